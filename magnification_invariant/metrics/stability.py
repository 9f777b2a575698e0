"""Whether two signatures chose the same dimensions, beyond what chance gives.

Sets of dimensions come as a boolean matrix `selected` (M signatures, d dimensions). Leave dead dimensions out of d, or
chance looks rarer than it is. All of this compares *indices*, which only mean the same thing in embeddings of one
backbone.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Stability(NamedTuple):
    """A stability figure with its interval; see `nogueira`."""

    value: float
    low: float
    high: float


def jaccard(a: ArrayLike, b: ArrayLike) -> float:
    """Jaccard index `|A and B| / |A or B|` of two sets of dimensions, given as indices or as boolean masks.

    NaN for two empty sets. Chance does not score 0: see `chance_jaccard`.
    """
    first, second = (
        set(np.flatnonzero(s).tolist() if s.dtype == bool else s.tolist()) for s in (np.asarray(a), np.asarray(b))
    )
    return len(first & second) / len(first | second) if first | second else float("nan")


def chance_jaccard(size_a: int, size_b: int, n_dimensions: int) -> float:
    """Jaccard index of two random sets at their expected overlap `size_a size_b / n_dimensions`."""
    overlap = size_a * size_b / n_dimensions
    return overlap / (size_a + size_b - overlap) if size_a + size_b else float("nan")


def nogueira(selected: ArrayLike) -> Stability:
    """Stability of feature selection, corrected for chance, with an asymptotic 95 % interval.

    `Phi = 1 - [mean_f M/(M-1) p_f (1 - p_f)] / [(k/d) (1 - k/d)]`, p_f how often dimension f was chosen and k the mean
    size. 1 is the same set each time, 0 is chance; their rule of thumb: below 0.4 poor, above 0.75 excellent. The
    interval is `Phi +- z sqrt(v)` with their variance estimate, asymptotic in M and for independent samples: with four
    folds, or subsamples of one cohort, it describes the resampling and not the population.

    Source: Nogueira, Sechidis and Brown, "On the Stability of Feature Selection Algorithms", JMLR 18(174), 2018,
    definition 4 and theorem 7.

    Args:
        selected: (M, d) booleans, M >= 2.

    Returns:
        Value and bounds; NaN where every dimension or none was always chosen, since any other set was impossible.
    """
    from scipy.stats import norm

    selected = np.asarray(selected)
    if selected.ndim != 2 or selected.shape[0] < 2 or not np.isin(selected, (0, 1)).all():
        raise ValueError(f"selected must be a boolean matrix (signatures >= 2, dimensions), not {selected.shape}")
    selected = selected.astype(np.float64)
    n_sets, d = selected.shape
    frequency, size = selected.mean(axis=0), selected.sum(axis=1)
    share = frequency.mean()
    random = share * (1 - share)
    if random == 0:
        return Stability(float("nan"), float("nan"), float("nan"))
    value = 1 - n_sets / (n_sets - 1) * np.mean(frequency * (1 - frequency)) / random
    influence = (
        selected @ frequency / d - size / d * share + value / 2 * (2 * share * size / d - size / d - share + 1)
    ) / random
    half = norm.ppf(0.975) * 2 / n_sets * np.sqrt(np.sum((influence - influence.mean()) ** 2))
    return Stability(float(value), float(value - half), float(value + half))
