"""Fetch a model's repository into a folder, which bare timm (local-dir:) and every command here take as a model."""

from pathlib import Path


def add_arguments(parser) -> None:
    parser.add_argument("repo", metavar="REPO", help="repository id, with @REVISION behind it if not main")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that does not exist yet")


def execute(args) -> int:
    from magnification_invariant.hub import fetch

    files = fetch(args.repo, args.folder)
    print(f"{args.repo} -> {args.folder}: {', '.join(files)}")
    return 0
