"""The path solver of signatures against scikit-learn's liblinear, in turns on the same data.

Prints CPU seconds of a 30-point path, the ratio, the relative suboptimality of both and the Jaccard index of their
supports with those of a reference whose optimality conditions hold to 1e-8 of the penalty. liblinear is given what
suits it best: a scaled intercept, so that its penalty on it hardly counts, and its default tolerance; it cannot start
from the last solution. Times of one thread.

Run: OMP_NUM_THREADS=1 python benchmarks/signature_path.py --p 512 --repeats 3
     OMP_NUM_THREADS=1 python benchmarks/signature_path.py --p 1920 --repeats 1
"""

import argparse
import time
import warnings

import numpy as np
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from magnification_invariant.metrics import jaccard
from magnification_invariant.signatures import l1_logistic_path


def embeddings(n: int, p: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Standardised non-negative, heavy-tailed, correlated columns (n, p) of 82 patients; their labels and patients."""
    rng = np.random.default_rng(seed)
    patient, magnification = rng.integers(82, size=n), rng.integers(4, size=n)
    y = (patient >= 24).astype(int)
    factors = 64
    z = rng.standard_t(5, (n, factors)) + 0.7 * rng.standard_normal((82, factors))[patient]
    z += 0.5 * rng.standard_normal((4, factors))[magnification]
    effect = np.zeros(factors)
    effect[rng.choice(factors, 40, replace=False)] = 0.5 * rng.standard_normal(40)
    z += np.outer(y - 0.5, effect)
    loading = rng.standard_normal((factors, p)) / np.sqrt(1 + np.arange(factors))[:, None]
    x = z @ loading / 3 + 0.1 * rng.standard_normal((n, p))
    x = np.logaddexp(0, 3 * x) ** 1.6
    return np.asfortranarray((x - x.mean(axis=0)) / x.std(axis=0)), y, patient


def objective(X, y, penalty, coef, intercept) -> float:
    eta = X @ coef + intercept
    return float(np.mean(np.logaddexp(0, eta) - y * eta) + penalty * np.abs(coef).sum())


def kkt(X, y, penalty, coef, intercept) -> float:
    residual = (expit(X @ coef + intercept) - y) / len(y)
    gradient = X.T @ residual
    active = np.where(coef != 0, np.abs(gradient + penalty * np.sign(coef)), np.abs(gradient) - penalty)
    return max(active.max(), abs(residual.sum())) / penalty


def liblinear_path(X, y, lambdas):
    coefs, intercepts = [], []
    for penalty in lambdas:
        model = LogisticRegression(
            C=1 / (len(y) * penalty), l1_ratio=1.0, solver="liblinear", intercept_scaling=100, tol=1e-4, max_iter=1000
        ).fit(X, y)
        coefs.append(model.coef_[0])
        intercepts.append(model.intercept_[0])
    return lambdas, np.array(coefs), np.array(intercepts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=6000)
    parser.add_argument("--p", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    X, y, _ = embeddings(args.n, args.p)
    l1_logistic_path(X[:200, :20], y[:200], n_lambdas=3)  # imports
    reference = l1_logistic_path(X, y, tol=1e-8)
    lambdas, best, _ = reference
    certificate = max(kkt(X, y, *point) for point in zip(*reference, strict=True))
    optimum = np.array([objective(X, y, *point) for point in zip(*reference, strict=True)])
    print(f"n={args.n} p={args.p}, support {np.count_nonzero(best, axis=1).tolist()}")
    print(f"reference: KKT violation at most {certificate:.1e} of the penalty")
    solvers = {"ours": lambda: l1_logistic_path(X, y), "liblinear": lambda: liblinear_path(X, y, lambdas)}
    seconds = {name: [] for name in solvers}
    with threadpool_limits(1):
        for _ in range(args.repeats):
            for name, solve in solvers.items():
                start = time.process_time()
                found = solve()
                seconds[name].append(time.process_time() - start)
                gap = [objective(X, y, *point) for point in zip(*found, strict=True)] / optimum - 1
                same = [jaccard(a != 0, b != 0) for a, b in zip(found[1][1:], best[1:], strict=True)]
                print(
                    f"{name:10s} {seconds[name][-1]:7.2f} CPU-s   suboptimality at most {gap.max():.1e}   "
                    f"support Jaccard at least {min(same):.4f}, mean {np.mean(same):.4f}",
                    flush=True,
                )
    print(f"ratio of medians: {np.median(seconds['ours']) / np.median(seconds['liblinear']):.3f}")


if __name__ == "__main__":
    main()
