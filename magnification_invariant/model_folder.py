"""One model's folder, in the layout of its Hub repository: a plain timm model and what is to be known about it."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from PIL import Image

from magnification_invariant.data.published import slides
from magnification_invariant.files import read_json, whole
from magnification_invariant.hub_files import resolve, snapshot
from magnification_invariant.models import VECTOR_MODELS, create_network, plain_architecture
from magnification_invariant.models.domain_head import PREFIX
from magnification_invariant.models.magdg import head_prefixes
from magnification_invariant.virtual_slides import YEAR, render_field, virtual_field

WANTED = ("name", "architecture", "num_classes", "label_names", "temperature", "pretrained_cfg")  # of config.json
FORMAT = 2  # of the folder; 1 had another view of the images, and its numbers are not those of this package


def source_name(ds) -> str:
    """What a table holds: "virtual" slides, "breakhis" (every image is a published one), or "other"."""
    if all(patient.startswith(f"{YEAR}-") for patient in ds["patient"]):
        return "virtual"
    published = {name for slide in slides() for name in slide.names}
    names = (Path(name).stem.partition("@")[0] for name in ds["filename"])  # "@200X" marks a digital zoom
    return "breakhis" if all(name in published for name in names) else "other"


def plain_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights without the domain head, which is a training device and is not released.

    Matrices whose values float16 holds exactly are given so: the file is smaller, and the model the same.
    """

    def stored(value: torch.Tensor) -> torch.Tensor:
        value = value.detach().cpu().contiguous()
        return value.half() if value.ndim > 1 and torch.equal(value.half().float(), value.float()) else value

    return {name: stored(value) for name, value in model.state_dict().items() if not name.startswith(PREFIX)}


def write_model_folder(
    folder: Path,
    model: torch.nn.Module,
    *,
    name: str,
    label_names: list[str],
    image_size: int | None,
    normalisation: tuple,
    about: dict[str, Any],
) -> Path:
    """Write `folder`: config, weights, and a fixture to prove a copy by. Bare timm loads it by ``local-dir:``.

    The fixture is an image of virtual tissue (``fixture.png``) with the logits that the written files give for it
    (``fixture.json``). Bare timm's transform shows the middle tile of the protocol view (see `data.views`).

    Args:
        name: architecture and tag, ``magdg_resnet18.breakhis_lomo200``.
        image_size: side of the network's square input in pixels; None of one that takes vectors: there is no fixture.
        normalisation: mean and std of the pixels.
        about: further keys of ``config.json``: temperature, base_range, mpp_range, mpp_source, seen, trained_on, ...

    An older folder of that name is replaced when the new one is complete.
    """
    arguments = {k: v for k, v in model._model_args.items() if k not in ("num_classes", "num_domains")}
    mean, std = normalisation
    of_pixels = {
        "input_size": [3, image_size, image_size],
        "mean": list(mean),
        "std": list(std),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    pool = getattr(model, "global_pool", None) or getattr(getattr(model, "head", None), "global_pool", "avg")
    config = {
        "architecture": plain_architecture(model),
        "num_classes": len(label_names),
        "num_features": model.num_features,
        "global_pool": getattr(pool, "pool_type", pool),
        "label_names": label_names,
        # Of ours "model_args" stays away: transformers' timm wrapper would be handed num_classes twice.
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": {
            "tag": name.partition(".")[2],
            "num_classes": len(label_names),
            "first_conv": model.pretrained_cfg["first_conv"],
            "classifier": model.pretrained_cfg["classifier"],
            "license": "apache-2.0" if about.get("trained_on") == "virtual" else "other",
            "label_names": label_names,
            **(of_pixels if image_size else {}),
        },
        "name": name,
        "format": FORMAT,
        **about,
    }
    with whole(folder) as unfinished:
        unfinished.mkdir()
        (unfinished / "config.json").write_text(json.dumps(config, indent=2))
        safetensors.torch.save_file(plain_state_dict(model), unfinished / "model.safetensors", {"format": "pt"})
        low, high = about.get("base_range", (1.0, 1.0))  # where the scale is not known, any will do for the fixture
        if image_size:
            _write_fixture(unfinished, image_size, (low * high) ** 0.5)
    return folder


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


def open_model(repo_or_folder: str, revision: str | None = None) -> tuple[Path, dict[str, Any]]:
    """Folder and config of a model that this package wrote, from a folder, a run or the Hub.

    Raises:
        ValueError: It is no such model, or one of version 0.1.
        OSError: There is no such folder or repository.
    """
    config = read_model_config(repo_or_folder, revision)
    if missing := [key for key in WANTED if key not in config]:
        raise ValueError(
            f"{repo_or_folder} is not a model of magnification_invariant: its config.json lacks "
            f"{', '.join(missing)}; load it with timm or transformers"
        )
    if config["architecture"] in VECTOR_MODELS:
        raise ValueError(
            f"{repo_or_folder} classifies embeddings and not images: load it with "
            "magnification_invariant.load_vector_model, and give it vectors"
        )
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{repo_or_folder} was written by version 0.1 of magnification_invariant, which showed images in another "
            "way: its temperature, records and signature do not hold any more. Train it again, or load it with timm"
        )
    return snapshot(repo_or_folder, revision), config


def load_vector_model(repo_or_folder: str, revision: str | None = None) -> torch.nn.Module:
    """A classifier of vectors, which a run on embeddings left in its ``model/``, in eval mode.

    Raises:
        ValueError: It classifies images, or its weights are damaged.
        OSError: There is no such folder or repository.
    """
    config = read_model_config(repo_or_folder, revision)
    if config.get("architecture") not in VECTOR_MODELS:
        raise ValueError(f"{repo_or_folder} classifies images: load it with timm, or as a Classifier")
    return load_model(snapshot(repo_or_folder, revision), config)


def load_model(folder: Path, config: dict[str, Any]) -> torch.nn.Module:
    """The only loader of a model's weights: what `open_model` gave to the network, in eval mode.

    Raises:
        ValueError: The weights are damaged or of another network: names the file, and the way on.
        OSError: There are none.
    """
    file = resolve(str(folder), "model.safetensors")
    arguments = config.get("model_args", {})
    model = create_network(config["architecture"], num_classes=config["num_classes"], **arguments).eval()
    if hasattr(model, "set_input_size"):  # of networks that are made for one size, such as ViTs
        model.set_input_size(img_size=tuple(config["pretrained_cfg"]["input_size"][1:]))
    of_pixels = {name: config["pretrained_cfg"][name] for name in ("mean", "std") if name in config["pretrained_cfg"]}
    model.pretrained_cfg = {**model.pretrained_cfg, **of_pixels}
    try:
        model.load_state_dict(read_weights(file))
    except RuntimeError as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{file} holds other weights than those of a {config['architecture']} with {config['num_classes']} "
            f"classes, which config.json beside it names ({why}): fetch both again"
        ) from error
    return model


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors file.

    Raises:
        ValueError: It is cut, empty, a git-lfs pointer or no such file at all: names it, and the way on.
    """
    try:
        return safetensors.torch.load_file(file)
    except Exception as error:  # safetensors' own, which is no ValueError
        raise ValueError(f"{file} {damage_of(file)} ({error}): fetch it again (git lfs pull, magdg pull)") from error


def damage_of(file: Path) -> str:
    """What a file is that cannot be read, in words."""
    with open(file, "rb") as opened:
        start = opened.read(64)
    if not start:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer and not the file itself"
    return "is a web page" if start.lstrip()[:1] == b"<" else "is damaged or cut"


def read_model_config(repo_or_folder: str, revision: str | None = None) -> dict:
    """``config.json`` of a model folder or Hub repository. What it states is of the right kind; it may state less.

    Raises:
        ValueError: it names another file or place, asks for code, or has a value of the wrong kind: says which.
    """
    path = resolve(repo_or_folder, "config.json", revision)
    try:
        config = read_json(path)
        wrong = [key for key, value in _flat(config) if key in _CHECKS and not _CHECKS[key](value)]
        wrong += [key for key, value in _flat(config) if key in _LEADING_ELSEWHERE and value]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"config.json of {repo_or_folder} is not a model's: {error}") from error
    if wrong:
        raise ValueError(
            f"config.json of {repo_or_folder} is refused for {', '.join(wrong)}: not a plain model's values"
        )
    return config


def _flat(config: dict) -> list[tuple[str, object]]:
    return [*config.items(), *config.get("pretrained_cfg", {}).items()]


def _numbers(value, n: int, low: float, high: float) -> bool:
    return isinstance(value, list) and len(value) == n and all(_number(v, low, high) for v in value)


def _number(value, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


# What timm's loader would follow to other files or run.
_LEADING_ELSEWHERE = ("file", "url", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "auto_map")
_CHECKS = {
    "architecture": lambda v: re.fullmatch(r"\w+", v) and (v in VECTOR_MODELS or timm.is_model(v)),
    "num_classes": lambda v: _number(v, 1, 10_000),
    "label_names": lambda v: isinstance(v, list) and all(re.fullmatch(r"[\w .,:()+-]{1,80}", label) for label in v),
    "name": lambda v: isinstance(v, str) and re.fullmatch(r"[\w.-]{1,96}", v),
    "trained_on": lambda v: isinstance(v, str) and re.fullmatch(r"\w{1,40}", v),
    "license": lambda v: isinstance(v, str) and re.fullmatch(r"[\w.-]{1,40}", v),
    "temperature": lambda v: _number(v, 1e-3, 1e3),
    "base_range": lambda v: _numbers(v, 2, 1e-3, 1e3) and v[0] <= v[1],
    "mpp_range": lambda v: _numbers(v, 2, 1e-3, 1e3) and v[0] <= v[1],
    "mpp_source": lambda v: isinstance(v, list) and _numbers(v, len(v), 1e-3, 1e3),
    "input_size": lambda v: _numbers(v, 3, 1, 4096),
    "mean": lambda v: _numbers(v, 3, -10, 10),
    "std": lambda v: _numbers(v, 3, 1e-6, 10),
    "crop_pct": lambda v: _number(v, 0.01, 1),
}


@dataclass(frozen=True)
class Start:
    """Weights that a run starts from, found and on this machine.

    Attributes:
        source: Hub repository, folder or file; recorded.
        file: of the weights, safetensors.
        timm_name: timm's architecture, where the weights are timm's own and timm knows how to read them.
        patients: that the weights have seen; None where their config does not say.
        magnifications: likewise.
        pretrained_cfg: of the weights' config; mean, std and license are used.
    """

    source: str
    file: Path
    timm_name: str | None = None
    patients: list | None = None
    magnifications: list | None = None
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)


def find_start(arch: str, init: str) -> Start | None:
    """What ``--init`` means for an architecture; fetched from the Hub if needed.

    Args:
        arch: timm's or ours, by name, or a place with ``hf-hub:`` or ``local-dir:`` before it.
        init: "none" (random weights), "imagenet" (timm's default weights of the architecture; of a place, its own), a
            ``.safetensors`` file, or a folder or Hub repository with ``model.safetensors``.

    Raises:
        ValueError: timm has no weights of that architecture.
        OSError: The weights cannot be had; says the ways on.
    """
    if init == "none":
        return None
    if init.endswith(".safetensors"):
        return Start(init, Path(init).expanduser())
    if init == "imagenet" and ":" not in arch:
        return _timm_start(arch)
    place = (arch if init == "imagenet" else init).removeprefix("local-dir:").removeprefix("hf-hub:")
    file = resolve(place, "model.safetensors")
    try:
        config = read_json(resolve(place, "config.json"))
    except FileNotFoundError:
        config = {}
    stated = config if isinstance(config, dict) else {}
    seen = stated.get("seen", {})
    known = {name: seen.get(name) for name in ("patients", "magnifications")}
    return Start(place, file, **known, pretrained_cfg=stated.get("pretrained_cfg", {}))


def _timm_start(arch: str) -> Start:
    name = plain_architecture(arch)
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        raise ValueError(
            f"timm has no weights of {name} to start from: take another architecture, give a folder, file or Hub "
            "repository (--init PLACE), or start from random weights (--init none)"
        )
    try:
        file = resolve(cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors")
    except OSError as error:
        raise FileNotFoundError(
            f"the ImageNet weights {cfg.hf_hub_id} cannot be had ({error.__cause__ or error}). Three ways on: reach "
            "the Hub or point HF_ENDPOINT to a mirror; give a folder, file or repository that has weights of "
            f"{name} (--init PLACE); or start from random weights (--init none)"
        ) from error
    return Start(cfg.hf_hub_id, file, name, pretrained_cfg=cfg.to_dict())


def load_start(model: torch.nn.Module, start: Start) -> dict[str, Any]:
    """Start `model` from the backbone of other weights; its heads keep their own initialisation.

    The mean and std that the weights expect of pixels become the model's.

    Returns:
        What is recorded: ``source``, ``sha256``, ``license``, and the ``patients`` and ``magnifications`` seen.

    Raises:
        ValueError: The file lacks a tensor of the backbone or has one of another shape.
    """
    heads = head_prefixes(model)
    given = _timm_weights(model, start) if start.timm_name else read_weights(start.file)
    given = {k: v for k, v in given.items() if not k.startswith(heads)}
    wanted = {k: v for k, v in model.state_dict().items() if not k.startswith(heads)}
    wrong = sorted(k for k in wanted if k not in given or given[k].shape != wanted[k].shape)
    if wrong or given.keys() - wanted.keys():
        raise ValueError(
            f"{start.file} does not hold the backbone of {type(model).__name__}: missing or of another shape "
            f"{wrong[:5]}, not part of it {sorted(given.keys() - wanted.keys())[:5]}"
        )
    model.load_state_dict(given, strict=False)
    stated = {name: tuple(start.pretrained_cfg[name]) for name in ("mean", "std") if name in start.pretrained_cfg}
    model.pretrained_cfg = {**model.pretrained_cfg, **stated}
    return {
        "source": start.source,
        "sha256": hashlib.sha256(start.file.read_bytes()).hexdigest(),
        "license": start.pretrained_cfg.get("license"),
        "patients": start.patients,
        "magnifications": start.magnifications,
    }


def _timm_weights(model: torch.nn.Module, start: Start) -> dict[str, torch.Tensor]:
    """timm's own weights, through timm's own loader, which renames and resizes what older files hold."""
    overlay = {"file": str(start.file)}
    given = timm.create_model(start.timm_name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0)
    if hasattr(given, "set_input_size"):
        given.set_input_size(img_size=model.patch_embed.img_size)
    return given.state_dict()
