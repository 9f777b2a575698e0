"""The networks are those of Radford et al. (2016), and they hear the class and the domain."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from magnification_invariant.tasks.dcgan import NOISE, Discriminator, Generator

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def convolutions(network):
    return [module for module in network.modules() if isinstance(module, CONVOLUTIONS)]


@pytest.mark.parametrize("size, channels", [(64, [512, 256, 128, 64]), (128, [1024, 512, 256, 128, 64])])
def test_strided_convolutions_and_nothing_else_change_the_size(size, channels):
    with torch.device("meta"):
        generator, discriminator = Generator(2, 3, size=size), Discriminator(2, 3, size=size)
    up, down = convolutions(generator), convolutions(discriminator)
    assert [c.out_channels for c in up] == [*channels, 3]
    assert [c.out_channels for c in down] == [*channels[::-1], 1]
    assert all(type(c) is nn.ConvTranspose2d and c.kernel_size == (4, 4) for c in up)
    assert all(type(c) is nn.Conv2d and c.kernel_size == (4, 4) for c in down)
    assert [c.stride[0] for c in up] == [1] + [2] * len(channels)
    assert [c.stride[0] for c in down] == [2] * len(channels) + [1]
    kinds = {type(m) for network in (generator, discriminator) for m in network.modules()}
    assert not kinds & {nn.MaxPool2d, nn.AvgPool2d, nn.Upsample, nn.Linear}


def test_norms_activations_and_biases_are_where_they_were_published():
    generator, discriminator = list(Generator(2, 3, width=4).layers), list(Discriminator(2, 3, width=4).layers)
    assert [type(m).__name__ for m in generator] == ["ConvTranspose2d", "BatchNorm2d", "ReLU"] * 4 + [
        "ConvTranspose2d",
        "Tanh",
    ]
    assert [type(m).__name__ for m in discriminator] == ["Conv2d", "LeakyReLU"] + [
        "Conv2d",
        "BatchNorm2d",
        "LeakyReLU",
    ] * 3
    assert {m.negative_slope for m in discriminator if isinstance(m, nn.LeakyReLU)} == {0.2}
    for layers in (generator, discriminator):
        for layer, following in pairwise(layers):
            if isinstance(layer, CONVOLUTIONS):
                assert (layer.bias is None) == isinstance(following, nn.BatchNorm2d)


def test_initial_weights():
    torch.manual_seed(0)
    generator, discriminator = Generator(2, 3, width=16), Discriminator(2, 3, width=16)
    weights = [c.weight for network in (generator, discriminator) for c in convolutions(network)]
    for weight in [*weights, discriminator.condition.weight]:
        if weight.numel() > 2000:
            assert weight.std().item() == pytest.approx(0.02, rel=0.06) and abs(weight.mean()) < 0.001
    norms = [m for network in (generator, discriminator) for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    scale = torch.cat([m.weight for m in norms])
    assert scale.std().item() == pytest.approx(0.02, rel=0.2) and abs(scale.mean() - 1) < 0.005
    for module in [*norms, *convolutions(generator), *convolutions(discriminator)]:
        assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize("size", [16, 64])
def test_images_in_and_out(size):
    torch.manual_seed(0)
    generator, discriminator = Generator(2, 3, size=size, width=4), Discriminator(2, 3, size=size, width=4)
    target, domain = torch.tensor([0, 1, 1]), torch.tensor([0, 2, 1])
    with torch.no_grad():
        generator.layers[-2].weight.mul_(1000)  # loud enough to saturate tanh
    images = generator.sample(target, domain)
    assert images.shape == (3, 3, size, size) and images.abs().max() <= 1 and images.min() < -0.99
    assert discriminator(images, target, domain).shape == (3,)


@pytest.mark.parametrize("size", [4, 48, 100])
def test_a_size_that_halving_does_not_reach_is_refused(size):
    for network in (Generator, Discriminator):
        with pytest.raises(ValueError, match=f"got {size}: choose 64 or 128"):
            network(2, 3, size=size)


def test_every_class_and_domain_has_its_own_images_and_its_own_score():
    torch.manual_seed(0)
    generator, discriminator = (n(2, 3, size=16, width=4).eval() for n in (Generator, Discriminator))
    target, domain = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2])
    noise = (torch.rand(1, NOISE) * 2 - 1).expand(6, -1)
    images = generator(noise, target, domain)
    assert len({tuple(image.flatten().tolist()) for image in images}) == 6
    assert len(set(discriminator(images[:1].expand(6, -1, -1, -1), target, domain).tolist())) == 6


def test_the_projection_is_a_second_output_layer():
    """Adding a class's and domain's own weights to the common output layer says the same."""
    torch.manual_seed(0)
    own = Discriminator(2, 2, size=16, width=4).eval()
    x, (c, d) = torch.rand(5, 3, 16, 16), (torch.full((5,), 1), torch.full((5,), 0))
    wanted = own(x, c, d)
    with torch.no_grad():
        own.score.weight += own.condition.weight[1 * 2 + 0].view_as(own.score.weight)
        own.condition.weight.zero_()
    assert torch.allclose(own(x, c, d), wanted, atol=1e-6)
