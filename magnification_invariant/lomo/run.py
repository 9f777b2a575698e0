"""Runs one cell: trains, predicts, explains by a signature, and records.

The folder of a cell holds

- ``config.json``: arguments, recipe, versions, git revision, thread count, sha256 of the initial weights;
- ``metrics.jsonl``: an epoch's mean losses a line;
- ``predictions.parquet``: logits and probabilities of validation and test images after every epoch;
- ``embeddings.safetensors``: embeddings of all parts after the last epoch, with the keys of their rows;
- ``gan_samples.png``, ``prepare.jsonl``: of the method ``gan``, real patches beside generated ones, and the mean losses
  of the DCGAN's epochs;
- ``results.json``: metrics, intervals and the signature; written last, so a cell that has it is finished;
- ``model/``: the model, in the layout of its Hub repository.
"""

import json
import platform
import shutil
import subprocess
import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from magnification_invariant import metrics
from magnification_invariant.data.augment import CROP_PCT, DRAWS, cache_height, input_mpp, random_view, view_height
from magnification_invariant.data.pixels import PixelCache
from magnification_invariant.data.splits import (
    Folds,
    Split,
    assert_disjoint,
    domain_column,
    domain_name,
    leave_one_domain_out,
)
from magnification_invariant.engine import MEAN, STD, Diverged, TrainRows, fit, predict
from magnification_invariant.hub_files import resolve
from magnification_invariant.lomo.cell import RECIPES, Cell, arguments, is_finished, own_options
from magnification_invariant.model_folder import load_backbone, source_name, write_model_folder
from magnification_invariant.records import evaluate, part_of, prediction_table, scores, write_json
from magnification_invariant.signatures import (
    SignatureProjector,
    SparseSignature,
    refit_stability,
    weights_digest,
    write_embeddings,
)
from magnification_invariant.signatures.sparse_signature import NothingToSelect
from magnification_invariant.tasks import Task, get_task
from magnification_invariant.tasks.floors import FLOORS

PARTS = ("val", "test", "test_source")
_NAMED_AFTER = {"magerm_resnet18": "erm", "magdg_resnet18": "dann", "maggan_resnet18": "gan"}
COLUMNS = ("filename", "patient", "slide", "label")


def run_cell(cell: Cell, ds, folder: Path, *, split: Split | None = None, accelerator=None) -> None:
    """Train, predict, explain by a signature, and record one cell; a run that was cut off is taken up where it stopped.

    Args:
        split: instead of the cell's own; one that holds no domain out has the tested rows in `test_source`.

    Raises:
        ValueError: the folder holds other arguments; the table cannot be split so; the start has seen the test.
        Diverged: the loss is no longer finite.
    """
    torch.set_num_threads(cell.threads)
    is_finished(folder, cell, ds)  # raises where the folder holds something else
    if accelerator is None and cell.method not in FLOORS:
        from accelerate import Accelerator

        accelerator = Accelerator(mixed_precision=cell.mixed_precision)
    main = accelerator is None or accelerator.is_main_process
    if cell.split:
        split = Folds.from_json(cell.split).split(ds, cell.held_out, cell.fold)
    elif split is None:
        split = leave_one_domain_out(
            ds,
            cell.held_out,
            n_folds=cell.n_folds,
            fold=cell.fold,
            split_seed=cell.split_seed,
            domain_column=domain_column(ds),
        )
    assert_disjoint(split, ds)
    with accelerator.main_process_first() if accelerator else nullcontext():
        cache = PixelCache(ds, cache_height(cell.image_size, cell.fit_config.zoom))
    columns = {name: np.asarray(ds[name]) for name in COLUMNS}
    columns["domain"] = np.asarray(ds[domain_column(ds)])
    columns["mpp"] = input_mpp(cache.mpp, cache.height, cell.image_size)
    columns["rescaled"] = np.asarray(ds["rescaled"] if "rescaled" in ds.column_names else np.zeros(len(ds)), bool)
    unknown = np.isnan(columns["mpp"])
    if cell.zoom and unknown.any():
        raise ValueError(
            f"continuous zoom states the micrometres per pixel it covers, and {unknown.sum()} images have none (first: "
            f"{columns['filename'][unknown][0]}): give the table a column 'mpp', or train without zoom"
        )
    if cache.height < view_height(cell.image_size):
        raise ValueError(
            f"an image size of {cell.image_size} needs images of {view_height(cell.image_size)} pixels on the short "
            f"side, and the smallest here has {cache.height}; the largest possible size is "
            f"{int(cache.height * CROP_PCT)}"
        )
    if main:
        folder.mkdir(parents=True, exist_ok=True)
    run = _run_floor if cell.method in FLOORS else _run_network
    run(cell, ds, folder, split, cache, columns, accelerator)


def _run_floor(cell: Cell, ds, folder: Path, split: Split, cache: PixelCache, columns: dict, accelerator) -> None:
    write_json(folder / "config.json", _config(cell, ds))
    weight = metrics.patient_weights(columns["patient"][split.train])
    predictor = FLOORS[cell.method](cache, split.train, columns["label"][split.train], weight)
    log_odds = {part: predictor(getattr(split, part)) for part in PARTS}
    logits = {part: np.stack([np.zeros_like(odds), odds], 1) for part, odds in log_odds.items()}
    records = _records(cell, columns, split, 0, logits)
    pq.write_table(records, folder / "predictions.parquet")
    results = {"temperature": 1.0, "parts": evaluate(records), "rescaled": _rescaled(columns, split)}
    write_json(folder / "results.json", results)


def _run_network(cell: Cell, ds, folder: Path, split: Split, cache: PixelCache, columns: dict, accelerator) -> None:
    started, main = time.perf_counter(), accelerator.is_main_process
    domains, domain = np.unique(columns["domain"][split.train], return_inverse=True)
    kept = [*split.val, *split.test, *split.test_source]
    task, start = _create_task(cell, ds, len(domains), set(columns["patient"][kept]))
    if main:
        tied = _class_domain_information(columns["label"][split.train], domain)
        write_json(folder / "config.json", _config(cell, ds) | {"start": start, "class_domain_information": tied})
    rows = TrainRows(split.train, columns["label"][split.train], domain, columns["patient"][split.train])
    prepared = _prepare(cell, ds, folder, task, rows, cache, domains, accelerator)
    prepared_after = time.perf_counter() - started
    parts = [part for part in PARTS if len(getattr(split, part))]  # where nothing is held out, there is no "test"

    def predicted(part: str, embedding: str | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        rows = getattr(split, part)
        return predict(model, cache, rows, cell.image_size, embedding=embedding, accelerator=accelerator)

    def on_epoch(epoch: int, current: torch.nn.Module, log: dict) -> None:
        nonlocal model
        model = current
        logits = {part: predicted(part)[0] for part in parts}
        if not all(np.isfinite(values).all() for values in logits.values()):
            raise Diverged(f"the model of epoch {epoch} predicts what is not a finite number")
        if main:
            _write_epoch(folder / "epochs", epoch, log)
            accelerator.log({f"{cell.name}/{name}": value for name, value in log.items()}, step=epoch)
            pq.write_table(_records(cell, columns, split, epoch, logits), folder / "epochs" / f"{epoch:04d}.parquet")

    model = None
    model = fit(
        task,
        cache,
        rows,
        cell.fit_config,
        accelerator=accelerator,
        checkpoint=folder / "checkpoint.pt",
        on_epoch=on_epoch,
        description=cell.name,
    )
    embeddings = {part: predicted(part, cell.embedding)[1] for part in ("train", *parts)}
    if not main:
        return

    tables = [pq.read_table(path) for path in sorted((folder / "epochs").glob("*.parquet"))]
    pq.write_table(pa.concat_tables(tables), folder / "predictions.parquet")
    for epochs, lines in (("epochs", "metrics.jsonl"), ("prepare", "prepare.jsonl")):
        if logs := [json.loads(path.read_text()) for path in sorted((folder / epochs).glob("*.json"))]:
            (folder / lines).write_text("".join(json.dumps(log) + "\n" for log in logs))
    parts = {part: ([array], _keys(columns, getattr(split, part))) for part, array in embeddings.items()}
    write_embeddings(folder / "embeddings.safetensors", parts, embedding=cell.embedding)

    temperature = 1.0
    if RECIPES[cell.recipe]["temperature"]:
        val = part_of(tables[-1], "val")
        weight = metrics.patient_weights(val["patient"])
        temperature = metrics.fit_temperature(val["logits"], val["label"], sample_weight=weight)
    signature, signature_results = _signature(embeddings, split, columns)
    results = {
        "temperature": temperature,
        "parts": evaluate(tables[-1], temperature),
        "uncalibrated": evaluate(tables[-1]),
        "signature": signature_results,
        "rescaled": _rescaled(columns, split),
        **prepared,
    }
    _write_model(cell, ds, folder, model, columns, split, results, signature)
    seconds = {"prepare_seconds": prepared_after, "seconds": time.perf_counter() - started}
    write_json(folder / "timing.json", seconds)
    for name in ("prepare.pt", "checkpoint.pt"):  # before the epochs: a checkpoint without them could not go on
        (folder / name).unlink(missing_ok=True)
    for name in ("prepare", "epochs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    write_json(folder / "results.json", results)


def _write_epoch(folder: Path, epoch: int, log: dict) -> None:
    folder.mkdir(exist_ok=True)
    reproducible = {name: value for name, value in log.items() if name != "images_per_second"}
    write_json(folder / f"{epoch:04d}.json", {"epoch": epoch, **reproducible})


def _prepare(
    cell: Cell, ds, folder: Path, task: Task, rows: TrainRows, cache: PixelCache, domains: np.ndarray, accelerator
) -> dict:
    """Train what the task needs before itself, leave its pictures in the folder, return its records."""
    config, device = cell.fit_config, accelerator.device

    def fit_first(other: Task, **changes) -> torch.nn.Module:
        def on_epoch(epoch: int, model: torch.nn.Module, log: dict) -> None:
            if accelerator.is_main_process:
                _write_epoch(folder / "prepare", epoch, log)
                about = f"{cell.name}/{type(other).__name__}"
                accelerator.log({f"{about}/{name}": value for name, value in log.items()}, step=epoch)

        return fit(
            other,
            cache,
            rows,
            replace(config, **changes),
            accelerator=accelerator,
            checkpoint=folder / "prepare.pt",
            on_epoch=on_epoch,
            description=f"{cell.name}, {type(other).__name__}",
        )

    def view(index: np.ndarray, size: int) -> tuple[torch.Tensor, np.ndarray]:
        draws = torch.rand(len(index), DRAWS, generator=torch.Generator().manual_seed(cell.seed)).to(device)
        images = cache.take(torch.from_numpy(index), device)
        return (
            random_view(images, draws, size, zoom=config.zoom, stain=config.stain),
            input_mpp(cache.mpp[index], cache.height, size),
        )

    record, pictures = task.prepare(
        rows, fit_first, view, ds.features["label"].names, [domain_name(d) for d in domains]
    )
    if accelerator.is_main_process:
        for name, picture in pictures.items():
            picture.save(folder / name)
    return record


def _class_domain_information(label: np.ndarray, domain: np.ndarray) -> float:
    """Mutual information of class and domain in bits; a warning where forgetting the domain would cost the class."""
    joint = np.zeros((label.max() + 1, domain.max() + 1))
    np.add.at(joint, (label, domain), 1 / len(label))
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    bits = float((joint[joint > 0] * np.log2(joint[joint > 0] / apart[joint > 0])).sum())
    if bits > 0.05:
        warnings.warn(
            f"class and domain share {bits:.2f} bits in the training rows: a model that must not know the domain "
            "cannot use all it could know of the class",
            stacklevel=2,
        )
    return bits


def _create_task(cell: Cell, ds, num_domains: int, tested: set[str]) -> tuple[Task, dict]:
    """The cell's task, seeded, and the record of the weights it starts from."""
    method = get_task(cell.method)
    torch.manual_seed(cell.seed)
    classes = ds.features["label"].num_classes
    arch = cell.model or method.arch
    model = method.create_model(arch, num_classes=classes, num_domains=num_domains)
    start = {"source": None}
    if cell.pretrained_backbone:
        start = load_backbone(model, cell.pretrained_backbone)
    elif method.pretrained:
        config = resolve(arch.removeprefix("local-dir:"), "config.json").read_text() if ":" in arch else "{}"
        seen = json.loads(config).get("seen", {})
        start = {"source": arch, "patients": seen.get("patients"), "magnifications": seen.get("magnifications")}
    if start["source"]:
        seen = sorted(tested & set(start["patients"] or []))
        magnification = cell.held_out in (start["magnifications"] or [])
        start["saw_test"] = bool(seen or magnification)
        if start["saw_test"] and not cell.allow_seen_init:
            what = [f"patients {', '.join(seen[:5])}"] * bool(seen)
            what += [f"the {domain_column(ds)} {cell.held_out}"] * magnification
            raise ValueError(
                f"the weights {start['source']} have seen {' and '.join(what)}, which this cell validates or "
                "tests on; start from others, or pass --allow-seen-init, which marks the result in every table"
            )
    own = own_options(cell.method)
    if unknown := set(cell.options) - own:
        has = f"its options are {', '.join(sorted(own))}" if own else "it has none"
        raise ValueError(f"{cell.method} has no option {', '.join(sorted(unknown))}: {has}")
    options = {name: getattr(cell, name) for name in method.options if name not in own} | cell.options
    try:
        task = method(model, **options)
    except TypeError as error:
        if not cell.options:
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in cell.options.items())
        raise ValueError(f"{cell.method} does not take the options {given}: {error}") from error
    return task, start | {"initial_sha256": weights_digest(model)}


def _config(cell: Cell, ds) -> dict:
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "arguments": arguments(cell, ds),
        "recipe": cell.frozen,
        "recipe_sha256": cell.recipe_sha256,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("magnification-invariant", "torch", "timm", "numpy", "scikit-learn")},
        },
        "git": git.stdout.strip() or None,
    }


def _records(cell: Cell, columns: dict, split: Split, epoch: int, logits: dict[str, np.ndarray]) -> pa.Table:
    about = {"fold": cell.fold, "held_out": cell.held_out, "method": cell.method, "seed": cell.seed}
    return pa.concat_tables(
        prediction_table(columns, getattr(split, part), values, part=part, epoch=epoch, **about)
        for part, values in logits.items()
    )


def _rescaled(columns: dict, split: Split) -> dict[str, int]:
    """How many images of each part were resampled from another scale (digital zoom) and not photographed at theirs."""
    return {part: int(columns["rescaled"][getattr(split, part)].sum()) for part in ("train", *PARTS)}


def _keys(columns: dict, rows: np.ndarray) -> dict[str, np.ndarray]:
    """What each of the embeddings of `rows` is."""
    return {"row": rows} | {name: columns[name][rows] for name in ("filename", "patient", "label", "domain")}


def _signature(embeddings: dict, split: Split, columns: dict) -> tuple[SparseSignature | None, dict]:
    """The signature of the training embeddings, how well it does itself, and how far refits of it agree.

    The refits leave out one training domain each, or, of a single one, halves of the patients, on the one backbone:
    indices mean the same in all. A representation that has collapsed has no signature; that is a result, not an error.
    """
    label, patient = columns["label"], columns["patient"]
    try:
        signature = SparseSignature().fit(
            embeddings["train"],
            label[split.train],
            groups=patient[split.train],
            X_val=embeddings["val"],
            y_val=label[split.val],
            groups_val=patient[split.val],
        )
    except NothingToSelect as error:
        return None, {"size": 0, "width": embeddings["train"].shape[1], "why_none": str(error)}
    domains = columns["domain"][split.train]
    stability = refit_stability(
        signature,
        embeddings["train"],
        label[split.train],
        domains,
        patient[split.train],
        n_subsamples=10 if (domains == domains[0]).all() else 0,
    )
    part = "test" if len(split.test) else "test_source"
    rows = getattr(split, part)
    test = scores(label[rows], signature.predict_proba(embeddings[part])[:, 1], patient[rows])
    curve = {"size": signature.path_size_, "val": signature.validation_loss_}
    curve["test"] = signature.loss_curve(embeddings[part], label[rows], patient[rows])
    return signature, {
        "size": len(signature.signature_),
        "width": embeddings["train"].shape[1],
        "live": int(signature.n_live_),
        **stability,
        "test": test,
        "curve": {name: values.tolist() for name, values in curve.items()},
    }


def _write_model(cell, ds, folder, model, columns, split, results, signature) -> None:
    size, mpp = cell.image_size, columns["mpp"][split.train]
    zoom = cell.fit_config.zoom
    arch, source = cell.model or get_task(cell.method).arch, source_name(ds)
    name = f"{arch}.{source}_{cell.left_out}" if len(split.test) else f"{arch}.{source}"
    if _NAMED_AFTER.get(arch) != cell.method:
        name += "_" + cell.method.replace(":", ".")
    name += "_zoom" * cell.zoom
    trained = np.concatenate([split.train, split.val])
    about = {
        "temperature": results["temperature"],
        "trained_on": source,
        "mpp_source": sorted({round(float(m), 6) for m in np.asarray(ds["mpp"], float)[split.train] if m == m}),
        "seen": {
            "patients": sorted(set(columns["patient"][trained])),
            "magnifications": np.unique(columns["domain"][trained]).tolist(),
        },
    }
    if not np.isnan(mpp).any():  # else nothing is stated: a range of the others would leave images out
        about["mpp_range"] = [float(mpp.min() / zoom), float(mpp.max() * zoom)]
    data_config = {
        "input_size": [3, size, size],
        "mean": MEAN,
        "std": STD,
        "interpolation": "bilinear",
        "crop_pct": CROP_PCT,
        "crop_mode": "center",
    }
    labels = ds.features["label"].names
    target = write_model_folder(
        folder / "model", model, name=name, label_names=labels, data_config=data_config, about=about
    )
    if signature is not None:
        known = {
            "class_names": labels,
            "embedding": cell.embedding,
            "source": name,
            "mpp_range": about.get("mpp_range"),
        }
        known["weights_sha256"] = weights_digest(model)
        known["stability"] = {k: v for k, v in results["signature"].items() if k not in ("test", "curve")}
        SignatureProjector.from_signature(signature, **known).save_pretrained(target)
    shutil.copy(folder / "predictions.parquet", target)
    write_json(target / "results.json", results)
