"""How well probabilities separate and name the two classes.

Every function takes `y_true` (n,) with 1 = malignant (the positive class) and 0 = benign, `y_prob` (n,) with the
probability of malignant, and an optional non-negative `sample_weight` (n,). With weights from `patient_weights` each
patient counts once, however many images were taken of it.

Bad input (NaN, labels other than 0 and 1, probabilities outside [0, 1], other lengths, no rows) is a ValueError. A
figure that the rows cannot define, such as an AUC of one class, is NaN, without a warning.
"""

import numpy as np
from numpy.typing import ArrayLike


def check_binary(
    y_true: ArrayLike, y_prob: ArrayLike, sample_weight: ArrayLike | None = None, *, scores: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checks the three columns that every metric takes.

    Args:
        y_true: (n,) labels, 0 or 1.
        y_prob: (n,) probabilities of class 1; with `scores` any finite numbers.
        sample_weight: (n,) non-negative weights with a positive sum; None weighs all rows alike.
        scores: Whether `y_prob` only has to rank the rows.

    Returns:
        `y_true` as bool, `y_prob` and the weights (summing to 1) as float64.

    Raises:
        ValueError: With the column and what is wrong with it.
    """
    y_true, y_prob = np.asarray(y_true), np.asarray(y_prob, np.float64)
    weight = np.ones(y_true.shape) if sample_weight is None else np.asarray(sample_weight, np.float64)
    if y_true.ndim != 1 or not y_true.size or y_true.shape != y_prob.shape or y_true.shape != weight.shape:
        raise ValueError(
            "y_true, y_prob and sample_weight must be one-dimensional, not empty and of one length, "
            f"not {y_true.shape}, {y_prob.shape} and {weight.shape}; y_prob holds the probability of malignant alone"
        )
    if not ((y_true == 0) | (y_true == 1)).all():
        raise ValueError(f"y_true must hold 0 (benign) and 1 (malignant), not {np.unique(y_true)[:5].tolist()}")
    if not np.isfinite(y_prob).all():
        raise ValueError(f"y_prob has {np.sum(~np.isfinite(y_prob))} rows that are NaN or infinite")
    if not scores and not (y_prob.min() >= 0 and y_prob.max() <= 1):
        raise ValueError(f"y_prob must lie in [0, 1], not {y_prob.min():g} to {y_prob.max():g}; pass no logits here")
    if not np.isfinite(weight).all() or weight.min() < 0 or weight.sum() <= 0:
        raise ValueError("sample_weight must be finite and non-negative, with a positive sum")
    return y_true.astype(bool), y_prob, weight / weight.sum()


def patient_weights(groups: ArrayLike) -> np.ndarray:
    """Gives each image 1/n, n the number of images of its patient, so that every patient weighs 1.

    Args:
        groups: (n,) patient of each image.

    Returns:
        (n,) weights that sum to the number of patients.
    """
    _, index, count = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    return 1.0 / count[index.ravel()]


def auc(y_true: ArrayLike, y_prob: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Weighted area under the ROC curve: the chance that a malignant row outranks a benign one, ties counting ½.

    `AUC = sum_ij w_i w_j ([p_i > p_j] + ½ [p_i = p_j]) / (sum_i w_i sum_j w_j)`, i malignant, j benign (Hanley and
    McNeil 1982, with weights). Any increasing transform of `y_prob` gives the same figure, so scores are accepted.

    Returns:
        A figure in [0, 1]; NaN where a class has no weight.
    """
    positive, score, weight = check_binary(y_true, y_prob, sample_weight, scores=True)
    _, rank = np.unique(score, return_inverse=True)
    malignant = np.bincount(rank, weight * positive)
    benign = np.bincount(rank, weight * ~positive)
    if not malignant.sum() or not benign.sum():
        return float("nan")
    below = np.cumsum(benign) - benign / 2
    return float(malignant @ below / (malignant.sum() * benign.sum()))


def average_precision(y_true: ArrayLike, y_prob: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Area under the precision-recall curve as a step function: `sum_t (R_t - R_{t-1}) P_t` over falling thresholds.

    The definition of scikit-learn: no interpolation, tied rows enter together. Scores are accepted.

    Returns:
        A figure in [0, 1]; NaN without malignant rows.
    """
    positive, score, weight = check_binary(y_true, y_prob, sample_weight, scores=True)
    _, rank = np.unique(-score, return_inverse=True)
    malignant, everything = np.bincount(rank, weight * positive), np.bincount(rank, weight)
    if not malignant.sum():
        return float("nan")
    seen = np.cumsum(everything)
    precision = np.divide(np.cumsum(malignant), seen, out=np.zeros_like(seen), where=seen > 0)
    return float(malignant @ precision / malignant.sum())


def _confusion(y_true, y_prob, sample_weight) -> tuple[float, float, float, float]:
    """Weight of true positives, false negatives, false positives and true negatives at the threshold 0.5."""
    positive, prob, weight = check_binary(y_true, y_prob, sample_weight)
    called = prob >= 0.5
    return tuple(float(weight[a & b].sum()) for a in (positive, ~positive) for b in (called, ~called))


def accuracy(y_true: ArrayLike, y_prob: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Weighted share of rows on the right side of 0.5 (0.5 itself is called malignant)."""
    tp, _, _, tn = _confusion(y_true, y_prob, sample_weight)
    return tp + tn


def f1(y_true: ArrayLike, y_prob: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """F1 of the malignant class at 0.5: `2 TP / (2 TP + FP + FN)`; NaN if nothing is malignant or called so.

    It depends on how common malignant is: calling everything malignant scores 0.81 on BreaKHis.
    """
    tp, fn, fp, _ = _confusion(y_true, y_prob, sample_weight)
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else float("nan")


def balanced_accuracy(y_true: ArrayLike, y_prob: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Mean of sensitivity and specificity at 0.5; NaN where a class has no weight."""
    tp, fn, fp, tn = _confusion(y_true, y_prob, sample_weight)
    return (tp / (tp + fn) + tn / (tn + fp)) / 2 if tp + fn and tn + fp else float("nan")


def brier(y_true: ArrayLike, y_prob: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Weighted mean of `(y_prob - y_true)^2` (Brier 1950, one class)."""
    positive, prob, weight = check_binary(y_true, y_prob, sample_weight)
    return float(weight @ (prob - positive) ** 2)


def log_loss(y_true: ArrayLike, y_prob: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Weighted mean of `-log P(label)` in nats, with probabilities kept 2.2e-16 away from 0 and 1."""
    positive, prob, weight = check_binary(y_true, y_prob, sample_weight)
    eps = np.finfo(np.float64).eps
    return float(-weight @ np.log(np.clip(np.where(positive, prob, 1 - prob), eps, 1 - eps)))


def patient_recognition_rate(
    y_true: ArrayLike, y_prob: ArrayLike, groups: ArrayLike, sample_weight: ArrayLike | None = None
) -> float:
    """BreaKHis' patient recognition rate: the mean over patients of the share of their images named rightly.

    Source: Spanhol et al., "A Dataset for Breast Cancer Histopathological Image Classification", IEEE TBME 63(7),
    2016, equations 1 and 2. It equals `accuracy` with `patient_weights`.

    Args:
        y_true: (n,) labels.
        y_prob: (n,) probabilities of malignant.
        groups: (n,) patient of each image.
        sample_weight: (n,) weights of the images within their patient.

    Returns:
        A figure in [0, 1]; patients without weight are left out.
    """
    positive, prob, weight = check_binary(y_true, y_prob, sample_weight)
    groups = np.asarray(groups)
    if groups.shape != prob.shape:
        raise ValueError(f"groups must give one patient a row: {groups.shape} for {prob.shape[0]} rows")
    _, patient = np.unique(groups, return_inverse=True)
    total, right = np.bincount(patient, weight), np.bincount(patient, weight * ((prob >= 0.5) == positive))
    return float(np.mean(right[total > 0] / total[total > 0]))


def by_domain(
    metric, y_true: ArrayLike, y_prob: ArrayLike, domains: ArrayLike, sample_weight: ArrayLike | None = None
) -> dict:
    """Applies a metric within each domain; take `min` or `max` of the values for the worst domain.

    Args:
        metric: A function `(y_true, y_prob, sample_weight) -> float` of this package.
        y_true: (n,) labels.
        y_prob: (n,) probabilities of malignant.
        domains: (n,) domain of each row, the magnification for BreaKHis.
        sample_weight: (n,) weights.

    Returns:
        The figure of each domain, in order of the domains.
    """
    positive, prob, weight = check_binary(y_true, y_prob, sample_weight, scores=True)
    domains = np.asarray(domains)
    return {d.item(): metric(positive[m], prob[m], weight[m]) for d in np.unique(domains) for m in [domains == d]}
