"""Write a report on finished runs: one self-contained HTML page, and the same as Markdown with PNG pictures."""

from pathlib import Path

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


def run(args) -> int:
    from magnification_invariant.report.contents import sections
    from magnification_invariant.report.page import write

    pairs = [tuple(pair) for pair in args.compare] if args.compare else None
    files = write(args.output_dir, "report", args.title, sections(args.runs, pairs))
    print(f"{files[1]}\n{files[0]}, {len(files) - 2} pictures")
    return 0
