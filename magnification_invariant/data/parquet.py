"""A table as Parquet shards with the images in them, and a card: a folder that is a Hub dataset repository."""

from pathlib import Path

from magnification_invariant.data.breakhis import MAGNIFICATIONS, MPP, SUBTYPES
from magnification_invariant.data.verification import Verification, verify

_BATCH = 100  # rows that are in memory at once, and a row group
_CARD = """---
pretty_name: {name}
{license}
task_categories: [image-classification]
tags: [histopathology, breast-cancer, medical, H&E]
size_categories: [{size}]
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
---
# {name}

{about}

```python
from datasets import load_dataset

ds = load_dataset("<this repository>", split="train")
```

## Columns

| column | |
|---|---|
| `image` | the file as it was, embedded |
| `label` | 0 benign, 1 malignant |
| `subtype` | {subtypes} |
| `magnification` | total optical magnification, objective times ten: 40, 100, 200 or 400 |
| `mpp` | micrometres per pixel of the stored image; {mpp} at the original size |
| `patient` | year and number of the biopsy; sections of one biopsy share it |
| `slide` | patient and section |
| `filename` | as published; the other columns follow from it |

## Splits

One split, `train`, holds everything. Split by `patient`, never by image: images of one slide look alike. The data
come with five official folds, which have sections of one biopsy on both sides; they serve to compare with papers that
used them.

## Counts

```
{counts}
```

## Licence

{licence}

## Citation

{citation}
"""
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
    ds, folder: str | Path, *, report: Verification | None = None, shard_bytes: int = 256 * 2**20
) -> list[Path]:
    """Writes ``data/train-00000-of-0000N.parquet`` and ``README.md``, the dataset card, into `folder`.

    `load_breakhis(folder)` and plain `datasets.load_dataset(folder)` give back equal rows and pixels. An older export
    in the folder is replaced when the new one is complete; other files stay.

    Args:
        ds: A table of `load_breakhis`.
        folder: Made if needed.
        report: What `verify` said of the table, for the card; without it, it is asked for the counts.
        shard_bytes: A shard is closed when it has so many bytes.

    Returns:
        The shards.
    """
    import pyarrow.parquet as pq
    from datasets.table import embed_table_storage

    data = Path(folder, "data")
    data.mkdir(parents=True, exist_ok=True)
    schema, rows = ds.features.arrow_schema, ds.with_format("arrow")
    unfinished: list[Path] = []
    start = 0
    while start < len(rows):
        path = data / f".unfinished-{len(unfinished):05d}"
        with pq.ParquetWriter(path, schema) as writer:
            size = 0
            while start < len(rows) and size < shard_bytes:
                table = embed_table_storage(rows[start : start + _BATCH].cast(schema))
                writer.write_table(table)
                start, size = start + _BATCH, size + table.nbytes
        unfinished.append(path)

    for old in data.glob("train-*-of-*.parquet"):
        old.unlink()
    names = [f"train-{i:05d}-of-{len(unfinished):05d}.parquet" for i in range(len(unfinished))]
    shards = [path.rename(data / name) for path, name in zip(unfinished, names, strict=True)]
    report = report or verify(ds, pixels=False)
    fields = _OTHER if report.kind == "not BreaKHis" else _BREAKHIS
    mpp = ", ".join(f"{MPP[magnification]:.4g} ({magnification}X)" for magnification in MAGNIFICATIONS)
    subtypes = ", ".join(SUBTYPES.values())
    card = _CARD.format(**fields, counts=report, mpp=mpp, subtypes=subtypes, size=_size_category(len(ds)))
    Path(folder, "README.md").write_text(card, encoding="utf-8")
    return shards


def _size_category(n: int) -> str:
    """As the Hub writes it."""
    return next((name for most, name in ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K")) if n < most), "")
