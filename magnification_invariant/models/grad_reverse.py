"""Gradient reversal, the one operation that turns a domain classifier into an adversary (Ganin et al., 2016)."""

import math

import torch
from torch import Tensor


class _GradReverse(torch.autograd.Function):
    # Lets torch.func.grad and vmap pass. No jvp: a Function that has one cannot be compiled.
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, coeff: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (coeff,) = ctx.saved_tensors
        return grad.neg() * coeff.to(grad.dtype), None


def grad_reverse(x: Tensor, coeff: Tensor) -> Tensor:
    """Identity forward (bit for bit), gradient times `-coeff` backward.

    The result is a view of `x`, so nothing may write into it: no `ReLU(inplace=True)` directly behind. Export eval
    graphs only: `torch.export` drops custom backward passes, and what is trained from such a graph is not reversed.

    Args:
        x: Features of any shape and floating dtype.
        coeff: 0-d tensor on the device of `x`, not differentiated. A tensor (else TypeError) rather than a float,
            because `torch.compile` makes a new graph for every new float and gives up after a few.

    Source: Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 17 (2016), section 4.2.
    """
    if not isinstance(coeff, Tensor):
        raise TypeError(f"coeff must be a 0-d tensor made outside the compiled region, got {type(coeff).__name__}.")
    return _GradReverse.apply(x, coeff)


def dann_coeff(progress: float | Tensor) -> float | Tensor:
    """Coefficient of the reversed gradient after a share `progress` of the training: 2 / (1 + exp(-10 p)) - 1.

    It starts at 0, so that a domain head that knows nothing yet does not disturb the encoder, and ends near 1.

    Args:
        progress: Steps done / all steps, in [0, 1]. A tensor gives a tensor on its device and is not looked at.

    Returns:
        The coefficient, in [0, 1).

    Raises:
        ValueError: If `progress` is outside [0, 1]; below 0 the gradient would not be reversed at all.

    Source: Ganin et al. (2016), section 5.2.2, with gamma = 10.
    """
    if not isinstance(progress, Tensor) and not 0 <= progress <= 1:
        raise ValueError(f"progress is a share of the training in [0, 1], got {progress}.")
    return 2 / (1 + math.e ** (-10 * progress)) - 1
