"""DCGAN (Radford et al., "Unsupervised Representation Learning with DCGANs", ICLR 2016), told the class and domain.

As published: strided and transposed convolutions of 4 x 4 instead of pooling, batch norm everywhere but in the
generator's output and the discriminator's input layer, ReLU and tanh in the generator, LeakyReLU(0.2) in the
discriminator, weights from N(0, 0.02), uniform noise of 100 dimensions. Images are RGB in [-1, 1].
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

NOISE = 100
_EMBEDDING = 16
# Initial standard deviation of the generator's embedding, chosen on virtual slides at 32 px: at 1 all patches of a
# class and domain become one; at 0.02, as all other weights, the condition matters late.
_EMBEDDING_STD = 0.3


class _ClassDomainEmbedding(nn.Embedding):
    """A vector for every pair of class and domain."""

    def __init__(self, num_classes: int, num_domains: int, width: int) -> None:
        super().__init__(num_classes * num_domains, width)
        self.num_domains = num_domains

    def forward(self, target: Tensor, domain: Tensor) -> Tensor:
        return super().forward(target * self.num_domains + domain)


class Generator(nn.Module):
    """Noise, class and domain to an image; the embedding of (class, domain) is concatenated to the noise.

    Args:
        num_classes: Classes.
        num_domains: Domains, such as magnifications.
        size: Side of the square image in pixels, a power of two from 8 (else ValueError); a doubling is one more block.
        width: Channels before the output layer, doubled in every block before.
    """

    def __init__(self, num_classes: int, num_domains: int, *, size: int = 64, width: int = 64) -> None:
        super().__init__()
        channels = _channels(size, width)[::-1]
        self.size = size
        self.condition = _ClassDomainEmbedding(num_classes, num_domains, _EMBEDDING)
        layers: list[nn.Module] = [nn.ConvTranspose2d(NOISE + _EMBEDDING, channels[0], 4, bias=False)]
        for before, after in pairwise(channels):
            layers += [nn.BatchNorm2d(before), nn.ReLU(), nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        self.layers.apply(_initialise)
        nn.init.normal_(self.condition.weight, 0.0, _EMBEDDING_STD)

    def forward(self, noise: Tensor, target: Tensor, domain: Tensor) -> Tensor:
        """Images (b, 3, size, size) in [-1, 1] from noise (b, `NOISE`) in [-1, 1], classes (b,) and domains (b,)."""
        x = torch.cat([noise, self.condition(target, domain)], 1)
        return self.layers(x[:, :, None, None]).float()

    def sample(self, target: Tensor, domain: Tensor) -> Tensor:
        """An image for every class and domain, with noise from torch's own random stream."""
        noise = torch.rand(len(target), NOISE, device=target.device) * 2 - 1
        return self(noise, target, domain)


class Discriminator(nn.Module):
    """An image, its class and domain to the logit of its being real.

    The condition enters by projection (Miyato & Koyama, "cGANs with Projection Discriminator", ICLR 2018): the output
    layer is linear in the last features, and every (class, domain) has weights of its own that are added to the
    common ones. It follows from the form of the log density ratio and leaves all published layers as they are.

    Args:
        num_classes: Classes.
        num_domains: Domains.
        size: Side of the square image in pixels, as the generator's.
        width: Channels behind the input layer, doubled in every further block.
    """

    def __init__(self, num_classes: int, num_domains: int, *, size: int = 64, width: int = 64) -> None:
        super().__init__()
        channels = _channels(size, width)
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers)
        self.score = nn.Conv2d(channels[-1], 1, 4)
        self.condition = _ClassDomainEmbedding(num_classes, num_domains, channels[-1] * 16)
        self.apply(_initialise)

    def forward(self, image: Tensor, target: Tensor, domain: Tensor) -> Tensor:
        """Logits (b,) of images (b, 3, size, size) in [-1, 1] with classes (b,) and domains (b,)."""
        x = self.layers(image)
        return self.score(x).flatten() + (x.flatten(1) * self.condition(target, domain)).sum(1)


def _channels(size: int, width: int) -> list[int]:
    """Channels of the feature maps of sides size / 2, size / 4, ..., 4."""
    if size < 8 or size & (size - 1):
        raise ValueError(f"a DCGAN's image size is a power of two from 8, got {size}: choose 64 or 128")
    return [width * 2**i for i in range(size.bit_length() - 3)]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)
