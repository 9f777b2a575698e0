"""The commands as a person types them, on 32 tiny images."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from magdg import demo, main

ROOT = Path(__file__).parents[1]
SMALL = ["--model", "test_magdg_resnet", "--image-size", "32", "--batch-size", "8", "--threads", "1", "--n-folds", "4"]


def test_lomo_trains_tests_and_prints_the_table(breakhis_tree, tmp_path, capsys):
    command = ["lomo", "--data", str(breakhis_tree), "--held-out", "40", "--folds", "0", "--epochs", "1", *SMALL]
    command += ["--output-dir", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [
        "colour-lomo40-fold0-seed0",
        "constant-lomo40-fold0-seed0",
        "dann-lomo40-fold0-seed0",
        "erm-lomo40-fold0-seed0",
    ]
    for method in ("constant", "colour", "erm", "dann"):
        assert f"| {method} " in printed
    assert main(command) == 0
    assert capsys.readouterr().out.count("skipped") == 4


def test_lomo_splits_by_the_file_that_split_wrote(breakhis_tree, tmp_path, capsys):
    file, runs = tmp_path / "split.json", tmp_path / "runs"
    data = ["--data", str(breakhis_tree)]
    assert main(["split", *data[1:], "--out", str(file), "--n-folds", "4", "--split-seed", "7"]) == 0
    command = ["lomo", *data, "--held-out", "40", "--folds", "1", "--methods", "erm", "--epochs", "1", *SMALL]
    assert main([*command, "--split", str(file), "--output-dir", str(runs)]) == 0
    dealt = main([*command, "--split-seed", "7", "--output-dir", str(tmp_path / "dealt")])
    assert dealt == 0
    name = "erm-lomo40-fold1-seed0/predictions.parquet"
    assert (runs / name).read_bytes() == (tmp_path / "dealt" / name).read_bytes()
    file.write_text(file.read_text() + " ")
    capsys.readouterr()
    assert main([*command, "--split", str(file), "--output-dir", str(runs)]) == 2
    assert "split_sha256 was" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nowhere"], "nowhere"),
        (["--held-out", "123"], "123"),
        (["--methods", "dan"], "choose from erm, dann"),
        (["--folds", "9"], "fold"),
        (["--image-size", "64"], "largest possible size is 40"),
    ],
)
def test_bad_input_is_an_error_in_one_line(breakhis_tree, tmp_path, capsys, arguments, message):
    defaults = ["--data", str(breakhis_tree), "--held-out", "40", "--folds", "0", *SMALL, "--output-dir", str(tmp_path)]
    assert main(["lomo", *defaults, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("magdg: error: ") and message in error and "Traceback" not in error


def test_warnings_are_lines_without_code(monkeypatch, capsys):
    def warned(args):
        print(warnings.formatwarning("few patients", UserWarning, "file.py", 7, "code"), end="")

    python_way = warnings.formatwarning
    monkeypatch.setattr(demo, "run", warned)
    assert main(["demo"]) == 0 and capsys.readouterr().out == "magdg: warning: few patients\n"
    assert warnings.formatwarning is python_way


def test_an_interrupted_run_says_how_to_go_on(breakhis_tree, tmp_path, capsys, monkeypatch):
    import magnification_invariant.lomo.run as cell

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cell, "fit", stop)
    command = ["lomo", "--data", str(breakhis_tree), "--held-out", "40", "--folds", "0", *SMALL]
    assert main([*command, "--output-dir", str(tmp_path)]) == 130
    assert "same command" in capsys.readouterr().err


def run(*command, **environment):
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_bare_command_trains_magdg_on_virtual_slides(tmp_path):
    """`accelerate launch examples/train.py`, as typed; only the folder it writes to is another."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    launch = Path(sys.executable).with_name("accelerate")
    done = subprocess.run(
        [str(launch), "launch", "examples/train.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 process(es) on cpu" in done.stdout
    assert "| dann " in done.stdout and "| constant " in done.stdout and "200X" in done.stdout
    folder = tmp_path / "runs" / "dann-lomo200-fold0-seed0"
    assert json.loads((folder / "model" / "config.json").read_text())["name"] == "magdg_resnet18.virtual_lomo200"


@pytest.mark.slow
def test_another_number_of_processes_than_expected_is_refused():
    done = run(sys.executable, "examples/train.py", "--expect-processes", "2")
    assert done.returncode != 0 and "2 processes were expected, 1 started" in done.stderr


@pytest.mark.slow
def test_a_saved_model_needs_nothing_of_this_package(breakhis_tree, tmp_path):
    """Bare timm, in a process that never imports the package, gives the same logits bit for bit."""
    command = ["lomo", "--data", str(breakhis_tree), "--held-out", "200", "--folds", "0", "--epochs", "1", *SMALL]
    assert main([*command, "--methods", "dann", "--output-dir", str(tmp_path)]) == 0
    folder = tmp_path / "dann-lomo200-fold0-seed0" / "model"
    code = (
        "import json, sys, timm, torch; from PIL import Image\n"
        f"model = timm.create_model('local-dir:{folder}', pretrained=True).eval()\n"
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        f"x = transform(Image.open('{folder}/fixture.png')).unsqueeze(0)\n"
        "with torch.inference_mode(): print(json.dumps(model(x)[0].tolist()))\n"
        "assert not [m for m in sys.modules if m.startswith('magnification_invariant')]\n"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((folder / "fixture.json").read_text())["logits"]
