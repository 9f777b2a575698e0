"""Tables of one's own: the same rows from every kind of source, clear errors, a scanner left out by the command."""

import csv
import io
import json
import os
import re
import shlex
import shutil
import warnings
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from magdg import main
from magnification_invariant.data.breakhis import load_breakhis
from magnification_invariant.data.scale import digital_zoom
from magnification_invariant.data.table import describe, load_table
from magnification_invariant.model_folder import read_model_config

SCANNERS = ("scanner a", "scanner b", "scanner c")
NAMES = {"image_column": "picture", "label_column": "diagnosis", "domain_column": "scanner", "group_column": "case"}
FLAGS = ["--image-column", "picture", "--label-column", "diagnosis", "--domain-column", "scanner"]
SMALL = ["--model", "test_magdg_resnet", "--image-size", "32", "--batch-size", "8", "--threads", "1", "--n-folds", "4"]
SMALL += ["--init", "none"]


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """8 cases x 3 scanners, of 40x48 pixels; `table.csv` names them."""
    folder = tmp_path_factory.mktemp("slides")
    rng, rows = np.random.default_rng(0), []
    for case in range(8):
        for s, scanner in enumerate(SCANNERS):
            grain = 8 if case % 2 else 4
            noise = np.kron(rng.random((40 // grain, 48 // grain, 1)), np.ones((grain, grain, 1)))
            pixels = noise * (230 - 30 * s, 180, 220) + (1 - noise) * (110, 60, 140)
            path = folder / f"case{case}" / f"{s}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            name = str(path.relative_to(folder))
            rows.append(
                {"picture": name, "diagnosis": ("benign", "cancer")[case % 2], "scanner": scanner, "case": case}
            )
    write_csv(folder / "table.csv", rows)
    return folder


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def table(slides):
    with pytest.warns(UserWarning, match="not known of 24 of 24"):
        return load_table(slides / "table.csv", **NAMES)


def pixels(ds):
    return [np.asarray(image).tobytes() for image in ds["image"]]


def test_columns(table):
    assert table.column_names == ["image", "label", "domain", "mpp", "patient", "slide", "filename"]
    assert table.features["label"].names == ["benign", "cancer"]
    assert table[4]["label"] == 1 and table[4]["domain"] == "scanner b" and table[4]["patient"] == "1"
    assert table["filename"][4] == "case1/1.png" and np.isnan(table["mpp"]).all()
    assert "24 images of 8 patients; label: benign 12, cancer 12" in describe(table)
    assert "scanner a 8, scanner b 8, scanner c 8" in describe(table)


def image_folder(slides, folder):
    shutil.copytree(slides, folder)
    rows = read_csv(folder / "table.csv")
    (folder / "table.csv").unlink()
    write_csv(folder / "metadata.csv", [{"file_name": row.pop("picture")} | row for row in rows])
    return folder, NAMES | {"image_column": "image"}


def csv_files(slides, folder):
    """A folder with nothing but tables, in two parts; the images are elsewhere."""
    folder.mkdir()
    rows = [row | {"picture": str(slides / row["picture"])} for row in read_csv(slides / "table.csv")]
    write_csv(folder / "a.csv", rows[:10])
    write_csv(folder / "b.csv", rows[10:])
    return folder, NAMES


def json_lines(slides, folder):
    rows = [row | {"case": int(row["case"])} for row in read_csv(slides / "table.csv")]
    (slides / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return slides / "t.jsonl", NAMES


def parquet_file(slides, folder):
    folder.mkdir()
    ds = datasets.Dataset.from_csv(str(slides / "table.csv"))
    encoded = [{"path": path, "bytes": (slides / path).read_bytes()} for path in ds["picture"]]
    ds = ds.remove_columns("picture").add_column("picture", encoded)
    ds.cast_column("picture", datasets.Image()).to_parquet(folder / "t.parquet")
    return folder / "t.parquet", NAMES


def dataset_with_splits(slides, folder):
    path, names = parquet_file(slides, folder)
    ds = datasets.Dataset.from_parquet(str(path))
    parts = datasets.DatasetDict(train=ds.select(range(10)), test=ds.select(range(10, 24)))
    for name, part in parts.items():
        part.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    path.unlink()
    return folder, names


@pytest.mark.parametrize("make", [image_folder, csv_files, json_lines, parquet_file, dataset_with_splits])
@pytest.mark.filterwarnings("ignore:micrometres")
def test_every_source_gives_equal_rows_and_pixels(slides, table, tmp_path, make):
    source, names = make(slides, tmp_path / "source")
    other = load_table(source, **names)
    for name in ("label", "domain", "patient"):
        assert other[name][:] == table[name][:], name
    assert pixels(other) == pixels(table)
    assert other.features == table.features


@pytest.mark.filterwarnings("ignore:micrometres")
def test_a_changed_file_gives_no_stale_rows(slides, tmp_path):
    folder, names = image_folder(slides, tmp_path / "copy")
    before = pixels(load_table(folder, **names))
    Image.new("RGB", (48, 40), "red").save(folder / "case0" / "0.png")
    rows = read_csv(folder / "metadata.csv")
    write_csv(folder / "metadata.csv", [row | {"diagnosis": row["diagnosis"].upper()} for row in rows])
    after = load_table(folder, **names)
    assert pixels(after)[0] != before[0] and pixels(after)[1:] == before[1:]
    assert after.features["label"].names == ["BENIGN", "CANCER"]


def test_scales_come_from_the_column_or_from_the_files(slides, tmp_path):
    rows = read_csv(slides / "table.csv")
    written = ["0.25", "", "NaN", "2.5e-1"]
    write_csv(slides / "scaled.csv", [row | {"mpp": written[i % 4]} for i, row in enumerate(rows)])
    with pytest.warns(UserWarning, match="not known of 12 of 24"):
        ds = load_table(slides / "scaled.csv", **NAMES)
    np.testing.assert_equal(ds["mpp"][:4], [0.25, np.nan, np.nan, 0.25])
    tiffs = []
    for row in rows:
        buffer = io.BytesIO()  # 40,000 pixels a centimetre
        Image.open(slides / row["picture"]).save(buffer, "TIFF", resolution=40_000, resolution_unit="cm")
        tiffs.append(row | {"picture": buffer.getvalue()})
    ds = load_table(datasets.Dataset.from_list(tiffs), **NAMES)
    assert np.allclose(ds["mpp"], 0.25)


@pytest.mark.parametrize("value", ["inf", "-inf", "0", "-0.5", "0.019", "20.1", "0,25", "fine"])
def test_a_scale_that_cannot_be_is_named(slides, value):
    rows = read_csv(slides / "table.csv")
    write_csv(slides / "scaled.csv", [row | {"mpp": value if i in (3, 8) else "0.25"} for i, row in enumerate(rows)])
    message = r"scaled\.csv: Column 'mpp', row 3, row 8 \(counted from 0; 2 of 24\): .*micrometres per pixel"
    with pytest.raises(ValueError, match=message):
        load_table(slides / "scaled.csv", **NAMES)


WRITTEN = ["007", "7", "1E5", "100000.0", "1.10", "1.1", "31415926535897932384", "31415926535897932385", "NA", "TRUE"]
WRITTEN += ["2020-01-01", "a b", "ä"]


def with_ids(slides, path, texts):
    """The table with other patients and scanners, in the text that the file has."""
    header, *lines = (slides / "table.csv").read_text().splitlines()
    assert header == "picture,diagnosis,scanner,case"
    rows = [line.split(",") for line in lines]
    lines = [f"{p},{d},{texts[i % len(texts)]},{texts[i % len(texts)]}" for i, (p, d, _, _) in enumerate(rows)]
    path.write_text("\n".join([header, *lines]), encoding="utf-8")


@pytest.mark.filterwarnings("ignore:micrometres")
@pytest.mark.parametrize("kind", ["file", "metadata"])
def test_ids_are_what_the_table_has_as_written(slides, tmp_path, kind):
    if kind == "file":
        source, names = slides / "written.csv", NAMES
        with_ids(slides, source, WRITTEN)
    else:
        source, names = image_folder(slides, tmp_path / "copy")
        with_ids(slides, source / "metadata.csv", WRITTEN)
        text = (source / "metadata.csv").read_text(encoding="utf-8")
        (source / "metadata.csv").write_text("\ufeff" + text.replace("picture", "file_name", 1), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "micrometres")
        ds = load_table(source, **names)
    expected = [WRITTEN[i % len(WRITTEN)] for i in range(24)]
    assert ds["patient"][:] == ds["domain"][:] == ds["slide"][:] == expected


@pytest.mark.filterwarnings("ignore:micrometres")
def test_numbers_of_typed_tables_are_written_as_they_are(slides, tmp_path):
    rows = [row | {"picture": str(slides / row["picture"])} for row in read_csv(slides / "table.csv")]
    case, scale = [31415926535897932384 + i for i in range(24)], [1234567.0 + i % 2 for i in range(24)]
    rows = [row | {"case": case[i], "scanner": scale[i]} for i, row in enumerate(rows)]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    ds = load_table(tmp_path / "t.json", **NAMES)
    assert ds["patient"][:] == list(map(str, case)) and set(ds["domain"]) == {"1234567.0", "1234568.0"}
    columns = {name: [row[name] for row in rows] for name in rows[0]} | {"case": [10**18 + i for i in range(24)]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "t.parquet")
    other = load_table(tmp_path / "t.parquet", **NAMES)
    assert other["patient"][1] == "1000000000000000001" and other["domain"][:] == ds["domain"][:]


@pytest.mark.filterwarnings("ignore:micrometres")
def test_blanks_at_the_ends_are_cut_off_and_said(slides, tmp_path):
    with_ids(slides, slides / "blanks.csv", ["a", " a", "a ", "b\u00a0", "A"])
    with pytest.warns(UserWarning) as said:
        ds = load_table(slides / "blanks.csv", **NAMES)
    assert set(ds["domain"]) == {"a", "b", "A"}
    said = [str(warning.message) for warning in said if "blanks" in str(warning.message)]
    assert sorted(message.split("'")[1] for message in said) == ["case", "scanner"]
    assert all("15 values (the first is ' a', row 1" in message for message in said)


@pytest.mark.filterwarnings("ignore:micrometres")
def test_a_picture_under_two_patients_is_said(slides, tmp_path):
    folder, names = image_folder(slides, tmp_path / "copy")
    shutil.copy(folder / "case0" / "0.png", folder / "case0" / "1.png")  # of one patient: no leak
    shutil.copy(folder / "case2" / "1.png", folder / "case5" / "2.png")
    with pytest.warns(UserWarning, match="1 pictures are there under more than one patient") as said:
        load_table(folder, **names)
    shown = next(str(warning.message) for warning in said if "pictures" in str(warning.message))
    assert "case2/1.png (patient 2) = case5/2.png (patient 5)" in shown


@pytest.mark.filterwarnings("ignore:micrometres")
def test_numbers_as_labels_are_in_their_order(slides):
    text = (slides / "table.csv").read_text().replace("benign", "9").replace("cancer", "10")
    (slides / "numbers.csv").write_text(text)
    ds = load_table(slides / "numbers.csv", **NAMES)
    assert ds.features["label"].names == ["9", "10"] and ds["label"][:6] == [0, 0, 0, 1, 1, 1]


def test_a_number_can_be_the_domain(slides, tmp_path):
    rows = read_csv(slides / "table.csv")
    write_csv(slides / "numbers.csv", [row | {"mpp": ("0.25", "0.50", "1")[i % 3]} for i, row in enumerate(rows)])
    ds = load_table(slides / "numbers.csv", **NAMES | {"domain_column": "mpp"})
    assert ds["domain"][:3] == ["0.25", "0.50", "1"] and ds["mpp"][:3] == [0.25, 0.5, 1.0]


def change(rows, **changed):
    return [row | {name: value(i, row) for name, value in changed.items()} for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    "changed, names, message",
    [
        ({}, {"label_column": "tumour"}, r"--label-column 'tumour'; the columns are 'picture', 'diagnosis'"),
        ({}, {"domain_column": "site", "group_column": "who"}, r"--domain-column 'site', --group-column 'who'"),
        ({"diagnosis": lambda i, row: "" if i == 3 else row["diagnosis"]}, {}, r"'diagnosis' has no value in 1 rows"),
        ({"case": lambda i, row: " " if i < 2 else row["case"]}, {}, r"'case' has no value in 2 rows \(0, 1\)"),
        ({"diagnosis": lambda i, row: "ABC"[i % 3]}, {}, r"'diagnosis' has 3 classes \('A', 'B', 'C'\)"),
        ({"picture": lambda i, row: row["picture"] + "x" * (i == 5)}, {}, r"1 images are not where.*case1/2\.pngx"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(slides, tmp_path, changed, names, message):
    rows = [row | {"picture": str(slides / row["picture"])} for row in read_csv(slides / "table.csv")]
    write_csv(tmp_path / "table.csv", change(rows, **changed))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_table(tmp_path / "table.csv", **NAMES | names)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty; a line with the names"),
        (b"picture,diagnosis,scanner,case\n\n", "has no rows, only the names of the columns: picture, diagnosis"),
        (b"picture;diagnosis;scanner;case\na.png;x;y;1\n", "is separated by semicolons; save it with commas"),
        (b"picture,diagnosis,scanner,case\na.png,x,M\xfcnchen,1\n", r"is not UTF-8 \(line 2: b'\\xfc'\); save it"),
        (b"picture,diagnosis,scanner,case\na.png,x,y,1\nb.png,x,Aachen, West,1\n", "line 3: 5 values for 4 columns"),
        (b"picture,diagnosis,case,case\na.png,x,y,1\n", "several columns named 'case'"),
    ],
)
@pytest.mark.parametrize("name", ["table.csv", "metadata.csv"])
def test_what_is_wrong_with_a_csv_is_said(tmp_path, content, message, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.* {message}"):
        load_table(tmp_path / name if name == "table.csv" else tmp_path, **NAMES)


@pytest.mark.filterwarnings("ignore:micrometres")
def test_a_folder_with_metadata(slides, tmp_path):
    folder, names = image_folder(slides, tmp_path / "copy")
    shutil.copy(folder / "case0" / "0.png", folder / "more.png")
    shutil.copy(folder / "case0" / "0.png", folder / "._more.png")
    with pytest.warns(UserWarning, match=r"1 images are in no table and are left out; the first: .*copy/more\.png"):
        assert len(load_table(folder, **names)) == 24
    shutil.copy(folder / "more.png", os.fsencode(folder) + b"/f\xe4.png")
    with pytest.raises(ValueError, match=r"f\\xe4\.png is not UTF-8; rename it"):
        load_table(folder, **names)


@pytest.mark.filterwarnings("ignore:micrometres")
def test_ids_of_a_hub_repository_are_as_written_or_it_is_said(slides, tmp_path, monkeypatch):
    """`datasets` reads a repository by the same builders as a folder, which stands in for it here."""
    place, load = tmp_path / "csv", datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda repo, revision, **options: load(str(place), **options))
    place.mkdir()
    with_ids(slides, slides / "ids.csv", ["007", "NA", "1E5"])
    rows = [row | {"picture": str(slides / row["picture"])} for row in read_csv(slides / "ids.csv")]
    write_csv(place / "train.csv", rows)
    assert load_table("me/table", **NAMES)["patient"][:3] == ["007", "NA", "1E5"]
    place, names = image_folder(slides, tmp_path / "images")
    with pytest.warns(UserWarning, match=r"me/images@main: columns 'case' of its metadata were read as numbers"):
        load_table("me/images@main", **names)


def test_sources_that_are_none(tmp_path):
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(ValueError, match=r"tables are \.csv"):
        load_table(tmp_path / "a.xlsx", **NAMES)
    with pytest.raises(FileNotFoundError, match=r"absent\.csv is not a folder, nor a file"):
        load_table(tmp_path / "absent.csv", **NAMES)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"b\.parquet cannot be read"):
        load_table(tmp_path / "b.parquet", **NAMES)
    (tmp_path / "c.json").write_text('{"picture": "a.png"}')
    with pytest.raises(ValueError, match=r"c\.json holds no list of objects"):
        load_table(tmp_path / "c.json", **NAMES)
    text = datasets.Value("string")
    kinds = {"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=["a", "b"]), "d": text, "g": text}
    unlabelled = {"image": [b"", b""], "label": [0, -1], "d": ["1", "2"], "g": ["1", "2"]}
    unlabelled = datasets.Dataset.from_dict(unlabelled, datasets.Features(kinds))
    with pytest.raises(ValueError, match=r"the table: Column 'label' has no class \(-1\) in 1 rows"):
        load_table(unlabelled, domain_column="d", group_column="g")
    with pytest.raises(ValueError, match="cannot read the image"):
        load_table(unlabelled, domain_column="d", group_column="g", label_column="d")
    with pytest.raises(ValueError, match="'e' holds no images"):
        load_table(unlabelled.map(lambda row: {"e": 1.5}), domain_column="g", group_column="g", image_column="e")


@pytest.mark.filterwarnings("ignore:micrometres")
def test_a_scanner_is_left_out_by_the_command(slides, tmp_path, capsys):
    """End to end: split file, training without scanner b, the table, a model that does not state a scale."""
    data, flags = str(slides / "table.csv"), [*FLAGS, "--group-column", "case"]
    split = tmp_path / "split.json"
    assert main(["split", data, *flags, "--out", str(split), "--n-folds", "4"]) == 0
    assert "scanner b     0" in capsys.readouterr().out
    command = ["lomo", "--data", data, *flags, "--held-out", "scanner b", "--folds", "0", "--epochs", "1", *SMALL]
    command += ["--split", str(split), "--output-dir", str(tmp_path / "runs")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "| dann     | scanner b |" in printed and "bX" not in printed
    (folder,) = (tmp_path / "runs").glob("dann-*lodo-scanner_b-fold0-seed0-*")
    records = pq.read_table(folder / "predictions.parquet").to_pandas()
    assert set(records[records.part == "test"].domain) == {"scanner b"} == set(records.held_out)
    assert set(records[records.part != "test"].domain) == {"scanner a", "scanner c"}
    tested, validated = (set(records[records.part == part].patient) for part in ("test", "val"))
    assert tested and not tested & validated
    config = read_model_config(str(folder / "model"))
    assert "mpp_range" not in config and config["mpp_source"] == []
    assert "lodo-scanner_b" in config["name"]
    assert config["seen"]["magnifications"] == ["scanner a", "scanner c"]
    assert json.loads((folder / "model" / "signature.json").read_text())["mpp_range"] is None
    assert main(command) == 0 and capsys.readouterr().out.count("skipped") == 4

    assert main([*command[:-1], str(tmp_path / "zoomed"), "--zoom"]) == 2
    assert "24 images have none" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--domain-column", "scanner"], "--group-column is missing"),
        (["--group-column", "case"], "--domain-column is missing"),
        (
            [*FLAGS, "--group-column", "case", "--held-out", "scanner d"],
            "the table has scanner a, scanner b, scanner c",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:micrometres")
def test_commands_want_a_domain_and_a_group(slides, capsys, flags, message):
    assert main(["split", str(slides / "table.csv"), *flags, "--n-folds", "4", "--out", "never.json"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:micrometres")
def test_without_groups_the_risk_is_said(slides, tmp_path):
    out, dealt = str(tmp_path / "split.json"), ["--n-folds", "3", "--split-seed", "8"]
    with pytest.warns(UserWarning, match="images of one patient will be in training and in test"):
        assert main(["split", str(slides / "table.csv"), *FLAGS, "--no-groups", *dealt, "--out", out]) == 0
    folds = json.loads((tmp_path / "split.json").read_text())["folds"]
    assert sorted(image for part in folds[0].values() for image in part)[:2] == ["case0/0.png", "case0/1.png"]


def test_two_scanners_are_enough(slides, tmp_path):
    """One domain to train on: the signature's refits then leave out patients."""
    from magnification_invariant.engine import FitConfig
    from magnification_invariant.lomo.cell import Cell
    from magnification_invariant.lomo.run import run_cell

    with pytest.warns(UserWarning, match="micrometres"):
        ds = load_table(slides / "table.csv", **NAMES)
    ds = ds.filter(lambda domain: domain != "scanner c", input_columns="domain")
    fit = FitConfig(epochs=1, image_size=32, batch_size=8)
    cell = Cell("erm", "scanner b", n_folds=4, model="test_magdg_resnet", fit=fit)
    run_cell(cell, ds, tmp_path / "run")
    signature = json.loads((tmp_path / "run" / "results.json").read_text())["signature"]
    assert signature.get("refits", "10 halves").startswith("10 halves")


def test_what_was_rescaled_is_marked_in_records_and_table(breakhis_tree, tmp_path, capsys):
    ds = load_breakhis(breakhis_tree)
    chosen = [i for i, magnification in enumerate(ds["magnification"]) if magnification == 100]
    digital_zoom(ds.select(chosen), (50, 100, 200)).to_parquet(tmp_path / "z.parquet")
    command = [
        "lomo",
        "--data",
        str(tmp_path / "z.parquet"),
        "--held-out",
        "50",
        "--folds",
        "0",
        "--methods",
        "erm",
    ]
    assert main([*command, "--epochs", "1", *SMALL, "--image-size", "16", "--output-dir", str(tmp_path / "runs")]) == 0
    assert "] rescaled: some images are digital zoom" in capsys.readouterr().out
    (folder,) = (tmp_path / "runs").glob("erm-*lomo50-fold0-seed0-*")
    records = pq.read_table(folder / "predictions.parquet").to_pandas()
    assert (records.rescaled == (records.domain != 100)).all()
    counted = json.loads((folder / "results.json").read_text())["rescaled"]
    assert counted["test"] == 2 and counted["train"] == 4 and counted["test_source"] == 2


@pytest.mark.slow
def test_the_example_of_the_page_runs(tmp_path, capsys, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "your_shift.md").read_text(encoding="utf-8")
    python, command = re.findall(r"```(?:python|bash)\n(.*?)```", page, re.DOTALL)[:2]
    monkeypatch.chdir(tmp_path)
    exec(compile(python, "your_shift.md", "exec"), {})
    assert main(shlex.split(command.replace("\\\n", ""))[1:]) == 0
    printed = capsys.readouterr().out
    assert "180 images of 30 patients" in printed and re.search(r"\| dann +\| scanner_b \|", printed)
