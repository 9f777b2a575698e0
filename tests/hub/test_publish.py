"""What a run becomes on the Hub, and the ways back from it."""

import json
import shutil
from pathlib import Path

import pytest
from hub_client import run_client
from hub_server import HubServer

from magdg import main
from magnification_invariant.hub import fetch, released, stage
from magnification_invariant.hub.doctor import examine
from magnification_invariant.model_folder import read_model_config

LAYOUT = {
    "README.md",
    "calibration.png",
    "config.json",
    "fixture.json",
    "fixture.png",
    "model.safetensors",
    "predictions.parquet",
    "results.json",
    "roc.png",
}
SIGNATURE = {"signature.json", "signature.safetensors"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - SIGNATURE


def test_a_run_is_staged_whole_and_the_same_every_time(tiny_run, tmp_path):
    staged = stage(tiny_run, "me/model", tmp_path / "one")
    assert names(staged) == LAYOUT
    again = stage(tiny_run, "me/model", tmp_path / "two")
    restaged = stage(staged, "me/model", tmp_path / "three")  # what was pulled can be pushed elsewhere
    for path in staged.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes() == (restaged / path.name).read_bytes(), path.name
    results = json.loads((staged / "results.json").read_text())
    assert results["comparison"].keys() == {"erm", "constant", "colour"}
    assert results["record"]["arguments"]["method"] == "dann" and results["seconds"] > 0


def test_paired_differences_are_of_the_same_images(tiny_runs, tmp_path):
    results = json.loads(
        (stage(tiny_runs / "erm-lomo200-fold0-seed0", "me/m", tmp_path / "m") / "results.json").read_text()
    )
    test = json.loads((tiny_runs / "dann-lomo200-fold0-seed0" / "results.json").read_text())["parts"]["test"]
    own = results["parts"]["test"]["patient_balanced"]["brier"]
    difference = results["comparison"]["dann"]["brier"]["difference"]
    assert difference == pytest.approx(own - test["patient_balanced"]["brier"])
    assert results["comparison"]["dann"]["brier"]["low"] is None  # two patients have no interval


def test_fold_0_and_seed_0_are_released(tiny_runs, tmp_path):
    assert {name: cell.name for name, cell in released(tiny_runs).items()} == {
        "test_magdg_resnet.other_lomo200_dann": "dann-lomo200-fold0-seed0",
        "test_magdg_resnet.other_lomo200_erm": "erm-lomo200-fold0-seed0",
    }
    other = shutil.copytree(tiny_runs / "dann-lomo200-fold0-seed0", tmp_path / "dann-lomo200-fold1-seed0")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"arguments": config["arguments"] | {"fold": 1}}))
    with pytest.raises(ValueError, match="no finished run of fold 0 and seed 0"):
        released(tmp_path)
    for copy in ("a", "b"):
        shutil.copytree(tiny_runs / "dann-lomo200-fold0-seed0", tmp_path / copy)
    with pytest.raises(ValueError, match=r"would both be test_magdg_resnet\.other_lomo200"):
        released(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["push", "{run}", "no-namespace"], "is no repository id"),
        (["push", "{run}", "../../etc/passwd"], "is no repository id"),
        (["push", "nowhere", "me/model"], "not the folder of a finished run: it lacks config.json"),
        (["push", "nowhere", "me", "--all"], "no finished run of fold 0"),
        (["pull", "me/model", "{run}"], "exists already"),
        (["doctor", "{run}"], "holds no fixture.json"),
        (["doctor", "nobody/nothing"], "Ways on"),
    ],
)
def test_bad_input_is_an_error_in_one_line(tiny_run, capsys, arguments, message):
    assert main([argument.format(run=tiny_run) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("magdg: error: ") and message in error and "Traceback" not in error


def test_dry_run_shows_files_sizes_and_card(tiny_run, capsys):
    assert main(["push", str(tiny_run), "me/model", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "model.safetensors" in printed and 'hf-hub:me/model"' in printed
    assert f"{(tiny_run / 'model' / 'model.safetensors').stat().st_size:,}" in printed


def test_pulled_from_a_folder_it_is_whole_without_what_runs_code(tiny_run, tmp_path):
    staged = stage(tiny_run, "me/model", tmp_path / "staged")
    (staged / "pytorch_model.bin").write_bytes(b"bomb")
    (staged / "loader.py").write_text("raise SystemExit")
    fetch(str(staged), tmp_path / "pulled")
    assert names(tmp_path / "pulled") == LAYOUT
    (staged / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model.safetensors"):
        fetch(str(staged), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_doctor_knows_the_model_and_another_one(tiny_run, tmp_path, capsys):
    report = examine(str(tiny_run / "model"))
    assert report.healthy and report.difference == 0
    assert main(["doctor", str(tiny_run / "model")]) == 0
    printed = capsys.readouterr().out
    for stated in ("OK: ", "equal bit for bit", "micrometres per pixel", "normalisation: mean [0.485", "torch "):
        assert stated in printed
    other = shutil.copytree(tiny_run / "model", tmp_path / "model")
    fixture = json.loads((other / "fixture.json").read_text())
    (other / "fixture.json").write_text(json.dumps(fixture | {"logits": [fixture["logits"][0] + 0.01, 0.0]}))
    assert main(["doctor", str(other)]) == 1
    assert "NOT what was saved" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture", "../../evil"),
        ("architecture", "hf-hub:evil/model"),
        ("label_names", ["benign", "<script>alert(1)</script>"]),
        ("name", "a/../../b"),
        ("temperature", 0),
        ("temperature", "1.0"),
        ("mpp_range", [2.0, 1.0]),
        ("mpp_range", [float("nan"), 1.0]),
        ("auto_map", {"AutoModel": "evil.Model"}),
        ("pretrained_cfg", {"file": "/etc/passwd"}),
        ("pretrained_cfg", {"url": "http://evil"}),
        ("pretrained_cfg", {"input_size": [3, 10**6, 10**6]}),
        ("pretrained_cfg", {"std": [0, 0, 0]}),
        ("pretrained_cfg", "text"),
    ],
)
def test_a_config_with_other_values_is_refused(tiny_run, tmp_path, key, value):
    config = json.loads((tiny_run / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=r"config.json of .* is (refused for|not a model's)"):
        read_model_config(str(tmp_path))


@pytest.mark.slow
def test_pushed_it_loads_everywhere(tiny_runs, tiny_run, tmp_path):
    """Push, again, all, branch, pull request, pull; then bare timm, the projector and offline, bit-equal."""
    code = f"""
from magdg import main

run, runs = {str(tiny_run)!r}, {str(tiny_runs)!r}
assert main(["push", run, "me/model"]) == 0
assert main(["push", run, "me/model"]) == 0
assert main(["push", run, "me/model", "--revision", "v1"]) == 0
assert main(["push", run, "me/hidden", "--private", "--create-pr"]) == 0
assert main(["push", runs, "me", "--all"]) == 0
assert main(["push", runs, "me", "--all"]) == 0
assert main(["pull", "me/model@v1", "pulled"]) == 0
assert main(["doctor", "me/model"]) == 0

import numpy as np, timm, torch
from PIL import Image
from magnification_invariant.signatures import SignatureProjector

model = timm.create_model("hf-hub:me/model", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.inference_mode():
    logits = model(transform(Image.open("pulled/fixture.png")).unsqueeze(0))[0].tolist()
assert logits == json.loads(Path("pulled/fixture.json").read_text())["logits"]
if Path("pulled/signature.json").exists():
    projector = SignatureProjector.from_pretrained("me/model")
    assert np.array_equal(projector.indices, SignatureProjector.from_pretrained("pulled").indices)

import huggingface_hub.constants
from magnification_invariant.hub_files import resolve
huggingface_hub.constants.HF_HUB_OFFLINE = True  # as HF_HUB_OFFLINE=1, which is read at import
again = timm.create_model("hf-hub:me/model", pretrained=True)
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
refused(resolve, "me/hidden", "config.json")
"""
    with HubServer() as hub:
        printed = run_client(hub, tmp_path / "client", code)
        assert names(tmp_path / "client" / "pulled") == LAYOUT
        assert hub.files("me/model").keys() - SIGNATURE == LAYOUT | {".gitattributes"}
        assert hub.commits("me/model") == ["initial commit", "test_magdg_resnet.other_lomo200_dann"]
        assert hub.repos["model", "me/hidden"].private and hub.repos["model", "me/hidden"].pull_requests == 1
        assert hub.commits("me/test_magdg_resnet.other_lomo200_erm")[1:] == ["test_magdg_resnet.other_lomo200_erm"]
    assert printed.count("unchanged, skipped") == 4  # v1 starts where main is
    assert "HF_HUB_OFFLINE is set" in printed and "hf_write" not in printed
