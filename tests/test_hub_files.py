"""Files to and from a Hub, here one on loopback. The client is a process of its own, see hub_server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

pytestmark = pytest.mark.slow


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def run_client(hub: HubServer, folder: Path, code: str) -> str:
    """Runs Python text as a client of the Hub, in `folder`; gives back what it prints."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= hub.env(folder / "home")
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_models(hub, tmp_path):
    folder = tmp_path / "model"
    (folder / "more").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlibrary_name: timm\n---\n# A model\n")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (folder / "more" / "empty.bin").write_bytes(b"")
    (folder / ".cache").write_text("hidden")
    hub.create("other/model", private=True)
    hub.create("me/data", {"data/old.parquet": b"1", "data/notes.txt": b"2"}, repo_type="dataset")
    code = """
import os
from pathlib import Path
from magnification_invariant.hub_files import resolve, upload

# What is uploaded comes back, from branches too.
print("URL", upload("model", "me/made", private=True, message="first"))
upload("model", "me/made", revision="try", message="on a branch")
Path("model/config.json").write_text('{"changed": true}')
print("PR", upload("model", "me/made", create_pr=True))
Path("model/config.json").write_text("{}")
for at in ("me/made", "hf-hub:me/made", "me/made@try"):
    for path in Path("model").rglob("[!.]*"):
        if path.is_file():
            name = path.relative_to("model").as_posix()
            assert resolve(at, name).read_bytes() == path.read_bytes(), (at, name)
upload("model", "me/data", repo_type="dataset", replace="data/*.parquet", message="new")

# As timm does it.
import timm, torch
model = timm.create_model("resnet18", num_classes=2)
timm.models.push_to_hf_hub(model, "me/timm-model", safe_serialization=True, model_config={"label_names": ["a", "b"]})
again = timm.create_model("hf-hub:me/timm-model", pretrained=True)
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))

# Refusals say what and where.
def refused(what, *arguments):
    try:
        what(*arguments)
    except (OSError, ValueError) as error:
        print("REFUSED", str(error).splitlines()[0])

refused(resolve, "me/made", "absent.json")
Path("model/README.md").write_text("no YAML")
refused(upload, "model", "me/no-card")
for token in ("hf_read", "hf_unknown"):
    os.environ["HF_TOKEN"] = token
    refused(upload, "model", "me/not-made")
    refused(resolve, "other/model", "config.json")
"""
    printed = run_client(hub, tmp_path, code)
    assert f"URL {hub.endpoint}/me/made/commit/" in printed and f"PR {hub.endpoint}/me/made/discussions/1" in printed
    assert hub.files("me/made").keys() == {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
        "more/empty.bin",
    }
    assert hub.repos["model", "me/made"].private
    assert hub.commits("me/made")[:2] == ["initial commit", "first"]  # one commit, however many files
    assert "model.safetensors" in hub.files("me/timm-model")

    assert hub.commits("me/data", repo_type="dataset") == ["initial commit", "new"]
    files = hub.files("me/data", repo_type="dataset")
    assert "data/old.parquet" not in files and "data/notes.txt" in files and "model.safetensors" in files

    assert "REFUSED me/made is neither a folder nor a Hub repository that gives absent.json" in printed
    assert "REFUSED Invalid metadata in README.md" in printed and hub.commits("me/no-card") == ["initial commit"]
    assert printed.count("REFUSED model could not be uploaded to the model repository me/not-made") == 2
    assert printed.count("REFUSED other/model is neither a folder nor a Hub repository") == 2
    assert ("model", "me/not-made") not in hub.repos


def test_data_sets(hub, tmp_path, breakhis_tree):
    code = f"""
import datasets, numpy as np
from magnification_invariant.cli import main
from magnification_invariant.data.breakhis import load_breakhis

assert main(["prepare", {str(breakhis_tree)!r}, "--push", "me/breakhis"]) == 0
ds = load_breakhis({str(breakhis_tree)!r})

def same(other):
    assert other.features == ds.features, other.features
    for row, wanted in zip(other, ds, strict=True):
        assert np.array_equal(np.asarray(row.pop("image")), np.asarray(wanted.pop("image")))
        assert row == wanted

same(load_breakhis("me/breakhis"))
same(load_breakhis("me/breakhis@main", streaming=True))
same(datasets.load_dataset("me/breakhis", split="train"))
ds.push_to_hub("me/pushed")  # as datasets itself does it
same(load_breakhis("me/pushed"))
ds.select_columns(["image"]).push_to_hub("me/mirror", private=True)  # a mirror with nothing but named images
same(load_breakhis("me/mirror"))
same(load_breakhis("me/mirror", streaming=True))
try:
    load_breakhis("me/absent")
except FileNotFoundError as error:
    print(error)
"""
    assert "me/absent is neither here nor a Hub dataset" in run_client(hub, tmp_path, code)
    assert hub.repos["dataset", "me/breakhis"].private
    assert len(hub.commits("me/breakhis", repo_type="dataset")) == 2
