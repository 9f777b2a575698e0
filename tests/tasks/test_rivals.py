"""Each rival against its paper's formula, worked out here by other means, and able to learn."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from magnification_invariant import engine, metrics
from magnification_invariant.data.pixels import PixelCache
from magnification_invariant.engine import FitConfig, TrainRows, fit, predict
from magnification_invariant.tasks import CDANN, CORAL, DANN, ERM, Frozen, MixStyle, MultiTask
from magnification_invariant.tasks.coral import coral
from magnification_invariant.tasks.mixstyle import mix_style

ARCH = "test_magdg_resnet"
RIVALS = (CDANN, CORAL, MixStyle, MultiTask, Frozen)
CONFIG = FitConfig(epochs=2, batch_size=12, image_size=32, log_every=1)
HALF = torch.tensor(0.5)
pytestmark = pytest.mark.filterwarnings("ignore:timm has no weights")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """48 images of two classes (coarse and fine stripes), three domains (brightness), eight patients."""
    rng, images = np.random.default_rng(0), []
    label, domain = np.arange(48) % 2, np.arange(48) // 2 % 3
    for y, d in zip(label, domain, strict=True):
        stripes = np.kron(rng.random((40 // (8 - 6 * y) + 1, 1, 1)) > 0.5, np.ones((8 - 6 * y, 60, 3)))[:40]
        images.append(PILImage.fromarray((stripes * 90 + 60 + 30 * d + rng.normal(0, 5, (40, 60, 3))).astype(np.uint8)))
    columns = Features({"image": Image(), "mpp": Value("float64")})
    cache = PixelCache(
        Dataset.from_dict({"image": images, "mpp": [1.0] * 48}, columns), 37, folder=tmp_path_factory.mktemp("pixels")
    )
    return cache, TrainRows(np.arange(48), label, domain, np.array([f"p{i // 6}" for i in range(48)]))


def make(method, **kwargs):
    torch.manual_seed(0)
    task = method(method.create_model(ARCH, num_classes=2, num_domains=3), method.Options(**kwargs))
    task.prepare(None, None, None, ["benign", "malignant"], ["40X", "100X", "400X"])
    return task


def batch(n=9):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 32, 32, generator=generator), torch.arange(n) % 5 % 2, torch.arange(n) % 3


def softmax_loss(logits, target):
    return -logits.log_softmax(1)[range(len(target)), target].mean()


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("domain_head.")}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------- adversaries


@pytest.mark.parametrize("arch", [ARCH, "resnet18", "densenet121", "convnext_atto", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("method, sign", [(CDANN, -1), (MultiTask, 1), (DANN, -1)])
def test_what_backbone_and_heads_receive(method, sign, arch):
    """The backbone: class gradient -/+ c times the domain gradient. The heads and the embedding: their own, whole."""
    torch.manual_seed(0)
    model = method.create_model(arch, num_classes=2, num_domains=3, image_size=32).double()
    task = method(model, method.Options(coeff=0.5, coeff_schedule="linear")).double().train()
    x, y, d = batch()
    x = x.double()
    out = task(x, y, d, HALF)
    out["loss"].backward()

    z = model.forward_head(model.forward_features(x), pre_logits=True)
    first, _, last = model.domain_head
    logits = last(first(z + task.class_embedding.weight[y] if method is CDANN else z).relu())
    if method is CDANN:  # every class weighs the same, every image of a class too
        assert y.bincount().tolist() == [5, 4]
        domain_loss = sum(softmax_loss(logits[y == c], d[y == c]) for c in (0, 1)) / 2
    else:
        domain_loss = softmax_loss(logits, d)
    class_loss = softmax_loss(model.get_classifier()(z), y)
    assert out["domain_loss"].item() == pytest.approx(domain_loss.item(), rel=1e-6)
    assert out["class_loss"].item() == pytest.approx(class_loss.item(), rel=1e-6)

    heads = {id(p) for p in (*task.critic, *model.get_classifier().parameters())}
    body = [p for p in model.parameters() if id(p) not in heads]
    by_class, by_domain = (torch.autograd.grad(loss, body, retain_graph=True) for loss in (class_loss, domain_loss))
    assert max(r.abs().max() for r in by_domain) > 1e-4
    for p, c, r in zip(body, by_class, by_domain, strict=True):
        torch.testing.assert_close(p.grad, c + sign * 0.25 * r, rtol=1e-5, atol=1e-8)
    for parameters, loss in ((task.critic, domain_loss), (list(model.get_classifier().parameters()), class_loss)):
        for p, wanted in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True):
            torch.testing.assert_close(p.grad, wanted, rtol=1e-5, atol=1e-8)
            assert wanted.abs().sum() > 0


@pytest.mark.parametrize("arch", ["resnet18", "densenet121", "convnext_atto", "vit_tiny_patch16_224"])
def test_trains_any_backbone(data, arch):
    """One epoch moves every part of it; what predicts gives logits of its plain forward."""
    torch.manual_seed(0)
    task = DANN(DANN.create_model(arch, num_classes=2, num_domains=3, image_size=32))
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    model = fit(task, *data, replace(CONFIG, epochs=1, batch_size=24, ema_decay=0.0))
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
    x, _, _ = batch()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.equal(model(x), model.get_classifier()(pooled))


def test_an_adversary_that_is_told_the_class_trains_its_embedding_and_keeps_it_to_itself(data):
    task = make(CDANN)
    before = task.class_embedding.weight.clone()
    model = fit(task, *data, CONFIG)
    assert not torch.equal(before, task.class_embedding.weight)
    assert not [name for name in model.state_dict() if "embedding" in name]


def test_critic_steps(data):
    """Two players: the critic learns on frozen features, the rest does not move it; as often as it was said."""
    task = make(DANN, critic_steps=2, coeff_schedule="constant")
    critic, rest = task.players
    assert (critic.steps, rest.steps) == (2, 1)
    inside = {id(p) for p in task.model.domain_head.parameters()}
    assert {id(p) for group in critic.parameters for p in group} == inside
    assert {id(p) for group in rest.parameters for p in group} == {id(p) for p in task.model.parameters()} - inside

    x, y, d = batch()
    out = task(x, y, d, HALF, player=0)
    out["loss"].backward()
    z = task.model.forward_head(task.model.forward_features(x), pre_logits=True)
    assert out["critic_loss"].item() == pytest.approx(F.cross_entropy(task.model.domain_head(z), d).item(), rel=1e-5)
    assert all((p.grad is not None) == (id(p) in inside) for p in task.model.parameters())

    logs = []
    fit(make(DANN, critic_steps=2), *data, CONFIG, on_epoch=lambda e, m, log: logs.append(log))
    assert {"critic_loss", "domain_loss", "class_loss"} <= logs[-1].keys()
    for steps, why in ((0.5, "of type int, not 0.5"), (-1, "at least 0")):
        with pytest.raises(ValueError, match=f"critic_steps is {why}"):
            DANN.Options(critic_steps=steps)


# ------------------------------------------------------------------------------------------------------- CORAL


def test_coral_is_sun_and_saenkos_distance():
    rng = np.random.default_rng(0)
    domain = np.array([0, 1, 2, 0, 1, 2, 0, 1, 0, 0])
    z = rng.normal(size=(10, 5)) * (1 + domain[:, None])
    covariance = [np.cov(z[domain == k], rowvar=False) for k in range(3)]
    pairs = [np.linalg.norm(covariance[a] - covariance[b], "fro") ** 2 for a, b in combinations(range(3), 2)]
    features = torch.tensor(z).float().requires_grad_()
    distance = coral(features, torch.tensor(domain), 3)
    assert distance.item() == pytest.approx(np.mean(pairs) / (4 * 5**2), rel=1e-5)
    # Means do not matter, and a domain of one image has no covariance.
    moved = torch.tensor(z + 10 * domain[:, None]).float()
    assert coral(moved, torch.tensor(domain), 3).item() == pytest.approx(distance.item(), rel=1e-3)
    few = np.array([0, 1, 2, 0, 1, 0, 0, 1, 0, 0])
    alone = np.linalg.norm(np.cov(z[few == 0].T) - np.cov(z[few == 1].T), "fro") ** 2 / 100 / 3
    assert coral(torch.tensor(z).float(), torch.tensor(few), 3).item() == pytest.approx(alone, rel=1e-5)

    # The gradient that the paper gives, with respect to domain a, here of two domains.
    two = torch.tensor(domain[:6] % 2)
    features = torch.tensor(z[:6]).float().requires_grad_()
    coral(features, two, 2).backward()
    a, b = z[:6][two.numpy() == 0], z[:6][two.numpy() == 1]
    difference = np.cov(a.T) - np.cov(b.T)
    wanted = (a - a.mean(0)) @ difference / (25 * (len(a) - 1))
    assert np.allclose(features.grad.numpy()[two.numpy() == 0], wanted, atol=1e-5)


def test_coral_adds_its_distance_to_the_class_loss(data):
    task = make(CORAL, coral_weight=3.0)
    x, y, d = batch()
    out = task(x, y, d, HALF)
    assert out["loss"].item() == pytest.approx((out["class_loss"] + 3 * out["coral_loss"]).item(), rel=1e-6)
    z = task.model.forward_head(task.model.forward_features(x), pre_logits=True)
    assert out["coral_loss"].item() == pytest.approx(coral(z, d, 3).item(), rel=1e-4)
    config, logs = replace(CONFIG, epochs=6, learning_rate=3e-3), []
    for weight in (0.0, 100.0):
        fit(make(CORAL, coral_weight=weight), *data, config, on_epoch=lambda e, m, log: logs.append(log["coral_loss"]))
    assert logs[-1] < logs[5] / 2
    with pytest.raises(RuntimeError, match=r"prepare\(\)"):
        CORAL(task.model)(x, y, d, HALF)
    with pytest.raises(ValueError, match="at least two training domains"):
        task.prepare(None, None, None, [], ["40X"])


# ---------------------------------------------------------------------------------------------------- MixStyle


def test_mixed_features_have_the_mixed_style():
    rng = np.random.default_rng(0)
    x, lam, partner = rng.normal(2, 3, (4, 5, 6, 7)), rng.random(4), np.array([2, 0, 3, 1])
    mu, sigma = x.mean((2, 3)), np.sqrt(x.var((2, 3), ddof=1) + 1e-6)
    own, other = lam[:, None], 1 - lam[:, None]
    beta, gamma = own * mu + other * mu[partner], own * sigma + other * sigma[partner]
    wanted = gamma[..., None, None] * (x - mu[..., None, None]) / sigma[..., None, None] + beta[..., None, None]
    tensor = torch.tensor(x, requires_grad=True)
    out = mix_style(tensor, torch.tensor(lam), torch.tensor(partner))
    assert np.allclose(out.detach().numpy(), wanted)
    # No gradient through the statistics: each pixel gets its own, scaled.
    up = torch.tensor(rng.normal(size=x.shape))
    out.backward(up)
    assert np.allclose(tensor.grad.numpy(), up.numpy() * (gamma / sigma)[..., None, None])


def test_mixstyle_mixes_after_two_stages_half_of_the_time_and_in_training_only(data):
    task, (x, y, d) = make(MixStyle), batch(6)
    stages = {}
    for name in ("layer1", "layer2", "layer3"):
        getattr(task.model, name).register_forward_hook(
            lambda module, args, out, name=name: stages.update({name: (args[0].detach(), out.detach())})
        )
    mixed = []
    for seed in range(60):
        torch.manual_seed(seed)
        task(x, y, d, HALF)
        left = [torch.equal(stages[a][1], stages[b][0]) for a, b in (("layer1", "layer2"), ("layer2", "layer3"))]
        mixed.append([not same for same in left])
    assert 0.3 < np.mean(mixed) < 0.7
    assert len({tuple(row) for row in mixed}) == 4  # drawn for each stage on its own
    torch.manual_seed(seed)
    again = task(x, y, d, HALF)["loss"]
    torch.manual_seed(seed)
    assert torch.equal(task(x, y, d, HALF)["loss"], again)

    task.eval()
    assert torch.equal(task(x, y, d, HALF)["output"], task.model(x))
    with pytest.raises(ValueError, match="timm ResNet"):
        MixStyle(timm.create_model("test_vit", num_classes=2))
    with pytest.raises(ValueError, match="mix_prob is at least 0 and at most 1, not 2"):
        MixStyle.Options(mix_prob=2)


# ------------------------------------------------------------------------------------------------------ frozen


def test_the_frozen_backbone_stays_as_it_is_and_the_head_learns(data):
    task = make(Frozen)
    before = weights(task.model)
    after = weights(fit(task, *data, CONFIG))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"fc.weight", "fc.bias"}


def test_the_frozen_head_is_regularised_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    task = make(Frozen, head_l2=0.01).train()
    x, y, d = batch(24)
    optimizer = torch.optim.LBFGS(task.model.fc.parameters(), max_iter=500, tolerance_grad=1e-9, history_size=50)

    def loss():
        optimizer.zero_grad()
        out = task(x, y, d, HALF)["loss"]
        out.backward()
        return out

    optimizer.step(loss)
    with torch.no_grad():
        z = task.model.forward_head(task.model.forward_features(x), pre_logits=True)
        log_odds = (task.model.fc(z)[:, 1] - task.model.fc(z)[:, 0]).numpy()
    # Of two logits w / 2 and -w / 2, the penalty is half that of one logit w.
    sklearn = LogisticRegression(C=2 / (0.01 * 24), tol=1e-10, max_iter=10000).fit(z.double().numpy(), y.numpy())
    assert np.allclose(log_odds, sklearn.decision_function(z.double().numpy()), atol=2e-3)


# --------------------------------------------------------------------------------------------------- all of them


def test_switched_off_they_are_erm(data):
    erm = weights(fit(make(ERM), *data, CONFIG))
    off = (DANN, {"coeff": 0.0}), (CDANN, {"coeff": 0.0}), (MultiTask, {"coeff": 0.0})
    for method, options in (*off, (CORAL, {"coral_weight": 0.0}), (MixStyle, {"mix_prob": 0.0})):
        assert equal(erm, weights(fit(make(method, **options), *data, CONFIG))), method.__name__
    assert not equal(erm, weights(fit(make(DANN), *data, CONFIG)))


@pytest.mark.parametrize("method", RIVALS)
def test_a_run_cut_off_and_resumed_ends_as_one_left_alone(data, tmp_path, method, monkeypatch):
    monkeypatch.setattr(engine, "CHECKPOINT_SECONDS", 0, raising=False)
    alone = fit(make(method), *data, CONFIG)

    def cut(epoch, model, log):
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(make(method), *data, CONFIG, checkpoint=tmp_path / "c.pt", on_epoch=cut)
    assert equal(weights(alone), weights(fit(make(method), *data, CONFIG, checkpoint=tmp_path / "c.pt")))


def tiles_of(cache):
    """The middle of each cached image, as one tile of 32 pixels."""
    top, left = ((side - 32) // 2 for side in cache.pixels.shape[2:])
    middle = cache.pixels[:, :, top : top + 32, left : left + 32].numpy()
    return lambda rows: (middle[row : row + 1] for row in rows)


@pytest.mark.parametrize("method", RIVALS)
def test_learns_the_classes(data, method):
    cache, rows = data
    train = TrainRows(*(getattr(rows, name)[:36] for name in ("index", "target", "domain", "group")))
    config = replace(CONFIG, epochs=12, stain=0.0, learning_rate=3e-3, ema_decay=0.9)
    model = fit(make(method), cache, train, config)
    logits, embedding = predict(model, tiles_of(cache), rows.index[36:], embedding="penultimate")
    assert metrics.auc(rows.target[36:], logits[:, 1] - logits[:, 0]) > 0.9
    assert embedding.shape == (12, 96)


@pytest.mark.slow
@pytest.mark.parametrize("method", RIVALS)
def test_compilation_makes_one_graph(data, method, monkeypatch):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend=counter, fullgraph=True))
    compiled = fit(make(method), *data, replace(CONFIG, compile=True))
    assert counter.frame_count == 1
    eager = fit(make(method), *data, CONFIG)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(compiled.parameters(), eager.parameters(), strict=True))
