"""Killed at any moment and started again, a cell ends as one that was left alone, bit for bit."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from magnification_invariant import engine
from magnification_invariant.data.breakhis import load_breakhis
from magnification_invariant.engine import FitConfig
from magnification_invariant.lomo.cell import Cell
from magnification_invariant.lomo.grid import run_grid
from magnification_invariant.lomo.run import run_cell
from magnification_invariant.records import Run

FIT = FitConfig(epochs=6, image_size=32, batch_size=8)
SHARED = {"n_folds": 4, "model": "test_magdg_resnet"}
CELL = Cell("dann", 200, fit=FIT, **SHARED)
FLOOR = ("predictions.parquet", "results.json")
KILLS = 6
RECORDS = (*FLOOR, "embeddings.parquet", "embeddings.safetensors", "metrics.jsonl", "model/model.safetensors")


@pytest.fixture(autouse=True)
def a_checkpoint_every_epoch(monkeypatch):
    monkeypatch.setattr(engine, "CHECKPOINT_SECONDS", 0)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in RECORDS}


def work(cell, tree, folder, slow_save):
    if slow_save:  # a checkpoint write that takes its time, so that some kills fall into it
        save = torch.save

        def slowly(state, file):
            save(state, file)
            file.flush()
            time.sleep(0.05)

        torch.save = slowly
    run_cell(cell, load_breakhis(tree), folder)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["erm", "dann", "gan"])
def test_killed_at_random_moments(breakhis_tree, tmp_path, method):
    cell = Cell(method, 200, fit=FIT, **SHARED).with_settings({"gan_epochs": 2} if method == "gan" else {})
    context, rng = multiprocessing.get_context("fork"), random.Random(0)
    started = time.perf_counter()
    work(cell, breakhis_tree, tmp_path / "alone", False)
    takes = time.perf_counter() - started
    if method != "gan":
        takes = min(takes, 2.0)  # the first run in a process is slower than the rest
    kills = 0
    for attempt in range(60):
        engine.CHECKPOINT_SECONDS = attempt % 3 * 0.1 * takes  # also with epochs that left none
        process = context.Process(target=work, args=(cell, breakhis_tree, tmp_path / "killed", True))
        process.start()
        process.join(timeout=rng.uniform(0.05, 0.4) * takes if kills < 6 else 300)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        elif Run(tmp_path / "killed").is_finished:
            break
    assert kills >= 3
    assert contents(tmp_path / "alone") == contents(tmp_path / "killed")
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_full_disk_keeps_the_last_good_checkpoint(breakhis_tree, tmp_path, monkeypatch):
    ds, saves = load_breakhis(breakhis_tree), []
    run_cell(CELL, ds, tmp_path / "alone")
    save = torch.save

    def full(state, file):
        saves.append(1)
        if len(saves) == 4:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(engine.torch, "save", full)
    with pytest.raises(OSError, match=r"cannot write \S*checkpoint\.pt: No space left on device\. .* is kept"):
        run_cell(CELL, ds, tmp_path / "full")
    monkeypatch.setattr(engine.torch, "save", save)
    assert not list((tmp_path / "full").glob("*.tmp"))
    assert torch.load(tmp_path / "full" / "checkpoint.pt", weights_only=True)["epochs_done"] == 3
    run_cell(CELL, ds, tmp_path / "full")
    assert contents(tmp_path / "alone") == contents(tmp_path / "full")


def test_half_written_files_are_never_read_and_do_not_stay(breakhis_tree, tmp_path, monkeypatch):
    ds = load_breakhis(breakhis_tree)
    run_cell(CELL, ds, tmp_path / "alone")
    half = [
        tmp_path / "cut" / name for name in (".checkpoint.pt.1.tmp", "epochs/.0000.json.1.tmp", ".results.json.1.tmp")
    ]
    (tmp_path / "cut" / "epochs").mkdir(parents=True)
    for file in half:
        file.write_bytes(b"half of a file")
    run_cell(CELL, ds, tmp_path / "cut")
    assert not list(tmp_path.rglob("*.tmp"))
    assert contents(tmp_path / "alone") == contents(tmp_path / "cut")


def cells():
    fit = replace(FIT, epochs=1)
    return [Cell(method, h, fit=fit, **SHARED) for h in (40, 200) for method in ("constant", "dann")]


@pytest.mark.slow
def test_workers_leave_the_records_of_a_serial_run(breakhis_tree, tmp_path):
    ds = load_breakhis(breakhis_tree)
    serial = run_grid(cells(), ds, tmp_path / "serial", say=lambda line: None)
    workers = run_grid(cells(), ds, tmp_path / "workers", workers=2, say=print)
    assert len(serial) == len(workers) == 4
    for a, b in zip(serial, workers, strict=True):
        for name in RECORDS if "constant" not in a.name else FLOOR:
            one, two = (a / name).read_bytes(), (b / name).read_bytes()
            assert one == two, (a.name, name, set(one.splitlines()) ^ set(two.splitlines()))


def children(pid):
    """Processes that `pid` has started."""
    return (path.name for path in Path("/proc").glob("[0-9]*") if parent_of(path) == str(pid))


def parent_of(path):
    try:
        return (path / "stat").read_text().rpartition(")")[2].split()[1]
    except OSError:  # it has ended
        return None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes by /proc")
def test_a_grid_of_two_workers_killed_at_random_moments(breakhis_tree, tmp_path):
    """`magdg lomo --workers 2`, its first process alone killed, in cells and between them: bit for bit the same."""
    command = (
        f"-m magdg lomo --data {breakhis_tree} --methods dann --held-out 40 200 --folds 0 --n-folds 4 --init none "
    )
    command += "--model test_magdg_resnet --image-size 32 --batch-size 8 --epochs 3 --threads 1"

    def start(folder, workers):
        words = [sys.executable, *command.split(), "--output-dir", str(folder), "--workers", str(workers)]
        return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "serial", 1).wait() == 0
    serial, killed, rng = sorted((tmp_path / "serial").glob("[!.]*")), tmp_path / "killed", random.Random(1)
    assert len(serial) == 6
    started, kills = time.perf_counter(), 0
    assert start(tmp_path / "warm", 2).wait() == 0
    takes = time.perf_counter() - started
    while kills < KILLS:
        process = start(killed, 2)
        try:
            process.wait(rng.uniform(0.4, 1.0) * takes)  # done: once more, from where a cell is missing
            shutil.rmtree(killed / rng.choice(serial).name, ignore_errors=True)
        except subprocess.TimeoutExpired:
            workers = [int(pid) for pid in children(process.pid)]
            process.kill()
            process.wait()
            kills += 1
            deadline = time.monotonic() + 300  # they may be importing, on a busy machine
            while any(Path(f"/proc/{pid}").exists() for pid in workers):
                assert time.monotonic() < deadline, "workers outlive who started them"
                time.sleep(0.1)
    assert start(killed, 2).wait(300) == 0
    for folder in serial:
        for name in RECORDS if "dann" in folder.name else FLOOR:
            assert (folder / name).read_bytes() == (killed / folder.name / name).read_bytes(), (folder.name, name)
    assert not list(killed.rglob("*.tmp"))


@pytest.mark.slow
def test_a_dask_cluster_works_on_the_grid(breakhis_tree, tmp_path):
    joblib = pytest.importorskip("joblib")
    distributed = pytest.importorskip("distributed")
    ds = load_breakhis(breakhis_tree)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config("dask"),
    ):
        finished = run_grid(cells(), ds, tmp_path / "dask", workers=2, say=print)
    assert len(finished) == 4
