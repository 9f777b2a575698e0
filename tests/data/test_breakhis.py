import csv
import gzip
import logging
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from magnification_invariant.data import images
from magnification_invariant.data.breakhis import MAGNIFICATIONS, MPP, SUBTYPES, load_breakhis


def image(path: Path, size: tuple[int, int] = (70, 46), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def load_one(path: Path) -> dict:
    ds = load_breakhis(path.parent)
    assert len(ds) == 1
    return ds[0]


@pytest.fixture
def tree(breakhis_tree, tmp_path) -> Path:
    """A copy to do harm to."""
    return Path(shutil.copytree(breakhis_tree, tmp_path / "tree"))


@pytest.fixture
def victim(tree) -> Path:
    return next(tree.rglob("SOB_M_PC-15-190EF-200-001.png"))


def test_the_table_says_what_the_file_names_say(breakhis_tree):
    ds = load_breakhis(breakhis_tree)
    assert ds.column_names == ["image", "label", "subtype", "magnification", "mpp", "patient", "slide", "filename"]
    assert ds.features["label"].names == ["benign", "malignant"]
    assert (ds.features["magnification"].dtype, ds.features["mpp"].dtype) == ("int32", "float64")
    assert ds["filename"][:] == sorted(path.name for path in breakhis_tree.rglob("*.png"))
    rows = {row["filename"]: row for row in ds}
    row = rows["SOB_M_PC-15-190EF-400-001.png"]
    assert row.pop("image").size == (70, 46)
    assert row == {
        "label": 1,
        "subtype": "papillary_carcinoma",
        "magnification": 400,
        "mpp": pytest.approx(MPP[400] * 10),
        "patient": "15-190",
        "slide": "15-190EF",
        "filename": "SOB_M_PC-15-190EF-400-001.png",
    }
    sections = {row["slide"] for row in rows.values() if row["patient"] == "14-1001"}
    assert sections == {"14-1001AB", "14-1001CD"}
    assert {(row["label"], row["subtype"]) for row in rows.values()} == {
        (int(code in ("DC", "LC", "MC", "PC")), subtype) for code, subtype in SUBTYPES.items()
    }


def test_native_pixel_sizes_are_the_published_ones():
    assert [round(MPP[m], 4) for m in MAGNIFICATIONS] == [0.4924, 0.197, 0.0985, 0.0492]


@pytest.mark.parametrize("inside", ["..", ".", "BreaKHis_v1", "BreaKHis_v1/histology_slides/breast"])
def test_the_archive_is_found_from_above_and_from_inside(breakhis_tree, inside):
    if inside == "..":
        breakhis_tree = shutil.copytree(breakhis_tree, breakhis_tree.parent / "above" / "data").parent
        inside = "."
    assert len(load_breakhis(breakhis_tree / inside)) == 32


def test_linked_folders_are_followed(tree):
    breast = next(tree.rglob("breast"))
    (breast / "benign").rename(tree / "elsewhere")
    (breast / "benign").symlink_to(tree / "elsewhere")
    shutil.move(tree / "elsewhere", tree.parent / "elsewhere")
    (breast / "benign").unlink()
    (breast / "benign").symlink_to(tree.parent / "elsewhere")
    assert len(load_breakhis(tree)) == 32


@pytest.mark.parametrize(
    ("size", "shrink"),
    [((700, 460), 1), ((700, 456), 1), ((350, 230), 2), ((500, 328), 1.4), ((224, 147), 700 / 224)],
)
def test_pixel_size_is_of_the_stored_array(tmp_path, size, shrink):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = load_one(image(tmp_path / "SOB_B_A-14-22549AB-40-001.png", size))
    assert row["mpp"] == pytest.approx(MPP[40] * shrink, rel=1e-12)


def test_stretched_mirror_gets_the_geometric_mean_and_one_warning(tmp_path):
    for sequence in range(3):
        image(tmp_path / f"SOB_B_A-14-22549AB-40-{sequence:03}.jpg", (224, 224))
    with pytest.warns(UserWarning) as caught:
        ds = load_breakhis(tmp_path)
    assert len(caught) == 1 and "3 images" in str(caught[0].message) and "not square" in str(caught[0].message)
    assert Path(caught[0].filename) == Path(__file__)
    across, down = MPP[40] * 700 / 224, MPP[40] * 460 / 224
    assert ds["mpp"][:] == pytest.approx([(across * down) ** 0.5] * 3)


@pytest.mark.parametrize("suffix", ["png", "PNG", "jpg", "JPeG", "jpeg", "tif", "TIFF", "webp"])
def test_formats(tmp_path, suffix):
    assert load_one(image(tmp_path / f"SOB_B_TA-14-3411F-100-001.{suffix}"))["patient"] == "14-3411"


def test_what_is_no_image_or_hidden_is_not_looked_at(tree, victim):
    (victim.parent / f"._{victim.name}").write_bytes(b"\0")
    (tree / ".DS_Store").write_bytes(b"\0")
    (tree / "README.txt").write_text("BreaKHis")
    image(tree / ".thumbnails" / "preview.png")
    image(tree / "__MACOSX" / "preview.png")
    assert len(load_breakhis(tree)) == 32


def test_nothing_found_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No image .* below .*\n.*SOB_B_A-14-22549AB-40-001.png"):
        load_breakhis(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is not a folder, .* Unpack"):
        load_breakhis(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="on_error"):
        load_breakhis(tmp_path, on_error="ignore")


def cut(path: Path, suffix: str) -> Path:
    new = image(path.with_suffix(suffix), (700, 460))
    if new != path:
        path.unlink()
    new.write_bytes(new.read_bytes()[: new.stat().st_size * 9 // 10])
    return new


def flip_a_bit(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def not_an_image(path: Path) -> Path:
    path.write_text("<html>404</html>")
    return path


def rename(path: Path, name: str) -> Path:
    return path.rename(path.with_name(name))


HARMS = {
    "cut png": (lambda p: cut(p, ".png"), "not a readable image"),
    "cut jpeg": (lambda p: cut(p, ".jpg"), "not a readable image"),
    "cut tiff": (lambda p: cut(p, ".tif"), "not a readable image"),
    "cut webp": (lambda p: cut(p, ".webp"), "not a readable image"),
    "png with a flipped bit": (flip_a_bit, "not a readable image"),
    "empty": (lambda p: (p.write_bytes(b""), p)[1], "not a readable image"),
    "web page": (not_an_image, "not a readable image"),
    "other name": (lambda p: rename(p, "slide1.png"), "not named as in BreaKHis"),
    "unknown magnification": (lambda p: rename(p, "SOB_M_PC-15-190EF-20-001.png"), "not named as in BreaKHis"),
    "benign carcinoma": (lambda p: rename(p, "SOB_B_PC-15-190EF-200-001.png"), "not named as in BreaKHis"),
    "class": (lambda p: rename(p, "SOB_B_A-15-190EF-200-001.png"), "its name says class benign, its folder malignant"),
    "subtype": (lambda p: rename(p, "SOB_M_DC-15-190EF-200-001.png"), "its folder papillary_carcinoma"),
    "slide": (lambda p: rename(p, "SOB_M_PC-15-190-200-001.png"), "its folder SOB_M_PC_15-190EF"),
    "magnification": (lambda p: rename(p, "SOB_M_PC-15-190EF-400-002.png"), "magnification 400X, its folder 200X"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_file_that_cannot_be_used_is_named_or_skipped_and_counted(tree, victim, harm):
    do, message = HARMS[harm]
    path = do(victim)
    with pytest.raises(ValueError, match="1 of 32 images") as caught:
        load_breakhis(tree)
    assert f"\n  {path.relative_to(tree)}: " in str(caught.value) and message in str(caught.value)
    with pytest.warns(UserWarning, match="1 of 32 images") as warned:
        ds = load_breakhis(tree, on_error="skip")
    assert len(warned) == 1 and str(path.relative_to(tree)) in str(warned[0].message)
    assert len(ds) == 31 and path.name not in ds["filename"][:]


def test_skipping_everything_is_an_error(tmp_path):
    image(tmp_path / "a.png")
    with pytest.raises(ValueError, match="1 of 1 images"):
        load_breakhis(tmp_path, on_error="skip")


def test_an_image_too_large_to_be_decoded_safely_is_an_error(breakhis_tree, monkeypatch):
    monkeypatch.setattr(images, "MOST_PIXELS", 70 * 46 - 1)
    with pytest.raises(ValueError, match="more than 3,219 pixels"):
        load_breakhis(breakhis_tree)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_an_image_that_is_there_twice_is_an_error(tree, victim, suffix):
    image((tree / "copy" / victim.name).with_suffix(suffix))
    with pytest.raises(ValueError, match="the same image name as"):
        load_breakhis(tree)


def test_slide_that_is_filed_twice_loses_its_ductal_copy(tree, caplog):
    def copy(code: str, slide: str) -> None:
        folder = f"{SUBTYPES[code]}/SOB_M_{code}_{slide}/40X"
        image(tree / "BreaKHis_v1/malignant" / folder / f"SOB_M_{code}-{slide}-40-001.png")

    copy("DC", "14-13412")
    copy("DC", "14-13412A")  # another section is no copy
    assert len(load_breakhis(tree)) == 34  # one filing only: nothing is there twice
    copy("LC", "14-13412")
    with caplog.at_level(logging.INFO, logger="magnification_invariant"):
        ds = load_breakhis(tree)
    assert "dropped 1 images" in caplog.text
    kept = [name for name in ds["filename"] if "13412" in name]
    assert kept == ["SOB_M_DC-14-13412A-40-001.png", "SOB_M_LC-14-13412-40-001.png"]
    assert len(load_breakhis(tree, drop_duplicate_slide=False)) == 35


def test_real_images_agree_with_the_complete_file_list(breakhis_real):
    with gzip.open(breakhis_real / "manifest.csv.gz", "rt") as file:
        listed = {Path(row["filename"]).stem: row for row in csv.DictReader(file)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ds = load_breakhis(breakhis_real, drop_duplicate_slide=False)
    assert len(ds) == 581
    for row in ds.remove_columns("image"):
        fact = listed[Path(row["filename"]).stem]
        assert row["slide"] == fact["slide_id"] and row["patient"] == fact["patient_numeric"]
        assert ("benign", "malignant")[row["label"]] == fact["tumor_class"]
        assert str(row["magnification"]) == fact["magnification"] and row["subtype"] == SUBTYPES[fact["tumor_type"]]

    ds = load_breakhis(breakhis_real)
    assert len(ds) == 557 and len(set(ds["patient"])) == 34 and len(set(ds["slide"])) == 42
    assert np.unique(ds["magnification"][:], return_counts=True)[1].tolist() == [49, 484, 10, 14]
