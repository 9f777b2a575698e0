"""Maps that add up to what the network says, and the page that shows them."""

import numpy as np
import pytest
import torch
from PIL import Image

from magdg import main
from magnification_invariant.predict import Classifier, explain
from magnification_invariant.virtual_slides import render_field, virtual_field


@pytest.fixture(scope="module")
def classifier(tiny_model):
    return Classifier.from_pretrained(tiny_model, device="cpu")


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(render_field(0, 0.25, virtual_field(0, 100, 0), (200, 160)))


@pytest.fixture(scope="module")
def tiles(picture):
    pixels = np.asarray(picture).transpose(2, 0, 1)
    return np.stack([pixels[:, :64, :64], pixels[:, 64:128, 100:164]])


def margin(classifier, tiles):
    logits = torch.from_numpy(classifier.run(tiles)[0])
    return (logits[:, 1] - logits[:, 0]).numpy()


def test_activation_maps_sum_to_the_margin(classifier, tiles):
    """Global pooling and a linear head: the mean of the map over its cells is the margin but for the bias."""
    maps = explain.activation_maps(classifier.network, tiles).numpy()
    cells = maps.shape[1] * maps.shape[2]
    bias = classifier.network.model.fc.bias.detach().numpy()
    # the gradient of a pooled cell is 1 / cells of the head's weight: the map's sum is already the mean
    np.testing.assert_allclose(maps.sum((1, 2)), margin(classifier, tiles) - (bias[1] - bias[0]), rtol=1e-3, atol=1e-3)
    assert cells > 1 and not np.allclose(maps, maps.mean())


def test_a_map_of_a_large_view_is_that_of_its_tiles(classifier, picture):
    view = np.asarray(picture)[:64, :128]
    whole = explain.map_of_view(classifier, view)
    parts = [explain.map_of_view(classifier, view[:, left : left + 64]) for left in (0, 64)]
    np.testing.assert_allclose(whole, np.hstack(parts), atol=1e-4)


def test_the_page_of_one_image(tiny_model, classifier, picture, tmp_path, capsys):
    picture.save(tmp_path / "image.png")
    out = tmp_path / "page.png"
    command = ["explain", str(tmp_path / "image.png"), "--model", str(tiny_model), "--out", str(out)]
    assert main([*command, "--mpp", "0.25"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("um/px: P(malignant)") == 4 and "not recorded" in printed
    with Image.open(out) as page:
        assert page.width > page.height > 400
    assert main(command) == 2 and "pass --mpp" in capsys.readouterr().err
    assert main([*command, "--mpp", "40"]) == 2 and "magnification of 40" in capsys.readouterr().err
    (tmp_path / "image.png").write_text("text")
    assert main([*command, "--mpp", "0.25"]) == 2 and "cannot identify" in capsys.readouterr().err
