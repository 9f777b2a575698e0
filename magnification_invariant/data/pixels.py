"""Images decoded once: a uint8 array on disk that training reads instead of files.

A cache is a folder of two arrays: ``pixels.npy`` (n, 3, height, width), and ``rows.npy`` (n, 2) with a row's checksum
and the short side in pixels of the image it was made from. A checksum that does not fit means that the row is still to
be decoded, be it that the build was cut or that the disk lost it: going on and repairing are one thing.
"""

import hashlib
import logging
import os
import shutil
import warnings
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from magnification_invariant.data.images import Encoded, EncodedImages, name_of, open_image, shown_size, to_rgb
from magnification_invariant.files import cache_root

_logger = logging.getLogger(__name__)

VERSION = 2  # raise it when the pixels that a source gives would change


class PixelCache:
    """Every image of a table, decoded once and resized so that its short side has `height` pixels.

    The aspect ratio is kept: images are scaled (Pillow's anti-aliased bilinear, the filter of timm's eval transform)
    and then centre-cropped to the one size they all share. An image is never enlarged: `height` is lowered to the
    smallest short side of the table. All cores decode; a build that was cut goes on where it stopped; every row is held
    against its checksum when the cache is opened, and decoded again if it does not fit.

    Args:
        ds: a `datasets.Dataset`, or a mapping of columns where images are paths or encoded bytes; where the scale is
            known with `mpp_column`, micrometres per pixel of the stored image.
        height: wanted short side in pixels; see `height_for`.
        folder: where caches lie; by default under `cache_root()`. The same images and height are built once,
            also by processes that start together.

    Attributes:
        pixels: uint8 tensor (n, 3, height, width), mapped from disk until `to` moves it.
        mpp: float64 array (n,), micrometres per pixel *of the cached array*; NaN where unknown.

    Raises:
        ValueError: an image that cannot be decoded, naming its file; a table without rows.
        OSError: the disk has no room, said before anything is written.
    """

    def __init__(self, ds, height: int, *, image_column: str = "image", mpp_column: str = "mpp", folder=None):
        images = EncodedImages(ds, image_column)
        if len(images) == 0:
            raise ValueError("the table has no rows: there is nothing to cache")
        columns = ds if isinstance(ds, Mapping) else ds.column_names
        native_mpp = np.asarray(ds[mpp_column], float) if mpp_column in columns else np.full(len(images), np.nan)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow and zlib give up the interpreter lock
            key = _fingerprint(images, height, pool)
            self.folder = Path(folder or cache_root() / "pixels") / key
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            if not self._is_whole(pool):
                with FileLock(f"{self.folder}.lock"):
                    if not self._is_whole(pool):  # nobody else was faster
                        self._build(images, height, pool)
        self.pixels = torch.from_numpy(np.load(self.folder / "pixels.npy", mmap_mode="c"))
        self.height, self.width = self.pixels.shape[2:]
        self.mpp = native_mpp * np.load(self.folder / "rows.npy")[:, 1] / self.height

    def __len__(self) -> int:
        return len(self.pixels)

    def _is_whole(self, pool: ThreadPoolExecutor) -> bool:
        if not self.folder.exists():
            return False
        try:
            damaged = _damaged_rows(*_open(self.folder), pool)
            what = f"{len(damaged)} rows of {self.folder} are not what was written"
        except (ValueError, IndexError) as error:
            damaged, what = True, str(error)
        if damaged:
            warnings.warn(f"the pixel cache is damaged: {what}; decoding again", stacklevel=3)
        return not damaged

    def _build(self, images: EncodedImages, height: int, pool: ThreadPoolExecutor) -> None:
        sizes = np.array(list(pool.map(lambda i: _size(images[i]), range(len(images)))))
        short = sizes.min(1)
        height = int(min(height, short.min()))
        scaled = sizes * height // short[:, None]  # rounded down, as torchvision's Resize does
        width, lines = scaled.min(0)
        shape = (len(images), 3, int(lines), int(width))
        unfinished = self.folder.with_suffix(".tmp")
        if self.folder.exists():  # damaged: what is whole of it is kept
            shutil.rmtree(unfinished, ignore_errors=True)
            self.folder.rename(unfinished)
        pixels, rows = _open_or_create(unfinished, shape)
        todo = _damaged_rows(pixels, rows, pool)

        def fill(i: int) -> None:
            pixels[i] = row = _decode(images[i], tuple(sizes[i]), tuple(scaled[i]), shape[2:])
            rows[i] = _checksum(row, short[i]), short[i]

        description = f"decoding {len(todo)} images to {width}x{lines} ({pixels.nbytes / 1e6:.0f} MB)"
        _logger.info("%s of %d, in %s", description, len(images), self.folder)
        try:
            jobs = pool.map(fill, todo)
            for _ in tqdm(jobs, total=len(todo), desc=description, unit="image", disable=None):
                pass
        except ValueError:  # once the image is repaired, the cache has another name
            shutil.rmtree(unfinished)
            raise
        # Not flushed: what a power failure takes away, the checksums show.
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
        batch = self.pixels.index_select(0, rows.to(self.pixels.device))  # copies whole rows; indexing copies values
        if torch.device(device).type == "cuda" and not batch.is_cuda:
            batch = batch.pin_memory()
        return batch.to(device, non_blocking=True)


def _open(folder: Path, mode: str = "r") -> tuple[np.ndarray, np.ndarray]:
    try:
        return np.load(folder / "pixels.npy", mmap_mode=mode), np.load(folder / "rows.npy", mmap_mode=mode)
    except Exception as error:  # a damaged header raises whatever Python's tokenizer does
        raise ValueError(f"{folder} cannot be opened: {error!r}") from error


def _open_or_create(folder: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The arrays of a build that was cut, or empty ones for which the disk has room.

    Raises:
        OSError: there is no room.
    """
    try:
        pixels, rows = _open(folder, "r+")
        if (pixels.shape, pixels.dtype, rows.shape, rows.dtype) == (shape, np.uint8, (shape[0], 2), np.int64):
            return pixels, rows
    except ValueError:
        pass  # there is none, or not to be used
    shutil.rmtree(folder, ignore_errors=True)
    need, free = int(np.prod(shape)), shutil.disk_usage(folder.parent).free
    if need > free:
        raise OSError(
            f"the pixel cache needs {need / 1e9:.1f} GB in {folder.parent}, where {free / 1e9:.1f} GB are free; make "
            "room, choose a smaller image size, or set MAGDG_CACHE to another disk"
        )
    folder.mkdir()
    pixels = np.lib.format.open_memmap(folder / "pixels.npy", mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):  # or else a disk that others fill would kill the process, without a message
        with open(folder / "pixels.npy", "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return pixels, np.lib.format.open_memmap(folder / "rows.npy", mode="w+", dtype=np.int64, shape=(shape[0], 2))


def _checksum(row: np.ndarray, short_side: int) -> int:
    return zlib.crc32(np.ascontiguousarray(row), int(short_side) & 0xFFFFFFFF) + 1  # 0 is a row not yet decoded


def _damaged_rows(pixels: np.ndarray, rows: np.ndarray, pool: ThreadPoolExecutor) -> list[int]:
    def is_damaged(i: int) -> bool:
        return rows[i, 0] == 0 or rows[i, 0] != _checksum(pixels[i], rows[i, 1])

    return [i for i, damaged in enumerate(pool.map(is_damaged, range(len(rows)))) if damaged]


def _fingerprint(images: EncodedImages, height: int, pool: ThreadPoolExecutor) -> str:
    """Changes with the files (path, size, time of change), embedded bytes, the height and this module's VERSION."""

    def state(i: int) -> bytes:
        path, content = images[i]
        if content is not None:
            return hashlib.sha256(content).digest()
        stat = os.stat(path)
        return f"{path} {stat.st_size} {stat.st_mtime_ns}".encode()

    digest = hashlib.sha256(f"{VERSION} {height}".encode())
    for each in pool.map(state, range(len(images))):
        digest.update(each)
    return digest.hexdigest()[:24]


def _size(encoded: Encoded) -> tuple[int, int]:
    try:
        with open_image(encoded) as image:
            return shown_size(image)
    except Exception as error:
        raise ValueError(f"cannot read the image {name_of(encoded)}: {error}") from error


def _decode(encoded: Encoded, size: tuple[int, int], scaled: tuple[int, int], crop: tuple[int, int]) -> np.ndarray:
    try:
        with open_image(encoded) as image:
            image = to_rgb(image)
            if image.size != size:
                raise ValueError("its EXIF data, behind the pixels, turn it; store it turned")
            image = image.resize(scaled, Image.Resampling.BILINEAR)
    except Exception as error:
        raise ValueError(f"cannot decode the image {name_of(encoded)}: {error}") from error
    top, left = (image.height - crop[0]) // 2, (image.width - crop[1]) // 2
    pixels = np.asarray(image)[top : top + crop[0], left : left + crop[1]]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
