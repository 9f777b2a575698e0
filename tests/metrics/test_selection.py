"""The rule of selection on made-up losses whose best setting is known."""

import numpy as np
import pytest

from magnification_invariant.metrics.selection import nested_choice


def patients(*settings):
    """Losses (settings, 4 patients): `base + spread` of one half of the patients, `base - spread` of the other."""
    return np.array([[base + spread, base - spread] * 2 for base, spread in settings])


def test_nested_choice_takes_the_weakest_setting_within_one_standard_error_of_the_difference():
    # Differences to the best, setting 0: +-0.03, with a standard deviation (ddof 1) of 0.03 * sqrt(4 / 3) and a
    # standard error of half of it, 0.0173, over four patients.
    strength = [3.0, 1.0, 0.1]
    within, beyond, far = (0.217, 0.03), (0.218, 0.03), (0.4, 0.0)
    assert nested_choice({("h", "a"): patients((0.2, 0), within, far)}, "h", strength) == 1
    assert nested_choice({("h", "a"): patients((0.2, 0), beyond, far)}, "h", strength) == 0
    # What all settings find hard in the same patients says nothing of their difference.
    hard = np.array([0.3, -0.1, 0.3, -0.1])
    assert nested_choice({("h", "a"): patients((0.2, 0), beyond, far) + hard}, "h", strength) == 0
    # No worse and weaker; equal strength: the lower loss.
    assert nested_choice({("h", "a"): patients((0.2, 0), within, (0.2, 0))}, "h", strength) == 2
    assert nested_choice({("h", "a"): patients((0.21, 0), (0.2, 0.0), (0.22, 0.0))}, "h", [0, 0, 0]) == 1


def test_nested_choice_averages_the_scored_domains_and_looks_at_no_score_of_the_held_out_one():
    losses = {("h", "a"): patients((0.1, 0), (0.3, 0)), ("h", "b"): patients((0.4, 0), (0.1, 0))}
    losses |= {("a", "h"): patients((0.0, 0), (0.9, 0)), ("a", "b"): patients((0.4, 0), (0.1, 0))}
    assert nested_choice(losses, "h", [1, 1]) == 1  # 0.25 against 0.2
    assert nested_choice(losses, "a", [1, 1]) == 0
    assert nested_choice(losses | {("a", "h"): patients((0.9, 0), (0.0, 0))}, "h", [1, 1]) == 1


def test_nested_choice_never_takes_what_diverged():
    diverged = np.full(4, np.inf)
    losses = {("h", "a"): np.stack([diverged, *patients((0.3, 0))]), ("h", "b"): patients((0.1, 0), (0.3, 0))}
    assert nested_choice(losses, "h", [0, 1]) == 1
    with pytest.raises(ValueError, match="diverged"):
        nested_choice({("h", "a"): np.stack([diverged, diverged])}, "h", [0, 1])
    with pytest.raises(ValueError, match="no training without 'b'"):
        nested_choice(losses, "b", [0, 1])
