"""Any table of images that `datasets` reads, with the columns that everything after works on."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from magnification_invariant.data.splits import column_values, domain_column, domain_name

if TYPE_CHECKING:
    import datasets

_BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", re.ASCII)


def load_table(
    source,
    *,
    domain_column: str,
    group_column: str | None,
    image_column: str = "image",
    label_column: str = "label",
) -> datasets.Dataset:
    """Reads images of your own, to leave one domain out: a scanner, a hospital, a scale.

    Args:
        source: A folder that `datasets` can read (images with a metadata.csv, Parquet, ...), a .csv, .json(l) or
            .parquet file (paths in it are relative to it), a Hub dataset repository with or without ``@revision``, a
            `datasets.Dataset`, or an `IterableDataset`, which is written down first: a split needs all of it. Of
            several splits, all rows are taken.
        domain_column: What is held out. Numbers (um/px) are named as they are written: "0.25".
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
        ValueError: It cannot be read, a column is missing or has gaps, there are not two classes, an mpp is not
            positive.
    """
    import datasets

    ds, folder = _read(source, image_column)
    wanted = {"image": image_column, "label": label_column, "domain": domain_column, "group": group_column}
    missing = {what: name for what, name in wanted.items() if name is not None and name not in ds.column_names}
    if missing:
        flags = ", ".join(f"--{what}-column {name!r}" for what, name in missing.items())
        raise ValueError(
            f"{_shown(source)} has no column for {flags}; its columns are {', '.join(map(repr, ds.column_names))}. "
            "(Beside images, columns are read from metadata.csv; a table of another name: pass the file itself.)"
        )
    images = _with_images(ds.select_columns([image_column]).rename_columns({image_column: "image"}), folder)
    label, names = _classes(ds, label_column)
    domain = [_name(value) for value in column_values(ds, domain_column)]
    filename, stated = _files(images, read_scale="mpp" not in ds.column_names)
    if group_column is None:
        warnings.warn(
            "without groups every image is its own: images of one patient will be in training and in test, and the "
            "results will be too good, unless every patient has one image",
            stacklevel=2,
        )
    group = filename if group_column is None else [str(value) for value in column_values(ds, group_column)]
    columns = {
        "label": (label, datasets.ClassLabel(names=names)),
        "domain": (domain, datasets.Value("string")),
        "mpp": (_scales(ds) if stated is None else stated, datasets.Value("float64")),
        "patient": (group, datasets.Value("string")),
        "slide": (
            [str(value) for value in column_values(ds, "slide")] if "slide" in ds.column_names else group,
            datasets.Value("string"),
        ),
        "filename": (filename, datasets.Value("string")),
    }
    if "rescaled" in ds.column_names:
        columns["rescaled"] = (column_values(ds, "rescaled"), datasets.Value("bool"))
    unknown = int(np.isnan(columns["mpp"][0]).sum())
    if unknown:
        warnings.warn(
            f"micrometres per pixel are not known of {unknown:,} of {len(images):,} images (no column 'mpp', nothing "
            "in the files): a model trained on them cannot state its scale, and continuous zoom and rescaling need it",
            stacklevel=2,
        )
    values = {name: value for name, (value, _) in columns.items()}
    about = datasets.Dataset.from_dict(values, datasets.Features({name: kind for name, (_, kind) in columns.items()}))
    return datasets.concatenate_datasets([images, about], axis=1)


def describe(ds) -> str:
    """A line on a table of `load_table` or `load_breakhis`: images, patients, classes and domains."""
    label = Counter(ds["label"])
    classes = ", ".join(f"{name} {label[i]:,}" for i, name in enumerate(ds.features["label"].names))
    domains = sorted(Counter(ds[domain_column(ds)]).items())
    return (
        f"{len(ds):,} images of {len(set(ds['patient'])):,} patients; label: {classes} (the last is the positive "
        f"one); domain: {', '.join(f'{domain_name(domain)} {n:,}' for domain, n in domains)}"
    )


def read_all(source, *arguments, **options):
    """All splits that `datasets.load_dataset` gives, as one table; its errors said in terms of `source`."""
    import datasets
    import pyarrow

    try:
        parts = datasets.load_dataset(*arguments, **options)
        return datasets.concatenate_datasets(list(parts.values()))
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid) as error:
        why = error.__cause__ or error
        raise ValueError(f"{source} cannot be read ({why}); write or download it again.") from error
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{source} is neither here nor a Hub dataset that can be read: {error}") from error


def _read(source, image_column: str) -> tuple[datasets.Dataset, Path | None]:
    """The table as it is, and the folder that paths in it are relative to."""
    import datasets

    if isinstance(source, datasets.Dataset):
        return source, None
    if isinstance(source, datasets.IterableDataset):
        return _written_down(source, image_column), None
    path = Path(source)
    if path.is_dir():
        return read_all(source, str(path.absolute())), path.absolute()
    if path.is_file():
        builder = _BUILDERS.get(path.suffix.lower())
        if not builder:
            raise ValueError(f"{source}: tables are {', '.join(_BUILDERS)} files, or folders.")
        return read_all(source, builder, data_files=str(path.absolute())), path.absolute().parent
    if _HUB.fullmatch(str(source)):
        repo, _, revision = str(source).partition("@")
        return read_all(source, repo, revision=revision or None), None
    raise FileNotFoundError(f"{source} is not a folder, nor a file, nor the name of a Hub dataset repository.")


def _written_down(stream: datasets.IterableDataset, image_column: str) -> datasets.Dataset:
    """A stream read to its end, into a file that lasts as long as this process; images stay encoded."""
    import datasets

    if stream.features and isinstance(stream.features.get(image_column), datasets.Image):
        stream = stream.cast_column(image_column, datasets.Image(decode=False))
    folder = tempfile.mkdtemp(prefix="magdg-stream-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return datasets.Dataset.from_generator(
        lambda: iter(stream), features=stream.features, cache_dir=folder, fingerprint=os.path.basename(folder)
    )


def _with_images(ds: datasets.Dataset, folder: Path | None) -> datasets.Dataset:
    import datasets

    if getattr(ds.features["image"], "dtype", None) in ("string", "large_string"):  # paths
        paths = [str(Path(folder or "", path)) for path in column_values(ds, "image")]
        absent = [path for path in paths if not os.path.isfile(path)]
        if absent:
            raise FileNotFoundError(f"{len(absent):,} images are not where the table says; the first: {absent[0]}")
        ds = datasets.Dataset.from_dict({"image": paths})
    try:
        return ds.cast_column("image", datasets.Image())
    except (TypeError, ValueError) as error:
        raise ValueError(f"The image column holds no images but {ds.features['image']}.") from error


def _files(images: datasets.Dataset, read_scale: bool) -> tuple[list[str], list[float] | None]:
    """What to call each image, below the folder that all share, and the scale that its file states."""
    import io

    from magnification_invariant.data.images import EncodedImages, name_of
    from magnification_invariant.data.scale import read_mpp

    encoded = EncodedImages(images)

    def look(i: int) -> tuple[str, float | None]:
        path, content = encoded[i]
        if path is None and content is None:
            raise ValueError(f"Row {i} has no image; drop it.")
        try:
            mpp = read_mpp(path if content is None else io.BytesIO(content)) if read_scale else None
        except Exception as error:  # whatever Pillow raises on a damaged file
            raise ValueError(f"cannot read the image {name_of((path, content))} (row {i}): {error}") from error
        return path or f"row-{i:06d}", np.nan if mpp is None else mpp

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        names, scales = zip(*pool.map(look, range(len(images))), strict=True)
    root = os.path.commonpath([os.path.dirname(name) for name in names]) if all(map(os.path.isabs, names)) else ""
    names = [os.path.relpath(name, root) if root else name for name in names]
    if len(set(names)) < len(names):
        names = [f"{i:06d}-{name}" for i, name in enumerate(names)]
    return names, list(scales) if read_scale else None


def _classes(ds: datasets.Dataset, column: str) -> tuple[list[int], list[str]]:
    import datasets

    values, kind = column_values(ds, column), ds.features[column]
    if isinstance(kind, datasets.ClassLabel):
        unlabelled = sum(value < 0 for value in values)
        if unlabelled:
            raise ValueError(f"Column {column!r} has no class (-1) in {unlabelled:,} rows; drop them.")
    found = sorted(set(values))
    if len(found) != 2:
        shown = ", ".join(map(repr, found[:10])) + ", ..." * (len(found) > 10)
        raise ValueError(f"Column {column!r} has {len(found)} classes ({shown}); two are needed: merge or drop some.")
    names = [kind.names[v] if isinstance(kind, datasets.ClassLabel) else _name(v) for v in found]
    return [found.index(value) for value in values], names


def _scales(ds: datasets.Dataset) -> list[float]:
    try:
        scales = np.array(ds.with_format(None)["mpp"][:], float)  # None becomes NaN
    except (TypeError, ValueError) as error:
        raise ValueError(f"Column 'mpp' holds no numbers: {error}") from error
    wrong = np.flatnonzero(scales <= 0)
    if len(wrong):
        raise ValueError(f"Column 'mpp' (micrometres per pixel) is {scales[wrong[0]]} in row {wrong[0]}.")
    return scales.tolist()


def _name(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shown(source) -> str:
    return str(source) if isinstance(source, str | Path) else "The table"
