"""What is out of a model's scope: the distance, its threshold, the file, and who asks for them."""

import shutil
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from magdg import main
from magnification_invariant.files import read_json
from magnification_invariant.hub import stage
from magnification_invariant.hub.doctor import check_files
from magnification_invariant.model_folder import load_model, open_model
from magnification_invariant.models import PACKAGED
from magnification_invariant.predict import Classifier, items_of, predict_to_file
from magnification_invariant.scope import FILE, LEVELS, Scope
from magnification_invariant.signatures import weights_digest
from magnification_invariant.virtual_slides import render_field, virtual_field

KNOWN = {"stage": 1, "weights_sha256": "0" * 64}


def statistics(n: int, d: int = 5, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + np.arange(d)


@pytest.fixture(scope="module")
def scope() -> Scope:
    return Scope.fit(statistics(200), statistics(60, seed=1), np.arange(60) // 6, **KNOWN)


def tissue(patient: int, mpp: float = 0.4, size=(160, 128)) -> np.ndarray:
    return render_field(patient, mpp, virtual_field(patient, 100, 0), size)


@pytest.fixture(scope="module")
def scoped(tiny_model, tmp_path_factory):
    """The tiny model with a scope of eight fields of virtual tissue."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("scoped") / "model")
    model = load_model(*open_model(str(folder)))
    rows = Scope(1, np.zeros(64, np.float32), np.eye(64, dtype=np.float32), np.zeros(LEVELS), "")
    rows.save_pretrained(folder)  # so that the classifier gives statistics
    classifier, seen = Classifier.from_pretrained(folder, device="cpu"), []
    run = classifier.run
    classifier.run = lambda tiles: seen.append(outputs := run(tiles)) or outputs
    classifier.batch_size = 2  # one image of 160 x 128 pixels has two tiles
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        classifier.predict([tissue(patient) for patient in range(8)], 0.4)
    x = np.array([outputs[2].mean(0) for outputs in seen])
    patients = np.arange(8)
    Scope.fit(x, x, patients, stage=1, weights_sha256=weights_digest(model)).save_pretrained(folder)
    return folder


def test_distances_are_mahalanobis(scope):
    from sklearn.covariance import LedoitWolf

    fitted, x = LedoitWolf().fit(statistics(200)), statistics(30, seed=2)
    apart = x - statistics(200).mean(0)
    by_hand = np.sqrt(np.einsum("ni,ij,nj->n", apart, np.linalg.inv(fitted.covariance_), apart))
    np.testing.assert_allclose(scope.distance(x), by_hand, rtol=1e-5)
    np.testing.assert_allclose(scope.distance(x) ** 2, fitted.mahalanobis(x), rtol=1e-5)
    assert scope.distance(scope.mean[None])[0] == 0
    with pytest.raises(ValueError, match=r"statistics \(n, 5\), not \(3, 4\)"):
        scope.distance(np.zeros((3, 4)))


def test_the_threshold_is_the_patient_balanced_quantile():
    """Four patients of very different numbers of images: the least distance up to which 99 % of the weight lies."""
    counts = (400, 3, 40, 7)
    patient, other = np.repeat(np.arange(4), counts), statistics(sum(counts), seed=3)
    other[patient == 1] *= 4  # three images that weigh as much as four hundred
    scope = Scope.fit(statistics(200), other, patient, **KNOWN)
    distance, weight = scope.distance(other), np.repeat(1 / np.array(counts), counts)
    shares = np.array([weight[distance <= t].sum() / weight.sum() for t in distance])
    assert scope.threshold == distance[shares >= 0.99 - 1e-9].min()
    assert scope.threshold > np.quantile(distance, 0.99)
    assert scope.share_out(other, patient) == pytest.approx(1 - shares[distance == scope.threshold][0])
    again = Scope.fit(statistics(200), np.repeat(other, 2, 0), np.repeat(patient, 2), **KNOWN)
    np.testing.assert_array_equal(again.reference, scope.reference)


def test_percentiles_are_shares_of_the_reference(scope):
    reference = scope.distance(statistics(60, seed=1))
    middle = np.median(reference)
    assert scope.percentile(middle) == pytest.approx(100 * np.mean(reference <= middle), abs=0.2)
    assert scope.percentile(0) == 0 and scope.percentile(reference.max()) == 100
    assert scope.percentile(scope.threshold) >= 99


def test_a_saved_scope_is_the_same_bit_for_bit(scope, tmp_path):
    path = scope.save_pretrained(tmp_path)
    again = Scope.from_pretrained(tmp_path)
    for name in ("mean", "whitener", "reference"):
        assert getattr(again, name).tobytes() == getattr(scope, name).tobytes()
        assert getattr(again, name).dtype == getattr(scope, name).dtype
    assert (again.stage, again.weights_sha256) == (scope.stage, scope.weights_sha256)
    x = statistics(30, seed=2)
    assert np.array_equal(again.distance(x), scope.distance(x)) and again.threshold == scope.threshold
    whole = path.read_bytes()
    for damage in (whole[:50], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=rf"{FILE} .*fetch it again"):
            Scope.from_pretrained(tmp_path)


def test_what_cannot_be_a_scope(scope):
    with pytest.raises(ValueError, match="says the same of all training images"):
        Scope.fit(np.ones((9, 5)), np.ones((3, 5)), [1, 2, 3], **KNOWN)
    with pytest.raises(ValueError, match="must rise"):
        Scope(1, scope.mean, scope.whitener, scope.reference[::-1], "")
    with pytest.raises(ValueError, match="cannot have"):
        Scope(1, scope.mean, scope.whitener[:3], scope.reference, "")


SLOW = [pytest.param(backend, marks=pytest.mark.slow) for backend in ("onnx", "openvino")]


@pytest.mark.parametrize("backend", ["torch", *SLOW])
def test_tissue_is_in_and_noise_is_out(scoped, tmp_path, backend):
    model = scoped
    if backend != "torch":
        pytest.importorskip({"onnx": "onnxruntime"}.get(backend, backend))
        from magnification_invariant.predict.export import export

        model = tmp_path / "model"
        export(scoped, model)
    classifier = Classifier.from_pretrained(model, backend=backend, device="cpu")
    noise = np.random.default_rng(0).integers(0, 256, (128, 160, 3), dtype=np.uint8)
    with pytest.warns(UserWarning, match="images, first: "):
        *inside, out = classifier.predict([*(tissue(patient) for patient in range(7)), noise], 0.4)
    assert sum(row["in_scope"] for row in inside) >= 6 and not out["in_scope"]
    assert out["scope_percentile"] == 100 and "out of the model's scope" in out["warning"]
    reference = Classifier.from_pretrained(scoped, device="cpu").predict([tissue(0)], 0.4)[0]["scope_percentile"]
    assert inside[0]["scope_percentile"] == pytest.approx(reference, abs=13)  # eight images are the reference


def test_the_distance_is_of_the_mean_over_tiles(scoped):
    """As by hand from layer 1 of the network, on each of two tiles."""
    classifier = Classifier.from_pretrained(scoped, device="cpu")
    shown, seen = np.asarray(classifier.view_of(Image.fromarray(tissue(3)), 0.4)[0].pixels), []
    network, layer = classifier.network, classifier.network.model.layer1
    layer.register_forward_hook(lambda module, given, output: seen.append(output))
    tiles = np.stack([shown[:, :64], shown[:, -64:]]).transpose(0, 3, 1, 2)
    logits, _, got = classifier.run(np.ascontiguousarray(tiles))
    flat = seen[0].flatten(2).double()
    wanted = torch.cat([flat.mean(2), flat.std(2, correction=0)], 1).numpy()
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)
    normalised = (torch.from_numpy(tiles).float() - network.shift) / network.scale
    with torch.inference_mode():
        np.testing.assert_allclose(logits, network.model(normalised), atol=1e-5)
    (row,) = classifier.predict([tissue(3)], 0.4)
    distance = classifier.scope.distance(wanted.mean(0)[None])[0]
    assert row["in_scope"] == (distance <= classifier.scope.threshold * (1 + 1e-6))


def test_the_packaged_model_knows_what_it_is_for():
    """With default arguments: virtual tissue of patients it never saw, and what nobody would call tissue."""
    classifier = Classifier.from_pretrained(PACKAGED / "magdg_resnet18.virtual", device="cpu")
    rows = classifier.predict([tissue(20_000 + i, 0.4, (350, 230)) for i in range(4)], 0.4)
    assert all(row["in_scope"] for row in rows)
    rng = np.random.default_rng(0)
    checks = np.kron(rng.integers(0, 2, (23, 35, 3)) * 255, np.ones((10, 10, 1))).astype(np.uint8)
    with pytest.warns(UserWarning, match="out of the model's scope"):
        rows = classifier.predict([checks, np.roll(tissue(20_000, 0.4, (350, 230)), 1, 2)], 0.4)
    assert [row["in_scope"] for row in rows] == [False, False]
    assert (PACKAGED / "magdg_resnet18.virtual" / FILE).stat().st_size < 200_000
    check_files(PACKAGED / "magdg_resnet18.virtual")


def test_a_model_without_a_scope_says_nothing_of_it(tiny_model, tmp_path, capsys):
    classifier = Classifier.from_pretrained(tiny_model, device="cpu")
    (row,) = classifier.predict([tissue(0)], 0.4)
    assert row["in_scope"] is None and row["scope_percentile"] is None and classifier.scope is None
    Image.fromarray(tissue(0)).save(tmp_path / "0.png")
    out = tmp_path / "out.parquet"
    assert (
        main(["predict", str(tmp_path / "0.png"), "--model", str(tiny_model), "--mpp", "0.4", "--out", str(out)]) == 0
    )
    assert "out of the model" not in capsys.readouterr().out
    assert pq.read_table(out)["in_scope"].to_pylist() == [None]


def test_the_command_counts_them(scoped, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        Image.fromarray(tissue(i)).save(pictures / f"{i}.png")
    Image.new("RGB", (160, 128), "lime").save(pictures / "3.png")
    (pictures / "4.png").write_text("no image")
    out = tmp_path / "out.csv"
    assert main(["predict", str(pictures), "--model", str(scoped), "--mpp", "0.4", "--out", str(out)]) == 1
    summary = predict_to_file(Classifier.from_pretrained(scoped), items_of(pictures, 0.4), tmp_path / "out.parquet")
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert rows[3]["in_scope"] is False and rows[4]["in_scope"] is None
    assert f"{summary.out_of_scope} of 5 images are out of the model's scope" in capsys.readouterr().out
    assert summary.out_of_scope == sum(row["in_scope"] is False for row in rows) < 3


def test_tiles_of_a_slide_have_it(scoped, tmp_path):
    pytest.importorskip("openslide")
    import tifffile

    pixels = np.full((512, 1024, 3), 243, np.uint8)
    pixels[:, :512] = tissue(1, 0.4, (512, 512))
    pixels[:, 600:] = (200, 40, 90)  # called tissue, and none
    unit = {"resolution": (25_000, 25_000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tmp_path / "slide.tif", pixels, tile=(256, 256), photometric="rgb", metadata=None, **unit)
    row = Classifier.from_pretrained(scoped, device="cpu").predict_slide(tmp_path / "slide.tif", tmp_path / "out")
    tiles = pq.read_table(tmp_path / "out/slide/tiles.parquet").to_pylist()
    assert row["out_of_scope"] == np.mean([not tile["in_scope"] for tile in tiles]) > 0.1
    assert f"{row['out_of_scope']:.0%} of its tiles are out of the model's scope" in row["warning"]
    flat = [tile for tile in tiles if tile["x"] > 610]
    assert flat and not any(tile["in_scope"] for tile in flat)


def test_another_models_scope_is_refused(scoped, tmp_path):
    folder = shutil.copytree(scoped, tmp_path / "model")
    check_files(folder)
    mine = Scope.from_pretrained(folder)
    Scope(mine.stage, mine.mean, mine.whitener, mine.reference, "0" * 64).save_pretrained(folder)
    with pytest.raises(ValueError, match=f"{FILE} is another model's"):
        check_files(folder)


def test_the_packaged_scope_travels_with_its_card(tmp_path):
    packaged = PACKAGED / "magdg_resnet18.virtual"
    staged = stage(packaged, "me/model", tmp_path / "staged")
    assert (staged / FILE).read_bytes() == (packaged / FILE).read_bytes()
    card, recorded = " ".join((staged / "README.md").read_text().split()), read_json(staged / "results.json")["scope"]
    assert f"{recorded['threshold']:.2f}" in card and "| photographs |" in card
    assert recorded["threshold"] == Scope.from_pretrained(packaged).threshold
    assert len(recorded["detection"]) > 15
