"""Zoom curves in a report, of cells whose every prediction is known."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from magnification_invariant import metrics
from magnification_invariant.records import ZOOM, Run, prediction_table
from magnification_invariant.report import pictures
from magnification_invariant.report.page import Picture, Table
from magnification_invariant.report.zoom import points_of, zoom_blocks

PATIENTS, TEMPERATURE = 24, 2.0
SCALES = {"40X": (0.5, 0.7, 1.0), "100X": (0.2, 0.3)}


def write_curves(folder, seed, mpp_range=(0.1, 0.8)):
    """Two source magnifications; the coarser the scale, the less the network knows."""
    run = Run(folder)
    folder.mkdir()
    rng, n = np.random.default_rng(seed), PATIENTS
    label = np.arange(n) % 2
    columns = {"filename": np.arange(n).astype(str), "patient": np.arange(n).astype(str), "label": label}
    columns |= {"domain": np.full(n, 40)}
    parts = [
        prediction_table(columns | {"mpp": np.full(n, mpp)}, np.arange(n), np.zeros((n, 2)), part=part, epoch=0)
        for part, mpp in (("val", 0.4), ("test", 0.25))
    ]
    run.write_predictions(pa.concat_tables(parts))
    run.write_results({"temperature": TEMPERATURE, "mpp_range": mpp_range})
    cell = {"method": "erm", "held_out": 100, "fold": 0, "seed": seed, "split": {}, "data": "d"}
    run.write_config({"cell": cell, "settings": {}, "settings_sha256": "s", "start": {}})
    rows = []
    for source, scales in SCALES.items():
        for k, mpp in enumerate(scales):
            score = (0.8 - 0.3 * k) * (2 * label - 1) + rng.standard_normal(n)
            for i in range(n):
                rows.append({"filename": f"{i}.png", "patient": str(i), "label": int(label[i]), "source": source})
                rows[-1] |= {"variant": "field", "mpp": mpp, "field": 32 * mpp, "logits": [0.0, float(score[i])]}
                rows[-1] |= {"cka": 1 - 0.2 * k - 0.1 * seed * (k > 0), "reference": k == 0}
    pq.write_table(pa.Table.from_pylist(rows), folder / ZOOM)
    return run


@pytest.fixture
def runs(tmp_path):
    return [write_curves(tmp_path / f"seed{seed}", seed) for seed in (0, 1)]


def test_points_by_hand(runs):
    curves = points_of(runs)
    assert {source: tuple(point.mpp for point in points) for (_, source), points in curves.items()} == SCALES
    for (_, source), points in curves.items():
        for k, point in enumerate(points):
            figures = []
            for run in runs:
                rows = pq.read_table(run.folder / ZOOM).to_pandas()
                rows = rows[(rows.source == source) & (rows.mpp == point.mpp)]
                probability = 1 / (1 + np.exp(-np.stack(rows.logits)[:, 1] / TEMPERATURE))
                figures.append((metrics.auc(rows.label, probability), np.mean((probability - rows.label) ** 2)))
            assert (point.auc.value, point.brier.value) == pytest.approx(np.mean(figures, 0))
            assert point.auc.low < point.auc.value < point.auc.high
            assert point.brier.low < point.brier.value < point.brier.high
            assert point.cka == pytest.approx(1 - 0.2 * k - 0.05 * (k > 0)) and point.reference == (k == 0)


def test_no_line_joins_magnifications_and_the_trained_range_is_marked(runs, monkeypatch):
    drawn, make = [], pictures._figure

    def keep(*arguments):
        drawn.append(make(*arguments))
        return drawn[-1]

    monkeypatch.setattr(pictures, "_figure", keep)
    words, picture, table = zoom_blocks({"erm": runs})
    assert isinstance(picture, Picture) and picture.png.startswith(b"\x89PNG") and "only downsampled" in words
    ((_, axes),) = drawn
    assert len(axes) == 3
    for axis in axes:
        curves = [tuple(line.get_xdata()) for line in axis.lines if line.get_marker() == "o"]
        assert sorted(curves) == sorted(SCALES.values())
        assert axis.patches[0].get_x() == pytest.approx(0.1) and axis.patches[0].get_width() == pytest.approx(0.7)
        upright = {round(line.get_xdata()[0], 6) for line in axis.lines if line.get_marker() != "o"}
        assert upright == {0.4, 0.25}
    assert isinstance(table, Table)
    assert [row[:5] for row in table.rows] == [
        ["erm", "100X", "constant field of view", "40X", "0.5 to 1, reference 0.5"],
        ["erm", "100X", "constant field of view", "100X (unseen)", "0.2 to 0.3, reference 0.2"],
    ]
    assert [row[-1] for row in table.rows] == ["0.55", "0.75"]


def test_other_ranges_have_other_pictures_and_no_file_says_nothing(runs, tmp_path):
    wide = write_curves(tmp_path / "zoomed", 0, mpp_range=(0.05, 2.0))
    blocks = zoom_blocks({"erm": runs, "erm + zoom": [wide]})
    assert sum(isinstance(block, Picture) for block in blocks) == 2
    (tmp_path / "zoomed" / ZOOM).unlink()
    assert zoom_blocks({"erm + zoom": [wide]}) == []
