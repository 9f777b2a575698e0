"""Training with generated patches: a DCGAN as a task of two players, the method that uses it, and its control."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from magnification_invariant.models import normalisation
from magnification_invariant.tasks.dcgan import NOISE, Discriminator, Generator
from magnification_invariant.tasks.erm import ERM
from magnification_invariant.tasks.options import option
from magnification_invariant.tasks.task import Player, Task, register

# Radford et al. 2016, section 4: Adam with these settings at a constant rate, mini-batches of 128.
ADAM = {"lr": 2e-4, "betas": (0.5, 0.999), "weight_decay": 0.0}
FIT = {"batch_size": 128, "schedule": "constant", "warmup": 0.0, "clip_norm": 0.0, "ema_decay": 0.0}

# See `examine`. k equally likely patches have a diversity of 1 - 1/k. On virtual slides at 64 px, real patches of other
# patients reach 0.9 to 1.05 at a colour shift under 0.25; a generator deaf to its noise 0.2 to 0.5, pixel noise 0.4.
MIN_DIVERSITY = 0.5
MAX_COLOUR_SHIFT = 1.0


class DCGAN(Task):
    """Generator against discriminator (Goodfellow et al. 2014, the non-saturating loss), with DCGAN's Adam settings.

    `model` is the generator. A batch is one turn of the discriminator and one of the generator; real and generated
    images pass the discriminator apart, so that its batch norm sees one kind at a time.
    The arguments are those of `dcgan.Generator`; `engine.fit` must feed it images of `size` pixels.
    """

    def __init__(self, num_classes: int, num_domains: int, *, size: int = 64, width: int = 64):
        super().__init__(Generator(num_classes, num_domains, size=size, width=width))
        self.discriminator = Discriminator(num_classes, num_domains, size=size, width=width)
        self.signed = _Signed(self.model)

    @property
    def players(self):
        return [
            Player("discriminator", [list(self.discriminator.parameters())], options=ADAM),
            Player("generator", [list(self.model.parameters())], options=ADAM),
        ]

    def forward(self, input, target, domain, progress, player=0):
        if player == 0:
            with torch.no_grad():
                generated = self.model.sample(target, domain)
            real = self.discriminator(self.signed(input), target, domain)
            fake = self.discriminator(generated, target, domain)
            # -log D(x) - log(1 - D(G(z)))
            name, loss = "discriminator_loss", F.softplus(-real).mean() + F.softplus(fake).mean()
        else:
            generated = self.model.sample(target, domain)
            # -log D(G(z)): Goodfellow's non-saturating form
            name, loss = "generator_loss", F.softplus(-self.discriminator(generated, target, domain)).mean()
        return {"loss": loss, "output": generated, name: loss.detach()}


class _Signed(nn.Module):
    """Images as `engine` normalises them for a model to [-1, 1], where tanh ends, and back."""

    def __init__(self, model: nn.Module):
        super().__init__()
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in normalisation(model))
        self.register_buffer("scale", 2 * std, persistent=False)
        self.register_buffer("shift", 2 * mean - 1, persistent=False)

    def forward(self, normalised: Tensor) -> Tensor:
        return normalised * self.scale + self.shift

    def inverse(self, signed: Tensor) -> Tensor:
        return (signed - self.shift) / self.scale


@register("degraded")
class DegradedERM(ERM):
    """The control of `MagGAN`: ERM with a part of every batch reduced to the generator's resolution and enlarged again.

    What it gains or loses against ERM is owed to the missing detail, not to the generator. At inputs of `size` pixels
    nothing is missing and it is ERM. Batches are in random order with the domains in turn, so the first `fraction` of
    one is a random, balanced choice.
    """

    fraction = 0.25
    size = 64  # pixels, of what stands in
    of_pixels = True

    def replacement(self, input: Tensor, target: Tensor, domain: Tensor) -> Tensor:
        """What stands in for `input`, of the same classes, domains and shape, normalised."""
        return _resize(_resize(input, self.size), input.shape[-1])

    def forward(self, input, target, domain, progress, player=0):
        k = round(self.fraction * len(input))
        if k:
            with torch.no_grad():
                other = self.replacement(input[:k], target[:k], domain[:k])
            input = torch.cat([other, input[k:]])
        return super().forward(input, target, domain, progress, player)


@register("gan")
class MagGAN(DegradedERM):
    """ERM with part of every batch generated, by a DCGAN that has seen the same training rows and nothing else."""

    @dataclass(frozen=True)
    class Options(ERM.Options):
        gan_epochs: int = option(200, "passes of the DCGAN over the training rows", bounds=(1, 1e6))

    arch = "maggan_resnet18"
    width = 64

    def __init__(self, model, options=None):
        super().__init__(model, options)
        self.generator: Generator | None = None
        self.signed = _Signed(model)

    def prepare(self, rows, fit, view, class_names, domain_names):
        gan = DCGAN(len(class_names), len(domain_names), size=self.size, width=self.width)
        epochs = self.options.gan_epochs
        self.generator = fit(gan, epochs=epochs, image_size=self.size, **FIT).requires_grad_(False)
        record, samples = examine(self.generator, rows, view, class_names, domain_names)
        steps = epochs * -(-len(rows) // FIT["batch_size"])
        record |= {"steps": steps, "images": steps * FIT["batch_size"]}
        return {"gan": record}, {"gan_samples.png": samples}

    def train(self, mode: bool = True):
        super().train(mode)
        if self.generator is not None:
            self.generator.eval()
        return self

    def replacement(self, input, target, domain):
        if self.generator is None:
            raise RuntimeError("MagGAN has no generator yet: call its prepare() before training, or set .generator")
        return self.signed.inverse(_resize(self.generator.sample(target, domain), input.shape[-1]))


def _resize(x: Tensor, size: int) -> Tensor:
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)


@torch.no_grad()
def examine(
    generator: Generator,
    rows,
    view: Callable[[np.ndarray, int], tuple[Tensor, np.ndarray]],
    class_names: list[str],
    domain_names: list[str],
    n: int = 64,
) -> tuple[dict, Image.Image]:
    """Whether a generator has collapsed, and a picture of real beside generated patches.

    For every class and domain, at most `n` real patches and `n` generated ones are compared:

    - *diversity*: mean pairwise distance over that of the real ones; near 0 where every patch is the same. Distances
      are Euclidean, between patches averaged to 8 x 8 pixels, so that pixel noise does not pass for variety.
    - *colour shift*: distance of their mean colour from the real ones', in standard deviations of the real pixels
      (root mean square over the channels); large where the generator has diverged.

    It has collapsed if, in any class and domain, the diversity is under `MIN_DIVERSITY` or the colour shift over
    `MAX_COLOUR_SHIFT`. A class and domain of one image has no diversity; where none has, the check is not passed.

    Args:
        generator: In eval mode.
        rows, view, class_names, domain_names: See `Task.prepare`.
        n: Most patches of a kind.

    Returns:
        ``collapsed``, ``diversity`` and ``colour_shift`` by class and domain, ``mpp`` (um/px) of the generated patches
        by domain, before zoom; and the picture, a row for each key of ``colour_shift``: eight real, eight generated.
    """
    device = next(generator.parameters()).device
    # The same noise for every class, and for a run taken up again.
    noise = (torch.rand(n, NOISE, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(device)
    diversity, colour_shift, mpp, samples = {}, {}, {}, []
    for (d, domain_name), (c, class_name) in product(enumerate(domain_names), enumerate(class_names)):
        index = rows.index[(rows.target == c) & (rows.domain == d)]
        if not len(index):
            continue
        name = f"{class_name} {domain_name}"
        real, scale = view(_spread(index, min(n, len(index))), generator.size)  # tables are sorted by patient
        fake = (generator(noise, *(torch.full((n,), value, device=device) for value in (c, d))) + 1) / 2
        mpp[domain_name] = float(np.median(scale))
        if len(index) > 1:
            diversity[name] = _mean_distance(fake) / max(_mean_distance(real), 1e-6)
        shift = (fake.mean((0, 2, 3)) - real.mean((0, 2, 3))) / real.std((0, 2, 3)).clamp(min=1e-6)
        colour_shift[name] = float(shift.square().mean().sqrt())
        samples += [_spread(images.cpu(), 8) for images in (real, fake)]
    collapsed = min(diversity.values(), default=0.0) < MIN_DIVERSITY or max(colour_shift.values()) > MAX_COLOUR_SHIFT
    record = {"collapsed": collapsed, "diversity": diversity, "colour_shift": colour_shift, "mpp": mpp}
    return record, to_pil_image(make_grid(torch.cat(samples).clamp(0, 1), nrow=16, pad_value=1))


def _spread(items, n: int):
    """`n` of an array's or tensor's items, evenly spread over it; some several times where there are fewer."""
    return items[np.linspace(0, len(items) - 1, n).astype(int)]


def _mean_distance(images: Tensor) -> float:
    return float(torch.pdist(F.adaptive_avg_pool2d(images.float(), 8).flatten(1)).mean())
