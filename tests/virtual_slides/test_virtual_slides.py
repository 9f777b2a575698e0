import json

import numpy as np
import pytest
from PIL import Image

from magnification_invariant.data.breakhis import MPP, load_breakhis
from magnification_invariant.virtual_slides import dataset as virtual_slides
from magnification_invariant.virtual_slides import (
    load_virtual_slides,
    native_mpp,
    render_field,
    virtual_field,
    virtual_patient,
)

SIZE = (175, 115)


def slides(folder, n_patients=4, **kwargs):
    return load_virtual_slides(n_patients, images_per_magnification=1, size=SIZE, write_to=folder, **kwargs)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.png")}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    slides(folder, workers=1)
    return folder


def test_the_table_is_that_of_breakhis(tree):
    ds = load_breakhis(tree)
    again = slides(tree)
    assert ds.column_names == again.column_names
    assert [row["filename"] for row in ds] == [row["filename"] for row in again]
    for a, b in zip(ds, again, strict=True):
        assert np.array_equal(np.asarray(a["image"]), np.asarray(b["image"]))
    assert set(ds["magnification"]) == {40, 100, 200, 400} and len(ds) == 16
    assert ds[0]["image"].size == SIZE
    for magnification, mpp in zip(ds["magnification"], ds["mpp"], strict=True):
        assert mpp == pytest.approx(MPP[magnification] * 700 / 175)
    assert {m: native_mpp(m) for m in MPP} == pytest.approx(MPP)
    label = dict(zip(ds["patient"], ds["label"], strict=True))
    assert sorted(label.values()) == [0, 0, 1, 1]  # half of them malignant


def test_pixels_are_what_was_drawn(tree):
    """The PNG writer is this module's own; Pillow reads from it what the renderer gave."""
    truth = json.loads((tree / "virtual_slides.json").read_text())
    parameters = truth["parameters"]
    for item in virtual_slides._plan(parameters)[::5]:
        drawn = virtual_slides._draw(parameters, item)
        assert np.array_equal(np.asarray(Image.open(tree / item["path"])), drawn)
        assert drawn.shape == (115, 175, 3) and drawn.std() > 10


def test_the_bytes_do_not_depend_on_the_workers_or_on_an_interruption(tree, tmp_path):
    slides(tmp_path / "two", workers=2)
    assert files(tmp_path / "two") == files(tree)
    whole = files(tmp_path / "two")
    for path in list((tmp_path / "two").rglob("*.png"))[::3]:
        path.unlink()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "two").rglob("*.png")}
    slides(tmp_path / "two", workers=1)
    assert files(tmp_path / "two") == whole
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())  # what was there is not drawn again


def test_seeds_choose_fields_and_numbers_choose_people(tree, tmp_path):
    slides(tmp_path / "seed", n_patients=1, seed=1)
    slides(tmp_path / "confirmation", n_patients=1, first_patient=10_000)
    original = files(tree)
    other = files(tmp_path / "seed")
    assert other.keys() <= original.keys() and not any(original[name] == other[name] for name in other)
    assert all("-31-10000-" in name for name in files(tmp_path / "confirmation"))
    assert virtual_patient(3) == virtual_patient(3) != virtual_patient(5)


def test_another_folder_is_not_overwritten(tree, tmp_path):
    with pytest.raises(FileExistsError, match="nuisance"):
        slides(tree, nuisance=2)
    (tmp_path / "BreaKHis_v1").mkdir()
    with pytest.raises(FileExistsError, match="not drawn here"):
        slides(tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n_patients": 0}, "1 or more"),
        ({"magnifications": (50,)}, "some of"),
        ({"nuisance": 3}, "0 .none., 1 .usual. or 2 .strong."),
        ({"size": (224, 224)}, "proportions"),
        ({"seed": -1}, "0 or more"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_virtual_slides(**arguments)


def test_the_same_tissue_at_every_scale():
    """A field and the same field drawn at half the scale, averaged down, show the same thing."""
    centre = virtual_field(2, 200, 0)
    fine = render_field(2, 0.2, centre, (350, 230)).astype(float)
    coarse = render_field(2, 0.4, centre, (175, 115)).astype(float)
    down = fine.reshape(115, 2, 175, 2, 3).mean((1, 3))
    assert np.corrcoef(down.ravel(), coarse.ravel())[0, 1] > 0.97
    elsewhere = render_field(2, 0.4, (centre[0] + 300, centre[1]), (175, 115)).astype(float)
    assert np.corrcoef(elsewhere.ravel(), coarse.ravel())[0, 1] < 0.6


@pytest.mark.parametrize("magnification", [100, 200, 400])
def test_nested_fields_lie_in_the_field_at_40x(magnification):
    wide, narrow = (np.array(virtual_field(4, m, 0, nested=True)) for m in (40, magnification))
    room = np.array([700, 460]) / 2 * (native_mpp(40) - native_mpp(magnification))
    assert (np.abs(narrow - wide) <= room + 1e-6).all()
    # and show the same tissue: the part of the 40X picture that the narrow one covers, against it, at the scale of 40X
    overview = np.asarray(Image.fromarray(render_field(4, native_mpp(40), tuple(wide))).convert("L"), float)
    detail = Image.fromarray(render_field(4, native_mpp(magnification), tuple(narrow))).convert("L")
    ratio = native_mpp(magnification) / native_mpp(40)
    w, h = int(700 * ratio), int(460 * ratio)
    detail = np.asarray(detail.resize((w, h), Image.Resampling.BOX), float)
    x, y = np.rint((narrow - wide) / native_mpp(40) + np.array([350, 230]) - np.array([w, h]) / 2).astype(int)
    x, y = np.clip(x, 0, 700 - w), np.clip(y, 0, 460 - h)
    assert np.corrcoef(overview[y : y + h, x : x + w].ravel(), detail.ravel())[0, 1] > 0.8


def test_separate_fields_are_the_default():
    fields = {virtual_field(4, m, k) for m in (40, 100, 200, 400) for k in range(3)}
    assert len(fields) == 12


PEOPLE = [virtual_patient(number) for number in range(2000)]


def by_class(name):
    values = np.array([getattr(p, name) for p in PEOPLE], float)
    label = np.array([p.label for p in PEOPLE])
    return values[label == 1], values[label == 0]


def separation(name):
    """Probability that a malignant patient has the larger value."""
    malignant, benign = by_class(name)
    return (malignant[:, None] > benign[None]).mean() + (malignant[:, None] == benign[None]).mean() / 2


@pytest.mark.parametrize(
    "name, sign", [("size_cv", 1), ("irregularity", 1), ("polarity", -1), ("mitoses", 1), ("solid", 1)]
)
def test_classes_differ_in_what_a_pathologist_looks_at(name, sign):
    assert 0.8 < (separation(name) if sign > 0 else 1 - separation(name)) < 0.999  # with overlap


@pytest.mark.parametrize(
    "name", ["diameter", "haematoxylin", "pitch", "epithelium", "fat", "inflammation", "looseness", "grain", "core"]
)
def test_and_in_nothing_else(name):
    assert abs(separation(name) - 0.5) < 0.04


def test_the_microscope_does_not_know_the_class(tmp_path):
    """Sessions are shared between magnifications; strength 0 adds nothing, 2 adds more than 1; all of it is logged."""
    from magnification_invariant.virtual_slides import _optics

    same = [{_optics(0, n, m, k, 1).session for m in (40, 100, 200, 400)} for n in range(20) for k in range(2)]
    assert all(len(sessions) == 1 for sessions in same) and len(set.union(*same)) > 1
    none, usual, strong = (_optics(0, 7, 200, 0, strength) for strength in (0, 1, 2))
    assert (none.blur, none.noise, none.vignette) == (0, 0, 0)
    assert strong.blur == pytest.approx(2 * usual.blur) and strong.noise == pytest.approx(2 * usual.noise)
    blurs = np.array([_optics(0, n, 200, 0, 1).blur for n in range(2000)])
    label = np.array([p.label for p in PEOPLE])
    assert abs((blurs[label == 1][:, None] > blurs[label == 0][None]).mean() - 0.5) < 0.04
    slides(tmp_path, n_patients=1)
    logged = json.loads((tmp_path / "virtual_slides.json").read_text())
    assert {"session", "blur", "noise", "gain", "vignette"} <= logged["images"][0].keys()
    assert logged["patients"][0]["atypia"] == virtual_patient(0).atypia


def test_nuclei_of_an_atypical_patient_vary_more_in_the_picture():
    """Measured on pixels: the spread of the areas of dark blobs, in the most and in the least atypical patients."""
    from scipy import ndimage

    def spread(patient):
        areas = []
        for k in range(3):
            image = render_field(patient.number, 0.2, virtual_field(patient.number, 200, k), (500, 330)).astype(float)
            density = -np.log((image[..., 0] + 1) / 256)
            blobs, n = ndimage.label(
                ndimage.binary_opening(
                    ndimage.binary_fill_holes(density > 0.55 * np.percentile(density, 99)), iterations=3
                )
            )
            area = ndimage.sum_labels(np.ones(blobs.shape), blobs, range(1, n + 1))
            areas += list(area[area > 60])
        return np.std(areas) / np.mean(areas)

    ranked = sorted(PEOPLE[:200], key=lambda p: p.atypia)
    assert np.mean([spread(p) for p in ranked[-6:]]) > 1.1 * np.mean([spread(p) for p in ranked[:6]])
