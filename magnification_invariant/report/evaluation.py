"""What anyone's predictions are worth: intervals, calibration, a threshold, types and domains."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from magnification_invariant import metrics
from magnification_invariant.data.splits import domain_name
from magnification_invariant.metrics.intervals import FEWEST_PATIENTS
from magnification_invariant.report.page import Picture, Section, Table, interval
from magnification_invariant.report.pictures import reliability_of

TEXTS = ("filename", "label", "patient", "part", "subtype", "domain", "magnification")


def read_predictions(path: Path) -> dict[str, np.ndarray]:
    """Columns of a table of predictions, of its last epoch if it has several.

    Needed are ``label`` (0, 1), ``patient``, and ``logits`` (two a row) or ``probability`` (of class 1); where both are
    there and disagree, ``probability`` counts. Used where there: ``part`` ("val" chooses threshold and temperature),
    ``subtype``, ``domain`` or ``magnification``.

    Raises:
        ValueError: a column is missing, has gaps or rows of another length; no rows.
        OSError: no such file, or no Parquet.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no such file: {path}")
    try:
        table = pd.read_parquet(path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise OSError(f"{path} is not a Parquet file of predictions: {error}") from error
    if "epoch" in table and len(table):
        epoch = pd.to_numeric(table["epoch"], errors="coerce").astype(float)
        if unknown := int(epoch.isna().sum()):
            raise ValueError(f"{path}: column 'epoch' has no value, or no number, in {unknown} of {len(table)} rows")
        table = table[epoch == epoch.max()]
    table = table[[name for name in ("logits", "probability", *TEXTS) if name in table]]
    for name, gaps in table.isna().sum().items():
        if gaps:
            raise ValueError(f"{path}: column {name!r} has no value in {gaps} of {len(table)} rows")
    if "logits" in table:
        logits = table["logits"].tolist()
        ragged = [i for i, row in enumerate(logits) if np.shape(row) != (2,)]
        if ragged:
            raise ValueError(
                f"{path}: column 'logits' has not two numbers (benign, malignant) in {len(ragged)} of {len(table)} "
                f"rows, the first of them row {ragged[0]}: {logits[ragged[0]]!r}"
            )
    keys = [name for name in ("filename", "patient", "part") if name in table]
    if "filename" in keys and (twice := int(table.duplicated(keys).sum())):
        warnings.warn(f"{path}: {twice} of {len(table)} rows are of an image that is there already", stacklevel=2)
    return {name: np.array(table[name].tolist()) for name in table}


def checked(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns with ``logits``, ``probability``, ``domain`` and ``part``, whatever of them was given.

    Raises:
        ValueError: see `read_predictions`; labels other than 0 and 1, numbers that are none.
    """
    missing = [name for name in ("label", "patient") if name not in columns]
    missing += ["probability, or logits"] * (not columns.keys() & {"probability", "logits"})
    if missing:
        raise ValueError(f"the predictions lack {', '.join(missing)}; they have {', '.join(sorted(columns))}")
    n = len(columns["label"])
    if not n:
        raise ValueError("the predictions have no rows")
    complete = {"part": np.full(n, "test"), **columns}
    if "logits" in columns:
        if columns["logits"].ndim != 2 or columns["logits"].shape[1] != 2:
            raise ValueError(f"logits must be two a row, benign and malignant, not of shape {columns['logits'].shape}")
        of_logits = metrics.apply_temperature(columns["logits"], 1.0)[:, 1]
        complete.setdefault("probability", of_logits)
    metrics.brier(complete["label"], complete["probability"])  # raises what is wrong with the two
    stated = "probability" in columns
    if stated and "logits" in columns:
        apart = np.abs(of_logits - columns["probability"])
        stated = apart.max() > 1e-3
        if stated:
            warnings.warn(
                f"probability and logits disagree in {int((apart > 1e-3).sum())} of {n} rows (as where a temperature "
                "was applied): probability is evaluated",
                stacklevel=3,
            )
    if stated:
        p = np.clip(complete["probability"].astype(float), 1e-12, 1 - 1e-12)
        complete["logits"] = np.stack([np.zeros(n), np.log(p / (1 - p))], 1)
    if "domain" not in complete and "magnification" in complete:
        complete["domain"] = complete["magnification"]
    return complete


def sections(
    columns: dict[str, np.ndarray],
    part: str = "test",
    *,
    sensitivity: float = 0.95,
    temperature: float | None = None,
) -> list[Section]:
    """The evaluation of predictions.

    Args:
        columns: see `read_predictions`.
        part: that is evaluated; "val", where there, chooses threshold and temperature and is not evaluated.
        sensitivity: wanted of the threshold.
        temperature: that the predictions come with; by default fitted on "val", if there is one.

    Raises:
        ValueError: see `checked`; `part` has no rows; a sensitivity outside (0, 1].
    """
    columns = checked(columns)
    if not 0 < sensitivity <= 1:
        raise ValueError(f"sensitivity must lie in (0, 1], not {sensitivity}")
    parts = sorted(set(columns["part"]))
    if part not in parts:
        raise ValueError(f"the predictions have no part {part!r}, but {', '.join(parts)}")
    test, val = ({name: c[columns["part"] == which] for name, c in columns.items()} for which in (part, "val"))
    classes = np.unique(test["label"])
    if len(classes) < 2:
        warnings.warn(f"all rows have label {classes[0]}: AUC and balanced accuracy do not exist", stacklevel=2)
    if set(test["patient"]) & set(val["patient"]):
        warnings.warn("patients of the validation part are tested: threshold and temperature saw them", stacklevel=2)
    source = "given with the predictions"
    if temperature is None:
        temperature, source = _fitted(val if part != "val" else None)
    for rows in (test, val):
        rows["raw"] = rows["probability"]
        if len(rows["label"]):
            rows["probability"] = metrics.apply_temperature(rows["logits"], temperature)[:, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # too few patients for an interval: the table says it
        domains = [(f"By {name}", _by(test, name)) for name in ("subtype", "domain") if name in test]
        return [
            ("Metrics", _metrics(test)),
            ("Calibration", _calibration(test, temperature, source)),
            ("Threshold", _threshold(test, val if part != "val" else {"label": []}, sensitivity)),
            *domains,
        ]


def _fitted(val: dict[str, np.ndarray] | None) -> tuple[float, str]:
    """A temperature, and where it is from."""
    if val is None or not len(val["label"]):
        return 1.0, "none: there are no validation rows"
    weight = metrics.patient_weights(val["patient"])
    temperature = metrics.fit_temperature(val["logits"], val["label"], sample_weight=weight)
    return temperature, "fitted on the validation patients"


def _metrics(test: dict) -> list:
    rows = []
    for name, metric in metrics.METRICS.items():
        measured = metrics.cluster_interval(name, test["label"], test["probability"], test["patient"])
        by_image = metric(test["label"], test["probability"])
        rows.append(
            [
                name.replace("_", " "),
                f"{measured.value:.4f}",
                interval(measured.low, measured.high) or "-",
                f"{by_image:.4f}",
            ]
        )
    n, benign, malignant = len(test["label"]), *(len(set(test["patient"][test["label"] == c])) for c in (0, 1))
    return [
        f"{n:,} images; {benign} patients with benign and {malignant} with malignant images. Patient-balanced: every "
        f"patient weighs the same; 95 % intervals over patients, none with fewer than {FEWEST_PATIENTS} of a class. "
        "nan: the rows do not define it.",
        Table(["metric", "patient-balanced", "95 % interval", "by image"], rows),
    ]


def _calibration(test: dict, temperature: float, source: str) -> list:
    label, weight = test["label"], metrics.patient_weights(test["patient"])
    oracle = metrics.fit_temperature(test["logits"], label, sample_weight=weight)
    kinds = {
        "as given, T=1": test["raw"],
        f"T={temperature:.2f}": test["probability"],
        f"oracle: T={oracle:.2f}, fitted on these very rows": metrics.apply_temperature(test["logits"], oracle)[:, 1],
    }
    names = ("brier", "log_loss", "expected_calibration_error")
    rows = []
    for kind, p in kinds.items():
        parts = metrics.corp_decomposition(label, p, weight)
        values = [metrics.METRICS[name](label, p, weight) for name in names]
        rows.append([kind, *(f"{v:.4f}" for v in (*values, parts.miscalibration, parts.discrimination))])
    head = ["", *(name.replace("_", " ") for name in names), "miscalibration", "discrimination"]
    return [
        f"Temperature {temperature:.3f}: {source}. The oracle's shows what a temperature could give, and is no result. "
        "Brier = miscalibration - discrimination + uncertainty (CORP).",
        Table(head, rows),
        Picture.drawn("reliability", "Reliability, bins of equal mass.", reliability_of, {"": (label, kinds, weight)}),
    ]


def _at(rows: dict, threshold: float) -> tuple[float, float]:
    """Patient-balanced sensitivity and specificity; NaN without the class."""
    weight, called = metrics.patient_weights(rows["patient"]), rows["probability"] >= threshold
    malignant = rows["label"] == 1

    def share(group: np.ndarray, right: np.ndarray) -> float:
        return weight[group & right].sum() / weight[group].sum() if group.any() else float("nan")

    return share(malignant, called), share(~malignant, ~called)


def _threshold(test: dict, val: dict, wanted: float) -> list:
    if not len(val["label"]) or not (val["label"] == 1).any():
        return ["None: there are no malignant validation rows (part 'val') to choose it by, and the test may not."]
    malignant = val["label"] == 1
    weight = metrics.patient_weights(val["patient"])[malignant]
    order = np.argsort(-val["probability"][malignant])
    reached = np.cumsum(weight[order]) / weight.sum()
    threshold = float(val["probability"][malignant][order][np.searchsorted(reached, wanted - 1e-9)])
    rows = [
        [name, *("-" if np.isnan(v) else f"{v:.3f}" for v in _at(rows, threshold))]
        for name, rows in (("validation", val), ("test", test))
    ]
    return [
        f"The highest threshold at which validation reaches a sensitivity of {wanted:.3g}, patient-balanced: a "
        f"probability of {threshold:.4f} and above is called malignant. What it gives on the test:",
        Table(["", "sensitivity", "specificity"], rows),
    ]


def _by(test: dict, name: str) -> list:
    rows = []
    for value in np.unique(test[name]):
        chosen = {key: column[test[name] == value] for key, column in test.items()}
        weight = metrics.patient_weights(chosen["patient"])
        given = chosen["label"], chosen["probability"], weight
        figures = [*_at(chosen, 0.5), metrics.auc(*given), metrics.brier(*given)]
        shown = domain_name(value) if name == "domain" else str(value)
        counts = [str(len(chosen["label"])), str(len(set(chosen["patient"])))]
        rows.append([shown, *counts, *("-" if np.isnan(v) else f"{v:.3f}" for v in figures)])
    head = [name, "images", "patients", "sensitivity", "specificity", "AUC", "Brier"]
    return ["Patient-balanced, at a threshold of 0.5.", Table(head, rows)]
