"""The signature table of finished cells, and what their signatures retrieve: Markdown on standard output.

Per cell about a second (p = 512, 30 halves of the patients) to half a minute; refits are kept in the cells' folders.

Run: OMP_NUM_THREADS=1 python benchmarks/signature_table.py RUNS > signatures.md
"""

import argparse
from collections import defaultdict
from itertools import product
from pathlib import Path

import numpy as np

from magnification_invariant.metrics import patient_weights
from magnification_invariant.predict.search import nearest, unit
from magnification_invariant.records import Run
from magnification_invariant.report.page import Table, markdown
from magnification_invariant.report.runs import by_title, read_runs
from magnification_invariant.report.signatures import signature_sections
from magnification_invariant.signatures import SignatureProjector

KS = (5, 10)


def representations(run: Run) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Vectors (n, d) of the tested images by representation, and the keys of their rows."""
    projector, parts = SignatureProjector.from_pretrained(run.model), ("test", "test_source")
    train, x = run.embeddings("train"), np.concatenate([run.embeddings(part) for part in parts])
    keys = [run.keys(part) for part in parts]
    signature, live = projector.transform(x), train.std(0) > 0
    vectors = {
        "signature": signature,
        "weighted": signature * np.abs(projector.weight).max(0),
        "embedding": (x[:, live] - train[:, live].mean(0)) / train[:, live].std(0),
    }
    return vectors, {name: np.concatenate([each[name] for each in keys]) for name in keys[0]}


def precision(vectors: np.ndarray, keys: dict[str, np.ndarray], query: np.ndarray, gallery: np.ndarray) -> list[float]:
    """Share of cases of other patients that have the query's class: of all, and of the `KS` nearest.

    Args:
        vectors: (n, d) of unit length.
        keys: label and patient, (n,).
        query: (n,) booleans, which rows ask.
        gallery: (n,) booleans, which rows can be found.
    """
    label, patient = keys["label"], keys["patient"]
    rows, _ = nearest(vectors[query], vectors[gallery], max(KS), patient[query], patient[gallery])
    same = np.where(rows >= 0, label[gallery][rows] == label[query][:, None], np.nan)
    others = patient[query][:, None] != patient[gallery]
    alike = others & (label[query][:, None] == label[gallery])
    shares = [alike.sum(1) / others.sum(1), *(np.nanmean(same[:, :k], axis=1) for k in KS)]
    return [np.average(share, weights=patient_weights(patient[query])) for share in shares]


def retrieval_section(runs: list[Run]) -> tuple[str, list]:
    """Precision by representation, from a magnification to the same and to the others, means over cells."""
    rows = []
    for title, group in by_title(runs).items():
        figures = defaultdict(list)
        for run in group:
            if not run.is_network or not run.results["signature"]["size"]:
                continue
            vectors, keys = representations(run)
            for (name, x), asked, given in product(vectors.items(), *[np.unique(keys["domain"])] * 2):
                where = "same magnification" if asked == given else "another magnification"
                shares = precision(unit(x), keys, keys["domain"] == asked, keys["domain"] == given)
                figures[name, where].append([x.shape[1], *shares])
        for (name, where), values in figures.items():
            width, *shares = np.mean(values, axis=0)
            rows.append([title, name, where, f"{width:.0f}", *(f"{share:.3f}" for share in shares)])
    head = ["method", "by", "gallery", "width", "chance", *(f"precision at {k}" for k in KS)]
    text = (
        "Share of the nearest cases of other tested patients that have the query's class, every patient weighing the "
        "same; the signature, its columns weighted by their coefficients, and the full embedding."
    )
    return "Retrieval", [text, Table(head, rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of cells, or folders that hold them")
    parser.add_argument("--subsamples", type=int, default=30, help="halves of the patients (default: 30)")
    args = parser.parse_args()
    runs = read_runs(args.runs)
    print(markdown("Signatures", [*signature_sections(runs, args.subsamples), retrieval_section(runs)]))


if __name__ == "__main__":
    main()
