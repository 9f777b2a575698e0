"""Train the weights that come with the package on real tissue: recipes out of fold, the best of them released.

    python benchmarks/distil.py --data BreaKHis_v1 --teacher local-dir:DENSENET121 --output-dir runs/tissue
    python benchmarks/train_tissue.py --data BreaKHis_v1 --teacher local-dir:DENSENET121 --output-dir runs/tissue

A ResNet-18 that was distilled (see distil.py) is trained on BreaKHis' 100X images at the three scales of
real_tissue.py, nothing held out. Three recipes, written here before any was run: a linear head on the frozen features,
fine-tuning by ERM, and by DANN, both with continuous zoom. Each is estimated out of fold: distillation, training and
temperature see the fold's training and validation patients only. Beside them, by the same folds: logistic regression
on frozen features of the teacher and of a random ResNet-18. `--release RECIPE` trains the released model, on all groups
of patients but the last, which gives the temperature; the out-of-fold records go into its folder and card. A run that
was cut goes on.
"""

import argparse
import os
import platform
import shutil
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
from distil import N_FOLDS, patients_of
from real_tissue import SETTINGS, tissue
from train_virtual import ROOT, package

IMAGES = 6
NAME = "breakhis_mini"
FIT = {**SETTINGS, "epochs": 4, "learning_rate": 3e-4}
HEAD = {**SETTINGS, "epochs": 4, "learning_rate": 1e-2, "weight_decay": 0.0}
# Row: method, architecture (None: the method's own), fit, zoom.
RECIPES = {
    "distilled, linear head": ("frozen", "magerm_resnet18", HEAD, False),
    "distilled, ERM + zoom": ("erm", None, FIT, True),
    "distilled, DANN + zoom": ("dann", None, FIT, True),
}
# Logistic regression on frozen features, by the same folds: of the teacher, and of random weights.
BESIDE = {"frozen DenseNet-121, the teacher": "teacher", "frozen ResNet-18, random weights": "resnet18"}


def cell_of(row: str, fold: int, start: Path, threads: int):
    from magnification_invariant.engine import FitConfig
    from magnification_invariant.lomo.cell import ZOOM, Cell

    method, arch, settings, zoom = RECIPES[row]
    fit = FitConfig(**settings, zoom=ZOOM if zoom else 1.0)
    return Cell(method, 0, fold, model=arch, init=str(start), fit=fit, threads=threads)


def split_of(ds, start: str):
    """Training patients as those of the start; the group behind the tested one validates."""
    from magnification_invariant.data import Split
    from magnification_invariant.data.splits import deal_folds

    folds, patient = deal_folds(ds, n_folds=N_FOLDS).folds, np.array(ds["patient"])
    parts = folds[int(start)] if start != "all" else {"val": folds[-1]["test"], "test": []}
    rows = {name: np.flatnonzero(np.isin(patient, parts[name])) for name in ("val", "test")}
    train = np.flatnonzero(np.isin(patient, patients_of(ds)[start]))
    return Split(train, rows["val"], test=[], test_source=rows["test"], held_out=0, fold=int(start != "all" and start))


def run(row: str, start: str, ds, args):
    from magnification_invariant.lomo.cell import is_finished
    from magnification_invariant.lomo.run import run_cell
    from magnification_invariant.records import Run

    folder = args.output_dir / row.replace(" ", "_").replace(",", "") / start
    cell = cell_of(row, 0 if start == "all" else int(start), args.output_dir / f"start_{start}", args.threads)
    if not is_finished(folder, cell, ds):
        run_cell(cell, ds, folder, split=split_of(ds, start), data_source="breakhis", half=start == "all")
    return Run(folder)


def beside(row: str, ds, args) -> list:
    """Runs of logistic regression on frozen features, a fold each."""
    import timm
    import torch

    from magnification_invariant import load_embeddings
    from magnification_invariant.lomo.cell import Cell
    from magnification_invariant.lomo.embedded import embed_images
    from magnification_invariant.lomo.run import run_cell
    from magnification_invariant.records import Run

    folder = args.output_dir / row.replace(" ", "_").replace(",", "")
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    teacher = BESIDE[row] == "teacher"
    model = timm.create_model(args.teacher if teacher else BESIDE[row], pretrained=teacher).eval()
    embed_images(ds, model, SETTINGS["image_size"], folder / "embeddings.parquet")
    table, runs = load_embeddings(folder / "embeddings.parquet"), []
    for fold in range(N_FOLDS):
        run_cell(Cell("l2", 0, fold), table, folder / str(fold), split=split_of(ds, str(fold)))
        runs.append(Run(folder / str(fold)))
    return runs


def pooled(runs) -> dict[str, np.ndarray]:
    """Out-of-fold records of all folds, logits divided by each fold's temperature."""
    parts = [(run.part("test_source"), run.temperature) for run in runs]
    columns = {name: np.concatenate([part[name] for part, _ in parts]) for name in parts[0][0]}
    return columns | {"logits": np.concatenate([part["logits"] / t for part, t in parts])}


def estimates(rows: dict) -> str:
    """A line a row: AUC and Brier out of fold, at 100X as photographed and over all three scales."""
    from magnification_invariant.metrics import auc, cluster_interval

    lines = ["| | AUC, 100X | AUC, all scales | Brier, all scales | AUC by image, 100X |", "|---|---|---|---|---|"]
    for row, runs in rows.items():
        p = pooled(runs)
        cells = []
        for metric, chosen in (("auc", p["domain"] == 100), ("auc", p["domain"] > 0), ("brier", p["domain"] > 0)):
            of = (p[name][chosen] for name in ("label", "probability", "patient"))
            cells.append("{:.3f} [{:.3f}, {:.3f}]".format(*cluster_interval(metric, *of)))
        at = p["domain"] == 100
        lines.append(f"| {row} | {' | '.join(cells)} | {auc(p['label'][at], p['probability'][at]):.3f} |")
    return "\n".join(lines)


def release(row: str, runs, ds, args) -> Path:
    """The released model: trained, its out-of-fold records added, staged and packaged."""
    from magnification_invariant.files import read_json, write_json
    from magnification_invariant.records import OUT_OF_FOLD, prediction_table, scores

    made, results, p = run(row, "all", ds, args), None, pooled(runs)
    results = made.results
    of_rows = {name: p[name] for name in ("label", "probability", "patient")}
    results["parts"] = {OUT_OF_FOLD: scores(**of_rows)} | results["parts"]
    for scale in np.unique(p["domain"]):
        at = p["domain"] == scale
        results["parts"][f"{OUT_OF_FOLD}_{scale}X"] = scores(**{name: values[at] for name, values in of_rows.items()})
    raw = np.concatenate([r.part("test_source", 1.0)["probability"] for r in runs])
    results["uncalibrated"][OUT_OF_FOLD] = scores(p["label"], raw, p["patient"])
    results["recipes"] = len(RECIPES)
    target = made.folder.parent / "staged"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(made.model, target)
    config = read_json(target / "config.json")
    arch = config["name"].split(".")[0]
    config["name"], config["pretrained_cfg"]["tag"] = f"{arch}.{NAME}", NAME
    write_json(target / "config.json", config)
    write_json(target / "results.json", results | {"record": made.config, "seconds": made.seconds})
    columns = {name: p[name] for name in ("filename", "patient", "label", "domain", "mpp")}
    constants = {"part": OUT_OF_FOLD, "epoch": made.config["settings"]["epochs"] - 1, "method": made.method}
    out_of_fold = prediction_table(columns, np.arange(len(p["label"])), p["logits"] * made.temperature, **constants)
    import pyarrow.parquet as pq

    pq.write_table(
        pa.concat_tables([made.records, out_of_fold], promote_options="default"), target / "predictions.parquet"
    )
    return package(target, args.weights, args.cards)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="BreaKHis, or a part of it")
    add("--teacher", required=True, help="as for distil.py")
    add("--output-dir", type=Path, required=True, help="of distil.py")
    add("--rows", nargs="*", default=[*RECIPES, *BESIDE], help="default: all")
    add("--release", metavar="RECIPE", help="train and package this one")
    add("--threads", type=int, default=1)
    add("--weights", type=Path, default=ROOT / "magnification_invariant" / "weights")
    add("--cards", type=Path, default=ROOT / "hub_cards")
    add("--out", type=Path, help="file for the estimates")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "no interval")
    ds = tissue(args.data, IMAGES)
    print(f"{len(ds)} images of {len(set(ds['patient']))} patients", flush=True)
    rows = {
        row: beside(row, ds, args) if row in BESIDE else [run(row, str(fold), ds, args) for fold in range(N_FOLDS)]
        for row in args.rows
    }
    text = estimates(rows)
    print(text)
    if args.out:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} thread(s)"
        command = (
            "python benchmarks/train_tissue.py --data BreaKHis_v1 --teacher local-dir:DENSENET121 --output-dir runs"
        )
        about = (
            f"{len(ds)} images of {len(set(ds['patient']))} patients of BreaKHis at 100X (at most {IMAGES} photographs "
            "of each) and at two finer scales by digital zoom. Five folds of patients, one seed, logits pooled after "
            "temperature scaling; distillation, training and temperature see the fold's training and validation "
            "patients only. Patients weigh the same; 95 % intervals over patients, the networks taken as given."
        )
        settings = f"Fine-tuning: {FIT}. Heads: {HEAD}."
        blocks = ["# A ResNet-18 that has seen tissue", f"`{command}`", machine, about, settings, text]
        args.out.write_text("\n\n".join(blocks) + "\n")
    if args.release:
        print(release(args.release, rows[args.release], ds, args))


if __name__ == "__main__":
    main()
