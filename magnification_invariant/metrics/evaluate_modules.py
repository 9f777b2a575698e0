"""The metrics of this room as modules of Hugging Face's `evaluate`, without a download.

    results = combined(patient_balanced=True)
    results.add_batch(predictions=probabilities, references=labels, patients=patients)
    results.compute()

The numbers are those of the functions in `METRICS`; `evaluate` adds the collecting of batches and of processes
(`num_process`, `process_id`, `experiment_id`).
"""

from functools import cache
from typing import Any

import numpy as np

from magnification_invariant.metrics.classification import METRICS, patient_weights


@cache
def _metric_class() -> type:
    # evaluate and datasets take seconds to import, so the class is made on first use.
    import datasets
    import evaluate

    # float64: the usual float32 changes the figures in the eighth place.
    columns = {"predictions": "float64", "references": "int64", "patients": "string"}
    features = datasets.Features({name: datasets.Value(kind) for name, kind in columns.items()})
    inputs = "predictions: probability of malignant. references: 1 = malignant. patients: the patient of each image."

    class PatientMetric(evaluate.Metric):
        """One metric of `METRICS`, each image counting once or each patient."""

        def __init__(self, metric: str, patient_balanced: bool = False, **kwargs: Any):
            if metric not in METRICS:
                raise ValueError(f"no metric is called {metric!r}; there are {', '.join(METRICS)}")
            self.metric, self.patient_balanced = metric, patient_balanced
            # The configuration is part of the path of the cache file: modules that collect side by side need their own.
            super().__init__(config_name=f"{metric}-{'patients' if patient_balanced else 'images'}", **kwargs)

        def _info(self) -> evaluate.MetricInfo:
            text = METRICS[self.metric].__doc__
            return evaluate.MetricInfo(description=text, citation="", inputs_description=inputs, features=features)

        # evaluate.combine hands every module the arguments of all of them.
        def _compute(self, predictions, references, patients, **_: Any) -> dict[str, float]:
            weight = patient_weights(patients) if self.patient_balanced else None
            return {self.metric: METRICS[self.metric](np.asarray(references), np.asarray(predictions), weight)}

    return PatientMetric


def load(metric: str, patient_balanced: bool = False, **kwargs: Any):
    """Makes the `evaluate.Metric` of one of `METRICS`; its inputs are `predictions`, `references` and `patients`.

    Args:
        metric: Its name.
        patient_balanced: Whether each image weighs 1/n of its patient.
        **kwargs: For `evaluate.Metric`. By default a single process keeps its rows in memory.
    """
    return _metric_class()(metric, patient_balanced, **{"keep_in_memory": kwargs.get("num_process", 1) == 1, **kwargs})


def combined(patient_balanced: bool = False, **kwargs: Any):
    """Combines all of `METRICS` with `evaluate.combine`; arguments as in `load`."""
    import evaluate

    return evaluate.combine([load(metric, patient_balanced, **kwargs) for metric in METRICS])
