"""The scale that a file states, in OME-XML, a scanner's description, ImageJ's or TIFF's resolution."""

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from magnification_invariant.data.images import opened
from magnification_invariant.data.scale import check_mpp

# Micrometres of the units of length that OME's schema has, and of what others write for them.
_METRIC = {"ym": -18, "zm": -15, "am": -12, "fm": -9, "pm": -6, "nm": -3, "um": 0, "mm": 3, "cm": 4, "dm": 5, "m": 6}
_METRIC |= {"dam": 7, "hm": 8, "km": 9, "Mm": 12, "Gm": 15}
UNITS = {name: 10.0**power for name, power in _METRIC.items()}
UNITS |= {"micron": 1.0, "microns": 1.0, "micrometer": 1.0, "micrometers": 1.0, "micrometre": 1.0, "micrometres": 1.0}
UNITS |= {"nanometer": 1e-3, "nanometre": 1e-3, "millimeter": 1e3, "millimetre": 1e3, "meter": 1e6, "metre": 1e6}
UNITS |= {"centimeter": 1e4, "centimetre": 1e4, "angstrom": 1e-4, "\u00c5": 1e-4, "A": 1e-4, "thou": 25.4, "mil": 25.4}
UNITS |= {"li": 25_400 / 12, "in": 25_400.0, "inch": 25_400.0, '"': 25_400.0, "ft": 304_800.0, "yd": 914_400.0}
UNITS |= {"pt": 25_400 / 72, "mi": 1.609344e9}
_NO_LENGTH = ("pixel", "pixels", "reference frame", "")
_RESOLUTION_UNITS = {2: "inch", 3: "cm"}  # of TIFF
_SQUARE = 1.05  # pixels whose sides differ by more are said not to be square


@dataclass(frozen=True)
class StatedScale:
    """What a file says of its scale.

    Attributes:
        mpp: micrometres per pixel, of pixels that are not square the geometric mean; None if it states none that can
            be used.
        note: what is to be said of it, or why it cannot be used; empty if there is nothing to say.
    """

    mpp: float | None
    note: str = ""


def read_mpp(file) -> float | None:
    """Micrometres per pixel as an image file states it, or None; see `stated_scale`."""
    return stated_scale(file).mpp


def stated_scale(file) -> StatedScale:
    """Looks at OME-XML, a scanner's description, ImageJ's and TIFF's resolution; the first of these that states counts.

    Args:
        file: path, or a binary file, of an image of any kind; only TIFF states a scale that is meant.

    Raises:
        OSError: it cannot be read as an image.
    """
    with opened(file) as image:
        size = image.size
        if image.format not in ("TIFF", "MPO") and not getattr(image, "tag_v2", None):
            return StatedScale(None)
    description, resolution = _tags(file)
    notes = []
    for source, values in (
        ("its OME-XML", _ome(description, size, notes)),
        ("its description", _scanner(description)),
        ("ImageJ's description", _imagej(description, resolution, notes)),
        ("TIFF's resolution", _resolution(resolution)),
    ):
        if values:
            found = checked(source, values, notes)
            if found is not None and source != "TIFF's resolution":
                _contradiction(source, found, _resolution(resolution), notes)
            return StatedScale(found, "; ".join(notes))
    return StatedScale(None, "; ".join(notes))


def _tags(file) -> tuple[str, tuple[float, float, int]]:
    """Description of the first page, and pixels a unit in x and y with TIFF's unit (0 where it has none)."""
    import tifffile

    if hasattr(file, "seek"):
        file.seek(0)
    try:
        with tifffile.TiffFile(file) as tiff:
            tags = {tag.name: tag.value for tag in tiff.pages[0].tags.values()}
    except (tifffile.TiffFileError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise OSError(f"its TIFF tags cannot be read: {error}") from error
    description = tags.get("ImageDescription", "")
    if isinstance(description, bytes):
        description = description.decode("utf-8", "replace")
    x, y = (_ratio(tags.get(name)) for name in ("XResolution", "YResolution"))
    return str(description), (x, y, int(tags.get("ResolutionUnit", 2) or 0))


def _ratio(value: Any) -> float:
    try:
        return value[0] / value[1] if isinstance(value, tuple) else float(value or 0)
    except (ZeroDivisionError, TypeError, ValueError):
        return 0.0


def _number(text: str | None) -> float | None:
    """A positive finite number, with a point or a comma."""
    try:
        value = float((text or "").strip().replace(",", "."))
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _factor(unit: str, source: str, notes: list[str]) -> float | None:
    """Micrometres of a unit as people write it."""
    name = re.sub("\u00c2?\u00b5|\u03bc|\\\\u00[bB]5", "u", unit.strip())  # the micro signs that are in use
    factor = UNITS.get(name) or UNITS.get(name.lower())
    if factor is None:
        kind = "which is no length" if name in _NO_LENGTH else "a unit that is not known"
        notes.append(f"{source} gives it in {unit!r}, {kind}")
    return factor


def checked(source: str, values: tuple[float, float], notes: list[str]) -> float | None:
    """One scale (um/px) of those in x and y, or None if it cannot be; what is to be said is added to `notes`."""
    x, y = values
    if max(x, y) > _SQUARE * min(x, y):
        notes.append(f"{source} says {x:g} x {y:g} um/px: its pixels are not square, the geometric mean is taken")
    try:
        return check_mpp((x * y) ** 0.5)
    except ValueError as error:
        notes.append(f"{source} says {(x * y) ** 0.5:g} um/px, which cannot be ({error})")
        return None


def _contradiction(source: str, mpp: float, other: tuple[float, float] | None, notes: list[str]) -> None:
    if other is None:
        return
    mean = (other[0] * other[1]) ** 0.5
    try:
        check_mpp(mean)  # 72 dpi means nothing
    except ValueError:
        return
    if not 1 / _SQUARE < mean / mpp < _SQUARE:
        notes.append(f"{source} says {mpp:g} um/px, which is taken, and TIFF's resolution {mean:g}: check it")


def _local(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _children(element: ElementTree.Element, name: str) -> Iterator[ElementTree.Element]:
    return (child for child in element.iter() if _local(child) == name)


def _ome(description: str, size: tuple[int, int], notes: list[str]) -> tuple[float, float] | None:
    """Of the Image in the OME-XML that the first page belongs to."""
    if "<OME" not in description and ":OME" not in description[:300]:
        return None
    try:
        root = ElementTree.fromstring(re.sub(r"^\s*<\?xml[^>]*\?>", "", description.strip("\0 \r\n\t\ufeff")))
    except ElementTree.ParseError as error:
        notes.append(f"its OME-XML is damaged ({error})")
        return None
    of_page = []
    for pixels in _children(root, "Pixels"):
        pages = [int(data.get("IFD", 0)) for data in _children(pixels, "TiffData")]
        if 0 in pages or not pages:
            of_page.append(pixels)
    shape = tuple(map(str, size))
    same_size = [each for each in of_page if (each.get("SizeX"), each.get("SizeY")) == shape]
    chosen = next(iter(same_size or of_page), None)
    if chosen is None:
        return None
    sides: list[float | None] = []
    for axis in "XY":
        value = _number(chosen.get(f"PhysicalSize{axis}"))
        factor = _factor(chosen.get(f"PhysicalSize{axis}Unit", "um"), "its OME-XML", notes) if value else None
        sides.append(value * factor if value and factor else None)
    x, y = sides
    if not (x and y) and (x or y):
        notes.append(f"its OME-XML states PhysicalSize{'X' if x else 'Y'} alone: pixels are taken to be square")
    x, y = x or y, y or x
    return (x, y) if x and y else None


def _scanner(description: str) -> tuple[float, float] | None:
    """Aperio's ``MPP = 0.25``, Ventana's ``ScanRes="0.25"``, Philips' DICOM_PIXEL_SPACING in millimetres."""
    number = r"[\"']?\s*([\d.,]+(?:[eE][+-]?\d+)?)"
    spacing = re.search(rf"DICOM_PIXEL_SPACING[^>]*>\s*{number}[\"']?\s+{number}", description)
    if spacing:
        y, x = (_number(side) for side in spacing.groups())
        return (x * 1e3, y * 1e3) if x and y else None
    axes = [re.search(rf"\b(?:MPP|mpp|openslide\.mpp)[-_.]?{axis}\s*[=:]\s*{number}", description) for axis in "xy"]
    if all(axes):
        x, y = (_number(axis[1]) for axis in axes if axis)
        return (x, y) if x and y else None
    single = re.search(rf"\b(?:MPP|ScanRes)\s*=\s*{number}", description)
    value = _number(single[1].rstrip(".,")) if single else None
    return (value, value) if value else None


def _imagej(description: str, resolution: tuple, notes: list[str]) -> tuple[float, float] | None:
    """ImageJ's unit, with TIFF's resolution in pixels a unit."""
    unit = re.search(r"^unit=(.*)$", description, re.MULTILINE)
    if not description.startswith("ImageJ=") or not unit or not resolution[0] or not resolution[1]:
        return None
    factor = _factor(unit[1], "ImageJ's description", notes)
    return (factor / resolution[0], factor / resolution[1]) if factor else None


def _resolution(resolution: tuple) -> tuple[float, float] | None:
    unit = _RESOLUTION_UNITS.get(resolution[2])
    if not unit or not resolution[0] or not resolution[1]:
        return None
    return UNITS[unit] / resolution[0], UNITS[unit] / resolution[1]
