"""The signature tables of cells whose records are known."""

import json

import numpy as np
import pytest

from magnification_invariant.records import write_json
from magnification_invariant.report import signatures
from magnification_invariant.report.runs import read_runs
from magnification_invariant.report.signatures import STABILITY, signature_sections
from magnification_invariant.signatures.networks import SignedNetwork

PATH = [0, 5, 20, 40]


def write_records(root, method, held_out, size, *, seed=0, losses=(0.7, 0.6, 0.5, 0.45), auc=0.8, stability=0.5):
    folder = root / f"{method}-lomo{held_out}-fold0-seed{seed}"
    arguments = {"method": method, "zoom": False, "held_out": held_out, "fold": 0, "seed": seed}
    write_json_in(folder, "config.json", {"arguments": arguments, "start": {}})
    signature = {"size": size, "width": 64, "live": 60}
    if size:
        signature |= {"jaccard": stability, "nogueira": stability - 0.1, "chance_jaccard": 0.05}
        signature |= {"jaccard_pairs": [stability - 0.2, stability, stability + 0.2]}
        signature["test"] = {"patient_balanced": {"auc": auc, "f1": auc - 0.1, "brier": 1 - auc}}
        signature["curve"] = {"size": PATH, "val": list(losses), "test": [loss + 0.1 for loss in losses]}
    write_json_in(folder, "results.json", {"signature": signature})
    return folder


def write_json_in(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / name, content)


@pytest.fixture
def cells(tmp_path):
    for seed, size in ((0, 10), (1, 20)):
        write_records(tmp_path, "erm", 40, size, seed=seed, auc=0.7 + 0.1 * seed)
        write_records(tmp_path, "dann", 40, 8, seed=seed, losses=(0.7, 0.5, 0.4, 0.35))
    write_records(tmp_path, "dann", 200, 0)
    return tmp_path


@pytest.fixture
def nothing_is_fitted(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a refit that nobody asked for")

    for name in ("SparseSignature", "refit_stability", "read_embeddings", "compare_networks"):
        monkeypatch.setattr(signatures, name, refuse)


def tables(root, refits=0):
    return {heading: blocks[-1].rows for heading, blocks in signature_sections(read_runs([root]), refits)}


def test_the_tables_are_read_from_the_records(cells, nothing_is_fitted):
    found = tables(cells)
    assert list(found) == ["Signatures", "Signatures at equal loss", "Stability on one backbone"]
    sizes = {row[0]: row[1:] for row in found["Signatures"]}
    assert sizes["erm"] == ["2", "0", "15 (10-20)", "64", "0.23", "60", "0.50", "0.40", "0.750", "0.650", "0.250"]
    # an empty signature counts as one of size 0, and has neither stability nor predictions
    assert sizes["dann"] == ["3", "1", "5 (0-8)", "64", "0.08", "60", "0.50", "0.40", "0.800", "0.700", "0.200"]
    # erm comes down to 0.45: with all 40 dimensions, where 20 of dann's already have 0.40
    assert found["Signatures at equal loss"] == [["dann", "2", "20.0", "20.0"], ["erm", "2", "40.0", "40.0"]]
    assert found["Stability on one backbone"] == [
        ["dann", "40X", "8", "60", "0.30, 0.50, 0.70", "0.05", "0.40", "-", "-", "-"],
        ["erm", "40X", "15", "60", "0.30, 0.50, 0.70", "0.05", "0.40", "-", "-", "-"],
    ]


def test_refits_are_shown_where_all_cells_of_a_row_keep_them(cells, nothing_is_fitted):
    for seed, nogueira in ((0, 0.3), (1, 0.5)):
        interval = [nogueira - 0.2, nogueira + 0.1]
        kept = {"subsamples": 30, "nogueira": nogueira, "nogueira_interval": interval}
        write_json_in(cells / f"erm-lomo40-fold0-seed{seed}", STABILITY, kept)
        if seed == 0:
            write_json_in(cells / "dann-lomo40-fold0-seed0", STABILITY, kept)
    dann, erm = (row[-3:] for row in tables(cells)["Stability on one backbone"])
    assert dann == ["-", "-", "-"] and erm == ["30", "0.40", "[0.20, 0.50]"]


def test_refits_and_networks_when_asked(cells, monkeypatch):
    write_records(cells, "erm", 200, 10)
    asked = []

    def refitted(folder, n):
        asked.append((folder.name, n))
        kept = {"subsamples": n, "nogueira": 0.6, "nogueira_interval": [None, None]}
        (folder / STABILITY).write_text(json.dumps(kept))

    names, shared = np.array([f"{i}.png" for i in range(50)]), np.random.default_rng(0).standard_normal((50, 6))

    def network(folder):
        held_out_40 = "lomo40" in folder.name
        rows = slice(0, 40) if held_out_40 else slice(10, 50)
        chosen = np.array([0, 1]) if held_out_40 else np.array([1, 2])
        return SignedNetwork(folder.name, "start", shared[rows], names[rows], chosen)

    monkeypatch.setattr(signatures, "patient_stability", refitted)
    monkeypatch.setattr(SignedNetwork, "from_cell", network)
    found = tables(cells, refits=4)
    cells_with_one = ["dann-lomo40-fold0-seed0", "dann-lomo40-fold0-seed1", "erm-lomo200-fold0-seed0"]
    cells_with_one += ["erm-lomo40-fold0-seed0", "erm-lomo40-fold0-seed1"]
    assert sorted(asked) == [(name, 4) for name in cells_with_one]
    assert [row[-3:] for row in found["Stability on one backbone"]] == [["4", "0.60", "[-, -]"]] * 3
    # the pair of seed 0: the same units, on the 30 images of both; of three dimensions they share one
    between = [["erm", "200X and 40X", by] for by in ("index", "matching")]
    assert [row[:3] for row in found["Stability between networks"]] == between
    assert [row[3:9] for row in found["Stability between networks"]] == [
        ["1.00", "1.00", "1 of 1", "1.00", "0.33", "0.20"],
        ["1.00", "-", "1 of 1", "1.00", "0.33", "0.20"],
    ]


def test_networks_of_two_domains_have_no_images_in_common(tmp_path, monkeypatch):
    for held_out in (40, 200):
        write_records(tmp_path, "erm", held_out, 10)

    def network(folder):
        names = np.array([f"{folder.name}/{i}.png" for i in range(9)])
        return SignedNetwork(folder.name, "start", np.eye(9), names, np.array([0]))

    monkeypatch.setattr(signatures, "patient_stability", lambda folder, n: None)
    monkeypatch.setattr(SignedNetwork, "from_cell", network)
    sections = dict(signature_sections(read_runs([tmp_path]), 4))
    assert sections["Stability between networks"] == ["No two networks of one fold and seed share training images."]


def test_without_any_signature_there_is_one_table(tmp_path):
    write_records(tmp_path, "erm", 40, 0)
    assert tables(tmp_path, refits=4) == {"Signatures": [["erm", "1", "1", "0 (0-0)", "64", "0.00", "60", *"-----"]]}


@pytest.mark.parametrize("refits", [-3, 1])
def test_one_refit_agrees_with_nothing(cells, refits):
    with pytest.raises(ValueError, match="at least 2, or 0 for none"):
        signature_sections(read_runs([cells]), refits)
