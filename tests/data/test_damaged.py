"""Files that are odd but whole, in the names of BreaKHis: a right image, or an error that names the file."""

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from magnification_invariant.data.breakhis import load_breakhis
from magnification_invariant.data.pixels import PixelCache

CASES = 10  # of every kind
NAME = "SOB_B_A-14-22549AB-40-001"


def picture(rng, width=70, height=46) -> Image.Image:
    """Smooth, so that JPEG keeps it."""
    coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def save(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def png(width: int, height: int, depth: int, colour: int, data: bytes, before=b"", after=b"") -> bytes:
    """A PNG by hand, with what Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    extra = [chunk(b"eXIf", exif) if exif else b"" for exif in (before, after)]
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + header + extra[0] + chunk(b"IDAT", zlib.compress(data)) + extra[1] + chunk(b"IEND", b"")


def png_rows(pixels: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in pixels)


def turned_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()[6:]


# Each kind writes one file below `folder` and gives it back, with the pixels that are right (H, W, 3), or None if
# there are none.


def wrong_extension(folder, rng):
    image = picture(rng)
    kind, suffix = [("JPEG", ".png"), ("PNG", ".jpg"), ("TIFF", ".jpeg"), ("BMP", ".webp"), ("GIF", ".tif")][
        rng.integers(5)
    ]
    if kind == "GIF":
        image = image.quantize(255)
    path = save(image, folder / (NAME + suffix), format=kind)
    return path, image.convert("RGB")


def cmyk(folder, rng):
    image = picture(rng).convert("CMYK")
    kind, suffix = [("JPEG", ".jpg"), ("TIFF", ".tif")][rng.integers(2)]
    return save(image, folder / (NAME + suffix), format=kind), image.convert("RGB")


def exif_turned(folder, rng):
    image = picture(rng, 46, 70)
    path = folder / (NAME + str(rng.choice([".jpg", ".png", ".tif", ".webp"])))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif, **({"lossless": True} if path.suffix == ".webp" else {}))
    return path, image.transpose(Image.Transpose.ROTATE_270)


def exif_behind_the_pixels(folder, rng):
    path = folder / (NAME + ".png")
    path.write_bytes(png(46, 70, 8, 2, png_rows(np.asarray(picture(rng, 46, 70))), after=turned_exif()))
    return path, None


def animated(folder, rng):
    frames = [picture(rng) for _ in range(3)]
    kind, suffix, options = [
        ("GIF", ".png", {}),
        ("PNG", ".png", {}),
        ("WEBP", ".webp", {"lossless": True}),
        ("TIFF", ".tif", {}),
    ][rng.integers(4)]
    if kind == "GIF":
        frames = [frame.quantize(200) for frame in frames]
    path = folder / (NAME + suffix)
    frames[0].save(path, format=kind, save_all=True, append_images=frames[1:], **options)
    return path, frames[0].convert("RGB")


def tiny(folder, rng):
    image = Image.new("RGB", tuple(rng.integers(1, 8, 2)), tuple(rng.integers(0, 256, 3)))
    return save(image, folder / (NAME + str(rng.choice([".png", ".jpg"])))), image


def odd_name(folder, rng):
    name = ["中文.png", "a\nb.png", NAME + "\n.png", "٤٠".join([NAME[:-6], "-001.png"]), "-" * 200 + ".png"][
        rng.integers(5)
    ]
    return save(picture(rng), folder / name), None


def odd_folder(folder, rng):
    folder = folder / ["中文", "a\nb", "%s {0} \\", " "][rng.integers(4)]
    folder.mkdir()
    image = picture(rng)
    return save(image, folder / (NAME + ".png")), image


def not_utf8(folder, rng):
    folder = os.fsencode(folder / "x") + b"\xff\xfe"
    os.mkdir(folder)
    return save(picture(rng), Path(os.fsdecode(folder)) / (NAME + ".png")), None


def not_a_file(folder, rng):
    path = folder / (NAME + ".png")
    if rng.integers(2):
        os.mkfifo(path)  # who reads it waits for ever
    else:
        path.symlink_to(folder / "nowhere.png")
    return path, None


KINDS = [wrong_extension, cmyk, exif_turned, exif_behind_the_pixels, animated, tiny]
KINDS += [odd_name, odd_folder, not_utf8, not_a_file]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:.*pixels are not square")
@pytest.mark.parametrize("kind", range(len(KINDS)), ids=lambda i: f"{i}-{KINDS[i].__name__}")
def test_a_right_image_or_an_error_that_names_the_file(kind, tmp_path):
    for case in range(CASES):
        folder = tmp_path / str(case)
        folder.mkdir()
        path, right = KINDS[kind](folder, np.random.default_rng([kind, case]))
        try:
            with warnings.catch_warnings(record=True) as caught:
                ds = load_breakhis(folder)
            cache = PixelCache(ds, 10**6, folder=tmp_path / "cache")
        except (ValueError, FileNotFoundError) as error:
            assert right is None, error
            shown = f"{error} {[str(warning.message) for warning in caught]}"
            assert path.name in shown or repr(path.name)[1:-1] in shown or ascii(path.name)[1:-1] in shown
        else:
            assert right is not None
            got = cache.pixels[0].permute(1, 2, 0).numpy().astype(int)
            assert got.shape == np.asarray(right).shape
            assert np.abs(got - np.asarray(right)).mean() < 6  # JPEG; others are exact


@pytest.mark.parametrize("kind", [exif_turned, cmyk], ids=lambda kind: kind.__name__)
def test_embedded_images_are_read_the_same_way(kind, tmp_path):
    path, right = kind(tmp_path, np.random.default_rng(1))
    image = {"path": path.name, "bytes": path.read_bytes()}
    ds = Dataset.from_dict({"image": [image]}, features=Features(image=ImageFeature()))
    got = PixelCache(ds, 10**6, folder=tmp_path / "cache").pixels[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(got - np.asarray(right)).mean() < 6
