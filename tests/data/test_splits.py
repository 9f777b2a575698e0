import json
import random

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from magnification_invariant.data.splits import (
    PARTS,
    Folds,
    Split,
    assert_disjoint,
    deal_folds,
    domain_column,
    leave_one_domain_out,
    leave_one_magnification_out,
)

DOMAINS = (40, 100, 200, 400)


def table(patients: dict, images: dict | None = None, seed: int | None = None) -> dict:
    """One row an image.

    Args:
        patients: Classes of each patient: a tuple, of which image i has the i-th, in turn.
        images: Images of each patient at each domain; default one a class.
        seed: Shuffles the rows.
    """
    rows = []
    for patient, classes in patients.items():
        for domain in DOMAINS:
            n = len(classes) if images is None else images[patient][domain]
            rows += [(patient, domain, classes[i % len(classes)], f"{patient}/{domain}/{i}") for i in range(n)]
    if seed is not None:
        random.Random(seed).shuffle(rows)
    return {name: [row[i] for row in rows] for i, name in enumerate(("patient", "magnification", "label", "filename"))}


def taken(ds: dict, rows: np.ndarray, column: str = "patient") -> set:
    return {ds[column][i] for i in rows}


def test_patients_of(ds: dict, **arguments) -> frozenset:
    split = leave_one_magnification_out(ds, **arguments)
    return frozenset(taken(ds, np.concatenate([split.test, split.test_source])))


test_patients_of.__test__ = False

patient_ids = st.one_of(st.integers(0, 10**6), st.text(min_size=1, max_size=6))


@st.composite
def patients_of_two_classes(draw, at_least: int = 3):
    ids = draw(st.lists(patient_ids, min_size=2 * at_least, max_size=24, unique_by=str))
    mixed = draw(st.integers(0, min(2, len(ids) - 2 * at_least)))
    benign = draw(st.integers(at_least, len(ids) - mixed - at_least))
    classes = [(0,)] * benign + [(1, 0)] * mixed + [(1,)] * (len(ids) - benign - mixed)
    return dict(zip(ids, classes, strict=True))


@given(patients_of_two_classes(), st.integers(3, 5), st.sampled_from(DOMAINS), st.integers(0, 4), st.randoms())
@settings(max_examples=200)
def test_any_table_is_split_without_leak_and_with_all_classes_or_refused(patients, n_folds, held_out, fold, rng):
    fold, split_seed, most = fold % n_folds, rng.randrange(99), rng.choice([0, 1, 1, 3])
    images = {p: {d: rng.randint(0, most) + (most == 3) for d in DOMAINS} for p in patients}
    ds = table(patients, images, seed=1)
    try:
        split = leave_one_magnification_out(ds, held_out, n_folds=n_folds, fold=fold, split_seed=split_seed)
    except ValueError as error:
        clear = (
            "no image of label",
            "groups of patients needs",
            "two classes",
            "leaves nothing",
            "No row has",
            "no rows",
        )
        assert any(words in str(error) for words in clear)
        event("refused")
        return
    train, val, test, source = (taken(ds, getattr(split, part)) for part in PARTS)
    assert not (train & val or train & (test | source) or val & (test | source))
    assert all(taken(ds, getattr(split, part), "label") == {0, 1} for part in PARTS)
    assert taken(ds, split.test, "magnification") == {held_out}
    seen = np.concatenate([split.train, split.val, split.test_source])
    assert held_out not in taken(ds, seen, "magnification")
    # What is in no part is exactly the held-out domain of patients who are not tested.
    unused = set(range(len(ds["label"]))) - set(seen.tolist()) - set(split.test.tolist())
    assert all(ds["magnification"][i] == held_out and ds["patient"][i] not in test for i in unused)
    assert all(np.all(np.diff(getattr(split, part)) > 0) for part in PARTS)


@given(patients_of_two_classes(at_least=5), st.integers(3, 5), st.integers(0, 99), st.randoms())
def test_groups_partition_the_patients_and_depend_on_nothing_else(patients, n_folds, split_seed, rng):
    ds = table(patients)
    arguments = [dict(n_folds=n_folds, fold=fold, split_seed=split_seed) for fold in range(n_folds)]
    groups = [test_patients_of(ds, held_out=40, **each) for each in arguments]
    assert sorted(map(str, patients)) == sorted(str(patient) for group in groups for patient in group)
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= 1
    for classes in set(patients.values()):
        sizes = [sum(patients[patient] == classes for patient in group) for group in groups]
        assert max(sizes) - min(sizes) <= 1

    # Every row is tested once, at its own magnification.
    splits = [leave_one_magnification_out(ds, held_out, **each) for held_out in DOMAINS for each in arguments]
    assert np.sort(np.concatenate([split.test for split in splits])).tolist() == list(range(len(ds["label"])))
    # The next group validates.
    for fold, split in enumerate(splits[:n_folds]):
        assert taken(ds, split.val) == groups[(fold + 1) % n_folds]

    # The same whatever is held out, however many images a patient has, in whatever order.
    other = table(patients, {p: {d: rng.randint(len(patients[p]), 4) for d in DOMAINS} for p in patients}, seed=2)
    for each, group in zip(arguments, groups, strict=True):
        assert all(test_patients_of(other, held_out=held_out, **each) == group for held_out in DOMAINS)


@given(patients_of_two_classes(at_least=4), st.randoms())
def test_row_order_does_not_matter(patients, rng):
    ds = table(patients)
    order = list(range(len(ds["label"])))
    rng.shuffle(order)
    shuffled = {name: [column[i] for i in order] for name, column in ds.items()}
    one = leave_one_magnification_out(ds, 200, n_folds=4)
    other = leave_one_magnification_out(shuffled, 200, n_folds=4)
    for part in PARTS:
        names = taken(ds, getattr(one, part), "filename")
        assert names == taken(shuffled, getattr(other, part), "filename")


PATIENTS = {f"14-{i}": (int(i >= 8),) for i in range(24)}  # 8 benign, 16 malignant


def test_the_deal_is_the_published_one():
    """Changing it would move patients between training and test of every model trained so far."""
    ds = table(PATIENTS)
    groups = [sorted(test_patients_of(ds, held_out=40, fold=fold)) for fold in range(5)]
    assert groups == GOLDEN
    assert test_patients_of(ds, held_out=40, split_seed=1) != set(GOLDEN[0])


GOLDEN = [
    ["14-12", "14-18", "14-23", "14-5", "14-7"],
    ["14-1", "14-11", "14-20", "14-6", "14-8"],
    ["14-14", "14-16", "14-2", "14-21", "14-3"],
    ["14-0", "14-13", "14-15", "14-17", "14-9"],
    ["14-10", "14-19", "14-22", "14-4"],
]


def as_dataset(ds):
    import datasets

    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=["benign", "malignant"]),
        magnification=datasets.Value("int32"),
        patient=datasets.Value("string"),
    )
    images = [f"/nowhere/{name}.png" for name in ds["filename"]]
    return datasets.Dataset.from_dict({**{k: ds[k] for k in list(features)[1:]}, "image": images}, features=features)


def test_every_kind_of_table_gives_the_same_split_and_no_image_is_opened():
    import pandas

    ds = table(PATIENTS, seed=3)
    hub = as_dataset(ds)
    arrays = {name: np.array(column) for name, column in ds.items()}
    tables = [hub, hub.with_format("torch"), hub.with_format("numpy"), hub.with_transform(lambda rows: rows["image"])]
    tables += [arrays, pandas.DataFrame(ds), pandas.DataFrame(ds, index=range(7, 7 + len(ds["label"])))]
    expected = leave_one_magnification_out(ds, 100)
    for other in tables:
        split = leave_one_magnification_out(other, np.int64(100))
        assert_disjoint(split, other)
        assert all(np.array_equal(getattr(split, part), getattr(expected, part)) for part in PARTS)
        assert split.train.dtype == np.int64


def test_domains_of_other_data_sets():
    ds = table(PATIENTS)
    other = {"patient": ds["patient"], "domain": [f"hospital {d}" for d in ds["magnification"]], "label": ds["label"]}
    assert (domain_column(ds), domain_column(other)) == ("magnification", "domain")
    split, expected = leave_one_domain_out(other, "hospital 40", fold=2), leave_one_magnification_out(ds, 40, fold=2)
    assert all(np.array_equal(getattr(split, part), getattr(expected, part)) for part in PARTS)
    assert_disjoint(split, other)


few = {f"14-{i}": (int(i >= 4),) for i in range(24)}
REFUSED = {
    "unknown domain": (table(PATIENTS), dict(held_out=20), r"No row has magnification 20; .* \[40, 100, 200, 400\]"),
    "domain of another type": (table(PATIENTS), dict(held_out="40"), r"No row has magnification '40'"),
    "one domain": (
        {**table(PATIENTS), "magnification": [40] * 96},
        dict(held_out=40),
        "Every row has magnification 40",
    ),
    "one class": ({**table(PATIENTS), "label": [1] * 96}, dict(held_out=40), "Every row has label 1"),
    "few patients": (table(few), dict(held_out=40), "only 4 of label 0, 20 of label 1"),
    "fold": (table(PATIENTS), dict(held_out=40, fold=5), "fold is 5; with n_folds=5 it runs from 0 to 4"),
    "negative fold": (table(PATIENTS), dict(held_out=40, fold=-1), "fold is -1"),
    "two groups": (table(PATIENTS), dict(held_out=40, n_folds=2), "at least 3"),
    "no patients": (
        {k: v for k, v in table(PATIENTS).items() if k != "patient"},
        dict(held_out=40),
        "no column 'patient'; it has 'magnification', 'label', 'filename'",
    ),
    "gaps": ({**table(PATIENTS), "patient": [None] * 96}, dict(held_out=40), "'patient' has no value in 96 rows"),
    "class missing at a domain": (
        {**table(PATIENTS), "magnification": [40 + 60 * label for label in table(PATIENTS)["label"]]},
        dict(held_out=40),
        r"train of fold 0 with magnification 40 held out has no image of label \[0\]",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused(why):
    ds, arguments, message = REFUSED[why]
    with pytest.raises(ValueError, match=message):
        leave_one_magnification_out(ds, **arguments)


def changed(split: Split, **parts) -> Split:
    return Split(**{**vars(split), **parts})


def test_assert_disjoint_names_what_leaks():
    ds = table(PATIENTS)
    split = leave_one_magnification_out(ds, 40)
    assert_disjoint(split, ds)
    row = {part: getattr(split, part)[0] for part in PARTS}
    unused = next(i for i, d in enumerate(ds["magnification"]) if d == 40 and i not in set(split.test))
    patient = {name: ds["patient"][i] for name, i in row.items()}

    def refuse(message: str, **parts):
        with pytest.raises(ValueError, match=message):
            assert_disjoint(changed(split, **parts), ds)

    refuse(f"in train and in test: {patient['test']}", train=[*split.train, row["test_source"]], test_source=[])
    refuse(f"in val and in test: {patient['test']}", val=[*split.val, row["test_source"]], test_source=[])
    refuse(f"in train and in val: {patient['val']}", train=[*split.train, row["val"]], val=split.val[1:])
    refuse(f"train has 1 rows at magnification 40.* patients: {ds['patient'][unused]}", train=[unused], val=[])
    refuse("test_source has 1 rows at magnification 40", test_source=[row["test"]], test=split.test[1:])
    refuse("test has 1 rows at magnification 100", test=[row["test_source"]], test_source=[])
    refuse("1 rows are taken more than once", train=[*split.train, row["train"]])
    refuse("the table only 96 rows", train=[*split.train, 96])
    refuse("rows from -1", train=[*split.train, -1])


@pytest.mark.parametrize("held_out", DOMAINS)
def test_the_small_tree_can_be_split(breakhis_tree, held_out):
    from magnification_invariant.data.breakhis import load_breakhis

    ds = load_breakhis(breakhis_tree)
    for fold in range(4):
        split = leave_one_magnification_out(ds, held_out, n_folds=4, fold=fold)
        assert [len(getattr(split, part)) for part in PARTS] == [12, 6, 2, 6]


def test_a_split_file_gives_the_same_splits_anywhere(tmp_path):
    ds = table(PATIENTS)
    deal_folds(ds, n_folds=4, split_seed=3).to_json(tmp_path / "split.json")
    assert [file.name for file in tmp_path.iterdir()] == ["split.json"]
    folds = Folds.from_json(tmp_path / "split.json")
    for fold in range(4):
        for held_out in DOMAINS:
            expected = leave_one_magnification_out(ds, held_out, n_folds=4, fold=fold, split_seed=3)
            again = folds.split(ds, held_out, fold)
            assert all(np.array_equal(getattr(again, part), getattr(expected, part)) for part in PARTS)
            assert {k: v for k, v in vars(again).items() if k not in PARTS} == {
                k: v for k, v in vars(expected).items() if k not in PARTS
            }
    # A file of the first edition, which named the columns too, is read.
    older = json.loads((tmp_path / "split.json").read_text()) | {"group_column": "patient", "note": ""}
    (tmp_path / "older.json").write_text(json.dumps(older))
    assert Folds.from_json(tmp_path / "older.json").folds == folds.folds
    # Of a part of the data, the patients who are there keep their places.
    some = table(
        {patient: classes for patient, classes in PATIENTS.items() if patient not in ("14-0", "14-20")}, seed=8
    )
    split = folds.split(some, 100, 1)
    assert taken(some, split.val) <= set(folds.folds[1]["val"])
    with pytest.raises(ValueError, match=r"1 of the table's patients are not in the split \(16-1\)"):
        folds.split(table({**PATIENTS, "16-1": (0,)}), 100, 1)
    with pytest.raises(ValueError, match="fold is 4; with n_folds=4 it runs from 0 to 3"):
        folds.split(ds, 100, 4)

    stored = json.loads((tmp_path / "split.json").read_text())
    stored["folds"][0]["train"].append(stored["folds"][0]["test"][0])
    (tmp_path / "split.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="patients in more than one part of a fold"):
        Folds.from_json(tmp_path / "split.json")
    for content in ("{", "[]", "{}", json.dumps({**stored, "kind": "other"})):
        (tmp_path / "split.json").write_text(content)
        with pytest.raises(ValueError, match="not a split file"):
            Folds.from_json(tmp_path / "split.json")


def test_magdg_split_writes_what_it_shows(breakhis_tree, tmp_path, capsys):
    from magdg import main
    from magnification_invariant.data.breakhis import load_breakhis

    arguments = ["split", str(breakhis_tree), "--out", str(tmp_path / "split.json")]
    assert main([*arguments, "--n-folds", "4"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("12 images/4 patients") == 16  # four folds, four magnifications
    ds = load_breakhis(breakhis_tree)
    split = Folds.from_json(tmp_path / "split.json").split(ds, 400, 2)
    assert np.array_equal(split.test, leave_one_magnification_out(ds, 400, n_folds=4, fold=2).test)
    assert main([*arguments, "--n-folds", "5"]) == 2
    assert "groups of patients needs" in capsys.readouterr().err
