"""The scale of a file in the forms in which others write it: each with its right value."""

import io

import numpy as np
import pytest
import tifffile
from PIL import Image

from magnification_invariant.data.stated_scale import stated_scale

PIXELS = np.zeros((20, 30, 3), np.uint8)
RESOLUTION = {"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER"}  # 0.25 um/px


def write(path, description: str | None = None, **options):
    text = description.encode() if description is not None else None
    tifffile.imwrite(path, PIXELS, description=text, metadata=None, photometric="rgb", **options)
    return path


def ome(sizes: str, *, before: str = "", after: str = "") -> str:
    return (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        f'{before}<Image ID="Image:1"><Pixels SizeX="30" SizeY="20" {sizes}><TiffData IFD="0"/>'
        f"</Pixels></Image>{after}</OME>"
    )


def both(value, unit=None) -> str:
    return " ".join(f'PhysicalSize{a}="{value}"' + (f' PhysicalSize{a}Unit="{unit}"' if unit else "") for a in "XY")


MACRO = '<Image ID="Image:0" Name="macro"><Pixels SizeX="9" SizeY="9" {}><TiffData IFD="{}"/></Pixels></Image>'
OME_UNITS = {None: 0.25, "\u00b5m": 0.25, "\u03bcm": 0.25, "&#181;m": 0.25, "&#xB5;m": 0.25, "\u00c2\u00b5m": 0.25}
OME_UNITS |= {"um": "0,25", "micron": 0.25, "nm": 250, "pm": 250_000, "mm": 2.5e-4, "cm": 2.5e-5, "dm": 2.5e-6}
OME_UNITS |= {"m": "2.5E-7", "km": "2.5e-10", "\u00c5": 2500, "thou": 0.25 / 25.4, "in": 0.25 / 25_400}
OME_UNITS |= {"pt": 0.25 * 72 / 25_400}


@pytest.mark.parametrize("unit", OME_UNITS)
def test_units_of_ome(tmp_path, unit):
    scale = stated_scale(write(tmp_path / "a.ome.tif", ome(both(OME_UNITS[unit], unit))))
    assert scale.mpp == pytest.approx(0.25) and not scale.note


@pytest.mark.parametrize("unit", ["pixel", "reference frame", "furlong"])
def test_a_unit_that_is_no_length_is_named(tmp_path, unit):
    scale = stated_scale(write(tmp_path / "a.ome.tif", ome(both(0.25, unit))))
    assert scale.mpp is None and repr(unit) in scale.note


def test_the_image_that_the_pixels_belong_to(tmp_path):
    """A macro image stands first in the XML and last in the file, or is told by its size alone."""
    by_page = ome(both(0.25), before=MACRO.format(both(8), 1))
    by_size = ome(both(0.25), before=MACRO.format(both(8), 0))
    last = ome(both(0.25), after=MACRO.format(both(8), 0))
    spaced = ome('PhysicalSizeX = "0.25"\n PhysicalSizeXUnit= "um" PhysicalSizeY ="0.25"')
    for text in (by_page, by_size, last, by_page.replace('"', "'"), spaced):
        assert stated_scale(write(tmp_path / "a.ome.tif", text)).mpp == 0.25


def test_one_axis_alone_and_pixels_that_are_not_square(tmp_path):
    one = stated_scale(write(tmp_path / "a.tif", ome('PhysicalSizeX="0.25"')))
    assert one.mpp == 0.25 and "PhysicalSizeX alone" in one.note
    other = stated_scale(write(tmp_path / "b.tif", ome('PhysicalSizeX="0.2" PhysicalSizeY="0.45"')))
    assert other.mpp == pytest.approx(0.3) and "not square" in other.note


def test_what_contradicts_itself_is_said_and_what_means_nothing_is_not(tmp_path):
    dpi = {"resolution": (72, 72), "resolutionunit": "INCH"}
    plain = stated_scale(write(tmp_path / "a.tif", ome(both(0.25)), **dpi))
    assert plain.mpp == 0.25 and not plain.note
    scale = stated_scale(write(tmp_path / "b.tif", ome(both(0.5)), **RESOLUTION))
    assert scale.mpp == 0.5 and "TIFF's resolution 0.25: check it" in scale.note
    alone = stated_scale(write(tmp_path / "c.tif", **dpi))
    assert alone.mpp is None and "352.778 um/px, which cannot be" in alone.note
    wrong = stated_scale(write(tmp_path / "d.tif", ome(both(250, "um")), **RESOLUTION))
    assert wrong.mpp is None and "in nanometres it would be 0.25" in wrong.note


IMAGEJ = {"micron": 1, "um": 1, "\u00b5m": 1, "\\u00B5m": 1, "microns": 1, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
IMAGEJ |= {"inch": 25_400, "Angstrom": 1e-4}


@pytest.mark.parametrize("unit", IMAGEJ)
def test_units_of_imagej(tmp_path, unit):
    resolution = {"resolution": (IMAGEJ[unit] / 0.25, IMAGEJ[unit] / 0.25), "resolutionunit": "NONE"}
    file = write(tmp_path / "a.tif", f"ImageJ=1.54f\nimages=1\nunit={unit}\n", **resolution)
    assert stated_scale(file).mpp == pytest.approx(0.25, rel=1e-5)
    unknown = stated_scale(write(tmp_path / "b.tif", "ImageJ=1\nunit=pixel\n", **resolution))
    assert unknown.mpp is None and "'pixel', which is no length" in unknown.note


@pytest.mark.parametrize(
    "description",
    [
        "Aperio Image Library v11.2.1\r\n46000x32914|AppMag = 40|MPP = 0.25|Left = 25",
        "Aperio Image Library|MPP = 0,25|AppMag = 40",
        "Aperio Image Library|MPP=0.2500.",
        '<iScan Magnification="40" ScanRes="0.25" />',
        '<Attribute Name="DICOM_PIXEL_SPACING" PMSVR="IDoubleArray">"0.00025" "0.00025"</Attribute>',
        "openslide.mpp-x: 0.25\nopenslide.mpp-y: 0.25",
    ],
)
def test_descriptions_of_scanners(tmp_path, description):
    assert stated_scale(write(tmp_path / "a.tif", description)).mpp == pytest.approx(0.25)


@pytest.mark.parametrize("description", ["Aperio|MPP = 0|AppMag = 40", ome(both(0)), "<OME><Image>", "no words of it"])
def test_a_zero_states_nothing_and_the_next_source_is_asked(tmp_path, description):
    assert stated_scale(write(tmp_path / "a.tif", description, **RESOLUTION)).mpp == pytest.approx(0.25)


def test_other_files_state_none(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png", dpi=(101_600, 101_600))
    assert stated_scale(tmp_path / "a.png").mpp is None
    content = io.BytesIO(write(tmp_path / "a.tif", ome(both(0.25))).read_bytes())
    assert stated_scale(content).mpp == 0.25
    (tmp_path / "b.tif").write_text("no image")
    with pytest.raises(OSError, match="cannot identify"):
        stated_scale(tmp_path / "b.tif")
