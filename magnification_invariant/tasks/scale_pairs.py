"""Two views of the same tissue at two scales: the class loss on both, and a term that ties the pair."""

from dataclasses import dataclass

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor

from magnification_invariant.models import embed
from magnification_invariant.tasks.erm import ERM
from magnification_invariant.tasks.options import option
from magnification_invariant.tasks.task import register


@register("two_view")
class TwoView(ERM):
    """Class cross-entropy, the mean over two views of every image: `ERM` that is shown each twice.

    Both views lie at the same place of the image, the finer one inside the coarser; zoom, turn, flip and stain are
    drawn anew for each. How far their scales differ is the training zoom's range: without zoom hardly at all. A step
    sees twice as many images as one of `ERM`, and takes about twice as long.
    """

    of_pixels = True
    views = 2


@register("scale_pairs")
class ScalePairs(TwoView):
    """`TwoView` plus ``pair_weight`` times a loss of the pairs, by the option ``pair_loss``.

    - "consistency": half the sum of both Kullback-Leibler divergences between the class probabilities of an image's
      two views, mean over images (R-Drop: Liang et al., NeurIPS 2021, equation 2; two views, not two dropouts);
    - "infonce": mean over all 2 b views of a batch of ``-log(exp(s_ip / t) / sum_k exp(s_ik / t))``, s the cosine of
      the pooled features, p the other view of the same image, k all views but i itself, t ``pair_temperature``
      (NT-Xent: Chen et al., "SimCLR", ICML 2020, equation 1, without their projection head). With ``pair_negatives``
      "own_domain", k runs over p and the views of the anchor's own domain alone, so that telling the domains apart
      never helps. Several processes share their views: the negatives are those of the whole batch.

    With a weight of 0 it is `TwoView`, bit for bit.
    """

    @dataclass(frozen=True)
    class Options(TwoView.Options):
        pair_weight: float = option(1.0, "weight of the loss of the pairs", search=(0.05, 3.0, "log"), bounds=(0, 1e6))
        pair_loss: str = option(
            "consistency",
            "what ties the two views of an image",
            search=("consistency", "infonce"),
            choices=("consistency", "infonce"),
        )
        pair_negatives: str = option(
            "all", "what infonce tells an image from: all, or own_domain", choices=("all", "own_domain")
        )
        pair_temperature: float = option(0.2, "of the softmax of infonce", bounds=(1e-3, 1e3))

    def forward(self, input, target, domain, progress, player=0):
        if not self.options.pair_weight:
            return super().forward(input, target, domain, progress, player)
        output, pooled = embed(self.model, input)
        class_loss = self.class_loss(output, target)
        with torch.autocast(input.device.type, enabled=False):
            if self.options.pair_loss == "consistency":
                pair_loss = consistency(output.float())
            else:
                own_domain = domain if self.options.pair_negatives == "own_domain" else torch.zeros_like(domain)
                pair_loss = infonce(pooled.float(), own_domain, self.options.pair_temperature)
        loss = class_loss + self.options.pair_weight * pair_loss
        parts = {"class_loss": class_loss.detach(), "pair_loss": pair_loss.detach()}
        return {"loss": loss, "output": output, **parts}


def consistency(logits: Tensor) -> Tensor:
    """See `ScalePairs`, 0-d.

    Args:
        logits: (2 b, classes), the first view of every image and then the second.
    """
    p, q = logits.log_softmax(1).chunk(2)
    return ((p.exp() - q.exp()) * (p - q)).sum(1).mean() / 2


def infonce(features: Tensor, group: Tensor, temperature: float) -> Tensor:
    """See `ScalePairs`, 0-d: of several processes, the mean over each one's own views among those of all.

    Args:
        features: (2 b, width), the first view of every image and then the second.
        group: (2 b,), int64; the negatives of a view are those of its own group.
        temperature: of the softmax over cosines.
    """
    n, first = len(features), 0
    z = others = F.normalize(features, dim=1)
    groups = group
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        from torch.distributed.nn.functional import all_gather  # with gradients, of all processes' losses

        others, first = torch.cat(all_gather(z)), distributed.get_rank() * n
        gathered = [torch.empty_like(group) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, group)
        groups = torch.cat(gathered)
    own = torch.arange(n, device=z.device)
    partner = first + (own + n // 2) % n
    column = torch.arange(len(others), device=z.device)
    left_out = (group[:, None] != groups) & (column != partner[:, None]) | (column == first + own[:, None])
    similarity = (z @ others.T / temperature).masked_fill(left_out, -torch.inf)
    return F.cross_entropy(similarity, partner)
