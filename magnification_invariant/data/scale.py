"""Scale as physics: what a scale can be, and images resampled to another number of micrometres per pixel.

One kernel both ways: Lanczos with a support of 3 pixels, of the coarser of the two grids. So downsampling averages
over what one new pixel covers (no aliasing), and upsampling interpolates; it adds no detail.
"""

import io
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from magnification_invariant.data.images import to_rgb

if TYPE_CHECKING:
    import datasets

PLAUSIBLE = (0.02, 20.0)  # micrometres per pixel of a microscope; 72 dpi, which editors write, is 353
_MAGNIFICATIONS = {2.5, 4, 5, 10, 20, 25, 40, 50, 60, 63, 80, 100, 200, 400, 1000}


def check_mpp(mpp, where: str = "") -> float:
    """`mpp` as a number, if it can be micrometres per pixel: the one check, wherever somebody states a scale.

    Args:
        mpp: A number, or text that is one.
        where: It stands, for the message ("row 3 of slides.csv").

    Raises:
        ValueError: It is not a positive finite number, or not one of a microscope (`PLAUSIBLE`): says what it may be.
    """
    place = f" ({where})" if where else ""
    try:
        value = float(mpp)
    except (TypeError, ValueError) as error:
        raise ValueError(f"micrometres per pixel must be a number like 0.25, not {mpp!r}{place}") from error
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"micrometres per pixel must be a positive finite number like 0.25, not {value:g}{place}")
    low, high = PLAUSIBLE
    if low <= value <= high:
        return value
    hint = ""
    if value in _MAGNIFICATIONS and value > high:
        hint = (
            f"; if you mean a magnification of {value:g}: a scanner's 40x is about 0.25 um/px and its 20x about 0.5, "
            "BreaKHis' 40X (total) is 0.49"
        )
    elif low <= value / 1e3 <= high:
        hint = f"; in nanometres it would be {value / 1e3:g} um/px"
    else:
        for unit, factor in (("millimetres", 1e3), ("centimetres", 1e4), ("metres", 1e6)):
            if low <= value * factor <= high:
                hint = f"; in {unit} it would be {value * factor:g} um/px"
                break
    kind = "coarser" if value > high else "finer"
    raise ValueError(f"{value:g} micrometres per pixel are {kind} than any microscope's ({low} to {high}){hint}{place}")


def rescale(image_or_ds, mpp: float, *, native_mpp: float | None = None, image_column: str = "image"):
    """Resamples an image, or every image of a table, to `mpp` micrometres per pixel.

    The new pixels are exactly `mpp` wide; what is left of the field beyond a whole number of them is cut off, half at
    either side.

    Args:
        image_or_ds: A PIL image, of which `native_mpp` says the scale, or a table with a column `mpp`.
        mpp: The new scale.
        native_mpp: Of the image, micrometres per pixel.
        image_column: Of the table.

    Returns:
        The image as RGB; or the table, with new images (PNG), `mpp`, and `rescaled` true where an image was resampled.

    Raises:
        ValueError: A scale is not known, or so coarse that no pixel of the image is left.
    """
    if isinstance(image_or_ds, Image.Image):
        return _resample(image_or_ds, native_mpp, mpp)
    _need_mpp(image_or_ds)
    arguments = {"column": image_column, "mpp": float(mpp), "size": None}
    return _mapped(image_or_ds, arguments)


def digital_zoom(ds, magnifications: tuple[int, ...], *, fields: int = 1, image_column: str = "image"):
    """Makes other magnifications from images of one, resampled, with the same pixels.

    A microscope's camera keeps its number of pixels while the field shrinks with the magnification. So all images
    get the size in pixels that the whole field has at the lowest magnification made (at most their own), and show
    the middle of the field, or several fields of it. Magnifications above the given one are upsampled: larger, but no
    sharper.

    Args:
        ds: A table with columns `mpp`, `magnification` (one value) and `filename`.
        magnifications: To make, (40, 100, 200, 400) for example.
        fields: An axis, evenly spread, that are made of an image above the given magnification; 1 is the middle.
        image_column: Of the table.

    Returns:
        A table with a row a field and magnification: `magnification`, `mpp` and `image` made anew, `filename` marked
        by "@40X" (of several fields "@200X-0", ...), and `rescaled` true unless the magnification is the given one.
        Call results on it "rescaled".

    Raises:
        ValueError: A column is missing, or the table has several magnifications.
    """
    import datasets

    _need_mpp(ds)
    given = sorted(set(ds["magnification"]))
    if len(given) != 1:
        raise ValueError(f"Digital zoom starts from one magnification, the table has {given}: take one with select.")
    shrink = min(1.0, min(magnifications) / given[0])
    parts = []
    for magnification in magnifications:
        arguments = {"column": image_column, "zoom": magnification / given[0], "size": shrink}
        places = np.linspace(0, 1, fields).tolist() if fields > 1 and magnification > given[0] else [0.5]
        for i, place in enumerate((x, y) for y in places for x in places):
            name = f"@{magnification}X" + f"-{i}" * (len(places) > 1)
            parts.append(_mapped(ds, arguments | {"name": name, "magnification": int(magnification), "place": place}))
    return datasets.concatenate_datasets(parts)


def _need_mpp(ds) -> None:
    missing = "mpp" not in ds.column_names
    unknown = [] if missing else [i for i, mpp in enumerate(ds["mpp"]) if mpp is None or not mpp > 0]
    if missing or unknown:
        what = "no column 'mpp'" if missing else f"no scale in {len(unknown)} rows (first: {unknown[0]})"
        raise ValueError(f"The table has {what}: without micrometres per pixel an image cannot be rescaled.")


def _mapped(ds, arguments: dict) -> "datasets.Dataset":
    import datasets

    features = datasets.Features(dict(ds.features) | {"rescaled": datasets.Value("bool")})
    return ds.map(_rescaled_row, fn_kwargs=arguments, features=features, desc="resampling")


def _rescaled_row(
    row: dict, column: str, size: float | None, mpp=None, zoom=None, magnification=None, name="", place=(0.5, 0.5)
) -> dict:
    target = mpp if mpp is not None else row["mpp"] / zoom
    image = to_rgb(row[column])
    box = size and (max(1, int(image.width * size + 1e-6)), max(1, int(image.height * size + 1e-6)))
    changed = not np.isclose(target, row["mpp"])
    image = _resample(image, row["mpp"], target, box, place)
    new = {column: _png(image), "mpp": target, "rescaled": bool(changed or row.get("rescaled"))}
    if magnification is not None:
        path = PurePath(row["filename"])
        new |= {"magnification": magnification, "filename": path.stem + name + path.suffix}
    return new


def _resample(
    image: Image.Image, native: float | None, mpp: float, size: tuple[int, int] | None = None, place=(0.5, 0.5)
) -> Image.Image:
    """A part of `image` at `mpp`, by default its middle: `size` pixels, by default all that the field holds.

    Args:
        place: of the part, from (0, 0), the upper left corner, to (1, 1), the lower right one.
    """
    if not (native and native > 0 and mpp > 0):
        raise ValueError(f"Scales are positive micrometres per pixel, not {native!r} to {mpp!r}; pass native_mpp.")
    image = to_rgb(image)
    step = mpp / native  # old pixels a new one covers
    width, height = size or (int(image.width / step + 1e-6), int(image.height / step + 1e-6))
    if not width or not height:
        raise ValueError(f"An image of {image.width} x {image.height} pixels has no whole one at {mpp} um/px.")
    left, top = (image.width - width * step) * place[0], (image.height - height * step) * place[1]
    box = (max(0.0, left), max(0.0, top), min(image.width, left + width * step), min(image.height, top + height * step))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def _png(image: Image.Image) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return {"path": None, "bytes": buffer.getvalue()}
