"""The same small random search for every method, on development slides: virtual patients numbered under 10,000.

Trial 0 is the defaults. Every further trial draws what the options of training and of the method say is searched, see
`tasks.option`; an option that several methods have is drawn alike for all. Two rules choose a trial:

- ``source``: the lowest log-loss on the validation patients, at the training magnifications, mean over `--held-out`;
  one setting a method.
- ``nested``: with a magnification held out, trainings on two of the other three are scored on the third by the
  temperature-scaled Brier score of other patients, see `metrics.selection.nested_choice`; one setting a method and
  held-out magnification. The six trainings on two magnifications serve all of them.

    python benchmarks/random_search.py                     # 8 trials, two magnifications held out in turn
    python benchmarks/random_search.py --rule nested       # 8 trials of six trainings; 100 patients are scored
    python benchmarks/random_search.py --rule nested --zoom 2.5 --width 280 --methods erm dann two_view scale_pairs
    python benchmarks/random_search.py --trials 2 --patients 20 --epochs 1 --images 1 --results runs/trial   # trial

A run that was cut goes on where it stopped; more trials or methods can be asked for later.
"""

import argparse
import math
import os
import shlex
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from zlib import crc32

import numpy as np

MAGNIFICATIONS = (40, 100, 200, 400)
COEFFICIENTS = ("coeff", "coral_weight", "mix_prob", "pair_weight")  # how strongly a method departs from plain training
BALANCED = "patient_balanced"
N_FOLDS = {"source": 5, "nested": 3}  # the nested rule tests a third of the patients, validates by another third


def draw(search: tuple, rng: np.random.Generator):
    """A value of the range or the choices of a `tasks.option`; of a range two significant digits, so that what is
    printed is what was run."""
    if search[-1] not in ("log", "linear"):
        return search[rng.integers(len(search))]
    low, high, scale = search
    value = math.exp(rng.uniform(math.log(low), math.log(high))) if scale == "log" else rng.uniform(low, high)
    return float(f"{value:.2g}")


def settings(method: str, trial: int, epochs: int | None = None) -> dict:
    """What a trial of a method changes of the defaults; `epochs` are not searched where they are given."""
    from magnification_invariant.engine import FitConfig
    from magnification_invariant.tasks import get_task

    if trial == 0:
        return {}
    drawn = {}
    for option in (*fields(FitConfig), *fields(get_task(method).Options)):
        if (search := option.metadata.get("search")) and not (epochs and option.name == "epochs"):
            rng = np.random.default_rng([trial, crc32(option.name.encode())])
            drawn[option.name] = option.type(draw(search, rng))
    return drawn


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rule", choices=tuple(N_FOLDS), default="source", help="default: %(default)s")
    add("--methods", nargs="+", default=["erm", "dann", "cdann", "coral", "mixstyle", "multitask"])
    add("--trials", type=int, default=8, help="the defaults among them; default: %(default)s")
    add("--patients", type=int, help="default: 80, and 300 by the nested rule, which scores a third of them")
    add("--first-patient", type=int, default=4000, help="default: %(default)s")
    add("--images", type=int, default=3, help="of a patient at each magnification; default: %(default)s")
    add("--width", type=int, default=176, help="of the slides in pixels; 280 holds the zoom; default: %(default)s")
    add("--zoom", type=float, default=1.0, help="of the training, of all trials; default: none")
    add("--held-out", nargs="+", type=int, default=[40, 400], help="of the rule source; default: 40 400")
    add("--epochs", type=int, help="of all trials; default: searched")
    add("--image-size", type=int, default=64, help="default: %(default)s")
    add("--model", default="test_magdg_resnet", help="default: %(default)s")
    add("--frozen-model", default="resnet18", help="of the method frozen, with weights; default: %(default)s")
    add("--learning-rate", type=float, default=3e-3, help="of trial 0; default: %(default)s")
    add("--workers", type=int, default=os.cpu_count(), help="cells at a time, a thread each; default: all cores")
    add("--output-dir", type=Path, default=Path("runs/random_search"), help="default: %(default)s")
    add("--results", type=Path, default=Path(__file__).parent / "results", help="default: %(default)s")
    args = parser.parse_args()
    args.patients = args.patients or {"source": 80, "nested": 300}[args.rule]
    if args.first_patient + args.patients > 10_000:
        parser.error("patients from 10,000 on are for confirmation: nothing is chosen with them")
    return args


def main() -> None:
    args = parse_args()
    from magnification_invariant.data import load_virtual_slides
    from magnification_invariant.engine import FitConfig
    from magnification_invariant.lomo.cell import Cell

    size = (args.width, round(args.width * 46 / 70))
    ds = load_virtual_slides(
        args.patients, images_per_magnification=args.images, first_patient=args.first_patient, size=size
    )
    epochs = {"epochs": args.epochs} if args.epochs else {}
    fit = FitConfig(image_size=args.image_size, learning_rate=args.learning_rate, zoom=args.zoom, **epochs)

    def cells(held_out: int | str) -> dict[tuple[str, int], Cell]:
        """By method and trial."""
        made = {}
        for trial in range(args.trials):
            for method in args.methods:
                model = args.frozen_model if method == "frozen" else args.model
                cell = Cell(method, held_out, n_folds=N_FOLDS[args.rule], model=model, fit=fit)
                made[method, trial] = cell.with_settings(settings(method, trial, args.epochs))
        return made

    search = by_source if args.rule == "source" else by_nesting
    write(args, *search(args, ds, cells))


def by_source(args: argparse.Namespace, ds, cells: Callable) -> tuple[dict, dict, dict]:
    """Validation log-losses (trials, 1) by method, the trial chosen for all held-outs, and no other rule's."""
    from magnification_invariant.lomo.grid import run_grid
    from magnification_invariant.records import Run

    losses = {method: np.zeros((args.trials, 1)) for method in args.methods}
    for held_out in args.held_out:
        planned = cells(held_out)
        finished = run_grid(list(planned.values()), ds, args.output_dir / "source", workers=args.workers)
        for (method, trial), cell in planned.items():
            loss = np.inf
            if (folder := args.output_dir / "source" / cell.name) in finished:
                loss = Run(folder).results["uncalibrated"]["val"][BALANCED]["log_loss"]
            losses[method][trial] += loss / len(args.held_out)
    return losses, {method: {"all": int(loss.argmin())} for method, loss in losses.items()}, {}


def by_nesting(args: argparse.Namespace, ds, cells: Callable) -> tuple[dict, dict, dict]:
    """Brier scores (trials, magnifications) by method, the trial that is chosen for each held-out magnification, and
    those that two other rules would have chosen."""
    from magnification_invariant.lomo.grid import run_grid
    from magnification_invariant.metrics.selection import nested_choice
    from magnification_invariant.records import Run

    taken_at = dict(zip(ds["filename"], ds["magnification"], strict=True))
    folder, losses, strength, seen = args.output_dir / "nested", defaultdict(dict), {}, defaultdict(dict)
    for pair in combinations(MAGNIFICATIONS, 2):
        unseen = f"{pair[0]}X+{pair[1]}X"  # both are one domain, so that a training that sees neither is tested on both
        domain = [unseen if magnification in pair else f"{magnification}X" for magnification in ds["magnification"]]
        planned = cells(unseen)
        finished = run_grid(list(planned.values()), ds.add_column("domain", domain), folder, workers=args.workers)
        for method in args.methods:
            trials = [planned[method, trial] for trial in range(args.trials)]
            runs = [Run(folder / cell.name) if folder / cell.name in finished else None for cell in trials]
            seen[method][pair] = [run.results["parts"]["val"][BALANCED]["brier"] if run else np.inf for run in runs]
            for held_out, scored in (pair, pair[::-1]):
                losses[method][held_out, scored] = patient_losses(runs, scored, taken_at)
            options = [vars(cell.options) for cell in trials]
            strength[method] = [next((each[name] for name in COEFFICIENTS if name in each), 0.0) for each in options]
    means = {
        method: np.stack([np.mean([x for (h, _), x in own.items() if h == m], axis=(0, 2)) for m in MAGNIFICATIONS], 1)
        for method, own in losses.items()
    }
    chosen = {m: {str(h): nested_choice(losses[m], h, strength[m]) for h in MAGNIFICATIONS} for m in args.methods}
    others = {"source": {}, "oracle": {}}
    for m in args.methods:
        by_seen = {h: [loss for pair, loss in seen[m].items() if h in pair] for h in MAGNIFICATIONS}
        by_test = {h: [loss.mean(1) for (_, scored), loss in losses[m].items() if scored == h] for h in MAGNIFICATIONS}
        for rule, scores in (("source", by_seen), ("oracle", by_test)):
            others[rule][m] = {str(h): int(np.mean(scores[h], axis=0).argmin()) for h in MAGNIFICATIONS}
    return means, chosen, others


def patient_losses(runs: list, magnification: int, taken_at: dict[str, int]) -> np.ndarray:
    """Temperature-scaled Brier scores (runs, patients) of the tested images of a magnification, in the order of the
    patients' names; infinite for a run that is None."""
    scores = {}
    for i, run in enumerate(runs):
        if run is not None:
            test = run.part("test")
            chosen = np.array([taken_at[name] == magnification for name in test["filename"].tolist()])
            _, patient = np.unique(test["patient"][chosen], return_inverse=True)
            squares = (test["probability"] - test["label"])[chosen] ** 2
            scores[i] = np.bincount(patient, squares) / np.bincount(patient)
    if not scores:
        raise SystemExit("every trial of a method diverged")
    diverged = np.full_like(next(iter(scores.values())), np.inf)
    return np.stack([scores.get(i, diverged) for i in range(len(runs))])


WORDS = {
    "source": "The loss is the patient-balanced log-loss of the validation patients after the last epoch, at the "
    "training magnifications, mean over the held-outs ({held_out}); the test was not looked at.",
    "nested": "The loss is the patient-balanced, temperature-scaled Brier score of {scored} other patients at a "
    "magnification that training did not see, mean over the three that are not held out. Within one standard error of "
    "the best over patients, the weaker coefficient is chosen. Beside it, what other rules would have chosen from "
    "the same trainings: source, the least Brier score of validation patients at the training magnifications; oracle, "
    "the least at the held-out magnification itself, which no method may use.",
}


def write(args: argparse.Namespace, losses: dict[str, np.ndarray], chosen: dict, others: dict) -> None:
    """The chosen settings as JSON, and a page that shows all trials and says how."""
    from magnification_invariant.files import write_json
    from magnification_invariant.report.page import markdown_table

    name = "random_search" + "_nested" * (args.rule == "nested") + "_zoom" * (args.zoom > 1)
    record, rows = {}, []
    for method, columns in chosen.items():
        own = {
            held_out: {"learning_rate": args.learning_rate, **settings(method, trial, args.epochs)}
            for held_out, trial in columns.items()
        }
        record[method] = own.get("all", own)
        for trial, of_trial in enumerate(losses[method]):
            marks = [
                " **chosen**" * (trial == best)
                + "".join(f" {rule}" for rule, of_rule in others.items() if of_rule[method][held_out] == trial)
                for held_out, best in columns.items()
            ]
            cells = ["diverged" if np.isinf(x) else f"{x:.4f}{mark}" for x, mark in zip(of_trial, marks, strict=True)]
            drawn = settings(method, trial, args.epochs).items()
            rows.append([method, str(trial), *cells, ", ".join(f"{k} {v}" for k, v in drawn) or "defaults"])
    args.results.mkdir(parents=True, exist_ok=True)
    write_json(args.results / f"{name}.json", record)
    words = WORDS[args.rule].format(
        held_out=", ".join(f"{m}X" for m in args.held_out), scored=round(args.patients / N_FOLDS["nested"])
    )
    heads = ["loss"] if args.rule == "source" else [f"{m}X held out" for m in MAGNIFICATIONS]
    about = (
        f"{args.trials} trials on {args.patients} virtual patients from {args.first_patient} on, {args.images} images "
        f"each at every magnification, {args.model} at {args.image_size} px, zoom {args.zoom:g}. "
        "Trial 0 is the defaults at a learning "
        f"rate of {args.learning_rate}. {words} `{name}.json` holds what was chosen."
    )
    command = f"`python benchmarks/random_search.py {shlex.join(sys.argv[1:])}`"
    table = markdown_table(["method", "trial", *heads, "settings"], rows)
    text = "\n\n".join(["# Random search, the same for every method", command, textwrap.fill(about, 120), table]) + "\n"
    (args.results / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
