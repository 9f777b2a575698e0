"""The signatures of finished cells: the tables, the page of the dimensions, and retrieval, from records alone."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from magdg import main
from magnification_invariant.data import load_breakhis, load_virtual_slides
from magnification_invariant.lomo.cell import Cell
from magnification_invariant.lomo.run import run_cell
from magnification_invariant.predict.search import retrieval
from magnification_invariant.report.dimensions import MORPHOLOGY, dimension_sections
from magnification_invariant.report.page import Picture, Table
from magnification_invariant.report.runs import read_runs
from magnification_invariant.report.signatures import STABILITY, patient_stability, signature_sections
from magnification_invariant.signatures import SignatureProjector, about_embeddings, read_embeddings
from magnification_invariant.signatures.networks import SignedNetwork, compare_networks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Small virtual slides whose class anybody can see: malignant ones are darker and bluer."""
    root = tmp_path_factory.mktemp("slides")
    load_virtual_slides(24, images_per_magnification=1, size=(105, 69), write_to=root, workers=1)
    for file in root.rglob("*/malignant/**/*.png"):
        pixels = np.asarray(Image.open(file)) * np.array([0.6, 0.75, 1.0])
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    return root


@pytest.fixture(scope="module")
def ds(slides):
    return load_breakhis(slides)


@pytest.fixture(scope="module")
def runs(ds, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for held_out in (200, 400):
        cell = Cell("erm", held_out, n_folds=4, model="test_magdg_resnet", epochs=1, image_size=32, batch_size=16)
        run_cell(cell, ds, root / cell.name)
    return root


def test_embeddings_say_what_their_rows_are(ds, runs):
    file = runs / "erm-lomo200-fold0-seed0" / "embeddings.safetensors"
    assert about_embeddings(file) == {"embedding": "penultimate"}
    _, keys = read_embeddings(file, "test")
    wanted = ds.select(keys["row"])
    for name, column in (
        ("filename", "filename"),
        ("patient", "patient"),
        ("label", "label"),
        ("domain", "magnification"),
    ):
        assert keys[name].tolist() == wanted[column][:]


def test_the_tables(runs):
    folder = runs / "erm-lomo200-fold0-seed0"
    known = json.loads((folder / "results.json").read_text())["signature"]
    assert 0 < known["size"] < known["live"] <= known["width"] == 96
    assert len(known["curve"]["size"]) == len(known["curve"]["val"]) == len(known["curve"]["test"]) == 30
    sections = dict(signature_sections(read_runs([runs]), 4))
    tables = {heading: blocks[-1] for heading, blocks in sections.items()}
    (sizes,) = tables["Signatures"].rows
    assert sizes[:3] == ["erm", "2", "0"] and sizes[4] == "96"
    other = json.loads((runs / "erm-lomo400-fold0-seed0" / "results.json").read_text())["signature"]
    assert sizes[3].startswith(f"{(known['size'] + other['size']) / 2:.0f} (")
    auc = np.mean([signature["test"]["patient_balanced"]["auc"] for signature in (known, other)])
    assert sizes[9] == f"{auc:.3f}"
    assert [row[1] for row in tables["Stability on one backbone"].rows] == ["200X", "400X"]
    assert tables["Stability on one backbone"].rows[0][4].count(",") == 2  # three training magnifications: three pairs
    assert [row[1:3] for row in tables["Stability between networks"].rows] == [
        ["200X and 400X", "index"],
        ["200X and 400X", "matching"],
    ]
    kept = json.loads((folder / STABILITY).read_text())
    assert kept["subsamples"] == 4 and len(kept["sizes"]) == 4
    (folder / STABILITY).write_text(json.dumps(kept | {"nogueira": 9}))
    assert patient_stability(folder, 4)["nogueira"] == 9  # not refitted


def test_networks_of_one_start_and_their_common_images(runs):
    folders = sorted(runs.glob("erm*"))

    def compared(by: str) -> dict:
        return compare_networks(*map(SignedNetwork.from_cell, folders), by)

    found = compared("index")
    _, a = read_embeddings(folders[0] / "embeddings.safetensors", "train")
    _, b = read_embeddings(folders[1] / "embeddings.safetensors", "train")
    assert found["images"] == len(set(a["filename"]) & set(b["filename"])) > 10
    config = folders[1] / "config.json"
    content = json.loads(config.read_text())
    changed = content | {"start": content["start"] | {"initial_sha256": "0" * 64}}
    try:
        config.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="started from different weights"):
            compared("index")
        assert compared("matching")["images"] == found["images"]
    finally:
        config.write_text(json.dumps(content))


def test_retrieval_finds_the_class_across_magnifications(runs):
    rows = retrieval(runs / "erm-lomo200-fold0-seed0", ks=(1, 3))
    assert {row["representation"] for row in rows} == {"signature", "weighted", "embedding"} and len(rows) == 3 * 16
    assert np.mean([row[1]["precision"] for row in rows]) > np.mean([row["chance"] for row in rows])


def test_the_script_prints_all_tables(runs, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["signature_table.py", str(runs), "--subsamples", "4"])
    runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "signature_table.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("## ")] == [
        "## Signatures",
        "## Signatures at equal loss",
        "## Stability on one backbone",
        "## Stability between networks",
        "## Retrieval",
    ]
    assert out.count("| embedding") == 2


def test_the_page_of_the_dimensions(ds, runs):
    pytest.importorskip("skimage")
    folder = runs / "erm-lomo200-fold0-seed0"
    projector = SignatureProjector.from_pretrained(folder / "model")
    sections = dict(dimension_sections(folder, ds, n_dimensions=2, n_images=2))
    _, table = sections["Magnification and morphology"]
    assert table.head == ["dimension", "towards", "magnification", *MORPHOLOGY]
    assert len(table.rows) == min(2, len(projector.indices)) and all(-1 <= float(c) <= 1 for c in table.rows[0][2:])
    assert {row[1] for row in table.rows} <= {"benign", "malignant"}
    truth = [block for block in sections["The generator's own parameters"] if isinstance(block, Table)]
    assert len(truth) == 2 and len(truth[1].rows) == 4
    assert all(isinstance(block, Picture) for block in sections["Images"])
    with pytest.raises(ValueError, match="another table"):
        dimension_sections(folder, ds.select(range(50)))


def test_the_command_writes_both_pages(slides, runs, tmp_path):
    pytest.importorskip("skimage")
    folder = runs / "erm-lomo200-fold0-seed0"
    command = ["report", str(runs), "--refits", "4", "--dimensions", str(folder), "--data", str(slides)]
    assert main([*command, "--output-dir", str(tmp_path)]) == 0
    size = len(SignatureProjector.from_pretrained(folder / "model").indices)
    assert (tmp_path / "dimensions.html").read_text().count("<img") == min(8, size)
    headings = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("## S")]
    assert headings == [
        "## Signatures",
        "## Signatures at equal loss",
        "## Stability on one backbone",
        "## Stability between networks",
    ]
