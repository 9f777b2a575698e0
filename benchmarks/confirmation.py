"""The confirmation table on virtual slides: {ERM, DANN} x {zoom off, on}, on patients that nothing was chosen with.

All that was chosen (slides, recipe, defaults) was chosen with virtual patients below 10,000. Here cohort c trains on 70
patients and validates on 30, numbered from 10,000 + 100 c on; every cohort is tested on the same 200 patients from
15,000 on, at a magnification it never saw. Recipes are frozen: their hashes are printed before anything runs and are in
every record; another recipe in the same folder is refused. All methods run, once, and the table is written whatever it
shows.

    python benchmarks/confirmation.py                          # 3 cohorts x 3 seeds, two cells at a time
    python benchmarks/confirmation.py --settings benchmarks/results/random_search.json   # not each method's defaults
    python benchmarks/confirmation.py --minutes 60             # whole seeds only, as many as fit; at least one
    python benchmarks/confirmation.py --arch resnet18          # each method's own ResNet-18
    python benchmarks/confirmation.py --first-patient 2000 --cohorts 1 --seeds 0 --epochs 2 --docs runs/trial   # trial

A run that was cut goes on where it stopped. Seeds are cut before cohorts: cells run seed by seed, over all cohorts.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

MAGNIFICATIONS = (40, 100, 200, 400)
TEST_OFFSET = 5_000  # from the first training patient to the first test patient
COHORT_STEP = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--methods", nargs="+", default=["erm", "dann"])
    add("--zoom", nargs="+", choices=("off", "on"), default=["off", "on"])
    add("--held-out", nargs="+", type=int, default=list(MAGNIFICATIONS))
    add("--cohorts", type=int, default=3, help="groups of training patients; default: %(default)s")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    add("--minutes", type=float, help="start no further seed that would not be done by then")
    add("--arch", default="test_magdg_resnet", help="or resnet18 for each method's own; default: %(default)s")
    add("--image-size", type=int, default=64, help="default: %(default)s")
    add("--width", type=int, default=280, help="of the slides' images; 280 holds the zoom; default: %(default)s")
    add("--epochs", type=int, default=15, help="default: %(default)s")
    add("--learning-rate", type=float, default=3e-3, help="default: %(default)s")
    add("--settings", type=Path, help="each method's own, as random_search.py wrote them; replace the learning rate")
    add("--train-patients", type=int, default=70, help="of a cohort; default: %(default)s")
    add("--val-patients", type=int, default=30, help="of a cohort; default: %(default)s")
    add("--test-patients", type=int, default=200, help="of all cohorts; default: %(default)s")
    add("--images", type=int, default=4, help="of a training patient and magnification; default: %(default)s")
    add("--test-images", type=int, default=1, help="of a test patient and magnification; default: %(default)s")
    add("--nuisance", type=int, choices=(0, 1, 2), default=1, help="of the slides; default: %(default)s")
    add("--first-patient", type=int, default=10_000, help="below 10,000: a trial, not to be published")
    add("--workers", type=int, default=os.cpu_count(), help="cells at a time, a thread each; default: %(default)s")
    add("--output-dir", type=Path, default=Path("runs/confirmation"), help="default: %(default)s")
    add("--docs", type=Path, default=Path("docs"), help="where confirmation.md and its pictures go; default: docs")
    args = parser.parse_args()
    if args.train_patients + args.val_patients > COHORT_STEP or args.cohorts * COHORT_STEP > TEST_OFFSET:
        parser.error(
            f"a cohort has room for {COHORT_STEP} patients, and there is room for {TEST_OFFSET // COHORT_STEP}"
        )

    from magnification_invariant.engine import FitConfig
    from magnification_invariant.lomo.cell import ZOOM as ZOOM_RANGE
    from magnification_invariant.lomo.grid import make_grid, run_grid
    from magnification_invariant.predict.zoom import write_zoom_curves
    from magnification_invariant.records import ZOOM
    from magnification_invariant.tasks.floors import FLOORS

    output = args.output_dir / f"nuisance{args.nuisance}"
    output.mkdir(parents=True, exist_ok=True)
    ds, split = slides(args, output)
    shared = {"model": None if args.arch == "resnet18" else args.arch, "split": str(split)}
    fit = FitConfig(epochs=args.epochs, image_size=args.image_size, learning_rate=args.learning_rate)
    settings = json.loads(args.settings.read_text()) if args.settings else {}
    rows = [(method, ZOOM_RANGE if zoom == "on" else 1.0) for zoom in args.zoom for method in args.methods]
    blocks = {}
    for seed in args.seeds:
        cells = [
            cell.with_settings(settings_of(cell, settings))
            for method, zoom in rows
            for cell in make_grid(
                [method], args.held_out, range(args.cohorts), [seed], fit=replace(fit, zoom=zoom), **shared
            )
        ]
        blocks[seed] = list({cell.name: cell for cell in reversed(cells)}.values())[::-1]  # the floors once
    first = {(c.method, c.fit.zoom): c for c in reversed(blocks[args.seeds[0]]) if c.method not in FLOORS}

    titles = {(method, zoom): method + (" + zoom" if zoom > 1 else "") for method, zoom in rows}
    print("\nFrozen recipes:")
    for row, title in titles.items():
        print(f"  {title:16} {first[row].settings_sha256}")
    seconds = {title: seconds_of(first[row], ds) for row, title in titles.items()}
    a_seed = sum(seconds.values()) * len(args.held_out) * args.cohorts / args.workers / 60
    each = ", ".join(f"{s:.0f} s ({title})" for title, s in seconds.items())
    print(f"\nEstimate, {args.workers} cells at a time: a cell {each}; a seed {a_seed:.0f} min; ", end="")
    print(f"all {len(blocks)} seeds {len(blocks) * a_seed:.0f} min\n", flush=True)

    started, finished = time.monotonic(), []
    for done, (seed, cells) in enumerate(blocks.items()):
        spent = (time.monotonic() - started) / 60
        if args.minutes and done and spent * (done + 1) / done > args.minutes:
            print(f"seeds from {seed} on are cut: {spent:.0f} min are spent, and {args.minutes:.0f} were given")
            break
        folders = run_grid(cells, ds, output, workers=args.workers)
        if len(folders) < len(cells):
            print(f"{len(cells) - len(folders)} cells of seed {seed} did not finish")
        finished += [folder for folder in folders if folder not in finished]
    print(f"\n{len(finished)} cells, {(time.monotonic() - started) / 60:.0f} min in this run")
    for cell in blocks[args.seeds[0]]:  # zoom curves of one cohort and one held-out magnification
        folder = output / cell.name
        shown = cell.fold == 0 and cell.held_out == args.held_out[0] and folder in finished
        if shown and cell.method not in FLOORS and not (folder / ZOOM).exists():
            write_zoom_curves(folder, ds)
    report(args, finished)


def settings_of(cell, settings: dict) -> dict:
    """A method's own, for all held-out magnifications or, by the nested rule, for each."""
    own = settings.get(cell.method, {})
    return own.get(str(cell.held_out), own)


def slides(args: argparse.Namespace, output: Path):
    """The table of all patients, and a split file with a fold a cohort."""
    import datasets

    from magnification_invariant.data import Folds, load_virtual_slides

    def drawn(first: int, n: int, images: int):
        return load_virtual_slides(
            n,
            first_patient=first,
            images_per_magnification=images,
            nuisance=args.nuisance,
            size=(args.width, round(args.width * 460 / 700)),
        )

    per_cohort = args.train_patients + args.val_patients
    cohorts = [drawn(args.first_patient + COHORT_STEP * c, per_cohort, args.images) for c in range(args.cohorts)]
    tested = drawn(args.first_patient + TEST_OFFSET, args.test_patients, args.test_images)
    patients = [sorted(set(cohort["patient"])) for cohort in cohorts]
    folds = [
        {
            "train": own[: args.train_patients],
            "val": own[args.train_patients :],
            "test": sorted(set(tested["patient"])),
            "unused": [patient for other in patients if other is not own for patient in other],
        }
        for own in patients
    ]
    path = output / f"cohorts{args.cohorts}.json"
    Folds(folds).to_json(path)
    return datasets.concatenate_datasets([*cohorts, tested]), path


def seconds_of(cell, ds) -> float:
    """About how long a cell takes: an epoch of training and its predictions, timed, times the number of epochs."""
    import numpy as np
    import torch

    from magnification_invariant.data import Folds, PixelCache, ViewCache, cache_height
    from magnification_invariant.engine import TrainRows, fit, predict
    from magnification_invariant.tasks import get_task

    torch.set_num_threads(cell.threads)
    split = Folds.from_json(cell.split).split(ds, cell.held_out, cell.fold)
    size = cell.fit.image_size
    cache, views = PixelCache(ds, cache_height(size, cell.fit.zoom)), ViewCache(ds, size)
    label, patient = np.asarray(ds["label"]), np.asarray(ds["patient"])
    domain = np.unique(np.asarray(ds["magnification"])[split.train], return_inverse=True)[1]
    method = get_task(cell.method)
    model = method.create_model(cell.model or method.arch, num_classes=2, num_domains=domain.max() + 1)
    started = time.perf_counter()
    rows = TrainRows(split.train, label[split.train], domain, patient[split.train])
    model = fit(method(model, cell.options), cache, rows, replace(cell.fit, epochs=1))
    predict(model, views.views, np.concatenate([split.val, split.test, split.test_source]))
    return (time.perf_counter() - started) * cell.fit.epochs + 5  # seconds for the signature and the model's folder


def report(args: argparse.Namespace, folders: list[Path]) -> None:
    """docs/confirmation.md, in the words and pictures of `magdg report`."""
    import numpy as np
    import torch

    from magnification_invariant.report.contents import sections
    from magnification_invariant.report.page import Picture, write

    trial = " (TRIAL: patients of development)" if args.first_patient < 10_000 else ""
    about = [
        f"Virtual slides, nuisance {args.nuisance}: procedural drawings, not patients. {args.cohorts} cohorts of "
        f"{args.train_patients} training and {args.val_patients} validation patients from {args.first_patient:,} on, "
        f"{args.images} images of each at each magnification; {args.test_patients} test patients from "
        f"{args.first_patient + TEST_OFFSET:,} on, the same for all, {args.test_images} images of each at each "
        "magnification. No choice was made with these patients, and no recipe was changed after they were drawn.",
        f"Command: {shlex.join(['python', *sys.argv])}",
        f"{platform.machine()}, {os.cpu_count()} cores, {args.workers} cells at a time; Python "
        f"{platform.python_version()}, NumPy {np.__version__}, torch {torch.__version__}. Networks not named here, "
        "and the GAN: not run.",
    ]
    name = "confirmation" + ("" if args.nuisance == 1 else f"_nuisance{args.nuisance}")
    contents = [("What was run", about), *sections(folders)]
    if args.nuisance != 1:  # the pictures of one strength are enough
        words = [(title, [b for b in blocks if not isinstance(b, Picture)]) for title, blocks in contents]
        contents = [(title, blocks) for title, blocks in words if blocks]
    files = write(args.docs, name, f"Confirmation on virtual slides{trial}", contents, with_page=False)
    size = sum(path.stat().st_size for path in files)
    print(f"{args.docs / name}.md and {len(files) - 1} pictures, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
