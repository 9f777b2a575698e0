"""From a run's records to a repository on the Hub: layout, comparison, pictures, card, one commit."""

import re
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from magnification_invariant import hub_files, metrics
from magnification_invariant.files import locked, read_json, whole, write_json
from magnification_invariant.hub.card import COMPARED, PICTURES, render_card, tested_part
from magnification_invariant.hub.doctor import check_files
from magnification_invariant.model_folder import read_model_config
from magnification_invariant.models import VECTOR_MODELS
from magnification_invariant.predict import Classifier
from magnification_invariant.records import POSITIVE, Run
from magnification_invariant.report.runs import by_title, difference

# One repository is one model. Nothing else of a run is published; none of these can run code when it is opened.
FILES = ("config.json", "model.safetensors", "fixture.png", "fixture.json", "results.json", "predictions.parquet")
SIGNATURE = ("signature.json", "signature.safetensors")
SCOPE = ("scope.safetensors",)


def publish(source: str | Path, repo: str, **options) -> str:
    """Commit a model to the Hub, where it loads with bare timm, with transformers and with this package.

    Args:
        source: As of `stage`.
        repo: Repository id, ``user/name``; made if needed.
        **options: Of `hub_files.upload`: private, revision, create_pr.

    Returns:
        URL of the commit or pull request; "" where the repository holds all that already.
    """
    with tempfile.TemporaryDirectory() as folder:
        staged = stage(source, repo, Path(folder, "model"))
        return hub_files.upload(staged, repo, message=read_model_config(str(staged))["name"], **options)


def stage(source: str | Path, repo: str, target: Path) -> Path:
    """Write what the repository `repo` shall hold.

    Args:
        source: The folder of a finished run or its ``model/``: its neighbours of the same test rows are what its card
            compares it with. Or a model without its run, such as this function writes: it keeps its comparison.
        repo: Repository id.
        target: A folder that does not exist yet.

    Raises:
        ValueError: `source` is no such folder or a file of it is damaged, `repo` is no repository id, or `target` is
            there.
    """
    run = Run(source)
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", repo):
        raise ValueError(f"{repo!r} is no repository id: give NAMESPACE/NAME, me/magdg_resnet18.breakhis_lomo200")
    if run.has_config and run.settings.get("model") in VECTOR_MODELS:
        raise ValueError(f"{source} is a model of embeddings; what is published are models of images")
    missing = [file for file in FILES if not (run.model / file).is_file()]
    missing += ["results.json of the run"] * (not (run.folder / "results.json").is_file())
    if missing:
        raise ValueError(f"{source} is not the folder of a finished run: it lacks {', '.join(missing)}")
    if target.exists():
        raise ValueError(f"{target} exists already: give a folder that does not, or remove it")
    check_files(run.model)
    results = dict(run.results, record=run.config)
    if run.folder != run.model:
        results |= {"seconds": run.seconds, "comparison": _compare(run)}
    results["centre_tile"] = _centre_tile(run.model)
    part = tested_part(results)
    with whole(target) as unfinished:
        unfinished.mkdir()
        for file in (*FILES, *SIGNATURE, *SCOPE):
            if (run.model / file).is_file():
                shutil.copyfile(run.model / file, unfinished / file)  # with the rights of a new file
        write_json(unfinished / "results.json", results)
        for file, (_, draw) in PICTURES.items():
            draw([run], unfinished / file, part)
        (unfinished / "README.md").write_text(render_card(unfinished, repo), encoding="utf-8")
    return target


def _compare(run: Run) -> dict[str, dict]:
    """Paired differences to the other runs of the grid that were tested on the same rows, row by row of its table."""
    part = tested_part(run.results)
    names = run.part(part)["filename"]

    def comparable(other: Run) -> bool:
        if other == run or not other.is_finished or "cell" not in read_json(other.folder / "config.json"):
            return False
        seeded = other.is_network  # what has no network has no seed either
        return other.key[: 2 + seeded] == run.key[: 2 + seeded] and np.array_equal(other.part(part)["filename"], names)

    same = filter(comparable, (Run(file.parent) for file in sorted(run.folder.parent.glob("*/results.json"))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # too few patients for an interval: null says it
        return {
            title: {metric: difference([run], group, metric, part)._asdict() for metric in COMPARED}
            for title, group in by_title([run, *same]).items()
            if run not in group
        }


def _centre_tile(model: Path) -> dict[str, float]:
    """Probability of the fixture by bare timm, whose transform shows the centre tile, and by this package."""
    fixture, classifier = read_json(model / "fixture.json"), Classifier.from_pretrained(model, device="cpu")
    timm = metrics.apply_temperature(np.array([fixture["logits"]]), classifier.temperature)[0, POSITIVE]
    with warnings.catch_warnings(), Image.open(model / "fixture.png") as image:
        warnings.simplefilter("ignore", UserWarning)  # on the look of its nuclei
        (row,) = classifier.predict(image.convert("RGB"), fixture["mpp"], view="protocol")
    return {"timm": float(timm), "package": row["probability"]}


def released(runs: str | Path) -> dict[str, Path]:
    """Name of the weights to folder of the run, for all of a grid that is released: fold 0 and seed 0.

    They are fixed beforehand: to release the best fold would be to choose on the test.

    Raises:
        ValueError: There is none, or two have one name.
    """
    named: dict[str, Path] = {}
    for run in (Run(file.parent) for file in sorted(Path(runs).glob("*/results.json"))):
        if (run.folder / "model").is_dir() and run.key[1:] == (0, 0):
            name = read_model_config(str(run.model))["name"]
            if name in named:
                raise ValueError(f"{named[name]} and {run.folder} would both be {name}: push one of them by itself")
            named[name] = run.folder
    if not named:
        raise ValueError(f"{runs} holds no finished run of fold 0 and seed 0, which are the ones to release")
    return named


def fetch(repo: str, folder: str | Path) -> list[str]:
    """Fetch a model's repository into a new folder, whole or not at all; files that can run code stay where they are.

    Returns:
        Names of the files.

    Raises:
        ValueError: The folder exists, the repository's weights are in a format that can run code, or a file of it is
            damaged or refused.
        FileNotFoundError: The repository cannot be reached.
    """
    folder = Path(folder)
    with locked(folder):
        if folder.exists():
            raise ValueError(f"{folder} exists already: give a folder that does not, or remove it")
        there = hub_files.snapshot(repo)
        if not (there / "model.safetensors").is_file():
            raise ValueError(f"{repo} holds no model.safetensors; weights in formats that can run code are not read")
        check_files(there)
        with whole(folder) as unfinished:
            unfinished.mkdir()
            for file in (file for pattern in hub_files.SAFE_FILES for file in there.glob(pattern)):
                shutil.copyfile(file, unfinished / file.name)
    return sorted(file.name for file in folder.iterdir())
