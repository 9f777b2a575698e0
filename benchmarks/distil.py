"""Distil the maps of a pretrained network into a ResNet-18, from crops without labels.

    python benchmarks/distil.py --data BreaKHis_v1 --teacher local-dir:DENSENET121 --output-dir runs/tissue

A student sees the crops at `SIZE` pixels and the teacher the same crops at `TEACHER_SIZE`; 1x1 convolutions from the
student's last three stages are fitted to the teacher's maps (after its second and third block), standardised a channel,
by smooth L1. First on virtual tissue and on real patients that have no 100X image and so are never tested; then, from
there, once for the training patients of each fold and once for all patients. Each start is a folder that states the
patients that it has seen, so that a cell which tests one of them refuses it. Resumes where it was cut off.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from magnification_invariant import load_breakhis, load_virtual_slides
from magnification_invariant.data.splits import deal_folds
from magnification_invariant.files import whole

SIZE, TEACHER_SIZE = 96, 128
BLOCKS = ("denseblock2", "denseblock3")
N_FOLDS = 5


def crops(ds, rows, each: int, seed: int):
    """`each` crops of every image, their sides log-uniform from `SIZE` pixels to the whole short side.

    Yields:
        The row, and the crop as the student and as the teacher see it, uint8 (3, side, side).
    """
    for row in rows:
        rng, image = np.random.default_rng([seed, row]), ds[int(row)]["image"].convert("RGB")
        for _ in range(each):
            side = math.exp(rng.uniform(math.log(SIZE), math.log(min(image.size))))
            left, top = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
            turned, flipped, box = int(rng.integers(4)), rng.random() < 0.5, (left, top, left + side, top + side)
            views = []
            for size in (SIZE, TEACHER_SIZE):
                pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
                pixels = np.rot90(pixels[:, ::-1] if flipped else pixels, turned)
                views.append(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
            yield row, *views


def standardised(model):
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) * 255 for name in ("mean", "std"))
    return lambda pixels: ((pixels.float() - mean) / std).contiguous(memory_format=torch.channels_last)


class Teacher:
    """Maps of a DenseNet after `BLOCKS`, at the strides of the student's stages."""

    def __init__(self, name: str):
        self.model = timm.create_model(name, pretrained=True).eval().to(memory_format=torch.channels_last)
        self.look, self.maps = standardised(self.model), {}
        for block in BLOCKS:
            getattr(self.model.features, block).register_forward_hook(lambda _, __, out, b=block: self._keep(b, out))

    def _keep(self, block: str, out: torch.Tensor) -> None:
        self.maps[block] = out

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        self.model.forward_features(self.look(pixels))
        return [F.adaptive_avg_pool2d(self.maps[b], SIZE // s) for b, s in zip(BLOCKS, (8, 16), strict=True)]


def taught(folder: Path, teacher: str, ds, rows, each: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Crops with the teacher's maps of them, float16, in files of `folder`, made if they are not there."""
    names = ("row", "pixels", "map0", "map1")
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        n, started, look = len(rows) * each, time.monotonic(), Teacher(teacher)
        out, batch, at = None, [], 0
        for crop in (*crops(ds, rows, each, seed), None):
            if crop is not None:
                batch.append(crop)
            if batch and (len(batch) == 32 or crop is None):
                maps = look(torch.from_numpy(np.stack([b[2] for b in batch])))
                values = [[b[0] for b in batch], np.stack([b[1] for b in batch]), *(m.half().numpy() for m in maps)]
                if out is None:
                    kinds = zip(names, values, (np.int64, np.uint8, np.float16, np.float16), strict=True)
                    out = [_new(folder / f"{k}.npy", (n, *np.shape(v)[1:]), t) for k, v, t in kinds]
                for file, value in zip(out, values, strict=True):
                    file[at : at + len(batch)] = value
                at, batch = at + len(batch), []
                if at % 640 == 0:
                    print(f"{folder.name}: {at} of {n} crops, {at / (time.monotonic() - started):.0f}/s", flush=True)
        for file in out:
            file.flush()
        (folder / "done").touch()
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}


def _new(path: Path, shape: tuple, dtype) -> np.memmap:
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def scales(sets: list[dict[str, np.ndarray]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Mean and standard deviation of each channel of the teacher's maps."""
    moments = []
    for name in ("map0", "map1"):
        some = np.concatenate([maps[name][:: max(1, len(maps[name]) // 500)].astype(np.float32) for maps in sets])
        mean, std = some.mean((0, 2, 3)), some.std((0, 2, 3)) + 1e-3
        moments.append(tuple(torch.from_numpy(v)[:, None, None] for v in (mean, std)))
    return moments


class Student(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = timm.create_model("resnet18", num_classes=0)
        self.project = torch.nn.ModuleList(torch.nn.Conv2d(i, o, 1) for i, o in ((128, 512), (256, 1024), (512, 1024)))

    def forward(self, x):
        stages = self.model.forward_intermediates(x, indices=(2, 3, 4), intermediates_only=True)
        return [project(stage) for project, stage in zip(self.project, stages, strict=True)]


def distil(student: Student, sets: list, chosen: list[np.ndarray], moments, *, epochs: int, rate: float, seed: int):
    """Train `student` on the chosen crops of each of the sets."""
    where = [(s, i) for s, rows in enumerate(chosen) for i in rows]
    look, steps = standardised(student.model), math.ceil(len(where) / 32) * epochs
    student.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(student.parameters(), rate, weight_decay=0.05)
    started, total, step = time.monotonic(), 0.0, 0
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(where))
        for start in range(0, len(order), 32):
            batch = [where[i] for i in order[start : start + 32]]
            pixels, *maps = (
                torch.from_numpy(np.stack([sets[s][name][i] for s, i in batch])) for name in ("pixels", "map0", "map1")
            )
            two, three = ((m.float() - mean) / std for m, (mean, std) in zip(maps, moments, strict=True))
            wanted = [two, three, F.adaptive_avg_pool2d(three, SIZE // 32)]
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = sum(F.smooth_l1_loss(a, b) for a, b in zip(student(look(pixels)), wanted, strict=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step, total = step + 1, total + loss.item()
        done = time.monotonic() - started
        print(
            f"  epoch {epoch}: {total / math.ceil(len(where) / 32):.4f}, {done:.0f} s of {done / step * steps:.0f}",
            flush=True,
        )
        total = 0.0
    return student


def write_start(folder: Path, student: Student, patients: list[str], magnifications: list[int]) -> None:
    """A start for `--init`: weights, and who was seen."""
    with whole(folder) as unfinished:
        unfinished.mkdir()
        weights = {k: v.contiguous() for k, v in student.model.state_dict().items()}
        save_file(weights, unfinished / "model.safetensors")
        config = {"architecture": "resnet18", "seen": {"patients": patients, "magnifications": magnifications}}
        (unfinished / "config.json").write_text(json.dumps(config, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="BreaKHis")
    add("--teacher", required=True, help="a DenseNet of timm, hf-hub: or local-dir:")
    add("--output-dir", type=Path, required=True)
    add("--starts", nargs="*", default=[*map(str, range(N_FOLDS)), "all"], help="which; default: folds and all")
    add("--epochs", type=int, nargs=2, default=(7, 3), help="first without, then with patients that are tested")
    args = parser.parse_args()
    ds, out = load_breakhis(args.data), args.output_dir
    patient, magnification = np.array(ds["patient"]), np.array(ds["magnification"])
    tested = np.isin(patient, patient[magnification == 100])
    virtual = load_virtual_slides(300, images_per_magnification=4, size=(350, 230))
    some = np.random.default_rng(0).choice(len(virtual), 2400, replace=False)
    others = np.flatnonzero(~tested)
    print(
        f"{len(others)} images of {len(set(patient[others]))} patients without 100X, {tested.sum()} others", flush=True
    )
    sets = [
        taught(out / "virtual", args.teacher, virtual, some, 1),
        taught(out / "untested", args.teacher, ds, others, max(1, 2400 // max(1, len(others)))),
        taught(out / "tested", args.teacher, ds, np.flatnonzero(tested), 6),
    ]
    moments = scales(sets[:2])
    everything = [np.arange(len(s["row"])) for s in sets[:2]]
    torch.manual_seed(0)
    student, common = Student(), out / "common.pt"
    if not common.exists():
        distil(student, sets, everything, moments, epochs=args.epochs[0], rate=2e-3, seed=0)
        torch.save(student.state_dict(), common)
    dealt = patients_of(ds)
    for start in args.starts:
        folder = out / f"start_{start}"
        if (folder / "model.safetensors").exists():
            continue
        student.load_state_dict(torch.load(common, weights_only=True))
        print(folder.name, flush=True)
        chosen = np.isin(patient[sets[2]["row"]], dealt[start])
        rehearsed = [rows[::8] for rows in everything]
        distil(student, sets, [*rehearsed, np.flatnonzero(chosen)], moments, epochs=args.epochs[1], rate=1e-3, seed=1)
        seen = np.isin(patient, dealt[start]) | ~tested
        write_start(folder, student, sorted(set(patient[seen])), np.unique(magnification[seen]).tolist())


def patients_of(ds) -> dict[str, list[str]]:
    """Training patients of each fold, and of the released model ("all": all but the last group, which validates)."""
    rows = [row for row in zip(ds["patient"], ds["label"], ds["magnification"], strict=True) if row[2] == 100]
    patients, labels, _ = zip(*rows, strict=True)
    table = {"patient": patients * 2, "label": labels * 2, "magnification": [100] * len(rows) + [200] * len(rows)}
    folds = deal_folds(table, n_folds=N_FOLDS).folds
    dealt = {str(i): fold["train"] for i, fold in enumerate(folds)}
    return dealt | {"all": sorted(set(patients) - set(folds[-1]["test"]))}


if __name__ == "__main__":
    main()
