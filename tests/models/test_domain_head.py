"""The domain head: the gradients of its one forward, its own random stream, and what it refuses."""

import copy
import pickle

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from magnification_invariant.models import add_domain_head, embed, forward_domains, forward_heads, pooled_features

TINY = "test_magdg_resnet"
BACKBONES = {
    "resnet18": {"zero_init_last": False},  # else most gradients are 0
    "densenet121": {},
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"img_size": 32},
}
Y, D = torch.tensor([0, 1] * 3), torch.tensor([0, 1, 2] * 2)


def create(name=TINY, seed=0, num_domains=3, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(
        name, **{"num_classes": 2} | kwargs | ({"num_domains": num_domains} if num_domains else {})
    )


def images(n=6, size=32, dtype=torch.float32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def without_head(weights):
    return {name: value for name, value in weights.items() if not name.startswith("domain_head.")}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def gradients(model, loss):
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


@pytest.mark.parametrize("name", [TINY, *BACKBONES])
def test_gradients_are_the_two_losses_put_together(name):
    """Encoder: class - coeff x domain. Class head: class. Domain head: +domain, so that it learns. On any backbone."""
    if name == TINY:
        model = create(zero_init_last=False, global_pool="catavgmax")
        model.set_grad_checkpointing()
    else:
        model = add_domain_head(create(name, num_domains=0, **BACKBONES[name]), 3)
    model, x = model.double().train(), images(dtype=torch.float64)
    classifier = f"{model.pretrained_cfg['classifier']}."

    z = model.forward_head(model.forward_features(x), pre_logits=True)
    by_class = gradients(model, F.cross_entropy(model.get_classifier()(z), Y))
    z = model.forward_head(model.forward_features(x), pre_logits=True)
    head = model.domain_head
    by_domain = gradients(model, F.cross_entropy(F.linear(F.relu(head[0](z)), head[2].weight, head[2].bias), D))

    for coeff in (0.0, 0.25):
        logits, domain_logits = forward_domains(model, x, torch.tensor(coeff))
        step = gradients(model, F.cross_entropy(logits, Y) + F.cross_entropy(domain_logits, D))
        for parameter, gradient in step.items():
            if parameter.startswith("domain_head."):
                wanted = by_domain[parameter]
                assert by_class[parameter] is None and wanted.abs().max() > 0
            elif parameter.startswith(classifier):
                wanted = by_class[parameter]
                assert by_domain[parameter] is None and wanted.abs().max() > 0
            else:
                wanted = by_class[parameter] - coeff * by_domain[parameter]
            torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-12, msg=parameter)
    assert max(gradient.abs().max() for gradient in without_head(by_domain).values() if gradient is not None) > 1e-4


def test_a_shift_is_added_behind_the_reversal():
    model, shift = create().double().eval(), torch.randn(6, 96, dtype=torch.float64, requires_grad=True)
    z = pooled_features(model, images(dtype=torch.float64)).detach().requires_grad_()
    logits, domain_logits = forward_heads(model, z, torch.tensor(0.3), shift)
    assert torch.equal(logits, model.fc(z)) and torch.equal(domain_logits, model.domain_head(z + shift))
    reverse, plain = torch.autograd.grad(domain_logits.square().sum(), (z, shift))
    torch.testing.assert_close(reverse, -0.3 * plain)


def test_class_logits_are_those_of_the_model_bit_for_bit():
    model, x = create(drop_rate=0.5, num_domains=5).train(), images()
    torch.manual_seed(7)
    plain = model(x)
    torch.manual_seed(7)
    logits, domain_logits = forward_domains(model, x, torch.tensor(1.0))
    assert plain.shape == (6, 2) and torch.equal(logits, plain)
    assert domain_logits.shape == (6, 5) and (domain_logits < 0).any()  # neither rectified nor probabilities
    assert torch.equal(embed(model.eval(), x)[0], model(x))


def test_at_coefficient_zero_backbone_and_classifier_train_as_by_supervision_alone():
    """Three optimizer steps, equal to the bit; the domain head moves all the same."""
    trained = []
    for num_domains in (3, 0):
        model = create(num_domains=num_domains).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            if num_domains:
                logits, domain_logits = forward_domains(model, images(), torch.tensor(0.0))
                loss = F.cross_entropy(logits, Y) + F.cross_entropy(domain_logits, D)
            else:
                loss = F.cross_entropy(model(images()), Y)
            loss.backward()
            assert all(parameter.grad is not None for parameter in model.parameters())  # a static graph
            optimizer.step()
        trained.append(model.state_dict())
    assert equal(without_head(trained[0]), trained[1])
    assert not torch.equal(trained[0]["domain_head.2.weight"], create().domain_head[2].weight)


def test_the_head_draws_from_a_stream_of_its_own():
    torch.manual_seed(3)
    plain = timm.create_model("resnet18", num_classes=2)
    state = torch.get_rng_state()
    ours = create("magdg_resnet18", seed=3)
    assert torch.equal(torch.get_rng_state(), state) and equal(without_head(ours.state_dict()), plain.state_dict())
    head = ours.domain_head
    assert [type(layer) for layer in head] == [torch.nn.Linear, torch.nn.ReLU, torch.nn.Linear]
    assert (head[0].in_features, head[0].out_features, head[2].out_features) == (512, 256, 3)
    assert not head[1].inplace  # it would write into a view that a custom backward pass stands behind

    torch.manual_seed(0)
    first, second = (timm.create_model(TINY, num_domains=3).domain_head[0].weight for _ in range(2))
    assert torch.equal(first, create(seed=0).domain_head[0].weight)
    assert not torch.equal(first, create(seed=1).domain_head[0].weight) and not torch.equal(first, second)
    assert 0.99 * 96**-0.5 < first.abs().max() <= 96**-0.5  # PyTorch's default for a linear layer


def test_what_has_no_pooled_features_or_no_two_domains_is_refused():
    for num_domains in (-1, 0, 1):
        with pytest.raises(ValueError, match=f"at least two training domains to tell apart, not {num_domains}"):
            add_domain_head(create(num_domains=0), num_domains)
    with pytest.raises(ValueError, match="at least two training domains"):
        create(num_domains=1)
    for name, kwargs in (
        (TINY, {"num_classes": 0, "global_pool": ""}),
        (TINY, {"features_only": True}),
        ("test_vit", {"global_pool": ""}),  # logits of every token
        ("deit_tiny_distilled_patch16_224", {}),  # two classifiers
        ("dpn68", {}),  # a convolution
    ):
        with pytest.raises(ValueError, match="pooled features and one linear classifier"), torch.device("meta"):
            add_domain_head(timm.create_model(name, **{"num_classes": 2} | kwargs), 3)


def test_dtype_device_and_mode_reach_the_head():
    assert {parameter.dtype for parameter in create(dtype=torch.float64).parameters()} == {torch.float64}
    with torch.device("meta"):
        model = create()
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    assert not add_domain_head(create(num_domains=0).eval(), 3).domain_head.training


def test_weights_load_with_and_without_a_domain_head(tmp_path):
    """Through load_state_dict, checkpoint_path and safetensors, in both directions; the given dict is left alone."""
    full = create(seed=5).state_dict()
    for given in (full, without_head(full)):
        path = str(tmp_path / f"{len(given)}.safetensors")
        safetensors.torch.save_file(given, path)
        for num_domains in (0, 3):
            wanted = full if num_domains and given is full else without_head(full)
            names = set(given)
            direct, loaded, wrapped = (create(num_domains=num_domains) for _ in range(3))
            direct.load_state_dict(given)
            safetensors.torch.load_model(loaded, path)
            torch.nn.Sequential(wrapped).load_state_dict({f"0.{name}": value for name, value in given.items()})
            checkpoint = create(num_domains=num_domains, checkpoint_path=path)
            copied, pickled = copy.deepcopy(create(num_domains=num_domains)), pickle.loads(pickle.dumps(loaded))
            copied.load_state_dict(given)
            for model in (direct, loaded, wrapped, checkpoint, copied, pickled):
                weights = model.state_dict()
                assert equal({name: weights[name] for name in wanted}, wanted)
                assert num_domains or equal(weights, wanted)
            assert set(given) == names
    stock = add_domain_head(create("test_resnet", num_domains=0), 3)
    stock.load_state_dict(without_head(full))
    assert torch.equal(stock.fc.weight, full["fc.weight"])


def test_the_load_hook_leaves_the_rest_to_strict():
    full = create(seed=5).state_dict()
    part = {k: v for k, v in full.items() if k.startswith(("conv1.", "fc.")) or k == "domain_head.0.bias"}
    missing = create().load_state_dict(part, strict=False).missing_keys
    assert {"layer1.0.conv1.weight", "domain_head.2.weight"} <= set(missing)  # half a head is not a head
    with pytest.raises(RuntimeError, match=r"Missing key\(s\)"):
        create().load_state_dict(part)
    with pytest.raises(RuntimeError, match=r"size mismatch for domain_head\.2\.weight"):
        create(num_domains=5).load_state_dict(full)
    typo = create(num_domains=0).load_state_dict({"typo": torch.zeros(1)}, strict=False)
    assert typo.unexpected_keys == ["typo"]


@pytest.mark.slow
def test_one_compiled_graph_for_every_coefficient():
    counter = CompileCounterWithBackend("aot_eager")
    model, norms = create().train(), []
    compiled = torch.compile(forward_domains, backend=counter, fullgraph=True)
    for coeff in (0.0, 0.2, 0.4, 1.0):
        model.zero_grad()
        compiled(model, images(), torch.tensor(coeff))[1].square().sum().backward()
        norms.append(model.conv1[0].weight.grad)
    assert counter.frame_count == 1
    assert norms[0].abs().max() == 0
    torch.testing.assert_close(norms[1], 0.2 * norms[-1], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_exported_graphs_do_not_hold_the_head(tmp_path):
    model, batch = create().eval(), torch.export.Dim("batch")
    program = torch.export.export(model, (images(2),), dynamic_shapes=({0: batch},))
    used = {node.target for node in program.graph.nodes if node.op == "placeholder" and node.users}
    assert not any("domain_head" in name for name in used)
    torch.testing.assert_close(program.module()(images(5)), model(images(5)))

    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (images(2),), path, dynamo=True, external_data=False, dynamic_shapes=({0: batch},))
    assert not any("domain_head" in tensor.name for tensor in onnx.load(path).graph.initializer)
    session = onnxruntime.InferenceSession(path)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images(5).numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images(5)).detach(), rtol=1e-4, atol=1e-5)
