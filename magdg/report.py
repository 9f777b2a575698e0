"""Write a report on finished runs: one self-contained HTML page, and the same as Markdown with PNG pictures."""

from pathlib import Path


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUNS", help="output folders of magdg lomo, or cells")
    add("--output-dir", type=Path, default=Path("report"), help="default: %(default)s")
    add("--title", default="Leave one magnification out", help="default: %(default)s")
    add(
        "--compare",
        nargs=2,
        action="append",
        metavar=("A", "B"),
        help="rows to compare, e.g. dann erm or 'dann + zoom' 'erm + zoom'; the first pair is the primary one; "
        "default: every method with erm, dann first",
    )
    add(
        "--refits",
        type=int,
        default=0,
        metavar="N",
        help="refit every signature on N halves of its patients, e.g. 30: up to half a minute a cell, kept in its "
        "folder; default: show those that are there",
    )


def execute(args) -> int:
    from magnification_invariant.report.contents import sections
    from magnification_invariant.report.page import write

    pairs = [tuple(pair) for pair in args.compare] if args.compare else None
    files = write(args.output_dir, "report", args.title, sections(args.runs, pairs, refits=args.refits))
    print(f"{files[1]}\n{files[0]}, {len(files) - 2} pictures")
    return 0
