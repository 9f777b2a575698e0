"""Models: importing this registers them with timm."""

from magnification_invariant.models.domain_head import (
    add_domain_head,
    forward_domains,
    forward_heads,
    linear_classifier,
    pooled_features,
)
from magnification_invariant.models.grad_reverse import dann_coeff, grad_reverse
from magnification_invariant.models.magdg import (
    HUB_NAMESPACE,
    PACKAGED,
    channel_statistics,
    embed,
    head_prefixes,
    normalisation,
    plain_architecture,
    scope_stage,
)
from magnification_invariant.models.vectors import VECTOR_MODELS, create_network

__all__ = [
    "HUB_NAMESPACE",
    "PACKAGED",
    "VECTOR_MODELS",
    "channel_statistics",
    "create_network",
    "embed",
    "head_prefixes",
    "normalisation",
    "plain_architecture",
    "scope_stage",
]
__all__ += ["add_domain_head", "forward_domains", "forward_heads", "linear_classifier", "pooled_features"]
__all__ += ["dann_coeff", "grad_reverse"]
