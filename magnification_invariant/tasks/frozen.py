"""Regularised logistic regression on the features of a frozen pretrained network (a linear probe)."""

from dataclasses import dataclass

import torch

from magnification_invariant.models import linear_classifier, pooled_features
from magnification_invariant.tasks.options import option
from magnification_invariant.tasks.task import Player, Task, register


@register("frozen")
class Frozen(Task):
    """Multinomial logistic regression with an L2 penalty, on features of a backbone that is never trained.

    ::

        L = CE(W z + b, y) + head_l2 / 2 ||W||^2

    The backbone is in eval mode throughout: no dropout, and BatchNorm keeps its statistics. The regression goes through
    the same loop as every other method, with the same batches, augmentation, steps and average of weights, instead of
    to convergence. The run's weight decay is not applied beside the penalty.

    It starts from ImageNet weights unless ``--init`` says otherwise; ``--model`` is any network of timm, by name or as
    ``hf-hub:...`` or ``local-dir:...``, whose own weights are then taken.

    Raises:
        ValueError: If the model's classifier is not one linear map.
    """

    @dataclass(frozen=True)
    class Options(Task.Options):
        head_l2: float = option(1e-3, "L2 penalty of the classifier", search=(1e-4, 1.0, "log"), bounds=(0, 1e6))

    arch = "resnet18"
    of_pixels = True
    pretrained = True

    def __init__(self, model, options=None):
        super().__init__(model, options)
        head = linear_classifier(model)
        model.requires_grad_(False)
        head.requires_grad_(True)

    @property
    def players(self):
        return [Player("head", [list(self.model.get_classifier().parameters())], options={"weight_decay": 0.0})]

    def train(self, mode: bool = True):
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, input, target, domain, progress, player=0):
        head = self.model.get_classifier()
        with torch.no_grad():
            pooled = pooled_features(self.model, input)
        output = head(pooled)
        class_loss, penalty = self.class_loss(output, target), self.options.head_l2 / 2 * head.weight.square().sum()
        parts = {"class_loss": class_loss.detach(), "penalty": penalty.detach()}
        return {"loss": class_loss + penalty, "output": output, **parts}
