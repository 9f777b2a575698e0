"""The path solver against its optimality conditions, a dual bound and scikit-learn's solvers."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, xlogy
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from magnification_invariant.signatures import l1_logistic_path


def problem(n: int = 200, p: int = 30, seed: int = 0, noise: float = 1.0):
    """Correlated, standardised columns, a few of which carry the label."""
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((n, 5))
    X = factors @ rng.standard_normal((5, p)) + rng.standard_normal((n, p))
    y = (X[:, :3].sum(axis=1) + noise * X.std() * rng.standard_normal(n) > 0).astype(int)
    return (X - X.mean(axis=0)) / X.std(axis=0), y


def objective(X, y, coef, intercept, penalty, weight=None):
    weight = np.full(len(y), 1 / len(y)) if weight is None else weight / weight.sum()
    eta = X @ coef + intercept
    return weight @ (np.logaddexp(0, eta) - y * eta) + penalty * np.abs(coef).sum()


def kkt_violation(X, y, coef, intercept, penalty, weight=None):
    """By how much the conditions fail, in units of the penalty, written out apart from the solver's own check."""
    weight = np.full(len(y), 1 / len(y)) if weight is None else weight / weight.sum()
    residual = weight * (expit(X @ coef + intercept) - y)
    gradient = X.T @ residual
    active = [abs(g + penalty * np.sign(c)) for g, c in zip(gradient, coef, strict=True) if c]
    inactive = [abs(g) - penalty for g, c in zip(gradient, coef, strict=True) if not c]
    return max([0, abs(residual.sum()), *active, *inactive]) / penalty


def dual_bound(X, y, coef, intercept, penalty):
    """A lower bound of the objective: the dual value at the scaled residuals, with the intercept's condition met."""
    n, s = len(y), 2 * y - 1
    a = expit(-s * (X @ coef + intercept))  # in (0, 1); the dual variables are a / n
    # The intercept asks for sum(s a) = 0: scale the class with the larger sum down.
    sums = a[s > 0].sum(), a[s < 0].sum()
    a = np.where(s > 0, a * min(sums) / sums[0], a * min(sums) / sums[1])
    a *= min(1, penalty * n / np.abs(X.T @ (s * a)).max())
    return -np.mean(xlogy(a, a) + xlogy(1 - a, 1 - a))


@settings(max_examples=25)
@given(
    st.integers(0, 10_000),
    st.sampled_from([(40, 10), (100, 30), (30, 80)]),
    st.booleans(),
    st.sampled_from([0.1, 1.0, 5.0]),
)
def test_every_point_of_the_path_meets_the_kkt_conditions(seed, shape, weighted, noise):
    X, y = problem(*shape, seed, noise)
    if len(np.unique(y)) < 2:
        return
    weight = np.random.default_rng(seed).integers(1, 5, len(y)) if weighted else None
    lambdas, coefs, intercepts = l1_logistic_path(X, y, n_lambdas=12, ratio=1e-2, sample_weight=weight, tol=1e-6)
    for penalty, coef, intercept in zip(lambdas, coefs, intercepts, strict=True):
        assert kkt_violation(X, y, coef, intercept, penalty, weight) <= 1.01e-6


def test_the_duality_gap_closes():
    X, y = problem()
    lambdas, coefs, intercepts = l1_logistic_path(X, y, tol=1e-9, n_lambdas=10, ratio=1e-2)
    for penalty, coef, intercept in zip(lambdas, coefs, intercepts, strict=True):
        primal = objective(X, y, coef, intercept, penalty)
        assert 0 <= primal - dual_bound(X, y, coef, intercept, penalty) + 1e-12 <= 1e-6 * primal


@pytest.mark.parametrize("solver", ["liblinear", "saga"])
def test_equals_scikit_learn_run_to_the_end(solver):
    X, y = problem()
    lambdas, coefs, intercepts = l1_logistic_path(X, y, n_lambdas=5, ratio=0.02, tol=1e-7)
    for penalty, coef, intercept in zip(lambdas[1:], coefs[1:], intercepts[1:], strict=True):
        # liblinear penalises the intercept, the less the larger its scaling.
        theirs = LogisticRegression(
            C=1 / (len(y) * penalty),
            l1_ratio=1.0,
            solver=solver,
            tol=1e-10,
            max_iter=100_000,
            intercept_scaling=1000 if solver == "liblinear" else 1,
            random_state=0,
        ).fit(X, y)
        assert coef == pytest.approx(theirs.coef_[0], abs=1e-3)
        assert intercept == pytest.approx(theirs.intercept_[0], abs=1e-3)
        ours = objective(X, y, coef, intercept, penalty)
        assert ours <= objective(X, y, theirs.coef_[0], theirs.intercept_[0], penalty) + 1e-12
        assert (np.flatnonzero(coef) == np.flatnonzero(np.abs(theirs.coef_[0]) > 1e-6)).all()


def test_a_weight_is_a_number_of_copies():
    X, y = problem(60, 10)
    weight = np.random.default_rng(0).integers(0, 4, 60)
    weighted = l1_logistic_path(X, y, sample_weight=weight, n_lambdas=8, ratio=0.01, tol=1e-9)
    copied = l1_logistic_path(np.repeat(X, weight, axis=0), np.repeat(y, weight), n_lambdas=8, ratio=0.01, tol=1e-9)
    for ours, theirs in zip(weighted, copied, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_swapping_the_classes_swaps_the_signs():
    X, y = problem()
    _, coefs, intercepts = l1_logistic_path(X, y, n_lambdas=8, tol=1e-9)
    _, mirrored, other = l1_logistic_path(X, 1 - y, n_lambdas=8, tol=1e-9)
    assert mirrored == pytest.approx(-coefs, abs=1e-5) and other == pytest.approx(-intercepts, abs=1e-5)


def test_the_path_starts_where_the_first_dimension_enters():
    X, y = problem()
    lambdas, coefs, intercepts = l1_logistic_path(X, y, tol=1e-8)
    assert len(lambdas) == 30 and lambdas[-1] / lambdas[0] == pytest.approx(1e-3)
    assert not coefs[0].any() and intercepts[0] == pytest.approx(np.log(y.mean() / (1 - y.mean())), abs=1e-6)
    _, just_below, _ = l1_logistic_path(X, y, [lambdas[0] * 0.999], tol=1e-8)
    assert np.count_nonzero(just_below) == 1


def test_a_point_does_not_depend_on_the_path_that_led_there():
    X, y = problem()
    lambdas, coefs, _ = l1_logistic_path(X, y, tol=1e-9, n_lambdas=15)
    _, cold, _ = l1_logistic_path(X, y, lambdas[10:11], tol=1e-9)
    assert cold[0] == pytest.approx(coefs[10], abs=1e-6)


def test_constant_and_repeated_columns():
    X, y = problem(p=6)
    X = np.hstack([X, X[:, :1], np.zeros((len(X), 1))])
    lambdas, coefs, intercepts = l1_logistic_path(X, y, n_lambdas=10, tol=1e-7)
    assert not coefs[:, -1].any()
    for penalty, coef, intercept in zip(lambdas, coefs, intercepts, strict=True):
        assert kkt_violation(X, y, coef, intercept, penalty) <= 1.01e-7


def test_an_embedding_of_low_rank_without_the_disease_is_solved_to_the_end():
    """Coordinate descent crawls here: few directions carry nearly all variance, and the label needs the others."""
    rng = np.random.default_rng(0)
    spread = np.linspace(1, 150, 220)[:, None] ** -1.0
    X = rng.standard_normal((360, 220)) @ (spread * rng.standard_normal((220, 220)))
    X, y = (X - X.mean(axis=0)) / X.std(axis=0), rng.integers(0, 2, 360)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        lambdas, coefs, intercepts = l1_logistic_path(X, y, max_iter=20)
    assert np.count_nonzero(coefs[-1]) > 150
    assert max(map(kkt_violation, [X] * 30, [y] * 30, coefs, intercepts, lambdas)) <= 1e-4


def test_unfinished_work_is_said():
    X, y = problem()
    with pytest.warns(ConvergenceWarning, match="KKT conditions"):
        l1_logistic_path(X, y, tol=1e-9, max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        l1_logistic_path(X, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.ones(200)}, "one class"),
        ({"y": np.arange(200)}, "0 and 1"),
        ({"y": np.ones(3)}, "do not fit"),
        ({"X": np.full((200, 3), np.nan)}, "finite"),
        ({"X": np.ones((200, 3))}, "constant"),
        ({"lambdas": [0.1, 0.2]}, "falling"),
        ({"lambdas": [0.1, 0.0]}, "falling"),
        ({"sample_weight": -np.ones(200)}, "non-negative"),
    ],
)
def test_bad_input_is_refused(change, message):
    X, y = problem()
    with pytest.raises(ValueError, match=message):
        l1_logistic_path(**{"X": X, "y": y, **change})
