"""Our entries: timm's networks to the bit, what they load and refuse, and their names."""

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from timm.models.resnet import ResNet

from magnification_invariant.models import HUB_NAMESPACE, embed, magdg, plain_architecture

MODELS = timm.list_models(module="magdg")
TINY = "test_magdg_resnet"


def create(name=TINY, seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, **kwargs)


def images(n=6, size=64, channels=3):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def backbone_of(weights):
    return {name: value for name, value in weights.items() if not name.startswith(("fc.", "domain_head."))}


def assert_same_weights(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", MODELS)
def test_an_entry_is_the_stock_architecture(name):
    """The same class, the same draws, and no parameter that a pass leaves without a gradient."""
    ours, stock = create(name), create(plain_architecture(name), num_classes=2)
    assert type(ours) is type(stock) is ResNet
    assert_same_weights(ours.state_dict(), stock.state_dict())
    ours(images(2)).sum().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())
    stock(images(2))  # BatchNorm's statistics
    assert torch.equal(ours.eval()(images(2)), stock.eval()(images(2)))


def test_plain_architecture():
    assert plain_architecture("magdg_resnet18.breakhis") == "resnet18"
    assert plain_architecture(create()) == "test_resnet"
    assert plain_architecture("resnet50.a1_in1k") == "resnet50"
    with pytest.raises(ValueError, match="no architecture 'magdg_resnet19'"):
        plain_architecture("magdg_resnet19")


# Loading


def pretrained(weights, overlay=None, **kwargs):
    return create(seed=9, pretrained=True, pretrained_cfg_overlay={"state_dict": weights, **(overlay or {})}, **kwargs)


@pytest.fixture(scope="module")
def plain():
    """Weights, every one of them unlike what a fresh model holds."""
    weights = create(seed=5).state_dict()
    return {name: value + (0.01 if value.is_floating_point() else 1) for name, value in weights.items()}


@pytest.mark.parametrize(
    "kwargs", [{}, {"num_classes": 7}, {"num_classes": 0}, {"features_only": True}, {"in_chans": 1}]
)
@pytest.mark.parametrize("lost", ["layer3.0.conv2.weight", "layer2.0.bn1.running_var", "conv1.0.weight"])
def test_pretrained_names_the_backbone_weights_that_are_missing(plain, lost, kwargs):
    broken = {name: value for name, value in plain.items() if name != lost}
    with pytest.raises(RuntimeError, match=f"test_magdg_resnet lack 1 backbone entries: {lost}.*test_resnet"):
        pretrained(broken, **kwargs)


def test_pretrained_refuses_another_network(plain):
    with pytest.raises(RuntimeError, match=r"lack \d+ backbone entries: .*, \.\.\."):
        pretrained({f"encoder.{name}": value for name, value in plain.items()}, num_classes=7)
    with pytest.raises(RuntimeError, match=r"hold unknown 1 backbone entries: layer5\.0\.conv1\.weight"):
        pretrained(plain | {"layer5.0.conv1.weight": torch.zeros(1)}, num_classes=7)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "fc.weight", "fc.bias"'):
        pretrained(backbone_of(plain))  # a class head that is missing is timm's own error


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    "kwargs", [{}, {"num_classes": 7}, {"num_classes": 0}, {"num_domains": 5}, {"global_pool": "max"}]
)
def test_pretrained_loads_all_of_the_backbone(plain, kwargs, wrapped):
    """From weights with and without a domain head, and from old ones without batch counters."""
    full = plain | {"domain_head.0.weight": torch.ones(256, 96)}
    old = {name: value for name, value in plain.items() if not name.endswith("num_batches_tracked")}
    for weights in (full, plain, old):
        model = pretrained({"state_dict": weights} if wrapped else weights, **kwargs)
        own = model.state_dict()
        assert_same_weights(*({name: w[name] for name in backbone_of(old)} for w in (own, plain)))
        if model.num_classes == 2:
            assert torch.equal(model.fc.weight, plain["fc.weight"])
        assert hasattr(model, "domain_head") == ("num_domains" in kwargs)


def test_pretrained_with_other_input_channels_classes_and_as_features(plain):
    one = pretrained(plain, in_chans=1)
    torch.testing.assert_close(one.conv1[0].weight, plain["conv1.0.weight"].sum(1, keepdim=True))
    features = pretrained(plain, features_only=True)
    assert torch.equal(features["layer4"][0].conv1.weight, plain["layer4.0.conv1.weight"])
    stock = create("test_resnet", seed=5, num_classes=10).state_dict()
    model = pretrained(stock, overlay={"num_classes": 10}, num_classes=2)
    assert_same_weights(backbone_of(model.state_dict()), backbone_of(stock))
    with pytest.raises(RuntimeError, match=r"size mismatch for fc\.weight"):
        pretrained(stock)  # says 2 classes, holds 10: as in stock timm


# Names, weights and what is stated of them


def test_tags_name_our_weights_and_nothing_else():
    tags = ["breakhis", "breakhis_lomo40", "breakhis_lomo100", "breakhis_lomo200", "breakhis_lomo400"]
    for arch in ("magdg_resnet18", "magerm_resnet18", "maggan_resnet18"):
        shown = [
            folder.name for folder in magdg.PACKAGED.glob("mag*") if arch in ("magdg_resnet18", *folder.name.split("."))
        ]
        packaged = [f"{arch}.{name.partition('.')[2]}" for name in shown]
        names = sorted(timm.list_models(f"{arch}*", include_tags=True))
        assert names == sorted([*packaged, *(f"{arch}.{tag}" for tag in tags)])
        for tag in tags:
            cfg = timm.get_pretrained_cfg(f"{arch}.{tag}")
            assert cfg.hf_hub_id == f"{HUB_NAMESPACE}/{arch}.{tag}" and not cfg.url and not cfg.file
            assert (cfg.num_classes, cfg.label_names) == (2, ("benign", "malignant"))
        assert timm.get_pretrained_cfg(arch).tag == (packaged[0].partition(".")[2] if packaged else "breakhis")
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("magdg_resnet18.a1_in1k")
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model(TINY, pretrained=True)


@pytest.mark.parametrize("name", ["magerm_resnet18", "magdg_resnet18.breakhis_lomo40"])
def test_weights_that_are_not_published_are_an_error_with_the_ways_on(name):
    with pytest.raises(FileNotFoundError) as raised:
        timm.create_model(name, pretrained=True)
    weights = name if "." in name else f"{name}.breakhis"
    for hint in (f"{HUB_NAMESPACE}/{weights}", "HF_HUB_OFFLINE", "magdg push", "MAGDG_HUB_NAMESPACE", "local folder"):
        assert hint in str(raised.value)


def test_packaged_weights_load_and_say_what_they_are(plain, tmp_path, monkeypatch, caplog):
    folder = tmp_path / f"{TINY}.virtual"
    folder.mkdir()
    half = {name: value.half() if value.dim() > 1 else value for name, value in plain.items()}
    safetensors.torch.save_file(half, folder / "model.safetensors")
    stated = {"tag": "virtual", "num_classes": 2, "input_size": [3, 64, 96], "first_conv": "conv1.0", "crop_pct": 0.5}
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": stated, "trained_on": "virtual"}))
    monkeypatch.setattr(magdg, "PACKAGED", tmp_path)
    cfg = magdg._packaged_cfgs()[folder.name]
    model = timm.create_model(TINY, pretrained=True, pretrained_cfg=cfg | {"tag": "virtual"})
    assert [r.levelname for r in caplog.records].count("WARNING") == 1
    assert f"{TINY}.virtual was trained on virtual slides" in caplog.text
    assert "say nothing about a patient" in caplog.text
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], half[name].to(value.dtype)) for name, value in plain.items())
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 64, 96) and config["crop_pct"] == 0.5
    assert model.pretrained_cfg["pool_size"] == (2, 3)


@pytest.mark.parametrize("name", MODELS)
def test_preprocessing_is_stated(name):
    config = timm.data.resolve_model_data_config(create(name))
    assert config["mean"] == timm.data.IMAGENET_DEFAULT_MEAN
    assert config["std"] == timm.data.IMAGENET_DEFAULT_STD
    assert (config["interpolation"], config["crop_pct"]) == ("bilinear", 1.0)
    size = {TINY: 160, "magdg_resnet18": 64}.get(name, 224)  # the packaged weights are of 64 pixels
    assert config["input_size"] == (3, size, size)


# One pass for logits and embedding


@pytest.mark.parametrize("name", [TINY, "magdg_resnet18"])
def test_embed(name):
    model, x = create(name, num_classes=2).eval(), images(2)
    passes = []
    model.layer4.register_forward_hook(lambda *_: passes.append(1))
    logits, penultimate = embed(model, x)
    pyramid_logits, pyramid = embed(model, x, "pyramid")
    assert len(passes) == 2
    assert torch.equal(logits, model(x)) and torch.equal(pyramid_logits, logits)
    assert torch.equal(penultimate, model.forward_head(model.forward_features(x), pre_logits=True))
    stage, stages = model.maxpool(model.act1(model.bn1(model.conv1(x)))), []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        stage = layer(stage)
        stages += [stage.flatten(2).mean(2), stage.flatten(2).max(2).values]
    torch.testing.assert_close(pyramid, torch.cat(stages, 1))
    assert pyramid.shape == (2, 1920 if name == "magdg_resnet18" else 2 * (32 + 48 + 192 + 96))
    for kind, embedding in (("penultimate", penultimate), ("pyramid", pyramid)):
        of_a_stage = embed(model, x, kind, stage=2)
        assert torch.equal(of_a_stage[0], logits) and torch.equal(of_a_stage[1], embedding)
        flat = model.forward_intermediates(x, indices=[2])[1][0].flatten(2)
        torch.testing.assert_close(of_a_stage[2], torch.cat([flat.mean(2), flat.std(2, correction=0)], 1))
    with pytest.raises(ValueError, match="'penultimate' or 'pyramid'"):
        embed(model, x, "last")


@pytest.mark.parametrize("name, size", [("convnext_atto", 32), ("densenet121", 32), ("test_vit", 160)])
def test_embed_of_other_networks(name, size):
    model, x = create(name, num_classes=2).eval(), images(2, size)
    for kind in ("penultimate", "pyramid"):
        logits, embedding = embed(model, x, kind)
        assert torch.equal(logits, model(x)) and len(embedding) == 2
    _, last = model.forward_intermediates(x, indices=1)
    assert torch.equal(embedding[:, -last[0].shape[1] :], last[0].amax((2, 3)))


@pytest.mark.slow
def test_registration_and_namespace_in_a_fresh_interpreter():
    """Importing the package is all it takes, and MAGDG_HUB_NAMESPACE moves every tag."""
    code = (
        "import magnification_invariant, timm;"
        "print(timm.get_pretrained_cfg('maggan_resnet18.breakhis_lomo400').hf_hub_id)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"MAGDG_HUB_NAMESPACE": "someone"},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "someone/maggan_resnet18.breakhis_lomo400", run.stderr
