"""A collection into a file: shards, a cut run, several processes, damaged files, and the command."""

import csv
import io
import json
import multiprocessing
import os
import resource

import numpy as np
import pyarrow.parquet as pq
import pytest
from accelerate import PartialState, debug_launcher
from accelerate.state import AcceleratorState
from PIL import Image

from magdg import main
from magnification_invariant import metrics
from magnification_invariant.files import Busy, locked
from magnification_invariant.predict import Classifier, items_of, predict_to_file
from magnification_invariant.predict import tables as predictions


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(predictions, "SHARD", 3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(10):
        coarse = Image.fromarray(rng.integers(60, 256, (12, 14, 3), dtype=np.uint8))
        coarse.resize((84, 72)).save(folder / f"{i}.png")
    (folder / "5.png").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def classifier(tiny_model):
    return Classifier.from_pretrained(tiny_model, device="cpu")


def rows_of(path):
    return pq.read_table(path).to_pylist()


def test_every_format_says_the_same(classifier, pictures, tmp_path):
    items = items_of(pictures, 0.5)
    for suffix in ("parquet", "csv", "json"):
        summary = predict_to_file(classifier, items, tmp_path / f"out.{suffix}")
        assert summary.images == 10 and [name for name, _ in summary.errors] == [str(pictures / "5.png")]
    rows = rows_of(tmp_path / "out.parquet")
    assert rows == json.loads((tmp_path / "out.json").read_text())
    with open(tmp_path / "out.csv", newline="") as file:
        for row, text in zip(rows, csv.DictReader(file), strict=True):
            assert text["probability"] == ("" if row["error"] else repr(row["probability"]))
            assert row["error"] or json.loads(text["signature"]) == row["signature"]
    names = sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock")
    assert names == ["out.csv", "out.json", "out.parquet"]
    direct = classifier.predict(pictures, 0.5)
    assert [row["probability"] for row in rows] == pytest.approx([row["probability"] for row in direct], abs=1e-6)
    with pytest.raises(ValueError, match=r"not as out\.txt"):
        predict_to_file(classifier, items, tmp_path / "out.txt")


def test_two_processes_do_not_mix_their_tables(classifier, pictures, tmp_path):
    out = tmp_path / "out.parquet"
    context = multiprocessing.get_context("fork")
    there, done = context.Event(), context.Event()

    def hold():
        with locked(out):
            there.set()
            done.wait(60)

    holder = context.Process(target=hold)
    holder.start()
    assert there.wait(60)
    with pytest.raises(Busy, match=r"out\.parquet is being written by another process .*since 20"):
        predict_to_file(classifier, items_of(pictures, 0.5), out)
    done.set()
    holder.join()
    assert predict_to_file(classifier, items_of(pictures, 0.5), out).images == 10


def test_a_cut_run_goes_on_where_it_stopped(classifier, pictures, tmp_path, monkeypatch):
    items, seen = items_of(pictures, 0.5), []
    iterate = Classifier.iterate

    def counted(self, items, **options):
        for row in iterate(self, items, **options):
            seen.append(row["filename"])
            if len(seen) == 8:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(Classifier, "iterate", counted)
    with pytest.raises(KeyboardInterrupt):
        predict_to_file(classifier, items, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
    predict_to_file(classifier, items, tmp_path / "out.parquet")
    assert seen[8:] == [item.name for item in items[6:]]  # two shards of three were whole
    predict_to_file(classifier, items, tmp_path / "whole.parquet")
    assert rows_of(tmp_path / "out.parquet") == rows_of(tmp_path / "whole.parquet")


def test_shards_of_another_run_are_not_taken(classifier, pictures, tmp_path):
    items, out = items_of(pictures, 0.5), tmp_path / "out.parquet"
    with pytest.raises(RuntimeError):

        def cut():
            if list((tmp_path / "out.parquet.parts").glob("*.parquet")):
                raise RuntimeError

        predict_to_file(classifier, items, out, wait=cut)
    predict_to_file(classifier, items_of(pictures, 0.1), out)
    assert {row["native_mpp"] for row in rows_of(out)} == {0.1}


def test_no_cell_of_a_csv_is_a_formula(classifier, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["=1+1.png", "@SUM(1).png", "+1.png", "-1.png", "\t=1.png", "\r=1.png", "good.png"]
    for name in names:
        (tmp_path / name).write_bytes((pictures / "1.png").read_bytes())
    predict_to_file(classifier, items_of(".", 0.5), tmp_path / "out.csv")
    with open("out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {os.path.normpath(row["filename"]) for row in rows} == set(names)
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for row in rows for cell in row.values())
    assert all(0 <= float(row["probability"]) <= 1 for row in rows)
    file = io.StringIO()
    predictions.write_csv(file, ["error", "mpp"], [{"error": "=HYPERLINK()", "mpp": -0.5}])
    assert file.getvalue().splitlines() == ["error,mpp", "'=HYPERLINK(),-0.5"]


def test_no_space_left(classifier, pictures, tmp_path):
    """A limit on the size of files stands for a full disk: the write itself fails, at the merged file or a shard."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    items, out = items_of(pictures, 0.5), tmp_path / "out.parquet"
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="make room, or write elsewhere, and start the same command again"):
            predict_to_file(classifier, items, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not out.exists()
    assert predict_to_file(classifier, items, out).images == 10


def test_the_command(tiny_model, pictures, tmp_path, capsys):
    out = tmp_path / "out.csv"
    command = ["predict", str(pictures), "--model", str(tiny_model), "--out", str(out)]
    assert main([*command, "--mpp", "0.5"]) == 1
    printed = capsys.readouterr().out
    assert f"wrote 10 rows to {out}" in printed and "FAILED" in printed and "5.png: cannot identify" in printed
    good = ["predict", str(pictures / "1.png"), "--model", str(tiny_model), "--out", str(out)]
    assert main([*good, "--mpp", "0.5", "--view", "protocol"]) == 0
    assert main([*good, "--mpp", "2"]) == 0 and "coarser than the model knows" in capsys.readouterr().out
    assert main(good) == 1 and "its scale is not known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--mpp": "40"}, "if you mean a magnification of 40"),
        ({"--mpp": "0"}, "positive finite number"),
        ({"--mpp": "nan"}, "positive finite number"),
        ({"--model": "nobody/nothing"}, "neither a folder nor a Hub repository"),
        ({"--out": "predictions.txt"}, "not as predictions.txt"),
        ({"--out": "/proc/nowhere/out.csv"}, "cannot write"),
        ({"--data": "virtual"}, "either PATHs or --data"),
        ({"path": "nowhere"}, "no file, no pattern"),
    ],
)
def test_bad_arguments_are_an_error_in_one_line(tiny_model, pictures, tmp_path, capsys, changes, message):
    arguments = {"path": str(pictures), "--model": str(tiny_model), "--mpp": "0.5", "--out": str(tmp_path / "o.csv")}
    arguments |= changes
    path = arguments.pop("path")
    assert main(["predict", path, *(each for pair in arguments.items() for each in pair)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("magdg: error: ") and message in error and "Traceback" not in error


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_that_may_not_be_read(classifier, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o700)
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            items_of(tmp_path / "locked", 0.5)
    finally:
        os.seteuid(0)


def share(arguments, folder):
    status = main(arguments)
    (folder / f"process{PartialState().process_index}of{PartialState().num_processes}: {status}").touch()


@pytest.mark.slow
def test_two_processes_share_the_shards(classifier, tiny_model, pictures, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = ["predict", str(pictures), "--model", str(tiny_model), "--mpp", "0.5"]
    debug_launcher(share, ([*arguments, "--out", str(tmp_path / "two.parquet")], tmp_path), num_processes=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    # the damaged file is reported by the first process
    names = sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock")
    assert names == ["process0of2: 1", "process1of2: 0", "two.parquet"]
    predict_to_file(classifier, items_of(pictures, 0.5), tmp_path / "one.parquet")
    one, two = rows_of(tmp_path / "one.parquet"), rows_of(tmp_path / "two.parquet")
    assert [row["filename"] for row in one] == [row["filename"] for row in two]
    for a, b in zip(one, two, strict=True):
        assert (a["error"], b["probability"]) == (b["error"], pytest.approx(a["probability"], abs=1e-5))


def test_a_row_a_patient(classifier, tiny_model, pictures, tmp_path, capsys):
    items = items_of(pictures, 0.5)
    patients = ["a", "b", "a", "=1", "b", "c", "a", "a", "b", "a"]  # the damaged image is the only one of c
    for suffix in ("parquet", "csv", "json"):
        summary = predict_to_file(classifier, items, tmp_path / f"out.{suffix}", patients=patients)
        assert summary.patients == 4
    images, rows = rows_of(tmp_path / "out.parquet"), rows_of(tmp_path / "out.patients.parquet")
    assert rows == json.loads((tmp_path / "out.patients.json").read_text())
    assert [(row["patient"], row["images"], row["failed"]) for row in rows] == [
        ("a", 5, 0),
        ("b", 3, 0),
        ("=1", 1, 0),
        ("c", 1, 1),
    ]
    weight = metrics.patient_weights(patients)
    for row in rows[:3]:
        own = np.array([patient == row["patient"] for patient in patients])
        mean = sum(image["probability"] * w for image, w in zip(np.array(images)[own], weight[own], strict=True))
        assert row["probability"] == pytest.approx(mean) and row["error"] is None
        assert row["prediction"] == classifier.labels[int(mean >= 0.5)]
    assert rows[3]["probability"] is None and "none of the images" in rows[3]["error"]
    with open(tmp_path / "out.patients.csv", newline="") as file:
        assert [row["patient"] for row in csv.DictReader(file)] == ["a", "b", "'=1", "c"]
    command = ["predict", str(pictures), "--model", str(tiny_model), "--mpp", "0.5", "--out", str(tmp_path / "o.csv")]
    assert main([*command, "--group-regex", r"([0-4])\.png$|[5-9]\.png"]) == 2
    assert "finds no patient in 5 of 10 names" in capsys.readouterr().err
    for bad, message in (("(", "no regular expression"), ("a", "must have one group")):
        assert main([*command, "--group-regex", bad]) == 2 and message in capsys.readouterr().err
    assert main([*command, "--group-regex", r"(\d)\.png$"]) == 1  # for the damaged image
    assert f"wrote 10 patients to {tmp_path}/o.patients.csv" in capsys.readouterr().out


def test_patients_of_a_table_are_written(breakhis_tree, tiny_model, tmp_path, capsys):
    out = tmp_path / "out.parquet"
    command = ["predict", "--data", str(breakhis_tree), "--model", str(tiny_model), "--out", str(out)]
    assert main([*command, "--mpp", "0.3"]) == 0
    assert "wrote 32 rows" in (printed := capsys.readouterr().out) and "wrote 8 patients" in printed
    rows = rows_of(tmp_path / "out.patients.parquet")
    assert [row["images"] for row in rows] == [4] * 8
