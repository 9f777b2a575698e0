"""What signatures cost beyond the path: cross-validation with refit, refits on subsamples, exact search.

Prints CPU time, and wall time in brackets, of one thread: on synthetic embeddings (n = 6000, p = 512, 82 patients; see
signature_path.py), and of a query of an exact search in 100,000 signatures of 304 dimensions.

Run: OMP_NUM_THREADS=1 python benchmarks/signature_cost.py
"""

import argparse
import time

import numpy as np
from signature_path import embeddings
from threadpoolctl import threadpool_limits

from magnification_invariant.predict.search import nearest, unit
from magnification_invariant.signatures import SparseSignature, refit_supports


def timed(what: str, function, *arguments, **options):
    """The function's result; prints what it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*arguments, **options)
    print(f"{what}: {time.process_time() - cpu:.2f} CPU-s ({time.perf_counter() - wall:.2f} s)", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=6000)
    parser.add_argument("--p", type=int, default=512)
    parser.add_argument("--subsamples", type=int, default=100)
    parser.add_argument("--rows", type=int, default=100_000)
    args = parser.parse_args()
    with threadpool_limits(1):
        X, y, patient = embeddings(args.n, args.p)
        SparseSignature(n_lambdas=3).fit(X[:300, :20], y[:300], patient[:300])  # imports
        signature = timed("path, 5-fold cross-validation by patient", SparseSignature().fit, X, y, patient)
        print(f"  {len(signature.signature_)} of {args.p} dimensions")
        what = f"{args.subsamples} refits on halves of the patients"
        supports = timed(what, refit_supports, signature, X, y, groups=patient, n_subsamples=args.subsamples)
        print(f"  {supports.sum(axis=1).mean():.0f} dimensions on average")

        rng = np.random.default_rng(0)
        gallery = unit(rng.standard_normal((args.rows, 304), np.float32))
        for m in (1, 16, 64):
            queries = unit(rng.standard_normal((m, 304), np.float32))
            nearest(queries, gallery, 10)
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(5):
                nearest(queries, gallery, 10)
            cpu, wall = (
                (now - then) / 5 / m * 1e3 for now, then in ((time.process_time(), cpu), (time.perf_counter(), wall))
            )
            print(
                f"exact search of {args.rows:,} x 304, {m} queries at a time: {cpu:.2f} CPU-ms a query ({wall:.2f} ms)"
            )


if __name__ == "__main__":
    main()
