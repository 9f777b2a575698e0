"""Flags made from dataclasses: what can be set stands once, where it is used, with its default and its help.

``python -m magdg.options`` prints the table of methods of docs/train.md.
"""

import argparse
import os
from collections.abc import Iterable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from magdg.sources import is_virtual, positive

VIRTUAL_IMAGE_SIZE = 64  # as large as the smallest virtual slides in use allow, and quick on a CPU


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flag(parser, field: Field, note: str = "", default: Any = None) -> None:
    """Add the flag of one field. Where it is not given, the parsed arguments have no such attribute.

    Its kind follows from the field's default; if that is a positive integer, every value must be one.

    Args:
        parser: or a group of one.
        field: with ``help`` in its metadata and, where only some values are allowed, ``choices``.
        note: behind the help.
        default: shown instead of the field's own.
    """
    own, choices = field.default, field.metadata.get("choices") or None
    shown = own if default is None else default
    help = field.metadata["help"] + note + (f"; default: {shown}" if shown is not None else "")
    settings: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
    if not isinstance(own, bool):
        counts = isinstance(own, int) and own > 0
        settings = {"type": positive if counts else str if own is None else type(own), "choices": choices}
        settings |= {} if choices else {"metavar": "N" if isinstance(own, int | float) else field.name.upper()}
    parser.add_argument(flag(field.name), default=argparse.SUPPRESS, help=help.replace("%", "%%"), **settings)


def add_dataclass_flags(parser, dataclass: type, *, skip: Iterable[str] = (), **defaults: Any) -> None:
    """Add a flag for every field of a dataclass that has a help; `defaults` are shown instead of the fields' own."""
    for field in fields(dataclass):
        if "help" in field.metadata and field.name not in skip:
            add_flag(parser, field, default=defaults.get(field.name))


def given(dataclass: type, values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that are fields of a dataclass with a help."""
    names = [field.name for field in fields(dataclass) if "help" in field.metadata]
    return {name: values[name] for name in names if name in values}


def options_of(methods: Iterable[str]) -> dict[str, dict[str, Field]]:
    """By name of an option, the methods that have it, and its field there: of all known methods and of `methods`."""
    from magnification_invariant.tasks import TASKS, get_task
    from magnification_invariant.tasks.floors import FLOORS

    owners: dict[str, dict[str, Field]] = {}
    for method in dict.fromkeys([*TASKS, *(method for method in methods if method not in FLOORS)]):
        for field in fields(get_task(method).Options):
            owners.setdefault(field.name, {})[method] = field
    return owners


class Parser(argparse.ArgumentParser):
    """Knows the options of all methods, and of those of your own that ``--method`` or ``--methods`` name."""

    def parse_known_args(self, args=None, namespace=None):
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--method", "--methods", nargs="+", default=[])
        group = self.add_argument_group("options of methods")
        for name, owners in options_of(first.parse_known_args(args)[0].method).items():
            if flag(name) in self._option_string_actions:
                raise ValueError(f"{', '.join(owners)}: the option {name!r} is called as another flag; rename it")
            add_flag(group, next(iter(owners.values())), f" ({', '.join(owners)})")
        return super().parse_known_args(args, namespace)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """What `magdg lomo` and ``examples/train.py`` share."""
    from magnification_invariant.engine import FitConfig
    from magnification_invariant.lomo.cell import RECIPES, ZOOM, Cell

    add = parser.add_argument
    recipes = "; ".join(f"{name}: {', '.join(f'{k} {v}' for k, v in each.items())}" for name, each in RECIPES.items())
    add("--recipe", choices=tuple(RECIPES), default="strong", help=f"{recipes}; default: %(default)s")
    add("--zoom", action="store_true", help=f"train with continuous zoom, in [1 / {ZOOM}, {ZOOM}]")
    sizes = f"{FitConfig.image_size}, on virtual slides {VIRTUAL_IMAGE_SIZE}"
    add_dataclass_flags(parser, FitConfig, skip=("seed", "zoom"), image_size=sizes)
    add_dataclass_flags(parser, Cell, threads="all", init="imagenet; on virtual slides none, but for frozen")
    add("--output-dir", type=Path, default=Path("runs"), help="one folder a cell is made in it; default: %(default)s")


def grid_settings(args: argparse.Namespace, methods: list[str]) -> dict[str, Any]:
    """Arguments of `lomo.grid.make_grid` beside method, held-out, fold and seed; flags win over the recipe.

    Raises:
        ValueError: an option that none of `methods` has, or one of images with embeddings.
    """
    from magnification_invariant.engine import FitConfig
    from magnification_invariant.lomo.cell import OF_PIXELS, RECIPES, ZOOM, Cell

    typed = {name: value for name, value in vars(args).items() if name not in ("seed", "zoom")}
    owners = options_of(methods)
    options = {name: typed[name] for name in owners if name in typed}
    for name in options:
        if not owners[name].keys() & set(methods):
            raise ValueError(f"{flag(name)} is an option of {', '.join(owners[name])}, not of {', '.join(methods)}")
    size = VIRTUAL_IMAGE_SIZE if is_virtual(args.data) else FitConfig.image_size
    values = {"threads": os.cpu_count() or 1, "image_size": size, "zoom": ZOOM if args.zoom else FitConfig.zoom}
    if getattr(args, "embeddings", None):
        from magnification_invariant.lomo.embedded import VECTOR_FIT
        from magnification_invariant.models import VECTOR_MODELS

        if wrong := [flag(name) for name in OF_PIXELS if name in typed] + ["--zoom"] * args.zoom:
            raise ValueError(f"{', '.join(wrong)}: of images, and there are --embeddings")
        values |= {"model": next(iter(VECTOR_MODELS)), **VECTOR_FIT}
    elif not is_virtual(args.data):
        values["init"] = "imagenet"
    values |= RECIPES[args.recipe] | typed
    return {"options": options, "fit": FitConfig(**given(FitConfig, values)), **given(Cell, values)}


def table_of_options() -> str:
    """The methods and their options as Markdown: what is trained, and every flag with its default."""
    from magnification_invariant.tasks import TASKS

    owners = options_of([])
    shared = [name for name in owners if len(owners[name]) == len(TASKS)]

    def flags(method: str, names: Iterable[str]) -> str:
        return ", ".join(f"`{flag(name)}` {owners[name][method].default}" for name in names if method in owners[name])

    lines = ["| `--method(s)` | what is trained | options |", "|---|---|---|"]
    for method, task in TASKS.items():
        what = (task.__doc__ or "").strip().splitlines()[0].rstrip(".:")
        lines.append(f"| `{method}` | {what} | {flags(method, (n for n in owners if n not in shared))} |")
    return "\n".join([*lines, "", f"All have {flags(next(iter(TASKS)), shared)}."])


if __name__ == "__main__":
    print(table_of_options())
