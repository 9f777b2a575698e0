"""What a run becomes on the Hub, the ways back from it, and what is said of a damaged one."""

import json
import shutil
from pathlib import Path

import pytest
from fabricated import add_model, write_run
from hub_client import run_client
from hub_server import HubServer

from magdg import main
from magnification_invariant.files import read_json, write_json
from magnification_invariant.hub import fetch, released, stage
from magnification_invariant.hub.doctor import examine
from magnification_invariant.model_folder import read_model_config
from magnification_invariant.records import Run
from magnification_invariant.report.runs import difference

LAYOUT = {"README.md", "calibration.png", "config.json", "fixture.json", "fixture.png", "model.safetensors"}
LAYOUT |= {"predictions.parquet", "results.json", "roc.png", "signature.json", "signature.safetensors"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_and_its_model_are_staged_whole_and_the_same_every_time(run, tmp_path):
    staged = stage(run, "me/model", tmp_path / "one")
    assert names(staged) == LAYOUT
    by_model = stage(run / "model", "me/model", tmp_path / "two")
    restaged = stage(staged, "me/model", tmp_path / "three")  # what was pulled can be pushed elsewhere
    for path in staged.iterdir():
        assert path.read_bytes() == (by_model / path.name).read_bytes() == (restaged / path.name).read_bytes(), (
            path.name
        )
    results = read_json(staged / "results.json")
    assert results["comparison"].keys() == {"erm", "constant", "colour"}
    assert results["record"]["cell"]["method"] == "dann" and results["seconds"] == 60
    with pytest.raises(ValueError, match="exists already"):
        stage(run, "me/model", tmp_path / "one")


def test_a_model_without_its_run_needs_its_own_results_alone(run, tmp_path):
    alone = shutil.copytree(run / "model", tmp_path / "alone")
    card = (stage(alone, "me/model", tmp_path / "staged") / "README.md").read_text()
    assert "`dann`" in card and "This model minus another" not in card
    results = read_json(alone / "results.json")
    del results["record"]
    write_json(alone / "results.json", results)
    with pytest.raises(ValueError, match="no record names its cell"):
        stage(alone, "me/model", tmp_path / "again")


def test_paired_differences_are_the_reports(grid, run, tmp_path):
    erm = Run(next(grid.glob("erm*")))
    results = read_json(stage(erm.folder, "me/m", tmp_path / "m") / "results.json")
    assert results["comparison"]["dann"]["brier"] == difference([erm], [Run(run)], "brier")._asdict()
    brier = {r.method: r.results["parts"]["test"]["patient_balanced"]["brier"] for r in (erm, Run(run))}
    assert results["comparison"]["dann"]["brier"]["difference"] == pytest.approx(brier["erm"] - brier["dann"])


def test_fold_0_and_seed_0_are_released(grid, run, tmp_path):
    assert {name: folder.name.split("200")[0] for name, folder in released(grid).items()} == {
        "test_magdg_resnet.other_lomo200_dann": "dann",
        "test_magdg_resnet.other_lomo200_erm": "erm",
    }
    add_model(write_run(tmp_path, "dann", 200, fold=1), tmp_path)
    with pytest.raises(ValueError, match="no finished run of fold 0 and seed 0"):
        released(tmp_path)
    for copy in ("a", "b"):
        shutil.copytree(run, tmp_path / copy)
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
        (["doctor", "nobody/nothing"], "Ways on"),
    ],
)
def test_bad_input_is_an_error_in_one_line(run, capsys, arguments, message):
    assert main([argument.format(run=run) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("magdg: error: ") and message in error and "Traceback" not in error


def test_dry_run_shows_files_sizes_and_card(run, capsys):
    assert main(["push", str(run), "me/model", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "model.safetensors" in printed and 'hf-hub:me/model"' in printed
    assert f"{(run / 'model' / 'model.safetensors').stat().st_size:,}" in printed


def test_pulled_from_a_folder_it_is_whole_without_what_runs_code(run, tmp_path):
    staged = stage(run, "me/model", tmp_path / "staged")
    (staged / "pytorch_model.bin").write_bytes(b"bomb")
    (staged / "loader.py").write_text("raise SystemExit")
    fetch(str(staged), tmp_path / "pulled")
    assert names(tmp_path / "pulled") == LAYOUT
    (staged / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model.safetensors"):
        fetch(str(staged), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_doctor_knows_the_model_and_another_one(run, tmp_path, capsys):
    report = examine(str(run))
    assert report.healthy and report.difference == 0
    assert main(["doctor", str(run / "model")]) == 0
    printed = capsys.readouterr().out
    for stated in ("OK: ", "equal bit for bit", "filled the input: 0.2 to 0.8", "normalisation: mean [0.485", "torch "):
        assert stated in printed
    other = shutil.copytree(run / "model", tmp_path / "model")
    fixture = read_json(other / "fixture.json")
    write_json(other / "fixture.json", fixture | {"logits": [fixture["logits"][0] + 0.01, 0.0]})
    assert main(["doctor", str(other)]) == 1
    assert "NOT what was saved" in capsys.readouterr().out


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n"
READ = sorted(LAYOUT - {"README.md", "calibration.png", "roc.png"})


@pytest.mark.parametrize("file", READ)
@pytest.mark.parametrize("damage", ["pointer", "cut", "empty", "page", "missing"])
def test_a_damaged_file_is_named_with_the_way_on(run, tmp_path, capsys, file, damage):
    folder = shutil.copytree(run / "model", tmp_path / "model")
    content = (folder / file).read_bytes()
    damaged = {"pointer": POINTER, "cut": content[: len(content) // 2], "empty": b"", "page": b"<!doctype html>"}
    (folder / file).write_bytes(damaged.get(damage, b""))
    if damage == "missing":
        (folder / file).unlink()
        if file in ("results.json", "predictions.parquet"):  # a prediction does without
            return
    words = {"pointer": "git-lfs pointer", "cut": "damaged or cut", "empty": "is empty", "page": "is a web page"}
    assert main(["doctor", str(folder)]) == 2
    error = capsys.readouterr().err
    assert file in error and "Traceback" not in error and error.count("\n") == 1
    assert damage == "missing" or (words[damage] in error and "fetch it again (git lfs pull" in error)
    if file.startswith(("model.", "signature")) and damage != "missing":
        with pytest.raises(ValueError, match=file):
            stage(folder, "me/model", tmp_path / "staged")
        assert not (tmp_path / "staged").exists()


def test_files_of_another_model_are_said(run, tmp_path, capsys):
    folder = shutil.copytree(run / "model", tmp_path / "model")
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"architecture": "magdg_resnet18"})
    assert main(["doctor", str(folder)]) == 2
    assert "model.safetensors holds other weights than those of a magdg_resnet18" in capsys.readouterr().err
    write_json(folder / "config.json", config)
    signature = read_json(folder / "signature.json")
    write_json(folder / "signature.json", signature | {"weights_sha256": "0" * 64})
    assert main(["doctor", str(folder)]) == 2
    assert "signature.safetensors is another model's" in capsys.readouterr().err


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
def test_a_config_with_other_values_is_refused(run, tmp_path, key, value):
    config = read_json(run / "model" / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))  # also with NaN
    with pytest.raises(ValueError, match=r"config.json of .* is (refused for|not a model's)"):
        read_model_config(str(tmp_path))


@pytest.mark.slow
def test_pushed_it_loads_everywhere(grid, run, tmp_path):
    """Push, again, all, branch, pull request, pull; then bare timm, the projector and offline, bit-equal."""
    code = f"""
from magdg import main

run, runs = {str(run)!r}, {str(grid)!r}
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
        assert hub.files("me/model").keys() == LAYOUT | {".gitattributes"}
        assert hub.commits("me/model") == ["initial commit", "test_magdg_resnet.other_lomo200_dann"]
        assert hub.repos["model", "me/hidden"].private and hub.repos["model", "me/hidden"].pull_requests == 1
        assert hub.commits("me/test_magdg_resnet.other_lomo200_erm")[1:] == ["test_magdg_resnet.other_lomo200_erm"]
    assert printed.count("unchanged, skipped") == 4  # v1 starts where main is
    assert "HF_HUB_OFFLINE is set" in printed and "hf_write" not in printed
