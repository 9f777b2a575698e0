"""Whether a model does on this machine what it did when it was saved, and what it expects of an image."""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from magnification_invariant.files import read_json
from magnification_invariant.hub_files import resolve, snapshot
from magnification_invariant.model_folder import damage_of, load_model, logits_of, open_model
from magnification_invariant.scope import FILE as SCOPE_FILE
from magnification_invariant.scope import Scope
from magnification_invariant.signatures import SignatureProjector, weights_digest

TOLERANCE = 1e-3  # logits of one float32 network on other processors and versions differ by 1e-5 or so
PACKAGES = ("magnification-invariant", "torch", "timm", "safetensors", "numpy", "pillow", "huggingface-hub")


@dataclass(frozen=True)
class Report:
    """What `examine` measured.

    Attributes:
        name: Of the weights.
        expects: What the model states, a line each.
        recorded: Logits of the fixture image when the model was saved.
        measured: Its logits now.
        versions: Of this machine.
    """

    name: str
    expects: dict[str, str]
    recorded: list[float]
    measured: list[float]
    versions: dict[str, str]

    @property
    def difference(self) -> float:
        """Largest difference of a logit; infinity where there are not as many."""
        if len(self.recorded) != len(self.measured):
            return float("inf")
        return float(np.abs(np.subtract(self.recorded, self.measured)).max())

    @property
    def healthy(self) -> bool:
        """Whether the logits are what was recorded, but for rounding."""
        return self.difference <= TOLERANCE  # also false of NaN

    def __str__(self) -> str:
        same = "equal bit for bit" if self.difference == 0 else f"largest difference {self.difference:.2g}"
        verdict = f"OK: the fixture's logits are as recorded ({same})"
        if not self.healthy:
            verdict = (
                f"NOT what was saved: the fixture's logits are {self.measured}, recorded are {self.recorded} ({same}); "
                "the weights, or what this machine computes with them, are others"
            )
        lines = [self.name, *(f"  {key}: {value}" for key, value in self.expects.items())]
        lines += ["this machine: " + ", ".join(f"{key} {value}" for key, value in self.versions.items()), verdict]
        return "\n".join(lines)


def check_files(folder: Path) -> dict[str, Any]:
    """Reads every file of a model's folder that a prediction reads, and returns its config.

    Raises:
        ValueError: One is a git-lfs pointer, cut, empty, or belongs to another model: names it, and the way on.
        FileNotFoundError: One is missing.
    """
    _read(folder, "config.json", read_json)
    _, config = open_model(str(folder))
    model = load_model(folder, config)
    if any((folder / f"signature.{kind}").exists() for kind in ("json", "safetensors")):
        _read(folder, "signature.json", read_json)
        projector = _read(folder, "signature.safetensors", lambda file: SignatureProjector.from_pretrained(folder))
        _read(folder, "signature.safetensors", lambda file: projector.as_module(model), "is another model's")
    if (folder / SCOPE_FILE).exists():
        scope = _read(folder, SCOPE_FILE, lambda file: Scope.from_pretrained(folder))
        if scope.weights_sha256 != weights_digest(model):
            raise ValueError(f"{folder / SCOPE_FILE} is another model's: fetch it again (git lfs pull, or magdg pull)")
    for file, read in {"results.json": read_json, "predictions.parquet": pq.read_table}.items():
        if (folder / file).exists():
            _read(folder, file, read)
    return config


def _read(folder: Path, name: str, read: Callable[[Path], Any], wrong: str | None = None) -> Any:
    file = resolve(str(folder), name)
    try:
        return read(file)
    except Exception as error:  # every format has errors of its own
        why = f"{wrong or damage_of(file)} ({' '.join(str(error).split())})"
        raise ValueError(f"{file} {why}: fetch it again (git lfs pull, or magdg pull)") from error


def examine(repo_or_folder: str) -> Report:
    """Check a model's or run's folder, or a Hub repository: every file, and its weights by the fixture image.

    Raises:
        ValueError: A file is damaged, or states what no model of ours does: names it.
        FileNotFoundError: A file is missing, or the repository cannot be reached.
    """
    folder = snapshot(repo_or_folder)
    config = check_files(folder)
    fixture = _read(folder, "fixture.json", read_json)
    image = _read(folder, "fixture.png", lambda file: Image.open(file).convert("RGB"))
    pretrained = config["pretrained_cfg"]
    scales = {
        "um/px at which training images filled the input": config.get("base_range"),
        "um/px shown in training": config.get("mpp_range"),
    }
    expects = {
        "classes": ", ".join(config["label_names"]),
        **{name: "{:.3g} to {:.3g}".format(*ends) if ends else "not stated" for name, ends in scales.items()},
        "input": f"{pretrained['input_size'][-1]} px, {pretrained['interpolation']}, crop {pretrained['crop_pct']}",
        "normalisation": f"mean {pretrained['mean']}, std {pretrained['std']}",
        "temperature": f"{config['temperature']:.4g}",
    }
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return Report(config["name"], expects, fixture["logits"], logits_of(folder, image), versions | {"on": device})
