"""What a method is: a model and a loss."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import timm
import torch
from torch import nn


def option(default, help, *, search=None, choices=None):
    return field(default=default, metadata={"help": help, "search": search, "choices": choices})


@dataclass
class Player:
    """A set of parameters with its own optimizer; most methods have one, adversaries in alternation have two.

    Attributes:
        name: for the log and the checkpoint.
        parameters: groups of parameters; gradients are clipped a group, so that one group never scales another's.
        steps: optimizer steps a turn.
        options: optimizer settings that differ from the run's, e.g. ``{"betas": (0.5, 0.999)}``.
    """

    name: str
    parameters: list[list[nn.Parameter]]
    steps: int = 1
    options: dict = field(default_factory=dict)


class Task(nn.Module):
    """A method: `model`, and a `forward` that gives the loss of a batch. `engine.fit` knows nothing more of it.

    A method is one file with one subclass, which defines `arch` (the timm model it trains by default), where needed
    `create_model` and `players`, and `forward`.

    Args:
        model: a timm classifier, e.g. from `create_model`.
        label_smoothing: of the class cross-entropy.
    """

    arch = ""
    options: tuple[str, ...] = ("label_smoothing",)  # of the constructor: what a user may set
    pretrained = False  # whether `create_model` loads weights

    def __init__(self, model: nn.Module, *, label_smoothing: float = 0.0):
        super().__init__()
        self.model = model
        self.class_loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)

    @classmethod
    def create_model(cls, arch: str, *, num_classes: int, num_domains: int, **kwargs) -> nn.Module:
        """The model this method trains: `num_classes` class logits; any timm classifier, without a domain head."""
        if timm.models.is_model_in_modules(arch, ["magdg"]):
            kwargs["num_domains"] = 0
        return timm.create_model(arch, num_classes=num_classes, **kwargs)

    @property
    def players(self) -> list[Player]:
        return [Player("model", [list(self.model.parameters())])]

    def prepare(
        self, rows, fit: Callable, view: Callable, class_names: list[str], domain_names: list[str]
    ) -> tuple[dict, dict]:
        """What must be trained before this task can be; nothing by default. Called on every process, also on resume.

        Args:
            rows: the training rows, an `engine.TrainRows`.
            fit: ``fit(task, **changes)`` trains another task on the same rows, with `changes` to the run's
                `engine.FitConfig`, and returns the model that predicts. It has a checkpoint of its own.
            view: ``view(index, size)`` gives images (n, 3, size, size) in [0, 1] of rows of the cache, augmented as in
                training, on the device, and their um/px (n,) before zoom.
            class_names: by class.
            domain_names: by training domain.

        Returns:
            What belongs into the records, and pictures (`PIL.Image.Image`) by file name.
        """
        return {}, {}

    def forward(
        self, input: torch.Tensor, target: torch.Tensor, domain: torch.Tensor, progress: torch.Tensor, player: int = 0
    ) -> dict[str, torch.Tensor]:
        """Loss of a batch.

        Args:
            input: normalised images (b, 3, size, size).
            target: classes (b,), int64.
            domain: training domains (b,), int64 in [0, num_domains).
            progress: share of the training done, 0-d in [0, 1).
            player: whose turn it is.

        Returns:
            ``loss`` (to be minimised by the player), ``output`` (class logits) and the loss's parts, 0-d, detached.
        """
        raise NotImplementedError


def parameters_except(model: nn.Module, head: nn.Module) -> Iterable[nn.Parameter]:
    """The parameters of `model` outside `head`, in the model's order."""
    inside = {id(p) for p in head.parameters()}
    return [p for p in model.parameters() if id(p) not in inside]
