"""Intervals and tests that know that images of one patient are not independent.

The estimand is a metric over *patients*: each image weighs 1/n of its patient (`patient_weights`). Uncertainty comes
from the patients alone; the trained models are taken as given, so nothing here speaks of other training runs.

The standard error is how much each patient moves the figure, on a scale on which the figure is closer to normal (logit
for figures in [0, 1], log for the log-loss, none for differences), with Student's t of (patients of the smaller class -
1) degrees of freedom. For the AUC the variance is the clustered one of Obuchowski (Biometrics 53, 1997), DeLong's if
every patient has one image; for other metrics the jackknife over patients within their class.

Coverage of nominal 95 % intervals of the AUC (`benchmarks/interval_coverage.py`, 1,000 simulated test sets, 25 images a
patient, true AUC 0.83 / 0.95), beside that of percentiles over redrawn patients, which are not offered for that reason:

| benign/malignant patients | here | bootstrap |
|---|---|---|
| 3/11 (refused) | .99 / .99 | .79 / .73 |
| 8/18 | .97 / .95 | .92 / .88 |
| 16/54 | .96 / .95 | .93 / .90 |
| 40/80 | .95 / .95 | .94 / .93 |

For the other metrics it covered .91 to 1.0 from 16/54 on (the calibration error .83 at 8/18), and of paired differences
(Brier, AUC, F1) .92 to .96 at 8/18, .95 to .96 above.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from magnification_invariant.metrics.classification import (
    METRICS,
    accuracy,
    auc,
    balanced_accuracy,
    brier,
    check_binary,
    f1,
    log_loss,
    patient_weights,
)


def _confusion(y: np.ndarray, p: np.ndarray) -> list[np.ndarray]:
    return [y & (p >= 0.5), y & (p < 0.5), ~y & (p >= 0.5), ~y & (p < 0.5)]


_EPS = np.finfo(np.float64).eps
# scikit-learn checks its input at every call, which is too slow for thousands of redrawn patients. Metrics that follow
# from weighted sums over rows: what is summed, once for each patient, and the figure.
_SUMS = {
    brier: (lambda y, p: [y == y, (p - y) ** 2], lambda n, e: e / n),
    log_loss: (lambda y, p: [y == y, -np.log(np.clip(np.where(y, p, 1 - p), _EPS, 1 - _EPS))], lambda n, e: e / n),
    accuracy: (_confusion, lambda tp, fn, fp, tn: (tp + tn) / (tp + fn + fp + tn)),
    f1: (_confusion, lambda tp, fn, fp, tn: 2 * tp / (2 * tp + fp + fn)),
    balanced_accuracy: (_confusion, lambda tp, fn, fp, tn: (tp / (tp + fn) + tn / (tn + fp)) / 2),
}


FEWEST_PATIENTS = 8
"""Patients of each class that an interval takes: below, no method that was tried covers what it claims."""

TAILS, SEED = (0.025, 0.975), 0  # of every interval; of every permutation test, so that tables come again


class Interval(NamedTuple):
    """A figure with its interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """A difference of two models on the same patients, with interval and two-sided p-value."""

    difference: float
    low: float
    high: float
    p_value: float


class _Patients:
    """Rows grouped by patient, with whatever a metric needs to be computed again for other weights of the patients."""

    def __init__(self, metric, y_true, y_probs, groups, runs):
        named = METRICS.get(metric) if isinstance(metric, str) else metric
        if not callable(named):
            raise ValueError(f"no metric is called {metric!r}; there are {', '.join(METRICS)}, or pass a function")
        self.metric: Callable[..., float] = named
        self.is_auc = self.metric is auc
        scores = self.is_auc or self.metric not in METRICS.values()
        checked = [check_binary(y_true, prob, scores=scores) for prob in y_probs]
        self.y, self.probs = checked[0][0], [prob for _, prob, _ in checked]
        groups, runs = np.asarray(groups), np.zeros(len(self.y), int) if runs is None else np.asarray(runs)
        for name, each, column in (("groups", "patient", groups), ("runs", "run", runs)):
            if column.shape != self.y.shape:
                raise ValueError(f"{name} must give one {each} to each of {len(self.y)} rows, not {column.shape}")
        names, self.patient = np.unique(groups, return_inverse=True)
        labels, run = np.unique(runs, return_inverse=True)
        self.count, self.runs = len(names), [np.flatnonzero(run == k) for k in range(len(labels))]
        self.weight = patient_weights(self.patient * len(labels) + run)
        malignant, benign = (  # weight of each patient in each run (runs, patients)
            np.array([np.bincount(self.patient[r], self.weight[r] * y[r], self.count) for r in self.runs])
            for y in (self.y, ~self.y)
        )
        self.with_class = int(malignant.any(axis=0).sum()), int(benign.any(axis=0).sum())
        self.smaller = min(self.with_class)
        self.malignant = malignant.sum(axis=0) >= benign.sum(axis=0)  # the stratum of a patient; BreaKHis has no mixed
        self.pairs = malignant.T @ benign

    def wins(self, malignant: np.ndarray, benign: np.ndarray) -> np.ndarray:
        """Weighted wins of each patient's malignant images over each patient's benign ones, (patients, patients).

        Within runs, summed over them. Any AUC over redrawn or reweighted patients is a quadratic form in it.
        """
        wins = np.zeros((self.count, self.count))
        for rows in self.runs:
            above, below = rows[self.y[rows]], rows[~self.y[rows]]
            rivals, first, rival = np.unique(self.patient[below], return_index=True, return_inverse=True)
            values, rank = np.unique(benign[below], return_inverse=True)
            cells = np.bincount(rival * len(values) + rank, minlength=len(rivals) * len(values))
            upto = np.zeros((len(rivals), len(values) + 1))  # how many images of a rival are at most the r-th value
            upto[:, 1:] = cells.reshape(len(rivals), len(values)).cumsum(axis=1)
            scores = malignant[above]
            beaten = (upto[:, np.searchsorted(values, scores)] + upto[:, np.searchsorted(values, scores, "right")]) / 2
            beaten *= self.weight[above] * self.weight[below[first], None]
            at = self.patient[above] + self.count * np.arange(len(rivals))[:, None]
            sums = np.bincount(at.ravel(), beaten.ravel(), self.count * len(rivals))
            wins[:, rivals] += sums.reshape(len(rivals), self.count).T
        return wins

    def sums(self, prob: np.ndarray) -> np.ndarray:
        """Each patient's weighted sums of a metric of `_SUMS`, (patients, sums)."""
        columns = _SUMS[self.metric][0](self.y, prob)
        return np.stack([np.bincount(self.patient, self.weight * c, minlength=self.count) for c in columns], axis=1)

    def of_sums(self, sums: np.ndarray) -> np.ndarray:
        """The metric of sums (draws, sums): (draws,)."""
        with np.errstate(invalid="ignore"):
            return _SUMS[self.metric][1](*sums.T)

    def figures(self, prob: np.ndarray, times: np.ndarray) -> np.ndarray:
        """The metric with each patient taken `times` (draws, patients) times: (draws,)."""
        if self.is_auc:
            wins = self.wins(prob, prob)
            with np.errstate(invalid="ignore"):
                return ((times @ wins) * times).sum(axis=1) / ((times @ self.pairs) * times).sum(axis=1)
        if self.metric in _SUMS:
            return self.of_sums(times @ self.sums(prob))
        return np.array([self.metric(self.y, prob, weight) for weight in times[:, self.patient] * self.weight])

    def variance(self, probs: list[np.ndarray], values: np.ndarray) -> float:
        """Variance of the figure, or of the difference of two, under new patients."""
        if self.is_auc:
            malignant, benign = np.zeros(self.count), np.zeros(self.count)
            for sign, prob, value in zip((1, -1), probs, values, strict=False):
                excess = (self.wins(prob, prob) - value * self.pairs) / self.pairs.sum()
                malignant, benign = malignant + sign * excess.sum(axis=1), benign + sign * excess.sum(axis=0)
            m, n = (int((self.pairs.sum(axis=axis) > 0).sum()) for axis in (1, 0))
            return float(
                m / (m - 1) * malignant @ malignant
                + n / (n - 1) * benign @ benign
                + 2 * self.count / (self.count - 1) * malignant @ benign
            )
        without = np.ones((self.count, self.count)) - np.eye(self.count)
        left = self.figures(probs[0], without) - (self.figures(probs[1], without) if len(probs) > 1 else 0)
        return sum(
            (group.sum() - 1) * float(np.var(left[group])) for group in (self.malignant, ~self.malignant) if group.any()
        )

    def too_few(self) -> bool:
        if self.smaller >= FEWEST_PATIENTS:
            return False
        counts = "{} malignant and {} benign patients".format(*self.with_class)
        warnings.warn(f"{counts} allow no interval: it takes {FEWEST_PATIENTS} of each class", stacklevel=3)
        return True


def cluster_interval(
    metric: str | Callable[..., float],
    y_true: ArrayLike,
    y_prob: ArrayLike,
    groups: ArrayLike,
    runs: ArrayLike | None = None,
) -> Interval:
    """Estimates a patient-balanced metric with its 95 % interval over patients.

    Args:
        metric: A name of `METRICS`, or a function `(y_true, y_prob, sample_weight) -> float`.
        y_true: (n,) labels, 1 = malignant.
        y_prob: (n,) probabilities of malignant.
        groups: (n,) patient of each row.
        runs: (n,) run that each row is of (a fold, a seed, a held-out magnification), where there are several. A
            patient weighs 1 in each of their runs and is one cluster over all of them. The AUC counts only pairs of one
            run, pooled by their weight: scores of different models are not on one scale.

    Returns:
        Value, low, high. The bounds are NaN, with a warning, with fewer than 8 patients in a class. A figure of
        exactly 0 or 1 shows no variance; its interval then is the exact binomial one (Clopper and Pearson) for
        that many patients of the smaller class; a log-loss of 0 has no upper bound.

    Raises:
        ValueError: On NaN, labels other than 0 and 1, columns of other lengths, an unknown metric.
    """
    sample = _Patients(metric, y_true, [y_prob], groups, runs)
    value = float(sample.figures(sample.probs[0], np.ones((1, sample.count)))[0])
    if sample.too_few():
        return Interval(value, float("nan"), float("nan"))
    return Interval(value, *_bounds(sample, value))


def _bounds(sample: _Patients, value: float) -> tuple[float, float]:
    """Bounds around the figure of a single model."""
    from scipy.special import expit, logit

    if sample.metric is log_loss and round(value, 12) == 0:
        return 0.0, float("inf")
    bounded = sample.metric in METRICS.values() and sample.metric is not log_loss
    if bounded and round(value, 12) in (0.0, 1.0):  # sums of weights end a bit off
        slack = TAILS[0] ** (1 / sample.smaller)
        return (slack, 1.0) if value > 0.5 else (0.0, 1 - slack)
    ends = np.array([-1, 1]) * _half_width(sample, sample.probs, np.array([value]))
    if sample.metric is log_loss:
        bounds = np.exp(np.log(value) + ends / value)
    else:
        bounds = expit(logit(value) + ends / (value * (1 - value))) if bounded else value + ends
    return tuple(bounds.tolist())


def paired_difference(
    metric: str | Callable[..., float],
    y_true: ArrayLike,
    y_prob_a: ArrayLike,
    y_prob_b: ArrayLike,
    groups: ArrayLike,
    runs: ArrayLike | None = None,
    *,
    n_draws: int = 2000,
) -> Difference:
    """Compares two models on the same rows: metric of a minus metric of b, with its 95 % interval and a p-value.

    The p-value is that of a permutation test: under the null hypothesis the models are exchangeable, so all of a
    patient's predictions may be swapped between them (`n_draws` random sets of patients, two-sided, the observed one
    counted in). For the AUC the scores are replaced by their ranks within their model and run first, as in Bandos,
    Rockette and Gur (Statistics in Medicine 24, 2005), because models may rank alike on different scales.

    Interval and test ask two things. A model that shifts all its probabilities gains in one class what it loses in the
    other; to the test these differences are noise, while the interval takes the classes' numbers of patients as given.
    So p can be large where the interval leaves out 0. Conclude from what both support.

    Arguments and errors are those of `cluster_interval`, with the probabilities (n,) of two models. No scale transform
    is used; `n_draws` are those of the test; a patient's predictions are swapped in all their `runs` together.

    Returns:
        Difference, low, high, p-value. The bounds are NaN, with a warning, with fewer than 8 patients in a class.
    """
    sample = _Patients(metric, y_true, [y_prob_a, y_prob_b], groups, runs)
    probs = sample.probs
    values = np.array([sample.figures(prob, np.ones((1, sample.count)))[0] for prob in probs])
    difference = float(values[0] - values[1])
    p_value = _swap_test(sample, difference, n_draws)
    if sample.too_few():
        return Difference(difference, float("nan"), float("nan"), p_value)
    half = _half_width(sample, probs, values)
    return Difference(difference, difference - half, difference + half, p_value)


def holm(p_values: ArrayLike) -> np.ndarray:
    """Adjusts the p-values (m,) of one family of tests by Holm's step-down method (1979)."""
    p_values = np.asarray(p_values, np.float64)
    order = np.argsort(p_values)
    adjusted = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    result = np.empty_like(adjusted)
    result[order] = np.minimum(adjusted, 1.0)
    return result


def _half_width(sample: _Patients, probs: list[np.ndarray], values: np.ndarray) -> float:
    from scipy.stats import t

    return float(t.ppf(TAILS[1], sample.smaller - 1) * np.sqrt(max(sample.variance(probs, values), 0.0)))


def _swap_test(sample: _Patients, difference: float, n_draws: int) -> float:
    """Two-sided p-value from swapping whole patients between the two models."""
    if not np.isfinite(difference):
        return float("nan")
    a, b = sample.probs
    swap = np.random.default_rng(SEED).random((n_draws, sample.count)) < 0.5
    keep_or_swap = 1.0 - swap, swap.astype(np.float64)
    if sample.is_auc:
        from scipy.stats import rankdata

        ranks = np.empty((2, len(a)))
        for rows in sample.runs:
            ranks[:, rows] = rankdata([a[rows], b[rows]], axis=1)
        drawn = np.zeros(n_draws)
        for i, malignant in enumerate(ranks):
            for j, benign in enumerate(ranks):
                wins = sample.wins(malignant, benign) / sample.pairs.sum()
                # Model a gets these wins where both patients' predictions came from (i, j), model b where not.
                first, second = (keep_or_swap[i], keep_or_swap[j]), (keep_or_swap[1 - i], keep_or_swap[1 - j])
                drawn += ((first[0] @ wins) * first[1]).sum(axis=1) - ((second[0] @ wins) * second[1]).sum(axis=1)
    elif sample.metric in _SUMS:
        keep, swapped = keep_or_swap
        sums = sample.sums(a), sample.sums(b)
        drawn = sample.of_sums(keep @ sums[0] + swapped @ sums[1]) - sample.of_sums(keep @ sums[1] + swapped @ sums[0])
    else:
        columns = ((np.where(row, b, a), np.where(row, a, b)) for row in swap[:, sample.patient])
        figures = [[sample.metric(sample.y, prob, sample.weight) for prob in pair] for pair in columns]
        drawn = -np.diff(figures, axis=1)[:, 0]
    return float((1 + np.sum(np.abs(drawn) >= abs(difference) - 1e-12)) / (1 + n_draws))
