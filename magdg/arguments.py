"""Arguments that ``magdg lomo`` and ``examples/train.py`` share."""

import argparse
import json
import os
from pathlib import Path

VIRTUAL = "virtual"
_SOURCES = "BreaKHis: its folder, archive (.tar.gz, .zip), the archive's URL, Parquet, or a Hub dataset repository"


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        default=VIRTUAL,
        help=f"{_SOURCES}; or 'virtual' for procedural slides that need no download (default)",
    )
    add_column_arguments(parser)


def add_source_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help=_SOURCES)


def add_column_arguments(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group(
        "your own images",
        "a folder, .csv, .json, .jsonl or .parquet file, or Hub dataset repository, read by `datasets`; for these, say "
        "which column is what",
    )
    own.add_argument("--domain-column", metavar="NAME", help="what is held out: the scanner, the um/px, ...")
    groups = own.add_mutually_exclusive_group()
    groups.add_argument("--group-column", metavar="NAME", help="what must not be on both sides: the patient")
    groups.add_argument("--no-groups", action="store_true", help="every image is its own group: see the warning")
    own.add_argument("--image-column", metavar="NAME", help="images or their paths; default: image")
    own.add_argument("--label-column", metavar="NAME", help="two classes; default: label")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="timm architecture, e.g. test_magdg_resnet; default: the method's own ResNet-18")
    add("--recipe", choices=("paper", "strong"), default="strong", help="default: %(default)s")
    add("--zoom", action=argparse.BooleanOptionalAction, default=False, help="train with continuous zoom")
    add("--epochs", type=positive, default=10, help="default: %(default)s")
    add("--image-size", type=positive, help="pixels; default: 224, and 64 on virtual slides")
    add("--batch-size", type=positive, default=32, help="images a step over all processes; default: %(default)s")
    add("--learning-rate", type=float, default=1e-3, help="default: %(default)s")
    add("--weight-decay", type=float, default=0.05, help="default: %(default)s")
    add("--n-folds", type=positive, default=5, help="groups of patients; default: %(default)s")
    add("--split-seed", type=int, default=0, help="deals patients to groups; default: %(default)s")
    add("--split", metavar="FILE", help="split by the folds that `magdg split` wrote there instead")
    add("--threads", type=positive, default=max(1, os.cpu_count() or 1), help="CPU threads; default: %(default)s")
    add("--embedding", choices=("penultimate", "pyramid"), default="penultimate", help="what signatures are made of")
    add("--mixed-precision", choices=("no", "bf16", "fp16"), default="no", help="default: %(default)s")
    add("--compile", action="store_true", help="torch.compile; pays on a GPU, not on a CPU")
    add("--label-smoothing", type=float, default=0.0, help="default: %(default)s")
    add("--coeff", type=float, default=1.0, help="largest coefficient of the gradient reversal; default: %(default)s")
    add("--coeff-schedule", choices=("dann", "constant", "linear", "adaptive"), default="dann", help="default: dann")
    add(
        "--pretrained-backbone",
        metavar="WEIGHTS",
        help="start from a .safetensors file, model folder or Hub repository",
    )
    add("--gan-epochs", type=positive, default=200, help="of the DCGAN of the method gan; default: %(default)s")
    add(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the methods that have it, e.g. gamma=10 of coral; may be given several times",
    )
    add("--allow-seen-init", action="store_true", help="accept a start that saw the test; marked in every table")
    add("--output-dir", type=Path, default=Path("runs"), help="one folder a cell is made in it; default: %(default)s")


def cell_arguments(args: argparse.Namespace) -> dict:
    """The arguments of `cells.Cell` that are the same for a whole grid."""
    shared = ("model", "recipe", "zoom", "epochs", "batch_size", "learning_rate", "n_folds", "split_seed", "threads")
    shared += ("embedding", "pretrained_backbone", "allow_seen_init", "mixed_precision", "compile")
    shared += ("split", "weight_decay", "label_smoothing", "coeff", "coeff_schedule", "gan_epochs")
    size = args.image_size or (64 if args.data == VIRTUAL else 224)
    return {name: getattr(args, name) for name in shared} | {"image_size": size, "options": dict(args.option)}


def load_data(args: argparse.Namespace):
    """The table that ``--data`` and the names of columns mean.

    Raises:
        ValueError: columns are named, but not those of the domain and the group.
    """
    columns = {name: getattr(args, name) for name in ("domain_column", "group_column", "image_column", "label_column")}
    columns = {name: value for name, value in columns.items() if value is not None}
    if columns or args.no_groups:
        if "domain_column" not in columns:
            raise ValueError("--domain-column is missing: name the column of what is held out (scanner, um/px, ...)")
        if "group_column" not in columns and not args.no_groups:
            raise ValueError(
                "--group-column is missing: name the column of the patient, so that nobody is in training and in test. "
                "Where there is none, --no-groups makes every image its own group; images of one patient are then on "
                "both sides, and the results too good."
            )
    from magnification_invariant.data import load_breakhis, load_table, load_virtual_slides

    if not columns:
        return load_virtual_slides() if args.data == VIRTUAL else load_breakhis(args.data)
    source = load_virtual_slides() if args.data == VIRTUAL else args.data
    return load_table(source, **{"group_column": None} | columns)


def held_out_domains(ds, names: list[str] | None) -> list[int | str]:
    """The domains of a table that ``--held-out`` names, "200" or "200X" for example; all without names.

    Raises:
        ValueError: the table has no such domain.
    """
    from magnification_invariant.data.splits import domain_column, domain_name

    domains = sorted(set(ds[domain_column(ds)]))
    by_name = {name: domain for domain in domains for name in (str(domain), domain_name(domain))}
    unknown = [name for name in names or [] if name not in by_name]
    if unknown:
        raise ValueError(f"--held-out {unknown[0]}: the table has {', '.join(map(domain_name, domains))}")
    return [by_name[name] for name in names] if names else domains


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _option(text: str) -> tuple[str, bool | int | float | str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text} is not of the form name=value")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
