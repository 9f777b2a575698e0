"""Pictures of finished cells, as PNG: the last argument of each is a path, or a file open for writing bytes."""

from collections.abc import Iterable
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from magnification_invariant import metrics
from magnification_invariant.data.splits import domain_name
from magnification_invariant.records import NORMALISED, Run
from magnification_invariant.report.runs import by_title, held_outs, joined

CLASS_COLOURS = ("#2c7fb8", "#d95f0e")  # benign, malignant


def _figure(n: int, width: float = 4.2, height: float = 4.0):
    """A figure of `n` panels, three in a row or, of four, two."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 2 if n == 4 else min(n, 3)
    rows = -(-n // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)  # no window system and no global state
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes[n:]:
        axis.set_axis_off()
    return figure, axes[:n]


def _save(figure, path) -> None:
    """At most 256 colours, which makes a third of the bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a dollar in a name is no formula
    canvas = FigureCanvasAgg(figure)  # savefig would draw twice, once for the layout, and write a PNG to be read again
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture = picture.quantize(256, dither=Image.Dither.NONE)
    picture.save(path, "PNG", optimize=True)


def reliability(runs: Iterable[Run], path, part: str = "test") -> None:
    """Reliability as trained, at the fitted temperature and at the oracle's, a panel a row of the table.

    Patient-balanced, all runs of a method together; T is the runs' geometric mean.
    """
    panels = {}
    for title, group in by_title(runs).items():
        kinds = {
            "as trained": [1.0] * len(group),
            "scaled on validation": [run.temperature for run in group],
            "oracle: scaled on the test itself": [run.oracle_temperature(part) for run in group],
        }
        columns = {f"{kind}, T={np.exp(np.mean(np.log(used))):.2f}": used for kind, used in kinds.items()}
        columns = {kind: joined(group, part, used) for kind, used in columns.items()}
        p = next(iter(columns.values()))
        weight = np.concatenate([metrics.patient_weights(p["groups"][p["runs"] == k]) for k in range(len(group))])
        panels[title] = p["y_true"], {kind: each["y_prob"] for kind, each in columns.items()}, weight
    reliability_of(panels, path)


def reliability_of(panels: dict[str, tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]], path) -> None:
    """Reliability in bins of equal mass, a panel a title: labels (n,), probabilities (n,) by name, weights (n,)."""
    figure, axes = _figure(len(panels))
    for axis, (title, (label, kinds, weight)) in zip(axes, panels.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="0.7", lw=1)
        for name, p in kinds.items():
            curve = metrics.reliability_curve(label, p, sample_weight=weight, n_bins=8)
            brier = metrics.brier(label, p, sample_weight=weight)
            style = {"marker": "o", "ms": 4, "ls": ":" if name.startswith("oracle") else "-"}
            axis.plot(curve.predicted, curve.observed, **style, label=f"{name}, Brier {brier:.3f}")
        axis.set(title=title, xlabel="predicted probability of malignant", ylabel="observed share", aspect="equal")
        axis.legend(loc="upper left", fontsize=7)
    _save(figure, path)


def roc(runs: Iterable[Run], path, part: str = "test") -> None:
    """ROC curves, a panel a held-out magnification and a line a method: the mean of its runs' sensitivities.

    Averaged at equal specificity, patient-balanced: scores of different models are on no common scale.
    """
    runs = list(runs)
    groups, domains = by_title(runs), held_outs(runs)
    figure, axes = _figure(len(domains))
    grid = np.linspace(0, 1, 201)
    for axis, held_out in zip(axes, domains, strict=True):
        axis.plot([0, 1], [0, 1], color="0.7", lw=1)
        for title, group in groups.items():
            curves = [_sensitivity(run.part(part), grid) for run in group if run.held_out == held_out]
            if curves and group[0].method != "constant":
                axis.plot(grid, np.mean(curves, 0), label=title, lw=1.5)
        title = f"{domain_name(held_out)} held out" if part == "test" else part.replace("_", " ")
        axis.set(title=title, xlabel="1 - specificity", ylabel="sensitivity", aspect="equal")
        axis.legend(loc="lower right", fontsize=8)
    _save(figure, path)


def _sensitivity(p: dict, grid: np.ndarray) -> np.ndarray:
    """NaN without images of both classes."""
    from sklearn.metrics import roc_curve

    if len(np.unique(p["label"])) < 2:
        return np.full_like(grid, np.nan)
    weight = metrics.patient_weights(p["patient"])
    return np.interp(grid, *roc_curve(p["label"], p["probability"], sample_weight=weight)[:2])


def forest(lines: list[tuple[str, float, float, float]], xlabel: str, path) -> None:
    """Differences with their intervals, one below the other: (text, difference, low, high)."""
    figure, (axis,) = _figure(1, 8.4, 0.8 + 0.32 * len(lines))
    y = np.arange(len(lines))[::-1]
    value, low, high = np.array([line[1:] for line in lines], float).T
    axis.axvline(0, color="0.7", lw=1)
    known = np.isfinite(low)
    axis.hlines(y[known], low[known], high[known], color="#2c7fb8")
    axis.plot(value, y, "s", color="#2c7fb8", ms=5)
    axis.set(xlabel=xlabel, ylim=(-0.7, len(lines) - 0.3))
    axis.set_yticks(y, [line[0] for line in lines])
    _save(figure, path)


def cost(rows: dict[str, dict[str, tuple[float, float, float]]], title: str, path) -> None:
    """AUC of every row where it saw the scale, where it never did, and there scale-normalised.

    Args:
        rows: By title, and there by part of the records ("test", "test_normalised", "test_source"), a value and the
            ends of its interval; a part may be absent, and ends may be NaN.
    """
    from matplotlib.figure import Figure

    styles = {"test_source": ("seen", "0.45", "o"), "test": ("never seen", "C3", "s")}
    styles[NORMALISED] = ("never seen, shown at a scale that was", "C0", "D")
    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.6), layout="constrained")
    axis = figure.subplots()
    for offset, (part, (name, colour, marker)) in zip((-0.22, 0, 0.22), styles.items(), strict=True):
        there = [(i + offset, row[part]) for i, row in enumerate(rows.values()) if part in row]
        at, values = [i for i, _ in there], np.array([value for _, value in there]).reshape(-1, 3)
        error = np.abs(values[:, 1:] - values[:, :1]).T
        axis.errorbar(values[:, 0], at, xerr=error, fmt=marker, color=colour, label=name, capsize=2, markersize=5)
    axis.axvline(0.5, color="0.7", linewidth=0.8)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel("patient-balanced AUC, 95 % interval over patients")
    axis.set_title(title)
    figure.legend(loc="outside lower center", ncols=3)
    _save(figure, path)


def zoom(curves: dict[str, dict], trained: tuple[float, float], seen: np.ndarray, unseen: np.ndarray, path) -> None:
    """AUC, Brier and CKA against um/px: a row of panels a way to show, a colour a method, a line each source.

    Args:
        curves: of each method, (way to show, source) to points, see `report.zoom.points_of`.
        trained: the range of um/px trained on, grey.
        seen: um/px of the acquisitions trained on, ticks below.
        unseen: um/px of the one held out, dashed.
    """
    ways = list(dict.fromkeys(way for of_method in curves.values() for way, _ in of_method))
    figure, axes = _figure(3 * len(ways), 4.2, 3.4)
    for axis, (way, name) in zip(axes, product(ways, ("auc", "brier", "cka")), strict=True):
        axis.axvspan(*trained, color="0.93", lw=0)
        for mpp in seen:
            axis.axvline(mpp, 0, 0.06, color="0.3", lw=1.5)
        for mpp in unseen:
            axis.axvline(mpp, color="0.4", lw=1, ls="--")
        for i, (title, of_method) in enumerate(curves.items()):
            label = title
            for (_, source), points in ((key, points) for key, points in of_method.items() if key[0] == way):
                x, y = ([getattr(point, n) for point in points] for n in ("mpp", name))
                if name != "cka":
                    y, low, high = np.array(y).T
                    axis.fill_between(x, low, high, color=f"C{i}", alpha=0.15, lw=0)
                axis.plot(x, y, "o-", color=f"C{i}", ms=3, lw=1.2, label=label)
                axis.annotate("" if source == "virtual" else source, (x[-1], y[-1]), fontsize=6, color=f"C{i}")
                label = None  # one entry of the legend a method
        labels = {"auc": "AUC", "brier": "Brier", "cka": "CKA with the reference"}
        axis.set(xscale="log", xlabel="um/px at the network's input", ylabel=labels[name])
        low, high = axis.get_xlim()
        ticks = [tick for tick in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= tick <= high]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.set_title(way, fontsize=9)
        axis.legend(fontsize=7)
    _save(figure, path)


def embedding_map(run: Run, path) -> None:
    """First two principal components of the test patients' embeddings, by class and by domain.

    The components are those of the training embeddings, so that the picture is not fitted to what it shows.
    """
    train, parts = run.embeddings("train"), ("test", "test_source")
    mean = train.mean(0)
    _, _, components = np.linalg.svd(train - mean, full_matrices=False)
    points = (np.concatenate([run.embeddings(part) for part in parts]) - mean) @ components[:2].T
    keys = [run.keys(part) for part in parts]
    label, domain = (np.concatenate([each[name] for each in keys]) for name in ("label", "domain"))
    figure, (left, right) = _figure(2)
    for value, name, colour in ((0, "benign", CLASS_COLOURS[0]), (1, "malignant", CLASS_COLOURS[1])):
        left.scatter(*points[label == value].T, s=10, color=colour, label=name, alpha=0.7, lw=0)
    for value in np.unique(domain):
        name = domain_name(value) + " (unseen)" * bool(value == run.held_out)
        right.scatter(*points[domain == value].T, s=10, label=name, alpha=0.7, lw=0)
    for axis, title in ((left, "by class"), (right, "by domain")):
        axis.set(title=f"{run.folder.name}\n{title}", xlabel="first component", ylabel="second component")
        axis.legend(fontsize=8)
    _save(figure, path)


def curves(runs: Iterable[Run], path) -> None:
    """Training losses and the coefficient by epoch, means over runs.

    A panel a row of the table, and one before it for what its runs trained first.
    """
    panels = {}
    for title, group in by_title(runs).items():
        for stage, what in (("prepare", f"{title}: trained first"), ("metrics", title)):
            if losses := [line for run in group for line in run.losses(stage)]:
                panels[what] = losses
    figure, axes = _figure(len(panels))
    for axis, (title, losses) in zip(axes, panels.items(), strict=True):
        epochs = sorted({line["epoch"] for line in losses})
        for name in sorted(losses[0].keys() - {"epoch", "loss", "learning_rate"}):
            mean = [np.mean([line[name] for line in losses if line["epoch"] == epoch]) for epoch in epochs]
            axis.plot(epochs, mean, label=name.replace("_", " "))
        axis.set(title=title, xlabel="epoch", ylim=(0, None))
        axis.legend(fontsize=8)
    _save(figure, path)


def montage(ds, path: Path, width: int = 230) -> None:
    """One patient a class, one image a magnification, side by side: what the table looks like."""
    label, patient, magnification = (np.asarray(ds[name]) for name in ("label", "patient", "magnification"))
    columns, classes = np.unique(magnification), np.unique(label)
    height = round(width * 460 / 700)
    sheet = Image.new("RGB", (len(columns) * (width + 4), len(classes) * (height + 4)), "white")
    for row, value in enumerate(classes):
        person = patient[np.flatnonzero(label == value)[0]]
        for column, m in enumerate(columns):
            chosen = np.flatnonzero((patient == person) & (magnification == m))
            if len(chosen):
                image = ds[int(chosen[0])]["image"].convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
                sheet.paste(image, (column * (width + 4), row * (height + 4)))
    sheet.save(path)
