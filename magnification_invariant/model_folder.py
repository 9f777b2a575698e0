"""One model's folder, in the layout of its Hub repository: a plain timm model and what is to be known about it."""

import hashlib
import json
import shutil
from pathlib import Path

import safetensors.torch
import timm
import torch
from PIL import Image

from magnification_invariant.data.virtual_slides import render_field, virtual_field
from magnification_invariant.hub_files import resolve
from magnification_invariant.models import plain_architecture

CARD = """---
library_name: timm
pipeline_tag: image-classification
license: apache-2.0
tags: [timm, image-classification, histopathology, domain-generalization]
---
# {name}

{text}

```python
import timm

model = timm.create_model("local-dir:.", pretrained=True).eval()  # or "hf-hub:" and the repository's id
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image).unsqueeze(0))  # classes: {labels}
probability = (logits / {temperature:.4g}).softmax(-1)  # the temperature was fitted on validation patients
```

The network expects the whole field of an image resized to {size} pixels; it was trained on {mpp_low:.3g} to
{mpp_high:.3g} micrometres per pixel at its input. It is for research: it must not be used for diagnosis.
"""


def plain_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights without the domain head, which is a training device and is not released."""
    return {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if not k.startswith("domain_head.")}


def write_model_folder(
    folder: Path,
    model: torch.nn.Module,
    *,
    name: str,
    label_names: list[str],
    data_config: dict,
    about: dict,
    text: str = "",
) -> Path:
    """Write `folder`: config, weights, a card, and a fixture to prove a copy by. Bare timm loads it by ``local-dir:``.

    The fixture is an image of virtual tissue (``fixture.png``) with the logits that the written files give for it
    (``fixture.json``).

    Args:
        name: architecture and tag, ``magdg_resnet18.breakhis_lomo200``.
        data_config: timm's input_size, mean, std, interpolation, crop_pct.
        about: further keys of ``config.json``: temperature, mpp_range, mpp_source, seen, ...
        text: what the card says of the model.

    An older folder of that name is replaced when the new one is complete.
    """
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    config = {
        "architecture": plain_architecture(model),
        "num_classes": len(label_names),
        "num_features": model.num_features,
        "global_pool": model.global_pool.pool_type,
        "label_names": label_names,
        # No "model_args": transformers' timm wrapper would be handed num_classes twice.
        "pretrained_cfg": {
            "tag": name.partition(".")[2],
            "num_classes": len(label_names),
            "first_conv": "conv1",
            "classifier": "fc",
            "license": "apache-2.0",
            "label_names": label_names,
            **data_config,
        },
        "name": name,
        **about,
    }
    (unfinished / "config.json").write_text(json.dumps(config, indent=2))
    safetensors.torch.save_file(plain_state_dict(model), unfinished / "model.safetensors", {"format": "pt"})
    size = int(data_config["input_size"][-1] / data_config["crop_pct"])
    low, high = about.get("mpp_range", (1.0, 1.0))  # where the scale is not known, any will do for the fixture
    card = CARD.format(
        name=name,
        text=text,
        labels=", ".join(label_names),
        temperature=about["temperature"],
        size=size,
        mpp_low=low,
        mpp_high=high,
    )
    (unfinished / "README.md").write_text(card)
    _write_fixture(unfinished, size, (low * high) ** 0.5)
    shutil.rmtree(folder, ignore_errors=True)
    return unfinished.rename(folder)


def _write_fixture(folder: Path, height: int, mpp: float) -> None:
    image = Image.fromarray(render_field(0, mpp, virtual_field(0, 100, 0), (round(1.5 * height), height)))
    image.save(folder / "fixture.png")
    content = {"image": "fixture.png", "mpp": mpp, "logits": logits_of(folder, image)}
    (folder / "fixture.json").write_text(json.dumps(content, indent=2))


def logits_of(folder: Path, image: Image.Image) -> list[float]:
    """What the model in `folder` says of an image, by nothing but timm: its loader and its transform."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        return model(transform(image.convert("RGB")).unsqueeze(0))[0].tolist()


def read_model_config(repo_or_folder: str) -> dict:
    """``config.json`` of a model folder or Hub repository."""
    return json.loads(resolve(repo_or_folder, "config.json").read_text())


def load_backbone(model: torch.nn.Module, source: str) -> dict:
    """Start `model` from the backbone of other weights; its heads keep their own initialisation.

    Args:
        source: a ``.safetensors`` file, or a folder or Hub repository with ``model.safetensors``.

    Returns:
        Where the weights come from: ``source``, ``sha256``, and the ``patients`` and ``magnifications`` that they have
        seen (None where the source does not say).

    Raises:
        ValueError: the file lacks a tensor of the backbone or has one of another shape.
    """
    is_file = source.endswith(".safetensors")
    path = Path(source).expanduser() if is_file else resolve(source, "model.safetensors")
    heads = ("fc.", "domain_head.")
    given = {k: v for k, v in safetensors.torch.load_file(path).items() if not k.startswith(heads)}
    wanted = {k: v for k, v in model.state_dict().items() if not k.startswith(heads)}
    wrong = sorted(k for k in wanted if k not in given or given[k].shape != wanted[k].shape)
    if wrong or given.keys() - wanted.keys():
        raise ValueError(
            f"{path} does not hold the backbone of {type(model).__name__}: missing or of another shape "
            f"{wrong[:5]}, not part of it {sorted(given.keys() - wanted.keys())[:5]}"
        )
    model.load_state_dict(given, strict=False)
    seen = {} if is_file else read_model_config(source).get("seen", {})
    return {
        "source": source,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "patients": seen.get("patients"),
        "magnifications": seen.get("magnifications"),
    }
