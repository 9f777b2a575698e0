"""The scripts behind the numbers on real tissue, on made-up images in the layout of BreaKHis."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from magnification_invariant.files import read_json
from magnification_invariant.metrics import cluster_interval
from magnification_invariant.records import Run

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_scale_at_the_input_differs_between_the_domains(breakhis_tree):
    """Digital zoom at constant pixels: what fills the input is half as wide at twice the magnification."""
    import real_tissue

    from magnification_invariant.data import ViewCache

    ds = real_tissue.tissue(str(breakhis_tree))
    mpp, magnification = ViewCache(ds, 32).mpp, np.array(ds["magnification"])
    at = {scale: np.unique(mpp[magnification == scale].round(6)) for scale in real_tissue.SCALES}
    assert [len(values) for values in at.values()] == [1, 1, 1]
    assert at[100][0] == pytest.approx(2 * at[200][0], rel=1e-4) and at[200][0] == pytest.approx(
        2 * at[400][0], rel=1e-4
    )
    assert {image.size for image in ds["image"]} == {(70, 46)} and len(ds) == 8 * (1 + 4 + 4)


@pytest.fixture
def table():
    """Predictions of two networks and a floor: 24 patients, two images each at every scale."""
    rng, lines = np.random.default_rng(0), []
    for row, skill in (("constant", 0.0), ("EfficientNet-Lite0, ERM", 0.5), ("EfficientNet-Lite0, DANN", 2.0)):
        for held_out in (100, 200, 400):
            for part in ("test", "test_normalised", "test_source") if skill else ("test", "test_source"):
                for i in range(48):
                    patient, label = i // 2, i // 2 % 2
                    log_odds = skill * (2 * label - 1) + rng.standard_normal() * (skill > 0)
                    key = {"row": row, "held_out": held_out, "fold": patient % 5, "part": part, "domain": held_out}
                    lines.append(key | {"patient": f"14-{patient}", "label": label, "log_odds": log_odds, "mpp": 0.5})
            diagnostics = {"probe": 0.75, "size": 10, "width": 1280, "nogueira": 0.5} if skill else {}
            lines += [{**key, "part": name, "log_odds": value} for name, value in diagnostics.items()]
    return pd.DataFrame(lines)


def test_tables_of_real_tissue_are_what_the_predictions_say(table, tmp_path):
    import real_tissue

    text = real_tissue.report(table, "command", "machine")
    some = table[(table["row"] == "EfficientNet-Lite0, DANN") & (table["part"] == "test")]
    probability, runs = 1 / (1 + np.exp(-some["log_odds"])), some["held_out"]
    expected = cluster_interval("auc", some["label"], probability, some["patient"], runs=runs)
    assert "| EfficientNet-Lite0, DANN | {:.3f} [{:.3f}, {:.3f}] |".format(*expected) in text
    assert "12 benign and 12 malignant patients" in text
    assert "| EfficientNet-Lite0, ERM | 0.750 | 10 | 1280 | 0.50 |" in text
    (gain,) = (line for line in text.splitlines() if line.startswith("| DANN minus ERM |"))
    assert float(gain.split("|")[2].split()[0]) > 0.1 and "zoom minus none" not in text
    real_tissue.picture(table, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_release_carries_the_out_of_fold_records_of_its_recipe(breakhis_tree, tmp_path, monkeypatch):
    import distil
    import real_tissue
    import train_tissue

    from magnification_invariant import Classifier, load_breakhis

    for module in (distil, train_tissue):
        monkeypatch.setattr(module, "N_FOLDS", 4)
    for settings in (real_tissue.SETTINGS, train_tissue.FIT, train_tissue.HEAD):
        settings |= {"image_size": 32, "epochs": 1}
    dealt = distil.patients_of(load_breakhis(breakhis_tree))
    assert all(len(dealt[str(fold)]) == 4 for fold in range(4)) and len(dealt["all"]) == 6
    for name, patients in dealt.items():
        distil.write_start(tmp_path / f"start_{name}", distil.Student(), patients, [100])
    row = "distilled, linear head"
    command = ["train_tissue.py", "--data", str(breakhis_tree), "--teacher", "none", "--output-dir", str(tmp_path)]
    command += [
        "--rows",
        row,
        "--release",
        row,
        "--weights",
        str(tmp_path / "weights"),
        "--cards",
        str(tmp_path / "cards"),
    ]
    monkeypatch.setattr(sys, "argv", command)
    train_tissue.main()

    folder = tmp_path / "weights" / "magerm_resnet18.breakhis_mini"
    results, records = read_json(folder / "results.json"), Run(folder).part("out_of_fold")
    assert results["parts"]["out_of_fold"]["patients"] == 8 == len(set(records["patient"]))
    args = argparse.Namespace(output_dir=tmp_path, threads=1)
    ds = real_tissue.tissue(str(breakhis_tree), train_tissue.IMAGES)
    folds = [train_tissue.run(row, str(fold), ds, args) for fold in range(4)]
    seen = [set(dealt[str(fold)]) for fold in range(4)]
    assert not any(
        set(run.part("test_source")["patient"]) & patients for run, patients in zip(folds, seen, strict=True)
    )
    expected = np.concatenate([run.part("test_source")["probability"] for run in folds])
    assert np.allclose(records["probability"], expected, atol=1e-5)  # each divided by its own fold's temperature
    card = (folder / "README.md").read_text()
    assert "have seen all of these patients" in card and "license: other" in card
    (answer,) = Classifier.from_pretrained(folder).predict(ds[0]["image"], ds[0]["mpp"])
    assert 0 < answer["probability"] < 1
