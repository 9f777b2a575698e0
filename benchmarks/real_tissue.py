"""Leave one scale out on real tissue: BreaKHis' 100X images, rescaled to three scales by digital zoom.

    python benchmarks/real_tissue.py --data BreaKHis_v1 --weights FOLDER            # FOLDER: densenet121_imagenet, ...
    python benchmarks/real_tissue.py --from benchmarks/results/real_tissue.csv.gz   # tables and picture, trains nothing

The pixels stay as many while the field shrinks, so that the um/px at the network's input differs between the scales; at
the two finer ones an image gives four fields. No detail appears that 100X has not: "rescaled", not photographed. At
most `IMAGES` images of a patient are taken, since patients weigh the same. Every scale is held out in turn, patients
are dealt into five folds. Settings are written here, none was chosen by what is reported. Cells that are finished are
skipped, so a run that was cut goes on, and predictions are committed, so another machine can go on too.
"""

import argparse
import hashlib
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SCALES = (100, 200, 400)
IMAGES = 5
SETTINGS = {"epochs": 4, "batch_size": 16, "image_size": 96, "learning_rate": 3e-4, "ema_decay": 0.99}
PROBE = {"learning_rate": 1e-2, "weight_decay": 0.0}  # of a linear head on frozen features
DENSENET, LITE = "densenet121_imagenet", "tf_efficientnet_lite0_imagenet"
# Row: method, network (None: ResNet-18), start, zoom.
ROWS = {
    "frozen DenseNet-121": ("frozen", DENSENET, "imagenet", False),
    "frozen EfficientNet-Lite0": ("frozen", LITE, "imagenet", False),
    "EfficientNet-Lite0, ERM": ("erm", LITE, "imagenet", False),
    "EfficientNet-Lite0, DANN": ("dann", LITE, "imagenet", False),
    "EfficientNet-Lite0, ERM + zoom": ("erm", LITE, "imagenet", True),
    "EfficientNet-Lite0, DANN + zoom": ("dann", LITE, "imagenet", True),
    "ResNet-18 from random weights, ERM": ("erm", None, "none", False),
}
FLOORS = ("constant", "colour")
PARTS = {"test": "unseen", "test_normalised": "unseen, scale-normalised", "test_source": "seen"}


def tissue(data: str, images: int = IMAGES):
    """The 100X images, at most `images` of a patient, at `SCALES`."""
    from magnification_invariant import load_breakhis
    from magnification_invariant.data import digital_zoom

    ds = load_breakhis(data)
    names, patients, chosen = ds["filename"][:], ds["patient"][:], {}
    for i in np.flatnonzero(np.array(ds["magnification"]) == SCALES[0]).tolist():
        chosen.setdefault(patients[i], []).append(i)
    rows = [i for of in chosen.values() for i in sorted(of, key=lambda i: _coin(names[i]))[:images]]
    return digital_zoom(ds.select(sorted(rows)), SCALES, fields=2)


def _coin(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def cells_of(row: str, weights: Path, threads: int) -> list:
    from magnification_invariant.engine import FitConfig
    from magnification_invariant.lomo.cell import ZOOM, Cell

    if row in FLOORS:
        fit = FitConfig(image_size=SETTINGS["image_size"])
        return [Cell(row, scale, fold, fit=fit) for scale in SCALES for fold in range(5)]
    method, network, init, zoom = ROWS[row]
    fit = FitConfig(**SETTINGS | (PROBE if method == "frozen" else {}), zoom=ZOOM if zoom else 1.0)
    model = network and f"local-dir:{weights / network}"
    return [
        Cell(method, scale, fold, model=model, init=init, fit=fit, threads=threads)
        for scale in SCALES
        for fold in range(5)
    ]


def measure(args) -> list[dict]:
    """Trains what is not finished; predictions and diagnostics of what is."""
    from magnification_invariant.lomo.grid import run_grid
    from magnification_invariant.records import Run

    ds = tissue(args.data)
    print(f"{len(ds)} images of {len(set(ds['patient']))} patients", flush=True)
    lines = []
    for row in args.rows:
        started, cells = time.monotonic(), cells_of(row, args.weights, args.threads)
        folders = run_grid(cells, ds, args.runs)
        if len(folders) < len(cells):
            raise SystemExit(f"{row}: {len(cells) - len(folders)} cells did not finish")
        print(f"{row}: {time.monotonic() - started:.0f} s", flush=True)
        for cell, run in zip(cells, map(Run, folders), strict=True):
            for part in PARTS:
                p = run.part(part)
                log_odds = (p["logits"][:, 1:2] - p["logits"][:, :1]).ravel() / run.temperature
                for i, value in enumerate(log_odds):
                    key = {"row": row, "held_out": cell.held_out, "fold": cell.fold, "part": part}
                    of_image = {name: p[name][i] for name in ("patient", "label", "domain")}
                    lines.append(key | of_image | {"mpp": round(float(p["mpp"][i]), 4), "log_odds": round(value, 3)})
            if run.is_network:
                lines += diagnostics(row, cell, run)
    return lines


def diagnostics(row: str, cell, run) -> list[dict]:
    """How well the seen scales can be told from tested patients' embeddings, and the signature, as further lines."""
    from magnification_invariant.metrics import domain_probe

    keys, signature = run.keys("test_source"), run.results["signature"]
    probe = domain_probe(run.embeddings("test_source"), keys["domain"], keys["patient"], n_folds=2, n_draws=10)
    values = {"probe": probe.balanced_accuracy, "size": signature["size"], "width": signature["width"]}
    values |= {"nogueira": signature.get("nogueira")}
    key = {"row": row, "held_out": cell.held_out, "fold": cell.fold}
    return [key | {"part": name, "log_odds": value} for name, value in values.items() if value is not None]


def of(table, row: str, part: str, held_out: int | None = None) -> dict[str, np.ndarray] | None:
    some = table[(table["row"] == row) & (table["part"] == part)]
    some = some if held_out is None else some[some["held_out"] == held_out]
    some = some.sort_values(["held_out", "fold", "patient", "domain", "label"], kind="stable")
    if some.empty:
        return None
    names = ("label", "patient", "held_out", "log_odds")
    return {name: some[name].to_numpy() for name in names} | {"p": 1 / (1 + np.exp(-some["log_odds"].to_numpy(float)))}


def interval(table, row: str, part: str, metric: str, held_out: int | None = None):
    """Value and 95 % interval: folds pooled after temperature scaling, patients are clusters over held-out scales."""
    from magnification_invariant.metrics import cluster_interval

    p = of(table, row, part, held_out)
    return p and cluster_interval(metric, p["label"].astype(int), p["p"], p["patient"], runs=p["held_out"])


def shown(value, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value[0]:.{digits}f} [{value[1]:.{digits}f}, {value[2]:.{digits}f}]"


def report(table, command: str, machine: str) -> str:
    from magnification_invariant.metrics import paired_difference
    from magnification_invariant.report.page import number

    rows = [row for row in (*FLOORS, *ROWS) if (table["row"] == row).any()]
    tested = table[table["part"] == "test"]
    count = tested.drop_duplicates("patient")["label"].astype(int).value_counts()
    text = ["# Leave one scale out on real tissue", "", f"`{command}`", "", machine, ""]
    text += [
        f"BreaKHis at 100X, rescaled to {', '.join(f'{s}X' for s in SCALES)}: {count[0]} benign and {count[1]} "
        f"malignant patients, at most {IMAGES} images of each. Every scale held out in turn x 5 folds of patients x 1 "
        "seed; folds pooled after temperature scaling; patients weigh the same and are the clusters of the 95 % "
        "intervals, which take the trained networks as given. With eight benign patients the intervals are wide: that "
        "is what is known.",
        "",
        f"Settings, written down before the run: {SETTINGS}; heads on frozen features: {PROBE}.",
        "",
        "| | "
        + " | ".join(f"AUC, {title}" for title in PARTS.values())
        + " |"
        + " Brier, unseen | normalised | seen |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        values = [shown(interval(table, row, part, "auc")) for part in PARTS]
        briers = [interval(table, row, part, "brier") for part in PARTS]
        values += [f"{b[0]:.3f}" if b else "-" for b in briers]
        text.append(f"| {row} | {' | '.join(values)} |")
    text += ["", "AUC at each unseen scale, protocol view and scale-normalised:", ""]
    text += ["| | " + " | ".join(f"{s}X | normalised" for s in SCALES) + " |", "|---" * 7 + "|"]
    for row in rows:
        values = [interval(table, row, part, "auc", s) for s in SCALES for part in ("test", "test_normalised")]
        text.append(f"| {row} | {' | '.join(f'{v[0]:.3f}' if v else '-' for v in values)} |")
    text += [
        "",
        "What the embeddings tell of the scale (balanced accuracy of a linear probe on tested patients, chance",
        "",
    ]
    text[-2] += " 0.500), and signatures, means over cells:"
    text += ["| | probe | signature | of | Nogueira |", "|---|---|---|---|---|"]
    for row in (row for row in rows if row not in FLOORS):
        some = table[table["row"] == row]
        means = [
            some[some["part"] == name]["log_odds"].astype(float).mean()
            for name in ("probe", "size", "width", "nogueira")
        ]
        text.append(f"| {row} | {means[0]:.3f} | {means[1]:.0f} | {means[2]:.0f} | {number(means[3], 2)} |")
    text += [
        "",
        "Differences of AUC and Brier at unseen scales, paired by patient (interval; p of a permutation test, not",
        "",
    ]
    text[-2] += " adjusted):"
    text += ["| | AUC | p | Brier | p |", "|---|---|---|---|---|"]
    for title, (one, part), (other, its) in contrasts(rows):
        a, b = of(table, one, part), of(table, other, its)
        cells = []
        for metric in ("auc", "brier"):
            d = paired_difference(metric, a["label"].astype(int), a["p"], b["p"], a["patient"], runs=a["held_out"])
            cells += [f"{d[0]:+.3f} [{d[1]:+.3f}, {d[2]:+.3f}]", f"{d[3]:.3f}"]
        text.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def contrasts(rows: list[str]):
    """Title, and the two (row, part) that are compared."""
    erm, dann = "EfficientNet-Lite0, ERM", "EfficientNet-Lite0, DANN"
    pairs = [("DANN minus ERM", (dann, "test"), (erm, "test"))]
    pairs += [("DANN minus ERM, both with zoom", (f"{dann} + zoom", "test"), (f"{erm} + zoom", "test"))]
    pairs += [("zoom minus none, ERM", (f"{erm} + zoom", "test"), (erm, "test"))]
    pairs += [(f"scale-normalised minus protocol, {row}", (row, "test_normalised"), (row, "test")) for row in ROWS]
    pairs += [
        (
            "fine-tuned (ERM + zoom) minus frozen, Lite0",
            (f"{erm} + zoom", "test"),
            ("frozen EfficientNet-Lite0", "test"),
        )
    ]
    pairs += [("ImageNet minus random start, ERM", (erm, "test"), ("ResNet-18 from random weights, ERM", "test"))]
    return [pair for pair in pairs if pair[1][0] in rows and pair[2][0] in rows]


def picture(table, path: Path) -> None:
    from magnification_invariant.report.pictures import cost

    rows = {}
    for row in (row for row in (*FLOORS, *ROWS) if (table["row"] == row).any()):
        rows[row] = {part: value for part in PARTS if (value := interval(table, row, part, "auc"))}
    cost(rows, "Real tissue, rescaled: a scale that was never seen", path)


def main() -> None:
    import pandas as pd

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="BreaKHis, or a part of it, in any form that `load_breakhis` reads")
    add("--weights", type=Path, help=f"folder with {DENSENET} and {LITE}, as timm saves models")
    add("--rows", nargs="+", default=[*FLOORS, *ROWS], help="default: all")
    add("--from", dest="known", type=Path, help="predictions of an earlier run, instead of training")
    add("--runs", type=Path, default=HERE.parent / "runs" / "real_tissue", help="records; default: %(default)s")
    add("--threads", type=int, default=1)
    add("--out", type=Path, help="folder for tables, picture and predictions")
    args = parser.parse_args()
    table = pd.read_csv(args.known, dtype={"patient": str}) if args.known else pd.DataFrame(measure(args))
    packages = ", ".join(f"{name} {sys.modules[name].__version__}" for name in ("torch", "timm") if name in sys.modules)
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} thread(s); {packages or 'from predictions'}"
    )
    text = report(table, " ".join(["python", "benchmarks/real_tissue.py", *map(_plain, sys.argv[1:])]), machine)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        table.to_csv(args.out / "real_tissue.csv.gz", index=False)
        (args.out / "real_tissue.md").write_text(text)
        picture(table, args.out / "real_tissue.png")


def _plain(word: str) -> str:
    """A path's last part: where things lay on one machine is of no use on another."""
    return Path(word).name if word.startswith("/") else word


if __name__ == "__main__":
    main()
