"""Embeddings that somebody has on disk, as a table that splits, training and records work on like one of images."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from magnification_invariant.data.splits import domain_name
from magnification_invariant.data.table import class_column, read_csv, scale_column, text_column
from magnification_invariant.files import whole

if TYPE_CHECKING:
    import datasets

VECTOR = "embedding"  # the column; a table that has it is one of vectors
_IDS = ("id", "filename", "ids", "names")  # names that files have for them, the first that is there counts
_VECTORS = (VECTOR, "embeddings", "features", "feats", "X")
_WANTED = ("patient", "label", "domain")
_SUFFIXES = (".parquet", ".safetensors", ".h5", ".hdf5", ".h5ad", ".npy")


def load_embeddings(source, manifest=None) -> datasets.Dataset:
    """Reads embeddings of images or slides, to leave one domain out.

    Ids, patients, labels and domains are text as written: ``007`` stays ``007``. Read are

    - ``.parquet``: a row an image, with columns ``id`` (or ``filename``), ``embedding`` (or ``features``, ``feats``)
      and, where no manifest says them, ``patient``, ``label`` and ``domain``: what `write_embeddings` writes;
    - ``.h5``, ``.h5ad`` (needs h5py): ``features`` with ``ids`` of as many rows; without ids it is one slide of the
      file's name, of which the mean over tiles is taken (TRIDENT);
    - ``.safetensors``: a tensor an id, of one row, or of several whose mean is taken;
    - a folder of such ``.h5`` or ``.npy`` files (tiatoolbox: ``0.features.0.npy`` has the id ``0``), each one slide.

    Args:
        source: The file or folder.
        manifest: A CSV file with the columns id, patient, domain and label, where the source does not have them; and
            mpp, slide if wanted. Lines of ids that the source lacks are left out, with a warning.

    Returns:
        The table, in the order of the source: `embedding` (float32, one width), `label` (a ClassLabel; the order is the
        source's own, else ascending), `domain`, or `magnification` (whole numbers) where the source has that instead,
        `patient`, `slide`, `filename` (the id), `mpp` (NaN where unknown); and `rescaled` where the source has it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file cannot be read; ids are there twice, or not in the manifest; widths differ; a number is not
            finite; there are not two classes, or a domain has one. Names rows and file.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"there is no {source}: give a file of embeddings, see docs/embeddings.md")
    columns, place = _read(source), str(source)
    try:
        ids, vectors = text_column(columns, "filename"), _checked(columns.pop(VECTOR), columns["filename"])
        _refuse_twice(ids, "")
        if manifest is not None:
            columns |= _described(Path(manifest), ids, place)
            place += f", described by {manifest}"
        return _table(columns, ids, vectors)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _read(source: Path) -> dict[str, Any]:
    """Columns as they are written, `filename` and `embedding` (an array, or a list of arrays) among them."""
    if source.is_dir():
        hidden = re.compile(r"\.|.*\.position")  # the latter tiatoolbox writes beside the features
        files = [path for path in sorted(source.iterdir()) if path.suffix.lower() in _SUFFIXES]
        files = [path for path in files if not hidden.match(path.name)]
        if not files:
            raise ValueError(f"{source} holds no {', '.join(_SUFFIXES)} file.")
        parts = [_read(path) for path in files]
        return {name: [value for part in parts for value in part[name]] for name in ("filename", VECTOR)}
    suffix = source.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(f"{source}: embeddings are {', '.join(_SUFFIXES)} files, or a folder of them.")
    readers = {".parquet": _read_parquet, ".safetensors": _read_safetensors, ".npy": _read_npy}
    try:
        return readers.get(suffix, _read_hdf5)(source)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # whatever the formats' readers raise on a damaged file
        raise ValueError(f"{source} cannot be read ({error}); write or download it again.") from error


def _read_parquet(file: Path) -> dict[str, Any]:
    table = pq.read_table(file)
    stored = {name: table[name] for name in table.column_names}
    ids, vectors = _column(stored, _IDS), stored[_column(stored, _VECTORS)].combine_chunks()
    widths = np.diff(vectors.offsets.to_numpy()) if pa.types.is_list(vectors.type) else np.zeros(0)
    if vectors.null_count or len(set(widths)) > 1:
        rows = vectors.to_pylist()
        vectors = [np.asarray([] if row is None else row, np.float32) for row in rows]
    else:
        vectors = vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(table), -1)
    names = json.loads((table.schema.metadata or {}).get(b"label_names", b"[]"))
    others = {name: column.to_pylist() for name, column in stored.items() if not pa.types.is_nested(column.type)}
    return others | {"filename": others[ids], VECTOR: vectors, "label_names": names}


def _read_hdf5(file: Path) -> dict[str, Any]:
    import h5py  # an extra: "hdf5"

    with h5py.File(file) as opened:
        vectors = np.asarray(opened[_column(opened, _VECTORS)][()], np.float32)
        index = opened["obs"].attrs["_index"] if "obs" in opened else None  # of an AnnData: lazyslide
        ids = opened["obs"][index] if index else next((opened[name] for name in _IDS if name in opened), None)
        if ids is None:
            return _one_slide(file.stem, vectors)
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in ids[()]]
        return {"filename": names, VECTOR: vectors}


def _read_npy(file: Path) -> dict[str, Any]:
    return _one_slide(file.name.split(".features")[0].removesuffix(".npy"), np.load(file, allow_pickle=False))


def _read_safetensors(file: Path) -> dict[str, Any]:
    import safetensors.numpy

    parts = [_one_slide(name, tensor) for name, tensor in sorted(safetensors.numpy.load_file(file).items())]
    return {name: [value for part in parts for value in part[name]] for name in ("filename", VECTOR)}


def _one_slide(name: str, vectors: np.ndarray) -> dict[str, Any]:
    rows = np.asarray(vectors, np.float64).reshape(-1, vectors.shape[-1])
    return {"filename": [name], VECTOR: [rows.mean(0).astype(np.float32)]}


def _column(stored, names: tuple[str, ...]) -> str:
    for name in names:
        if name in stored:
            return name
    raise ValueError(f"no column {' or '.join(map(repr, names))}, but {', '.join(map(repr, stored))}")


def _checked(vectors, ids: list) -> np.ndarray:
    """One array (n, width) of finite numbers."""
    widths = [len(row) for row in vectors]
    usual, _ = Counter(widths).most_common(1)[0] if widths else (0, 0)
    if not usual:
        raise ValueError("there are no embeddings in it.")
    if wrong := [i for i, width in enumerate(widths) if width != usual]:
        shown = [f"{ids[i]!r} (row {i}) has {widths[i]}" for i in wrong]
        raise ValueError(f"embeddings are of {usual} numbers, but {_some(shown)}; they are of other networks or cut.")
    array = np.ascontiguousarray(vectors, np.float32)
    if len(wrong := np.flatnonzero(~np.isfinite(array).all(1))):
        shown = [f"{ids[i]!r} (row {i})" for i in wrong]
        raise ValueError(f"embeddings have numbers that are not finite: {_some(shown)}; make them again, or drop them.")
    return array


def _refuse_twice(ids: list[str], what: str) -> None:
    twice = {name for name, n in Counter(ids).items() if n > 1}
    if twice:
        shown = [
            f"{name!r} (rows {', '.join(str(i) for i, other in enumerate(ids) if other == name)})"
            for name in sorted(twice)[:10]
        ]
        raise ValueError(f"{len(twice):,} ids are there more than once{what}: {_some(shown)}; keep one row of each.")


def _described(manifest: Path, ids: list[str], source: str) -> dict[str, list]:
    """What a manifest says of each of `ids`."""
    columns = read_csv(manifest)
    if missing := [name for name in ("id", *_WANTED) if name not in columns]:
        raise ValueError(f"{manifest} has no column {', '.join(missing)}; it has {', '.join(columns)}.")
    names = text_column(columns, "id")
    for name in _WANTED:
        if empty := [i for i, value in enumerate(columns[name]) if value is None]:
            shown = [f"{names[i]!r} (row {i})" for i in empty]
            raise ValueError(f"{manifest} has no {name} of {_some(shown)}.")
    twice = {name for name, n in Counter(names).items() if n > 1}
    if twice:
        shown = []
        for name in sorted(twice)[:10]:
            rows = [i for i, other in enumerate(names) if other == name]
            shown.append(
                f"{name!r} (rows {', '.join(map(str, rows))}: patients {_some(columns['patient'][i] for i in rows)})"
            )
        raise ValueError(f"{manifest} has {len(twice):,} ids more than once: {_some(shown)}; which line is right?")
    row_of = {name: i for i, name in enumerate(names)}
    if unknown := [f"{name!r} (row {i})" for i, name in enumerate(ids) if name not in row_of]:
        raise ValueError(f"{manifest} lacks {len(unknown):,} of its {len(ids):,} ids: {_some(unknown)}.")
    if surplus := len(names) - len(ids):
        warnings.warn(f"{surplus:,} lines of {manifest} are of ids that {source} has not; left out", stacklevel=4)
    return {name: [column[row_of[each]] for each in ids] for name, column in columns.items() if name != "id"}


def _table(columns: dict[str, Any], ids: list[str], vectors: np.ndarray) -> datasets.Dataset:
    import datasets

    by_magnification = "domain" not in columns and "magnification" in columns
    domain = "magnification" if by_magnification else "domain"
    if missing := [name for name in ("patient", "label", domain) if name not in columns]:
        raise ValueError(f"nothing says {' or '.join(missing)} of its rows: give a manifest (--manifest CSV).")
    label, classes = class_column(columns, "label")
    if columns.get("label_names") and set(columns["label_names"]) == set(classes):
        label, classes = [columns["label_names"].index(classes[each]) for each in label], columns["label_names"]
    values = list(map(int, text_column(columns, domain))) if by_magnification else text_column(columns, domain)
    patient = text_column(columns, "patient")
    _check_domains(values, label, ids, classes)
    _warn_of_equal(vectors, patient, ids)
    text = datasets.Value("string")
    features = {
        "label": datasets.ClassLabel(names=classes),
        domain: datasets.Value("int64") if by_magnification else text,
        "mpp": datasets.Value("float64"),
        **dict.fromkeys(("patient", "slide", "filename"), text),
    }
    table = {"label": label, domain: values, "patient": patient, "filename": ids}
    table["mpp"] = scale_column(columns) if "mpp" in columns else [float("nan")] * len(ids)
    table["slide"] = text_column(columns, "slide") if "slide" in columns else patient
    if "rescaled" in columns:
        table["rescaled"] = [value.lower() == "true" for value in text_column(columns, "rescaled")]
        features["rescaled"] = datasets.Value("bool")
    feature = datasets.Features({VECTOR: datasets.List(datasets.Value("float32"), length=vectors.shape[1])})
    stored = datasets.Dataset(pa.table([_fixed(vectors)], [VECTOR]), info=datasets.DatasetInfo(features=feature))
    named = datasets.Dataset.from_dict(table, datasets.Features({name: features[name] for name in table}))
    return datasets.concatenate_datasets([stored, named], axis=1)


def _fixed(vectors: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


def _check_domains(domains: list, label: list[int], ids: list[str], classes: list[str]) -> None:
    for domain in sorted(set(domains)):
        rows = [i for i, each in enumerate(domains) if each == domain]
        if len(there := {label[i] for i in rows}) < 2:
            raise ValueError(
                f"domain {domain_name(domain)!r} has one class only: its {len(rows):,} rows are "
                f"{classes[there.pop()]!r} "
                f"({_some(f'{ids[i]!r} (row {i})' for i in rows)}); drop them, or join it with another domain."
            )


def _warn_of_equal(vectors: np.ndarray, patient: list[str], ids: list[str]) -> None:
    """Says which vectors are there under several patients: one image in training and in test, or a wrong patient."""
    rows: dict[bytes, list[int]] = {}
    for i, vector in enumerate(vectors):
        rows.setdefault(hashlib.blake2b(vector.tobytes()).digest(), []).append(i)
    shared = [group for group in rows.values() if len({patient[i] for i in group}) > 1]
    if shared:
        shown = [" = ".join(f"{ids[i]!r} (patient {patient[i]})" for i in group) for group in shared]
        warnings.warn(
            f"{len(shared):,} embeddings are there under more than one patient: {_some(shown)}. One and the same image "
            "may be in training and in test: drop them, or correct the patients",
            stacklevel=4,
        )


def _some(shown) -> str:
    shown = list(map(str, shown))
    return "; ".join(shown[:5]) + ("; ..." if len(shown) > 5 else "")


def write_embeddings(path: str | Path, vectors: Iterable[np.ndarray], ds, **record: Any) -> None:
    """Writes the Parquet file that `load_embeddings` reads without a manifest.

    Args:
        path: Of the file.
        vectors: Blocks (rows, width) that follow each other, of all rows of `ds` together.
        ds: The table they are of, as of `load_breakhis` or `load_table`.
        **record: Further facts, by which network for example; JSON in the file's metadata.
    """
    domain = "domain" if "domain" in ds.column_names else "magnification"
    names = ds.features["label"].names
    columns = {"id": ds["filename"][:], "label": [names[each] for each in ds["label"]]}
    wanted = [domain, "patient", "slide", "mpp"] + ["rescaled"] * ("rescaled" in ds.column_names)
    columns |= {name: ds[name][:] for name in wanted}
    metadata = {"label_names": json.dumps(names), **{name: json.dumps(value) for name, value in record.items()}}
    table, start, writer = pa.table(columns), 0, None
    with whole(path) as unfinished, ExitStack() as stack:
        for block in vectors:
            part = table.slice(start, len(block)).append_column(VECTOR, _fixed(np.asarray(block, np.float32)))
            part, start = part.replace_schema_metadata(metadata), start + len(block)
            writer = writer or stack.enter_context(pq.ParquetWriter(unfinished, part.schema))
            writer.write_table(part)


def embeddings_record(path: str | Path) -> dict[str, Any]:
    """The `record` with which `write_embeddings` wrote a file; empty where there is no such file."""
    if not Path(path).is_file():
        return {}
    metadata = pq.read_schema(path).metadata or {}
    return {name.decode(): json.loads(value) for name, value in metadata.items() if not name.startswith(b"ARROW")}


def is_of_vectors(ds) -> bool:
    """Whether a table holds vectors in the place of images."""
    return VECTOR in (ds if isinstance(ds, Mapping) else ds.column_names)


def vectors_of(ds) -> np.ndarray:
    """float32 (n, width) of a table of vectors."""
    if not hasattr(ds, "with_format"):
        return np.asarray(ds[VECTOR], np.float32)
    column = ds.with_format("arrow")[VECTOR][:]
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(ds), -1)


class VectorCache:
    """Vectors of a table in the place of a `PixelCache` and a `ViewCache`: they are taken, and shown, as they are.

    Attributes:
        vectors: float32 tensor (n, width).
        native_mpp: float64 array (n,), micrometres per pixel of what they are of; NaN where unknown.
    """

    def __init__(self, ds):
        self.vectors = torch.from_numpy(vectors_of(ds).copy())
        self.native_mpp = np.asarray(ds["mpp"][:], float)

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self.vectors.device

    def to(self, device) -> VectorCache:
        """Moves the vectors; returns itself."""
        self.vectors = self.vectors.to(device)
        return self

    def take(self, rows: torch.Tensor, device) -> torch.Tensor:
        """Rows as a float32 tensor (len(rows), width) on `device`."""
        return self.vectors.index_select(0, rows.to(self.device)).to(device)

    def augmentation(self, config, mean: torch.Tensor, std: torch.Tensor) -> Callable:
        """None: the model standardises vectors itself; see `PixelCache.augmentation`."""
        return lambda vectors, draws: vectors

    def views(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Each vector as the one tile of a view, (1, width)."""
        vectors = self.vectors.cpu().numpy()
        for row in rows:
            yield vectors[row : row + 1]
