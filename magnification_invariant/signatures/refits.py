"""How far a signature survives other training data, on one backbone: an index means one dimension in all refits."""

from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import clone

from magnification_invariant.metrics import chance_jaccard, jaccard, nogueira
from magnification_invariant.signatures.sparse_signature import SparseSignature


def refit_supports(
    signature: SparseSignature,
    X: ArrayLike,
    y: ArrayLike,
    domains: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    *,
    n_subsamples: int = 0,
    seed: int = 0,
) -> np.ndarray:
    """Refits a signature on parts of its data, at the same fraction of the first penalty.

    Args:
        signature: The fitted signature.
        X: (n, d) embeddings.
        y: (n,) labels.
        domains: (n,) domain of each row. Each refit leaves one out, where `n_subsamples` is 0.
        groups: (n,) patient of each row, for subsamples.
        n_subsamples: Refits on `halves` of the patients, dealt by `seed`.
        seed: Of the halves.

    Returns:
        (refits, d) booleans, which dimensions each refit chose.
    """
    X, y = np.asarray(X), np.asarray(y)
    if n_subsamples:
        if groups is None:
            raise ValueError("subsamples are drawn by patient: pass groups")
        parts = halves(y, np.asarray(groups), n_subsamples, seed)
    elif domains is None:
        raise ValueError("pass domains to leave out, or a number of subsamples")
    else:
        domains = np.asarray(domains)
        parts = [domains != domain for domain in np.unique(domains)]
        if len(parts) < 2:
            raise ValueError(f"leaving out the only domain, {domains[0]!r}, leaves nothing to fit")
    refit = clone(signature).set_params(lambda_fraction=signature.lambda_fraction_)
    supports = np.zeros((len(parts), X.shape[1]), bool)
    for support, part in zip(supports, parts, strict=True):
        support[refit.fit(X[part], y[part]).signature_] = True
    return supports


def refit_stability(
    signature: SparseSignature,
    X: ArrayLike,
    y: ArrayLike,
    domains: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    *,
    n_subsamples: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures how far the refits of `refit_supports` agree, over live dimensions; arguments as there.

    Returns:
        refits: How the parts were made; and the keys of `agreement`. The interval of halves is a Monte Carlo one,
        conditional on the cohort: it holds the chance of the halves, not of the patients.
    """
    supports = refit_supports(signature, X, y, domains, groups, n_subsamples=n_subsamples, seed=seed)
    figures = agreement(supports[:, signature.live_])
    if not n_subsamples:
        return {"refits": "each training domain left out once", **figures}
    figures["jaccard_pairs"] = None  # too many to keep
    return {"refits": f"{n_subsamples} halves of the patients", **figures}


def agreement(supports: ArrayLike) -> dict[str, Any]:
    """How far signatures agree that index the same dimensions: `supports` (M, d), booleans over live ones, M >= 2.

    Returns:
        sizes (M,); jaccard: mean over pairs, with jaccard_pairs (in the order of `itertools.combinations`) and
        chance_jaccard, what random sets of these sizes score; nogueira and nogueira_interval.
    """
    supports = np.asarray(supports, bool)
    value, *interval = nogueira(supports)
    sizes = supports.sum(axis=1).tolist()
    pairs = [jaccard(a, b) for a, b in combinations(supports, 2)]
    chance = [chance_jaccard(a, b, supports.shape[1]) for a, b in combinations(sizes, 2)]
    scores = {"sizes": sizes, "jaccard": float(np.mean(pairs)), "jaccard_pairs": pairs}
    return scores | {"chance_jaccard": float(np.mean(chance)), "nogueira": value, "nogueira_interval": interval}


def halves(y: np.ndarray, groups: np.ndarray, n_subsamples: int, seed: int) -> list[np.ndarray]:
    """Row masks (n,) of halves of the patients, dealt within their class, each followed by its complement.

    Source: complementary pairs, Shah and Samworth, JRSS B 75, 2013.

    Raises:
        ValueError: A class has a single patient, who cannot be in both halves.
    """
    _, first, patient = np.unique(groups, return_index=True, return_inverse=True)
    classes, patients = np.unique(y[first], return_counts=True)
    if patients.min() < 2:
        raise ValueError(f"class {classes[patients.argmin()]!r} has a single patient: both halves need one")
    rng, parts = np.random.default_rng(seed), []
    while len(parts) < n_subsamples:
        half = np.zeros(len(first), bool)
        for c in np.unique(y):
            of_class = rng.permutation(np.flatnonzero(y[first] == c))
            half[of_class[: len(of_class) // 2]] = True
        parts += [half[patient], ~half[patient]]
    return parts[:n_subsamples]
