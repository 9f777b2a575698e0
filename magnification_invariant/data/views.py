"""What a network is shown of an image, and at which micrometres per pixel (um/px): the one road from pixels to input.

A *view* shows a whole image at one scale, by one resampling from its decoded pixels and never finer than they are, and
is covered by the fewest evenly spread tiles of the network's input; logits and embeddings are means over the tiles.
``field = native * short side / size`` is the scale at which the short side just fills the input. There are two views:

- ``protocol``: ``max(native, field)``. What is trained on, validated by and tested with: a magnification that was never
  seen is a scale that was never seen.
- ``normalised``: ``max(native, clip(field, base_range))``, where `base_range` is the least and the largest field of the
  training images. What a `Classifier` shows by default: an unseen scale is undone where its size is known.

In training, square crops are shown at ``field / u``, u log-uniform in [1, 1 / 0.875], times the zoom. Augmentation is
batched and on the device.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

VIEWS = ("normalised", "protocol")
RESAMPLING = Image.Resampling.BILINEAR  # anti-aliased: a triangle as wide as two new pixels
CROP_PCT = 0.875  # of the side of a view, what the smallest training crops show
LEAST_SHARE = 0.25  # of the input's side: an image that fills less of it is refused


class View(NamedTuple):
    """An image as the network is shown it.

    Attributes:
        pixels: uint8 RGB (height, width, 3), no side shorter than the network's input.
        filled: Share of them that continues the image by reflection.
    """

    pixels: np.ndarray
    filled: float


def field_mpp(native, short_side, size: int):
    """Um/px at which an image's short side (in pixels of `native` um/px) just fills an input of `size` pixels."""
    return native * short_side / size


def view_mpp(view: str | float, native, short_side, size: int, base_range: Sequence[float] | None = None):
    """Um/px at which an image is shown; see the module.

    Args:
        view: "protocol", "normalised", or um/px to show it at.
        native: Um/px of the image, a number or an array; NaN where unknown.
        short_side: Of the image in pixels, of the same shape.
        size: Side of the network's square input in pixels.
        base_range: Least and largest um/px of "normalised"; None, of a model that knows no scale, is as "protocol".

    Returns:
        Um/px, never finer than `native`; NaN where that is unknown.

    Raises:
        ValueError: Another view.
    """
    wanted = field_mpp(native, short_side, size)
    if view == "normalised" and base_range is not None:
        wanted = np.clip(wanted, *base_range)
    elif not isinstance(view, str):
        wanted = np.full_like(wanted, view) if np.ndim(wanted) else view
    elif view not in VIEWS:
        raise ValueError(f"unknown view {view!r}: choose {' or '.join(VIEWS)}, or give micrometres per pixel")
    return np.maximum(native, wanted)


def shown_pixels(width: int, height: int, step: float) -> tuple[int, int]:
    """Width and height of an image of which one new pixel covers `step` (at least 1) of the old ones."""
    return max(1, round(width / max(step, 1.0))), max(1, round(height / max(step, 1.0)))


def show(image: Image.Image, native: float, mpp: float, size: int) -> View:
    """The whole image at one scale, continued by reflection where it is smaller than the network's input.

    Args:
        image: RGB.
        native: Its um/px (any unit of length will do, if `mpp` has the same).
        mpp: Um/px to show it at; finer than `native` is taken as `native`.
        size: Side of the network's square input in pixels.

    Raises:
        ValueError: It fills less than a quarter of the input's side.
    """
    width, height = shown_pixels(*image.size, mpp / native)
    if min(width, height) < size * LEAST_SHARE:
        raise ValueError(
            f"{width} x {height} pixels are left of {image.width} x {image.height} at the scale the model is shown, "
            f"fewer than a quarter of its input of {size}: the field is too small"
        )
    pixels = np.asarray(image if image.size == (width, height) else image.resize((width, height), RESAMPLING))
    extra = [max(0, size - side) for side in pixels.shape[:2]]
    if any(extra):
        pixels = np.pad(pixels, [(e // 2, e - e // 2) for e in extra] + [(0, 0)], "symmetric")
    return View(pixels, 1 - width * height / (pixels.shape[0] * pixels.shape[1]))


def corners(height: int, width: int, size: int) -> list[tuple[int, int]]:
    """(top, left) of the fewest tiles of `size` pixels that cover a view, evenly spread."""
    lines, columns = (
        np.linspace(0, max(side, size) - size, math.ceil(side / size)).round().astype(int).tolist()
        for side in (height, width)
    )
    return [(top, left) for top in lines for left in columns]


def tiles(pixels: np.ndarray, size: int) -> np.ndarray:
    """The tiles (n, 3, size, size) that cover a view's pixels (height, width, 3), in the order of `corners`."""
    places = corners(*pixels.shape[:2], size)
    return np.stack([pixels[top : top + size, left : left + size].transpose(2, 0, 1) for top, left in places])


def mean_over_tiles(
    run: Callable[[np.ndarray], Sequence[np.ndarray]], views: Iterable[np.ndarray], batch_size: int
) -> Iterator[list[np.ndarray]]:
    """Outputs of a network for views, means over their tiles, a view after the other.

    Args:
        run: uint8 tiles (b, 3, size, size) to outputs (b, ...).
        views: uint8 tiles (n, 3, size, size) of each; of none, outputs are empty.
        batch_size: Tiles at a time.

    Yields:
        The outputs of one view, float64.
    """
    waiting: deque[_Sums] = deque()
    batch: list[tuple[_Sums, np.ndarray]] = []

    def flush() -> None:
        for (sums, _), *outputs in zip(batch, *run(np.stack([tile for _, tile in batch])), strict=True):
            sums.add(outputs)
        batch.clear()

    for view in views:
        waiting.append(_Sums(len(view)))
        for tile in view:
            batch.append((waiting[-1], tile))
            if len(batch) == batch_size:
                flush()
        while waiting and not waiting[0].to_come:
            yield waiting.popleft().means
    if batch:
        flush()
    for sums in waiting:
        yield sums.means


class _Sums:
    """Of the outputs for the tiles of one view."""

    def __init__(self, tiles: int):
        self.tiles = self.to_come = tiles
        self.totals: list[np.ndarray] = []

    def add(self, outputs: Sequence[np.ndarray]) -> None:
        outputs = [output.astype(np.float64) for output in outputs]
        self.totals = [a + b for a, b in zip(self.totals, outputs, strict=True)] if self.totals else outputs
        self.to_come -= 1

    @property
    def means(self) -> list[np.ndarray]:
        return [total / self.tiles for total in self.totals]


# Optical density of haematoxylin, eosin and a residual in RGB (Ruifrok & Johnston 2001), rows of unit length.
_STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_STAINS = _STAINS / _STAINS.norm(dim=1, keepdim=True)
_UNMIX = torch.linalg.inv(_STAINS)  # here, on the CPU: on a GPU it makes the host wait, to look for singular matrices

PLACE = slice(2, 4)  # of the draws of an image
DRAWS = 11  # random numbers an image needs: quarter turn and flip, zoom, centre (2), stain (6), crop


def cache_height(size: int, zoom: float = 1.0) -> int:
    """Short side to cache, so that the finest training crop shows pixels and not blur."""
    return math.ceil(size / CROP_PCT * zoom)


def random_draws(n: int, views: int, generator: torch.Generator, share: slice = slice(None)) -> torch.Tensor:
    """Uniform numbers in [0, 1) for `random_view`, on the generator's device: (views * len(share), `DRAWS`).

    Args:
        n: Images of the whole batch; `share` of them are taken, of whatever was drawn for all.
        views: Of every image, all at the same place: a finer one lies inside a coarser one.
        generator: Is drawn from.
    """
    draws = [torch.rand(n, DRAWS, generator=generator, device=generator.device)[share] for _ in range(views)]
    for other in draws[1:]:
        other[:, PLACE] = draws[0][:, PLACE]
    return torch.cat(draws)


def random_view(
    images: torch.Tensor, draws: torch.Tensor, size: int, *, zoom: float = 1.0, stain: float = 0.0
) -> torch.Tensor:
    """Random flip, quarter turn, place, scale and stain of every image of a batch; see the module for the scale.

    Args:
        images: uint8 (b, 3, height, width).
        draws: uniform random numbers in [0, 1), (b, `DRAWS`); the result depends on nothing else.
        size: side of the square network input in pixels.
        zoom: the zoom is log-uniform in [1 / zoom, zoom]; 1 turns it off. Views wider than the image are filled
            by reflection.
        stain: strength of the stain jitter: the haematoxylin, eosin and residual densities are multiplied by
            U(1 - stain, 1 + stain) and shifted by U(-stain, stain) / 4 (after Tellez et al. 2018); 0 turns it off.

    Returns:
        float (b, 3, size, size) in [0, 1].
    """
    x = images.float().div_(255)
    height, width = x.shape[2:]
    turn = (draws[:, 0] * 8).long()  # the eight symmetries of the square
    finest = max(1.0, min(1 / CROP_PCT, height / size))  # never finer than what is cached
    magnify = zoom ** (2 * draws[:, 1] - 1) * finest ** draws[:, 10]
    step = (height / size) / magnify  # cached pixels from one output pixel to the next

    # Where the output's top left pixel may lie; whole cached pixels, so that without a zoom pixels are copied.
    span = step * (size - 1)
    room = torch.stack([width - 1 - span, height - 1 - span], 1)
    corner = torch.where(room >= 0, torch.floor(draws[:, PLACE] * (room + 1).clamp(min=1)).minimum(room), room / 2)
    centre = corner + span[:, None] / 2

    axis = torch.arange(size, device=x.device, dtype=x.dtype) - (size - 1) / 2
    quarter, flip = turn % 4, 1 - 2 * (turn // 4).to(x.dtype)
    cos = (quarter == 0).to(x.dtype) - (quarter == 2).to(x.dtype)
    sin = (quarter == 1).to(x.dtype) - (quarter == 3).to(x.dtype)
    u, v = axis[None, None, :] * flip[:, None, None], axis[None, :, None]
    turned = torch.stack(torch.broadcast_tensors(_col(cos) * u - _col(sin) * v, _col(sin) * u + _col(cos) * v), -1)
    where = turned * step[:, None, None, None] + centre[:, None, None, :]

    x = _sample(x, where, step, levels=max(0, math.ceil(math.log2(max(1.0, zoom * height / size)) - 0.25)))
    return _jitter_stain(x, draws[:, 4:10], stain) if stain else x


def _col(x: torch.Tensor) -> torch.Tensor:
    return x[:, None, None]


def _sample(x: torch.Tensor, where: torch.Tensor, step: torch.Tensor, levels: int) -> torch.Tensor:
    """Bilinear sampling at `where` (pixels), blended from halved copies where `step` would skip pixels (mip-mapping).

    Every image is sampled at every level and weighted, since choosing by value would make the host wait.
    """
    level = step.log2().clamp(0, levels)
    out = torch.zeros((), dtype=x.dtype, device=x.device)
    for k in range(levels + 1):
        if k:
            x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        last = torch.tensor([x.shape[3] - 1, x.shape[2] - 1], dtype=x.dtype).to(x.device, non_blocking=True)
        grid = ((where + 0.5) / 2**k - 0.5) * (2 / last) - 1
        picked = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=True)
        out = out + picked * (1 - (level - k).abs()).clamp(min=0)[:, None, None, None] if levels else picked
    return out


def _jitter_stain(x: torch.Tensor, draws: torch.Tensor, strength: float) -> torch.Tensor:
    stains, unmix = _STAINS.to(x, non_blocking=True), _UNMIX.to(x, non_blocking=True)
    scale = 1 + strength * (2 * draws[:, :3] - 1)
    shift = strength / 4 * (2 * draws[:, 3:6] - 1)
    # density @ inv(stains), scaled and shifted a stain, back @ stains: one 3x3 matrix an image
    mix = unmix @ (scale[:, :, None] * stains)
    density = -torch.log(x.clamp(min=1 / 255)).flatten(2)
    density = mix.transpose(1, 2) @ density + (shift @ stains)[:, :, None]
    return torch.exp(-density).clamp(max=1).view_as(x)
