"""BreaKHis from wherever it lies: the same rows and pixels, never stale ones, and no archive that does harm."""

import gzip
import http.server
import io
import os
import shutil
import struct
import tarfile
import threading
import tracemalloc
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets.table import embed_table_storage
from PIL import Image

from magnification_invariant.data.archives import LIMIT
from magnification_invariant.data.breakhis import load_breakhis
from magnification_invariant.data.images import image_files
from magnification_invariant.files import cache_root


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
    assert len(ds) == len(expected)
    for row, wanted in zip(ds, expected, strict=True):
        assert np.array_equal(np.asarray(row.pop("image")), np.asarray(wanted.pop("image")))
        assert row == wanted


@pytest.mark.parametrize("name", ["b.tar.gz", "b.tar", "b.zip"])
def test_an_archive_is_the_folder(archive_of, breakhis_tree, name):
    assert_same(load_breakhis(archive_of / name), load_breakhis(breakhis_tree))


@pytest.mark.parametrize("name", ["b.tar.gz", "b.zip"])
def test_a_url_is_the_folder(url_of, breakhis_tree, name):
    assert_same(load_breakhis(url_of(name)), load_breakhis(breakhis_tree))


def test_a_url_that_is_not_there(url_of):
    with pytest.raises(FileNotFoundError, match=r"nothing\.zip"):
        load_breakhis(url_of("nothing.zip"))


def with_images(ds):
    """The table with the files themselves in it, as `push_to_hub` sends it."""
    return ds.with_format("arrow").map(embed_table_storage, batched=True).with_format(None)


def test_parquet_is_the_folder(breakhis_tree, tmp_path):
    ds = load_breakhis(breakhis_tree).add_column("rescaled", [False, True] * 16)  # which is not forgotten
    parts = [tmp_path / f"{i}.parquet" for i in range(2)]
    for i, part in enumerate(parts):
        with_images(ds).shard(2, i).to_parquet(part)
    assert_same(load_breakhis(tmp_path), ds)
    assert_same(load_breakhis(parts[0]), ds.shard(2, 0))
    parts[0].write_bytes(parts[0].read_bytes()[:-100])
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_breakhis(tmp_path)


def test_a_mirror_with_nothing_but_named_images_is_the_folder(breakhis_tree, tmp_path):
    ds = load_breakhis(breakhis_tree)
    images = [{"path": name, "bytes": next(breakhis_tree.rglob(name)).read_bytes()} for name in ds["filename"]]
    mirror = datasets.Dataset.from_dict({"image": images[::-1]}, datasets.Features(image=datasets.Image()))
    mirror.to_parquet(tmp_path / "mirror.parquet")
    assert_same(load_breakhis(tmp_path), ds)


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
            with_images(load_breakhis(tree)).to_parquet(tmp_path / "b.parquet")
            return tmp_path / "b.parquet"
        if kind == "url":
            return url_of(Path(shutil.make_archive(archive_of / "changing", "zip", tree)).name)
        return shutil.make_archive(tmp_path / "packed", kind, tree)

    def shown():
        return next(row["image"].size for row in load_breakhis(source()) if row["filename"] == changed.name)

    assert shown() == (70, 46)
    Image.new("RGB", (140, 92)).save(changed)
    assert shown() == (140, 92)


def test_an_unpacking_that_was_cut_is_made_again(archive_of, breakhis_tree, tmp_path, monkeypatch):
    """A process that died while it unpacked leaves nothing that is taken for the data set."""
    path = Path(shutil.copy(archive_of / "b.zip", tmp_path))
    extractall = zipfile.ZipFile.extractall

    def cut(self, folder, members):
        extractall(self, folder, list(members)[:5])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", cut)
        with pytest.raises(KeyboardInterrupt):
            load_breakhis(path)
    assert_same(load_breakhis(path), load_breakhis(breakhis_tree))


def test_a_damaged_image_in_an_archive_is_named_or_skipped(breakhis_tree, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in breakhis_tree.rglob("*.png"):
            content = path.read_bytes()
            archive.writestr(path.name, content[:-50] if "2003-200" in path.name else content)
    for _ in range(2):  # also when the cache knows them
        with pytest.raises(
            ValueError, match=r"1 of 32 images below .*x.zip.*\n  SOB_M_MC-14-2003-200-001.png: not a read"
        ):
            load_breakhis(tmp_path / "x.zip")
        with pytest.warns(UserWarning, match="1 of 32 images"):
            assert len(load_breakhis(tmp_path / "x.zip", on_error="skip")) == 31


# What counts as an image file.


def test_image_files_are_regular_visible_and_found_once(tmp_path):
    wanted = ["a/b.PNG", "a/f\udce4.jpg", "z.tif"]
    others = [".hidden/x.png", "a/._b.png", "__MACOSX/a/b.png", "a/.b.png", "notes.txt", "a/png"]
    for name in wanted + others:
        path = tmp_path / "top" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "top" / "a" / "loop").symlink_to(tmp_path / "top")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.webp").touch()
    (tmp_path / "top" / "linked").symlink_to(tmp_path / "elsewhere")
    expected = sorted(tmp_path / "top" / name for name in [*wanted, "linked/c.webp"])
    assert image_files(tmp_path / "top") == expected
    os.mkfifo(tmp_path / "top" / "pipe.png")
    (tmp_path / "top" / "nowhere.png").symlink_to(tmp_path / "absent")
    with pytest.warns(UserWarning, match=r"2 of 6 images below .*nowhere\.png: not a file"):
        assert image_files(str(tmp_path / "top")) == expected


# What an archive must not do.

PNG = io.BytesIO()
Image.new("RGB", (70, 46)).save(PNG, "PNG")
NAME = "SOB_B_A-14-22549AB-40-001.png"


@pytest.fixture
def nothing_unpacked():
    """Refused before anything is written: no folder of an archive is left, whole or not."""
    folder = cache_root() / "archives"
    before = {path for path in folder.glob("*") if path.is_dir()}
    yield
    assert {path for path in folder.glob("*") if path.is_dir()} == before


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
    "large member": ([(member("zeros.bin"), bytes(LIMIT + 1))], "no image has more than 64"),
    "many members": ([(member(f"{i}.bin"), bytes(2**20)) for i in range(70)], "inflates to more than 64"),
}


@pytest.mark.parametrize("harm", BAD_TARS)
def test_a_tar_that_could_do_harm_is_refused(tmp_path, harm, monkeypatch, nothing_unpacked):
    monkeypatch.setattr("datasets.DownloadManager.extract", lambda *_: pytest.fail("unpacked"))
    members, why = BAD_TARS[harm]
    path = tar_with(tmp_path / "b.tar.gz", GOOD, *members)
    with pytest.raises(ValueError, match=f"b.tar.gz is refused: .*{why}"):
        load_breakhis(path)


def test_a_header_that_claims_gigabytes_is_not_believed(tmp_path):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 2**33
    path = tmp_path / "b.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        for _ in range(140):
            file.write(bytes(2**20))
    with pytest.raises(ValueError, match=r"damaged .*a header of 8,589,934,592 bytes"):
        load_breakhis(path)


def test_what_follows_the_end_of_a_tar_is_not_inflated_for_ever(tmp_path):
    with gzip.open(tar_with(tmp_path / "b.tar.gz", GOOD), "ab", compresslevel=1) as file:
        for _ in range(140):
            file.write(bytes(2**20))
    with pytest.raises(ValueError, match="far beyond its own size"):
        load_breakhis(tmp_path / "b.tar.gz")


def test_a_bit_that_is_flipped_in_a_tar_gz_is_found(archive_of, tmp_path):
    """In the pixels of an image, where neither tar nor PNG's decoder (of a stored block) need see it."""
    content = gzip.decompress((archive_of / "b.tar.gz").read_bytes())
    stored = gzip.compress(content, compresslevel=0)  # every byte as it is: only the checksum knows
    at = stored.index(b"IDAT") + 100
    damaged = stored[:at] + bytes([stored[at] ^ 4]) + stored[at + 1 :]
    for bits, name in ((damaged, "one.tar.gz"), (stored[:-8] + bytes(4) + stored[-4:], "sum.tar.gz")):
        (tmp_path / name).write_bytes(bits)
        with pytest.raises(ValueError, match=rf"{name} is damaged \(checksum\), download it again"):
            load_breakhis(tmp_path / name)


def test_a_damaged_header_does_not_end_a_tar_without_a_word(archive_of, tmp_path):
    content = bytearray((archive_of / "b.tar").read_bytes())
    content[content.rindex(b"SOB_") + 2] ^= 1
    (tmp_path / "b.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"b\.tar is damaged"):
        load_breakhis(tmp_path / "b.tar")


BAD_ZIPS = {
    "traversal": ("../x.png", {}, "leads out of it"),
    "drive": ("C:\\x.png", {}, "leads out of it"),
    "windows traversal": ("a\\..\\..\\x.png", {}, "leads out of it"),
    "link": ("x.png", {"external_attr": 0o120777 << 16}, "is a link or device"),
    "backslashes": ("BreaKHis_v1\\40X\\x.png", {}, "has backslashes.*: unpack it"),
}


@pytest.mark.parametrize("harm", BAD_ZIPS)
def test_a_zip_that_could_do_harm_is_refused(tmp_path, harm, nothing_unpacked):
    name, about, why = BAD_ZIPS[harm]
    info = zipfile.ZipInfo(name)
    for key, value in about.items():
        setattr(info, key, value)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr(NAME, PNG.getvalue())
        archive.writestr(info, b"x")
    with pytest.raises(ValueError, match=f"b.zip is refused: .*{why}"):
        load_breakhis(tmp_path / "b.zip")


def test_a_zip_bomb_is_refused(tmp_path, nothing_unpacked):
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("zeros.png", bytes(LIMIT + 1))
    with pytest.raises(ValueError, match=r"refused: 'zeros.png' has 64 MiB"):
        load_breakhis(tmp_path / "b.zip")


@pytest.mark.parametrize("claimed, why", [(1000, "is larger than the 1,000 bytes"), (150_000, r"damaged \(checksum\)")])
def test_a_zip_that_lies_about_a_size_is_refused_before_memory_is_spent(tmp_path, claimed, why, nothing_unpacked):
    """100 MiB of zeros that say to be less, in both headers."""
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(NAME, bytes(100 * 2**20))
    content = bytearray((tmp_path / "b.zip").read_bytes())
    for mark, at in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        start = content.rfind(mark) + at
        content[start : start + 4] = struct.pack("<I", claimed)
    (tmp_path / "b.zip").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=why):
        load_breakhis(tmp_path / "b.zip")
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["b.tar.gz", "b.zip", "b.tar"])
def test_a_cut_archive_is_an_error(archive_of, tmp_path, name):
    content = (archive_of / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{name} is damaged .*download it again"):
        load_breakhis(tmp_path / name)


def test_what_is_no_archive_or_holds_nothing(tmp_path):
    (tmp_path / "x.bin").write_bytes(os.urandom(5000))
    with pytest.raises(ValueError, match=r"x.bin is damaged .not a whole .tar, .tar.gz or .zip archive"):
        load_breakhis(tmp_path / "x.bin")
    path = tar_with(tmp_path / "y.tar.gz", (member("._" + NAME), b"x"), (member("__MACOSX/" + NAME), b"x"))
    with pytest.raises(FileNotFoundError, match="No image"):
        load_breakhis(path)
