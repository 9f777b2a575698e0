"""A model for WSInfer and its QuPath extension: ``torchscript_model.pt`` and the ``config.json`` of its model zoo."""

import warnings
from pathlib import Path

import torch

from magnification_invariant.files import whole, write_json
from magnification_invariant.models import normalisation
from magnification_invariant.predict.classifier import Classifier
from magnification_invariant.predict.slides import default_scale

MODEL_FILE = "torchscript_model.pt"


class Calibrated(torch.nn.Module):
    """Logits over temperature, so that the softmax taken behind them gives calibrated probabilities."""

    def __init__(self, model: torch.nn.Module, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Of normalised images (b, 3, size, size), (b, classes)."""
        return self.model(images) / self.temperature


def export_wsinfer(repo_or_folder: str | Path, out: str | Path, at: float | None = None) -> Path:
    """Writes a folder that WSInfer's QuPath extension opens as a model of one's own.

    A tile is what `Classifier.predict_slide` shows: the network's input at `at`; only who reads the pixels differs. The
    signature and the flag for what is out of scope do not go along.

    Args:
        repo_or_folder: see `Classifier.from_pretrained`.
        out: the folder.
        at: um/px of the tiles; by default as for slides, the geometric middle of the model's `base_range`.

    Returns:
        The folder.

    Raises:
        ValueError: the model knows no scale, and none is given.
    """
    classifier = Classifier.from_pretrained(repo_or_folder, device="cpu")
    network, size = classifier.network, classifier.size
    assert network is not None  # of the backend torch
    mean, std = normalisation(network.model)
    config = {
        "spec_version": "1.0",
        "architecture": classifier.config["architecture"],
        "num_classes": len(classifier.labels),
        "class_names": list(classifier.labels),
        "patch_size_pixels": size,
        "spacing_um_px": default_scale(classifier) if at is None else at,
        "transform": [
            {"name": "Resize", "arguments": {"size": size}},
            {"name": "ToTensor"},
            {"name": "Normalize", "arguments": {"mean": list(mean), "std": list(std)}},
        ],
    }
    model = Calibrated(network.model.to(memory_format=torch.contiguous_format), classifier.temperature).eval()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), whole(out / MODEL_FILE) as unfinished:
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and what the extension reads
        traced = torch.jit.trace(model, torch.zeros(1, 3, size, size))
        torch.jit.save(torch.jit.freeze(traced), str(unfinished))
    write_json(out / "config.json", config)
    return out
