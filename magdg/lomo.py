"""Leave one magnification or scanner out: train and test every method x held-out x fold x seed, print the table."""

from magdg.options import Parser, add_training_arguments, grid_settings
from magdg.sources import add_data_argument, add_embeddings_arguments, held_out_domains, load_data, positive

__all__ = ["Parser", "add_arguments", "execute"]


def add_arguments(parser) -> None:
    from magnification_invariant.tasks import TASKS

    add = parser.add_argument
    known = (
        f"{', '.join(TASKS)} or module:Class; of embeddings not gan, degraded, mixstyle, two_view, scale_pairs, frozen"
    )
    add("--methods", nargs="+", default=["erm", "dann"], metavar="METHOD", help=f"{known}; default: erm dann")
    add("--held-out", nargs="+", metavar="DOMAIN", help="default: every magnification in turn")
    add("--folds", nargs="+", type=int, metavar="N", help="which groups of patients to test; default: all")
    add("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default: 0")
    add("--workers", type=positive, default=1, metavar="N", help="cells at a time, each in a process; default: 1")
    add_data_argument(parser)
    add_embeddings_arguments(parser)
    add_training_arguments(parser)


def execute(args) -> int:
    cells, finished = train(args)
    return 0 if len(finished) == len(cells) else 1


def train(args) -> tuple[list, list]:
    """Cells, and the folders of those that finished; prints their table."""
    from magnification_invariant.data import Folds, describe
    from magnification_invariant.lomo.cell import Cell
    from magnification_invariant.lomo.grid import make_grid, run_grid
    from magnification_invariant.report.table import markdown, summarise

    settings = grid_settings(args, args.methods)
    ds = load_data(args)
    held_outs = held_out_domains(ds, args.held_out)
    print(describe(ds))
    n_folds = settings.get("n_folds", Cell.n_folds)
    folds = args.folds or range(len(Folds.from_json(settings["split"]).folds) if "split" in settings else n_folds)
    cells = make_grid(args.methods, held_outs, folds, args.seeds, **settings)
    finished = run_grid(cells, ds, args.output_dir, workers=args.workers, data_source=args.embeddings or args.data)
    print(markdown(summarise(finished)))
    return cells, finished
