"""Coverage of the patient-clustered intervals of the AUC, measured on simulated patients.

A score is a patient's effect plus an image's, both normal and of equal variance; malignant patients are shifted so that
the true AUC of an image of a random malignant patient against one of a random benign patient is known.

Run: OMP_NUM_THREADS=1 python benchmarks/interval_coverage.py --simulations 1000
"""

import argparse
import warnings

import numpy as np
from scipy.stats import norm

from magnification_invariant.metrics import cluster_interval, intervals


def simulate(n_benign: int, n_malignant: int, images: int, true_auc: float, rng: np.random.Generator):
    """Draws labels, probabilities and patients of one test set."""
    malignant = np.repeat(np.arange(n_benign + n_malignant) >= n_benign, images)
    patient = np.repeat(np.arange(n_benign + n_malignant), images)
    effect, noise = rng.standard_normal(n_benign + n_malignant), rng.standard_normal(len(patient))
    score = norm.ppf(true_auc) * np.sqrt(2) * malignant + (effect[patient] + noise) / np.sqrt(2)
    return malignant.astype(int), norm.cdf(score / 2), patient


def coverage(n_benign, n_malignant, true_auc, method, simulations, images=25, n_draws=500, seed=0) -> float:
    """Share of simulated test sets whose 95 % interval holds the true AUC; a missing interval is a miss."""
    hits = 0
    for run in range(simulations):
        y_true, y_prob, patient = simulate(n_benign, n_malignant, images, true_auc, np.random.default_rng([seed, run]))
        _, low, high = cluster_interval("auc", y_true, y_prob, patient, method, n_draws=n_draws, seed=run)
        hits += low <= true_auc <= high
    return hits / simulations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=1000)
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    print("| benign/malignant patients | true AUC | t | bootstrap |\n|---|---|---|---|")
    intervals.FEWEST_PATIENTS = 2  # to show why the package asks for more
    for sizes in ((3, 11), (8, 18), (16, 54), (40, 80)):
        for true_auc in (0.83, 0.95):
            found = [coverage(*sizes, true_auc, method, args.simulations) for method in ("t", "bootstrap")]
            print(f"| {sizes[0]}/{sizes[1]} | {true_auc} | {found[0]:.3f} | {found[1]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
