"""Embeddings: how they are made of images, by the one road, and what a cell that is run on them must be like."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import timm
import torch
from tqdm import tqdm

from magnification_invariant.data.pixels import ViewCache
from magnification_invariant.data.vectors import embeddings_record, write_embeddings
from magnification_invariant.data.views import mean_over_tiles
from magnification_invariant.engine import Network
from magnification_invariant.files import locked, read_json, remove_unfinished, whole, write_json
from magnification_invariant.lomo.cell import Cell, table_digest
from magnification_invariant.models import VECTOR_MODELS
from magnification_invariant.signatures import weights_digest
from magnification_invariant.tasks import get_task
from magnification_invariant.tasks.floors import FLOORS, OF_VECTORS

# Of `FitConfig`, defaults where the input are vectors.
VECTOR_FIT = {"epochs": 10, "batch_size": 256, "learning_rate": 3e-3}
_ROWS = 256  # images a part that is kept when the making is cut


def check_cell(cell: Cell) -> None:
    """Whether a cell can be run on vectors.

    Raises:
        ValueError: Its method, model or a setting is of images; says which.
    """
    if cell.method in FLOORS:
        if cell.method not in OF_VECTORS:
            raise ValueError(f"{cell.method} looks at images, and there are embeddings")
        return
    if get_task(cell.method).of_pixels:
        raise ValueError(f"{cell.method} works on images, and there are embeddings: leave it out")
    if cell.model not in VECTOR_MODELS:
        raise ValueError(f"of embeddings the model is {' or '.join(VECTOR_MODELS)}, not {cell.model}")
    if cell.fit.zoom > 1 or cell.embedding != "penultimate":
        raise ValueError("embeddings have no zoom, and no pyramid of stages: leave both at their defaults")
    if cell.fit.compile:
        raise ValueError("compiling pays on images alone: leave it out for embeddings")


def load_network(name: str, size: int | None = None) -> tuple[torch.nn.Module, int]:
    """A timm network with its weights, in eval mode, and the side of its square input in pixels.

    Args:
        name: A timm name, ``hf-hub:...`` or ``local-dir:...``; without weights in timm it is random.
        size: Of the input; by default the network's own.
    """
    torch.manual_seed(0)
    known = ":" in name or timm.models.is_model_pretrained(name)
    model = timm.create_model(name, pretrained=known).eval()
    if not known:
        warnings.warn(f"timm has no weights for {name}: these are embeddings of a random network", stacklevel=2)
    if size and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(size, size))
    return model, size or timm.data.resolve_model_data_config(model)["input_size"][-1]


def embed_images(ds, model: torch.nn.Module, size: int, out: Path, *, batch_size: int = 64, **record: Any) -> None:
    """Write the embeddings of all images of a table: pooled features, means over the tiles of the protocol view.

    What is done is kept beside `out` until it is whole: called again with the same arguments it goes on there, and does
    nothing where `out` holds them already. Memory holds `batch_size` tiles and `_ROWS` embeddings.

    Args:
        ds: A table of images, as of `load_breakhis` or `load_table`.
        model: A timm network, on the device that it shall run on; its config states the normalisation.
        size: Side of its square input in pixels.
        out: A .parquet file, see `data.vectors.write_embeddings`.
        batch_size: Tiles at a time.
        **record: Further facts for the file's metadata.

    Raises:
        ValueError: `out` is no .parquet file.
        Busy: Another process makes them.
    """
    out = Path(out)
    if out.suffix != ".parquet":
        raise ValueError(f"{out}: embeddings are written as Parquet; name a file that ends in .parquet")
    parts = out.with_name(f"{out.name}.parts")
    views = ViewCache(ds, size)
    record |= {"weights_sha256": weights_digest(model), "image_size": size, "pixels": views.folder.name}
    record["table"] = table_digest(ds)
    with locked(parts):
        if (there := embeddings_record(out)) and all(there.get(name) == value for name, value in record.items()):
            return
        _start(parts, record)
        run = Network(model).to(next(model.parameters()).device).runner()
        with tqdm(total=len(views), desc=f"embedding at {size} px", unit="image", disable=None) as bar:
            for start in range(0, len(views), _ROWS):
                rows, file = np.arange(start, min(start + _ROWS, len(views))), parts / f"{start:08d}.safetensors"
                if not file.is_file():
                    outputs = mean_over_tiles(run, views.views(rows), batch_size)
                    vectors = np.stack([vector for _, vector in outputs]).astype(np.float32)
                    with whole(file) as unfinished:
                        safetensors.numpy.save_file({"embedding": vectors}, unfinished)
                bar.update(len(rows))
        write_embeddings(out, _made(parts), ds, **record)
        shutil.rmtree(parts)


def _start(parts: Path, identity: dict[str, Any]) -> None:
    """Take away what is of other images or another network."""
    remove_unfinished(parts)
    file = parts / "of.json"
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    if file.is_file() and read_json(file) != digest:
        for part in parts.glob("*.safetensors"):
            part.unlink()
    write_json(file, digest)


def _made(parts: Path) -> Iterator[np.ndarray]:
    for file in sorted(parts.glob("*.safetensors")):
        yield safetensors.numpy.load_file(file)["embedding"]
