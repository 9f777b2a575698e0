"""Flags made from dataclasses: what can be set stands once, where it is used, with its default and its help.

``python -m magdg.options`` prints the README's table of methods.
"""

import argparse
import os
from collections.abc import Iterable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from magdg.sources import is_virtual

IMAGE_SIZE, VIRTUAL_IMAGE_SIZE = 224, 64


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flag(parser, field: Field, note: str = "") -> None:
    """Add the flag of one field. Without it, the parsed arguments have no such attribute.

    Its kind follows from the field's default; a number whose default is a positive integer must be one too.

    Args:
        parser: or a group of one.
        field: with ``help`` in its metadata and, where only some values are allowed, ``choices``.
        note: for the help.
    """
    default, choices = field.default, field.metadata.get("choices")
    text = field.metadata["help"] + note + (f"; default: {default}" if default is not None else "")
    settings = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if isinstance(default, bool):
        settings["action"] = argparse.BooleanOptionalAction
    else:
        counts = isinstance(default, int) and default > 0
        settings |= {"type": positive if counts else str if default is None else type(default), "choices": choices}
        settings |= {} if choices else {"metavar": "N" if isinstance(default, int | float) else field.name.upper()}
    parser.add_argument(flag(field.name), **settings)


def add_dataclass_flags(parser, dataclass: type, skip: Iterable[str] = ()) -> None:
    """Add a flag for every field of a dataclass that has a help."""
    for field in fields(dataclass):
        if "help" in field.metadata and field.name not in set(skip):
            add_flag(parser, field)


def given(dataclass: type, values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that are fields of a dataclass."""
    return {field.name: values[field.name] for field in fields(dataclass) if field.name in values}


def options_of(methods: Iterable[str]) -> dict[str, dict[str, Field]]:
    """By name of an option, the methods that have it, and its field there."""
    from magnification_invariant.tasks import get_task

    owners: dict[str, dict[str, Field]] = {}
    for method in methods:
        for field in fields(get_task(method).Options):
            owners.setdefault(field.name, {})[method] = field
    return owners


class Parser(argparse.ArgumentParser):
    """Knows the options of all methods, and of those of your own that ``--method`` or ``--methods`` name."""

    def parse_known_args(self, args=None, namespace=None):
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--method", "--methods", nargs="+", default=[])
        from magnification_invariant.tasks import TASKS

        methods = dict.fromkeys([*TASKS, *first.parse_known_args(args)[0].method])
        group = self.add_argument_group("options of methods")
        for name, owners in options_of(methods).items():
            if flag(name) in self._option_string_actions:
                raise ValueError(f"{', '.join(owners)}: the option {name!r} is called as another flag; rename it")
            note = "" if len(owners) == len(methods) else f" ({', '.join(owners)})"
            add_flag(group, next(iter(owners.values())), note)
        return super().parse_known_args(args, namespace)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """What `magdg lomo` and ``examples/train.py`` share."""
    from magnification_invariant.engine import FitConfig
    from magnification_invariant.lomo.cell import RECIPES, ZOOM, Cell

    add = parser.add_argument
    recipes = "; ".join(f"{name}: {', '.join(f'{k} {v}' for k, v in each.items())}" for name, each in RECIPES.items())
    add("--recipe", choices=tuple(RECIPES), default="strong", help=f"{recipes}; default: %(default)s")
    add("--zoom", action="store_true", help=f"train with continuous zoom, in [1 / {ZOOM}, {ZOOM}]")
    add(
        "--image-size", type=positive, help=f"pixels; default: {IMAGE_SIZE}, and {VIRTUAL_IMAGE_SIZE} on virtual slides"
    )
    add("--threads", type=positive, default=max(1, os.cpu_count() or 1), help="CPU threads; default: %(default)s")
    add_dataclass_flags(parser, FitConfig, skip={"seed", "zoom", "image_size"})
    add_dataclass_flags(parser, Cell, skip={"method", "held_out", "fold", "seed", "threads", "fit", "options"})
    add("--output-dir", type=Path, default=Path("runs"), help="one folder a cell is made in it; default: %(default)s")


def grid_settings(args: argparse.Namespace, methods: list[str]) -> dict[str, Any]:
    """Arguments of `lomo.grid.make_grid` beside method, held-out, fold and seed; flags win over the recipe.

    Raises:
        ValueError: an option that none of `methods` has.
    """
    from magnification_invariant.engine import FitConfig
    from magnification_invariant.lomo.cell import RECIPES, ZOOM, Cell
    from magnification_invariant.tasks import TASKS

    typed = vars(args)
    owners = options_of(dict.fromkeys([*TASKS, *methods]))
    options = {name: typed[name] for name in owners if name in typed}
    for name in options:
        if not owners[name].keys() & set(methods):
            raise ValueError(f"{flag(name)} is an option of {', '.join(owners[name])}, not of {', '.join(methods)}")
    size = args.image_size or (VIRTUAL_IMAGE_SIZE if is_virtual(args.data) else IMAGE_SIZE)
    values = RECIPES[args.recipe] | typed | {"image_size": size, "zoom": ZOOM if args.zoom else 1.0}
    fit = FitConfig(**given(FitConfig, {name: value for name, value in values.items() if name != "seed"}))
    apart = {"method", "held_out", "fold", "seed", "fit", "options"}
    cell = {name: value for name, value in values.items() if name not in apart}
    return {"options": options, "fit": fit} | given(Cell, cell)


def table_of_options() -> str:
    """The methods and their options as Markdown: what is trained, and every flag with its default."""
    from magnification_invariant.tasks import TASKS

    owners = options_of(TASKS)
    shared = [name for name in owners if len(owners[name]) == len(TASKS)]

    def flags(method: str, names: Iterable[str]) -> str:
        return ", ".join(f"`{flag(name)}` {owners[name][method].default}" for name in names if method in owners[name])

    lines = ["| `--method(s)` | what is trained | options |", "|---|---|---|"]
    for method, task in TASKS.items():
        what = task.__doc__.strip().splitlines()[0].rstrip(".:")
        lines.append(f"| `{method}` | {what} | {flags(method, (n for n in owners if n not in shared))} |")
    return "\n".join([*lines, "", f"All have {flags(next(iter(TASKS)), shared)}."])


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


if __name__ == "__main__":
    print(table_of_options())
