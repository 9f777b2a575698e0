"""Correlation alignment (Sun and Saenko, "Deep CORAL", ECCV 2016 workshops)."""

from dataclasses import dataclass
from itertools import combinations

import torch

from magnification_invariant.models import embed
from magnification_invariant.tasks.options import option
from magnification_invariant.tasks.task import Task, register


@register("coral")
class CORAL(Task):
    """Class cross-entropy plus the distance of the domains' feature covariances.

    For two domains the loss is the paper's equation 1, ``||C_a - C_b||_F^2 / (4 w^2)``, C a covariance (over n - 1) of
    pooled features of width w; for more it is the mean over pairs, as in DomainBed, times the option
    ``coral_weight``. Means are not aligned, as in the paper (DomainBed does, and leaves out the factor 1/4).

    A domain with fewer than two images in the batch has no covariance, and its pairs are left out of the sum.
    With several processes each aligns the covariances of its own share of the batch: no mean over all images.
    """

    @dataclass(frozen=True)
    class Options(Task.Options):
        coral_weight: float = option(1.0, "weight of the alignment", search=(0.1, 1e3, "log"), bounds=(0, 1e9))

    arch = "magerm_resnet18"
    num_domains = 0

    def prepare(self, rows, fit, view, class_names, domain_names):
        self.num_domains = len(domain_names)
        if self.num_domains < 2:
            raise ValueError("CORAL needs at least two training domains to align, and there is one: use erm")
        return {}, {}

    def forward(self, input, target, domain, progress, player=0):
        if not self.num_domains:
            raise RuntimeError("CORAL does not know its domains yet: call its prepare() before training")
        output, pooled = embed(self.model, input)
        class_loss, coral_loss = self.class_loss(output, target), coral(pooled, domain, self.num_domains)
        parts = {"class_loss": class_loss.detach(), "coral_loss": coral_loss.detach()}
        return {"loss": class_loss + self.options.coral_weight * coral_loss, "output": output, **parts}


def coral(features: torch.Tensor, domain: torch.Tensor, num_domains: int) -> torch.Tensor:
    """Mean over pairs of domains of the covariances' squared distance (see `CORAL`), 0-d.

    Masks instead of slices: shapes must not depend on the batch, or every batch would compile anew.

    Args:
        features: (b, width).
        domain: (b,) in [0, num_domains).
    """
    with torch.autocast(features.device.type, enabled=False):  # small differences of sums
        features = features.float()
        covariances, known = [], []
        for d in range(num_domains):
            inside = (domain == d).float()
            n = inside.sum()
            centred = (features - inside @ features / n.clamp(min=1)) * inside[:, None]
            covariances.append(centred.T @ centred / (n - 1).clamp(min=1))
            known.append(n > 1)
        pairs = list(combinations(range(num_domains), 2))
        distances = [(covariances[a] - covariances[b]).square().mean() / 4 * (known[a] & known[b]) for a, b in pairs]
        return torch.stack(distances).sum() / len(pairs)
