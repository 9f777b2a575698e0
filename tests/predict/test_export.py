"""ONNX: the same logits for any batch, in ONNX Runtime and OpenVINO; 8 bits only where they hardly change anything."""

import json
import shutil

import numpy as np
import pytest

from magdg import main
from magnification_invariant.predict import Classifier, Item, items_of
from magnification_invariant.predict import export as exporting
from magnification_invariant.virtual_slides import render_field, virtual_field

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def tissue():
    return [render_field(p, 0.4, virtual_field(p, 100, 0), (256, 192)) for p in range(3)]


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "model"
    done = exporting.export(tiny_model, folder)
    assert done.error <= exporting.TOLERANCE and done.change is None and not done.int8
    return folder


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_another_backend_says_the_same(exported, tiny_model, tissue, backend):
    pytest.importorskip({"onnx": "onnxruntime"}.get(backend, backend))
    torch_rows = Classifier.from_pretrained(tiny_model, device="cpu").predict(tissue, 0.4)
    for batch_size in (1, 5, 32):  # one file for all
        rows = Classifier.from_pretrained(exported, backend=backend, batch_size=batch_size).predict(tissue, 0.4)
        for ours, theirs in zip(rows, torch_rows, strict=True):
            np.testing.assert_allclose(ours["logits"], theirs["logits"], rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(ours["signature"], theirs["signature"], rtol=1e-3, atol=1e-3)


def test_the_file_takes_stored_pixels(exported):
    import onnx

    graph = onnx.load(exported / "model.onnx").graph
    (given,) = graph.input
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert given.type.tensor_type.shape.dim[0].dim_param and given.type.tensor_type.shape.dim[2].dim_value == 64
    assert json.loads((exported / "config.json").read_text())["temperature"] == 1.5


def test_eight_bits_are_kept_only_if_they_hardly_change_the_probability(tiny_model, tissue, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    calibration = items_of([*tissue, *(each[::-1] for each in tissue)], 0.4)  # 4 tiles each
    monkeypatch.setattr(exporting, "ALLOWED_CHANGE", 1.0)
    done = exporting.export(folder, calibration=calibration)
    assert done.int8 and 0 < done.change < 0.5
    eight = done.path.stat().st_size
    rows = Classifier.from_pretrained(folder, backend="onnx").predict(tissue, 0.4)
    exact = Classifier.from_pretrained(folder, device="cpu").predict(tissue, 0.4)
    changes = [abs(a["probability"] - b["probability"]) for a, b in zip(rows, exact, strict=True)]
    assert 0 < max(changes) <= 2 * done.change + 0.02
    monkeypatch.setattr(exporting, "ALLOWED_CHANGE", 0.0)
    kept = exporting.export(folder, calibration=calibration)
    assert not kept.int8 and kept.change > 0 and kept.path.stat().st_size > 2 * eight
    assert not list(folder.glob(".export-*"))


def test_what_is_missing_is_said(tiny_model, tissue):
    with pytest.raises(FileNotFoundError, match="magdg export"):
        Classifier.from_pretrained(tiny_model, backend="onnx")
    with pytest.raises(ValueError, match="16 are the least"):
        exporting.export(tiny_model, calibration=[Item("one", tissue[0][:64, :64], 0.4)])


def test_the_command(tiny_model, tmp_path, capsys):
    assert main(["export", str(tiny_model), "--out", str(tmp_path)]) == 0
    assert f"wrote {tmp_path / 'model.onnx'} (32 bits" in capsys.readouterr().out
