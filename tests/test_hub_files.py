"""Files to and from a Hub, here one on loopback. The client is a process of its own, see hub_client."""

import json
import os
import pickle
import signal

import pytest
from hub_client import run_client, start_client
from hub_server import HubServer

pytestmark = pytest.mark.slow


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def test_models(hub, tmp_path):
    folder = tmp_path / "model"
    (folder / "more").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlibrary_name: timm\n---\n# A model\n")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (folder / "more" / "empty.json").write_bytes(b"")
    (folder / ".cache").write_text("hidden")
    hub.create("other/model", private=True)
    code = """
from magnification_invariant.hub_files import resolve, upload

# What is uploaded comes back, from branches too.
print("URL", upload("model", "me/made", private=True, message="first"))
upload("model", "me/made", revision="try", message="on a branch")
Path("model/config.json").write_text('{"changed": true}')
print("PR", upload("model", "me/made", create_pr=True))
assert upload("model", "me/made", revision="b") and not upload("model", "me/made", revision="b")  # nothing new
Path("model/config.json").write_text("{}")
for at in ("me/made", "hf-hub:me/made", "me/made@try"):
    for path in Path("model").rglob("[!.]*"):
        if path.is_file():
            name = path.relative_to("model").as_posix()
            assert resolve(at, name).read_bytes() == path.read_bytes(), (at, name)

# As timm does it.
import timm, torch
model = timm.create_model("resnet18", num_classes=2)
timm.models.push_to_hf_hub(model, "me/timm-model", safe_serialization=True, model_config={"label_names": ["a", "b"]})
again = timm.create_model("hf-hub:me/timm-model", pretrained=True)
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))

# Refusals say what and where.
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
        "more/empty.json",
    }
    assert hub.repos["model", "me/made"].private
    assert hub.commits("me/made")[:2] == ["initial commit", "first"]  # one commit, however many files
    assert "model.safetensors" in hub.files("me/timm-model")

    assert "REFUSED me/made is neither a folder nor a Hub repository that gives absent.json" in printed
    assert "REFUSED Invalid metadata in README.md" in printed and hub.commits("me/no-card") == ["initial commit"]
    assert printed.count("REFUSED model could not be uploaded to the repository me/not-made") == 2
    assert printed.count("REFUSED other/model is neither a folder nor a Hub repository") == 2
    assert ("model", "me/not-made") not in hub.repos


def test_data_sets(hub, tmp_path, breakhis_tree):
    code = f"""
import datasets, numpy as np
from magnification_invariant.data.breakhis import load_breakhis

ds = load_breakhis({str(breakhis_tree)!r})

def same(other):
    assert other.features == ds.features, other.features
    for row, wanted in zip(other, ds, strict=True):
        assert np.array_equal(np.asarray(row.pop("image")), np.asarray(wanted.pop("image")))
        assert row == wanted

ds.push_to_hub("me/breakhis", private=True)
same(load_breakhis("me/breakhis"))
same(load_breakhis("me/breakhis@main"))
ds.select_columns(["image"]).push_to_hub("me/mirror", private=True)  # a mirror with nothing but named images
same(load_breakhis("me/mirror"))
try:
    load_breakhis("me/absent")
except FileNotFoundError as error:
    print(error)
"""
    assert "me/absent is neither here nor a Hub dataset" in run_client(hub, tmp_path, code)
    assert hub.repos["dataset", "me/breakhis"].private


CONTENT = bytes(range(256)) * 4000  # 1 MB


def test_downloads_that_fail_leave_no_half_file_and_succeed_the_next_time(hub, tmp_path):
    """Each misfortune outlasts the client's own patience: an error that says what to do; then the same call works."""
    hub.create("me/model", {"model.safetensors": CONTENT, "config.json": b"{}"})
    code = """
import resource, shutil
from magnification_invariant.hub_files import resolve, snapshot

def assert_nothing_is_half():
    cached = [path for path in Path("home").rglob("snapshots/*/*") if path.is_file()]
    assert all(path.stat().st_size in (2, 1_024_000) for path in cached), cached

def read():
    return [resolve("me/model", name).read_bytes() for name in ("config.json", "model.safetensors")]

for pattern, what, times in (
    ("HEAD .*resolve", 500, 200),
    ("GET /store", 503, 200),
    ("GET /store", "drop", 20),
    ("GET /store", "damage", 1),
    ("GET .*config.json", "damage", 1),
):
    fault(pattern, what, times)
    refused(read)
    fault()
    assert_nothing_is_half()
    assert [len(content) for content in read()] == [2, 1_024_000] and snapshot("me/model").is_dir()
    shutil.rmtree("home")

fault("GET /store", "drop")  # once: the client goes on where it was cut off
read()
shutil.rmtree("home")

for status in (429, 500, 503):  # what passes is waited for
    fault("HEAD .*resolve/main/config.json", status)
    read()
    shutil.rmtree("home")
    fault("GET .*/api/models", status)  # the client itself does not try this again
    snapshot("me/model")
    shutil.rmtree("home")

soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))  # as a full disk: no file can become larger
refused(read)
assert_nothing_is_half()
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
read()
"""
    printed = run_client(hub, tmp_path, code)
    assert printed.count("REFUSED") == 6 and printed.count("Ways on: publish") == 2, printed
    assert printed.count("the server's trouble and not this machine's") == 2 and "answered 503" in printed
    assert printed.count("arrived damaged (its checksum is wrong) and was removed; try again") == 2


def test_a_client_that_is_killed_leaves_no_half_file(hub, tmp_path):
    hub.create("me/model", {"model.safetensors": CONTENT})
    hub.fail("GET /store", "stall")
    code = """
from magnification_invariant.hub_files import resolve
assert resolve("me/model", "model.safetensors").stat().st_size == 1_024_000
"""
    client = start_client(hub, tmp_path, code)
    assert hub.stalled.wait(120), (tmp_path / "printed.txt").read_text()
    os.kill(client.pid, signal.SIGKILL)
    client.join()
    hub.go_on.set()
    assert not [path for path in (tmp_path / "home").rglob("snapshots/*/*") if path.is_file()]
    run_client(hub, tmp_path, code)


def test_uploads_that_fail_commit_nothing_by_halves_and_succeed_the_next_time(hub, tmp_path):
    code = """
import os
from magnification_invariant.hub_files import upload

Path("model").mkdir()
Path("model/README.md").write_text("---\\nlibrary_name: timm\\n---\\n")
for i, (pattern, what) in enumerate((
    ("POST .*/commit/", 500),
    ("POST .*/commit/", "meanwhile"),
    ("POST .*/preupload/", 500),
    ("POST .*/objects/batch", 500),
    ("PUT /store", 500),
    ("PUT /store", "drop"),
)):
    Path("model/config.json").write_text(str(i))
    Path("model/model.safetensors").write_bytes(os.urandom(100_000))
    fault(pattern, what, 1 if what == "meanwhile" else 200)
    refused(upload, "model", "me/model", message=str(i))
    fault()
    assert upload("model", "me/model", message=str(i))

Path("model/config.json").write_text("last")
fault("POST .*/commit/", "drop")  # done, but the answer is lost
refused(upload, "model", "me/model", message="last")
fault()
assert not upload("model", "me/model", message="last")

os.environ["HF_TOKEN"] = "hf_read"
Path("model/config.json").write_text("mine?")
refused(upload, "model", "me/model")
"""
    printed = run_client(hub, tmp_path, code)
    assert printed.count("Nothing was committed by halves; the same command goes on") == 8, printed
    assert "hf_" not in printed  # no token
    titles = hub.commits("me/model")
    assert titles == ["initial commit", "0", "somebody else's", "1", "2", "3", "4", "5", "last"]
    for commit in hub.repos["model", "me/model"].commits[1:]:
        assert {"README.md", "config.json", "model.safetensors"} <= commit["files"].keys()
    assert hub.files("me/model")["other.txt"] == b"theirs"


def test_weights_that_can_run_code_are_refused(hub, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    bomb = pickle.dumps({"fc.weight": Bomb()}, protocol=2)  # as torch writes
    config = {"architecture": "test_resnet", "num_classes": 2, "pretrained_cfg": {}}
    files = {"pytorch_model.bin": bomb, "config.json": json.dumps(config).encode()}
    hub.create("me/magerm_resnet18.breakhis", files)
    code = """
import timm
from magnification_invariant.hub import fetch
from magnification_invariant.hub_files import resolve, snapshot

name = "magerm_resnet18.breakhis"
refused(timm.create_model, name, pretrained=True)
refused(resolve, f"me/{name}", "pytorch_model.bin")
refused(fetch, f"me/{name}", "pulled")
assert not (snapshot(f"me/{name}") / "pytorch_model.bin").exists() and not Path("pulled").exists()
try:
    timm.create_model(f"hf-hub:me/{name}", pretrained=True)
except RuntimeError as error:
    assert "weights_only=True" in str(error)
    print("timm refuses it too")
"""
    printed = run_client(hub, tmp_path, code, MAGDG_HUB_NAMESPACE="me")
    assert not (tmp_path / "exploded").exists()
    assert "REFUSED me/magerm_resnet18.breakhis is neither a folder nor a Hub repository that gives model" in printed
    assert "REFUSED pytorch_model.bin of me/magerm_resnet18.breakhis is not read" in printed
    assert "REFUSED me/magerm_resnet18.breakhis holds no model.safetensors" in printed
    assert "timm refuses it too" in printed
