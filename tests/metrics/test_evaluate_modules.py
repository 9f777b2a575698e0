"""The `evaluate` modules give the numbers of the functions, in batches and from several processes."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from magnification_invariant import metrics
from magnification_invariant.metrics.evaluate_modules import combined, load


def rows(n: int = 50):
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=n)
    return y, np.clip(0.3 + 0.4 * y + 0.3 * rng.standard_normal(n), 0, 1), np.array([f"14-{i % 9}" for i in range(n)])


@pytest.mark.parametrize("patient_balanced", [False, True])
def test_combined_equals_the_functions(patient_balanced):
    y, p, g = rows()
    weight = metrics.patient_weights(g) if patient_balanced else None
    expected = {name: metric(y, p, weight) for name, metric in metrics.METRICS.items()}
    modules = combined(patient_balanced)
    assert modules.compute(predictions=p, references=y, patients=g) == expected
    for start in range(0, len(y), 20):
        part = slice(start, start + 20)
        modules.add_batch(predictions=p[part], references=y[part], patients=g[part])
    assert modules.compute() == expected


def test_processes_pool_their_rows(tmp_path):
    y, p, g = rows()

    def process(rank: int):
        part = load(
            "auc",
            True,
            num_process=2,
            process_id=rank,
            experiment_id="pool",
            cache_dir=str(tmp_path),
            timeout=30,
        )
        return part.compute(predictions=p[rank::2], references=y[rank::2], patients=g[rank::2])

    with ThreadPoolExecutor(2) as pool:  # threads wait for each other's files as processes do
        first, second = pool.map(process, (0, 1))
    assert first == {"auc": pytest.approx(metrics.auc(y, p, metrics.patient_weights(g)))}
    assert second is None


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="no metric is called"):
        load("roc")
