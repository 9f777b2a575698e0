"""Two views of the same tissue: where they lie, what ties them against formulas written out, and two processes."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import debug_launcher
from test_distributed import FrozenNorm, fresh_state, load, train  # noqa: F401  the fixture too
from test_distributed import data as noise  # noqa: F401
from test_rivals import ARCH, CONFIG, HALF, batch, data, equal, make, weights  # noqa: F401

from magnification_invariant.data.views import random_draws, random_view
from magnification_invariant.engine import fit
from magnification_invariant.tasks import ERM, ScalePairs, TwoView
from magnification_invariant.tasks.scale_pairs import consistency, infonce


def test_both_views_show_the_same_place_the_finer_inside_the_coarser():
    """Pixels that say where they are: what the finer view covers lies within what the coarser one does."""
    across = torch.arange(200).expand(120, 200)
    down = torch.arange(120)[:, None].expand(120, 200)
    image = torch.stack([across, down, 0 * down]).to(torch.uint8)
    draws = random_draws(64, 2, torch.Generator().manual_seed(0))
    assert torch.equal(draws[:64, 2:4], draws[64:, 2:4]) and not (draws[:64, 4:] == draws[64:, 4:]).any()
    views = random_view(image.expand(128, 3, 120, 200), draws, 32, zoom=2.5) * 255
    low, high = views.amin((2, 3)), views.amax((2, 3))
    span = (high - low)[:, 0]
    for i in range(64):
        fine, coarse = (i, i + 64) if span[i] < span[i + 64] else (i + 64, i)
        # 8 pixels: the coarsest views are of halved copies, whose outermost pixels are means
        assert (low[fine, :2] >= low[coarse, :2] - 8).all() and (high[fine, :2] <= high[coarse, :2] + 8).all()
    assert 1.5 < (span[:64] / span[64:]).log().abs().exp().mean() < 2.5


def test_one_view_draws_what_it_always_did():
    drawn = random_draws(8, 1, torch.Generator().manual_seed(3), slice(2, 5))
    assert torch.equal(drawn, torch.rand(8, 11, generator=torch.Generator().manual_seed(3))[2:5])


def test_consistency_is_the_mean_of_both_divergences_and_so_are_its_gradients():
    logits = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    p, q = logits.softmax(1).chunk(2)
    wanted = ((p * (p / q).log()).sum(1) + (q * (q / p).log()).sum(1)).mean() / 2
    loss = consistency(logits)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    (grad,) = torch.autograd.grad(loss, logits)
    # d/dp_logit of (1/2) sum (p - q)(log p - log q), written out for softmax: J_p [(log p - log q) + (p - q) / p] / 2n
    d = (p.log() - q.log()) + (p - q) / p
    by_hand = p * (d - (p * d).sum(1, keepdim=True)) / 6
    torch.testing.assert_close(grad[:3], by_hand.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("own_domain", [False, True])
def test_infonce_and_its_gradient_by_hand(own_domain):
    """Two loops for the loss; its gradient in the cosines is (softmax - one at the pair) / (n t), an anchor."""
    features = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    group = torch.tensor([0, 0, 1, 2] * 2) if own_domain else torch.zeros(8, dtype=torch.int64)
    t, n = 0.3, 8
    loss = infonce(features, group, t)
    z = (features / features.norm(dim=1, keepdim=True)).detach()
    total, by_cosine = 0.0, torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        pair = (i + 4) % 8
        among = [k for k in range(n) if k != i and (k == pair or group[k] == group[i])]
        exps = {k: math.exp(float(z[i] @ z[k]) / t) for k in among}
        total -= math.log(exps[pair] / sum(exps.values())) / n
        for k in among:
            by_cosine[i, k] = (exps[k] / sum(exps.values()) - (k == pair)) / (n * t)
    assert loss.item() == pytest.approx(total, rel=1e-10)
    by_z = by_cosine @ z + by_cosine.T @ z
    by_hand = (by_z - (by_z * z).sum(1, keepdim=True) * z) / features.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(torch.autograd.grad(loss, features)[0], by_hand, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pair_loss", ["consistency", "infonce"])
def test_the_loss_is_the_class_loss_of_both_views_and_the_weighted_pairs(pair_loss):
    task = make(ScalePairs, pair_loss=pair_loss, pair_weight=0.5, pair_negatives="own_domain")
    x, y, d = (torch.cat([a, a]) for a in batch())
    x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    out = task.eval()(x, y, d, HALF)
    pooled = task.model.forward_head(task.model.forward_features(x), pre_logits=True)
    logits = task.model.get_classifier()(pooled)
    tied = consistency(logits) if pair_loss == "consistency" else infonce(pooled, d, 0.2)
    assert out["pair_loss"].item() == pytest.approx(tied.item(), rel=1e-5)
    both = torch.nn.functional.cross_entropy(logits, y)
    assert out["loss"].item() == pytest.approx((both + 0.5 * tied).item(), rel=1e-5)


def test_weight_zero_is_two_view_training_bit_for_bit_and_neither_is_erm(data):  # noqa: F811
    config = replace(CONFIG, zoom=2.0)
    plain, zero, tied, erm = (
        weights(fit(make(method, **options), *data, config))
        for method, options in ((TwoView, {}), (ScalePairs, {"pair_weight": 0.0}), (ScalePairs, {}), (ERM, {}))
    )
    assert equal(plain, zero)
    assert not equal(plain, tied) and not equal(plain, erm)


class FrozenPairs(FrozenNorm, ScalePairs):
    def __init__(self, model, options=None):
        super().__init__(model, ScalePairs.Options(pair_loss="infonce", pair_negatives="own_domain"))


@pytest.mark.usefixtures("fresh_state")
def test_two_processes_take_negatives_from_each_other(noise, tmp_path):  # noqa: F811
    """With the same loss, and the same weights after two epochs, as one process with the whole batch."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    debug_launcher(train, (FrozenPairs, noise, tmp_path / "two"), num_processes=2)
    train(FrozenPairs, noise, tmp_path / "one")
    one, two = (load(tmp_path / name / "rank0.pt") for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["losses"] == pytest.approx(two["losses"], abs=1e-5)
    assert torch.allclose(one["logits"], two["logits"], atol=1e-3)
