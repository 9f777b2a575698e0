"""The commands as a person types them, on 32 tiny images."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from magdg import COMMANDS, demo, main, options, sources
from magnification_invariant.records import Run
from magnification_invariant.tasks import TASKS, Task
from magnification_invariant.tasks.task import option

ROOT = Path(__file__).parents[1]
SMALL = ["--model", "test_magdg_resnet", "--image-size", "32", "--batch-size", "8", "--threads", "1", "--n-folds", "4"]
SMALL += ["--init", "none"]


def lomo(tree, output, *more: str) -> int:
    """One fold of ERM without 40X, for an epoch."""
    data = ["--data", str(tree), "--held-out", "40", "--folds", "0", "--epochs", "1", *SMALL]
    return main(["lomo", *data, "--methods", "erm", "--output-dir", str(output), *more])


def parsed(*argv: str):
    parser = options.Parser()
    parser.add_argument("--methods", nargs="+", default=["erm", "dann"])
    sources.add_data_argument(parser)
    options.add_training_arguments(parser)
    args = parser.parse_args(argv)
    return options.grid_settings(args, args.methods)


class Weighted(Task):
    """A method of somebody else's."""

    @dataclass(frozen=True)
    class Options(Task.Options):
        colour_weight: float = option(0.5, "of 100 % of the loss")
        kind: str = option("a", "which", choices=("a", "b"))
        steps: int = option(3, "a turn")
        both: bool = option(True, "of them")


def test_lomo_trains_tests_and_prints_the_table(breakhis_tree, tmp_path, capsys):
    assert lomo(breakhis_tree, tmp_path, "--methods", "erm", "dann", "--label-smoothing", "0.1", "--zoom") == 0
    printed = capsys.readouterr().out
    runs = {run.method: run for run in map(Run, tmp_path.iterdir()) if run.has_config}
    assert runs.keys() == {"constant", "colour", "erm", "dann"}
    assert all(f"| {method} " in printed for method in runs)
    assert runs["erm"].settings["label_smoothing"] == 0.1 and runs["erm"].settings["zoom"] == 2.5
    assert runs["erm"].config["cell"]["data_source"] == str(breakhis_tree)
    assert lomo(breakhis_tree, tmp_path, "--methods", "erm", "dann", "--label-smoothing", "0.1", "--zoom") == 0
    assert capsys.readouterr().out.count("skipped") == 4
    erm = [str(runs["erm"].folder)]
    assert main(["zoom", *erm]) == 0  # by the data that its records name
    command = ["evaluate", *erm, "--data", str(breakhis_tree), "--output-dir", str(tmp_path / "evaluation")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    tested = runs["erm"].results["parts"]["test"]
    (line,) = [line for line in printed.splitlines() if line.startswith("| brier ")]
    assert f"{tested['patient_balanced']['brier']:.3f}" in line and f"{tested['image']['brier']:.3f}" in line


def test_lomo_splits_by_the_file_that_split_wrote(breakhis_tree, tmp_path):
    file = tmp_path / "split.json"
    assert main(["split", str(breakhis_tree), "--out", str(file), "--n-folds", "4", "--split-seed", "7"]) == 0
    assert lomo(breakhis_tree, tmp_path / "file", "--split", str(file)) == 0
    assert lomo(breakhis_tree, tmp_path / "dealt", "--split-seed", "7") == 0
    (read,), (dealt,) = ((tmp_path / kind).glob("erm*/predictions.parquet") for kind in ("file", "dealt"))
    assert read.read_bytes() == dealt.read_bytes()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nowhere"], "nowhere"),
        (["--held-out", "123"], "123"),
        (["--methods", "dan"], "choose from erm, dann"),
        (["--folds", "9"], "fold"),
        (["--coeff", "1"], "--coeff is an option of dann, cdann, multitask, not of erm"),
        (["--label-smoothing", "2"], "label_smoothing is at least 0 and at most 1"),
        (["--data", "virtual:patients=3"], "no 'patients', but n_patients"),
        (["--data", "virtual:size=350"], "size is given like size=700x460"),
        (["--data", "virtual:n_patients=many"], "n_patients is given like n_patients=40, not 'many'"),
    ],
)
def test_bad_input_is_an_error_in_one_line(breakhis_tree, tmp_path, capsys, arguments, message):
    assert lomo(breakhis_tree, tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("magdg: error: ") and message in error and "Traceback" not in error


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults():
    plain, paper = parsed(), parsed("--recipe", "paper")
    assert (plain["fit"].stain, plain["fit"].zoom, plain["fit"].image_size) == (0.2, 1.0, 64)
    assert (paper["fit"].stain, paper["fit"].ema_decay, paper["calibrate"]) == (0.0, 0.0, False)
    own = parsed("--recipe", "paper", "--stain", "0.1", "--calibrate", "--zoom", "--data", "tree", "--coeff", "0.3")
    assert (own["fit"].stain, own["calibrate"], own["options"]) == (0.1, True, {"coeff": 0.3})
    assert (own["fit"].zoom, own["fit"].image_size, own["fit"].ema_decay) == (2.5, 224, 0.0)
    assert parsed("--data", "virtual:n_patients=8", "--image-size", "32")["fit"].image_size == 32


def test_a_method_of_your_own_brings_its_flags(capsys):
    method = ["--methods", f"{__name__}:Weighted"]
    given = parsed(*method, "--colour-weight", "0.1", "--kind", "b", "--no-both", "--steps", "2")["options"]
    assert given == {"colour_weight": 0.1, "kind": "b", "both": False, "steps": 2}
    for wrong in (["--kind", "c"], ["--steps", "0"], ["--colour-weight", "much"]):
        with pytest.raises(SystemExit):
            parsed(*method, *wrong)
    with pytest.raises(SystemExit):
        parsed(*method, "--help")
    assert "of 100 % of the loss" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        parsed("--kind", "b")


def test_words_for_virtual_slides():
    text = "virtual:n_patients=8,size=350x230,magnifications=40,nested=true"
    wanted = {"n_patients": 8, "size": (350, 230), "magnifications": (40,), "nested": True}
    assert sources.virtual_parameters(text) == wanted and sources.virtual_parameters("virtual") == {}


def test_the_page_on_training_has_the_table_of_methods():
    table = options.table_of_options()
    assert table in (ROOT / "docs" / "train.md").read_text(encoding="utf-8"), "print it: python -m magdg.options"
    assert all(f"| `{method}` |" in table for method in TASKS)


def test_warnings_are_lines_without_code(monkeypatch, capsys):
    def warned(args):
        print(warnings.formatwarning("few patients", UserWarning, "file.py", 7, "code"), end="")

    python_format = warnings.formatwarning
    monkeypatch.setattr(demo, "execute", warned)
    assert main(["demo"]) == 0 and capsys.readouterr().out == "magdg: warning: few patients\n"
    assert warnings.formatwarning is python_format


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_with_a_line(monkeypatch, capsys, number, status):
    def interrupted(args):
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(demo, "execute", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # by shells, of what they start behind them
    try:
        assert main(["demo"]) == status and "same command" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert signal.getsignal(signal.SIGTERM) is before


def python(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_help_and_mistakes_load_nothing_heavy():
    code = "import sys, magdg\nfor argv in {}:\n  try: assert magdg.main(argv) == 0\n  except SystemExit: pass\n"
    code += "print('heavy:', *{{'torch', 'timm', 'numpy', 'magnification_invariant'}} & set(sys.modules))"
    light = [[name, "--help"] for name in COMMANDS if name != "lomo"] + [["--help"], ["--version"], ["x"], ["predict"]]
    done = python("-c", code.format(light))
    assert done.stdout.endswith("heavy:\n"), done.stdout + done.stderr
    assert all(f"magdg {name}" in done.stdout for name in COMMANDS if name != "lomo")
    assert "invalid choice: 'x'" in done.stderr and "arguments are required: --model" in done.stderr


@pytest.mark.slow
def test_workers_end_with_the_command(breakhis_tree, tmp_path):
    command = [sys.executable, "-m", "magdg", "lomo", "--data", str(breakhis_tree), *SMALL, "--epochs", "5000"]
    command += ["--workers", "2", "--output-dir", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while process.poll() is None and not list(tmp_path.glob("*/epochs/0001.json")):
            time.sleep(0.1)
        process.terminate()
        assert "terminated; the same command" in process.stderr.read() and process.wait() == 143
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    pytest.fail("a worker lives on")


@pytest.mark.slow
def test_the_bare_command_trains_magdg_on_virtual_slides(tmp_path):
    """`accelerate launch examples/train.py`, as typed; only the folder it writes to is another."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "examples/train.py"]
    done = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 process(es) on cpu" in done.stdout
    assert "| dann " in done.stdout and "| constant " in done.stdout and "200X" in done.stdout
    (config,) = tmp_path.glob("runs/dann-*/model/config.json")
    assert json.loads(config.read_text())["name"] == "magdg_resnet18.virtual_lomo200"


@pytest.mark.slow
def test_another_number_of_processes_than_expected_is_refused():
    done = python("examples/train.py", "--expect-processes", "2")
    assert done.returncode == 2 and done.stderr.startswith("magdg: error: 2 processes were expected, 1 started")


@pytest.mark.slow
def test_a_saved_model_needs_nothing_of_this_package(breakhis_tree, tmp_path):
    """Bare timm, in a process that never imports the package, gives the same logits bit for bit."""
    assert lomo(breakhis_tree, tmp_path, "--methods", "dann") == 0
    (folder,) = tmp_path.glob("dann-*/model")
    code = (
        "import json, sys, timm, torch; from PIL import Image\n"
        f"model = timm.create_model('local-dir:{folder}', pretrained=True).eval()\n"
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        f"x = transform(Image.open('{folder}/fixture.png')).unsqueeze(0)\n"
        "with torch.inference_mode(): print(json.dumps(model(x)[0].tolist()))\n"
        "assert not [m for m in sys.modules if m.startswith('magnification_invariant')]\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((folder / "fixture.json").read_text())["logits"]
