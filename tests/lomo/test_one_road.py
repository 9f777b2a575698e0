"""What a run records is what its model answers to users: one function, to the last digits that float32 has."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from magnification_invariant import load_breakhis, load_table, load_virtual_slides, metrics
from magnification_invariant.engine import FitConfig
from magnification_invariant.lomo.cell import Cell
from magnification_invariant.lomo.run import run_cell
from magnification_invariant.predict import Classifier
from magnification_invariant.records import Run

FIT = FitConfig(epochs=1, batch_size=8, image_size=32, learning_rate=3e-3)
CELL = Cell("erm", 40, n_folds=3, model="test_magdg_resnet", fit=FIT)
VIEW = {"val": "protocol", "test": "protocol", "test_source": "protocol", "test_normalised": "normalised"}


def assert_one_road(run: Run, ds) -> None:
    """Every record of the run is what `Classifier` says of the same file, shown in the same view."""
    classifier = Classifier.from_pretrained(run.folder, device="cpu")
    row_of = {name: i for i, name in enumerate(ds["filename"])}
    assert set(run.parts) == VIEW.keys()
    for part, view in VIEW.items():
        recorded = run.part(part)
        rows = classifier.predict(ds.select([row_of[name] for name in recorded["filename"]]), view=view)
        assert np.abs([row["probability"] for row in rows] - recorded["probability"]).max() <= 1e-5
        np.testing.assert_allclose([row["mpp"] for row in rows], recorded["mpp"], rtol=1e-9)
        if part != "val":  # these patients set the threshold
            out = [not row["in_scope"] for row in rows]
            alarms = run.results["scope"]["false_alarms"][part]
            assert alarms == pytest.approx(np.average(out, weights=metrics.patient_weights(recorded["patient"])))
        if view == "protocol":
            embedding = run.embeddings(part)
            np.testing.assert_allclose(
                [row["embedding"] for row in rows], embedding, atol=1e-4 * np.abs(embedding).max()
            )
            if run.results["signature"]["size"]:
                signature = classifier.projector.transform(embedding)
                difference = np.abs(np.array([row["signature"] for row in rows]) - signature)
                assert difference.max() <= 1e-4 * np.abs(signature).max()


def test_virtual_slides(tmp_path):
    ds = load_virtual_slides(9, images_per_magnification=2, size=(160, 105), write_to=tmp_path / "slides")
    run_cell(CELL, ds, tmp_path / "run")
    run = Run(tmp_path / "run")
    assert_one_road(run, ds)
    test, normalised = run.part("test"), run.part("test_normalised")
    assert np.all(normalised["mpp"] < test["mpp"])  # 40X is shown at the scale of 100X ...
    assert not np.allclose(test["probability"], normalised["probability"])
    base_range = Classifier.from_pretrained(run.model).base_range
    assert np.allclose(normalised["mpp"], base_range[1])  # ... the coarsest that training had


def test_mixed_aspect_ratios_and_scales(tmp_path):
    rng, lines = np.random.default_rng(0), ["file_name,label,scanner,patient,mpp"]
    shapes = [(90, 60), (60, 90), (64, 64), (150, 40), (41, 55)]
    for i in range(60):
        coarse = Image.fromarray(rng.integers(60, 255, (5, 5, 3), dtype=np.uint8))
        coarse.resize(shapes[i % 5], Image.Resampling.NEAREST).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{'ab'[i // 2 % 2]},{'xyz'[i % 3]},p{i // 6},{(0.25, 0.5, 0.3)[i % 3]}")
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    ds = load_table(tmp_path, domain_column="scanner", group_column="patient")
    run_cell(replace(CELL, held_out="y"), ds, tmp_path / "run")
    assert_one_road(Run(tmp_path / "run"), ds)


@pytest.mark.slow
def test_real_images(tmp_path):
    folder = Path(__file__).parents[3] / "shared" / "breakhis-real"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    from magnification_invariant.data.scale import digital_zoom

    ds = load_breakhis(folder)
    ds = ds.select(np.flatnonzero(np.array(ds["magnification"]) == 100))
    first = {}
    for i, patient in enumerate(ds["patient"]):
        first.setdefault(patient, i)
    ds = digital_zoom(ds.select(sorted(first.values())), (40, 100, 200))
    run_cell(replace(CELL, held_out=200, fit=replace(FIT, image_size=64)), ds, tmp_path / "run")
    assert_one_road(Run(tmp_path / "run"), ds)
