"""Search by signature: the cases of a collection that a network finds most like an image.

A collection is one Parquet file: a row an image, with its signature as float16 of unit length, padded with zeros to a
multiple of 8. Cases are compared by the cosine of their signatures, exactly, against every row.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from numpy.typing import ArrayLike

from magnification_invariant import metrics
from magnification_invariant.data.augment import view_height
from magnification_invariant.data.breakhis import name_fields
from magnification_invariant.data.images import EncodedImages
from magnification_invariant.data.pixels import PixelCache
from magnification_invariant.engine import predict
from magnification_invariant.model_folder import read_model_config
from magnification_invariant.signatures import SignatureProjector, read_embeddings

FILE = "signatures.parquet"
CASE = ("filename", "patient", "label", "subtype", "magnification", "domain", "mpp")  # what of a table is kept


class SignedModel:
    """A published or trained network with its signature.

    Args:
        source: Model folder or Hub repository that also holds a signature.
        device: Where it runs.

    Raises:
        FileNotFoundError: There is no such model, or no signature beside it.
        ValueError: The signature belongs to other weights.
    """

    def __init__(self, source: str, device: str | torch.device = "cpu"):
        self.source = str(Path(source).resolve()) if Path(source).is_dir() else source
        self.size = read_model_config(self.source)["pretrained_cfg"]["input_size"][-1]
        self.projector = SignatureProjector.from_pretrained(self.source)
        where = "local-dir" if Path(self.source).is_dir() else "hf-hub"
        self.model = timm.create_model(f"{where}:{self.source.removeprefix('hf-hub:')}", pretrained=True).eval()
        self.projector.as_module(self.model)  # raises where the two do not belong together
        self.model.to(device)

    def embeddings(self, ds, *, batch_size: int = 1024, cache_folder=None) -> Iterator[np.ndarray]:
        """Embeddings of a table's images, (b, width) at a time: of the centre of each, as the protocol makes them."""
        cache = PixelCache(ds, view_height(self.size), folder=cache_folder)
        for rows in np.split(np.arange(len(ds)), range(batch_size, len(ds), batch_size)):
            yield predict(self.model, cache, rows, self.size, embedding=self.projector.embedding)[1]

    def signatures(self, ds, **options) -> Iterator[np.ndarray]:
        """Signatures of a table's images, (b, k) at a time; options as of `embeddings`."""
        return (self.projector.transform(batch) for batch in self.embeddings(ds, **options))


def unit(signatures: ArrayLike) -> np.ndarray:
    """Rows of unit length, float32, padded with zeros to a multiple of 8 columns; a row of zeros stays one."""
    x = np.asarray(signatures, np.float32)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return np.pad(x, ((0, 0), (0, -x.shape[1] % 8)))


def build_index(model: SignedModel, ds, folder: str | Path) -> Path:
    """Writes the signatures of a table's images, a batch at a time, to a folder.

    Args:
        model: What makes the signatures.
        ds: A table with an image column, `filename` and `patient`; the other columns of `CASE` are kept where it has
            them.
        folder: Of the index; the file in it is replaced when the new one is complete.

    Returns:
        The file.
    """
    folder, k = Path(folder), len(model.projector.indices)
    folder.mkdir(parents=True, exist_ok=True)
    images = EncodedImages(ds)
    names = [name for name in CASE if name in ds.column_names]
    columns = {name: ds[name][:] for name in names}
    if hasattr(ds.features.get("label"), "int2str"):
        columns["label"] = ds.features["label"].int2str(columns["label"])
    columns["picture"] = [images[i][0] for i in range(len(ds))]  # None for images inside Parquet files
    cases = pa.table(columns)
    about = {"model": model.source, "embedding": model.projector.embedding, "size": k}
    about |= {"source": model.projector.source, "weights_sha256": model.projector.weights_sha256}
    kind = pa.list_(pa.float16(), k + -k % 8)
    schema = cases.schema.append(pa.field("signature", kind)).with_metadata({"magdg": json.dumps(about)})
    unfinished = folder / (FILE + ".tmp")
    start = 0
    with pq.ParquetWriter(unfinished, schema) as writer:
        for batch in model.signatures(ds):
            flat = pa.array(unit(batch).astype(np.float16).ravel())
            part = cases.slice(start, len(batch)).append_column(
                schema.field("signature"), pa.FixedSizeListArray.from_arrays(flat, type=kind)
            )
            writer.write_table(part)
            start += len(batch)
    return unfinished.replace(folder / FILE)


def nearest(
    queries: np.ndarray,
    gallery: np.ndarray,
    k: int,
    query_groups: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    *,
    block: int = 8192,
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of a gallery with the largest inner product with each query, exactly, block by block.

    Args:
        queries: (m, d) float32, of unit length where cosines are meant.
        gallery: (n, d), float32 or float16.
        k: Rows to find.
        query_groups: (m,) patient of each query, whose rows are left out; None leaves nobody out.
        groups: (n,) patient of each row.
        block: Rows looked at at a time.

    Returns:
        Rows (m, k), best first, and their inner products (m, k); -1 and -inf where there are not as many.
    """
    best, found = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
    for start in range(0, len(gallery), block):
        score = queries @ gallery[start : start + block].astype(np.float32, copy=False).T
        if query_groups is not None:
            own = np.asarray(query_groups)[:, None] == np.asarray(groups)[None, start : start + block]
            score[own] = -np.inf
        if score.shape[1] > k:
            top = np.argpartition(score, -k, axis=1)[:, -k:]
        else:
            top = np.broadcast_to(np.arange(score.shape[1]), score.shape)
        score = np.concatenate([best, np.take_along_axis(score, top, 1)], axis=1)
        row = np.concatenate([found, top + start], axis=1)
        order = np.argsort(-score, axis=1, kind="stable")[:, :k]
        best, found = np.take_along_axis(score, order, 1), np.take_along_axis(row, order, 1)
    return np.where(np.isfinite(best), found, -1), best


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

    def to_faiss(self, lists: int | None = None, probes: int = 32):
        """The signatures as an index of faiss that looks at a part of them only, for more than 100,000 cases.

        Its `search` gives similarities and rows of `cases`, approximately, and knows no patients: ask for more than
        needed and drop the query's own. It is kept by `faiss.write_index`.

        Args:
            lists: Clusters the cases are dealt into; default four times the root of their number.
            probes: Clusters searched; more find more of what `search` finds.

        Raises:
            OSError: faiss is not installed; says how to get it.
        """
        try:
            import faiss
        except ModuleNotFoundError as error:
            raise OSError("this needs faiss: pip install 'magnification-invariant[faiss]'") from error
        lists = lists or max(1, int(4 * len(self.vectors) ** 0.5))
        index = faiss.index_factory(self.vectors.shape[1], f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
        index.train(self.vectors)
        index.add(self.vectors)
        index.nprobe = probes
        return index


def find(
    index: SignatureIndex,
    image: str | Path,
    *,
    k: int = 10,
    patient: str | None = None,
    magnification: int | None = None,
    device: str | torch.device = "cpu",
) -> tuple[pa.Table, str | None]:
    """The k cases of an index most like the image in a file.

    Args:
        index: To search; the model that made it is loaded.
        image: File.
        k: Cases to find.
        patient: Of the image, whose own cases are left out. By default, of the case of the same file name in the index,
            or what a BreaKHis file name says.
        magnification: Find cases of this one only.
        device: Where the model runs.

    Returns:
        The cases, best first, as of `SignatureIndex.search`; and whose own cases were left out (None: nobody's).

    Raises:
        ValueError: The model is not the one that made the index.
    """
    import datasets

    model = SignedModel(index.about["model"], device)
    if model.projector.weights_sha256 != index.about["weights_sha256"]:
        raise ValueError(f"{model.source} is no longer the model that made this index; build it again")
    image = Path(image)
    if patient is None:
        known = dict(zip(index.cases["filename"].to_pylist(), index.cases["patient"].to_pylist(), strict=True))
        patient = known.get(image.name) or (name_fields(image.name) or {}).get("patient")
    ds = datasets.Dataset.from_dict({"image": [str(image)]}).cast_column("image", datasets.Image())
    with tempfile.TemporaryDirectory() as folder:
        signature = next(model.signatures(ds, cache_folder=folder))
    return index.search(signature, k, None if patient is None else [patient], magnification)[0], patient


def precision_at(
    vectors: np.ndarray,
    label: ArrayLike,
    patient: ArrayLike,
    *,
    query: ArrayLike | None = None,
    gallery: ArrayLike | None = None,
    ks: tuple[int, ...] = (5, 10),
) -> dict[str, Any]:
    """How many of the nearest cases of other patients have the query's class; every query patient weighs the same.

    Args:
        vectors: (n, d) of unit length.
        label: (n,) classes.
        patient: (n,) patients.
        query: (n,) booleans, which rows ask; default all.
        gallery: (n,) booleans, which rows can be found; default all.
        ks: How many nearest cases to look at.

    Returns:
        queries, chance (the precision of random cases of other patients), and for each k precision and by_class.
    """
    label, patient = np.asarray(label), np.asarray(patient)
    query, gallery = (np.flatnonzero(np.ones(len(label), bool) if m is None else m) for m in (query, gallery))
    found, _ = nearest(vectors[query], vectors[gallery], max(ks), patient[query], patient[gallery])
    same = np.where(found >= 0, label[gallery][found] == label[query][:, None], np.nan)
    weight = metrics.patient_weights(patient[query])
    others = patient[query][:, None] != patient[gallery][None]
    alike = (label[query][:, None] == label[gallery][None]) & others
    chance = np.average(alike.sum(1) / np.maximum(others.sum(1), 1), weights=weight)
    result = {"queries": len(query), "chance": float(chance)}
    for k in ks:
        share = np.nanmean(same[:, :k], axis=1)
        by_class = {}
        for c in np.unique(label[query]).tolist():
            chosen = label[query] == c
            by_class[c] = float(np.average(share[chosen], weights=weight[chosen]))
        result[k] = {"precision": float(np.average(share, weights=weight)), "by_class": by_class}
    return result


def retrieval(folder: str | Path, ks: tuple[int, ...] = (5, 10)) -> list[dict[str, Any]]:
    """Precision among the tested patients of a finished cell, from each magnification to each, by representation.

    "signature" is the standardised signature, "weighted" its columns times the size of their coefficients, "embedding"
    all live dimensions, standardised on the training images. No tested patient was seen in training.

    Returns:
        A row a (representation, query magnification, gallery magnification) with the figures of `precision_at`.
    """
    folder = Path(folder)
    projector = SignatureProjector.from_pretrained(folder / "model")
    train = read_embeddings(folder / "embeddings.safetensors", "train")[0].astype(np.float64)
    parts = [read_embeddings(folder / "embeddings.safetensors", part) for part in ("test", "test_source")]
    x = np.concatenate([embedding for embedding, _ in parts]).astype(np.float64)
    keys = {name: np.concatenate([of[name] for _, of in parts]) for name in ("label", "patient", "domain")}
    live = train.std(0) > 0
    signature = projector.transform(x)
    vectors = {
        "signature": signature,
        "weighted": signature * np.abs(projector.weight).max(0),
        "embedding": (x[:, live] - train[:, live].mean(0)) / train[:, live].std(0),
    }
    rows = []
    for name, vector in vectors.items():
        vector = unit(vector)
        for asked in np.unique(keys["domain"]):
            for given in np.unique(keys["domain"]):
                found = precision_at(
                    vector,
                    keys["label"],
                    keys["patient"],
                    query=keys["domain"] == asked,
                    gallery=keys["domain"] == given,
                    ks=ks,
                )
                about = {"representation": name, "width": vector.shape[1]}
                rows.append({**about, "query": asked.item(), "gallery": given.item(), **found})
    return rows
