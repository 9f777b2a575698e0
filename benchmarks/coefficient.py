"""The adaptive coefficient against the paper's schedule, on development slides: patients numbered under 10,000.

Nothing here may be repeated on other slides to choose again. Prints validation (patients of the training
magnifications) and test (the unseen magnification) of every schedule.

python benchmarks/coefficient.py
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from magnification_invariant.data.virtual_slides import load_virtual_slides
from magnification_invariant.lomo import Cell, run_grid

MEASURES = (("brier", "Brier"), ("auc", "AUC"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--schedules", nargs="+", default=["dann", "adaptive"])
    add("--coeff", nargs="+", type=float, default=[1.0], help="largest coefficient; each with every schedule")
    add("--patients", type=int, default=80)
    add("--first-patient", type=int, default=3000)
    add("--images", type=int, default=3, help="of a patient at each magnification")
    add("--width", type=int, default=350, help="of the slides in pixels")
    add("--held-out", nargs="+", type=int, default=[40, 400])
    add("--seeds", nargs="+", type=int, default=[0, 1])
    add("--epochs", type=int, default=20)
    add("--image-size", type=int, default=64)
    add("--model", default="test_magdg_resnet")
    add("--learning-rate", type=float, default=3e-3)
    add("--threads", type=int, default=2)
    add("--workers", type=int, default=1)
    args = parser.parse_args()
    if args.first_patient + args.patients > 10_000:
        parser.error("development is for patients numbered under 10,000; the others confirm")
    size = (args.width, round(args.width * 460 / 700))
    ds = load_virtual_slides(
        args.patients, images_per_magnification=args.images, first_patient=args.first_patient, size=size
    )
    base = Cell(
        "dann",
        0,
        model=args.model,
        epochs=args.epochs,
        image_size=args.image_size,
        learning_rate=args.learning_rate,
        threads=args.threads,
    )
    print("| coefficient | held out | part | " + " | ".join(title for _, title in MEASURES) + " | by seed |")
    print("|---|---|---|" + "---|" * (len(MEASURES) + 1))
    with tempfile.TemporaryDirectory() as output:
        for schedule in args.schedules:
            for coeff in args.coeff:
                name = f"{schedule} {coeff:g}"
                for held_out in args.held_out:
                    cell = replace(base, held_out=held_out, coeff=coeff, coeff_schedule=schedule)
                    cells = [replace(cell, seed=seed) for seed in args.seeds]
                    folders = run_grid(cells, ds, Path(output, name), workers=args.workers, say=lambda line: None)
                    results = [json.loads((folder / "results.json").read_text())["parts"] for folder in folders]
                    for part in ("val", "test"):
                        found = {m: [r[part]["patient_balanced"][m] for r in results] for m, _ in MEASURES}
                        means = " | ".join(f"{np.mean(values):.3f}" for values in found.values())
                        seeds = ", ".join(f"{value:.3f}" for value in found["brier"])
                        print(f"| {name} | {held_out}X | {part} | {means} | Brier {seeds} |", flush=True)


if __name__ == "__main__":
    main()
