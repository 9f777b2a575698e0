"""The protocol on 32 tiny images: records, resume, leaks, starts."""

import json
import shutil
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
from magnification_invariant.lomo import grid as lomo
from magnification_invariant.lomo import run as cell_module
from magnification_invariant.lomo.cell import Cell
from magnification_invariant.lomo.grid import make_grid, run_grid
from magnification_invariant.lomo.run import PARTS, run_cell
from magnification_invariant.model_folder import read_model_config
from magnification_invariant.report.table import markdown, summarise
from magnification_invariant.tasks.floors import FLOORS

CELL = Cell(
    "dann",
    held_out=200,
    n_folds=4,
    model="test_magdg_resnet",
    epochs=2,
    image_size=32,
    batch_size=8,
)


@pytest.fixture(scope="module")
def ds(breakhis_tree):
    return load_breakhis(breakhis_tree)


@pytest.fixture(scope="module")
def finished(ds, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / CELL.name
    run_cell(CELL, ds, folder)
    return folder


def weights(folder):
    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_records(ds, finished):
    assert sorted(p.name for p in finished.iterdir()) == [
        "config.json",
        "embeddings.safetensors",
        "metrics.jsonl",
        "model",
        "predictions.parquet",
        "results.json",
        "timing.json",
    ]
    config = json.loads((finished / "config.json").read_text())
    assert config["arguments"]["held_out"] == 200 and config["threads"] == 1
    assert len(config["start"]["initial_sha256"]) == 64 and len(config["recipe_sha256"]) == 16
    assert [json.loads(line)["epoch"] for line in (finished / "metrics.jsonl").read_text().splitlines()] == [0, 1]

    split = leave_one_magnification_out(ds, 200, n_folds=4)
    records = pq.read_table(finished / "predictions.parquet").to_pandas()
    for epoch in (0, 1):
        for part in PARTS:
            rows = records[(records.epoch == epoch) & (records.part == part)]
            wanted = ds.select(getattr(split, part))
            assert rows.filename.tolist() == wanted["filename"][:]
            assert rows.label.tolist() == wanted["label"][:]
            assert rows.domain.tolist() == wanted["magnification"][:]
    assert set(records[records.part == "test"].domain) == {200}
    assert 200 not in set(records[records.part != "test"].domain)
    logits = np.stack(records.logits)
    assert np.allclose(records.probability, 1 / (1 + np.exp(logits[:, 0] - logits[:, 1])))
    # um/px at the network's input: the whole height of 460 native pixels on 36
    native = 6.5 / (3.3 * 20)
    assert np.allclose(records[records.part == "test"].mpp, native * 460 / 36)

    tensors = safetensors.torch.load_file(finished / "embeddings.safetensors")
    assert tensors["train.row"].tolist() == split.train.tolist()
    assert tensors["train.embedding"].shape == (12, 96)


def test_results_follow_from_the_predictions(finished):
    from sklearn.metrics import roc_auc_score

    results = json.loads((finished / "results.json").read_text())
    records = pq.read_table(finished / "predictions.parquet").to_pandas()
    source = records[(records.epoch == 1) & (records.part == "test_source")]
    assert results["parts"]["test_source"]["image"]["auc"] == pytest.approx(
        roc_auc_score(source.label, source.probability)
    )
    brier = np.mean((source.probability - source.label) ** 2)
    assert results["uncalibrated"]["test_source"]["image"]["brier"] == pytest.approx(brier)
    assert 0.25 <= results["temperature"] <= 8
    assert 0 <= results["signature"]["size"] <= results["signature"]["width"] == 96


def test_the_model_loads_in_timm_and_says_the_same(ds, finished):
    """Its own transform on the image file gives the recorded logits: nothing about the input is left to guess."""
    model = timm.create_model(f"local-dir:{finished / 'model'}", pretrained=True).eval()
    assert type(model) is timm.models.resnet.ResNet
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    records = pq.read_table(finished / "predictions.parquet").to_pandas()
    records = records[(records.epoch == 1) & (records.part == "test_source")]
    images = dict(zip(ds["filename"], ds["image"], strict=True))
    with torch.inference_mode():
        logits = model(torch.stack([transform(images[name]) for name in records.filename]))
    # The cache holds whole pixel values (8 bit) of the same resize.
    assert np.allclose(logits.numpy(), np.stack(records.logits), atol=2e-3)

    config = read_model_config(str(finished / "model"))
    native = {m: 6.5 / (3.3 * m / 10) for m in (40, 100, 400)}
    assert config["mpp_range"] == pytest.approx([native[400] * 460 / 36, native[40] * 460 / 36])
    assert config["mpp_source"] == pytest.approx(sorted(10 * v for v in native.values()), abs=1e-6)  # 70 pixels wide
    assert config["seen"]["magnifications"] == [40, 100, 400] and len(config["seen"]["patients"]) == 6
    assert config["label_names"] == ["benign", "malignant"] and "model_args" not in config
    fixture = json.loads((finished / "model" / "fixture.json").read_text())
    with torch.inference_mode():
        again = model(transform(Image.open(finished / "model" / fixture["image"])).unsqueeze(0))[0]
    assert again.tolist() == fixture["logits"]


def test_same_arguments_same_records(ds, finished, tmp_path):
    run_cell(CELL, ds, tmp_path / "again")
    assert same_weights(finished, tmp_path / "again")
    for name in ("predictions.parquet", "results.json", "metrics.jsonl", "embeddings.safetensors"):
        assert (finished / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_grid_skips_what_is_finished_and_goes_on_after_a_failure(ds, tmp_path, monkeypatch):
    cells = make_grid(
        ["erm", "dann"],
        [40, 200],
        [0],
        [0],
        **{k: getattr(CELL, k) for k in ("n_folds", "model", "image_size")},
        epochs=1,
    )
    assert [cell.method for cell in cells] == [*FLOORS, "erm", "dann"] * 2
    ran, real = [], cell_module.fit

    def fit(task, *args, **kwargs):
        ran.append(kwargs["description"])
        if kwargs["description"].startswith("erm-lomo40"):
            raise cell_module.Diverged("made for this test")
        return real(task, *args, **kwargs)

    monkeypatch.setattr(cell_module, "fit", fit)
    said = []
    folders = run_grid(cells, ds, tmp_path, say=said.append)
    assert len(folders) == 7 and "FAILED" in said[2] and "made for this test" in said[2]
    assert len(ran) == 4
    monkeypatch.setattr(cell_module, "fit", real)
    assert len(run_grid(cells, ds, tmp_path, say=said.append)) == 8
    assert sum("skipped" in line for line in said) == 7

    rows = summarise(run_grid(cells, ds, tmp_path, say=said.append))
    assert {(row["method"], row["held_out"]) for row in rows} == {
        (m, h) for m in (*FLOORS, "erm", "dann") for h in (40, 200)
    }
    text = markdown(rows)
    assert text.count("constant") == 4 and "AUC" in text and "Nogueira" in text
    constant = next(row for row in rows if row["method"] == "constant")
    assert constant["image"]["auc"] == 0.5 and constant["image"]["brier"] == pytest.approx(0.25)


def test_a_fold_whose_test_lacks_a_class_does_not_end_the_grid(ds, tmp_path):
    settings = {name: getattr(CELL, name) for name in ("n_folds", "model", "image_size")}
    cells = [cell for cell in make_grid(["erm"], [40], [0, 1], [0], epochs=1, **settings) if cell.method == "erm"]
    split = leave_one_magnification_out(ds, 40, n_folds=CELL.n_folds, fold=1)
    gone = {int(i) for i in split.test if ds[int(i)]["label"] == 0}
    said = []
    folders = run_grid(cells, ds.select([i for i in range(len(ds)) if i not in gone]), tmp_path, say=said.append)
    assert [folder.name for folder in folders] == ["erm-lomo40-fold0-seed0"]
    assert "FAILED" in said[1] and "no image of label [0]" in said[1]


def test_a_folder_of_other_arguments_is_refused(ds, finished):
    with pytest.raises(ValueError, match="epochs was 2 and is now 3"):
        run_cell(replace(CELL, epochs=3), ds, finished)
    with pytest.raises(ValueError, match="data was"):
        run_cell(CELL, ds.select(range(31)), finished)


def test_a_model_that_predicts_no_numbers_ends_its_cell_and_not_the_grid(ds, tmp_path, monkeypatch):
    """Its losses may have been numbers: BatchNorm in training hides what its running statistics have become."""
    real, said = cell_module.predict, []

    def predict(model, *args, **kwargs):
        logits, embedding = real(model, *args, **kwargs)
        return (logits * np.nan if hasattr(model, "num_domains") and model.num_domains else logits), embedding

    monkeypatch.setattr(cell_module, "predict", predict)
    cells = [replace(CELL, epochs=1), replace(CELL, method="erm", epochs=1)]
    folders = run_grid(cells, ds, tmp_path, say=said.append)
    assert [folder.name for folder in folders] == [cells[1].name]
    assert "FAILED" in said[0] and "not a finite number" in said[0] and "done" in said[1]


def test_only_a_collapsed_embedding_has_no_signature(ds, monkeypatch):
    split = leave_one_magnification_out(ds, 200, n_folds=4)
    columns = {name: np.asarray(ds[name]) for name in ("label", "patient")} | {
        "domain": np.asarray(ds["magnification"])
    }
    flat = {part: np.ones((len(getattr(split, part)), 5)) for part in ("train", *PARTS)}
    signature, results = cell_module._signature(flat, split, columns)
    assert signature is None and "constant" in results["why_none"]
    with pytest.raises(ValueError, match="NaN"):
        cell_module._signature(flat | {"train": flat["train"] * np.nan}, split, columns)


def test_one_training_magnification_is_too_few_for_an_adversary(ds, tmp_path):
    two = ds.filter(lambda m: m in (40, 200), input_columns="magnification")
    with pytest.raises(ValueError, match="two training domains to tell apart, and there is one: use erm"):
        run_cell(CELL, two, tmp_path / "dann")
    run_cell(replace(CELL, method="erm", epochs=1), two, tmp_path / "erm")
    assert (tmp_path / "erm" / "results.json").exists()


def test_workers_take_gpus_in_turns(ds, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for worker in range(3):
        lomo._work(worker, [], ds, tmp_path, None, print)
    assert taken == [0, 1, 0]


def test_class_and_domain_that_tell_each_other_are_warned_of():
    import warnings

    label = np.array([0, 0, 1, 1] * 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cell_module._class_domain_information(label, np.array([0, 1] * 8)) == pytest.approx(0, abs=1e-12)
    with pytest.warns(UserWarning, match=r"share 1\.00 bits"):
        assert cell_module._class_domain_information(label, label) == pytest.approx(1)
    # three of four agree: by the definition
    domain = np.where(np.arange(16) % 4 == 0, 1, label)
    joint = np.array([[4, 4], [0, 8]]) / 16
    wanted = sum(p * np.log2(p / (joint[i].sum() * joint[:, j].sum())) for (i, j), p in np.ndenumerate(joint) if p)
    with pytest.warns(UserWarning, match="bits in the training rows"):
        assert cell_module._class_domain_information(label, domain) == pytest.approx(wanted)


def test_tensorboard_gets_what_metrics_jsonl_has(ds, tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("magdg")
    (folder,) = run_grid([CELL], ds, tmp_path / "runs", accelerator=accelerator, say=lambda line: None)
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "magdg")).Reload()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = lines[0].keys() - {"epoch"}
    assert {f"{CELL.name}/{name}" for name in {*names, "images_per_second"}} == set(events.Tags()["scalars"])
    assert {"class_loss", "domain_loss", "coeff", "learning_rate"} <= names
    for name in names:
        scalars = events.Scalars(f"{CELL.name}/{name}")
        assert [(s.step, s.value) for s in scalars] == [(i, pytest.approx(line[name])) for i, line in enumerate(lines)]


def test_start_weights_are_part_of_the_split(ds, finished, tmp_path):
    """A start that saw the test's patients or magnification is refused, or marked."""
    start = str(finished / "model")
    with pytest.raises(ValueError, match="seen patients"):  # fold 1 tests what fold 0 validated on
        run_cell(replace(CELL, fold=1, pretrained_backbone=start), ds, tmp_path / "a")
    with pytest.raises(ValueError, match="the magnification 40"):
        run_cell(replace(CELL, held_out=40, pretrained_backbone=start), ds, tmp_path / "b")
    folder = tmp_path / "c"
    run_cell(replace(CELL, fold=1, pretrained_backbone=start, allow_seen_init=True, epochs=1), ds, folder)
    assert "the start had seen the test" in markdown(summarise([folder]))


def test_weights_that_are_frozen_are_a_start_too(ds, finished, tmp_path):
    cell = replace(CELL, method="frozen", model=f"local-dir:{finished / 'model'}", epochs=1)
    with pytest.raises(ValueError, match="seen patients"):  # what was validated on was seen too
        run_cell(cell, ds, tmp_path / "a")
    run_cell(replace(cell, allow_seen_init=True), ds, tmp_path / "b")
    start = json.loads((tmp_path / "b" / "config.json").read_text())["start"]
    assert start["source"] == cell.model and start["saw_test"]
    a, b = weights(finished), weights(tmp_path / "b")
    assert {name for name in a if not torch.equal(a[name], b[name])} == {"fc.weight", "fc.bias"}


def test_options_go_to_the_methods_that_have_them(ds, tmp_path):
    cells = make_grid(["erm", "coral", "mixstyle"], [200], [0], [0], options={"gamma": 7.0, "p": 0.0})
    assert {cell.method: cell.options for cell in cells} == {
        **{method: {} for method in (*FLOORS, "erm")},
        "coral": {"gamma": 7.0},
        "mixstyle": {"p": 0.0},
    }
    assert len({replace(CELL, method="coral", options={"gamma": g}).recipe_sha256 for g in (1.0, 2.0)}) == 2
    with pytest.raises(ValueError, match="erm, coral: none has the option gama"):
        make_grid(["erm", "coral"], [200], [0], [0], options={"gama": 7.0})
    with pytest.raises(ValueError, match="coral has no option coeff: its options are gamma"):
        run_cell(replace(CELL, method="coral", options={"coeff": 1.0}), ds, tmp_path / "a")
    with pytest.raises(ValueError, match="gamma is a weight of at least 0"):
        run_cell(replace(CELL, method="coral", options={"gamma": -1.0}), ds, tmp_path / "b")
    with pytest.raises(ValueError, match="coral does not take the options gamma='x'"):
        run_cell(replace(CELL, method="coral", options={"gamma": "x"}), ds, tmp_path / "c")
    folder = tmp_path / CELL.name
    run_cell(replace(CELL, options={"critic_steps": 2}, epochs=1), ds, folder)
    assert "critic_loss" in json.loads((folder / "metrics.jsonl").read_text())
    with pytest.raises(ValueError, match=r"options was \{'critic_steps': 2\} and is now \{\}"):
        run_cell(replace(CELL, epochs=1), ds, folder)


def test_start_weights_are_loaded(ds, finished, tmp_path):
    plain = tmp_path / "backbone.safetensors"
    shutil.copy(finished / "model" / "model.safetensors", plain)
    folder = tmp_path / "run"
    run_cell(replace(CELL, pretrained_backbone=str(plain), epochs=1, learning_rate=0.0), ds, folder)
    a, b = weights(finished), weights(folder)
    assert torch.equal(a["layer1.0.conv1.weight"], b["layer1.0.conv1.weight"])
    assert not torch.equal(a["fc.weight"], b["fc.weight"])

    del a["layer3.0.conv1.weight"]
    safetensors.torch.save_file(a, plain)
    with pytest.raises(ValueError, match=r"layer3\.0\.conv1\.weight"):
        run_cell(replace(CELL, pretrained_backbone=str(plain)), ds, tmp_path / "broken")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub repository"):
        run_cell(replace(CELL, pretrained_backbone="nobody/nothing"), ds, tmp_path / "absent")
