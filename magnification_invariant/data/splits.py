"""Splits by patient for a domain that training never sees (BreaKHis: leave one magnification out).

Patients are dealt once into groups that depend on nothing but their ids, their classes and a seed: the same for
every held-out domain, method and training seed. Group `fold` is tested, the next one validates, the rest trains.

A table is what `load_breakhis` or `load_table` gives, or anything else whose columns are had by ``ds[name]``: "label",
"patient", and "domain" or "magnification".
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass

import numpy as np

from magnification_invariant.files import read_json, write_json

PARTS = ("train", "val", "test", "test_source")


def domain_column(ds) -> str:
    """The column that says the domain: `load_table`'s "domain", or "magnification" of `load_breakhis`."""
    return "domain" if "domain" in _names(ds) else "magnification"


def domain_name(domain: int | str) -> str:
    """What to call a domain where people read: "200X" for a magnification, which is a whole number, or its own name."""
    return domain if isinstance(domain, str) else f"{domain}X"


class LackingClass(ValueError):
    """A part of a split has no image of one of the classes: few patients, or few of them at a domain."""


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of a table, int64, ascending, and what they follow from.

    Attributes:
        train: Rows to train on, of the domains that are not held out.
        val: Rows of other patients at the same domains: what a model may be chosen with.
        test: Rows of yet other patients at the held-out domain.
        test_source: Rows of the test patients at the training domains: what is lost on `test` against these is due
            to the domain and not to the patients.
        held_out: The domain that only `test` has.
        fold: The group of patients that is tested, of `n_folds`; the next group validates.
        split_seed: Seed of the deal.
    """

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    test_source: np.ndarray
    held_out: int | str
    fold: int = 0
    n_folds: int = 5
    split_seed: int = 0

    def __post_init__(self):
        for part in PARTS:
            object.__setattr__(self, part, np.asarray(getattr(self, part), dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Folds:
    """Who trains, validates and tests in each fold, whatever domain is held out: what a split file holds.

    Attributes:
        folds: for each fold the patients of "train", "val" and "test".
        split_seed: Seed of the deal.
    """

    folds: list[dict[str, list]]
    split_seed: int = 0

    def split(self, ds, held_out: int | str, fold: int = 0) -> Split:
        """The rows of `ds` for one held-out domain and fold.

        The table may lack some of the patients: it may be a part of the data that the folds were dealt for.

        Raises:
            ValueError: The domain, the fold or a patient of the table is unknown, or a part would lack a class.
        """
        if not 0 <= fold < len(self.folds):
            raise ValueError(f"fold is {fold}; with n_folds={len(self.folds)} it runs from 0 to {len(self.folds) - 1}.")
        column = domain_column(ds)
        domains, patients, labels = (column_values(ds, name) for name in (column, "patient", "label"))
        known = sorted(set(domains), key=lambda domain: (str(type(domain)), domain))
        if held_out not in known:
            raise ValueError(f"No row has {column} {held_out!r}; the table has {known}.")
        held_out = known[known.index(held_out)]  # the table's type: what NumPy scalar the caller had, JSON cannot write
        part_of = {patient: part for part, members in self.folds[fold].items() for patient in members}
        unknown = set(patients) - part_of.keys()
        if unknown:
            raise ValueError(
                f"{len(unknown)} of the table's patients are not in the split ({_some(unknown)}): it was made for "
                "other data. Make a new one."
            )
        rows: dict[str, list[int]] = {part: [] for part in PARTS}
        for i, (domain, patient) in enumerate(zip(domains, patients, strict=True)):
            part, unseen = part_of[patient], domain == held_out
            if part == "test":
                rows["test" if unseen else "test_source"].append(i)
            elif part in ("train", "val") and not unseen:
                rows[part].append(i)
        for part in PARTS:
            lacking = sorted(set(labels) - {labels[i] for i in rows[part]})
            if lacking:
                raise LackingClass(
                    f"{part} of fold {fold} with {column} {held_out!r} held out has no image of label {lacking}: its "
                    "patients have none at the domains it takes. Lower n_folds, take another split_seed, or leave out "
                    "domains that few patients have."
                )
        split = Split(**rows, held_out=held_out, fold=fold, n_folds=len(self.folds), split_seed=self.split_seed)
        assert_disjoint(split, ds)
        return split

    def to_json(self, path: str | os.PathLike) -> None:
        """Writes a split file, at once or not at all."""
        write_json(path, {"kind": "folds", **vars(self)})

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> Folds:
        """Reads a split file.

        Raises:
            ValueError: It is none, or has a patient in more than one part of a fold.
        """
        try:
            content = read_json(path)
            if content["kind"] != "folds":
                raise KeyError("kind")
            folds = cls(content["folds"], content["split_seed"])
            stored = [[patient for part in ("train", "val", "test") for patient in fold[part]] for fold in folds.folds]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a split file that `magdg split` wrote ({error!r}).") from error
        twice = {patient for patients in stored for patient, n in Counter(patients).items() if n > 1}
        if twice:
            raise ValueError(f"{path} has patients in more than one part of a fold: {_some(twice)}.")
        return folds


def deal_folds(ds, *, n_folds: int = 5, split_seed: int = 0) -> Folds:
    """Deals patients into groups; group `fold` is tested, the next one validates, the rest trains.

    Each group has as many patients as any other, of each class too, give or take one. Arguments and errors are those
    of `leave_one_domain_out`.
    """
    if n_folds < 3:
        raise ValueError(f"n_folds is {n_folds}; training, validation and test need at least 3 groups of patients.")
    labels, domains, patients = (column_values(ds, name) for name in ("label", domain_column(ds), "patient"))
    if len(set(domains)) == 1:
        raise ValueError(
            f"Every row has {domain_column(ds)} {domains[0]!r}; holding it out leaves nothing to train on."
        )
    classes: dict = {}  # that each patient has
    for patient, label in zip(patients, labels, strict=True):
        classes.setdefault(patient, set()).add(label)
    counts = Counter(label for has in classes.values() for label in has)
    if len(counts) == 1:
        raise ValueError(f"Every row has label {labels[0]!r}; a classifier needs two classes.")
    if min(counts.values()) < n_folds:
        raise ValueError(
            f"Every one of {n_folds} groups of patients needs one of each class, but there are only "
            f"{', '.join(f'{n} of label {label!r}' for label, n in sorted(counts.items()))}. Lower n_folds (3 at "
            "least) or add patients."
        )

    def place(patient) -> tuple:
        # Class by class, dealing on where the last one ended, keeps groups equal and each class spread evenly.
        return sorted(classes[patient]), hashlib.sha256(f"{split_seed}:{patient}".encode()).hexdigest()

    deal, folds = sorted(classes, key=place), []
    for fold in range(n_folds):
        parts: dict[str, list] = {"train": [], "val": [], "test": []}
        for i, patient in enumerate(deal):
            parts[{fold: "test", (fold + 1) % n_folds: "val"}.get(i % n_folds, "train")].append(patient)
        folds.append(parts)
    return Folds(folds, split_seed)


def leave_one_domain_out(ds, held_out: int | str, *, n_folds: int = 5, fold: int = 0, split_seed: int = 0) -> Split:
    """Splits a table by patient so that one domain is unseen in training, and so are the patients it is tested on.

    Rows of training and validation patients at the held-out domain are in no part. Over all folds, every patient is
    tested once at every domain. Each group has as many patients as any other, of each class too, give or take one.

    Args:
        ds: The table. Patients of several classes are dealt apart.
        held_out: The domain to test on; of BreaKHis 40, 100, 200 or 400.
        n_folds: Number of groups, at least three: one tests, one validates.
        fold: The group to test.
        split_seed: Seed of the deal.

    Returns:
        The split, its rows ascending.

    Raises:
        ValueError: A column is missing or has gaps, the domain is unknown or the only one, `fold` or `n_folds` is out
            of range, there are fewer patients of a class than groups, or a part would lack a class.
    """
    return deal_folds(ds, n_folds=n_folds, split_seed=split_seed).split(ds, held_out, fold)


leave_one_magnification_out = leave_one_domain_out  # the name by which it is known for BreaKHis


def assert_disjoint(split: Split, ds) -> None:
    """Checks that nothing of the test is seen before it: neither its patients nor its domain.

    Raises:
        ValueError: A patient is on two sides, a row is taken twice or is not in the table, the held-out domain is in
            another part than `test`, or another one in it. Says which.
    """
    column = domain_column(ds)
    patients, domains = column_values(ds, "patient"), column_values(ds, column)
    rows = np.concatenate([getattr(split, part) for part in PARTS])
    if rows.size and not 0 <= rows.min() <= rows.max() < len(patients):
        raise ValueError(f"The split has rows from {rows.min()} to {rows.max()}, the table only {len(patients)} rows.")
    twice = [i for i, n in Counter(rows.tolist()).items() if n > 1]
    if twice:
        raise ValueError(f"{len(twice)} rows are taken more than once: {_some(twice)}.")
    sides = {"train": split.train, "val": split.val, "test": np.concatenate([split.test, split.test_source])}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = {patients[i] for i in sides[one]} & {patients[i] for i in sides[other]}
        if shared:
            raise ValueError(f"{len(shared)} patients are in {one} and in {other}: {_some(shared)}.")
    for part in PARTS:
        wrong = [i for i in getattr(split, part) if (domains[i] == split.held_out) != (part == "test")]
        if wrong:
            raise ValueError(
                f"{part} has {len(wrong)} rows at {column} {_some({domains[i] for i in wrong})} while "
                f"{split.held_out!r} is held out; patients: {_some({patients[i] for i in wrong})}."
            )


def column_values(ds, name: str) -> list:
    """A column as a list of Python values; no other column is read, and so no image decoded.

    Raises:
        ValueError: The table has no such column or no rows, or the column has gaps.
    """
    if hasattr(ds, "with_format"):
        ds = ds.with_format(None)  # a transform that the caller set may want all columns, images too
    if name not in _names(ds):
        raise ValueError(f"The table has no column {name!r}; it has {', '.join(map(repr, _names(ds)))}.")
    values = ds[name][:]
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    if not values:
        raise ValueError("The table has no rows.")
    empty = [i for i, value in enumerate(values) if value is None or value != value]
    if empty:
        raise ValueError(f"Column {name!r} has no value in {len(empty)} rows ({_some(empty)}); fill or drop them.")
    return values


def _names(ds) -> list[str]:
    return getattr(ds, "column_names", None) or list(ds)


def _some(values) -> str:
    values = sorted(values, key=str)
    return ", ".join(map(str, values[:10])) + (", ..." if len(values) > 10 else "")
