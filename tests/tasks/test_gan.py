"""The DCGAN as a task of two players, and the methods that train on something else in a quarter of each batch."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD

from magnification_invariant import engine
from magnification_invariant.data.pixels import PixelCache
from magnification_invariant.engine import FitConfig, TrainRows, fit
from magnification_invariant.tasks import DCGAN, ERM, DegradedERM, MagGAN
from magnification_invariant.tasks.dcgan import Generator
from magnification_invariant.tasks.gan import FIT, examine

ARCH = "test_magdg_resnet"
COLOURS = np.array([[[230, 150, 190], [150, 60, 110]], [[90, 60, 160], [200, 210, 90]]])  # class x domain, RGB
CONFIG = FitConfig(epochs=1, image_size=16, stain=0.0, log_every=1, **FIT | {"batch_size": 8})
NAMES = ["benign", "malignant"], ["40X", "100X"]


def normalised(x):
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def make_data(images):
    cache = PixelCache.__new__(PixelCache)
    cache.pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    cache.height, cache.width = cache.pixels.shape[2:]
    i = np.arange(len(images))
    return cache, TrainRows(i, i % 2, i // 2 % 2, np.array([f"p{k // 4}" for k in i]))


@pytest.fixture
def data():
    """24 images, each of one colour, which tells the class and the domain, and a little noise."""
    i, rng = np.arange(24), np.random.default_rng(0)
    colours = COLOURS[i % 2, i // 2 % 2] + rng.normal(0, 6, (24, 3))
    return make_data((colours[:, None, None] + rng.normal(0, 4, (24, 18, 27, 3))).clip(0, 255).astype(np.uint8))


def viewer(cache):
    def view(index, size):
        return cache.pixels[torch.from_numpy(index), :, :size, :size] / 255, np.full(len(index), 0.5)

    return view


def make_gan(**kwargs):
    torch.manual_seed(0)
    return DCGAN(2, 2, size=16, width=4, **kwargs)


def make(method, **kwargs):
    torch.manual_seed(0)
    return method(method.create_model(ARCH, num_classes=2, num_domains=3), method.Options(**kwargs))


def copies(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_each_player_moves_only_itself_by_adams_steps(data):
    seen = []

    class Watched(DCGAN):
        def forward(self, input, target, domain, progress, player=0):
            seen.append((player, copies(self.model), copies(self.discriminator)))
            return super().forward(input, target, domain, progress, player)

    torch.manual_seed(0)
    gan = Watched(2, 2, size=16, width=4)
    fit(gan, *data, CONFIG)
    seen.append((None, copies(gan.model), copies(gan.discriminator)))
    assert [player for player, *_ in seen] == [0, 1] * 3 + [None]
    for (player, *before), (_, *after) in pairwise(seen):
        moved, still = (1, 0) if player == 0 else (0, 1)
        assert equal(before[still], after[still])
        assert not any(torch.equal(before[moved][name], after[moved][name]) for name in before[moved])
    # Adam's first step is the learning rate, whatever the gradient's size; weight decay would add to it.
    for which, turn in ((2, 0), (1, 1)):
        step = torch.cat([(seen[turn + 1][which][k] - v).abs().flatten() for k, v in seen[turn][which].items()])
        assert step.max() <= 2e-4 * (1 + 1e-3) and step.median() == pytest.approx(2e-4, rel=1e-2)
    assert [player.options["betas"] for player in gan.players] == [(0.5, 0.999)] * 2


def test_losses_are_goodfellows(data):
    gan = make_gan()
    target, domain = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1])
    input = normalised(torch.rand(4, 3, 16, 16))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))

    def discriminate(x):
        return gan.discriminator(x, target, domain)

    for player, name in enumerate(("discriminator_loss", "generator_loss")):
        torch.manual_seed(1)
        out = gan(input, target, domain, torch.tensor(0.0), player=player)
        torch.manual_seed(1)
        fake = discriminate(gan.model.sample(target, domain))
        if player == 0:
            real = discriminate((input * std + mean) * 2 - 1)
            wanted = F.binary_cross_entropy_with_logits(real, torch.ones(4))
            wanted = wanted + F.binary_cross_entropy_with_logits(fake, torch.zeros(4))
        else:
            wanted = F.binary_cross_entropy_with_logits(fake, torch.ones(4))
        assert out["loss"].item() == pytest.approx(wanted.item(), rel=1e-5) == out[name].item()


@pytest.mark.slow
def test_learns_which_colour_belongs_to_which_class_and_domain(data):
    torch.manual_seed(0)
    gan = DCGAN(2, 2, size=8, width=16)
    generator = fit(gan, *data, replace(CONFIG, epochs=200, batch_size=24, image_size=8))
    for c in (0, 1):
        for d in (0, 1):
            with torch.no_grad():
                images = generator.sample(torch.full((16,), c), torch.full((16,), d))
            colour = ((images + 1) / 2 * 255).mean((0, 2, 3)).numpy()
            distance = np.linalg.norm(COLOURS - colour, axis=2)
            assert np.unravel_index(distance.argmin(), (2, 2)) == (c, d), (c, d, colour)


def test_sees_its_training_rows_and_nothing_else(data):
    cache, rows = data
    rows = TrainRows(*(getattr(rows, name)[:12] for name in ("index", "target", "domain", "group")))
    once = fit(make_gan(), cache, rows, CONFIG).state_dict()
    cache.pixels[12:] = torch.randint(0, 256, (12, 3, 18, 27), dtype=torch.uint8)
    assert equal(once, fit(make_gan(), cache, rows, CONFIG).state_dict())
    cache.pixels[11] = 255 - cache.pixels[11]
    assert not equal(once, fit(make_gan(), cache, rows, CONFIG).state_dict())


class Spy:
    def __init__(self, module):
        self.seen = []
        module.register_forward_pre_hook(lambda module, args: self.seen.append(args))


@pytest.mark.parametrize("size, mean, std", [(16, MEAN, STD), (24, (0.5,) * 3, (0.25,) * 3)])
def test_a_quarter_of_the_batch_is_generated_with_its_class_and_domain(size, mean, std):
    network = MagGAN.create_model(ARCH, num_classes=2, num_domains=3)
    network.pretrained_cfg = network.pretrained_cfg | {"mean": mean, "std": std}
    task = MagGAN(network)
    task.generator = make_gan().model.requires_grad_(False)
    task.train()
    generator, model = Spy(task.generator), Spy(task.model)
    input = torch.randn(12, 3, size, size)
    target, domain = torch.arange(12) % 2, torch.arange(12) // 2 % 2
    before = {name: value.clone() for name, value in task.generator.state_dict().items()}
    task(input, target, domain, torch.tensor(0.0))["loss"].backward()

    ((noise, *condition),) = generator.seen
    assert torch.equal(condition[0], target[:3]) and torch.equal(condition[1], domain[:3])
    ((images,),) = model.seen
    assert torch.equal(images[3:], input[3:])
    generated = (task.generator(noise, *condition) + 1) / 2
    generated = F.interpolate(generated, (size, size), mode="bilinear", antialias=True)
    shift, scale = (torch.tensor(value).view(3, 1, 1) for value in (mean, std))
    assert torch.allclose(images[:3], (generated - shift) / scale, atol=1e-5)
    # In eval mode while the model trains, and frozen.
    assert task.model.training and not task.generator.training
    assert all(torch.equal(before[k], v) for k, v in task.generator.state_dict().items())
    assert all(p.grad is None for p in task.generator.parameters())
    assert {id(p) for player in task.players for group in player.parameters for p in group} == {
        id(p) for p in task.model.parameters()
    }


def test_the_control_sees_the_same_share_at_the_generators_resolution():
    task = make(DegradedERM)
    model = Spy(task.model)
    input, target = torch.randn(8, 3, 96, 96), torch.arange(8) % 2
    task(input, target, target, torch.tensor(0.0))
    ((images,),) = model.seen
    small = F.interpolate(input[:2], size=(64, 64), mode="bilinear", antialias=True)
    assert torch.equal(images[:2], F.interpolate(small, size=(96, 96), mode="bilinear", antialias=True))
    assert torch.equal(images[2:], input[2:])
    # Where the generator's resolution is the network's, it is ERM.
    input, losses = torch.randn(8, 3, 64, 64), []
    for method in (ERM, DegradedERM):
        losses.append(make(method)(input, target, target, torch.tensor(0.0))["loss"])
    assert torch.equal(*losses)


def test_without_a_generator_it_says_so():
    with pytest.raises(RuntimeError, match=r"call its prepare\(\)"):
        make(MagGAN)(torch.randn(4, 3, 16, 16), torch.zeros(4).long(), torch.zeros(4).long(), torch.tensor(0.0))


class Replayed(Generator):
    """Gives out images, (n, 3, 16, 16) in [0, 1] for every class and domain, instead of making them."""

    def __init__(self, images):
        super().__init__(2, 2, size=16, width=1)
        self.images = images

    def forward(self, noise, target, domain):
        return self.images[int(target[0]), int(domain[0])] * 2 - 1


def test_the_collapse_check_tells_real_images_from_one_image_and_from_noise():
    rng = np.random.default_rng(0)
    colours = COLOURS[np.arange(160) % 2, np.arange(160) // 2 % 2][:, None, None] + rng.normal(0, 25, (160, 1, 1, 3))
    cache, rows = make_data((colours + rng.normal(0, 30, (160, 16, 16, 3))).clip(0, 255).astype(np.uint8))

    def real(c, d, other=0):  # the patches that are not among the 20 looked at
        chosen = rows.index[(rows.target == c) & (rows.domain == d)][20:]
        return cache.pixels[torch.from_numpy(chosen)] / 255 + other

    def check(images):
        images = {(c, d): images(c, d) for c in (0, 1) for d in (0, 1)}
        first = TrainRows(*(getattr(rows, name)[:80] for name in ("index", "target", "domain", "group")))
        record, picture = examine(Replayed(images).eval(), first, viewer(cache), *NAMES, n=20)
        pixels = np.asarray(picture) / 255.0
        for row, (d, c) in enumerate(np.ndindex(2, 2)):  # 16 px and a gap of 2; the first eight columns are real
            real_patch, fake_patch = (pixels[18 * row + 2 :][:16, x : x + 16] for x in (2, 18 * 8 + 2))
            first_of = cache.pixels[int(first.index[(first.target == c) & (first.domain == d)][0])] / 255
            assert np.allclose(real_patch, first_of.permute(1, 2, 0), atol=0.01)
            assert np.allclose(fake_patch, images[c, d][0].clamp(0, 1).permute(1, 2, 0), atol=0.01)
        assert list(record["mpp"].values()) == [0.5, 0.5]
        assert [*record["diversity"]] == [f"{c} {d}" for d in NAMES[1] for c in NAMES[0]]
        return record

    healthy = check(real)
    assert not healthy["collapsed"]
    assert all(0.75 < value < 1.3 for value in healthy["diversity"].values())
    constant = check(lambda c, d: real(c, d)[:1].expand(20, -1, -1, -1))
    assert constant["collapsed"] and max(constant["diversity"].values()) < 1e-3
    one_class = check(lambda c, d: real(c, d)[: 1 if c else 20].expand(20, -1, -1, -1))
    assert one_class["collapsed"] and max(one_class["diversity"].values()) > 0.75
    assert check(lambda c, d: torch.rand(20, 3, 16, 16))["collapsed"]
    off = check(lambda c, d: real(c, d, 0.5))
    assert off["collapsed"] and min(off["diversity"].values()) > 0.75 and min(off["colour_shift"].values()) > 1


def prepare(task, data, config=CONFIG, **kwargs):
    """As a cell does; what the DCGAN's epochs logged."""
    cache, rows = data
    logs = []

    def fit_first(other, **changes):
        return fit(
            other, cache, rows, replace(config, **changes), on_epoch=lambda e, m, log: logs.append(log), **kwargs
        )

    return *task.prepare(rows, fit_first, viewer(cache), *NAMES), logs


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(MagGAN, "size", 16)
    monkeypatch.setattr(MagGAN, "width", 4)


def test_prepare_trains_a_generator_and_records_it(data, tmp_path, tiny, monkeypatch):
    """At DCGAN's settings whatever the run's are; cut off after an epoch it ends as one left alone."""
    task = make(MagGAN, gan_epochs=3)
    record, pictures, logs = prepare(task, data, replace(CONFIG, ema_decay=0.9, batch_size=8))
    assert record["gan"]["steps"] == 3 and record["gan"]["images"] == 3 * 128  # 24 rows fill one batch
    assert record["gan"]["collapsed"] is True  # after three steps
    assert record["gan"]["mpp"] == {"40X": 0.5, "100X": 0.5} and len(record["gan"]["diversity"]) == 4
    assert list(pictures) == ["gan_samples.png"] and len(logs) == 3
    assert {"generator_loss", "discriminator_loss"} <= logs[0].keys()

    monkeypatch.setattr(engine, "CHECKPOINT_SECONDS", 0)
    save = engine._save_checkpoint

    def cut(path, *args):
        save(path, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_save_checkpoint", cut)
    with pytest.raises(KeyboardInterrupt):
        prepare(make(MagGAN, gan_epochs=3), data, checkpoint=tmp_path / "prepare.pt")
    monkeypatch.setattr(engine, "_save_checkpoint", save)
    resumed = make(MagGAN, gan_epochs=3)
    again, _, rest = prepare(resumed, data, checkpoint=tmp_path / "prepare.pt")
    assert again == record and len(rest) == 2
    assert equal(copies(task.generator), copies(resumed.generator))


# --------------------------------------------------------------------------------------------------- two processes


def prepare_and_train(data, path):
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    MagGAN.size, MagGAN.width = 16, 4
    task = make(MagGAN, gan_epochs=2)
    _, _, logs = prepare(task, data, accelerator=accelerator, checkpoint=path / "p.pt")
    state = {"generator": copies(task.generator), "losses": [log["generator_loss"] for log in logs]}
    state["noise"] = torch.rand(1).item()
    state["model"] = copies(fit(task, *data, replace(CONFIG, image_size=32), accelerator=accelerator))
    torch.save(state, path / f"{accelerator.process_index}.pt")


@pytest.fixture
def fresh_state():
    """An Accelerator made before would be inherited by the processes, and be one process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_two_processes_train_one_gan_and_one_model(data, tmp_path, fresh_state):
    debug_launcher(prepare_and_train, (data, tmp_path), num_processes=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert equal(one["generator"], two["generator"]) and equal(one["model"], two["model"])
    assert one["losses"] == two["losses"] and len(one["losses"]) == 2
    assert one["noise"] != two["noise"]  # each draws its own
    torch.manual_seed(0)
    make(MagGAN)
    fresh = copies(DCGAN(2, 2, size=16, width=4).model)
    assert not any(torch.equal(fresh[name], one["generator"][name]) for name in fresh)
