"""BreaKHis from wherever it lies, as a table with one row an image.

Spanhol, Oliveira, Petitjean, Heutte: A Dataset for Breast Cancer Histopathological Image Classification.
IEEE TBME 63(7), 2016, doi 10.1109/TBME.2015.2496264. 7,909 images of 81 slides, 70 biopsies, four magnifications.

Every source becomes the same *raw* rows (`raw_row`), of which an unusable image is one too: it says what is wrong with
it. `load_breakhis` then reports these, and drops and sorts, for all sources alike.
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

from magnification_invariant.data.images import SUFFIXES, check
from magnification_invariant.data.published import MAGNIFICATIONS
from magnification_invariant.data.table import read_all

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
COLUMNS = ("image", "label", "subtype", "magnification", "mpp", "patient", "slide", "filename")

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
    source: str | os.PathLike,
    *,
    on_error: str = "raise",
    drop_duplicate_slide: bool = True,
    streaming: bool = False,
    num_proc: int | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Reads BreaKHis, or a mirror that kept the file names, into a table.

    What an image shows is read from its file name; folders are only checked against it. Every image is checked to be
    whole. Rows are in the order of the file names.

    Args:
        source: What `source_kind` tells apart: the unpacked archive (`BreaKHis_v1`, a folder above it, or one inside
            it); the archive itself, .tar, .tar.gz or .zip, local or an http(s) URL; a Parquet file or a folder of
            them; or a Hub dataset repository, with or without ``@revision``.
        on_error: "raise", or "skip" to leave out the files that cannot be used, with one warning.
        drop_duplicate_slide: Slide 14-13412 is filed twice, as ductal and as lobular carcinoma, with the same
            images: leave out the ductal copy where both are there (the complete data set keeps 7,786 images).
        streaming: Read while iterating, in the order of the source, without a copy. What needs the whole table is then
            not done: images that are there twice are not noticed, and the ductal copy is left out unseen.
        num_proc: Processes that read an archive or a Hub repository. A folder is read by threads.

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
    kind = source_kind(source)
    if kind in ("parquet", "hub"):
        raw = _read_table(source, kind, streaming=streaming, num_proc=num_proc)
    elif kind == "folder" and not streaming:
        raw = _read_folder(source)
    else:
        raw = _read_with_builder(source, streaming=streaming, num_proc=num_proc)
    if streaming:
        return _finished_stream(raw, on_error, drop_duplicate_slide)
    return _finished(raw, source, on_error, drop_duplicate_slide)


def source_kind(source: str | os.PathLike) -> str:
    """ "url", "folder" (of images), "parquet" (a file or a folder of them), "archive" or "hub".

    Raises:
        FileNotFoundError: It is not here, and no name that a Hub repository could have.
        ValueError: It is a folder of both images and Parquet files.
    """
    if re.match("https?://", str(source)):
        return "url"
    path = Path(source)
    if path.is_dir():
        tables = parquet_files(path)
        if tables and image_paths(path):
            raise ValueError(f"{source} holds images and Parquet files ({tables[0]}): point to the one or the other.")
        return "parquet" if tables else "folder"
    if path.is_file():
        return "parquet" if path.suffix == ".parquet" else "archive"
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", str(source), re.ASCII):
        return "hub"
    raise FileNotFoundError(
        f"{source} is not a folder, nor an archive or Parquet file, nor the name of a Hub repository. Unpack "
        "BreaKHis_v1.tar.gz and pass the folder it is in, or pass the archive."
    )


def parquet_files(path: Path) -> list[str]:
    """Parquet files at or below `path`, sorted."""
    return [str(file) for file in sorted(path.rglob("*.parquet"))] if path.is_dir() else [str(path)]


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


def raw_features() -> datasets.Features:
    """Columns of raw rows: those of the table, and `path` in the source, `stretched` and `problem`."""
    import datasets

    more = {"stretched": "bool", "path": "string", "problem": "string"}
    return datasets.Features(features() | {name: datasets.Value(dtype) for name, dtype in more.items()})


def raw_row(path: str, content: bytes | None = None) -> dict:
    """The row of one image file.

    Args:
        path: Where it is in its source; the file to read if there is no content.
        content: The file's bytes, which the row then holds.

    Returns:
        A row of `raw_features`; if the image cannot be used, all is None but `path`, `filename` and `problem`.
    """
    name = PurePath(path).name
    row = dict.fromkeys((*COLUMNS, "stretched", "problem")) | {"filename": _printable(name), "path": _printable(path)}
    problem = _name_problem(PurePath(path))
    if not problem and content is None and not os.path.isfile(path):
        problem = "not a file, or a link to none; remove it"  # a pipe would be waited for
    if not problem:
        try:
            width, height = check(path if content is None else io.BytesIO(content))
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... on damaged files
            problem = f"not a readable image ({type(error).__name__}: {error}); unpack or download it again"
    if problem:
        return row | {"problem": problem}

    fields = name_fields(name)
    stretched = _is_stretched(width, height)
    # Kept aspect ratio: the width says it all, as cropped rows change no pixel. Else the mean of both directions.
    shrink = (_WIDTH / width * _HEIGHT / height) ** 0.5 if stretched else _WIDTH / width
    return row | {
        **fields,
        "image": {"path": path if content is None else name, "bytes": content},
        "mpp": MPP[fields["magnification"]] * shrink,
        "stretched": stretched,
    }


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


def image_paths(source: str | os.PathLike) -> list[str]:
    """Image files below `source` by file name, whatever the file system's order; hidden files are none of ours."""
    paths = []
    for folder, folders, names in os.walk(Path(source).absolute(), followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    paths = [path for path in paths if path.suffix.lower() in SUFFIXES]
    return [str(path) for path in sorted(paths, key=lambda path: (path.name, str(path)))]


def nothing_found(source) -> FileNotFoundError:
    return FileNotFoundError(f"No image ({', '.join(sorted(SUFFIXES))}) below {source}. Expected:\n  {_LAYOUT}")


def _name_problem(path: PurePath) -> str | None:
    """What keeps `path` from being taken at its name: a name that is not BreaKHis's, or folders that deny it."""
    fields = name_fields(path.name)
    if not fields:
        return "not named as in BreaKHis (SOB_B_A-14-22549AB-40-001.png); rename it, or move it out of the folder"
    slide_folder = path.name.partition("-")[0] + "_" + fields["slide"]
    says = {
        "class": ("|".join(LABELS), LABELS[fields["label"]]),
        "subtype": ("|".join(SUBTYPES.values()), fields["subtype"]),
        "slide": ("SOB_.*", slide_folder),
        "magnification": (r"\d+X", f"{fields['magnification']}X"),
    }
    for field, (pattern, said) in says.items():
        folder = next((part for part in reversed(path.parts[:-1]) if re.fullmatch(pattern, part)), said)
        if folder != said:
            return f"its name says {field} {said}, its folder {folder}; move it to where it belongs"
    if str(path) != _printable(str(path)):
        return "its path is not UTF-8; rename the file or its folder"
    return None


def _printable(path: str) -> str:
    """Bytes of a path that are no UTF-8, written as such: no table holds them."""
    return path.encode("utf-8", "backslashreplace").decode()


def _is_stretched(width: int, height: int) -> bool:
    return abs(width / height / (_WIDTH / _HEIGHT) - 1) > 0.02  # 700 x 456 is off by 0.9 %, rounded sizes by less


def _read_folder(source) -> datasets.Dataset:
    import datasets

    paths = image_paths(source)
    if not paths:
        raise nothing_found(source)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        rows = list(pool.map(raw_row, paths))
    return datasets.Dataset.from_list(rows, features=raw_features())


def _read_with_builder(source, *, streaming: bool, num_proc: int | None):
    from magnification_invariant.data.breakhis_builder import BreaKHis

    builder = BreaKHis(source=source)
    if streaming:
        return builder.as_streaming_dataset(split="train")
    builder.download_and_prepare(num_proc=num_proc)
    return builder.as_dataset(split="train")


def _read_table(source, kind: str, *, streaming: bool, num_proc: int | None):
    """A table with the columns of `features` as it is; of any other with named images, raw rows by these names."""
    import datasets

    options = {"streaming": streaming, "num_proc": None if streaming else num_proc}
    if kind == "parquet":
        ds = read_all(source, "parquet", data_files=parquet_files(Path(source)), **options)
    else:
        repo, _, revision = str(source).partition("@")
        ds = read_all(source, repo, revision=revision or None, **options)
    wanted = features()
    if all(ds.features.get(name) == wanted[name] for name in COLUMNS):
        return ds.select_columns(_shown(ds))
    if not isinstance(ds.features.get("image"), datasets.Image):
        raise ValueError(f"{source} has no column 'image' of images, only {', '.join(ds.column_names)}.")
    ds = ds.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    if streaming:
        return ds.map(_raw_row_of_image).cast(raw_features())  # with features=... images would not be decoded
    return ds.map(_raw_row_of_image, features=raw_features(), num_proc=num_proc)


def _raw_row_of_image(row: dict) -> dict:
    import fsspec

    path, content = row["image"]["path"], row["image"]["bytes"]
    if content is None:
        with fsspec.open(path, "rb") as file:
            content = file.read()
    return raw_row(path or "(without a file name)", content)


def _finished(raw: datasets.Dataset, source, on_error: str, drop_duplicate_slide: bool) -> datasets.Dataset:
    """The table of raw rows: in the order of the names, without what cannot be used or is there twice."""
    about = raw.remove_columns("image").to_dict()
    paths = about.get("path", about["filename"])
    rows, problems, first = [], [], {}
    for i in sorted(range(len(raw)), key=lambda i: (about["filename"][i], paths[i])):
        twin = first.setdefault(PurePath(paths[i]).stem, i)
        problem = about["problem"][i] if "problem" in about else None
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

    stretched = [about["filename"][i] for i in rows if about.get("stretched") and about["stretched"][i]]
    if stretched:
        warnings.warn(
            f"{len(stretched)} images (first: {stretched[0]}) do not have BreaKHis's 700:460 sides: their pixels are "
            "not square, and `mpp` is the geometric mean of both directions. If they were cropped rather than "
            "resized, it is wrong: use the original images.",
            stacklevel=3,
        )
    ds = raw.select_columns(_shown(raw)).select(rows)
    return without_duplicate_slide(ds) if drop_duplicate_slide else ds


def without_duplicate_slide(ds: datasets.Dataset) -> datasets.Dataset:
    """The table without the ductal copy of slide 14-13412, if it has the lobular one."""
    filed = list(zip(ds["slide"], ds["subtype"], strict=True))
    kept = [i for i, where in enumerate(filed) if not is_ductal_copy(*where)]
    lobular = any(slide == DUPLICATE_SLIDE and not is_ductal_copy(slide, subtype) for slide, subtype in filed)
    if not lobular or len(kept) == len(ds):
        return ds
    _logger.info(
        "Slide %s is filed as ductal and as lobular carcinoma: dropped %d images of the ductal copy, kept %d.",
        DUPLICATE_SLIDE,
        len(ds) - len(kept),
        len(kept),
    )
    return ds.select(kept)


def _finished_stream(raw: datasets.IterableDataset, on_error: str, drop_duplicate_slide: bool):
    if "problem" in raw.features:
        usable = _usable_or_raise if on_error == "raise" else _usable_or_warn
        raw = raw.filter(usable, input_columns=["path", "problem"])
    if drop_duplicate_slide:
        raw = raw.filter(_is_no_ductal_copy, input_columns=["slide", "subtype"])
    return raw.select_columns(_shown(raw))


def _shown(raw) -> list[str]:
    return [name for name in raw.column_names if name in (*COLUMNS, "rescaled")]


def is_ductal_copy(slide: str, subtype: str) -> bool:
    """Whether an image is of the slide that is filed twice, where it is filed as ductal carcinoma."""
    return slide == DUPLICATE_SLIDE and subtype == SUBTYPES["DC"]


def _is_no_ductal_copy(slide: str, subtype: str) -> bool:
    return not is_ductal_copy(slide, subtype)


def _usable_or_raise(path: str, problem: str | None) -> bool:
    if problem:
        raise ValueError(f"{path}: {problem}")
    return True


def _usable_or_warn(path: str, problem: str | None) -> bool:
    if problem:
        warnings.warn(f"{path}: {problem}. It is skipped.", stacklevel=2)
    return not problem
