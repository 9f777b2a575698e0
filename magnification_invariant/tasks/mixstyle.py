"""MixStyle (Zhou et al., "Domain Generalization with MixStyle", ICLR 2021)."""

from dataclasses import dataclass

import torch
from timm.models.resnet import ResNet

from magnification_invariant.tasks.options import option
from magnification_invariant.tasks.task import Task, register


@register("mixstyle")
class MixStyle(Task):
    """Class cross-entropy of features whose style is mixed between images, in training only.

    After the first and the second stage of the ResNet, and each time with probability ``mix_prob`` for the whole
    batch, the mean mu and the standard deviation sigma of an image's channels over its pixels are replaced by a mixture
    with those of another image of the batch (a random permutation, the paper's variant that needs no domain labels)::

        (lam sigma + (1 - lam) sigma') (x - mu) / sigma + lam mu + (1 - lam) mu',    lam ~ Beta(a, a) an image

    with a the option ``mix_alpha``. The statistics carry no gradient. The network that predicts is the plain one.

    Raises:
        ValueError: If the model is not a timm ResNet.
    """

    @dataclass(frozen=True)
    class Options(Task.Options):
        mix_prob: float = option(
            0.5, "probability of mixing styles after a stage", search=(0.25, 0.5, 0.75, 1.0), bounds=(0, 1)
        )
        mix_alpha: float = option(
            0.1, "of the Beta distribution of a style's share", search=(0.1, 0.2, 0.3), bounds=(1e-6, 1e6)
        )

    arch = "magerm_resnet18"
    of_pixels = True

    def __init__(self, model, options=None):
        super().__init__(model, options)
        if not isinstance(model, ResNet):
            raise ValueError(f"MixStyle mixes between the stages of a timm ResNet, and {type(model).__name__} is none")

    def forward(self, input, target, domain, progress, player=0):
        model = self.model
        x = model.maxpool(model.act1(model.bn1(model.conv1(input))))
        for stage in (model.layer1, model.layer2):
            x = stage(x)
            if self.training:
                # Chosen by arithmetic, not by a branch: one graph for every batch. The draws are of the stream that
                # the loop seeds before each step.
                lam = torch.distributions.Beta(*x.new_full((2,), self.options.mix_alpha).float(), validate_args=False)
                mixed = mix_style(x, lam.sample((len(x),)).to(x.dtype), torch.randperm(len(x), device=x.device))
                x = torch.where(torch.rand((), device=x.device) < self.options.mix_prob, mixed, x)
        output = model.forward_head(model.layer4(model.layer3(x)))
        loss = self.class_loss(output, target)
        return {"loss": loss, "output": output, "class_loss": loss.detach()}


def mix_style(x: torch.Tensor, lam: torch.Tensor, partner: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Features with the style of a mixture (see `MixStyle`).

    Args:
        x: (b, channels, height, width).
        lam: (b,) shares of the own style.
        partner: (b,) whose style is mixed in.
        eps: Added to the variance (over n - 1 pixels), as in the authors' code.
    """
    mean = x.mean((2, 3), keepdim=True).detach()
    std = (x.var((2, 3), keepdim=True) + eps).sqrt().detach()
    lam = lam[:, None, None, None]
    mixed_std, mixed_mean = (lam * own + (1 - lam) * own[partner] for own in (std, mean))
    return mixed_std * (x - mean) / std + mixed_mean
