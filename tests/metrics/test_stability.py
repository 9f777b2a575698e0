"""Stability figures against brute force over pairs, exact fractions and simulation."""

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnification_invariant import metrics

SETS = np.array([[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 1, 1, 0, 1]], bool)


def test_jaccard_of_indices_and_masks():
    assert metrics.jaccard([1, 2, 3], [2, 3, 4, 5]) == 2 / 5
    assert metrics.jaccard(SETS[0], SETS[2]) == 1 / 6
    assert np.isnan(metrics.jaccard([], []))
    assert metrics.jaccard([], [1]) == 0


def test_chance_jaccard_is_what_random_sets_score():
    rng = np.random.default_rng(0)
    scores = [metrics.jaccard(rng.permutation(512)[:282], rng.permutation(512)[:282]) for _ in range(300)]
    assert metrics.chance_jaccard(282, 282, 512) == pytest.approx(np.mean(scores), abs=0.003)
    assert metrics.chance_jaccard(282, 282, 512) == pytest.approx(0.38, abs=0.005)


def test_nogueira_in_exact_fractions():
    n_sets, d = SETS.shape
    frequency = [Fraction(int(c), n_sets) for c in SETS.sum(axis=0)]
    share = sum(frequency) / d
    value = 1 - Fraction(n_sets, n_sets - 1) * sum(p * (1 - p) for p in frequency) / d / (share * (1 - share))
    influence = []
    for row in SETS:
        size = Fraction(int(row.sum()), d)
        overlap = sum(p for p, chosen in zip(frequency, row, strict=True) if chosen) / d
        influence.append(overlap - size * share + value / 2 * (2 * share * size - size - share + 1))
    influence = [phi / (share * (1 - share)) for phi in influence]
    middle = sum(influence) / n_sets
    variance = Fraction(4, n_sets**2) * sum((phi - middle) ** 2 for phi in influence)
    found = metrics.nogueira(SETS)
    assert found.value == pytest.approx(float(value), abs=1e-14)
    assert (found.high - found.low) / 2 == pytest.approx(1.959963984540054 * float(variance) ** 0.5, abs=1e-12)


@given(st.integers(0, 500), st.integers(2, 6), st.integers(1, 9))
def test_nogueira_of_equal_sizes_is_the_mean_of_kunchevas_index(seed, n_sets, size):
    rng = np.random.default_rng(seed)
    selected = np.zeros((n_sets, 10), bool)
    for row in selected:
        row[rng.permutation(10)[:size]] = True
    pairs = [((a & b).sum() * 10 - size**2) / (size * (10 - size)) for a, b in combinations(selected, 2)]
    assert metrics.nogueira(selected).value == pytest.approx(np.mean(pairs), abs=1e-12)


def test_nogueira_at_its_ends():
    assert metrics.nogueira(np.repeat(SETS[:1], 4, axis=0)).value == 1
    rng = np.random.default_rng(0)
    chance = metrics.nogueira(rng.random((200, 300)) < 0.4)
    assert chance.value == pytest.approx(0, abs=0.01)
    for every in (np.ones((3, 5)), np.zeros((3, 5))):
        assert np.isnan(metrics.nogueira(every)).all()


def test_the_interval_of_nogueira_covers_what_it_claims():
    # Each dimension is chosen with its own probability, so the population value is known.
    rng = np.random.default_rng(1)
    p = rng.beta(0.3, 0.6, 100)
    truth = 1 - np.mean(p * (1 - p)) / (p.mean() * (1 - p.mean()))
    found = [metrics.nogueira(rng.random((100, 100)) < p) for _ in range(400)]
    assert np.mean([f.low <= truth <= f.high for f in found]) == pytest.approx(0.95, abs=0.03)
    assert np.std([f.value for f in found]) == pytest.approx(np.mean([f.high - f.low for f in found]) / 3.92, rel=0.15)


@pytest.mark.parametrize("selected", [np.ones(4), np.ones((1, 4)), np.full((2, 4), 2)])
def test_what_is_no_set_of_signatures_is_refused(selected):
    with pytest.raises(ValueError, match="boolean matrix"):
        metrics.nogueira(selected)
