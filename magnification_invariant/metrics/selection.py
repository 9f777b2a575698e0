"""Which setting of a method counts: a rule over losses that were recorded, applied after training.

The epoch is not chosen: the last one counts, after the same number of steps for every method.
"""

from collections.abc import Hashable, Mapping

import numpy as np
from numpy.typing import ArrayLike


def nested_choice(
    losses: Mapping[tuple[Hashable, Hashable], ArrayLike], held_out: Hashable, strength: ArrayLike
) -> int:
    """The setting of a method that nested leave-one-domain-out chooses for a held-out domain, without looking at it.

    Every other domain is scored by trainings that saw neither of the two. The setting of the least mean loss is the
    best; the weakest counts of those that are worse by at most one standard error of the difference over patients. The
    trainings without domains a and b serve twice: scored on b for a held out, on a for b held out.

    Args:
        losses: For (held-out domain, scored domain) the losses (settings, patients) of trainings that saw neither, the
            same patients for all of them; infinite where a setting diverged.
        held_out: The domain to choose for.
        strength: (settings,) how far each departs from plain training, such as the coefficient of an adversary; of
            equal ones the lower mean loss counts.

    Returns:
        Index of the setting.

    Raises:
        ValueError: No other domain is scored, or every setting diverged.

    Source: the one-standard-error rule of Breiman et al., "Classification and Regression Trees" (1984), section 3.4.3,
    with the standard error of paired differences.
    """
    scored = [np.asarray(loss, np.float64) for (unseen, _), loss in losses.items() if unseen == held_out]
    if not scored:
        raise ValueError(f"no training without {held_out!r} is scored on another domain")
    loss = np.mean(scored, axis=0)
    mean = loss.mean(1)
    best = mean.argmin()
    if not np.isfinite(mean[best]):
        raise ValueError(f"every setting diverged in a training without {held_out!r}")
    with np.errstate(invalid="ignore"):  # of what diverged, the error is no number, and the comparison false
        worse = loss - loss[best]
        as_good = worse.mean(1) <= worse.std(1, ddof=1) / np.sqrt(loss.shape[1])
    return int(next(i for i in np.lexsort((mean, strength)) if as_good[i]))
