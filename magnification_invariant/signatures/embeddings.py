"""Embeddings on disk: safetensors, written batch by batch, with what each row is."""

import json
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

_TYPES = {"float16": "F16", "float32": "F32"}


def live_dimensions(X: np.ndarray) -> np.ndarray:
    """Which columns of X (n, d) vary at all: a column is dead if float32 would not see it vary."""
    return X.std(axis=0, dtype=np.float64) > 1e-6 * np.abs(X).max(axis=0)


def write_embeddings(
    path: str | Path,
    parts: dict[str, tuple[Iterable[ArrayLike], dict[str, ArrayLike]]],
    *,
    dtype: str = "float32",
    **about: Any,
) -> None:
    """Writes embeddings while they are computed: no more than one batch is in memory.

    Args:
        path: Of the file, which appears when it is whole.
        parts: Name to batches (b, d) and the keys of the rows, columns of one length: filename, patient, ... The number
            of rows is that of the keys.
        dtype: "float32" or "float16".
        **about: What JSON can hold, kept in the header: kind of embedding, source, ...

    Raises:
        ValueError: If there are not as many rows as keys, rows of different widths, or values that `dtype` cannot hold.
    """
    path, bytes_of = Path(path), {"float16": 2, "float32": 4}
    keys = {part: {name: np.asarray(c) for name, c in columns.items()} for part, (_, columns) in parts.items()}
    rows = {part: len(next(iter(columns.values()))) for part, columns in keys.items()}
    batches = {part: iter(given) for part, (given, _) in parts.items()}
    # The header comes first and names the width, so that one batch is drawn ahead.
    ahead = {part: list(islice(given, 1)) for part, given in batches.items()}
    width = next((np.shape(batch[0])[1] for batch in ahead.values() if batch), 0)
    numbers, texts = {}, {}
    for part, columns in keys.items():
        for name, column in columns.items():
            if column.dtype.kind in "iub":
                numbers[f"{part}.{name}"] = column.astype("<i8")
            else:
                texts.setdefault(part, {})[name] = column.tolist()
    header, end = {"__metadata__": {"about": json.dumps({**about, "keys": texts})}}, 0
    shapes = {name: ("I64", array.shape, 8) for name, array in numbers.items()}  # widest type first: all are aligned
    shapes |= {f"{part}.embedding": (_TYPES[dtype], (n, width), bytes_of[dtype]) for part, n in rows.items()}
    for name, (kind, shape, size) in shapes.items():
        start, end = end, end + size * int(np.prod(shape))
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()

    unfinished = path.with_name(path.name + ".tmp")
    with open(unfinished, "wb") as file:
        file.write((len(text) + -len(text) % 8).to_bytes(8, "little") + text + b" " * (-len(text) % 8))
        for array in numbers.values():
            file.write(array.tobytes())
        for part, given in batches.items():
            written = 0
            for batch in chain(ahead[part], given):
                with np.errstate(over="ignore"):
                    stored = np.asarray(batch).astype(f"<{dtype[0]}{bytes_of[dtype]}")
                if stored.shape[1:] != (width,) or np.isinf(stored).any():
                    raise ValueError(f"{part!r}: embeddings not (rows, {width}) but {stored.shape}, or beyond {dtype}")
                file.write(stored.tobytes())
                written += len(stored)
            if written != rows[part]:
                raise ValueError(f"{written} embeddings for {rows[part]} keys in {part!r}")
    unfinished.replace(path)


def read_embeddings(path: str | Path, part: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Reads one part of what `write_embeddings` wrote: embeddings (n, d) as stored, and the rows' keys by name."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        names = [name for name in file.keys() if name.startswith(f"{part}.")]  # noqa: SIM118  (no mapping)
        if f"{part}.embedding" not in names:
            raise ValueError(f"{path} holds no part {part!r}: {sorted(name for name in file.keys())}")  # noqa: SIM118
        found = {name.removeprefix(f"{part}."): file.get_tensor(name) for name in names}
        about = json.loads((file.metadata() or {}).get("about", "{}"))
    texts = {name: np.array(column) for name, column in about.get("keys", {}).get(part, {}).items()}
    return found.pop("embedding"), found | texts


def about_embeddings(path: str | Path) -> dict[str, Any]:
    """What `write_embeddings` was told about the embeddings, without reading them."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        about = json.loads((file.metadata() or {}).get("about", "{}"))
    return {name: value for name, value in about.items() if name != "keys"}
