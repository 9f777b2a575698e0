"""Frozen networks on real tissue by the whole protocol: the 100X images of BreaKHis, at scales made by digital zoom.

Every image is shown at three scales (`data.scale.digital_zoom`: constant pixels, a shrinking field, so that the um/px
at the network's input differ), each scale is held out in turn, and the table of `magdg lomo --embeddings` is made on
the embeddings of each network. Real evidence at other magnifications it is not: these images are rescaled. The settings
of all methods are the defaults, fixed beforehand, and DANN stands there with other coefficients too: with so few
patients nothing is chosen.

    python benchmarks/tissue_embeddings.py --data path/to/BreaKHis_v1 --weights densenet121_folder lite0_folder
    python benchmarks/tissue_embeddings.py --data virtual:n_patients=12 --weights test_magdg_resnet   # the same path

A run that was cut goes on where it stopped. No pixel and no embedding is written into the results.
"""

import argparse
import os
import shlex
import sys
import textwrap
import warnings
from pathlib import Path

TAKEN_AT, ZOOMED = 100, (100, 141, 200)
METHODS = ("erm", "dann", "cdann", "coral")
# Of DANN's coefficient, beside its default.
SCHEDULES = (("dann", 0.3), ("dann", 3.0), ("constant", 1.0), ("adaptive", 1.0))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="as of magdg lomo; of several magnifications, 100X is taken")
    add("--weights", nargs="+", required=True, metavar="NETWORK", help="model folders, or timm names")
    add("--images", type=int, default=6, help="of a patient, at most, evenly spread; default: %(default)s")
    add("--image-size", type=int, help="side of the networks' input; default: their own")
    add("--n-folds", type=int, default=4, help="groups of patients; default: %(default)s")
    add("--folds", nargs="+", type=int, help="default: all")
    add("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    add("--workers", type=int, default=1, help="cells at a time; default: %(default)s")
    add("--output-dir", type=Path, default=Path("runs/tissue_embeddings"), help="default: %(default)s")
    add("--results", type=Path, default=Path(__file__).parent / "results", help="default: %(default)s")
    return parser.parse_args()


def zoomed_images(data: str, images: int):
    """The table of at most `images` of each patient, each at every scale."""
    from magdg.sources import is_virtual, virtual_parameters
    from magnification_invariant import load_breakhis, load_virtual_slides
    from magnification_invariant.data.scale import digital_zoom

    if is_virtual(data):
        ds = load_virtual_slides(**{"magnifications": (TAKEN_AT,), **virtual_parameters(data)})
    else:
        ds = load_breakhis(data)
    rows: dict[str, list[int]] = {}
    for i, (patient, magnification) in enumerate(zip(ds["patient"], ds["magnification"], strict=True)):
        if magnification == TAKEN_AT:
            rows.setdefault(patient, []).append(i)
    chosen = []
    for each in rows.values():
        n = min(images, len(each))
        chosen += [each[i * len(each) // n] for i in range(n)]
    return digital_zoom(ds.select(chosen), ZOOMED)


def embedded(images, weights: str, size: int | None, folder: Path):
    """The table of a network's embeddings, made once."""
    from magnification_invariant.data.vectors import load_embeddings
    from magnification_invariant.lomo.embedded import embed_images, load_network

    out = folder / f"{Path(weights).name}.parquet"
    model, size = load_network(f"local-dir:{weights}" if Path(weights).is_dir() else weights, size)
    embed_images(images, model, size, out, network=Path(weights).name)
    return load_embeddings(out)


def cells(args: argparse.Namespace) -> list:
    from magnification_invariant.engine import FitConfig
    from magnification_invariant.lomo.embedded import VECTOR_FIT
    from magnification_invariant.lomo.grid import make_grid

    folds, fit = args.folds or range(args.n_folds), FitConfig(**VECTOR_FIT)
    planned = []
    for methods, model in ((METHODS, "mag_hidden"), (("erm",), "mag_linear")):
        planned += make_grid(methods, ZOOMED, folds, args.seeds, n_folds=args.n_folds, model=model, fit=fit)
    dann = [cell for cell in planned if cell.method == "dann"]
    for schedule, coeff in SCHEDULES:
        planned += [cell.with_settings({"coeff": coeff, "coeff_schedule": schedule}) for cell in dann]
    return list({cell.name: cell for cell in planned}.values())


def table(folders: list[Path]) -> str:
    """A line a method, over all held-out scales, folds and seeds."""
    from magnification_invariant.report.page import interval, markdown_table
    from magnification_invariant.report.runs import baseline, by_title, difference, estimate, read_runs

    runs = by_title(read_runs(folders))
    lines = []
    for title, group in runs.items():
        auc, brier, seen = estimate(group, "auc"), estimate(group), estimate(group, part="test_source")
        minus = "-"
        if base := baseline(title, runs):
            measured = difference(group, runs[base])
            minus = f"{measured.difference:+.4f} {interval(measured.low, measured.high, '+.4f')}"
        figures = [f"{each.value:.3f} {interval(each.low, each.high)}" for each in (auc, brier)]
        sizes = [run.results["signature"] for run in group if run.is_network]
        size = f"{sum(s['size'] for s in sizes) / len(sizes):.0f} of {sizes[0]['width']}" if sizes else "-"
        lines.append([title, str(len(group)), *figures, f"{brier.value - seen.value:+.4f}", minus, size])
    head = ["method", "runs", "AUC, unseen scale", "Brier", "Brier: unseen - seen", "Brier minus erm's", "signature"]
    return markdown_table(head, lines)


def main() -> None:
    args = parse_args()
    from magnification_invariant.lomo.grid import run_grid

    images, blocks = zoomed_images(args.data, args.images), []
    for weights in args.weights:
        name = Path(weights).name
        ds = embedded(images, weights, args.image_size, args.output_dir)
        finished = run_grid(cells(args), ds, args.output_dir / name, workers=args.workers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # too few patients for an interval: there is none in the table
            blocks.append(f"## {name} ({ds.features['embedding'].length} numbers)\n\n{table(finished)}")
    patients = len(set(images["patient"]))
    malignant = len({p for p, y in zip(images["patient"], images["label"], strict=True) if y})
    taken = len(images) // len(ZOOMED)
    size = f" Inputs are of {args.image_size} pixels." if args.image_size else ""
    about = (
        f"{len(images):,} images: {taken:,} photographs at {TAKEN_AT}X, at most {args.images} of a patient, each shown "
        f"as at {', '.join(f'{m}X' for m in ZOOMED)} by digital zoom (they are *rescaled*). {patients} patients, "
        f"{malignant} of them malignant, in {args.n_folds} groups; seeds {', '.join(map(str, args.seeds))}. Patients "
        "weigh the same; probabilities are temperature-scaled; intervals are 95 % over patients, given the trained "
        f"models. Settings are the defaults of `magdg lomo --embeddings`, fixed beforehand, but for DANN's where a row "
        f"names them.{size} Differences are not adjusted for their number."
    )
    command = shlex.join(["python", "benchmarks/tissue_embeddings.py", *shown(sys.argv[1:])])
    machine = f"{os.cpu_count()} CPU cores, one thread a cell."
    text = "\n\n".join(
        ["# Frozen networks on real tissue", f"`{command}`", textwrap.fill(f"{about} {machine}", 120), *blocks]
    )
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "tissue_embeddings.md").write_text(text + "\n")
    print(text)


def shown(arguments: list[str]) -> list[str]:
    """Arguments without the places of this machine."""
    return [Path(each).name if os.sep in each else each for each in arguments]


if __name__ == "__main__":
    main()
