import math

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from magnification_invariant import metrics
from magnification_invariant.data.pixels import PixelCache
from magnification_invariant.engine import (
    Diverged,
    FitConfig,
    TrainRows,
    epoch_order,
    fit,
    learning_rate_factor,
    predict,
)
from magnification_invariant.tasks import DANN, ERM, Player, Task, get_task

ARCH = "test_magdg_resnet"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """48 images of two classes (coarse and fine stripes), three domains (brightness), eight patients."""
    rng, images = np.random.default_rng(0), []
    label = np.arange(48) % 2
    domain = np.arange(48) // 2 % 3
    for y, d in zip(label, domain, strict=True):
        stripes = np.kron(rng.random((40 // (8 - 6 * y) + 1, 1, 1)) > 0.5, np.ones((8 - 6 * y, 60, 3)))[:40]
        images.append(PILImage.fromarray((stripes * 90 + 60 + 30 * d + rng.normal(0, 5, (40, 60, 3))).astype(np.uint8)))
    ds = Dataset.from_dict(
        {"image": images, "mpp": [1.0] * 48}, features=Features({"image": Image(), "mpp": Value("float64")})
    )
    cache = PixelCache(ds, 37, folder=tmp_path_factory.mktemp("pixels"))
    group = np.array([f"p{i // 6}" for i in range(48)])
    return cache, TrainRows(np.arange(48), label, domain, group)


CONFIG = FitConfig(epochs=2, batch_size=16, image_size=32, log_every=1)


def make(method, seed=0, **kwargs):
    torch.manual_seed(seed)
    return method(method.create_model(ARCH, num_classes=2, num_domains=3), **kwargs)


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("domain_head.")}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_dann_with_coefficient_zero_is_erm_bit_for_bit(data):
    erm, dann = fit(make(ERM), *data, CONFIG), fit(make(DANN, coeff=0.0), *data, CONFIG)
    assert equal(state(erm), state(dann))
    assert not equal(state(erm), state(fit(make(DANN, coeff=1.0), *data, CONFIG)))


def test_same_seed_same_weights_and_another_seed_others(data):
    once, again = fit(make(ERM), *data, CONFIG), fit(make(ERM), *data, CONFIG)
    assert equal(state(once), state(again))
    other = fit(make(ERM), *data, FitConfig(**{**vars(CONFIG), "seed": 1}))
    assert not equal(state(once), state(other))


@pytest.mark.parametrize("method", [ERM, DANN])
def test_a_run_cut_off_and_resumed_ends_as_one_left_alone(data, tmp_path, method):
    config = FitConfig(**{**vars(CONFIG), "epochs": 3})
    alone = fit(make(method), *data, config)

    def cut(epoch, model, log):
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(make(method), *data, config, checkpoint=tmp_path / "c.pt", on_epoch=cut)
    seen = []
    resumed = fit(
        make(method, seed=9), *data, config, checkpoint=tmp_path / "c.pt", on_epoch=lambda e, m, log: seen.append(e)
    )
    assert seen == [1, 2]
    assert equal(alone.state_dict(), resumed.state_dict())
    assert not list(tmp_path.glob("*.tmp"))


def test_learns_the_classes(data):
    cache, rows = data
    train = TrainRows(*(getattr(rows, name)[:36] for name in ("index", "target", "domain", "group")))
    config = FitConfig(epochs=12, batch_size=12, image_size=32, stain=0.0, learning_rate=3e-3, ema_decay=0.9)
    model = fit(make(DANN), cache, train, config)
    logits, _ = predict(model, cache, rows.index[36:], 32)
    assert metrics.auc(rows.target[36:], logits[:, 1] - logits[:, 0]) > 0.9


def test_the_domain_head_learns_while_the_backbone_forgets(data):
    """With the coefficient at 0 the head reads the domain; it is trained, not just carried along."""
    logs = []
    config = FitConfig(epochs=12, batch_size=24, image_size=32, stain=0.0, learning_rate=3e-3)
    fit(make(DANN, coeff=0.0), *data, config, on_epoch=lambda e, m, log: logs.append(log))
    assert logs[-1]["domain_loss"] < 0.8 * math.log(3) < logs[0]["domain_loss"]
    assert [log["coeff"] for log in logs] == [0] * 12


def test_the_coefficient_follows_the_schedule(data):
    logs = []
    fit(make(DANN, coeff=0.5), *data, CONFIG, on_epoch=lambda e, m, log: logs.append(log))
    steps = [
        np.mean([0.5 * (2 / (1 + math.exp(-10 * p)) - 1) for p in part])
        for part in ([0, 1 / 6, 2 / 6], [3 / 6, 4 / 6, 5 / 6])
    ]
    assert [log["coeff"] for log in logs] == pytest.approx(steps, rel=1e-5)


def test_order_gives_domains_and_patients_equal_turns():
    rng = np.random.default_rng(0)
    domain = rng.choice(3, 200, p=[0.7, 0.2, 0.1])
    group = rng.choice(list("abcdefgh"), 200, p=[0.6, *[0.4 / 7] * 7])
    rows = TrainRows(np.arange(200), rng.integers(0, 2, 200), domain, group)
    order = epoch_order(rows, 480, seed=3, epoch=5)
    assert np.array_equal(order, epoch_order(rows, 480, seed=3, epoch=5))
    assert not np.array_equal(order, epoch_order(rows, 480, seed=3, epoch=6))
    assert not np.array_equal(epoch_order(rows, 480, seed=4, epoch=5), epoch_order(rows, 480, seed=3, epoch=6))
    assert np.bincount(domain[order]).tolist() == [160, 160, 160]
    for start in range(0, 480, 3):  # in every stretch, not only over the epoch
        assert set(domain[order[start : start + 3]]) == {0, 1, 2}
    for d in range(3):
        chosen = order[domain[order] == d]
        _, turns = np.unique(group[chosen], return_counts=True)
        assert turns.max() - turns.min() <= 1
        for patient in np.unique(group[chosen]):  # no image twice before every image of the patient once
            _, times = np.unique(chosen[group[chosen] == patient], return_counts=True)
            assert times.max() - times.min() <= 1 or len(times) < np.sum((group == patient) & (domain == d))


def test_learning_rate_rises_and_falls():
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10] == 1 and factors[-1] < 0.001
    assert factors[55] == pytest.approx(0.5, abs=0.01)


def test_a_loss_that_is_no_number_stops_the_run(data):
    class Broken(ERM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            return out | {"loss": out["loss"] * float("nan")}

    with pytest.raises(Diverged, match=r"epoch 0, step 0.*nan"):
        fit(make(Broken), *data, CONFIG)


def test_two_players_take_turns(data):
    """Each player's optimizer moves its own parameters only, as often as it says, at its own settings."""
    moved = []

    class Duel(ERM):
        @property
        def players(self):
            head = list(self.model.fc.parameters())
            body = [p for p in self.model.parameters() if all(p is not h for h in head)]
            return [Player("body", [body], options={"lr": 0.0}), Player("head", [head], steps=2)]

        def forward(self, input, target, domain, progress, player=0):
            moved.append(player)
            return super().forward(input, target, domain, progress)

    task = make(Duel)
    before = {k: v.clone() for k, v in task.model.named_parameters()}
    fit(task, *data, FitConfig(**{**vars(CONFIG), "epochs": 1, "weight_decay": 0.0, "ema_decay": 0.0}))
    assert moved == [0, 1, 1] * 3
    for name, value in task.model.named_parameters():
        assert torch.equal(value, before[name]) == (not name.startswith("fc."))


def test_predict_keeps_the_order_and_the_batch_does_not_matter(data):
    cache, _ = data
    model = make(ERM).model.eval()
    rows = np.array([5, 3, 40, 3, 0])
    logits, embedding = predict(model, cache, rows, 32, batch_size=2, embedding="penultimate")
    assert np.array_equal(logits[1], logits[3])
    assert np.allclose(logits, predict(model, cache, rows, 32)[0], atol=1e-5)
    weight, bias = (p.detach().numpy() for p in (model.fc.weight, model.fc.bias))
    assert np.allclose(embedding @ weight.T + bias, logits, atol=1e-5)
    assert np.allclose(logits[0], predict(model, cache, np.array([5]), 32)[0], atol=1e-5)


def test_batch_must_be_shared_equally(data):
    class Three:
        num_processes, process_index, device = 3, 0, torch.device("cpu")

    with pytest.raises(ValueError, match=r"16 images.*3 processes"):
        fit(make(ERM), *data, CONFIG, accelerator=Three())


def test_methods_by_name():
    assert get_task("erm") is ERM
    assert get_task("magnification_invariant.tasks.dann:DANN") is DANN
    with pytest.raises(ValueError, match="choose from erm, dann"):
        get_task("dan")
    with pytest.raises(ValueError, match="cannot import"):
        get_task("no.such:Thing")
    with pytest.raises(ValueError, match="not a subclass"):
        get_task("json:loads")
    assert issubclass(DANN, Task)


@pytest.mark.parametrize("schedule, wanted", [("dann", 0.9866142981514303), ("constant", 1.0), ("linear", 0.5)])
def test_schedules_of_the_coefficient(schedule, wanted):
    task = make(DANN, coeff=2.0, coeff_schedule=schedule)
    out = task(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 2, 0]), torch.tensor(0.5))
    assert out["coeff"].item() == pytest.approx(2 * wanted, rel=1e-6)


def test_the_adaptive_coefficient_makes_both_gradients_equally_strong():
    """Against the two gradients at the pooled features, taken one by one."""
    task = make(DANN, coeff=0.7, coeff_schedule="adaptive")
    x, y, d = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 0, 1, 1, 0]), torch.tensor([0, 1, 2, 0, 1, 2])
    out = task(x, y, d, torch.tensor(0.3))
    out["loss"].backward()
    got = [p.grad.clone() for p in task.model.layer1.parameters()]

    def gradients(of):
        model = task.model
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        loss = torch.nn.functional.cross_entropy(
            *((model.fc(pooled), y) if of == "class" else (model.domain_head(pooled), d))
        )
        at_features = torch.autograd.grad(loss, pooled, retain_graph=True)[0].norm()
        return at_features, torch.autograd.grad(loss, list(model.layer1.parameters()))

    (class_norm, by_class), (domain_norm, by_domain) = gradients("class"), gradients("domain")
    coeff = 0.7 * (2 / (1 + math.exp(-3)) - 1) * class_norm / domain_norm
    assert out["coeff"].item() == pytest.approx(coeff.item(), rel=1e-4)
    for g, c, r in zip(got, by_class, by_domain, strict=True):
        assert torch.allclose(g, c - coeff * r, atol=1e-5)


def test_dann_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="choose from dann, constant"):
        make(DANN, coeff_schedule="cosine")
    with pytest.raises(ValueError, match="two training domains"):
        DANN(DANN.create_model(ARCH, num_classes=2, num_domains=1))
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="domain head"):
        DANN(ERM.create_model(ARCH, num_classes=2, num_domains=3))


def test_compilation_makes_one_graph_for_every_coefficient(data, monkeypatch):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend=counter, fullgraph=True))
    logs = []
    config = FitConfig(**{**vars(CONFIG), "compile": True, "zoom": 2.0})
    compiled = fit(make(DANN), *data, config, on_epoch=lambda e, m, log: logs.append(log["coeff"]))
    assert counter.frame_count == 1 and logs[0] < logs[1]
    eager = fit(make(DANN), *data, FitConfig(**{**vars(CONFIG), "zoom": 2.0}))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(compiled.parameters(), eager.parameters(), strict=True))
