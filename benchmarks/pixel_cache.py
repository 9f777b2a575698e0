"""What the pixel cache buys: building it against one thread of Pillow, a batch of it against rows of `datasets`.

Both sides of a ratio run in turns, since other programs may use the machine.

python benchmarks/pixel_cache.py
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from magnification_invariant.data import images
from magnification_invariant.data.pixels import PixelCache
from magnification_invariant.virtual_slides import render_field, virtual_field


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)

    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder, f"{i}.png")) for i in range(args.images)]
        tissue = render_field(0, 0.492, virtual_field(0, 40, 0), (700, 460)).astype(np.int16)
        rng = np.random.default_rng(0)
        for path in paths:  # camera noise gives the files the size that originals have, about half a megabyte
            noisy = (np.roll(tissue, rng.integers(0, 460, 2), (0, 1)) + rng.normal(0, 4, tissue.shape)).clip(0, 255)
            Image.fromarray(noisy.astype(np.uint8)).save(path)
        size = statistics.mean(os.path.getsize(path) for path in paths)
        print(f"{args.images} PNGs of 700x460, {size / 1e3:.0f} kB each; {os.cpu_count()} cores")
        ds = Dataset.from_dict({"image": paths}, features=Features(image=ImageFeature()))
        rounds = iter(range(10**6))

        def one_thread() -> None:
            for path in paths:
                with Image.open(path) as image:
                    width = image.width * args.height // image.height
                    np.asarray(image.convert("RGB").resize((width, args.height), Image.Resampling.BILINEAR))

        def build() -> None:
            PixelCache(ds, args.height, folder=Path(folder, f"cache{next(rounds)}"))

        def build_by_pillow() -> None:
            with patch.object(images, "_png_decoder", lambda: None):
                build()

        compare("build the cache", build, "one thread of Pillow", one_thread, args.images, args.rounds)
        if images._png_decoder() is not None:
            compare("build, extra [fast]", build, "build by Pillow", build_by_pillow, args.images, args.rounds)

        cache = PixelCache(ds, args.height, folder=folder)
        chosen = torch.from_numpy(rng.permutation(args.images)[:64])
        rows = chosen.tolist()
        from_cache = lambda: [cache.take(chosen, "cpu") for _ in range(50)]  # noqa: E731  (50, to be measurable)
        from_rows = lambda: [np.asarray(ds[i]["image"]) for i in rows]  # noqa: E731
        compare("batch from the cache", from_cache, "datasets rows", from_rows, 64, args.rounds, repeats=50)

        started = time.perf_counter()
        PixelCache(ds, args.height, folder=folder)
        seconds = time.perf_counter() - started
        print(f"opening with all checksums: {cache.pixels.nbytes / 1e9 / seconds:.2f} GB/s")


def compare(
    name: str, fast: Callable, other_name: str, other: Callable, n: int, rounds: int, *, repeats: int = 1
) -> None:
    """Times both in turns; `fast` does its work `repeats` times a call."""
    seconds = [(clock(fast) / repeats, clock(other)) for _ in range(rounds + 1)][1:]
    ratios = [b / a for a, b in seconds]
    for label, k in ((name, 0), (other_name, 1)):
        print(f"{label:24} {n / statistics.median(pair[k] for pair in seconds):10.1f} images/s")
    print(f"ratio: median {statistics.median(ratios):.2f}, range {min(ratios):.2f} to {max(ratios):.2f}\n")


def clock(function: Callable) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
