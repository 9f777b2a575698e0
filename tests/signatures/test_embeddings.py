"""The streamed file is what safetensors itself reads, key by key, and whole or not there."""

import numpy as np
import pytest
import safetensors.numpy

from magnification_invariant.signatures import about_embeddings, live_dimensions, read_embeddings, write_embeddings


def keys(n, start=0):
    index = np.arange(start, start + n)
    return {"row": index, "filename": [f"{i}é.png" for i in index], "label": (index % 2).astype(np.int32)}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_batches_come_back_as_one_array_with_their_keys(dtype, tmp_path):
    x = np.random.default_rng(0).standard_normal((13, 7)).astype(np.float32)
    file = tmp_path / "e.safetensors"
    parts = {
        "train": ((x[:10][i : i + 3] for i in range(0, 10, 3)), keys(10)),
        "none": ([], keys(0)),
        "test": ([x[10:]], keys(3, 10)),
    }
    write_embeddings(file, parts, dtype=dtype, embedding="pyramid", source="a.b")
    tensors = safetensors.numpy.load_file(file)
    assert tensors["train.embedding"].dtype == dtype and tensors["none.embedding"].shape == (0, 7)
    assert (tensors["train.embedding"] == x[:10].astype(dtype)).all() and (tensors["test.row"] == [10, 11, 12]).all()
    found, of = read_embeddings(file, "test")
    assert (found == x[10:].astype(dtype)).all()
    assert of["filename"].tolist() == ["10é.png", "11é.png", "12é.png"] and of["label"].tolist() == [0, 1, 0]
    assert about_embeddings(file) == {"embedding": "pyramid", "source": "a.b"}
    assert [p.name for p in tmp_path.iterdir()] == ["e.safetensors"]
    with pytest.raises(ValueError, match="no part 'val'"):
        read_embeddings(file, "val")


def test_no_more_than_one_batch_is_held(tmp_path):
    written = []

    def batches():
        for i in range(5):
            written.append(i)
            yield np.full((2, 3), i, np.float32)

    write_embeddings(tmp_path / "e", {"train": (batches(), keys(10))})
    assert written == [0, 1, 2, 3, 4]
    assert read_embeddings(tmp_path / "e", "train")[0][:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    ("batches", "dtype", "message"),
    [
        ([np.ones((3, 2))], "float32", "3 embeddings for 4 keys in 'train'"),
        ([np.ones((2, 2)), np.ones((2, 3))], "float32", r"not \(rows, 2\) but \(2, 3\)"),
        ([np.full((4, 2), 7e4)], "float16", "beyond float16"),
    ],
)
def test_bad_input_leaves_no_file(batches, dtype, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_embeddings(tmp_path / "e", {"train": (batches, keys(4))}, dtype=dtype)
    assert not (tmp_path / "e").exists()


def test_dead_dimensions_are_seen():
    x = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    x[:, 1], x[:, 3] = 0, 1000 + 1e-5 * x[:, 3]
    assert live_dimensions(x).tolist() == [True, False, True, False]
