"""Search is exact, leaves the query's own patient out, and its precision is what counting by hand gives."""

import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from magdg import main
from magnification_invariant.data.breakhis import load_breakhis
from magnification_invariant.predict.search import (
    FILE,
    SignatureIndex,
    SignedModel,
    build_index,
    find,
    nearest,
    precision_at,
    unit,
)
from magnification_invariant.signatures import weights_digest


@pytest.mark.parametrize("block", [7, 100, 8192])
def test_search_is_exact_whatever_the_blocks(block):
    rng = np.random.default_rng(0)
    gallery, queries = unit(rng.standard_normal((230, 12))), unit(rng.standard_normal((9, 12)))
    groups, own = rng.integers(20, size=230).astype(str), rng.integers(20, size=9).astype(str)
    for mine in (None, own):
        found, similarity = nearest(queries, gallery, 10, mine, groups, block=block)
        score = queries.astype(float) @ gallery.T.astype(float)
        if mine is not None:
            score[mine[:, None] == groups] = -np.inf
        assert (found == np.argsort(-score, axis=1)[:, :10]).all()
        assert similarity == pytest.approx(-np.sort(-score, axis=1)[:, :10], abs=1e-6)


def test_fewer_cases_than_asked_for():
    gallery = unit(np.eye(3))
    found, similarity = nearest(gallery[:1], gallery, 5, ["a"], ["a", "b", "c"])
    assert sorted(found[0]) == [-1, -1, -1, 1, 2] and np.isinf(similarity[0, 2:]).all()
    assert nearest(gallery[:1], gallery[:0], 2)[0].tolist() == [[-1, -1]]


def test_padding_changes_no_cosine():
    x = np.random.default_rng(0).standard_normal((5, 13))
    padded = unit(x)
    assert padded.shape == (5, 16)
    assert padded @ padded.T == pytest.approx((x @ x.T) / np.outer(*[np.linalg.norm(x, axis=1)] * 2), abs=1e-6)
    assert not unit(np.zeros((2, 3))).any()


@pytest.fixture(scope="module")
def signed(tiny_model, breakhis_tree, tmp_path_factory):
    """The tiny model with a signature of ten dimensions, standardised on the images."""
    folder = tmp_path_factory.mktemp("signed") / "model"
    shutil.copytree(tiny_model, folder)
    model = SignedModel(str(folder))
    x = np.concatenate(list(model.embeddings(load_breakhis(breakhis_tree))))
    chosen = np.flatnonzero(x.std(0) > 0.1 * x.std(0).max())[:10]
    arrays = {"indices": chosen, "mean": x[:, chosen].mean(0), "scale": x[:, chosen].std(0)}
    weights = {"weight": np.ones((1, 10)), "weights_sha256": weights_digest(model.model)}
    replace(model.projector, **arrays, **weights).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def index(signed, breakhis_tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    build_index(SignedModel(signed), load_breakhis(breakhis_tree), folder)
    return folder


def test_the_index_holds_the_signatures_in_half_precision(index, signed, breakhis_tree):
    ds, model = load_breakhis(breakhis_tree), SignedModel(signed)
    schema = pq.read_schema(index / FILE)
    assert str(schema.field("signature").type).startswith("fixed_size_list") and "halffloat" in str(schema)
    read = SignatureIndex.load(index)
    assert read.vectors == pytest.approx(unit(np.concatenate(list(model.signatures(ds, batch_size=5)))), abs=1e-3)
    assert read.vectors.shape == (32, 16) and read.about["size"] == 10
    assert read.cases["filename"].to_pylist() == ds["filename"][:]
    assert set(read.cases["label"].to_pylist()) == {"benign", "malignant"}
    assert [p.name for p in index.iterdir()] == [FILE]


def test_the_own_patient_is_left_out(index):
    read = SignatureIndex.load(index)
    case = read.cases.slice(9, 1).to_pylist()[0]
    cases, patient = find(read, case["picture"], k=40)
    assert patient == case["patient"] and patient not in cases["patient"].to_pylist()
    assert len(cases) == 32 - read.cases["patient"].to_pylist().count(patient)
    assert (np.diff(cases["similarity"]) <= 0).all()
    cases, _ = find(read, case["picture"], k=3, patient="somebody else")
    assert cases["filename"][0].as_py() == case["filename"] and cases["similarity"][0].as_py() > 0.999
    cases, _ = find(read, case["picture"], k=40, magnification=100)
    assert set(cases["magnification"].to_pylist()) == {100}


def test_the_command_builds_and_searches(index, signed, breakhis_tree, tmp_path, capsys):
    image = SignatureIndex.load(index).cases["picture"][0].as_py()
    build = ["--build", signed, "--data", str(breakhis_tree)]
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


def test_the_example_runs(signed, breakhis_tree, tmp_path, capsys, monkeypatch):
    arguments = ["--model", signed, "--data", str(breakhis_tree), "--index", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["search.py", *arguments])
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "search.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "32 cases of 8 patients" in out and "Precision at 5" in out and out.splitlines()[-1].startswith("  400X")


def test_faiss_finds_nearly_the_same():
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    x = unit(rng.standard_normal((40, 12))[rng.integers(40, size=2000)] + 0.5 * rng.standard_normal((2000, 12)))
    approximate = SignatureIndex(None, x, {}).to_faiss(lists=32, probes=8)
    similarity, rows = approximate.search(x[:50], 10)
    exact, best = nearest(x[:50], x, 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, exact, strict=True)]) > 0.95
    assert similarity[:, 0] == pytest.approx(best[:, 0], abs=2e-3)


def test_another_model_is_refused(index, signed):
    read = SignatureIndex.load(index)
    changed = replace(read, about=read.about | {"weights_sha256": "0" * 64})
    with pytest.raises(ValueError, match="no longer the model that made this index"):
        find(changed, read.cases["picture"][0].as_py())


def test_wrong_signatures_are_refused(index):
    with pytest.raises(ValueError, match="signatures of 10 dimensions, not"):
        SignatureIndex.load(index).search(np.zeros((1, 4)))


def test_precision_is_counted_by_hand():
    # Three patients on a line; each one's nearest others are known.
    angle = np.array([0.0, 0.1, 0.5, 0.6, 1.5])
    vectors = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    label, patient = np.array([0, 0, 0, 1, 1]), np.array(["a", "a", "b", "c", "c"])
    found = precision_at(vectors, label, patient, ks=(1, 2))
    # k=1: a0 -> b (hit), a1 -> b (hit), b -> c (miss), c3 -> b (miss), c4 -> b (miss): patients a 1, b 0, c 0
    assert found[1]["precision"] == pytest.approx(1 / 3)
    assert found[1]["by_class"] == pytest.approx({0: 1 / 2, 1: 0})
    # k=2: a0 -> b, c; a1 -> b, c; b -> c, a; c3, c4 -> b, a
    assert found[2]["by_class"] == pytest.approx({0: 1 / 2, 1: 0})
    assert found["chance"] == pytest.approx(np.mean([1 / 3, 2 / 4, 0]))
    only = precision_at(vectors, label, patient, query=patient == "a", gallery=patient == "b", ks=(1,))
    assert only["queries"] == 2 and only[1]["precision"] == 1 and only["chance"] == 1


def test_noise_retrieves_at_chance():
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(60), 5)
    found = precision_at(unit(rng.standard_normal((300, 16))), patient % 3 == 0, patient)
    assert found[10]["precision"] == pytest.approx(found["chance"], abs=0.05)
