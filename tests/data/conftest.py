from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def breakhis_real() -> Path:
    """A part of the real data set beside the repository, where there is one."""
    folder = Path(__file__).parents[3] / "shared" / "breakhis-real"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return folder
