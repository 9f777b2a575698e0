"""Images as they are stored: opened, sized and turned to 8-bit RGB the same way everywhere."""

import io
import os
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

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


MOST_PIXELS = 1_000_000_000  # of one image: 3 GB once it is decoded
_OPENING = threading.Lock()


def opened(file: Any) -> Image.Image:
    """`PIL.Image.open` of a path or binary file, with a limit for large images that is ours and not Pillow's.

    Raises:
        ValueError: It has more than `MOST_PIXELS` pixels.
        OSError: It is no image.
    """
    with _OPENING:  # the limit is the process's; other users of Pillow keep theirs
        theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = theirs
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels are more than the {MOST_PIXELS:,} that are decoded at once: cut it "
            "into fields, or save it at a coarser scale"
        )
    return image


def open_image(encoded: Encoded) -> Image.Image:
    path, content = encoded
    return opened(path if content is None else io.BytesIO(content))


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


def to_rgb(image: Image.Image, notes: list[str] | None = None) -> Image.Image:
    """8-bit RGB as a viewer shows it: turned as EXIF asks for, on white where it is transparent, of frames the first.

    Grey values of 10, 12 or 14 bits in 16 are scaled by their own depth (`bit_depth`), and inverted where TIFF's
    photometric interpretation says that 0 is white.

    Args:
        image: Of any mode.
        notes: Gets what must be said of the picture: a depth that was guessed, a part that may be missing.

    Raises:
        ValueError: values have no known range (32-bit integers, floating point).
    """
    notes = [] if notes is None else notes
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = _grey16(image, notes)
    elif tuple(getattr(image, "tag_v2", {}).get(_BITS, ())) == (16, 16, 16):
        image = _rgb16(image, notes)
    if image.mode in ("I", "F"):
        raise ValueError(f"values of mode {image.mode!r} have no known range; store the image with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    notes += _missing_part(np.asarray(image))
    return image


_BITS, _PHOTOMETRIC, _MOST_VALUE, _MOST_SAMPLE = 258, 262, 281, 341  # tags of TIFF


def bit_depth(values: np.ndarray, stated: Any, notes: list[str]) -> int:
    """Bits that 16-bit values use: by TIFF's tag of the largest, else the fewest of 10, 12, 14, 16 that hold them."""
    largest = int(max(stated)) if isinstance(stated, tuple) and stated else int(stated or 0)
    bits = next((bits for bits in (10, 12, 14) if (largest or int(values.max(initial=0))) < 2**bits), 16)
    if bits < 16 and not largest:
        notes.append(f"its largest value is {values.max(initial=0)} of 16 bits: it is taken to have {bits}")
    return bits


def _grey16(image: Image.Image, notes: list[str]) -> Image.Image:
    tags, values = getattr(image, "tag_v2", {}), np.asarray(image).astype(np.uint16)
    bits = bit_depth(values, tags.get(_MOST_SAMPLE) or tags.get(_MOST_VALUE), notes)
    values = (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(255 - values if tags.get(_PHOTOMETRIC) == 0 else values)


def _rgb16(image: Image.Image, notes: list[str]) -> Image.Image:
    """Pillow keeps the upper 8 of 16 bits, whatever the values' depth."""
    import tifffile

    tags = image.tag_v2
    image.fp.seek(0)
    with tifffile.TiffFile(image.fp) as tiff:
        values = tiff.pages[0].asarray()
    values = np.moveaxis(values, 0, -1) if values.shape[0] == 3 and values.shape[-1] != 3 else values
    bits = bit_depth(values, tags.get(_MOST_SAMPLE) or tags.get(_MOST_VALUE), notes)
    return Image.fromarray((values >> (bits - 8)).clip(0, 255).astype(np.uint8))


def _missing_part(pixels: np.ndarray) -> list[str]:
    """Says where the lower part of a picture is of exactly one colour, as where a copy was cut and closed again."""
    same = (pixels == pixels[-1, -1]).all((1, 2))
    lines = len(same) if same.all() else int(same[::-1].argmin())
    if lines == len(same):
        return ["it is of one colour: there is no tissue in it"]
    share = lines / len(same)
    return [f"the lowest {share:.0%} of it are of exactly one colour: a part may be missing"] * (share >= 0.1)


def check(file: str | os.PathLike | BinaryIO) -> tuple[int, int]:
    """Width and height as shown of a whole image. As little decoding as finds damage.

    Raises:
        Exception: it is none; Pillow raises OSError, SyntaxError, ValueError, struct.error ... on damaged files.
    """
    with opened(file) as image:
        width, height = shown_size(image)
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
