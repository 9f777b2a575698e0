import math

import numpy as np
import pytest
import torch
from PIL import Image

from magnification_invariant.data.augment import (
    DRAWS,
    cache_height,
    centre_view,
    input_mpp,
    random_view,
    view_height,
)


def draws(n, **fixed):
    """Uniform numbers, with the columns named in `fixed` set."""
    u = torch.rand(n, DRAWS, generator=torch.Generator().manual_seed(0))
    for name, value in fixed.items():
        u[:, {"turn": 0, "zoom": 1, "x": 2, "y": 3}[name]] = value
    return u


def noise(n, height, width, seed=0):
    return torch.randint(
        0, 256, (n, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def test_without_zoom_and_stain_pixels_are_copied():
    size, images = 16, noise(8, view_height(16), 30)
    views = random_view(images, draws(8, turn=(torch.arange(8) + 0.5) / 8), size)
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
    period = 16 * height / view_height(size)  # 16 output pixels unzoomed
    x = torch.arange(2 * height)
    wave = (127.5 + 100 * torch.cos(2 * math.pi * x / period)).to(torch.uint8).expand(1, 3, height, -1).contiguous()
    view = random_view(wave, draws(1, turn=0.0, zoom=draw, x=0.5, y=0.5), size, zoom=zoom)[0, 0, size // 2]
    spectrum = torch.fft.rfft(view - view.mean(), n=4096).abs()
    assert 4096 / spectrum.argmax().item() == pytest.approx(16 * magnify, rel=0.06)


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
    u[:, 4:] = 0.5  # no shift of any stain, no scaling ...
    assert torch.allclose(random_view(image, u, 16, stain=0.2), random_view(image, u, 16), atol=1e-5)
    u[:, 4] = 1.0  # ... and then haematoxylin times 1.2
    density = -torch.log(random_view(image, u, 16, stain=0.2)[0, :, 0, 0])
    before = -torch.log(random_view(image, u, 16)[0, :, 0, 0])
    assert torch.allclose(density, 1.2 * before, atol=0.01)


def test_centre_view_is_what_timm_shows_the_loaded_model():
    import timm

    size, height = 56, view_height(56)
    assert height == 64
    pixels = np.random.default_rng(0).integers(0, 256, (64, 90, 3), dtype=np.uint8)
    transform = timm.data.create_transform(
        (3, size, size), interpolation="bilinear", crop_pct=0.875, mean=(0, 0, 0), std=(1, 1, 1)
    )
    wanted = transform(Image.fromarray(pixels))
    got = centre_view(torch.from_numpy(pixels).permute(2, 0, 1)[None], size)[0]
    assert torch.allclose(got, wanted, atol=1e-6)


def test_scale_of_the_input():
    # 700x460 at 0.492 um/px, shown 73 pixels high
    assert input_mpp(0.492 * 460 / 73, 73, 64) == pytest.approx(0.492 * 460 / 73)
    assert input_mpp(0.492 * 460 / 183, 183, 64) == pytest.approx(0.492 * 460 / 73)
