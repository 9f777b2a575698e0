"""Any table of images, with the columns that everything after works on; ids are what the table has as written."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from magnification_invariant.data.images import EncodedImages, image_files, name_of, printable
from magnification_invariant.data.scale import check_mpp
from magnification_invariant.data.splits import column_values, domain_column, domain_name
from magnification_invariant.data.stated_scale import stated_scale
from magnification_invariant.files import read_json, read_json_lines

if TYPE_CHECKING:
    import datasets

HUB_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", re.ASCII)
_SUFFIXES = (".csv", ".json", ".jsonl", ".parquet", ".arrow")
_UNKNOWN = ("", "nan", "na", "n/a", "none", "null")  # how a table says that a number is not known


def load_table(
    source, *, domain_column: str, group_column: str | None, image_column: str = "image", label_column: str = "label"
) -> datasets.Dataset:
    """Reads images of your own, to leave one domain out: a scanner, a hospital, a scale.

    Labels, domains, patients and slides are text as the table has it: ``007`` stays ``007``. Only blanks at the ends
    are cut off, with a warning. A warning also names pictures that are there under two patients.

    Args:
        source: A folder (images with a metadata.csv, or what `datasets` can read), a .csv, .json(l), .parquet or
            .arrow file (paths in it are relative to it), a Hub dataset repository with or without ``@revision``, or a
            `datasets.Dataset`. Of several splits, all rows are taken.
        domain_column: What is held out.
        group_column: What must not be on both sides of a split: the patient. None makes every image its own group,
            and warns of it.
        image_column: Images, encoded or as paths.
        label_column: Two classes. Their order is a `ClassLabel`'s own, else ascending; the second is the positive one.

    Returns:
        The table, in the order of the source: `image`, `label` (a ClassLabel), `domain` (string), `mpp` (micrometres
        per pixel of the stored image: the source's column of that name, else what the files state; NaN if neither
        does), `patient`, `slide` (the source's column of that name, else the patient), `filename`; and `rescaled`
        where the source has it.

    Raises:
        FileNotFoundError: There is no such source, or an image that it names is not there.
        ValueError: It cannot be read, a column is missing or has gaps, there are not two classes, an mpp cannot be.
    """
    table, folder, where = _read(source)
    names = {"image": image_column, "label": label_column, "domain": domain_column, "group": group_column}
    try:
        return _standard(table, folder, names)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def describe(ds) -> str:
    """A line on a table of `load_table` or `load_breakhis`: images, patients, classes and domains."""
    label = Counter(ds["label"])
    classes = ", ".join(f"{name} {label[i]:,}" for i, name in enumerate(ds.features["label"].names))
    domains = sorted(Counter(ds[domain_column(ds)]).items())
    return (
        f"{len(ds):,} images of {len(set(ds['patient'])):,} patients; label: {classes} (the last is the positive "
        f"one); domain: {', '.join(f'{domain_name(domain)} {n:,}' for domain, n in domains)}"
    )


def read_all(source, *arguments, **options) -> datasets.Dataset:
    """All splits that `datasets.load_dataset` gives, as one table; its errors said in terms of `source`."""
    import datasets
    import pyarrow

    try:
        parts = datasets.load_dataset(*arguments, **options)
        return datasets.concatenate_datasets(list(parts.values()))
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid) as error:
        raise ValueError(
            f"{source} cannot be read ({error.__cause__ or error}); write or download it again."
        ) from error
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{source} is neither here nor a Hub dataset that can be read: {error}") from error


def _read(source) -> tuple[datasets.Dataset | dict[str, list], Path | None, str]:
    """The columns as they are written, the folder that paths in them are relative to, and what to call the table."""
    import datasets

    if isinstance(source, datasets.Dataset):
        return source, None, "the table"
    path = Path(source).absolute()
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_file(path), path.parent, str(source)
    if not HUB_REPO.fullmatch(str(source)):
        raise FileNotFoundError(f"{source} is not a folder, nor a file, nor the name of a Hub dataset repository.")
    repo, _, revision = str(source).partition("@")
    ds = read_all(source, repo, revision=revision or None)
    if ds.info.builder_name == "csv":  # again, with nothing guessed into numbers
        text = datasets.Features(dict.fromkeys(ds.column_names, datasets.Value("string")))
        ds = read_all(source, repo, revision=revision or None, features=text, keep_default_na=False)
    guessed = [name for name, kind in ds.features.items() if getattr(kind, "dtype", "") in ("int64", "float64")]
    if ds.info.builder_name == "imagefolder" and set(guessed) - {"mpp"}:
        warnings.warn(
            f"{source}: columns {', '.join(map(repr, guessed))} of its metadata were read as numbers, so 007 became 7; "
            "download the repository and pass the folder, if they are ids",
            stacklevel=3,
        )
    return ds, None, str(source)


def _read_folder(folder: Path) -> tuple[datasets.Dataset | dict[str, list], Path, str]:
    """The tables named metadata in it, each with the images beside it; without any, its .csv files or what else is."""
    images = image_files(folder)
    unreadable = [path for path in images if str(path) != printable(path)]
    if unreadable:
        raise ValueError(f"the name {printable(unreadable[0])} is not UTF-8; rename it ({len(unreadable):,} such).")
    hidden = re.compile(r"(.*/)?(\.|__MACOSX)")
    visible = [path for path in sorted(folder.rglob("*")) if not hidden.match(path.relative_to(folder).as_posix())]
    metadata = [path for path in visible if path.name in ("metadata.csv", "metadata.jsonl")]
    plain = [path for path in visible if path.suffix == ".csv"]
    if not metadata and (images or not plain or any(path.suffix in (".parquet", ".arrow") for path in visible)):
        return read_all(folder, str(folder)), folder, str(folder)
    tables, paths = [], metadata or plain
    for path in paths:
        columns = _read_file(path)
        if metadata:
            if "file_name" not in columns:
                raise ValueError(f"{path} has no column 'file_name', which says what image a row is of.")
            columns = {"image": [str(path.parent / name) for name in text_column(columns, "file_name")], **columns}
        if tables and columns.keys() != tables[0].keys():
            raise ValueError(f"{path} has other columns than {paths[0]}.")
        tables.append(columns)
    columns = {name: [value for table in tables for value in table[name]] for name in tables[0]}
    unlisted = sorted(set(map(str, images)) - set(columns["image"])) if metadata else []
    if unlisted:
        warnings.warn(
            f"{len(unlisted):,} images are in no table and are left out; the first: {unlisted[0]}", stacklevel=4
        )
    return columns, folder, str(folder if len(paths) > 1 else paths[0])


def _read_file(path: Path) -> datasets.Dataset | dict[str, list]:
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(f"{path}: tables are {', '.join(_SUFFIXES)} files, or folders.")
    if suffix == ".csv":
        return read_csv(path)
    if suffix in (".json", ".jsonl"):
        return _read_json(path)
    return read_all(path, suffix[1:], data_files=str(path))


def read_csv(path: Path) -> dict[str, list[str | None]]:
    """Columns as text; what is empty is None."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        byte = error.object[error.start : error.start + 1]
        raise ValueError(f"{path} is not UTF-8 (line {line}: {byte!r}); save it as UTF-8.") from error
    reader = csv.reader(io.StringIO(text, newline=""))
    lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    if not lines:
        raise ValueError(f"{path} is empty; a line with the names of the columns comes first.")
    header = [name.strip() for name in lines[0][1]]
    for other, called in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and other in header[0]:
            raise ValueError(f"{path} is separated by {called}; save it with commas.")
    twice = [name for name, n in Counter(header).items() if n > 1]
    if twice:
        raise ValueError(f"{path} has several columns named {twice[0]!r}; rename them.")
    if len(lines) == 1:
        raise ValueError(f"{path} has no rows, only the names of the columns: {', '.join(header)}.")
    for number, row in lines:
        if len(row) != len(header):
            raise ValueError(
                f"{path}, line {number}: {len(row)} values for {len(header)} columns ({', '.join(header)}); put "
                "those that hold a comma in quotes."
            )
    return {name: [row[i] if row[i].strip() else None for _, row in lines[1:]] for i, name in enumerate(header)}


def _read_json(path: Path) -> dict[str, list]:
    try:
        rows = read_json(path) if path.suffix.lower() == ".json" else read_json_lines(path)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON of UTF-8 ({error}); .jsonl has an object a line.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no list of objects, one a row.")
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _standard(table: datasets.Dataset | dict[str, list], folder: Path | None, names: dict) -> datasets.Dataset:
    """The table that `load_table` gives; `names` are the columns of image, label, domain and group."""
    import datasets

    there = list(table) if isinstance(table, Mapping) else table.column_names
    missing = [f"--{what}-column {name!r}" for what, name in names.items() if name is not None and name not in there]
    if missing:
        raise ValueError(
            f"no column for {', '.join(missing)}; the columns are {', '.join(map(repr, there))}. (Beside images, "
            "columns are read from metadata.csv; a table of another name: pass the file itself.)"
        )
    images = _images(table, names["image"], folder)
    label, classes = class_column(table, names["label"])
    domain = text_column(table, names["domain"])
    filename, stated, content = _files(images, read_scale="mpp" not in there)
    if names["group"] is None:
        warnings.warn(
            "without groups every image is its own: images of one patient will be in training and in test, and the "
            "results will be too good, unless every patient has one image",
            stacklevel=3,
        )
    patient = filename if names["group"] is None else text_column(table, names["group"])
    _warn_of_shared(content, patient, filename)
    text = datasets.Value("string")
    columns = {
        "label": (label, datasets.ClassLabel(names=classes)),
        "domain": (domain, text),
        "mpp": (scale_column(table) if "mpp" in there else stated, datasets.Value("float64")),
        "patient": (patient, text),
        "slide": (text_column(table, "slide") if "slide" in there else patient, text),
        "filename": (filename, text),
    }
    if "rescaled" in there:
        flags = [value.lower() == "true" for value in text_column(table, "rescaled")]
        columns["rescaled"] = (flags, datasets.Value("bool"))
    unknown = sum(map(math.isnan, columns["mpp"][0]))
    if unknown:
        warnings.warn(
            f"micrometres per pixel are not known of {unknown:,} of {len(images):,} images (no column 'mpp', nothing "
            "in the files): a model trained on them cannot state its scale, and continuous zoom and rescaling need it",
            stacklevel=3,
        )
    values = {name: value for name, (value, _) in columns.items()}
    features = datasets.Features({name: feature for name, (_, feature) in columns.items()})
    return datasets.concatenate_datasets([images, datasets.Dataset.from_dict(values, features)], axis=1)


def text_column(table, column: str) -> list[str]:
    """A column as text, as written but for blanks at the ends."""
    values = column_values(table, column)
    names = None if isinstance(table, Mapping) else getattr(table.features[column], "names", None)  # of a ClassLabel
    if names and min(values) < 0:
        raise ValueError(f"Column {column!r} has no class (-1) in {values.count(-1):,} rows; drop them.")
    written = [names[value] if names else str(value) for value in values]
    values = [value.strip() for value in written]
    changed = [i for i, value in enumerate(values) if value != written[i]]
    if "" in values:
        raise ValueError(f"Column {column!r} has no value in row {values.index('')} (counted from 0); fill or drop it.")
    if changed:
        warnings.warn(
            f"column {column!r} has blanks at the ends of {len(changed):,} values (the first is "
            f"{written[changed[0]]!r}, row {changed[0]} counted from 0); they are cut off",
            stacklevel=4,
        )
    return values


def class_column(table, column: str) -> tuple[list[int], list[str]]:
    """The class of each row, and the names of the two classes."""
    values = text_column(table, column)
    order = [] if isinstance(table, Mapping) else getattr(table.features[column], "names", [])
    try:
        names = sorted(set(values), key=lambda value: order.index(value) if order else (float(value), value))
    except ValueError:
        names = sorted(set(values))
    if len(names) != 2:
        shown = ", ".join(map(repr, names[:10])) + ", ..." * (len(names) > 10)
        raise ValueError(f"Column {column!r} has {len(names)} classes ({shown}); two are needed: merge or drop some.")
    return [names.index(value) for value in values], names


def scale_column(table) -> list[float]:
    """Column `mpp` as numbers; what is empty or NaN is not known."""
    values = table["mpp"] if isinstance(table, Mapping) else table.with_format(None)["mpp"][:]
    scales, wrong, why = [], [], ""
    for i, value in enumerate(values):
        try:
            scales.append(math.nan if str(value).strip().lower() in _UNKNOWN else check_mpp(value))
        except ValueError as error:
            why = why or str(error)
            wrong.append(f"row {i}")
    if wrong:
        rows = ", ".join(wrong[:5]) + ", ..." * (len(wrong) > 5)
        raise ValueError(f"Column 'mpp', {rows} (counted from 0; {len(wrong):,} of {len(values):,}): {why}.")
    return scales


def _images(table, column: str, folder: Path | None) -> datasets.Dataset:
    """Column `image`; paths are taken from `folder` and looked at."""
    import datasets
    import pyarrow

    try:
        if isinstance(table, Mapping) or getattr(table.features[column], "dtype", None) in ("string", "large_string"):
            paths = [str(Path(folder or "", path)) for path in text_column(table, column)]
            absent = [path for path in paths if not os.path.isfile(path)]
            if absent:
                raise FileNotFoundError(f"{len(absent):,} images are not where the table says; the first: {absent[0]}")
            images = datasets.Dataset.from_dict({"image": paths})
        else:
            images = table.select_columns([column]).rename_columns({column: "image"})
        return images.cast_column("image", datasets.Image())
    except (TypeError, pyarrow.ArrowException) as error:
        raise ValueError(f"The column {column!r} holds no images ({error}).") from error


def _files(images: datasets.Dataset, read_scale: bool) -> tuple[list[str], list[float], list[bytes]]:
    """What to call each image, below the folder that all share; the scale that its file states; a hash of the file."""
    encoded = EncodedImages(images)

    def look(i: int) -> tuple[str, float, bytes]:
        path, content = encoded[i]
        if path is None and content is None:
            raise ValueError(f"Row {i} has no image; drop it.")
        try:
            content = Path(path).read_bytes() if content is None else content
            mpp = stated_scale(io.BytesIO(content)).mpp if read_scale else None
        except Exception as error:  # whatever Pillow raises on a damaged file
            raise ValueError(f"cannot read the image {name_of((path, content))} (row {i}): {error}") from error
        return path or f"row-{i:06d}", math.nan if mpp is None else mpp, hashlib.blake2b(content).digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        names, scales, content = map(list, zip(*pool.map(look, range(len(images))), strict=True))
    root = os.path.commonpath([os.path.dirname(name) for name in names]) if all(map(os.path.isabs, names)) else ""
    names = [os.path.relpath(name, root) if root else name for name in names]
    if len(set(names)) < len(names):
        names = [f"{i:06d}-{name}" for i, name in enumerate(names)]
    return names, scales, content


def _warn_of_shared(content: list[bytes], patient: list[str], filename: list[str]) -> None:
    """Says which pictures are there under several patients: they may get on both sides of a split."""
    rows: dict[bytes, list[int]] = {}
    for i, key in enumerate(content):
        rows.setdefault(key, []).append(i)
    shared = [group for group in rows.values() if len({patient[i] for i in group}) > 1]
    if shared:
        shown = "; ".join(" = ".join(f"{filename[i]} (patient {patient[i]})" for i in group) for group in shared[:5])
        warnings.warn(
            f"{len(shared):,} pictures are there under more than one patient: {shown}{'; ...' * (len(shared) > 5)}. "
            "One and the same may be in training and in test: drop them, or correct the patients",
            stacklevel=4,
        )
