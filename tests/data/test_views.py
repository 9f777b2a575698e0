"""What the network is shown: scales and tiles against their definitions, augmentation against optics."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from magnification_invariant.data.views import (
    DRAWS,
    cache_height,
    corners,
    mean_over_tiles,
    random_view,
    show,
    tiles,
    view_mpp,
)


def test_the_two_views_of_a_known_scale():
    """BreaKHis at 64 px, trained on 100X to 400X: 40X is shown whole, or no coarser than 100X."""
    native, short = np.array([0.492, 0.197, 0.0985, 0.0492]), np.full(4, 460)
    field = native * 460 / 64
    base_range = field[3], field[1]
    assert np.allclose(view_mpp("protocol", native, short, 64, base_range), field)
    assert np.allclose(view_mpp("normalised", native, short, 64, base_range), [field[1], *field[1:]])
    assert view_mpp("normalised", 0.492, 460, 64, (0.1, 0.3)) == 0.492  # never finer than the pixels
    assert view_mpp("normalised", 0.01, 460, 64, (0.1, 0.3)) == 0.1
    assert view_mpp("protocol", 0.5, 46, 64) == 0.5 and view_mpp(0.2, 0.5, 46, 64) == 0.5
    assert view_mpp(2.0, 0.5, 46, 64) == 2.0 and view_mpp("normalised", 0.5, 128, 64) == 1.0
    assert np.isnan(view_mpp("protocol", np.nan, 460, 64))
    with pytest.raises(ValueError, match="unknown view 'whole'"):
        view_mpp("whole", 0.5, 460, 64)


def test_a_view_is_one_resampling_of_the_whole_image():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (46, 70, 3), dtype=np.uint8))
    view = show(image, 0.5, view_mpp("protocol", 0.5, 46, 32), 32)
    assert (
        np.array_equal(view.pixels, np.asarray(image.resize((49, 32), Image.Resampling.BILINEAR))) and not view.filled
    )
    assert np.array_equal(show(image, 0.5, 0.5, 32).pixels, np.asarray(image))
    assert np.array_equal(show(image, 0.5, 0.1, 32).pixels, np.asarray(image))  # never finer than native


def test_a_small_image_is_continued_by_reflection_and_says_how_much():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 64, 3), dtype=np.uint8))
    view = show(image, 1.0, 1.0, 32)
    assert view.pixels.shape == (32, 64, 3) and view.filled == 0.5
    assert np.array_equal(view.pixels[8:24], np.asarray(image))
    assert np.array_equal(view.pixels[:8], np.asarray(image)[7::-1]) and np.array_equal(
        view.pixels[24:], np.asarray(image)[:7:-1]
    )
    with pytest.raises(ValueError, match="7 x 7 pixels are left of 70 x 70"):
        show(Image.new("RGB", (70, 70)), 0.1, 1.0, 32)


@pytest.mark.parametrize(
    ("height", "width", "n"), [(150, 201, 12), (64, 64, 1), (64, 97, 2), (65, 64, 2), (128, 192, 6)]
)
def test_tiles_cover_a_view_evenly_and_are_the_fewest(height, width, n):
    view = np.arange(height * width * 3).reshape(height, width, 3)
    places = corners(height, width, 64)
    assert len(places) == n == len(tiles(view, 64))
    assert np.unique(tiles(view, 64)).size == view.size
    for axis, side in ((0, height), (1, width)):
        starts = np.unique([place[axis] for place in places])
        assert starts[0] == 0 and starts[-1] == side - 64 and np.ptp(np.diff(starts)) <= 1 if len(starts) > 1 else True


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_means_over_tiles_do_not_depend_on_the_batch(batch_size):
    rng = np.random.default_rng(0)
    views = [rng.integers(0, 256, (k, 3, 4, 4), dtype=np.uint8) for k in (2, 1, 0, 5, 1)]
    sizes = []

    def run(batch):
        sizes.append(len(batch))
        return batch.mean((1, 2, 3))[:, None].astype(np.float32), batch[:, :, 0, 0].astype(np.float32)

    outputs = list(mean_over_tiles(run, iter(views), batch_size))
    assert sum(sizes) == 9 and max(sizes) == min(batch_size, 9)
    for view, output in zip(views, outputs, strict=True):
        if len(view):
            np.testing.assert_allclose(output[0], [view.mean()], rtol=1e-6)
            np.testing.assert_allclose(output[1], view[:, :, 0, 0].mean(0), rtol=1e-6)
        else:
            assert output == []


def test_training_crops_are_shown_at_the_scale_of_the_view_or_a_little_finer():
    """A grating of 16 pixels in the protocol view has 16 to 16 / 0.875 in the crops, by the last of the draws."""
    size, height = 64, cache_height(64)
    wave = grating(16 * height / size, height)
    for draw, period in ((0.0, 16), (1.0, 16 * height / size)):
        view = random_view(wave, draws(1, turn=0.0, zoom=0.5, x=0.0, y=0.5, crop=draw), size)[0, 0, size // 2]
        assert seen_period(view) == pytest.approx(period, rel=0.03)


def grating(period, height):
    x = torch.arange(2 * height)
    return (127.5 + 100 * torch.cos(2 * math.pi * x / period)).to(torch.uint8).expand(1, 3, height, -1).contiguous()


def seen_period(line):
    return 4096 / torch.fft.rfft(line - line.mean(), n=4096).abs().argmax().item()


def draws(n, **fixed):
    """Uniform numbers, with the columns named in `fixed` set."""
    u = torch.rand(n, DRAWS, generator=torch.Generator().manual_seed(0))
    for name, value in fixed.items():
        u[:, {"turn": 0, "zoom": 1, "x": 2, "y": 3, "crop": 10}[name]] = value
    return u


def noise(n, height, width, seed=0):
    return torch.randint(
        0, 256, (n, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def test_at_the_finest_scale_pixels_are_copied():
    size = 28
    images = noise(8, cache_height(size), 50)
    views = random_view(images, draws(8, turn=(torch.arange(8) + 0.5) / 8, crop=1.0), size)
    symmetries = set()
    for image, view in zip(images.float() / 255, views, strict=True):
        crops = image.unfold(1, size, 1).unfold(2, size, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        found = [
            (k, flip)
            for k in range(4)
            for flip in (False, True)
            for crop in torch.rot90(crops.flip(3) if flip else crops, k, (2, 3))
            if torch.allclose(crop, view, atol=1e-4)
        ]
        assert len(found) == 1
        symmetries |= set(found)
    assert len(symmetries) == 8  # all symmetries of the square


def test_the_view_is_a_function_of_the_draws():
    images, u = noise(4, 40, 60), draws(4)
    a = random_view(images, u, 16, zoom=2.0, stain=0.2)
    assert torch.equal(a, random_view(images, u, 16, zoom=2.0, stain=0.2))
    # ... of an image's own row of them: the batch around it does not matter
    assert torch.allclose(a[2:3], random_view(images[2:3], u[2:3], 16, zoom=2.0, stain=0.2), atol=1e-6)


@pytest.mark.parametrize("draw, magnify", [(0.0, 1 / 2), (0.5, 1.0), (1.0, 2.0)])
def test_zoom_scales_what_is_seen(draw, magnify):
    """A grating of a known period is seen with that period times the zoom."""
    size, zoom = 64, 2.0
    height = cache_height(size, zoom)
    wave = grating(16 * height / size, height)  # 16 output pixels unzoomed
    view = random_view(wave, draws(1, turn=0.0, zoom=draw, x=0.5, y=0.5, crop=0.0), size, zoom=zoom)[0, 0, size // 2]
    assert seen_period(view) == pytest.approx(16 * magnify, rel=0.06)


def test_zooming_out_does_not_alias():
    """Detail finer than the output's pixels becomes grey, not a false pattern."""
    size, zoom = 32, 2.5
    height = cache_height(size, zoom)
    stripes = (torch.arange(2 * height) % 2 * 255).to(torch.uint8).expand(1, 3, height, -1).contiguous()
    view = random_view(stripes, draws(1, turn=0.0, zoom=0.0, x=0.5, y=0.5), size, zoom=zoom)
    assert view.std() < 0.02
    assert view.mean() == pytest.approx(0.5, abs=0.02)


def test_stain_jitter_scales_optical_density():
    """Pure haematoxylin stays pure haematoxylin: its colour moves along its own ray of optical density."""
    ray = torch.tensor([0.65, 0.70, 0.29])
    image = (255 * torch.exp(-ray / ray.norm())).round().to(torch.uint8).view(1, 3, 1, 1).expand(1, 3, 40, 60)
    u = draws(1, turn=0.0, x=0.0, y=0.0)
    u[:, 4:10] = 0.5  # no shift of any stain, no scaling ...
    assert torch.allclose(random_view(image, u, 16, stain=0.2), random_view(image, u, 16), atol=1e-5)
    u[:, 4] = 1.0  # ... and then haematoxylin times 1.2
    density = -torch.log(random_view(image, u, 16, stain=0.2)[0, :, 0, 0])
    before = -torch.log(random_view(image, u, 16)[0, :, 0, 0])
    assert torch.allclose(density, 1.2 * before, atol=0.01)
