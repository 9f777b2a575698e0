"""Measures of diagnosis, calibration, stability and invariance: numpy arrays in, floats out."""

from magnification_invariant.metrics.calibration import (
    apply_temperature,
    corp_decomposition,
    debiased_calibration_error,
    expected_calibration_error,
    fit_temperature,
    reliability_curve,
    smooth_calibration_error,
)
from magnification_invariant.metrics.classification import (
    accuracy,
    auc,
    average_precision,
    balanced_accuracy,
    brier,
    by_domain,
    f1,
    log_loss,
    patient_recognition_rate,
    patient_weights,
)
from magnification_invariant.metrics.intervals import METRICS, cluster_interval, holm, paired_difference
from magnification_invariant.metrics.invariance import (
    class_conditional_mmd,
    domain_probe,
    linear_cka,
    probe_difference,
)
from magnification_invariant.metrics.selection import SELECTION_RULES, select_epoch, selected_scores
from magnification_invariant.metrics.stability import chance_jaccard, jaccard, mean_pairwise_jaccard, nogueira

__all__ = [
    "METRICS",
    "SELECTION_RULES",
    "accuracy",
    "apply_temperature",
    "auc",
    "average_precision",
    "balanced_accuracy",
    "brier",
    "by_domain",
    "chance_jaccard",
    "class_conditional_mmd",
    "cluster_interval",
    "corp_decomposition",
    "debiased_calibration_error",
    "domain_probe",
    "expected_calibration_error",
    "f1",
    "fit_temperature",
    "holm",
    "jaccard",
    "linear_cka",
    "log_loss",
    "mean_pairwise_jaccard",
    "nogueira",
    "paired_difference",
    "patient_recognition_rate",
    "patient_weights",
    "probe_difference",
    "reliability_curve",
    "select_epoch",
    "selected_scores",
    "smooth_calibration_error",
]
