"""The protocol on vectors: the same tasks, records and report as on images, and embeddings made by the one road."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import timm
import torch

from magdg import main
from magnification_invariant import engine
from magnification_invariant.data.breakhis import load_breakhis
from magnification_invariant.data.pixels import ViewCache
from magnification_invariant.data.splits import leave_one_domain_out
from magnification_invariant.data.vectors import VectorCache, load_embeddings, vectors_of
from magnification_invariant.engine import FitConfig, Network
from magnification_invariant.hub import stage
from magnification_invariant.lomo import embedded, run
from magnification_invariant.lomo.cell import Cell
from magnification_invariant.lomo.embedded import embed_images, load_network
from magnification_invariant.lomo.run import run_cell
from magnification_invariant.metrics import patient_weights
from magnification_invariant.model_folder import load_vector_model, open_model
from magnification_invariant.models import PACKAGED, VECTOR_MODELS, add_domain_head, create_network
from magnification_invariant.records import PARTS, Run
from magnification_invariant.tasks import ERM
from magnification_invariant.tasks.floors import PENALTIES, Labelled, l2

FIT = FitConfig(epochs=3, batch_size=32, learning_rate=1e-2)
SHARED = {"n_folds": 3, "model": "mag_hidden", "fit": FIT}
CELL = Cell("dann", "b", **SHARED)


class Own(ERM):
    """A method of somebody's own."""


@pytest.fixture(scope="module")
def columns():
    """18 patients, 4 vectors of 6 numbers at each of three domains; two numbers tell the class, two the domain."""
    rng = np.random.default_rng(0)
    patient, domain = (x.ravel() for x in np.meshgrid(np.repeat(np.arange(18), 4), np.arange(3), indexing="ij"))
    label = patient % 2
    vectors = rng.standard_normal((len(patient), 6)) + rng.standard_normal((18, 6))[patient] / 2
    vectors[:, :2] += 1.5 * label[:, None]
    vectors[:, 2:4] += 2 * np.eye(3)[domain, :2]
    names = {"id": [f"{i:03d}" for i in range(len(patient))], "patient": [f"{p:02d}" for p in patient]}
    names |= {"label": np.array(["benign", "malignant"])[label], "domain": np.array(["a", "b", "c"])[domain]}
    return names | {"embedding": vectors.astype(np.float32)}


def stored(path, columns):
    pq.write_table(pa.table(columns | {"embedding": list(columns["embedding"])}), path)
    return load_embeddings(path)


@pytest.fixture(scope="module")
def ds(columns, tmp_path_factory):
    return stored(tmp_path_factory.mktemp("vectors") / "e.parquet", columns)


@pytest.fixture(scope="module")
def finished(ds, tmp_path_factory):
    run_cell(CELL, ds, folder := tmp_path_factory.mktemp("runs") / CELL.name)
    return Run(folder)


def weights(run):
    return safetensors.torch.load_file(run.model / "model.safetensors")


def records(folder):
    names = (
        "predictions.parquet",
        "results.json",
        "embeddings.safetensors",
        "metrics.jsonl",
        "model/model.safetensors",
    )
    return {name: (folder / name).read_bytes() for name in names}


def test_a_coefficient_of_0_gives_the_weights_of_erm_bit_for_bit(ds, tmp_path):
    own = {"erm": {}, "dann": {"coeff": 0.0}, "cdann": {"coeff": 0.0}, "multitask": {"coeff": 0.0}}
    own["coral"] = {"coral_weight": 0.0}
    for method, settings in own.items():
        run_cell(Cell(method, "b", **SHARED).with_settings(settings), ds, tmp_path / method)
    erm = Run(tmp_path / "erm")
    for method in own:
        other = Run(tmp_path / method)
        assert all(torch.equal(value, weights(erm)[name]) for name, value in weights(other).items())
        assert other.part("test")["logits"].tolist() == erm.part("test")["logits"].tolist()


def test_an_adversary_changes_them(ds, finished, tmp_path):
    run_cell(replace(CELL, method="erm", options=None), ds, tmp_path / "erm")
    assert not torch.equal(weights(finished)["hidden.0.weight"], weights(Run(tmp_path / "erm"))["hidden.0.weight"])


def test_cut_and_taken_up_again_it_ends_the_same(ds, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "CHECKPOINT_SECONDS", 0)
    write = run._write_epoch

    def cut(folder, epoch, log):
        if epoch == 2:
            raise KeyboardInterrupt
        write(folder, epoch, log)

    monkeypatch.setattr(run, "_write_epoch", cut)
    with pytest.raises(KeyboardInterrupt):
        run_cell(CELL, ds, tmp_path / "cut")
    monkeypatch.setattr(run, "_write_epoch", write)
    run_cell(CELL, ds, tmp_path / "cut")
    assert records(tmp_path / "cut") == records(finished.folder)


def test_nothing_of_the_unseen_rows_is_learned(columns, ds, finished, tmp_path):
    """Noise in the place of all vectors of the tested patients and of the held-out domain."""
    split = leave_one_domain_out(ds, "b", n_folds=3)
    seen = np.isin(np.arange(len(ds)), [*split.train, *split.val])
    noise = 100 * np.random.default_rng(1).standard_normal(columns["embedding"].shape).astype(np.float32)
    poisoned = columns | {"embedding": np.where(seen[:, None], columns["embedding"], noise)}
    run_cell(CELL, stored(tmp_path / "e.parquet", poisoned), tmp_path / "run")
    other = Run(tmp_path / "run")
    assert all(torch.equal(value, weights(finished)[name]) for name, value in weights(other).items())
    assert other.temperature == finished.temperature
    signatures = [(each.model / "signature.safetensors") for each in (other, finished)]
    assert len({file.read_bytes() for file in signatures if file.is_file()}) <= 1


def test_models_of_embeddings_are_not_published(finished, tmp_path):
    with pytest.raises(ValueError, match="a model of embeddings; what is published are models of images"):
        stage(finished.folder, "me/model", tmp_path / "staged")


def test_records(ds, finished):
    split = leave_one_domain_out(ds, "b", n_folds=3)
    assert finished.parts == [*PARTS] and set(finished.part("test")["domain"]) == {"b"}
    assert not finished.settings.keys() & {"image_size", "zoom", "stain"} and finished.settings["model"] == "mag_hidden"
    assert "mpp" not in finished.records.column_names
    for part in ("train", *PARTS):
        assert finished.keys(part)["filename"].tolist() == [ds["filename"][i] for i in getattr(split, part).tolist()]
    head, embeddings = weights(finished), finished.embeddings("test")
    logits = embeddings @ head["head.weight"].float().numpy().T + head["head.bias"].numpy()
    assert np.allclose(logits, finished.part("test")["logits"], atol=1e-5)
    mean, std = head["mean"].numpy(), head["std"].numpy()
    x, weight = vectors_of(ds)[split.train], patient_weights(np.array(ds["patient"][:])[split.train])
    assert np.allclose(mean, np.average(x, axis=0, weights=weight), atol=1e-6)
    assert np.allclose(std**2, np.average((x - mean) ** 2, axis=0, weights=weight), atol=1e-5)
    hidden = (vectors_of(ds)[split.test] - mean) / std @ head["hidden.0.weight"].float().numpy().T
    assert np.allclose(np.maximum(hidden + head["hidden.0.bias"].numpy(), 0), embeddings, atol=1e-4)


def test_a_model_is_loaded_and_answers_as_recorded(ds, finished):
    rows = leave_one_domain_out(ds, "b", n_folds=3).test
    model = load_vector_model(str(finished.folder))
    with torch.inference_mode():
        logits = model(torch.from_numpy(vectors_of(ds)[rows]))
    assert np.allclose(logits.numpy(), finished.part("test")["logits"], atol=1e-6)
    with pytest.raises(ValueError, match="classifies embeddings and not images"):
        open_model(str(finished.model))
    with pytest.raises(ValueError, match="classifies images"):
        load_vector_model(str(PACKAGED / "magdg_resnet18.virtual"))
    assert main(["push", str(finished.folder), "me/model", "--dry-run"]) == 2


def test_one_representation_has_one_signature(ds, tmp_path, monkeypatch):
    fitted, new = [], run._new_signature
    monkeypatch.setattr(run, "_new_signature", lambda *arguments: fitted.append(1) or new(*arguments))
    for method, seed in (("erm", 0), ("erm", 1), ("coral", 0)):
        run_cell(replace(Cell(method, "b", **SHARED), seed=seed, model="mag_linear"), ds, tmp_path / f"{method}{seed}")
    assert len(fitted) == 1
    embeddings = Run(tmp_path / "erm0").embeddings("test")  # the standardised vectors themselves
    head = weights(Run(tmp_path / "erm0"))
    x = vectors_of(ds)[leave_one_domain_out(ds, "b", n_folds=3).test]
    assert np.allclose(embeddings, (x - head["mean"].numpy()) / head["std"].numpy(), atol=1e-5)
    run_cell(replace(Cell("erm", "c", **SHARED), model="mag_linear"), ds, tmp_path / "other")
    assert len(fitted) == 2


def test_l2_is_the_best_of_scikit_learns_logistic_regressions(ds):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    split, label, patient = (
        leave_one_domain_out(ds, "b", n_folds=3),
        np.array(ds["label"][:]),
        np.array(ds["patient"][:]),
    )
    train, val = (Labelled(rows, label[rows], patient_weights(patient[rows])) for rows in (split.train, split.val))
    score = l2(VectorCache(ds), train, val)(split.test)
    x = vectors_of(ds).astype(np.float64)
    mean = np.average(x[train.rows], axis=0, weights=train.weight)
    x = (x - mean) / np.sqrt(np.average((x[train.rows] - mean) ** 2, axis=0, weights=train.weight))
    weight, fits = train.weight * len(train.rows) / train.weight.sum(), []
    for penalty in PENALTIES:
        model = LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=10_000)
        model.fit(x[train.rows], train.label, sample_weight=weight)
        loss = log_loss(val.label, model.predict_proba(x[val.rows])[:, 1], sample_weight=val.weight)
        fits.append((loss, model.decision_function(x[split.test])))
    best = min(fits, key=lambda fit: fit[0])[1]
    temperature = best / score
    assert np.ptp(temperature) < 0.02 * temperature.mean()  # one temperature for all, and else the same


def test_what_cannot_be_run_on_vectors_is_said(ds, tmp_path):
    for cell, said in (
        (Cell("mixstyle", "b", **SHARED), "mixstyle works on images"),
        (Cell("gan", "b", **SHARED), "gan works on images"),
        (Cell("erm", "b", n_folds=3), "the model is mag_hidden or mag_linear, not None"),
        (Cell("colour", "b", n_folds=3), "colour looks at images"),
        (replace(CELL, embedding="pyramid"), "no zoom, and no pyramid"),
        (replace(CELL, model="mag_linear"), "nothing of this VectorClassifier lies before its classifier"),
    ):
        with pytest.raises(ValueError, match=said):
            run_cell(cell, ds, tmp_path / cell.name)


def test_embeddings_of_another_network_are_other_data(columns, finished, tmp_path):
    other = stored(tmp_path / "e.parquet", columns | {"embedding": columns["embedding"] + 1})
    with pytest.raises(ValueError, match=r"other data or settings .*data was"):
        run_cell(CELL, other, finished.folder)


@pytest.mark.parametrize("name", VECTOR_MODELS)
def test_a_vector_classifier_has_what_methods_ask_of_timms(name):
    assert not timm.is_model(name)  # whose tests and tools expect images
    model = create_network(name, num_classes=2, width=6).eval()
    x = torch.randn(4, 6)
    model.standardise(np.random.default_rng(0).standard_normal((20, 6)) * 3 + 1, np.ones(20))
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.equal(model(x), model.get_classifier()(pooled)) and pooled.shape == (4, model.num_features)
    assert torch.equal(pooled, (x - model.mean) / model.std) == (name == "mag_linear")
    if name == "mag_hidden":
        before = model(x)
        with_head = add_domain_head(create_network(name, num_classes=2, width=6), 3).eval()
        with_head.load_state_dict(model.state_dict())  # a file without the head
        assert torch.equal(with_head(x), before)
        model.load_state_dict(with_head.state_dict())  # and one with it
        assert torch.equal(model(x), before)


def test_the_command_and_its_report(columns, tmp_path, capsys):
    stored(tmp_path / "e.parquet", columns)
    command = ["lomo", "--embeddings", str(tmp_path / "e.parquet"), "--methods", "l2", "erm", "dann", f"{__name__}:Own"]
    command += ["--folds", "0", "--held-out", "b", "--n-folds", "3", "--epochs", "2", "--threads", "1"]
    assert main([*command, "--output-dir", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    for method in ("constant", "l2", "erm", "dann", "test_embedded:Own"):
        assert f"| {method} " in out
    assert "scale-normalised" not in out and "colour" not in out
    assert main(["report", str(tmp_path / "runs"), "--output-dir", str(tmp_path / "report")]) == 0
    assert "embeddings were made in one view" in (tmp_path / "report" / "report.md").read_text()
    assert main([*command, "--zoom"]) == 2 and "of images, and there are --embeddings" in capsys.readouterr().err


def test_embeddings_are_means_over_the_tiles_of_the_protocol_view(breakhis_tree, tmp_path, monkeypatch):
    ds, out = load_breakhis(breakhis_tree), tmp_path / "e.parquet"
    with pytest.warns(UserWarning, match="random network"):
        model, size = load_network("test_magdg_resnet", 32)
    monkeypatch.setattr(embedded, "_ROWS", 10)
    real, parts = embedded.mean_over_tiles, []

    def cut(run, views, batch_size):
        if len(parts) == 2:
            raise KeyboardInterrupt
        parts.append(1)
        return real(run, views, batch_size)

    monkeypatch.setattr(embedded, "mean_over_tiles", cut)
    with pytest.raises(KeyboardInterrupt):
        embed_images(ds, model, size, out, batch_size=4)
    assert not out.exists() and len(list((tmp_path / "e.parquet.parts").glob("*.safetensors"))) == 2
    parts.clear()
    embed_images(ds, model, size, out, batch_size=4)  # the last two parts
    assert len(parts) == 2 and not (tmp_path / "e.parquet.parts").exists()
    embed_images(ds, model, size, out, batch_size=4)  # is there: nothing to do
    assert len(parts) == 2

    table, run_tiles = load_embeddings(out), Network(model).runner()
    wanted = [
        run_tiles(np.ascontiguousarray(tiles))[1].mean(0) for tiles in ViewCache(ds, size).views(np.arange(len(ds)))
    ]
    assert np.allclose(vectors_of(table), wanted, atol=1e-5)
    for name in ("magnification", "patient", "filename", "label", "mpp"):
        assert table[name][:] == ds[name][:]
    with pytest.raises(ValueError, match=r"ends in \.parquet"):
        embed_images(ds, model, size, tmp_path / "e.h5")
