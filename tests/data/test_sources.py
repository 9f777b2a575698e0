"""BreaKHis from wherever it lies: the same rows and the same pixels, and never stale ones."""

import gzip
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
from magnification_invariant.data.breakhis_builder import BreaKHis
from PIL import Image

from magnification_invariant.data import archives
from magnification_invariant.data.breakhis import features, load_breakhis, name_fields
from magnification_invariant.data.parquet import to_parquet
from magnification_invariant.data.published import slides


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
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield lambda name: f"http://127.0.0.1:{server.server_port}/{name}"
    server.shutdown()
    server.server_close()


def assert_same(ds, expected):
    assert list(ds.features) == list(expected.features) and ds.features == expected.features
    rows = list(ds)
    if isinstance(ds, datasets.IterableDataset):
        rows.sort(key=lambda row: row["filename"])
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


def test_parquet_is_the_folder(breakhis_tree, tmp_path):
    ds = load_breakhis(breakhis_tree)
    shards = to_parquet(ds, tmp_path, shard_bytes=1)
    assert [path.name for path in shards] == ["train-00000-of-00001.parquet"]
    for source in (tmp_path, shards[0]):
        assert_same(load_breakhis(source), ds)
    assert_same(load_breakhis(tmp_path, streaming=True), ds)
    assert_same(datasets.load_dataset(str(tmp_path), split="train"), ds)  # as the card says
    # An older export is replaced; that images were resampled is not forgotten.
    rescaled = ds.select(range(20)).add_column("rescaled", [True] * 20)
    (shard,) = to_parquet(rescaled, tmp_path)
    assert list((tmp_path / "data").iterdir()) == [shard]
    assert_same(load_breakhis(tmp_path), rescaled)
    assert_same(load_breakhis(tmp_path, streaming=True), rescaled)


def test_shards_are_cut_and_named(archive_of, breakhis_tree, tmp_path, monkeypatch):
    monkeypatch.setattr("magnification_invariant.data.parquet._BATCH", 5)
    shards = to_parquet(load_breakhis(archive_of / "b.zip"), tmp_path, shard_bytes=1)
    assert [path.name for path in shards] == [f"train-{i:05d}-of-00007.parquet" for i in range(7)]
    assert_same(load_breakhis(tmp_path), load_breakhis(breakhis_tree))
    assert load_breakhis(tmp_path, streaming=True).num_shards == 7
    shards[0].write_bytes(shards[0].read_bytes()[:-100])
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_breakhis(tmp_path)


def test_the_card_is_for_the_hub(tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    names = [name for slide in slides()[:30] for name in slide.names]
    rows = [{**name_fields(name), "image": None, "mpp": 1.0, "filename": f"{name}.png"} for name in names]
    to_parquet(datasets.Dataset.from_list(rows, features=features()), tmp_path)
    card = huggingface_hub.DatasetCard.load(tmp_path / "README.md")
    assert card.data.license == "other" and card.data.license_link.endswith("jxwvdwhpc2.1")
    assert card.data.configs == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}
    ]
    assert card.data.size_categories == ["1K<n<10K"]
    for said in (
        f"known subset: {len(names):,} of BreaKHis's 7,909",
        "not verified",
        "10.1109/TBME.2015.2496264",
        "0.4924 (40X)",
        "never by image",
    ):
        assert said in card.text


def test_what_is_meant_must_be_clear(breakhis_tree, tmp_path):
    load_breakhis(breakhis_tree).select_columns(["label"]).to_parquet(tmp_path / "x.parquet")
    Image.new("RGB", (70, 46)).save(tmp_path / "y.png")
    with pytest.raises(ValueError, match=r"holds images and Parquet files"):
        load_breakhis(tmp_path)


def test_a_table_without_images_is_refused(breakhis_tree, tmp_path):
    load_breakhis(breakhis_tree).select_columns(["label"]).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="no column 'image' of images, only label"):
        load_breakhis(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "zip", "gztar", "parquet", "url"])
def test_changed_files_never_give_old_rows(breakhis_tree, tmp_path, kind, archive_of, url_of):
    tree = shutil.copytree(breakhis_tree, tmp_path / "tree")
    changed = next(tree.rglob("SOB_B_F-14-1002-40-001.png"))

    def source():
        if kind == "folder":
            return tree
        if kind == "parquet":
            to_parquet(load_breakhis(tree), tmp_path / "parquet")
            return tmp_path / "parquet"
        if kind == "url":
            return url_of(Path(shutil.make_archive(archive_of / "changing", "zip", tree)).name)
        return shutil.make_archive(tmp_path / "packed", kind, tree)

    def shown():
        return next(row["image"].size for row in load_breakhis(source()) if row["filename"] == changed.name)

    assert shown() == (70, 46)
    Image.new("RGB", (140, 92)).save(changed)
    assert shown() == (140, 92)


def test_rows_of_older_code_are_not_taken(archive_of, monkeypatch):
    before = BreaKHis(source=archive_of / "b.zip")
    monkeypatch.setattr("magnification_invariant.data.breakhis_builder._code_digest", lambda: "other")
    assert BreaKHis(source=archive_of / "b.zip").cache_dir != before.cache_dir


def test_a_damaged_image_in_an_archive_is_named_or_skipped(breakhis_tree, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in breakhis_tree.rglob("*.png"):
            content = path.read_bytes()
            archive.writestr(path.name, content[:-50] if "2003-200" in path.name else content)
    for _ in range(2):  # also when the cache knows them
        with pytest.raises(ValueError, match=r"1 of 32 images.*\n.*SOB_M_MC-14-2003-200-001.png: not a readable"):
            load_breakhis(tmp_path / "x.zip", num_proc=2)
        with pytest.warns(UserWarning, match="1 of 32 images"):
            assert len(load_breakhis(tmp_path / "x.zip", on_error="skip")) == 31
    with pytest.raises(ValueError, match=r"2003-200-001.png: not a readable"):
        list(load_breakhis(tmp_path / "x.zip", streaming=True))
    with pytest.warns(UserWarning, match=r"2003-200-001.png: not a readable"):
        assert len(list(load_breakhis(tmp_path / "x.zip", on_error="skip", streaming=True))) == 31


def test_the_ductal_copy_is_left_out_of_streams(tmp_path):
    for code in ("DC", "LC"):
        Image.new("RGB", (70, 46)).save(tmp_path / f"SOB_M_{code}-14-13412-40-001.png")
    assert [row["subtype"] for row in load_breakhis(tmp_path, streaming=True)] == ["lobular_carcinoma"]
    assert len(list(load_breakhis(tmp_path, streaming=True, drop_duplicate_slide=False))) == 2


# What an archive must not do.

PNG = io.BytesIO()
Image.new("RGB", (70, 46)).save(PNG, "PNG")
NAME = "SOB_B_A-14-22549AB-40-001.png"


def tar_with(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode="w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def member(name: str) -> tarfile.TarInfo:
    return tarfile.TarInfo(name)


def linked(kind: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = member("link.png")
    info.type, info.linkname = kind, "/etc/passwd"
    return info, b""


GOOD = (member(NAME), PNG.getvalue())
BAD_TARS = {
    "traversal": ([(member("../../etc/x.png"), b"x")], "leads out of it"),
    "absolute": ([(member("/etc/x.png"), b"x")], "leads out of it"),
    "symbolic link": ([linked(tarfile.SYMTYPE)], "is a link or device"),
    "hard link": ([linked(tarfile.LNKTYPE)], "is a link or device"),
    "device": ([linked(tarfile.CHRTYPE)], "is a link or device"),
    "pipe": ([linked(tarfile.FIFOTYPE)], "is a link or device"),
    "large member": ([(member("zeros.bin"), bytes(archives.LIMIT + 1))], "no image has more than 64"),
    "many members": ([(member(f"{i}.bin"), bytes(2**20)) for i in range(70)], "inflates to more than 64"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("harm", BAD_TARS)
def test_a_tar_that_could_do_harm_is_refused(tmp_path, harm, streaming, monkeypatch):
    if not streaming:  # nothing is decoded before all has been looked at
        monkeypatch.setattr("magnification_invariant.data.breakhis_builder.raw_row", lambda *_: pytest.fail("decoded"))
    members, why = BAD_TARS[harm]
    path = tar_with(tmp_path / "b.tar.gz", GOOD, *members)
    with pytest.raises(ValueError, match=f"b.tar.gz is refused: .*{why}"):
        list(load_breakhis(path, streaming=streaming))


def test_a_header_that_claims_gigabytes_is_not_believed(tmp_path):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 2**33
    path = tmp_path / "b.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        for _ in range(140):
            file.write(bytes(2**20))
    with pytest.raises(ValueError, match="far beyond its own size"):
        load_breakhis(path)


BAD_ZIPS = {
    "traversal": ("../x.png", {}, "leads out of it"),
    "drive": ("C:\\x.png", {}, "leads out of it"),
    "windows traversal": ("a\\..\\..\\x.png", {}, "leads out of it"),
    "link": ("x.png", {"external_attr": 0o120777 << 16}, "is a link or device"),
}


@pytest.mark.parametrize("harm", BAD_ZIPS)
def test_a_zip_that_could_do_harm_is_refused(tmp_path, harm):
    name, about, why = BAD_ZIPS[harm]
    info = zipfile.ZipInfo(name)
    for key, value in about.items():
        setattr(info, key, value)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr(NAME, PNG.getvalue())
        archive.writestr(info, b"x")
    with pytest.raises(ValueError, match=f"b.zip is refused: .*{why}"):
        load_breakhis(tmp_path / "b.zip")


def test_a_zip_bomb_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("zeros.png", bytes(archives.LIMIT + 1))
    with pytest.raises(ValueError, match=r"refused: 'zeros.png' has 64 MiB"):
        load_breakhis(tmp_path / "b.zip")


@pytest.mark.parametrize("name", ["b.tar.gz", "b.zip", "b.tar"])
def test_a_cut_archive_is_an_error(archive_of, tmp_path, name):
    content = (archive_of / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{name} is not a whole .tar, .tar.gz or .zip archive"):
        load_breakhis(tmp_path / name)


def test_what_is_no_archive_or_holds_nothing(tmp_path):
    (tmp_path / "x.bin").write_bytes(os.urandom(5000))
    with pytest.raises(ValueError, match=r"x.bin is not a whole"):
        load_breakhis(tmp_path / "x.bin")
    path = tar_with(tmp_path / "y.tar.gz", (member("._" + NAME), b"x"), (member("__MACOSX/" + NAME), b"x"))
    with pytest.raises(FileNotFoundError, match="No image"):
        load_breakhis(path)
