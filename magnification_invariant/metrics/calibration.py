"""Whether a probability of 0.8 is right eight times in ten, and the temperature that makes it so.

Conventions as in `classification`: `y_true` 0 or 1, `y_prob` the probability of malignant, `sample_weight` optional.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from magnification_invariant.metrics.classification import check_binary, register

TEMPERATURE_RANGE = (0.25, 8.0)
"""No temperature outside it is fitted: a few dozen validation patients cannot support one."""


class ReliabilityCurve(NamedTuple):
    """Points of a reliability diagram, one a bin that holds rows.

    Attributes:
        predicted: (bins,) mean probability of malignant.
        observed: (bins,) share of malignant.
        weight: (bins,) share of all weight.
        rows: (bins,) effective number of rows, `(sum w)^2 / sum w^2`.
    """

    predicted: np.ndarray
    observed: np.ndarray
    weight: np.ndarray
    rows: np.ndarray


class BrierDecomposition(NamedTuple):
    """`brier = miscalibration - discrimination + uncertainty`, exactly.

    Attributes:
        brier: The score itself.
        miscalibration: What isotonic recalibration would save; 0 is calibrated.
        discrimination: What the recalibrated probabilities save over the base rate; higher is better.
        uncertainty: Brier score of the base rate.
    """

    brier: float
    miscalibration: float
    discrimination: float
    uncertainty: float


def reliability_curve(
    y_true: ArrayLike, y_prob: ArrayLike, sample_weight: ArrayLike | None = None, n_bins: int = 15
) -> ReliabilityCurve:
    """Bins rows by rising probability into bins of about equal weight.

    Rows of one probability always share a bin: the order of the rows cannot matter, a constant prediction is one bin.
    """
    positive, prob, weight = check_binary(y_true, y_prob, sample_weight)
    _, value = np.unique(prob, return_inverse=True)
    mass = np.bincount(value, weight)
    middle = np.cumsum(mass) - mass / 2
    bins = np.minimum((middle * n_bins).astype(int), n_bins - 1)[value]
    total, square = np.bincount(bins, weight), np.bincount(bins, weight**2)
    predicted, observed = np.bincount(bins, weight * prob), np.bincount(bins, weight * positive)
    held = total > 0
    total = total[held]
    return ReliabilityCurve(predicted[held] / total, observed[held] / total, total, total**2 / square[held])


@register
def expected_calibration_error(
    y_true: ArrayLike, y_prob: ArrayLike, sample_weight: ArrayLike | None = None, n_bins: int = 15
) -> float:
    """Expected calibration error: `sum_b W_b |mean probability of malignant - share of malignant|`.

    Bins are those of `reliability_curve`, on the probability of malignant and not on the confidence of the predicted
    class: figures of the other definition (Guo et al. 2017; equal width, `max(p, 1 - p)` against accuracy) differ on
    the same predictions. Noise in the bins biases it upwards, so compare it only between equal samples.
    """
    curve = reliability_curve(y_true, y_prob, sample_weight, n_bins)
    return float(curve.weight @ np.abs(curve.predicted - curve.observed))


def corp_decomposition(
    y_true: ArrayLike, y_prob: ArrayLike, sample_weight: ArrayLike | None = None
) -> BrierDecomposition:
    """Decomposes the Brier score without bins (CORP; Dimitriadis, Gneiting and Jordan, PNAS 2021).

    With c the isotonic regression of `y_true` on `y_prob` and ybar the base rate, miscalibration is `B(p) - B(c)`,
    discrimination `B(ybar) - B(c)` and uncertainty `B(ybar)`, none of them negative.
    """
    from scipy.optimize import isotonic_regression

    positive, prob, weight = check_binary(y_true, y_prob, sample_weight)
    positive, prob, weight = positive[weight > 0], prob[weight > 0], weight[weight > 0]
    _, value = np.unique(prob, return_inverse=True)
    mass = np.bincount(value, weight)
    calibrated = isotonic_regression(np.bincount(value, weight * positive) / mass, weights=mass).x[value]
    score, recalibrated, base = (
        float(weight @ (p - positive) ** 2) for p in (prob, calibrated, np.full_like(prob, weight @ positive))
    )
    return BrierDecomposition(score, score - recalibrated, base - recalibrated, base)


def recalibration(y_true: ArrayLike, y_prob: ArrayLike, sample_weight: ArrayLike | None = None) -> tuple[float, float]:
    """Calibration slope and intercept, as clinical prediction models state them.

    The slope is that of a logistic regression of the label on the log-odds: below 1, probabilities are too extreme. The
    intercept is that of one whose slope is held at 1: above 0, they are too low on the whole. Perfect is (1, 0).

    Probabilities are kept from 0 and 1 by 1e-6. NaN where one class is missing, or where a slope does not exist since
    the classes are told apart without an error, or all probabilities are one.

    Source: Cox, "Two further applications of a model for binary regression", Biometrika 45 (1958); Van Calster et al.,
    BMC Medicine 17:230 (2019).
    """
    from scipy.optimize import brentq
    from scipy.special import expit, logit
    from sklearn.linear_model import LogisticRegression

    positive, prob, weight = check_binary(y_true, y_prob, sample_weight)
    if positive.all() or not positive.any():
        return float("nan"), float("nan")
    odds = logit(np.clip(prob, 1e-6, 1 - 1e-6))
    intercept = brentq(lambda shift: weight @ (expit(odds + shift) - positive), -40, 40)
    apart = odds[~positive].max() <= odds[positive].min() or odds[positive].max() <= odds[~positive].min()
    if apart:  # also where all are one value
        return float("nan"), float(intercept)
    line = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(odds[:, None], positive, weight / weight.mean())
    return float(line.coef_[0, 0]), float(intercept)


def _check_logits(logits: ArrayLike) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or logits.shape[0] < 1 or logits.shape[1] < 2:
        raise ValueError(f"logits must be (rows, classes) with at least two classes, not {logits.shape}")
    if not np.isfinite(logits).all():
        raise ValueError(f"logits of {np.sum(~np.isfinite(logits).all(axis=1))} rows are NaN or infinite")
    return logits


def apply_temperature(logits: ArrayLike, temperature: float) -> np.ndarray:
    """Turns logits (n, classes) into probabilities: `softmax(logits / temperature)`.

    A temperature of 1 changes nothing, larger ones soften; 0 and below are a ValueError.
    """
    from scipy.special import softmax

    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    return softmax(_check_logits(logits) / temperature, axis=1)


def fit_temperature(logits: ArrayLike, y_true: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Fits the temperature that minimises the weighted log-loss (Guo et al. 2017), clipped to `TEMPERATURE_RANGE`.

    In `b = 1 / temperature` the loss is convex; its slope `sum_i w_i (E_p[z_i] - z_i[y_i])`, p = softmax(b z), is
    brought to 0 by bisection (Brent), or the bound that the slope points at is returned. Fit it on validation patients
    with `patient_weights`.

    Args:
        logits: (n, classes).
        y_true: (n,) class indices.
        sample_weight: (n,) weights.
    """
    from scipy.optimize import brentq
    from scipy.special import softmax

    logits, y_true = _check_logits(logits), np.asarray(y_true)
    if y_true.shape != logits.shape[:1] or not np.isin(y_true, np.arange(logits.shape[1])).all():
        raise ValueError(f"y_true must hold one class index below {logits.shape[1]} for each of {len(logits)} rows")
    weight = np.ones(len(logits)) if sample_weight is None else np.asarray(sample_weight, np.float64)
    if weight.shape != y_true.shape or not np.isfinite(weight).all() or weight.min() < 0 or weight.sum() <= 0:
        raise ValueError("sample_weight must be one finite non-negative number a row, with a positive sum")
    right = logits[np.arange(len(logits)), y_true.astype(int)]

    def slope(inverse: float) -> float:
        return float(weight @ ((softmax(inverse * logits, axis=1) * logits).sum(axis=1) - right))

    coldest, hottest = TEMPERATURE_RANGE
    if slope(1 / hottest) >= 0:
        return hottest
    if slope(1 / coldest) <= 0:
        return coldest
    return 1 / brentq(slope, 1 / hottest, 1 / coldest, xtol=1e-12)
