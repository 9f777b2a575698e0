"""A resumable grid of cells, each a folder of records: leave one magnification out, or any other domain."""

import os
import platform
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import torch

from magnification_invariant.data.pixels import PixelCache, ViewCache
from magnification_invariant.data.splits import LackingClass
from magnification_invariant.data.vectors import is_of_vectors
from magnification_invariant.data.views import cache_height
from magnification_invariant.engine import Diverged
from magnification_invariant.files import Busy, locked
from magnification_invariant.lomo.cell import Cell, is_finished
from magnification_invariant.lomo.run import run_cell
from magnification_invariant.model_folder import find_start
from magnification_invariant.models import VECTOR_MODELS
from magnification_invariant.tasks import get_task
from magnification_invariant.tasks.floors import FLOORS, OF_IMAGES, OF_VECTORS


def make_grid(
    methods: Iterable[str],
    held_outs: Iterable[int | str],
    folds: Iterable[int],
    seeds: Iterable[int],
    *,
    options: dict[str, Any] | None = None,
    **arguments,
) -> list[Cell]:
    """The cells of method x held-out x fold x seed, with the floors of every (held-out, fold) in front.

    Args:
        options: of methods, by name; each is given to the methods that have it.
        **arguments: further ones of `Cell`: fit, model, n_folds, ...; of vectors, model is one of `VECTOR_MODELS`.

    Raises:
        ValueError: an option that none of the methods has.
    """
    methods, folds, seeds, options = list(methods), list(folds), list(seeds), options or {}
    kinds = {method: get_task(method).Options for method in methods if method not in FLOORS}
    of_method = {
        method: kind(**{f.name: options[f.name] for f in fields(kind) if f.name in options})
        for method, kind in kinds.items()
    }
    if unknown := set(options) - {f.name for kind in kinds.values() for f in fields(kind)}:
        raise ValueError(f"{', '.join(methods)}: none has the option {', '.join(sorted(unknown))}")
    floors = OF_VECTORS if arguments.get("model") in VECTOR_MODELS else OF_IMAGES
    cells = [
        Cell(method, held_out, fold, seed, options=of_method.get(method), **arguments)
        for held_out, fold in product(held_outs, folds)
        for method, seed in [*((floor, 0) for floor in floors), *product(methods, seeds)]
    ]
    return list({cell.name: cell for cell in cells}.values())


def run_grid(
    cells: list[Cell],
    ds,
    output: Path,
    *,
    accelerator=None,
    workers: int = 1,
    data_source: str | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Run the cells that are not finished yet; one that diverges or lacks a class is reported and the others go on.

    Args:
        accelerator: with one worker, the processes that share every cell.
        workers: processes of joblib, each running one cell at a time on a GPU of its own (worker modulo GPUs). Inside
            ``joblib.parallel_config("dask")`` they are a dask cluster's. A cell's folder is locked by who runs it, so
            that several such runs, on machines that share the output folder, work on one grid.
        data_source: see `run_cell`.

    Returns:
        Folders of the finished cells.

    Raises:
        OSError: the weights to start from cannot be had; nothing was trained.
    """
    output = Path(output)
    arguments = (cells, ds, output, data_source, say)
    to_train = [cell for cell in cells if cell.method not in FLOORS and not is_finished(output / cell.name, cell, ds)]
    for arch, init in sorted({(cell.architecture, cell.init) for cell in to_train}):
        find_start(arch, init)  # before anything that takes long
    if workers == 1:
        _work(0, *arguments, accelerator=accelerator)
    else:
        from joblib import Parallel, delayed

        of_pixels = {(cell.fit.image_size, cell.fit.zoom) for cell in cells if not is_of_vectors(ds)}
        for size, zoom in of_pixels:  # built once, before anybody asks
            ViewCache(ds, size)
            PixelCache(ds, cache_height(size, zoom))
        started_by = platform.node(), os.getpid()
        Parallel(n_jobs=workers)(delayed(_worker)(started_by, k, *arguments) for k in range(workers))
    finished = [cell for cell in cells if is_finished(output / cell.name, cell, ds)]
    for cell in cells:
        if cell not in finished and (accelerator is None or accelerator.is_main_process):
            try:
                with locked(output / cell.name):
                    pass
            except Busy as error:
                say(f"{cell.name} is not in the table: {error}")
    return [output / cell.name for cell in finished]


def _worker(started_by: tuple[str, int], *arguments) -> None:
    """`_work` in a process of its own, which ends with the one that started it: killed, that one could not say so."""
    machine, pid = started_by

    def watch() -> None:
        while True:
            try:
                os.kill(pid, 0)  # asks whether it is there
            except ProcessLookupError:
                os._exit(1)  # what is half done is taken up again, as after any kill
            time.sleep(0.5)

    if platform.node() == machine and os.getpid() != pid:
        threading.Thread(target=watch, daemon=True).start()
    _work(*arguments)


def _work(worker: int, cells: list[Cell], ds, output: Path, data_source: str | None, say, *, accelerator=None) -> None:
    if accelerator is None and torch.cuda.is_available():
        torch.cuda.set_device(worker % torch.cuda.device_count())
    for i, cell in enumerate(cells, 1):
        folder, which = output / cell.name, f"[{i}/{len(cells)}] {cell.name}"
        is_floor = cell.method in FLOORS
        if is_floor and accelerator is not None and not accelerator.is_main_process:
            continue
        if is_finished(folder, cell, ds):
            say(f"{which}: finished before, skipped")
            continue
        try:
            # a floor is the first process's alone: it must not wait there for the others
            run_cell(cell, ds, folder, accelerator=None if is_floor else accelerator, data_source=data_source)
            say(f"{which}: done")
            if accelerator is not None:
                accelerator.free_memory()  # it would keep every model of the grid
        except Busy:
            continue  # somebody else is at it
        except (Diverged, LackingClass) as error:
            say(f"{which}: FAILED, {error}")
