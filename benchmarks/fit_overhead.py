"""What `fit` costs over a bare loop: epochs of both in turns, in one process, on the same batches and augmentation.

Of two bare loops: forward, backward and optimizer alone; and with clipping and the average of the weights, which are
part of the recipe and cost what they cost in any loop.

python benchmarks/fit_overhead.py
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from timm.utils import ModelEmaV3

from magnification_invariant import load_virtual_slides
from magnification_invariant.data.pixels import PixelCache
from magnification_invariant.data.views import DRAWS, cache_height, random_view
from magnification_invariant.engine import FitConfig, TrainRows, fit
from magnification_invariant.models import normalisation
from magnification_invariant.tasks import get_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--method", default="erm")
    parser.add_argument("--patients", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    ds = load_virtual_slides(args.patients, images_per_magnification=4)
    cache = PixelCache(ds, cache_height(args.image_size))
    domain = np.unique(ds["magnification"], return_inverse=True)[1]
    rows = TrainRows(np.arange(len(ds)), np.asarray(ds["label"]), domain, np.asarray(ds["patient"]))
    config = FitConfig(epochs=args.epochs, image_size=args.image_size)
    steps = math.ceil(len(rows) / config.batch_size)
    method = get_task(args.method)
    target, domain = torch.from_numpy(rows.target), torch.from_numpy(rows.domain)

    def make():
        torch.manual_seed(0)
        return method(method.create_model(method.arch, num_classes=2, num_domains=4))

    def bare_loop(whole_recipe: bool) -> Callable[[], None]:
        """A function that trains an epoch."""
        task = make().train()
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in normalisation(task.model))
        optimizer = torch.optim.AdamW(task.parameters(), lr=config.learning_rate, fused=True)
        ema, progress = ModelEmaV3(task.model, decay=config.ema_decay, use_warmup=True), torch.tensor(0.5)

        def epoch() -> None:
            order = torch.randperm(len(rows))
            for step in range(steps):
                chosen = order[torch.arange(step * config.batch_size, (step + 1) * config.batch_size) % len(rows)]
                draws = torch.rand(config.batch_size, DRAWS)
                view = random_view(cache.pixels[chosen], draws, config.image_size, stain=config.stain)
                loss = task((view - mean) / std, target[chosen], domain[chosen], progress)["loss"]
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if whole_recipe:
                    torch.nn.utils.clip_grad_norm_(task.parameters(), config.clip_norm)
                optimizer.step()
                if whole_recipe:
                    ema.update(task.model)

        return epoch

    loops = {"bare loop": bare_loop(False), "bare loop with clipping and average": bare_loop(True)}
    seconds: dict[str, list[float]] = {"fit": [], **{name: [] for name in loops}}
    started = 0.0

    def on_epoch(epoch: int, model, log) -> None:
        nonlocal started
        seconds["fit"].append(time.perf_counter() - started)
        for name, run in loops.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
        started = time.perf_counter()

    for run in loops.values():
        run()  # all have run once before anything is timed
    started = time.perf_counter()
    fit(make(), cache, rows, config, on_epoch=on_epoch)
    images = steps * config.batch_size
    for name, values in seconds.items():
        print(f"{name:36} {images / statistics.median(values[1:]):7.1f} images/s (median of {len(values) - 1} epochs)")
    for name in loops:
        ratios = [a / b for a, b in zip(seconds["fit"][1:], seconds[name][1:], strict=True)]
        print(f"fit / {name}: median {statistics.median(ratios):.3f}, range {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
