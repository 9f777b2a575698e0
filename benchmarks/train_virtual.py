"""Train the weights that come with the package, `magdg_resnet18.virtual`, on virtual slides alone; test and card them.

    python benchmarks/train_virtual.py                                # what is shipped; resumes where it was cut off
    python benchmarks/train_virtual.py --cards-only                   # render the card anew, from the records

All four magnifications are trained on, by the frozen recipe of the method. Training and validation patients have
numbers below 10,000 (development); the test is on patients from 10,000 on (confirmation), at each magnification. The
run is a cell as `magdg lomo` makes them, with nothing held out; what follows from it is written to

- `magnification_invariant/weights/magdg_resnet18.virtual`: the model's repository, matrices rounded to float16 (the
  results are those before rounding; by how much it changes the fixture's logits is printed);
- `hub_cards/magdg_resnet18.virtual`: card, pictures and records, to be looked at.
"""

import argparse
import hashlib
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
SCORES = ROOT / "benchmarks" / "results" / "real_tissue_scores.json"
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


def add_magnifications(folder: Path, magnifications: np.ndarray) -> None:
    """Add the results at each magnification to those of the test, and the device to the record."""
    import torch

    from magnification_invariant.records import last_epoch, part_of, scores, write_json

    results = json.loads((folder / "results.json").read_text())
    records = last_epoch(folder)
    for magnification in magnifications:
        chosen = records.filter(np.asarray(records["domain"]) == magnification)
        p = part_of(chosen, "test_source", results["temperature"])
        results["parts"][f"test_source_{magnification}X"] = scores(p["label"], p["probability"], p["patient"])
    write_json(folder / "results.json", results)
    record = json.loads((folder / "config.json").read_text())
    record["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    write_json(folder / "config.json", record)


def halve(folder: Path) -> None:
    """Replace the weights by float16 ones (vectors stay float32); fixture and signature are then of these."""
    import safetensors.torch
    import timm
    from PIL import Image

    from magnification_invariant.model_folder import logits_of
    from magnification_invariant.records import write_json
    from magnification_invariant.signatures import SignatureProjector
    from magnification_invariant.signatures.projector import weights_digest

    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights = {name: value.half() if value.dim() > 1 else value for name, value in weights.items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    fixture = json.loads((folder / "fixture.json").read_text())
    with Image.open(folder / "fixture.png") as image:
        logits = logits_of(folder, image)
    print(f"float16 changes the fixture's logits by {np.abs(np.subtract(logits, fixture['logits'])).max():.2g}")
    write_json(folder / "fixture.json", fixture | {"logits": logits})
    if (folder / "signature.json").exists():
        digest = weights_digest(timm.create_model(f"local-dir:{folder}", pretrained=True))
        replace(SignatureProjector.from_pretrained(folder), weights_sha256=digest).save_pretrained(folder)


def add_real_tissue(folder: Path, weights: Path) -> None:
    """Add to the results what `real_tissue.py --score locked` said of these weights, if it did."""
    from magnification_invariant.records import write_json

    scores = json.loads(SCORES.read_text()) if SCORES.exists() else []
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    for score in scores:
        if score["half"] == "locked" and score["weights_sha256"] == digest:
            results = json.loads((folder / "results.json").read_text())
            write_json(folder / "results.json", results | {"real_tissue": score})


def package(run: Path, weights: Path, cards: Path) -> Path:
    """Write the repository of a run (or of a folder of `weights`) into `weights`, what people look at into `cards`."""
    from magnification_invariant.hub import stage
    from magnification_invariant.model_folder import read_model_config
    from magnification_invariant.models import HUB_NAMESPACE

    model = run / "model" if (run / "model").is_dir() else run
    name = read_model_config(str(model))["name"]
    add_real_tissue(run, model / "model.safetensors")
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

    from magnification_invariant.lomo.cell import Cell, is_finished
    from magnification_invariant.lomo.run import run_cell

    ds, split = virtual_split(args)
    shared = ("method", "model", "image_size", "epochs", "batch_size", "zoom", "mixed_precision", "threads")
    chosen = json.loads(args.settings.read_text())[args.method] if args.settings else {}
    cell = Cell(held_out=0, **{name: getattr(args, name) for name in shared}).with_settings(chosen)
    print(f"{len(split.train)} images to train on, {len(split.val)} to validate, {len(split.test_source)} to test")
    print(json.dumps(asdict(cell)))
    if not is_finished(args.run, cell, ds):
        run_cell(cell, ds, args.run, split=split)
    halve(args.run / "model")
    add_magnifications(args.run, np.unique(ds["magnification"]))
    target = package(args.run, args.weights, args.cards)
    print((target / "README.md").read_text())
    print(f"{target}: {(target / 'model.safetensors').stat().st_size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
