"""BreaKHis from wherever it lies, as a table with one row an image.

Spanhol, Oliveira, Petitjean, Heutte: A Dataset for Breast Cancer Histopathological Image Classification.
IEEE TBME 63(7), 2016, doi 10.1109/TBME.2015.2496264. 7,909 images of 81 slides, 70 biopsies, four magnifications.

Every source becomes the same *raw* rows (`_raw_row`), of which an unusable image is one too: it says what is wrong
with it. `load_breakhis` then reports these, and drops and sorts, for all sources alike.
"""

from __future__ import annotations

import io
import logging
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from magnification_invariant.data.archives import unpacked
from magnification_invariant.data.images import SUFFIXES, check, image_files, printable
from magnification_invariant.data.published import MAGNIFICATIONS
from magnification_invariant.data.table import HUB_REPO, read_all

if TYPE_CHECKING:
    import datasets

_logger = logging.getLogger(__name__)

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
DUPLICATE_SLIDE = "14-13412"

_WIDTH, _HEIGHT = 700, 460  # pixels of an original; a few slides were cropped to 456 rows
_NAME = re.compile(
    r"SOB_(?P<code>B_(?:A|F|PT|TA)|M_(?:DC|LC|MC|PC))"
    r"-(?P<patient>\d{2}-\d+)(?P<section>[A-Z]*)-(?P<magnification>40|100|200|400)-\d+",
    re.ASCII,
)
_LAYOUT = (
    "BreaKHis_v1/histology_slides/breast/{benign|malignant}/SOB/{subtype}/SOB_B_A_14-22549AB/40X/"
    "SOB_B_A-14-22549AB-40-001.png"
)


def load_breakhis(
    source: str | os.PathLike, *, on_error: str = "raise", drop_duplicate_slide: bool = True
) -> datasets.Dataset:
    """Reads BreaKHis, or a mirror that kept the file names, into a table.

    What an image shows is read from its file name; folders are only checked against it. Every image is checked to be
    whole. Rows are in the order of the file names.

    Args:
        source: The unpacked archive (`BreaKHis_v1`, a folder above it, or one inside it); the archive itself, .tar,
            .tar.gz or .zip, local or an http(s) URL; a Parquet file or a folder of them; or a Hub dataset repository,
            with or without ``@revision``.
        on_error: "raise", or "skip" to leave out the files that cannot be used, with one warning.
        drop_duplicate_slide: Slide 14-13412 is filed twice, as ductal and as lobular carcinoma, with the same
            images: leave out the ductal copy where both are there (the complete data set keeps 7,786 images).

    Returns:
        The table. `image` (decoded on access), `label` (benign 0, malignant 1), `subtype` ("adenosis"),
        `magnification` (total optical: 40, 100, 200, 400), `mpp` (micrometres per pixel of the stored array, so a
        resized mirror has larger ones), `patient` ("14-22549": the biopsy's year and number, which sections share),
        `slide` ("14-22549AB"), `filename`. Of a Parquet table made by `digital_zoom` or `rescale` also `rescaled`.

    Raises:
        FileNotFoundError: There is no such source, or no image in it.
        ValueError: A file is not named as in BreaKHis, contradicts its folders, is no whole image, or is there twice;
            an archive is damaged or could do harm.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is 'raise' or 'skip', not {on_error!r}.")
    path, is_url = Path(source), re.match("https?://", str(source))
    if path.is_dir() and not is_url:
        tables = sorted(map(str, path.rglob("*.parquet")))
        if tables and image_files(path):
            raise ValueError(f"{source} holds images and Parquet files ({tables[0]}): point to the one or the other.")
        raw = _of_table(source, read_all(source, "parquet", data_files=tables)) if tables else _of_folder(path, source)
    elif path.suffix == ".parquet" and path.is_file():
        raw = _of_table(source, read_all(source, "parquet", data_files=str(path)))
    elif is_url or path.is_file():
        raw = _of_folder(unpacked(source), source)
    elif HUB_REPO.fullmatch(str(source)):
        repo, _, revision = str(source).partition("@")
        raw = _of_table(source, read_all(source, repo, revision=revision or None))
    else:
        raise FileNotFoundError(
            f"{source} is not a folder, nor an archive or Parquet file, nor the name of a Hub repository. Unpack "
            "BreaKHis_v1.tar.gz and pass the folder it is in, or pass the archive."
        )
    shown = [name for name in raw.column_names if name in (*features(), "rescaled")]
    ds = raw.select_columns(shown).select(_usable(raw, source, on_error))
    return without_duplicate_slide(ds) if drop_duplicate_slide else ds


def features() -> datasets.Features:
    """Columns of the table."""
    import datasets

    return datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=list(LABELS)),
        subtype=datasets.Value("string"),
        magnification=datasets.Value("int32"),
        mpp=datasets.Value("float64"),
        patient=datasets.Value("string"),
        slide=datasets.Value("string"),
        filename=datasets.Value("string"),
    )


def name_fields(filename: str) -> dict | None:
    """What a file name says: label, subtype, magnification, patient, slide; None if it is not named as in BreaKHis."""
    match = _NAME.fullmatch(PurePath(filename).stem)
    return match and {
        "label": int(match["code"][0] == "M"),
        "subtype": SUBTYPES[match["code"][2:]],
        "magnification": int(match["magnification"]),
        "patient": match["patient"],
        "slide": match["patient"] + match["section"],
    }


def is_ductal_copy(slide: str, subtype: str) -> bool:
    """Whether an image is of the slide that is filed twice, where it is filed as ductal carcinoma."""
    return slide == DUPLICATE_SLIDE and subtype == SUBTYPES["DC"]


def without_duplicate_slide(ds: datasets.Dataset) -> datasets.Dataset:
    """The table without the ductal copy of slide 14-13412, if it has the lobular one."""
    filed = list(zip(ds["slide"], ds["subtype"], strict=True))
    kept = [i for i, where in enumerate(filed) if not is_ductal_copy(*where)]
    dropped = len(ds) - len(kept)
    if not dropped or all(filed[i][0] != DUPLICATE_SLIDE for i in kept):
        return ds
    _logger.info(
        f"Slide {DUPLICATE_SLIDE} is filed as ductal and as lobular carcinoma: dropped {dropped} images of the ductal "
        f"copy, kept {len(kept)}."
    )
    return ds.select(kept)


def _of_folder(root: Path, source: str | os.PathLike) -> datasets.Dataset:
    """Raw rows of the images below `root`, which is what `source` holds."""
    import datasets

    paths = image_files(root.absolute())
    if not paths:
        raise FileNotFoundError(f"No image ({', '.join(sorted(SUFFIXES))}) below {source}. Expected:\n  {_LAYOUT}")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        rows = list(pool.map(_raw_row, map(str, paths)))
    for row, path in zip(rows, paths, strict=True):
        row["path"] = printable(path.relative_to(root.absolute()))
    return datasets.Dataset.from_list(rows, features=_raw_features())


def _of_table(source: str | os.PathLike, ds: datasets.Dataset) -> datasets.Dataset:
    """A table with the columns of `features` as it is; of any other with named images, raw rows by these names."""
    import datasets

    if all(ds.features.get(name) == feature for name, feature in features().items()):
        return ds
    if not isinstance(ds.features.get("image"), datasets.Image):
        raise ValueError(f"{source} has no column 'image' of images, only {', '.join(ds.column_names)}.")
    ds = ds.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    return ds.map(
        lambda row: _raw_row(row["image"]["path"] or "(without a file name)", row["image"]["bytes"]),
        features=_raw_features(),
        load_from_cache_file=False,  # it may be of older code
    )


def _raw_features() -> datasets.Features:
    """Columns of raw rows: those of the table, and `path` in the source, `stretched` and `problem`."""
    import datasets

    more = {"stretched": "bool", "path": "string", "problem": "string"}
    return datasets.Features(features() | {name: datasets.Value(dtype) for name, dtype in more.items()})


def _raw_row(path: str, content: bytes | None = None) -> dict:
    """The row of an image file (or of its bytes); one that cannot be used has a `problem`, a name, and nothing else."""
    name = PurePath(path).name
    row = dict.fromkeys(_raw_features()) | {"filename": printable(name), "path": printable(path)}
    problem = _name_problem(PurePath(path))
    if not problem:
        try:
            width, height = check(path if content is None else io.BytesIO(content))
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... on damaged files
            problem = f"not a readable image ({type(error).__name__}: {error}); unpack or download it again"
    if problem:
        return row | {"problem": problem}

    fields = name_fields(name) or {}  # there is no problem: it is named as in BreaKHis
    stretched = abs(width / height / (_WIDTH / _HEIGHT) - 1) > 0.02  # 700 x 456 is off by 0.9 %, rounded sizes by less
    # Kept aspect ratio: the width says it all, as cropped rows change no pixel. Else the mean of both directions.
    shrink = (_WIDTH / width * _HEIGHT / height) ** 0.5 if stretched else _WIDTH / width
    image = {"path": path if content is None else name, "bytes": content}
    return row | fields | {"image": image, "mpp": MPP[fields["magnification"]] * shrink, "stretched": stretched}


def _name_problem(path: PurePath) -> str | None:
    """What keeps `path` from being taken at its name: a name that is not BreaKHis's, or folders that deny it."""
    fields = name_fields(path.name)
    if not fields:
        return "not named as in BreaKHis (SOB_B_A-14-22549AB-40-001.png); rename it, or move it out of the folder"
    says = {
        "class": ("|".join(LABELS), LABELS[fields["label"]]),
        "subtype": ("|".join(SUBTYPES.values()), fields["subtype"]),
        "slide": ("SOB_.*", path.name.partition("-")[0] + "_" + fields["slide"]),
        "magnification": (r"\d+X", f"{fields['magnification']}X"),
    }
    for field, (pattern, said) in says.items():
        folder = next((part for part in reversed(path.parts[:-1]) if re.fullmatch(pattern, part)), said)
        if folder != said:
            return f"its name says {field} {said}, its folder {folder}; move it to where it belongs"
    return None if str(path) == printable(path) else "its path is not UTF-8; rename the file or its folder"


def _usable(raw: datasets.Dataset, source: str | os.PathLike, on_error: str) -> list[int]:
    """Raw rows in the order of the names, without what cannot be used or is there twice."""
    columns = raw.remove_columns("image").to_dict()
    names = columns["filename"]
    paths, stated, stretched = (columns.get(name) for name in ("path", "problem", "stretched"))
    paths, stated, stretched = paths or names, stated or [None] * len(raw), stretched or [False] * len(raw)
    rows, problems, first = [], [], {}
    for i in sorted(range(len(raw)), key=lambda i: (names[i], paths[i])):
        twin, problem = first.setdefault(PurePath(paths[i]).stem, i), stated[i]
        if twin != i and not problem:
            problem = f"the same image name as {paths[twin]}: point `source` at one copy of the data set"
        if problem:
            problems.append(f"{paths[i]}: {problem}")
        else:
            rows.append(i)
    if problems:
        shown = "\n  ".join(problems[:5])
        report = f"{len(problems)} of {len(raw)} images below {source} cannot be used:\n  {shown}"
        if on_error == "raise" or not rows:
            raise ValueError(f"{report}\nRepair or remove them; on_error='skip' leaves them out if others remain.")
        warnings.warn(f"{report}\nThey are skipped; the first {len(problems[:5])} are shown.", stacklevel=3)
    odd = [names[i] for i in rows if stretched[i]]
    if odd:
        warnings.warn(
            f"{len(odd)} images (first: {odd[0]}) do not have BreaKHis's 700:460 sides: their pixels are "
            "not square, and `mpp` is the geometric mean of both directions. If they were cropped rather than "
            "resized, it is wrong: use the original images.",
            stacklevel=3,
        )
    return rows
