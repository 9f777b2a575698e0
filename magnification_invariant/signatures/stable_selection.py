"""Stability selection: which dimensions are among the first to enter in most halves of the patients."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from magnification_invariant.signatures.embeddings import live_dimensions
from magnification_invariant.signatures.refits import halves
from magnification_invariant.signatures.solver import l1_logistic_path


class StableSelection(NamedTuple):
    """What `stability_selection` found.

    Attributes:
        selected: (k,) dimensions chosen in at least `threshold` of the halves, rising.
        frequency: (d,) share of the halves in which each dimension was among the first q.
        q: Dimensions taken from each half.
        threshold: As asked for.
        bound: Of the expected number of selected dimensions whose chance to be among the first q of half of the
            patients is at most that of a random one, `q / live dimensions`.
    """

    selected: np.ndarray
    frequency: np.ndarray
    q: int
    threshold: float
    bound: float


def stability_selection(
    X: ArrayLike,
    y: ArrayLike,
    groups: ArrayLike,
    *,
    q: int = 30,
    threshold: float = 0.75,
    n_pairs: int = 50,
    seed: int = 0,
) -> StableSelection:
    """Selects dimensions over complementary pairs of halves of the patients.

    From each half the first `q` dimensions that enter the path are taken. `q` is fixed and not the penalty, because the
    bound is in q: the expected number of selected dimensions of low selection probability is at most
    `q^2 / ((2 threshold - 1) p)`, without any assumption on how the others behave. It counts dimensions that are no
    better than a random one; where dimensions are copies of each other, each of them can be one.

    Source: Shah and Samworth, "Variable selection with error control: another look at stability selection", JRSS B
    75(1), 2013, theorem 1 and (6); Meinshausen and Buehlmann, JRSS B 72(4), 2010, for exchangeable noise.

    Args:
        X: (n, d) embeddings.
        y: (n,) labels, two classes.
        groups: (n,) patient of each row.
        q: Dimensions to take from each half, at most the live ones.
        threshold: Share of the halves, in (0.5, 1].
        n_pairs: Pairs of halves.
        seed: Of the halves.

    Raises:
        ValueError: On another number of classes than two, NaN, too few patients, or more dimensions asked for than
            exist.
    """
    X, (classes, codes), groups = np.asarray(X, np.float64), np.unique(y, return_inverse=True), np.asarray(groups)
    if len(classes) != 2:
        raise ValueError(f"stability selection tells two classes apart, and y holds {len(classes)}")
    if not np.isfinite(X).all():
        raise ValueError("X must be finite: it holds NaN or infinity")
    if not 0.5 < threshold <= 1 or n_pairs < 1:
        raise ValueError(f"0.5 < threshold <= 1 and n_pairs >= 1, not {threshold} and {n_pairs}")
    n_live = int(live_dimensions(X).sum())
    if not 1 <= q <= n_live:
        raise ValueError(f"q = {q} dimensions cannot be taken from {n_live} live ones of {X.shape[1]}")
    counts = np.zeros(X.shape[1])
    for half in halves(codes, groups, 2 * n_pairs, seed):
        counts[_first(X[half], codes[half], q)] += 1
    frequency = counts / (2 * n_pairs)
    selected = np.flatnonzero(frequency >= threshold)
    return StableSelection(selected, frequency, q, threshold, q**2 / ((2 * threshold - 1) * n_live))


def _first(X: np.ndarray, y: np.ndarray, q: int) -> np.ndarray:
    """The first q dimensions that enter the path; among those of one step the larger coefficients."""
    live = np.flatnonzero(live_dimensions(X))
    scaled = (X[:, live] - X[:, live].mean(axis=0)) / X[:, live].std(axis=0)
    _, coefs, _ = l1_logistic_path(scaled, y, n_lambdas=40, tol=1e-3, max_size=q)
    entered = coefs != 0
    step = np.where(entered.any(axis=0), entered.argmax(axis=0), len(coefs))
    size = np.abs(coefs[np.minimum(step, len(coefs) - 1), np.arange(len(live))])
    order = np.lexsort((-size, step))[:q]
    return live[order[step[order] < len(coefs)]]
