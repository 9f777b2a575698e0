"""The signature tables of runs whose records are known, and refits from the embeddings of one."""

import numpy as np
import pytest
from fabricated import write_run

from magnification_invariant.files import write_json
from magnification_invariant.records import Run
from magnification_invariant.report import signatures
from magnification_invariant.report.runs import read_runs
from magnification_invariant.report.signatures import STABILITY, patient_stability, signature_sections
from magnification_invariant.signatures import SparseSignature, refit_stability

PATH = [0, 5, 20, 40]


def write_records(root, method, held_out, size, *, seed=0, losses=(0.7, 0.6, 0.5, 0.45), auc=0.8, stability=0.5):
    run = Run(root / f"{method}-lomo{held_out}-fold0-seed{seed}")
    run.folder.mkdir()
    cell = {"method": method, "held_out": held_out, "fold": 0, "seed": seed, "split": {}, "data": "d"}
    run.write_config({"cell": cell, "settings": {}, "settings_sha256": "s", "machine": {}, "start": {}})
    signature = {"size": size, "width": 64, "live": 60}
    if size:
        signature |= {"jaccard": stability, "nogueira": stability - 0.1, "chance_jaccard": 0.05}
        signature |= {"jaccard_pairs": [stability - 0.2, stability, stability + 0.2]}
        signature["test"] = {"patient_balanced": {"auc": auc, "f1": auc - 0.1, "brier": 1 - auc}}
        signature["curve"] = {"size": PATH, "val": list(losses), "test": [loss + 0.1 for loss in losses]}
    run.write_results({"signature": signature})


@pytest.fixture
def root(tmp_path):
    for seed, size in ((0, 10), (1, 20)):
        write_records(tmp_path, "erm", 40, size, seed=seed, auc=0.7 + 0.1 * seed)
        write_records(tmp_path, "dann", 40, 8, seed=seed, losses=(0.7, 0.5, 0.4, 0.35))
    write_records(tmp_path, "dann", 200, 0)
    return tmp_path


@pytest.fixture
def nothing_is_fitted(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a refit that nobody asked for")

    for name in ("SparseSignature", "refit_stability"):
        monkeypatch.setattr(signatures, name, refuse)


def tables(root, refits=0):
    return {heading: blocks[-1].rows for heading, blocks in signature_sections(read_runs([root]), refits)}


def test_the_tables_are_read_from_the_records(root, nothing_is_fitted):
    rows = tables(root)
    assert list(rows) == ["Signatures", "Signatures at equal loss", "Stability on one backbone"]
    sizes = {row[0]: row[1:] for row in rows["Signatures"]}
    assert sizes["erm"] == ["2", "0", "15 (10-20)", "64", "0.23", "60", "0.50", "0.40", "0.750", "0.650", "0.250"]
    # an empty signature counts as one of size 0, and has neither stability nor predictions
    assert sizes["dann"] == ["3", "1", "5 (0-8)", "64", "0.08", "60", "0.50", "0.40", "0.800", "0.700", "0.200"]
    # erm comes down to 0.45: with all 40 dimensions, where 20 of dann's already have 0.40
    assert rows["Signatures at equal loss"] == [["dann", "2", "20.0", "20.0"], ["erm", "2", "40.0", "40.0"]]
    assert rows["Stability on one backbone"] == [
        ["dann", "40X", "8", "60", "0.30, 0.50, 0.70", "0.05", "0.40", "-", "-", "-"],
        ["erm", "40X", "15", "60", "0.30, 0.50, 0.70", "0.05", "0.40", "-", "-", "-"],
    ]


def test_a_single_cell_does_not_take_all_others_from_the_comparison(root, nothing_is_fitted):
    before = tables(root)["Signatures at equal loss"]
    write_records(root, "gan", 100, 8)
    assert tables(root)["Signatures at equal loss"] == before and len(tables(root)["Signatures"]) == 3


def test_refits_are_shown_where_all_runs_of_a_row_keep_them(root, nothing_is_fitted):
    for seed, nogueira in ((0, 0.3), (1, 0.5)):
        kept = {"subsamples": 30, "nogueira": nogueira, "nogueira_interval": [nogueira - 0.2, nogueira + 0.1]}
        write_json(root / f"erm-lomo40-fold0-seed{seed}" / STABILITY, kept)
        if seed == 0:
            write_json(root / "dann-lomo40-fold0-seed0" / STABILITY, kept)
    dann, erm = (row[-3:] for row in tables(root)["Stability on one backbone"])
    assert dann == ["-", "-", "-"] and erm == ["30", "0.40", "[0.20, 0.50]"]


def test_refits_when_asked(root, monkeypatch):
    asked = []

    def refitted(run, n):
        asked.append((run.folder.name, n))
        write_json(run.folder / STABILITY, {"subsamples": n, "nogueira": 0.6, "nogueira_interval": [None, None]})

    monkeypatch.setattr(signatures, "patient_stability", refitted)
    rows = tables(root, refits=4)
    signed = [f"{method}-lomo40-fold0-seed{seed}" for method in ("dann", "erm") for seed in (0, 1)]
    assert sorted(asked) == [(name, 4) for name in signed]
    assert [row[-3:] for row in rows["Stability on one backbone"]] == [["4", "0.60", "[-, -]"]] * 2


def test_a_refit_is_of_the_runs_own_embeddings_and_made_once(tmp_path):
    run = write_run(tmp_path, "erm", 40)
    x, y, patients = run.embeddings("train"), *(run.keys("train")[name] for name in ("label", "patient"))
    val = run.keys("val")
    own = SparseSignature().fit(x, y, patients, run.embeddings("val"), val["label"], val["patient"])
    results = run.results | {"signature": run.results["signature"] | {"size": len(own.signature_)}}
    run.write_results(results)
    stability = patient_stability(run, 4)
    wanted = refit_stability(own, x, y, groups=patients, n_subsamples=4)
    assert stability["subsamples"] == 4 and stability["sizes"] == list(wanted["sizes"]) and len(stability["sizes"]) == 4
    assert np.isclose(stability["nogueira"], wanted["nogueira"], equal_nan=True)
    write_json(run.folder / STABILITY, stability | {"nogueira": 9})
    assert patient_stability(run, 4)["nogueira"] == 9  # not refitted
    run.write_results(results | {"signature": results["signature"] | {"size": 3 + len(own.signature_)}})
    with pytest.raises(ValueError, match="another version of this package"):
        patient_stability(run, 6)


def test_without_any_signature_there_is_one_table(tmp_path):
    write_records(tmp_path, "erm", 40, 0)
    assert tables(tmp_path, refits=4) == {"Signatures": [["erm", "1", "1", "0 (0-0)", "64", "0.00", "60", *"-----"]]}


@pytest.mark.parametrize("refits", [-3, 1])
def test_one_refit_agrees_with_nothing(root, refits):
    with pytest.raises(ValueError, match="at least 2, or 0 for none"):
        signature_sections(read_runs([root]), refits)
