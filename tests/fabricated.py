"""Finished runs whose every prediction is known, and models that nobody trained, in the layout of `lomo`."""

import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from magnification_invariant.files import read_json, write_json
from magnification_invariant.records import NORMALISED, Run, evaluate, prediction_table
from magnification_invariant.tasks.floors import FLOORS

MAGNIFICATIONS = (40, 100, 200, 400)
LABELS = ["benign", "malignant"]


def write_run(
    root, method, held_out, *, fold=0, seed=0, skill=1.0, scaled=None, domains=MAGNIFICATIONS, patients=24, **changes
) -> Run:
    """Two images of every patient at each seen domain and at the unseen one; the same noise for every method.

    Args:
        skill: How far a patient's class moves the score.
        scaled: The same of the part "test_normalised"; None is without that part.
        changes: Of the config: start, settings, split.
    """
    settings = changes.get("settings", {})
    words = "".join(c for c in f"{method} {held_out}{sorted(settings.items())}" if c.isalnum())
    run = Run(root / f"{words}-fold{fold}-seed{seed}")
    run.folder.mkdir(parents=True)
    cell = {"method": method, "held_out": held_out, "fold": fold, "seed": seed, "data": "d"}
    cell["split"] = changes.get("split", {"n_folds": 4, "split_seed": 0})
    machine = {"threads": 1, "versions": {"torch": "2"}, "git": None}
    config = {"cell": cell, "settings": settings, "settings_sha256": f"s{sorted(settings.items())}", "machine": machine}
    if method not in FLOORS:
        run.folder.joinpath("model").mkdir()
        config["start"] = changes.get("start") or {"source": None}
        run.write_timing(seconds=60.0)
        run.write_losses([{"epoch": 1, "class_loss": 0.4}])
    run.write_config(config)
    _write_records(run, skill, scaled, domains, patients)
    results = {"temperature": 1.5, "parts": evaluate(run, 1.5), "uncalibrated": evaluate(run, 1.0)}
    if scaled is None:
        results["normalised_why_none"] = "a scale is not known"
    if method not in FLOORS:
        signature = {"size": 1 + (method == "erm"), "width": 3, "live": 3, "jaccard": 0.5, "nogueira": 0.4}
        signature |= {"chance_jaccard": 0.1, "jaccard_pairs": [0.5] * 3, "test": results["parts"]["test"]}
        signature["curve"] = {"size": [0, 1, 2], "val": [0.7, 0.6, 0.5], "test": [0.7, 0.6, 0.5]}
        results |= {"signature": signature, "mpp_range": [0.2, 0.8], "base_range": [0.2, 0.8]}
    run.write_results(results)
    return Run(run.folder)


def _write_records(run: Run, skill: float, scaled: float | None, domains: tuple, patients: int) -> None:
    held_out, fold, seed = run.key
    rng = np.random.default_rng([domains.index(held_out), fold, seed])
    seen = [domain for domain in domains if domain != held_out]
    tables, embeddings, keys = [], {}, {}
    for part, shown in (("val", seen), ("test", [held_out]), ("test_source", seen)):
        n = patients * 2 * len(shown)
        patient = np.resize(np.repeat(np.arange(patients), 2), n) + 100 * (part == "val")
        label, domain = patient % 2, np.repeat(shown, patients * 2)
        columns = {"patient": patient.astype(str), "slide": patient.astype(str), "label": label, "domain": domain}
        columns |= {"filename": np.array([f"{part}{i}.png" for i in range(n)]), "mpp": np.full(n, 0.5)}
        noise = rng.standard_normal(n)
        kinds = [(part, skill, epoch) for epoch in (0, 1)]
        if part == "test" and scaled is not None:
            kinds.append((NORMALISED, scaled, 1))
        for name, strength, epoch in kinds:
            logits = np.stack([np.zeros(n), (strength * (2 * label - 1) + noise) * (epoch + 1)], 1)
            tables.append(prediction_table(columns, np.arange(n), logits, part=name, epoch=epoch))
        which = np.unique(domains, return_inverse=True)[1][[domains.index(d) for d in domain.tolist()]]
        features = [skill * (2 * label - 1) + noise, rng.standard_normal(n), which.astype(float)]
        embeddings[part] = np.stack(features, 1).astype(np.float32)
        keys[part] = {name: columns[name] for name in ("filename", "patient", "label", "domain")}
    run.write_predictions(pa.concat_tables(tables))
    if run.is_network:
        embeddings["train"], keys["train"] = embeddings["val"], keys["val"]
        run.write_embeddings(embeddings, keys)


@lru_cache
def _template(folder: Path) -> Path:
    import timm
    import torch

    import magnification_invariant  # noqa: F401  (registers the models)
    from magnification_invariant.model_folder import write_model_folder
    from magnification_invariant.signatures import SignatureProjector
    from magnification_invariant.signatures.projector import weights_digest

    torch.manual_seed(0)
    model = timm.create_model("test_magdg_resnet", num_classes=2).eval()
    with torch.no_grad():
        model.fc.weight *= 30  # probabilities that differ
    name, norm = "test_magdg_resnet.other", ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    about = {"temperature": 1.5, "trained_on": "other", "base_range": [0.2, 0.8], "mpp_range": [0.17, 0.8]}
    about["seen"] = {"patients": ["1", "2"], "magnifications": [40, 100, 400]}
    write_model_folder(folder, model, name=name, label_names=LABELS, image_size=32, normalisation=norm, about=about)
    SignatureProjector(
        indices=np.array([3, 10]),
        mean=np.zeros(2),
        scale=np.ones(2),
        weight=np.array([[1.0, -2.0]]),
        bias=np.zeros(1),
        width=model.num_features,
        class_names=tuple(LABELS),
        embedding="penultimate",
        source=name,
        weights_sha256=weights_digest(model),
    ).save_pretrained(folder)
    return folder


def add_model(run: Run, cache: Path) -> Run:
    """Gives a run a model with a signature, untrained, of 32 pixels; made once in `cache`."""
    shutil.copytree(_template(cache / "template"), run.model, dirs_exist_ok=True)
    config = read_json(run.model / "config.json")
    held_out = "".join(c for c in str(run.held_out) if c.isalnum())
    write_json(run.model / "config.json", config | {"name": f"{config['name']}_lomo{held_out}_{run.method}"})
    shutil.copy(run.folder / "predictions.parquet", run.model)
    write_json(run.model / "results.json", run.results | {"record": run.config, "seconds": 60.0})
    return run
