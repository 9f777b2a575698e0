"""What a run leaves behind: the predictions table, and the numbers that follow from it alone."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from magnification_invariant import metrics

POSITIVE = 1  # malignant
ZOOM = "zoom.parquet"  # predictions at one scale after the other, see `zoom_curves`


def write_json(path: Path, content: dict) -> None:
    """Whole or not at all; what is not a number becomes null, since JSON has no NaN."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(_plain(content), indent=1, allow_nan=False))
    unfinished.replace(path)


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def prediction_table(
    columns: dict[str, np.ndarray], rows: np.ndarray, logits: np.ndarray, **constants: str | int
) -> pa.Table:
    """Predictions of `rows`, one a line.

    Args:
        columns: of the whole table: filename, patient, slide, domain, mpp (at the network's input), label, rescaled.
        rows: row indices (n,).
        logits: (n, classes), uncalibrated.
        constants: further columns of one value: part, epoch, fold, held_out, method, seed.
    """
    table = {name: column[rows] for name, column in columns.items()}
    table["logits"] = list(np.asarray(logits, np.float32))
    table["probability"] = metrics.apply_temperature(logits, 1.0)[:, POSITIVE]
    return pa.table(table | {name: [value] * len(rows) for name, value in constants.items()})


def last_epoch(folder: Path) -> pa.Table:
    """Predictions of a finished cell after its last epoch, the one that counts."""
    records = pq.read_table(Path(folder) / "predictions.parquet")
    return records.filter(pc.equal(records["epoch"], pc.max(records["epoch"])))


def part_of(records: pa.Table, part: str, temperature: float = 1.0) -> dict[str, np.ndarray]:
    """``logits``, ``label``, ``patient``, ``probability`` (calibrated by `temperature`) of a part, as arrays."""
    records = records.filter(pa.array(np.asarray(records["part"]) == part))
    logits = np.array(records["logits"].to_pylist(), np.float64).reshape(len(records), -1)
    return {
        "logits": logits,
        "label": np.asarray(records["label"]),
        "patient": np.asarray(records["patient"]),
        "probability": metrics.apply_temperature(logits, temperature)[:, POSITIVE] if len(records) else np.empty(0),
    }


def scores(label: np.ndarray, probability: np.ndarray, patient: np.ndarray) -> dict:
    """Every metric by image and patient-balanced, and patient-clustered intervals of the main ones.

    What does not exist is NaN or None: an AUC of one class, an interval of too few patients.
    """
    weight = metrics.patient_weights(patient)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # too few patients for an interval: the None says it
        intervals = {
            name: metrics.cluster_interval(name, label, probability, patient)[1:] for name in ("auc", "f1", "brier")
        }
    found = {
        "images": len(label),
        "patients": len(np.unique(patient)),
        "image": {name: metric(label, probability) for name, metric in metrics.METRICS.items()},
        "patient_balanced": {
            name: metric(label, probability, sample_weight=weight) for name, metric in metrics.METRICS.items()
        },
    }
    found["interval"] = {name: None if np.isnan(ends).any() else ends for name, ends in intervals.items()}
    return found


def evaluate(records: pa.Table, temperature: float = 1.0) -> dict:
    """`scores` of every part in the predictions of one epoch of one run."""
    parts = {}
    for part in dict.fromkeys(records["part"].to_pylist()):
        p = part_of(records, part, temperature)
        parts[part] = scores(p["label"], p["probability"], p["patient"])
    return parts
