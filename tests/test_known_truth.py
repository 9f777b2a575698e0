"""The vectors of benchmarks/vectors.py have the effects that they are said to have, and its splits are honest."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from magnification_invariant.data.splits import leave_one_domain_out

BENCHMARK = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "vectors.py"))
data_set, seeing, EFFECTS = BENCHMARK["data_set"], BENCHMARK["seeing"], BENCHMARK["EFFECTS"]


def by_domain(table, figure):
    """(domains, width) of a figure over the rows of each domain."""
    return np.stack([figure(table["embedding"][table["domain"] == name]) for name in "ABCD"])


def singular(matrix):
    return np.linalg.svd(matrix - matrix.mean(0), compute_uv=False)


def test_shifts_lie_in_a_plane_and_along_the_signal():
    first, second, third, _ = singular(by_domain(data_set("additive", 4, 0), lambda x: x.mean(0)))
    assert second > 5 * third
    table = data_set("along the signal", 4, 0)
    means = by_domain(table, lambda x: x.mean(0))
    first, second, *_ = singular(means)
    assert first > 5 * second
    classes = [table["embedding"][table["label"] == y].mean(0) for y in (0, 1)]
    signal, shift = classes[1] - classes[0], np.linalg.svd(means - means.mean(0))[2][0]
    assert abs(shift @ signal) / np.linalg.norm(signal) > 0.9  # but for noise


def test_gains_are_of_two_patterns():
    spread = by_domain(data_set("multiplicative", 2, 0), lambda x: np.log(x.std(0)))
    _, second, third, _ = singular(spread)
    assert second > 2 * third
    plain = by_domain(data_set("multiplicative", 0, 0), lambda x: np.log(x.std(0)))
    assert singular(plain)[0] < 0.3 * second


def test_only_prevalence_changes_the_shares_of_the_classes():
    for effect in EFFECTS:
        table = data_set(effect, 4, 1)
        shares = [table["label"][table["domain"] == name].mean() for name in "ABCD"]
        assert (np.ptp(shares) > 0.2) == (effect == "prevalence")
        again = data_set(effect, 4, 1)
        assert all(np.array_equal(table[name], again[name], equal_nan=name == "mpp") for name in table)


@pytest.mark.parametrize("effect", EFFECTS)
def test_who_has_seen_the_domain_has_not_seen_the_tested_patients(effect):
    table = data_set(effect, 1, 2)
    split = leave_one_domain_out(table, "A", n_folds=3)
    more = seeing(table, split)
    assert set(split.train) < set(more.train) and np.array_equal(more.test, split.test)
    assert {"A"} == set(table["domain"][np.setdiff1d(more.train, split.train)])
    sides = [set(table["patient"][getattr(more, part)]) for part in ("train", "val", "test")]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
