"""Pixels as a viewer shows them: transparency, depth, polarity; and what of a file is missing is said."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from magnification_invariant.data import images
from magnification_invariant.data.apparent_scale import apparent_mpp, otsu
from magnification_invariant.data.images import check, open_image, to_rgb

GREY = np.random.default_rng(0).integers(1, 255, (40, 50), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(1, 255, (40, 50, 3), dtype=np.uint8)
COLOUR[0, 0] = 255  # all of the range


def stored(image: Image.Image, kind: str = "PNG", **options) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def tiff(pixels: np.ndarray, **options) -> Image.Image:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **({"metadata": None} | options))
    return Image.open(io.BytesIO(buffer.getvalue()))


def seen(image: Image.Image) -> tuple[np.ndarray, str]:
    notes = []
    return np.asarray(to_rgb(image, notes)).astype(int), "; ".join(notes)


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return pixels * share + 255 * (1 - share)


ALPHA = np.random.default_rng(2).integers(0, 256, (40, 50), dtype=np.uint8)
GREYS = np.repeat(GREY[..., None], 3, 2)
TRANSPARENT = {
    "RGBA": (lambda: stored(Image.fromarray(np.dstack([COLOUR, ALPHA]))), COLOUR),
    "LA": (lambda: stored(Image.fromarray(np.dstack([GREY, ALPHA]), "LA")), GREYS),
    "RGBA in memory": (lambda: Image.fromarray(np.dstack([COLOUR, ALPHA])), COLOUR),
    "RGBa": (lambda: Image.fromarray(np.dstack([COLOUR, ALPHA])).convert("RGBa"), COLOUR),
    "La": (lambda: Image.fromarray(np.dstack([GREY, ALPHA]), "LA").convert("La"), GREYS),
    "WebP": (lambda: stored(Image.fromarray(np.dstack([COLOUR, ALPHA])), "WEBP", lossless=True, exact=True), COLOUR),
    "TIFF": (lambda: tiff(np.dstack([COLOUR, ALPHA]), photometric="rgb", extrasamples=["unassalpha"]), COLOUR),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparency_is_shown_on_white(kind):
    make, pixels = TRANSPARENT[kind]
    shown, notes = seen(make())
    np.testing.assert_allclose(shown, on_white(pixels, ALPHA), atol=2)  # premultiplied colours are rounded
    assert notes == "its transparent parts are shown on white"


def test_premultiplied_tiff_adds_white_to_what_is_stored():
    pixels = (COLOUR * (ALPHA[..., None] / 255)).astype(np.uint8)
    shown, _ = seen(tiff(np.dstack([pixels, ALPHA]), photometric="rgb", extrasamples=["assocalpha"]))
    np.testing.assert_allclose(shown, pixels + 255.0 - ALPHA[..., None], atol=2)


def test_a_transparent_colour_of_a_palette_or_of_grey_is_white():
    image = Image.fromarray(GREY // 64).convert("P")
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 90, 90, 90])
    clear = (GREY // 64) == 1
    opaque = np.asarray(image.convert("RGB"))
    several = bytes([255, 0, 128, 255])
    assert (seen(stored(image, transparency=1))[0] == np.where(clear[..., None], 255, opaque)).all()
    half = on_white(opaque, np.array(list(several))[GREY // 64])
    np.testing.assert_allclose(seen(stored(image, transparency=several))[0], half, atol=1)
    image.info["transparency"] = several
    np.testing.assert_allclose(seen(image.convert("PA"))[0], half, atol=1)
    level = int(GREY[3, 3])
    grey = seen(stored(Image.fromarray(GREY), transparency=level))[0][..., 0]
    assert (grey == np.where(level == GREY, 255, GREY)).all()
    deep = seen(stored(Image.fromarray(GREY.astype(np.uint16) * 257), transparency=level * 257))[0][..., 0]
    assert (deep == grey).all()


def test_an_opaque_image_is_not_touched():
    opaque = np.dstack([COLOUR, np.full_like(GREY, 255)])
    assert seen(stored(Image.fromarray(opaque)))[1] == "" and (seen(stored(Image.fromarray(opaque)))[0] == COLOUR).all()


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["png", "tiff", "big-endian tiff", "deflated tiff"])
@pytest.mark.parametrize("colours", [1, 3])
def test_sixteen_bit_files_of_fewer_bits(bits, kind, colours):
    eight = GREY.copy() if colours == 1 else COLOUR
    eight[0] = 255
    values = eight.astype(np.uint16) << bits - 8 | (1 << bits - 8) - 1
    if kind == "png" and colours == 3:
        content = _png16(values)
        image = Image.open(io.BytesIO(content))
    elif kind == "png":
        image = stored(Image.fromarray(values))
    else:
        options = {"byteorder": ">" if "big" in kind else "<", "compression": "zlib" if "deflated" in kind else None}
        image = tiff(values, photometric="rgb" if colours == 3 else "minisblack", **options)
    shown, notes = seen(image)
    assert (shown == (eight if colours == 3 else np.repeat(eight[..., None], 3, 2))).all()
    said = f"its 16-bit values have {bits} bits, by their maximum of {values.max()}, and are shown so"
    assert notes == said * (bits < 16)


def _png16(values: np.ndarray, colour_type: int = 2, channels: int = 1) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", values.shape[1] // channels, len(values), 16, colour_type, 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def test_few_bits_that_no_decoder_gives_whole_are_dark_and_that_is_said():
    def grey_and_alpha():
        values = np.dstack([GREY.astype(np.uint16) << 2, np.full(GREY.shape, 65535, np.uint16)])  # 10 bits
        return Image.open(io.BytesIO(_png16(values.reshape(len(GREY), -1), colour_type=4, channels=2)))

    premultiplied = np.dstack([COLOUR.astype(np.uint16) << 2, np.full(GREY.shape, 65535, np.uint16)])
    dark = (grey_and_alpha(), tiff(premultiplied, photometric="rgb", extrasamples=["assocalpha"]))
    dark += (stored(Image.fromarray(COLOUR // 5)), stored(Image.fromarray(GREY // 4)))
    for image in dark:
        assert "dark: nothing is brighter than " in seen(image)[1], image.mode
    assert seen(stored(Image.fromarray(COLOUR // 4 + 64)))[1] == ""


@pytest.mark.parametrize("tag", [281, 341])  # MaxSampleValue, SMaxSampleValue
def test_the_depth_that_a_tiff_states_counts(tag):
    dim = GREY.astype(np.uint16) * 3  # 10 bits by its maximum
    shown, notes = seen(tiff(dim, extratags=[(tag, "H", 1, 4095, False)]))
    assert (shown[..., 0] == dim >> 4).all() and "12 bits, as it says" in notes
    assert (seen(tiff(dim, extratags=[(tag, "H", 1, 65535, False)]))[0][..., 0] == dim >> 8).all()


def test_white_is_zero_is_inverted_in_every_depth():
    for values in (GREY, GREY.astype(np.uint16) * 257):
        assert (seen(tiff(values, photometric="miniswhite"))[0][..., 0] == 255 - GREY).all()
    twelve = GREY.astype(np.uint16) * 16 + 15
    twelve[0, 0] = 4095
    shown, _ = seen(tiff(twelve, photometric="miniswhite"))
    assert (shown[..., 0] == 255 - (twelve >> 4)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_an_image_is_turned_once(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth = Image.fromarray(COLOUR[:4, :5]).resize((50, 40))
    image = Image.Image.copy(smooth)
    image.getexif()[0x0112] = orientation
    right = np.asarray(ImageOps.exif_transpose(image)).astype(int)
    shown, _ = seen(stored(smooth, kind, exif=exif))
    assert shown.shape == right.shape and np.abs(shown - right).mean() < 6


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2] + b"\xff\xd9"


def test_what_is_missing_of_a_file_is_said():
    smooth = Image.fromarray(COLOUR[:20, :25]).resize((500, 400))
    buffer = io.BytesIO()
    smooth.save(buffer, "JPEG", quality=90)
    assert seen(Image.open(io.BytesIO(buffer.getvalue())))[1] == ""
    shown, notes = seen(Image.open(io.BytesIO(cut(buffer.getvalue()))))
    lines = int(notes.split()[2])
    assert "of 400 lines are of one colour (128, 128, 128)" in notes and 100 < lines < 300
    assert np.ptp(shown[-lines:]) == 0 and np.ptp(shown[-lines - 1]) > 0
    half = np.asarray(smooth).copy()
    half[201:] = 0
    assert "its last 199 of 400 lines are of one colour (0, 0, 0)" in seen(tiff(half, photometric="rgb"))[1]
    few = np.asarray(smooth).copy()
    few[365:] = 0
    assert seen(Image.fromarray(few))[1] == ""
    left = np.asarray(smooth).copy()
    left[:, :200] = 0
    assert seen(Image.fromarray(left))[1] == ""


@pytest.mark.parametrize("size", [(100, 100), (250, 170), (300, 200), (64, 512), (701, 463)])
@pytest.mark.parametrize("colour", [(200, 100, 150), (230, 230, 230), (180, 120, 200), (0, 0, 0), (255, 255, 255)])
def test_a_field_of_one_colour_is_said_to_be_one_and_is_no_error(size, colour):
    image = Image.new("RGB", size, colour)
    assert apparent_mpp(image) is None
    assert seen(image)[1] == "hardly any tissue: a field of one colour"


def test_the_threshold_is_scikit_images_and_a_constant_has_one_too():
    filters, rng = pytest.importorskip("skimage.filters"), np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 1, 500), rng.normal(4, 1.5, 300)]).astype(np.float32).reshape(20, -1)
    assert otsu(values) == pytest.approx(filters.threshold_otsu(values, 128), rel=1e-5)
    for constant in (0.0, 7.0):
        assert constant - 0.5 <= otsu(np.full((8, 8), constant, np.float32)) < constant


def test_images_are_as_large_as_memory_allows(tmp_path, monkeypatch):
    assert Image.MAX_IMAGE_PIXELS >= images.MOST_PIXELS > 0
    path = tmp_path / "large.png"
    Image.new("1", (400, 300)).save(path)
    monkeypatch.setattr(images, "MOST_PIXELS", 100_000)
    for limit in (None, 50_000):  # Pillow's own is said the same way
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for opened in (lambda: open_image((path, None)), lambda: check(path)):
            with pytest.raises(ValueError, match=r"more than 100,000 pixels.* or set MAGDG_MAX_PIXELS"):
                opened()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setenv("MAGDG_MAX_PIXELS", "120000")
    monkeypatch.setattr(images, "MOST_PIXELS", images._most_pixels())
    assert check(path) == (400, 300)


def test_what_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png is not a regular file"):
        open_image((tmp_path / "pipe.png", None))
    with pytest.raises(ValueError, match="there is no image"):
        open_image((None, None))
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match="no known range"):
            to_rgb(Image.new(mode, (9, 9)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_rgb(Image.new("P", (9, 9)))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def encoded(pixels: np.ndarray, mode: str | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, "PNG", **options)
    return buffer.getvalue()


def outcome(content: bytes):
    """Pixels and notes, or what was raised."""
    notes = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(to_rgb(open_image((None, content)), notes)).tolist(), notes
    except Exception as error:
        return type(error), str(error).split(" at 0x")[0]  # an address


def outcomes(content: bytes, monkeypatch) -> tuple:
    """With the quick decoder of PNG and without."""
    with monkeypatch.context() as patched:
        patched.setattr(images, "_png_decoder", lambda: None)
        by_pillow = outcome(content)
    return outcome(content), by_pillow


def magick() -> bytes:
    """With the chunks of BreaKHis' originals."""
    plain = encoded(COLOUR)
    before = chunk(b"bKGD", bytes(6)) + chunk(b"oFFs", bytes(9)) + chunk(b"vpAg", bytes(9))
    return plain[:33] + before + plain[33:-12] + chunk(b"tEXt", b"date:create\x002014-12-14") + plain[-12:]


TURNED = b"4d4d002a000000080001011200030000000100060000000000000000"  # EXIF data: orientation 6
RAW_PROFILE = b"Raw profile type exif\0\nexif\n      28\n" + TURNED


def turned_png() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(COLOUR, exif=exif)


ALL_KINDS = {
    "turned by EXIF": turned_png(),
    "RGB": encoded(COLOUR),
    "RGB with its resolution": encoded(COLOUR, dpi=(300, 300)),
    "grey": encoded(GREY),
    "palette": encoded(COLOUR, "P"),
    "palette with transparency": encoded(COLOUR, "P", transparency=3),
    "transparent colour": encoded(COLOUR, transparency=tuple(COLOUR[5, 5].tolist())),
    "RGBA": encoded(np.dstack([COLOUR, ALPHA])),
    "16 bits": encoded(GREY.astype(np.uint16) * 100),
    "as ImageMagick writes it": magick(),
    "EXIF as text": encoded(COLOUR)[:33] + chunk(b"tEXt", RAW_PROFILE) + encoded(COLOUR)[33:],
    "more behind its end": encoded(COLOUR) + b"more",
    "no end": encoded(COLOUR)[:-12],
    "another checksum": encoded(COLOUR)[:-16] + b"abcd" + encoded(COLOUR)[-12:],
}


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_quick_decoder_of_png_changes_nothing(kind, monkeypatch):
    pytest.importorskip("kornia_rs")
    quick, by_pillow = outcomes(ALL_KINDS[kind], monkeypatch)
    assert quick == by_pillow


def test_the_quick_decoder_is_used_where_it_is_there():
    pytest.importorskip("kornia_rs")
    for content in (encoded(COLOUR), magick()):
        assert np.array_equal(np.asarray(images._plain_png(open_image((None, content)))), COLOUR)
    assert images._plain_png(open_image((None, turned_png()))) is None


def test_a_damaged_png_is_the_same_error_with_a_quick_decoder_and_without(monkeypatch):
    pytest.importorskip("kornia_rs")
    whole = magick()
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.integers(8, len(whole))] ^= 1 << rng.integers(8)
        for content in (bytes(damaged), whole[: rng.integers(8, len(whole))]):
            quick, by_pillow = outcomes(content, monkeypatch)
            assert quick == by_pillow


def test_originals_are_bit_equal_with_a_quick_decoder(breakhis_real, monkeypatch):
    pytest.importorskip("kornia_rs")
    originals = sorted(breakhis_real.rglob("*.png"))[:20]
    assert originals
    for path in originals:
        quick, by_pillow = outcomes(path.read_bytes(), monkeypatch)
        assert quick == by_pillow
