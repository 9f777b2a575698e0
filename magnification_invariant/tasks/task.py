"""What a method is: a model and a loss."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import timm
import torch
from torch import nn


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
    options: tuple[str, ...] = ("label_smoothing",)  # of `lomo.Cell`, for the constructor

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
