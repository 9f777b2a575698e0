"""Search is exact, leaves the query's own patient out, and compares what `predict` gives."""

import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from magdg import main
from magnification_invariant.data.breakhis import load_breakhis
from magnification_invariant.predict import Classifier
from magnification_invariant.predict.search import FILE, SignatureIndex, build_index, nearest, similar_cases, unit
from magnification_invariant.signatures import SignatureProjector, weights_digest


def test_search_is_exact():
    rng = np.random.default_rng(0)
    gallery, queries = unit(rng.standard_normal((230, 12))), unit(rng.standard_normal((9, 12)))
    groups, own = rng.integers(20, size=230).astype(str), rng.integers(20, size=9).astype(str)
    for mine in (None, own):
        found, similarity = nearest(queries, gallery, 10, mine, groups)
        score = queries.astype(float) @ gallery.T.astype(float)
        if mine is not None:
            score[mine[:, None] == groups] = -np.inf
        assert (found == np.argsort(-score, axis=1)[:, :10]).all()
        assert similarity == pytest.approx(-np.sort(-score, axis=1)[:, :10], abs=1e-6)


def test_fewer_cases_than_asked_for():
    gallery = unit(np.eye(3))
    found, similarity = nearest(gallery[:1], gallery, 5, ["a"], ["a", "b", "c"])
    assert found.tolist() == [[1, 2, -1]] and np.isinf(similarity[0, 2])
    assert nearest(gallery[:1], gallery[:0], 2)[0].shape == (1, 0)


def test_padding_changes_no_cosine():
    x = np.random.default_rng(0).standard_normal((5, 13))
    padded = unit(x)
    assert padded.shape == (5, 16)
    assert padded @ padded.T == pytest.approx((x @ x.T) / np.outer(*[np.linalg.norm(x, axis=1)] * 2), abs=1e-6)
    assert not unit(np.zeros((2, 3))).any()


@pytest.fixture(scope="module")
def classifier(tiny_model, breakhis_tree, tmp_path_factory):
    """The tiny model with a signature of ten dimensions, standardised on the images."""
    folder = tmp_path_factory.mktemp("signed") / "model"
    shutil.copytree(tiny_model, folder)
    model = Classifier.from_pretrained(folder, device="cpu")
    x = np.stack([row["embedding"] for row in model.predict(load_breakhis(breakhis_tree))])
    chosen = np.flatnonzero(x.std(0) > 0.1 * x.std(0).max())[:10]
    arrays = {"indices": chosen, "mean": x[:, chosen].mean(0), "scale": x[:, chosen].std(0)}
    weights = {"weight": np.ones((1, 10)), "weights_sha256": weights_digest(model.network.model)}
    replace(model.projector, **arrays, **weights).save_pretrained(folder)
    return Classifier.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def index(classifier, breakhis_tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    build_index(classifier, load_breakhis(breakhis_tree), folder)
    return folder


def test_the_index_holds_the_signatures_that_predict_gives_in_half_precision(index, classifier, breakhis_tree):
    ds = load_breakhis(breakhis_tree)
    schema = pq.read_schema(index / FILE)
    assert str(schema.field("signature").type).startswith("fixed_size_list") and "halffloat" in str(schema)
    read = SignatureIndex.load(index)
    assert read.vectors == pytest.approx(unit([row["signature"] for row in classifier.predict(ds)]), abs=1e-3)
    assert read.vectors.shape == (32, 16) and read.about["size"] == 10
    assert read.cases["filename"].to_pylist() == ds["filename"][:]
    assert set(read.cases["label"].to_pylist()) == {"benign", "malignant"}
    assert [p.name for p in index.iterdir()] == [FILE]


def test_the_own_patient_is_left_out(index, classifier):
    read = SignatureIndex.load(index)
    case = read.cases.slice(9, 1).to_pylist()[0]
    cases, patient = similar_cases(read, classifier, case["picture"], k=40)
    assert patient == case["patient"] and patient not in cases["patient"].to_pylist()
    assert len(cases) == 32 - read.cases["patient"].to_pylist().count(patient)
    assert (np.diff(cases["similarity"]) <= 0).all()
    cases, _ = similar_cases(read, classifier, case["picture"], k=3, patient="somebody else")
    assert cases["filename"][0].as_py() == case["filename"] and cases["similarity"][0].as_py() > 0.999
    cases, _ = similar_cases(read, classifier, case["picture"], k=40, magnification=100)
    assert set(cases["magnification"].to_pylist()) == {100}


def test_the_command_builds_and_searches(index, classifier, breakhis_tree, tmp_path, capsys):
    image = SignatureIndex.load(index).cases["picture"][0].as_py()
    build = ["--build", classifier.source, "--data", str(breakhis_tree)]
    assert main(["search", image, "--index", str(tmp_path / "new"), *build, "-k", "2"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("wrote") and "left out" in out[1] and len(out) == 4
    assert out[2].endswith(".png") and "X " in out[2]
    for wrong, message in (
        (["--index", str(index)], "give an IMAGE"),
        ([image, "--index", str(tmp_path)], "holds no index"),
        (["none.png", "--index", str(index)], "no image none.png"),
    ):
        assert main(["search", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_another_model_is_refused(index, classifier):
    read = SignatureIndex.load(index)
    changed = replace(read, about=read.about | {"weights_sha256": "0" * 64})
    with pytest.raises(ValueError, match=r"no longer\) the model that made this index"):
        similar_cases(changed, classifier, read.cases["picture"][0].as_py())


def test_wrong_signatures_are_refused(index):
    with pytest.raises(ValueError, match="signatures of 10 dimensions, not"):
        SignatureIndex.load(index).search(np.zeros((1, 4)))


def test_a_model_without_a_signature_or_with_an_empty_one_cannot_compare(classifier, index, breakhis_tree, tmp_path):
    folder = shutil.copytree(classifier.folder, tmp_path / "model")
    arrays = {name: np.zeros(0) for name in ("mean", "scale")} | {"weight": np.zeros((1, 0))}
    replace(SignatureProjector.from_pretrained(folder), indices=np.zeros(0, int), **arrays).save_pretrained(folder)
    read = SignatureIndex.load(index)
    for what in ("an empty signature", "no signature"):
        unsigned = Classifier.from_pretrained(folder, device="cpu")
        with pytest.raises(ValueError, match=f"has {what}: cases cannot be compared by it"):
            build_index(unsigned, load_breakhis(breakhis_tree), tmp_path / "index")
        with pytest.raises(ValueError, match=what):
            similar_cases(read, unsigned, read.cases["picture"][0].as_py())
        for file in folder.glob("signature.*"):
            file.unlink()
    assert not list((tmp_path / "index").glob("*"))
