"""Methods: one file each, a model and a loss."""

from importlib import import_module

from magnification_invariant.tasks.cdann import CDANN
from magnification_invariant.tasks.coral import CORAL
from magnification_invariant.tasks.dann import DANN
from magnification_invariant.tasks.erm import ERM
from magnification_invariant.tasks.frozen import Frozen
from magnification_invariant.tasks.gan import DCGAN, DegradedERM, MagGAN
from magnification_invariant.tasks.mixstyle import MixStyle
from magnification_invariant.tasks.multitask import MultiTask
from magnification_invariant.tasks.task import Player, Task

TASKS: dict[str, type[Task]] = {
    "erm": ERM,
    "dann": DANN,
    "gan": MagGAN,
    "degraded": DegradedERM,
    "cdann": CDANN,
    "coral": CORAL,
    "mixstyle": MixStyle,
    "multitask": MultiTask,
    "frozen": Frozen,
}

__all__ = [
    "CDANN",
    "CORAL",
    "DANN",
    "DCGAN",
    "ERM",
    "TASKS",
    "DegradedERM",
    "Frozen",
    "MagGAN",
    "MixStyle",
    "MultiTask",
    "Player",
    "Task",
    "get_task",
]


def get_task(name: str) -> type[Task]:
    """The class of a method: a name of `TASKS`, or ``module:Class`` for one of your own.

    Raises:
        ValueError: no such method, or not a `Task`.
    """
    if name in TASKS:
        return TASKS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"unknown method {name!r}: choose from {', '.join(TASKS)}, or give one as module:Class")
    try:
        task = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import the method {name!r}: {error}") from error
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise ValueError(f"{name!r} is not a subclass of magnification_invariant.tasks.Task")
    return task
