"""Virtual slides as a table: drawn once, then read like BreaKHis."""

import os

from magnification_invariant.data.breakhis import load_breakhis
from magnification_invariant.files import cache_root
from magnification_invariant.virtual_slides import Cohort, draw_slides


def load_virtual_slides(
    n_patients: int = 40, *, write_to: str | os.PathLike | None = None, workers: int | None = None, **parameters
):
    """Procedural breast H&E in the form of BreaKHis; needs no download and no network.

    Args:
        n_patients: Number of patients, half of them malignant.
        write_to: Folder for the PNG files, as `virtual_slides.draw_slides` writes them; default is a folder of the
            cache (`MAGDG_CACHE`, else `~/.cache/magnification_invariant`) named after the parameters.
        workers: Processes that draw; default is one a core.
        **parameters: As `virtual_slides.Cohort` explains them: `images_per_magnification` (4), `magnifications`
            ((40, 100, 200, 400)), `seed` (0), `first_patient` (0), `nuisance` (1), `size` ((700, 460)), `nested`
            (False).

    Returns:
        A `datasets.Dataset` with the columns of `load_breakhis`.

    Raises:
        ValueError: An argument is out of range.
        FileExistsError: `write_to` holds slides of other parameters, or a tree that was not drawn here.
    """
    cohort = Cohort(n_patients, **parameters)
    folder = cache_root() / "virtual_slides" / cohort.digest if write_to is None else write_to
    return load_breakhis(draw_slides(cohort, folder, workers=workers))
