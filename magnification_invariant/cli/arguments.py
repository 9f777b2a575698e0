"""Arguments that ``magdg lomo`` and ``examples/train.py`` share."""

import argparse
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


def add_source_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help=_SOURCES)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="timm architecture, e.g. test_magdg_resnet; default: the method's own ResNet-18")
    add("--recipe", choices=("paper", "strong"), default="strong", help="default: %(default)s")
    add("--zoom", action=argparse.BooleanOptionalAction, default=False, help="train with continuous zoom")
    add("--epochs", type=_positive, default=10, help="default: %(default)s")
    add("--image-size", type=_positive, help="pixels; default: 224, and 64 on virtual slides")
    add("--batch-size", type=_positive, default=32, help="images a step over all processes; default: %(default)s")
    add("--learning-rate", type=float, default=1e-3, help="default: %(default)s")
    add("--n-folds", type=_positive, default=5, help="groups of patients; default: %(default)s")
    add("--split-seed", type=int, default=0, help="deals patients to groups; default: %(default)s")
    add("--split", metavar="FILE", help="split by the folds that `magdg split` wrote there instead")
    add("--threads", type=_positive, default=max(1, os.cpu_count() or 1), help="CPU threads; default: %(default)s")
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
    add("--gan-epochs", type=_positive, default=200, help="of the DCGAN of the method gan; default: %(default)s")
    add("--allow-seen-init", action="store_true", help="accept a start that saw the test; marked in every table")
    add("--output-dir", type=Path, default=Path("runs"), help="one folder a cell is made in it; default: %(default)s")


def cell_arguments(args: argparse.Namespace) -> dict:
    """The arguments of `lomo.Cell` that are the same for a whole grid."""
    shared = ("model", "recipe", "zoom", "epochs", "batch_size", "learning_rate", "n_folds", "split_seed", "threads")
    shared += ("embedding", "pretrained_backbone", "allow_seen_init", "mixed_precision", "compile")
    shared += ("split", "label_smoothing", "coeff", "coeff_schedule", "gan_epochs")
    size = args.image_size or (64 if args.data == VIRTUAL else 224)
    return {name: getattr(args, name) for name in shared} | {"image_size": size}


def load_data(source: str):
    """The table that ``--data`` names."""
    from magnification_invariant.data import load_breakhis, load_virtual_slides

    return load_virtual_slides() if source == VIRTUAL else load_breakhis(source)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
