"""Two processes (gloo) against one: the same training, the same predictions."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState, PartialState
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from test_files import locked_elsewhere

from magnification_invariant.data.breakhis import load_breakhis
from magnification_invariant.data.pixels import PixelCache, ViewCache
from magnification_invariant.engine import FitConfig, TrainRows, fit, predict
from magnification_invariant.lomo.cell import Cell
from magnification_invariant.lomo.grid import run_grid
from magnification_invariant.records import Run
from magnification_invariant.tasks import DANN, ERM

CONFIG = FitConfig(epochs=2, batch_size=8, image_size=32, learning_rate=1e-2)


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate's state is the process's: the launched ones would inherit that of the tests before."""

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()

    reset()
    yield
    reset()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = np.random.default_rng(0)
    images = [PILImage.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in range(21)]
    ds = Dataset.from_dict(
        {"image": images, "mpp": [1.0] * 21}, features=Features({"image": Image(), "mpp": Value("float64")})
    )
    rows = TrainRows(
        np.arange(21), np.arange(21) % 2, np.arange(21) // 2 % 3, np.array([f"p{i // 3}" for i in range(21)])
    )
    folder = tmp_path_factory.mktemp("pixels")
    return PixelCache(ds, 37, folder=folder), rows, ViewCache(ds, 32, folder=folder).views


class FrozenNorm:
    """BatchNorm with the running statistics: over 4 images it would differ from over 8, whatever the engine does."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        return self


class FrozenERM(FrozenNorm, ERM):
    pass


class FrozenDANN(FrozenNorm, DANN):
    pass


def train(method, data, path):
    cache, rows, views = data
    torch.set_num_threads(1)
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    task = method(method.create_model("test_magdg_resnet", num_classes=2, num_domains=3))
    logs = []

    def on_epoch(epoch, model, log):
        logs.append(log["loss"])

    model = fit(
        task, cache, rows, CONFIG, accelerator=accelerator, on_epoch=on_epoch, checkpoint=path / "checkpoint.pt"
    )
    logits, embedding = predict(model, views, rows.index, embedding="penultimate", accelerator=accelerator)
    torch.save(
        {
            "processes": accelerator.num_processes,
            "losses": logs,
            "logits": torch.from_numpy(logits),
            "embedding": torch.from_numpy(embedding),
            "weights": model.state_dict(),
        },
        path / f"rank{accelerator.process_index}.pt",
    )


def load(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("method", [FrozenERM, FrozenDANN])
def test_two_processes_are_one_with_twice_the_hands(method, data, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    debug_launcher(train, (method, data, tmp_path / "two"), num_processes=2)
    train(method, data, tmp_path / "one")
    one, two, other = (load(tmp_path / name) for name in ("one/rank0.pt", "two/rank0.pt", "two/rank1.pt"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["losses"] == pytest.approx(two["losses"], abs=1e-5)
    assert two["losses"] == other["losses"]  # over all images, not over a process's own
    # 21 rows on 2 processes: each of them once, in order, on both
    assert two["logits"].shape == (21, 2) and torch.equal(two["logits"], other["logits"])
    assert torch.allclose(one["logits"], two["logits"], atol=1e-3)
    assert torch.allclose(one["embedding"], two["embedding"], atol=1e-3)
    assert [p.name for p in (tmp_path / "two").glob("checkpoint*")] == ["checkpoint.pt"]


def test_batch_norm_in_training_takes_each_process_for_itself_and_all_predict_alike(data, tmp_path):
    """On CPUs, see `fit`: a loss near that of one process, not equal to it, and one model that predicts."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    debug_launcher(train, (ERM, data, tmp_path / "two"), num_processes=2)
    train(ERM, data, tmp_path / "one")
    one, two, other = (load(tmp_path / name) for name in ("one/rank0.pt", "two/rank0.pt", "two/rank1.pt"))
    assert one["losses"] != pytest.approx(two["losses"], abs=1e-4)
    assert one["losses"] == pytest.approx(two["losses"], rel=0.2)
    for name, value in two["weights"].items():
        assert torch.equal(value, other["weights"][name]), name
    model = ERM.create_model("test_magdg_resnet", num_classes=2, num_domains=3)
    model.load_state_dict(two["weights"])
    alone, _ = predict(model, data[2], data[1].index)
    assert np.allclose(two["logits"].numpy(), alone, atol=1e-5)


CELL = Cell("dann", 200, n_folds=4, model="test_magdg_resnet", fit=CONFIG)


def run_cells(cells, tree, path, said):
    torch.set_num_threads(1)
    run_grid(cells, load_breakhis(tree), path, accelerator=Accelerator(cpu=True), say=said.append)
    (path / f"said{os.getpid()}").write_text("\n".join(said))


def test_two_processes_leave_the_records_of_a_grid_once(breakhis_tree, tmp_path):
    cells = [replace(CELL, method="colour", options=None), CELL]
    debug_launcher(run_cells, (cells, breakhis_tree, tmp_path, []), num_processes=2)
    for cell in cells:
        run = Run(tmp_path / cell.name)
        assert run.results["parts"]["test"]["images"] == 2
        rows = run.predictions.to_pandas()
        # One of four patients of each class tests, one validates, at three magnifications: 2 + 6 + 6 images;
        # of a network, the two tested ones once more, scale-normalised.
        assert len(rows) == len(rows.groupby(["part", "filename"])) == 14 + 2 * run.is_network
    assert not {p.name for p in run.folder.iterdir()} & {"checkpoint.pt", "epochs"}
    assert len(run.losses()) == 2


def test_processes_of_a_launch_leave_a_cell_that_another_launch_runs_together(breakhis_tree, tmp_path):
    with locked_elsewhere(tmp_path / CELL.name) as pid:
        debug_launcher(run_cells, ([CELL], breakhis_tree, tmp_path, []), num_processes=2)
    one, other = sorted(path.read_text() for path in tmp_path.glob("said*"))
    assert one == "" and f"process {pid} on" in other
    assert not (tmp_path / CELL.name).exists()
