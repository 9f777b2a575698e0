"""Clustered intervals against DeLong, scikit-learn, brute force and, slowly, their nominal coverage."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import norm, t

from magnification_invariant import metrics
from magnification_invariant.metrics import cluster_interval, paired_difference
from magnification_invariant.metrics.intervals import _Patients

_path = Path(__file__).parents[2] / "benchmarks" / "interval_coverage.py"
_spec = importlib.util.spec_from_file_location("interval_coverage", _path)
coverage = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(coverage)

# One image a patient, with ties: DeLong's case. The figures are those of MLstatkit 0.1.91, Delong_test(Y, A, B).
Y = np.repeat([0, 1], [14, 26])
# fmt: off
A = np.array(
    [30, 67, 71, 45, 48, 27, 20, 20, 18, 61, 36, 41, 24, 17, 38, 46, 79, 67, 56, 61, 33, 87, 37, 68, 94, 14,
     33, 49, 69, 27, 61, 66, 70, 16, 79, 91, 76, 49, 52, 12]
) / 100
B = np.array(
    [54, 77, 59, 4, 33, 40, 31, 68, 11, 27, 57, 67, 47, 68, 72, 34, 84, 47, 23, 70, 90, 80, 80, 64, 11, 75,
     64, 10, 44, 38, 81, 63, 67, 66, 28, 17, 61, 53, 60, 56]
) / 100
# fmt: on
DELONG = {"auc_a": 0.7142857142857143, "auc_b": 0.6222527472527472, "low_a": 0.5480367107900864}
DELONG["variance_of_difference"] = 0.01619616963763202


def patients(seed: int = 0, sizes: tuple[int, int] = (16, 54), images: int = 5, true_auc: float = 0.85):
    return coverage.simulate(*sizes, images, true_auc, np.random.default_rng(seed))


def test_one_image_a_patient_is_delong():
    value, low, high = cluster_interval("auc", Y, A, np.arange(40))
    error = (DELONG["auc_a"] - DELONG["low_a"]) / norm.ppf(0.975)
    half = t.ppf(0.975, 13) * error / (value * (1 - value))
    assert value == pytest.approx(DELONG["auc_a"])
    assert (low, high) == pytest.approx((expit(logit(value) - half), expit(logit(value) + half)))


def test_the_difference_of_one_image_a_patient_is_delong():
    difference, low, high, p_value = paired_difference("auc", Y, A, B, np.arange(40))
    half = t.ppf(0.975, 13) * DELONG["variance_of_difference"] ** 0.5
    assert difference == pytest.approx(DELONG["auc_a"] - DELONG["auc_b"])
    assert (low, high) == pytest.approx((difference - half, difference + half))
    assert p_value == pytest.approx(0.47, abs=0.06)  # DeLong's: 0.4696


@pytest.mark.parametrize("name", sorted(metrics.METRICS))
def test_the_value_is_the_patient_balanced_metric(name):
    y, p, g = patients()
    keep = np.random.default_rng(1).random(len(y)) < 0.6
    y, p, g = y[keep], p[keep], g[keep]
    expected = metrics.METRICS[name](y, p, metrics.patient_weights(g))
    value, low, high = cluster_interval(name, y, p, g)
    assert value == pytest.approx(expected, abs=1e-12)
    assert 0 <= low < high


def test_copies_of_an_image_add_no_certainty():
    y, p, g = patients()
    for name in ("auc", "brier", "f1"):
        once = cluster_interval(name, y, p, g)
        thrice = cluster_interval(name, np.repeat(y, 3), np.repeat(p, 3), np.repeat(g, 3))
        assert tuple(thrice) == pytest.approx(tuple(once), abs=1e-9)


def test_auc_of_redrawn_patients_equals_the_metric_on_their_rows():
    y, p, g = patients(sizes=(8, 9), images=4)
    p = np.round(p, 1)
    sample = _Patients("auc", y, [p], g, None)
    times = np.random.default_rng(1).multinomial(17, np.full(17, 1 / 17), size=30)
    for found, draw in zip(sample.figures(p, times), times, strict=True):
        rows = np.concatenate([np.tile(np.flatnonzero(g == k), n) for k, n in enumerate(draw) if n])
        assert found == pytest.approx(metrics.auc(y[rows], p[rows]), abs=1e-12)


def test_clustered_variance_of_the_auc_agrees_with_the_jackknife():
    y, p, g = patients(sizes=(30, 60))
    closed = _Patients("auc", y, [p], g, None)
    value = closed.figures(p, np.ones((1, 90)))
    jackknife = _Patients(lambda *row: metrics.auc(*row), y, [p], g, None)
    assert closed.variance([p], value) == pytest.approx(jackknife.variance([p], value), rel=0.02)


def test_patients_with_both_classes_are_allowed():
    rng = np.random.default_rng(0)
    y, g = rng.integers(2, size=200), np.arange(200) // 8
    p = expit(2 * y - 1 + rng.standard_normal(200))
    value = metrics.auc(y, p)
    found = cluster_interval("auc", y, p, g)
    assert found.value == pytest.approx(value)
    assert found.low < value < found.high


def test_the_auc_counts_only_pairs_of_one_model():
    y, p, g = patients(sizes=(20, 40), images=3, true_auc=0.95)
    folds = g % 5
    shifted = expit(logit(np.clip(p, 1e-6, 1 - 1e-6)) + 3 * folds)
    pooled = sum(metrics.auc(y[folds == k], p[folds == k]) for k in range(5)) / 5  # equal pairs in every fold
    found = cluster_interval("auc", y, shifted, g, runs=folds)
    assert found.value == pytest.approx(pooled)
    assert found.low < pooled < found.high
    assert metrics.auc(y, shifted) < found.low
    same = paired_difference("auc", y, p, shifted, g, runs=folds)
    assert same.difference == pytest.approx(0) and same.p_value == 1


@pytest.mark.parametrize("name", ["auc", "brier", "log_loss"])
def test_runs_are_averaged_and_a_patient_stays_one_cluster(name):
    """Three models on the same patients, the last one on a part of their images: the mean of the three figures."""
    y, _, g = patients(images=6)
    p = [patients(seed, images=6)[1] for seed in range(3)]
    kept = [np.ones(len(y), bool), np.ones(len(y), bool), np.arange(len(y)) % 6 < 4]
    rows = [np.concatenate([column[k] for k in kept]) for column in (y, g)]
    prob, runs = (
        np.concatenate([q[k] for q, k in zip(p, kept, strict=True)]),
        np.repeat(list("abc"), [k.sum() for k in kept]),
    )
    each = [cluster_interval(name, y[k], q[k], g[k]) for q, k in zip(p, kept, strict=True)]
    found = cluster_interval(name, rows[0], prob, rows[1], runs=runs)
    assert found.value == pytest.approx(np.mean([one.value for one in each]))
    # Copies of one run are one run: no certainty is gained by training seeds that agree.
    again = cluster_interval(name, np.tile(y, 2), np.tile(p[0], 2), np.tile(g, 2), runs=np.repeat([0, 1], len(y)))
    assert tuple(again) == pytest.approx(tuple(each[0]), abs=1e-9)
    pair = paired_difference(name, *rows[:1], prob, prob[::-1], rows[1], runs=runs, n_draws=50)
    assert 0 < pair.p_value <= 1 and pair.low < pair.difference < pair.high
    with pytest.raises(ValueError, match="one run to each"):
        cluster_interval(name, y, p[0], g, runs=[1, 2])


@pytest.mark.parametrize("name", sorted(set(metrics.METRICS) - {"auc", "expected_calibration_error"}))
def test_the_fast_forms_are_the_metric(name):
    y, a, g = patients(0)
    a, b = np.round(a, 2), np.round(patients(1)[1], 1)
    slow = metrics.METRICS[name]
    fast = paired_difference(name, y, a, b, g, n_draws=50)
    plain = paired_difference(lambda *row: slow(*row), y, a, b, g, n_draws=50)
    assert tuple(fast) == pytest.approx(tuple(plain), abs=1e-12)


def test_a_difference_is_antisymmetric_and_zero_for_equal_models():
    y, a, g = patients(0)
    b = patients(1)[1]
    for name in ("auc", "brier"):
        forth, back = paired_difference(name, y, a, b, g), paired_difference(name, y, b, a, g)
        assert tuple(forth)[:3] == pytest.approx((-back.difference, -back.high, -back.low))
        assert forth.p_value == pytest.approx(back.p_value, abs=0.03)
        assert tuple(paired_difference(name, y, a, a, g)) == pytest.approx((0, 0, 0, 1))


def test_the_swap_test_sees_every_outcome_when_patients_are_few():
    # Three patients a class: of the 64 ways to swap, the observed and its mirror are the most extreme.
    y, g = np.repeat([0, 0, 0, 1, 1, 1], 2), np.repeat(np.arange(6), 2)
    a, b = np.where(y, 0.9, 0.1), np.full(12, 0.5)
    with pytest.warns(UserWarning, match="8 of each class"):
        found = paired_difference("brier", y, a, b, g, n_draws=20000)
    assert np.isnan([found.low, found.high]).all()
    assert found.p_value == pytest.approx(2 / 64, abs=0.005)


@pytest.mark.parametrize("name", ["auc", "brier"])
def test_the_p_value_is_uniform_when_the_models_are_exchangeable(name):
    found = []
    for seed in range(100):
        y, a, g = patients(seed, (10, 14), 3)
        b = expit(logit(a) + np.random.default_rng(seed).standard_normal(len(a)))
        a = expit(logit(a) + np.random.default_rng([seed, 1]).standard_normal(len(a)))
        found.append(paired_difference(name, y, a, b, g, n_draws=199).p_value)
    assert np.mean(np.array(found) <= 0.1) == pytest.approx(0.1, abs=0.06)
    assert np.mean(found) == pytest.approx(0.5, abs=0.08)


def test_models_of_the_same_ranking_have_the_same_auc_on_any_scale():
    y, a, g = patients()
    assert paired_difference("auc", y, a, a**9, g).p_value == 1


def test_perfect_separation_gives_a_wide_interval_not_a_point():
    y, _, g = patients()
    for name in ("auc", "f1", "accuracy", "balanced_accuracy"):
        assert tuple(cluster_interval(name, y, y * 1.0, g)) == pytest.approx((1, 0.025 ** (1 / 16), 1))
    assert tuple(cluster_interval("brier", y, y * 1.0, g)) == pytest.approx((0, 0, 1 - 0.025 ** (1 / 16)))


def test_a_log_loss_of_one_is_no_bound():
    y, _, g = patients()
    found = cluster_interval("log_loss", y, np.full(len(y), np.exp(-1.0)), g)
    assert found.low == pytest.approx(found.high)  # a constant prediction at a fixed class mix
    noisy = np.clip(np.exp(-1.0) + 0.2 * np.random.default_rng(0).standard_normal(len(y)), 0.01, 0.99)
    assert cluster_interval("log_loss", y, noisy, g).low > 0
    assert cluster_interval("log_loss", y, y * 1.0, g).high == np.inf


def test_too_few_patients_give_an_estimate_and_a_warning():
    for sizes in ((7, 30), (30, 7)):
        y, p, g = patients(sizes=sizes)
        with pytest.warns(UserWarning, match="8 of each class"):
            value, low, high = cluster_interval("auc", y, p, g)
        assert value == pytest.approx(metrics.auc(y, p)) and np.isnan([low, high]).all()
    with pytest.warns(UserWarning):
        assert np.isnan(cluster_interval("auc", np.ones(4, int), np.full(4, 0.5), list("aabb"))).all()


def test_a_function_of_the_callers_has_the_same_error_on_no_other_scale():
    y, p, g = patients()
    known = cluster_interval("brier", y, p, g)
    value, low, high = cluster_interval(lambda *row: metrics.brier(*row), y, p, g)
    assert value == pytest.approx(known.value) and value - low == pytest.approx(high - value)
    error = (logit(known.high) - logit(known.low)) * value * (1 - value)
    assert high - low == pytest.approx(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "roc"}, "no metric is called 'roc'"),
        ({"groups": [1, 2]}, "one patient to each"),
        ({"y_prob": np.full(350, np.nan)}, "NaN"),
        ({"y_true": np.full(350, 3)}, "y_true must hold"),
    ],
)
def test_bad_input_is_refused(change, message):
    y, p, g = patients()
    with pytest.raises(ValueError, match=message):
        cluster_interval(**{"metric": "auc", "y_true": y, "y_prob": p, "groups": g, **change})


def test_holm():
    assert metrics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert metrics.holm([0.9, 0.8]) == pytest.approx([1, 1])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(16, 54), (40, 80)])
@pytest.mark.parametrize("true_auc", [0.83, 0.95])
def test_coverage_at_the_sizes_of_breakhis(sizes, true_auc):
    assert coverage.coverage(*sizes, true_auc, simulations=600) >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["brier", "auc"])
def test_coverage_of_differences_at_the_size_of_breakhis(metric):
    assert coverage.paired_coverage(metric, 16, 54, simulations=400) >= 0.93


def test_differences_that_cancel_between_classes_are_noise_to_the_test_alone():
    """Model a says 0.2 more than b of every patient: better in the malignant, about as much worse in the benign."""
    rng = np.random.default_rng(0)
    label = np.arange(100) % 2
    b = np.clip(0.35 + 0.05 * rng.standard_normal(100), 0, 1)
    found = paired_difference("brier", label, b + 0.2, b, np.arange(100))
    assert found.high < 0 and found.p_value > 0.1
    once = (b + 0.2 - label) ** 2 - (b - label) ** 2
    assert found.difference == pytest.approx(once.mean()) and once[label == 1].max() < 0 < once[label == 0].min()
