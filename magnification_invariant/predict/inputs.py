"""What can be predicted: files, folders, patterns, tables, pictures and arrays, each as an item with name and scale."""

import glob
import io
import math
import os
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from magnification_invariant.data.images import SUFFIXES, EncodedImages, eight_bits, image_files, open_image, printable
from magnification_invariant.data.scale import check_mpp
from magnification_invariant.data.stated_scale import StatedScale, stated_scale

_PIXELS = "(height, width[, 3 or 4]) or (3 or 4, height, width) of uint8 or uint16"
TAKEN = (
    "what is taken is a path, a folder, a glob pattern, an image file's bytes or the file opened in binary mode, a PIL "
    f"image, an array or tensor {_PIXELS}, several of these, or a datasets.Dataset"
)


class Item(NamedTuple):
    """An image to predict, not yet opened.

    Attributes:
        name: what the result and messages call it.
        image: path, bytes of a file, PIL image, array, or (`EncodedImages`, row).
        mpp: micrometres per pixel; None to look for them in the file.
    """

    name: str
    image: Any
    mpp: float | None


def find_images(paths: Iterable[str | os.PathLike], suffixes: set[str] = SUFFIXES) -> list[Path]:
    """Image files of paths that are files, folders (see `data.images.image_files`) or glob patterns, each sorted.

    Raises:
        OSError: a path does not exist, a pattern or folder holds no image, or a folder cannot be read.
    """
    paths_found: list[Path] = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            inside = image_files(path, suffixes)
        elif path.exists():
            inside = [path]
        else:
            inside = [Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name)]
        if not inside:
            name = printable(given)
            raise FileNotFoundError(f"{name} is no file, no pattern that fits one, and no folder with images in it")
        paths_found += sorted(inside)
    return list(dict.fromkeys(paths_found))


def items_of(images, mpp: float | Sequence[float] | None = None, *, image_column: str = "image") -> list[Item]:
    """What `Classifier.predict` takes, as a list of `Item`.

    Args:
        images: one or several of: path, folder, glob pattern, bytes of an image file, open binary file, PIL image,
            array or tensor (height, width[, 3 or 4]) or (3 or 4, height, width); or a `datasets.Dataset` with
            `image_column` and, where it knows them, ``mpp`` and ``filename``.
        mpp: micrometres per pixel of all images, or one a image; by default what table or file says.

    Raises:
        ValueError: an `mpp` that cannot be, or another number of them than of images; something else than an image.
        OSError: nothing is where a path points.
    """
    if hasattr(images, "column_names"):
        encoded = EncodedImages(images, image_column)
        names = images["filename"][:] if "filename" in images.column_names else map(str, range(len(images)))
        known = images["mpp"][:] if "mpp" in images.column_names else [None] * len(images)
        known = [None if each is None or math.isnan(each) else each for each in known]
        items = [Item(str(name), (encoded, i), known[i]) for i, name in enumerate(names)]
    else:
        is_one = isinstance(images, str | os.PathLike | bytes | bytearray | Image.Image) or hasattr(images, "read")
        is_one = is_one or isinstance(images, type) or not isinstance(images, Iterable)
        items = []
        for image in [images] if is_one or (hasattr(images, "shape") and len(images.shape) < 4) else images:
            items += _items(image, len(items))
    if mpp is None:
        return items
    given = [check_mpp(mpp)] * len(items) if np.ndim(mpp) == 0 else [check_mpp(each) for each in mpp]
    if len(given) != len(items):
        raise ValueError(f"{len(given)} scales for {len(items)} images")
    return [item._replace(mpp=each) for item, each in zip(items, given, strict=True)]


def patients_by_name(items: Sequence[Item], pattern: str) -> list[str]:
    """The patient of every item: what the one group of a regular expression finds in its name.

    Raises:
        ValueError: it is no regular expression with one group; it finds nothing in a name.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    if expression.groups != 1:
        raise ValueError(f"{pattern!r} must have one group, (...), which is the patient; it has {expression.groups}")
    matches = [expression.search(item.name) for item in items]
    missed = [item.name for item, match in zip(items, matches, strict=True) if not (match and match[1])]
    if missed:
        raise ValueError(f"{pattern!r} finds no patient in {len(missed)} of {len(items)} names, first: {missed[0]}")
    return [match[1] for match in matches if match]


def _items(image: Any, number: int) -> list[Item]:
    """One of `items_of`; a path can be a folder."""
    if isinstance(image, str | os.PathLike):
        return [Item(printable(path), path, None) for path in find_images([image])]
    name = str(number)
    if isinstance(image, Image.Image) or hasattr(image, "read"):
        known = getattr(image, "filename", None) or getattr(image, "name", None)
        name = printable(known) if known and isinstance(known, str | bytes | os.PathLike) else name
    if hasattr(image, "read"):
        if image.seekable():
            image.seek(0)
        image = image.read()
    elif hasattr(image, "detach"):
        image = image.detach().cpu()
        image = image.numpy() if str(image.dtype) in ("torch.uint8", "torch.uint16") else image
    if not isinstance(image, bytes | bytearray | Image.Image | np.ndarray):
        kind = f"{tuple(image.shape)} of {image.dtype}" if hasattr(type(image), "dtype") else type(image).__name__
        raise ValueError(f"image {name} is no image but {kind}: {TAKEN}")
    return [Item(name, image, None)]


def open_item(image: Any, notes: list[str] | None = None) -> Image.Image:
    """Opens what an item holds; what is doubtful about an array of 16 bits is added to `notes`.

    Raises:
        ValueError: an array that is no picture, no pixels, or no regular file.
        OSError: not an image.
    """
    if isinstance(image, np.ndarray):
        image = _picture(image, [] if notes is None else notes)
    elif not isinstance(image, Image.Image):
        image = open_image(_encoded(image))
    if not all(image.size):
        raise ValueError("it has no pixels")
    return image


def _encoded(image: Any) -> tuple[str | None, bytes | None]:
    if isinstance(image, tuple):
        encoded, i = image
        return encoded[i]
    return (None, bytes(image)) if isinstance(image, bytes | bytearray) else (os.fspath(image), None)


def _picture(pixels: np.ndarray, notes: list[str]) -> Image.Image:
    if not pixels.size:
        raise ValueError("it has no pixels")
    if pixels.ndim == 3 and pixels.shape[2] not in (3, 4) and pixels.shape[0] in (3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,), (4,)) or pixels.dtype not in ("u1", "u2"):
        raise ValueError(f"an array must be {_PIXELS}, not {pixels.shape} of {pixels.dtype}")
    return Image.fromarray(np.ascontiguousarray(pixels if pixels.dtype == "u1" else eight_bits(pixels, notes)))


def scale_of(image: Any) -> StatedScale:
    """What the file of an item states of its scale, also of a PIL image that was opened from one; nothing of an array.

    Raises:
        OSError: not an image.
    """
    if isinstance(image, np.ndarray):
        return StatedScale(None)
    if not isinstance(image, Image.Image):
        path, content = _encoded(image)
        return stated_scale(path if content is None else io.BytesIO(content))
    if image.format not in ("TIFF", "MPO"):  # no other kind states a scale, and what is computed has no format
        return StatedScale(None)
    path = getattr(image, "filename", None)
    if path and os.path.isfile(path):
        return stated_scale(path)
    files = (getattr(image, name, None) for name in ("fp", "_fp"))  # the second outlives the decoding
    file = next((file for file in files if file is not None and hasattr(file, "seek") and not file.closed), None)
    return stated_scale(file) if file else StatedScale(None)


class _Listener:
    """Collects what Pillow warns of, a thread at a time; `warnings.catch_warnings` is one for all threads."""

    def __init__(self):
        self._lock, self._thread, self._listening = threading.Lock(), threading.local(), 0

    @contextmanager
    def __call__(self, notes: list[str]) -> Iterator[None]:
        with self._lock:
            if not self._listening:
                self._catcher = warnings.catch_warnings()
                self._catcher.__enter__()
                self._elsewhere, warnings.showwarning = warnings.showwarning, self._show
                warnings.filterwarnings("always", category=UserWarning, module=r"PIL\b")
            self._listening += 1
        self._thread.notes = notes
        try:
            yield
        finally:
            self._thread.notes = None
            with self._lock:
                self._listening -= 1
                if not self._listening:
                    self._catcher.__exit__(None, None, None)

    def _show(self, message, category, *place, **options) -> None:
        notes = getattr(self._thread, "notes", None)
        if notes is None or not issubclass(category, UserWarning):
            self._elsewhere(message, category, *place, **options)
        elif (text := " ".join(str(message).split())) not in notes:
            notes.append(text)


pillow_warnings = _Listener()
