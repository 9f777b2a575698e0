"""Where images come from: what ``--data`` means, and which column of a table is what."""

import argparse
from dataclasses import Field, fields
from typing import Any

VIRTUAL = "virtual"
_SOURCES = "BreaKHis: its folder, archive (.tar.gz, .zip), the archive's URL, Parquet, or a Hub dataset repository"
COLUMNS = ("domain_column", "group_column", "image_column", "label_column")


def add_data_argument(parser: argparse.ArgumentParser, default: str | None = VIRTUAL, otherwise: str = VIRTUAL) -> None:
    parser.add_argument(
        "--data",
        default=default,
        help=f"{_SOURCES}; or 'virtual' for procedural slides that need no download, with parameters if wanted, e.g. "
        f"virtual:n_patients=100,size=350x230; default: {otherwise}",
    )
    add_column_arguments(parser)


def add_embeddings_arguments(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("embeddings in the place of images, see docs/embeddings.md")
    own.add_argument("--embeddings", metavar="FILE", help="of any network: what magdg embed wrote, Parquet, HDF5, ...")
    own.add_argument("--manifest", metavar="CSV", help="id, patient, domain and label, where FILE does not say them")


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


def is_virtual(source: str) -> bool:
    return source.split(":")[0] == VIRTUAL


def load_data(args: argparse.Namespace, source: str | None = None):
    """The table that ``--data`` and the names of columns mean.

    Args:
        source: instead of ``--data``.

    Raises:
        ValueError: columns are named, but not those of the domain and the group; see `virtual_parameters`.
    """
    if getattr(args, "embeddings", None):
        from magnification_invariant.data.vectors import load_embeddings

        return load_embeddings(args.embeddings, args.manifest)
    columns = {name: getattr(args, name) for name in COLUMNS if getattr(args, name) is not None}
    if columns or args.no_groups:
        if "domain_column" not in columns:
            raise ValueError("--domain-column is missing: name the column of what is held out (scanner, um/px, ...)")
        if "group_column" not in columns and not args.no_groups:
            raise ValueError(
                "--group-column is missing: name the column of the patient, so that nobody is in training and in test. "
                "Where there is none, --no-groups makes every image its own group; images of one patient are then on "
                "both sides, and the results too good."
            )
    from magnification_invariant import load_breakhis, load_table, load_virtual_slides

    source = source or args.data
    slides = load_virtual_slides(**virtual_parameters(source)) if is_virtual(source) else None
    if columns or args.no_groups:
        return load_table(slides or source, **{"group_column": None} | columns)
    return slides or load_breakhis(source)


def virtual_parameters(source: str) -> dict[str, Any]:
    """Arguments of `load_virtual_slides` in words: ``virtual:n_patients=100,size=350x230``; of "virtual" none.

    Raises:
        ValueError: it has no such argument, or not of that kind.
    """
    from magnification_invariant.virtual_slides import Cohort

    kinds = {field.name: field for field in fields(Cohort)}
    parameters = {}
    for word in filter(None, source.partition(":")[2].split(",")):
        name, _, value = word.partition("=")
        if name not in kinds:
            raise ValueError(f"--data {source}: virtual slides have no {name!r}, but {', '.join(kinds)}")
        try:
            parameters[name] = _parsed(kinds[name], value)
        except (KeyError, ValueError) as error:
            example = str(kinds[name].default).strip("()").replace(", ", "x").lower()
            raise ValueError(f"--data {source}: {name} is given like {name}={example}, not {value!r}") from error
    return parameters


def _parsed(field: Field, text: str) -> bool | int | tuple[int, ...]:
    if isinstance(field.default, bool):
        return {"true": True, "false": False}[text]
    if not isinstance(field.default, tuple):
        return int(text)
    numbers = tuple(map(int, text.split("x")))
    if len(numbers) != len(field.default) and "..." not in str(field.type):
        raise ValueError(f"{len(numbers)} numbers")
    return numbers


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
    """Of a count on the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
