"""Nothing of the test reaches a model, whatever the method: its rows are replaced by noise, and all stays bit-equal."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from magnification_invariant.data.breakhis import load_breakhis
from magnification_invariant.data.splits import leave_one_magnification_out
from magnification_invariant.lomo.cell import Cell
from magnification_invariant.lomo.run import run_cell
from magnification_invariant.metrics import select_epoch
from magnification_invariant.tasks import TASKS, MagGAN

CELL = Cell("erm", 200, n_folds=4, model="test_magdg_resnet", epochs=3, image_size=32, batch_size=8, gan_epochs=1)
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


def contents(folder):
    """All that follows from training and validation."""
    records = pq.read_table(folder / "predictions.parquet").to_pandas()
    results = json.loads((folder / "results.json").read_text())
    embeddings = safetensors.torch.load_file(folder / "embeddings.safetensors")
    return {
        **{name: (folder / name).read_bytes() if (folder / name).exists() else None for name in FILES},
        "epochs": [select_epoch(rule, records) for rule in ("last", "val_log_loss", "val_auc")],
        "validation": np.stack(records[records.part == "val"].logits).tolist(),
        "embeddings": [embeddings[f"{part}.embedding"].tolist() for part in ("train", "val")],
        "temperature": results["temperature"],
        "scores": results["parts"]["val"],
    }


@pytest.mark.parametrize("method", TASKS)
def test_nothing_of_the_test_reaches_the_model(ds, tmp_path, method, monkeypatch):
    monkeypatch.setattr(MagGAN, "size", 16)
    monkeypatch.setattr(MagGAN, "width", 4)
    cell = replace(CELL, method=method)
    # The split is made once: from the labels that are poisoned, others would follow.
    split = leave_one_magnification_out(ds, cell.held_out, n_folds=cell.n_folds)
    unseen = np.setdiff1d(np.arange(len(ds)), np.concatenate([split.train, split.val]))
    held_out = np.flatnonzero(np.asarray(ds["magnification"]) == 200)
    assert {*split.test, *split.test_source, *held_out} == {*unseen} and len(unseen) == 14

    run_cell(cell, ds, tmp_path / "clean", split=split)
    run_cell(cell, poisoned(ds, unseen), tmp_path / "poisoned", split=split)
    clean, other = contents(tmp_path / "clean"), contents(tmp_path / "poisoned")
    assert [name for name in clean if clean[name] != other[name]] == []
    assert clean["model/signature.safetensors"] and (clean["gan_samples.png"] is None) == (method != "gan")

    # The poison did reach the test, and the rows of training would have shown it.
    a, b = (pq.read_table(tmp_path / name / "predictions.parquet").to_pandas() for name in ("clean", "poisoned"))
    for part in ("test", "test_source"):
        one, two = (np.stack(records[records.part == part].logits) for records in (a, b))
        assert (one != two).all()
    if method == "erm":
        run_cell(cell, poisoned(ds, split.train[:1]), tmp_path / "seen", split=split)
        assert contents(tmp_path / "seen")["model/model.safetensors"] != clean["model/model.safetensors"]

    # What is released is the plain network, without the method's own parts.
    released = timm.create_model(f"local-dir:{tmp_path / 'clean' / 'model'}", pretrained=True)
    assert type(released) is timm.models.resnet.ResNet
    saved = safetensors.torch.load_file(tmp_path / "clean" / "model" / "model.safetensors")
    assert saved.keys() == released.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in released.state_dict().items())
