"""What frozen embeddings still tell about the acquisition.

An adversary that was trained together with an encoder says little about it: it may just have been beaten. These
measures look at the finished embeddings from outside.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from magnification_invariant.metrics.intervals import Difference, paired_difference


class DomainProbe(NamedTuple):
    """How well a fresh linear probe names the domain.

    Attributes:
        balanced_accuracy: Mean recall over domains, patients weighing the same within each.
        low: Lower bound of the 95 % interval over patients.
        high: Upper bound.
        chance: What guessing scores, 1 / domains.
        right: (n,) whether the domain of each row was named, by a probe that had not seen its patient.
    """

    balanced_accuracy: float
    low: float
    high: float
    chance: float
    right: np.ndarray


def domain_probe(
    embeddings: ArrayLike,
    domains: ArrayLike,
    groups: ArrayLike,
    *,
    n_folds: int = 5,
    n_draws: int = 2000,
    seed: int = 0,
) -> DomainProbe:
    """Reads the domain from embeddings by logistic regression, on patients that the probe has not seen.

    Each fold standardises and fits anew (L2 penalty, domains weighing the same); all rows are predicted out of fold.
    The interval is a percentile bootstrap over patients with the fitted probes taken as given. Only differences between
    encoders on the same rows are evidence: a probe may also read what differs between patients.

    Args:
        embeddings: (n, d).
        domains: (n,) domain of each row, two or more of them.
        groups: (n,) patient of each row.
        n_folds: Over patients.
        n_draws: Of the bootstrap.
        seed: Of folds and bootstrap.

    Raises:
        ValueError: On one domain, NaN, fewer patients than folds, or a domain that some training fold lacks.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    embeddings = _check_embeddings(embeddings, domains, groups)
    names, domain = np.unique(np.asarray(domains), return_inverse=True)
    _, patient = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"a probe tells domains apart, and there is one: {names.tolist()}")
    guess = np.empty_like(domain)
    for train, test in GroupKFold(n_folds, shuffle=True, random_state=seed).split(embeddings, groups=patient):
        if len(np.unique(domain[train])) < len(names):
            raise ValueError("a fold's training patients lack a domain; take fewer folds or domains with more patients")
        probe = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
        guess[test] = probe.fit(embeddings[train], domain[train]).predict(embeddings[test])

    count = patient.max() + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=n_draws)
    value, *recalls = _mean_recall(np.vstack([np.ones(count), drawn]), guess == domain, domain, patient)
    return DomainProbe(float(value), *map(float, np.quantile(recalls, (0.025, 0.975))), 1 / len(names), guess == domain)


def _mean_recall(times: np.ndarray, right: np.ndarray, domain: np.ndarray, patient: np.ndarray) -> np.ndarray:
    """Mean recall over domains with each patient taken `times` (draws, patients) times: (draws,).

    A patient's share of rows that are `right` (n,) counts once in each domain where they have rows.
    """
    seen, named = np.zeros((2, times.shape[1], domain.max() + 1))
    np.add.at(seen, (patient, domain), 1)
    np.add.at(named, (patient, domain), right)
    with np.errstate(invalid="ignore"):
        return np.nanmean((times @ (named / np.maximum(seen, 1))) / (times @ (seen > 0)), axis=1)


def probe_difference(
    a: DomainProbe, b: DomainProbe, y_true: ArrayLike, domains: ArrayLike, groups: ArrayLike, **options
) -> Difference:
    """How much better the domain can be read from the one encoder than from the other, on the same rows.

    Balanced accuracy of a minus that of b, by `paired_difference` and its `options` (n_draws); the fitted probes are
    taken as given. `domains` and `groups` (n,) are those of the probes; patients are redrawn within their class in
    `y_true` (n,), 0 or 1.
    """
    _, domain = np.unique(np.asarray(domains), return_inverse=True)

    def balanced(_, right: np.ndarray, weight: np.ndarray) -> float:
        with np.errstate(invalid="ignore"):
            return float(np.nanmean(np.bincount(domain, weight * right) / np.bincount(domain, weight)))

    # Domains as runs: each patient weighs the same within each domain.
    return paired_difference(balanced, y_true, a.right, b.right, groups, runs=domain, **options)


def knn_reading(embeddings: ArrayLike, domains: ArrayLike, groups: ArrayLike, k: int = 10) -> float:
    """How often the k nearest images of *other* patients (by cosine) name the domain: mean recall over domains.

    The majority names it, of several equal ones the nearest. Chance is 1 / domains; beside `domain_probe` it tells what
    lies near in the space as it is, not what a direction in it can separate.

    Args:
        embeddings: (n, d).
        domains: (n,) domain of each row.
        groups: (n,) patient of each row.
        k: Neighbours; fewer where there are not so many.

    Raises:
        ValueError: There is one patient, or NaN.
    """
    z = _check_embeddings(embeddings, domains, groups)
    _, domain = np.unique(np.asarray(domains), return_inverse=True)
    nearest = domain[_nearest(z, groups, k)]
    votes = _votes(nearest)
    first = np.take_along_axis(votes, nearest, 1) == votes.max(1, keepdims=True)
    named = nearest[np.arange(len(nearest)), first.argmax(1)]
    return _recall(named, domain)


def _nearest(z: np.ndarray, groups: ArrayLike, k: int) -> np.ndarray:
    """Row numbers (n, k) of the nearest rows of other patients by cosine, the nearest first.

    Fewer than `k` columns where the largest patient leaves not so many.

    Raises:
        ValueError: There is one patient.
    """
    z = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    _, patient = np.unique(np.asarray(groups), return_inverse=True)
    others = len(z) - np.bincount(patient).max()
    if others < 1:
        raise ValueError("neighbours are images of other patients, and there is one patient")
    nearest = np.empty((len(z), min(k, others)), int)
    for start in range(0, len(z), 1024):
        rows = slice(start, start + 1024)
        near = np.where(patient[rows, None] == patient, -np.inf, z[rows] @ z.T)
        # Sorted are only those that are among the nearest: a picture has thousands of others.
        among = np.sort(np.argpartition(-near, nearest.shape[1] - 1, axis=1)[:, : nearest.shape[1]], axis=1)
        order = np.argsort(-np.take_along_axis(near, among, 1), axis=1, kind="stable")
        nearest[rows] = np.take_along_axis(among, order, 1)
    return nearest


def _votes(codes: np.ndarray) -> np.ndarray:
    """How many of the codes (n, k) of each row are 0, 1, ...: (n, codes)."""
    return np.stack([(codes == code).sum(1) for code in range(codes.max() + 1)], 1)


def _recall(named: np.ndarray, code: np.ndarray) -> float:
    """Mean over codes of the share of their rows (n,) that are `named` so (n,)."""
    return float((np.bincount(code, named == code) / np.bincount(code)).mean())


class RobustnessIndex(NamedTuple):
    """See `robustness_index`.

    Attributes:
        value: 1 where neighbours share the class across domains, 0 where they share the domain across classes.
        support: Share of rows that have a neighbour of either kind; the others say nothing.
        k: Neighbours, at which they name the class best.
    """

    value: float
    support: float
    k: int


def robustness_index(
    embeddings: ArrayLike, labels: ArrayLike, domains: ArrayLike, groups: ArrayLike
) -> RobustnessIndex:
    """Whether neighbours are of one class or of one domain: the robustness index of PathoROB (Koemen et al., 2025).

    Of the k nearest rows of other patients, those of the same class and another domain, over those and the ones of
    another class and the same domain; 0.5 where there is none of either. Of the k that can be chosen (5, 11, 21, 51,
    below a quarter of the rows) it is the one at which neighbours name the class best, by mean recall.

    Source: the package `croma` (1.0), whose numbers these are.

    Args:
        embeddings: (n, d).
        labels: (n,) classes.
        domains: (n,) domain of each row.
        groups: (n,) patient of each row.

    Raises:
        ValueError: There is one patient, or NaN.
    """
    z = _check_embeddings(embeddings, labels, domains, groups)
    _, label = np.unique(np.asarray(labels), return_inverse=True)
    _, domain = np.unique(np.asarray(domains), return_inverse=True)
    candidates = [k for k in (5, 11, 21, 51) if k < len(z) // 4] or [1]
    nearest = _nearest(z, groups, max(candidates))
    k = max(candidates, key=lambda k: _recall(_votes(label[nearest[:, :k]]).argmax(1), label))
    same_label, same_domain = (code[nearest[:, :k]] == code[:, None] for code in (label, domain))
    either, for_class = same_label != same_domain, same_label & ~same_domain
    value = for_class.sum() / either.sum() if either.any() else 0.5
    return RobustnessIndex(float(value), float(either.any(1).mean()), k)


def linear_cka(a: ArrayLike, b: ArrayLike) -> float:
    """Similarity of two embeddings of the *same* rows: linear CKA with the unbiased HSIC estimate.

    `HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))` with the Gram matrices `K = a aT` and `L = b bT` (Kornblith et al., ICML
    2019) and the estimate of Song et al. (JMLR 13, 2012), which does not drift to 1 when dimensions outnumber rows
    (Davari et al. 2022 on why that matters). For magnifications the rows must be the same fields.

    1 for equal embeddings (n, d) and (n, e), n >= 4, up to rotation and scale, about 0 for unrelated ones; NaN if one
    of them is constant.
    """
    a, b = _check_embeddings(a), _check_embeddings(b)
    if len(a) != len(b) or len(a) < 4:
        raise ValueError(f"CKA compares the same rows, at least 4 of them, not {len(a)} and {len(b)}")
    grams = [x @ x.T for x in (a - a.mean(axis=0), b - b.mean(axis=0))]
    for gram in grams:
        np.fill_diagonal(gram, 0)

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        n = len(k)
        ends = k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * k.sum(axis=0) @ m.sum(axis=0)
        return float((np.sum(k * m) + ends) / (n * (n - 3)))

    scale = hsic(grams[0], grams[0]) * hsic(grams[1], grams[1])
    return hsic(*grams) / np.sqrt(scale) if scale > 0 else float("nan")


def _check_embeddings(embeddings: ArrayLike, *columns: ArrayLike) -> np.ndarray:
    embeddings = np.asarray(embeddings, np.float64)
    if embeddings.ndim != 2 or not np.isfinite(embeddings).all():
        raise ValueError(f"embeddings must be finite and (rows, dimensions), not of shape {embeddings.shape}")
    if any(np.shape(column) != embeddings.shape[:1] for column in columns):
        raise ValueError(f"{len(embeddings)} embeddings need as many labels, domains and groups")
    return embeddings
