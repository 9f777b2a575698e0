"""The only training loop, and prediction. It knows no method by name: see `tasks.Task` for what it asks of one."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from timm.utils import ModelEmaV3
from tqdm import tqdm

from magnification_invariant.data.augment import DRAWS, centre_view, random_view
from magnification_invariant.data.pixels import PixelCache
from magnification_invariant.models import embed
from magnification_invariant.tasks import Task

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as timm's default
CHECKPOINT_SECONDS = 60.0  # between two checkpoints: what a killed run does again, and an epoch


@dataclass(frozen=True)
class FitConfig:
    """How to train; the same for every method.

    Attributes:
        epochs: passes of ``ceil(rows / batch_size)`` steps.
        batch_size: images a step, over all processes together.
        learning_rate: of AdamW after the warm-up.
        weight_decay: of weights, not of biases and norms.
        warmup: share of the steps in which the learning rate rises linearly.
        schedule: of the learning rate, "cosine" or "constant".
        clip_norm: largest gradient norm of each parameter group of a player; 0 turns it off.
        ema_decay: of the average of the weights that predicts; 0 predicts with the last weights.
        image_size: side of the network's square input in pixels.
        zoom: the training zoom is log-uniform in [1 / zoom, zoom]; 1 turns it off.
        stain: strength of the stain jitter; 0 turns it off.
        seed: of the order of images and of the augmentation.
        compile: `torch.compile` augmentation, model and loss into one graph; pays on a GPU, not on a CPU.
        log_every: steps between two looks at the losses, since every look makes the host wait for the device.
    """

    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    schedule: str = "cosine"
    clip_norm: float = 1.0
    ema_decay: float = 0.998
    image_size: int = 224
    zoom: float = 1.0
    stain: float = 0.2
    seed: int = 0
    compile: bool = False
    log_every: int = 20


@dataclass(frozen=True)
class TrainRows:
    """The training rows of a table, as arrays of one length.

    Attributes:
        index: rows of the cache.
        target: classes, from 0.
        domain: training domains, from 0 without gaps.
        group: patients, any type.
    """

    index: np.ndarray
    target: np.ndarray
    domain: np.ndarray
    group: np.ndarray

    def __len__(self) -> int:
        return len(self.index)


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


def epoch_order(rows: TrainRows, n: int, seed: int, epoch: int) -> np.ndarray:
    """Positions in `rows` of the `n` images of an epoch, a function of (rows, seed, epoch) alone.

    Domains take equal turns; within a domain patients do, and within a patient images, each in a fresh random order a
    round. A patient with 100 images so weighs as much as one with 10, as in the patient-balanced metrics.
    """
    rng = np.random.default_rng([seed, epoch])

    def rounds(items: np.ndarray, length: int) -> np.ndarray:
        times = math.ceil(length / len(items))
        return np.concatenate([rng.permutation(items) for _ in range(times)])[:length] if length else items[:0]

    turn = rounds(np.unique(rows.domain), n)
    order = np.empty(n, np.int64)
    for domain in np.unique(rows.domain):
        inside = np.flatnonzero(rows.domain == domain)
        patients, which = np.unique(rows.group[inside], return_inverse=True)
        slots = np.flatnonzero(turn == domain)
        patient_turn = rounds(np.arange(len(patients)), len(slots))
        for patient in range(len(patients)):
            taken = slots[patient_turn == patient]
            order[taken] = rounds(inside[which == patient], len(taken))
    return order


def learning_rate_factor(step: int, steps: int, warmup: float, schedule: str = "cosine") -> float:
    """Linear warm-up over the first `warmup` share of the steps, then a cosine to 0, or 1 throughout."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _step_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def normalise(x: torch.Tensor) -> torch.Tensor:
    """[0, 1] RGB (b, 3, h, w) to what the network takes."""
    mean, std = (torch.tensor(v, dtype=x.dtype).view(3, 1, 1).to(x.device, non_blocking=True) for v in (MEAN, STD))
    return (x - mean) / std


def _optimizer(player, config: FitConfig) -> torch.optim.Optimizer:
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay, **player.options}
    groups = []
    for parameters in player.parameters:
        groups.append({"params": [p for p in parameters if p.ndim > 1]})
        groups.append({"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0})
    return torch.optim.AdamW([g for g in groups if g["params"]], fused=True, **options)


def fit(
    task: Task,
    cache: PixelCache,
    rows: TrainRows,
    config: FitConfig,
    *,
    accelerator=None,
    checkpoint: Path | None = None,
    on_epoch: Callable[[int, torch.nn.Module, dict], None] | None = None,
    description: str = "training",
) -> torch.nn.Module:
    """Train `task` on `rows` of `cache`.

    Every random number is a function of (seed, epoch, step), so that a run cut off and started again from
    `checkpoint` ends as one that was left alone.

    Several processes do what one does with the whole batch, with two exceptions. Random numbers drawn inside the model
    (dropout, a generator's noise) are each process's own. BatchNorm in training takes its statistics from the whole
    batch on GPUs (SyncBatchNorm), but from each process's share on CPUs, where torch has no such layer: there the
    loss differs from a single process's, as it would at a smaller batch, and the running statistics that predict are
    those of the first process.

    Args:
        accelerator: an `accelerate.Accelerator`; one for this process by default. Each of its processes takes an equal
            part of every batch, so `batch_size` must be a multiple of their number.
        checkpoint: file to resume from, if it is there, and to write after the last epoch, and before it after epochs
            that end `CHECKPOINT_SECONDS` or more after the checkpoint before.
        on_epoch: called on every process as ``on_epoch(epoch, model, log)`` with the model that predicts (the average
            if there is one, in eval mode) and the epoch's mean losses, learning rate and images/s.

    Returns:
        The model that predicts, in eval mode, on the accelerator's device.

    Raises:
        Diverged: a loss that is not finite, seen within `log_every` steps.
    """
    if accelerator is None:
        from accelerate import Accelerator

        accelerator = Accelerator()
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    if config.batch_size % world:
        raise ValueError(f"a batch of {config.batch_size} images cannot be shared equally by {world} processes")
    share = slice(rank * config.batch_size // world, (rank + 1) * config.batch_size // world)

    if device.type == "cuda":
        task = task.to(device, memory_format=torch.channels_last)
        if world > 1:
            task = torch.nn.SyncBatchNorm.convert_sync_batchnorm(task)
    cache.to(device)
    ema = ModelEmaV3(task.model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
    players = task.players
    if world > 1:
        from accelerate import DistributedDataParallelKwargs

        # a turn leaves the other players' parameters without a gradient
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=len(players) > 1)
    wrapped, *optimizers = accelerator.prepare(task, *(_optimizer(player, config) for player in players))
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    index, target, domain = (torch.from_numpy(np.ascontiguousarray(a)) for a in (rows.index, rows.target, rows.domain))
    index, target, domain = index.to(cache.pixels.device), target.to(device), domain.to(device)
    steps_per_epoch = math.ceil(len(rows) / config.batch_size)
    steps = steps_per_epoch * config.epochs
    progress = (torch.arange(steps, dtype=torch.float64) / steps).float().to(device)
    generator = torch.Generator(device)

    def forward(images, draws, target, domain, progress, player):
        view = random_view(images, draws, config.image_size, zoom=config.zoom, stain=config.stain)
        return wrapped(normalise(view), target, domain, progress, player=player)

    if config.compile:
        torch.compiler.reset()  # it compiles a function eight times and then no more: fits of one process would add up
        forward = torch.compile(forward)

    first_epoch = 0
    if checkpoint and checkpoint.exists():
        first_epoch = _load_checkpoint(checkpoint, task, ema, optimizers, device)
    saved = time.monotonic()

    bar = tqdm(
        total=steps,
        initial=first_epoch * steps_per_epoch,
        desc=description,
        unit="step",
        disable=None if accelerator.is_main_process else True,
    )
    for epoch in range(first_epoch, config.epochs):
        started, sums, shown = time.perf_counter(), {}, {}
        order = torch.from_numpy(epoch_order(rows, steps_per_epoch * config.batch_size, config.seed, epoch))
        on_cache, on_device = order.to(index.device), order.to(device)
        wrapped.train()
        for step in range(steps_per_epoch):
            now = epoch * steps_per_epoch + step
            factor = learning_rate_factor(now, steps, config.warmup, config.schedule)
            for turn, (player, optimizer) in enumerate(zip(players, optimizers, strict=True)):
                for group, rate in zip(optimizer.param_groups, base_rates[turn], strict=True):
                    group["lr"] = rate * factor
                for repeat in range(player.steps):
                    # Drawn for the whole batch and then shared out: the same draws for any number of processes.
                    generator.manual_seed(_step_seed(config.seed, epoch, step, turn, repeat))
                    draws = torch.rand(config.batch_size, DRAWS, generator=generator, device=device)[share]
                    torch.manual_seed(_step_seed(config.seed, epoch, step, turn, repeat, rank))  # dropout and the like
                    batch = slice(step * config.batch_size + share.start, step * config.batch_size + share.stop)
                    images, chosen = cache.take(index[on_cache[batch]], device), on_device[batch]
                    out = forward(images, draws, target[chosen], domain[chosen], progress[now], turn)
                    task.zero_grad(set_to_none=True)
                    accelerator.backward(out["loss"])
                    if config.clip_norm:
                        accelerator.unscale_gradients(optimizer)
                        for parameters in player.parameters:
                            torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
                    optimizer.step()
                for name, value in out.items():
                    if name != "output":
                        sums[name] = sums.get(name, 0.0) + value.detach().double()
            if ema:
                ema.update(task.model, step=now + 1)
            bar.update()
            if (step + 1) % config.log_every == 0 or step + 1 == steps_per_epoch:
                means = torch.stack(list(sums.values())) / (step + 1)
                shown = dict(zip(sums, accelerator.reduce(means, "mean").tolist(), strict=True))
                if not all(math.isfinite(value) for value in shown.values()):
                    bar.close()
                    raise Diverged(f"the loss is not finite in epoch {epoch}, step {step}: {shown}")
                rate = (step + 1) * config.batch_size / (time.perf_counter() - started)
                bar.set_postfix({**{k: f"{v:.3f}" for k, v in shown.items()}, "images/s": f"{rate:.0f}"})
        model = ema.module if ema else task.model.eval()
        if world > 1:
            for buffer in model.buffers():  # BatchNorm's on CPUs: all must predict with one model
                torch.distributed.broadcast(buffer, 0)
        log = {**shown, "learning_rate": config.learning_rate * factor, "images_per_second": rate}
        if on_epoch:
            on_epoch(epoch, model, log)
        due = epoch + 1 == config.epochs or time.monotonic() - saved >= CHECKPOINT_SECONDS
        if checkpoint and due and accelerator.is_main_process:
            _save_checkpoint(checkpoint, task, ema, optimizers, epoch + 1)
            saved = time.monotonic()
    bar.close()
    return ema.module if ema else task.model.eval()


def _save_checkpoint(path: Path, task, ema, optimizers, epochs_done: int) -> None:
    state = {
        "task": task.state_dict(),
        "ema": ema.state_dict() if ema else None,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "epochs_done": epochs_done,
    }
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with open(unfinished, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch reports a full disk as either
        unfinished.unlink(missing_ok=True)
        raise OSError(
            f"cannot write the checkpoint {path} ({error}); the one before it is kept: make room and start the same "
            "command again"
        ) from error
    unfinished.replace(path)


def _load_checkpoint(path: Path, task, ema, optimizers, device) -> int:
    state = torch.load(path, map_location=device, weights_only=True)
    task.load_state_dict(state["task"])
    if ema:
        ema.load_state_dict(state["ema"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["epochs_done"]


@torch.inference_mode()
def predict(
    model: torch.nn.Module,
    cache: PixelCache,
    rows: np.ndarray,
    image_size: int,
    *,
    batch_size: int = 64,
    embedding: str | None = None,
    accelerator=None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Logits, and on request embeddings, of rows of a cache: the centre of each image at the base scale.

    Args:
        model: in eval mode.
        rows: row indices (n,).
        embedding: "penultimate" or "pyramid", see `models.embed`; None for logits only.
        accelerator: its processes share the rows and all get the whole result, in the order of `rows`.

    Returns:
        float32 logits (n, classes) and embeddings (n, width) or None.
    """
    model.eval()
    device = next(model.parameters()).device
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    each = math.ceil(len(rows) / world)
    # The last process repeats the last row, so that all gather equally many; the surplus is cut off again.
    mine = np.minimum(np.arange(rank * each, (rank + 1) * each), len(rows) - 1)
    index = torch.from_numpy(np.asarray(rows, np.int64)[mine])
    outputs = []
    for part in index.split(batch_size):
        x = normalise(centre_view(cache.take(part, device), image_size))
        outputs.append(embed(model, x, embedding) if embedding else (model(x),))
    columns = [torch.cat(column).float() for column in zip(*outputs, strict=True)]
    if world > 1:
        columns = [accelerator.gather(column) for column in columns]
    logits, *rest = [column[: len(rows)].cpu().numpy() for column in columns]
    return logits, (rest[0] if rest else None)
