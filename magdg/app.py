"""A page in the browser: upload an image, say its scale, see probability, map, zoom curve, signature, similar cases."""

from pathlib import Path


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("model", metavar="REPO_OR_FOLDER", nargs="?", help="a model that this package wrote; default: the packaged one")
    add("--index", type=Path, metavar="DIR", help="index of `magdg search --build`, to show similar cases")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in; default: %(default)s")
    add("--port", type=int, default=7860, help="default: %(default)s")


def execute(args) -> int:
    from magnification_invariant.predict.app import LAUNCH, build

    build(args.model, index=args.index).launch(server_name=args.host, server_port=args.port, **LAUNCH)
    return 0
