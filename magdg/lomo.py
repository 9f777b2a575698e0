"""Leave one magnification or scanner out: train and test every method x held-out x fold x seed, print the table."""

from magdg.arguments import (
    add_data_argument,
    add_training_arguments,
    cell_arguments,
    held_out_domains,
    load_data,
)

HELP = "train and test methods on a magnification they never saw"


def add_arguments(parser) -> None:
    add_data_argument(parser)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["erm", "dann"],
        metavar="METHOD",
        help="erm, dann, cdann, coral, mixstyle, multitask, gan, degraded, frozen or module:Class; default: erm dann",
    )
    parser.add_argument("--held-out", nargs="+", metavar="DOMAIN", help="default: every magnification in turn")
    parser.add_argument("--folds", nargs="+", type=int, help="which groups of patients to test; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time, each in a process; default: 1")
    add_training_arguments(parser)


def run(args) -> int:
    from magnification_invariant.data import Folds, describe
    from magnification_invariant.lomo.grid import make_grid, run_grid
    from magnification_invariant.report.table import markdown, summarise
    from magnification_invariant.tasks import get_task

    for method in args.methods:
        get_task(method)
    ds = load_data(args)
    held_outs = held_out_domains(ds, args.held_out)
    print(describe(ds))
    folds = args.folds or range(len(Folds.from_json(args.split).folds) if args.split else args.n_folds)
    cells = make_grid(args.methods, held_outs, folds, args.seeds, **cell_arguments(args))
    finished = run_grid(cells, ds, args.output_dir, workers=args.workers)
    print(markdown(summarise(finished)))
    return 0 if len(finished) == len(cells) else 1
