import math
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from magnification_invariant.data.breakhis import MPP, load_breakhis
from magnification_invariant.data.scale import digital_zoom, rescale


def grating(period: float, width=300, height=200) -> Image.Image:
    """Vertical stripes of a cosine, `period` pixels from one to the next."""
    wave = 127.5 + 100 * np.cos(2 * math.pi * (np.arange(width) + 0.5) / period)
    return Image.fromarray(np.broadcast_to(wave.round().astype(np.uint8)[None, :, None], (height, width, 3)).copy())


def period_and_amplitude(image: Image.Image) -> tuple[float, float]:
    line = np.asarray(image)[image.height // 2, 8:-8, 0].astype(float)
    spectrum = np.abs(np.fft.rfft((line - line.mean()) * np.hanning(len(line)), n=1 << 16))
    return (1 << 16) / spectrum.argmax(), line.std() * 2**0.5


@pytest.mark.parametrize("mpp", [0.2, 0.25, 0.4, 0.5, 0.7, 1.0])
def test_lengths_in_micrometres_stay(mpp):
    """A structure of 8 um has 8 / mpp pixels whatever the scale, and its contrast."""
    image = rescale(grating(8 / 0.5), mpp, native_mpp=0.5)
    period, amplitude = period_and_amplitude(image)
    assert period == pytest.approx(8 / mpp, rel=0.02)
    assert amplitude == pytest.approx(100, abs=4)
    assert image.size == (int(300 * 0.5 / mpp + 1e-6), int(200 * 0.5 / mpp + 1e-6))


def test_detail_finer_than_the_new_pixels_becomes_grey():
    """Stripes of 3 pixels, sampled every 4: without a filter they would come back as stripes of 12."""
    image = rescale(grating(3), 2.0, native_mpp=0.5)
    assert np.ptp(np.asarray(image)[10:-10, 10:-10].astype(int)) <= 8
    assert np.asarray(image).mean() == pytest.approx(127.5, abs=2)


def test_the_same_scale_is_the_same_image():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (46, 70, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(rescale(image, 0.5, native_mpp=0.5)), np.asarray(image))


def test_the_scale_is_exact_where_pixels_do_not_divide():
    """101 pixels of 0.5 um at 0.7 um are 72.1: 72 whole ones, centred, not 101 squeezed into 72."""
    image = Image.fromarray(np.zeros((101, 101, 3), np.uint8))
    image.paste((255, 255, 255), (50, 0, 51, 101))
    small = np.asarray(rescale(image, 0.7, native_mpp=0.5))[36, :, 0].astype(float)
    assert small.shape == (72,)
    assert (small * np.arange(72)).sum() / small.sum() == pytest.approx(35.5, abs=0.02)  # the middle stays the middle


def test_refusals():
    image = grating(8)
    with pytest.raises(ValueError, match="pass native_mpp"):
        rescale(image, 0.5)
    with pytest.raises(ValueError, match="positive"):
        rescale(image, -1, native_mpp=1)
    with pytest.raises(ValueError, match="no whole one"):
        rescale(image, 1000, native_mpp=1)


def table(images, mpp, magnification=100):
    n = len(images)
    features = Features(
        image=ImageFeature(), mpp=Value("float64"), magnification=Value("int32"), filename=Value("string")
    )
    columns = {"image": images, "mpp": mpp, "magnification": [magnification] * n}
    return Dataset.from_dict(columns | {"filename": [f"{i}.png" for i in range(n)]}, features=features)


def test_a_table_is_rescaled_and_says_so():
    ds = table([grating(16), grating(16)], [0.5, 1.0])
    new = rescale(ds, 1.0)
    assert new["mpp"][:] == [1.0, 1.0] and new["rescaled"][:] == [True, False]
    assert [row["image"].size for row in new] == [(150, 100), (300, 200)]
    assert np.array_equal(np.asarray(new[1]["image"]), np.asarray(ds[1]["image"]))
    again = rescale(new, 1.0)
    assert again["rescaled"][:] == [True, False]  # once resampled, always marked
    with pytest.raises(ValueError, match=r"no scale in 1 rows \(first: 1\)"):
        rescale(table([grating(16)] * 2, [0.5, None]), 1.0)
    with pytest.raises(ValueError, match="no column 'mpp'"):
        rescale(ds.remove_columns("mpp"), 1.0)


def test_digital_zoom_makes_domains_of_the_same_size(breakhis_tree):
    mpp = MPP[100]
    ds = table([grating(16, 700, 460)], [mpp])
    zoomed = digital_zoom(ds, (40, 100, 200, 400))
    assert zoomed["magnification"][:] == [40, 100, 200, 400]
    assert np.allclose(zoomed["mpp"], [MPP[m] for m in (40, 100, 200, 400)])
    assert zoomed["rescaled"][:] == [True, False, True, True]
    assert zoomed["filename"][:] == ["0@40X.png", "0@100X.png", "0@200X.png", "0@400X.png"]
    assert {row["image"].size for row in zoomed} == {(280, 184)}
    for row in zoomed:  # what is 16 pixels at 100X is so many times larger
        assert period_and_amplitude(row["image"])[0] == pytest.approx(16 * row["magnification"] / 100, rel=0.03)
    # At its own magnification pixels are copied, from the middle.
    middle = np.asarray(ds[0]["image"])[138:322, 210:490]
    assert np.array_equal(np.asarray(zoomed[1]["image"]), middle)
    assert digital_zoom(ds, (200,))[0]["image"].size == (700, 460)
    with pytest.raises(ValueError, match=r"one magnification, the table has \[40, 100, 200, 400\]"):
        digital_zoom(load_breakhis(breakhis_tree), (40,))


def test_digital_zoom_keeps_the_other_columns(breakhis_tree):
    ds = load_breakhis(breakhis_tree)
    ds = ds.select(np.flatnonzero(np.asarray(ds["magnification"]) == 100))
    zoomed = digital_zoom(ds, (40, 100))
    assert zoomed.column_names == [*ds.column_names, "rescaled"]
    assert zoomed["patient"][:] == ds["patient"][:] * 2 and zoomed.features["label"] == ds.features["label"]


def test_digital_zoom_of_several_fields_tiles_the_image(breakhis_tree):
    """At twice the magnification the four corner fields are the quarters of the upsampled image."""
    ds = load_breakhis(breakhis_tree)
    ds = ds.select([i for i, magnification in enumerate(ds["magnification"]) if magnification == 100][:1])
    zoomed = digital_zoom(ds, (100, 200), fields=2)
    whole, *quarters = (np.asarray(image, int) for image in zoomed["image"])
    assert [Path(name).stem.partition("@")[2] for name in zoomed["filename"]] == [
        "100X",
        *(f"200X-{i}" for i in range(4)),
    ]
    height, width = whole.shape[:2]
    doubled = np.asarray(ds[0]["image"].resize((2 * width, 2 * height), Image.Resampling.LANCZOS), int)
    for i, quarter in enumerate(quarters):
        top, left = (i // 2) * height, (i % 2) * width
        expected = doubled[top : top + height, left : left + width]
        inside = np.s_[8:-8, 8:-8]  # Lanczos sees beyond a field's edge only in the doubled image
        assert np.abs(quarter[inside] - expected[inside]).max() <= 1
    assert zoomed["mpp"] == [ds[0]["mpp"], *[ds[0]["mpp"] / 2] * 4]
