"""Whole slides: tiles are images like others, where they lie, what is tissue, a cut run, and a large one."""

import csv
import json
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from magdg import main
from magnification_invariant import metrics
from magnification_invariant.data.slides import Slide, find_tissue, tissue_shares
from magnification_invariant.models.magdg import PACKAGED
from magnification_invariant.predict import Classifier, slides
from magnification_invariant.virtual_slides import render_field, virtual_field, virtual_optics, virtual_patient

pytest.importorskip("openslide")

MPP = 0.25
WHITE = 243
BENIGN, MALIGNANT = (next(n for n in (400, 401) if virtual_patient(n).label == label) for label in (0, 1))
PLACES = {BENIGN: (210, 310), MALIGNANT: (1105, 310)}  # (x, y) of their tissue, of WIDTH x HEIGHT pixels
WIDTH, HEIGHT = 640, 900


def write_slide(path, pixels, mpp=MPP, levels=3):
    """A pyramid as OpenSlide's generic-tiff reads it, every level half of the one before; without loss."""
    unit = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    written = []
    with tifffile.TiffWriter(path) as tif:
        for k in range(levels):
            kind = {"tile": (256, 256), "photometric": "rgb", "subfiletype": int(k > 0)}
            tif.write(pixels, **kind, **(unit if k == 0 else {}), metadata=None)
            written.append(pixels)
            pixels = np.asarray(Image.fromarray(pixels).reduce(2))
    return written


def drawn(size=(2000, 1500)):
    pixels = np.full((size[1], size[0], 3), WHITE, np.uint8)
    for number, (x, y) in PLACES.items():
        field = render_field(number, MPP, virtual_field(number, 100, 0), (WIDTH, HEIGHT))
        pixels[y : y + HEIGHT, x : x + WIDTH] = field
    return pixels


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A slide of a benign and a malignant piece of tissue: its path, and the pixels of its levels."""
    path = tmp_path_factory.mktemp("slides") / "two.tif"
    return path, write_slide(path, drawn())


@pytest.fixture(scope="module")
def classifier(tiny_model):
    return Classifier.from_pretrained(tiny_model, device="cpu")


def tiles_of(folder):
    return pq.read_table(folder / "tiles.parquet").to_pylist()


def table_of(out):
    with open(out / "slides.csv", newline="") as file:
        return {Path(row["slide"]).stem: row for row in csv.DictReader(file)}


def data_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("at", "level", "side"), [(None, 0, 102), (0.7, 1, 90), (0.1, 0, 64), (1.0, 2, 64)])
def test_a_tile_is_predicted_as_an_image_of_its_pixels(classifier, two, tmp_path, at, level, side):
    path, levels = two
    row = classifier.predict_slide(path, tmp_path, at=at)
    tiles, native = tiles_of(tmp_path / "two"), MPP * 2**level
    assert row["tiles"] == len(tiles) and row["mpp"] == pytest.approx(MPP)
    assert row["at"] == pytest.approx(native * side / 64) and abs(row["at"] / max(at or 0.4, MPP) - 1) < 0.01
    assert {tile["width"] for tile in tiles} == {side * 2**level}
    for tile in tiles[:: max(1, len(tiles) // 7)]:
        assert tile["mpp"] == pytest.approx(row["at"])
        x, y = tile["x"] >> level, tile["y"] >> level
        Image.fromarray(levels[level][y : y + side, x : x + side]).save(tmp_path / "tile.png")
        (alone,) = classifier.predict(tmp_path / "tile.png", native, view=row["at"])
        assert alone["tiles"] == 1 and alone["filled"] == 0
        assert tile["probability"] == pytest.approx(alone["probability"], abs=1e-5)
        assert tile["signature"] == pytest.approx(alone["signature"], rel=1e-4, abs=1e-5)
    mean = np.mean([tile["logits"] for tile in tiles], 0)
    assert row["probability"] == pytest.approx(metrics.apply_temperature(mean[None], 1.5)[0, 1])


def test_tiles_lie_on_the_tissue_and_nowhere_else(classifier, two, tmp_path):
    path, _ = two
    row = classifier.predict_slide(path, tmp_path)
    tiles = tiles_of(tmp_path / "two")
    area = 2 * WIDTH * HEIGHT
    assert row["tissue"] == pytest.approx(area / (2000 * 1500), rel=0.1)
    assert sum(tile["width"] ** 2 for tile in tiles) == pytest.approx(area, rel=0.15)
    known = {}  # share of tissue, by place in the grid of tiles of 102 pixels
    for x, y in np.ndindex(2000 // 102, 1500 // 102):
        ends = [[(a, a + n, 102 * k) for a, n, k in ((p[0], WIDTH, x), (p[1], HEIGHT, y))] for p in PLACES.values()]
        parts = [[max(0, min(high, at + 102) - max(low, at)) for low, high, at in both] for both in ends]
        known[102 * x, 102 * y] = sum(w * h for w, h in parts) / 102**2
    shares = {(tile["x"], tile["y"]): tile["tissue"] for tile in tiles}
    assert min(shares.values()) >= 0.5 and min(known[place] for place in shares) > 0.25  # the edge is not sharp
    assert all(place in shares for place, share in known.items() if share > 0.75)
    corners = [(tile["x"], tile["y"]) for tile in tiles]
    assert len(set(corners)) == len(corners)
    assert all(x % tiles[0]["width"] == 0 and y % tiles[0]["width"] == 0 for x, y in corners)
    classifier.predict_slide(path, tmp_path / "all", least_tissue=0)
    assert len(tiles_of(tmp_path / "all/two")) == (2000 // 102) * (1500 // 102)


def test_what_tissue_is():
    rng = np.random.default_rng(0)
    glass = rng.integers(236, 246, (120, 100, 1)) + rng.integers(-3, 4, (120, 100, 3))
    assert not find_tissue(glass.astype(np.uint8), 8.0).any()
    picture = glass.copy()
    picture[20:80, 20:80] = np.array((225, 190, 215)) + rng.integers(-3, 4, (60, 60, 3))  # pale
    picture[90:110, 20:80] = (20, 20, 22)  # ink
    picture[5:10, 5:10] = (120, 60, 140)  # dust
    picture[40:50, 40:50] = 240  # a lumen
    fine, coarse = (find_tissue(picture.astype(np.uint8), mpp) for mpp in (8.0, 20.0))
    assert fine[22:78, 22:78].all()  # the lumen of 80 um is filled
    fine[17:83, 17:83] = False  # an edge is known to half the square that colour is averaged over
    assert not fine.any()
    assert coarse[21:79, 21:79].sum() == pytest.approx(58**2 - 10**2, abs=25)  # one of 200 um is not tissue
    assert not coarse[42:48, 42:48].any() and not coarse[85:].any() and not coarse[:15, :15].any()
    full = rng.integers(100, 230, (50, 50, 1)) + np.array([20, -40, 20])
    assert find_tissue(full.astype(np.uint8), 8.0).all()


def test_shares_are_exact_means_over_areas(two):
    with Slide(two[0]) as opened:
        grid = opened.grid(0.4, 64)
    mask = np.random.default_rng(1).random((1500, 2000)) < 0.3
    shares = tissue_shares(mask, grid, (2000, 1500))
    assert shares.shape == (14, 19)
    assert shares[3, 5] == pytest.approx(mask[306:408, 510:612].mean(), abs=1e-5)


def test_files_of_a_slide(classifier, two, tmp_path):
    path, _ = two
    row = classifier.predict_slide(path, tmp_path)
    tiles, folder = tiles_of(tmp_path / "two"), tmp_path / "two"
    collection = json.loads((folder / "tiles.geojson").read_text())
    assert collection["type"] == "FeatureCollection" and len(collection["features"]) == len(tiles)
    for tile, feature in zip(tiles, collection["features"], strict=True):
        x, y, w = tile["x"], tile["y"], tile["width"]
        (ring,) = feature["geometry"]["coordinates"]
        assert ring == [[x, y], [x + w, y], [x + w, y + w], [x, y + w], [x, y]]
        about = feature["properties"]
        assert about["measurements"] == {"probability": tile["probability"]}
        assert about["classification"]["name"] == tile["prediction"] and len(about["classification"]["color"]) == 3
    with Image.open(folder / "heatmap.png") as heatmap:
        assert min(heatmap.size) > 400 and heatmap.convert("HSV").getextrema()[1][1] > 100
    with open(tmp_path / "slides.csv", newline="") as file:
        (line,) = csv.DictReader(file)
    assert list(line) == list(slides.ROW) and line["error"] == ""
    assert float(line["probability"]) == row["probability"] and line["slide"] == str(path)


def test_embeddings_are_as_trident_names_them(classifier, two, tmp_path):
    h5py = pytest.importorskip("h5py")
    classifier.predict_slide(two[0], tmp_path)
    tiles = tiles_of(tmp_path / "two")
    with h5py.File(tmp_path / "two/embeddings.h5") as file:
        assert file["coords"][()].tolist() == [[tile["x"], tile["y"]] for tile in tiles]
        assert file["coords"].attrs["patch_size_level0"] == 102 and file["coords"].attrs["patch_size"] == 64
        features = file["features"][()]
    assert features.shape == (len(tiles), classifier.network.model.num_features)
    signature = classifier.projector.transform(features)
    np.testing.assert_allclose(signature, [tile["signature"] for tile in tiles], rtol=1e-4, atol=1e-5)


def test_a_cut_run_ends_as_one_that_was_not(classifier, two, tmp_path, monkeypatch):
    monkeypatch.setattr(slides, "SHARD", 20)
    path, _ = two
    classifier.predict_slide(path, tmp_path / "whole")
    iterate, seen = Classifier.iterate, []

    def cut(self, items, **options):
        for row in iterate(self, items, **options):
            seen.append(row)
            if len(seen) == 50:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(Classifier, "iterate", cut)
    with pytest.raises(KeyboardInterrupt):
        classifier.predict_slide(path, tmp_path / "cut")
    assert not (tmp_path / "cut/two/tiles.parquet").exists()
    row = classifier.predict_slide(path, tmp_path / "cut")
    assert len(seen) == row["tiles"] + 10  # two shards of twenty were whole
    whole, again = data_of(tmp_path / "whole/two"), data_of(tmp_path / "cut/two")
    assert whole == again and whole.keys() >= {"tiles.parquet", "tiles.geojson", "heatmap.png", "slide.json"}
    assert not list((tmp_path / "cut/two").glob("parts"))
    assert classifier.predict_slide(path, tmp_path / "cut") == row and len(seen) == row["tiles"] + 10  # is skipped
    assert classifier.predict_slide(path, tmp_path / "cut", at=0.5)["tiles"] < row["tiles"]  # other settings are not


def test_one_bad_slide_does_not_stop_the_others(tiny_model, two, tmp_path, capsys):
    folder = tmp_path / "slides"
    folder.mkdir()
    (folder / "good.tif").write_bytes(two[0].read_bytes())
    (folder / "cut.tif").write_bytes(two[0].read_bytes()[:200_000])
    write_slide(folder / "blank.tif", np.full((1000, 1000, 3), WHITE, np.uint8))
    write_slide(folder / "unknown.tif", np.full((600, 600, 3), WHITE, np.uint8), mpp=None)
    write_slide(folder / "wrong.tif", np.full((600, 600, 3), WHITE, np.uint8), mpp=352.8)
    write_slide(folder / "tiny.tif", np.full((60, 600, 3), WHITE, np.uint8), levels=1)
    Image.new("RGB", (90, 90)).save(folder / "image.tif")
    out = tmp_path / "out"
    command = ["predict", str(folder), "--model", str(tiny_model), "--out", str(out)]
    assert main(command) == 1
    printed = capsys.readouterr().out
    assert f"wrote {out}/slides.csv: a row for every slide in {out}" in printed
    rows = table_of(out)
    assert len(rows) == 7
    assert 0 < float(rows["good"]["probability"]) < 1 and not rows["good"]["error"]
    wanted = {
        "blank": "no tissue: 0.0% of the slide look like it",
        "unknown": "its scale is not known: the slide does not state it; pass mpp",
        "wrong": "coarser than any microscope's",
        "tiny": "the slide is too small",
        "image": "it is no slide that OpenSlide reads; images are predicted into a file",
    }
    for name, message in wanted.items():
        assert message in rows[name]["error"] and rows[name]["probability"] == "", name
    assert rows["cut"]["error"]
    assert main([*command[:1], str(folder / "good.tif"), *command[2:], "--mpp", "0.5", "--at", "0.8"]) == 0
    assert "tiles at 0.797 um/px" in capsys.readouterr().out
    assert float(json.loads((out / "good/slide.json").read_text())["mpp"]) == 0.5


def test_the_table_grows_and_what_fails_leaves_no_tiles(classifier, two, tmp_path):
    other, out = tmp_path / "other.tif", tmp_path / "out"
    other.write_bytes(two[0].read_bytes())
    first = classifier.predict_slide(two[0], out)
    (row,) = slides.predict_slides(classifier, [other], out)  # the rows of this command
    table = table_of(out)  # of all
    assert row["slide"] == str(other) and set(table) == {"two", "other"}
    assert float(table["two"]["probability"]) == first["probability"] == float(table["other"]["probability"])
    before = data_of(out / "two")
    other.write_bytes(other.read_bytes()[:200_000])
    (row,) = slides.predict_slides(classifier, [other], out)
    table = table_of(out)
    assert row["error"] and table["other"]["error"] == row["error"] and table["other"]["probability"] == ""
    assert set(data_of(out / "other")) == {"slide.json"}
    assert not table["two"]["error"] and data_of(out / "two") == before
    other.write_bytes(two[0].read_bytes())
    slides.predict_slides(classifier, [other], out)
    assert set(data_of(out / "other")) == set(before) and not table_of(out)["other"]["error"]


def test_processes_share_the_slides(classifier, two, tmp_path):
    other = tmp_path / "other.tif"
    other.write_bytes(two[0].read_bytes())
    share = {"out": tmp_path / "out", "processes": 2}
    assert slides.predict_slides(classifier, [two[0], other], process=1, **share) is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["other"]
    one, two_ = slides.predict_slides(classifier, [two[0], other, other], process=0, **share)
    assert one | {"slide": None} == two_ | {"slide": None} and one["slide"] == str(two[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--mpp": "40"}, "if you mean a magnification of 40"),
        ({"--at": "0"}, "positive finite number"),
        ({"--tissue": "2"}, "least share of tissue must lie in [0, 1]"),
        ({"--view": "protocol"}, "--at for --view"),
        ({"path": "nowhere.svs"}, "no file, no pattern"),
        ({"path": "x.svs", "--out": "o.csv"}, "x.svs is a whole slide: name a folder to write to"),
    ],
)
def test_bad_arguments_are_an_error_in_one_line(tiny_model, two, tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    Path("x.svs").touch()
    arguments = {"path": str(two[0]), "--model": str(tiny_model), "--out": "out"} | changes
    path = arguments.pop("path")
    assert main(["predict", path, *(each for pair in arguments.items() for each in pair)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("magdg: error: ") and message in error and "Traceback" not in error


def test_what_is_missing_is_said(classifier, tiny_model, two, tmp_path, capsys, monkeypatch):
    other = tmp_path / "two.svs"
    other.touch()
    with pytest.raises(ValueError, match="two slides are called two"):
        slides.predict_slides(classifier, [two[0], other], tmp_path / "out")
    classifier = Classifier.from_pretrained(tiny_model, device="cpu")
    classifier.base_range = None
    with pytest.raises(ValueError, match="the model knows no scale"):
        classifier.predict_slide(two[0], tmp_path / "out")
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'magnification-invariant\[wsi\]'"):
        classifier.predict_slide(two[0], tmp_path / "out")
    assert main(["predict", str(two[0]), "--model", str(tiny_model), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("pip install 'magnification-invariant[wsi]'") == 1


def test_images_at_any_scale(classifier, tiny_model, tmp_path):
    Image.fromarray(drawn()[300:700, 200:700]).save(tmp_path / "image.png")
    command = ["predict", str(tmp_path / "image.png"), "--model", str(tiny_model), "--mpp", "0.25"]
    assert main([*command, "--at", "0.6", "--out", str(tmp_path / "o.parquet")]) == 0
    (row,) = pq.read_table(tmp_path / "o.parquet").to_pylist()
    assert row["mpp"] == 0.6 and row["probability"] == pytest.approx(
        classifier.predict(tmp_path / "image.png", 0.25, view=0.6)[0]["probability"], abs=1e-6
    )


BLOCK = 2048
LARGE = (10, 8)  # blocks: 20,480 x 16,384 pixels


def write_large_slide(path):
    """Twelve patients, benign on the left, malignant on the right, each on four blocks; glass around them.

    Every patient is drawn once, and written tile by tile: the slide is never in memory.

    Returns:
        Label of every block (rows, columns), -1 where there is glass.
    """
    glass = np.full((BLOCK, BLOCK, 3), WHITE, np.uint8)
    number = np.full(LARGE[::-1], -1)
    label = np.full(LARGE[::-1], -1)
    for side in (0, 1):
        patients = [n for n in range(400, 412) if virtual_patient(n).label == side]
        for i, (row, column) in enumerate(np.ndindex(6, 4)):
            number[1 + row, 1 + 4 * side + column] = patients[i // 4]
            label[1 + row, 1 + 4 * side + column] = side
    drawn = {-1: glass}
    for n in set(number.ravel().tolist()) - {-1}:
        optics = virtual_optics(0, n, 100, 0, 1)
        drawn[n] = render_field(n, MPP, virtual_field(n, 100, 0), (BLOCK, BLOCK), optics)
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        for k, factor in enumerate((1, 4, 16)):
            side = BLOCK // factor
            tile = min(256, side)
            small = {n: np.asarray(Image.fromarray(each).reduce(factor)) for n, each in drawn.items()}
            corners = list(np.ndindex(side // tile, side // tile))
            pieces = {
                (n, y, x): zlib.compress(each[y * tile : (y + 1) * tile, x * tile : (x + 1) * tile].tobytes(), 1)
                for n, each in small.items()
                for y, x in corners
            }
            per = side // tile
            lines = np.ndindex(LARGE[1] * per, LARGE[0] * per)
            tif.write(
                (pieces[int(number[y // per, x // per]), y % per, x % per] for y, x in lines),
                shape=(LARGE[1] * side, LARGE[0] * side, 3),
                dtype=np.uint8,
                tile=(tile, tile),
                photometric="rgb",
                compression="zlib",
                subfiletype=int(k > 0),
                resolution=(1e4 / MPP / factor, 1e4 / MPP / factor),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    return label


@pytest.mark.slow
def test_a_large_slide_with_the_packaged_model(tmp_path):
    start = time.perf_counter()
    label = write_large_slide(tmp_path / "large.tif")
    drawn_in = time.perf_counter() - start
    out, model = tmp_path / "out", PACKAGED / "magdg_resnet18.virtual"
    # not ru_maxrss, which a process takes over from the one that starts it
    code = "import sys\nfrom magdg import main\nstatus = main(sys.argv[1:])\n"
    code += "print(*[line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line])\nsys.exit(status)"
    command = ["predict", str(tmp_path / "large.tif"), "--model", str(model), "--out", str(out)]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    megabytes = int(done.stdout.split()[-1]) / 1024
    tiles = pq.read_table(out / "large/tiles.parquet").to_pylist()
    known = []
    for tile in tiles:
        ends = [(tile[axis] // BLOCK, (tile[axis] + tile["width"] - 1) // BLOCK) for axis in "yx"]
        of_tile = {int(label[row, column]) for row in ends[0] for column in ends[1]}
        known.append(of_tile.pop() if len(of_tile) == 1 else -1)
    known, probability = np.array(known), np.array([tile["probability"] for tile in tiles])
    auc = metrics.auc(known[known >= 0], probability[known >= 0])
    size = (tmp_path / "large.tif").stat().st_size / 1e6
    print(done.stdout)
    print(
        f"20,480 x 16,384 pixels ({size:.0f} MB, drawn in {drawn_in:.0f} s), {len(tiles)} tiles: {seconds:.0f} s, peak "
        f"{megabytes:.0f} MB, AUC of {(known >= 0).sum()} tiles of one label {auc:.3f}"
    )
    tissue = (label >= 0).mean()
    assert len(tiles) == pytest.approx(tissue * LARGE[0] * LARGE[1] * BLOCK**2 / tiles[0]["width"] ** 2, rel=0.1)
    assert megabytes < 1500
    assert auc > 0.5
