"""Training on a GPU: against the same step on one fixed batch, against timm's loader, and a grid's wall time.

One command, under nine minutes on a fast GPU; needs neither `datasets` nor `evaluate`:

python benchmarks/gpu.py
python benchmarks/gpu.py --smoke    # the same path in a minute on a CPU; its figures mean nothing

1. DANN, `magdg_resnet18`, bf16, compiled: epochs of `fit` on the cache, of the bare step on one fixed batch that lies
   on the device (network and loss, backward, clipping, optimizer, average; with and without the augmentation), and of
   timm's loader feeding the bare step, in turns. Compiling is not counted, building the cache is.
2. How often the host waits for the device in an epoch.
3. One seed of every held-out magnification x ERM, DANN and GAN on as many rows as BreaKHis has, predictions of all
   test images after every epoch included; signatures are not.
"""

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.utils import ModelEmaV3

from magnification_invariant.data.pixels import PixelCache, ViewCache
from magnification_invariant.data.splits import leave_one_magnification_out
from magnification_invariant.data.views import DRAWS, cache_height, field_mpp, random_view
from magnification_invariant.engine import FitConfig, TrainRows, fit, predict
from magnification_invariant.tasks import MagGAN, Task, get_task
from magnification_invariant.virtual_slides import render_field, virtual_field

MAGNIFICATIONS = (40, 100, 200, 400)
METHODS = ("erm", "dann", "gan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=int, default=7909, help="PNGs of 700x460; BreaKHis has 7,909")
    add("--image-size", type=int, default=224)
    add("--batch-size", type=int, default=128)
    add("--epochs", type=int, default=10, help="of the grid")
    add("--gan-epochs", type=int, default=50)
    add("--timm-images", type=int, default=4096, help="of an epoch of timm's loader")
    add("--rounds", type=int, default=4, help="epochs in turns of part 1, and one that warms up")
    add("--smoke", action="store_true")
    add("--output", type=Path, default=Path(__file__).parent / "results" / "gpu.md")
    args = parser.parse_args()
    args.arch, args.compile, args.held_outs = None, True, MAGNIFICATIONS
    if args.smoke:
        args.arch, args.compile, args.held_outs = "test_magdg_resnet", False, MAGNIFICATIONS[:1]
        args.images, args.image_size, args.batch_size, args.timm_images = 80, 32, 8, 16
        args.epochs, args.gan_epochs, args.rounds, MagGAN.size, MagGAN.width = 1, 1, 2, 16, 4
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    accelerator = Accelerator(mixed_precision="bf16")
    started = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {line}", flush=True)
        lines.append(f"- {line}")

    device = accelerator.device
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    lines = ["# Training on a GPU", ""]
    say(f"{name}, {os.cpu_count()} CPU cores, torch {torch.__version__}, bf16")
    say(f"`python {' '.join(sys.argv)}`: {args.image_size} px, batches of {args.batch_size}, PNGs of 700x460")
    with tempfile.TemporaryDirectory() as folder:
        table = make_table(Path(folder), args.images)
        say(f"{args.images} PNGs drawn")
        before = time.perf_counter()
        cache = PixelCache(table, cache_height(args.image_size), folder=Path(folder) / "cache")
        building = time.perf_counter() - before
        views = ViewCache(table, args.image_size, folder=Path(folder) / "cache")
        size = cache.pixels.nbytes / 1e9
        say(f"cache built in {building:.1f} s ({args.images / building:.0f} images/s, {size:.2f} GB)")
        throughput(table, cache, building, accelerator, args, say)
        if device.type == "cuda":
            say(f"the host waited {waits(table, cache, accelerator, args):.2f} times a step")
            torch.cuda.reset_peak_memory_stats()
        grid(table, cache, views, accelerator, args, say)
    if device.type == "cuda":
        say(f"peak memory of the grid on the GPU: {torch.cuda.max_memory_reserved() / 1e9:.2f} GB, cache included")
    say(f"peak memory of the host: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    args.output.write_text("\n".join(lines) + "\n")


def make_table(folder: Path, n: int) -> dict[str, list]:
    """Columns like BreaKHis'. A virtual slide, shifted, under camera noise, gives files of the originals' size."""
    tissue = render_field(0, 0.492, virtual_field(0, 40, 0), (700, 460)).astype(np.float32)

    def draw(i: int) -> str:
        rng = np.random.default_rng(i)
        noisy = np.roll(tissue, rng.integers(0, 460, 2), (0, 1)) + 4 * rng.standard_normal(tissue.shape, np.float32)
        path = folder / f"{i}.png"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, compress_level=1)
        return str(path)

    patients = min(82, n // 8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        image = list(pool.map(draw, range(n)))
    magnification = [MAGNIFICATIONS[i // patients % 4] for i in range(n)]
    return {
        "image": image,
        "label": [i % patients % 2 for i in range(n)],
        "patient": [f"p{i % patients}" for i in range(n)],
        "magnification": magnification,
        "mpp": [19.7 / m for m in magnification],
    }


def make_task(method: str, args, **options) -> Task:
    torch.manual_seed(0)
    kind = get_task(method)
    return kind(kind.create_model(args.arch or kind.arch, num_classes=2, num_domains=3), kind.Options(**options))


def train_rows(table: dict, index: np.ndarray) -> TrainRows:
    label, group, magnification = (np.asarray(table[name])[index] for name in ("label", "patient", "magnification"))
    return TrainRows(index, label, np.unique(magnification, return_inverse=True)[1], group)


def config_of(args, **changes) -> FitConfig:
    return FitConfig(batch_size=args.batch_size, image_size=args.image_size, epochs=args.epochs, **changes)


# ------------------------------------------------------------------------------------------------------ throughput


def throughput(table, cache, building: float, accelerator, args, say: Callable[[str], None]) -> None:
    """Images/s of an epoch of each in turns; the first round compiles."""
    split = leave_one_magnification_out(table, 400)
    rows = train_rows(table, split.train)
    steps = -(-len(rows) // args.batch_size)
    config = config_of(args, compile=args.compile)
    config = replace(config, epochs=args.rounds + 1)
    device = accelerator.device
    stored = cache.pixels[: args.batch_size].to(device)
    plain, augmented = (BareStep(make_task("dann", args), config, device) for _ in range(2))
    loader = timm_loader(table, args, device)

    def fixed(bare: BareStep, augment: bool) -> float:
        draws = torch.rand(args.batch_size, DRAWS, device=device)
        view = plain.normalised(random_view(stored, draws, args.image_size))
        return clocked(device, lambda: [bare(stored if augment else view, augment) for _ in range(steps)])

    def from_timm() -> float:
        return len(loader) * args.batch_size / clocked(device, lambda: [plain(images, False) for images, _ in loader])

    rates: dict[str, list[float]] = {"fit": [], "fixed batch": [], "fixed batch, augmented": [], "timm": []}

    def on_epoch(epoch: int, model: torch.nn.Module, log: dict) -> None:
        rates["fit"].append(log["images_per_second"])
        rates["fixed batch"].append(steps * args.batch_size / fixed(plain, False))
        rates["fixed batch, augmented"].append(steps * args.batch_size / fixed(augmented, True))
        rates["timm"].append(from_timm())

    fit(make_task("dann", args), cache, rows, config, accelerator=accelerator, on_epoch=on_epoch)
    rates = {name: each[1:] for name, each in rates.items()}
    for name, each in rates.items():
        say(f"{name}: {statistics.median(each):.0f} images/s ({min(each):.0f} to {max(each):.0f})")
    for name in ("fixed batch", "fixed batch, augmented"):
        ratios = [ours / theirs for ours, theirs in zip(rates["fit"], rates[name], strict=True)]
        say(f"fit over {name}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    ours, theirs = statistics.median(rates["fit"]), statistics.median(rates["timm"])
    with_cache = 10 * args.images / (10 * args.images / ours + building)
    say(
        f"fit over timm's loader and step: {ours / theirs:.2f}; with the cache, in 10 epochs: {with_cache / theirs:.2f}"
    )


class BareStep:
    """What `fit` does in a step, on a batch that is there already."""

    def __init__(self, task: Task, config: FitConfig, device: torch.device):
        self.task = task.to(device)
        if device.type == "cuda":
            self.task = self.task.to(memory_format=torch.channels_last)
        self.config, self.device, self.n = config, device, 0
        self.groups = self.task.players[0].parameters
        self.optimizer = torch.optim.AdamW(self.task.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
        self.ema = ModelEmaV3(self.task.model, decay=config.ema_decay, use_warmup=True)
        self.label = torch.arange(config.batch_size, device=device) % 2
        self.domain = torch.arange(config.batch_size, device=device) % 3
        self.progress = torch.tensor(0.5, device=device)
        normalisation = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        self.mean, self.std = (torch.tensor(value, device=device).view(3, 1, 1) for value in normalisation)
        self.loss = torch.compile(self._loss) if config.compile else self._loss

    def normalised(self, view: torch.Tensor) -> torch.Tensor:
        return (view - self.mean) / self.std

    def _loss(self, images: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
        if draws is not None:
            images = self.normalised(random_view(images, draws, self.config.image_size, stain=self.config.stain))
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.task(images, self.label, self.domain, self.progress)["loss"]

    def __call__(self, images: torch.Tensor, augment: bool) -> None:
        self.n += 1
        draws = torch.rand(len(images), DRAWS, device=self.device) if augment else None
        loss = self.loss(images, draws)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameters in self.groups:
            torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        self.optimizer.step()
        self.ema.update(self.task.model, step=self.n)


def timm_loader(table, args, device: torch.device):
    """Of a folder of classes with the first images; whole epochs, so that nothing is read ahead during ours."""
    from timm.data import create_dataset, create_loader

    folder = Path(table["image"][0]).parent / "timm"
    for path, label in zip(table["image"][: args.timm_images], table["label"], strict=False):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        (folder / str(label) / Path(path).name).symlink_to(path)
    return create_loader(
        create_dataset("", root=str(folder), split="train"),
        input_size=(3, args.image_size, args.image_size),
        batch_size=args.batch_size,
        is_training=True,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        interpolation="bilinear",
        num_workers=0 if args.smoke else os.cpu_count(),
        persistent_workers=not args.smoke,
        use_prefetcher=device.type == "cuda",
        pin_memory=device.type == "cuda",
        device=device,
    )


def clocked(device: torch.device, work: Callable[[], object]) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def waits(table, cache, accelerator, args) -> float:
    """Synchronizing CUDA calls a step in the second epoch of `fit`, not compiled."""
    rows = train_rows(table, leave_one_magnification_out(table, 400).train)
    counts = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            config = replace(config_of(args), epochs=2)
            record = lambda *_: counts.append(sum("synchronizing CUDA" in str(w.message) for w in seen))  # noqa: E731
            fit(make_task("dann", args), cache, rows, config, accelerator=accelerator, on_epoch=record)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return (counts[1] - counts[0]) / -(-len(rows) // args.batch_size)


# ------------------------------------------------------------------------------------------------------------- grid


def grid(table, cache, views, accelerator, args, say: Callable[[str], None]) -> None:
    """Trains every cell of one seed and fold; the seconds of each, and of all."""
    first, seconds, prepared = time.perf_counter(), {method: [] for method in METHODS}, []
    for held_out in args.held_outs:
        split = leave_one_magnification_out(table, held_out)
        rows = train_rows(table, split.train)
        tested = np.concatenate([split.val, split.test, split.test_source])
        config = config_of(args)

        for method in METHODS:
            started = time.perf_counter()
            task = make_task(method, args, **({"gan_epochs": args.gan_epochs} if method == "gan" else {}))

            def fit_first(other: Task, rows=rows, config=config, **changes) -> torch.nn.Module:
                return fit(other, cache, rows, replace(config, **changes), accelerator=accelerator)

            def view(index: np.ndarray, size: int) -> tuple[torch.Tensor, np.ndarray]:
                draws = torch.rand(len(index), DRAWS).to(accelerator.device)
                images = cache.take(torch.from_numpy(index), accelerator.device)
                return random_view(images, draws, size), field_mpp(cache.native_mpp, cache.short_side, size)[index]

            task.prepare(rows, fit_first, view, ["benign", "malignant"], [f"domain {d}" for d in range(3)])
            if method == "gan":
                prepared.append(time.perf_counter() - started)

            def on_epoch(epoch: int, model: torch.nn.Module, log: dict, tested=tested) -> None:
                predict(model, views.views, tested)

            fit(task, cache, rows, config, accelerator=accelerator, on_epoch=on_epoch)
            accelerator.free_memory()
            seconds[method].append(time.perf_counter() - started)
    wall = time.perf_counter() - first
    n = sum(map(len, seconds.values()))
    each = ", ".join(f"{method} {statistics.mean(s):.1f} s" for method, s in seconds.items())
    say(f"grid of {n} cells x {args.epochs} epochs on {args.images} rows, not compiled: {wall:.1f} s ({each})")
    gan = statistics.mean(prepared) / args.gan_epochs
    say(f"of these, the DCGANs took {sum(prepared):.1f} s ({gan:.2f} s an epoch of {args.gan_epochs})")
    full = wall + len(prepared) * gan * (200 - args.gan_epochs)
    say(f"arithmetic, not measured: {full / 60:.1f} min with 200 epochs of the DCGAN, five folds {full / 12:.0f} min")


if __name__ == "__main__":
    main()
