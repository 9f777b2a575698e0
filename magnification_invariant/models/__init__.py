"""Models: importing this registers them with timm."""

from magnification_invariant.models.grad_reverse import dann_coeff, grad_reverse
from magnification_invariant.models.magdg import (
    HUB_NAMESPACE,
    MagDGResNet,
    embed,
    magdg_resnet18,
    magerm_resnet18,
    maggan_resnet18,
    plain_architecture,
    test_magdg_resnet,
)

__all__ = [
    "HUB_NAMESPACE",
    "MagDGResNet",
    "dann_coeff",
    "embed",
    "grad_reverse",
    "magdg_resnet18",
    "magerm_resnet18",
    "maggan_resnet18",
    "plain_architecture",
    "test_magdg_resnet",
]
