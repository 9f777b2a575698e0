"""Stability selection finds what carries the class, by patient, and its bound holds on noise."""

import numpy as np
import pytest

from magnification_invariant.signatures import l1_logistic_path, stability_selection
from magnification_invariant.signatures.stable_selection import _first


def cohort(strong: int = 4, d: int = 60, n_patients: int = 60, seed: int = 0):
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(n_patients), 4)
    y = patient % 2
    x = rng.standard_normal((len(y), d)) + 0.5 * rng.standard_normal((n_patients, d))[patient]
    x[:, :strong] += 1.2 * y[:, None]
    x[:, -1] = 3.0
    return x, y, patient


def test_it_finds_what_carries_the_class():
    x, y, patient = cohort()
    found = stability_selection(x, np.array(["b", "m"])[y], patient, q=8, n_pairs=15)
    assert found.selected.tolist() == [0, 1, 2, 3]
    assert found.frequency[:4].min() > 0.9 and found.frequency[-1] == 0
    assert found.frequency.sum() == pytest.approx(8)  # q of each half
    assert found.bound == pytest.approx(8**2 / (0.5 * 59))


def test_the_bound_holds_on_noise():
    errors = []
    for seed in range(8):
        x, y, patient = cohort(strong=0, d=40, n_patients=40, seed=seed)
        found = stability_selection(x, y, patient, q=6, threshold=0.75, n_pairs=10, seed=seed)
        errors.append(len(found.selected))
    assert np.mean(errors) <= found.bound


def test_the_first_to_enter_are_those_of_a_fine_path():
    x, y, _ = cohort(seed=1)
    scaled = (x[:, :-1] - x[:, :-1].mean(axis=0)) / x[:, :-1].std(axis=0)
    _, coefs, _ = l1_logistic_path(scaled, y, n_lambdas=2000, ratio=0.05)
    entry = np.where((coefs != 0).any(axis=0), (coefs != 0).argmax(axis=0), 9999)
    assert set(_first(x, y, 6)) == set(np.argsort(entry)[:6])


def test_the_path_ends_where_it_is_large_enough():
    x, y, _ = cohort()
    lambdas, coefs, intercepts = l1_logistic_path(x, y, max_size=7)
    size = np.count_nonzero(coefs, axis=1)
    assert len(lambdas) == len(coefs) == len(intercepts) < 30 and (size[:-1] < 7).all() and size[-1] >= 7
    assert coefs[-1] == pytest.approx(l1_logistic_path(x, y)[1][len(lambdas) - 1])


def test_bad_input_is_refused():
    x, y, patient = cohort()
    for change, message in (
        ({"y": patient % 3}, "holds 3"),
        ({"X": np.where(x > 2, np.nan, x)}, "NaN"),
        ({"q": 60}, "q = 60 dimensions cannot be taken from 59 live ones of 60"),
        ({"X": np.ones((240, 60))}, "0 live ones"),
        ({"threshold": 0.5}, "threshold"),
        ({"groups": np.where(y == 0, -1, patient)}, "single patient"),
    ):
        with pytest.raises(ValueError, match=message):
            stability_selection(**{"X": x, "y": y, "groups": patient, "q": 5, "n_pairs": 1, **change})
