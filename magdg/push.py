"""Publish a finished run, or a grid of them, on the Hub: weights, card, records; one commit a model, if it changed."""

from pathlib import Path


def add_arguments(parser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="RUN_FOLDER", help="folder of a run; with --all, of a grid of runs"
    )
    parser.add_argument("repo", metavar="REPO_ID", help="NAMESPACE/NAME, made if needed; with --all, NAMESPACE")
    parser.add_argument(
        "--all",
        action="store_true",
        help="fold 0, seed 0 of every method and held-out magnification, named by their tags",
    )
    parser.add_argument("--private", action="store_true", default=None, help="make the repository a private one")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--revision", metavar="BRANCH", help="commit to this branch, made if needed")
    where.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--dry-run", action="store_true", help="show files, sizes and card; send nothing")


def execute(args) -> int:
    from tqdm import tqdm

    from magnification_invariant.hub import publish, released

    cells = {args.repo: args.folder}
    if args.all:
        cells = {f"{args.repo}/{name}": cell for name, cell in released(args.folder).items()}
    bar = tqdm(cells.items(), desc="push", unit="model", disable=None if args.all else True)
    for repo, cell in bar:
        if args.dry_run:
            bar.write(_what_would_go(cell, repo))
            continue
        url = publish(cell, repo, private=args.private, revision=args.revision, create_pr=args.create_pr)
        bar.write(f"{cell} -> {url}" if url else f"{cell} -> {repo}: unchanged, skipped")
    return 0


def _what_would_go(cell: Path, repo: str) -> str:
    import tempfile

    from magnification_invariant.hub import stage

    with tempfile.TemporaryDirectory() as folder:
        staged = stage(cell, repo, Path(folder, "model"))
        sizes = [f"{path.stat().st_size:>12,}  {path.name}" for path in sorted(staged.iterdir())]
        card = (staged / "README.md").read_text(encoding="utf-8")
    return "\n".join([f"{cell} -> {repo} (dry run)", *sizes, "", card])
