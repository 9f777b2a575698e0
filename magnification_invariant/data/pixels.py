"""Images decoded once: a uint8 array on disk that training reads instead of files."""

import hashlib
import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from tqdm import tqdm

_logger = logging.getLogger(__name__)

VERSION = 1  # raise it when the pixels that a source gives would change


def cache_root() -> Path:
    """Folder of everything that can be made again: ``MAGDG_CACHE``, else ``~/.cache/magnification_invariant``."""
    return Path(os.environ.get("MAGDG_CACHE") or "~/.cache/magnification_invariant").expanduser()


class PixelCache:
    """Every image of a table, decoded once and resized so that its short side has `height` pixels.

    The aspect ratio is kept: images are scaled (Pillow's anti-aliased bilinear, the filter of timm's eval transform)
    and then centre-cropped to the one size they all share. An image is never enlarged: `height` is lowered to the
    smallest short side of the table.

    Args:
        ds: a `datasets.Dataset` with an image column and, where the scale is known, `mpp_column`
            (micrometres per pixel of the stored image).
        height: wanted short side in pixels; see `height_for`.
        folder: where caches lie; by default under `cache_root()`. The same table and height are built once,
            also by processes that start together.

    Attributes:
        pixels: uint8 tensor (n, 3, height, width), mapped from disk until `to` moves it.
        mpp: float64 array (n,), micrometres per pixel *of the cached array*; NaN where unknown.

    Raises:
        ValueError: an image that cannot be decoded, naming its file; a table without rows.
        OSError: the disk has no room, said before anything is written.
    """

    def __init__(self, ds, height: int, *, image_column: str = "image", mpp_column: str = "mpp", folder=None):
        if len(ds) == 0:
            raise ValueError("the table has no rows: there is nothing to cache")
        if image_column not in ds.column_names:
            raise ValueError(f"no column {image_column!r} in the table; it has {', '.join(ds.column_names)}")
        sources = _sources(ds, image_column)
        native_mpp = np.asarray(ds[mpp_column], float) if mpp_column in ds.column_names else np.full(len(ds), np.nan)
        key = _fingerprint(sources, height)
        self.folder = Path(folder or cache_root() / "pixels") / key
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.folder}.lock"):
            if not (self.folder / "pixels.npy").exists():
                self._build(sources, height)
        sizes = json.loads((self.folder / "meta.json").read_text())
        self.pixels = torch.from_numpy(np.load(self.folder / "pixels.npy", mmap_mode="c"))
        self.height, self.width = self.pixels.shape[2:]
        self.mpp = native_mpp * np.asarray(sizes["short_side"]) / self.height

    def __len__(self) -> int:
        return len(self.pixels)

    def _build(self, sources: list, height: int) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow gives up the interpreter lock while it decodes
            sizes = np.array(list(pool.map(_size, sources)))
            short = sizes.min(1)
            height = int(min(height, short.min()))
            scaled = sizes * height // short[:, None]  # rounded down, as torchvision's Resize does
            width, rows = scaled.min(0)
            shape = (len(sources), 3, int(rows), int(width))
            need, free = int(np.prod(shape)), shutil.disk_usage(self.folder.parent).free
            if need > free:
                raise OSError(
                    f"the pixel cache needs {need / 1e9:.1f} GB in {self.folder.parent}, where {free / 1e9:.1f} GB are "
                    "free; make room, choose a smaller image size, or set MAGDG_CACHE to another disk"
                )
            unfinished = self.folder.with_suffix(".tmp")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            array = np.lib.format.open_memmap(unfinished / "pixels.npy", mode="w+", dtype=np.uint8, shape=shape)

            def fill(i: int) -> None:
                array[i] = _decode(sources[i], tuple(scaled[i]), shape[2:])

            description = f"decoding {len(sources)} images to {width}x{rows} ({need / 1e6:.0f} MB)"
            jobs = pool.map(fill, range(len(sources)))
            for _ in tqdm(jobs, total=len(sources), desc=description, unit="image", disable=None):
                pass
        array.flush()
        (unfinished / "meta.json").write_text(json.dumps({"short_side": short.tolist()}))
        unfinished.rename(self.folder)

    def to(self, device) -> "PixelCache":
        """Move the pixels to where batches are taken fastest.

        To a GPU if they fit into half of its free memory; else into pinned host memory, from which it copies without
        waiting, if they fit into half of the free host memory; else they stay on disk, mapped. The log says which.
        """
        device, need = torch.device(device), self.pixels.nbytes
        if device.type != "cuda" or self.pixels.is_cuda or self.pixels.is_pinned():
            return self
        if need < torch.cuda.mem_get_info(device)[0] / 2:
            self.pixels, place = self.pixels.to(device), str(device)
        elif need < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2:
            self.pixels, place = self.pixels.pin_memory(), "pinned host memory"
        else:
            place = "disk, mapped"
        _logger.info("%.1f GB of pixels: %s", need / 1e9, place)
        return self

    def take(self, rows: torch.Tensor, device) -> torch.Tensor:
        """Rows of the cache as a uint8 tensor (len(rows), 3, height, width) on `device`."""
        batch = self.pixels[rows.to(self.pixels.device)]
        if torch.device(device).type == "cuda" and not batch.is_cuda:
            batch = batch.pin_memory()
        return batch.to(device, non_blocking=True)


def _sources(ds, image_column: str) -> list[tuple[str | None, bytes | None]]:
    """(path, bytes) of every image, undecoded."""
    from datasets import Image as ImageFeature

    column = ds.select_columns([image_column]).cast_column(image_column, ImageFeature(decode=False))
    return [(image["path"], image["bytes"]) for image in column[image_column]]


def _fingerprint(sources: list, height: int) -> str:
    """Changes with the files (path, size, time of change), embedded bytes, the height and this module's VERSION."""
    digest = hashlib.sha256(f"{VERSION} {height}".encode())
    for path, content in sources:
        if content is None:
            stat = os.stat(path)
            digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode())
        else:
            digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:24]


def _open(source: tuple[str | None, bytes | None]) -> Image.Image:
    path, content = source
    return Image.open(path if content is None else BytesIO(content))


def _size(source: tuple[str | None, bytes | None]) -> tuple[int, int]:
    try:
        with _open(source) as image:
            turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations that swap the sides
            return image.size[::-1] if turned else image.size
    except Exception as error:
        raise ValueError(f"cannot read the image {source[0] or '(embedded)'}: {error}") from error


def _decode(source: tuple[str | None, bytes | None], size: tuple[int, int], crop: tuple[int, int]) -> np.ndarray:
    try:
        with _open(source) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
            image = image.resize(size, Image.Resampling.BILINEAR)
    except Exception as error:
        raise ValueError(f"cannot decode the image {source[0] or '(embedded)'}: {error}") from error
    top, left = (image.height - crop[0]) // 2, (image.width - crop[1]) // 2
    return np.asarray(image)[top : top + crop[0], left : left + crop[1]].transpose(2, 0, 1)
