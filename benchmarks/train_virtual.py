"""Train the weights that come with the package, `magdg_resnet18.virtual`, on virtual slides alone; test and card them.

    python benchmarks/train_virtual.py                                # what is shipped; resumes where it was cut off
    python benchmarks/train_virtual.py --cards-only                   # render the card anew, from the records

All four magnifications are trained on, by the frozen recipe of the method. Training and validation patients have
numbers below 10,000 (development); the test is on patients from 10,000 on (confirmation), at each magnification. The
run is a cell as `magdg lomo` makes them, with nothing held out; what follows from it is written to

- `magnification_invariant/weights/magdg_resnet18.virtual`: the model's repository, matrices rounded to float16 before
  anything is recorded;
- `hub_cards/magdg_resnet18.virtual`: card, pictures and records, to be looked at.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
CONFIRMATION = 10_000  # first patient
SHOWN = ("README.md", "config.json", "results.json", "calibration.png", "roc.png")


def virtual_split(args):
    """The table, and which of its rows train, validate and test."""
    from datasets import concatenate_datasets

    from magnification_invariant.data import Split, load_virtual_slides

    size = (args.width, round(args.width * 460 / 700))
    sides = {"train": (args.first_patient, args.patients)}
    sides["val"] = (args.first_patient + args.patients, args.val_patients)
    sides["test_source"] = (CONFIRMATION + args.first_patient, args.test_patients)
    if args.first_patient + args.patients + args.val_patients > CONFIRMATION:
        raise SystemExit(f"development patients have numbers below {CONFIRMATION}")
    tables = [
        load_virtual_slides(n, first_patient=first, images_per_magnification=args.images, size=size)
        for first, n in sides.values()
    ]
    ends = np.cumsum([0, *map(len, tables)])
    rows = {part: np.arange(*ends[i : i + 2]) for i, part in enumerate(sides)}
    return concatenate_datasets(tables), Split(**rows, test=[], held_out=0)


def add_magnifications(run) -> None:
    """Add the results at each magnification to those of the test, and the device to the record."""
    import torch

    from magnification_invariant.records import scores

    results, test = run.results, run.part("test_source")
    for magnification in np.unique(test["domain"]):
        chosen = test["domain"] == magnification
        of_rows = (test[name][chosen] for name in ("label", "probability", "patient"))
        results["parts"][f"test_source_{magnification}X"] = scores(*of_rows)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    run.write_config(run.config | {"machine": run.config["machine"] | {"device": device}})
    run.write_results(results)


def package(run: Path, weights: Path, cards: Path) -> Path:
    """Write the repository of a run (or of a folder of `weights`) into `weights`, what people look at into `cards`."""
    from magnification_invariant.hub import stage
    from magnification_invariant.model_folder import read_model_config
    from magnification_invariant.models import HUB_NAMESPACE

    model = run / "model" if (run / "model").is_dir() else run
    name = read_model_config(str(model))["name"]
    unfinished = weights / f".{name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    stage(run, f"{HUB_NAMESPACE}/{name}", unfinished)
    shutil.rmtree(weights / name, ignore_errors=True)
    unfinished.rename(weights / name)
    shutil.rmtree(cards / name, ignore_errors=True)
    (cards / name).mkdir(parents=True)
    for file in (*SHOWN, "signature.json"):
        if (weights / name / file).exists():
            shutil.copyfile(weights / name / file, cards / name / file)
    return weights / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="dann")
    parser.add_argument("--settings", type=Path, help="each method's own, as random_search.py wrote them")
    parser.add_argument("--model", help="timm architecture; default: the method's own, magdg_resnet18")
    parser.add_argument("--patients", type=int, default=400, help="to train on; default: %(default)s")
    parser.add_argument("--val-patients", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--test-patients", type=int, default=200, help="of the confirmation; default: %(default)s")
    parser.add_argument("--first-patient", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--images", type=int, default=4, help="a patient and magnification; default: %(default)s")
    parser.add_argument("--width", type=int, default=350, help="of the drawn images in pixels; default: %(default)s")
    parser.add_argument("--image-size", type=int, default=128, help="of the network's input; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--zoom", action="store_true", help="continuous zoom, where the frozen recipe has it")
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "virtual", help="records; default: %(default)s")
    parser.add_argument("--weights", type=Path, default=ROOT / "magnification_invariant" / "weights")
    parser.add_argument("--cards", type=Path, default=ROOT / "hub_cards")
    parser.add_argument("--cards-only", action="store_true", help="render the cards of packaged weights anew")
    args = parser.parse_args()

    if args.cards_only:
        for folder in args.weights.glob("[!.]*"):
            package(folder, args.weights, args.cards)
        return

    from magnification_invariant.engine import FitConfig
    from magnification_invariant.lomo.cell import ZOOM, Cell, is_finished
    from magnification_invariant.lomo.run import run_cell
    from magnification_invariant.records import Run

    ds, split = virtual_split(args)
    fit = FitConfig(args.epochs, args.batch_size, image_size=args.image_size, zoom=ZOOM if args.zoom else 1.0)
    own = {"model": args.model, "mixed_precision": args.mixed_precision, "threads": args.threads}
    cell = Cell(args.method, held_out=0, fit=fit, **own)
    cell = cell.with_settings(json.loads(args.settings.read_text())[args.method] if args.settings else {})
    print(f"{len(split.train)} images to train on, {len(split.val)} to validate, {len(split.test_source)} to test")
    print(json.dumps(cell.settings))
    if not is_finished(args.run, cell, ds):
        run_cell(cell, ds, args.run, split=split, half=True)
    add_magnifications(Run(args.run))
    target = package(args.run, args.weights, args.cards)
    print((target / "README.md").read_text())
    print(f"{target}: {(target / 'model.safetensors').stat().st_size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
