"""What a run leaves behind: one class reads it and writes it, and knows the names of its files and their keys.

The folder of a run (a finished cell of the grid) holds

- ``config.json``: ``cell`` (method, held_out, fold, seed, split, data), ``settings`` (all else that the method reads),
  ``settings_sha256``, ``machine`` (threads, versions, git revision) and, of networks, ``start`` (initial weights);
- ``metrics.jsonl``: an epoch's mean losses a line; ``prepare.jsonl``: the same of what was trained first;
- ``predictions.parquet``: logits and probabilities of the parts below, after the last epoch;
- ``embeddings.safetensors``: embeddings of all parts after the last epoch, one tensor a part;
- ``results.json``: metrics, intervals and the signature; written last, so a run that has it is finished;
- ``timing.json``, ``zoom.parquet`` (see `predict.zoom`), ``signature_stability.json`` (see `report.signatures`);
- ``model/``: the model, in the layout of its Hub repository.

Parts of the predictions: ``val``; ``test``, the unseen domain; ``test_source``, the same patients at the seen ones;
``test_normalised``, the rows of ``test`` shown at a scale that was trained on (see `data.views`).
"""

import json
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import safetensors.numpy

from magnification_invariant import metrics
from magnification_invariant.files import read_json, read_json_lines, whole, write_json

POSITIVE = 1  # malignant
PARTS = ("val", "test", "test_source")  # of a split, beside "train"
NORMALISED = "test_normalised"
OUT_OF_FOLD = "out_of_fold"  # of a released model: what models of its recipe said of patients that they had not seen
ZOOM = "zoom.parquet"  # see `predict.zoom`
KEYS = ("filename", "patient", "label", "domain")  # of a prediction or an embedding: what its image is


class Run:
    """The folder of one run; attributes are read when they are first asked for.

    Args:
        folder: Of a run, or its ``model/``; or of a model without its run, which has predictions and results too.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.folder = folder.parent if folder.name == "model" and (folder.parent / "config.json").is_file() else folder
        self._columns: dict[str, dict[str, np.ndarray]] = {}  # of `part`, which a report asks for many times
        self._oracles: dict[str, float] = {}  # by part, which takes long

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and self.folder.resolve() == other.folder.resolve()

    def __hash__(self) -> int:
        return hash(self.folder.resolve())

    # What it is

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``; of a model without its run, the record of it that its results carry.

        Raises:
            ValueError: The folder holds neither, or what version 0.1 recorded.
        """
        config = read_json(self.folder / "config.json")
        if "cell" not in config:
            config = self.results.get("record", {})
        if "cell" not in config:
            raise ValueError(
                f"{self.folder} holds no run that this version can read (no record names its cell; version 0.1 wrote "
                "other ones): train it again"
            )
        return config

    @property
    def has_config(self) -> bool:
        """Whether it was begun."""
        return (self.folder / "config.json").is_file()

    @property
    def is_finished(self) -> bool:
        """Whether everything is written."""
        return self.has_config and (self.folder / "results.json").is_file()

    @property
    def is_network(self) -> bool:
        """Whether a network was trained; a floor has none."""
        return "start" in self.config

    @property
    def method(self) -> str:
        """Name of the method, or of the floor."""
        return self.config["cell"]["method"]

    @property
    def held_out(self) -> int | str:
        """The domain that training has not seen."""
        return self.config["cell"]["held_out"]

    @property
    def settings(self) -> dict[str, Any]:
        """What its method read, by name."""
        return self.config["settings"]

    @property
    def zoom(self) -> float:
        """Range of the training's continuous zoom, [1 / zoom, zoom]; 1 is none."""
        return self.settings.get("zoom", 1.0)

    @property
    def title(self) -> str:
        """The row of a table that it belongs to."""
        return self.method + " + zoom" * (self.zoom > 1) + f" ({self.recipe})" * bool(self.recipe)

    @property
    def recipe(self) -> str | None:
        """Name of its row, where settings were chosen for each held-out domain."""
        return self.config["cell"].get("recipe")

    @property
    def key(self) -> tuple[int | str, int, int]:
        """What is compared with what: held-out domain, fold, seed."""
        return self.held_out, self.config["cell"]["fold"], self.config["cell"]["seed"]

    # What it left

    @property
    def model(self) -> Path:
        """Folder of its model."""
        return self.folder / "model" if (self.folder / "model").is_dir() else self.folder

    @cached_property
    def results(self) -> dict[str, Any]:
        """Content of ``results.json``."""
        return read_json(self.folder / "results.json")

    @cached_property
    def temperature(self) -> float:
        """What logits are divided by before the softmax."""
        return self.results["temperature"]

    @property
    def seconds(self) -> float | None:
        """Duration of the training; None where it was not written."""
        file = self.folder / "timing.json"
        return read_json(file)["seconds"] if file.is_file() else None

    def losses(self, stage: str = "metrics") -> list[dict[str, float]]:
        """Mean losses by epoch, of the stage "metrics" or "prepare"; empty where none are recorded."""
        file = self.folder / f"{stage}.jsonl"
        return read_json_lines(file) if file.is_file() else []

    @cached_property
    def predictions(self) -> pa.Table:
        """As written; runs of older versions hold every epoch."""
        return pq.read_table(self.folder / "predictions.parquet")

    @cached_property
    def records(self) -> pa.Table:
        """Predictions after the last epoch, the one that counts."""
        return self.predictions.filter(pc.equal(self.predictions["epoch"], pc.max(self.predictions["epoch"])))

    @property
    def zoom_curves(self) -> pa.Table | None:
        """See `predict.zoom`; None where they were not asked for."""
        file = self.folder / ZOOM
        return pq.read_table(file) if file.is_file() else None

    @property
    def parts(self) -> list[str]:
        """Of the records."""
        return self.records["part"].unique().to_pylist()

    def part(self, part: str, temperature: float | None = None) -> dict[str, np.ndarray]:
        """One part of the records as arrays, a value a row.

        Args:
            part: see the module; a part that is not there has no rows.
            temperature: by default the run's own.

        Returns:
            `KEYS`, mpp (um/px at the network's input), logits (n, classes) and probability (calibrated).
        """
        if part not in self._columns:
            rows = self.records.filter(pc.equal(self.records["part"], part))
            columns = {name: np.asarray(rows[name]) for name in (*KEYS, "mpp") if name in rows.column_names}
            columns["logits"] = np.array(rows["logits"].to_pylist(), np.float64).reshape(
                len(rows), -1 if len(rows) else 0
            )
            self._columns[part] = columns
        columns = self._columns[part]
        if not len(columns["logits"]):
            return columns | {"probability": np.empty(0)}
        used = self.temperature if temperature is None else temperature
        return columns | {"probability": metrics.apply_temperature(columns["logits"], used)[:, POSITIVE]}

    def oracle_temperature(self, part: str = "test") -> float:
        """Fitted on the rows it is judged by: what no method may use, and the most that a temperature can give."""
        if part not in self._oracles:
            p = self.part(part)
            weight = metrics.patient_weights(p["patient"])
            self._oracles[part] = metrics.fit_temperature(p["logits"], p["label"], sample_weight=weight)
        return self._oracles[part]

    def embeddings(self, part: str) -> np.ndarray:
        """(n, width) of a part, in the order of `keys`."""
        with safetensors.safe_open(self.folder / "embeddings.safetensors", "numpy") as file:
            return file.get_tensor(part)

    @cached_property
    def _embedded(self) -> pa.Table:
        return pq.read_table(self.folder / "embeddings.parquet")

    def keys(self, part: str) -> dict[str, np.ndarray]:
        """`KEYS` of the rows of `embeddings`."""
        rows = self._embedded.filter(pc.equal(self._embedded["part"], part))
        return {name: np.asarray(rows[name]) for name in KEYS}

    @cached_property
    def marks(self) -> list[str]:
        """What must be said beside every number of it."""
        marks = set()
        if any(self.results.get("rescaled", {}).values()):
            marks.add("rescaled: some images are digital zoom, not photographed at their magnification")
        if self.config.get("start", {}).get("saw_test"):
            marks.add("the start had seen the test")
        if self.results.get("gan", {}).get("collapsed"):
            marks.add("the generator failed its collapse check")
        low, high = self.results.get("mpp_range") or (0.0, 0.0)
        if self.zoom > 1 and np.all((low <= (mpp := self.part("test")["mpp"])) & (mpp <= high)):
            marks.add("unseen optics, scale simulated")
        return sorted(marks)

    # What is written

    def write_config(self, config: dict[str, Any]) -> None:
        """Writes what the run is."""
        write_json(self.folder / "config.json", config)

    def write_results(self, results: dict[str, Any]) -> None:
        """Writes ``results.json``, the last file of a run."""
        write_json(self.folder / "results.json", results)
        self.__dict__.pop("results", None)

    def write_timing(self, **seconds: float) -> None:
        """Writes durations by name."""
        write_json(self.folder / "timing.json", seconds)

    def write_predictions(self, table: pa.Table) -> None:
        """Writes a table of `prediction_table`."""
        write_table(table, self.folder / "predictions.parquet")

    def write_losses(self, losses: list[dict[str, float]], stage: str = "metrics") -> None:
        """Writes the losses of each epoch."""
        with whole(self.folder / f"{stage}.jsonl") as unfinished:
            unfinished.write_text("".join(json.dumps(each) + "\n" for each in losses))

    def write_embeddings(self, embeddings: dict[str, np.ndarray], keys: dict[str, dict[str, np.ndarray]]) -> None:
        """Embeddings (n, width) by part, and the `KEYS` of their rows."""
        with whole(self.folder / "embeddings.safetensors") as unfinished:
            safetensors.numpy.save_file({part: np.ascontiguousarray(x) for part, x in embeddings.items()}, unfinished)
        rows = [pa.table({**columns, "part": [part] * len(embeddings[part])}) for part, columns in keys.items()]
        write_table(pa.concat_tables(rows), self.folder / "embeddings.parquet")


def write_table(table: pa.Table, path: Path) -> None:
    """Writes Parquet, whole or not at all."""
    with whole(path) as unfinished:
        pq.write_table(table, unfinished)


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
    return {
        "images": len(label),
        "patients": len(np.unique(patient)),
        "image": {name: metric(label, probability) for name, metric in metrics.METRICS.items()},
        "patient_balanced": {
            name: metric(label, probability, sample_weight=weight) for name, metric in metrics.METRICS.items()
        },
        "interval": {name: None if np.isnan(ends).any() else ends for name, ends in intervals.items()},
    }


def evaluate(run: Run, temperature: float | None = None) -> dict[str, dict]:
    """`scores` of every part of a run's records."""
    parts = {part: run.part(part, temperature) for part in run.parts}
    return {part: scores(p["label"], p["probability"], p["patient"]) for part, p in parts.items()}
