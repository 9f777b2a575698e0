"""A domain head on the pooled features of any timm classifier, and the one forward pass that runs it."""

import torch
from timm.layers import get_device_dtype
from torch import Tensor, nn

from magnification_invariant.models.grad_reverse import grad_reverse

PREFIX = "domain_head."  # of the names of its weights, which no released file holds


def linear_classifier(model: nn.Module) -> nn.Linear:
    """The one linear map with which a timm classifier ends; its `in_features` is the width of `pooled_features`.

    Raises:
        ValueError: The model has none: no class head, several heads, a convolution, or no pooling before it.
    """
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    pool = getattr(model, "global_pool", None)
    if not isinstance(classifier, nn.Linear) or getattr(pool, "pool_type", pool) == "":
        raise ValueError(
            f"{type(model).__name__} does not end with pooled features and one linear classifier: choose another "
            "architecture, or create it with num_classes > 0 and a global_pool"
        )
    return classifier


def add_domain_head(model: nn.Module, num_domains: int) -> nn.Module:
    """Gives a timm classifier a head that guesses the domain from the pooled features, as `model.domain_head`.

    A perceptron width -> 256 -> `num_domains` with ReLU. It draws its initial weights from a stream of its own, so
    backbone, classifier and everything drawn later are bit for bit what they are without it. `model(x)` does not run
    it, `forward_domains` does. State dicts load with and without it from then on.

    Args:
        model: Any timm classifier that ends with pooled features and a linear map; changed in place.
        num_domains: Domains to tell apart, at least 2.

    Returns:
        The model.

    Raises:
        ValueError: If there are fewer than two domains, or the model has no pooled features (`linear_classifier`), or
            nothing that is trained before them.

    Source: Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 17 (2016).
    """
    if num_domains < 2:
        raise ValueError(
            f"A domain head needs at least two training domains to tell apart, not {num_domains}: with fewer, train by "
            "supervision alone (the method erm)"
        )
    classifier = linear_classifier(model)
    if len(list(model.parameters())) == len(list(classifier.parameters())):
        raise ValueError(
            f"nothing of this {type(model).__name__} lies before its classifier, so a reversed gradient would change "
            "nothing: take a model with a hidden layer, or train by supervision alone (the method erm)"
        )
    width = classifier.in_features
    # The seed is drawn inside the fork: deterministic, another one for every model, and the draw is undone with the
    # rest. On the CPU, so that the weights are the same on every device.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), device="cpu")))
        head = nn.Sequential(nn.Linear(width, 256, device="cpu"), nn.ReLU(), nn.Linear(256, num_domains, device="cpu"))
    model.domain_head = head.to(**get_device_dtype(model)).train(model.training)
    model.register_load_state_dict_pre_hook(match_domain_head)
    return model


def pooled_features(model: nn.Module, x: Tensor) -> Tensor:
    """What the classifier of a timm model reads (B, width) of normalised images (B, in_chans, H, W)."""
    return model.forward_head(model.forward_features(x), pre_logits=True)


def forward_heads(
    model: nn.Module, pooled: Tensor, coeff: Tensor, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Both heads on pooled features, the domain head behind a gradient reversal.

    To be minimised is the sum of both losses: each head learns its own, and what made the features receives the
    class loss's gradient minus `coeff` times the domain loss's.

    Args:
        model: With a domain head, see `add_domain_head`.
        pooled: `pooled_features` (B, width).
        coeff: 0-d tensor; below 0 the features help the domain head, at 0 the head still learns.
        shift: (B, width), added to what the domain head reads; its gradient is not reversed.

    Returns:
        Class logits (B, num_classes) and domain logits (B, num_domains).
    """
    reverse = grad_reverse(pooled, coeff)
    return model.get_classifier()(pooled), model.domain_head(reverse if shift is None else reverse + shift)


def forward_domains(model: nn.Module, x: Tensor, coeff: Tensor) -> tuple[Tensor, Tensor]:
    """`forward_heads` of images (B, in_chans, H, W); the class logits are those of `model(x)`, bit for bit."""
    return forward_heads(model, pooled_features(model, x), coeff)


def match_domain_head(model: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Load pre-hook: drops the domain head that the model lacks, adds the one that the file lacks. Never raises."""
    own = model.domain_head.state_dict(prefix=prefix + PREFIX) if hasattr(model, "domain_head") else {}
    given = [key for key in state_dict if key.startswith(prefix + PREFIX)]
    if not own:
        for key in given:
            del state_dict[key]
    elif not given:
        state_dict.update(own)
