"""Measures of diagnosis, calibration, stability and invariance: numpy arrays in, floats out."""

from magnification_invariant.metrics.classification import (
    METRICS,
    accuracy,
    auc,
    balanced_accuracy,
    brier,
    f1,
    log_loss,
    patient_weights,
)

from magnification_invariant.metrics.calibration import (  # isort: skip  (after the scores: the order of METRICS)
    apply_temperature,
    corp_decomposition,
    expected_calibration_error,
    fit_temperature,
    recalibration,
    reliability_curve,
)
from magnification_invariant.metrics.intervals import cluster_interval, holm, paired_difference
from magnification_invariant.metrics.invariance import (
    domain_probe,
    knn_reading,
    linear_cka,
    probe_difference,
    robustness_index,
)
from magnification_invariant.metrics.stability import chance_jaccard, jaccard, nogueira

__all__ = ["METRICS", "accuracy", "auc", "balanced_accuracy", "brier", "f1", "log_loss"]
__all__ += ["apply_temperature", "corp_decomposition", "expected_calibration_error", "fit_temperature"]
__all__ += ["cluster_interval", "holm", "paired_difference", "patient_weights", "reliability_curve"]
__all__ += ["chance_jaccard", "domain_probe", "jaccard", "knn_reading", "linear_cka", "nogueira", "probe_difference"]
__all__ += ["recalibration", "robustness_index"]
