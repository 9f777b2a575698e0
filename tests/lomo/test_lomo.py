"""The protocol on 32 tiny images: records, identity, resume, starts, and two runs at once."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from test_files import locked_elsewhere

from magdg import main
from magnification_invariant.data.breakhis import load_breakhis
from magnification_invariant.data.splits import leave_one_magnification_out
from magnification_invariant.engine import Diverged, FitConfig
from magnification_invariant.lomo import grid
from magnification_invariant.lomo import run as run_module
from magnification_invariant.lomo.cell import Cell, is_finished
from magnification_invariant.lomo.grid import make_grid, run_grid
from magnification_invariant.lomo.run import run_cell
from magnification_invariant.model_folder import read_model_config
from magnification_invariant.records import NORMALISED, PARTS, Run
from magnification_invariant.report.table import markdown, summarise
from magnification_invariant.tasks.floors import OF_IMAGES

FIT = FitConfig(epochs=2, image_size=32, batch_size=8)
SHARED = {"n_folds": 4, "model": "test_magdg_resnet"}
CELL = Cell("dann", 200, fit=FIT, **SHARED)
ERM = Cell("erm", 200, fit=replace(FIT, epochs=1), **SHARED)
NATIVE = {m: 6.5 / (3.3 * m / 10) for m in (40, 100, 200, 400)}  # um/px of 460 lines


def quiet(line):
    pass


@pytest.fixture(scope="module")
def ds(breakhis_tree):
    return load_breakhis(breakhis_tree)


@pytest.fixture(scope="module")
def finished(ds, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("runs") / CELL.name)
    run_cell(CELL, ds, run.folder)
    return run


def weights(run):
    return safetensors.torch.load_file(run.model / "model.safetensors")


def test_records(ds, finished):
    assert {p.name for p in finished.folder.iterdir()} == {
        *("config.json", "embeddings.parquet", "embeddings.safetensors", "metrics.jsonl", "model"),
        *("predictions.parquet", "results.json", "timing.json"),
    }
    config = finished.config
    assert config.keys() == {"cell", "settings", "settings_sha256", "machine", "start"}
    assert (finished.method, finished.held_out, finished.key) == ("dann", 200, (200, 0, 0))
    assert config["cell"]["split"] == {"n_folds": 4, "split_seed": 0} and len(config["settings_sha256"]) == 16
    assert config["settings"]["model"] == "test_magdg_resnet" and config["settings"]["coeff"] == 1
    assert config["machine"].keys() == {"threads", "versions", "git"} and len(config["start"]["initial_sha256"]) == 64
    assert [each["epoch"] for each in finished.losses()] == [0, 1]

    split = leave_one_magnification_out(ds, 200, n_folds=4)
    predictions = finished.predictions.to_pandas()
    assert set(predictions.epoch) == {1}  # the last of two
    for part in (*PARTS, NORMALISED):
        wanted = ds.select(getattr(split, part.removesuffix("_normalised")))
        rows = predictions[predictions.part == part]
        for name, column in {"filename": "filename", "label": "label", "domain": "magnification"}.items():
            assert rows[name].tolist() == wanted[column][:]
        # the whole height of 460 native pixels on 32, which two tiles cover; 200X lies between 100X and 400X
        assert np.allclose(rows.mpp, [NATIVE[m] * 460 / 32 for m in rows.domain])
        assert set(rows.tiles) == {2} and set(rows.filled) == {0}
    assert finished.part(NORMALISED)["logits"].tolist() == finished.part("test")["logits"].tolist()
    assert set(finished.part("test")["domain"]) == {200} and 200 not in finished.part("test_source")["domain"]
    logits = np.stack(predictions.logits)
    assert np.allclose(predictions.probability, 1 / (1 + np.exp(logits[:, 0] - logits[:, 1])))

    for part in ("train", *PARTS):
        rows = getattr(split, part)
        assert finished.embeddings(part).shape == (len(rows), 96)
        assert finished.keys(part)["filename"].tolist() == ds.select(rows)["filename"][:]
    head = weights(finished)
    logits = finished.embeddings("test") @ head["fc.weight"].float().numpy().T + head["fc.bias"].numpy()
    assert np.allclose(logits, finished.part("test")["logits"], atol=1e-5)


def test_results_follow_from_the_predictions(finished):
    from sklearn.metrics import roc_auc_score

    results, source = finished.results, finished.part("test_source", temperature=1.0)
    auc = roc_auc_score(source["label"], source["probability"])
    assert results["parts"]["test_source"]["image"]["auc"] == pytest.approx(auc)
    brier = np.mean((source["probability"] - source["label"]) ** 2)
    assert results["uncalibrated"]["test_source"]["image"]["brier"] == pytest.approx(brier)
    assert results["parts"].keys() == results["uncalibrated"].keys() == {*PARTS, NORMALISED}
    assert 0.25 <= results["temperature"] <= 8
    assert 0 <= results["signature"]["size"] <= results["signature"]["width"] == 96


def test_the_model_loads_in_timm_and_its_own_transform_shows_the_tile_that_was_recorded(ds, tmp_path):
    """Of square images, which one tile covers: nothing about the input is left to guess."""
    feature = ds.features["image"]
    squares = [feature.encode_example(image.crop((12, 0, 58, 46))) for image in ds["image"]]
    square = ds.remove_columns("image").add_column("image", squares, feature=feature)
    run_cell(ERM, square, tmp_path / "run")
    run = Run(tmp_path / "run")
    model = timm.create_model(f"local-dir:{run.model}", pretrained=True).eval()
    assert type(model) is timm.models.resnet.ResNet
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images, records = dict(zip(square["filename"], square["image"], strict=True)), run.part("test_source")
    with torch.inference_mode():
        logits = model(torch.stack([transform(images[name]) for name in records["filename"]]))
    assert np.allclose(logits.numpy(), records["logits"], atol=1e-5)


def test_what_the_model_says_of_itself(ds, finished):
    config = read_model_config(str(finished.folder))
    low, high = NATIVE[400] * 460 / 32, NATIVE[40] * 460 / 32
    assert config["base_range"] == pytest.approx([low, high])
    assert config["mpp_range"] == finished.results["mpp_range"] == pytest.approx([low * 0.875, high])
    native = sorted(10 * NATIVE[m] for m in (40, 100, 400))  # the images here are 70 pixels wide
    assert config["mpp_source"] == pytest.approx(native, abs=1e-6)
    split = leave_one_magnification_out(ds, 200, n_folds=4)
    patients = set(ds.select([*split.train, *split.val])["patient"])
    assert config["seen"] == {"magnifications": [40, 100, 400], "patients": sorted(patients)} and len(patients) == 6
    assert config["label_names"] == ["benign", "malignant"] and "model_args" not in config
    assert json.loads((finished.model / "results.json").read_text())["record"] == finished.config


def test_the_same_cell_gives_the_same_records_on_any_number_of_threads_it_is_the_same_cell(ds, finished, tmp_path):
    run_cell(CELL, ds, tmp_path / "again")
    for name in ("predictions.parquet", "results.json", "metrics.jsonl", "embeddings.safetensors"):
        assert (finished.folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    a, b = weights(finished), weights(Run(tmp_path / "again"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    same = replace(CELL, threads=3, fit=replace(FIT, log_every=7))
    assert same.name == CELL.name and is_finished(finished.folder, same, ds)


def test_identity_is_what_the_method_reads():
    other = {
        "epochs": 5,
        "zoom": 2.0,
        "image_size": 64,
        "model": "resnet18",
        "calibrate": False,
        "embedding": "pyramid",
    }
    constant, colour = Cell("constant", 40, seed=3), Cell("colour", 40)
    assert constant.settings == constant.with_settings(other).settings == {}
    assert constant.with_settings(other).name == constant.name == "constant-lomo40-fold0"
    assert colour.settings == {"image_size": 224} and colour.with_settings(other).settings == {"image_size": 64}
    assert colour.with_settings(other).name == "colour-64px-lomo40-fold0"
    assert (
        constant.with_settings({"n_folds": 4}).name != constant.name != constant.with_settings({"split_seed": 1}).name
    )

    erm, dann = Cell("erm", 40), Cell("dann", 40)
    assert "coeff" not in erm.settings and dann.settings["coeff"] == 1 and erm.settings["model"] == "magerm_resnet18"
    assert erm.name == replace(erm, model="magerm_resnet18").name == "erm-lomo40-fold0-seed0"
    with pytest.raises(ValueError, match="erm has no setting coeff"):
        erm.with_settings({"coeff": 0.5})
    named = [dann.with_settings({"zoom": zoom}).name for zoom in (1.0, 2.5, 2.0)]
    assert named == [f"dann{zoom}-lomo40-fold0-seed0" for zoom in ("", "-zoom", "-zoom2")]
    assert replace(dann, held_out="scanner B/1").name == "dann-lodo-scanner_B_1-fold0-seed0"
    every = [erm.with_settings({name: value}) for name, value in other.items()]
    every += [dann, dann.with_settings({"coeff": 0.5}), erm, replace(erm, init="weights.safetensors")]
    assert len({cell.name for cell in every}) == len({cell.settings_sha256 for cell in every}) == len(every)
    assert replace(erm, seed=1, fold=2, held_out=100).settings_sha256 == erm.settings_sha256


def test_several_settings_live_in_one_folder_and_one_table(ds, finished):
    changes = {"epochs": 3}, {"coeff": 0.5}, {"zoom": 2.5}
    cells = [CELL, *(CELL.with_settings(each) for each in changes)]
    folders = run_grid(cells, ds, finished.folder.parent, say=quiet)
    assert len({*folders}) == 4 and folders[0] == finished.folder
    titles = {row["method"] for row in summarise(folders)}
    wanted = {"dann (epochs 2, coeff 1)", "dann (epochs 3, coeff 1)", "dann (epochs 2, coeff 0.5)", "dann + zoom"}
    assert titles == wanted | {f"{title}, scale-normalised" for title in wanted}
    assert all(title in markdown(summarise(folders)) for title in titles)
    (low, high), zoomed = finished.results["base_range"], Run(folders[3]).results
    assert zoomed["mpp_range"] == pytest.approx([low * 0.875 / 2.5, high * 2.5])
    assert zoomed["base_range"] == [low, high]

    with pytest.raises(ValueError, match="epochs was 2 and is now 3"):
        run_cell(cells[1], ds, finished.folder)
    with pytest.raises(ValueError, match=r"data was .* choose another output folder"):
        run_cell(CELL, ds.select(range(31)), finished.folder)


def test_settings_chosen_for_each_held_out_are_one_row_by_their_recipe(ds, tmp_path):
    fit = replace(FIT, epochs=1)
    plain = [Cell("erm", held_out, fit=fit, **SHARED) for held_out in (100, 200)]
    cells = [
        replace(plain[0], recipe="nested"),
        replace(plain[1], recipe="nested").with_settings({"weight_decay": 0.1}),
    ]
    assert cells[0].settings_sha256 == plain[0].settings_sha256 and cells[0].name != plain[0].name
    folders = run_grid([*cells, plain[1]], ds, tmp_path, say=quiet)
    assert len(folders) == 3 and [Run(folder).recipe for folder in folders] == ["nested", "nested", None]
    rows = {(row["method"], row["held_out"]) for row in summarise(folders) if row["part"] == "test"}
    assert rows == {("erm (nested)", 100), ("erm (nested)", 200), ("erm", 200)}
    with pytest.raises(ValueError, match="recipe was 'nested' and is now 'other'"):
        run_cell(replace(cells[0], recipe="other"), ds, folders[0])


def test_grid_skips_what_is_finished_and_goes_on_after_a_failure(ds, tmp_path, monkeypatch):
    cells = make_grid(["erm", "dann"], [40, 200], [0], [0], fit=ERM.fit, **SHARED)
    assert [cell.method for cell in cells] == [*OF_IMAGES, "erm", "dann"] * 2
    ran, real = [], run_module.fit

    def fit(task, *args, **kwargs):
        ran.append(kwargs["description"])
        if kwargs["description"] == cells[2].name:
            raise Diverged("made for this test")
        return real(task, *args, **kwargs)

    monkeypatch.setattr(run_module, "fit", fit)
    said = []
    folders = run_grid(cells, ds, tmp_path, say=said.append)
    assert len(folders) == 7 and "FAILED" in said[2] and "made for this test" in said[2]
    assert len(ran) == 4
    monkeypatch.setattr(run_module, "fit", real)
    folders = run_grid(cells, ds, tmp_path, say=said.append)
    assert len(folders) == 8 and sum("skipped" in line for line in said) == 7

    rows = summarise(folders)
    titles = (*OF_IMAGES, *(name + more for name in ("erm", "dann") for more in ("", ", scale-normalised")))
    assert {(row["method"], row["held_out"]) for row in rows} == {(m, h) for m in titles for h in (40, 200)}
    text = markdown(rows)
    assert text.count("constant") == 4 and "AUC" in text and "Nogueira" in text
    constant = next(row for row in rows if row["method"] == "constant")
    assert constant["image"]["auc"] == 0.5 and constant["image"]["brier"] == pytest.approx(0.25)


def test_a_cell_that_another_process_runs_is_left_to_it_and_named(breakhis_tree, ds, tmp_path, capsys):
    command = ["lomo", "--data", str(breakhis_tree), "--methods", "erm", "--held-out", "200", "--folds", "0"]
    command += ["--n-folds", "4", "--image-size", "32", "--epochs", "1", "--batch-size", "8", "--threads", "1"]
    command += ["--model", "test_magdg_resnet", "--init", "none", "--output-dir", str(tmp_path)]
    with locked_elsewhere(tmp_path / ERM.name) as pid:
        assert main(command) == 1
        printed = capsys.readouterr().out
        assert f"{ERM.name} is not in the table: {tmp_path / ERM.name} is being written by" in printed
        assert f"process {pid} on" in printed
        assert "| constant " in printed and "| erm " not in printed and not (tmp_path / ERM.name).exists()
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "| erm " in printed and printed.count("skipped") == 2


def test_a_cell_that_another_process_finished_meanwhile_is_not_run_again(ds, finished, monkeypatch):
    monkeypatch.setattr(run_module, "fit", None)
    before = (finished.folder / "timing.json").read_bytes()
    run_cell(CELL, ds, finished.folder)
    assert (finished.folder / "timing.json").read_bytes() == before


def test_a_fold_whose_test_lacks_a_class_does_not_end_the_grid(ds, tmp_path):
    cells = [replace(ERM, held_out=40, fold=fold) for fold in (0, 1)]
    split = leave_one_magnification_out(ds, 40, n_folds=4, fold=1)
    gone = {int(i) for i in split.test if ds[int(i)]["label"] == 0}
    said = []
    folders = run_grid(cells, ds.select([i for i in range(len(ds)) if i not in gone]), tmp_path, say=said.append)
    assert [folder.name for folder in folders] == [cells[0].name]
    assert "FAILED" in said[1] and "no image of label [0]" in said[1]


def test_a_model_that_predicts_no_numbers_ends_its_cell_and_not_the_grid(ds, tmp_path, monkeypatch):
    """Its losses may have been numbers: BatchNorm in training hides what its running statistics have become."""
    real, said = run_module.predict_all, []

    def predict_all(network, *args, **kwargs):
        logits, *others = real(network, *args, **kwargs)
        return [logits * np.nan if hasattr(network.model, "domain_head") else logits, *others]

    monkeypatch.setattr(run_module, "predict_all", predict_all)
    folders = run_grid([CELL, ERM], ds, tmp_path, say=said.append)
    assert [folder.name for folder in folders] == [ERM.name]
    assert "FAILED" in said[0] and "not a finite number" in said[0] and "done" in said[1]


def test_only_a_collapsed_embedding_has_no_signature(ds):
    split = leave_one_magnification_out(ds, 200, n_folds=4)
    columns = {name: np.asarray(ds[name]) for name in ("label", "patient")}
    columns["domain"] = np.asarray(ds["magnification"])
    flat = {part: np.ones((len(getattr(split, part)), 5)) for part in ("train", *PARTS)}
    signature, results = run_module._signature(flat, split, columns)
    assert signature is None and "constant" in results["why_none"]
    with pytest.raises(ValueError, match="NaN"):
        run_module._signature(flat | {"train": flat["train"] * np.nan}, split, columns)


def test_one_training_magnification_is_too_few_for_an_adversary(ds, tmp_path):
    two = ds.filter(lambda m: m in (40, 200), input_columns="magnification")
    with pytest.raises(ValueError, match="two training domains to tell apart"):
        run_cell(CELL, two, tmp_path / "dann")
    run_cell(ERM, two, tmp_path / "erm")
    assert Run(tmp_path / "erm").is_finished


@pytest.mark.slow
def test_a_network_made_for_one_size_is_made_for_the_cells(ds, tmp_path):
    cell = replace(CELL, model="vit_tiny_patch16_224", fit=ERM.fit)
    run_cell(cell, ds, tmp_path / "run")
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'model'}", pretrained=True)
    assert model.patch_embed.img_size == (32, 32)


def test_workers_take_gpus_in_turns(ds, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for worker in range(3):
        grid._work(worker, [], ds, tmp_path, None, print)
    assert taken == [0, 1, 0]


def test_tensorboard_gets_what_metrics_jsonl_has(ds, tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("magdg")
    (folder,) = run_grid([CELL], ds, tmp_path / "runs", accelerator=accelerator, say=quiet)
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "magdg")).Reload()
    losses = Run(folder).losses()
    names = losses[0].keys() - {"epoch"}
    assert {f"{CELL.name}/{name}" for name in {*names, "images_per_second"}} == set(events.Tags()["scalars"])
    assert {"class_loss", "domain_loss", "coeff", "learning_rate"} <= names
    for name in names:
        scalars = events.Scalars(f"{CELL.name}/{name}")
        assert [(s.step, s.value) for s in scalars] == [(i, pytest.approx(e[name])) for i, e in enumerate(losses)]


def test_start_weights_are_part_of_the_split(ds, finished, tmp_path):
    """A start that saw the test's patients or magnification is refused, or marked; the run's folder is one too."""
    start = replace(ERM, init=str(finished.model))
    with pytest.raises(ValueError, match="seen patients"):  # fold 1 tests what fold 0 validated on
        run_cell(replace(start, fold=1), ds, tmp_path / "a")
    with pytest.raises(ValueError, match="the magnification 40"):
        run_cell(replace(start, held_out=40), ds, tmp_path / "b")
    run_cell(replace(start, fold=1, allow_seen_init=True), ds, tmp_path / "c")
    assert "the start had seen the test" in markdown(summarise([tmp_path / "c"]))


def test_weights_that_are_frozen_are_a_start_too(ds, finished, tmp_path):
    cell = Cell("frozen", 200, n_folds=4, model=f"local-dir:{finished.model}", fit=ERM.fit)
    with pytest.raises(ValueError, match="seen patients"):  # what was validated on was seen too
        run_cell(cell, ds, tmp_path / "a")
    run_cell(replace(cell, allow_seen_init=True), ds, tmp_path / "b")
    run = Run(tmp_path / "b")
    assert run.config["start"]["source"] == str(finished.model) and run.config["start"]["saw_test"]
    a, b = weights(finished), weights(run)
    assert {name for name in a if not torch.equal(a[name], b[name])} == {"fc.weight", "fc.bias"}


def test_options_go_to_the_methods_that_have_them(ds, tmp_path):
    cells = make_grid(["erm", "coral", "mixstyle"], [200], [0], [0], options={"coral_weight": 7.0, "mix_prob": 0.0})
    options = {cell.method: cell.options for cell in cells}
    assert options["constant"] is options["colour"] is None
    assert (options["coral"].coral_weight, options["mixstyle"].mix_prob) == (7, 0)
    assert not hasattr(options["erm"], "coral_weight") and not hasattr(options["coral"], "mix_prob")
    with pytest.raises(ValueError, match="erm, coral: none has the option gama"):
        make_grid(["erm", "coral"], [200], [0], [0], options={"gama": 7.0})
    run_cell(CELL.with_settings({"critic_steps": 2}), ds, tmp_path)
    assert "critic_loss" in Run(tmp_path).losses()[0]


def test_start_weights_are_loaded(ds, finished, tmp_path):
    plain = tmp_path / "backbone.safetensors"
    shutil.copy(finished.model / "model.safetensors", plain)
    run_cell(replace(CELL, init=str(plain), fit=replace(ERM.fit, learning_rate=0.0)), ds, tmp_path / "run")
    a, b = weights(finished), weights(Run(tmp_path / "run"))
    assert torch.equal(a["layer1.0.conv1.weight"], b["layer1.0.conv1.weight"])
    assert not torch.equal(a["fc.weight"], b["fc.weight"])

    del a["layer3.0.conv1.weight"]
    safetensors.torch.save_file(a, plain)
    with pytest.raises(ValueError, match=r"layer3\.0\.conv1\.weight"):
        run_cell(replace(CELL, init=str(plain)), ds, tmp_path / "broken")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub repository"):
        run_cell(replace(CELL, init="nobody/nothing"), ds, tmp_path / "absent")
