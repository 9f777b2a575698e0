"""What a cell of the grid is: one method, trained once without one magnification. Its settings, identity and name."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from magnification_invariant.data.splits import domain_column
from magnification_invariant.data.vectors import is_of_vectors, vectors_of
from magnification_invariant.engine import FitConfig
from magnification_invariant.models import VECTOR_MODELS
from magnification_invariant.records import Run
from magnification_invariant.tasks import get_task
from magnification_invariant.tasks.floors import FLOORS, READ_IMAGES
from magnification_invariant.tasks.options import option

# The paper's own recipe is not published: "paper" adds nothing it does not mention.
RECIPES = {
    "paper": {"stain": 0.0, "ema_decay": 0.0, "calibrate": False},
    "strong": {"stain": 0.2, "ema_decay": 0.998, "calibrate": True},
}
ZOOM = 2.5  # the widest step between neighbouring magnifications of BreaKHis, 40X to 100X
NOT_READ = ("log_every",)  # of `FitConfig`, what no weight follows from
OF_PIXELS = ("image_size", "zoom", "stain")  # of `FitConfig`, what nothing follows from where the input are vectors


@dataclass(frozen=True)
class Cell:
    """One cell of the grid.

    Attributes:
        method: of `tasks.TASKS`, ``module:Class``, or one of `FLOORS`.
        held_out: the magnification, or other domain, that is not trained on.
        fold: which group of patients is tested.
        seed: of initialisation, order and augmentation.
        n_folds, split_seed, split: see the flags' help, below.
        fit: how to train; its seed is `seed`.
        options: of the method, an instance of its `Options`; by default with default values.
        recipe: names the row in tables, where settings were chosen for each held-out domain.
    """

    method: str
    held_out: int | str
    fold: int = 0
    seed: int = 0
    n_folds: int = option(5, "groups of patients")
    split_seed: int = option(0, "deals patients to groups")
    split: str | None = option(None, "split by the folds that `magdg split` wrote to this file instead")
    model: str | None = option(None, "timm architecture; by default the method's own ResNet-18")
    init: str | None = option(
        None, "weights to start from: imagenet (timm's), none, or a .safetensors file, model folder or Hub repository"
    )
    allow_seen_init: bool = option(False, "accept a start that saw the test; marked in every table")
    embedding: str = option("penultimate", "what signatures are made of", choices=("penultimate", "pyramid"))
    mixed_precision: str = option("no", "of training", choices=("no", "bf16", "fp16"))
    calibrate: bool = option(True, "fit a temperature on validation patients")
    threads: int = option(1, "CPU threads; results are equal bit for bit only at the same number")
    fit: FitConfig = field(default_factory=FitConfig)
    options: Any = None
    recipe: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "fit", replace(self.fit, seed=self.seed))
        if self.method in FLOORS:
            return
        if self.options is None:
            object.__setattr__(self, "options", get_task(self.method).Options())
        if self.init is None:
            object.__setattr__(self, "init", "imagenet" if get_task(self.method).pretrained else "none")

    def with_settings(self, settings: dict[str, Any]) -> "Cell":
        """This cell with settings by name, be they its own, of `fit` or of the method's options.

        Raises:
            ValueError: A name is none of these.
        """
        own, fit = ({each.name for each in fields(kind)} for kind in (self, self.fit))
        options = {each.name for each in fields(self.options)} if self.options is not None else set()
        if unknown := settings.keys() - own - fit - options:
            raise ValueError(f"{self.method} has no setting {', '.join(sorted(unknown))}")
        changes = {name: value for name, value in settings.items() if name in own}
        changes["fit"] = replace(self.fit, **{name: settings[name] for name in settings.keys() & fit})
        if self.options is not None:
            changes["options"] = replace(self.options, **{name: settings[name] for name in settings.keys() & options})
        return replace(self, **changes)

    @property
    def architecture(self) -> str:
        """The network that is trained; a floor has none."""
        return self.model or get_task(self.method).arch

    @property
    def settings(self) -> dict[str, Any]:
        """Exactly what the method reads, by name, but the data, the split and the seed.

        A floor trains no network and knows of no zoom, and only one that looks at images knows of their size.
        """
        if self.method in FLOORS:
            return {"image_size": self.fit.image_size} if self.method in READ_IMAGES else {}
        own = ("model", "init", "allow_seen_init", "embedding", "mixed_precision", "calibrate")
        unread = ("seed", *NOT_READ, *(OF_PIXELS if self.model in VECTOR_MODELS else ()))
        fit = {name: value for name, value in asdict(self.fit).items() if name not in unread}
        named = {name: getattr(self, name) for name in own}
        return {**named, "model": self.architecture, **fit, **asdict(self.options)}

    @property
    def settings_sha256(self) -> str:
        """The same for all cells of one row of a table, and known before any of them runs."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """Of its folder: method, start, zoom and image size in words; what else is not default as six digits."""
        words = [self.method.replace(":", "."), *self._words, self.held_out_name, f"fold{self.fold}"]
        words += [f"seed{self.seed}"] * (self.method not in FLOORS)
        init = self.init if self.init == "imagenet" else None
        fit = FitConfig(zoom=self.fit.zoom, image_size=self.fit.image_size)
        plain = Cell(self.method, self.held_out, init=init, fit=fit)
        own, usual = ({**each.settings, "split": each._split, **each._recipe} for each in (self, plain))
        if own != usual:
            words.append(hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:6])
        return "-".join(words)

    @property
    def _words(self) -> list[str]:
        start = ["imagenet"] * (self.settings.get("init") == "imagenet" and not get_task(self.method).pretrained)
        zoom = [f"zoom{self.fit.zoom:g}" if self.fit.zoom != ZOOM else "zoom"] * ("zoom" in self.settings)
        size = [f"{self.fit.image_size}px"] * ("image_size" in self.settings)
        return start + zoom * (self.fit.zoom != 1) + size * (self.fit.image_size != FitConfig().image_size)

    @property
    def held_out_name(self) -> str:
        """What is held out, as a part of the names of files and models: "lomo200", "lodo-scanner_b"."""
        if isinstance(self.held_out, str):
            return "lodo-" + re.sub(r"[^\w.-]+", "_", self.held_out)
        return f"lomo{self.held_out}"

    @property
    def _recipe(self) -> dict[str, str]:
        return {"recipe": self.recipe} if self.recipe and self.method not in FLOORS else {}

    @property
    def _split(self) -> dict[str, Any]:
        if self.split:
            return {"file_sha256": hashlib.sha256(Path(self.split).read_bytes()).hexdigest()[:16]}
        return {"n_folds": self.n_folds, "split_seed": self.split_seed}

    def identity(self, ds) -> dict[str, Any]:
        """What its records follow from: see `Run.config`; threads and machine are recorded, not compared."""
        cell = {name: getattr(self, name) for name in ("method", "held_out", "fold", "seed")}
        if self.method in FLOORS:
            cell["seed"] = 0
        cell |= {"split": self._split, "data": table_digest(ds), **self._recipe}
        return {"cell": cell, "settings": self.settings, "settings_sha256": self.settings_sha256}


def is_finished(folder: Path, cell: Cell, ds) -> bool:
    """Whether `folder` holds this very cell, finished.

    Raises:
        ValueError: It holds a cell of other settings or data.
    """
    run = Run(folder)
    if not run.has_config:
        return False
    there, wanted = run.config, cell.identity(ds)
    differing = {}
    for group in ("cell", "settings"):
        for key, value in wanted[group].items():
            if json.dumps(old := there.get(group, {}).get(key)) != json.dumps(value):
                differing[key] = (old, value)
    if differing:
        what = ", ".join(f"{key} was {old!r} and is now {new!r}" for key, (old, new) in differing.items())
        raise ValueError(f"{folder} holds a run of other data or settings ({what}); choose another output folder")
    return run.is_finished


@lru_cache(maxsize=1)  # a grid asks for every cell
def table_digest(ds) -> str:
    """Identifies a table by its rows' names, labels, patients and domains, and by its vectors where it has such."""
    columns = zip(*(ds[name] for name in ("filename", "label", "patient", domain_column(ds))), strict=True)
    digest = hashlib.sha256(json.dumps(list(columns)).encode())
    if is_of_vectors(ds):
        digest.update(vectors_of(ds))
    return digest.hexdigest()[:16]
