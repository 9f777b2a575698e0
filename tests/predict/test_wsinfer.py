"""What WSInfer's QuPath extension reads: the zoo's config, and a model whose softmax is our probability."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from magdg import main
from magnification_invariant.models import PACKAGED
from magnification_invariant.predict import Classifier
from magnification_invariant.predict.wsinfer import export_wsinfer
from magnification_invariant.virtual_slides import render_field, virtual_field

PACKAGED_MODEL = PACKAGED / "magdg_resnet18.virtual"
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")


def test_the_config_is_the_zoo_s_and_the_model_says_what_predict_does(tmp_path):
    """By the default model: pixels as the extension prepares them (transform in the config), softmax behind."""
    folder = export_wsinfer(PACKAGED_MODEL, tmp_path / "out")
    assert {file.name for file in folder.iterdir()} == {"config.json", "torchscript_model.pt"}
    config, classifier = json.loads((folder / "config.json").read_text()), Classifier.from_pretrained(PACKAGED_MODEL)
    names = "spec_version architecture num_classes class_names patch_size_pixels spacing_um_px transform"
    assert list(config) == names.split() and config["spec_version"] == "1.0"
    assert (config["num_classes"], config["class_names"]) == (2, ["benign", "malignant"])
    assert config["spacing_um_px"] == pytest.approx(math.sqrt(math.prod(classifier.base_range)))

    at, size = config["spacing_um_px"], config["patch_size_pixels"]
    pixels = np.asarray(render_field(0, at, virtual_field(0, 100, 0), (size, size)))
    resize, to_tensor, normalize = config["transform"]
    assert (resize, to_tensor) == ({"name": "Resize", "arguments": {"size": size}}, {"name": "ToTensor"})
    mean, std = (torch.tensor(normalize["arguments"][name]).view(3, 1, 1) for name in ("mean", "std"))
    image = (torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 - mean) / std
    model = torch.jit.load(str(folder / "torchscript_model.pt"))
    probability = model(torch.stack([image, image.flip(2)])).softmax(1)[0, 1].item()  # any batch
    (row,) = classifier.predict([Image.fromarray(pixels)], at, view=at)
    assert probability == pytest.approx(row["probability"], abs=1e-5)


def test_by_command(tmp_path, capsys):
    assert main(["export", str(PACKAGED_MODEL), "--to", "wsinfer", "--out", str(tmp_path / "w"), "--at", "0.5"]) == 0
    assert json.loads((tmp_path / "w" / "config.json").read_text())["spacing_um_px"] == 0.5
    assert main(["export", str(PACKAGED_MODEL), "--to", "wsinfer"]) == 2
    assert "--out FOLDER" in capsys.readouterr().err
    assert main(["export", str(PACKAGED_MODEL), "--to", "wsinfer", "--out", str(tmp_path), "--at", "500"]) == 2
    assert main(["export", str(PACKAGED_MODEL), "--out", str(tmp_path), "--at", "0.5"]) == 2
