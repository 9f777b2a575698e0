"""The confirmation on virtual slides: two tests that were declared before anything ran, on patients nothing was chosen
with.

Training patients are numbered from 20,000 on, tested ones from 30,000 on; all that was chosen (slides, recipes) was
chosen with patients below 10,000, by nested leave-one-domain-out (`random_search.py --rule nested`), for each held-out
magnification. Cohort c trains on 100 patients and validates on 30; every cohort is tested on the same 200 patients.

The family is two tests of the temperature-scaled, patient-balanced Brier score at the unseen magnification, Holm's:

1. DANN minus ERM, zoom off, protocol view: the paper's claim;
2. ERM + zoom, the same networks: scale-normalised minus protocol view.

A win needs the interval over patients and the t-interval over the cohorts' differences both below 0. All else is
exploratory.

    python benchmarks/confirmation.py --plan            # writes what is to be run and what it could detect
    python benchmarks/confirmation.py                   # 4 held-outs x 6 cohorts x 7 rows and three single cells
    python benchmarks/confirmation.py --minutes 60      # whole cohorts only, as many as fit; at least one
    python benchmarks/confirmation.py --first-patient 2000 --cohorts 2 --patients 24 8 24 --epochs 1 --docs runs/t

A run that was cut goes on where it stopped.
"""

import argparse
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAGNIFICATIONS = (40, 100, 200, 400)
TEST_OFFSET = 10_000  # from the first training patient to the first test patient
COHORT_STEP = 200
RESULTS = Path(__file__).parent / "results"


class Recipe(NamedTuple):
    """A row of the table: a method with or without zoom, its epochs times a factor."""

    method: str
    zoom: bool
    factor: int = 1

    @property
    def name(self) -> str:
        return "nested" if self.factor == 1 else f"nested, epochs x {self.factor}"

    @property
    def title(self) -> str:
        return self.method + " + zoom" * self.zoom + f" ({self.name})"


ERM_ZOOM, DANN_ZOOM = Recipe("erm", True), Recipe("dann", True)
TWO_VIEW, PAIRS = Recipe("two_view", True), Recipe("scale_pairs", True)
LONGER = Recipe("erm", True, 2)  # sees as many images as `TWO_VIEW`
ERM, DANN = Recipe("erm", False), Recipe("dann", False)
ROWS = (ERM, DANN, ERM_ZOOM, DANN_ZOOM, TWO_VIEW, PAIRS, LONGER)
# The paper's systems at its best held-out magnifications, one cell each: single trainings, which decide nothing. GAN
# with what was chosen for ERM and a quarter of its DCGAN's epochs, which take a CPU hours; the others on a ResNet-18,
# with the defaults of `magdg lomo` but 30 epochs of 300 images.
GAN_HELD_OUT, GAN_EPOCHS, RESNET_HELD_OUT = 100, 50, 200
LIKE_ERM, RESNET = "one cell, settings of erm", "one cell, ResNet-18"
# (a, b): title and whether scale-normalised
DECLARED = {
    "dann minus erm, zoom off, protocol view": ((DANN, False), (ERM, False)),
    "erm + zoom, scale-normalised minus protocol view": ((ERM_ZOOM, True), (ERM_ZOOM, False)),
}
EXPLORATORY = {
    "dann + zoom minus erm + zoom, protocol view": ((DANN_ZOOM, False), (ERM_ZOOM, False)),
    "dann + zoom minus erm + zoom, both scale-normalised": ((DANN_ZOOM, True), (ERM_ZOOM, True)),
    "dann minus erm, zoom off, both scale-normalised": ((DANN, True), (ERM, True)),
    "erm + zoom minus erm, protocol view": ((ERM_ZOOM, False), (ERM, False)),
    "erm, zoom off, scale-normalised minus protocol view": ((ERM, True), (ERM, False)),
    "two views minus erm + zoom at twice the epochs": ((TWO_VIEW, False), (LONGER, False)),
    "scale pairs minus two views": ((PAIRS, False), (TWO_VIEW, False)),
    "erm + zoom at twice the epochs minus erm + zoom": ((LONGER, False), (ERM_ZOOM, False)),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--plan", action="store_true", help="write the plan and stop")
    add("--cohorts", type=int, default=6, help="groups of training patients; default: %(default)s")
    add("--minutes", type=float, help="start no further cohort that would not be done by then")
    add("--arch", default="test_magdg_resnet", help="default: %(default)s")
    add("--image-size", type=int, default=64, help="default: %(default)s")
    add("--width", type=int, default=280, help="of the slides' images; 280 holds the zoom; default: %(default)s")
    add("--learning-rate", type=float, default=3e-3, help="where nothing was chosen; default: %(default)s")
    add("--epochs", type=int, help="of all cells, for trials; default: as chosen")
    add("--settings", type=Path, default=RESULTS, help="folder of what random_search.py wrote; default: %(default)s")
    add("--patients", type=int, nargs=3, default=(100, 30, 200), help="to train, validate, test; default: 100 30 200")
    add("--images", type=int, default=1, help="of a patient at each magnification; default: %(default)s")
    add("--first-patient", type=int, default=20_000, help="below 10,000: a trial, not to be published")
    add("--workers", type=int, default=os.cpu_count(), help="cells at a time, a thread each; default: %(default)s")
    add("--output-dir", type=Path, default=Path("runs/confirmation2"), help="default: %(default)s")
    add("--docs", type=Path, default=Path("docs"), help="where confirmation.md and its pictures go; default: docs")
    args = parser.parse_args()
    if sum(args.patients[:2]) > COHORT_STEP or args.cohorts * COHORT_STEP > TEST_OFFSET:
        parser.error(
            f"a cohort has room for {COHORT_STEP} patients, and there is room for {TEST_OFFSET // COHORT_STEP}"
        )
    return args


def main() -> None:
    args = parse_args()
    from magnification_invariant.lomo.grid import run_grid

    args.output_dir.mkdir(parents=True, exist_ok=True)
    ds, split = slides(args)
    blocks = [plan_cells(args, str(split), cohort) for cohort in range(args.cohorts)]
    text = plan(args, blocks[0])
    print(text, flush=True)
    if args.plan:
        (RESULTS / "confirmation_plan.md").write_text(text)
        return
    started, finished = time.monotonic(), []
    for cohort, cells in enumerate(blocks):
        spent = (time.monotonic() - started) / 60
        if args.minutes and cohort and spent * (cohort + 1) / cohort > args.minutes:
            print(f"cohorts from {cohort} on are cut: {spent:.0f} min are spent, and {args.minutes:.0f} were given")
            break
        folders = run_grid(cells, ds, args.output_dir, workers=args.workers)
        if len(folders) < len(cells):
            print(f"{len(cells) - len(folders)} cells of cohort {cohort} did not finish")
        finished += [folder for folder in folders if folder not in finished]
        print(f"cohort {cohort}: {(time.monotonic() - started) / 60:.0f} min in this run", flush=True)
    report(args, ds, finished)


def settings_of(folder: Path, recipe: Recipe, held_out: int) -> dict:
    """What the nested rule chose for a row and a held-out magnification; nothing where there is no such file."""
    path = folder / f"random_search_nested{'_zoom' * recipe.zoom}.json"
    return json.loads(path.read_text())[recipe.method][str(held_out)] if path.is_file() else {}


def plan_cells(args: argparse.Namespace, split: str, cohort: int) -> list:
    """The cells of a cohort: floors, then every row, for every held-out magnification."""
    from magnification_invariant.engine import FitConfig
    from magnification_invariant.lomo.cell import ZOOM, Cell
    from magnification_invariant.tasks.floors import OF_IMAGES

    fit = FitConfig(image_size=args.image_size, learning_rate=args.learning_rate)
    shared = {"split": split, "fold": cohort}
    cells = [Cell(floor, held_out, fit=fit, **shared) for floor in OF_IMAGES for held_out in MAGNIFICATIONS]
    for recipe in ROWS:
        for held_out in MAGNIFICATIONS:
            zoomed = replace(fit, zoom=ZOOM if recipe.zoom else 1.0)
            cell = Cell(recipe.method, held_out, model=args.arch, recipe=recipe.name, fit=zoomed, **shared)
            cell = cell.with_settings(settings_of(args.settings, recipe, held_out))
            epochs = args.epochs or cell.fit.epochs * recipe.factor
            cells.append(cell.with_settings({"epochs": epochs}))
    if cohort == 0:
        cells += single_cells(args, shared, fit)
    return cells


def single_cells(args: argparse.Namespace, shared: dict, fit) -> list:
    """The paper's systems, see `GAN_HELD_OUT`; `fit` is without zoom."""
    from magnification_invariant.engine import FitConfig
    from magnification_invariant.lomo.cell import Cell

    gan = Cell("gan", GAN_HELD_OUT, model=args.arch, recipe=LIKE_ERM, fit=fit, **shared)
    gan = gan.with_settings(settings_of(args.settings, ERM, GAN_HELD_OUT) | {"gan_epochs": args.epochs or GAN_EPOCHS})
    fit = FitConfig(image_size=args.image_size, epochs=30)
    cells = [gan, *(Cell(method, RESNET_HELD_OUT, recipe=RESNET, fit=fit, **shared) for method in ("erm", "dann"))]
    return [cell.with_settings({"epochs": args.epochs}) for cell in cells] if args.epochs else cells


def plan(args: argparse.Namespace, cells: list) -> str:
    """What is to be run, in words and settings, and what it could detect: written before anything runs."""
    from magnification_invariant.report.page import markdown_table
    from magnification_invariant.tasks.floors import FLOORS

    rows = [
        [
            cell.method + " + zoom" * (cell.fit.zoom > 1),
            cell.recipe,
            f"{cell.held_out}X",
            str(cell.fit.epochs),
            f"{cell.fit.learning_rate:g}",
            f"{cell.fit.weight_decay:g}",
            cell.settings_sha256,
            ", ".join(f"{name} {value}" for name, value in vars(cell.options).items()),
        ]
        for cell in cells
        if cell.method not in FLOORS
    ]
    head = ["row", "recipe", "held out", "epochs", "learning rate", "weight decay", "sha256", "options"]
    lines = [f"{title}: {text}" for title, text in detectable(args).items()]
    return (
        "\n\n".join(
            [
                "# Plan of the confirmation",
                f"Declared: {'; '.join(DECLARED)}. All else is exploratory. {args.cohorts} cohorts from patient "
                f"{args.first_patient:,} on, {args.patients[0]} + {args.patients[1]} patients each; "
                f"{args.patients[2]} tested patients from {args.first_patient + TEST_OFFSET:,} on.",
                *lines,
                markdown_table(head, rows),
            ]
        )
        + "\n"
    )


def detectable(args: argparse.Namespace) -> dict[str, str]:
    """Of each declared test, the difference it would find in 80 of 100 repetitions, if cohorts differ as much as the
    six trainings on two magnifications of the nested search do (their defaults)."""
    from scipy.stats import t

    from magnification_invariant.records import Run
    from magnification_invariant.report.runs import difference

    nested = args.output_dir.parent / "random_search" / "nested"
    runs = [run for run in map(Run, sorted(nested.glob("*"))) if run.is_finished]
    texts = {}
    for title, (a, b) in DECLARED.items():
        pairs = []
        for of_a in runs:
            for of_b in runs:
                same = of_a.held_out == of_b.held_out and default_of(of_a, a[0]) and default_of(of_b, b[0])
                parts = ["test_normalised" if scaled else "test" for _, scaled in (a, b)]
                if same and parts[0] in of_a.parts and parts[1] in of_b.parts:
                    pairs.append(difference([of_a], [of_b], part_a=parts[0], part_b=parts[1]).difference)
        if len(pairs) < 2:
            texts[title] = "no development runs to take a spread from"
            continue
        sd, df = np.std(pairs, ddof=1), args.cohorts - 1
        least = (t.ppf(0.975, df) + t.ppf(0.8, df)) * sd / math.sqrt(args.cohorts)
        texts[title] = f"on development patients {np.mean(pairs):+.4f}, SD {sd:.4f} over {len(pairs)} trainings; "
        texts[title] += f"{args.cohorts} cohorts would detect {least:.4f} (power 0.8)"
    return texts


def default_of(run, recipe: Recipe) -> bool:
    """Whether a run of the nested search is its trial 0 of this row."""
    return run.method == recipe.method and (run.zoom > 1) == recipe.zoom and run.settings["weight_decay"] == 0.05


def slides(args: argparse.Namespace):
    """The table of all patients, and a split file with a fold a cohort."""
    import datasets

    from magnification_invariant.data import Folds, load_virtual_slides

    train, val, tested = args.patients

    def drawn(first: int, n: int):
        size = (args.width, round(args.width * 46 / 70))
        return load_virtual_slides(n, first_patient=first, images_per_magnification=args.images, size=size)

    cohorts = [drawn(args.first_patient + COHORT_STEP * c, train + val) for c in range(args.cohorts)]
    test = drawn(args.first_patient + TEST_OFFSET, tested)
    patients = [sorted(set(cohort["patient"])) for cohort in cohorts]
    folds = [
        {
            "train": own[:train],
            "val": own[train:],
            "test": sorted(set(test["patient"])),
            "unused": [patient for other in patients if other is not own for patient in other],
        }
        for own in patients
    ]
    path = args.output_dir / f"cohorts{args.cohorts}.json"
    Folds(folds).to_json(path)
    return datasets.concatenate_datasets([*cohorts, test]), path


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Of the mean of independent values, by Student's t; NaN of fewer than two."""
    from scipy.stats import t

    if len(values) < 2:
        return math.nan, math.nan
    half = t.ppf((1 + level) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def compared(rows: dict, a: tuple[Recipe, bool], b: tuple[Recipe, bool]):
    """The difference over all runs (see `report.runs.difference`), and that of each cohort."""
    from magnification_invariant.records import NORMALISED
    from magnification_invariant.report.runs import difference

    parts = {f"part_{side}": NORMALISED if scaled else "test" for side, (_, scaled) in zip("ab", (a, b), strict=True)}
    runs = [rows[recipe.title] for recipe, _ in (a, b)]
    cohorts = sorted({run.key[1] for run in runs[0]} & {run.key[1] for run in runs[1]})
    each = [
        difference(*([run for run in own if run.key[1] == cohort] for own in runs), **parts).difference
        for cohort in cohorts
    ]
    return difference(*runs, **parts), each


def verdict(measured, cohorts: Sequence[float], adjusted: float) -> str:
    """A win, or a loss, needs both intervals on one side of 0, and Holm's p below 0.05."""
    low, high = t_interval(cohorts)
    if adjusted < 0.05 and measured.high < 0 and high < 0:
        return "better"
    return "WORSE" if adjusted < 0.05 and measured.low > 0 and low > 0 else "not told apart"


def tests(rows: dict) -> list:
    """The declared family, and what is exploratory, as blocks of a page."""
    from magnification_invariant import metrics
    from magnification_invariant.report.page import Table, interval

    def line(title, measured, cohorts) -> list[str]:
        return [
            title,
            f"{measured.difference:+.4f}",
            interval(measured.low, measured.high, "+.4f"),
            interval(*t_interval(cohorts), "+.4f"),
            " ".join(f"{value:+.3f}" for value in cohorts),
        ]

    declared = {title: compared(rows, *pair) for title, pair in DECLARED.items()}
    adjusted = metrics.holm([measured.p_value for measured, _ in declared.values()])
    head = ["Brier at the unseen magnification", "estimate", "over patients", "t over cohorts", "cohorts"]
    family = [
        [*line(title, *each), f"{each[0].p_value:.4f}", f"{p:.4f}", verdict(*each, p)]
        for (title, each), p in zip(declared.items(), adjusted, strict=True)
    ]
    rest = [line(title, *compared(rows, *pair)) for title, pair in EXPLORATORY.items()]
    return [
        "Declared before anything ran; a win needs both intervals below 0. p is of swapping patients' predictions, "
        "adjusted by Holm's method over the two. What later sections say of a difference goes by patients alone, with "
        "the networks as they are; where they disagree, this verdict counts.",
        Table([*head, "p", "p adjusted", "verdict"], family),
        "Exploratory, not adjusted: to be read as hints.",
        Table(head, rest),
    ]


def guesses(ds, folders: list[Path]) -> list:
    """A third row of ERM + zoom: scale-normalised by the um/px that nuclei look like, as if none were known."""
    from magnification_invariant import metrics
    from magnification_invariant.data.apparent_scale import apparent_mpp
    from magnification_invariant.data.views import mean_over_tiles, tiles
    from magnification_invariant.predict import Classifier
    from magnification_invariant.records import NORMALISED, POSITIVE, Run
    from magnification_invariant.report.page import Table

    runs = [run for run in map(Run, folders) if run.is_network and run.title == ERM_ZOOM.title]
    if not runs:
        return ["No runs."]
    place = {name: row for row, name in enumerate(ds["filename"])}
    tested = {name for run in runs for name in run.part("test")["filename"]}
    looks = {name: apparent_mpp(ds[place[name]]["image"].convert("RGB")) for name in tested}
    lines = []
    for held_out in MAGNIFICATIONS:
        scores, worse, known, ratio = [], [], [], []
        for run in (run for run in runs if run.held_out == held_out):
            classifier, test = Classifier.from_pretrained(run.model), run.part("test")
            shown, which = [], []
            for i, name in enumerate(test["filename"]):
                if (guess := looks[name]) is not None:
                    try:
                        view, _ = classifier.view_of(ds[place[name]]["image"].convert("RGB"), guess)
                    except ValueError:  # too small a field at a known scale, if the guess were right
                        continue
                    which.append(i)
                    ratio.append(guess / ds[place[name]]["mpp"])
                    shown.append(tiles(view.pixels, classifier.size))
            logits = test["logits"].copy()
            logits[which] = [logits for logits, *_ in mean_over_tiles(classifier.run, shown, 64)]
            probability = metrics.apply_temperature(logits, run.temperature)[:, POSITIVE]
            weight = metrics.patient_weights(test["patient"])
            by_view = (test["probability"], run.part(NORMALISED)["probability"], probability)
            scores.append([metrics.METRICS["brier"](test["label"], p, weight) for p in by_view])
            error = [(p - test["label"]) ** 2 for p in by_view]
            worse.append(np.mean(error[2] > error[0] + 1e-9))
            known.append(len(which) / len(logits))
        row = [f"{x:.4f}" for x in np.mean(scores, 0)] + [f"{np.mean(worse):.0%}", f"{np.mean(known):.0%}"]
        lines.append([f"{held_out}X", *row, "{:.2f} to {:.2f}".format(*np.quantile(ratio, [0.05, 0.95]))])
    head = ["held out", "Brier, protocol", "by the stated scale", "by the guess", "worse than protocol"]
    return [
        "ERM + zoom where the scale is not known: normalised by the um/px that the nuclei look like (`apparent_mpp`; "
        "images without a guess, or too small by it, stay in the protocol view). How often an image's squared error "
        "grows over the protocol view's; the guess over the truth, 5th to 95th percentile.",
        Table([*head, "guessed", "guess / truth"], lines),
    ]


def compact(path: Path, runs: list) -> None:
    """Logits of what is tested, a row an image and run: enough to make every table of predictions again."""
    import pandas as pd

    from magnification_invariant.files import whole

    columns = ["filename", "patient", "label", "domain", "part", "mpp", "logits"]
    tables = []
    for run in runs:
        table = run.records.to_pandas()[columns]
        table = table[table.part.isin(["test", "test_normalised", "val"])]
        logits = np.stack(table.pop("logits")).astype(np.float32)
        table = table.assign(margin=logits[:, 1] - logits[:, 0], temperature=np.float32(run.temperature))
        held_out, cohort, _ = run.key
        tables.append(table.assign(mpp=table.mpp.astype(np.float32), row=run.title, held_out=held_out, cohort=cohort))
    table = pd.concat(tables)
    for name in ("filename", "patient", "part", "row"):
        table[name] = table[name].astype("category")
    with whole(path) as unfinished:
        table.to_parquet(unfinished, index=False, compression="zstd")


def report(args: argparse.Namespace, ds, folders: list[Path]) -> None:
    """docs/confirmation.md, in the words and pictures of `magdg report`, behind the declared tests."""
    import torch

    from magnification_invariant.records import Run
    from magnification_invariant.report.contents import sections
    from magnification_invariant.report.page import write
    from magnification_invariant.report.runs import by_title

    runs = [Run(folder) for folder in folders]
    rows, trial = by_title(runs), " (TRIAL: patients of development)" * (args.first_patient < 10_000)
    cohorts = len({run.key[1] for run in runs})
    about = [
        f"Virtual slides: procedural drawings, not patients. {cohorts} cohorts of {args.patients[0]} training and "
        f"{args.patients[1]} validation patients from {args.first_patient:,} on, {args.patients[2]} test patients "
        f"from {args.first_patient + TEST_OFFSET:,} on, the same for all, {args.images} image of each at each "
        "magnification. "
        "No choice was made with these patients, and no recipe was changed after they were drawn: settings by nested "
        "leave-one-domain-out (`benchmarks/results/random_search_nested*.md`), plan in "
        "`benchmarks/results/confirmation_plan.md`.",
        f"Command: {shlex.join(['python', *sys.argv])}",
        f"{platform.machine()}, {os.cpu_count()} cores, {args.workers} cells at a time; Python "
        f"{platform.python_version()}, NumPy {np.__version__}, torch {torch.__version__}.",
    ]
    contents = [
        ("What was run", about),
        ("The declared tests", tests(rows)),
        ("When the scale is not known", guesses(ds, folders)),
        *sections(
            folders, [(DANN.title, ERM.title), (DANN_ZOOM.title, ERM_ZOOM.title), (TWO_VIEW.title, LONGER.title)]
        ),
    ]
    files = write(args.docs, "confirmation", f"Confirmation on virtual slides{trial}", contents, with_page=False)
    compact((args.docs if trial else RESULTS) / "confirmation.parquet", runs)
    size = sum(path.stat().st_size for path in files)
    print(f"{args.docs}/confirmation.md and {len(files) - 1} pictures, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
