"""Predicting the magnification as a second task (Caruana, "Multitask Learning", Machine Learning 28, 1997)."""

from magnification_invariant.tasks.dann import DANN
from magnification_invariant.tasks.task import register


@register("multitask")
class MultiTask(DANN):
    """The opposite control of `DANN`: the same head, loss, schedule and coefficient, and no reversal.

    The backbone receives the domain loss's gradient times ``+coeff``: it is helped to tell the magnifications apart. A
    gain of `DANN` that this method has too is not owed to invariance. In the log ``coeff`` is negative, for it is still
    the coefficient of a reversal.
    """

    def coefficient(self, pooled, target, domain, progress):
        return -super().coefficient(pooled, target, domain, progress)
