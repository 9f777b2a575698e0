"""Images as they are stored: opened, sized and turned to 8-bit RGB the same way everywhere."""

import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp"}
Encoded = tuple[str | None, bytes | None]  # path and bytes of an image as `datasets` stores it: the one, other or both


def image_files(folder: str | os.PathLike) -> list[Path]:
    """Image files below a folder, by suffix, sorted: the one rule of what counts as one.

    What is hidden is left out, and so are the twins that macOS adds (``._name.png``, ``__MACOSX``). Links are
    followed, into each folder once. What is called like an image but is no regular file (a named pipe, a link to
    nothing) is left out with a warning: whoever opens it may wait for ever. Names need not be UTF-8.

    Raises:
        OSError: A folder cannot be read.
    """

    def counts(name: str) -> bool:
        return not name.startswith((".", "__MACOSX"))

    paths, entered = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(parent)
        folders[:] = [] if real in entered else sorted(filter(counts, folders))
        if real not in entered:
            paths += [Path(parent, name) for name in filter(counts, names) if Path(name).suffix.lower() in SUFFIXES]
        entered.add(real)
    irregular = sorted(path for path in paths if not path.is_file())
    if irregular:
        warnings.warn(
            f"{len(irregular):,} of {len(paths):,} images below {folder} are left out, the first of them "
            f"{irregular[0]}: not a file, or a link to none",
            stacklevel=2,
        )
    return sorted(set(paths) - set(irregular))


def printable(path: str | os.PathLike) -> str:
    """A path as text; bytes that are no UTF-8, which no table can hold, are written as ``\\xe4``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _raise(error: OSError) -> None:
    raise error


class EncodedImages:
    """The images of a table, undecoded: `images[i]` is (path, bytes), read when asked for.

    The table is a `datasets.Dataset`, or a mapping from names to columns with paths or encoded bytes for images, which
    needs no `datasets`.

    Raises:
        ValueError: the table has no such column.
    """

    def __init__(self, ds, image_column: str = "image"):
        names = list(ds) if isinstance(ds, Mapping) else ds.column_names
        if image_column not in names:
            raise ValueError(f"no column {image_column!r} in the table; it has {', '.join(names)}")
        self._column = image_column
        if isinstance(ds, Mapping):
            encoded = [(None, x) if isinstance(x, bytes) else (os.fspath(x), None) for x in ds[image_column]]
            self._rows = [{image_column: {"path": path, "bytes": content}} for path, content in encoded]
            return
        import datasets

        column = ds.with_format(None).select_columns([image_column])
        self._rows = column.cast_column(image_column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Encoded:
        image = self._rows[int(i)][self._column]
        return image["path"], image["bytes"]


def open_image(encoded: Encoded) -> Image.Image:
    path, content = encoded
    return Image.open(path if content is None else io.BytesIO(content))


def name_of(encoded: Encoded) -> str:
    """What to call the image in a message."""
    return repr(encoded[0] or "(embedded, without a name)")


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as shown, that is after the turn that EXIF asks for; no pixel is decoded."""
    # Pillow decodes a whole PNG to look for EXIF data behind the pixels, where hardly any file has them; the size of a
    # TIFF it has turned already.
    has_exif = "exif" in image.info if image.format == "PNG" else image.format != "TIFF"
    turned = has_exif and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return image.size[::-1] if turned else image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, turned as EXIF asks for; of 16 bits the upper 8 are kept, of several frames the first.

    Raises:
        ValueError: values have no known range (32-bit integers, floating point).
    """
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"values of mode {image.mode!r} have no known range; store the image with 8 or 16 bits")
    return image if image.mode == "RGB" else image.convert("RGB")


def check(file: str | os.PathLike | BinaryIO) -> tuple[int, int]:
    """Width and height as shown of a whole image. As little decoding as finds damage.

    Raises:
        Exception: it is none; Pillow raises OSError, SyntaxError, ValueError, struct.error ... on damaged files.
    """
    with Image.open(file) as image:
        (width, height), limit = shown_size(image), Image.MAX_IMAGE_PIXELS
        if limit and width * height > limit:
            raise Image.DecompressionBombError(f"{width} x {height} pixels are more than the limit of {limit}")
        if image.mode in ("I", "F"):
            raise ValueError(f"values of mode {image.mode!r} have no known range; store it with 8 or 16 bits")
        if image.format == "PNG":
            image.verify()  # checksums, no decoding
        else:
            if image.format == "JPEG":
                # Reads all coefficients, computes few pixels.
                image.draft(None, (max(1, width // 8), max(1, height // 8)))
            image.load()
    return width, height
