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

from magnification_invariant.data.images import EncodedImages, bit_depth, image_files, open_image, opened, printable
from magnification_invariant.data.scale import check_mpp
from magnification_invariant.data.stated_scale import StatedScale, stated_scale

KINDS = "a path, folder or pattern, the bytes of a file or an open one, a PIL image, or an array or tensor"
_ONE = str | Path | bytes | bytearray | io.IOBase | Image.Image | np.ndarray


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


def find_images(given_paths: Iterable[str | Path]) -> list[Path]:
    """Image files of paths that are files, folders (by the rule of `image_files`) or glob patterns, in sorted order.

    Raises:
        OSError: a path does not exist, a pattern or folder holds no image, or a folder cannot be read.
    """
    paths: list[Path] = []
    for given in given_paths:
        path = Path(given).expanduser()
        if path.is_dir():
            inside = image_files(path)
        elif path.exists():
            inside = [path]
        else:
            inside = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
        if not inside:
            raise FileNotFoundError(f"{given} is no file, no pattern that fits one, and no folder with images in it")
        paths += inside
    return list(dict.fromkeys(paths))


def items_of(images, mpp: float | Sequence[float] | None = None, *, image_column: str = "image") -> list[Item]:
    """What `Classifier.predict` takes, as a list of `Item`.

    Args:
        images: one or several of `KINDS`; or a `datasets.Dataset` with `image_column` and, where it knows them,
            ``mpp`` and ``filename``.
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
        one = images is None or isinstance(images, _ONE) or hasattr(images, "cpu")
        items = []
        for image in [images] if one else images:
            if isinstance(image, str | Path):
                items += [Item(printable(path), path, None) for path in find_images([image])]
            else:
                name = getattr(image, "filename", "") or getattr(image, "name", "")
                items.append(Item(printable(name) if isinstance(name, str) and name else str(len(items)), image, None))
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
    if hasattr(image, "cpu"):  # a tensor
        image = image.detach().cpu().numpy()
        if image.ndim == 3 and image.shape[0] in (1, 3, 4) and image.shape[2] not in (3, 4):
            image = image.transpose(1, 2, 0).squeeze()
    if isinstance(image, tuple):
        encoded, i = image
        image = open_image(encoded[i])
    elif isinstance(image, str | Path):
        if not os.path.isfile(image):
            raise ValueError("it is no regular file" if os.path.exists(image) else "there is no such file")
        image = opened(image)
    elif isinstance(image, bytes | bytearray):
        image = opened(io.BytesIO(image))
    elif isinstance(image, io.IOBase):
        image = opened(image)
    elif isinstance(image, np.ndarray):
        if image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,), (4,)) or image.dtype not in ("u1", "u2"):
            raise ValueError(
                f"an array must be (height, width[, 3 or 4]) of uint8 or uint16, not {image.shape} of {image.dtype}"
            )
        image = _of_array(image) if image.size else None
    elif not isinstance(image, Image.Image):
        raise ValueError(f"{type(image).__name__} is no image: give {KINDS}")
    if image is None or not all(image.size):
        raise ValueError("it has no pixels")
    return image


def _of_array(array: np.ndarray) -> Image.Image:
    if array.dtype == "u1" or array.ndim == 2:
        return Image.fromarray(array)
    return Image.fromarray((array >> (bit_depth(array, None, []) - 8)).astype(np.uint8))


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
    if isinstance(image, bytes | bytearray):
        image = io.BytesIO(image)
    if isinstance(image, io.IOBase) or (isinstance(image, str | Path) and os.path.isfile(image)):
        stated = stated_scale(image)
        if isinstance(image, io.IOBase):
            image.seek(0)
        return stated
    return StatedScale(None)
