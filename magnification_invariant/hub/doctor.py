"""Whether a model does on this machine what it did when it was saved, and what it expects of an image."""

import json
import platform
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
from PIL import Image

from magnification_invariant.hub_files import resolve, snapshot
from magnification_invariant.model_folder import logits_of, read_model_config

TOLERANCE = 1e-3  # logits of one float32 network on other processors and versions differ by 1e-5 or so


@dataclass(frozen=True)
class Report:
    """What `examine` found.

    Attributes:
        name: of the weights.
        expects: what the model states, a line each.
        recorded: logits of the fixture image when the model was saved.
        found: its logits now.
        versions: of this machine.
    """

    name: str
    expects: dict[str, str]
    recorded: list[float]
    found: list[float]
    versions: dict[str, str]

    @property
    def difference(self) -> float:
        """Largest difference of a logit; infinity where there are not as many."""
        if len(self.recorded) != len(self.found):
            return float("inf")
        return float(np.abs(np.subtract(self.recorded, self.found)).max())

    @property
    def healthy(self) -> bool:
        return self.difference <= TOLERANCE  # also false of NaN

    def __str__(self) -> str:
        same = "equal bit for bit" if self.difference == 0 else f"largest difference {self.difference:.2g}"
        verdict = f"OK: the fixture's logits are as recorded ({same})"
        if not self.healthy:
            verdict = (
                f"NOT what was saved: the fixture's logits are {self.found}, recorded are {self.recorded} ({same}); "
                "the weights, or what this machine computes with them, are others"
            )
        lines = [self.name, *(f"  {key}: {value}" for key, value in self.expects.items())]
        lines += ["this machine: " + ", ".join(f"{key} {value}" for key, value in self.versions.items()), verdict]
        return "\n".join(lines)


def examine(repo_or_folder: str) -> Report:
    """Check a model folder or Hub repository: its config's values, its weights by the fixture image.

    Raises:
        ValueError: the config states what no model of ours does.
        FileNotFoundError: a file is missing, or the repository cannot be reached.
    """
    folder = snapshot(repo_or_folder)
    config = read_model_config(str(folder))
    fixture = json.loads(resolve(str(folder), "fixture.json").read_text())
    resolve(str(folder), "model.safetensors")  # or timm would look for weights in formats that can run code
    with Image.open(resolve(str(folder), "fixture.png")) as image:
        found = logits_of(folder, image)
    pretrained = config["pretrained_cfg"]
    low, high = config.get("mpp_range", (None, None))
    expects = {
        "classes": ", ".join(config["label_names"]),
        "micrometres per pixel at the input": f"{low:.3g} to {high:.3g}" if low else "not stated",
        "input": f"{pretrained['input_size'][-1]} px, {pretrained['interpolation']}, crop {pretrained['crop_pct']}",
        "normalisation": f"mean {pretrained['mean']}, std {pretrained['std']}",
        "temperature": f"{config.get('temperature', 1):.4g}",
    }
    packages = ("magnification-invariant", "torch", "timm", "safetensors", "numpy", "pillow", "huggingface-hub")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return Report(config.get("name", repo_or_folder), expects, fixture["logits"], found, versions | {"on": device})
