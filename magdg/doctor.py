"""Is a model what it was when it was published? Its fixture's logits again, its scale and input, and this machine."""


def add_arguments(parser) -> None:
    parser.add_argument("model", metavar="REPO_OR_FOLDER", help="Hub repository (with @REVISION if wanted) or folder")


def execute(args) -> int:
    from magnification_invariant.hub.doctor import examine

    report = examine(args.model)
    print(report)
    return 0 if report.healthy else 1
