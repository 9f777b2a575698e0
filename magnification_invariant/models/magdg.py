"""Our names and weights, registered with timm.

`import magnification_invariant` (timm has no plug-in discovery), then `timm.create_model('magdg_resnet18')`. Each is
timm's own ResNet; with `num_domains=K` it is one with a domain head, see `add_domain_head`.
"""

import dataclasses
import logging
import os
from pathlib import Path

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from magnification_invariant.files import read_json
from magnification_invariant.hub_files import resolve
from magnification_invariant.models.domain_head import PREFIX, add_domain_head, match_domain_head, pooled_features
from magnification_invariant.models.vectors import VECTOR_MODELS

_logger = logging.getLogger(__name__)

HUB_NAMESPACE = os.environ.get("MAGDG_HUB_NAMESPACE") or "magnification-invariant"
"""Who publishes the weights on the Hub: `arch.tag` is fetched from `HUB_NAMESPACE/arch.tag`."""

PACKAGED = Path(__file__).parents[1] / "weights"
"""Model folders that come with the package, named `arch.tag`; one is made by `benchmarks/train_virtual.py`."""

# What packaged weights have seen, and what follows from that.
_SEEN = {
    "virtual": "virtual slides, procedural drawings of H&E: it shows how everything works and is a start for training. "
    "It has never seen tissue; its probabilities say nothing about a patient.",
    "breakhis": "a small part of BreaKHis (27 patients at 100X, other scales by resampling): it shows how everything "
    "works and is a start for training. For research; its probabilities say nothing about a patient.",
}

_RESNET18S = ("magdg_resnet18", "magerm_resnet18", "maggan_resnet18")
_PLAIN = dict.fromkeys(_RESNET18S, "resnet18") | {"test_magdg_resnet": "test_resnet"}


def head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of all weights of a timm model that are not its backbone's: of class and domain heads."""
    classifiers = model.pretrained_cfg.get("classifier") or ()
    return PREFIX, *(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Checks that pretrained weights hold this backbone, all of it and nothing else, and drops a domain head.

    timm loads with `strict=False` as soon as the class head is replaced, and would then train on from a partly random
    backbone without a word.

    Args:
        state_dict: Weights by name, or a checkpoint that holds them under "state_dict".
        model: The model that they are for.

    Raises:
        RuntimeError: If backbone weights are missing or do not belong to this backbone.
    """
    state_dict = state_dict.get("state_dict", state_dict)

    def backbone(keys):  # torch itself fills in a missing num_batches_tracked, old checkpoints have none
        return {k for k in keys if not k.startswith(head_prefixes(model)) and not k.endswith("num_batches_tracked")}

    expected, given = backbone(model.state_dict()), backbone(state_dict)
    for what, keys in (("lack", expected - given), ("hold unknown", given - expected)):
        if keys:
            names = ", ".join(sorted(keys)[:8]) + (", ..." if len(keys) > 8 else "")
            raise RuntimeError(
                f"The pretrained weights for {model.pretrained_cfg['architecture']} {what} {len(keys)} backbone "
                f"entries: {names}. Give the weights of a {plain_architecture(model)}."
            )
    return {key: value for key, value in state_dict.items() if not key.startswith(PREFIX)}


def plain_architecture(model: nn.Module | str) -> str:
    """Name of the stock timm architecture that the model is, its domain head aside: "resnet18" for most of ours.

    Args:
        model: A model, or its name with or without tag; of vectors it is its own.

    Raises:
        ValueError: If timm does not know the name.
    """
    name = model if isinstance(model, str) else model.pretrained_cfg["architecture"]
    arch = name.split(".")[0]
    if arch not in VECTOR_MODELS and not timm.is_model(arch):
        raise ValueError(f"timm knows no architecture {arch!r}; `timm.list_models('mag*')` names ours.")
    return _PLAIN.get(arch, arch)


def scope_stage(model: nn.Module) -> int | None:
    """The early stage whose statistics say whether an image is like the training's: the second that timm counts.

    Layer 1 of a ResNet (its stem is timm's first), block 2 of a ViT; None of a network without stages, as of vectors.
    """
    return 1 if hasattr(model, "forward_intermediates") and len(model.feature_info) > 1 else None


def embed(model: nn.Module, x: Tensor, kind: str = "penultimate", stage: int | None = None) -> tuple[Tensor, ...]:
    """Logits and an embedding of the same images from one pass through the network, and statistics of a stage.

    Args:
        model: A timm classifier, in the mode (train or eval) that the caller has set; not wrapped.
        x: Images (B, in_chans, H, W), normalised as the model wants them.
        kind: "penultimate" for the pooled features that the classifier reads, (B, 512) for a ResNet-18; "pyramid" for
            the spatial average and maximum of the last four stages, in the order avg 1, max 1, ..., avg 4, max 4,
            which is (B, 1920) for a ResNet-18 (twice 64 + 128 + 256 + 512).
        stage: As timm's `forward_intermediates` counts; None for no statistics.

    Returns:
        `(logits, embedding)`: what `model(x)` gives, and the embedding in the same dtype; with a `stage` of C channels
        also (B, 2 C): the mean of every channel over the pixels, then the standard deviation of every channel.

    Raises:
        ValueError: If `kind` is another.
    """
    if kind not in ("penultimate", "pyramid"):
        raise ValueError(f"Unknown kind of embedding {kind!r}: use 'penultimate' or 'pyramid'.")
    if kind == "penultimate" and stage is None:
        pooled = embedding = pooled_features(model, x)
        return model.get_classifier()(pooled), embedding
    n = len(model.feature_info)
    last = list(range(n - 4, n)) if kind == "pyramid" else []  # a ResNet's stem is left out
    indices = sorted({*last, *([] if stage is None else [stage])})
    x, maps = model.forward_intermediates(x, indices=indices)
    maps = dict(zip(indices, maps, strict=True))
    pooled = embedding = model.forward_head(x, pre_logits=True)
    if last:
        pools = [pool for index in last for pool in (maps[index].mean((2, 3)), maps[index].amax((2, 3)))]
        embedding = torch.cat(pools, dim=1)
    outputs = model.get_classifier()(pooled), embedding
    if stage is None:
        return outputs
    return *outputs, channel_statistics(maps[stage])


def normalisation(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the pixels, in [0, 1], that a model expects: its config's, ImageNet's where it has none."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return tuple(config.get("mean") or IMAGENET_DEFAULT_MEAN), tuple(config.get("std") or IMAGENET_DEFAULT_STD)


def channel_statistics(features: Tensor) -> Tensor:
    """Mean and standard deviation over the pixels of every channel: (B, C, H, W) to (B, 2 C), all means first."""
    mean = features.mean((2, 3), keepdim=True)
    variance = (features - mean).square().mean((2, 3))  # a tenth of the time that torch.var_mean takes on a CPU
    return torch.cat([mean.flatten(1), variance.sqrt()], dim=1)


def _cfg(**kwargs) -> dict:
    return {
        "num_classes": 2,
        "label_names": ("benign", "malignant"),
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 1.0,  # the middle tile of the view that records are made in
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        **kwargs,
    }


def _packaged_cfgs() -> dict:
    """Of each packaged model, with the input that its own config states.

    `magdg_resnet18` has them all, also those that another method trained: the warning says which.
    """
    cfgs = {}
    for file in sorted(PACKAGED.glob("[!.]*/config.json")):
        stated = read_json(file)["pretrained_cfg"]
        stated = {k: tuple(v) if isinstance(v, list) else v for k, v in stated.items() if k != "tag"}
        stated["pool_size"] = tuple(-(-side // 32) for side in stated["input_size"][1:])
        arch, _, tag = file.parent.name.partition(".")
        for name in {arch, "magdg_resnet18"} if arch in _RESNET18S else {arch}:
            cfgs[f"{name}.{tag}"] = _cfg(**stated, file=str(file.with_name("model.safetensors")))
    return cfgs


# The first tag of a name is its default. `breakhis` was trained at all magnifications, `breakhis_lomo200` at all but
# 200x.
default_cfgs = generate_default_cfgs(
    _packaged_cfgs()
    | {
        f"{arch}.{tag}": _cfg(hf_hub_id=f"{HUB_NAMESPACE}/{arch}.{tag}")
        for arch in _RESNET18S
        for tag in ("breakhis", *(f"breakhis_lomo{magnification}" for magnification in (40, 100, 200, 400)))
    }
    | {"test_magdg_resnet.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5), first_conv="conv1.0")}
)


def _create(
    variant: str,
    pretrained: bool,
    pretrained_cfg: str | dict | None = None,
    pretrained_cfg_overlay: dict | None = None,
    cache_dir: str | None = None,
    num_domains: int = 0,
    **kwargs,
) -> nn.Module:
    """timm's build; weights from the Hub are fetched by `resolve`: safetensors, checked, or an error that helps."""
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    if pretrained and cfg.hf_hub_id and not (cfg.source or cfg.state_dict or cfg.file):
        file = resolve(cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors", cache_dir=cache_dir)
        cfg = dataclasses.replace(cfg, file=str(file))
    if pretrained and cfg.file and PACKAGED in Path(cfg.file).parents and not cfg.state_dict:
        seen = _SEEN[read_json(Path(cfg.file).with_name("config.json"))["trained_on"]]
        name = Path(cfg.file).parent.name
        own = "" if name == f"{variant}.{cfg.tag}" else f"{variant}.{cfg.tag} are the weights of {name}: "
        _logger.warning("%s%s was trained on %s", own, name, seen)
    model = build_model_with_cfg(
        ResNet, variant, pretrained, pretrained_cfg=cfg, pretrained_filter_fn=checkpoint_filter_fn, **kwargs
    )
    if num_domains:
        return add_domain_head(model, num_domains)
    model.register_load_state_dict_pre_hook(match_domain_head)  # weights that hold a domain head load too
    return model


_RESNET18 = dict(block=BasicBlock, layers=(2, 2, 2, 2))


@register_model
def magdg_resnet18(pretrained: bool = False, **kwargs) -> nn.Module:
    """ResNet-18 for adversarial training; `num_domains=3` for the magnifications that leaving one out trains on."""
    return _create("magdg_resnet18", pretrained, **_RESNET18 | kwargs)


@register_model
def magerm_resnet18(pretrained: bool = False, **kwargs) -> nn.Module:
    """ResNet-18 trained by supervision alone, the baseline."""
    return _create("magerm_resnet18", pretrained, **_RESNET18 | kwargs)


@register_model
def maggan_resnet18(pretrained: bool = False, **kwargs) -> nn.Module:
    """ResNet-18 trained by supervision with DCGAN patches added, the other baseline."""
    return _create("maggan_resnet18", pretrained, **_RESNET18 | kwargs)


@register_model
def test_magdg_resnet(pretrained: bool = False, **kwargs) -> nn.Module:
    """timm's tiny `test_resnet` (under 0.5 M parameters), for tests."""
    args = dict(
        block=[BasicBlock, BasicBlock, Bottleneck, BasicBlock],
        layers=(1, 1, 1, 1),
        stem_width=16,
        stem_type="deep",
        avg_down=True,
        channels=(32, 48, 48, 96),
    )
    return _create("test_magdg_resnet", pretrained, **args | kwargs)
