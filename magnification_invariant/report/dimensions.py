"""What the dimensions of a signature respond to: images, places in them, magnification, nuclei, and known truth."""

import io
import json
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from tqdm import tqdm

from magnification_invariant.data.augment import centre_view, view_height
from magnification_invariant.data.images import EncodedImages, open_image, to_rgb
from magnification_invariant.data.pixels import PixelCache
from magnification_invariant.data.scale import rescale
from magnification_invariant.data.splits import domain_name
from magnification_invariant.engine import normalise
from magnification_invariant.report.page import Picture, Section, Table
from magnification_invariant.report.runs import is_cell
from magnification_invariant.signatures import SignatureProjector, read_embeddings
from magnification_invariant.virtual_slides import SIDECAR

PARTS = ("val", "test", "test_source")  # images that did not train the network
MORPHOLOGY = ("nuclei per mm2", "nuclear area", "eccentricity", "haematoxylin")
NUCLEUS = (8.0, 400.0)  # areas in square micrometres that are taken for a nucleus


def dimension_sections(folder: str | Path, ds, *, n_dimensions: int = 8, n_images: int = 5) -> list[Section]:
    """The dimensions of largest weight in the signature of a finished cell, as sections of a report.

    Args:
        folder: Of the cell, with its model, its signature and its embeddings.
        ds: The table it was trained on.
        n_dimensions: To show.
        n_images: Of each dimension, from different patients.

    Raises:
        FileNotFoundError: The cell has no signature.
        ValueError: It is no finished cell, its signature is empty, or the table is another one or without scales.
        OSError: scikit-image is not installed.
    """
    folder = Path(folder)
    if not is_cell(folder):
        raise ValueError(f"{folder} is no finished cell (config.json and results.json)")
    projector = SignatureProjector.from_pretrained(folder / "model")
    embeddings, keys = zip(*(read_embeddings(folder / "embeddings.safetensors", part) for part in PARTS), strict=True)
    keys = {name: np.concatenate([of[name] for of in keys]) for name in keys[0]}
    rows = keys["row"]
    if rows.max(initial=-1) >= len(ds) or ds.select(rows)["filename"][:] != keys["filename"].tolist():
        raise ValueError(f"{folder} was made from another table than this one")
    if not len(projector.indices):
        raise ValueError(f"the signature of {folder} is empty: no dimension has a weight")
    mpp = np.asarray(ds["mpp"], float)
    if np.isnan(mpp[rows]).any():
        raise ValueError("nuclei are measured in micrometres, and the table does not know the scale of all images")
    strength = np.abs(projector.weight).max(axis=0)
    order = np.argsort(-strength, kind="stable")[:n_dimensions]
    values = projector.transform(np.concatenate(embeddings))[:, order]

    images = EncodedImages(ds)
    measured = measure(images, rows, mpp)
    patients, patient = np.unique(keys["patient"], return_inverse=True)
    columns = {}
    if keys["domain"].dtype.kind == "i":
        columns["magnification"] = spearman(values, np.log(keys["domain"]))
    within = {name: _within(values, measured[:, i], keys["domain"]) for i, name in enumerate(MORPHOLOGY)}
    chance = _chance(values, measured, keys["domain"], patient)
    table = Table(
        ["dimension", "towards", *columns, *MORPHOLOGY],
        [
            [str(projector.indices[d]), _towards(projector, d), *(f"{c[i]:+.2f}" for c in (columns | within).values())]
            for i, d in enumerate(order)
        ],
    )
    text = (
        f"{len(order)} of {len(projector.indices)} dimensions, those of largest weight, on {len(rows)} images of "
        f"{len(patients)} patients that did not train the network. Rank correlations; those with morphology are taken "
        "within a magnification and averaged, since both follow magnification. Nuclei were measured with every image "
        f"at {mpp[rows].max():.3g} micrometres per pixel, the coarsest of all, by a threshold on haematoxylin: a "
        "measurement, not the truth. With patients swapped, the largest of these correlations stays below "
        f"{chance:.2f} in 95 of 100."
    )
    sections = [("Magnification and morphology", [text, table])]
    truths = _truths(images, keys)
    if truths:
        sections.append(
            ("The generator's own parameters", _truth_blocks(truths, values, measured, keys, projector, order))
        )
    pictures = _pictures(folder / "model", ds, rows, values, patient, projector, order, n_images)
    captions = [
        f"Dimension {projector.indices[d]} ({_towards(projector, d)}): its largest values, one image a patient; below, "
        "where they come from (red)."
        for d in order
    ]
    shown = [
        Picture(f"dimension-{projector.indices[d]}", caption, png)
        for d, caption, png in zip(order, captions, pictures, strict=True)
    ]
    return [*sections, ("Images", shown)]


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation of each column of `a` (n, k) with `b` (n,); rows where `b` is NaN are left out, NaN if few."""
    from scipy.stats import rankdata

    known = np.isfinite(b)
    a, b = a[known], b[known]
    if len(b) < 3:
        return np.full(a.shape[1], np.nan)
    a, b = rankdata(a, axis=0), rankdata(b)
    a, b = a - a.mean(0), b - b.mean()
    scale = np.sqrt((a**2).sum(0) * (b**2).sum())
    return np.divide(a.T @ b, scale, out=np.full(a.shape[1], np.nan), where=scale > 0)


def _within(values: np.ndarray, other: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """Rank correlation within each domain, averaged by its number of images: (k,)."""
    found = [(np.sum(domain == m), spearman(values[domain == m], other[domain == m])) for m in np.unique(domain)]
    weight = np.array([n * np.isfinite(r) for n, r in found])
    return np.nansum([n * r for n, r in found], axis=0) / np.maximum(weight.sum(0), 1)


def _chance(
    values: np.ndarray, measured: np.ndarray, domain: np.ndarray, patient: np.ndarray, draws: int = 100
) -> float:
    """95th percentile of the largest correlation with morphology when whole patients are swapped."""
    rng, largest = np.random.default_rng(0), []
    place = {key: np.flatnonzero(patient == key) for key in np.unique(patient)}
    names = np.array(list(place))
    for _ in range(draws):
        swapped = np.empty(len(patient), int)
        for who, whose in zip(names, rng.permutation(names), strict=True):
            for m in np.unique(domain[place[who]]):
                of = place[whose][domain[place[whose]] == m]
                of = of if len(of) else place[whose]
                swapped[place[who][domain[place[who]] == m]] = rng.choice(of, np.sum(domain[place[who]] == m))
        largest.append(max(np.nanmax(np.abs(_within(values, measured[swapped, i], domain))) for i in range(4)))
    return float(np.quantile(largest, 0.95))


# ------------------------------------------------------------------------------------------------------- morphology


def measure(images: EncodedImages, rows: np.ndarray, mpp: np.ndarray) -> np.ndarray:
    """`morphology` of images, all resampled to the coarsest of their scales: (len(rows), 4)."""
    at = float(np.max(mpp[rows]))
    measured = []
    for row in tqdm(rows, desc="measuring nuclei", unit="image", disable=None):
        image = rescale(to_rgb(open_image(images[row])), at, native_mpp=float(mpp[row]))
        measured.append(morphology(image, at))
    return np.array(measured)


def morphology(image: Image.Image, mpp: float) -> tuple[float, float, float, float]:
    """Nuclei of an H&E image, found by a threshold on haematoxylin and split by a watershed.

    Args:
        image: RGB.
        mpp: Its micrometres per pixel.

    Returns:
        What `MORPHOLOGY` names: nuclei per square millimetre, mean area in square micrometres and mean eccentricity
        (NaN without a nucleus), and the mean optical density of haematoxylin (Ruifrok and Johnston's, in scikit-image).

    Raises:
        OSError: scikit-image is not installed; says how to get it.
    """
    try:
        from skimage.color import rgb2hed
        from skimage.feature import peak_local_max
        from skimage.filters import gaussian, threshold_otsu
        from skimage.measure import regionprops_table
        from skimage.segmentation import watershed
    except ModuleNotFoundError as error:
        raise OSError(
            "measuring nuclei needs scikit-image: pip install 'magnification-invariant[morphology]'"
        ) from error
    from scipy.ndimage import distance_transform_edt

    density = rgb2hed(np.asarray(image))[..., 0]
    smooth = gaussian(density, 0.5 / mpp)
    mask = smooth > threshold_otsu(smooth) if np.ptp(smooth) > 1e-6 else np.zeros(smooth.shape, bool)
    depth = gaussian(distance_transform_edt(mask), 0.5 / mpp)
    peaks = peak_local_max(depth, min_distance=max(1, round(2 / mpp)), labels=mask.astype(int))
    seeds = np.zeros(mask.shape, int)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    found = regionprops_table(watershed(-depth, seeds, mask=mask), properties=("area", "eccentricity"))
    area = found["area"] * mpp**2
    nucleus = (area >= NUCLEUS[0]) & (area <= NUCLEUS[1])
    per_mm2 = nucleus.sum() / (mask.size * mpp**2 / 1e6)
    if not nucleus.any():
        return 0.0, np.nan, np.nan, float(density.mean())
    return (
        float(per_mm2),
        float(area[nucleus].mean()),
        float(found["eccentricity"][nucleus].mean()),
        float(density.mean()),
    )


# ------------------------------------------------------------------------------------------------------------ truth


def _truths(images: EncodedImages, keys: dict[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """What the sidecar of virtual slides says of each image's patient, by name: (n,) each; None of other images."""
    path = images[0][0]
    sidecar = next((p / SIDECAR for p in Path(path or "").parents if (p / SIDECAR).is_file()), None)
    if path is None or sidecar is None:
        return None
    patients = {patient["id"]: patient for patient in json.loads(sidecar.read_text())["patients"]}
    of = [patients[patient] for patient in keys["patient"]]
    names = [name for name, value in of[0].items() if isinstance(value, int | float) and name != "number"]
    return {name: np.array([patient[name] for patient in of], float) for name in names}


def _truth_blocks(truths, values, measured, keys, projector, order) -> list:
    _, first, patient = np.unique(keys["patient"], return_index=True, return_inverse=True)
    count = np.bincount(patient)

    def by_patient(x: np.ndarray) -> np.ndarray:
        """Means of patients, each magnification at its own mean: (patients, k)."""
        x = np.where(np.isfinite(x), x, np.nanmean(x, axis=0))
        for m in np.unique(keys["domain"]):
            x[keys["domain"] == m] -= x[keys["domain"] == m].mean(0)
        return np.stack([np.bincount(patient, column) / count for column in x.T], axis=1)

    names, truth = list(truths), np.stack([column[first] for column in truths.values()], axis=1)
    of_dimension, of_measure = by_patient(values), by_patient(measured.copy())
    rng = np.random.default_rng(0)
    largest = [
        np.nanmax(np.abs([spearman(of_dimension[rng.permutation(len(first))], column) for column in truth.T]))
        for _ in range(100)
    ]
    text = (
        f"These are virtual slides, so what made each patient's tissue is known. Rank correlations of {len(first)} "
        f"patients' means; dealt at random, the largest of all {len(order)} x {len(names)} stays below "
        f"{np.quantile(largest, 0.95):.2f} in 95 of 100."
    )

    def strongest(r: np.ndarray) -> list[str]:
        return [f"{names[i]} {r[i]:+.2f}" for i in np.argsort(-np.nan_to_num(np.abs(r)))[:4]]

    def rows(columns: np.ndarray) -> np.ndarray:
        return np.stack([spearman(columns, column) for column in truth.T], axis=1)

    head = ["strongest", "second", "third", "fourth"]
    dimensions = [
        [str(projector.indices[d]), _towards(projector, d), *strongest(r)]
        for d, r in zip(order, rows(of_dimension), strict=True)
    ]
    check = [[name, *strongest(r)] for name, r in zip(MORPHOLOGY, rows(of_measure), strict=True)]
    return [
        text,
        Table(["dimension", "towards", *head], dimensions),
        "The same of the measured morphology, which shows how far the measurement above can be trusted:",
        Table(["measured", *head], check),
    ]


# ----------------------------------------------------------------------------------------------------------- images


def unit_of(index: int, kind: str, channels: list[int]) -> tuple[int, int]:
    """Stage (0 to 3) and channel whose map is pooled to a dimension of an embedding, see `models.embed`."""
    if kind == "penultimate":
        return len(channels) - 1, index
    for stage, width in enumerate(channels):
        if index < 2 * width:
            return stage, index % width
        index -= 2 * width
    raise ValueError(f"the embedding of stages {channels} has no such dimension")


def _pictures(folder, ds, rows, values, patient, projector, order, n_images) -> list[bytes]:
    """A PNG a dimension: its top images above, with their activation below."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    projector.as_module(model)  # raises where the two do not belong together
    size = json.loads((folder / "config.json").read_text())["pretrained_cfg"]["input_size"][-1]
    channels = [stage["num_chs"] for stage in model.feature_info[1:]]
    top = []
    for column in values.T:
        ranked = np.argsort(-column, kind="stable")
        _, best = np.unique(patient[ranked], return_index=True)  # the best image of each patient
        top.append(ranked[np.sort(best)[:n_images]])
    used = np.unique(np.concatenate(top))
    chosen = ds.select(rows[used])
    with tempfile.TemporaryDirectory() as place:
        cache = PixelCache(chosen, view_height(size), folder=place)
        shown = centre_view(cache.take(torch.arange(len(used)), "cpu"), size)
    with torch.inference_mode():
        stages = model.forward_intermediates(normalise(shown), indices=[1, 2, 3, 4], intermediates_only=True)
    names = [domain_name(d) for d in chosen["magnification"]] if "magnification" in ds.column_names else None
    pictures = []
    for d, images in zip(order, top, strict=True):
        stage, channel = unit_of(int(projector.indices[d]), projector.embedding, channels)
        at = torch.from_numpy(np.searchsorted(used, images))
        pictures.append(_sheet(shown[at], stages[stage][at, channel], names and [names[i] for i in at]))
    return pictures


def _sheet(images: torch.Tensor, maps: torch.Tensor, names: list[str] | None, side: int = 160) -> bytes:
    """Images (b, 3, s, s) in [0, 1] in a row, below them the same in grey with maps (b, h, w) in red, as PNG."""
    from PIL import ImageDraw

    sheet = Image.new("RGB", (len(images) * (side + 4), 2 * (side + 4)), "white")
    top = float(maps.max())
    for i, (image, heat) in enumerate(zip(images, maps, strict=True)):
        pixels = (image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        patch = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        share = np.clip(heat.numpy() / top, 0, 1) if top > 0 else np.zeros(heat.shape)
        share = Image.fromarray((share * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        red = Image.composite(Image.new("RGB", (side, side), (215, 25, 28)), patch.convert("L").convert("RGB"), share)
        if names:
            ImageDraw.Draw(patch).text((4, 2), names[i], fill="black")
        sheet.paste(patch, (i * (side + 4), 0))
        sheet.paste(red, (i * (side + 4), side + 4))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _towards(projector: SignatureProjector, d: int) -> str:
    """The class that a larger value speaks for."""
    weight = projector.weight[:, d]
    if len(weight) > 1:
        return projector.class_names[int(np.argmax(weight))]
    return projector.class_names[int(weight[0] > 0)]
