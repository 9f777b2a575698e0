"""Which way of showing an image to a network is best: version 0.1's two and today's, on development patients.

    python benchmarks/views.py --seeds 0 1 --out benchmarks/results/views.md

Small networks (ERM, with and without continuous zoom) are trained without 40X and without 400X. The same networks then
see the same tested images in four ways:

- *centre*: 0.1's records. The short side at size / 0.875 pixels, of which the middle is cut out.
- *tiles in the trained range*: 0.1's `Classifier`. No coarser than the image is, no finer than the range's fine end, in
  as many tiles as that takes.
- *protocol* and *normalised*: see `magnification_invariant.data.views`.

Means over held-outs and seeds of patient-balanced AUC and Brier (each rule with its own temperature, fitted on the
validation patients shown in the same way), and seconds an image, decoding included, on one thread.
"""

import argparse
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

FIRST_PATIENT, PATIENTS = 6_400, 150  # development
RULES = ("centre", "tiles in the trained range", "protocol", "normalised")


def tiles_of(rule: str, image, native: float, size: int, base_range, mpp_range) -> np.ndarray:
    """uint8 tiles (k, 3, size, size) of an RGB image by a rule."""
    from magnification_invariant.data.views import CROP_PCT, field_mpp, show, tiles, view_mpp

    field = field_mpp(native, min(image.size), size)
    if rule == "centre":
        pixels = show(image, native, max(native, field * CROP_PCT), size).pixels
        top, left = ((side - size) // 2 for side in pixels.shape[:2])
        return pixels[top : top + size, left : left + size].transpose(2, 0, 1)[None]
    mpp = max(native, mpp_range[0]) if rule == RULES[1] else view_mpp(rule, native, min(image.size), size, base_range)
    return tiles(show(image, native, float(mpp), size).pixels, size)


def outputs(classifier, ds, rows: np.ndarray, rule: str) -> tuple[np.ndarray, float]:
    """Logits (n, 2) of rows of a table by a rule, and seconds an image."""
    from magnification_invariant.data.images import EncodedImages, open_image, to_rgb
    from magnification_invariant.data.views import mean_over_tiles

    images, native, started = EncodedImages(ds), ds["mpp"][:], time.perf_counter()

    def shown():
        for row in rows.tolist():
            with open_image(images[row]) as image:
                rgb = to_rgb(image)
            yield tiles_of(rule, rgb, native[row], classifier.size, classifier.base_range, classifier.mpp_range)

    logits = np.stack([logits for logits, *_ in mean_over_tiles(classifier.run, shown(), 32)])
    return logits, (time.perf_counter() - started) / len(rows)


def measure(args) -> list[dict]:
    from magnification_invariant import load_virtual_slides, metrics
    from magnification_invariant.data import leave_one_magnification_out
    from magnification_invariant.engine import FitConfig
    from magnification_invariant.lomo.cell import ZOOM, Cell
    from magnification_invariant.lomo.run import run_cell
    from magnification_invariant.predict import Classifier

    size = (args.width, round(args.width * 460 / 700))
    ds = load_virtual_slides(PATIENTS, first_patient=FIRST_PATIENT, images_per_magnification=3, size=size)
    label, patient = np.array(ds["label"]), np.array(ds["patient"])
    found = []
    for held_out in args.held_out:
        split = leave_one_magnification_out(ds, held_out, n_folds=3)
        for seed in args.seeds:
            for zoom in (1.0, ZOOM):
                config = FitConfig(epochs=args.epochs, batch_size=16, learning_rate=3e-3, image_size=64, zoom=zoom)
                cell = Cell("erm", held_out, 0, seed, n_folds=3, model="test_magdg_resnet", fit=config)
                cell = replace(cell, threads=args.threads)
                run_cell(cell, ds, args.runs / cell.name)
                torch.set_num_threads(1)
                classifier = Classifier.from_pretrained(args.runs / cell.name, device="cpu")
                for rule in RULES:
                    val, _ = outputs(classifier, ds, split.val, rule)
                    weight = metrics.patient_weights(patient[split.val])
                    temperature = metrics.fit_temperature(val, label[split.val], sample_weight=weight)
                    for part in ("test", "test_source"):
                        rows = getattr(split, part)
                        logits, seconds = outputs(classifier, ds, rows, rule)
                        probability = metrics.apply_temperature(logits, temperature)[:, 1]
                        of_rows = label[rows], probability, metrics.patient_weights(patient[rows])
                        scores = {"auc": metrics.auc(*of_rows), "brier": metrics.brier(*of_rows), "seconds": seconds}
                        found.append({"held_out": held_out, "zoom": zoom > 1, "rule": rule, "part": part, **scores})
                        print(found[-1], flush=True)
    return found


def report(found: list[dict], args) -> str:
    lines = ["# Four ways to show an image", ""]
    lines += [f"`python benchmarks/views.py --seeds {' '.join(map(str, args.seeds))} --epochs {args.epochs}`", ""]
    lines += [
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; {PATIENTS} development patients,"
    ]
    lines += [
        "a third of them tested. Means over held-outs and seeds; ms an image on one thread, decoding included.",
        "",
    ]
    lines += ["| training | shown | " + " | ".join(f"AUC, {h}X unseen | Brier" for h in args.held_out)]
    lines[-1] += " | AUC, seen | Brier | ms an image |"
    lines += ["|---" * (lines[-1].count("|") - 1) + "|"]
    for zoom in (False, True):
        for rule in RULES:
            some = [row for row in found if row["zoom"] == zoom and row["rule"] == rule]
            cells = []
            for rows in (
                *([r for r in some if r["part"] == "test" and r["held_out"] == h] for h in args.held_out),
                [r for r in some if r["part"] == "test_source"],
            ):
                cells += [f"{np.mean([row[name] for row in rows]):.3f}" for name in ("auc", "brier")]
            cells.append(f"{1e3 * np.mean([row['seconds'] for row in some]):.1f}")
            lines.append(f"| {'ERM, zoom' if zoom else 'ERM'} | {rule} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", nargs="+", type=int, default=[40, 400])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--width", type=int, default=350, help="of the drawn images in pixels")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=Path, default=Path("runs/views"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    text = report(measure(args), args)
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
