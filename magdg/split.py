"""Deal the patients into folds and write them, so that other runs, tools and people can split the same way."""

from pathlib import Path

from magdg.sources import add_column_arguments, add_source_argument, held_out_domains, load_data


def add_arguments(parser) -> None:
    add_source_argument(parser)
    add_column_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the split file, split.json")
    parser.add_argument("--n-folds", type=int, default=5, help="groups of patients; default: %(default)s")
    parser.add_argument("--split-seed", type=int, default=0, help="deals patients to groups; default: %(default)s")
    parser.add_argument("--held-out", nargs="+", metavar="DOMAIN", help="check these only; default: all")


def execute(args) -> int:
    from magnification_invariant.data.splits import PARTS, deal_folds, domain_name

    ds = load_data(args)
    folds = deal_folds(ds, n_folds=args.n_folds, split_seed=args.split_seed)
    patients = ds["patient"][:]
    print(f"{'held out':>12} {'fold':>5}" + "".join(f"{part:>24}" for part in PARTS))
    for held_out in held_out_domains(ds, args.held_out):
        for fold in range(len(folds.folds)):
            split = folds.split(ds, held_out, fold)  # raises where a part would lack a class
            rows = [getattr(split, part) for part in PARTS]
            cells = [f"{len(part)} images/{len({patients[i] for i in part})} patients" for part in rows]
            print(f"{domain_name(held_out):>12} {fold:>5}" + "".join(f"{cell:>24}" for cell in cells))
    folds.to_json(args.out)
    print(f"\nwrote {args.out}; --split {args.out} reads it back")
    return 0
