"""Zoom curves show the right tissue at the right scale, and fall where what a network looks at is lost."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from magdg import main
from magnification_invariant import metrics
from magnification_invariant.data import load_breakhis, load_virtual_slides
from magnification_invariant.data.scale import rescale
from magnification_invariant.data.splits import leave_one_magnification_out
from magnification_invariant.data.views import tiles
from magnification_invariant.predict import Classifier
from magnification_invariant.predict.zoom import photographed_fields, virtual_fields, write_zoom_curves, zoom_curves
from magnification_invariant.records import Run, prediction_table
from magnification_invariant.virtual_slides import SIDECAR

SIZE = 32


def classifier_of(run, mpp_range=(0.2, 0.8), size=SIZE):
    """A classifier whose network is a function of uint8 tiles (n, 3, s, s)."""
    config = {"label_names": ["benign", "malignant"], "temperature": 1.0, "mpp_range": list(mpp_range)}
    return Classifier(Path(), config | {"pretrained_cfg": {"input_size": [3, size, size]}}, run, batch_size=16)


def finest_detail(pieces):
    """Malignant is what differs from one pixel to the next."""
    detail = np.abs(np.diff(pieces.astype(float), axis=3)).mean((1, 2, 3))
    return np.stack([np.zeros(len(pieces)), detail], 1), pieces.reshape(len(pieces), -1)[:, ::97]


def table(images, **columns):
    import datasets

    files = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        files.append({"path": None, "bytes": file.getvalue()})
    n = len(images)
    columns = {"filename": [f"{i}.png" for i in range(n)], "magnification": [40] * n, "mpp": [0.25] * n} | columns
    columns = {"patient": [str(i) for i in range(n)], "label": [0] * n} | columns
    features = datasets.Dataset.from_dict(columns).features | {"image": datasets.Image()}
    return datasets.Dataset.from_dict(columns | {"image": files}, datasets.Features(features))


def noise(rng, width=128, height=96):
    """Slow noise, which survives downsampling and knows no class."""
    slow = Image.fromarray(rng.integers(60, 200, (height // 8, width // 8, 3), np.uint8))
    return np.asarray(slow.resize((width, height), Image.Resampling.BICUBIC)).astype(float)


def test_what_lies_in_the_finest_pixels_is_lost_and_the_curve_falls():
    rng = np.random.default_rng(0)
    checker = 2.0 * (np.indices((96, 128)).sum(0) % 2)[..., None] - 1
    label = np.arange(40) % 2
    images = [noise(rng) + checker * (30 if y else 20) for y in label]
    ds = table([Image.fromarray(image.clip(0, 255).astype(np.uint8)) for image in images], label=label.tolist())
    found = zoom_curves(classifier_of(finest_detail), photographed_fields(ds, np.arange(40), SIZE)).to_pandas()
    for _, curve in found.groupby("variant"):
        margin = curve.logits.map(lambda logits: logits[1] - logits[0])
        auc = [metrics.auc(curve.label[curve.mpp == m], margin[curve.mpp == m]) for m in np.unique(curve.mpp)]
        assert auc[0] > 0.999 and auc[-1] < 0.75, auc


def test_a_photograph_is_shown_whole_in_fewer_and_fewer_pixels():
    pixels = np.full((96, 128, 3), 200, np.uint8)
    pixels[40:56, 56:72] = 20  # the middle
    ds = table([Image.fromarray(pixels)])
    (field,) = photographed_fields(ds, np.arange(1), SIZE)
    views = list(field.views())
    assert field.variant == "field" and [mpp for mpp, _ in views] == pytest.approx(np.geomspace(0.25, 0.75, 5))
    assert np.array_equal(views[0][1], pixels)
    for mpp, shown in views:
        assert np.multiply(shown.shape[:2], mpp) == pytest.approx((24, 32), abs=mpp)
        assert shown.mean() == pytest.approx(pixels.mean(), abs=1.5)


def test_photographs_are_never_enlarged_and_never_joined_over_magnifications():
    rng = np.random.default_rng(0)
    sizes = [(128, 96), (96, 80), (200, 120), (128, 96), (20, 20)]
    images = [Image.fromarray(noise(rng, *size).astype(np.uint8)) for size in sizes]
    ds = table(images, magnification=[40, 40, 40, 100, 200], mpp=[0.25, 0.25, 0.25, 0.1, 0.05])
    fields = photographed_fields(ds, np.arange(5), SIZE)
    rows = zoom_curves(classifier_of(finest_detail), fields).to_pandas()
    shapes = [shown.shape[:2] for field in fields for _, shown in field.views()]
    assert max(shapes) == (120, 200) and min(min(shape) for shape in shapes) == SIZE
    ranges = {source: (curve.mpp.min(), curve.mpp.max()) for source, curve in rows.groupby("source")}
    assert ranges == {"40X": pytest.approx((0.25, 0.25 * 80 / SIZE)), "100X": pytest.approx((0.1, 0.1 * 96 / SIZE))}
    with pytest.raises(ValueError, match="at no magnification do all tested images hold"):
        photographed_fields(ds, np.array([4]), SIZE)


def test_similarity_is_that_of_the_same_fields_with_the_finest_scale_trained_on():
    rng = np.random.default_rng(0)
    images = [Image.fromarray(noise(rng).astype(np.uint8)) for _ in range(12)]
    fields = photographed_fields(table(images), np.arange(12), SIZE)
    classifier = classifier_of(finest_detail, mpp_range=(0.3, 0.5))
    rows = zoom_curves(classifier, fields).to_pandas()
    points = np.unique(rows.mpp)
    reference = points[points >= 0.3][0]
    assert set(rows[rows.reference].mpp) == {reference}
    embedded = {mpp: [] for mpp in points}
    for field in fields:
        for mpp, shown in field.views():
            embedded[mpp].append(finest_detail(tiles(shown, SIZE))[1].mean(0))
    for mpp in points:
        expected = metrics.linear_cka(np.stack(embedded[mpp]), np.stack(embedded[reference]))
        assert rows[rows.mpp == mpp].cka.tolist() == pytest.approx([expected] * 12)
    assert rows[rows.reference].cka.tolist() == pytest.approx([1] * 12)


# --------------------------------------------------------------------------------------------------- whole folders


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    root = tmp_path_factory.mktemp("slides")
    load_virtual_slides(
        8, images_per_magnification=2, magnifications=(100, 400), size=(175, 115), write_to=root, workers=1
    )
    return root


def write_cell(folder, model, ds, held_out=100):
    """A cell of a model that was not trained: what zoom curves need of it."""
    shutil.copytree(model, folder / "model")
    split = leave_one_magnification_out(ds, held_out, n_folds=4)
    columns = {name: np.array(ds[name][:]) for name in ("filename", "patient", "slide", "label", "mpp")}
    columns |= {"domain": np.array(ds["magnification"][:]), "mpp": columns["mpp"] * 115 / 73}
    rows = {part: getattr(split, part) for part in ("val", "test", "test_source")}
    parts = [prediction_table(columns, rows[part], np.zeros((len(rows[part]), 2)), part=part, epoch=0) for part in rows]
    run = Run(folder)
    run.write_config({"cell": {"method": "erm", "held_out": held_out, "fold": 0, "seed": 0}, "settings": {}})
    run.write_predictions(pa.concat_tables(parts))
    return split


def test_virtual_tissue_is_drawn_anew_at_every_scale(slides, tiny_model, tmp_path, capsys):
    ds = load_breakhis(slides)
    split = write_cell(tmp_path / "cell", tiny_model, ds)
    assert main(["zoom", str(tmp_path / "cell"), "--data", str(slides)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "cell" / "zoom.parquet")
    found = pq.read_table(tmp_path / "cell" / "zoom.parquet")
    assert json.loads(found.schema.metadata[b"about"])["mpp_range"] == [0.2, 0.8]
    found = found.to_pandas()
    assert set(found.filename) == set(ds.select(split.test_source)["filename"])  # tested patients, finest magnification
    assert np.unique(found.mpp) == pytest.approx(np.geomspace(0.1, 1.6, 9))
    assert found.field.tolist() == pytest.approx((64 * found.mpp).tolist())
    assert set(found[found.reference].mpp) == {found.mpp[found.mpp >= 0.2 * 0.999].min()}
    again = write_zoom_curves(tmp_path / "cell" / "model", ds)
    assert again.read_bytes() == (tmp_path / "cell" / "zoom.parquet").read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))
    few = pq.read_table(write_zoom_curves(tmp_path / "cell", ds, n_images=1))
    assert len(few) == len(found) // 2


def test_drawn_at_its_own_scale_a_field_is_the_image_of_the_table(slides):
    ds = load_breakhis(slides)
    native, height = np.array(ds["mpp"][:]), 36  # the network's view of 32
    rows = np.flatnonzero(native < native.min() * 1.001)
    own = native[rows[0]] * 115 / height
    classifier = classifier_of(finest_detail, mpp_range=(2 * own, own / 2))  # the scales begin with its own
    fields = virtual_fields(ds, rows, native[rows] * 115 / height, classifier)
    images = [np.asarray(rescale(ds[int(row)]["image"], own, native_mpp=native[row])).astype(float) for row in rows]
    views = [next(field.views()) for field in fields]
    assert all(mpp == pytest.approx(own) for mpp, _ in views) and {each.variant for each in fields} == {"rendered"}

    def apart(view, image):
        top, left = (image.shape[0] - SIZE) // 2, (image.shape[1] - SIZE) // 2
        return min(  # the middles of the two frames may lie half a pixel apart
            np.abs(view[1] - image[y : y + SIZE, x : x + SIZE]).mean() for y in (top, top + 1) for x in (left, left + 1)
        )

    same = [apart(view, image) for view, image in zip(views, images, strict=True)]
    other = [apart(view, images[i - 2]) for i, view in enumerate(views)]
    assert max(same) < 6 and min(other) > 20  # resampled by another filter


def test_what_does_not_fit_is_refused(slides, tiny_model, breakhis_tree, tmp_path):
    ds = load_breakhis(slides)
    write_cell(tmp_path / "cell", tiny_model, ds)
    with pytest.raises(ValueError, match="which the data lack"):
        write_zoom_curves(tmp_path / "cell", load_breakhis(breakhis_tree))
    with pytest.raises(ValueError, match="photographed at its own magnification"):
        write_zoom_curves(tmp_path / "cell", ds.add_column("rescaled", [True] * len(ds)))
    assert main(["zoom", str(tmp_path), "--data", str(slides)]) == 2
    cell = {"method": "erm", "held_out": 100, "fold": 0, "seed": 0, "data": "another digest", "data_source": "virtual"}
    shutil.copytree(tmp_path / "cell", tmp_path / "digested")
    Run(tmp_path / "digested").write_config({"cell": cell, "settings": {}})
    with pytest.raises(ValueError, match="was made from other data: virtual; give the same"):
        write_zoom_curves(tmp_path / "digested", ds)
    old = tmp_path / "slides"
    shutil.copytree(slides, old)
    truth = json.loads((old / SIDECAR).read_text())
    truth["parameters"]["generator_version"] -= 1
    (old / SIDECAR).write_text(json.dumps(truth))
    with pytest.raises(ValueError, match="cannot be drawn again"):
        write_zoom_curves(tmp_path / "cell", load_breakhis(old))
    assert not (tmp_path / "cell" / "zoom.parquet").exists()
