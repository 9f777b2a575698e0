"""Gradient reversal: the forward pass is the identity to the bit, the backward pass is -coeff times the reference."""

import math

import pytest
import torch

from magnification_invariant.models import dann_coeff, grad_reverse

COEFFS = (0.0, 0.1, 0.5, 1.0, 10.0)


def coeff_tensor(value: float) -> torch.Tensor:
    return torch.tensor(value)


def loss_of(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() * x).sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_the_identity_bit_for_bit(dtype):
    x = torch.cat([torch.randn(1000, dtype=torch.float64) * 1e3, torch.tensor([0.0, -0.0, math.inf, -math.inf])]).to(
        dtype
    )
    y = grad_reverse(x, coeff_tensor(0.7))
    assert y.dtype == dtype
    assert torch.equal(y, x)
    assert torch.equal(torch.signbit(y), torch.signbit(x))  # torch.equal takes 0 and -0 for the same
    assert grad_reverse(torch.tensor(math.nan), coeff_tensor(0.7)).isnan()


@pytest.mark.parametrize("coeff", COEFFS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient_is_minus_coeff_times_the_reference(dtype, coeff):
    x = torch.randn(64, 8, dtype=dtype, requires_grad=True)
    (reference,) = torch.autograd.grad(loss_of(x), x)
    (reversed_,) = torch.autograd.grad(loss_of(grad_reverse(x, coeff_tensor(coeff))), x)
    assert reversed_.dtype == dtype
    assert reference.abs().max() > 0
    assert torch.equal(reversed_, -coeff_tensor(coeff).to(dtype) * reference)


def test_only_what_lies_before_is_reversed():
    before, after = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    (grad_reverse(before, coeff_tensor(2.0)) * after).sum().backward()
    assert torch.equal(before.grad, -2 * after.detach())
    assert torch.equal(after.grad, before.detach())


def test_gradcheck_where_reversal_is_undone():
    """At coeff = -1 the backward pass is the true one; at any other it is a lie on purpose."""
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def function(x):
        return grad_reverse(x, torch.tensor(-1.0, dtype=torch.float64)).sin()

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_functional_gradients_and_vmap():
    x = torch.randn(6, 4)
    coeffs = torch.linspace(0, 1, 6)

    def loss(x, coeff):
        return loss_of(grad_reverse(x, coeff))

    reference = torch.func.grad(loss_of)(x)
    torch.testing.assert_close(torch.func.grad(loss)(x, coeff_tensor(0.3)), -0.3 * reference)
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(0, 0))(x, coeffs)
    torch.testing.assert_close(per_sample, -coeffs[:, None] * reference)


def test_under_autocast():
    torch.manual_seed(0)
    features, head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 3)
    x = torch.randn(16, 8)

    def gradients(wrap):
        with torch.autocast("cpu", torch.bfloat16):
            out = head(wrap(features(x)))
            assert out.dtype == torch.bfloat16
        return torch.autograd.grad(out.float().square().sum(), (features.weight, head.weight))

    encoder, last = gradients(lambda z: z)
    encoder_reversed, last_reversed = gradients(lambda z: grad_reverse(z, coeff_tensor(0.5)))
    assert torch.equal(encoder_reversed, -0.5 * encoder)  # a power of two, so exact in bfloat16
    assert torch.equal(last_reversed, last)


def test_a_float_coefficient_is_refused():
    with pytest.raises(TypeError, match="0-d tensor"):
        grad_reverse(torch.randn(2), 0.5)


def test_dann_coeff_is_the_published_schedule():
    assert dann_coeff(0) == 0
    assert dann_coeff(1) == pytest.approx(0.9999092042625951, rel=1e-12)
    values = [dann_coeff(step / 100) for step in range(101)]
    assert values == pytest.approx([math.tanh(5 * step / 100) for step in range(101)], abs=1e-15)
    assert values == sorted(values)


@pytest.mark.parametrize("progress", [-0.01, 1.01, 50, math.nan])
def test_dann_coeff_refuses_what_is_not_a_share(progress):
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        dann_coeff(progress)
