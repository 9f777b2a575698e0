"""Runs one cell: trains, predicts, explains by a signature, and records (see `records` for what)."""

import hashlib
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from magnification_invariant import metrics
from magnification_invariant.data.pixels import PixelCache, ViewCache, decoded_views
from magnification_invariant.data.splits import (
    Folds,
    Split,
    assert_disjoint,
    domain_column,
    domain_name,
    leave_one_domain_out,
)
from magnification_invariant.data.vectors import VectorCache, is_of_vectors
from magnification_invariant.data.views import CROP_PCT, cache_height, field_mpp, random_draws, random_view, view_mpp
from magnification_invariant.engine import Diverged, Network, TrainRows, fit, predict_all
from magnification_invariant.files import locked, read_json, remove_unfinished, write_json
from magnification_invariant.lomo.cell import Cell, is_finished
from magnification_invariant.lomo.embedded import check_cell
from magnification_invariant.model_folder import find_start, load_start, source_name, write_model_folder
from magnification_invariant.models import normalisation, scope_stage
from magnification_invariant.records import (
    KEYS,
    NORMALISED,
    PARTS,
    Run,
    evaluate,
    prediction_table,
    scores,
)
from magnification_invariant.scope import Scope
from magnification_invariant.signatures import SignatureProjector, SparseSignature, refit_stability, weights_digest
from magnification_invariant.signatures.sparse_signature import NothingToSelect
from magnification_invariant.tasks import Task, get_task
from magnification_invariant.tasks.floors import FLOORS, Labelled

_NAMED_AFTER = {"magerm_resnet18": "erm", "magdg_resnet18": "dann", "maggan_resnet18": "gan"}


@dataclass(frozen=True, eq=False)
class _Job:
    """A cell with what it is run on.

    Attributes:
        columns: of the whole table, by name, in the protocol view.
        base_range: least and largest um/px at which a training image fills the input; None where one is unknown, and
            of vectors.
    """

    cell: Cell
    ds: Any
    run: Run
    split: Split
    views: ViewCache | VectorCache
    columns: dict[str, np.ndarray]
    base_range: tuple[float, float] | None
    accelerator: Any

    @property
    def parts(self) -> list[str]:
        """Where nothing is held out, there is no "test"."""
        return [part for part in PARTS if len(self.rows(part))]

    @property
    def mpp_range(self) -> list[float] | None:
        """Um/px that training shows, with its smallest crops and its zoom."""
        zoom = self.cell.fit.zoom
        return self.base_range and [self.base_range[0] * CROP_PCT / zoom, self.base_range[1] * zoom]

    @property
    def image_size(self) -> int | None:
        """Side of the network's square input in pixels; None of vectors."""
        return None if isinstance(self.views, VectorCache) else self.cell.fit.image_size

    def rows(self, part: str) -> np.ndarray:
        return getattr(self.split, part)

    def labelled(self, part: str) -> Labelled:
        rows = self.rows(part)
        return Labelled(rows, self.columns["label"][rows], metrics.patient_weights(self.columns["patient"][rows]))

    def training_cache(self) -> PixelCache | VectorCache:
        if isinstance(self.views, VectorCache):
            return self.views
        return PixelCache(self.ds, cache_height(self.cell.fit.image_size, self.cell.fit.zoom))

    def keys(self, part: str) -> dict[str, np.ndarray]:
        return {name: self.columns[name][self.rows(part)] for name in KEYS}

    def records(self, part: str, epoch: int, logits: np.ndarray, **changed: np.ndarray) -> pa.Table:
        """Predictions of a part's rows; `changed` are values of columns that differ from the protocol view's."""
        cell, rows = self.cell, self.rows("test" if part == NORMALISED else part)
        columns = {name: column[rows] for name, column in self.columns.items()} | changed
        constants = {"fold": cell.fold, "held_out": cell.held_out, "method": cell.method, "seed": cell.seed}
        return prediction_table(columns, np.arange(len(rows)), logits, part=part, epoch=epoch, **constants)


def run_cell(
    cell: Cell,
    ds,
    folder: Path,
    *,
    split: Split | None = None,
    accelerator=None,
    data_source: str | None = None,
    half: bool = False,
) -> None:
    """Train, predict, explain by a signature, and record one cell; a run that was cut off is taken up where it stopped.

    Args:
        split: instead of the cell's own; one that holds no domain out has the tested rows in `test_source`.
        accelerator: whose processes share the training; one for this process by default.
        data_source: as the data were named by who asked for them; recorded.
        half: round the trained matrices to what float16 holds before they are recorded: the model's file is half as
            large, and what is recorded is what it gives.

    Raises:
        ValueError: the folder holds other settings; the table cannot be split so; the start has seen the test.
        Busy: another process runs this cell.
        Diverged: the loss is no longer finite.
    """
    torch.set_num_threads(cell.threads)
    is_finished(folder, cell, ds)  # raises where the folder holds something else
    split = split or _split(cell, ds)
    assert_disjoint(split, ds)
    if accelerator is None and cell.method not in FLOORS:
        from accelerate import Accelerator

        accelerator = Accelerator(mixed_precision=cell.mixed_precision)
    with _claimed(folder, accelerator):
        if is_finished(folder, cell, ds):  # by another process, since somebody looked
            return
        if accelerator is None or accelerator.is_main_process:
            for place in (folder, folder / "epochs", folder / "prepare"):
                remove_unfinished(place)
        job = _job(cell, ds, Run(folder), split, accelerator)
        config = {**cell.identity(ds), "machine": _machine()}
        config["cell"]["data_source"] = data_source
        if cell.method in FLOORS:
            _run_floor(job, config)
        else:
            _run_network(job, config, half)


@contextmanager
def _claimed(folder: Path, accelerator) -> Iterator[None]:
    """The first process locks the folder for all of a launch; if it cannot, none of them goes on."""
    if accelerator is None or accelerator.num_processes == 1:
        with locked(folder):
            yield
        return
    from accelerate.utils import broadcast_object_list

    lock, refused = locked(folder), [None]
    if accelerator.is_main_process:
        try:
            lock.__enter__()
        except OSError as error:  # Busy, or no lock can be made: the others must not wait for this process
            refused = [error]
    broadcast_object_list(refused)
    if refused[0]:
        raise refused[0]
    try:
        yield
    finally:
        if accelerator.is_main_process:
            lock.__exit__(None, None, None)


def _split(cell: Cell, ds) -> Split:
    if cell.split:
        return Folds.from_json(cell.split).split(ds, cell.held_out, cell.fold)
    dealt = {"n_folds": cell.n_folds, "fold": cell.fold, "split_seed": cell.split_seed}
    return leave_one_domain_out(ds, cell.held_out, **dealt)


def _job(cell: Cell, ds, run: Run, split: Split, accelerator) -> _Job:
    columns = {name: np.asarray(ds[name][:]) for name in ("filename", "patient", "slide", "label")}
    columns["domain"] = np.asarray(ds[domain_column(ds)][:])
    columns["rescaled"] = np.asarray(ds["rescaled"][:] if "rescaled" in ds.column_names else np.zeros(len(ds)), bool)
    if is_of_vectors(ds):
        check_cell(cell)
        return _Job(cell, ds, run, split, VectorCache(ds), columns, None, accelerator)
    size = cell.fit.image_size
    with accelerator.main_process_first() if accelerator else nullcontext():
        views = ViewCache(ds, size)
    columns |= {"mpp": views.mpp, "filled": views.filled, "tiles": np.diff(views.starts)}
    unknown = np.isnan(views.mpp)
    if cell.fit.zoom > 1 and cell.method not in FLOORS and unknown.any():
        raise ValueError(
            f"continuous zoom states the micrometres per pixel it covers, and {unknown.sum()} images have none (first: "
            f"{columns['filename'][unknown][0]}): give the table a column 'mpp', or train without zoom"
        )
    short = views.short_side[split.train]
    if short.min() < size:
        raise ValueError(
            f"an image size of {size} needs training images of as many pixels on the short side, and the smallest "
            f"({columns['filename'][split.train][short.argmin()]}) has {short.min()}: take that as the image size"
        )
    field = field_mpp(views.native_mpp, views.short_side, size)[split.train]
    base_range = None if np.isnan(field).any() else (float(field.min()), float(field.max()))
    return _Job(cell, ds, run, split, views, columns, base_range, accelerator)


def _run_floor(job: _Job, config: dict) -> None:
    run = job.run
    run.write_config(config)
    predictor = FLOORS[job.cell.method](job.views, job.labelled("train"), job.labelled("val"))
    tables = []
    for part in job.parts:
        log_odds = predictor(job.rows(part))
        tables.append(job.records(part, 0, np.stack([np.zeros_like(log_odds), log_odds], 1)))
    run.write_predictions(pa.concat_tables(tables))
    run.write_results({"temperature": 1.0, "parts": evaluate(run, 1.0), "rescaled": _rescaled(job)})


def _run_network(job: _Job, config: dict, half: bool) -> None:
    started, main, cell, run = time.perf_counter(), job.accelerator.is_main_process, job.cell, job.run
    train = job.split.train
    domains, domain = np.unique(job.columns["domain"][train], return_inverse=True)
    task, start = _create_task(job, len(domains))
    if main:
        run.write_config(config | {"start": start})
    rows = TrainRows(train, job.columns["label"][train], domain, job.columns["patient"][train])
    with job.accelerator.main_process_first():
        cache = job.training_cache()
    prepared = _prepare(job, task, rows, cache, domains)
    prepare_seconds = time.perf_counter() - started

    def on_epoch(epoch: int, model: torch.nn.Module, log: dict) -> None:
        if half and epoch + 1 == cell.fit.epochs:
            for parameter in (each.data for each in model.parameters() if each.ndim > 1):
                parameter.copy_(parameter.half())
        if main:
            _write_epoch(run.folder / "epochs", epoch, log)
            job.accelerator.log({f"{cell.name}/{name}": value for name, value in log.items()}, step=epoch)

    checkpoint = run.folder / "checkpoint.pt"
    options = {"accelerator": job.accelerator, "checkpoint": checkpoint, "on_epoch": on_epoch}
    model = fit(task, cache, rows, cell.fit, **options, description=cell.name)
    network = Network(model, cell.embedding, scope_stage(model))
    outputs = {part: _predicted(job, network, part) for part in ("train", *job.parts)}
    if not all(np.isfinite(logits).all() for logits, *_ in outputs.values()):
        raise Diverged("the trained model predicts what is not a finite number")
    if main:
        normalised, shown_otherwise = _normalised(job, network, outputs.get("test", []))
        results = {"rescaled": _rescaled(job), "mpp_range": job.mpp_range, "base_range": job.base_range, **prepared}
        if isinstance(shown_otherwise, str):
            results["normalised_why_none"] = shown_otherwise
        else:
            outputs[NORMALISED] = shown_otherwise
        last = cell.fit.epochs - 1
        tables = [job.records(part, last, outputs[part][0]) for part in job.parts]
        run.write_predictions(pa.concat_tables([*tables, *([normalised] if normalised is not None else [])]))
        _record(job, model, outputs, results)
        seconds = time.perf_counter() - started
        run.write_timing(prepare_seconds=prepare_seconds, seconds=seconds)
        write_json(run.model / "results.json", results | {"record": run.config, "seconds": seconds})
        for name in ("prepare.pt", "checkpoint.pt"):  # before the epochs: a checkpoint without them could not go on
            (run.folder / name).unlink(missing_ok=True)
        for name in ("prepare", "epochs"):
            shutil.rmtree(run.folder / name, ignore_errors=True)
        run.write_results(results)


def _predicted(job: _Job, network: Network, part: str) -> list[np.ndarray]:
    batch = {} if job.image_size else {"batch_size": 1024}  # a vector is a small tile
    return predict_all(network, job.views.views, job.rows(part), accelerator=job.accelerator, **batch)


def _normalised(
    job: _Job, network: Network, outputs: list[np.ndarray]
) -> tuple[pa.Table, list[np.ndarray]] | tuple[None, str]:
    """Predictions and outputs of the unseen domain in the normalised view, or why there are none.

    `outputs` are the protocol view's.
    """
    rows, views, size = job.split.test, job.views, job.cell.fit.image_size
    if isinstance(views, VectorCache):
        return None, "embeddings were made in one view"
    if not len(rows) or job.base_range is None:
        return None, "nothing is held out" if not len(rows) else "the scale of some training images is not known"
    native = views.native_mpp[rows]
    mpp = view_mpp("normalised", native, views.short_side[rows], size, job.base_range)
    if np.isnan(mpp).any():
        return None, "the scale of some tested images is not known"
    changed = np.flatnonzero(~np.isclose(mpp, views.mpp[rows], rtol=1e-9))
    columns = {name: job.columns[name][rows].copy() for name in ("filled", "tiles")}
    if len(changed):
        outputs = [output.copy() for output in outputs]

        def shown(places: np.ndarray):
            views_of = decoded_views(job.ds, rows[places], mpp[places], size)
            for place, view in zip(places, views_of, strict=True):
                columns["filled"][place], columns["tiles"][place] = view.filled, len(view.tiles)
                yield view.tiles

        try:
            for output, new in zip(outputs, predict_all(network, shown, changed), strict=True):
                output[changed] = new
        except ValueError as error:  # the field is too small at every scale that was trained on
            return None, str(error)
    return job.records(NORMALISED, job.cell.fit.epochs - 1, outputs[0], mpp=mpp, **columns), outputs


def _record(job: _Job, model, outputs: dict[str, list[np.ndarray]], results: dict) -> None:
    """Writes losses, embeddings and the model; adds temperature, metrics, signature and scope to `results`."""
    run, embeddings = job.run, {part: outputs[part][1] for part in ("train", *job.parts)}
    for epochs, stage in (("epochs", "metrics"), ("prepare", "prepare")):
        if losses := [read_json(path) for path in sorted((run.folder / epochs).glob("*.json"))]:
            run.write_losses(losses, stage)
    run.write_embeddings(embeddings, {part: job.keys(part) for part in embeddings})
    results["temperature"] = 1.0
    if job.cell.calibrate:
        val = run.part("val", 1.0)
        weight = metrics.patient_weights(val["patient"])
        results["temperature"] = metrics.fit_temperature(val["logits"], val["label"], sample_weight=weight)
    signature, results["signature"] = _signature(embeddings, job.split, job.columns)
    results["parts"] = evaluate(run, results["temperature"])
    results["uncalibrated"] = evaluate(run, 1.0)
    statistics = {part: each[2] for part, each in outputs.items() if len(each) > 2}
    scope, results["scope"] = _scope(job, model, statistics)
    _write_model(job, model, results, signature, scope)


def _write_epoch(folder: Path, epoch: int, log: dict) -> None:
    reproducible = {name: value for name, value in log.items() if name != "images_per_second"}
    write_json(folder / f"{epoch:04d}.json", {"epoch": epoch, **reproducible})


def _prepare(job: _Job, task: Task, rows: TrainRows, cache: PixelCache | VectorCache, domains: np.ndarray) -> dict:
    """Train what the task needs before itself, leave its pictures in the folder, return its records."""
    cell, run, accelerator, config = job.cell, job.run, job.accelerator, job.cell.fit

    def fit_first(other: Task, **changes) -> torch.nn.Module:
        name = f"{cell.name}, {type(other).__name__}"

        def on_epoch(epoch: int, model: torch.nn.Module, log: dict) -> None:
            if accelerator.is_main_process:
                _write_epoch(run.folder / "prepare", epoch, log)
                accelerator.log({f"{name}/{key}": value for key, value in log.items()}, step=epoch)

        options = {"accelerator": accelerator, "checkpoint": run.folder / "prepare.pt", "on_epoch": on_epoch}
        return fit(other, cache, rows, replace(config, **changes), **options, description=name)

    def view(index: np.ndarray, size: int) -> tuple[torch.Tensor, np.ndarray]:
        draws = random_draws(len(index), 1, torch.Generator().manual_seed(cell.seed))
        images = cache.take(torch.from_numpy(index), accelerator.device)
        shown = random_view(images, draws.to(accelerator.device), size, zoom=config.zoom, stain=config.stain)
        return shown, field_mpp(cache.native_mpp, cache.short_side, size)[index]

    class_names = job.ds.features["label"].names
    record, pictures = task.prepare(rows, fit_first, view, class_names, [domain_name(d) for d in domains])
    if accelerator.is_main_process:
        for name, picture in pictures.items():
            picture.save(run.folder / name)
    return record


def _create_task(job: _Job, num_domains: int) -> tuple[Task, dict]:
    """The cell's task, seeded, and the record of the weights it starts from."""
    cell, ds, split = job.cell, job.ds, job.split
    method = get_task(cell.method)
    torch.manual_seed(cell.seed)
    size = {"image_size": job.image_size} if job.image_size else {"width": job.views.vectors.shape[1]}
    classes = ds.features["label"].num_classes
    model = method.create_model(cell.architecture, num_classes=classes, num_domains=num_domains, **size)
    if isinstance(job.views, VectorCache):
        train = job.labelled("train")
        model.standardise(job.views.vectors[train.rows].cpu().numpy(), train.weight)
    source = find_start(cell.architecture, cell.init)
    start = load_start(model, source) if source else {"source": None}
    if source:
        tested = set(job.columns["patient"][[*split.val, *split.test, *split.test_source]])
        patients = sorted(tested & set(start["patients"] or []))
        domain = cell.held_out in (start["magnifications"] or [])
        start["saw_test"] = bool(patients or domain)
        if start["saw_test"] and not cell.allow_seen_init:
            what = [f"patients {', '.join(patients[:5])}"] * bool(patients)
            what += [f"the {domain_column(ds)} {cell.held_out}"] * domain
            raise ValueError(
                f"the weights {start['source']} have seen {' and '.join(what)}, which this cell validates or "
                "tests on; start from others, or pass --allow-seen-init, which marks the result in every table"
            )
    return method(model, cell.options), start | {"initial_sha256": weights_digest(model)}


def _machine() -> dict:
    git = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    packages = ("magnification-invariant", "torch", "timm", "numpy", "scikit-learn")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return {"threads": torch.get_num_threads(), "versions": versions, "git": done.stdout.strip() or None}


def _rescaled(job: _Job) -> dict[str, int]:
    """How many images of each part were resampled from another scale (digital zoom) and not photographed at theirs."""
    return {part: int(job.columns["rescaled"][job.rows(part)].sum()) for part in ("train", *PARTS)}


_LAST_SIGNATURE: dict[str, tuple] = {}  # methods and seeds that share a representation, as of vectors, share it


def _signature(embeddings: dict, split: Split, columns: dict) -> tuple[SparseSignature | None, dict]:
    """`_new_signature`, or the last one again where it is of the same embeddings and rows."""
    digest = hashlib.sha256()
    for part, vectors in embeddings.items():
        rows = getattr(split, part)
        for column in (vectors, rows, columns["label"][rows]):
            digest.update(np.ascontiguousarray(column))
        digest.update(json.dumps([columns[name][rows].tolist() for name in ("patient", "domain")]).encode())
    if (key := digest.hexdigest()) not in _LAST_SIGNATURE:
        made = _new_signature(embeddings, split, columns)
        _LAST_SIGNATURE.clear()
        _LAST_SIGNATURE[key] = made
    return _LAST_SIGNATURE[key]


def _new_signature(embeddings: dict, split: Split, columns: dict) -> tuple[SparseSignature | None, dict]:
    """The signature of the training embeddings, how well it does itself, and how far refits of it agree.

    The refits leave out one training domain each, or, of a single one, halves of the patients, on the one backbone:
    indices mean the same in all. A representation that has collapsed has no signature; that is a result, not an error.
    """
    label, patient = columns["label"], columns["patient"]
    x, y, groups = embeddings["train"], label[split.train], patient[split.train]
    val = {"X_val": embeddings["val"], "y_val": label[split.val], "groups_val": patient[split.val]}
    try:
        signature = SparseSignature().fit(x, y, groups=groups, **val)
    except NothingToSelect as error:
        return None, {"size": 0, "width": x.shape[1], "why_none": str(error)}
    domains = columns["domain"][split.train]
    halves = 10 if (domains == domains[0]).all() else 0
    stability = refit_stability(signature, x, y, domains, groups, n_subsamples=halves)
    part = next(part for part in ("test", "test_source", "val") if len(getattr(split, part)))
    rows = getattr(split, part)
    curve = {"size": signature.path_size_, "val": signature.validation_loss_}
    curve["test"] = signature.loss_curve(embeddings[part], label[rows], patient[rows])
    return signature, {
        "size": len(signature.signature_),
        "width": x.shape[1],
        "live": int(signature.n_live_),
        **stability,
        "test": scores(label[rows], signature.predict_proba(embeddings[part])[:, 1], patient[rows]),
        "curve": {name: values.tolist() for name, values in curve.items()},
    }


def _scope(job: _Job, model, statistics: dict[str, np.ndarray]) -> tuple[Scope | None, dict]:
    """What is usual for the model, and how often tested images are called unusual; see `scope`.

    The validation patients set the threshold. A network without stages, or one that has collapsed, has no scope.
    """
    if not statistics:
        return None, {"why_none": "it is of images, and this is a model of embeddings"}
    patient = job.columns["patient"]
    known = {"stage": scope_stage(model), "weights_sha256": weights_digest(model)}
    try:
        scope = Scope.fit(statistics["train"], statistics["val"], patient[job.split.val], **known)
    except ValueError as error:
        return None, {"why_none": str(error)}
    tested = [part for part in statistics if part not in ("train", "val")]
    rows = {part: job.rows("test" if part == NORMALISED else part) for part in tested}
    return scope, {
        "stage": scope.stage,
        "threshold": scope.threshold,
        "patients": len(np.unique(patient[job.split.val])),
        "false_alarms": {part: scope.share_out(statistics[part], patient[of]) for part, of in rows.items()},
    }


def _model_name(job: _Job, source: str) -> str:
    arch = job.cell.architecture
    name = f"{arch}.{source}_{job.cell.held_out_name}" if len(job.split.test) else f"{arch}.{source}"
    if _NAMED_AFTER.get(arch) != job.cell.method:
        name += "_" + job.cell.method.replace(":", ".")
    return name.replace("/", "_").replace(":", "_") + "_zoom" * (job.cell.fit.zoom > 1)


def _write_model(job: _Job, model, results: dict, signature: SparseSignature | None, scope: Scope | None) -> None:
    cell, split, columns = job.cell, job.split, job.columns
    source, labels = source_name(job.ds), job.ds.features["label"].names
    name, trained = _model_name(job, source), np.concatenate([split.train, split.val])
    native = job.views.native_mpp[split.train]
    about = {
        "temperature": results["temperature"],
        "trained_on": source,
        "mpp_source": sorted({round(float(m), 6) for m in native if m == m}),
        "seen": {
            "patients": sorted(set(columns["patient"][trained])),
            "magnifications": np.unique(columns["domain"][trained]).tolist(),
        },
    }
    if job.base_range:  # else nothing is stated: a range of the others would leave images out
        about |= {"base_range": list(job.base_range), "mpp_range": job.mpp_range}
    mean, std = normalisation(model)
    target = write_model_folder(
        job.run.folder / "model",
        model,
        name=name,
        label_names=labels,
        image_size=job.image_size,
        normalisation=(mean, std),
        about=about,
    )
    if signature is not None:
        known = {"class_names": labels, "embedding": cell.embedding, "source": name, "mpp_range": job.mpp_range}
        known["stability"] = {k: v for k, v in results["signature"].items() if k not in ("test", "curve")}
        projector = SignatureProjector.from_signature(signature, **known, weights_sha256=weights_digest(model))
        projector.save_pretrained(target)
    if scope is not None:
        scope.save_pretrained(target)
    shutil.copy(job.run.folder / "predictions.parquet", target)
