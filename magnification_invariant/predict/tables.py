"""Predictions of a collection, in a file: in shards that several processes share and a cut run finds again."""

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from magnification_invariant.files import locked, read_json, whole, write_json
from magnification_invariant.predict.inputs import Item
from magnification_invariant.records import POSITIVE, write_table

if TYPE_CHECKING:
    from magnification_invariant.predict.classifier import Classifier

SHARD = 64  # images; what a cut run loses at most, per process
FORMATS = (".parquet", ".csv", ".json")

_TEXT, _REAL, _WHOLE, _REALS = pa.string(), pa.float64(), pa.int64(), pa.list_(pa.float64())
SCHEMA = pa.schema(
    {
        "filename": _TEXT,
        "width": _WHOLE,
        "height": _WHOLE,
        "native_mpp": _REAL,
        "mpp": _REAL,
        "apparent_mpp": _REAL,
        "tiles": _WHOLE,
        "filled": _REAL,
        "logits": _REALS,
        "probability": _REAL,
        "prediction": _TEXT,
        "signature": _REALS,
        "in_scope": pa.bool_(),
        "scope_percentile": _REAL,
        "warning": _TEXT,
        "error": _TEXT,
    }
)


PATIENTS = pa.schema(
    {"patient": _TEXT, "images": _WHOLE, "failed": _WHOLE, "probability": _REAL, "prediction": _TEXT, "error": _TEXT}
)


@dataclass
class Summary:
    """What came of a run: images in all, and (name, text) of those with an error or a warning.

    `out_of_scope` counts images; None where the model has no scope.
    """

    images: int = 0
    out_of_scope: int | None = None
    patients: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)


def predict_to_file(
    classifier: "Classifier",
    items: list[Item],
    out: str | Path,
    *,
    view: str | float = "normalised",
    patients: Sequence[str] | None = None,
    process: int = 0,
    processes: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Summary | None:
    """Predicts items and writes a row for each, in their order, to `out` (``.parquet``, ``.csv`` or ``.json``).

    Shards of `SHARD` images are written to ``OUT.parts`` and merged at the end. A run that was cut, started again with
    the same model, items and settings, goes on after the shards that are there, with any number of processes.

    Args:
        view: see `Classifier.iterate`.
        patients: of each item; then a row a patient is written too, see `patients_file` and `by_patient`.
        process, processes: which of how many this is; every process is given all items and takes its share of shards.
        wait: returns when all processes have called it.

    Returns:
        The summary, on process 0; None on the others.

    Raises:
        ValueError: another kind of file is wanted.
        Busy: another process writes `out`.
        CannotWrite: a file cannot be written; the shards are kept.
    """
    out = Path(out)
    if out.suffix not in FORMATS:
        raise ValueError(f"predictions are written as {', '.join(FORMATS)}, not as {out.name}")
    parts = out.with_name(out.name + ".parts")
    shards = [parts / f"{first // SHARD:06d}.parquet" for first in range(0, len(items), SHARD)]
    with locked(out) if process == 0 else nullcontext():
        if process == 0:
            prepare_parts(parts, fingerprint(classifier, items, view))
        wait()
        todo = [k for k in range(process, len(shards), processes) if not shards[k].exists()]
        with tqdm(total=sum(len(items[k * SHARD : (k + 1) * SHARD]) for k in todo), unit="image", disable=None) as bar:
            for k in todo:
                rows = []
                for row in classifier.iterate(items[k * SHARD : (k + 1) * SHARD], view=view):
                    rows.append({name: row[name] for name in SCHEMA.names})
                    bar.update()
                write_table(pa.Table.from_pylist(rows, SCHEMA), shards[k])
        wait()
        if process:
            return None
        summary = Summary()
        with whole(out) as unfinished:
            _WRITERS[out.suffix](_noted(shards, summary), unfinished, SCHEMA)
        if patients is not None:
            table = by_patient((pq.read_table(shard) for shard in shards), patients, classifier.labels)
            summary.patients = len(table)
            with whole(patients_file(out)) as unfinished:
                _WRITERS[out.suffix]([table], unfinished, PATIENTS)
        shutil.rmtree(parts)
    return summary


def patients_file(out: Path) -> Path:
    """What the table of patients beside `out` is called: ``predictions.patients.csv``."""
    return out.with_name(f"{out.stem}.patients{out.suffix}")


def by_patient(tables: Iterable[pa.Table], patients: Sequence[str], labels: Sequence[str]) -> pa.Table:
    """A row (`PATIENTS`) a patient, in the order of their first image.

    The probability is the mean of the images', each of which weighs the same within its patient, as in
    `metrics.patient_weights`. Images that failed are counted and left out.

    Args:
        tables: of `SCHEMA`, all rows in order.
        patients: of every row.
        labels: names of the classes, the positive one last.
    """
    probability: dict[str, list[float | None]] = {}
    values = (each for table in tables for each in table["probability"].to_pylist())
    for patient, value in zip(patients, values, strict=True):
        probability.setdefault(patient, []).append(value)
    rows = []
    for patient, values in probability.items():
        known = [value for value in values if value is not None]
        row = {"patient": patient, "images": len(values), "failed": len(values) - len(known)}
        if known:
            mean = float(np.mean(known))
            row |= {"probability": mean, "prediction": labels[POSITIVE if mean >= 0.5 else 1 - POSITIVE]}
        rows.append(row | {"error": None if known else "none of the images could be predicted"})
    return pa.Table.from_pylist(rows, PATIENTS)


def prepare_parts(parts: Path, digest: str) -> None:
    """The folder of shards; emptied if they are of another run."""
    run = parts / "run.json"
    if not (run.exists() and read_json(run)["fingerprint"] == digest):
        shutil.rmtree(parts, ignore_errors=True)
        write_json(run, {"fingerprint": digest})


def fingerprint(classifier: "Classifier", items: list[Item], settings: Any) -> str:
    """Of a model, what it is given, and settings (JSON): parts of another one are not taken."""
    digest = hashlib.sha256(json.dumps([classifier.config, settings]).encode())
    # Of the weights' file and not of its name: a model trained again in the same folder is another one.
    for path in sorted([*classifier.folder.glob("model.*"), *classifier.folder.glob("scope.*")]):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    for item in items:
        is_file = isinstance(item.image, str | os.PathLike) and os.path.exists(item.image)
        digest.update(f"{item.name} {item.mpp} {os.stat(item.image).st_mtime_ns if is_file else ''}\n".encode())
        if isinstance(item.image, bytes | bytearray | np.ndarray):
            digest.update(np.ascontiguousarray(item.image).data if isinstance(item.image, np.ndarray) else item.image)
    return digest.hexdigest()


def _noted(shards: list[Path], summary: Summary) -> Iterator[pa.Table]:
    for shard in shards:
        table = pq.read_table(shard)
        summary.images += len(table)
        if known := [each for each in table["in_scope"].to_pylist() if each is not None]:
            summary.out_of_scope = (summary.out_of_scope or 0) + known.count(False)
        for name, error, warning in zip(*(table[c].to_pylist() for c in ("filename", "error", "warning")), strict=True):
            if error:
                summary.errors.append((name, error))
            elif warning:
                summary.warnings.append((name, warning))
        yield table


def _to_parquet(tables: Iterable[pa.Table], path: Path, schema: pa.Schema) -> None:
    with pq.ParquetWriter(path, schema) as writer:
        for table in tables:
            writer.write_table(table)


def _to_csv(tables: Iterable[pa.Table], path: Path, schema: pa.Schema) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        write_csv(file, schema.names, (row for table in tables for row in table.to_pylist()))


def write_csv(file: TextIO, names: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Writes what `names` names of rows, after a line of the names.

    Lists are JSON in their cells, and text is never a formula to who opens the table, see `_cell`.
    """
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(name, row[name]) for name in names})


def _cell(name: str, value):
    """A file name that begins as a formula does gets ``./`` before it, other text an apostrophe; numbers stay."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        return ("./" if name == "filename" else "'") + value
    return json.dumps(value) if isinstance(value, list) else value


def _to_json(tables: Iterable[pa.Table], path: Path, schema: pa.Schema) -> None:
    """A list of objects, one a line."""
    with open(path, "w", encoding="utf-8") as file:
        rows = (json.dumps(row) for table in tables for row in table.to_pylist())
        file.write("[")
        for i, row in enumerate(rows):
            file.write(("," if i else "") + "\n" + row)
        file.write("\n]\n")


_WRITERS = {".parquet": _to_parquet, ".csv": _to_csv, ".json": _to_json}
