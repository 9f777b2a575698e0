"""Zoom curves: what a trained network says of the same tissue at one scale after the other.

A scale is micrometres per pixel at the network's input. There are three kinds of curve, the `variant` of a row:

- ``rendered``: virtual slides. The tissue around the middle of an image of the finest magnification is photographed
  anew at every scale and fills the network's input, so the field grows with the scale.
- ``crop``: photographs at a constant crop. Downsampled, of which the middle fills the network's input: always as many
  pixels, so the field grows with the scale.
- ``field``: photographs at a constant field of view. Downsampled, always the same square of tissue, which the network
  sees in fewer and fewer tiles; their outputs are averaged.

A photograph is never enlarged: its curves start at the scale it was taken at and end where its short side just holds
the network's input; there both show the same. Every source magnification has curves of its own, because it has fields
and optics of its own.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from magnification_invariant import metrics
from magnification_invariant.data.images import EncodedImages, open_image, shown_size, to_rgb
from magnification_invariant.data.scale import rescale
from magnification_invariant.data.splits import domain_column, domain_name
from magnification_invariant.predict import Classifier
from magnification_invariant.records import ZOOM, last_epoch
from magnification_invariant.virtual_slides import GENERATOR_VERSION, SIDECAR, Optics, render_field

RENDERED_POINTS, PHOTOGRAPH_POINTS = 9, 5
BEYOND = 2.0  # how far the rendered curve goes beyond what was trained on, as a factor at either end


class View(NamedTuple):
    """A field at one scale: uint8 RGB (height, width, 3), no side shorter than the network's input."""

    variant: str
    mpp: float
    pixels: np.ndarray


class Field(NamedTuple):
    """One image of a tested patient; `views` shows its tissue at every scale of its curves."""

    filename: str
    patient: str
    label: int
    source: str
    views: Callable[[], Iterator[View]]


def write_zoom_curves(folder: str | Path, ds, *, n_images: int = 8) -> Path:
    """Predicts the tested patients at one scale after the other and writes ``zoom.parquet``, whole or not at all.

    The file has a row an image, variant and scale: ``filename``, ``patient``, ``label``, ``source`` (magnification),
    ``variant``, ``mpp``, ``field`` (side in micrometres of the square of tissue that is seen), ``logits``, and, the
    same in all rows of a scale, ``cka`` (`metrics.linear_cka` of the embeddings of its fields and of the same fields
    at the reference) and ``reference`` (this scale is it: the finest of the curve in the range trained on, else the
    finest of all). The range trained on stands in the file's metadata.

    Args:
        folder: a finished cell, or a model's folder with its predictions; the file is written there.
        ds: the table it was tested on. If it is of virtual slides, their tissue is rendered, else photographs are
            downsampled.
        n_images: the most images of a patient that are taken at a magnification, evenly from all.

    Raises:
        OSError: there is no model, or no predictions with it.
        ValueError: the model states no scale; the table is another one; no image is large enough.
    """
    folder = Path(folder)
    model = folder / "model" if (folder / "model").is_dir() else folder
    classifier = Classifier.from_pretrained(model)
    rows, input_mpp = _tested_rows(model, ds, n_images)
    fields = virtual_fields(ds, rows, input_mpp, classifier) or photographed_fields(ds, rows, classifier.size)
    table = zoom_curves(classifier, fields)
    about = {"mpp_range": list(classifier.mpp_range), "size": classifier.size}
    table = table.replace_schema_metadata({"about": json.dumps(about)})
    unfinished = folder / (ZOOM + ".tmp")
    pq.write_table(table, unfinished)
    return unfinished.replace(folder / ZOOM)


def zoom_curves(classifier: Classifier, fields: list[Field]) -> pa.Table:
    """The rows of `write_zoom_curves`, by field; see there."""
    columns, embeddings = defaultdict(list), []
    for field in tqdm(fields, desc="zoom curves", unit="image", disable=None):
        views = list(field.views())
        logits, embedding = _outputs(classifier, [view.pixels for view in views])
        for view, values in zip(views, logits, strict=True):
            for name in ("filename", "patient", "label", "source"):
                columns[name].append(getattr(field, name))
            columns["variant"].append(view.variant)
            columns["mpp"].append(view.mpp)
            columns["field"].append(min(view.pixels.shape[:2]) * view.mpp)
            columns["logits"].append(values.tolist())
        embeddings.append(embedding)
    cka, reference = _similarity(columns, np.concatenate(embeddings), classifier.mpp_range)
    return pa.table(dict(columns) | {"cka": cka, "reference": reference})


def _outputs(classifier: Classifier, views: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Logits and embeddings of views, means over the tiles that cover each."""
    corners = [classifier.corners(view) for view in views]
    size, step = classifier.size, classifier.batch_size
    tiles = [
        view[top : top + size, left : left + size].transpose(2, 0, 1)
        for view, places in zip(views, corners, strict=True)
        for top, left in places
    ]
    outputs = [classifier.run(np.stack(tiles[first : first + step])) for first in range(0, len(tiles), step)]
    counts = np.array([len(places) for places in corners])
    starts = np.cumsum(counts) - counts
    logits, embeddings = (np.concatenate(parts).astype(np.float64) for parts in zip(*outputs, strict=True))
    return tuple(np.add.reduceat(each, starts, axis=0) / counts[:, None] for each in (logits, embeddings))


def _similarity(columns: dict[str, list], embeddings: np.ndarray, mpp_range: tuple) -> tuple[np.ndarray, np.ndarray]:
    """CKA of each scale of each curve with its reference, and where that is, a value a row. The fields are paired."""
    mpp, (low, high) = np.array(columns["mpp"]), mpp_range
    names = np.array([" ".join(name) for name in zip(columns["variant"], columns["source"], strict=True)])
    cka, reference = np.full(len(mpp), np.nan), np.zeros(len(mpp), bool)
    for name in np.unique(names):
        points = np.unique(mpp[names == name])
        trained = points[(points >= low * 0.999) & (points <= high * 1.001)]
        finest = (trained if len(trained) else points)[0]
        rows = {point: np.flatnonzero((names == name) & (mpp == point)) for point in points}
        reference[rows[finest]] = True
        for mine in rows.values():
            if len(mine) >= 4:
                cka[mine] = metrics.linear_cka(embeddings[mine], embeddings[rows[finest]])
    return cka, reference


def _tested_rows(model: Path, ds, n_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the table that the model was tested on and are real photographs; um/px at which it saw each."""
    records = last_epoch(model)
    records = records.filter(pc.is_in(records["part"], pa.array(["test", "test_source"])))
    row_of = {name: row for row, name in enumerate(ds["filename"][:])}
    patients, labels, domains = (ds[name][:] for name in ("patient", "label", domain_column(ds)))
    rescaled = ds["rescaled"][:] if "rescaled" in ds.column_names else [False] * len(ds)
    chosen = defaultdict(list)
    known = (records[name].to_pylist() for name in ("filename", "patient", "label", "mpp"))
    for name, patient, label, mpp in zip(*known, strict=True):
        row = row_of.get(name)
        if row is None or (patients[row], labels[row]) != (patient, label):
            raise ValueError(f"{model} was tested on {name} of {patient}, which the data lack: give the same data")
        if not rescaled[row]:
            chosen[patient, domains[row]].append((row, mpp))
    if not chosen:
        raise ValueError(f"{model} was tested on no image that was photographed at its own magnification")
    few = [found[i] for found in chosen.values() for i in _evenly(len(found), n_images)]
    rows, mpp = (np.array(column) for column in zip(*sorted(few), strict=True))
    return rows, mpp


def _evenly(n: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int)).tolist()


def photographed_fields(ds, rows: np.ndarray, size: int) -> list[Field]:
    """Rows of a table of photographs, to be shown by `downsampled`; the scales are common to a magnification.

    Raises:
        ValueError: the scale of an image is not known; at no magnification do all images hold the network's input of
            `size` pixels at one scale.
    """
    images, native = EncodedImages(ds), np.asarray(ds["mpp"][:], float)
    if np.isnan(native[rows]).any():
        raise ValueError("the scale of some tested images is not known: give the table a column 'mpp'")
    domain = np.array(ds[domain_column(ds)][:])
    fields = []
    for value in np.unique(domain[rows]):
        mine = rows[domain[rows] == value]
        short = []
        for row in mine:
            with open_image(images[row]) as image:
                short.append(min(shown_size(image)))
        low, high = native[mine].max(), (np.array(short) * native[mine]).min() / size
        if high < low:
            continue
        points = np.geomspace(low, high, PHOTOGRAPH_POINTS if high > low * 1.01 else 1).tolist()
        views = [partial(_opened, images, row, native[row], points, size) for row in mine]
        fields += _fields(ds, mine, [domain_name(value.item())] * len(mine), views)
    if not fields:
        raise ValueError(f"at no magnification do all tested images hold the network's input of {size} pixels")
    return fields


def _opened(images: EncodedImages, row: int, native: float, points: list[float], size: int) -> Iterator[View]:
    with open_image(images[row]) as image:
        yield from downsampled(to_rgb(image), native, points, size)


def downsampled(image: Image.Image, native: float, points: list[float], size: int) -> Iterator[View]:
    """A photograph at every one of the scales `points`, at a constant crop and at a constant field of view.

    Args:
        image: RGB.
        native: its um/px.
        points: um/px, ascending, none finer than `native`, the last one so that the short side holds `size` pixels.
        size: side of the network's input in pixels.
    """
    field = size * points[-1]
    for mpp in points:
        shown = np.asarray(rescale(image, mpp, native_mpp=native))
        yield View("crop", mpp, _middle(shown, size))
        yield View("field", mpp, _middle(shown, int(field / mpp + 1e-6)))


def virtual_fields(ds, rows: np.ndarray, input_mpp: np.ndarray, classifier: Classifier) -> list[Field]:
    """Of a table of virtual slides the rows at the finest magnification, to be shown by `rendered`; else none.

    Images at the finest magnification, because their middles lie on epithelium also when the field is small.

    Raises:
        ValueError: the slides were drawn by another version of the generator, so that the tissue would be other.
    """
    path = EncodedImages(ds)[int(rows[0])][0]
    sidecar = next((p / SIDECAR for p in Path(path or "").parents if (p / SIDECAR).is_file()), None)
    if path is None or sidecar is None:
        return []
    truth = json.loads(sidecar.read_text())
    version = truth["parameters"]["generator_version"]
    if version != GENERATOR_VERSION:
        raise ValueError(
            f"{sidecar.parent} was drawn by version {version} of the generator, this is version {GENERATOR_VERSION}, "
            "and the same tissue cannot be drawn again"
        )
    number = {patient["id"]: patient["number"] for patient in truth["patients"]}
    of_image = {image["filename"]: image for image in truth["images"]}
    native, names = np.asarray(ds["mpp"][:], float)[rows], np.array(ds["filename"][:])
    finest = native < native.min() * 1.001
    ratio = float((input_mpp / native)[finest][0])
    low, high = classifier.mpp_range
    points = np.geomspace(low / BEYOND, high * BEYOND, RENDERED_POINTS).tolist()
    views = []
    for seed, row in enumerate(rows[finest]):
        image = of_image[Path(names[row]).name]
        optics = Optics(**{name: image[name] for name in Optics.__dataclass_fields__})
        optics = replace(optics, blur=optics.blur / image["mpp"])
        place = number[ds["patient"][int(row)]], tuple(image["centre"])
        views.append(partial(rendered, *place, optics, points, classifier.size, ratio, seed))
    return _fields(ds, rows[finest], ["virtual"] * finest.sum(), views)


def rendered(
    patient: int,
    centre: tuple[float, float],
    optics: Optics,
    points: list[float],
    size: int,
    ratio: float,
    noise_seed: int = 0,
) -> Iterator[View]:
    """A place of virtual tissue, photographed anew at every one of the scales `points`.

    Args:
        patient, centre: as of `render_field`.
        optics: of the microscope, but the blur in *pixels* of the camera: the finer the objective, the higher its
            aperture.
        points: um/px at the network's input.
        size: side of the network's input in pixels.
        ratio: pixels of the camera to one of the network's input, at least 1; as in training, images are taken finer
            than the network sees them, and downsampled.
        noise_seed: of the camera's noise.
    """
    side = math.ceil(size * ratio)
    for mpp in points:
        camera = mpp / ratio
        through = replace(optics, blur=optics.blur * camera)
        image = Image.fromarray(render_field(patient, camera, centre, (side, side), through, noise_seed))
        yield View("rendered", mpp, _middle(np.asarray(rescale(image, mpp, native_mpp=camera)), size))


def _fields(ds, rows: np.ndarray, sources: list[str], views: list[Callable]) -> list[Field]:
    some = ds.select(rows)
    return [
        Field(*row)
        for row in zip(*(some[name][:] for name in ("filename", "patient", "label")), sources, views, strict=True)
    ]


def _middle(pixels: np.ndarray, side: int) -> np.ndarray:
    top, left = ((n - side) // 2 for n in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]
