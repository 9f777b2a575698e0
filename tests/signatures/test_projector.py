"""The shared signature gives the estimator's numbers after a round trip, and refuses what is not its own."""

import json

import numpy as np
import pytest

from magnification_invariant.signatures import SignatureProjector, SparseSignature


def fitted(classes: int = 2):
    rng = np.random.default_rng(0)
    y = np.arange(120) % classes
    x = rng.standard_normal((120, 20)) + 2 * np.eye(20)[y]
    return SparseSignature(lambda_fraction=0.2).fit(x, y), x


def projector(classes: int = 2, **about):
    signature, x = fitted(classes)
    about = {"embedding": "penultimate", "source": "user/model", "mpp_range": (0.2, 1.5), **about}
    return SignatureProjector.from_signature(signature, **about), signature, x


@pytest.mark.parametrize("classes", [2, 3])
def test_the_round_trip_is_bit_equal_to_the_estimator(classes, tmp_path):
    made, signature, x = projector(
        classes, revision="abc", stability={"nogueira": 0.7, "interval": [0.6, float("nan")]}
    )
    made.save_pretrained(tmp_path / "deep" / "model")
    read = SignatureProjector.from_pretrained(tmp_path / "deep" / "model")
    assert sorted(p.name for p in (tmp_path / "deep" / "model").iterdir()) == [
        "signature.json",
        "signature.safetensors",
    ]
    assert (read.transform(x) == signature.transform(x)).all()
    assert (read.predict_proba(x) == made.predict_proba(x)).all()
    assert read.predict_proba(x) == pytest.approx(signature.predict_proba(x), abs=1e-12)
    assert read.class_names == tuple(map(str, range(classes))) and read.mpp_range == (0.2, 1.5)
    assert (read.width, read.embedding, read.source, read.revision) == (20, "penultimate", "user/model", "abc")
    assert read.stability == {"nogueira": 0.7, "interval": [0.6, None]}
    json.loads((tmp_path / "deep" / "model" / "signature.json").read_text(), parse_constant=pytest.fail)


def test_float32_embeddings_are_taken():
    made, _, x = projector()
    assert made.predict_proba(x.astype(np.float32)) == pytest.approx(made.predict_proba(x), abs=1e-5)


def test_an_empty_signature_predicts_the_base_rate(tmp_path):
    rng = np.random.default_rng(0)
    signature = SparseSignature(lambda_fraction=1.0).fit(rng.standard_normal((40, 5)), np.arange(40) % 4 == 0)
    made = SignatureProjector.from_signature(signature, embedding="pyramid", source="here")
    made.save_pretrained(tmp_path)
    read = SignatureProjector.from_pretrained(tmp_path)
    assert read.transform(np.zeros((3, 5))).shape == (3, 0)
    assert read.predict_proba(np.zeros((3, 5)))[:, 1] == pytest.approx([0.25] * 3)


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


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"signature\.json and signature\.safetensors missing"):
        SignatureProjector.from_pretrained(tmp_path)
    made, signature, _ = projector()
    made.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "signature.json").read_text())
    for change, message in (
        ({"format": 9}, "format 1"),
        ({"width": 1}, "in an embedding of 1"),
        ({"class_names": list("abc")}, "3 classes"),
    ):
        (tmp_path / "signature.json").write_text(json.dumps({**about, **change}))
        with pytest.raises(ValueError, match=message):
            SignatureProjector.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="3 class names for 2 classes"):
        SignatureProjector.from_signature(signature, class_names=list("abc"), embedding="pyramid", source="x")
