"""The only training loop, and prediction. It knows no method by name: see `tasks.Task` for what it asks of one."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from timm.utils import ModelEmaV3
from tqdm import tqdm

from magnification_invariant.data.pixels import PixelCache
from magnification_invariant.data.vectors import VectorCache
from magnification_invariant.data.views import mean_over_tiles, random_draws
from magnification_invariant.files import whole
from magnification_invariant.models import embed, normalisation
from magnification_invariant.tasks import Task
from magnification_invariant.tasks.options import option

CHECKPOINT_SECONDS = 60.0  # between two checkpoints: what a killed run does again, and an epoch


@dataclass(frozen=True)
class FitConfig:
    """How to train; the same for every method.

    `zoom` is the range of the training zoom, log-uniform in [1 / zoom, zoom]; 1 turns it off. `ema_decay` is of the
    average of the weights that predicts; 0 predicts with the last weights.
    """

    epochs: int = option(10, "passes of ceil(rows / batch size) steps", search=(8, 16, 30))
    batch_size: int = option(32, "images a step, over all processes together")
    learning_rate: float = option(1e-3, "of AdamW after the warm-up", search=(3e-4, 1e-2, "log"))
    weight_decay: float = option(0.05, "of weights, not of biases and norms", search=(1e-3, 0.3, "log"))
    warmup: float = option(0.05, "share of the steps in which the learning rate rises linearly")
    schedule: str = option("cosine", "of the learning rate", choices=("cosine", "constant"))
    clip_norm: float = option(1.0, "largest gradient norm of each parameter group of a player; 0: none")
    ema_decay: float = option(0.998, "of the average of the weights that predicts; 0: none")
    image_size: int = option(224, "side of the network's square input in pixels")
    zoom: float = option(1.0, "train at scales from 1 / zoom to zoom times the image's own; 1: none")
    stain: float = option(0.2, "strength of the stain jitter; 0: none")
    seed: int = option(0, "of the order of images and of the augmentation")
    compile: bool = option(False, "torch.compile; pays on a GPU, not on a CPU")
    log_every: int = option(20, "steps between two looks at the losses, which make the host wait")


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


class Network(torch.nn.Module):
    """From pixels as they are stored to logits and embedding: what a model's records and its users run alike.

    Args:
        model: A timm classifier; the mean and std of its own config are part of the graph.
        embedding: See `models.embed`; None for logits alone.
        stage: Whose statistics are a third output, see `models.embed`; None for none. It needs an embedding.
    """

    def __init__(self, model: torch.nn.Module, embedding: str | None = "penultimate", stage: int | None = None):
        super().__init__()
        self.model, self.embedding, self.stage = model, embedding, stage
        for name, value in zip(("shift", "scale"), normalisation(model), strict=True):
            self.register_buffer(name, 255 * torch.tensor(value, dtype=torch.float32).view(3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """uint8 RGB (b, 3, size, size) to logits (b, classes) and, where wanted, embedding (b, width), statistics.

        Vectors (b, width), of a model that takes those, go in as they are.
        """
        x = images if images.ndim == 2 else (images.float() - self.shift) / self.scale
        return embed(self.model, x, self.embedding, self.stage) if self.embedding else (self.model(x),)

    def runner(self) -> Callable[[np.ndarray], list[np.ndarray]]:
        """A function from uint8 tiles (b, 3, size, size) to outputs, float32, on the network's device."""
        self.eval().to(memory_format=torch.channels_last)  # else the weights are turned at every call

        @torch.inference_mode()
        def run(tiles: np.ndarray) -> list[np.ndarray]:
            images = torch.from_numpy(tiles).to(self.shift.device)
            if images.ndim == 4:
                images = images.contiguous(memory_format=torch.channels_last)
            return [output.float().cpu().numpy() for output in self(images)]

        return run


def _optimizer(player, config: FitConfig) -> torch.optim.Optimizer:
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay, **player.options}
    groups = []
    for parameters in player.parameters:
        groups.append({"params": [p for p in parameters if p.ndim > 1]})
        groups.append({"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0})
    return torch.optim.AdamW([g for g in groups if g["params"]], fused=True, **options)


def fit(
    task: Task,
    cache: PixelCache | VectorCache,
    rows: TrainRows,
    config: FitConfig,
    *,
    accelerator=None,
    checkpoint: Path | None = None,
    on_epoch: Callable[[int, torch.nn.Module, dict], None] | None = None,
    description: str = "training",
) -> torch.nn.Module:
    """Train `task` on `rows` of `cache`, which says what a batch of them is (`PixelCache`, `VectorCache`).

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

    task = task.to(device, memory_format=torch.channels_last)  # faster on CPUs too
    if device.type == "cuda" and world > 1:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(task)  # of its parts: it is none itself
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
    index, target, domain = index.to(cache.device), target.to(device), domain.to(device)
    steps_per_epoch = math.ceil(len(rows) / config.batch_size)
    steps = steps_per_epoch * config.epochs
    progress = (torch.arange(steps, dtype=torch.float64) / steps).float().to(device)
    generator = torch.Generator(device)
    augment = cache.augmentation(config, *(torch.tensor(v, device=device) for v in normalisation(task.model)))

    def forward(images, draws, target, domain, progress, player):
        return wrapped(augment(images, draws), target, domain, progress, player=player)

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
                    draws = random_draws(config.batch_size, task.views, generator, share)
                    torch.manual_seed(_step_seed(config.seed, epoch, step, turn, repeat, rank))  # dropout and the like
                    batch = slice(step * config.batch_size + share.start, step * config.batch_size + share.stop)
                    images = cache.take(index[on_cache[batch].repeat(task.views)], device)
                    chosen = on_device[batch].repeat(task.views)
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
    with whole(path) as unfinished, open(unfinished, "wb") as file:
        torch.save(state, file)


def _load_checkpoint(path: Path, task, ema, optimizers, device) -> int:
    state = torch.load(path, map_location=device, weights_only=True)
    task.load_state_dict(state["task"])
    if ema:
        ema.load_state_dict(state["ema"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["epochs_done"]


def predict(
    model: torch.nn.Module,
    views: Callable[[np.ndarray], Iterable[np.ndarray]],
    rows: np.ndarray,
    *,
    batch_size: int = 64,
    embedding: str | None = None,
    accelerator=None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Logits, and on request embeddings, of images; arguments as of `predict_all`.

    Returns:
        float32 logits (n, classes) and embeddings (n, width) or None.
    """
    network = Network(model, embedding)
    logits, *rest = predict_all(network, views, rows, batch_size=batch_size, accelerator=accelerator)
    return logits, (rest[0] if rest else None)


def predict_all(
    network: Network,
    views: Callable[[np.ndarray], Iterable[np.ndarray]],
    rows: np.ndarray,
    *,
    batch_size: int = 64,
    accelerator=None,
) -> list[np.ndarray]:
    """All outputs of a network for images: means over the tiles of the view that each is shown in.

    Args:
        network: its model is on the device that it shall run on; put into eval mode.
        views: gives of row indices (n,) the uint8 tiles (k, 3, size, size) of each, such as `ViewCache.views`.
        rows: row indices (n,).
        batch_size: tiles at a time.
        accelerator: its processes share the rows and all get the whole result, in the order of `rows`.

    Returns:
        float32, (n, ...) each.
    """
    device = next(network.model.parameters()).device
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    each = math.ceil(len(rows) / world)
    # The last process repeats the last row, so that all gather equally many; the surplus is cut off again.
    share = np.asarray(rows, np.int64)[np.minimum(np.arange(rank * each, (rank + 1) * each), len(rows) - 1)]
    outputs = zip(*mean_over_tiles(network.to(device).runner(), views(share), batch_size), strict=True)
    columns = [torch.from_numpy(np.stack(column).astype(np.float32)).to(device) for column in outputs]
    if accelerator and world > 1:
        columns = [accelerator.gather(column) for column in columns]
    return [column[: len(rows)].cpu().numpy() for column in columns]
