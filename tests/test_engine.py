"""The training loop and prediction: reproducible, resumable, the same for every method; the network against timm."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from magnification_invariant import engine, metrics
from magnification_invariant.data.pixels import PixelCache, ViewCache
from magnification_invariant.engine import (
    Diverged,
    FitConfig,
    Network,
    TrainRows,
    epoch_order,
    fit,
    learning_rate_factor,
    predict,
)
from magnification_invariant.models import embed
from magnification_invariant.tasks import DANN, ERM, Player, ScalePairs

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
    cache.views = ViewCache(ds, 32, folder=tmp_path_factory.mktemp("views")).views  # two tiles an image
    group = np.array([f"p{i // 6}" for i in range(48)])
    return cache, TrainRows(np.arange(48), label, domain, group)


CONFIG = FitConfig(epochs=2, batch_size=16, image_size=32, log_every=1)


def make(method, seed=0, **kwargs):
    torch.manual_seed(seed)
    return method(method.create_model(ARCH, num_classes=2, num_domains=3), method.Options(**kwargs))


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
    other = fit(make(ERM), *data, replace(CONFIG, seed=1))
    assert not equal(state(once), state(other))


@pytest.mark.parametrize("method", [ERM, DANN, ScalePairs])
def test_a_run_cut_off_and_resumed_ends_as_one_left_alone(data, tmp_path, method, monkeypatch):
    monkeypatch.setattr(engine, "CHECKPOINT_SECONDS", 0)
    config = replace(CONFIG, epochs=3)
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


@pytest.mark.parametrize("seconds, wanted", [(0, [1, 2, 3, 4, 5]), (35, [2, 4, 5]), (1000, [5])])
def test_checkpoints_are_written_by_the_clock_and_at_the_end(data, tmp_path, monkeypatch, seconds, wanted):
    class Clock:
        now, perf_counter = 0.0, itertools.count(1.0).__next__
        monotonic = staticmethod(lambda: Clock.now)

    def on_epoch(epoch, model, log):
        Clock.now += 20

    monkeypatch.setattr(engine, "time", Clock)
    monkeypatch.setattr(engine, "CHECKPOINT_SECONDS", seconds)
    saved = []
    monkeypatch.setattr(engine, "_save_checkpoint", lambda *args: saved.append(args[-1]))
    fit(make(ERM), *data, replace(CONFIG, epochs=5), checkpoint=tmp_path / "c.pt", on_epoch=on_epoch)
    assert saved == wanted


def test_the_last_batch_is_as_large_as_the_others(data):
    """17 rows in batches of 16: no batch of one, on which BatchNorm would fail."""
    cache, rows = data
    seen = []

    class Counting(ERM):
        def forward(self, input, *args, **kwargs):
            seen.append(len(input))
            return super().forward(input, *args, **kwargs)

    rows = TrainRows(*(getattr(rows, name)[:17] for name in ("index", "target", "domain", "group")))
    fit(make(Counting), cache, rows, CONFIG)
    assert seen == [16] * 4
    logits, _ = predict(make(ERM).model, cache.views, rows.index, batch_size=16)
    assert logits.shape == (17, 2)


def test_bfloat16_is_close_to_single_precision(data, fresh_state):
    from accelerate import Accelerator

    cache, rows = data
    logs, logits = {}, {}
    for precision in ("no", "bf16"):
        fresh_state()
        losses = logs[precision] = []
        model = fit(
            make(DANN),
            *data,
            replace(CONFIG, epochs=4),
            accelerator=Accelerator(cpu=True, mixed_precision=precision),
            on_epoch=lambda e, m, log, losses=losses: losses.append(log["loss"]),
        )
        logits[precision], _ = predict(model, cache.views, rows.index)
        assert next(model.parameters()).dtype == torch.float32
    assert logs["bf16"] != logs["no"]  # it was another precision
    assert logs["bf16"] == pytest.approx(logs["no"], rel=0.02)
    assert np.abs(logits["bf16"] - logits["no"]).max() < 0.1 * np.abs(logits["no"]).max()


@pytest.fixture
def fresh_state():
    """Accelerate's state is the process's: an Accelerator takes the precision of the one before."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda: AcceleratorState._reset_state(reset_partial_state=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_trains_without_datasets_and_evaluate(tmp_path):
    """Engine, tasks, models, metrics and pixel cache import and run where neither is installed."""
    for i in range(8):
        PILImage.fromarray(np.full((40, 60, 3), 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
    code = f"""
import sys
sys.modules["datasets"] = sys.modules["evaluate"] = None  # an import of them fails
import numpy as np, torch
import magnification_invariant.metrics
from magnification_invariant.data.pixels import PixelCache, ViewCache
from magnification_invariant.engine import FitConfig, TrainRows, fit, predict
from magnification_invariant.tasks import TASKS, get_task
files = [r"{tmp_path}/%d.png" % i for i in range(8)]
table = {{"image": [*files[:4], *(open(f, "rb").read() for f in files[4:])], "mpp": [0.5] * 8}}
cache = PixelCache(table, 37, folder=r"{tmp_path}/cache")
assert cache.pixels[:, 0, 5, 5].tolist() == [20 * i for i in range(8)] and cache.mpp.tolist() == [0.5 * 40 / 37] * 8
i = np.arange(8)
rows = TrainRows(i, i % 2, i // 2 % 2, i // 4)
method = get_task("dann")
task = method(method.create_model("{ARCH}", num_classes=2, num_domains=2))
before = [p.clone() for p in task.model.parameters()]
model = fit(task, cache, rows, FitConfig(epochs=1, batch_size=4, image_size=32))
assert not any(torch.equal(a, b) for a, b in zip(before, task.model.parameters()))
views = ViewCache(table, 32, folder=r"{tmp_path}/views").views
assert np.isfinite(predict(model, views, i)[0]).all()
print("trained")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "trained", done.stderr[-3000:]


def test_learns_the_classes(data):
    cache, rows = data
    train = TrainRows(*(getattr(rows, name)[:36] for name in ("index", "target", "domain", "group")))
    config = FitConfig(epochs=12, batch_size=12, image_size=32, stain=0.0, learning_rate=3e-3, ema_decay=0.9)
    model = fit(make(DANN), cache, train, config)
    logits, _ = predict(model, cache.views, rows.index[36:])
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
    fit(task, *data, replace(CONFIG, epochs=1, weight_decay=0.0, ema_decay=0.0))
    assert moved == [0, 1, 1] * 3
    for name, value in task.model.named_parameters():
        assert torch.equal(value, before[name]) == (not name.startswith("fc."))


def test_predict_is_the_mean_over_tiles_in_the_order_asked_for(data):
    """Against timm's model on the tiles, normalised here; whatever the size of a batch, which tiles of images share."""
    cache, _ = data
    model = make(ERM).model.eval()
    rows = np.array([5, 3, 40, 3, 0])
    logits, embedding = predict(model, cache.views, rows, batch_size=3, embedding="penultimate")
    assert logits.shape == (5, 2) and logits.dtype == embedding.dtype == np.float32
    assert np.array_equal(logits[1], logits[3])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for row, tiles, own_logits, own_embedding in zip(rows, cache.views(rows), logits, embedding, strict=True):
        assert len(tiles) == 2, row
        with torch.inference_mode():
            wanted = embed(model, (torch.from_numpy(tiles) / 255 - mean) / std, "penultimate")
        for got, each in zip((own_logits, own_embedding), wanted, strict=True):
            assert np.allclose(got, each.mean(0), atol=1e-5)
    alone, nothing = predict(model, cache.views, rows)
    assert np.allclose(logits, alone, atol=1e-5) and nothing is None


def test_the_normalisation_of_a_model_is_used_to_train_it_and_to_predict(data):
    """A model that wants pixels in [-1, 1] is given the same pictures as one that wants ImageNet's normalisation."""
    seen = []

    class Seeing(ERM):
        def forward(self, input, *args, **kwargs):
            seen.append(input)
            return super().forward(input, *args, **kwargs)

    half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    inputs, models = [], []
    for changed in ({}, half):
        task = make(Seeing)
        task.model.pretrained_cfg = {**task.model.pretrained_cfg, **changed}
        seen.clear()
        models.append(fit(task, *data, replace(CONFIG, epochs=1)))
        mean, std = (torch.tensor(task.model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
        inputs.append(torch.cat(seen) * std + mean)
    assert torch.allclose(*inputs, atol=1e-6) and inputs[0].min() >= 0 and inputs[0].max() <= 1
    (tiles,) = data[0].views([7])
    with torch.inference_mode():
        wanted = models[1](torch.from_numpy(tiles) / 127.5 - 1).mean(0)
    assert np.allclose(predict(models[1], data[0].views, [7])[0][0], wanted, atol=1e-5)
    assert len(Network(models[1], None)(torch.from_numpy(tiles))) == 1


def test_batch_must_be_shared_equally(data):
    class Three:
        num_processes, process_index, device = 3, 0, torch.device("cpu")

    with pytest.raises(ValueError, match=r"16 images.*3 processes"):
        fit(make(ERM), *data, CONFIG, accelerator=Three())


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
    with pytest.raises(ValueError, match="domain head"):
        DANN(ERM.create_model(ARCH, num_classes=2, num_domains=3))


def test_compilation_makes_one_graph_for_every_coefficient(data, monkeypatch):
    from torch._dynamo.testing import CompileCounter

    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend=counter, fullgraph=True))
    logs = []
    config = replace(CONFIG, compile=True, zoom=2.0)
    compiled = fit(make(DANN), *data, config, on_epoch=lambda e, m, log: logs.append(log["coeff"]))
    assert counter.frame_count == 1 and logs[0] < logs[1]
    eager = fit(make(DANN), *data, replace(CONFIG, zoom=2.0))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(compiled.parameters(), eager.parameters(), strict=True))


@pytest.mark.slow
def test_every_fit_of_a_process_is_compiled(data, fresh_state, monkeypatch):
    """torch compiles a function a few times and then runs it as it is; a grid has more cells than that."""
    from accelerate import Accelerator
    from torch._dynamo.testing import CompileCounter

    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend=counter, fullgraph=True))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    config = replace(CONFIG, compile=True, epochs=1)
    for size in (32, 24):
        fit(make(ERM), *data, replace(config, image_size=size), accelerator=accelerator)
    assert counter.frame_count == 2
