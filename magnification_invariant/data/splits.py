"""Splits by patient for a domain that training never sees (BreaKHis: leave one magnification out).

Patients are dealt once into groups that depend on nothing but their ids, their classes and a seed: the same for
every held-out domain, method and training seed. Group `fold` is tested, the next one validates, the rest trains.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

PARTS = ("train", "val", "test", "test_source")


def domain_column(ds) -> str:
    """The column that says the domain: `load_table`'s "domain", or "magnification" of `load_breakhis`."""
    return "domain" if "domain" in ds.column_names else "magnification"


def domain_name(domain: int | str) -> str:
    """What to call a domain where people read: "200X" for a magnification, which is a whole number, or its own name."""
    return domain if isinstance(domain, str) else f"{domain}X"


class LackingClass(ValueError):
    """A part of a split has no image of one of the classes: few patients, or few of them at a domain."""


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of a table, int64, and what they follow from.

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
    label_column: str = "label"
    domain_column: str = "magnification"
    group_column: str = "patient"

    def __post_init__(self):
        for part in PARTS:
            object.__setattr__(self, part, np.asarray(getattr(self, part), dtype=np.int64))

    def to_json(self, path: str | os.PathLike, ds) -> None:
        """Writes the patients of each part, which other copies of the same data can be split by.

        Args:
            path: File to write, at once or not at all.
            ds: The table that the rows are of.

        Raises:
            ValueError: The split takes only some of a patient's rows, so patients do not describe it.
        """
        groups = column_values(ds, self.group_column)
        patients = {
            "train": _distinct(groups, self.train),
            "val": _distinct(groups, self.val),
            "test": _distinct(groups, np.concatenate([self.test, self.test_source])),
        }
        taken = {patient for part in patients.values() for patient in part}
        # Patients who have images at the held-out domain only, but are not tested.
        patients["unused"] = sorted(set(groups) - taken, key=str)
        about = {name: value for name, value in vars(self).items() if name not in PARTS}
        again = _of_patients(ds, patients, **about)
        differing = [part for part in PARTS if not np.array_equal(np.sort(getattr(self, part)), getattr(again, part))]
        if differing:
            raise ValueError(
                f"A split is stored by its patients, but {differing} are not all rows of theirs at the domains they "
                f"belong to (held out: {self.held_out!r}). Make it with leave_one_domain_out on the same table."
            )
        _write_json(path, {**about, "patients": patients})

    @classmethod
    def from_json(cls, path: str | os.PathLike, ds) -> Split:
        """Finds the rows of `ds` that a stored split means, by patient, and checks them with `assert_disjoint`.

        Raises:
            ValueError: The file is no split, or it and the table do not have the same patients.
        """
        try:
            about = json.loads(Path(path).read_text(encoding="utf-8"))
            patients = about.pop("patients")
            stored = [patient for part in ("train", "val", "test", "unused") for patient in patients[part]]
            if differing := set(about) ^ ({field.name for field in fields(cls)} - set(PARTS)):
                raise KeyError(*differing)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a split that Split.to_json wrote ({error!r}).") from error
        twice = [patient for patient, n in Counter(stored).items() if n > 1]
        if twice:
            raise ValueError(f"{path} has patients in more than one part: {_some(twice)}.")
        there = set(column_values(ds, about["group_column"]))
        missing, new = set(stored) - there, there - set(stored)
        if missing or new:
            raise ValueError(
                f"{path} was made for other data: {len(missing)} of its patients are not in the table "
                f"({_some(missing)}), {len(new)} of the table's are not in it ({_some(new)}). Use the table it was "
                "made for, or make a new split."
            )
        split = _of_patients(ds, patients, **about)
        assert_disjoint(split, ds)
        return split


@dataclass(frozen=True, eq=False)
class Folds:
    """Who trains, validates and tests in each fold, whatever domain is held out: what a split file holds.

    Attributes:
        folds: for each fold the groups (patients) of "train", "val" and "test".
        split_seed: Seed of the deal.
        note: What readers of results must know of these folds; said whenever they are read.
    """

    folds: list[dict[str, list]]
    split_seed: int = 0
    label_column: str = "label"
    domain_column: str = "magnification"
    group_column: str = "patient"
    note: str = ""

    def split(self, ds, held_out: int | str, fold: int = 0) -> Split:
        """The rows of `ds` for one held-out domain and fold.

        The table may lack some of the groups: it may be a part of the data that the folds were dealt for.

        Raises:
            ValueError: The domain, the fold or a group of the table is unknown, or a part would lack a class.
        """
        if not 0 <= fold < len(self.folds):
            raise ValueError(f"fold is {fold}; with n_folds={len(self.folds)} it runs from 0 to {len(self.folds) - 1}.")
        split = _of_patients(
            ds,
            self.folds[fold],
            held_out=held_out,
            fold=fold,
            n_folds=len(self.folds),
            split_seed=self.split_seed,
            label_column=self.label_column,
            domain_column=self.domain_column,
            group_column=self.group_column,
        )
        labels = column_values(ds, self.label_column)
        for part in PARTS:
            lacking = sorted(set(labels) - {labels[i] for i in getattr(split, part)})
            if lacking:
                raise LackingClass(
                    f"{part} of fold {fold} with {self.domain_column} {held_out!r} held out has no image of "
                    f"{self.label_column} {lacking}: its patients have none at the domains it takes. Lower n_folds, "
                    "take another split_seed, or leave out domains that few patients have."
                )
        assert_disjoint(split, ds)
        return split

    def to_json(self, path: str | os.PathLike) -> None:
        """Writes a split file, at once or not at all."""
        _write_json(path, {"kind": "folds", **vars(self)})

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> Folds:
        """Reads a split file.

        Raises:
            ValueError: It is none, or has a group in more than one part of a fold.
        """
        try:
            about = json.loads(Path(path).read_text(encoding="utf-8"))
            if about.pop("kind") != "folds":
                raise KeyError("kind")
            folds = cls(**about)
            stored = [[group for part in ("train", "val", "test") for group in fold[part]] for fold in folds.folds]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a split file that `magdg split` wrote ({error!r}).") from error
        twice = {group for groups in stored for group, n in Counter(groups).items() if n > 1}
        if twice:
            raise ValueError(f"{path} has groups in more than one part of a fold: {_some(twice)}.")
        if folds.note:
            warnings.warn(folds.note, stacklevel=2)
        return folds


def deal_folds(
    ds,
    *,
    n_folds: int = 5,
    split_seed: int = 0,
    label_column: str = "label",
    domain_column: str = "magnification",
    group_column: str = "patient",
) -> Folds:
    """Deals patients into groups; group `fold` is tested, the next one validates, the rest trains.

    Each group has as many patients as any other, of each class too, give or take one. Arguments and errors are those
    of `leave_one_domain_out`.
    """
    if n_folds < 3:
        raise ValueError(f"n_folds is {n_folds}; training, validation and test need at least 3 groups of patients.")
    labels, domains, groups = (column_values(ds, name) for name in (label_column, domain_column, group_column))
    if len(set(domains)) == 1:
        raise ValueError(f"Every row has {domain_column} {domains[0]!r}; holding it out leaves nothing to train on.")
    classes = _classes(groups, labels)
    counts = Counter(label for has in classes.values() for label in has)
    if len(counts) == 1:
        raise ValueError(f"Every row has {label_column} {labels[0]!r}; a classifier needs two classes.")
    if min(counts.values()) < n_folds:
        raise ValueError(
            f"Every one of {n_folds} groups of patients needs one of each class, but there are only "
            f"{', '.join(f'{n} of {label_column} {label!r}' for label, n in sorted(counts.items()))}. "
            "Lower n_folds (3 at least) or add patients."
        )
    deal, folds = _shuffled(classes, split_seed), []
    for fold in range(n_folds):
        patients = {"train": [], "val": [], "test": []}
        for i, patient in enumerate(deal):
            patients[{fold: "test", (fold + 1) % n_folds: "val"}.get(i % n_folds, "train")].append(patient)
        folds.append(patients)
    return Folds(folds, split_seed, label_column, domain_column, group_column)


def official_folds(ds, *, split_seed: int = 0) -> Folds:
    """The five folds that were published with BreaKHis, to compare with papers that used them; warns of them.

    Fold i here is fold i + 1 there. They know training and test only: a fifth of the training patients validates.

    Args:
        ds: A table of `load_breakhis`.
        split_seed: Seed of the choice of the patients who validate.

    Raises:
        ValueError: The table has a slide that was not published, or has the duplicate slide twice.
    """
    from magnification_invariant.data.breakhis import SUBTYPES
    from magnification_invariant.data.published import OFFICIAL_FOLDS, slides

    columns = [column_values(ds, name) for name in ("subtype", "slide", "patient", "label")]
    rows = set(zip(*columns, strict=True))
    tested = {(SUBTYPES[slide.code[2:]], slide.slide): slide.tested for slide in slides()}
    unknown = {slide for subtype, slide, _, _ in rows if (subtype, slide) not in tested}
    if unknown:
        raise ValueError(f"{len(unknown)} slides are not BreaKHis's, so no official fold has them: {_some(unknown)}.")
    twice = [slide for slide, n in Counter(slide for _, slide, _, _ in rows).items() if n > 1]
    if twice:
        raise ValueError(f"Slide {_some(twice)} is there twice; load with drop_duplicate_slide=True.")
    folds = []
    for number in OFFICIAL_FOLDS:
        train = [row for row in rows if number not in tested[row[:2]]]
        deal = _shuffled(_classes([row[2] for row in train], [row[3] for row in train]), split_seed)
        part_of = {patient: "val" if i % len(OFFICIAL_FOLDS) == 0 else "train" for i, patient in enumerate(deal)}
        groups = {"train": [], "val": [], "test": []}
        for subtype, slide, patient, _ in sorted(rows):
            groups["test" if number in tested[subtype, slide] else part_of[patient]].append(slide)
        folds.append(groups)
    note = (
        "The official folds of BreaKHis are repeated hold-outs, not a partition, and each has sections of 6 to 8 "
        "biopsies both in training and in test, so results are too good. Use them only to compare with papers that did."
    )
    warnings.warn(note, stacklevel=2)
    return Folds(folds, split_seed, group_column="slide", note=note)


def leave_one_domain_out(
    ds,
    held_out: int | str,
    *,
    n_folds: int = 5,
    fold: int = 0,
    split_seed: int = 0,
    label_column: str = "label",
    domain_column: str = "magnification",
    group_column: str = "patient",
) -> Split:
    """Splits a table by patient so that one domain is unseen in training, and so are the patients it is tested on.

    Rows of training and validation patients at the held-out domain are in no part. Over all folds, every patient is
    tested once at every domain. Each group has as many patients as any other, of each class too, give or take one.

    Args:
        ds: A `datasets.Dataset`, or anything else whose columns are had by `ds[name]`.
        held_out: The domain to test on.
        n_folds: Number of groups, at least three: one tests, one validates.
        fold: The group to test.
        split_seed: Seed of the deal.
        label_column: The class. Patients of several classes are dealt apart.
        domain_column: What is held out.
        group_column: What must not be on both sides: the patient.

    Returns:
        The split, its rows ascending.

    Raises:
        ValueError: A column is missing or has gaps, the domain is unknown or the only one, `fold` or `n_folds` is out
            of range, there are fewer patients of a class than groups, or a part would lack a class.
    """
    columns = {"label_column": label_column, "domain_column": domain_column, "group_column": group_column}
    return deal_folds(ds, n_folds=n_folds, split_seed=split_seed, **columns).split(ds, held_out, fold)


def leave_one_magnification_out(ds, held_out: int, *, n_folds: int = 5, fold: int = 0, split_seed: int = 0) -> Split:
    """`leave_one_domain_out` of a table as `load_breakhis` gives it: `held_out` is 40, 100, 200 or 400."""
    return leave_one_domain_out(ds, held_out, n_folds=n_folds, fold=fold, split_seed=split_seed)


def assert_disjoint(split: Split, ds) -> None:
    """Checks that nothing of the test is seen before it: neither its patients nor its domain.

    Args:
        split: Rows of `ds`, with the names of its columns.
        ds: The table.

    Raises:
        ValueError: Rows are out of range or taken twice, patients are in more than one of train, val and test (with
            test_source), the held-out domain is in train, val or test_source, or another one is in test.
    """
    groups, domains = column_values(ds, split.group_column), column_values(ds, split.domain_column)
    rows = np.concatenate([getattr(split, part) for part in PARTS])
    if rows.size and not 0 <= rows.min() <= rows.max() < len(groups):
        raise ValueError(f"The split has rows from {rows.min()} to {rows.max()}, the table only {len(groups)} rows.")
    if len(np.unique(rows)) != rows.size:
        twice = [i for i, n in Counter(rows.tolist()).items() if n > 1]
        raise ValueError(f"{len(twice)} rows are taken more than once: {_some(twice)}.")

    sides = {
        "train": set(_distinct(groups, split.train)),
        "val": set(_distinct(groups, split.val)),
        "test": set(_distinct(groups, np.concatenate([split.test, split.test_source]))),
    }
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = sides[one] & sides[other]
        if shared:
            raise ValueError(f"{len(shared)} patients are in {one} and in {other}: {_some(shared)}.")
    for part in PARTS:
        wrong = [i for i in getattr(split, part) if (domains[i] == split.held_out) != (part == "test")]
        if wrong:
            raise ValueError(
                f"{part} has {len(wrong)} rows at {split.domain_column} {_some({domains[i] for i in wrong})} while "
                f"{split.held_out!r} is held out; patients: {_some({groups[i] for i in wrong})}."
            )


def _of_patients(ds, patients: dict[str, list], *, held_out, **about) -> Split:
    """The rows that `patients` of each part have at the domains which that part takes."""
    part_of = {patient: part for part, members in patients.items() for patient in members}
    domains, groups = column_values(ds, about["domain_column"]), column_values(ds, about["group_column"])
    known = sorted(set(domains), key=lambda domain: (str(type(domain)), domain))
    if held_out not in known:
        raise ValueError(f"No row has {about['domain_column']} {held_out!r}; the table has {known}.")
    held_out = known[known.index(held_out)]  # the table's type: what NumPy scalar the caller had, JSON cannot write
    unknown = set(groups) - part_of.keys()
    if unknown:
        raise ValueError(
            f"{len(unknown)} of the table's {about['group_column']} values are not in the split ({_some(unknown)}): it "
            "was made for other data. Make a new one."
        )
    rows: dict[str, list[int]] = {part: [] for part in PARTS}
    for i, (domain, patient) in enumerate(zip(domains, groups, strict=True)):
        part, unseen = part_of[patient], domain == held_out
        if part == "test":
            rows["test" if unseen else "test_source"].append(i)
        elif part != "unused" and not unseen:
            rows[part].append(i)
    return Split(**rows, held_out=held_out, **about)


def column_values(ds, name: str) -> list:
    """A column as a list of Python values; no other column is read, and so no image decoded."""
    if hasattr(ds, "with_format"):
        ds = ds.with_format(None)  # a transform that the caller set may want all columns, images too
    names = getattr(ds, "column_names", None) or list(ds)
    if name not in names:
        raise ValueError(f"The table has no column {name!r}; it has {', '.join(map(repr, names))}.")
    values = ds[name][:]
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    if not values:
        raise ValueError("The table has no rows.")
    empty = [i for i, value in enumerate(values) if value is None or value != value]
    if empty:
        raise ValueError(f"Column {name!r} has no value in {len(empty)} rows ({_some(empty)}); fill or drop them.")
    return values


def _classes(groups: list, labels: list) -> dict:
    """The classes that each patient has."""
    classes: dict = {}
    for patient, label in zip(groups, labels, strict=True):
        classes.setdefault(patient, set()).add(label)
    return classes


def _shuffled(classes: dict, split_seed: int) -> list:
    """Patients, class by class, in an order that follows from their ids and the seed alone.

    Dealing on where the last class ended keeps the groups' sizes equal, and each class spread evenly.
    """

    def key(patient) -> tuple:
        return sorted(classes[patient]), hashlib.sha256(f"{split_seed}:{patient}".encode()).hexdigest()

    return sorted(classes, key=key)


def _write_json(path: str | os.PathLike, content: dict) -> None:
    """Whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _distinct(values: list, rows: np.ndarray) -> list:
    return sorted({values[i] for i in rows}, key=str)


def _some(values) -> str:
    values = sorted(values, key=str)
    return ", ".join(map(str, values[:10])) + (", ..." if len(values) > 10 else "")
