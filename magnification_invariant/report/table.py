"""The paper's table, from the records of finished cells."""

import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from magnification_invariant.data.splits import domain_name
from magnification_invariant.report.page import markdown_table, number
from magnification_invariant.report.runs import Run, estimate

WEIGHTINGS = {"patient_balanced": "each image weighs 1/n of its patient", "image": "each image weighs the same"}


def summarise(folders: Iterable[Path], part: str = "test") -> list[dict]:
    """One row a (method, held-out magnification), averaged over its cells (folds and seeds).

    Metrics are computed within a cell and then averaged: raw scores of different models are never pooled. AUC and Brier
    are `runs.estimate`'s, with its intervals.

    Args:
        folders: finished cells.
        part: "test" (the unseen magnification), "test_source" (the same patients at the seen ones) or "val".
    """
    groups = defaultdict(list)
    for run in map(Run, map(Path, folders)):
        groups[run.title, run.held_out].append(run)
    return [_row(method, held_out, runs, part) for (method, held_out), runs in groups.items()]


def _row(method: str, held_out: int | str, runs: list[Run], part: str) -> dict:
    measured = defaultdict(list)
    for run in runs:
        results = run.results
        for weighting in WEIGHTINGS:
            for name, value in results["parts"][part][weighting].items():
                measured[weighting, name].append(value)
        if signature := results.get("signature"):
            for name in ("size", "width", "live", "jaccard", "nogueira"):
                measured["signature", name].append(signature.get(name))
            measured["uncalibrated", "brier"].append(results["uncalibrated"][part]["patient_balanced"]["brier"])
    marks = sorted({mark for run in runs for mark in run.marks})
    row = {"method": method, "held_out": held_out, "cells": len(runs), "marks": marks}
    for (group, name), values in measured.items():
        known = [value for value in values if value is not None and not np.isnan(value)]
        row.setdefault(group, {})[name] = float(np.mean(known)) if known else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # too few patients for an interval: there is none in the row
        for name in ("auc", "brier"):
            value, *interval = estimate(runs, name, part)
            row["patient_balanced"][name] = None if np.isnan(value) else value
            if not np.isnan(interval).any():
                row[f"{name}_interval"] = interval
    return row


def markdown(rows: list[dict], part: str = "test") -> str:
    """`summarise`'s rows as Markdown: a patient-balanced table and, below it, the same by image."""
    blocks = []
    marks = sorted({mark for row in rows for mark in row["marks"]})
    for weighting, meaning in WEIGHTINGS.items():
        head = ["method", "held out", "AUC", "F1", "bal. acc.", "Brier", "ECE"]
        if weighting == "patient_balanced":
            head += ["Brier before T", "signature", "Jaccard", "Nogueira"]
        lines = []
        for row in sorted(rows, key=lambda row: (row["held_out"], row["method"] not in ("constant", "colour"))):
            s, signature = row[weighting], row.get("signature", {})
            name = row["method"] + "".join(f" [{marks.index(mark) + 1}]" for mark in row["marks"])
            cells = [name, domain_name(row["held_out"])]
            cells += [number(s[k]) for k in ("auc", "f1", "balanced_accuracy", "brier", "expected_calibration_error")]
            if weighting == "patient_balanced":
                if "auc_interval" in row:
                    cells[2] += " [{:.3f}, {:.3f}]".format(*row["auc_interval"])
                size = f"{signature['size']:.0f} of {signature['width']:.0f}" if signature else "-"
                cells += [number(row.get("uncalibrated", {}).get("brier")), size]
                cells += [number(signature.get(k), 2) for k in ("jaccard", "nogueira")]
            lines.append(cells)
        title = f"{weighting.replace('_', '-')} ({meaning}), part `{part}`"
        blocks.append(f"{title}\n\n" + markdown_table(head, lines))
    notes = [f"[{i}] {mark}" for i, mark in enumerate(marks, 1)]
    return "\n\n".join([*blocks, *notes])
