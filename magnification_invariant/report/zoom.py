"""Zoom curves in a report: AUC, Brier and CKA against micrometres per pixel, from the ``zoom.parquet`` of cells."""

import json
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from magnification_invariant import metrics
from magnification_invariant.data.splits import domain_name
from magnification_invariant.metrics.intervals import Interval
from magnification_invariant.records import POSITIVE, ZOOM
from magnification_invariant.report import pictures
from magnification_invariant.report.page import Picture, Table, interval, number
from magnification_invariant.report.runs import Run, star

SHOWN = {
    "rendered": "virtual, drawn anew",
    "crop": "constant crop",
    "field": "constant field of view",
}


class Point(NamedTuple):
    """What some runs of one method give at one scale.

    Attributes:
        mpp: micrometres per pixel at the network's input.
        auc: patient-balanced, with its 95 % interval over patients.
        brier: the same, at each run's temperature.
        cka: of the embeddings here and at the reference, mean over runs.
        reference: this is it.
    """

    mpp: float
    auc: Interval
    brier: Interval
    cka: float
    reference: bool


def zoom_blocks(networks: dict[str, list[Run]]) -> list:
    """What a report says of the zoom curves of runs; nothing if no run has any.

    A picture shows what has one held-out magnification and one range trained on.
    """
    groups = defaultdict(dict)
    for title, runs in networks.items():
        for run in runs:
            if (run.folder / ZOOM).is_file():
                groups[run.held_out, trained_range(run)].setdefault(title, []).append(run)
    rows, drawn = [], []
    for (held_out, trained), methods in sorted(groups.items(), key=lambda item: (str(item[0][0]), item[0][1])):
        curves = {title: _named(points_of(runs), domain_name(held_out)) for title, runs in methods.items()}
        first = next(iter(methods.values()))[0]
        marks = [np.unique(first.part(part)["mpp"].round(6)) for part in ("val", "test")]
        caption = (
            f"{domain_name(held_out)} held out. Grey: trained on; ticks below: acquisitions trained on; dashed: the "
            "unseen one. Bands: 95 % over patients."
        )
        name = f"zoom_{domain_name(held_out)}_{trained[0]:.3g}-{trained[1]:.3g}"
        drawn.append(Picture.drawn(name, caption, pictures.zoom, curves, trained, *marks))
        for title, of_title in curves.items():
            for (shown, source), points in of_title.items():
                name = title + star(methods[title])
                rows.append([name, domain_name(held_out), shown, source, *_cells(points)])
    if not rows:
        return []
    head = ["method", "held out", "shown", "source", "um/px"]
    head += [f"{name}, {where}" for name in ("AUC", "Brier") for where in ("finest", "reference", "coarsest")]
    return [
        "Tested patients at one scale after the other, um/px at the network's input, seen and unseen magnifications "
        "together. Virtual tissue is drawn anew at every scale. Photographs are only downsampled, as long as the short "
        "side holds the network's input: at a constant crop (as many pixels, more tissue) or a constant field of view "
        "(the same tissue in fewer tiles, which are averaged). Magnifications differ in fields and optics and are "
        "separate curves. Patient-balanced, at the fitted temperature. CKA (linear, unbiased) compares embeddings of "
        "the same fields here and at the reference, the finest scale in the range trained on.",
        *drawn,
        Table([*head, "lowest CKA"], rows),
    ]


def _named(curves: dict[tuple[str, str], list[Point]], unseen: str) -> dict[tuple[str, str], list[Point]]:
    mark = {unseen: f"{unseen} (unseen)"}
    return {(SHOWN[variant], mark.get(source, source)): points for (variant, source), points in curves.items()}


def trained_range(run: Run) -> tuple[float, float]:
    """Micrometres per pixel that the network of the run's zoom curves was trained on, continuous zoom included."""
    about = json.loads(pq.read_schema(run.folder / ZOOM).metadata[b"about"])
    return tuple(float(f"{mpp:.5g}") for mpp in about["mpp_range"])


def points_of(runs: list[Run]) -> dict[tuple[str, str], list[Point]]:
    """The curves of runs of one method, by variant and source magnification, each from fine to coarse.

    Runs are joined where they have the same scale: patients are the clusters, scores of different runs are never
    pooled.
    """
    tables = []
    for k, run in enumerate(runs):
        table = pq.read_table(run.folder / ZOOM).replace_schema_metadata()
        logits = np.array(table["logits"].to_pylist())
        probability = metrics.apply_temperature(logits, run.results["temperature"])[:, POSITIVE]
        table = table.append_column("probability", pa.array(probability))
        tables.append(table.append_column("run", pa.array(np.full(len(table), k))))
    joined = pa.concat_tables(tables)
    of = {name: np.array(joined[name].to_pylist()) for name in joined.column_names if name != "logits"}
    mpp = np.array([float(f"{value:.5g}") for value in of["mpp"]])
    curves = {}
    for variant, source in dict.fromkeys(zip(of["variant"].tolist(), of["source"].tolist(), strict=True)):
        curve = (of["variant"] == variant) & (of["source"] == source)
        curves[variant, source] = [_point(scale, of, curve & (mpp == scale)) for scale in np.unique(mpp[curve])]
    return curves


def _point(mpp: float, of: dict[str, np.ndarray], rows: np.ndarray) -> Point:
    given = [of[name][rows] for name in ("label", "probability", "patient")]
    found = (metrics.cluster_interval(name, *given, runs=of["run"][rows]) for name in ("auc", "brier"))
    cka = [of["cka"][rows & (of["run"] == run)][0] for run in np.unique(of["run"][rows])]
    return Point(float(mpp), *found, float(np.mean(cka)), bool(of["reference"][rows].all()))


def _cells(points: list[Point]) -> list[str]:
    reference = next((point for point in points if point.reference), points[0])
    chosen = points[0], reference, points[-1]
    cells = [f"{points[0].mpp:.3g} to {points[-1].mpp:.3g}, reference {reference.mpp:.3g}"]
    for name in ("auc", "brier"):
        for value, low, high in (getattr(point, name) for point in chosen):
            cells.append(f"{number(value)} {interval(low, high)}".rstrip())
    return [*cells, number(min(point.cka for point in points), 2)]
