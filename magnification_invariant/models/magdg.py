"""ResNets with a gradient-reversed domain head, registered with timm.

`import magnification_invariant` (timm has no plug-in discovery), then `timm.create_model('magdg_resnet18')`.
Everything timm does with a ResNet works on these: they differ from it by one training-only head.
"""

import dataclasses
import json
import logging
import os
from pathlib import Path

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_device_dtype
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from magnification_invariant.hub_files import resolve
from magnification_invariant.models.grad_reverse import grad_reverse

__all__ = ["HUB_NAMESPACE", "MagDGResNet", "embed", "plain_architecture"]

_logger = logging.getLogger(__name__)

HUB_NAMESPACE = os.environ.get("MAGDG_HUB_NAMESPACE") or "magnification-invariant"
"""Who publishes the weights on the Hub: `arch.tag` is fetched from `HUB_NAMESPACE/arch.tag`."""

PACKAGED = Path(__file__).parents[1] / "weights"
"""Model folders that come with the package, named `arch.tag`; one is made by `benchmarks/train_virtual.py`."""

# What the state_dict of each entry is once the domain head is gone.
_PLAIN = {
    "magdg_resnet18": "resnet18",
    "magerm_resnet18": "resnet18",
    "maggan_resnet18": "resnet18",
    "test_magdg_resnet": "test_resnet",
}


class MagDGResNet(ResNet):
    """timm's ResNet with an adversarial head that guesses the domain (magnification) from the pooled features.

    `model(x)` gives class logits (B, num_classes). Only in training mode and after `set_domain_training(True)` it
    gives `(logits, domain_logits)`, the second (B, num_domains), always from the same graph: a coefficient of 0 runs
    the head too, so DistributedDataParallel and torch.compile never see it change. Both losses are minimised; the
    head learns to tell the domains apart while its gradient reaches the encoder times `-grl_coeff`.

    The head draws its initial weights from a stream of its own, so backbone, classifier and everything drawn later
    are bit for bit what they are without it. It is a training device: eval, export and ONNX graphs do not hold it,
    and state dicts load with or without it, whether the model has one or not.

    Args:
        *args: Of `timm.models.resnet.ResNet`.
        num_domains: Domains to tell apart; 0 gives exactly timm's ResNet.
        **kwargs: Of `timm.models.resnet.ResNet`.

    Source: Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 17 (2016).
    """

    def __init__(self, *args, num_domains: int = 0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.num_domains = num_domains
        # A buffer, so that one compiled graph serves every coefficient; it belongs to a moment of the training and
        # not to the weights, so it is not saved.
        coeff = torch.zeros((), dtype=torch.float32, device=get_device_dtype(self)["device"])
        self.register_buffer("grl_coeff", coeff, persistent=False)
        self._reset_domain_head()
        self.register_load_state_dict_pre_hook(_match_domain_head)

    @torch.jit.ignore
    def _reset_domain_head(self) -> None:
        """Makes a fresh head for the present pooling (none without pooled features); domain training is off then."""
        self.domain_training = False
        self.domain_head: nn.Module = nn.Identity()
        if not self.num_domains or not self.global_pool.pool_type:
            return
        # The seed is drawn inside the fork: deterministic, another one for every model, and the draw is undone with
        # the rest. On the CPU, so that the weights are the same on every device.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), device="cpu")))
            head = nn.Sequential(
                nn.Linear(self.head_hidden_size, 256, device="cpu"),
                nn.ReLU(),
                nn.Linear(256, self.num_domains, device="cpu"),
            )
        self.domain_head = head.to(**get_device_dtype(self)).train(self.training)

    @torch.jit.ignore
    def set_domain_training(self, enable: bool = True) -> None:
        """Turns the second output of the training-mode `forward` on or off.

        Raises:
            ValueError: If there is no domain head to train.
        """
        if enable and isinstance(self.domain_head, nn.Identity):
            raise ValueError(
                "This model has no domain head: create it with num_domains > 0 and a global_pool "
                f"(num_domains={self.num_domains}, global_pool={self.global_pool.pool_type!r})."
            )
        self.domain_training = enable

    @torch.jit.ignore
    def set_grl_coeff(self, value: float | Tensor) -> None:
        """Sets the coefficient of the reversed gradient (0 at first), before a forward pass, not before its backward.

        Args:
            value: A number, or a 0-d tensor, which is copied without waiting for the device.
        """
        self.grl_coeff.fill_(value)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As timm's; another pooling also gets a fresh domain head, since the features it reads are other ones."""
        pool_type = self.global_pool.pool_type
        super().reset_classifier(num_classes, global_pool)
        if self.global_pool.pool_type != pool_type:
            self._reset_domain_head()

    def forward(self, x: Tensor):
        """(B, in_chans, H, W) to class logits (B, num_classes), or to `(logits, domain_logits)`: see the class."""
        x = self.forward_features(x)
        # The form of timm's distilled ViT: TorchScript does not read a branch guarded like this.
        if self.domain_training and self.training and not torch.jit.is_scripting():
            return self.forward_heads(self.forward_head(x, pre_logits=True))
        return self.forward_head(x)

    @torch.jit.ignore
    def forward_heads(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (B, head_hidden_size) to `(logits, domain_logits)`, the second behind the reversal."""
        return self.fc(pooled), self.domain_head(grad_reverse(pooled, self.grl_coeff))


def _match_domain_head(module: MagDGResNet, state_dict: dict, prefix: str, *_) -> None:
    """Load pre-hook: drops the domain head that the model lacks, adds the one that the file lacks. Never raises."""
    own = module.domain_head.state_dict(prefix=f"{prefix}domain_head.")
    given = [key for key in state_dict if key.startswith(f"{prefix}domain_head.")]
    if not own:
        for key in given:
            del state_dict[key]
    elif not given:
        state_dict.update(own)
        _logger.info(
            "The weights hold no domain head: the model keeps its own, for %d domains, untrained if it was just made.",
            module.num_domains,
        )


def checkpoint_filter_fn(state_dict: dict, model: MagDGResNet) -> dict:
    """Checks that pretrained weights hold this backbone, all of it and nothing else.

    timm loads with `strict=False` as soon as the class head is replaced, and would then train on from a partly random
    backbone without a word. A domain head of another shape is left out, so that the model keeps a fresh one.

    Args:
        state_dict: Weights by name, or a checkpoint that holds them under "state_dict".
        model: The model that they are for.

    Returns:
        The weights by name.

    Raises:
        RuntimeError: If backbone weights are missing or do not belong to this backbone.
    """
    state_dict = dict(state_dict.get("state_dict", state_dict))
    own = model.state_dict()

    def backbone(keys):  # torch itself fills in a missing num_batches_tracked, old checkpoints have none
        heads = (f"{model.get_classifier(name_only=True)}.", "domain_head.")
        return {key for key in keys if not key.startswith(heads) and not key.endswith("num_batches_tracked")}

    for what, keys in (
        ("lack", backbone(own) - backbone(state_dict)),
        ("hold unknown", backbone(state_dict) - backbone(own)),
    ):
        if keys:
            named = ", ".join(sorted(keys)[:8]) + (", ..." if len(keys) > 8 else "")
            raise RuntimeError(
                f"The pretrained weights for {model.pretrained_cfg['architecture']} {what} {len(keys)} backbone "
                f"entries: {named}. Give the weights of a {plain_architecture(model)}."
            )

    def head(weights):
        return {key: value.shape for key, value in weights.items() if key.startswith("domain_head.")}

    if head(state_dict) != head(own):
        for key in head(state_dict):
            del state_dict[key]
    return state_dict


def plain_architecture(model: nn.Module | str) -> str:
    """Name of the stock timm architecture that the model is without its domain head, "resnet18" for most.

    Args:
        model: A model made by timm, or its name with or without tag.

    Raises:
        ValueError: If timm does not know the name.
    """
    name = model if isinstance(model, str) else model.pretrained_cfg["architecture"]
    arch = name.split(".")[0]
    if not timm.is_model(arch):
        raise ValueError(f"timm knows no architecture {arch!r}; `timm.list_models('mag*')` names ours.")
    return _PLAIN.get(arch, arch)


def embed(model: ResNet, x: Tensor, kind: str = "penultimate") -> tuple[Tensor, Tensor]:
    """Logits and an embedding of the same images from one pass through the network.

    Args:
        model: Any timm ResNet, in the mode (train or eval) that the caller has set; not wrapped.
        x: Images (B, in_chans, H, W), normalised as the model wants them.
        kind: "penultimate" for the pooled features that the classifier reads, (B, 512) for a ResNet-18; "pyramid" for
            the spatial average and maximum of all four stages, in the order avg 1, max 1, ..., avg 4, max 4, which
            is (B, 1920) for a ResNet-18 (twice 64 + 128 + 256 + 512).

    Returns:
        `(logits, embedding)`: what `model(x)` gives without domain training, and the embedding in the same dtype.

    Raises:
        ValueError: If `kind` is another.
    """
    if kind == "penultimate":
        pooled = embedding = model.forward_head(model.forward_features(x), pre_logits=True)
    elif kind == "pyramid":
        x, stages = model.forward_intermediates(x, indices=[1, 2, 3, 4])  # 0 is the stem
        pooled = model.forward_head(x, pre_logits=True)
        embedding = torch.cat([pool for stage in stages for pool in (stage.mean((2, 3)), stage.amax((2, 3)))], dim=1)
    else:
        raise ValueError(f"Unknown kind of embedding {kind!r}: use 'penultimate' or 'pyramid'.")
    return model.get_classifier()(pooled), embedding


def _cfg(**kwargs) -> dict:
    return {
        "num_classes": 2,
        "label_names": ("benign", "malignant"),
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        **kwargs,
    }


def _packaged_cfgs() -> dict:
    """Of each packaged model, with the input that its own config states."""
    cfgs = {}
    for file in sorted(PACKAGED.glob("[!.]*/config.json")):
        about = json.loads(file.read_text())["pretrained_cfg"]
        about = {k: tuple(v) if isinstance(v, list) else v for k, v in about.items() if k != "tag"}
        about["pool_size"] = tuple(-(-side // 32) for side in about["input_size"][1:])
        cfgs[file.parent.name] = _cfg(**about, file=str(file.with_name("model.safetensors")))
    return cfgs


# The first tag of a name is its default. `breakhis` was trained at all magnifications, `breakhis_lomo200` at all but
# 200x.
default_cfgs = generate_default_cfgs(
    _packaged_cfgs()
    | {
        f"{arch}.{tag}": _cfg(hf_hub_id=f"{HUB_NAMESPACE}/{arch}.{tag}")
        for arch in ("magdg_resnet18", "magerm_resnet18", "maggan_resnet18")
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
    **kwargs,
) -> nn.Module:
    """timm's build; weights from the Hub are fetched by `resolve`: safetensors, checked, or an error that helps."""
    if kwargs.get("features_only"):
        kwargs["num_domains"] = 0  # no pooled features, nothing for a head to read
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    if pretrained and cfg.hf_hub_id and not (cfg.source or cfg.state_dict or cfg.file):
        file = resolve(cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors", cache_dir=cache_dir)
        cfg = dataclasses.replace(cfg, file=str(file))
    if pretrained and cfg.file and PACKAGED in Path(cfg.file).parents and not cfg.state_dict:
        _logger.warning(
            "%s.%s was trained on virtual slides, procedural drawings of H&E: it shows how everything works and is a "
            "start for training. It has never seen tissue; its probabilities say nothing about a patient.",
            variant,
            cfg.tag,
        )
    return build_model_with_cfg(
        MagDGResNet, variant, pretrained, pretrained_cfg=cfg, pretrained_filter_fn=checkpoint_filter_fn, **kwargs
    )


_RESNET18 = dict(block=BasicBlock, layers=(2, 2, 2, 2))


@register_model
def magdg_resnet18(pretrained: bool = False, **kwargs) -> MagDGResNet:
    """ResNet-18 with a gradient-reversed magnification head, for the three that leaving one out trains on."""
    return _create("magdg_resnet18", pretrained, **_RESNET18 | {"num_domains": 3} | kwargs)


@register_model
def magerm_resnet18(pretrained: bool = False, **kwargs) -> MagDGResNet:
    """ResNet-18 trained by supervision alone, the baseline."""
    return _create("magerm_resnet18", pretrained, **_RESNET18 | kwargs)


@register_model
def maggan_resnet18(pretrained: bool = False, **kwargs) -> MagDGResNet:
    """ResNet-18 trained by supervision with DCGAN patches added, the other baseline."""
    return _create("maggan_resnet18", pretrained, **_RESNET18 | kwargs)


@register_model
def test_magdg_resnet(pretrained: bool = False, **kwargs) -> MagDGResNet:
    """timm's tiny `test_resnet` (under 0.5 M parameters) with a domain head, for tests."""
    args = dict(
        block=[BasicBlock, BasicBlock, Bottleneck, BasicBlock],
        layers=(1, 1, 1, 1),
        stem_width=16,
        stem_type="deep",
        avg_down=True,
        channels=(32, 48, 48, 96),
        num_domains=3,
    )
    return _create("test_magdg_resnet", pretrained, **args | kwargs)
