"""Pictures of finished cells, as PNG."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import safetensors.numpy

from magnification_invariant import metrics
from magnification_invariant.data.splits import domain_name
from magnification_invariant.records import last_epoch, part_of

CLASS_COLOURS = ("#2c7fb8", "#d95f0e")  # benign, malignant


def _figure(n: int):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * n, 4.0), layout="constrained")
    FigureCanvasAgg(figure)  # no window system and no global state
    return figure, np.atleast_1d(figure.subplots(1, n))


def reliability(folders: Iterable[Path], path: Path, part: str = "test") -> None:
    """Reliability before and after temperature scaling, a panel a cell; bins of equal mass, patient-balanced."""
    folders = [Path(folder) for folder in folders]
    figure, axes = _figure(len(folders))
    for axis, folder in zip(axes, folders, strict=True):
        results = json.loads((folder / "results.json").read_text())
        records = last_epoch(folder)
        axis.plot([0, 1], [0, 1], color="0.7", lw=1)
        for temperature, label, colour in ((1.0, "as trained", "0.5"), (results["temperature"], "scaled", "#31a354")):
            p = part_of(records, part, temperature)
            weight = metrics.patient_weights(p["patient"])
            curve = metrics.reliability_curve(p["label"], p["probability"], sample_weight=weight, n_bins=8)
            brier = metrics.brier(p["label"], p["probability"], sample_weight=weight)
            axis.plot(
                curve.predicted,
                curve.observed,
                "o-",
                color=colour,
                ms=4,
                label=f"{label} (T={temperature:.2f}), Brier {brier:.3f}",
            )
        axis.set(
            title=folder.name, xlabel="predicted probability of malignant", ylabel="observed share", aspect="equal"
        )
        axis.legend(loc="upper left", fontsize=8)
    figure.savefig(path, dpi=110)


def embedding_map(folder: Path, path: Path) -> None:
    """First two principal components of the test patients' embeddings, by class and by magnification.

    The components are those of the training embeddings, so that the picture is not fitted to what it shows.
    """
    tensors = safetensors.numpy.load_file(Path(folder) / "embeddings.safetensors")
    train = tensors["train.embedding"]
    _, _, axes_ = np.linalg.svd(train - train.mean(0), full_matrices=False)
    parts = ("test", "test_source")
    points = np.concatenate([tensors[f"{part}.embedding"] for part in parts])
    points = (points - train.mean(0)) @ axes_[:2].T
    records = last_epoch(folder)
    shown = {
        name: np.concatenate([np.asarray(records.filter(pc.equal(records["part"], part))[name]) for part in parts])
        for name in ("label", "domain", "held_out")
    }
    figure, (left, right) = _figure(2)
    for value, name, colour in ((0, "benign", CLASS_COLOURS[0]), (1, "malignant", CLASS_COLOURS[1])):
        chosen = shown["label"] == value
        left.scatter(*points[chosen].T, s=10, color=colour, label=name, alpha=0.7, lw=0)
    for domain in np.unique(shown["domain"]):
        chosen = shown["domain"] == domain
        unseen = " (unseen)" if domain == shown["held_out"][0] else ""
        right.scatter(*points[chosen].T, s=10, label=f"{domain_name(domain)}{unseen}", alpha=0.7, lw=0)
    for axis, title in ((left, "by class"), (right, "by magnification")):
        axis.set(title=f"{Path(folder).name}\n{title}", xlabel="first component", ylabel="second component")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def curves(folders: Iterable[Path], path: Path) -> None:
    """Training losses and the coefficient by epoch, a panel a cell."""
    folders = [Path(folder) for folder in folders if (Path(folder) / "metrics.jsonl").exists()]
    figure, axes = _figure(len(folders))
    for axis, folder in zip(axes, folders, strict=True):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for name in sorted(lines[0].keys() - {"epoch", "loss", "learning_rate"}):
            axis.plot([line["epoch"] for line in lines], [line[name] for line in lines], label=name.replace("_", " "))
        axis.set(title=folder.name, xlabel="epoch", ylim=(0, None))
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def montage(ds, path: Path, width: int = 230) -> None:
    """One patient a class, one image a magnification, side by side: what the table looks like."""
    from PIL import Image

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
