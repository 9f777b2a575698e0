"""Units of two networks: when an index means the same, and what matching gives back."""

from dataclasses import replace

import numpy as np
import pytest

from magnification_invariant.signatures.networks import (
    SignedNetwork,
    compare_networks,
    match_units,
    same_units,
    unit_correlation,
)


def activations(n=120, d=30, seed=0):
    x = np.maximum(np.random.default_rng(seed).standard_normal((n, d)), 0)
    x[:, -2:] = 0
    return x


def network(x, signature, name="a", initial="1" * 64, rows=None):
    rows = np.arange(len(x)) if rows is None else rows
    return SignedNetwork(name, initial, x[rows], np.array([f"{i}.png" for i in rows]), np.asarray(signature))


def test_correlation_is_numpys():
    a, b = activations(d=8), activations(d=6, seed=1)
    r = unit_correlation(a, b)
    assert r[:6, :4] == pytest.approx(np.corrcoef(a[:, :6].T, b[:, :4].T)[:6, 6:])
    assert not r[6:].any() and not r[:, 4:].any()


def test_matching_undoes_a_permutation_scale_and_noise():
    x, rng = activations(), np.random.default_rng(3)
    order = rng.permutation(30)
    y = 5 * x[:, order] + 0.3 * rng.random(x.shape) * (x[:, order].std(axis=0) > 0)
    pairs, r = match_units(x, y)
    assert len(pairs) == 28 and r.min() > 0.95
    assert (order[pairs[:, 1]] == pairs[:, 0]).all()


def test_indices_are_compared_where_units_stayed_the_same_and_not_else():
    x, rng = activations(), np.random.default_rng(1)
    near = x + 0.3 * rng.standard_normal(x.shape) * (x.std(axis=0) > 0)
    assert same_units(x, near).comparable and same_units(x, near).share == 1
    a, b = network(x, [0, 1, 2, 3]), network(near, [0, 1, 2, 4], "b")
    found = compare_networks(a, b, "index")
    assert found["jaccard"] == pytest.approx(3 / 5) and found["live"] == 28 and found["width"] == 30
    assert found["chance_jaccard"] == pytest.approx((16 / 28) / (8 - 16 / 28))

    far = network(activations(seed=9), [0, 1, 2, 3], "far")
    found = compare_networks(a, far, "index")
    assert not found["comparable"] and found["jaccard"] is None and found["nogueira"] is None
    # One of the two conditions alone is not enough: here most units have a twin that fits better.
    noisy = [x[:, :9] + 0.8 * rng.standard_normal((120, 9)) for _ in range(2)]
    same = same_units(np.hstack([x[:, :9]] * 3), np.hstack([*noisy, x[:, :9]]))
    assert same.correlation > 0.5 and same.share == pytest.approx(1 / 3) and not same.comparable


def test_different_initial_weights_are_compared_by_matching_alone():
    x = activations()
    order = np.random.default_rng(3).permutation(30)
    a, b = network(x, [0, 5, 7]), network(x[:, order], np.argsort(order)[[0, 5, 9]], "b", "2" * 64)
    with pytest.raises(ValueError, match=r"a and b started from different weights.*by='matching', or refit"):
        compare_networks(a, b, "index")
    found = compare_networks(a, b, "matching")
    assert found["jaccard"] == pytest.approx(2 / 4) and found["correlation"] == pytest.approx(1)
    assert found["kept"] == found["sizes"] == [3, 3] and found["live"] == 28


def test_units_without_a_partner_are_left_out_and_counted():
    x = activations()
    y = np.hstack([x[:, :15], activations(seed=8)[:, 15:]])
    found = compare_networks(network(x, [0, 1, 20]), network(y, [0, 1, 21], "b", "2" * 64), "matching")
    assert found["live"] == 15 and found["kept"] == [2, 2] and found["sizes"] == [3, 3]
    assert found["jaccard"] == 1


def test_only_common_training_images_count():
    x = activations()
    a, b = network(x, [0, 1], rows=np.arange(0, 80)), network(x, [0, 1], "b", rows=np.arange(40, 120)[::-1])
    found = compare_networks(a, b, "index")
    assert found["images"] == 40 and found["correlation"] == pytest.approx(1)
    with pytest.raises(ValueError, match="share 1 training images"):
        compare_networks(a, replace(b, keys=np.r_[["0.png"], b.keys[1:] + "x"]), "index")


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="same images"):
        unit_correlation(np.ones((4, 2)), np.ones((5, 2)))
    with pytest.raises(ValueError, match="different width"):
        same_units(np.ones((4, 2)), np.ones((4, 3)))
    with pytest.raises(ValueError, match="'index' or 'matching'"):
        compare_networks(network(activations(), [0]), network(activations(), [0]), "name")
    assert not same_units(np.zeros((9, 3)), np.zeros((9, 3))).comparable
