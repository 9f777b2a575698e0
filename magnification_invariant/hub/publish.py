"""From a run's records to a repository on the Hub: layout, comparison, pictures, card, one commit."""

import json
import re
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np

from magnification_invariant import hub_files, metrics
from magnification_invariant.hub.card import COMPARED, draw_pictures, render_card, tested_part
from magnification_invariant.model_folder import read_model_config
from magnification_invariant.records import last_epoch, part_of, write_json

# One repository is one model. Nothing else of a run is published; none of these can run code when it is opened.
FILES = ("config.json", "model.safetensors", "fixture.png", "fixture.json", "results.json", "predictions.parquet")
SIGNATURE = ("signature.json", "signature.safetensors")


def publish(source: Path, repo: str, **options) -> str:
    """Commit a run to the Hub, where it loads with bare timm, with transformers and with this package.

    Args:
        source: as of `stage`.
        repo: repository id, ``user/name``; made if needed.
        **options: of `hub_files.upload`: private, revision, create_pr.

    Returns:
        URL of the commit or pull request; "" where the repository holds all that already.
    """
    with tempfile.TemporaryDirectory() as folder:
        staged = stage(source, repo, Path(folder, "model"))
        about = read_model_config(str(staged))
        return hub_files.upload(staged, repo, message=about["name"], **options)


def stage(source: Path, repo: str, target: Path) -> Path:
    """Write what the repository `repo` shall hold.

    Args:
        source: the folder of a finished cell (see `lomo`); its neighbours of the same test rows are what its card
            compares it with. Or a folder that this function wrote: only its card and pictures are made anew.
        target: a folder that does not exist yet.

    Raises:
        ValueError: `source` is no such folder, or `repo` no repository id.
    """
    source = Path(source)
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", repo):
        raise ValueError(f"{repo!r} is no repository id: give NAMESPACE/NAME, me/magdg_resnet18.breakhis_lomo200")
    model = source / "model" if (source / "model").is_dir() else source
    missing = [file for file in FILES if not (model / file).is_file()]
    missing += ["results.json of the run"] * (not (source / "results.json").is_file())
    if missing:
        raise ValueError(f"{source} is not the folder of a finished run: it lacks {', '.join(missing)}")
    target.mkdir(parents=True)
    for file in (*FILES, *SIGNATURE):
        if (model / file).is_file():
            shutil.copyfile(model / file, target / file)  # with the rights of a new file
    if model != source:
        results = json.loads((source / "results.json").read_text())
        results["record"] = json.loads((source / "config.json").read_text())
        results["seconds"] = json.loads((source / "timing.json").read_text())["seconds"]
        results["comparison"] = _compare(source, results)
        write_json(target / "results.json", results)
    draw_pictures(target)
    (target / "README.md").write_text(render_card(target, repo), encoding="utf-8")
    return target


def _compare(cell: Path, results: dict) -> dict:
    """Paired differences to the other cells of the grid that were tested on the same rows, method by method."""
    own = results["record"]["arguments"]
    part = tested_part(results)
    mine, rows = _tested(cell, results, part)
    found = {}
    for file in sorted(cell.parent.glob("*/results.json")):
        config = json.loads((file.parent / "config.json").read_text())
        other = config.get("arguments", {})
        if file.parent == cell or any(other.get(name) != own[name] for name in ("data", "held_out", "fold")):
            continue
        if "start" in config and other["seed"] != own["seed"]:  # what has no network has no seed either
            continue
        theirs, their_rows = _tested(file.parent, json.loads(file.read_text()), part)
        if their_rows != rows:
            continue
        name = other["method"] + " + zoom" * bool(other["zoom"] and "start" in config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # too few patients for an interval: null says it
            found[name] = {
                metric: metrics.paired_difference(
                    metric, mine["label"], mine["probability"], theirs["probability"], mine["patient"]
                )._asdict()
                for metric in COMPARED
            }
    return found


def _tested(cell: Path, results: dict, part: str) -> tuple[dict[str, np.ndarray], list[str]]:
    records = last_epoch(cell)
    chosen = records.filter(np.asarray(records["part"]) == part)
    return part_of(records, part, results["temperature"]), chosen["filename"].to_pylist()


def released(runs: Path) -> dict[str, Path]:
    """Name of the weights to folder of the cell, for all of a grid that is released: fold 0 and seed 0.

    They are fixed beforehand: to release the best fold would be to choose on the test.

    Raises:
        ValueError: there is none, or two have one name.
    """
    found: dict[str, Path] = {}
    for file in sorted(Path(runs).glob("*/results.json")):
        cell = file.parent
        arguments = json.loads((cell / "config.json").read_text())["arguments"]
        if (cell / "model").is_dir() and arguments["fold"] == arguments["seed"] == 0:
            name = read_model_config(str(cell / "model"))["name"]
            if name in found:
                raise ValueError(f"{found[name]} and {cell} would both be {name}: push one of them by itself")
            found[name] = cell
    if not found:
        raise ValueError(f"{runs} holds no finished run of fold 0 and seed 0, which are the ones to release")
    return found


def fetch(repo: str, folder: Path) -> list[str]:
    """Fetch a model's repository into a new folder, whole or not at all; files that can run code stay where they are.

    Returns:
        Names of the files.

    Raises:
        ValueError: the folder exists, the repository's weights are in a format that can run code, or its config is
            refused.
        FileNotFoundError: the repository cannot be reached.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already: give a folder that does not, or remove it")
    there = hub_files.snapshot(repo)
    if not (there / "model.safetensors").is_file():
        raise ValueError(f"{repo} holds no model.safetensors; weights in formats that can run code are not read")
    read_model_config(str(there))
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for pattern in hub_files.SAFE_FILES:
        for file in there.glob(pattern):
            shutil.copyfile(file, unfinished / file.name)
    unfinished.rename(folder)
    return sorted(file.name for file in folder.iterdir())
