"""Refits on one backbone: what is left out, what stays fixed, and what agreement is worth."""

import numpy as np
import pytest

from magnification_invariant.signatures import SparseSignature, refit_stability, refit_supports
from magnification_invariant.signatures.refits import halves


def cohort(strong: int, seed: int = 0):
    """Rows at three domains; `strong` dimensions of 40 carry the class, three are dead."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(60), 6)
    y, domain = patient % 2, np.tile([40, 100, 400, 40, 100, 400], 60)
    x = rng.standard_normal((360, 40)) + 0.3 * rng.standard_normal((60, 40))[patient]
    x[:, :strong] += 1.0 * y[:, None]
    x[:, -3:] = 0
    return x, y, domain, patient


def test_each_refit_leaves_one_domain_out_at_the_same_fraction():
    x, y, domain, patient = cohort(4)
    fitted = SparseSignature().fit(x, y, patient)
    supports = refit_supports(fitted, x, y, domain)
    assert supports.shape == (3, 40)
    by_hand = SparseSignature(lambda_fraction=fitted.lambda_fraction_).fit(x[domain != 100], y[domain != 100])
    assert (np.flatnonzero(supports[1]) == by_hand.signature_).all()


def test_strong_dimensions_make_stable_signatures_and_noise_does_not():
    x, y, domain, patient = cohort(6)
    fitted = SparseSignature(lambda_fraction=0.4).fit(x, y)
    stable = refit_stability(fitted, x, y, domain, patient)
    assert stable["nogueira"] > 0.8 and stable["jaccard"] > 0.7
    assert len(stable["sizes"]) == len(stable["jaccard_pairs"]) == 3
    noise = refit_stability(
        SparseSignature(lambda_fraction=0.4).fit(x, patient % 7 % 2), x, patient % 7 % 2, None, patient, n_subsamples=30
    )
    assert noise["nogueira"] < 0.4
    assert noise["nogueira_interval"][0] < noise["nogueira"] < noise["nogueira_interval"][1]


def test_dead_dimensions_do_not_make_agreement_look_rarer_than_it_is():
    x, y, domain, _ = cohort(4)
    fitted = SparseSignature(lambda_fraction=0.1).fit(x, y)
    alone = SparseSignature(lambda_fraction=0.1).fit(x[:, :37], y)
    with_dead, without = refit_stability(fitted, x, y, domain), refit_stability(alone, x[:, :37], y, domain)
    assert with_dead == without


def test_halves_are_of_patients_within_classes_and_come_with_their_complement():
    _, y, _, patient = cohort(1)
    parts = halves(y, patient, 6, 0)
    assert len(parts) == 6
    for half, rest in zip(parts[::2], parts[1::2], strict=True):
        assert (half ^ rest).all()
        assert not set(patient[half]) & set(patient[rest])
        assert len(set(patient[half & (y == 1)])) == 15
    assert (parts[0] != parts[2]).any()


def test_bad_input_is_refused():
    x, y, _, patient = cohort(4)
    fitted = SparseSignature(lambda_fraction=0.4).fit(x, y)
    with pytest.raises(ValueError, match="only domain"):
        refit_supports(fitted, x, y, np.zeros(len(y)))
    with pytest.raises(ValueError, match="pass groups"):
        refit_supports(fitted, x, y, n_subsamples=4)
    with pytest.raises(ValueError, match="single patient"):
        refit_supports(fitted, x, y, groups=np.where(y == 0, -1, patient), n_subsamples=4)
    with pytest.raises(ValueError, match="pass domains"):
        refit_supports(fitted, x, y, groups=patient)
