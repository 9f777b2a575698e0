"""Predict tested patients at one scale after the other: zoom.parquet in the cell's folder, for `magdg report`."""

from pathlib import Path

from magdg.sources import VIRTUAL, add_data_argument, load_data, positive


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="CELL", help="finished cells, or folders of models with predictions")
    add("--images", type=positive, default=8, help="at most, of a patient at a magnification; default: %(default)s")
    add_data_argument(parser, default=None, otherwise="what the cell was trained and tested on")


def execute(args) -> int:
    from magnification_invariant.predict.zoom import write_zoom_curves
    from magnification_invariant.records import Run

    tables = {}
    for folder in args.folders:
        source = args.data or Run(folder).config["cell"].get("data_source") or VIRTUAL
        if source not in tables:
            tables[source] = load_data(args, source)
        print(write_zoom_curves(folder, tables[source], n_images=args.images))
    return 0
