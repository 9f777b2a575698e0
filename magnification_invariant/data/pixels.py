"""Images decoded once: a uint8 array on disk that training reads instead of files.

A cache is a folder of two arrays: ``pixels.npy`` (pieces, 3, height, width), and ``rows.npy`` (n, 3) with an image's
checksum and its width and height as stored. A checksum that does not fit means that the image is still to be decoded,
be it that the build was cut or that the disk lost it: going on and repairing are one thing.
"""

import hashlib
import logging
import os
import shutil
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from magnification_invariant.data.images import Encoded, EncodedImages, name_of, open_image, shown_size, to_rgb
from magnification_invariant.data.views import RESAMPLING, corners, random_view, show, shown_pixels, tiles, view_mpp
from magnification_invariant.files import cache_root

_logger = logging.getLogger(__name__)

VERSION = 4  # raise it when the pixels that a source gives would change


class _Cache:
    """Images of a table as uint8 pieces of one shape, decoded once; what the pieces are, a subclass says.

    All cores decode; a build that was cut goes on where it stopped; every image's pieces are held against a checksum
    when the cache is opened, and decoded again if they do not fit. The same images are built once, also by processes
    that start together.

    Attributes:
        pixels: uint8 tensor (pieces, 3, height, width), mapped from disk.
        starts: int64 array (n + 1,); the pieces of image i are ``pixels[starts[i] : starts[i + 1]]``.
        short_side: int64 array (n,), of the stored images in pixels.
        native_mpp: float64 array (n,), micrometres per pixel of the stored images; NaN where unknown.
    """

    def __init__(self, ds, kind: str, *, image_column: str = "image", mpp_column: str = "mpp", folder=None):
        images = EncodedImages(ds, image_column)
        if len(images) == 0:
            raise ValueError("the table has no rows: there is nothing to cache")
        columns = ds if isinstance(ds, Mapping) else ds.column_names
        known = np.asarray(ds[mpp_column], float) if mpp_column in columns else np.full(len(images), np.nan)
        self.native_mpp = known
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow and zlib give up the interpreter lock
            key = _fingerprint(images, kind, pool)
            self.folder = Path(folder or cache_root() / "pixels") / key
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            if not self._is_whole(pool):
                with FileLock(f"{self.folder}.lock"):
                    if not self._is_whole(pool):  # nobody else was faster
                        self._build(images, pool)
        rows = np.load(self.folder / "rows.npy")
        self.short_side, (counts, _) = rows[:, 1:].min(1), self._layout(rows[:, 1:])
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.pixels = torch.from_numpy(np.load(self.folder / "pixels.npy", mmap_mode="c"))

    def _layout(self, sizes: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """Of images of `sizes` (n, 2: width, height) the numbers of pieces (n,), and the shape of a piece."""
        raise NotImplementedError

    def _pieces(self, image: Image.Image) -> np.ndarray:
        """uint8 (pieces, 3, height, width) of an RGB image."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.starts) - 1

    def _is_whole(self, pool: ThreadPoolExecutor) -> bool:
        if not self.folder.exists():
            return False
        try:
            pixels, rows = _open(self.folder)
            counts, _ = self._layout(rows[:, 1:])
            damaged = _damaged_rows(pixels, rows, np.concatenate([[0], np.cumsum(counts)]), pool)
            what = f"{len(damaged)} rows of {self.folder} are not what was written"
        except (ValueError, IndexError) as error:
            damaged, what = True, str(error)
        if damaged:
            warnings.warn(f"the pixel cache is damaged: {what}; decoding again", stacklevel=4)
        return not damaged

    def _build(self, images: EncodedImages, pool: ThreadPoolExecutor) -> None:
        sizes = np.array(list(pool.map(lambda i: _size(images[i]), range(len(images)))))
        counts, shape = self._layout(sizes)
        starts = np.concatenate([[0], np.cumsum(counts)])
        unfinished = self.folder.with_suffix(".tmp")
        if self.folder.exists():  # damaged: what is whole of it is kept
            shutil.rmtree(unfinished, ignore_errors=True)
            self.folder.rename(unfinished)
        pixels, rows = _open_or_create(unfinished, (int(starts[-1]), 3, *shape), len(images))
        todo = _damaged_rows(pixels, rows, starts, pool)

        def fill(i: int) -> None:
            pixels[starts[i] : starts[i + 1]] = pieces = _decoded(images[i], tuple(sizes[i]), self._pieces)
            rows[i] = _checksum(pieces, sizes[i]), *sizes[i]

        description = f"decoding {len(todo)} images to {shape[1]}x{shape[0]} ({pixels.nbytes / 1e6:.0f} MB)"
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


class ViewCache(_Cache):
    """The tiles of the protocol view of every image of a table, see `data.views`: what networks are tested on.

    Args:
        ds: see `PixelCache`.
        size: side of the network's square input in pixels.
        **options: image_column, mpp_column and folder of `PixelCache`.

    Attributes:
        mpp: float64 array (n,), micrometres per pixel at the network's input; NaN where unknown.
        filled: float64 array (n,), share of the view that continues the image by reflection.
    """

    def __init__(self, ds, size: int, **options):
        self.size = size
        super().__init__(ds, f"views {size}", **options)
        self.mpp = view_mpp("protocol", self.native_mpp, self.short_side, size)
        sizes = np.load(self.folder / "rows.npy")[:, 1:]
        self.filled = np.array([_protocol_shape(*each, size)[2] for each in sizes])

    def _layout(self, sizes):
        shapes = [_protocol_shape(*each, self.size) for each in sizes.tolist()]
        return np.array([len(corners(height, width, self.size)) for height, width, _ in shapes]), (self.size, self.size)

    def _pieces(self, image):
        step = view_mpp("protocol", 1.0, min(image.size), self.size)
        return tiles(show(image, 1.0, step, self.size).pixels, self.size)

    def views(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Tiles (k, 3, size, size) of images, one image after the other."""
        pixels = self.pixels.numpy()
        for row in rows:
            yield pixels[self.starts[row] : self.starts[row + 1]]


class TiledView(NamedTuple):
    """Tiles (k, 3, size, size) of a view of an image, and the share of them that continues it by reflection."""

    tiles: np.ndarray
    filled: float


def decoded_views(ds, rows: np.ndarray, mpp: np.ndarray, size: int) -> Iterator[TiledView]:
    """Views of images at scales of their own, decoded now: what `ViewCache` does not hold.

    Args:
        ds: a `datasets.Dataset` with a column ``mpp``.
        rows: of it, (n,).
        mpp: um/px to show each at, (n,).
        size: side of the network's square input in pixels.

    Raises:
        ValueError: an image cannot be decoded, or shows too little at its scale; names it.
    """
    images, native = EncodedImages(ds), np.asarray(ds["mpp"], float)

    def shown(item: tuple[int, float]) -> TiledView:
        row, scale = item
        view = _decoded(images[row], None, lambda image: show(image, native[row], scale, size))
        return TiledView(tiles(view.pixels, size), view.filled)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from ahead(pool, shown, zip(rows.tolist(), mpp.tolist(), strict=True), 16)


def ahead(pool: ThreadPoolExecutor, function: Callable, items: Iterable, n: int) -> Iterator:
    """`map` by a pool that is at most `n` items ahead of who takes the results."""
    items = iter(items)
    futures = deque(pool.submit(function, item) for item in islice(items, n))
    while futures:
        yield futures.popleft().result()
        futures.extend(pool.submit(function, item) for item in islice(items, 1))


def _protocol_shape(width: int, height: int, size: int) -> tuple[int, int, float]:
    """Height and width of the protocol view in pixels, and the share of it that is reflection."""
    shown = shown_pixels(width, height, view_mpp("protocol", 1.0, min(width, height), size))
    padded = [max(side, size) for side in shown]
    return padded[1], padded[0], 1 - shown[0] * shown[1] / (padded[0] * padded[1])


class PixelCache(_Cache):
    """Every image of a table, decoded once and resized so that its short side has `height` pixels: for training.

    The aspect ratio is kept: images are resampled once (`views.RESAMPLING`) and then centre-cropped to the one size
    they all share. An image is never enlarged: `height` is lowered to the smallest short side of the table.

    Args:
        ds: a `datasets.Dataset`, or a mapping of columns where images are paths or encoded bytes; where the scale is
            known with `mpp_column`, micrometres per pixel of the stored image.
        height: wanted short side in pixels; see `views.cache_height`.
        image_column, mpp_column: of the table.
        folder: where caches lie; by default under `files.cache_root`.

    Attributes:
        pixels: uint8 tensor (n, 3, height, width), mapped from disk until `to` moves it.
        mpp: float64 array (n,), micrometres per pixel *of the cached array*; NaN where unknown.

    Raises:
        ValueError: an image that cannot be decoded, naming its file; a table without rows.
        OSError: the disk has no room, said before anything is written.
    """

    def __init__(self, ds, height: int, **options):
        self.wanted = height
        super().__init__(ds, str(height), **options)
        self.height, self.width = self.pixels.shape[2:]
        self.mpp = self.native_mpp * self.short_side / self.height

    def _layout(self, sizes):
        short = sizes.min(1)
        self.height = int(min(self.wanted, short.min()))
        width, lines = (sizes * self.height // short[:, None]).min(0)  # rounded down, as torchvision's Resize does
        self.crop = int(lines), int(width)
        return np.ones(len(sizes), np.int64), self.crop

    def _pieces(self, image):
        width, height = (side * self.height // min(image.size) for side in image.size)
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        pixels = np.asarray(image.resize((width, height), RESAMPLING))
        pixels = pixels[top : top + self.crop[0], left : left + self.crop[1]]
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))[None]

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

    @property
    def device(self) -> torch.device:
        """Where `take` wants its rows."""
        return self.pixels.device

    def augmentation(self, config, mean: torch.Tensor, std: torch.Tensor) -> Callable:
        """What training makes of a batch that was taken, of uniform draws (b, `views.DRAWS`): a network's input.

        Args:
            config: image_size, zoom and stain of an `engine.FitConfig`.
            mean: Of the pixels in [0, 1], (3,), as the network wants them normalised; `std` too.
        """
        mean, std = mean.view(3, 1, 1), std.view(3, 1, 1)

        def shown(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
            return (random_view(images, draws, config.image_size, zoom=config.zoom, stain=config.stain) - mean) / std

        return shown

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


def _open_or_create(folder: Path, shape: tuple[int, ...], images: int) -> tuple[np.ndarray, np.ndarray]:
    """The arrays of a build that was cut, or empty ones for which the disk has room.

    Raises:
        OSError: there is no room.
    """
    try:
        pixels, rows = _open(folder, "r+")
        if (pixels.shape, pixels.dtype, rows.shape, rows.dtype) == (shape, np.uint8, (images, 3), np.int64):
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
    return pixels, np.lib.format.open_memmap(folder / "rows.npy", mode="w+", dtype=np.int64, shape=(images, 3))


def _checksum(pieces: np.ndarray, size: np.ndarray) -> int:
    return (
        zlib.crc32(np.ascontiguousarray(pieces), zlib.crc32(np.asarray(size, "<i8").tobytes())) + 1
    )  # 0: to be decoded


def _damaged_rows(pixels: np.ndarray, rows: np.ndarray, starts: np.ndarray, pool: ThreadPoolExecutor) -> list[int]:
    def is_damaged(i: int) -> bool:
        return rows[i, 0] == 0 or rows[i, 0] != _checksum(pixels[starts[i] : starts[i + 1]], rows[i, 1:])

    return [i for i, damaged in enumerate(pool.map(is_damaged, range(len(rows)))) if damaged]


def _fingerprint(images: EncodedImages, kind: str, pool: ThreadPoolExecutor) -> str:
    """Changes with the files (path, size, time of change), embedded bytes, what is cached and this module's VERSION."""

    def state(i: int) -> bytes:
        path, content = images[i]
        if content is not None:
            return hashlib.sha256(content).digest()
        stat = os.stat(path)
        return f"{path} {stat.st_size} {stat.st_mtime_ns}".encode()

    digest = hashlib.sha256(f"{VERSION} {kind}".encode())
    for each in pool.map(state, range(len(images))):
        digest.update(each)
    return digest.hexdigest()[:24]


def _size(encoded: Encoded) -> tuple[int, int]:
    try:
        with open_image(encoded) as image:
            return shown_size(image)
    except Exception as error:
        raise ValueError(f"cannot read the image {name_of(encoded)}: {error}") from error


def _decoded(encoded: Encoded, size: tuple[int, int] | None, use: Callable[[Image.Image], Any]) -> Any:
    try:
        with open_image(encoded) as image:
            image = to_rgb(image)
            if size and image.size != size:
                raise ValueError("its EXIF data, behind the pixels, turn it; store it turned")
            return use(image)
    except Exception as error:
        raise ValueError(f"cannot decode the image {name_of(encoded)}: {error}") from error
