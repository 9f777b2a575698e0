"""The same small random search for every method, on development slides: virtual patients numbered under 10,000.

Trial 0 is the defaults. Every further trial draws the shared settings, the same for all methods, and at most three
settings of the method's own. Chosen is the trial with the lowest log-loss on the validation patients, at the training
magnifications, after the last epoch, mean over the held-out magnifications; the test is not looked at.

    python benchmarks/random_search.py                     # 8 trials, two magnifications held out in turn
    python benchmarks/random_search.py --methods gan frozen --trials 4
    python benchmarks/random_search.py --trials 2 --patients 20 --epochs 1 --images 1 --results runs/trial   # trial

A run that was cut goes on where it stopped; more trials or methods can be asked for later.
"""

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import numpy as np

Draw = Callable[[np.random.Generator], float | str]


def log_uniform(low: float, high: float) -> Draw:
    """Two significant digits, so that what is printed is what was run."""
    return lambda rng: float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.2g}")


def choice(*values: float | str) -> Draw:
    return lambda rng: values[rng.integers(len(values))]


SHARED = {
    "learning_rate": log_uniform(5e-4, 1e-2),
    "weight_decay": log_uniform(1e-3, 0.5),
    "label_smoothing": choice(0.0, 0.05, 0.1),
}
OWN = {
    "dann": {"coeff": log_uniform(0.1, 3), "coeff_schedule": choice("dann", "adaptive")},
    "cdann": {"coeff": log_uniform(0.1, 3), "coeff_schedule": choice("dann", "adaptive")},
    "multitask": {"coeff": log_uniform(0.1, 3), "coeff_schedule": choice("dann", "adaptive")},
    "coral": {"gamma": log_uniform(0.1, 1000)},
    "mixstyle": {"p": choice(0.25, 0.5, 0.75, 1.0), "alpha": choice(0.1, 0.2, 0.3)},
    "frozen": {"l2": log_uniform(1e-4, 1)},
}


def settings(method: str, trial: int) -> dict:
    """What a trial of a method changes; a function of the two alone."""
    if trial == 0:
        return {}
    shared, own = np.random.default_rng([trial]), np.random.default_rng([trial, crc32(method.encode())])
    drawn = {name: draw(shared) for name, draw in SHARED.items()}
    return drawn | {name: draw(own) for name, draw in OWN.get(method, {}).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--methods", nargs="+", default=["erm", "dann", "cdann", "coral", "mixstyle", "multitask"])
    add("--trials", type=int, default=8, help="the defaults among them; default: %(default)s")
    add("--patients", type=int, default=80, help="default: %(default)s")
    add("--first-patient", type=int, default=4000, help="default: %(default)s")
    add("--images", type=int, default=3, help="of a patient at each magnification; default: %(default)s")
    add("--width", type=int, default=176, help="of the slides in pixels; default: %(default)s")
    add("--held-out", nargs="+", type=int, default=[40, 400], help="default: 40 400")
    add("--epochs", type=int, default=20, help="default: %(default)s")
    add("--image-size", type=int, default=64, help="default: %(default)s")
    add("--model", default="test_magdg_resnet", help="default: %(default)s")
    add("--frozen-model", default="resnet18", help="of the method frozen, with weights; default: %(default)s")
    add("--learning-rate", type=float, default=3e-3, help="of trial 0; default: %(default)s")
    add("--workers", type=int, default=os.cpu_count(), help="cells at a time, a thread each; default: all cores")
    add("--output-dir", type=Path, default=Path("runs/random_search"), help="default: %(default)s")
    add("--results", type=Path, default=Path(__file__).parent / "results", help="default: %(default)s")
    args = parser.parse_args()
    if args.first_patient + args.patients > 10_000:
        parser.error("patients from 10,000 on are for confirmation: nothing is chosen with them")

    from magnification_invariant.data import load_virtual_slides
    from magnification_invariant.lomo.cell import Cell
    from magnification_invariant.lomo.grid import run_grid

    ds = load_virtual_slides(
        args.patients,
        images_per_magnification=args.images,
        first_patient=args.first_patient,
        size=(args.width, round(args.width * 46 / 70)),
    )
    base = {"epochs": args.epochs, "image_size": args.image_size, "learning_rate": args.learning_rate}

    def cell(method: str, held_out: int, trial: int) -> Cell:
        model = args.frozen_model if method == "frozen" else args.model
        return Cell(method, held_out, model=model, **base).with_settings(settings(method, trial))

    losses = {method: [] for method in args.methods}
    for trial in range(args.trials):
        folder = args.output_dir / f"trial{trial:02d}"
        cells = [cell(method, held_out, trial) for method in args.methods for held_out in args.held_out]
        finished = set(run_grid(cells, ds, folder, workers=args.workers))
        for method in args.methods:
            folders = [folder / each.name for each in cells if each.method == method]
            losses[method].append(np.mean([validation_loss(f) if f in finished else np.inf for f in folders]))
    write(args, losses)


def validation_loss(folder: Path) -> float:
    results = json.loads((folder / "results.json").read_text())
    return results["uncalibrated"]["val"]["patient_balanced"]["log_loss"]


def write(args: argparse.Namespace, losses: dict[str, list[float]]) -> None:
    """`random_search.json`, the chosen settings, and `random_search.md`, which shows all trials and says how."""
    chosen, lines = {}, []
    for method, values in losses.items():
        best = int(np.argmin(values))
        chosen[method] = {"learning_rate": args.learning_rate, **settings(method, best)}
        for trial, loss in enumerate(values):
            mark = " **chosen**" if trial == best else ""
            what = ", ".join(f"{k} {v}" for k, v in settings(method, trial).items()) or "defaults"
            lines.append(f"| {method} | {trial} | {'diverged' if np.isinf(loss) else f'{loss:.4f}'}{mark} | {what} |")
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "random_search.json").write_text(json.dumps(chosen, indent=1) + "\n")
    held_outs = ", ".join(f"{magnification}X" for magnification in args.held_out)
    text = f"""# Random search, the same for every method

`python benchmarks/random_search.py {shlex.join(sys.argv[1:])}`

{args.trials} trials on {args.patients} virtual patients from {args.first_patient} on, {args.images} images each at
every magnification, {args.model} at {args.image_size} px, {args.epochs} epochs, held out in turn: {held_outs}.
Trial 0 is the defaults at a learning rate of {args.learning_rate}. The loss is the patient-balanced log-loss of the
validation patients after the last epoch, at the training magnifications, mean over the held-outs; the test was not
looked at. `random_search.json` holds what was chosen.

| method | trial | validation log-loss | settings |
|---|---|---|---|
"""
    (args.results / "random_search.md").write_text(text + "\n".join(lines) + "\n")
    print(text.partition("|")[0] + "\n".join(lines))


if __name__ == "__main__":
    main()
