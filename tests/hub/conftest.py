"""A grid of two tiny models, trained once."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_runs(breakhis_tree, tmp_path_factory) -> Path:
    """Finished cells of erm and dann (and the floors) with 200X held out. Do not write into it: copy it first."""
    from magnification_invariant.data import load_breakhis
    from magnification_invariant.lomo.grid import make_grid, run_grid

    folder = tmp_path_factory.mktemp("grid")
    small = {"model": "test_magdg_resnet", "epochs": 1, "batch_size": 8, "image_size": 32, "threads": 1, "n_folds": 4}
    run_grid(make_grid(["erm", "dann"], [200], [0], [0], **small), load_breakhis(breakhis_tree), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_runs) -> Path:
    """The cell of dann."""
    return tiny_runs / "dann-lomo200-fold0-seed0"
