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
from magnification_invariant.metrics.stability import chance_jaccard, jaccard, mean_pairwise_jaccard, nogueira

METRICS = {
    "auc": auc,
    "average_precision": average_precision,
    "f1": f1,
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "brier": brier,
    "log_loss": log_loss,
    "expected_calibration_error": expected_calibration_error,
    "debiased_calibration_error": debiased_calibration_error,
    "smooth_calibration_error": smooth_calibration_error,
}
"""Metrics by name, all of the form `(y_true, y_prob, sample_weight=None) -> float`."""

__all__ = [
    "METRICS",
    "apply_temperature",
    "by_domain",
    "chance_jaccard",
    "corp_decomposition",
    "fit_temperature",
    "jaccard",
    "mean_pairwise_jaccard",
    "nogueira",
    "patient_recognition_rate",
    "patient_weights",
    "reliability_curve",
    *METRICS,
]
