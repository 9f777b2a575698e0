"""Nothing of the test reaches a model, whatever the method: its rows are replaced by noise, and all stays bit-equal."""

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from magnification_invariant.data.breakhis import load_breakhis
from magnification_invariant.data.splits import leave_one_magnification_out
from magnification_invariant.engine import FitConfig
from magnification_invariant.lomo.cell import Cell
from magnification_invariant.lomo.run import run_cell
from magnification_invariant.records import NORMALISED, Run
from magnification_invariant.tasks import TASKS, MagGAN

FIT = FitConfig(epochs=3, image_size=32, batch_size=8)
FILES = ("metrics.jsonl", "prepare.jsonl", "gan_samples.png", "model/model.safetensors", "model/signature.safetensors")

pytestmark = pytest.mark.filterwarnings("ignore:timm has no weights")  # of the tiny model


@pytest.fixture(scope="module")
def ds(breakhis_tree):
    return load_breakhis(breakhis_tree)


def poisoned(ds, rows):
    """Noise for the pixels of `rows`, and the other class for their label."""
    rng, images, label = np.random.default_rng(0), list(ds["image"]), np.asarray(ds["label"]).copy()
    for row in rows:
        images[row] = Image.fromarray(rng.integers(0, 256, (46, 70, 3), dtype=np.uint8))
    label[rows] = 1 - label[rows]
    features = ds.features
    ds = ds.remove_columns(["image", "label"])
    ds = ds.add_column(
        "image", [features["image"].encode_example(image) for image in images], feature=features["image"]
    )
    return ds.add_column("label", label.tolist(), feature=features["label"])


def contents(run):
    """All that follows from training and validation."""
    of_val = run.predictions.filter([part == "val" for part in run.predictions["part"].to_pylist()])
    return {
        **{name: (run.folder / name).read_bytes() if (run.folder / name).exists() else None for name in FILES},
        "validation": of_val.to_pydict(),
        "embeddings": [run.embeddings(part).tolist() for part in ("train", "val")],
        "scales": [run.results[name] for name in ("base_range", "mpp_range")],
        "temperature": run.temperature,
        "scores": run.results["parts"]["val"],
    }


@pytest.mark.parametrize("method", TASKS)
def test_nothing_of_the_test_reaches_the_model(ds, tmp_path, method, monkeypatch):
    monkeypatch.setattr(MagGAN, "size", 16)
    monkeypatch.setattr(MagGAN, "width", 4)
    # 40X is coarser than all that is trained on, so that it is another image when it is shown scale-normalised
    cell = Cell(method, 40, n_folds=4, model="test_magdg_resnet", init="none", fit=FIT)
    cell = cell.with_settings({"gan_epochs": 1} if method == "gan" else {})
    # The split is made once: from the labels that are poisoned, others would follow.
    split = leave_one_magnification_out(ds, cell.held_out, n_folds=cell.n_folds)
    unseen = np.setdiff1d(np.arange(len(ds)), np.concatenate([split.train, split.val]))
    held_out = np.flatnonzero(np.asarray(ds["magnification"]) == 40)
    assert {*split.test, *split.test_source, *held_out} == {*unseen} and len(unseen) == 14

    def run(table, name):
        run_cell(cell, table, tmp_path / name, split=split)
        return Run(tmp_path / name)

    clean, other = run(ds, "clean"), run(poisoned(ds, unseen), "poisoned")
    a, b = contents(clean), contents(other)
    assert [name for name in a if a[name] != b[name]] == []
    assert a["model/signature.safetensors"] and (a["gan_samples.png"] is None) == (method != "gan")

    # The poison did reach the test, and the rows of training would have shown it.
    for part in ("test", "test_source", NORMALISED):
        assert (clean.part(part)["logits"] != other.part(part)["logits"]).all()
    assert (clean.part("test")["mpp"] > clean.part(NORMALISED)["mpp"]).all()
    if method == "erm":
        seen = run(poisoned(ds, split.train[:1]), "seen")
        assert contents(seen)["model/model.safetensors"] != a["model/model.safetensors"]

    # What is released is the plain network, without the method's own parts.
    released = timm.create_model(f"local-dir:{clean.model}", pretrained=True)
    assert type(released) is timm.models.resnet.ResNet
    saved = safetensors.torch.load_file(clean.model / "model.safetensors")
    assert saved.keys() == released.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in released.state_dict().items())
