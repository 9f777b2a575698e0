"""What can be predicted: files, folders, patterns, tables, pictures and arrays, each as an item with name and scale."""

import glob
import io
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from magnification_invariant.data.images import SUFFIXES, EncodedImages, open_image
from magnification_invariant.data.scale import check_mpp
from magnification_invariant.data.stated_scale import StatedScale, stated_scale


class Item(NamedTuple):
    """An image to predict, not yet opened.

    Attributes:
        name: what the result and messages call it.
        image: path, PIL image, array, or (`EncodedImages`, row).
        mpp: micrometres per pixel; None to look for them in the file.
    """

    name: str
    image: Any
    mpp: float | None


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Image files of paths that are files, folders (searched through, by suffix) or glob patterns, in sorted order.

    Raises:
        OSError: a path does not exist, a pattern or folder holds no image, or a folder cannot be read.
    """
    found: list[Path] = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            inside = []
            for folder, _, names in os.walk(path, onerror=_raise):
                inside += [Path(folder, name) for name in names if Path(name).suffix.lower() in SUFFIXES]
        elif path.exists():
            inside = [path]
        else:
            inside = [Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name)]
        if not inside:
            raise FileNotFoundError(f"{given} is no file, no pattern that fits one, and no folder with images in it")
        found += sorted(inside)
    return list(dict.fromkeys(found))


def _raise(error: OSError) -> None:
    raise error


def items_of(images, mpp: float | Sequence[float] | None = None, *, image_column: str = "image") -> list[Item]:
    """What `Classifier.predict` takes, as a list of `Item`.

    Args:
        images: one or several of: path, folder, glob pattern, PIL image, array (height, width[, 3 or 4]); or a
            `datasets.Dataset` with `image_column` and, where it knows them, ``mpp`` and ``filename``.
        mpp: micrometres per pixel of all images, or one a image; by default what table or file says.

    Raises:
        ValueError: an `mpp` that cannot be, or another number of them than of images.
        OSError: nothing is where a path points.
    """
    if hasattr(images, "column_names"):
        encoded = EncodedImages(images, image_column)
        names = images["filename"][:] if "filename" in images.column_names else map(str, range(len(images)))
        known = images["mpp"][:] if "mpp" in images.column_names else [None] * len(images)
        known = [None if each is None or math.isnan(each) else each for each in known]
        items = [Item(str(name), (encoded, i), known[i]) for i, name in enumerate(names)]
    else:
        one = isinstance(images, str | Path | Image.Image | np.ndarray)
        items = []
        for image in [images] if one else images:
            if isinstance(image, str | Path):
                items += [Item(str(path), path, None) for path in find_images([image])]
            else:
                items.append(Item(str(getattr(image, "filename", "") or len(items)), image, None))
    if mpp is None:
        return items
    given = [check_mpp(mpp)] * len(items) if np.ndim(mpp) == 0 else [check_mpp(each) for each in mpp]
    if len(given) != len(items):
        raise ValueError(f"{len(given)} scales for {len(items)} images")
    return [item._replace(mpp=each) for item, each in zip(items, given, strict=True)]


def open_item(image) -> Image.Image:
    """Opens what an item holds.

    Raises:
        ValueError: an array that is no picture, or no pixels.
        OSError: not an image.
    """
    if isinstance(image, tuple):
        encoded, i = image
        image = open_image(encoded[i])
    elif isinstance(image, str | Path):
        image = Image.open(image)
    elif isinstance(image, np.ndarray):
        if image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,), (4,)) or image.dtype not in ("u1", "u2"):
            raise ValueError(
                f"an array must be (height, width[, 3 or 4]) of uint8 or uint16, not {image.shape} of {image.dtype}"
            )
        image = Image.fromarray(image if image.dtype == "u1" else (image >> 8).astype(np.uint8)) if image.size else None
    if image is None or not all(image.size):
        raise ValueError("it has no pixels")
    return image


def scale_of(image: Any) -> StatedScale:
    """What the file of an item states of its scale; nothing of an array.

    Raises:
        OSError: not an image.
    """
    if isinstance(image, tuple):
        encoded, i = image
        path, content = encoded[i]
        return stated_scale(path if content is None else io.BytesIO(content))
    if isinstance(image, Image.Image):
        image = getattr(image, "filename", None) or getattr(image, "fp", None)
    if isinstance(image, str | Path) and str(image):
        return stated_scale(image)
    return StatedScale(None)
