"""Finished cells as a report reads them, and the comparisons that are made between them.

The estimand, everywhere: the temperature-scaled, patient-balanced Brier score of one method minus that of another, on
the unseen magnification, averaged over the runs (folds and seeds) and over the held-out magnifications. Every patient
weighs 1 in each run and is one cluster over all of them, so the interval and the p-value speak of other patients, the
trained models taken as given. The AUC counts pairs of one run only: scores of different models are never pooled.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from magnification_invariant import metrics
from magnification_invariant.metrics.intervals import Difference, Interval
from magnification_invariant.records import last_epoch, part_of

PRIMARY = "brier"


@dataclass(frozen=True, eq=False)
class Run:
    """One finished cell."""

    folder: Path

    @cached_property
    def config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())

    @cached_property
    def results(self) -> dict:
        return json.loads((self.folder / "results.json").read_text())

    @cached_property
    def records(self) -> pa.Table:
        return last_epoch(self.folder)

    @property
    def is_network(self) -> bool:
        return "start" in self.config

    @property
    def title(self) -> str:
        """The row of a table that it belongs to."""
        arguments = self.config["arguments"]
        return arguments["method"] + (" + zoom" if arguments["zoom"] and self.is_network else "")

    @property
    def held_out(self) -> int | str:
        return self.config["arguments"]["held_out"]

    @property
    def key(self) -> tuple:
        """What is compared with what: held-out domain, fold, seed."""
        return self.held_out, self.config["arguments"]["fold"], self.config["arguments"]["seed"]

    def part(self, part: str, temperature: float | None = None) -> dict[str, np.ndarray]:
        """As `records.part_of`, calibrated by the run's own temperature unless another one is given."""
        rows = self.records.filter(pc.equal(self.records["part"], part))
        known = part_of(rows, part, self.results["temperature"] if temperature is None else temperature)
        return known | {name: np.asarray(rows[name]) for name in ("filename", "domain", "mpp")}

    def oracle_temperature(self, part: str = "test") -> float:
        """Fitted on the rows it is judged by: what no method may use, and the most that a temperature can give."""
        p = self.part(part)
        return metrics.fit_temperature(p["logits"], p["label"], sample_weight=metrics.patient_weights(p["patient"]))

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
        model = self.folder / "model" / "config.json"
        if self.config["arguments"]["zoom"] and model.exists():
            low, high = json.loads(model.read_text())["mpp_range"]
            mpp = self.part("test")["mpp"]
            if np.all((mpp >= low) & (mpp <= high)):
                marks.add("unseen optics, scale simulated")
        return sorted(marks)


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Finished cells: `folders` themselves, or what lies in them.

    Raises:
        ValueError: there is none, or one cell is there twice.
    """
    folders = [Path(folder) for folder in folders]
    inside = [path for folder in folders for path in ([folder] if is_cell(folder) else sorted(folder.glob("*")))]
    runs = [Run(path) for path in inside if is_cell(path)]
    if not runs:
        raise ValueError(f"no finished cell (config.json and results.json) in {', '.join(map(str, folders))}")
    seen = {}
    for run in runs:
        other = seen.setdefault((run.title, *run.key), run)
        if other is not run:
            raise ValueError(f"{other.folder} and {run.folder} are the same cell; give one of them")
    return runs


def is_cell(folder: Path) -> bool:
    return (folder / "results.json").is_file() and (folder / "config.json").is_file()


def by_title(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs of each row of a table: floors first, then methods, in the order they come."""
    groups = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.is_network):
        groups[run.title].append(run)
    return dict(groups)


def star(runs: Iterable[Run]) -> str:
    """A star behind a title where a word must be said beside the numbers of its runs, see `Run.marks`."""
    return " *" if any(run.marks for run in runs) else ""


def estimate(
    runs: list[Run], metric: str = PRIMARY, part: str = "test", temperatures: Iterable[float] | None = None
) -> Interval:
    """A patient-balanced metric over runs, with an interval over patients; see the module for what it estimates.

    Args:
        temperatures: of the runs, in place of their own.
    """
    return metrics.cluster_interval(metric, **joined(runs, part, temperatures))


def difference(a: list[Run], b: list[Run], metric: str = PRIMARY, part: str = "test") -> Difference:
    """The metric of `a` minus that of `b` over the runs that both have; see the module for what it estimates.

    The p-value is that of swapping all predictions of a patient, in every run, between `a` and `b`.

    Raises:
        ValueError: they share no run, or their runs of one key tested other images.
    """
    of_a, of_b = ({run.key: run for run in runs} for runs in (a, b))
    keys = [key for key in of_a if key in of_b]
    if not keys:
        raise ValueError(f"{a[0].title} and {b[0].title} have no (held-out, fold, seed) in common")
    columns, other = (joined([of[key] for key in keys], part) for of in (of_a, of_b))
    for key in keys:
        if not np.array_equal(of_a[key].part(part)["filename"], of_b[key].part(part)["filename"]):
            raise ValueError(f"{of_a[key].folder} and {of_b[key].folder} tested other images and cannot be compared")
    prob = columns.pop("y_prob")
    return metrics.paired_difference(metric, y_prob_a=prob, y_prob_b=other["y_prob"], **columns)


def spread(runs: list[Run], metric: str = PRIMARY, part: str = "test") -> dict[str, float]:
    """Standard deviation of the figure between seeds (of one fold) and between folds (of one seed), averaged.

    Returns:
        ``seed`` and ``fold``; NaN where there is but one.
    """
    figure = {}
    for run in runs:
        p = run.part(part)
        figure[run.key] = metrics.METRICS[metric](p["label"], p["probability"], metrics.patient_weights(p["patient"]))
    found = {}
    for name, position in (("fold", 1), ("seed", 2)):
        groups = defaultdict(list)
        for key, value in figure.items():
            groups[key[:position] + key[position + 1 :]].append(value)
        variances = [np.var(values, ddof=1) for values in groups.values() if len(values) > 1]
        found[name] = float(np.sqrt(np.mean(variances))) if variances else float("nan")
    return found


def joined(runs: list[Run], part: str, temperatures: Iterable[float] | None = None) -> dict[str, np.ndarray]:
    """Rows of several runs below each other: ``y_true``, ``y_prob``, ``groups`` (patients) and ``runs`` (0, 1, ...)."""
    used = [None] * len(runs) if temperatures is None else temperatures
    parts = [run.part(part, temperature) for run, temperature in zip(runs, used, strict=True)]
    names = {"y_true": "label", "y_prob": "probability", "groups": "patient"}
    columns = {name: np.concatenate([p[column] for p in parts]) for name, column in names.items()}
    return columns | {"runs": np.repeat(np.arange(len(parts)), [len(p["label"]) for p in parts])}
