"""BreaKHis from wherever it lies: the same rows and the same pixels, and never stale ones."""

import http.server
import io
import os
import shutil
import tarfile
import threading
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from magnification_invariant.data import archives
from magnification_invariant.data.breakhis import COLUMNS, load_breakhis
from magnification_invariant.data.breakhis_builder import BreaKHis


@pytest.fixture(scope="module")
def archive_of(breakhis_tree, tmp_path_factory):
    """The small tree as a .tar.gz and as a .zip, in another order than the names'."""
    folder = tmp_path_factory.mktemp("archives")
    files = sorted(breakhis_tree.rglob("*.png"), reverse=True)
    with tarfile.open(folder / "b.tar.gz", "w:gz") as tar, zipfile.ZipFile(folder / "b.zip", "w") as zipped:
        for path in files:
            tar.add(path, path.relative_to(breakhis_tree))
            zipped.write(path, path.relative_to(breakhis_tree))
    with tarfile.open(folder / "b.tar", "w") as tar:
        tar.add(breakhis_tree / "BreaKHis_v1", "BreaKHis_v1")
    return folder


@pytest.fixture
def url_of(archive_of, monkeypatch):
    """Serves the archives over http."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=archive_of)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield lambda name: f"http://127.0.0.1:{server.server_port}/{name}"
    server.shutdown()
    server.server_close()


def pixels(ds) -> dict[str, np.ndarray]:
    return {row["filename"]: np.asarray(row["image"]) for row in ds}


def assert_same(ds, expected):
    assert list(ds.features) == list(expected.features) and ds.features == expected.features
    if isinstance(ds, datasets.IterableDataset):
        rows = sorted(ds, key=lambda row: row["filename"])
    else:
        rows = list(ds)
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        assert np.array_equal(np.asarray(row.pop("image")), np.asarray(wanted.pop("image")))
        assert row == wanted


@pytest.mark.parametrize("name", ["b.tar.gz", "b.tar", "b.zip"])
@pytest.mark.parametrize("streaming", [False, True])
def test_an_archive_is_the_folder(archive_of, breakhis_tree, name, streaming):
    assert_same(load_breakhis(archive_of / name, streaming=streaming), load_breakhis(breakhis_tree))


@pytest.mark.parametrize("name", ["b.tar.gz", "b.zip"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_url_is_the_folder(url_of, breakhis_tree, name, streaming):
    assert_same(load_breakhis(url_of(name), streaming=streaming), load_breakhis(breakhis_tree))


def test_a_folder_is_streamed(breakhis_tree):
    stream = load_breakhis(breakhis_tree, streaming=True)
    assert stream.num_shards == 9  # slides
    assert_same(stream, load_breakhis(breakhis_tree))


@pytest.mark.parametrize("name", ["b.tar.gz", "b.zip"])
def test_processes_share_the_work(archive_of, breakhis_tree, tmp_path, name):
    shutil.copy(archive_of / name, tmp_path)  # a source that no cache knows
    assert_same(load_breakhis(tmp_path / name, num_proc=2), load_breakhis(breakhis_tree))
