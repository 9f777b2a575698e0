"""The shared signature gives the estimator's numbers after a round trip, and refuses what is not its own."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from hub_server import HubServer

import magnification_invariant  # noqa: F401  (registers the models)
from magnification_invariant.models import embed
from magnification_invariant.signatures import SignatureProjector, SparseSignature, weights_digest


def fitted():
    rng = np.random.default_rng(0)
    y = np.arange(120) % 2
    x = rng.standard_normal((120, 20)) + 2 * np.eye(20)[y]
    return SparseSignature(lambda_fraction=0.2).fit(x, y), x


def projector(**about):
    signature, x = fitted()
    about = {"embedding": "penultimate", "source": "user/model", "mpp_range": (0.2, 1.5), **about}
    return SignatureProjector.from_signature(signature, **about), signature, x


def test_the_round_trip_is_bit_equal_to_the_estimator(tmp_path):
    made, signature, x = projector(revision="abc", stability={"nogueira": 0.7, "interval": [0.6, float("nan")]})
    made.save_pretrained(tmp_path / "deep" / "model")
    read = SignatureProjector.from_pretrained(tmp_path / "deep" / "model")
    assert sorted(p.name for p in (tmp_path / "deep" / "model").iterdir()) == [
        "signature.json",
        "signature.safetensors",
    ]
    assert (read.transform(x) == signature.transform(x)).all()
    assert (read.predict_proba(x) == made.predict_proba(x)).all()
    assert read.predict_proba(x) == pytest.approx(signature.predict_proba(x), abs=1e-12)
    assert read.predict_proba(x.astype(np.float32)) == pytest.approx(read.predict_proba(x), abs=1e-5)
    assert read.class_names == ("0", "1") and read.mpp_range == (0.2, 1.5)
    assert (read.width, read.embedding, read.source, read.revision) == (20, "penultimate", "user/model", "abc")
    assert read.stability == {"nogueira": 0.7, "interval": [0.6, None]}
    json.loads((tmp_path / "deep" / "model" / "signature.json").read_text(), parse_constant=pytest.fail)


def test_an_empty_signature_predicts_the_base_rate(tmp_path):
    rng = np.random.default_rng(0)
    signature = SparseSignature(lambda_fraction=1.0).fit(rng.standard_normal((40, 5)), np.arange(40) % 4 == 0)
    made = SignatureProjector.from_signature(signature, embedding="pyramid", source="here")
    made.save_pretrained(tmp_path)
    read = SignatureProjector.from_pretrained(tmp_path)
    assert len(read.indices) == 0 and read.transform(np.zeros((3, 5))).shape == (3, 0)
    assert read.predict_proba(np.zeros((3, 5)))[:, 1] == pytest.approx([0.25] * 3)
    none = np.empty(0)
    model = timm.create_model("test_magdg_resnet", num_classes=2).eval()
    parts = {"mean": none, "scale": none, "weight": np.empty((1, 0)), "bias": np.zeros(1), "width": model.num_features}
    parts |= {"class_names": ("benign", "malignant"), "embedding": "penultimate", "source": "here"}
    assert SignatureProjector(none.astype(int), **parts).as_module(model)(torch.zeros(2, 3, 32, 32)).shape == (2, 0)
    with pytest.raises(ValueError, match="integers, not float64"):
        SignatureProjector(none, **parts)


def test_what_is_not_its_own_is_refused():
    made, _, x = projector()
    with pytest.raises(ValueError, match=r"'penultimate' embeddings of 'user/model', \(rows, 20\)"):
        made.transform(x[:, :19])
    with pytest.raises(ValueError, match="kind 'penultimate', not 'pyramid'"):
        made.predict_proba(x, embedding="pyramid")
    with pytest.raises(ValueError, match="model 'user/model', not 'other'"):
        made.transform(x, source="other")
    with pytest.raises(ValueError, match="NaN"):
        made.transform(np.full((2, 20), np.nan))
    assert made.transform(x, embedding="penultimate", source="user/model").shape == (120, len(made.indices))


@pytest.mark.parametrize("name", ["signature.json", "signature.safetensors"])
def test_a_file_that_is_no_signature_is_refused_in_one_sentence(name, tmp_path):
    made, *_ = projector()
    made.save_pretrained(tmp_path)
    content = (tmp_path / name).read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    damaged = {
        "is a git-lfs pointer": pointer,
        "is empty": b"",
        "damaged": content[: len(content) // 2],
        "": b"<html>404</html>" + bytes(range(256)),
    }
    for message, damage in damaged.items():
        (tmp_path / name).write_bytes(damage)
        with pytest.raises(ValueError, match=f"{tmp_path / name}.*{message}") as error:
            SignatureProjector.from_pretrained(tmp_path)
        text = str(error.value)
        assert "\n" not in text and ("git lfs pull" in text or "fetch or write it again" in text)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no {name}.*git lfs pull"):
        SignatureProjector.from_pretrained(tmp_path)


def test_files_that_do_not_fit_together_are_refused(tmp_path):
    made, signature, _ = projector()
    made.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "signature.json").read_text())
    without = {name: value for name, value in written.items() if name != "class_names"}
    for content, message in (
        (written | {"format": 9}, "signature.json is not of format 1: update"),
        ([1, 2], "signature.json is not of format 1: update"),
        (written | {"width": 1}, "do not fit together .*in an embedding of 1.*git lfs pull"),
        (written | {"class_names": list("abc")}, "do not fit together .*3 classes"),
        (written | {"size": 1}, "do not fit together"),
        (written | {"colour": "red"}, "do not fit together .*colour"),
        (without, "do not fit together .*class_names"),
    ):
        (tmp_path / "signature.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            SignatureProjector.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="two classes apart, not 3"):
        SignatureProjector.from_signature(signature, class_names=list("abc"), embedding="pyramid", source="x")


def of_network(kind: str, **about):
    """A small network, images, and a signature of random dimensions of its embeddings."""
    torch.manual_seed(0)
    model = timm.create_model("test_magdg_resnet", num_classes=2).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        embedding = embed(model, images, kind)[1].numpy()
    width = embedding.shape[1]
    rng = np.random.default_rng(0)
    made = SignatureProjector(
        indices=np.sort(rng.choice(width, 9, replace=False)),
        mean=rng.standard_normal(9),
        scale=rng.uniform(0.5, 2, 9),
        weight=rng.standard_normal((1, 9)),
        bias=np.zeros(1),
        width=width,
        class_names=("benign", "malignant"),
        embedding=kind,
        source="test",
        **about,
    )
    return made, model, images, embedding


@pytest.mark.parametrize("kind", ["penultimate", "pyramid"])
def test_the_module_goes_from_images_to_signatures(kind):
    made, model, images, embedding = of_network(kind)
    module = made.as_module(model.train())
    with torch.inference_mode():
        assert module(images).numpy() == pytest.approx(made.transform(embedding), abs=1e-4)


def test_the_module_takes_its_own_network_alone(tmp_path):
    made, model, *_ = of_network("pyramid")
    with pytest.raises(ValueError, match="of 736 dimensions, not 1920"):
        made.as_module(timm.create_model("magerm_resnet18", num_classes=2))
    made, model, images, _ = of_network("penultimate", weights_sha256=weights_digest(model))
    made.save_pretrained(tmp_path)
    made = SignatureProjector.from_pretrained(tmp_path)
    plain = timm.create_model("test_resnet", num_classes=2)  # as the published model: without the domain head
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("domain_head.")})
    with torch.inference_mode():
        assert torch.equal(made.as_module(plain)(images), made.as_module(model)(images))
        plain.layer1[0].conv1.weight[0, 0, 0, 0] += 1e-6
    with pytest.raises(ValueError, match="not the weights of 'test'"):
        made.as_module(plain)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["penultimate", "pyramid"])
def test_onnx_runtime_gives_the_same_signatures(kind, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    made, model, images, embedding = of_network(kind)
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.onnx.export(
        made.as_module(model), (images,), dynamo=True, dynamic_shapes=({0: batch},), input_names=["images"]
    )
    program.save(tmp_path / "signature.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "signature.onnx", providers=["CPUExecutionProvider"])
    for part in (slice(0, 4), slice(1, 2)):
        (found,) = session.run(None, {"images": images[part].numpy()})
        assert found == pytest.approx(made.transform(embedding[part]), abs=1e-3)


@pytest.mark.slow
def test_it_goes_to_the_hub_and_back_beside_the_model(tmp_path):
    made, _, x = projector()
    made.save_pretrained(tmp_path / "made")
    np.save(tmp_path / "x.npy", x)
    code = """
import numpy as np
from magnification_invariant.signatures import SignatureProjector

made = SignatureProjector.from_pretrained("made")
print(made.push_to_hub("me/model", message="a signature"))
for read in (SignatureProjector.from_pretrained("me/model"), SignatureProjector.from_pretrained("me/model", "main")):
    x = np.load("x.npy")
    assert (read.predict_proba(x) == made.predict_proba(x)).all() and read.source == made.source
try:
    SignatureProjector.from_pretrained("me/none")
except FileNotFoundError as error:
    print("REFUSED", error)
"""
    with HubServer() as hub:
        hub.create("me/model", {"config.json": b"{}", "model.safetensors": b"weights"})
        env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        env |= hub.env(tmp_path / "home")
        done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "REFUSED me/none is neither a folder nor a Hub repository that gives signature.json" in done.stdout
        assert hub.commits("me/model") == ["initial commit", "a signature"]
        own = {".gitattributes", "config.json", "model.safetensors"}
        assert hub.files("me/model").keys() == own | {"signature.json", "signature.safetensors"}
        assert hub.files("me/model")["model.safetensors"] == b"weights"
