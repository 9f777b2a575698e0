import multiprocessing
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from magnification_invariant.data import pixels as pixels_module
from magnification_invariant.data.breakhis import load_breakhis
from magnification_invariant.data.pixels import PixelCache, ViewCache, decoded_views
from magnification_invariant.data.views import show, tiles, view_mpp


def table(images, mpp=1.0):
    features = Features({"image": Image(), "mpp": Value("float64")})
    return Dataset.from_dict({"image": images, "mpp": [mpp] * len(images)}, features=features)


def picture(width, height, seed=0):
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_pixels_are_those_of_pillow(breakhis_tree, tmp_path):
    ds = load_breakhis(breakhis_tree)
    cache = PixelCache(ds, 23, folder=tmp_path)
    assert cache.pixels.shape == (32, 3, 23, 35)
    for i in (0, 17, 31):
        wanted = np.asarray(ds[i]["image"].convert("RGB").resize((35, 23), PILImage.Resampling.BILINEAR))
        assert np.array_equal(cache.pixels[i].permute(1, 2, 0).numpy(), wanted)
    assert np.allclose(cache.mpp, np.asarray(ds["mpp"]) * 46 / 23)


def test_nothing_is_enlarged_and_the_scale_follows(tmp_path):
    ds = table([picture(70, 46), picture(64, 40)], mpp=0.5)
    cache = PixelCache(ds, 100, folder=tmp_path)
    assert cache.pixels.shape == (2, 3, 40, 60)  # the smaller one as it is, cut to the width both have
    assert np.allclose(cache.mpp, [0.5 * 46 / 40, 0.5])
    assert np.array_equal(cache.pixels[1].permute(1, 2, 0).numpy(), np.asarray(ds[1]["image"])[:, 2:62])


def test_portrait_and_rotated_images_keep_their_aspect(tmp_path):
    exif = PILImage.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    turned = tmp_path / "turned.jpg"
    picture(60, 40).save(turned, exif=exif)
    cache = PixelCache(table([str(turned)]), 40, folder=tmp_path)
    assert cache.pixels.shape == (1, 3, 60, 40)


def test_is_built_once_and_again_when_a_file_changes(tmp_path):
    path = tmp_path / "a.png"
    picture(30, 20).save(path)
    first = PixelCache(table([str(path)]), 20, folder=tmp_path / "cache")
    built = (first.folder / "pixels.npy").stat().st_mtime_ns
    again = PixelCache(table([str(path)]), 20, folder=tmp_path / "cache")
    assert again.folder == first.folder and (again.folder / "pixels.npy").stat().st_mtime_ns == built
    picture(30, 20, seed=1).save(path)
    changed = PixelCache(table([str(path)]), 20, folder=tmp_path / "cache")
    assert changed.folder != first.folder
    assert np.array_equal(changed.pixels[0].permute(1, 2, 0).numpy(), np.asarray(picture(30, 20, seed=1)))


def test_an_unreadable_image_is_named_and_nothing_is_left(tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    picture(30, 20).save(good)
    bad.write_bytes(good.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"bad\.png"):
        PixelCache(table([str(good), str(bad)]), 10, folder=tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix not in (".lock", ".tmp")]
    picture(30, 20).save(bad)
    assert len(PixelCache(table([str(good), str(bad)]), 10, folder=tmp_path / "cache")) == 2


def test_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        PixelCache(table([]), 10, folder=tmp_path)
    with pytest.raises(ValueError, match="no column 'picture'"):
        PixelCache(table([picture(30, 20)]), 10, image_column="picture", folder=tmp_path)


def test_no_room_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("magnification_invariant.data.pixels.shutil.disk_usage", lambda _: _Usage())
    with pytest.raises(OSError, match="MAGDG_CACHE"):
        PixelCache(table([picture(30, 20)]), 10, folder=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.tmp"))


class _Usage:
    free = 100


def _build(folder, path, queue):
    queue.put(PixelCache(table([path] * 50), 20, folder=folder).pixels.sum().item())


def test_two_processes_share_one_cache(tmp_path):
    path = tmp_path / "a.png"
    picture(300, 200).save(path)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_build, args=(tmp_path / "cache", str(path), queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    sums = {queue.get(timeout=300) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(sums) == 1
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1


def test_views_are_those_of_the_road_for_every_shape(tmp_path):
    """Mixed sizes and aspect ratios: each image has the tiles of its own protocol view, and its scale."""
    images = [picture(70, 46), picture(40, 100, 1), picture(30, 28, 2), picture(32, 32, 3)]
    cache = ViewCache(table(images, mpp=0.5), 32, folder=tmp_path)
    for i, (image, pieces) in enumerate(zip(images, cache.views(np.arange(4)), strict=True)):
        mpp = float(view_mpp("protocol", 0.5, min(image.size), 32))
        view = show(image, 0.5, mpp, 32)
        assert np.array_equal(pieces, tiles(view.pixels, 32))
        assert cache.mpp[i] == mpp and cache.filled[i] == pytest.approx(view.filled)
    assert np.diff(cache.starts).tolist() == [2, 3, 1, 1] and cache.filled[2] == pytest.approx(1 - 30 * 28 / 32**2)
    decoded = list(decoded_views(table(images, mpp=0.5), np.array([2, 0]), np.array([0.5, 0.5]), 32))
    assert np.array_equal(decoded[0].tiles, next(cache.views([2]))) and len(decoded[1].tiles) == 6


def files_of(cache):
    return cache.folder / "pixels.npy", cache.folder / "rows.npy"


@pytest.fixture
def many(tmp_path):
    """A table of 30 files, and the pixels that its cache must have."""
    for i in range(30):
        picture(30, 20, seed=i).save(tmp_path / f"{i}.png")
    ds = table([str(tmp_path / f"{i}.png") for i in range(30)])
    return ds, np.stack([np.asarray(picture(30, 20, seed=i)).transpose(2, 0, 1) for i in range(30)])


def count_decoded(monkeypatch):
    decoded, decode = [], pixels_module._decoded

    def counting(encoded, *arguments):
        decoded.append(encoded[0])
        return decode(encoded, *arguments)

    monkeypatch.setattr(pixels_module, "_decoded", counting)
    return decoded


def test_a_cut_build_goes_on(many, tmp_path, monkeypatch):
    ds, wanted = many
    decode = pixels_module._decoded

    def interrupted(encoded, *arguments):
        if encoded[0].endswith(("/20.png", "/25.png")):
            raise KeyboardInterrupt
        return decode(encoded, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pixels_module, "_decoded", interrupted)
        PixelCache(ds, 20, folder=tmp_path / "cache")
    unfinished = next((tmp_path / "cache").glob("*.tmp"))
    done = np.load(unfinished / "rows.npy")[:, 0] != 0
    assert 0 < done.sum() < 30
    # What the disk has lost of it since is not taken for done.
    lost = int(np.flatnonzero(done)[3])
    np.load(unfinished / "pixels.npy", mmap_mode="r+")[lost, 0, 0, 0] ^= 1

    decoded = count_decoded(monkeypatch)
    cache = PixelCache(ds, 20, folder=tmp_path / "cache")
    assert len(decoded) == 30 - done.sum() + 1
    assert np.array_equal(cache.pixels.numpy(), wanted) and not unfinished.exists()


def test_a_killed_build_goes_on(many, tmp_path):
    """A kill leaves no time to tidy up."""
    ds, wanted = many
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=_die_at_row_20, args=(tmp_path / "cache", ds))
    worker.start()
    worker.join(timeout=300)
    assert worker.exitcode == 9
    assert list((tmp_path / "cache").glob("*.tmp"))
    assert np.array_equal(PixelCache(ds, 20, folder=tmp_path / "cache").pixels.numpy(), wanted)


def _die_at_row_20(folder, ds):
    decode = pixels_module._decoded
    pixels_module._decoded = lambda e, *a: os._exit(9) if e[0].endswith("/20.png") else decode(e, *a)
    PixelCache(ds, 20, folder=folder)


def flip_pixel(pixels, rows):
    np.load(pixels, mmap_mode="r+")[7, 1, 2, 3] ^= 4


def wrong_side(pixels, rows):
    np.load(rows, mmap_mode="r+")[7, 1] += 1


HARMS = {
    "pixel": (flip_pixel, 1),
    "size": (wrong_side, 1),
    "cut": (lambda pixels, rows: os.truncate(pixels, 5000), 28),
    "empty": (lambda pixels, rows: os.truncate(rows, 0), 30),
    "header": (lambda pixels, rows: pixels.write_bytes(b"\x93NUMPY\x01\x00v\x00{'" + bytes(1000)), 30),
    "lost": (lambda pixels, rows: rows.unlink(), 30),
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_the_disk_lost_is_noticed_and_decoded_again(many, tmp_path, monkeypatch, harm):
    ds, wanted = many
    do, n = HARMS[harm]
    do(*files_of(PixelCache(ds, 20, folder=tmp_path / "cache")))
    decoded = count_decoded(monkeypatch)
    with pytest.warns(UserWarning, match="is damaged") as warned:
        cache = PixelCache(ds, 20, folder=tmp_path / "cache")
    assert len(decoded) == n
    assert Path(warned[0].filename) == Path(__file__)
    assert np.array_equal(cache.pixels.numpy(), wanted) and np.allclose(cache.mpp, 1.0)
    decoded.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PixelCache(ds, 20, folder=tmp_path / "cache")
    assert not decoded


def test_the_size_is_said_before_it_starts(many, tmp_path, caplog):
    ds, _ = many
    with caplog.at_level("INFO", logger="magnification_invariant"):
        PixelCache(ds, 10, folder=tmp_path / "cache")
    assert "decoding 30 images to 15x10 (0 MB)" in caplog.text


def test_images_in_the_table_are_cached_like_files(many, tmp_path):
    ds, wanted = many
    embedded = table(
        [{"path": f"{i}.png", "bytes": Path(ds.data["image"][i].as_py()["path"]).read_bytes()} for i in range(30)]
    )
    cache = PixelCache(embedded, 20, folder=tmp_path / "cache")
    assert np.array_equal(cache.pixels.numpy(), wanted)
    assert PixelCache(embedded, 20, folder=tmp_path / "cache").folder == cache.folder
