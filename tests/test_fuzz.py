"""Tables, TIFF tags and damaged files at random: the right value, or an error that names the file; nothing else."""

import csv
import io
import warnings

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from magnification_invariant import Classifier, load_table
from magnification_invariant.data.scale import PLAUSIBLE
from magnification_invariant.data.stated_scale import UNITS, stated_scale
from magnification_invariant.predict import Item

pytestmark = pytest.mark.slow
FUZZ = settings(max_examples=700, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    for i in range(4):
        Image.fromarray(np.roll(PIXELS, i, 0)).save(folder / f"{i}.png")
    return folder


IDS = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0", exclude_categories=("Cs", "Zl", "Zp", "Cc")))
IDS |= st.sampled_from(["007", "1E5", "1.10", "NA", "null", "nan", " a ", "31415926535897932384", "=1+1", "true", ""])
SCALE = st.sampled_from(["", "0.25", "nan", "inf", "-1", "0", "1e400", "250", "0,25", "0.25 ", "x"]) | st.floats().map(
    str
)


GOOD = st.sampled_from(["", "0.25", "nan", "0.5 "])
ROWS = st.lists(st.tuples(IDS, IDS, GOOD), min_size=2, max_size=8)
ROWS |= st.lists(st.tuples(IDS, IDS, GOOD | SCALE), min_size=1, max_size=8)


@FUZZ
@given(rows=ROWS, delimiter=st.sampled_from(",,,;"))
def test_tables(folder, rows, delimiter):
    path = folder / "table.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["image", "label", "domain", "patient", "mpp"])
        for i, (domain, patient, mpp) in enumerate(rows):
            writer.writerow([f"{i % 4}.png", "ab"[i % 2], domain, patient, mpp])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            ds = load_table(path, domain_column="domain", group_column="patient")
        except (ValueError, FileNotFoundError) as error:
            assert "table.csv" in str(error), error
            return
    assert ds["patient"][:] == [patient.strip() for _, patient, _ in rows]
    assert ds["domain"][:] == [domain.strip() for domain, _, _ in rows]
    for value, (_, _, mpp) in zip(ds["mpp"], rows, strict=True):
        assert np.isnan(value) or (value == float(mpp) and PLAUSIBLE[0] <= value <= PLAUSIBLE[1])


NUMBER = st.floats(1e-9, 1e9).map(repr) | st.sampled_from(["0", "-1", "nan", "inf", "1e999", "", "x", "0,25"])


@FUZZ
@given(
    x=NUMBER,
    y=NUMBER,
    unit=st.sampled_from([*UNITS, "pixel", "", "&#181;m", "parsec"]),
    resolution=st.floats(1e-3, 1e7),
    kind=st.sampled_from(["ome", "aperio", "imagej", "none"]),
)
def test_tags_of_tiff(folder, x, y, unit, resolution, kind):
    path, quoted = folder / "a.tif", unit.replace('"', "&quot;")
    text = {
        "ome": f'<OME><Image><Pixels PhysicalSizeX="{x}" PhysicalSizeY="{y}" PhysicalSizeXUnit="{quoted}" '
        f'PhysicalSizeYUnit="{quoted}"/></Image></OME>',
        "aperio": f"Aperio|MPP = {x}|AppMag = {y}",
        "imagej": f"ImageJ=1.54\nunit={unit}\n",
        "none": "",
    }[kind]
    written = {"resolution": (resolution, resolution), "resolutionunit": "NONE" if kind == "imagej" else "CENTIMETER"}
    tifffile.imwrite(path, PIXELS, description=text.encode(), metadata=None, photometric="rgb", **written)
    scale = stated_scale(path)
    assert scale.mpp is None or PLAUSIBLE[0] <= scale.mpp <= PLAUSIBLE[1]
    try:
        sides = [float(side.replace(",", ".")) for side in (x, y)]
    except ValueError:
        return
    factor = UNITS.get({"&#181;m": "um"}.get(unit, unit))
    if kind == "ome" and factor and all(np.isfinite(side) and side > 0 for side in sides):
        wanted = (sides[0] * sides[1]) ** 0.5 * factor
        if PLAUSIBLE[0] * 1.001 < wanted < PLAUSIBLE[1] * 0.999:
            assert scale.mpp == pytest.approx(wanted, rel=1e-6)
        elif not PLAUSIBLE[0] * 0.999 < wanted < PLAUSIBLE[1] * 1.001:
            assert scale.mpp is None and "its OME-XML says" in scale.note


FORMATS = ["PNG", "JPEG", "TIFF", "WEBP"]


@FUZZ
@given(
    kind=st.sampled_from(FORMATS),
    cut=st.integers(0, 4000),
    flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 255)), max_size=4),
)
def test_damaged_files(tiny_classifier, kind, cut, flips):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for place, bits in flips:
        content[place % len(content)] ^= bits
    if cut % 2:
        content = content[: cut % len(content)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = tiny_classifier.load(Item("damaged", bytes(content), 0.5))
    if loaded.row["error"]:
        assert loaded.view is None and "Traceback" not in loaded.row["error"]
    else:
        assert loaded.view.pixels.dtype == np.uint8 and min(loaded.view.pixels.shape[:2]) >= 64


@pytest.fixture(scope="module")
def tiny_classifier(tiny_model):
    return Classifier.from_pretrained(tiny_model, device="cpu")
