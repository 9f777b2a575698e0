"""Whole slides: opened, read at any scale in bounded memory, covered by a grid of squares, and where tissue is.

Squares do not overlap and begin at the upper left corner; what does not fill a whole one at the right and lower edge
is left out. Pixels come from the coarsest level that is not coarser than what is shown.

**Tissue** is what is coloured. On a picture of the slide of 8 um/px (coarser if a side had more than `LONGEST` pixels)
the difference of the largest and the least of red, green and blue, averaged over squares of `BLUR` um, is held against
Otsu's threshold, which is kept between `CHROMA`, so that neither a white slide nor one full of tissue is cut in two.
Glass, shadows and black ink are grey. Specks and holes below `SMALLEST` are dust and lumina: they are taken away, and
filled.
"""

import math
import os
from typing import NamedTuple

import numpy as np
import scipy.ndimage
from PIL import Image

from magnification_invariant.data.apparent_scale import otsu
from magnification_invariant.data.scale import check_mpp
from magnification_invariant.data.stated_scale import checked

SLIDE_SUFFIXES = {".svs", ".svslide", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".czi", ".dcm"}
BLOCK = 2048  # most pixels of a side that are read at once for the picture
MASK_MPP, LONGEST = 8.0, 4096  # of the picture that tissue is found on: um/px, and most pixels of a side
BLUR = 40.0  # micrometres; clefts are narrower
CHROMA = (10, 20)  # of 255: least and largest threshold between grey and coloured
SMALLEST = 20_000.0  # square micrometres, a square of 140 um


class Grid(NamedTuple):
    """Squares that cover a slide.

    Attributes:
        level: of the slide that is read.
        step: level-0 pixels to one of this level.
        side: of a square in pixels of this level.
        mpp: um/px at the network's input.
        rows, columns: of squares.
    """

    level: int
    step: float
    side: int
    mpp: float
    rows: int
    columns: int

    def place(self, row: int, column: int) -> tuple[int, int]:
        """(x, y) of a square's upper left corner in level-0 pixels."""
        return round(column * self.side * self.step), round(row * self.side * self.step)


def openslide_library():
    """The module `openslide`; an extra, "wsi".

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import openslide
    except (ModuleNotFoundError, OSError) as error:  # the second: its library is not there, or does not load
        how = "whole slides are read by OpenSlide: pip install 'magnification-invariant[wsi]'"
        raise ModuleNotFoundError(how, name="openslide") from error
    return openslide


class Slide:
    """An opened slide.

    Attributes:
        size: width and height in level-0 pixels.
        mpp: um/px of level 0.
        notes: what is doubtful about its scale.

    Args:
        path: a file of any kind that OpenSlide reads.
        mpp: um/px; by default what the file states.

    Raises:
        ModuleNotFoundError: OpenSlide is not installed.
        ValueError: it is no slide; its scale is not known, or cannot be one.
        OpenSlideError: it is damaged.
    """

    def __init__(self, path: str | os.PathLike, mpp: float | None = None):
        openslide = openslide_library()
        if openslide.OpenSlide.detect_format(path) is None:
            raise ValueError(
                "it is no slide that OpenSlide reads; images are predicted into a file: --out predictions.parquet"
            )
        self.file, self.notes = openslide.OpenSlide(path), []
        self.size = self.file.dimensions
        stated = [self.file.properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
        stated = [float(each) for each in stated if each]
        if mpp is None and stated:
            mpp = checked("the slide", (stated[0], stated[-1]), self.notes)
        if mpp is None:
            why = "; ".join(self.notes) or "the slide does not state it"
            raise ValueError(f"its scale is not known: {why}; pass mpp, micrometres per pixel of its finest level")
        self.mpp = check_mpp(mpp)

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def level_for(self, mpp: float) -> int:
        """The coarsest level that is not coarser than `mpp` (by more than the hundredth that levels are rounded by)."""
        steps = self.file.level_downsamples
        return max((k for k, step in enumerate(steps) if step * self.mpp <= mpp * 1.01), key=steps.__getitem__)

    def read(self, level: int, place: tuple[int, int], size: tuple[int, int]) -> Image.Image:
        """A part of a level as RGB, on white; `place` (x, y) is in level-0 pixels, `size` in those of the level."""
        part = self.file.read_region(place, level, size)
        on = Image.new("RGB", size, "white")
        on.paste(part, mask=part.getchannel("A"))
        return on

    def grid(self, at: float, size: int) -> Grid:
        """Squares that are shown as `size` pixels at `at` um/px, or the nearest to it for which they have whole pixels.

        Raises:
            ValueError: the slide is smaller than one.
        """
        at = max(at, self.mpp)
        level = self.level_for(at)
        step = self.file.level_downsamples[level]
        side = max(size, round(size * at / (step * self.mpp)))
        width, height = self.file.level_dimensions[level]
        if min(width, height) < side:
            raise ValueError(
                f"its {self.size[0]} x {self.size[1]} pixels hold no tile of {side * step:.0f}: the slide is too small"
            )
        return Grid(level, step, side, step * self.mpp * side / size, height // side, width // side)

    def picture(self) -> tuple[Image.Image, float]:
        """The whole slide, small, and its um/px: means over areas, read in blocks; what tissue is found on."""
        mpp = max(MASK_MPP, self.mpp, max(self.size) * self.mpp / LONGEST)
        level = self.level_for(mpp)
        step, (full_width, full_height) = self.file.level_downsamples[level], self.file.level_dimensions[level]
        factor = mpp / (step * self.mpp)
        width, height = (max(1, round(side / factor)) for side in (full_width, full_height))
        small, n = Image.new("RGB", (width, height)), max(1, int(BLOCK / factor))
        for top in range(0, height, n):
            for left in range(0, width, n):
                right, bottom = min(left + n, width), min(top + n, height)
                x0, x1 = (x * full_width / width for x in (left, right))
                y0, y1 = (y * full_height / height for y in (top, bottom))
                x, y = int(x0), int(y0)
                part = self.read(level, (round(x * step), round(y * step)), (math.ceil(x1) - x, math.ceil(y1) - y))
                box = (x0 - x, y0 - y, min(x1 - x, part.width), min(y1 - y, part.height))
                small.paste(part.resize((right - left, bottom - top), Image.Resampling.BOX, box=box), (left, top))
        return small, self.size[0] * self.mpp / width


def find_tissue(pixels: np.ndarray, mpp: float) -> np.ndarray:
    """Where tissue is, bool (height, width), on uint8 RGB (height, width, 3) of `mpp` um/px; see the module."""
    chroma = np.ptp(pixels, axis=2).astype(np.float32)
    chroma = scipy.ndimage.uniform_filter(chroma, max(1, round(BLUR / mpp)), mode="nearest")
    mask = chroma > np.clip(otsu(chroma), *CHROMA)
    for part in (True, False):  # specks, then holes
        labels, n = scipy.ndimage.label(mask == part)
        small = np.bincount(labels.ravel(), minlength=n + 1) * mpp**2 < SMALLEST
        small[0] = False
        mask[small[labels]] = not part
    return mask


def tissue_shares(mask: np.ndarray, grid: Grid, size: tuple[int, int]) -> np.ndarray:
    """Share of tissue (rows, columns) of a grid's squares on a slide of `size` level-0 pixels."""
    ends = zip((grid.columns, grid.rows), size, mask.shape[::-1], strict=True)
    right, bottom = (min(n * grid.side * grid.step / whole * pixels, pixels) for n, whole, pixels in ends)
    image = Image.fromarray(mask.astype(np.float32))
    return np.asarray(image.resize((grid.columns, grid.rows), Image.Resampling.BOX, box=(0, 0, right, bottom)))
