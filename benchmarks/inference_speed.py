"""Prediction on a CPU against what one would write by hand: eager timm, a loop of PIL that cuts the same tiles.

Both sides of a ratio run in turns in one process, since other programs may use the machine, on the same weights, files
and tiles; that they give the same probabilities is checked before they are timed.

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
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD
from torchvision.transforms import Compose, Normalize, ToTensor

from magnification_invariant.data.apparent_scale import apparent_mpp
from magnification_invariant.data.images import to_rgb
from magnification_invariant.data.views import corners, shown_pixels, view_mpp
from magnification_invariant.model_folder import load_model, write_model_folder
from magnification_invariant.models import normalisation
from magnification_invariant.predict import Classifier, find_images, items_of, predict_to_file
from magnification_invariant.predict.export import export
from magnification_invariant.virtual_slides import render_field, virtual_field

BATCH = 32
MPP = 0.5  # of the files


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
        files = pictures(folder / "files", args.files)
        exact, eight = folder / "exact", folder / "eight"
        print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {BATCH}")
        export(model, exact)
        done = export(model, eight, calibration=items_of(files, MPP))
        print(f"8 bits: probability change {done.change:.3f} (99th percentile), {'kept' if done.int8 else 'REFUSED'}")
        forward(model, exact, eight if done.int8 else None, args.rounds)
        end_to_end(model, exact, eight if done.int8 else None, files, args.rounds)
        memory(model, files, folder, args.many)
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


def pictures(folder: Path, n: int) -> Path:
    """`n` PNGs of 700 x 460 pixels at 0.5 um/px, with the noise of a camera: of the size that originals have."""
    folder.mkdir()
    field = render_field(0, 0.5, virtual_field(0, 40, 0), (700, 460)).astype(np.int16)
    rng = np.random.default_rng(0)
    for i in range(n):
        noisy = (np.roll(field, rng.integers(0, 460, 2), (0, 1)) + rng.normal(0, 4, field.shape)).clip(0, 255)
        Image.fromarray(noisy.astype(np.uint8)).save(folder / f"{i:04d}.png")
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


def by_hand(classifier: Classifier, paths: list[Path]) -> Callable[[], np.ndarray]:
    """A loop that decodes, resizes, cuts the tiles that `classifier` is shown and runs eager timm on them."""
    loaded = load_model(classifier.folder, classifier.config)
    model = timm.create_model("resnet18", num_classes=2).eval()
    model.load_state_dict(loaded.state_dict())
    size, (mean, std) = classifier.size, normalisation(loaded)
    transform = Compose([ToTensor(), Normalize(mean, std)])

    @torch.inference_mode()
    def loop() -> np.ndarray:
        logits, counts, batch = [], [], []
        for path in paths:
            image = Image.open(path).convert("RGB")
            mpp = view_mpp("normalised", MPP, min(image.size), size, classifier.base_range)
            image = image.resize(shown_pixels(*image.size, mpp / MPP), Image.Resampling.BILINEAR)
            places = corners(image.height, image.width, size)
            counts.append(len(places))
            batch += [transform(image.crop((left, top, left + size, top + size))) for top, left in places]
            while len(batch) >= BATCH:
                logits.append(model(torch.stack(batch[:BATCH])))
                batch = batch[BATCH:]
        logits = torch.cat([*logits, *([model(torch.stack(batch))] if batch else [])])
        means = torch.stack([each.mean(0) for each in logits.split(counts)])
        return (means / classifier.temperature).softmax(1)[:, 1].numpy()

    return loop


def end_to_end(model: Path, exact: Path, eight: Path | None, files: Path, rounds: int) -> None:
    """Images a second from files to a table of probabilities, and the share of the check of the scale."""
    paths = find_images([files])
    out = files.parent / "out.parquet"
    loop = by_hand(Classifier.from_pretrained(model, device="cpu"), paths)
    sides: dict[str, Callable] = {"loop of PIL and timm": loop}
    expected = loop()
    for name, folder in (("torch", model), ("onnx", exact), ("openvino", exact), ("openvino", eight)):
        if folder is not None:
            classifier = Classifier.from_pretrained(folder, backend=name, device="cpu")
            label = f"predict, {name}{', 8 bits' if folder == eight else ''}"
            sides[label] = lambda c=classifier: predict_to_file(c, items_of(paths, MPP), out)
            sides[label]()
            difference = np.abs(pq.read_table(out)["probability"].to_numpy() - expected).max()
            print(f"{label}: probabilities within {difference:.1g} of the loop's")
            if folder != eight and difference > 1e-4:
                raise RuntimeError("the two sides do not the same work")
    compare("end to end", sides, len(paths), rounds)
    image = to_rgb(Image.open(paths[0]))
    started = time.process_time()
    for _ in range(50):
        apparent_mpp(image)
    print(f"check of the scale: {(time.process_time() - started) * 20:.1f} CPU-ms an image of {image.size}")


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


# Not of `os.wait4`: Linux hands the peak of the process that started it on to a new one.
PEAK = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"


def memory(model: Path, files: Path, folder: Path, many: int) -> None:
    """Peak memory of `magdg predict` above that of `import torch, timm`: of 100 files, and of many."""
    bare, sources = _peak("import torch, timm", []), find_images([files])
    print(f"memory: import torch, timm: peak {bare:.0f} MB")
    for n in (100, many):
        copies = folder / f"files{n}"
        copies.mkdir()
        for i in range(n):
            os.link(sources[i % len(sources)], copies / f"{i:05d}.png")
        arguments = ["predict", str(copies), "--model", str(model), "--mpp", str(MPP)]
        peak = _peak(
            "import sys, magdg; assert magdg.main(sys.argv[1:]) == 0",
            [*arguments, "--out", str(folder / "peak.parquet")],
        )
        print(f"memory: predict, {n:6} files: peak {peak:.0f} MB, {peak - bare:.0f} above")
        shutil.rmtree(copies)


def _peak(code: str, arguments: list[str]) -> float:
    command = [sys.executable, "-c", f"{code}\n{PEAK}", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return int(done.stdout.split()[-1]) / 1e3


def start_up(rounds: int) -> None:
    """`magdg --help` and the import of this package against the import of timm."""
    commands = {
        "import timm": [sys.executable, "-c", "import timm"],
        "import magnification_invariant": [sys.executable, "-c", "import magnification_invariant"],
        "magdg --help": [sys.executable, "-m", "magdg", "--help"],
    }
    run = {k: lambda c=c: subprocess.run(c, check=True, stdout=subprocess.DEVNULL) for k, c in commands.items()}
    compare("start-up", run, 1, rounds)


if __name__ == "__main__":
    main()
