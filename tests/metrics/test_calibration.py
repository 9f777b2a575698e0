"""Calibration figures against their definitions, and the temperature against a direct search."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from magnification_invariant import metrics


def calibrated(n: int, seed: int = 0, power: float = 1.0):
    """Rows whose labels are drawn with probability `p`, told as `p` to a power in log-odds."""
    rng = np.random.default_rng(seed)
    p = rng.beta(0.6, 0.6, n)
    return (rng.random(n) < p).astype(int), p**power / (p**power + (1 - p) ** power)


def test_expected_calibration_error_by_hand():
    # Four bins of five rows each: mean probabilities .1 .3 .6 .9 against 1, 2, 2 and 5 malignant of 5.
    p = np.repeat([0.1, 0.3, 0.6, 0.9], 5)
    y = np.concatenate([np.arange(5) < k for k in (1, 2, 2, 5)]).astype(int)
    by_hand = np.mean([abs(0.1 - 0.2), abs(0.3 - 0.4), abs(0.6 - 0.4), abs(0.9 - 1.0)])
    assert metrics.expected_calibration_error(y, p, n_bins=4) == pytest.approx(by_hand)
    curve = metrics.reliability_curve(y, p, n_bins=4)
    assert curve.predicted == pytest.approx([0.1, 0.3, 0.6, 0.9])
    assert curve.observed == pytest.approx([0.2, 0.4, 0.4, 1.0])
    assert curve.rows == pytest.approx([5, 5, 5, 5])


def test_bins_hold_equal_mass():
    y, p = calibrated(3000)
    assert metrics.reliability_curve(y, p).weight == pytest.approx(np.full(15, 1 / 15), abs=1e-3)


def test_a_constant_prediction_is_one_bin():
    y, p = (np.arange(10) < 3).astype(int), np.full(10, 0.4)
    assert metrics.expected_calibration_error(y, p) == pytest.approx(0.1)
    assert metrics.corp_decomposition(y, p).discrimination == pytest.approx(0, abs=1e-15)


def test_the_error_sees_overconfidence():
    error = metrics.METRICS["expected_calibration_error"]
    assert error(*calibrated(4000)) < 0.03 < 0.06 < error(*calibrated(4000, power=3))


@given(st.integers(0, 500), st.booleans())
def test_corp_adds_up_and_is_non_negative(seed, weighted):
    rng = np.random.default_rng(seed)
    y, p = rng.integers(2, size=40), np.round(rng.random(40), 1)
    w = rng.integers(0, 3, 40) + (np.arange(40) == 0) if weighted else None
    parts = metrics.corp_decomposition(y, p, w)
    assert parts.brier == pytest.approx(metrics.brier(y, p, w))
    assert parts.miscalibration - parts.discrimination + parts.uncertainty == pytest.approx(parts.brier, abs=1e-15)
    assert min(parts) >= -1e-12


def test_corp_recalibration_is_scikit_learns_isotonic_regression():
    from sklearn.isotonic import IsotonicRegression

    y, p = calibrated(200, power=2)
    c = IsotonicRegression().fit_transform(p, y)
    assert metrics.corp_decomposition(y, p).miscalibration == pytest.approx(
        metrics.brier(y, p) - metrics.brier(y, np.clip(c, 0, 1))
    )


def logits_and_labels(temperature: float, classes: int, n: int = 3000, seed: int = 0):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((n, classes)) * 2
    p = metrics.apply_temperature(logits, 1.0)
    y = (rng.random((n, 1)) > np.cumsum(p, axis=1)).sum(axis=1).clip(max=classes - 1)
    return logits * temperature, y


@pytest.mark.parametrize("classes", [2, 4])
def test_the_temperature_is_found_and_minimises_the_weighted_log_loss(classes):
    logits, y = logits_and_labels(2.5, classes)
    assert metrics.fit_temperature(logits, y) == pytest.approx(2.5, rel=0.1)
    w = np.random.default_rng(1).random(len(y))

    def loss(log_t: float) -> float:
        return -w @ log_softmax(logits / np.exp(log_t), axis=1)[np.arange(len(y)), y] / w.sum()

    best = minimize_scalar(loss, bounds=np.log([0.25, 8]), method="bounded", options={"xatol": 1e-9})
    assert metrics.fit_temperature(logits, y, w) == pytest.approx(np.exp(best.x), rel=1e-5)


def test_the_temperature_stays_in_its_range():
    logits, y = logits_and_labels(1.0, 2, n=200)
    assert metrics.fit_temperature(logits * 100, y) == 8.0
    separable = np.array([[5.0, 0.0], [0.0, 5.0]])
    assert metrics.fit_temperature(separable, [0, 1]) == 0.25
    assert metrics.fit_temperature(separable, [1, 0]) == 8.0
    assert metrics.fit_temperature(np.zeros((2, 2)), [0, 1]) == 8.0  # nothing to scale: every temperature is the same


def test_shifting_all_logits_changes_nothing():
    logits, y = logits_and_labels(2.0, 3, n=300)
    assert metrics.fit_temperature(logits + 1000.0, y) == pytest.approx(metrics.fit_temperature(logits, y))
    assert metrics.apply_temperature(logits + 1000.0, 2.0) == pytest.approx(metrics.apply_temperature(logits, 2.0))


@pytest.mark.parametrize(
    ("logits", "y", "weight", "message"),
    [
        ([[0.0, np.nan]], [0], None, "NaN"),
        ([[0.0, 1.0]], [2], None, "class index"),
        ([0.0, 1.0], [0, 1], None, "two classes"),
        ([[0.0, 1.0]], [0], [-1.0], "non-negative"),
    ],
)
def test_bad_logits_are_refused(logits, y, weight, message):
    with pytest.raises(ValueError, match=message):
        metrics.fit_temperature(logits, y, weight)


def test_slope_and_intercept_of_what_is_known():
    """Labels drawn from a known line of the log-odds: both are found again; and their scores are 0, by hand."""
    rng = np.random.default_rng(0)
    odds = rng.normal(size=40_000) * 1.5
    y = (rng.random(len(odds)) < 1 / (1 + np.exp(-(0.6 * odds - 0.4)))).astype(int)
    prob, weight = 1 / (1 + np.exp(-odds)), rng.random(len(odds)) + 0.5
    slope, intercept = metrics.recalibration(y, prob, weight)
    assert slope == pytest.approx(0.6, abs=0.03)
    assert weight @ (y - 1 / (1 + np.exp(-(odds + intercept)))) == pytest.approx(0, abs=1e-6)
    calibrated = (rng.random(len(odds)) < prob).astype(int)
    assert metrics.recalibration(calibrated, prob) == pytest.approx((1, 0), abs=0.05)


def test_slopes_that_do_not_exist_are_nan():
    assert np.isnan(metrics.recalibration([1, 1], [0.2, 0.7])).all()
    for separated in ([0.1, 0.2, 0.8, 0.9], [0.9, 0.8, 0.2, 0.1], [0.3, 0.3, 0.3, 0.3]):
        slope, intercept = metrics.recalibration([0, 0, 1, 1], separated)
        assert np.isnan(slope) and np.isfinite(intercept)
    assert metrics.recalibration([0, 1, 1, 1], [0.5] * 4)[1] == pytest.approx(np.log(3))
