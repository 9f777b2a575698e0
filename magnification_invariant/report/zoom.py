"""Zoom curves in a report: AUC, Brier and CKA against micrometres per pixel, of runs that have them."""

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from magnification_invariant import metrics
from magnification_invariant.data.splits import domain_name
from magnification_invariant.metrics.intervals import Interval
from magnification_invariant.records import POSITIVE, Run
from magnification_invariant.report import pictures
from magnification_invariant.report.page import Picture, Table, interval, number
from magnification_invariant.report.runs import star

SHOWN = {"rendered": "virtual, drawn anew", "field": "constant field of view"}


class Point(NamedTuple):
    """What some runs of one method give at one scale.

    Attributes:
        mpp: Micrometres per pixel at the network's input.
        auc: Patient-balanced, with its 95 % interval over patients.
        brier: The same, at each run's temperature.
        cka: Of the embeddings here and at the reference, mean over runs.
        reference: This is it.
    """

    mpp: float
    auc: Interval
    brier: Interval
    cka: float
    reference: bool


def zoom_blocks(networks: dict[str, list[Run]]) -> list:
    """What a report says of the zoom curves of runs; nothing if no run has any.

    A picture shows what has one held-out domain and one range trained on.
    """
    groups = defaultdict(dict)
    for title, runs in networks.items():
        for run in runs:
            if run.zoom_curves is not None:
                trained = tuple(float(f"{mpp:.5g}") for mpp in run.results["mpp_range"])
                groups[run.held_out, trained].setdefault(title, []).append(run)
    rows, drawn = [], []
    for (held_out, trained), methods in sorted(groups.items(), key=lambda item: (str(item[0][0]), item[0][1])):
        domain = domain_name(held_out)
        curves = {title: _named(points_of(runs), domain) for title, runs in methods.items()}
        first = next(iter(methods.values()))[0]
        marks = [np.unique(first.part(part)["mpp"].round(6)) for part in ("val", "test")]
        caption = (
            f"{domain} held out. Grey: trained on; ticks below: acquisitions trained on; dashed: the unseen one. "
            "Bands: 95 % over patients."
        )
        name = f"zoom_{domain}_{trained[0]:.3g}-{trained[1]:.3g}"
        drawn.append(Picture.drawn(name, caption, pictures.zoom, curves, trained, *marks))
        for title, by_source in curves.items():
            for (shown, source), points in by_source.items():
                rows.append([title + star(methods[title]), domain, shown, source, *_cells(points)])
    if not rows:
        return []
    head = ["method", "held out", "shown", "source", "um/px"]
    head += [f"{name}, {where}" for name in ("AUC", "Brier") for where in ("finest", "reference", "coarsest")]
    return [
        "Tested patients at one scale after the other, um/px at the network's input, seen and unseen magnifications "
        "together. Virtual tissue is drawn anew at every scale. Photographs are only downsampled, as long as the short "
        "side holds the network's input: the same tissue in fewer tiles, which are averaged. Magnifications differ in "
        "fields and optics and are "
        "separate curves. Patient-balanced, at the fitted temperature. CKA (linear, unbiased) compares embeddings of "
        "the same fields here and at the reference, the finest scale in the range trained on.",
        *drawn,
        Table([*head, "lowest CKA"], rows),
    ]


def _named(curves: dict[tuple[str, str], list[Point]], unseen: str) -> dict[tuple[str, str], list[Point]]:
    mark = {unseen: f"{unseen} (unseen)"}
    return {(SHOWN[variant], mark.get(source, source)): points for (variant, source), points in curves.items()}


def points_of(runs: list[Run]) -> dict[tuple[str, str], list[Point]]:
    """The curves of runs of one method, by variant and source magnification, each from fine to coarse.

    Runs are joined where they have the same scale: patients are the clusters, scores of different runs are never
    pooled.
    """
    columns = defaultdict(list)
    for k, run in enumerate(runs):
        table = run.zoom_curves
        if table is None:
            raise ValueError(f"{run.folder} has no zoom curves: magdg zoom {run.folder}")
        for name in ("variant", "source", "label", "patient", "cka", "reference"):
            columns[name].append(np.array(table[name].to_pylist()))
        columns["mpp"].append(np.array([float(f"{mpp:.5g}") for mpp in table["mpp"].to_pylist()]))
        logits = np.array(table["logits"].to_pylist())
        columns["probability"].append(metrics.apply_temperature(logits, run.temperature)[:, POSITIVE])
        columns["run"].append(np.full(len(table), k))
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    curves = {}
    for variant, source in dict.fromkeys(zip(joined["variant"].tolist(), joined["source"].tolist(), strict=True)):
        curve = (joined["variant"] == variant) & (joined["source"] == source)
        scales = np.unique(joined["mpp"][curve])
        curves[variant, source] = [_point(scale, joined, curve & (joined["mpp"] == scale)) for scale in scales]
    return curves


def _point(mpp: float, columns: dict[str, np.ndarray], rows: np.ndarray) -> Point:
    here = {name: column[rows] for name, column in columns.items()}
    given = here["label"], here["probability"], here["patient"]
    auc, brier = (metrics.cluster_interval(name, *given, runs=here["run"]) for name in ("auc", "brier"))
    cka = [here["cka"][here["run"] == run][0] for run in np.unique(here["run"])]
    return Point(float(mpp), auc, brier, float(np.mean(cka)), bool(here["reference"].all()))


def _cells(points: list[Point]) -> list[str]:
    reference = next((point for point in points if point.reference), points[0])
    chosen = points[0], reference, points[-1]
    cells = [f"{points[0].mpp:.3g} to {points[-1].mpp:.3g}, reference {reference.mpp:.3g}"]
    for name in ("auc", "brier"):
        for value, low, high in (getattr(point, name) for point in chosen):
            cells.append(f"{number(value)} {interval(low, high)}".rstrip())
    return [*cells, number(min(point.cka for point in points), 2)]
