"""Search by signature: the cases of a collection that a network finds most like an image.

A collection is one Parquet file: a row an image, with its signature as float16 of unit length, padded with zeros to a
multiple of 8. Cases are compared by the cosine of their signatures, exactly, against every row.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike
from tqdm import tqdm

from magnification_invariant.data.breakhis import name_fields
from magnification_invariant.data.images import EncodedImages
from magnification_invariant.files import locked, whole
from magnification_invariant.predict.classifier import Classifier
from magnification_invariant.predict.inputs import Item, items_of
from magnification_invariant.signatures import SignatureProjector

FILE = "signatures.parquet"
CASE = ("filename", "patient", "label", "subtype", "magnification", "domain", "mpp")  # what of a table is kept
BATCH = 1024  # cases written at a time


def unit(signatures: ArrayLike) -> np.ndarray:
    """Rows of unit length, float32, padded with zeros to a multiple of 8 columns; a row of zeros stays one."""
    x = np.asarray(signatures, np.float32)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return np.pad(x, ((0, 0), (0, -x.shape[1] % 8)))


def _projector(classifier: Classifier) -> SignatureProjector:
    if classifier.projector is None or not len(classifier.projector.indices):
        what = "has no signature" if classifier.projector is None else "has an empty signature"
        raise ValueError(f"the model {classifier.folder} {what}: cases cannot be compared by it; choose another model")
    return classifier.projector


def build_index(classifier: Classifier, ds, folder: str | Path) -> Path:
    """Writes the signatures of a table's images, a batch at a time, to a folder.

    Args:
        classifier: What makes the signatures.
        ds: A table with an image column, `filename` and `patient`; the other columns of `CASE` are kept where it has
            them.
        folder: Of the index; the file in it is replaced when the new one is complete.

    Returns:
        The file.

    Raises:
        ValueError: The model has no signature, or an image cannot be predicted.
        Busy: Another process writes there.
    """
    projector, folder = _projector(classifier), Path(folder)
    size, images = len(projector.indices), EncodedImages(ds)
    columns = {name: ds[name][:] for name in CASE if name in ds.column_names}
    if hasattr(ds.features.get("label"), "int2str"):
        columns["label"] = ds.features["label"].int2str(columns["label"])
    columns["picture"] = [images[i][0] for i in range(len(ds))]  # None for images inside Parquet files
    cases = pa.table(columns)
    about = {"model": classifier.source, "size": size, "embedding": projector.embedding, "source": projector.source}
    about["weights_sha256"] = projector.weights_sha256
    kind = pa.list_(pa.float16(), size + -size % 8)
    schema = cases.schema.append(pa.field("signature", kind)).with_metadata({"magdg": json.dumps(about)})
    rows = tqdm(classifier.iterate(items_of(ds)), total=len(ds), desc="signatures", unit="image", disable=None)
    with locked(folder), whole(folder / FILE) as unfinished, pq.ParquetWriter(unfinished, schema) as writer:
        batch, start = [], 0
        for i, row in enumerate(rows, 1):
            if row["error"]:
                raise ValueError(f"{row['filename']} cannot be predicted: {row['error']}")
            batch.append(row["signature"])
            if len(batch) == BATCH or i == len(ds):
                flat = pa.array(unit(batch).astype(np.float16).ravel())
                signatures = pa.FixedSizeListArray.from_arrays(flat, type=kind)
                part = cases.slice(start, len(batch))
                writer.write_table(part.append_column(schema.field("signature"), signatures))
                batch, start = [], i
    return folder / FILE


def nearest(
    queries: np.ndarray,
    gallery: np.ndarray,
    k: int,
    query_groups: ArrayLike | None = None,
    groups: ArrayLike | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of a gallery with the largest inner product with each query, exactly.

    Args:
        queries: (m, d) float32, of unit length where cosines are meant.
        gallery: (n, d).
        k: Rows to find.
        query_groups: (m,) patient of each query, whose rows are left out; None leaves nobody out.
        groups: (n,) patient of each row.

    Returns:
        Rows (m, k), or (m, n) where there are fewer, best first, and their inner products; -1 and -inf where a row is
        left out.
    """
    score = queries @ gallery.T
    if query_groups is not None:
        score[np.asarray(query_groups)[:, None] == np.asarray(groups)] = -np.inf
    rows = np.argsort(-score, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(score, rows, 1)
    return np.where(np.isfinite(best), rows, -1), best


@dataclass(frozen=True, eq=False)
class SignatureIndex:
    """A collection to search.

    Attributes:
        cases: (n rows) what `CASE` names, and picture, the file of the image or null.
        vectors: (n, d) float32 signatures of unit length, padded.
        about: model (folder or repository), source and weights_sha256, embedding, size.
    """

    cases: pa.Table
    vectors: np.ndarray
    about: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> "SignatureIndex":
        """Reads what `build_index` wrote.

        Raises:
            FileNotFoundError: There is none.
            ValueError: The file is another one.
        """
        file = Path(folder) / FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} holds no index ({FILE}); make one: magdg search --build MODEL --data DATA"
            )
        table = pq.read_table(file)
        if b"magdg" not in (table.schema.metadata or {}):
            raise ValueError(f"{file} was not written by magdg search --build")
        signature = table["signature"].combine_chunks()
        width = signature.type.list_size
        vectors = signature.flatten().to_numpy(zero_copy_only=False).reshape(-1, width).astype(np.float32)
        return cls(table.drop(["signature"]), vectors, json.loads(table.schema.metadata[b"magdg"]))

    def search(
        self, signatures: ArrayLike, k: int = 10, patients: ArrayLike | None = None, magnification: int | None = None
    ) -> list[pa.Table]:
        """The k nearest cases of each signature.

        Args:
            signatures: (m, size), of the model that made the index.
            k: Cases to find; there can be fewer.
            patients: (m,) patient of each query, whose own images are left out.
            magnification: Cases of this one only.

        Returns:
            A table a query, best first: the columns of `cases` and similarity, the cosine.
        """
        signatures = np.asarray(signatures)
        if signatures.ndim != 2 or signatures.shape[1] != self.about["size"]:
            raise ValueError(f"this index holds signatures of {self.about['size']} dimensions, not {signatures.shape}")
        rows = np.arange(len(self.cases))
        if magnification is not None:
            rows = np.flatnonzero(np.asarray(self.cases["magnification"]) == magnification)
        own = np.asarray(self.cases["patient"])[rows]
        found, similarity = nearest(unit(signatures), self.vectors[rows], k, patients, own)
        tables = []
        for row, value in zip(found, similarity, strict=True):
            there = row >= 0
            tables.append(self.cases.take(rows[row[there]]).append_column("similarity", pa.array(value[there])))
        return tables


def similar_cases(
    index: SignatureIndex,
    classifier: Classifier,
    image: str | Path,
    *,
    mpp: float | None = None,
    k: int = 10,
    patient: str | None = None,
    magnification: int | None = None,
) -> tuple[pa.Table, str | None]:
    """The k cases of an index most like the image in a file.

    Args:
        index: To search.
        classifier: The model that made it.
        image: File.
        mpp: Micrometres per pixel of the image; by default what the index says of a case of the same file name, or
            what the file states.
        k: Cases to find.
        patient: Of the image, whose own cases are left out. By default, of the case of the same file name in the index,
            or what a BreaKHis file name says.
        magnification: Find cases of this one only.

    Returns:
        The cases, best first, as of `SignatureIndex.search`; and whose own cases were left out (None: nobody's).

    Raises:
        ValueError: The model is not the one that made the index, or the image cannot be predicted.
    """
    if _projector(classifier).weights_sha256 != index.about["weights_sha256"]:
        raise ValueError(f"{classifier.folder} is not (or no longer) the model that made this index; build it again")
    name = Path(image).name
    names = [Path(each).name for each in index.cases["filename"].to_pylist()]
    case = index.cases.slice(names.index(name), 1).to_pylist()[0] if name in names else {}
    fields = name_fields(name) or {}
    patient = patient or case.get("patient") or fields.get("patient")
    known = case.get("mpp")
    known = None if known is None or np.isnan(known) else known
    (row,) = classifier.iterate([Item(name, Path(image), known if mpp is None else mpp)])
    if row["error"]:
        raise ValueError(f"{image} cannot be predicted: {row['error']}")
    query = [row["signature"]]
    return index.search(query, k, None if patient is None else [patient], magnification)[0], patient
