"""Predict tested patients at one scale after the other: zoom.parquet in the cell's folder, for `magdg report`."""

from pathlib import Path

from magdg.arguments import add_data_argument, load_data, positive

HELP = "predict tested patients at one scale after the other"


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="CELL", help="finished cells, or folders of models with predictions")
    add("--images", type=positive, default=8, help="at most, of a patient at a magnification; default: %(default)s")
    add_data_argument(parser)


def run(args) -> int:
    from magnification_invariant.predict.zoom import write_zoom_curves

    ds = load_data(args)
    for folder in args.folders:
        print(write_zoom_curves(folder, ds, n_images=args.images))
    return 0
