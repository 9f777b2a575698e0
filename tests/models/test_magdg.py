"""The models: their gradients, their randomness, what they load and refuse, and timm's habits."""

import copy
import json
import logging
import os
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from magnification_invariant.models import HUB_NAMESPACE, MagDGResNet, embed, magdg, plain_architecture

MODELS = timm.list_models(module="magdg")
TINY = "test_magdg_resnet"


def create(name: str = TINY, seed: int = 0, **kwargs) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **kwargs)


def images(n: int = 6, size: int = 64, channels: int = 3, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def backbone_of(weights: dict) -> dict:
    return {key: value for key, value in weights.items() if not key.startswith(("fc.", "domain_head."))}


def assert_same_weights(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


# The adversarial step


def gradients(model, loss) -> dict:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


@pytest.mark.parametrize("kwargs", [{}, {"global_pool": "catavgmax"}, {"checkpointing": True}])
@pytest.mark.parametrize("coeff", [0.0, 0.3, 1.0])
def test_adversarial_step_is_the_two_loss_gradients_put_together(coeff, kwargs):
    """Encoder: class - coeff x domain. Class head: class. Domain head: +domain, so that it learns."""
    kwargs = dict(kwargs)
    checkpointing = kwargs.pop("checkpointing", False)
    model = create(zero_init_last=False, **kwargs).double().train()  # else most gradients are 0
    model.set_grad_checkpointing(checkpointing)
    x, y, domain = images(dtype=torch.float64), torch.tensor([0, 1] * 3), torch.tensor([0, 1, 2] * 2)

    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    of_class = gradients(model, F.cross_entropy(model.fc(pooled), y))
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    of_domain = gradients(model, F.cross_entropy(model.domain_head(pooled), domain))

    model.set_domain_training(True)
    model.set_grl_coeff(coeff)
    logits, domain_logits = model(x)
    step = gradients(model, F.cross_entropy(logits, y) + F.cross_entropy(domain_logits, domain))

    for name, gradient in step.items():
        if name.startswith("domain_head."):
            expected = of_domain[name]
            assert of_class[name] is None
        elif name.startswith("fc."):
            expected = of_class[name]
            assert of_domain[name] is None
        else:
            expected = of_class[name] - coeff * of_domain[name]
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12, msg=name)


def test_coefficient_zero_trains_backbone_and_classifier_as_supervision_alone_does():
    """Three optimizer steps, equal to the bit; the domain head moves all the same."""
    trained = []
    for num_domains in (3, 0):
        model = create(num_domains=num_domains).train()
        model.set_domain_training(num_domains > 0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            out = model(images())
            logits, domain_logits = out if num_domains else (out, None)
            loss = F.cross_entropy(logits, torch.tensor([0, 1] * 3))
            if num_domains:
                loss = loss + F.cross_entropy(domain_logits, torch.tensor([0, 1, 2] * 2))
            loss.backward()
            assert all(parameter.grad is not None for parameter in model.parameters())  # a static graph
            optimizer.step()
        trained.append(model.state_dict())
    assert_same_weights({k: v for k, v in trained[0].items() if not k.startswith("domain_head.")}, trained[1])
    assert not torch.equal(trained[0]["domain_head.2.weight"], create().domain_head[2].weight)


def test_two_outputs_only_in_training_with_domain_training_on():
    model, x = create(num_classes=4, num_domains=5), images()
    assert model.train()(x).shape == (6, 4)
    model.set_domain_training(True)
    logits, domain_logits = model(x)
    assert logits.shape == (6, 4)
    assert domain_logits.shape == (6, 5)
    assert (domain_logits < 0).any()  # logits, neither rectified nor probabilities
    assert model.eval()(x).shape == (6, 4)
    model.set_domain_training(False)
    assert model.train()(x).shape == (6, 4)


def test_class_logits_are_the_same_with_the_domain_head_running():
    model, x = create(drop_rate=0.5).train(), images()
    torch.manual_seed(7)
    plain = model(x)
    model.set_domain_training(True)
    torch.manual_seed(7)
    assert torch.equal(model(x)[0], plain)


def test_coefficient_is_set_in_place_and_not_saved():
    model = create()
    coeff = model.grl_coeff
    assert coeff.shape == ()
    assert coeff.item() == 0
    model.set_grl_coeff(0.25)
    assert coeff.item() == 0.25
    model.set_grl_coeff(torch.tensor(0.75))
    assert coeff.item() == 0.75
    assert model.grl_coeff is coeff
    assert "grl_coeff" not in model.state_dict()


def test_domain_training_without_a_head_is_refused():
    for kwargs in ({"num_domains": 0}, {"num_classes": 0, "global_pool": ""}):
        with pytest.raises(ValueError, match="no domain head"):
            create(**kwargs).set_domain_training(True)
        create(**kwargs).set_domain_training(False)


def test_domain_head_is_as_published():
    head = create("magdg_resnet18").domain_head
    assert [type(layer) for layer in head] == [torch.nn.Linear, torch.nn.ReLU, torch.nn.Linear]
    assert (head[0].in_features, head[0].out_features, head[2].out_features) == (512, 256, 3)
    assert not head[1].inplace  # it would write into a view that a custom backward pass stands behind


# Randomness


@pytest.mark.parametrize("pair", [("magdg_resnet18", "magerm_resnet18"), ("magdg_resnet18", "maggan_resnet18")])
def test_methods_start_from_the_same_weights_and_leave_the_same_stream(pair):
    weights, states = [], []
    for name in pair:
        model = create(name, seed=3)
        weights.append(model.state_dict())
        states.append(torch.get_rng_state())
    assert weights[0].keys() - weights[1].keys() == {f"domain_head.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")}
    assert_same_weights({k: v for k, v in weights[0].items() if not k.startswith("domain_head.")}, weights[1])
    assert torch.equal(*states)


def test_domain_head_follows_the_seed():
    def head(model):
        return model.domain_head[0].weight

    torch.manual_seed(0)
    first, second = timm.create_model(TINY), timm.create_model(TINY)
    assert torch.equal(head(first), head(create(seed=0)))
    assert not torch.equal(head(first), head(create(seed=1)))
    assert not torch.equal(head(first), head(second))
    # PyTorch's default for a linear layer: uniform in +-1/sqrt(inputs)
    bound = first.head_hidden_size**-0.5
    assert 0.99 * bound < head(first).abs().max() <= bound


@pytest.mark.parametrize("name", ["magerm_resnet18", "maggan_resnet18", "magdg_resnet18", TINY])
def test_without_a_domain_head_it_is_the_stock_architecture(name):
    model, stock = create(name, num_domains=0), create(plain_architecture(name), num_classes=2)
    assert_same_weights(model.state_dict(), stock.state_dict())  # the same draws too
    assert torch.equal(model.eval()(images(2)), stock.eval()(images(2)))


def test_plain_architecture():
    assert plain_architecture("magdg_resnet18.breakhis") == "resnet18"
    assert plain_architecture(create()) == "test_resnet"
    assert plain_architecture("resnet50.a1_in1k") == "resnet50"
    with pytest.raises(ValueError, match="no architecture 'magdg_resnet19'"):
        plain_architecture("magdg_resnet19")


# Loading


def pretrained(weights: dict, name: str = TINY, overlay: dict | None = None, **kwargs):
    overlay = {"state_dict": weights, **(overlay or {})}
    return create(name, seed=9, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


@pytest.fixture(scope="module")
def full() -> dict:
    """Weights with a domain head, every one of them unlike what a fresh model holds."""
    weights = create(seed=5).state_dict()
    return {key: value + (0.01 if value.is_floating_point() else 1) for key, value in weights.items()}


@pytest.fixture(scope="module")
def plain(full) -> dict:
    """What is published: the same weights without the domain head."""
    return {key: value for key, value in full.items() if not key.startswith("domain_head.")}


@pytest.mark.parametrize(
    "kwargs", [{}, {"num_classes": 7}, {"num_classes": 0}, {"features_only": True}, {"in_chans": 1}]
)
@pytest.mark.parametrize("lost", ["layer3.0.conv2.weight", "bn1.bias", "layer2.0.bn1.running_var", "conv1.0.weight"])
def test_pretrained_names_the_backbone_weights_that_are_missing(plain, lost, kwargs):
    broken = {key: value for key, value in plain.items() if key != lost}
    with pytest.raises(RuntimeError, match=f"test_magdg_resnet lack 1 backbone entries: {lost}.*test_resnet"):
        pretrained(broken, **kwargs)


def test_pretrained_refuses_another_network(plain):
    with pytest.raises(RuntimeError, match=r"lack \d+ backbone entries: .*, \.\.\."):
        pretrained({f"encoder.{key}": value for key, value in plain.items()}, num_classes=7)
    with pytest.raises(RuntimeError, match=r"hold unknown 1 backbone entries: layer5\.0\.conv1\.weight"):
        pretrained(plain | {"layer5.0.conv1.weight": torch.zeros(1)}, num_classes=7)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"num_classes": 7}, {"num_classes": 0}, {"num_domains": 0}, {"global_pool": "max"}, {"num_domains": 5}],
)
def test_pretrained_loads_all_of_the_backbone(full, plain, kwargs, wrapped):
    for weights in (full, plain):
        model = pretrained({"state_dict": weights} if wrapped else weights, **kwargs)
        assert_same_weights(backbone_of(model.state_dict()), backbone_of(full))
        if kwargs.get("num_classes", 2) == 2:
            assert torch.equal(model.fc.weight, full["fc.weight"])
        if kwargs.get("num_domains", 3) == 3:
            fresh = weights is plain
            assert torch.equal(model.domain_head[0].weight, full["domain_head.0.weight"]) != fresh
        assert model(images()).shape[0] == 6


def test_pretrained_with_other_input_channels_and_as_features(plain):
    one = pretrained(plain, in_chans=1)
    torch.testing.assert_close(one.conv1[0].weight, plain["conv1.0.weight"].sum(1, keepdim=True))
    features = pretrained(plain, features_only=True)
    assert torch.equal(features["layer4"][0].conv1.weight, plain["layer4.0.conv1.weight"])


def test_pretrained_from_stock_weights_of_another_width():
    stock = create("test_resnet", seed=5, num_classes=10).state_dict()
    model = pretrained(stock, overlay={"num_classes": 10}, num_classes=2)
    assert_same_weights(backbone_of(model.state_dict()), backbone_of(stock))
    assert model.fc.out_features == 2
    with pytest.raises(RuntimeError, match=r"size mismatch for fc\.weight"):
        pretrained(stock)  # says 2 classes, holds 10: as in stock timm


def test_class_head_missing_from_the_file_is_timms_own_error(plain):
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "fc.weight", "fc.bias"'):
        pretrained(backbone_of(plain))


def test_old_checkpoints_without_batch_counters_load(plain):
    pretrained({key: value for key, value in plain.items() if not key.endswith("num_batches_tracked")})


def test_fresh_domain_head_is_logged(full, plain, caplog):
    caplog.set_level(logging.INFO, logger="magnification_invariant.models.magdg")
    pretrained(full)
    pretrained(plain, num_domains=0)
    assert not caplog.records
    for weights, kwargs in ((plain, {}), (plain, {"num_classes": 7}), (full, {"num_domains": 5})):
        caplog.clear()
        model = pretrained(weights, **kwargs)
        (record,) = caplog.records
        assert record.levelno == logging.INFO
        assert f"no domain head: the model keeps its own, for {model.num_domains} domains" in record.getMessage()


def test_weights_load_with_and_without_a_domain_head(full, plain, tmp_path):
    """Through load_state_dict, checkpoint_path and safetensors, in both directions; the given dict is left alone."""
    for given in (full, plain):
        path = str(tmp_path / f"{len(given)}.safetensors")
        safetensors.torch.save_file(given, path)
        for num_domains in (0, 3):
            expected = full if num_domains and given is full else plain
            before = set(given)
            direct, loaded = create(num_domains=num_domains), create(num_domains=num_domains)
            head = copy.deepcopy(direct.domain_head.state_dict())
            direct.load_state_dict(given)
            safetensors.torch.load_model(loaded, path)
            for model in (direct, loaded, create(num_domains=num_domains, checkpoint_path=path)):
                weights = model.state_dict()
                assert_same_weights({key: weights[key] for key in expected}, expected)
                if expected is plain:
                    assert_same_weights(model.domain_head.state_dict(), head)
            assert set(given) == before


def test_load_hook_never_decides_for_the_caller(full):
    """It adds or drops a whole domain head; all else is the caller's `strict`, as in PyTorch."""
    part = {
        key: value for key, value in full.items() if key.startswith(("conv1.", "fc.")) or key == "domain_head.0.bias"
    }
    model = create()
    result = model.load_state_dict(part, strict=False)
    assert "layer1.0.conv1.weight" in result.missing_keys
    assert "domain_head.2.weight" in result.missing_keys  # half a head is not a head
    assert torch.equal(model.fc.weight, full["fc.weight"])
    with pytest.raises(RuntimeError, match=r"Missing key\(s\)"):
        model.load_state_dict(part)
    with pytest.raises(RuntimeError, match=r"size mismatch for domain_head\.2\.weight"):
        create(num_domains=5).load_state_dict(full)
    with pytest.raises(RuntimeError, match=r"size mismatch for fc\.weight"):
        create(num_classes=7).load_state_dict(full)
    assert create(num_domains=0).load_state_dict({"typo": torch.zeros(1)}, strict=False).unexpected_keys == ["typo"]


def test_load_hook_works_inside_other_modules_and_on_copies(full, plain):
    wrapped = torch.nn.Sequential(create())
    wrapped.load_state_dict({f"0.{key}": value for key, value in plain.items()})
    assert torch.equal(wrapped[0].fc.weight, plain["fc.weight"])
    original = create()
    for other in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        other.load_state_dict(plain)
        assert torch.equal(other.domain_head[0].weight, original.domain_head[0].weight)
        assert other.domain_head[0].weight is not original.domain_head[0].weight
        assert torch.equal(other.fc.weight, plain["fc.weight"])


# timm's habits, for every model


def test_tags_name_our_weights_and_nothing_else():
    tags = ["breakhis", "breakhis_lomo40", "breakhis_lomo100", "breakhis_lomo200", "breakhis_lomo400"]
    for arch in ("magdg_resnet18", "magerm_resnet18", "maggan_resnet18"):
        packaged = [folder.name for folder in magdg.PACKAGED.glob(f"{arch}.*")]
        names = sorted(timm.list_models(f"{arch}*", include_tags=True))
        assert names == sorted([*packaged, *(f"{arch}.{tag}" for tag in tags)])
        for tag in tags:
            cfg = timm.get_pretrained_cfg(f"{arch}.{tag}")
            assert cfg.hf_hub_id == f"{HUB_NAMESPACE}/{arch}.{tag}"
            assert not cfg.url
            assert not cfg.file
            assert (cfg.num_classes, cfg.label_names) == (2, ("benign", "malignant"))
        assert timm.get_pretrained_cfg(arch).tag == ("virtual" if packaged else "breakhis")
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("magdg_resnet18.a1_in1k")
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model(TINY, pretrained=True)


@pytest.mark.parametrize("name", ["magerm_resnet18", "maggan_resnet18", "magdg_resnet18.breakhis_lomo40"])
def test_weights_that_are_not_published_are_an_error_with_the_ways_on(name):
    with pytest.raises(FileNotFoundError) as raised:
        timm.create_model(name, pretrained=True)
    weights = name if "." in name else f"{name}.breakhis"
    for said in (f"{HUB_NAMESPACE}/{weights}", "HF_HUB_OFFLINE", "magdg push", "MAGDG_HUB_NAMESPACE", "local folder"):
        assert said in str(raised.value)


def test_packaged_weights_load_and_say_what_they_are(plain, tmp_path, monkeypatch, caplog):
    folder = tmp_path / f"{TINY}.virtual"
    folder.mkdir()
    half = {name: value.half() if value.dim() > 1 else value for name, value in plain.items()}
    safetensors.torch.save_file(half, folder / "model.safetensors")
    about = {"tag": "virtual", "num_classes": 2, "input_size": [3, 64, 96], "first_conv": "conv1.0", "crop_pct": 0.5}
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": about}))
    monkeypatch.setattr(magdg, "PACKAGED", tmp_path)
    cfg = magdg._packaged_cfgs()[folder.name]
    model = timm.create_model(TINY, pretrained=True, pretrained_cfg=cfg | {"tag": "virtual"})
    assert [r.levelname for r in caplog.records].count("WARNING") == 1
    assert (
        f"{TINY}.virtual was trained on virtual slides" in caplog.text and "say nothing about a patient" in caplog.text
    )
    for name, value in plain.items():
        loaded = model.state_dict()[name]
        assert loaded.dtype == value.dtype and torch.equal(loaded, half[name].to(value.dtype))
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 64, 96) and config["crop_pct"] == 0.5
    assert model.pretrained_cfg["pool_size"] == (2, 3)


@pytest.mark.parametrize("name", MODELS)
def test_preprocessing_is_stated(name):
    config = timm.data.resolve_model_data_config(create(name))
    assert config["mean"] == timm.data.IMAGENET_DEFAULT_MEAN
    assert config["std"] == timm.data.IMAGENET_DEFAULT_STD
    assert (config["interpolation"], config["crop_pct"]) == ("bilinear", 0.875)
    size = {TINY: 160, "magdg_resnet18": 64}.get(name, 224)  # the packaged weights are of 64 pixels
    assert config["input_size"] == (3, size, size)


@pytest.mark.parametrize("name", MODELS)
def test_timm_habits(name):
    model = create(name).eval()
    assert isinstance(model, MagDGResNet)
    assert model.num_classes == 2
    x = images(2)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert features.shape[:2] == (2, model.num_features)
    assert pooled.shape == (2, model.head_hidden_size)
    assert torch.equal(model.forward_head(features), model(x))
    assert torch.equal(model.get_classifier()(pooled), model(x))
    last, intermediates = model.forward_intermediates(x)
    assert torch.equal(last, features)
    assert [tuple(i.shape[1:]) for i in intermediates] == [
        (info["num_chs"], 64 // info["reduction"], 64 // info["reduction"]) for info in model.feature_info
    ]
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    assert create(name, num_classes=0, global_pool="")(x).shape == features.shape


def test_tiny_model_is_tiny():
    assert sum(parameter.numel() for parameter in create().parameters()) < 0.5e6


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax"])
def test_domain_head_reads_every_pooling(pool):
    model = create(global_pool=pool, in_chans=1)
    model.set_domain_training(True)
    x = images(channels=1)
    logits, domain_logits = model.train()(x)
    assert logits.shape == (6, 2)
    # the same batch statistics, so the head must see exactly the pooled features
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.equal(domain_logits, model.domain_head(pooled))


def test_another_pooling_gets_a_fresh_domain_head():
    model = create()
    head = model.domain_head
    model.reset_classifier(5)
    assert model.domain_head is head
    model.set_domain_training(True)
    model.reset_classifier(2, "catavgmax")
    assert not model.domain_training
    assert model.domain_head[0].in_features == model.head_hidden_size == 2 * model.num_features
    model.prune_intermediate_layers([2], prune_head=True)
    assert not any(key.startswith("domain_head.") for key in model.state_dict())


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx"])
def test_features_only_has_no_heads(feature_cls):
    features = create(features_only=True, feature_cls=feature_cls, out_indices=(1, 2, 3, 4)).eval()
    assert not any("domain_head" in key for key in features.state_dict())
    out = features(images(2))
    out = list(out.values()) if isinstance(out, dict) else out
    _, expected = create().eval().forward_intermediates(images(2), indices=[1, 2, 3, 4])
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_other_dtype_and_device_reach_the_domain_head():
    model = create(dtype=torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    with torch.device("meta"):
        model = timm.create_model(TINY)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


# One pass for logits and embedding


@pytest.mark.parametrize("name", [TINY, "magdg_resnet18", "test_resnet"])
def test_embed(name):
    model, x = create(name, num_classes=2).eval(), images(2)
    logits, penultimate = embed(model, x)
    assert torch.equal(logits, model(x))
    assert torch.equal(penultimate, model.forward_head(model.forward_features(x), pre_logits=True))
    logits, pyramid = embed(model, x, "pyramid")
    assert torch.equal(logits, model(x))
    stage, stages = model.maxpool(model.act1(model.bn1(model.conv1(x)))), []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        stage = layer(stage)
        stages += [stage.flatten(2).mean(2), stage.flatten(2).max(2).values]
    torch.testing.assert_close(pyramid, torch.cat(stages, 1))
    if name == "magdg_resnet18":
        assert penultimate.shape == (2, 512)
        assert pyramid.shape == (2, 1920)
        assert torch.equal(pyramid[:, 2 * (64 + 128 + 256) : 1920 - 512], penultimate)


def test_embed_is_one_pass_and_ignores_domain_training():
    model = create().train()
    model.set_domain_training(True)
    passes = []
    model.layer4.register_forward_hook(lambda *_: passes.append(1))
    for kind in ("penultimate", "pyramid"):
        logits, _ = embed(model, images(), kind)
        assert logits.shape == (6, 2)
    assert len(passes) == 2
    with pytest.raises(ValueError, match="'penultimate' or 'pyramid'"):
        embed(model, images(), "last")


# Compilation and export


def test_one_compiled_graph_for_every_coefficient():
    counter = CompileCounterWithBackend("aot_eager")
    model = create().train()
    model.set_domain_training(True)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    norms = []
    for coeff in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        model.set_grl_coeff(coeff)
        model.zero_grad()
        compiled(images())[1].square().sum().backward()
        norms.append(model.conv1[0].weight.grad)
    assert counter.frame_count == 1
    assert norms[0].abs().max() == 0
    torch.testing.assert_close(norms[1], 0.2 * norms[-1], rtol=1e-3, atol=1e-6)


def test_torch_export_holds_no_domain_head():
    model = create().eval()
    model.set_domain_training(True)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (images(2),), dynamic_shapes=({0: batch},))
    used = {node.target for node in program.graph.nodes if node.op == "placeholder" and node.users}
    assert not any("domain_head" in name for name in used)
    torch.testing.assert_close(program.module()(images(5)), model(images(5)))


def test_onnx_export_in_onnxruntime(tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = create().eval()
    model.set_domain_training(True)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(
        model, (images(2),), path, dynamo=True, external_data=False, dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    assert not any("domain_head" in tensor.name for tensor in onnx.load(path).graph.initializer)
    session = onnxruntime.InferenceSession(path)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images(5).numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images(5)).detach(), rtol=1e-4, atol=1e-5)


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
