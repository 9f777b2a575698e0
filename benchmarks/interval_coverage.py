"""Coverage of the patient-clustered intervals, measured on simulated patients.

A score is a patient's effect plus an image's, both normal and of equal variance; malignant patients are shifted so that
the true AUC of an image of a random malignant patient against one of a random benign patient is known. Two models share
part of both effects; the true difference of their figures comes from 20,000 patients of each class.

Run: OMP_NUM_THREADS=1 python benchmarks/interval_coverage.py --simulations 1000
"""

import argparse
import warnings

import numpy as np
from scipy.stats import norm

from magnification_invariant.metrics import METRICS, cluster_interval, intervals, paired_difference


def simulate(n_benign: int, n_malignant: int, images: int, true_auc: float, rng: np.random.Generator):
    """Draws labels, probabilities and patients of one test set."""
    malignant = np.repeat(np.arange(n_benign + n_malignant) >= n_benign, images)
    patient = np.repeat(np.arange(n_benign + n_malignant), images)
    effect, noise = rng.standard_normal(n_benign + n_malignant), rng.standard_normal(len(patient))
    score = norm.ppf(true_auc) * np.sqrt(2) * malignant + (effect[patient] + noise) / np.sqrt(2)
    return malignant.astype(int), norm.cdf(score / 2), patient


def coverage(n_benign, n_malignant, true_auc, simulations, images=25, seed=0) -> float:
    """Share of simulated test sets whose 95 % interval holds the true AUC; a missing interval is a miss."""
    hits = 0
    for run in range(simulations):
        y_true, y_prob, patient = simulate(n_benign, n_malignant, images, true_auc, np.random.default_rng([seed, run]))
        _, low, high = cluster_interval("auc", y_true, y_prob, patient)
        hits += low <= true_auc <= high
    return hits / simulations


def simulate_pair(n_benign: int, n_malignant: int, images: int, rng: np.random.Generator):
    """Draws labels, probabilities of two models, the second the better one, and patients."""
    count = n_benign + n_malignant
    patient = np.repeat(np.arange(count), images)
    sign = np.where(patient >= n_benign, 1, -1)
    shared = 0.6 * (rng.standard_normal(count)[patient] + rng.standard_normal(len(patient)))
    own = [0.5 * (rng.standard_normal(count)[patient] + rng.standard_normal(len(patient))) for _ in range(2)]
    a, b = (norm.cdf(shift * sign + shared + effect) for shift, effect in zip((0.9, 1.2), own, strict=True))
    return (sign > 0).astype(int), a, b, patient


def paired_coverage(metric, n_benign, n_malignant, simulations, images=8) -> float:
    """Share of simulated pairs whose 95 % interval holds the true difference."""
    y_true, a, b, _ = simulate_pair(20_000, 20_000, 5, np.random.default_rng(7))
    weight = np.where(y_true, n_malignant, n_benign)
    truth = METRICS[metric](y_true, a, weight) - METRICS[metric](y_true, b, weight)
    hits = 0
    for run in range(simulations):
        drawn = simulate_pair(n_benign, n_malignant, images, np.random.default_rng([3, run]))
        _, low, high, _ = paired_difference(metric, *drawn, n_draws=1)  # the interval needs no swaps
        hits += low <= truth <= high
    return hits / simulations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=1000)
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    print("| benign/malignant patients | true AUC | coverage |\n|---|---|---|")
    intervals.FEWEST_PATIENTS = 2  # to show why the package asks for more
    for sizes in ((3, 11), (8, 18), (16, 54), (40, 80)):
        for true_auc in (0.83, 0.95):
            share = coverage(*sizes, true_auc, args.simulations)
            print(f"| {sizes[0]}/{sizes[1]} | {true_auc} | {share:.3f} |", flush=True)
    print("\n| benign/malignant patients | difference | coverage |\n|---|---|---|")
    for sizes in ((8, 18), (16, 54), (40, 80)):
        for metric in ("brier", "auc", "f1"):
            share = paired_coverage(metric, *sizes, args.simulations)
            print(f"| {sizes[0]}/{sizes[1]} | {metric} | {share:.3f} |", flush=True)


if __name__ == "__main__":
    main()
