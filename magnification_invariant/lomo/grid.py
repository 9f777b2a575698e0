"""The protocol: leave one magnification out, patients disjoint. A resumable grid of cells, each a folder of records.

The table is one of `data.load_breakhis`, or of `data.load_table`, of which any other domain is left out (a scanner).
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from magnification_invariant.data.augment import cache_height
from magnification_invariant.data.pixels import PixelCache
from magnification_invariant.data.splits import LackingClass
from magnification_invariant.engine import Diverged
from magnification_invariant.lomo.cell import Cell, is_finished, own_options
from magnification_invariant.lomo.run import run_cell
from magnification_invariant.tasks.floors import FLOORS


def make_grid(
    methods: Iterable[str],
    held_outs: Iterable[int],
    folds: Iterable[int],
    seeds: Iterable[int],
    options: dict | None = None,
    **arguments,
) -> list[Cell]:
    """The cells of method x held-out x fold x seed, with the floors of every (held-out, fold) in front.

    Args:
        options: each is handed to the methods that have it.

    Raises:
        ValueError: an option that none of the methods has.
    """
    methods, folds, seeds, options = list(methods), list(folds), list(seeds), options or {}
    owned = {method: {k: v for k, v in options.items() if k in own_options(method)} for method in (*FLOORS, *methods)}
    if unknown := set(options) - {name for own in owned.values() for name in own}:
        raise ValueError(f"{', '.join(methods)}: none has the option {', '.join(sorted(unknown))}")
    cells = [
        Cell(method, held_out, fold, seed, options=owned[method], **arguments)
        for held_out, fold in product(held_outs, folds)
        for method, seed in [*((floor, 0) for floor in FLOORS), *product(methods, seeds)]
    ]
    return list(dict.fromkeys(cells))


def run_grid(
    cells: list[Cell],
    ds,
    output: Path,
    *,
    accelerator=None,
    workers: int = 1,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Run the cells that are not finished yet; one that diverges or lacks a class is reported and the others go on.

    Args:
        accelerator: with one worker, the processes that share every cell.
        workers: processes of joblib, each running one cell at a time on a GPU of its own (worker modulo GPUs). Inside
            ``joblib.parallel_config("dask")`` they are a dask cluster's. A cell is claimed by a lock file beside its
            folder, so that several such runs, on machines that share the output folder, work on one grid.

    Returns:
        Folders of the finished cells.
    """
    output = Path(output)
    if workers == 1:
        _work(0, cells, ds, output, accelerator, say)
    else:
        from joblib import Parallel, delayed

        for height in {cache_height(cell.image_size, cell.fit_config.zoom) for cell in cells}:
            PixelCache(ds, height)  # built once, before anybody needs it
        Parallel(n_jobs=workers)(delayed(_work)(k, cells, ds, output, None, say) for k in range(workers))
    return [output / cell.name for cell in cells if is_finished(output / cell.name, cell, ds)]


def _work(worker: int, cells: list[Cell], ds, output: Path, accelerator, say: Callable[[str], None]) -> None:
    if accelerator is None and torch.cuda.is_available():
        torch.cuda.set_device(worker % torch.cuda.device_count())
    shared = accelerator is not None and accelerator.num_processes > 1
    for i, cell in enumerate(cells, 1):
        folder, which = output / cell.name, f"[{i}/{len(cells)}] {cell.name}"
        if shared and cell.method in FLOORS and not accelerator.is_main_process:
            continue
        if is_finished(folder, cell, ds):
            say(f"{which}: finished before, skipped")
            continue
        output.mkdir(parents=True, exist_ok=True)
        claim = nullcontext() if shared else FileLock(output / f".{cell.name}.lock", timeout=0)
        try:
            with claim:
                if not is_finished(folder, cell, ds):
                    # a floor is the first process's alone: it must not wait there for the others
                    run_cell(cell, ds, folder, accelerator=None if cell.method in FLOORS else accelerator)
                    say(f"{which}: done")
                    if accelerator is not None:
                        accelerator.free_memory()  # it would keep every model of the grid
        except Timeout:
            continue  # somebody else is at it
        except (Diverged, LackingClass) as error:
            say(f"{which}: FAILED, {error}")
