"""Embeddings on disk become the table that their writer meant; what cannot be meant is said by row and file."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch

from magnification_invariant.data.vectors import VectorCache, load_embeddings, vectors_of, write_embeddings

VECTORS = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32)
IDS = [f"{i:03d}" for i in range(12)]
COLUMNS = {
    "id": IDS,
    "patient": [f"{i // 2:02d}" for i in range(12)],
    "label": ["benign", "malignant"] * 6,
    "domain": ["a", "a", "b", "b"] * 3,
}


def parquet(path, vectors=VECTORS, **changed):
    columns = {name: column for name, column in (COLUMNS | changed).items() if column is not None}
    stored = vectors if isinstance(vectors, list) else [row.tolist() for row in vectors]
    pq.write_table(pa.table(columns | {"embedding": pa.array(stored, pa.list_(pa.float32()))}), path)
    return path


def manifest(path, *lines, columns=COLUMNS):
    rows = lines or [",".join(row) for row in zip(*columns.values(), strict=True)]
    path.write_text("\n".join([",".join(columns), *rows]))
    return path


def test_a_table_is_what_was_written(tmp_path):
    ds = load_embeddings(parquet(tmp_path / "e.parquet"))
    assert ds["filename"][:] == IDS and ds["patient"][:] == COLUMNS["patient"]  # 007 stays 007
    assert ds.features["label"].names == ["benign", "malignant"] and ds["label"][:] == [0, 1] * 6
    assert (
        ds["domain"][:] == COLUMNS["domain"] and ds["slide"][:] == COLUMNS["patient"] and np.isnan(ds["mpp"][:]).all()
    )
    assert np.array_equal(vectors_of(ds), VECTORS)
    assert np.array_equal(vectors_of(ds.select([3, 0])), VECTORS[[3, 0]])


def test_what_is_written_is_read_again(tmp_path):
    named = {"magnification": [40, 200] * 6, "label": ["Malignant", "Benign", "Benign", "Malignant"] * 3}
    ds = load_embeddings(parquet(tmp_path / "e.parquet", domain=None, mpp=["0.5", ""] * 6, **named))
    assert ds["magnification"][:3] == [40, 200, 40] and ds["mpp"][0] == 0.5 and np.isnan(ds["mpp"][1])
    ds = ds.cast_column("label", type(ds.features["label"])(names=["Malignant", "Benign"]))  # not in the ABC's order
    write_embeddings(tmp_path / "again.parquet", iter([VECTORS[:7], VECTORS[7:]]), ds, network="x")
    again = load_embeddings(tmp_path / "again.parquet")
    assert again.features["label"].names == ["Malignant", "Benign"]
    for name in ("label", "magnification", "patient", "filename"):
        assert again[name][:] == ds[name][:]
    assert (
        np.array_equal(vectors_of(again), VECTORS) and pq.read_schema(tmp_path / "again.parquet").metadata[b"network"]
    )
    assert again.features["magnification"].dtype == "int64"


def test_a_manifest_describes_what_the_file_does_not(tmp_path):
    file = parquet(tmp_path / "e.parquet", patient=None, label=None, domain=None)
    order = np.random.default_rng(1).permutation(12)
    shuffled = {name: [column[i] for i in order] for name, column in COLUMNS.items()}
    ds = load_embeddings(file, manifest(tmp_path / "m.csv", columns=shuffled))
    whole = load_embeddings(parquet(tmp_path / "w.parquet"))
    for name in ("filename", "patient", "domain", "label"):
        assert ds[name][:] == whole[name][:]
    more = {name: [*column, column[0]] for name, column in COLUMNS.items()} | {"id": [*IDS, "elsewhere"]}
    with pytest.warns(UserWarning, match="1 lines of .*m.csv are of ids that .*e.parquet has not"):
        load_embeddings(file, manifest(tmp_path / "m.csv", columns=more))
    with pytest.raises(ValueError, match=r"e\.parquet: nothing says patient or label or domain .*--manifest"):
        load_embeddings(file)


def test_files_of_the_field(tmp_path):
    """Slides of several tiles are their mean; ids are the files' names, or stand beside the vectors."""
    rng, csv = np.random.default_rng(2), manifest(tmp_path / "m.csv")
    tiles = {name: rng.standard_normal((4, 5)).astype(np.float32) for name in IDS}
    wanted = np.stack([tiles[name].astype(np.float64).mean(0) for name in IDS]).astype(np.float32)

    safetensors.numpy.save_file(tiles, tmp_path / "e.safetensors")
    assert np.array_equal(vectors_of(load_embeddings(tmp_path / "e.safetensors", csv)), wanted)

    (tmp_path / "tiatoolbox").mkdir()
    for name in IDS:
        np.save(tmp_path / "tiatoolbox" / f"{name}.features.0.npy", tiles[name])
        np.save(tmp_path / "tiatoolbox" / f"{name}.position.npy", np.zeros((4, 4)))
    assert np.array_equal(vectors_of(load_embeddings(tmp_path / "tiatoolbox", csv)), wanted)

    h5py = pytest.importorskip("h5py")
    (tmp_path / "trident").mkdir()
    for name in IDS:
        with h5py.File(tmp_path / "trident" / f"{name}.h5", "w") as file:
            file["features"], file["coords"] = tiles[name], np.zeros((4, 2), int)
    ds = load_embeddings(tmp_path / "trident", csv)
    assert ds["filename"][:] == IDS and np.array_equal(vectors_of(ds), wanted)
    with h5py.File(tmp_path / "one.h5", "w") as file:
        file["feats"], file["ids"] = wanted[::-1], np.array(IDS[::-1], "S")
    ds = load_embeddings(tmp_path / "one.h5", csv)
    assert ds["filename"][:] == IDS[::-1] and np.array_equal(vectors_of(ds), wanted[::-1])
    with h5py.File(tmp_path / "lazyslide.h5ad", "w") as file:
        file["X"], file["obs/names"] = wanted, IDS
        file["obs"].attrs["_index"] = "names"
    ds = load_embeddings(tmp_path / "lazyslide.h5ad", csv)
    assert ds["filename"][:] == IDS and np.array_equal(vectors_of(ds), wanted)


def test_hdf5_without_h5py_is_one_sentence(tmp_path, monkeypatch, capsys):
    from magdg import main

    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    (tmp_path / "e.h5").write_bytes(b"")
    assert main(["lomo", "--embeddings", str(tmp_path / "e.h5"), "--output-dir", str(tmp_path / "runs")]) == 2
    assert "pip install 'magnification-invariant[hdf5]'" in capsys.readouterr().err


def changed(column, i, value):
    return {column: [value if j == i else each for j, each in enumerate(COLUMNS[column])]}


def with_row(i, row):
    return [row if j == i else each.tolist() for j, each in enumerate(VECTORS)]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (changed("id", 3, "001"), r"'001' \(rows 1, 3\)"),
        ({"vectors": with_row(4, [1.0, float("nan"), 0, 0, 0])}, r"not finite: '004' \(row 4\)"),
        ({"vectors": with_row(4, [1.0, float("inf"), 0, 0, 0])}, r"not finite: '004' \(row 4\)"),
        ({"vectors": with_row(5, [1.0, 2.0])}, r"of 5 numbers, but '005' \(row 5\) has 2"),
        ({"vectors": with_row(5, None)}, r"of 5 numbers, but '005' \(row 5\) has 0"),
        ({"label": ["benign"] * 12}, "Column 'label' has 1 classes"),
        (
            {"domain": [*"ababababab", "c", "c"], "label": ["x", "x", "y", "y"] * 3},
            r"'c' has one class only: its 2 rows are 'y'",
        ),
        (changed("patient", 2, None), r"Column 'patient' has no value in 1 rows \(2\)"),
        (changed("patient", 2, " "), "Column 'patient' has no value in row 2"),
        ({"mpp": ["0.5"] * 11 + ["500"]}, "Column 'mpp', row 11"),
    ],
)
def test_bad_rows_are_named_with_their_file(tmp_path, made, said):
    file = parquet(tmp_path / "bad.parquet", **made)
    with pytest.raises(ValueError, match=rf"bad\.parquet: .*{said}"):
        load_embeddings(file)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["001,p,benign,a"], r"lacks 11 of its 12 ids: '000' \(row 0\); '002' \(row 2\)"),
        (
            ["001,p,benign,a", "001,q,benign,a"],
            r"ids more than once: '001' \(rows 0, 1: patients p; q\); which line is right",
        ),
        (["001,,benign,a"], r"has no patient of '001' \(row 0\)"),
        (["001,p,benign"], "line 2: 3 values for 4 columns"),
    ],
)
def test_a_bad_manifest_is_named(tmp_path, lines, said):
    file = parquet(tmp_path / "e.parquet", patient=None, label=None, domain=None)
    with pytest.raises(ValueError, match=rf"m\.csv.*{said}"):
        load_embeddings(file, manifest(tmp_path / "m.csv", *lines))


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*none\.parquet"):
        load_embeddings(tmp_path / "none.parquet")
    for name in ("cut.parquet", "cut.safetensors", "cut.npy"):
        (tmp_path / name).write_bytes(b"PAR1")
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            load_embeddings(tmp_path / name)
    (tmp_path / "e.txt").write_text("1")
    with pytest.raises(ValueError, match=r"e\.txt: embeddings are \.parquet"):
        load_embeddings(tmp_path / "e.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no \.parquet"):
        load_embeddings(tmp_path / "empty")
    manifest(tmp_path / "m.csv", columns={"id": IDS, "patient": IDS})
    with pytest.raises(ValueError, match=r"m\.csv has no column label, domain; it has id, patient"):
        load_embeddings(parquet(tmp_path / "e.parquet"), tmp_path / "m.csv")


def test_one_vector_under_two_patients_is_said(tmp_path):
    twice = [VECTORS[0].tolist() if i == 5 else row.tolist() for i, row in enumerate(VECTORS)]
    with pytest.warns(UserWarning, match=r"'000' \(patient 00\) = '005' \(patient 02\)"):
        load_embeddings(parquet(tmp_path / "e.parquet", twice))


def test_a_cache_gives_rows_as_they_are(tmp_path):
    cache = VectorCache(load_embeddings(parquet(tmp_path / "e.parquet")))
    taken = cache.take(torch.tensor([4, 4, 0]), "cpu")
    assert torch.equal(cache.augmentation(None, None, None)(taken, None), torch.from_numpy(VECTORS[[4, 4, 0]]))
    assert [view.tolist() for view in cache.views(np.array([2, 7]))] == [VECTORS[[2]].tolist(), VECTORS[[7]].tolist()]
    assert len(cache) == 12 and json.dumps(cache.native_mpp.tolist()) == json.dumps([float("nan")] * 12)
