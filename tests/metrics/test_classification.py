"""The metrics equal scikit-learn's, weights and ties included, and refuse what they cannot answer."""

import subprocess
import sys

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given
from hypothesis import strategies as st

from magnification_invariant import metrics


def problem(seed: int, n: int = 60):
    """Labels, probabilities with ties, weights with zeros."""
    rng = np.random.default_rng(seed)
    y = rng.integers(2, size=n)
    y[:2] = 0, 1
    return y, np.round(rng.random(n), 1), rng.integers(0, 4, n) + (np.arange(n) < 2)


THEIRS = {
    "auc": sk.roc_auc_score,
    "brier": sk.brier_score_loss,
    "log_loss": sk.log_loss,
    "f1": lambda y, p, sample_weight: sk.f1_score(y, p >= 0.5, sample_weight=sample_weight),
    "accuracy": lambda y, p, sample_weight: sk.accuracy_score(y, p >= 0.5, sample_weight=sample_weight),
    "balanced_accuracy": lambda y, p, sample_weight: sk.balanced_accuracy_score(
        y, p >= 0.5, sample_weight=sample_weight
    ),
}


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("seed", range(5))
def test_equals_scikit_learn(name, seed):
    y, p, w = problem(seed)
    for weight in (None, w):
        expected = THEIRS[name](y, p, sample_weight=weight)
        assert metrics.METRICS[name](y, p, weight) == pytest.approx(expected, abs=1e-12)


@given(st.integers(0, 1000), st.sampled_from(sorted(metrics.METRICS)))
def test_a_weight_is_a_number_of_copies_and_neither_order_nor_scale_matters(seed, name):
    y, p, w = problem(seed, 30)
    value, order = metrics.METRICS[name](y, p, w), np.random.default_rng(seed).permutation(30)
    assert metrics.METRICS[name](np.repeat(y, w), np.repeat(p, w)) == pytest.approx(value, abs=1e-9)
    assert metrics.METRICS[name](y[order], p[order], 7.0 * w[order]) == pytest.approx(value, abs=1e-9)


def test_patient_weights_count_each_patient_once():
    groups = np.array(["b", "a", "b", "b", "c", "a"])
    weight = metrics.patient_weights(groups)
    assert np.bincount(np.unique(groups, return_inverse=True)[1], weight).tolist() == pytest.approx([1, 1, 1])


def test_accuracy_by_patient_is_the_patient_recognition_rate_of_breakhis():
    y, p, _ = problem(3)
    groups = np.arange(len(y)) // 7
    rate = np.mean([np.mean((p[groups == g] >= 0.5) == y[groups == g]) for g in np.unique(groups)])
    assert metrics.accuracy(y, p, metrics.patient_weights(groups)) == pytest.approx(rate)


def test_calling_everything_malignant_on_breakhis_scores_what_the_docstring_says():
    y = np.repeat([0, 1], [2480, 5429])
    assert metrics.f1(y, np.ones(len(y))) == pytest.approx(0.814, abs=1e-3)


def test_one_class_is_nan_and_not_a_number_of_something_else(recwarn):
    p = np.array([0.2, 0.7])
    for columns in (([1, 1], p), ([1, 0, 1], [0.2, 0.4, 0.7], [1, 0, 1])):  # no rows of a class, or none that weigh
        assert np.isnan([metrics.auc(*columns), metrics.balanced_accuracy(*columns)]).all()
        assert metrics.f1(*columns) == pytest.approx(2 / 3)
    assert np.isnan(metrics.f1([0, 0], [0.1, 0.2]))
    assert metrics.brier([0, 0], p) == pytest.approx((0.04 + 0.49) / 2)
    assert metrics.log_loss([1, 1], p) == pytest.approx(-np.log(p).mean()) and metrics.accuracy([1, 1], p) == 0.5
    assert not recwarn.list


@pytest.mark.slow
def test_importing_the_metrics_does_not_import_scikit_learn():
    code = "import sys, magnification_invariant.metrics as m; assert m.METRICS and 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", sorted(metrics.METRICS))
@pytest.mark.parametrize(
    ("y", "p", "weight", "message"),
    [
        ([0, 1], [0.1, np.nan], None, "NaN"),
        ([0, 2], [0.1, 0.2], None, "y_true must hold"),
        ([], [], None, "not empty"),
        ([0, 1], [0.1, 0.2, 0.3], None, "one length"),
        ([0, 1], [[0.9, 0.1], [0.2, 0.8]], None, "one-dimensional"),
        ([0, 1], [0.1, 0.2], [-1, 1], "non-negative"),
        ([0, 1], [0.1, 0.2], [0, 0], "positive sum"),
    ],
)
def test_bad_input_is_refused(name, y, p, weight, message):
    with pytest.raises(ValueError, match=message):
        metrics.METRICS[name](y, p, weight)


@pytest.mark.parametrize("name", sorted(set(metrics.METRICS) - {"auc"}))
def test_logits_are_no_probabilities(name):
    with pytest.raises(ValueError, match="logits"):
        metrics.METRICS[name]([0, 1], [-2.0, 3.0])
