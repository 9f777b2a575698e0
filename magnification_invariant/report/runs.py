"""Runs compared: the rows of a table, and what is estimated of them.

The estimand, everywhere: the temperature-scaled, patient-balanced Brier score of one method minus that of another, on
the unseen magnification, averaged over the runs (folds and seeds) and over the held-out magnifications. Every patient
weighs 1 in each run and is one cluster over all of them, so the interval and the p-value speak of other patients, the
trained models taken as given. The AUC counts pairs of one run only: scores of different models are never pooled.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from magnification_invariant import metrics
from magnification_invariant.metrics.intervals import Difference, Interval
from magnification_invariant.records import NORMALISED, Run

PRIMARY = "brier"
SCALED = ", scale-normalised"  # behind the title of a row
WHAT_SCALED_IS = (
    'A row "scale-normalised" is the same network, shown the unseen magnification at a scale it was trained on (the '
    "plainest rival there is: undo the shift where its size is known). Where that scale is the image's own, there is "
    "nothing to undo, and both rows show the same."
)


class Row(NamedTuple):
    """A row of a table: runs of one method and one setting, judged on one part of their records."""

    title: str
    runs: list[Run]
    part: str = "test"

    @property
    def starred(self) -> str:
        """The title, with a star where a word must be said beside the numbers."""
        return self.title + star(self.runs)

    def at(self, held_out: int | str | None) -> "Row":
        """With the runs of one held-out domain; None is all."""
        return self._replace(runs=[run for run in self.runs if held_out in (None, run.held_out)])


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Finished runs: `folders` themselves, or what lies in them.

    Raises:
        ValueError: There is none, one is of version 0.1, or one cell of one setting is there twice.
    """
    folders = [Path(folder) for folder in folders]
    inside = [path for path in folders for path in ([path] if Run(path).is_finished else sorted(path.glob("*")))]
    runs = [run for run in map(Run, inside) if run.is_finished]
    if not runs:
        raise ValueError(f"no finished cell (config.json and results.json) in {', '.join(map(str, folders))}")
    known = {}
    for run in runs:
        other = known.setdefault((run.title, _setting(run), run.key), run)
        if other is not run:
            raise ValueError(f"{other.folder} and {run.folder} are the same cell; give one of them")
    return runs


def by_title(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs of each row of a table: floors first, then methods, in the order they come.

    Runs of different settings are different rows, unless they bear the name of one recipe. Where a method has several,
    titles name the settings in which they differ: "erm (epochs 3)".
    """
    groups: dict[str, dict[tuple, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: run.is_network):
        groups[run.title][_setting(run)].append(run)
    titled = {}
    for title, by_setting in groups.items():
        settings = [_named_settings(group[0]) for group in by_setting.values()]
        names = dict.fromkeys(name for each in settings for name in each)
        differing = [name for name in names if any(each.get(name) != settings[0].get(name) for each in settings)]
        for (digest, *_), group, each in zip(by_setting, by_setting.values(), settings, strict=True):
            words = ", ".join(f"{name.replace('_', ' ')} {_word(each.get(name))}" for name in differing)
            titled[f"{title} ({words or digest})" if len(settings) > 1 else title] = group
    return titled


def _setting(run: Run) -> tuple:
    """Equal for runs that are folds, seeds and held-out domains of one experiment."""
    split = run.config["cell"]["split"]
    return run.recipe or run.config["settings_sha256"], split.get("n_folds"), split.get("split_seed")


def _named_settings(run: Run) -> dict[str, Any]:
    split = run.config["cell"]["split"]
    return run.settings | {name: split[name] for name in ("n_folds", "split_seed") if name in split}


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def rows_of(groups: dict[str, list[Run]]) -> dict[str, Row]:
    """The rows of `by_title` by title, each followed by the same runs scale-normalised, where they have that part."""
    rows = {}
    for title, runs in groups.items():
        rows[title] = Row(title, runs)
        if scaled := [run for run in runs if NORMALISED in run.parts]:
            rows[title + SCALED] = Row(title + SCALED, scaled, NORMALISED)
    return rows


def held_outs(runs: Iterable[Run]) -> list[int | str]:
    """Held-out domains, sorted: magnifications, then names."""
    return sorted({run.held_out for run in runs}, key=lambda domain: (isinstance(domain, str), domain))


def baseline(title: str, groups: dict[str, list[Run]]) -> str | None:
    """Title of what a row is compared with: "erm" of the same zoom, of its recipe, and of the most equal settings."""
    (run, *_), keys = groups[title], {run.key for run in groups[title]}
    titles = [
        other
        for other, (first, *rest) in groups.items()
        if first.method == "erm" and (first.zoom > 1) == (run.zoom > 1) and keys & {r.key for r in (first, *rest)}
    ]
    if run.method == "erm" or not titles:
        return None
    own = _named_settings(run).items()

    def likeness(other: str) -> tuple[bool, int]:
        first = groups[other][0]
        return first.recipe == run.recipe, sum(item in own for item in _named_settings(first).items())

    return max(titles, key=likeness)


def star(runs: Iterable[Run]) -> str:
    """A star behind a title where a word must be said beside the numbers of its runs, see `Run.marks`."""
    return " *" if any(run.marks for run in runs) else ""


def estimate(
    runs: list[Run], metric: str = PRIMARY, part: str = "test", temperatures: Iterable[float] | None = None
) -> Interval:
    """A patient-balanced metric over runs, with an interval over patients; see the module for what it estimates.

    Args:
        runs: Of one row.
        metric: Of `metrics.METRICS`.
        part: Of their records.
        temperatures: Of the runs, in place of their own.
    """
    return metrics.cluster_interval(metric, **joined(runs, part, temperatures))


def difference(
    a: list[Run], b: list[Run], metric: str = PRIMARY, part_a: str = "test", part_b: str | None = None
) -> Difference:
    """The metric of `a` minus that of `b` over the runs that both have; see the module for what it estimates.

    The p-value is that of swapping all predictions of a patient, in every run, between `a` and `b`.

    Args:
        a: Runs of one row.
        b: Runs of another, or the same runs on another part.
        metric: Of `metrics.METRICS`.
        part_a: Of the records of `a`.
        part_b: Of the records of `b`; by default the same.

    Raises:
        ValueError: They share no (held-out, fold, seed), or a pair of them tested other images.
    """
    part_b = part_b or part_a
    pairs = [(x, y) for x in a for y in b if _comparable(x, y)]
    if not pairs:
        raise ValueError(f"{a[0].title} and {b[0].title} have no (held-out, fold, seed) in common")
    for x, y in pairs:
        if not np.array_equal(x.part(part_a)["filename"], y.part(part_b)["filename"]):
            raise ValueError(f"{x.folder} and {y.folder} tested other images and cannot be compared")
    columns, other = joined([x for x, _ in pairs], part_a), joined([y for _, y in pairs], part_b)
    prob = columns.pop("y_prob")
    return metrics.paired_difference(metric, y_prob_a=prob, y_prob_b=other["y_prob"], **columns)


def _comparable(x: Run, y: Run) -> bool:
    """Of one held-out domain and fold, and of one seed; what has no network has no seed either."""
    return x.key[:2] == y.key[:2] and (x.key[2] == y.key[2] or not (x.is_network and y.is_network))


def spread(runs: list[Run], part: str = "test") -> dict[str, float]:
    """Standard deviation of the `PRIMARY` metric between seeds (of one fold) and between folds (of one seed), averaged.

    Returns:
        ``seed`` and ``fold``; NaN where there is but one.
    """
    figure = {}
    for run in runs:
        p = run.part(part)
        figure[run.key] = metrics.METRICS[PRIMARY](p["label"], p["probability"], metrics.patient_weights(p["patient"]))
    deviations = {}
    for name, position in (("fold", 1), ("seed", 2)):
        groups = defaultdict(list)
        for key, value in figure.items():
            groups[key[:position] + key[position + 1 :]].append(value)
        variances = [np.var(values, ddof=1) for values in groups.values() if len(values) > 1]
        deviations[name] = float(np.sqrt(np.mean(variances))) if variances else float("nan")
    return deviations


def joined(runs: list[Run], part: str, temperatures: Iterable[float] | None = None) -> dict[str, np.ndarray]:
    """Rows of several runs below each other: ``y_true``, ``y_prob``, ``groups`` (patients) and ``runs`` (0, 1, ...)."""
    used = [None] * len(runs) if temperatures is None else temperatures
    parts = [run.part(part, temperature) for run, temperature in zip(runs, used, strict=True)]
    names = {"y_true": "label", "y_prob": "probability", "groups": "patient"}
    columns = {name: np.concatenate([p[column] for p in parts]) for name, column in names.items()}
    return columns | {"runs": np.repeat(np.arange(len(parts)), [len(p["label"]) for p in parts])}
