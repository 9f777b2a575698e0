"""The declared tests of benchmarks/confirmation.py on runs whose truth is known."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from magnification_invariant.metrics.intervals import Difference

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import confirmation
from confirmation import DECLARED, ERM, ERM_ZOOM, LONGER, ROWS, settings_of, t_interval, verdict


def test_the_t_interval_is_the_textbook_s():
    low, high = t_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    half = 2.5705818 * np.std([1, 2, 3, 4, 5, 6], ddof=1) / math.sqrt(6)  # t of 5 degrees of freedom, 97.5 %
    assert (low, high) == pytest.approx((3.5 - half, 3.5 + half), rel=1e-6)
    assert np.isnan(t_interval([1.0])).all()


@pytest.mark.parametrize(
    "interval, cohorts, p, wanted",
    [
        ((-0.02, -0.01), [-0.02, -0.01, -0.015], 0.01, "better"),
        ((-0.02, -0.01), [-0.05, 0.04, -0.02], 0.01, "not told apart"),  # other cohorts could say otherwise
        ((-0.02, 0.01), [-0.02, -0.01, -0.015], 0.01, "not told apart"),
        ((-0.02, -0.01), [-0.02, -0.01, -0.015], 0.06, "not told apart"),
        ((0.01, 0.02), [0.02, 0.01, 0.015], 0.01, "WORSE"),
        ((-0.02, -0.01), [-0.02], 0.01, "not told apart"),  # one cohort says nothing of others
    ],
)
def test_a_win_needs_patients_and_cohorts(interval, cohorts, p, wanted):
    measured = Difference(float(np.mean(cohorts)), *interval, p)
    assert verdict(measured, cohorts, p) == wanted


def test_every_row_is_there_once_and_has_the_settings_of_its_own_search(tmp_path):
    assert len({recipe.title for recipe in ROWS}) == len(ROWS) == 7
    assert {side for pair in DECLARED.values() for side, _ in pair} <= set(ROWS)
    (tmp_path / "random_search_nested.json").write_text('{"erm": {"40": {"epochs": 8}}}')
    (tmp_path / "random_search_nested_zoom.json").write_text('{"erm": {"40": {"epochs": 30}}}')
    assert settings_of(tmp_path, ERM, 40) == {"epochs": 8}
    assert settings_of(tmp_path, ERM_ZOOM, 40) == settings_of(tmp_path, LONGER, 40) == {"epochs": 30}


@pytest.mark.slow
def test_a_trial_ends_with_the_declared_tests_first(tmp_path, monkeypatch, capsys):
    """Every row at 40X to 400X, two small cohorts, one epoch: plan, page and compact predictions."""
    command = ["confirmation.py", "--first-patient", "2000", "--cohorts", "2", "--patients", "12", "6", "24"]
    command += ["--epochs", "1", "--image-size", "32", "--width", "120", "--docs", str(tmp_path / "docs")]
    command += ["--settings", str(tmp_path), "--output-dir", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setenv("MAGDG_CACHE", str(tmp_path / "cache"))
    confirmation.main()
    page = (tmp_path / "docs" / "confirmation.md").read_text()
    assert "TRIAL" in page and page.index("The declared tests") < page.index("Each held-out magnification")
    assert all(title in page for title in DECLARED) and "erm + zoom (nested, epochs x 2)" in page
    import pandas as pd

    kept = pd.read_parquet(tmp_path / "docs" / "confirmation.parquet")
    assert set(kept.part) == {"test", "test_normalised", "val"} and kept.groupby(["row", "held_out", "cohort"]).ngroups
    of_erm = kept[(kept.row == ERM.title) & (kept.part == "test")]
    assert len(of_erm) == 4 * 2 * 24 and np.isfinite(of_erm.margin).all()
