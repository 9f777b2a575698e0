"""Look a copy of BreaKHis over: is it whole, is anything there twice, are the files the authors'?"""

from magdg.sources import add_source_argument


def add_arguments(parser) -> None:
    add_source_argument(parser)
    parser.add_argument("--strict", action="store_true", help="fail on any difference from the published data")


def execute(args) -> int:
    from magnification_invariant.data.breakhis import load_breakhis
    from magnification_invariant.data.verification import verify

    try:
        everything = load_breakhis(args.data, drop_duplicate_slide=False)
    except ValueError as error:
        print(f"not BreaKHis, or a damaged copy: {args.data}\n\n! {error}")
        return 1
    report = verify(everything)
    print(report)
    return 1 if args.strict and report.differences else 0
