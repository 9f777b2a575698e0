"""Nuclei are measured in micrometres, and maps are those that the embedding pools."""

import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw

import magnification_invariant  # noqa: F401  (registers the models)
from magnification_invariant.models import embed
from magnification_invariant.report.dimensions import (
    _within,
    morphology,
    spearman,
    unit_of,
)


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
    fine, coarse = (morphology(tissue(mpp), mpp) for mpp in (0.25, 0.5))
    for density, area, eccentricity, _ in (fine, coarse):
        assert density == pytest.approx(1e6 / 15**2, rel=0.03)
        assert area == pytest.approx(np.pi * 3.5**2, rel=0.3)  # the threshold lies outside the outline
        assert eccentricity < 0.3
    assert fine[1] == pytest.approx(coarse[1], rel=0.15)
    large = morphology(tissue(0.25, axes=(10, 10)), 0.25)
    assert large[1] / fine[1] == pytest.approx(100 / 49, rel=0.15) and large[3] > fine[3]
    long = morphology(tissue(0.25, axes=(10, 5)), 0.25)
    assert long[2] == pytest.approx(np.sqrt(1 - 0.25), abs=0.05)
    empty = morphology(Image.new("RGB", (50, 40), (235, 180, 205)), 0.25)
    assert empty[0] == 0 and np.isnan(empty[1])


def test_a_missing_scikit_image_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.color", None)
    with pytest.raises(OSError, match=r"pip install 'magnification-invariant\[morphology\]'"):
        morphology(tissue(1.0), 1.0)


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
