"""Zoom curves: what a trained network says of the same tissue at one scale after the other.

A scale is micrometres per pixel at the network's input. There are two kinds of curve, the `variant` of a row:

- ``rendered``: virtual slides. The tissue around the middle of an image of the finest magnification is photographed
  anew at every scale and fills the network's input, so the field grows with the scale.
- ``field``: photographs. The whole image, as `data.views.show` shows it, in fewer and fewer tiles.

A photograph is never enlarged: its curves start at the scale it was taken at and end where its short side just holds
the network's input. Every source magnification has curves of its own, because it has fields and optics of its own.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from tqdm import tqdm

from magnification_invariant import metrics
from magnification_invariant.data.images import EncodedImages, open_image, shown_size, to_rgb
from magnification_invariant.data.splits import domain_column, domain_name
from magnification_invariant.data.views import field_mpp, mean_over_tiles, show, tiles
from magnification_invariant.files import read_json
from magnification_invariant.lomo.cell import table_digest
from magnification_invariant.predict.classifier import Classifier
from magnification_invariant.records import ZOOM, Run, write_table
from magnification_invariant.virtual_slides import GENERATOR_VERSION, SIDECAR, Optics, render_field

RENDERED_POINTS, PHOTOGRAPH_POINTS = 9, 5
BEYOND = 2.0  # how far the rendered curve goes beyond what was trained on, as a factor at either end


class Field(NamedTuple):
    """One image of a tested patient; `views` shows its tissue at every scale of its curve."""

    filename: str
    patient: str
    label: int
    source: str
    variant: str
    views: Callable[[], Iterator[tuple[float, np.ndarray]]]  # um/px, pixels (height, width, 3)


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
    run = Run(folder)
    classifier = Classifier.from_pretrained(run.model)
    if not classifier.mpp_range:
        raise ValueError(f"{run.model} states no scale: it was trained on images of unknown micrometres per pixel")
    recorded = run.config["cell"]
    if recorded.get("data", table_digest(ds)) != table_digest(ds):
        named = f": {recorded['data_source']}" if recorded.get("data_source") else ""
        raise ValueError(f"{run.folder} was made from other data{named}; give the same")
    rows, input_mpp = _tested_rows(run, ds, n_images)
    fields = virtual_fields(ds, rows, input_mpp, classifier) or photographed_fields(ds, rows, classifier.size)
    table = zoom_curves(classifier, fields)
    about = {"mpp_range": list(classifier.mpp_range), "size": classifier.size}
    write_table(table.replace_schema_metadata({"about": json.dumps(about)}), run.folder / ZOOM)
    return run.folder / ZOOM


def zoom_curves(classifier: Classifier, fields: list[Field]) -> pa.Table:
    """The rows of `write_zoom_curves`, by field; see there."""
    columns, embeddings = defaultdict(list), []

    def shown() -> Iterator[np.ndarray]:
        for field in tqdm(fields, desc="zoom curves", unit="image", disable=None):
            for mpp, pixels in field.views():
                for name in ("filename", "patient", "label", "source", "variant"):
                    columns[name].append(getattr(field, name))
                columns["mpp"].append(mpp)
                columns["field"].append(min(pixels.shape[:2]) * mpp)
                yield tiles(pixels, classifier.size)

    for logits, embedding, *_ in mean_over_tiles(classifier.run, shown(), classifier.batch_size):
        columns["logits"].append(logits.tolist())
        embeddings.append(embedding)
    cka, reference = _similarity(columns, np.stack(embeddings), classifier.mpp_range)
    return pa.table(dict(columns) | {"cka": cka, "reference": reference})


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
        for point in points:
            if len(rows[point]) >= 4:
                cka[rows[point]] = metrics.linear_cka(embeddings[rows[point]], embeddings[rows[finest]])
    return cka, reference


def _tested_rows(run: Run, ds, n_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the table that the model was tested on and are real photographs; um/px at which it saw each."""
    records = run.records.filter(pc.is_in(run.records["part"], pa.array(["test", "test_source"])))
    row_of = {name: row for row, name in enumerate(ds["filename"][:])}
    patients, labels, domains = (ds[name][:] for name in ("patient", "label", domain_column(ds)))
    rescaled = ds["rescaled"][:] if "rescaled" in ds.column_names else [False] * len(ds)
    chosen = defaultdict(list)
    known = (records[name].to_pylist() for name in ("filename", "patient", "label", "mpp"))
    for name, patient, label, mpp in zip(*known, strict=True):
        row = row_of.get(name)
        if row is None or (patients[row], labels[row]) != (patient, label):
            raise ValueError(f"{run.folder} was tested on {name} of {patient}, which the data lack: give the same data")
        if not rescaled[row]:
            chosen[patient, domains[row]].append((row, mpp))
    if not chosen:
        raise ValueError(f"{run.folder} was tested on no image that was photographed at its own magnification")
    few = [found[i] for found in chosen.values() for i in _evenly(len(found), n_images)]
    rows, mpp = (np.array(column) for column in zip(*sorted(few), strict=True))
    return rows, mpp


def _evenly(n: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int)).tolist()


def photographed_fields(ds, rows: np.ndarray, size: int) -> list[Field]:
    """Rows of a table of photographs; the scales are common to a magnification.

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
        of_domain, short = rows[domain[rows] == value], []
        for row in of_domain:
            with open_image(images[row]) as image:
                short.append(min(shown_size(image)))
        low, high = native[of_domain].max(), field_mpp(native[of_domain], np.array(short), size).min()
        if high < low:
            continue
        points = np.geomspace(low, high, PHOTOGRAPH_POINTS if high > low * 1.01 else 1).tolist()
        views = [partial(_photographed, images, row, native[row], points, size) for row in of_domain]
        fields += _fields(ds, of_domain, domain_name(value.item()), "field", views)
    if not fields:
        raise ValueError(f"at no magnification do all tested images hold the network's input of {size} pixels")
    return fields


def _photographed(
    images: EncodedImages, row: int, native: float, points: list[float], size: int
) -> Iterator[tuple[float, np.ndarray]]:
    with open_image(images[row]) as image:
        image = to_rgb(image)
    for mpp in points:
        yield mpp, show(image, native, mpp, size).pixels


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
    truth = read_json(sidecar)
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
    return _fields(ds, rows[finest], "virtual", "rendered", views)


def rendered(
    patient: int,
    centre: tuple[float, float],
    optics: Optics,
    points: list[float],
    size: int,
    ratio: float,
    noise_seed: int = 0,
) -> Iterator[tuple[float, np.ndarray]]:
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
    side = round(size * ratio)
    for mpp in points:
        camera = mpp / ratio
        through = replace(optics, blur=optics.blur * camera)
        image = Image.fromarray(render_field(patient, camera, centre, (side, side), through, noise_seed))
        yield mpp, show(image, camera, mpp, size).pixels


def _fields(ds, rows: np.ndarray, source: str, variant: str, views: list[Callable]) -> list[Field]:
    keys = zip(*(ds.select(rows)[name][:] for name in ("filename", "patient", "label")), strict=True)
    return [Field(*key, source, variant, each) for key, each in zip(keys, views, strict=True)]
