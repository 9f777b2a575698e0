"""The paper's table, from the records of finished cells."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from magnification_invariant.data.splits import domain_name
from magnification_invariant.metrics.evaluate_modules import combined
from magnification_invariant.records import last_epoch, part_of

WEIGHTINGS = {"patient_balanced": "each image weighs 1/n of its patient", "image": "each image weighs the same"}


def summarise(folders: Iterable[Path], part: str = "test") -> list[dict]:
    """One row a (method, held-out magnification), averaged over its cells (folds and seeds).

    Metrics are computed within a cell and then averaged: raw scores of different models are never pooled.

    Args:
        folders: finished cells.
        part: "test" (the unseen magnification), "test_source" (the same patients at the seen ones) or "val".
    """
    groups = defaultdict(list)
    for folder in map(Path, folders):
        config = json.loads((folder / "config.json").read_text())
        arguments = config["arguments"]
        zoom = "" if not arguments["zoom"] or "start" not in config else " + zoom"
        groups[arguments["method"] + zoom, arguments["held_out"]].append((folder, config))
    return [_row(method, held_out, cells, part) for (method, held_out), cells in groups.items()]


def _row(method: str, held_out: int | str, cells: list, part: str) -> dict:
    measured = defaultdict(list)
    intervals, marks = [], set()
    for folder, config in cells:
        results = json.loads((folder / "results.json").read_text())
        records = last_epoch(folder)
        tested = part_of(records, part, results["temperature"])
        for weighting in WEIGHTINGS:
            scores = combined(patient_balanced=weighting == "patient_balanced").compute(
                predictions=tested["probability"], references=tested["label"], patients=tested["patient"]
            )
            for name, value in scores.items():
                measured[weighting, name].append(value)
        intervals.append(results["parts"][part]["interval"]["auc"])
        if signature := results.get("signature"):
            for name in ("size", "width", "live", "jaccard", "nogueira"):
                measured["signature", name].append(signature.get(name))
            measured["uncalibrated", "brier"].append(results["uncalibrated"][part]["patient_balanced"]["brier"])
        if config.get("start", {}).get("saw_test"):
            marks.add("the start had seen the test")
        if results.get("gan", {}).get("collapsed"):
            marks.add("the generator failed its collapse check")
        if any(results.get("rescaled", {}).values()):
            marks.add("rescaled: some images are digital zoom, not photographed at their magnification")
        model = folder / "model" / "config.json"
        if config["arguments"]["zoom"] and model.exists():
            low, high = json.loads(model.read_text())["mpp_range"]
            mpp = np.asarray(records.filter(pc.equal(records["part"], part))["mpp"])
            if np.all((mpp >= low) & (mpp <= high)):
                marks.add("unseen optics, scale simulated")
    row = {"method": method, "held_out": held_out, "cells": len(cells), "marks": sorted(marks)}
    for (group, name), values in measured.items():
        known = [value for value in values if value is not None and not np.isnan(value)]
        row.setdefault(group, {})[name] = float(np.mean(known)) if known else None
    if len(cells) == 1 and intervals[0]:
        row["auc_interval"] = intervals[0]
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
            cells += [_number(s[k]) for k in ("auc", "f1", "balanced_accuracy", "brier", "expected_calibration_error")]
            if weighting == "patient_balanced":
                if "auc_interval" in row:
                    cells[2] += " [{:.3f}, {:.3f}]".format(*row["auc_interval"])
                size = f"{signature['size']:.0f} of {signature['width']:.0f}" if signature else "-"
                cells += [_number(row.get("uncalibrated", {}).get("brier")), size]
                cells += [_number(signature.get(k), 2) for k in ("jaccard", "nogueira")]
            lines.append(cells)
        title = f"{weighting.replace('_', '-')} ({meaning}), part `{part}`"
        blocks.append(f"{title}\n\n" + _markdown_table(head, lines))
    notes = [f"[{i}] {mark}" for i, mark in enumerate(marks, 1)]
    return "\n\n".join([*blocks, *notes])


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _markdown_table(head: list[str], lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    rows = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    top = "| " + " | ".join(cell.ljust(w) for cell, w in zip(head, widths, strict=True)) + " |"
    return "\n".join([top, "|" + "|".join("-" * (w + 2) for w in widths) + "|", *rows])
