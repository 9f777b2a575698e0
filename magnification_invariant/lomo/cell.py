"""What a cell is: one method, trained once without one magnification. Its arguments, its name, its recipe's hash."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path

from magnification_invariant.data.splits import domain_column
from magnification_invariant.engine import FitConfig
from magnification_invariant.tasks import get_task
from magnification_invariant.tasks.floors import FLOORS

# The paper's own recipe is not published: "paper" adds nothing it does not mention.
RECIPES = {
    "paper": {"stain": 0.0, "ema_decay": 0.0, "temperature": False},
    "strong": {"stain": 0.2, "ema_decay": 0.998, "temperature": True},
}
ZOOM = 2.5  # the widest step between neighbouring magnifications of BreaKHis, 40X to 100X


@dataclass(frozen=True)
class Cell:
    """Arguments of one cell of the grid.

    Attributes:
        method: of `tasks.TASKS`, ``module:Class``, or one of `FLOORS`.
        held_out: the magnification, or other domain, that is not trained on.
        fold: which group of patients is tested, of `n_folds` dealt by `split_seed`.
        seed: of initialisation, order and augmentation.
        split: file of `data.Folds` to split by, instead of `n_folds` and `split_seed`.
        model: timm architecture; the method's own by default.
        recipe: of `RECIPES`.
        zoom: train with continuous zoom.
        image_size: side of the network's square input in pixels.
        threads: CPU threads of torch; results are equal bit for bit only at the same number.
        pretrained_backbone: weights to start from, see `model_folder.load_backbone`.
        allow_seen_init: accept a start that has seen patients or the magnification of the test.
        embedding: what signatures are made of, "penultimate" or "pyramid".
        mixed_precision: "no", "bf16" or "fp16".
        compile: see `engine.FitConfig`.
        label_smoothing, coeff, coeff_schedule, gan_epochs: handed to the methods that have them, see `tasks`.
        options: further options of the method by name, numbers or words, see `own_options`.
    """

    method: str
    held_out: int | str
    fold: int = 0
    seed: int = 0
    n_folds: int = 5
    split_seed: int = 0
    split: str | None = None
    model: str | None = None
    recipe: str = "strong"
    zoom: bool = False
    epochs: int = 10
    image_size: int = 224
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    threads: int = 1
    pretrained_backbone: str | None = None
    allow_seen_init: bool = False
    embedding: str = "penultimate"
    mixed_precision: str = "no"
    compile: bool = False
    label_smoothing: float = 0.0
    coeff: float = 1.0
    coeff_schedule: str = "dann"
    gan_epochs: int = 200
    options: dict = field(default_factory=dict, hash=False)

    def with_settings(self, settings: dict) -> "Cell":
        """This cell with settings by name: its own arguments are replaced, all others are options of the method."""
        arguments = {each.name for each in fields(self)}
        options = {name: value for name, value in settings.items() if name not in arguments}
        return replace(self, **{k: v for k, v in settings.items() if k in arguments}, options=options)

    @property
    def name(self) -> str:
        method = self.method.replace(":", ".")
        zoom = "-zoom" if self.zoom and self.method not in FLOORS else ""
        return f"{method}{zoom}-{self.left_out}-fold{self.fold}-seed{self.seed}"

    @property
    def left_out(self) -> str:
        """What is held out, as a part of the names of files and models: "lomo200", "lodo-scanner_b"."""
        if isinstance(self.held_out, str):
            return "lodo-" + re.sub(r"[^\w.-]+", "_", self.held_out)
        return f"lomo{self.held_out}"

    @property
    def frozen(self) -> dict:
        """All that training follows from but the data, the split, the seed and the machine."""
        apart = {"held_out", "fold", "seed", "n_folds", "split_seed", "split", "threads"}
        arguments = asdict(self) | asdict(self.fit_config) | {"temperature": RECIPES[self.recipe]["temperature"]}
        return {name: value for name, value in arguments.items() if name not in apart}

    @property
    def recipe_sha256(self) -> str:
        """Of `frozen`: the same for all cells of one row of a table, and known before any of them runs."""
        return hashlib.sha256(json.dumps(self.frozen, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def fit_config(self) -> FitConfig:
        recipe = RECIPES[self.recipe]
        return FitConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            image_size=self.image_size,
            zoom=ZOOM if self.zoom else 1.0,
            stain=recipe["stain"],
            ema_decay=recipe["ema_decay"],
            seed=self.seed,
            compile=self.compile,
        )


def own_options(method: str) -> set[str]:
    """Names of the options of a method that are no argument of `Cell`, but keys of its `options`."""
    return set() if method in FLOORS else set(get_task(method).options) - {f.name for f in fields(Cell)}


def is_finished(folder: Path, cell: Cell, ds) -> bool:
    """Whether `folder` holds this very cell, finished.

    Raises:
        ValueError: it holds a cell of other arguments or data.
    """
    if not (folder / "config.json").exists():
        return False
    found = json.loads((folder / "config.json").read_text())
    wanted = arguments(cell, ds)
    differing = {k: (found["arguments"].get(k), v) for k, v in wanted.items() if found["arguments"].get(k) != v}
    if differing:
        what = ", ".join(f"{k} was {old!r} and is now {new!r}" for k, (old, new) in differing.items())
        raise ValueError(f"{folder} holds a run of other arguments ({what}); choose another output folder or remove it")
    return (folder / "results.json").exists()


def arguments(cell: Cell, ds) -> dict:
    """What a cell's records follow from: its arguments, and digests of the table and of the split file."""
    digest = hashlib.sha256(Path(cell.split).read_bytes()).hexdigest()[:16] if cell.split else None
    return asdict(cell) | {"data": table_digest(ds), "split_sha256": digest}


@lru_cache(maxsize=1)  # a grid asks for every cell
def table_digest(ds) -> str:
    """Identifies a table by its rows' names, labels, patients and domains."""
    columns = zip(*(ds[name] for name in ("filename", "label", "patient", domain_column(ds))), strict=True)
    return hashlib.sha256(json.dumps(list(columns)).encode()).hexdigest()[:16]
