"""What a method is: a model and a loss; and the registry of methods."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from magnification_invariant.models import create_network
from magnification_invariant.tasks.options import check_options, option

TASKS: dict[str, type["Task"]] = {}
"""Methods by name, entered by `register`."""


@dataclass
class Player:
    """A set of parameters with its own optimizer; most methods have one, adversaries in alternation have two.

    Attributes:
        name: For the log and the checkpoint.
        parameters: Groups of parameters; gradients are clipped a group, so that one group never scales another's.
        steps: Optimizer steps a turn.
        options: Optimizer settings that differ from the run's, e.g. ``{"betas": (0.5, 0.999)}``.
    """

    name: str
    parameters: list[list[nn.Parameter]]
    steps: int = 1
    options: dict = field(default_factory=dict)


class Task(nn.Module):
    """A method: `model`, and a `forward` that gives the loss of a batch. `engine.fit` knows nothing more of it.

    A method is one file with one subclass, which defines `arch` (the timm model it trains by default), `forward`, and
    where needed `Options`, `create_model`, `players`, `views` and `prepare`.

    Args:
        model: A timm classifier, e.g. from `create_model`.
        options: Of the class's `Options`; the defaults without.
    """

    @dataclass(frozen=True)
    class Options:
        """What a user may set; a subclass extends its parent's."""

        label_smoothing: float = option(
            0.0, "share of the target spread over all classes", search=(0.0, 0.05, 0.1), bounds=(0, 1)
        )
        __post_init__ = check_options

    arch = ""
    of_pixels = False  # whether it asks for images, and cannot be trained on embeddings
    views = 1  # of an image in a batch, all at the same place of it
    pretrained = False  # whether it starts from ImageNet weights unless told otherwise

    def __init__(self, model: nn.Module, options: Any = None):
        super().__init__()
        self.model = model
        self.options = self.Options() if options is None else options
        self.class_loss = nn.CrossEntropyLoss(label_smoothing=self.options.label_smoothing)

    @classmethod
    def create_model(
        cls, arch: str, *, num_classes: int, num_domains: int, image_size: int | None = None, **kwargs
    ) -> nn.Module:
        """The model this method trains, with what it needs for `num_domains` training domains.

        Args:
            arch: Any timm classifier: a name, ``hf-hub:...`` or ``local-dir:...``; or one of vectors.
            num_classes: Class logits.
            num_domains: Training domains; of no concern to methods without a domain head.
            image_size: Side of the input in pixels; networks that are made for one size, such as ViTs, need it.
            **kwargs: Of `create_network`.
        """
        model = create_network(arch, num_classes=num_classes, **kwargs)
        if image_size and hasattr(model, "set_input_size"):
            model.set_input_size(img_size=(image_size, image_size))
        return model

    @property
    def players(self) -> list[Player]:
        """Who trains, in the order of their turns; here the whole model."""
        return [Player("model", [list(self.model.parameters())])]

    def prepare(
        self, rows, fit: Callable, view: Callable, class_names: list[str], domain_names: list[str]
    ) -> tuple[dict, dict]:
        """What must be trained before this task can be; nothing by default. Called on every process, also on resume.

        Args:
            rows: The training rows, an `engine.TrainRows`.
            fit: ``fit(task, **changes)`` trains another task on the same rows, with `changes` to the run's
                `engine.FitConfig`, and returns the model that predicts. It has a checkpoint of its own.
            view: ``view(index, size)`` gives images (n, 3, size, size) in [0, 1] of rows of the cache, augmented as in
                training, on the device, and their um/px (n,) before zoom.
            class_names: By class.
            domain_names: By training domain.

        Returns:
            What belongs into the records, and pictures (`PIL.Image.Image`) by file name.
        """
        return {}, {}

    def forward(
        self, input: Tensor, target: Tensor, domain: Tensor, progress: Tensor, player: int = 0
    ) -> dict[str, Tensor]:
        """Loss of a batch.

        Args:
            input: Normalised images (b, 3, size, size); of several `views`, the first of every image comes first.
            target: Classes (b,), int64.
            domain: Training domains (b,), int64 in [0, num_domains).
            progress: Share of the training done, 0-d in [0, 1).
            player: Whose turn it is.

        Returns:
            ``loss`` (to be minimised by the player), ``output`` (class logits) and the loss's parts, 0-d, detached.
        """
        raise NotImplementedError


def register(name: str) -> Callable[[type[Task]], type[Task]]:
    """Class decorator: enters a method into `TASKS` under the name that users type."""

    def enter(task: type[Task]) -> type[Task]:
        TASKS[name] = task
        return task

    return enter


def get_task(name: str) -> type[Task]:
    """The class of a method: a name of `TASKS`, or ``module:Class`` for one of your own.

    Raises:
        ValueError: There is no such method, or it is not a `Task`.
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
