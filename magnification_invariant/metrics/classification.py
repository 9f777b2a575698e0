"""How well probabilities separate and name the two classes: scikit-learn's scores, under one convention.

Every function takes `y_true` (n,) with 1 = malignant (the positive class) and 0 = benign, `y_prob` (n,) with the
probability of malignant, and an optional non-negative `sample_weight` (n,). With weights from `patient_weights` each
patient counts once, however many images were taken of it.

Bad input (NaN, labels other than 0 and 1, probabilities outside [0, 1], other lengths, no rows) is a ValueError. A
figure that the rows cannot define, such as an AUC of one class, is NaN, without a warning. scikit-learn takes a second
to import, so the first call does it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

METRICS: dict[str, Callable[..., float]] = {}
"""The registry: every metric by its name, a function `(y_true, y_prob, sample_weight=None) -> float`."""


def register(metric: Callable[..., float]) -> Callable[..., float]:
    """Puts a metric into `METRICS`; what loops over metrics (tables, cards, `evaluate` modules) shows it then."""
    METRICS[metric.__name__] = metric
    return metric


def check_binary(
    y_true: ArrayLike, y_prob: ArrayLike, sample_weight: ArrayLike | None = None, *, scores: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checks the three columns that every metric takes; with `scores`, any finite `y_prob` will do.

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

    `groups` (n,) is the patient of each image; the weights (n,) sum to the number of patients.
    """
    _, index, count = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    return 1.0 / count[index.ravel()]


def _score(
    score: Callable[..., float],
    columns: tuple[ArrayLike, ArrayLike, ArrayLike | None],
    *,
    needs: tuple[int, ...] = (),
    called: bool = False,
    scores: bool = False,
    **options: Any,
) -> float:
    """A score of scikit-learn by the conventions of this module.

    `columns` are y_true, y_prob and sample_weight; without weight in a class that it `needs`, the figure is NaN. It may
    take what is `called` malignant (probabilities from 0.5 on) or any `scores`, see `check_binary`.
    """
    positive, prob, weight = check_binary(*columns, scores=scores)
    counted = weight > 0
    y_true, y_pred = positive[counted].astype(int), (prob >= 0.5 if called else prob)[counted]
    if any(label not in y_true for label in needs):
        return float("nan")
    return float(score(y_true, y_pred, sample_weight=weight[counted], **options))


@register
def auc(y_true: ArrayLike, y_prob: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Area under the ROC curve: the chance that a malignant row outranks a benign one, ties counting ½.

    `AUC = sum_ij w_i w_j ([p_i > p_j] + ½ [p_i = p_j]) / (sum_i w_i sum_j w_j)`, i malignant, j benign (Hanley and
    McNeil 1982, with weights). Only ranks count, so scores are accepted. NaN where a class has no weight.
    """
    from sklearn.metrics import roc_auc_score

    return _score(roc_auc_score, (y_true, y_prob, sample_weight), needs=(0, 1), scores=True)


@register
def f1(y_true: ArrayLike, y_prob: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """F1 of the malignant class at 0.5: `2 TP / (2 TP + FP + FN)`; NaN if nothing is malignant or called so.

    It depends on how common malignant is: calling everything malignant scores 0.81 on BreaKHis.
    """
    from sklearn.metrics import f1_score

    return _score(f1_score, (y_true, y_prob, sample_weight), called=True, zero_division=np.nan)


@register
def accuracy(y_true: ArrayLike, y_prob: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Share of rows on the right side of 0.5 (0.5 itself is called malignant).

    With `patient_weights` it is BreaKHis' patient recognition rate, the mean over patients of the share of their images
    named rightly (Spanhol et al., IEEE TBME 63(7), 2016, equations 1 and 2).
    """
    from sklearn.metrics import accuracy_score

    return _score(accuracy_score, (y_true, y_prob, sample_weight), called=True)


@register
def balanced_accuracy(y_true: ArrayLike, y_prob: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Mean of sensitivity and specificity at 0.5; NaN where a class has no weight."""
    from sklearn.metrics import balanced_accuracy_score

    return _score(balanced_accuracy_score, (y_true, y_prob, sample_weight), needs=(0, 1), called=True)


@register
def brier(y_true: ArrayLike, y_prob: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Mean of `(y_prob - y_true)^2` (Brier 1950, one class)."""
    positive, prob, weight = check_binary(y_true, y_prob, sample_weight)
    return float(weight @ (prob - positive) ** 2)


@register
def log_loss(y_true: ArrayLike, y_prob: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Mean of `-log P(label)` in nats, with probabilities kept 2.2e-16 away from 0 and 1."""
    from sklearn import metrics

    return _score(metrics.log_loss, (y_true, y_prob, sample_weight), labels=[0, 1])
