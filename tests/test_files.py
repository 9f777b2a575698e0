"""Files written whole or not at all, by one process at a time, with errors that say where and why."""

import json
import multiprocessing
import os
import resource
import signal
import threading
from contextlib import contextmanager

import numpy as np
import pytest

from magnification_invariant.files import Busy, CannotWrite, locked, read_json, whole, write_json


@contextmanager
def locked_elsewhere(path):
    """While the block runs, another process writes to `path`; gives its process id."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def hold():
        with locked(path):
            there.send("locked")
            there.recv()

    process = context.Process(target=hold)
    process.start()
    try:
        assert here.poll(60)
        yield process.pid
    finally:
        here.send("enough")
        process.join()


def write_old(path, is_folder):
    if is_folder:
        path.mkdir()
    (path / "old" if is_folder else path).write_text("before")


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_new_file_or_folder_takes_the_place_of_the_old_one_when_it_is_whole(tmp_path, is_folder):
    path = tmp_path / "made" / "results"
    path.parent.mkdir()
    write_old(path, is_folder)
    with whole(path) as unfinished:
        assert unfinished.parent == path.parent and unfinished.name.startswith(".results.")
        if is_folder:
            unfinished.mkdir()
        (unfinished / "new" if is_folder else unfinished).write_text("after")
        assert (path / "old" if is_folder else path).read_text() == "before"
    assert [p.name for p in path.parent.iterdir()] == ["results"]
    assert [p.name for p in path.iterdir()] == ["new"] if is_folder else path.read_text() == "after"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, FileNotFoundError])
@pytest.mark.parametrize("is_folder", [False, True])
def test_what_fails_leaves_what_was_there_and_nothing_else(tmp_path, is_folder, error):
    path = tmp_path / "results"
    write_old(path, is_folder)
    with pytest.raises(error), whole(path) as unfinished:
        if is_folder:
            unfinished.mkdir()
        (unfinished / "new" if is_folder else unfinished).write_text("half")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["results"]
    assert (path / "old" if is_folder else path).read_text() == "before"


def test_a_full_disk_is_named_with_the_path_and_nothing_is_lost(tmp_path):
    path, limits = tmp_path / "results.json", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_json(path, {"brier": 0.1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CannotWrite) as caught:
            write_json(path, {"curve": list(range(10_000))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot write {path}: File too large. What was there before is kept" in str(caught.value)
    assert read_json(path) == {"brier": 0.1} and os.listdir(tmp_path) == ["results.json"]


def test_a_place_that_cannot_be_written_to_is_named_with_the_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match=r"cannot write \S*/file/results\.json: (File exists|Not a directory)"):
        write_json(tmp_path / "file" / "results.json", {})
    for write in (lambda path: write_json(path, {}), lambda path: locked(path).__enter__()):
        with pytest.raises(CannotWrite, match=r"cannot write /sys/results\.json: (Permission denied|Read-only file)"):
            write("/sys/results.json")  # not even to root


def test_two_processes_do_not_write_to_one_place(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/magdg", "lomo", "--data", "virtual", "--zoom"])
    path = tmp_path / "runs" / "table"
    with locked_elsewhere(path) as pid:
        who = rf"\(magdg lomo --data virtual; process {pid} on .*, since 2\d\d\d-.*\); wait for it, or name another"
        with pytest.raises(Busy, match=rf"{path} is being written by another process {who}"):
            locked(path).__enter__()
        with locked(path.with_name("other")):
            pass
        waiting = threading.Thread(target=lambda: locked(path, wait=True).__enter__(), daemon=True)
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
    waiting.join(60)
    assert not waiting.is_alive()
    assert not list(path.parent.glob(".other.holder.json"))


def test_a_killed_process_leaves_neither_a_lock_nor_half_a_file(tmp_path):
    path, other = tmp_path / "table [1].csv", tmp_path / ".table 1.csv.1.tmp"
    other.write_text("of another table")
    with locked_elsewhere(path) as pid:
        (tmp_path / f".{path.name}.{pid}.tmp").write_text("half")
        os.kill(pid, signal.SIGKILL)
    with locked(path):
        assert [p.name for p in tmp_path.glob("*.tmp")] == [other.name]


def test_a_folder_whose_writer_was_killed_between_two_renames_comes_back(tmp_path):
    for aside, name in ((".model.v2.7.old.tmp", "before"), (".other.7.old.tmp", "of another folder")):
        (tmp_path / aside).mkdir()
        (tmp_path / aside / name).touch()
    (tmp_path / ".model.v2.7.tmp").mkdir()
    (tmp_path / "..model.v2.holder.json.7.tmp").touch()
    with locked(tmp_path / "model.v2"):
        assert [path.name for path in (tmp_path / "model.v2").iterdir()] == ["before"]
        assert [path.name for path in tmp_path.glob("*.tmp")] == [".other.7.old.tmp"]
    write_old(tmp_path / "new", True)
    (tmp_path / ".new.7.old.tmp").mkdir()
    with locked(tmp_path / "new"):  # both renames were done: what stepped aside goes
        assert (tmp_path / "new" / "old").read_text() == "before" and not (tmp_path / ".new.7.old.tmp").exists()


def test_json_has_no_nan_and_knows_numpy(tmp_path):
    path = tmp_path / "results.json"
    content = {"nan": float("nan"), "curve": np.array([1.5, np.inf]), "n": np.int64(3), "in": [(np.float32(0.5), None)]}
    write_json(path, content)
    assert read_json(path) == {"nan": None, "curve": [1.5, None], "n": 3, "in": [[0.5, None]]}
    json.loads(path.read_text(), parse_constant=pytest.fail)  # called for NaN and Infinity
    path.write_text('{"half":')
    with pytest.raises(ValueError, match=r"results\.json is not JSON, or damaged.*fetch or write it again"):
        read_json(path)


def test_a_folder_that_cannot_be_replaced_is_still_there(tmp_path, monkeypatch):
    path, replace = tmp_path / "results", os.replace
    write_old(path, True)

    def refuse(source, target):
        if os.path.isdir(os.path.join(source, "new")):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CannotWrite, match="What was there before is kept"), whole(path) as unfinished:
        (unfinished / "new").mkdir(parents=True)
    assert [p.name for p in tmp_path.iterdir()] == ["results"] and (path / "old").read_text() == "before"
