"""Our embedder as raw2features finds and uses it: the embeddings it stores are those of `Classifier`."""

import configparser
import inspect
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from magnification_invariant.data.slides import find_tissue
from magnification_invariant.predict import Classifier
from magnification_invariant.predict.slides import default_scale
from magnification_invariant.virtual_slides import render_field, virtual_field

pytest.importorskip("raw2features")

MPP = 0.25
SIZE = (1280, 960)


@pytest.fixture(scope="module")
def classifier(tiny_model):
    return Classifier.from_pretrained(tiny_model, device="cpu")


@pytest.fixture(scope="module")
def ours(tiny_model):
    from magnification_invariant.predict.raw2features import embedder

    return embedder(tiny_model)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """An OME-Zarr of tissue on glass, and the pixels of its three levels."""
    for name in ("ngff_zarr", "cv2"):
        pytest.importorskip(name, reason="pip install 'raw2features[zarr,image]'")
    import zarr

    path = tmp_path_factory.mktemp("slide") / "drawn.ome.zarr"
    pixels = np.full((*SIZE[::-1], 3), 243, np.uint8)
    pixels[100:800, 200:1100] = render_field(400, MPP, virtual_field(400, 100, 0), (900, 700))
    levels = [pixels, *(np.asarray(Image.fromarray(pixels).reduce(factor)) for factor in (2, 4))]
    group = zarr.open_group(path, mode="w", zarr_format=2)
    for k, level in enumerate(levels):
        group.create_array(str(k), data=level.transpose(2, 0, 1).copy(), chunks=(3, 256, 256))
    axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space", "unit": "micrometer"} for n in "yx")]
    scales = [[{"type": "scale", "scale": [1.0, MPP * 2**k, MPP * 2**k]}] for k in range(3)]
    datasets = [{"path": str(k), "coordinateTransformations": scale} for k, scale in enumerate(scales)]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    return path, levels


def test_the_entry_point_is_an_embedder():
    from raw2features.embedders.base import Embedder, ModelSpec

    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[2] / "setup.cfg")
    name, value = config["options.entry_points"]["raw2features.embedders"].strip().split(" = ")
    plugin = EntryPoint(name, value, "raw2features.embedders").load()
    assert issubclass(plugin, Embedder) and not inspect.isabstract(plugin)
    from magnification_invariant.predict import raw2features

    assert name == raw2features.FAMILY and plugin is raw2features.Embedder
    assert list(inspect.signature(plugin.load).parameters) == list(inspect.signature(Embedder.load).parameters)
    assert isinstance(raw2features.base.ModelSpec, type) and raw2features.base.ModelSpec is ModelSpec


def test_tiles_have_the_classifiers_embeddings(ours, classifier):
    tiles = [render_field(n, 0.4, virtual_field(n, 100, 0), (classifier.size,) * 2) for n in range(3)]
    embeddings = ours.embed_batch(ours.transform_batch(tiles, "cpu"))
    rows = classifier.predict(tiles, 0.4, view=0.4)
    np.testing.assert_allclose(embeddings, [row["embedding"] for row in rows], rtol=1e-4, atol=1e-5)
    assert embeddings.dtype == torch.float32 and embeddings.shape[1] == ours.embedding_dim
    signature = classifier.projector.transform(embeddings.numpy())
    np.testing.assert_allclose(signature, [row["signature"] for row in rows], rtol=1e-3, atol=1e-4)
    assert ours.spec.recommended_mpp == default_scale(classifier) and ours.spec.input_size == classifier.size


def test_a_slide_is_embedded(ours, classifier, slide, tmp_path):
    import zarr
    from raw2features import RunConfig, embed_slide, validate_store

    path, levels = slide
    config = RunConfig(models=[ours.name], features_dtype="float32", device="cpu", tissue_threshold=0.5)
    embed_slide(str(path), str(tmp_path), config, requested_mpp=2 * MPP, embedders=[ours])
    (store,) = tmp_path.glob("*.embeddings.zarr")
    assert not validate_store(str(store))
    ((_, grid),) = zarr.open_group(store, mode="r")["grids"].groups()
    coords, features = grid["coords"][:], grid["features"][ours.name][:]
    tissue = find_tissue(levels[0], MPP)
    assert len(coords) > 10 and min(tissue[y : y + 128, x : x + 128].mean() for x, y in coords) > 0.25
    tiles = [levels[1][y // 2 : y // 2 + 64, x // 2 : x // 2 + 64] for x, y in coords]
    rows = classifier.predict(tiles, 2 * MPP, view=2 * MPP)
    np.testing.assert_allclose(features, [row["embedding"] for row in rows], rtol=1e-3, atol=1e-4)
    embed_slide(str(path), str(tmp_path / "own"), RunConfig(models=[ours.name], device="cpu"), embedders=[ours])
    (store,) = (tmp_path / "own").glob("*.embeddings.zarr")
    assert list(zarr.open_group(store, mode="r")["grids"].group_keys()) == ["mpp0.4_px64"]  # the middle of its range
