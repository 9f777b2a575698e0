"""A table as Parquet shards with the images in them, and a card: a folder that is a Hub dataset repository."""

import os
from importlib.resources import files
from pathlib import Path

from magnification_invariant.data.breakhis import MAGNIFICATIONS, MPP, SUBTYPES
from magnification_invariant.data.verification import Verification, verify
from magnification_invariant.files import whole

_BATCH = 100  # rows that are in memory at once, and a row group
_BREAKHIS = {
    "name": "BreaKHis",
    "license": "license: other\nlicense_name: stated-as-cc-by-4.0-by-third-parties\n"
    "license_link: https://doi.org/10.17632/jxwvdwhpc2.1",
    "about": "Breast tumour biopsies, H&E, photographed at four magnifications.",
    "licence": "Third parties state CC BY 4.0 (doi 10.17632/jxwvdwhpc2.1); the wording of the authors themselves is "
    "not verified.\nAsk them before you rely on it, and cite the paper.",
    "citation": "Spanhol, Oliveira, Petitjean, Heutte: A Dataset for Breast Cancer Histopathological Image "
    "Classification.\nIEEE Transactions on Biomedical Engineering 63(7), 2016. doi 10.1109/TBME.2015.2496264",
}
_OTHER = {
    "name": "Histology images in the layout of BreaKHis",
    "license": "license: unknown",
    "about": "These are NOT the images of BreaKHis; they only have its columns. Say here what they are.",
    "licence": "Unknown to the program that wrote this card. Say it here before you share the data.",
    "citation": "None.",
}


def to_parquet(
    ds, folder: str | os.PathLike, *, report: Verification | None = None, shard_bytes: int = 256 * 2**20
) -> list[Path]:
    """Writes ``data/train-00000-of-0000N.parquet`` and ``README.md``, the dataset card, into `folder`.

    `load_breakhis(folder)` and plain `datasets.load_dataset(folder)` give back equal rows and pixels. An older export
    in the folder is replaced when the new one is complete.

    Args:
        ds: A table of `load_breakhis`.
        folder: Made if needed.
        report: What `verify` said of the table, for the card; without it, it is asked for the counts.
        shard_bytes: A shard is closed when it has so many bytes.

    Returns:
        The shards.

    Raises:
        FileExistsError: ``data`` in the folder holds something else.
        CannotWrite: The disk is full or read-only.
    """
    import pyarrow.parquet as pq
    from datasets.table import embed_table_storage

    data = Path(folder, "data")
    others = sorted(set(data.glob("*")) - set(data.glob("train-*-of-*.parquet")))
    if others:
        raise FileExistsError(
            f"{data} holds something else ({others[0].name}), which would be lost; name another folder"
        )
    schema, rows, shards, start = ds.features.arrow_schema, ds.with_format("arrow"), 0, 0
    with whole(data) as unfinished:
        unfinished.mkdir()
        while start < len(rows):
            with pq.ParquetWriter(unfinished / f"{shards:05d}", schema) as writer:
                size = 0
                while start < len(rows) and size < shard_bytes:
                    table = embed_table_storage(rows[start : start + _BATCH].cast(schema))
                    writer.write_table(table)
                    start, size = start + _BATCH, size + table.nbytes
            shards += 1
        for i in range(shards):  # the names say how many there are
            (unfinished / f"{i:05d}").rename(unfinished / f"train-{i:05d}-of-{shards:05d}.parquet")

    report = report or verify(ds, pixels=False)
    card = files(__package__).joinpath("dataset_card.md").read_text(encoding="utf-8")
    with whole(Path(folder, "README.md")) as unfinished:
        text = card.format(
            **(_OTHER if report.kind == "not BreaKHis" else _BREAKHIS),
            counts=report,
            mpp=", ".join(f"{MPP[magnification]:.4g} ({magnification}X)" for magnification in MAGNIFICATIONS),
            subtypes=", ".join(SUBTYPES.values()),
            size="n<1K" if len(ds) < 10**3 else "1K<n<10K" if len(ds) < 10**4 else "10K<n<100K",
        )
        unfinished.write_text(text, encoding="utf-8")
    return sorted(data.iterdir())
