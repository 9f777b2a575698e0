"""How long `magdg prepare` takes on all 7,909 images, tiny generated ones under the published names. Wanted: 60 s.

python benchmarks/prepare.py
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from magnification_invariant.data.breakhis import SUBTYPES
from magnification_invariant.data.published import slides

SECONDS = 60


def write_tree(root: Path) -> int:
    """The whole tree with images of 35x23 pixels, each another; the number of images."""
    rng, n = np.random.default_rng(0), 0
    for slide in slides():
        kind = "benign" if slide.code[0] == "B" else "malignant"
        folder = root / "BreaKHis_v1/histology_slides/breast" / kind / "SOB" / SUBTYPES[slide.code[2:]]
        for name in slide.names:
            path = folder / f"SOB_{slide.code}_{slide.slide}" / f"{name.split('-')[-2]}X" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (23, 35, 3), dtype=np.uint8)).save(path)
            n += 1
    return n


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as root:
        n = write_tree(Path(root))
        started = time.perf_counter()
        command = [sys.executable, "-m", "magdg", "prepare", root]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - started
    print(done.stdout)
    print(f"{n:,} images: {seconds:.1f} s (wanted: at most {SECONDS} s)")
    sys.exit(seconds > SECONDS)


if __name__ == "__main__":
    main()
