"""Images as they are stored: opened, sized and turned to 8-bit RGB the same way everywhere.

Importing this raises Pillow's limit of pixels (`Image.MAX_IMAGE_PIXELS`) to `MOST_PIXELS`: whole fields are large.
What a decoder gives no sign of cannot be found: flipped bits in JPEG or WebP can be other pixels without a word.
"""

import bisect
import io
import os
import struct
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp"}
Encoded = tuple[str | None, bytes | None]  # path and bytes of an image as `datasets` stores it: the one, other or both


def _most_pixels() -> int:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 << 30
    return int(os.environ.get("MAGDG_MAX_PIXELS") or memory // 32)


MOST_PIXELS = _most_pixels()
"""Of an image that is opened: ``MAGDG_MAX_PIXELS``, else one for every 32 bytes of memory (of 8 GB, 268 million)."""

if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MOST_PIXELS)

_DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras give
_DARK = 64  # of 255: tissue on glass is lit from behind, and something in a field of it is bright
_PNG = b"\x89PNG\r\n\x1a\n"
# Chunks that change no pixel; of text only what can be no EXIF data.
_PLAIN = {b"IHDR", b"IDAT", b"IEND", b"pHYs", b"gAMA", b"sRGB", b"cHRM", b"tIME", b"bKGD", b"oFFs", b"vpAg", b"tEXt"}
_LEAST_BAND = 0.1  # of the height: as many lines of one colour at the bottom are said
_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM}
_TURNS |= {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE}
_TURNS |= {8: Image.Transpose.ROTATE_90}


def image_files(folder: str | os.PathLike, suffixes: set[str] = SUFFIXES) -> list[Path]:
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
            paths += [Path(parent, name) for name in filter(counts, names) if Path(name).suffix.lower() in suffixes]
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
    r"""A path as text; bytes that are no UTF-8, which no table can hold, are written as ``\xe4``."""
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
        image = self._rows[int(i)][self._column] or {"path": None, "bytes": None}
        return image["path"], image["bytes"]


def open_image(encoded: Encoded) -> Image.Image:
    """An image, not yet decoded.

    Raises:
        ValueError: There is none, or no regular file (whoever opens a named pipe may wait for ever), or it has more
            than `MOST_PIXELS`.
        OSError: It cannot be read, or is not an image.
    """
    path, content = encoded
    if path is None and content is None:
        raise ValueError("there is no image")
    if content is None and os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{printable(path)} is not a regular file")
    return opened(path if content is None else io.BytesIO(content))


def opened(file: str | os.PathLike | BinaryIO) -> Image.Image:
    """`PIL.Image.open` with `MOST_PIXELS` as the limit.

    Raises:
        ValueError: It has more pixels.
        OSError: It cannot be read, or is not an image.
    """
    try:
        image = Image.open(file)
        pixels = image.width * image.height
    except Image.DecompressionBombError:
        pixels = sys.maxsize
    if pixels > MOST_PIXELS:
        raise ValueError(
            f"it has more than {MOST_PIXELS:,} pixels, the most that this machine's memory is trusted with: cut it "
            "into parts, predict it as a whole slide (magdg predict --out FOLDER), or set MAGDG_MAX_PIXELS to a larger "
            "number"
        )
    return image


def name_of(encoded: Encoded) -> str:
    """What to call the image in a message."""
    return repr(encoded[0] or "(embedded, without a name)")


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as shown, that is after the turn that EXIF asks for; no pixel is decoded."""
    # Pillow decodes a whole PNG to look for EXIF data behind the pixels, where hardly any file has them; the size of a
    # TIFF it has turned already.
    has_exif = "exif" in image.info if image.format == "PNG" else image.format != "TIFF"
    turned = has_exif and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    width, height = image.size
    return (height, width) if turned else (width, height)


def to_rgb(image: Image.Image, notes: list[str] | None = None) -> Image.Image:
    """8-bit RGB as a viewer shows it: turned as EXIF asks for, transparency on white, of several frames the first.

    Of 16 bits the upper 8 are kept; of 10, 12 or 14 bits in 16, the upper 8 of those, see `eight_bits`.

    Args:
        image: Opened by Pillow.
        notes: What is doubtful about the pixels is added to it.

    Raises:
        ValueError: Values have no known range (32-bit integers, floating point).
    """
    notes = [] if notes is None else notes
    image = _plain_png(image) or image
    lower = _lower_bytes(image)
    image.load()
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    _check_range(image)
    if image.mode.startswith("I;16"):
        image = _grey(image, notes)
    elif lower and max(high for _, high in image.getextrema()[:3]) < 64:
        values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(lower)
        parts = eight_bits(values[..., :3], notes), eight_bits(values[..., 3:], [])  # colours, and transparency
        image = Image.fromarray(np.concatenate(parts, axis=2))
    image = _on_white(image, notes)
    _note_doubts(image, notes)
    return image if turn is None else image.transpose(turn)


@cache
def _png_decoder() -> Callable[[bytes, tuple[int, int], str], np.ndarray] | None:
    try:
        from kornia_rs.io import decode_image_png_u8
    except ImportError:
        return None
    return decode_image_png_u8


def _plain_png(image: Image.Image) -> Image.Image | None:
    """A whole PNG of 8-bit RGB, decoded by kornia-rs, if it is there: Pillow's pixels in a third of the time.

    None is for Pillow to decode: all else, also what is damaged, of which it is to say how.
    """
    decode = _png_decoder()
    if decode is None or image.format != "PNG" or [tile[3] for tile in getattr(image, "tile", [])] != ["RGB"]:
        return None
    place = image.fp.tell()
    image.fp.seek(0)
    content = image.fp.read()
    image.fp.seek(place)
    try:
        kinds, at = [], len(_PNG)
        while at < len(content):
            length, kind = struct.unpack_from(">I4s", content, at)
            kinds.append(b"EXIF" if content.startswith(b"Raw profile", at + 8) else kind)
            at += length + 12
        if at != len(content) or kinds[-1] != b"IEND" or not _PLAIN.issuperset(kinds):
            return None
        return Image.fromarray(decode(content, (image.height, image.width), "rgb"))
    except Exception:  # whatever the decoder raises
        return None


def _check_range(image: Image.Image) -> None:
    if image.mode in ("I", "F"):
        raise ValueError(f"values of mode {image.mode!r} have no known range; store the image with 8 or 16 bits")


def eight_bits(values: np.ndarray, notes: list[str], highest: int = 0) -> np.ndarray:
    """The upper 8 of the bits that uint16 values use, as uint8; fewer than 16 are noted.

    Args:
        values: Of any shape.
        notes: See `to_rgb`.
        highest: What the file says is the highest value that can be; 0 if it does not, and the maximum of the values
            tells, to the next of 8, 10, 12, 14 and 16 bits.
    """
    most = int(values.max(initial=0))
    bits = next(depth for depth in _DEPTHS if max(most, highest) >> depth == 0) if most else 16
    if bits < 16:
        how = "as it says" if highest else f"by their maximum of {most}"
        notes.append(f"its 16-bit values have {bits} bits, {how}, and are shown so")
    return (values >> bits - 8).astype(np.uint8)


def _grey(image: Image.Image, notes: list[str]) -> Image.Image:
    """Of 16 bits; TIFF's "white is zero", which Pillow inverts in 8 bits only, is inverted."""
    tags = getattr(image, "tag_v2", {})
    said = [tags.get(tag) for tag in (281, 341)]  # MaxSampleValue, SMaxSampleValue
    said = [int(np.max(value)) for value in said if value is not None]
    bits = int(np.max(tags.get(258, 16)))  # BitsPerSample
    values = np.asarray(image)
    grey = eight_bits(values, notes, max([*said, (1 << bits) - 1 if bits < 16 else 0]))
    if tags.get(262) == 0:
        grey = 255 - grey
    if isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = 255
    return Image.fromarray(grey)


def _lower_bytes(image: Image.Image) -> Image.Image | None:
    """Of an image of three or four times 16 bits that is not yet decoded, of which Pillow gives the upper bytes."""
    swapped = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
    tiles = []
    for codec, box, offset, args in getattr(image, "tile", []):
        raw, *rest = [args] if isinstance(args, str) else args
        if not isinstance(raw, str) or raw[:-1] not in ("RGB;16", "RGBX;16", "RGBA;16"):
            return None
        raw = raw[:-1] + swapped[raw[-1]]
        tiles.append((codec, box, offset, raw if isinstance(args, str) else (raw, *rest)))
    if not tiles:
        return None
    place = image.fp.tell()
    image.fp.seek(0)
    lower = Image.open(io.BytesIO(image.fp.read()))
    image.fp.seek(place)
    lower.seek(image.tell())
    lower.tile = [type(old)(*new) for old, new in zip(lower.tile, tiles, strict=True)]
    return lower


def _on_white(image: Image.Image, notes: list[str]) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            notes.append("its transparent parts are shown on white")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _note_doubts(image: Image.Image, notes: list[str]) -> None:
    """Notes bands of one colour and darkness.

    With the one, decoders and file systems fill what a cut file lacks; the other is what few bits in a large container
    look like where a decoder gives the upper ones alone.
    """
    width, height = image.size

    def varies(lines: int) -> bool:
        return any(low != high for low, high in image.crop((0, height - lines, width, height)).getextrema())

    if not height:
        return
    brightest = max(high for _, high in image.getextrema())
    if not varies(max(1, round(height * _LEAST_BAND))):
        lines = bisect.bisect_left(range(1, height + 1), True, key=varies)
        if lines == height:
            notes.append("hardly any tissue: a field of one colour")
            return
        colour = image.getpixel((0, height - 1))
        notes.append(f"its last {lines} of {height} lines are of one colour {colour}: is a part of it missing?")
    if brightest < _DARK:
        notes.append(f"dark: nothing is brighter than {brightest} of 255; does it use fewer bits than its file has?")


def check(file: str | os.PathLike | BinaryIO) -> tuple[int, int]:
    """Width and height as shown of a whole image. As little decoding as finds damage.

    Raises:
        Exception: it is none; Pillow raises OSError, SyntaxError, ValueError, struct.error ... on damaged files.
    """
    with opened(file) as image:
        width, height = shown_size(image)
        _check_range(image)
        if image.format == "PNG":
            image.verify()  # checksums, no decoding
        else:
            if image.format == "JPEG":
                # Reads all coefficients, computes few pixels.
                image.draft(None, (max(1, width // 8), max(1, height // 8)))
            image.load()
    return width, height
