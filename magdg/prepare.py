"""Look a copy of BreaKHis over: is it whole, is anything there twice? On request write it as Parquet, or to the Hub."""

from pathlib import Path

from magdg.sources import add_source_argument


def add_arguments(parser) -> None:
    add_source_argument(parser)
    parser.add_argument("--strict", action="store_true", help="fail on any difference from the published data")
    parser.add_argument("--to-parquet", type=Path, metavar="DIR", help="write shards with the images, and a card")
    parser.add_argument(
        "--push",
        metavar="REPO",
        help="commit shards and card to this Hub dataset repository; a new one is private, as the licence is unclear",
    )


def execute(args) -> int:
    import tempfile
    from contextlib import nullcontext

    from magnification_invariant import hub_files
    from magnification_invariant.data.breakhis import load_breakhis, without_duplicate_slide
    from magnification_invariant.data.parquet import to_parquet
    from magnification_invariant.data.verification import verify

    try:
        everything = load_breakhis(args.data, drop_duplicate_slide=False)
    except ValueError as error:
        print(f"not BreaKHis, or a damaged copy: {args.data}\n\n! {error}")
        return 1
    report = verify(everything)
    print(report)
    if args.strict and report.differences:
        return 1
    if args.to_parquet or args.push:
        ds = without_duplicate_slide(everything)
        with nullcontext(args.to_parquet) if args.to_parquet else tempfile.TemporaryDirectory() as folder:
            shards = to_parquet(ds, folder)
            print(f"\nwrote {len(ds):,} images, {sum(p.stat().st_size for p in shards) / 1e6:,.0f} MB, to {folder}")
            if args.push:
                message = f"{len(ds):,} images ({report.kind})"
                url = hub_files.upload(
                    folder, args.push, repo_type="dataset", private=True, message=message, replace="data/*.parquet"
                )
                print(f"pushed: {url}" if url else f"{args.push} holds them already")
    return 0
