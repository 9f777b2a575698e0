"""Models: importing this registers them with timm."""

from magnification_invariant.models.domain_head import (
    add_domain_head,
    forward_domains,
    forward_heads,
    linear_classifier,
    pooled_features,
)
from magnification_invariant.models.grad_reverse import dann_coeff, grad_reverse
from magnification_invariant.models.magdg import HUB_NAMESPACE, PACKAGED, embed, head_prefixes, plain_architecture

__all__ = [
    "HUB_NAMESPACE",
    "PACKAGED",
    "add_domain_head",
    "dann_coeff",
    "embed",
    "forward_domains",
    "forward_heads",
    "grad_reverse",
    "head_prefixes",
    "linear_classifier",
    "plain_architecture",
    "pooled_features",
]
