"""Write a report on finished runs: one self-contained HTML page, and the same as Markdown with PNG pictures."""

from pathlib import Path

from magdg.arguments import add_data_argument, load_data

HELP = "write a report on finished runs: HTML, Markdown and PNG"


def add_arguments(parser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="output folders of magdg lomo, or cells")
    parser.add_argument("--output-dir", type=Path, default=Path("report"), help="default: %(default)s")
    parser.add_argument("--title", default="Leave one magnification out", help="default: %(default)s")
    parser.add_argument(
        "--compare",
        nargs=2,
        action="append",
        metavar=("A", "B"),
        help="rows to compare, e.g. dann erm or 'dann + zoom' 'erm + zoom'; the first pair is the primary one; "
        "default: every method with erm, dann first",
    )
    parser.add_argument(
        "--refits",
        type=int,
        default=0,
        metavar="N",
        help="refit every signature on N halves of its patients, e.g. 30, and compare those of different networks; "
        "refits take up to half a minute a cell and are kept in its folder; default: show those that are there",
    )
    parser.add_argument(
        "--dimensions",
        type=Path,
        metavar="CELL",
        help="write a second page: what the signature of this cell responds to, from the images of --data",
    )
    add_data_argument(parser)


def run(args) -> int:
    from magnification_invariant.report.contents import sections

    pairs = [tuple(pair) for pair in args.compare] if args.compare else None
    _write(args.output_dir, "report", args.title, sections(args.runs, pairs, refits=args.refits))
    if args.dimensions:
        from magnification_invariant.report.dimensions import dimension_sections

        title = f"What the signature of {args.dimensions.resolve().name} responds to"
        _write(args.output_dir, "dimensions", title, dimension_sections(args.dimensions, load_data(args)))
    return 0


def _write(folder: Path, name: str, title: str, sections: list) -> None:
    from magnification_invariant.report.page import write

    files = write(folder, name, title, sections)
    print(f"{files[1]}\n{files[0]}, {len(files) - 2} pictures")
