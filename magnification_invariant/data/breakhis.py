"""BreaKHis as it is distributed: from its folder tree to a table with one row an image.

Spanhol, Oliveira, Petitjean, Heutte: A Dataset for Breast Cancer Histopathological Image Classification.
IEEE TBME 63(7), 2016, doi 10.1109/TBME.2015.2496264. 7,909 images of 81 slides, 70 biopsies, four magnifications.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    import datasets

_logger = logging.getLogger(__name__)

MAGNIFICATIONS = (40, 100, 200, 400)
# Camera pixels of 6.5 um behind a 3.3x relay lens and an objective of a tenth of the total magnification.
MPP = {magnification: 6.5 / (3.3 * magnification / 10) for magnification in MAGNIFICATIONS}
SUBTYPES = {
    "A": "adenosis",
    "F": "fibroadenoma",
    "PT": "phyllodes_tumor",
    "TA": "tubular_adenoma",
    "DC": "ductal_carcinoma",
    "LC": "lobular_carcinoma",
    "MC": "mucinous_carcinoma",
    "PC": "papillary_carcinoma",
}
LABELS = ("benign", "malignant")

_WIDTH, _HEIGHT = 700, 460  # pixels of an original; a few slides were cropped to 456 rows
_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp"}
_NAME = re.compile(
    r"SOB_(?P<code>B_(?:A|F|PT|TA)|M_(?:DC|LC|MC|PC))"
    r"-(?P<patient>\d{2}-\d+)(?P<section>[A-Z]*)-(?P<magnification>40|100|200|400)-\d+"
)
_LAYOUT = (
    "BreaKHis_v1/histology_slides/breast/{benign|malignant}/SOB/{subtype}/SOB_B_A_14-22549AB/40X/"
    "SOB_B_A-14-22549AB-40-001.png"
)


def load_breakhis(
    source: str | os.PathLike, *, on_error: str = "raise", drop_duplicate_slide: bool = True
) -> datasets.Dataset:
    """Reads the tree of the BreaKHis archive, or of a mirror that kept the file names, into a table.

    What an image shows is read from its file name; folders are only checked against it. Every file is checked to
    be a whole image, in threads. Rows are in the order of the file names.

    Args:
        source: The unpacked archive: `BreaKHis_v1`, a folder above it, or one inside it.
        on_error: "raise", or "skip" to leave out the files that cannot be used, with one warning.
        drop_duplicate_slide: Slide 14-13412 is filed twice, as ductal and as lobular carcinoma, with the same
            images: leave out the ductal copy where both are there (the complete data set keeps 7,786 images).

    Returns:
        The table. `image` (path, decoded on access), `label` (benign 0, malignant 1), `subtype` ("adenosis"),
        `magnification` (total optical: 40, 100, 200, 400), `mpp` (micrometres per pixel of the stored array, so a
        resized mirror has larger ones), `patient` ("14-22549": the biopsy's year and number, which sections share),
        `slide` ("14-22549AB"), `filename`.

    Raises:
        FileNotFoundError: There is no such folder, or no image in it.
        ValueError: A file is not named as in BreaKHis, contradicts its folders, is no whole image, or is there twice.
    """
    import datasets

    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is 'raise' or 'skip', not {on_error!r}.")
    paths = _image_paths(Path(source))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        sizes = list(pool.map(_checked_size, paths))

    rows, problems, first = [], [], {}
    for path, size in zip(paths, sizes, strict=True):
        twin = first.setdefault(path.stem, path)
        if isinstance(size, str):
            problem = size
        elif twin is not path:
            problem = f"the same image name as {twin}: point `source` at one copy of the data set"
        else:
            problem = _name_problem(path)
        if problem:
            problems.append(f"{path}: {problem}")
        else:
            rows.append(_row(path, *size))
    if problems:
        shown = "\n  ".join(problems[:5])
        report = f"{len(problems)} of {len(paths)} images below {source} cannot be used:\n  {shown}"
        if on_error == "raise" or not rows:
            raise ValueError(f"{report}\nRepair or remove them; on_error='skip' leaves them out if others remain.")
        warnings.warn(f"{report}\nThey are skipped; the first {len(problems[:5])} are shown.", stacklevel=2)

    if drop_duplicate_slide:
        rows = _without_duplicate_slide(rows)
    _warn_if_stretched(rows)
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=list(LABELS)),
        subtype=datasets.Value("string"),
        magnification=datasets.Value("int32"),
        mpp=datasets.Value("float64"),
        patient=datasets.Value("string"),
        slide=datasets.Value("string"),
        filename=datasets.Value("string"),
    )
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def _image_paths(source: Path) -> list[Path]:
    """Image files below `source` by file name, whatever the file system's order; hidden files are none of ours."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder. Unpack BreaKHis_v1.tar.gz and pass the folder it is in.")
    paths = []
    for folder, folders, names in os.walk(source.absolute(), followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    paths = [path for path in paths if path.suffix.lower() in _SUFFIXES]
    if not paths:
        raise FileNotFoundError(f"No image ({', '.join(sorted(_SUFFIXES))}) below {source}. Expected:\n  {_LAYOUT}")
    return sorted(paths, key=lambda path: (path.name, str(path)))


def _checked_size(path: Path) -> tuple[int, int] | str:
    """Width and height in pixels of a whole image, else what is wrong with it. As little decoding as finds damage."""
    try:
        with Image.open(path) as image:
            size, limit = image.size, Image.MAX_IMAGE_PIXELS
            if limit and size[0] * size[1] > limit:
                raise Image.DecompressionBombError(f"{size[0]} x {size[1]} pixels are more than the limit of {limit}")
            if image.format == "PNG":
                image.verify()  # checksums, no decoding
            else:
                if image.format == "JPEG":
                    image.draft(None, (size[0] // 8, size[1] // 8))  # reads all coefficients, computes few pixels
                image.load()
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... on damaged files
        return f"not a readable image ({type(error).__name__}: {error}); unpack or download it again"
    return size


def _name_problem(path: Path) -> str | None:
    """What keeps `path` from being taken at its name: a name that is not BreaKHis's, or folders that deny it."""
    match = _NAME.fullmatch(path.stem)
    if not match:
        return "not named as in BreaKHis (SOB_B_A-14-22549AB-40-001.png); rename it, or move it out of the folder"
    code = match["code"]
    says = {
        "class": ("|".join(LABELS), LABELS[code[0] == "M"]),
        "subtype": ("|".join(SUBTYPES.values()), SUBTYPES[code[2:]]),
        "slide": ("SOB_.*", f"SOB_{code}_{match['patient']}{match['section']}"),
        "magnification": (r"\d+X", f"{match['magnification']}X"),
    }
    for field, (pattern, said) in says.items():
        folder = next((part for part in reversed(path.parts[:-1]) if re.fullmatch(pattern, part)), said)
        if folder != said:
            return f"its name says {field} {said}, its folder {folder}; move it to where it belongs"
    return None


def _row(path: Path, width: int, height: int) -> dict:
    match = _NAME.fullmatch(path.stem)
    magnification = int(match["magnification"])
    stretched = _is_stretched(width, height)
    # Kept aspect ratio: the width says it all, as cropped rows change no pixel. Else the mean of both directions.
    shrink = (_WIDTH / width * _HEIGHT / height) ** 0.5 if stretched else _WIDTH / width
    return {
        "image": str(path),
        "label": int(match["code"][0] == "M"),
        "subtype": SUBTYPES[match["code"][2:]],
        "magnification": magnification,
        "mpp": MPP[magnification] * shrink,
        "patient": match["patient"],
        "slide": match["patient"] + match["section"],
        "filename": path.name,
        "stretched": stretched,
    }


def _is_stretched(width: int, height: int) -> bool:
    return abs(width / height / (_WIDTH / _HEIGHT) - 1) > 0.02  # 700 x 456 is off by 0.9 %, rounded sizes by less


def _warn_if_stretched(rows: Iterable[dict]) -> None:
    stretched = [row["filename"] for row in rows if row["stretched"]]
    if stretched:
        warnings.warn(
            f"{len(stretched)} images (first: {stretched[0]}) do not have BreaKHis's 700:460 sides: their pixels are "
            "not square, and `mpp` is the geometric mean of both directions. If they were cropped rather than "
            "resized, it is wrong: use the original images.",
            stacklevel=3,
        )


def _without_duplicate_slide(rows: list[dict]) -> list[dict]:
    copies = {row["subtype"] for row in rows if row["slide"] == "14-13412"}
    if not {"ductal_carcinoma", "lobular_carcinoma"} <= copies:
        return rows
    kept = [row for row in rows if (row["slide"], row["subtype"]) != ("14-13412", "ductal_carcinoma")]
    _logger.info(
        "Slide 14-13412 is filed as ductal and as lobular carcinoma: dropped %d images of the ductal copy, kept %d.",
        len(rows) - len(kept),
        len(kept),
    )
    return kept
