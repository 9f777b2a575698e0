"""Options of methods and of training: fields of a dataclass that know their help and what a search tries."""

from dataclasses import field, fields
from typing import Any


def option(
    default: Any, help: str, *, search: tuple | None = None, choices: tuple = (), bounds: tuple | None = None
) -> Any:
    """A field of an options dataclass; command flags, searches and tables of options are made from these.

    Args:
        default: Value, of the type that the field is annotated with.
        help: One line for the user, with the unit.
        search: `(low, high, "log")`, `(low, high, "linear")` or a tuple of values; None for what is not searched.
        choices: The only values allowed.
        bounds: Smallest and largest number allowed.

    Returns:
        A `dataclasses.field` with the arguments as metadata.
    """
    return field(default=default, metadata={"help": help, "search": search, "choices": choices, "bounds": bounds})


def check_options(options: Any) -> None:
    """For `__post_init__` of an options dataclass: refuses values of another type, out of bounds, or not to be chosen.

    A whole number given for a float becomes one, so that options that mean the same are equal and print the same.

    Raises:
        ValueError: Names the option, what it takes and what it was given.
    """
    for each in fields(options):
        value = getattr(options, each.name)
        if each.type is float and type(value) is int:
            object.__setattr__(options, each.name, value := float(value))
        choices, bounds = each.metadata.get("choices"), each.metadata.get("bounds")
        if each.type in (bool, int, float, str) and type(value) is not each.type:
            raise ValueError(f"{each.name} is of type {each.type.__name__}, not {value!r}")
        if bounds and not bounds[0] <= value <= bounds[1]:
            raise ValueError(f"{each.name} is at least {bounds[0]:g} and at most {bounds[1]:g}, not {value!r}")
        if choices and value not in choices:
            raise ValueError(f"unknown {each.name} {value!r}: choose from {', '.join(map(str, choices))}")
