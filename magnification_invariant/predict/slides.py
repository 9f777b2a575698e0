"""Whole slides: every tile of tissue is predicted at a scale that the model knows; tables, map and GeoJSON of them.

What a tile is and where tissue is: see `data.slides`. A tile is resampled as every image is (`Classifier.iterate`): its
prediction is that of an image with the same pixels. Memory does not grow with the slide, but for the tiles' table. A
slide's probability is that of the mean of its tiles' logits, as an image's is that of the tiles it is covered by.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tqdm import tqdm

from magnification_invariant import metrics
from magnification_invariant.data.images import printable
from magnification_invariant.data.pixels import ahead
from magnification_invariant.data.scale import check_mpp
from magnification_invariant.data.slides import (
    SLIDE_SUFFIXES,
    Grid,
    Slide,
    find_tissue,
    openslide_library,
    tissue_shares,
)
from magnification_invariant.files import CannotWrite, locked, read_json, whole, write_json
from magnification_invariant.predict.inputs import Item, find_images
from magnification_invariant.predict.tables import SCHEMA, fingerprint, prepare_parts, write_csv
from magnification_invariant.records import POSITIVE, write_table

if TYPE_CHECKING:
    from magnification_invariant.predict.classifier import Classifier

SHARD = 512  # tiles; what a cut run loses at most
MUCH = 0.1  # share of tiles out of scope that is worth a warning: 0.01 are, of what a model knows
COLOURS = ((94, 60, 153), (230, 97, 1))  # of the negative and the positive class, as in the maps of `explain`
FILES = ("tiles.parquet", "tiles.geojson", "heatmap.png", "embeddings.h5")
ROW = ("slide", "mpp", "at", "tiles", "tissue", "probability", "prediction", "out_of_scope", "warning", "error")

_NAMES = ("mpp", "apparent_mpp", "logits", "probability", "prediction", "signature", "in_scope")
_NAMES += ("scope_percentile",)
_PLACE = {"x": pa.int64(), "y": pa.int64(), "width": pa.int64(), "tissue": pa.float64()}
TILES = pa.schema(_PLACE | {name: SCHEMA.field(name).type for name in _NAMES})
_SHARD = TILES.append(pa.field("embedding", pa.list_(pa.float32())))


class _Settings(NamedTuple):
    at: float
    least_tissue: float


def find_slides(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """Slides that paths, folders and patterns name; of a folder by suffix (of DICOM, a file of a slide is named)."""
    return find_images(paths, (SLIDE_SUFFIXES | {".tif", ".tiff"}) - {".dcm"})


def predict_slides(
    classifier: "Classifier",
    paths: Iterable[str | os.PathLike],
    out: str | os.PathLike,
    *,
    mpp: float | None = None,
    at: float | None = None,
    least_tissue: float = 0.5,
    process: int = 0,
    processes: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]] | None:
    """Predicts slides into ``OUT/<name of the slide>/``; ``OUT/slides.csv`` has a row (`ROW`) for each slide in `out`.

    A slide's folder holds ``tiles.parquet`` (`TILES`; x, y and width in level-0 pixels), ``tiles.geojson`` for QuPath,
    ``heatmap.png``, ``slide.json`` (its row) and, where h5py is installed, ``embeddings.h5`` (``features`` and
    ``coords``, as TRIDENT names them). ``out_of_scope`` is a share of tiles. A run that was cut goes on after the last
    `SHARD` of tiles that is there; slides that are finished with the same model and settings are skipped. What is wrong
    with a slide is its ``error``, and then its folder holds no tiles, not even of an earlier run.

    Args:
        paths: of slides.
        out: a folder.
        mpp: um/px of all slides' finest level; by default what they state.
        at: um/px at the network's input; by default the geometric middle of the model's `base_range`. Never finer than
            the slide.
        least_tissue: share of tissue that a tile must have.
        process, processes: which of how many this is; each takes its share of the slides.
        wait: returns when all processes have called it.

    Returns:
        The rows of `paths`, on process 0; None on the others.

    Raises:
        ModuleNotFoundError: OpenSlide is not installed.
        ValueError: a scale or share that cannot be; two slides of one name; a model that knows no scale, without `at`.
        Busy: another process writes `out`.
        CannotWrite: a file cannot be written; the shards are kept.
    """
    openslide_library()  # or it is missed here, and not in the middle
    out = Path(out)
    folders = _folders(out, paths)
    mpp = None if mpp is None else check_mpp(mpp)
    settings = _Settings(check_mpp(default_scale(classifier) if at is None else at), least_tissue)
    if not 0 <= least_tissue <= 1:
        raise ValueError(f"the least share of tissue must lie in [0, 1], not {least_tissue:g}")
    with locked(out) if process == 0 else nullcontext():
        wait()
        for folder, path in list(folders.items())[process::processes]:
            _predict_or_say(classifier, path, folder, mpp, settings)
        wait()
        if process:
            return None
        _write_table(out)
    return [_row(folder / "slide.json") for folder in folders]


def _row(path: Path) -> dict[str, Any]:
    row = read_json(path)
    return {name: row[name] for name in ROW}


def _write_table(out: Path) -> None:
    """``slides.csv``: a row for every slide in the folder, whichever command predicted it."""
    with whole(out / "slides.csv") as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        write_csv(file, ROW, map(_row, sorted(out.glob("*/slide.json"))))


def _predict_or_say(classifier: "Classifier", path: Path, folder: Path, mpp: float | None, settings: _Settings) -> None:
    """One slide, unless it is finished; what is wrong with it is its row, and no files of an earlier run stay."""
    try:
        _predict(classifier, path, folder, mpp, settings)
    except CannotWrite:
        raise
    except (OSError, ValueError, openslide_library().OpenSlideError) as error:
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        row = dict.fromkeys(ROW) | {"slide": printable(path), "error": str(error) or type(error).__name__}
        write_json(folder / "slide.json", row)


def _folders(out: Path, paths: Iterable[str | os.PathLike]) -> dict[Path, Path]:
    """The path of the slide that each folder is for."""
    slides = list(dict.fromkeys(map(Path, paths)))
    folders = {out / printable(path.stem): path for path in slides}
    if len(folders) < len(slides):
        twice = next(path for path in slides if folders[out / printable(path.stem)] != path)
        raise ValueError(f"two slides are called {printable(twice.stem)}: predict them into different folders")
    return folders


def default_scale(classifier: "Classifier") -> float:
    """Um/px at which tiles are shown where none is asked for: the geometric middle of the model's `base_range`.

    Raises:
        ValueError: The model knows no scale.
    """
    if not classifier.base_range:
        raise ValueError("the model knows no scale: say at how many micrometres per pixel it is shown tiles (at)")
    return math.sqrt(classifier.base_range[0] * classifier.base_range[1])


def _predict(classifier: "Classifier", path: Path, folder: Path, mpp: float | None, settings: _Settings) -> None:
    """One slide, unless it is finished; ``slide.json`` is written last."""
    digest = fingerprint(classifier, [Item(printable(path), path, mpp)], [*settings, classifier.batch_size, SHARD])
    done = folder / "slide.json"
    if done.is_file() and read_json(done).get("fingerprint") == digest:
        return
    with Slide(path, mpp) as slide:
        grid = slide.grid(settings.at, classifier.size)
        picture, picture_mpp = slide.picture()
        mask = find_tissue(np.asarray(picture), picture_mpp)
        shares = tissue_shares(mask, grid, slide.size)
        places = np.argwhere(shares >= settings.least_tissue).tolist()
        if not places:
            raise ValueError(
                f"no tissue: {mask.mean():.1%} of the slide look like it, and of no tile (of {shares.size}) a share of "
                f"{settings.least_tissue:g}"
            )
        parts = folder / "parts"
        prepare_parts(parts, digest)
        shards = [parts / f"{first // SHARD:06d}.parquet" for first in range(0, len(places), SHARD)]
        with tqdm(total=len(places), desc=path.name, unit="tile", disable=None) as bar:
            for k, shard in enumerate(shards):
                some = places[k * SHARD : (k + 1) * SHARD]
                if shard.exists():
                    bar.update(len(some))
                else:
                    rows = _predict_tiles(classifier, slide, grid, some, shares, bar)
                    write_table(pa.Table.from_pylist(rows, _SHARD), shard)
        row = _write(classifier, slide, grid, shards, folder, picture)
    row |= {"slide": printable(path), "mpp": slide.mpp, "at": grid.mpp, "tissue": float(mask.mean()), "error": None}
    write_json(done, {name: row[name] for name in ROW} | {"fingerprint": digest})
    shutil.rmtree(parts)


def _predict_tiles(
    classifier: "Classifier", slide: Slide, grid: Grid, places: list[list[int]], shares: np.ndarray, bar: tqdm
) -> list[dict[str, Any]]:
    """Rows of `_SHARD` for squares (row, column); a few are read ahead by threads, no more are held."""

    def read(place: list[int]) -> Item:
        image = slide.read(grid.level, grid.place(*place), (grid.side, grid.side))
        return Item(str(place), image, slide.mpp * grid.step)

    rows, workers = [], max(2, torch.get_num_threads())
    with ThreadPoolExecutor(workers) as pool:
        items = ahead(pool, read, places, 2 * workers)
        for place, predicted in zip(places, classifier.iterate(items, view=grid.mpp), strict=True):
            if predicted["error"]:
                raise ValueError(predicted["error"])
            x, y = grid.place(*place)
            row = {"x": x, "y": y, "width": round(grid.side * grid.step), "tissue": float(shares[tuple(place)])}
            rows.append(row | {name: predicted[name] for name in (*_NAMES, "embedding")})
            bar.update()
    return rows


def _write(
    classifier: "Classifier", slide: Slide, grid: Grid, shards: list[Path], folder: Path, picture: Image.Image
) -> dict[str, Any]:
    """All files but the last; returns what is known of the slide from its tiles."""
    with whole(folder / "tiles.parquet") as unfinished, pq.ParquetWriter(unfinished, TILES) as writer:
        for shard in shards:
            writer.write_table(pq.read_table(shard, columns=TILES.names))
    tiles = pq.read_table(
        folder / "tiles.parquet", columns=["x", "y", "width", "apparent_mpp", "in_scope", *_NAMES[2:5]]
    )
    if find_spec("h5py"):  # an extra: "wsi"
        _write_embeddings(classifier, slide, grid, shards, folder)
    _write_geojson(classifier, tiles, folder / "tiles.geojson")
    _write_heatmap(classifier, tiles, slide.size, picture, folder / "heatmap.png")
    logits = np.array(tiles["logits"].to_pylist()).mean(0)
    apparent = [each for each in tiles["apparent_mpp"].to_pylist() if each]
    looks = float(np.median(apparent)) / grid.step if apparent else None  # of the finest level
    notes = [*slide.notes, *classifier.doubts({"apparent_mpp": looks, "filled": 0}, slide.mpp)]
    notes += classifier.doubts({"apparent_mpp": None, "filled": 0}, grid.mpp)
    known = [each for each in tiles["in_scope"].to_pylist() if each is not None]
    out_of_scope = known.count(False) / len(known) if known else None
    if out_of_scope is not None and out_of_scope > MUCH:
        notes.append(f"{out_of_scope:.0%} of its tiles are out of the model's scope")
    return {
        "tiles": len(tiles),
        "out_of_scope": out_of_scope,
        "probability": float(metrics.apply_temperature(logits[None], classifier.temperature)[0, POSITIVE]),
        "prediction": classifier.labels[int(logits.argmax())],
        "warning": "; ".join(dict.fromkeys(notes)) or None,
    }


def _write_embeddings(classifier: "Classifier", slide: Slide, grid: Grid, shards: list[Path], folder: Path) -> None:
    import h5py

    tables = (pq.read_table(shard, columns=["x", "y", "embedding"]) for shard in shards)
    n = sum(pq.read_metadata(shard).num_rows for shard in shards)
    with whole(folder / "embeddings.h5") as unfinished, h5py.File(unfinished, "w") as file:
        first = 0
        for table in tables:
            part = np.array(table["embedding"].to_pylist(), np.float32)
            if not first:
                file.create_dataset("features", (n, part.shape[1]), np.float32)
                file.create_dataset("coords", (n, 2), np.int64)
            file["features"][first : first + len(part)] = part
            file["coords"][first : first + len(part)] = np.stack([table["x"], table["y"]], 1)
            first += len(part)
        about = {"patch_size": classifier.size, "patch_size_level0": round(grid.side * grid.step), "overlap": 0}
        about |= {"level0_width": slide.size[0], "level0_height": slide.size[1], "name": folder.name}
        file["coords"].attrs.update(about | {"level0_mpp": slide.mpp, "target_mpp": grid.mpp})
        file["features"].attrs.update({"name": folder.name, "encoder": classifier.config["name"]})


def _write_geojson(classifier: "Classifier", tiles: pa.Table, path: Path) -> None:
    """One tile a line, in level-0 pixels."""
    columns = (tiles[name].to_pylist() for name in ("x", "y", "width", "probability", "prediction"))
    with whole(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for i, (x, y, width, probability, name) in enumerate(zip(*columns, strict=True)):
            corners = [(x, y), (x + width, y), (x + width, y + width), (x, y + width), (x, y)]
            colour = COLOURS[classifier.labels.index(name) == POSITIVE]
            properties = {"objectType": "tile", "classification": {"name": name, "color": colour}}
            properties["measurements"] = {"probability": probability}
            geometry = {"type": "Polygon", "coordinates": [corners]}
            feature = {"type": "Feature", "geometry": geometry, "properties": properties}
            file.write(("," if i else "") + "\n" + json.dumps(feature))
        file.write("\n]}\n")


def _write_heatmap(
    classifier: "Classifier", tiles: pa.Table, size: tuple[int, int], picture: Image.Image, path: Path
) -> None:
    """The probability of every tile in colour, over the slide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x, y, width, probability = (tiles[name].to_numpy() for name in ("x", "y", "width", "probability"))
    columns, rows = (np.rint(place / width).astype(int) for place in (x, y))
    heat = np.full((rows.max() + 1, columns.max() + 1), np.nan)
    heat[rows, columns] = probability
    figure = Figure(figsize=(10, max(2.0, 9 * size[1] / size[0])), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.imshow(picture, extent=(0, size[0], size[1], 0))
    extent = (0, heat.shape[1] * width[0], heat.shape[0] * width[0], 0)
    shown = axis.imshow(heat, cmap="PuOr_r", vmin=0, vmax=1, alpha=0.6, extent=extent, interpolation="nearest")
    axis.set(xlim=(0, size[0]), ylim=(size[1], 0), xticks=[], yticks=[])
    figure.colorbar(shown, ax=axis, label=f"P({classifier.labels[POSITIVE]})", shrink=0.8)
    with whole(path) as unfinished:
        figure.savefig(unfinished, dpi=200, format="png")
