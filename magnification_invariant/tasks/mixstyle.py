"""MixStyle (Zhou et al., "Domain Generalization with MixStyle", ICLR 2021)."""

import torch
from timm.models.resnet import ResNet

from magnification_invariant.tasks.task import Task


class MixStyle(Task):
    """Class cross-entropy of features whose style is mixed between images, in training only.

    After the first and the second stage of the ResNet, and each time with probability `p` for the whole batch, the mean
    mu and the standard deviation sigma of an image's channels over its pixels are replaced by a mixture with those of
    another image of the batch (a random permutation, the paper's variant that needs no domain labels)::

        (lam sigma + (1 - lam) sigma') (x - mu) / sigma + lam mu + (1 - lam) mu',    lam ~ Beta(alpha, alpha) an image

    The statistics carry no gradient. The network that predicts is the plain one.

    Args:
        p: probability of mixing.
        alpha: of the Beta distribution; small values leave most images nearly to one of the two styles.
    """

    arch = "magerm_resnet18"
    options = ("label_smoothing", "p", "alpha")

    def __init__(self, model, *, p: float = 0.5, alpha: float = 0.1, **kwargs):
        super().__init__(model, **kwargs)
        if not isinstance(model, ResNet):
            raise ValueError(f"MixStyle mixes between the stages of a timm ResNet, and {type(model).__name__} is none")
        if not 0 <= p <= 1 or not alpha > 0:
            raise ValueError(f"MixStyle needs a probability p in [0, 1] and alpha > 0, not {p} and {alpha}")
        self.p, self.alpha = p, alpha

    def forward(self, input, target, domain, progress, player=0):
        model = self.model
        x = model.maxpool(model.act1(model.bn1(model.conv1(input))))
        for stage in (model.layer1, model.layer2):
            x = stage(x)
            if self.training:
                # Chosen by arithmetic, not by a branch: one graph for every batch. The draws are of the stream that
                # the loop seeds before each step.
                lam = torch.distributions.Beta(*x.new_full((2,), self.alpha).float(), validate_args=False)
                mixed = mix_style(x, lam.sample((len(x),)).to(x.dtype), torch.randperm(len(x), device=x.device))
                x = torch.where(torch.rand((), device=x.device) < self.p, mixed, x)
        output = model.forward_head(model.layer4(model.layer3(x)))
        loss = self.class_loss(output, target)
        return {"loss": loss, "output": output, "class_loss": loss.detach()}


def mix_style(x: torch.Tensor, lam: torch.Tensor, partner: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Features with the style of a mixture (see `MixStyle`).

    Args:
        x: (b, channels, height, width).
        lam: (b,) shares of the own style.
        partner: (b,) whose style is mixed in.
        eps: added to the variance (over n - 1 pixels), as in the authors' code.
    """
    mean = x.mean((2, 3), keepdim=True).detach()
    std = (x.var((2, 3), keepdim=True) + eps).sqrt().detach()
    lam = lam[:, None, None, None]
    mixed_std, mixed_mean = (lam * own + (1 - lam) * own[partner] for own in (std, mean))
    return mixed_std * (x - mean) / std + mixed_mean
