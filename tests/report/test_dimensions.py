"""Nuclei are measured in micrometres, maps are those the embedding pools, and a cell's page holds what it says."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw

import magnification_invariant  # noqa: F401  (registers the models)
from magnification_invariant.models import embed
from magnification_invariant.report.dimensions import (
    MORPHOLOGY,
    _within,
    dimension_page,
    dimension_sections,
    morphology,
    spearman,
    unit_of,
)
from magnification_invariant.report.page import Picture, Table


def tissue(mpp: float, axes=(7.0, 7.0), pitch: float = 15.0, field=(300.0, 210.0)) -> Image.Image:
    """Pink ground with a grid of purple ellipses of these axes in micrometres."""
    image = Image.new("RGB", (round(field[0] / mpp), round(field[1] / mpp)), (235, 180, 205))
    draw = ImageDraw.Draw(image)
    for x in np.arange(pitch / 2, field[0], pitch):
        for y in np.arange(pitch / 2, field[1], pitch):
            box = (x - axes[0] / 2, y - axes[1] / 2, x + axes[0] / 2, y + axes[1] / 2)
            draw.ellipse([v / mpp for v in box], fill=(90, 50, 140))
    return image


def test_nuclei_are_measured_in_micrometres():
    pytest.importorskip("skimage")
    for mpp in (0.25, 0.5):
        density, area, eccentricity, haematoxylin = morphology(tissue(mpp), mpp)
        assert density == pytest.approx(1e6 / 15**2, rel=0.03)
        assert area == pytest.approx(np.pi * 3.5**2, rel=0.12)
        assert eccentricity < 0.3
    long = morphology(tissue(0.25, axes=(10, 5)), 0.25)
    assert long[2] == pytest.approx(np.sqrt(1 - 0.25), abs=0.05)
    assert morphology(tissue(0.25, axes=(10, 10)), 0.25)[3] > haematoxylin
    empty = morphology(Image.new("RGB", (50, 40), (235, 180, 205)), 0.25)
    assert empty[0] == 0 and np.isnan(empty[1])


def test_rank_correlation_is_scipys_and_within_domains():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((40, 3)), rng.integers(5, size=40).astype(float)
    assert spearman(a, b) == pytest.approx([spearmanr(column, b).statistic for column in a.T])
    assert np.isnan(spearman(a, np.ones(40))).all()
    # Both follow the domain and nothing else: across domains they correlate, within them they do not.
    domain = np.repeat([40, 400], 200)
    x, y = (rng.standard_normal(400) + 4 * (domain == 400) for _ in range(2))
    assert spearman(x[:, None], y)[0] > 0.6
    assert abs(_within(x[:, None], y, domain)[0]) < 0.2


@pytest.mark.parametrize("kind", ["penultimate", "pyramid"])
def test_the_map_is_the_one_that_is_pooled(kind):
    torch.manual_seed(0)
    model, images = timm.create_model("test_magdg_resnet", num_classes=2).eval(), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        embedding = embed(model, images, kind)[1]
        stages = model.forward_intermediates(images, indices=[1, 2, 3, 4], intermediates_only=True)
    channels = [stage["num_chs"] for stage in model.feature_info[1:]]
    for index in range(0, embedding.shape[1], 7):
        stage, channel = unit_of(index, kind, channels)
        chosen = stages[stage][:, channel].flatten(1)
        pooled = torch.stack([chosen.mean(1), chosen.amax(1)])
        assert (pooled - embedding[:, index]).abs().min(0).values.max() < 1e-5
    with pytest.raises(ValueError, match="no such dimension"):
        unit_of(10_000, "pyramid", channels)


@pytest.mark.slow
def test_the_page_of_a_cell(tmp_path):
    pytest.importorskip("skimage")
    from magnification_invariant.data import load_virtual_slides
    from magnification_invariant.lomo import Cell, run_cell

    ds = load_virtual_slides(24, images_per_magnification=1, size=(140, 92), write_to=tmp_path / "slides", workers=1)
    cell = Cell("erm", 200, n_folds=4, model="test_magdg_resnet", epochs=1, image_size=32, batch_size=16)
    folder = tmp_path / cell.name
    run_cell(cell, ds, folder)
    known = json.loads((folder / "model" / "signature.json").read_text())
    if not known["size"]:
        pytest.skip("this network has no signature")
    sections = dict(dimension_sections(folder, ds, n_dimensions=3, n_images=2))
    _, table = sections["Magnification and morphology"]
    assert table.head == ["dimension", "towards", "magnification", *MORPHOLOGY]
    assert len(table.rows) == min(3, known["size"]) and all(-1 <= float(cell) <= 1 for cell in table.rows[0][2:])
    truth = [block for block in sections["The generator's own parameters"] if isinstance(block, Table)]
    assert len(truth) == 2 and len(truth[1].rows) == 4
    assert all(isinstance(block, Picture) for block in sections["Images"])
    assert dimension_page(folder, ds).count("<img") == min(8, known["size"])
    with pytest.raises(ValueError, match="another table"):
        dimension_sections(folder, ds.select(range(50)))
