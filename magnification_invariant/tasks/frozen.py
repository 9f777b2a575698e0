"""Regularised logistic regression on the features of a frozen pretrained network (a linear probe)."""

import warnings

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from magnification_invariant.tasks.task import Player, Task


class Frozen(Task):
    """Multinomial logistic regression with an L2 penalty, on features of a backbone that is never trained::

        L = CE(W z + b, y) + l2 / 2 ||W||^2

    The backbone is in eval mode throughout: no dropout, and BatchNorm keeps its statistics. The regression goes through
    the same loop as every other method, with the same batches, augmentation, steps and average of weights, instead of
    to convergence; its strength `l2` is chosen like the options of the others, by log-loss on validation patients.

    `create_model` loads the weights that timm has, so ``--model`` is a timm name, ``hf-hub:...`` or ``local-dir:...``.

    Args:
        l2: weight of the penalty; the run's weight decay is not applied beside it.
    """

    arch = "resnet18"
    options = ("label_smoothing", "l2")
    pretrained = True

    def __init__(self, model, *, l2: float = 1e-3, **kwargs):
        super().__init__(model, **kwargs)
        if not l2 >= 0:
            raise ValueError(f"l2 is a weight of at least 0, not {l2}")
        if not isinstance(model.get_classifier(), torch.nn.Linear):
            raise ValueError(f"the classifier of {type(model).__name__} is not one linear map: choose another --model")
        expected = {name: tuple(model.pretrained_cfg[name]) for name in ("mean", "std")}
        if expected != {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}:
            raise ValueError(f"images are normalised by ImageNet's mean and std here, and the model expects {expected}")
        self.l2 = l2
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)

    @classmethod
    def create_model(cls, arch, *, num_classes, num_domains, **kwargs):
        known = ":" in arch or timm.models.is_model_pretrained(arch)
        if not known:
            warnings.warn(
                f"timm has no weights for {arch}: its features are those of a random network unless "
                "--pretrained-backbone gives some",
                stacklevel=2,
            )
        model = super().create_model(arch, num_classes=num_classes, num_domains=num_domains, pretrained=known, **kwargs)
        model.reset_classifier(num_classes)  # the file's own head may fit, and has seen who knows what
        return model

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
            pooled = self.model.forward_head(self.model.forward_features(input), pre_logits=True)
        output = head(pooled)
        class_loss, penalty = self.class_loss(output, target), self.l2 / 2 * head.weight.square().sum()
        return {
            "loss": class_loss + penalty,
            "output": output,
            "class_loss": class_loss.detach(),
            "penalty": penalty.detach(),
        }
