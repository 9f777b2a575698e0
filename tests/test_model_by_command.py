"""Every command with every form of a model: the packaged one, a run's folder, and the model folder inside it."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from magdg import main
from magnification_invariant import load_breakhis
from magnification_invariant.files import read_json, write_json
from magnification_invariant.models.magdg import PACKAGED
from magnification_invariant.virtual_slides import render_field, virtual_field

RUN = ["--methods", "erm", "--held-out", "40", "--folds", "0", "--n-folds", "3", "--epochs", "1", "--batch-size", "8"]
RUN += [
    "--model",
    "test_magdg_resnet",
    "--image-size",
    "32",
    "--learning-rate",
    "3e-3",
    "--threads",
    "1",
    "--init",
    "none",
]


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    from magnification_invariant import load_virtual_slides

    folder = tmp_path_factory.mktemp("slides") / "tree"
    load_virtual_slides(12, first_patient=5000, images_per_magnification=1, size=(160, 105), write_to=folder)
    return folder


@pytest.fixture(scope="module")
def run(slides, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    assert main(["lomo", "--data", str(slides), *RUN, "--output-dir", str(output)]) == 0
    return next(path for path in output.iterdir() if path.name.startswith("erm"))


@pytest.fixture(params=["packaged", "run", "run/model"])
def model(request, run) -> str:
    packaged = next(PACKAGED.glob("[!.]*"))
    return str({"packaged": packaged, "run": run, "run/model": run / "model"}[request.param])


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("image") / "case.png"
    Image.fromarray(render_field(0, 0.5, virtual_field(0, 100, 0), (300, 200))).save(path)
    return str(path)


COMMANDS = {
    "predict": lambda m, image, data, tmp: ["predict", image, "--mpp", "0.5", "--model", m, "--out", f"{tmp}/p.csv"],
    "evaluate": lambda m, image, data, tmp: ["evaluate", m, "--data", data, "--output-dir", f"{tmp}/evaluation"],
    "explain": lambda m, image, data, tmp: ["explain", image, "--mpp", "0.5", "--model", m, "--out", f"{tmp}/e.png"],
    "export": lambda m, image, data, tmp: ["export", m, "--out", f"{tmp}/onnx"],
    "push": lambda m, image, data, tmp: ["push", m, "me/model", "--dry-run"],
    "doctor": lambda m, image, data, tmp: ["doctor", m],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_takes_every_model(command, model, image, slides, tmp_path, capsys):
    status = main(COMMANDS[command](model, image, str(slides), tmp_path))
    out, err = capsys.readouterr()
    assert status == 0, err
    if command == "predict":
        assert "wrote 1 rows" in out
    if command == "explain":
        assert (tmp_path / "e.png").stat().st_size > 10_000 and "P(malignant)" in out


def test_search_takes_every_model(model, slides, tmp_path, capsys):
    case = next(slides.rglob("*.png"))
    command = ["search", str(case), "--build", model, "--data", str(slides), "--index", str(tmp_path / "index")]
    status = main(command)
    out, err = capsys.readouterr()
    if status == 2:  # a network trained for one epoch may have no signature; that must be said
        assert "signature" in err and "packaged" not in model
        return
    assert status == 0 and "left out" in out


def test_the_page_answers_with_every_model(model, image):
    from magnification_invariant.predict import app

    page = app.build(model)
    (predict,) = [fn for fn in page.fns.values() if fn.api_name == "predict"]
    shown, note, figure, similar, table, _, (row,) = predict.fn([image], "0.5", None)
    assert 0 <= shown["malignant"] <= 1 and np.isclose(sum(shown.values()), 1)
    assert "um/px" in note and "images of" in note and len(figure.axes) == 4 and similar == []
    assert row["error"] is None and row["probability"] == shown["malignant"] and not table.visible


def test_patients_that_a_model_has_seen_are_no_evaluation(run, slides, tmp_path, capsys):
    """Under other file names than the records': the patients say it."""
    folder = shutil.copytree(run / "model", tmp_path / "model")
    (folder / "predictions.parquet").unlink()
    command = ["evaluate", str(folder), "--data", str(slides), "--output-dir", str(tmp_path / "evaluation")]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert re.search(r"\d+ of \d+ images are of patients that the model was trained on: they are left out", out)
    config = read_json(folder / "config.json")
    config["seen"]["patients"] = load_breakhis(slides)["patient"][:]
    write_json(folder / "config.json", config)
    assert main(command) == 2 and "was trained on all 12 patients" in capsys.readouterr().err
