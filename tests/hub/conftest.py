"""A grid of models that nobody trained, with records that are known."""

from pathlib import Path

import pytest
from fabricated import add_model, write_run


@pytest.fixture(scope="session")
def grid(tmp_path_factory) -> Path:
    """Runs of erm and dann, and the floors, with 200X held out. Do not write into it: copy it first."""
    root, cache = tmp_path_factory.mktemp("grid"), tmp_path_factory.mktemp("template")
    settings = {"zoom": 1.0, "epochs": 2, "calibrate": True}
    for method, skill in (("erm", 0.8), ("dann", 1.3)):
        add_model(write_run(root, method, 200, skill=skill, scaled=1.4, settings=settings), cache)
    for floor in ("constant", "colour"):
        write_run(root, floor, 200, skill=0.1)
    return root


@pytest.fixture(scope="session")
def run(grid) -> Path:
    """The run of dann."""
    return next(grid.glob("dann*"))
