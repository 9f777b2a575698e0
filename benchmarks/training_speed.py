"""Training from the pixel cache against training that decodes files, on the same PNGs; and what it takes of memory.

Three ways train the same ResNet-18 on the same 700x460 PNGs, an epoch of each in turns, in one process:

- `fit` on a `PixelCache`, whose building counts;
- timm's own dataset, transforms and loader, with a bare step;
- a `datasets` table behind a torch DataLoader, shaped like transformers' image-classification example: `set_transform`
  with torchvision's transforms, a collate function, and the Trainer's step (clipping, scheduler).

The peers have the number of workers that is fastest for them on this machine, found in an epoch of each before.

python benchmarks/training_speed.py --image-size 64 128
python benchmarks/training_speed.py --memory
"""

import argparse
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD

from magnification_invariant.data import PixelCache, cache_height, load_virtual_slides
from magnification_invariant.engine import FitConfig, TrainRows, fit
from magnification_invariant.tasks import ERM

RATE, DECAY = 1e-3, 0.05
RESULTS = Path(__file__).parent / "results" / "training_speed.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--image-size", type=int, nargs="+", default=[64, 128])
    add("--patients", type=int, default=40)
    add("--images", type=int, default=2, help="of a patient at each magnification")
    add("--epochs", type=int, default=10)
    add("--batch-size", type=int, default=32)
    add("--threads", type=int, default=2, help="of torch, for all three")
    add("--workers", type=int, nargs="+", default=[0, 1, 2], help="of which the peers get the fastest")
    add("--memory", action="store_true", help="measure the memory of the host instead")
    add("--output", type=Path, default=RESULTS, help="file of the table; default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ds = load_virtual_slides(args.patients, images_per_magnification=args.images)
    if args.memory:
        return measure_memory(ds, args)
    ds = ds.select(range(len(ds) - len(ds) % args.batch_size))  # whole batches: as many images an epoch for all

    command = f"python benchmarks/training_speed.py --image-size {' '.join(map(str, args.image_size))}"
    lines = [
        "# Training from the pixel cache and from files",
        "",
        f"`{command} --patients {args.patients} --images {args.images} --epochs {args.epochs}`: ResNet-18, batches of "
        f"{args.batch_size}, {len(ds)} PNGs of 700x460, {args.epochs} epochs of each in turns, {args.threads} threads; "
        f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}. Building the cache counts.",
        "",
        "| size | | images/s | seconds | our speed over it | in single epochs |",
        "|---|---|---|---|---|---|",
    ]
    for size in args.image_size:
        lines += compare(ds, size, args)
    args.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def compare(ds, size: int, args) -> list[str]:
    """Rows of the table: seconds of all epochs of each way, in turns."""
    peers: dict[str, Iterator[float]] = {}
    for name, peer in {"timm loader": timm_epochs, "datasets + DataLoader": datasets_epochs}.items():
        pilots = {}
        for workers in args.workers:
            epochs = peer(ds, size, args.batch_size, workers)
            next(epochs)  # the first epoch starts workers, warms up torch
            pilots[workers] = next(epochs)
            epochs.close()
        best = min(pilots, key=pilots.get)
        print(f"{size} px, {name}, seconds an epoch by workers: {pilots}")
        peers[f"{name}, {best} workers"] = peer(ds, size, args.batch_size, best)

    seconds: dict[str, list[float]] = {"fit": [], **{name: [] for name in peers}}
    domain = np.unique(ds["magnification"], return_inverse=True)[1]
    rows = TrainRows(np.arange(len(ds)), np.asarray(ds["label"]), domain, np.asarray(ds["patient"]))
    config = FitConfig(epochs=args.epochs, batch_size=args.batch_size, image_size=size, learning_rate=RATE)

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        cache = PixelCache(ds, cache_height(size), folder=folder)
        building = time.perf_counter() - started

        def on_epoch(epoch: int, model: torch.nn.Module, log: dict) -> None:
            nonlocal started
            seconds["fit"].append(time.perf_counter() - started)
            for name, epochs in peers.items():
                seconds[name].append(next(epochs))
            started = time.perf_counter()

        started = time.perf_counter()
        fit(ERM(ERM.create_model(ERM.arch, num_classes=2, num_domains=4)), cache, rows, config, on_epoch=on_epoch)
    for epochs in peers.values():
        epochs.close()

    total = {name: sum(each) for name, each in seconds.items()}
    total["fit"] += building
    lines = []
    for name, each in seconds.items():
        ratio, apart = "", f"cache {building:.2f} s"
        if name != "fit":
            ratios = [theirs / ours for theirs, ours in zip(each, seconds["fit"], strict=True)]
            ratio = f"{total[name] / total['fit']:.2f}"
            apart = f"median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}, without the cache"
        rate = len(ds) * args.epochs / total[name]
        lines.append(f"| {size} px | {name} | {rate:.1f} | {total[name]:.1f} | {ratio} | {apart} |")
    return lines


def timed(epoch: Callable[[], None]) -> Iterator[float]:
    while True:
        started = time.perf_counter()
        epoch()
        yield time.perf_counter() - started


def stepper(steps: int | None = None) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """One step of the peers on normalised images and labels; with `steps`, the Trainer's extras too."""
    import timm

    model = timm.create_model("resnet18", num_classes=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, fused=True)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps) if steps else None

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        if scheduler:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if scheduler:
            scheduler.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timm_epochs(ds, size: int, batch_size: int, workers: int) -> Iterator[float]:
    """Seconds of every next epoch of timm's `create_dataset` and `create_loader` on a folder of classes."""
    from timm.data import create_dataset, create_loader

    with tempfile.TemporaryDirectory() as folder:
        for path, label in zip(files(ds), ds["label"], strict=True):
            (Path(folder) / str(label)).mkdir(exist_ok=True)
            (Path(folder) / str(label) / Path(path).name).symlink_to(path)
        loader = create_loader(
            create_dataset("", root=folder, split="train"),
            input_size=(3, size, size),
            batch_size=batch_size,
            is_training=True,
            mean=MEAN,
            std=STD,
            interpolation="bilinear",
            num_workers=workers,
            persistent_workers=workers > 0,
            use_prefetcher=False,
            pin_memory=False,
            device=torch.device("cpu"),
        )
        step = stepper()

        def epoch() -> None:
            for images, labels in loader:
                step(images, labels)

        yield from timed(epoch)


def datasets_epochs(ds, size: int, batch_size: int, workers: int) -> Iterator[float]:
    """Seconds of every next epoch of a loop in the shape of transformers' run_image_classification.py."""
    from torch.utils.data import DataLoader
    from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor

    transform = Compose([RandomResizedCrop(size), RandomHorizontalFlip(), ToTensor(), Normalize(MEAN, STD)])

    def train_transforms(batch: dict) -> dict:
        batch["pixel_values"] = [transform(image.convert("RGB")) for image in batch["image"]]
        return batch

    def collate(examples: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.stack([example["pixel_values"] for example in examples])
        return images, torch.tensor([example["label"] for example in examples])

    table = ds.select_columns(["image", "label"])
    table.set_transform(train_transforms)
    loader = DataLoader(
        table, batch_size, shuffle=True, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0
    )
    step = stepper(steps=10**6)

    def epoch() -> None:
        for images, labels in loader:
            step(images, labels)

    yield from timed(epoch)


def files(ds) -> list[str]:
    import datasets

    return [row["path"] for row in ds.cast_column("image", datasets.Image(decode=False))["image"]]


# ----------------------------------------------------------------------------------------------------------- memory


def measure_memory(ds, args) -> None:
    """Prints the process's own memory by epoch, and the cache's share in processes that read it at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        size = args.image_size[-1]
        cache = PixelCache(ds, cache_height(size), folder=folder)
        print(f"cache of {len(ds)} images: {cache.pixels.nbytes / 1e6:.1f} MB, ResNet-18 at {size} px\n")
        del cache  # or this process would have a share of it
        print("| epoch | own memory, MB | cache mapped, MB |\n|---|---|---|")
        train(ds, folder, size, args, lambda epoch: print(f"| {epoch} | {own_memory():.1f} | {cache_share():.1f} |"))
        print("\n| processes at a time | cache in memory, all together, MB | own memory, each, MB |\n|---|---|---|")
        context = multiprocessing.get_context("spawn")
        for workers in (1, 2, 3):
            barrier, queue = context.Barrier(workers), context.Queue()
            arguments = (ds, folder, size, args, barrier, queue)
            processes = [context.Process(target=worker, args=arguments) for _ in range(workers)]
            for process in processes:
                process.start()
            measured = [queue.get(timeout=600) for _ in processes]
            for process in processes:
                process.join()
            own = ", ".join(f"{own:.0f}" for _, own in measured)
            print(f"| {workers} | {sum(share for share, _ in measured):.1f} | {own} |")


def train(ds, folder: str, size: int, args, on_epoch: Callable[[int], None]) -> None:
    cache = PixelCache(ds, cache_height(size), folder=folder)
    domain = np.unique(ds["magnification"], return_inverse=True)[1]
    rows = TrainRows(np.arange(len(ds)), np.asarray(ds["label"]), domain, np.asarray(ds["patient"]))
    config = FitConfig(epochs=args.epochs, batch_size=args.batch_size, image_size=size)
    task = ERM(ERM.create_model(ERM.arch, num_classes=2, num_domains=4))
    fit(task, cache, rows, config, on_epoch=lambda epoch, model, log: on_epoch(epoch))


def worker(ds, folder: str, size: int, args, barrier, queue) -> None:
    """Trains beside others; measures while all of them hold the cache."""
    torch.set_num_threads(1)

    def on_epoch(epoch: int) -> None:
        if epoch + 1 == args.epochs:
            barrier.wait(timeout=600)
            queue.put((cache_share(), own_memory()))
            barrier.wait(timeout=600)

    train(ds, folder, size, args, on_epoch)


def own_memory() -> float:
    """MB of anonymous memory of this process: what it shares with nobody and no file backs."""
    return _kilobytes(Path("/proc/self/status").read_text(), "RssAnon:") / 1e3


def cache_share() -> float:
    """MB of `pixels.npy` in memory, divided by the processes that map it (Linux's proportional set size)."""
    blocks, share = Path("/proc/self/smaps").read_text().split("VmFlags"), 0.0
    for block in blocks:
        if "pixels.npy" in block:
            share += _kilobytes(block, "Pss:")
    return share / 1e3


def _kilobytes(text: str, name: str) -> float:
    line = next((line for line in text.splitlines() if line.startswith(name)), None)
    return float(line.split()[1]) if line else math.nan


if __name__ == "__main__":
    main()
