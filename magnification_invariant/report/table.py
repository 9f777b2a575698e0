"""The paper's table, from the records of finished cells."""

import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from magnification_invariant.data.splits import domain_name
from magnification_invariant.records import Run
from magnification_invariant.report.page import markdown_table, number
from magnification_invariant.report.runs import WHAT_SCALED_IS, Row, by_title, estimate, held_outs, rows_of

WEIGHTINGS = {"patient_balanced": "each image weighs 1/n of its patient", "image": "each image weighs the same"}


def summarise(folders: Iterable[Path], part: str = "test") -> list[dict]:
    """One row a (method, setting, held-out domain), averaged over its cells (folds and seeds).

    Metrics are computed within a cell and then averaged: raw scores of different models are never pooled. AUC and Brier
    are `runs.estimate`'s, with its intervals. Floors come first; each network is followed by its row "scale-normalised"
    (see `runs.WHAT_SCALED_IS`).

    Args:
        folders: Finished cells.
        part: "test" (the unseen magnification), "test_source" (the same patients at the seen ones) or "val"; only of
            "test" there are scale-normalised rows.
    """
    runs = [Run(folder) for folder in folders]
    groups = by_title(runs)
    rows = rows_of(groups) if part == "test" else {title: Row(title, group, part) for title, group in groups.items()}
    parts = [row.at(held_out) for held_out in held_outs(runs) for row in rows.values()]
    return [_summary(row) for row in parts if row.runs]


def _summary(row: Row) -> dict:
    measured = defaultdict(list)
    for run in row.runs:
        results = run.results
        for weighting in WEIGHTINGS:
            for name, value in results["parts"][row.part][weighting].items():
                measured[weighting, name].append(value)
        if run.is_network:
            measured["uncalibrated", "brier"].append(results["uncalibrated"][row.part]["patient_balanced"]["brier"])
        if (signature := results.get("signature")) and row.part == "test":
            for name in ("size", "width", "live", "jaccard", "nogueira"):
                measured["signature", name].append(signature.get(name))
    marks = sorted({mark for run in row.runs for mark in run.marks})
    summary = {"method": row.title, "held_out": row.runs[0].held_out, "cells": len(row.runs), "marks": marks}
    summary["part"] = row.part
    for (group, name), values in measured.items():
        known = [value for value in values if value is not None and not np.isnan(value)]
        summary.setdefault(group, {})[name] = float(np.mean(known)) if known else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # too few patients for an interval: there is none in the row
        for name in ("auc", "brier"):
            value, *interval = estimate(row.runs, name, row.part)
            summary["patient_balanced"][name] = None if np.isnan(value) else value
            if not np.isnan(interval).any():
                summary[f"{name}_interval"] = interval
    return summary


def markdown(rows: list[dict], part: str = "test") -> str:
    """`summarise`'s rows as Markdown: a patient-balanced table and, below it, the same by image."""
    blocks = []
    marks = sorted({mark for row in rows for mark in row["marks"]})
    for weighting, meaning in WEIGHTINGS.items():
        head = ["method", "held out", "AUC", "F1", "bal. acc.", "Brier", "ECE"]
        if weighting == "patient_balanced":
            head += ["Brier before T", "signature", "Jaccard", "Nogueira"]
        lines = []
        for row in rows:
            scores, signature = row[weighting], row.get("signature", {})
            name = row["method"] + "".join(f" [{marks.index(mark) + 1}]" for mark in row["marks"])
            cells = [name, domain_name(row["held_out"])]
            cells += [
                number(scores[k]) for k in ("auc", "f1", "balanced_accuracy", "brier", "expected_calibration_error")
            ]
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
    scaled = [WHAT_SCALED_IS] * any(row["part"] != part for row in rows)
    return "\n\n".join([*blocks, *scaled, *notes])
