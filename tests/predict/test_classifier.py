"""One image and many: scale first, then tiles, probability, signature; and whatever people hand in."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import softmax

from magnification_invariant.data.views import show
from magnification_invariant.model_folder import logits_of
from magnification_invariant.predict import Classifier, Item, check_mpp
from magnification_invariant.virtual_slides import render_field, virtual_field


@pytest.fixture(scope="module")
def classifier(tiny_model) -> Classifier:
    return Classifier.from_pretrained(tiny_model, device="cpu")


def tissue(mpp: float, size=(160, 128), patient=0) -> Image.Image:
    return Image.fromarray(render_field(patient, mpp, virtual_field(patient, 100, 0), size))


def only(rows: list[dict]) -> dict:
    (row,) = rows
    return row


def test_one_tile_is_what_timm_says_of_it(classifier, tiny_model):
    """A square at its own scale: one tile, which is what bare timm's transform shows too."""
    image = tissue(0.5, (64, 64))
    row = only(classifier.predict(image, 0.5))
    assert row["tiles"] == 1 and row["mpp"] == 0.5 and row["filled"] == 0
    np.testing.assert_allclose(row["logits"], logits_of(tiny_model, image), atol=1e-4)
    assert row["probability"] == pytest.approx(softmax(np.array(row["logits"]) / 1.5)[1])
    assert row["prediction"] == ("malignant" if row["probability"] > 0.5 else "benign")
    np.testing.assert_allclose(row["signature"], row["embedding"][[3, 10, 40]], rtol=1e-6)


def test_the_stored_scale_decides_and_never_the_number_of_pixels(classifier):
    """160 x 128 pixels; the model knows fields of 0.2 to 0.8 um/px and an input of 64."""
    image = tissue(0.25)
    inside, coarse, fine = (only(classifier.predict(image, mpp)) for mpp in (0.25, 0.6, 0.05))
    assert (inside["mpp"], coarse["mpp"], fine["mpp"]) == (0.5, 0.8, 0.2)  # the field, clipped into the range
    assert (inside["tiles"], coarse["tiles"], fine["tiles"]) == (2, 4, 1)  # 80 x 64, 120 x 96, 40 x 32 pixels
    assert fine["filled"] == pytest.approx(1 - 40 * 32 / 64**2) and "reflection" in fine["warning"]
    protocol = [only(classifier.predict(image, mpp, view="protocol")) for mpp in (0.25, 0.6, 0.05)]
    assert [row["mpp"] for row in protocol] == pytest.approx([0.5, 1.2, 0.1])  # never clipped: always 80 x 64
    assert all(row["logits"] == inside["logits"] for row in protocol)
    resampled = Image.fromarray(show(image, 0.25, 0.8, 64).pixels)
    by_hand = only(classifier.predict(image, 0.25, view=0.5))
    assert by_hand["logits"] == inside["logits"] and resampled.size == (64, 64)


def test_a_large_image_is_the_mean_of_its_tiles(classifier):
    pixels = np.asarray(tissue(0.5, (192, 128)))
    tiles = [pixels[y : y + 64, x : x + 64] for y in (0, 64) for x in (0, 64, 128)]
    whole = only(classifier.predict(pixels, 0.5, view=0.5))
    parts = classifier.predict(tiles, 0.5)
    np.testing.assert_allclose(whole["logits"], np.mean([row["logits"] for row in parts], 0), atol=1e-5)
    np.testing.assert_allclose(whole["signature"], np.mean([row["signature"] for row in parts], 0), atol=1e-5)


def test_a_model_of_no_scale_shows_every_image_whole(tiny_model):
    known = Classifier.from_pretrained(tiny_model, device="cpu")
    config = {key: value for key, value in known.config.items() if key not in ("base_range", "mpp_range")}
    classifier = Classifier(known.folder, config, known.run)
    row = only(classifier.predict(tissue(0.5)))
    assert row["mpp"] is None and row["tiles"] == 2
    assert row["logits"] == only(known.predict(tissue(0.5), view="protocol"))["logits"]
    with pytest.raises(ValueError, match="its scale is not known"):
        known.predict(tissue(0.5))


def test_coarser_than_known_warns(classifier):
    with pytest.warns(UserWarning, match=r"2 um/px is coarser than the model knows \(0.2 to 0.8\)"):
        row = only(classifier.predict(tissue(0.5), 2.0))
    assert row["mpp"] == 2.0 and row["probability"] is not None  # not enlarged, and predicted all the same
    with pytest.warns(UserWarning, match="was a magnification meant"):
        classifier.predict(tissue(0.5), 10.0)


def test_the_batch_and_its_order_do_not_matter(classifier, tiny_model):
    images = [tissue(0.5, size, patient=i) for i, size in enumerate([(64, 64), (200, 130), (80, 64), (64, 300)])]
    one_by_one = [only(classifier.predict(image, 0.5)) for image in images]
    together = Classifier.from_pretrained(tiny_model, device="cpu", batch_size=5).predict(images, 0.5)
    for a, b in zip(one_by_one, together, strict=True):
        np.testing.assert_allclose(a["logits"], b["logits"], atol=1e-5)


def test_the_zoom_curve_of_one_image(classifier):
    image = tissue(0.1, (512, 512))
    mpp, probability = classifier.zoom_curve(image, 0.1, n=5)
    assert mpp[0] == 0.2 and mpp[-1] == pytest.approx(0.8) and len(mpp) == 5  # 64 x 64 are left at the coarsest
    alone = only(classifier.predict(image, 0.1, view=0.4))
    assert probability[2] == alone["probability"]
    mpp, probability = classifier.zoom_curve(image, 3.0)  # coarser than the model knows: one point, with a warning
    assert mpp.tolist() == [3.0] and np.isfinite(probability).all()


@pytest.mark.parametrize("mpp", [0.22, 0.3, 0.5])
def test_a_scale_ten_times_wrong_is_seen_in_the_pixels(classifier, mpp):
    images = [tissue(mpp, (512, 400), patient=i) for i in range(4)]
    items = [Item(str(i), image, m) for i, image in enumerate(images) for m in (mpp, mpp * 10, mpp / 10)]
    said = ["look like about" in (row["warning"] or "") for row in classifier.iterate(items)]
    right, coarser, finer = (said[i::3] for i in range(3))
    assert sum(right) == 0 and sum(coarser) >= 3 and sum(finer) >= 3


def test_the_scale_of_a_tiff_is_read_from_it(classifier, tmp_path):
    tissue(0.5).save(tmp_path / "a.tif", resolution=(20_000, 20_000), resolution_unit=3)  # pixels a centimetre
    tissue(0.5).save(tmp_path / "b.png")
    a, b = classifier.predict(tmp_path)
    assert a["native_mpp"] == pytest.approx(0.5) and a["error"] is None
    assert "its scale is not known" in b["error"]
    assert only(classifier.predict(tmp_path / "a.tif", 0.3))["native_mpp"] == 0.3


@pytest.mark.parametrize(
    ("mpp", "message"),
    [
        (0, "positive finite number"),
        (-0.5, "positive finite number"),
        (float("nan"), "positive finite number"),
        (float("inf"), "positive finite number"),
        ("fine", "a number like 0.25, not 'fine'"),
        (250, "in nanometres it would be 0.25 um/px"),
        (2.5e-4, "in millimetres it would be 0.25 um/px"),
        (0.001, "finer than any microscope's"),
        (40, "if you mean a magnification of 40: a scanner's 40x is about 0.25 um/px"),
    ],
)
def test_an_mpp_that_cannot_be(classifier, mpp, message):
    with pytest.raises(ValueError, match=message):
        check_mpp(mpp)
    with pytest.raises(ValueError, match=message):
        classifier.predict(tissue(0.5), mpp)


def test_one_scale_an_image_or_one_for_all(classifier):
    rows = classifier.predict([tissue(0.5)] * 2, [0.5, 0.1])
    assert [row["native_mpp"] for row in rows] == [0.5, 0.1]
    with pytest.raises(ValueError, match="3 scales for 2 images"):
        classifier.predict([tissue(0.5)] * 2, [0.5, 0.1, 0.2])


@pytest.mark.slow
def test_a_hundred_megapixels(classifier, tmp_path):
    Image.effect_noise((10_000, 10_000), 30).convert("RGB").save(tmp_path / "large.jpg")
    row = only(classifier.predict(tmp_path / "large.jpg", 0.1))
    assert (row["width"], row["mpp"], row["tiles"]) == (10_000, 0.8, 20**2)


def test_folders_patterns_and_what_is_not_there(classifier, tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.jpg", "sub/c.tif", "notes.txt"):
        tissue(0.5).save(tmp_path / name, "PNG")
    folder = [row["filename"] for row in classifier.predict(tmp_path, 0.5)]
    assert folder == [str(tmp_path / name) for name in ("a.jpg", "b.png", "sub/c.tif")]
    assert len(classifier.predict(f"{tmp_path}/**/*.[pt]*[gf]", 0.5)) == 2
    for nothing in ("nowhere.png", "*.bmp", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match="no file, no pattern"):
            classifier.predict(tmp_path / nothing, 0.5)


def test_a_datasets_table_brings_its_own_scale(classifier, breakhis_tree):
    from magnification_invariant.data import load_breakhis

    ds = load_breakhis(breakhis_tree).select([0, 1])
    rows = classifier.predict(ds)
    assert [row["filename"] for row in rows] == ds["filename"][:]
    assert [row["native_mpp"] for row in rows] == ds["mpp"][:]
    assert classifier.predict(ds, 0.3)[0]["native_mpp"] == 0.3


def test_a_model_that_is_not_ours(tmp_path):
    import timm
    from timm.models import save_for_hf

    save_for_hf(timm.create_model("test_resnet", num_classes=2), tmp_path, safe_serialization=True)
    with pytest.raises(ValueError, match="not a model of magnification_invariant"):
        Classifier.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub repository"):
        Classifier.from_pretrained("nobody/nothing")
    with pytest.raises(ValueError, match="unknown backend 'tensorflow'"):
        Classifier.from_pretrained(tmp_path, backend="tensorflow")
    assert torch.is_grad_enabled()


def test_what_became_of_such_probabilities(classifier, tiny_model, tmp_path):
    import shutil

    import pyarrow as pa
    import pyarrow.parquet as pq

    assert "not recorded" in classifier.reliability(0.5)
    folder = shutil.copytree(tiny_model, tmp_path / "with records")
    low, high = [0.0, np.log(0.25) * 1.5], [0.0, np.log(4) * 1.5]  # at the temperature of 1.5: 0.2 and 0.8
    columns = {"logits": [low] * 8 + [high] * 8, "label": [1, 0, 0, 0] * 2 + [1, 1, 1, 0] * 2}
    columns |= {"patient": [f"p{i % 4}" for i in range(16)], "part": ["test"] * 16, "epoch": [0] * 16}
    pq.write_table(pa.table(columns), folder / "predictions.parquet")
    assert (
        Classifier.from_pretrained(folder)
        .reliability(0.7)
        .startswith("Of images of an unseen magnification that were given about 0.80, 75% were malignant")
    )
