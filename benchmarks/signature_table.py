"""The signature table of finished cells, and what their signatures retrieve: Markdown on standard output.

Per cell about a second (p = 512, 30 halves of the patients) to half a minute; refits are kept in the cells' folders.

Run: OMP_NUM_THREADS=1 python benchmarks/signature_table.py RUNS > signatures.md
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from magnification_invariant.predict.search import retrieval
from magnification_invariant.report.page import Table, markdown
from magnification_invariant.report.runs import by_title, read_runs
from magnification_invariant.report.signatures import signature_sections


def retrieval_section(folders: list[Path]) -> tuple[str, list]:
    """Precision by representation, from a magnification to the same and to the others, means over cells."""
    rows = []
    for title, runs in by_title(read_runs(folders)).items():
        found = defaultdict(list)
        for run in runs:
            if run.is_network and run.results["signature"]["size"]:
                for row in retrieval(run.folder):
                    where = "same magnification" if row["query"] == row["gallery"] else "another magnification"
                    figures = [row["chance"], row[5]["precision"], row[10]["precision"], *row[10]["by_class"].values()]
                    found[row["representation"], where].append([row["width"], *figures])
        for (name, where), figures in found.items():
            mean = np.mean(figures, axis=0)
            rows.append([title, name, where, f"{mean[0]:.0f}", *(f"{value:.3f}" for value in mean[1:])])
    head = [
        "method",
        "by",
        "gallery",
        "width",
        "chance",
        "precision at 5",
        "at 10",
        "at 10, benign",
        "at 10, malignant",
    ]
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
    sections = [*signature_sections(read_runs(args.runs), args.subsamples), retrieval_section(args.runs)]
    print(markdown("Signatures", sections))


if __name__ == "__main__":
    main()
