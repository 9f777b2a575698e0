"""Weights to start from: what `--init` means, by architecture, and what is said where they cannot be had."""

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from hub_client import run_client
from hub_server import HubServer

from magdg.options import Parser, add_training_arguments, grid_settings
from magdg.sources import add_data_argument
from magnification_invariant.lomo.cell import Cell
from magnification_invariant.lomo.grid import make_grid
from magnification_invariant.model_folder import Start, find_start, load_start
from magnification_invariant.tasks import get_task

WEIGHTS = Path(__file__).parents[2] / "shared" / "weights"


@pytest.fixture
def folder(tmp_path):
    """A model as timm saves one, with a mean and std of its own."""
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=7)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}
    timm.models.save_for_hf(model, tmp_path / "start", safe_serialization=True)
    return tmp_path / "start"


def test_a_folder_gives_backbone_and_normalisation_but_no_head(folder):
    model = timm.create_model("test_magdg_resnet", num_classes=7, num_domains=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    record = load_start(model, find_start("test_magdg_resnet", str(folder)))
    given = safetensors.torch.load_file(folder / "model.safetensors")
    heads = {name for name in before if name.startswith(("fc.", "domain_head."))}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in heads else given[name]), name
    assert model.pretrained_cfg["mean"] == (0.4, 0.5, 0.6) and model.pretrained_cfg["std"] == (0.1, 0.2, 0.3)
    assert record["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert record["source"] == str(folder) and record["patients"] is None


def test_a_place_as_architecture_is_its_own_imagenet_start(folder):
    start = find_start(f"local-dir:{folder}", "imagenet")
    assert start.file == folder / "model.safetensors" and start.timm_name is None
    assert find_start(f"local-dir:{folder}", "none") is None


def test_imagenet_is_the_default_but_on_virtual_slides():
    def started(*argv, methods=("erm", "frozen")):
        parser = Parser()
        add_data_argument(parser)
        add_training_arguments(parser)
        cells = make_grid(methods, [200], [0], [0], **grid_settings(parser.parse_args(argv), list(methods)))
        return {cell.method: cell.init for cell in cells if cell.method in methods}

    assert started() == {"erm": "none", "frozen": "imagenet"}
    assert started("--data", "virtual:n_patients=9") == {"erm": "none", "frozen": "imagenet"}
    assert started("--data", "BreaKHis_v1") == {"erm": "imagenet", "frozen": "imagenet"}
    assert started("--data", "BreaKHis_v1", "--init", "none") == {"erm": "none", "frozen": "none"}
    assert Cell("erm", 200, init="imagenet").name == "erm-imagenet-lomo200-fold0-seed0"
    assert Cell("frozen", 200).name == "frozen-lomo200-fold0-seed0"


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "magdg_resnet18"])
def test_timms_own_weights_give_timms_own_features(name, tmp_path):
    """Through timm's loader: at another input size, with the head that is asked for, and a domain head."""
    plain = "resnet18" if name.startswith("mag") else name
    donor = timm.create_model(plain)
    safetensors.torch.save_file(dict(donor.state_dict()), tmp_path / "model.safetensors")
    model = get_task("dann").create_model(name, num_classes=2, num_domains=3, image_size=96).eval()
    cfg = timm.get_pretrained_cfg(plain).to_dict()
    record = load_start(model, Start("hub", tmp_path / "model.safetensors", plain, pretrained_cfg=cfg))
    if hasattr(donor, "set_input_size"):
        donor.set_input_size(img_size=(96, 96))
    x = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(model.forward_features(x), donor.eval().forward_features(x))
    assert model.pretrained_cfg["mean"] == cfg["mean"] and record["license"] == "apache-2.0"


def test_an_architecture_without_weights_says_the_ways_on(monkeypatch):
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: None)
    with pytest.raises(ValueError, match=r"no weights of resnet18.*--init PLACE.*--init none"):
        find_start("magdg_resnet18", "imagenet")


LOMO = """
import json
import safetensors.torch
import torch
from magdg import main
from magnification_invariant import load_virtual_slides
from magnification_invariant.records import Run

load_virtual_slides(8, images_per_magnification=1, size=(96, 64)).to_parquet("slides.parquet")
status = main(
    "lomo --data slides.parquet --domain-column magnification --group-column patient --methods erm dann --held-out 200 "
    "--folds 0 --n-folds 4 --model test_magdg_resnet --image-size 32 --batch-size 8 --epochs 1 --learning-rate 1e-9 "
    "--ema-decay 0 --output-dir runs".split()
)
"""

STARTED = """
assert status == 0, status
given = safetensors.torch.load_file("donor/model.safetensors")
for folder in Path("runs").glob("[!.]*-imagenet-*"):
    run = Run(folder)
    trained = safetensors.torch.load_file(run.model / "model.safetensors")["layer2.0.conv1.weight"]
    assert torch.allclose(trained.float(), given["layer2.0.conv1.weight"], atol=1e-6)
    print("START", json.dumps(run.config["start"]))
"""


@pytest.mark.slow
def test_imagenet_weights_come_from_the_hub_before_anything_is_trained(tmp_path):
    """`magdg lomo` on a table of its own, as a user types it: offline first, then with the Hub."""
    timm.models.save_for_hf(timm.create_model("test_resnet"), tmp_path / "donor", safe_serialization=True)
    with HubServer() as hub:
        files = {path.name: path.read_bytes() for path in (tmp_path / "donor").iterdir()}
        hub.create("timm/test_resnet.r160_in1k", files)
        printed = run_client(hub, tmp_path, LOMO + "assert status == 2, status", HF_HUB_OFFLINE="1")
        assert "the ImageNet weights timm/test_resnet.r160_in1k cannot be had" in printed
        assert "HF_ENDPOINT" in printed and "--init PLACE" in printed and "--init none" in printed
        assert not list(tmp_path.glob("runs/*/config.json"))
        printed = run_client(hub, tmp_path, LOMO + STARTED)
    starts = [json.loads(line.removeprefix("START ")) for line in printed.splitlines() if line.startswith("START")]
    assert [start["source"] for start in starts] == ["timm/test_resnet.r160_in1k"] * 2
    assert {start["sha256"] for start in starts} == {hashlib.sha256(files["model.safetensors"]).hexdigest()}


@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="the ImageNet weights are not beside the repository")
@pytest.mark.parametrize("name", ["densenet121_imagenet", "tf_efficientnet_lite0_imagenet"])
def test_real_imagenet_weights_say_what_they_said(name):
    """Features of a started model are timm's own, with the mean and std of the weights' config."""
    arch = f"local-dir:{WEIGHTS / name}"
    model = timm.create_model(arch, num_classes=2).eval()
    load_start(model, find_start(arch, "imagenet"))
    own = timm.create_model(arch, pretrained=True).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model.forward_features(x), own.forward_features(x))
    assert tuple(model.pretrained_cfg["mean"]) == tuple(own.pretrained_cfg["mean"])
