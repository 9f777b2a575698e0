"""Methods: one file each, a model and a loss."""

from magnification_invariant.tasks.options import check_options, option
from magnification_invariant.tasks.task import TASKS, Player, Task, get_task, register

# In the order of `TASKS`, which is that of help and tables.
# isort: off
from magnification_invariant.tasks.erm import ERM
from magnification_invariant.tasks.dann import DANN
from magnification_invariant.tasks.gan import DCGAN, DegradedERM, MagGAN
from magnification_invariant.tasks.cdann import CDANN
from magnification_invariant.tasks.coral import CORAL
from magnification_invariant.tasks.mixstyle import MixStyle
from magnification_invariant.tasks.multitask import MultiTask
from magnification_invariant.tasks.scale_pairs import ScalePairs, TwoView
from magnification_invariant.tasks.frozen import Frozen
# isort: on

__all__ = ["CDANN", "CORAL", "DANN", "DCGAN", "ERM", "DegradedERM", "Frozen", "MagGAN", "MixStyle", "MultiTask"]
__all__ += ["TASKS", "Player", "ScalePairs", "Task", "TwoView", "check_options", "get_task", "option", "register"]
