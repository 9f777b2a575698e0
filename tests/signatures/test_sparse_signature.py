"""SparseSignature: scikit-learn's conventions, the choice of the penalty, and what it refuses."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from magnification_invariant.metrics import log_loss, patient_weights
from magnification_invariant.signatures import SparseSignature, l1_logistic_path


@parametrize_with_checks([SparseSignature(n_lambdas=8, cv=2)])
def test_scikit_learn_conventions(estimator, check):
    check(estimator)


def cohort(n_patients: int = 40, images: int = 6, d: int = 30, seed: int = 0, effect: float = 1.5):
    """Embeddings (n, d) whose first dimensions tell the class and whose last two are dead; labels, patients."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(n_patients), rng.integers(1, 2 * images, n_patients))
    y = patient % 2
    x = rng.standard_normal((n_patients, d))[patient] + rng.standard_normal((len(patient), d))
    for c in (0, 1):
        x[y == c, c] += effect
    x[:, -2:] = 7.0, 0.0
    return x, y, np.array([f"14-{p}" for p in patient])


def test_the_penalty_is_chosen_by_the_patient_balanced_loss_of_the_validation_patients():
    x, y, g = cohort()
    x_val, y_val, g_val = cohort(30, seed=1)
    fitted = SparseSignature().fit(x, y, g, x_val, y_val, g_val)
    mean, scale = x.mean(axis=0), np.where(x.std(axis=0) > 0, x.std(axis=0), 1)
    lambdas, coefs, intercepts = l1_logistic_path((x - mean) / scale, y)
    assert fitted.lambdas_ == pytest.approx(lambdas)
    prob = 1 / (1 + np.exp(-((x_val - mean) / scale @ coefs.T + intercepts)))
    losses = [log_loss(y_val, p, patient_weights(g_val)) for p in prob.T]
    assert fitted.validation_loss_ == pytest.approx(losses, abs=1e-6)
    best = np.argmin(losses)
    of_patient = [log_loss(y_val[g_val == k], prob[g_val == k, best]) for k in np.unique(g_val)]
    bound = losses[best] + np.std(of_patient, ddof=1) / len(of_patient) ** 0.5
    chosen = np.flatnonzero(np.array(losses) <= bound + 1e-9)[0]
    assert fitted.lambda_ == pytest.approx(lambdas[chosen])
    assert fitted.coef_[0] == pytest.approx(coefs[chosen], abs=1e-4)
    assert (fitted.signature_ == np.flatnonzero(coefs[chosen])).all()


def test_cross_validation_never_sees_the_patients_it_judges():
    # Each patient has a dimension of their own and labels are random, so only a leak could beat the base rate.
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(40), 5)
    x = np.eye(40)[patient] * 5 + 0.1 * rng.standard_normal((200, 40))
    y = rng.permutation(np.arange(40) % 2)[patient]
    honest, leaking = SparseSignature().fit(x, y, patient), SparseSignature().fit(x, y)
    assert honest.validation_loss_.min() > 0.65
    assert leaking.validation_loss_.min() < 0.2


def test_scaling_is_refitted_in_every_fold():
    x, y, g = cohort(20)
    fitted = SparseSignature(cv=2, n_lambdas=6).fit(x, y, g)
    from magnification_invariant.signatures.sparse_signature import _deal, _patient_codes

    patients = _patient_codes(g, len(g), "groups")
    fold = _deal(y, patients, 2, fitted.classes_, 0)[patients]
    losses = []
    for k in (0, 1):
        train, held = fold != k, fold == k
        mean, scale = x[train].mean(axis=0), np.where(x[train].std(axis=0) > 0, x[train].std(axis=0), 1)
        _, coefs, intercepts = l1_logistic_path((x[train] - mean) / scale, y[train], fitted.lambdas_)
        prob = 1 / (1 + np.exp(-((x[held] - mean) / scale @ coefs.T + intercepts)))
        losses += [[log_loss(y[held][g[held] == who], p[g[held] == who]) for p in prob.T] for who in np.unique(g[held])]
    assert fitted.validation_loss_ == pytest.approx(np.mean(losses, axis=0), abs=1e-5)


def test_folds_hold_both_classes_and_each_patient_once():
    from magnification_invariant.signatures.sparse_signature import _deal

    patients = np.repeat(np.arange(11), 3)
    codes = (patients < 2).astype(int)
    fold = _deal(codes, patients, 5, np.array([0, 1]), 0)
    assert sorted(np.bincount(fold)) == [2, 2, 2, 2, 3]
    assert fold[0] != fold[1]


def test_dead_dimensions_stay_out():
    x, y, g = cohort()
    x[:, -3] = 1 + 1e-9 * np.arange(len(x))  # float32 would call this constant
    fitted = SparseSignature(ratio=1e-4).fit(x, y, g)
    assert fitted.n_live_ == 27 and not fitted.live_[-3:].any()
    assert fitted.signature_.max() < 27 and not fitted.path_coef_[..., -3:].any()
    assert np.isfinite(fitted.decision_function(x + 5)).all()


def test_the_signature_carries_the_decision():
    x, y, g = cohort()
    for labels in (y, np.array(["a", "b"])[y]):
        fitted = SparseSignature(n_lambdas=15).fit(x, labels, g)
        k = fitted.signature_
        scores = fitted.transform(x) @ fitted.coef_[:, k].T + fitted.intercept_
        assert scores.squeeze() == pytest.approx(fitted.decision_function(x))
        assert fitted.predict_proba(x).sum(axis=1) == pytest.approx(np.ones(len(x)))
        assert fitted.score(x, labels) > 0.6
        assert fitted.path_size_[0] == 0 and fitted.path_size_[-1] > len(k)
        assert list(fitted.get_feature_names_out()) == [f"x{i}" for i in k]


def test_a_fixed_fraction_gives_the_point_of_the_path():
    x, y, g = cohort()
    chosen = SparseSignature().fit(x, y, g)
    fixed = clone(chosen).set_params(lambda_fraction=chosen.lambda_fraction_).fit(x, y)
    assert fixed.lambda_ == pytest.approx(chosen.lambda_)
    assert fixed.coef_ == pytest.approx(chosen.coef_, abs=1e-4)
    assert fixed.validation_loss_ is None


def test_it_works_in_a_pipeline_and_more_dimensions_than_rows():
    x, y, g = cohort(20, images=2, d=200, effect=4)
    pipe = make_pipeline(FunctionTransformer(), SparseSignature(cv=3), StandardScaler())
    out = pipe.fit_transform(x, y, sparsesignature__groups=g)
    assert len(x) < 200 and out.shape == (len(x), len(pipe[1].signature_))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.zeros(200)}, "one class"),
        ({"X": np.full((200, 5), np.nan)}, "NaN"),
        ({"X": np.full((200, 5), 3.0)}, "all 5 dimensions are constant"),
        ({"groups": np.arange(200) % 4}, "5 folds need as many patients, and there are 4"),
        ({"groups": np.where(np.arange(200) < 100, 0, np.arange(200))}, "single patient"),
        ({"groups": np.arange(3)}, "one patient to each"),
        ({"X_val": np.ones((4, 7)), "y_val": [0, 1, 0, 1]}, "7 features"),
        ({"X_val": np.ones((4, 5)), "y_val": [0, 1, 2, 1]}, "labels that training has not"),
        ({"X_val": np.ones((4, 5)), "y_val": [0, 1, 0, 1], "groups_val": [1, 1, 1, 1]}, "two validation patients"),
        ({"lambda_fraction": 2.0}, "lambda_fraction"),
        ({"ratio": 0}, "0 < ratio < 1"),
    ],
)
def test_bad_input_is_refused(change, message):
    rng = np.random.default_rng(0)
    given = {"X": rng.standard_normal((200, 5)), "y": np.repeat([0, 1], 100), **change}
    parameters = {k: given.pop(k) for k in ("lambda_fraction", "ratio") if k in given}
    with pytest.raises(ValueError, match=message):
        SparseSignature(**parameters).fit(**given)
