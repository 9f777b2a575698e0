import multiprocessing

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from magnification_invariant.data.breakhis import load_breakhis
from magnification_invariant.data.pixels import PixelCache


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
    sums = {queue.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(sums) == 1
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1
