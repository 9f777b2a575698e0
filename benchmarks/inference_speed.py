"""Prediction on a CPU against what one would write by hand: eager timm `resnet18`, a loop of PIL and timm's transform.

Both sides of a ratio run in turns in one process, since other programs may use the machine.

python benchmarks/inference_speed.py                       # an untrained ResNet-18 of 224 pixels
python benchmarks/inference_speed.py --model FOLDER        # a trained one: 8 bits are then judged on what it knows
python benchmarks/inference_speed.py --files 64 --rounds 1 --many 200   # does it run at all?
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD

from magnification_invariant.model_folder import write_model_folder
from magnification_invariant.predict import Classifier, find_images, items_of, predict_to_file
from magnification_invariant.predict.export import export
from magnification_invariant.virtual_slides import render_field, virtual_field

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--files", type=int, default=256)
    parser.add_argument("--many", type=int, default=10_000, help="files for the peak memory, against 100")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = args.model or untrained(folder / "untrained")
        tiles = pictures(folder / "tiles", args.files, Classifier.from_pretrained(model).size)
        exact, eight = folder / "exact", folder / "eight"
        print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {BATCH}")
        export(model, exact)
        done = export(model, eight, calibration=items_of(tiles, 0.5))
        print(f"8 bits: probability change {done.change:.3f} (99th percentile), {'kept' if done.int8 else 'REFUSED'}")
        forward(model, exact, eight if done.int8 else None, args.rounds)
        end_to_end(model, exact, eight if done.int8 else None, tiles, args.rounds)
        memory(exact, tiles, folder, args.many)
        start_up(args.rounds)


def untrained(folder: Path) -> Path:
    torch.manual_seed(0)
    return write_model_folder(
        folder,
        timm.create_model("magdg_resnet18", num_classes=2, num_domains=0),
        name="magdg_resnet18.untrained",
        label_names=["benign", "malignant"],
        image_size=224,
        normalisation=(MEAN, STD),
        about={"temperature": 1.0, "base_range": [0.2, 0.8], "mpp_range": [0.2, 0.8]},
    )


def pictures(folder: Path, n: int, size: int) -> Path:
    """`n` JPEG tiles of the network's size at 0.5 um/px."""
    folder.mkdir()
    field = render_field(0, 0.5, virtual_field(0, 40, 0), (4 * size, 4 * size))
    rng = np.random.default_rng(0)
    for i in range(n):
        top, left = rng.integers(0, 3 * size, 2)
        Image.fromarray(field[top : top + size, left : left + size]).save(folder / f"{i:04d}.jpg", quality=90)
    return folder


def forward(model: Path, exact: Path, eight: Path | None, rounds: int) -> None:
    """Images a second from decoded batches."""
    size = Classifier.from_pretrained(model).size
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, 3, size, size), dtype=np.uint8)
    floats, eager = torch.rand(BATCH, 3, size, size), timm.create_model("resnet18", num_classes=2).eval()

    def by_timm() -> None:
        with torch.inference_mode():
            eager(floats)

    sides = {"eager timm resnet18": by_timm}
    for name, folder in (("torch", model), ("onnx", exact), ("openvino", exact), ("onnx", eight), ("openvino", eight)):
        if folder is not None:
            run = Classifier.from_pretrained(folder, backend=name, device="cpu").run
            sides[f"{name}{', 8 bits' if folder == eight else ''}"] = lambda run=run: run(pixels)
    compare("forward", sides, BATCH, rounds)


def end_to_end(model: Path, exact: Path, eight: Path | None, tiles: Path, rounds: int) -> None:
    """Images a second from files to a table of probabilities."""
    paths = find_images([tiles])
    reference = timm.create_model("resnet18", num_classes=2).eval()
    size = Classifier.from_pretrained(model).size
    transform = timm.data.create_transform((3, size, size), mean=MEAN, std=STD, crop_pct=0.875)

    def by_hand() -> None:
        with torch.inference_mode():
            for i in range(0, len(paths), BATCH):
                images = [transform(Image.open(path).convert("RGB")) for path in paths[i : i + BATCH]]
                reference(torch.stack(images)).softmax(1)

    sides: dict[str, Callable] = {"loop of PIL and timm": by_hand}
    for name, folder in (("torch", model), ("onnx", exact), ("openvino", exact), ("openvino", eight)):
        if folder is not None:
            classifier = Classifier.from_pretrained(folder, backend=name, device="cpu")
            out = tiles.parent / "out.parquet"
            label = f"predict, {name}{', 8 bits' if folder == eight else ''}"
            sides[label] = lambda c=classifier, out=out: predict_to_file(c, items_of(paths, 0.5), out)
    compare("end to end", sides, len(paths), rounds)


def compare(what: str, sides: dict[str, Callable], images: int, rounds: int) -> None:
    """Prints images a second of each side and the median ratio to the first, which runs in every round."""
    seconds = {name: [] for name in sides}
    for k in range(rounds + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if k:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    first = seconds[next(iter(sides))]
    for name, each in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(first, each, strict=True))
        print(f"{what}: {name:28} {images / statistics.median(each):8.1f} images/s   {ratio:.2f}x")


def memory(model: Path, tiles: Path, folder: Path, many: int) -> None:
    """Peak memory of `magdg predict` over many files against 100, each in a fresh process."""
    peaks, sources = {}, find_images([tiles])
    for n in (100, many):
        copies = folder / f"files{n}"
        copies.mkdir()
        for i in range(n):
            os.link(sources[i % len(sources)], copies / f"{i:05d}.jpg")
        command = [sys.executable, "-m", "magdg", "predict", str(copies), "--model", str(model)]
        command += ["--mpp", "0.5", "--backend", "onnx", "--out", str(folder / "memory.parquet")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"{' '.join(command)} failed")
        peaks[n] = usage.ru_maxrss / 1e3
        shutil.rmtree(copies)
        print(f"memory: {n:6} files: peak {peaks[n]:.0f} MB")
    print(f"memory: {peaks[many] / peaks[100]:.2f}x")


def start_up(rounds: int) -> None:
    """`magdg --help` against the import of what every user imports."""
    commands = {
        "import torch, timm": [sys.executable, "-c", "import torch, timm"],
        "magdg --help": [sys.executable, "-m", "magdg", "--help"],
    }
    run = {k: lambda c=c: subprocess.run(c, check=True, stdout=subprocess.DEVNULL) for k, c in commands.items()}
    compare("start-up", run, 1, rounds)


if __name__ == "__main__":
    main()
