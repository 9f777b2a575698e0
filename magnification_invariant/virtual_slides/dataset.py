"""A data set of virtual slides: PNG files in BreaKHis' original tree, and beside them the truth about every one.

Modules of this package import each other by relative names and nothing else of ours: the processes that draw take it
for a package of its own, so that they need not import torch.
"""

import hashlib
import json
import os
import struct
import subprocess
import sys
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .drawing import render_field, virtual_field
from .optics import MAGNIFICATIONS, native_mpp, virtual_optics
from .tissue import BENIGN, MALIGNANT, virtual_patient

# Raise it whenever a pixel changes: cached folders of another version are then left alone and drawn anew.
GENERATOR_VERSION = 7
SIDECAR = "virtual_slides.json"


@dataclass(frozen=True)
class Cohort:
    """What a data set of virtual slides follows from.

    Attributes:
        n_patients: Number of patients, half of them malignant. Their numbers, which fix class, stain and tissue, are
            `first_patient`, `first_patient + 1`, ...
        images_per_magnification: Images of each patient at each magnification.
        magnifications: Of 40, 100, 200, 400.
        seed: Chooses fields, sessions and optics. A patient's tissue does not depend on it.
        first_patient: First patient number; disjoint ranges are different people.
        nuisance: Strength of stain drift, blur, noise, vignetting and white balance: 0 none, 1 usual, 2 strong.
        size: (width, height) in pixels with BreaKHis' proportions. The field of view stays BreaKHis' own (345 x 227 um
            at 40X), so half the width is twice the um/px.
        nested: Fields at 100X, 200X and 400X lie inside the 40X field of the same sequence number; by default every
            magnification has its own fields.

    Raises:
        ValueError: One of them is out of range.
    """

    n_patients: int = 40
    images_per_magnification: int = 4
    magnifications: tuple[int, ...] = MAGNIFICATIONS
    seed: int = 0
    first_patient: int = 0
    nuisance: int = 1
    size: tuple[int, int] = (700, 460)
    nested: bool = False

    def __post_init__(self):
        if self.n_patients < 1 or self.images_per_magnification < 1:
            numbers = f"{self.n_patients}, {self.images_per_magnification}"
            raise ValueError(f"n_patients and images_per_magnification must be 1 or more, got {numbers}")
        if self.first_patient < 0 or self.seed < 0:
            raise ValueError(f"first_patient and seed must be 0 or more, got {self.first_patient}, {self.seed}")
        chosen = sorted(set(self.magnifications))
        if not chosen or set(chosen) - set(MAGNIFICATIONS):
            raise ValueError(f"magnifications must be some of {MAGNIFICATIONS}, got {self.magnifications}")
        if self.nuisance not in (0, 1, 2):
            raise ValueError(f"nuisance must be 0 (none), 1 (usual) or 2 (strong), got {self.nuisance!r}")
        width, height = size = tuple(int(v) for v in self.size)
        if width < 32 or abs(width / height * 460 / 700 - 1) > 0.02:
            raise ValueError(
                f"size must be (width, height) in BreaKHis' proportions 700 x 460, such as (350, 230), got {self.size}"
            )
        for name in ("n_patients", "images_per_magnification", "seed", "first_patient", "nuisance"):
            object.__setattr__(self, name, int(getattr(self, name)))
        for name, value in (("magnifications", tuple(chosen)), ("size", size), ("nested", bool(self.nested))):
            object.__setattr__(self, name, value)

    @property
    def parameters(self) -> dict:
        """As the sidecar file records them, with the version of the generator."""
        lists = {"magnifications": list(self.magnifications), "size": list(self.size)}
        return {"generator_version": GENERATOR_VERSION, **asdict(self), **lists}

    @property
    def digest(self) -> str:
        """Name of a folder that holds this cohort and no other."""
        return hashlib.sha256(json.dumps(self.parameters).encode()).hexdigest()[:16]

    def images(self) -> list[dict]:
        """Every image: its path in the original tree and all that is needed to draw it."""
        images = []
        for number in range(self.first_patient, self.first_patient + self.n_patients):
            p = virtual_patient(number)
            kind, kinds = ("malignant", MALIGNANT) if p.label else ("benign", BENIGN)
            code = f"{'M' if p.label else 'B'}_{p.subtype}"
            folder = f"BreaKHis_v1/histology_slides/breast/{kind}/SOB/{kinds[p.subtype]}/SOB_{code}_{p.id}"
            for magnification in self.magnifications:
                for k in range(self.images_per_magnification):
                    name = f"SOB_{code}-{p.id}-{magnification}-{k + 1:03d}.png"
                    path = f"{folder}/{magnification}X/{name}"
                    images.append({"path": path, "patient": number, "magnification": magnification, "k": k})
        return images

    def draw(self, image: dict) -> np.ndarray:
        """One of `images`: (height, width, 3) uint8 RGB."""
        number, magnification, k = image["patient"], image["magnification"], image["k"]
        return render_field(
            number,
            native_mpp(magnification) * 700 / self.size[0],
            virtual_field(number, magnification, k, seed=self.seed, nested=self.nested),
            self.size,
            virtual_optics(self.seed, number, magnification, k, self.nuisance),
            noise_seed=int(np.random.default_rng([205, self.seed, number, magnification, k]).integers(2**31)),
        )

    def truths(self) -> dict:
        """Content of the sidecar file: parameters, and what is known of every patient and image."""
        images = []
        for image in self.images():
            number, magnification, k = image["patient"], image["magnification"], image["k"]
            images.append(
                {
                    "filename": image["path"].rsplit("/", 1)[1],
                    "patient": virtual_patient(number).id,
                    "label": virtual_patient(number).label,
                    "magnification": magnification,
                    "mpp": native_mpp(magnification) * 700 / self.size[0],
                    "centre": virtual_field(number, magnification, k, seed=self.seed, nested=self.nested),
                    **asdict(virtual_optics(self.seed, number, magnification, k, self.nuisance)),
                }
            )
        people = map(virtual_patient, range(self.first_patient, self.first_patient + self.n_patients))
        return {
            "parameters": self.parameters,
            "patients": [{"id": p.id, **asdict(p)} for p in people],
            "images": images,
        }


def draw_slides(cohort: Cohort, folder: str | os.PathLike, *, workers: int | None = None) -> Path:
    """Draws what a folder lacks of a cohort; a run that was cut goes on where it stopped.

    Args:
        cohort: What to draw.
        folder: Root of the tree; `virtual_slides.json` in it records the parameters and the truth about every patient
            (nuclei, architecture, stain) and image (place, session, optics).
        workers: Processes that draw; default is one a core. The bytes do not depend on it.

    Returns:
        The folder.

    Raises:
        FileExistsError: It holds slides of other parameters, or a tree that was not drawn here.
    """
    root = Path(folder).expanduser()
    sidecar = root / SIDECAR
    if sidecar.exists():
        there, wanted = _parameters(root), cohort.parameters
        if there != wanted:
            other = {k: there.get(k) for k in wanted if there.get(k) != wanted[k]}
            raise FileExistsError(f"{root} holds virtual slides drawn with {other}; choose another write_to")
    elif (root / "BreaKHis_v1").exists():
        raise FileExistsError(f"{root} holds a tree that was not drawn here (no {SIDECAR}); choose another write_to")
    else:
        root.mkdir(parents=True, exist_ok=True)
        _write_whole(sidecar, json.dumps(cohort.truths(), indent=1).encode())
    missing = sum(not (root / image["path"]).exists() for image in cohort.images())
    if missing:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        _render(root, missing, workers or cores)
    return root


def _parameters(root: Path) -> dict:
    return json.loads((root / SIDECAR).read_text())["parameters"]


def _write_png(path: Path, image: np.ndarray) -> None:
    """Write an RGB PNG, whole or not at all: one row filter and run lengths only, three times as fast as Pillow."""
    h, w, _ = image.shape
    flat = image.reshape(h, 3 * w)
    rows = np.empty((h, 1 + 3 * w), np.uint8)
    rows[:, 0] = 2  # PNG's filter "up": the difference to the row above
    rows[0, 1:] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    squeeze = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    data = squeeze.compress(rows) + squeeze.flush()
    head = struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", data), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    _write_whole(path, b"\x89PNG\r\n\x1a\n" + body)


def _write_whole(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    part.write_bytes(data)
    os.replace(part, path)


def _render_share(root: Path, share: int, shares: int):
    """Draw every `shares`-th missing image of the cohort of a folder; yields once an image."""
    cohort = Cohort(**{name: value for name, value in _parameters(root).items() if name != "generator_version"})
    for image in cohort.images()[share::shares]:
        path = root / image["path"]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_png(path, cohort.draw(image))
            yield path


def _render(root: Path, missing: int, workers: int) -> None:
    """Draw what is missing. Workers are fresh interpreters that import this package alone: no torch, no fork."""
    from tqdm import tqdm

    above = Path(__file__).parents[1]
    workers = max(1, min(workers, missing // 8))
    with tqdm(total=missing, desc="virtual slides", unit="image", disable=None) as bar:
        if workers == 1:
            for _ in _render_share(root, 0, 1):
                bar.update()
            return
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        read, write = os.pipe()
        processes = []
        try:
            for share in range(workers):
                command = [sys.executable, "-P", "-c", _WORKER, *map(str, (above, root, share, workers))]
                processes.append(subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE, env=environment))
            os.close(write)
            with os.fdopen(read, "rb", buffering=0) as drawn:
                while news := drawn.read(4096):  # one byte an image; ends when every worker has ended
                    bar.update(len(news))
            for process in processes:
                error = process.communicate()[1].decode(errors="replace")
                if process.returncode:
                    raise RuntimeError(
                        f"a worker drawing virtual slides in {root} ended with code {process.returncode}; images drawn "
                        f"so far are kept, call again to go on.\n{error[-2000:]}"
                    )
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()


_WORKER = """
import os, sys
sys.path.append(sys.argv[1])  # the last, so that no module beside this package hides another
from pathlib import Path
from virtual_slides.dataset import _render_share
for _ in _render_share(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])):
    os.write(1, b".")
"""
