"""Evaluation of anyone's predictions: its numbers against the definitions, and what bad tables are told."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.special import expit

from magdg import main
from magnification_invariant import metrics
from magnification_invariant.report.evaluation import read_predictions, sections
from magnification_invariant.report.page import Table


def predictions(seed=0, patients=20, images=4):
    """Half of the patients validate; logits are twice too steep."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(2 * patients), images)
    label = patient % 2
    score = 1.5 * (2 * label - 1) + rng.standard_normal(len(label)) + rng.standard_normal(2 * patients)[patient]
    logits = np.stack([np.zeros(len(label)), 4 * score], 1)
    part = np.where(patient < patients, "val", "test")
    return {"label": label, "patient": patient.astype(str), "logits": logits, "part": part}


def table(found, heading):
    (block,) = (b for name, blocks in found if name == heading for b in blocks if isinstance(b, Table))
    return {row[0]: dict(zip(block.head[1:], row[1:], strict=True)) for row in block.rows}


def test_metrics_are_those_of_the_scaled_probabilities_of_the_test():
    columns = predictions()
    test, val = (columns["part"] == part for part in ("test", "val"))
    temperature = metrics.fit_temperature(columns["logits"][val], columns["label"][val])
    p = expit(columns["logits"][test, 1] / temperature)
    found = table(sections(columns), "Metrics")
    assert float(found["brier"]["by image"]) == pytest.approx(metrics.brier(columns["label"][test], p), abs=1e-4)
    calibration = table(sections(columns), "Calibration")
    briers = [float(row["brier"]) for row in calibration.values()]
    assert temperature > 1.5 and briers[0] > briers[1] >= briers[2] - 1e-4
    assert "oracle" in list(calibration)[2]


def test_the_threshold_is_chosen_on_validation_alone():
    columns = predictions()
    first = sections(columns, sensitivity=0.9)
    changed = dict(columns, logits=columns["logits"] * np.where(columns["part"] == "test", -1, 1)[:, None])
    second = sections(changed, sensitivity=0.9)
    assert table(first, "Threshold")["validation"] == table(second, "Threshold")["validation"]
    assert float(table(first, "Threshold")["validation"]["sensitivity"]) >= 0.9
    specificity = float(table(first, "Threshold")["test"]["specificity"])
    assert specificity > 0.5 > float(table(second, "Threshold")["test"]["specificity"])
    none = [blocks for name, blocks in sections(dict(columns, part=np.full(160, "test"))) if name == "Threshold"]
    assert "no malignant validation rows" in none[0][0]


def test_types_and_domains():
    columns = predictions() | {"subtype": np.array(["a", "b"] * 80), "domain": np.array([40, 400] * 80)}
    assert list(table(sections(columns), "By subtype")) == ["a", "b"]
    assert list(table(sections(columns), "By domain")) == ["40X", "400X"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": None}, "lack label"),
        ({"logits": None}, "probability, or logits"),
        ({"logits": np.full((160, 2), np.nan)}, "NaN"),
        ({"logits": np.zeros((160, 3))}, "two a row"),
        ({"label": np.full(160, 2)}, "y_true must hold"),
        ({"part": np.full(160, "train")}, "no part 'test'"),
        ({"logits": None, "probability": np.full(160, 1.2)}, r"lie in \[0, 1\]"),
    ],
)
def test_bad_predictions_are_refused(change, message):
    columns = {name: column for name, column in (predictions() | change).items() if column is not None}
    with pytest.raises(ValueError, match=message):
        sections(columns)


def test_one_class_or_one_patient_is_no_number_and_a_warning():
    one = {"label": np.ones(4, int), "patient": np.zeros(4, int), "probability": np.full(4, 0.7)}
    with pytest.warns(UserWarning, match="all rows have label 1"):
        found = sections(one)
    rows = table(found, "Metrics")
    assert rows["auc"]["patient-balanced"] == "nan" and rows["auc"]["95 % interval"] == "-"


def test_patients_on_both_sides_are_said():
    columns = predictions() | {"patient": np.resize(np.arange(20), 160)}
    with pytest.warns(UserWarning, match="saw them"):
        sections(columns)


def test_the_command(tmp_path, capsys):
    columns = predictions()
    content = {name: list(column) for name, column in columns.items()}
    pq.write_table(pa.table(content), tmp_path / "p.parquet")
    assert main(["evaluate", str(tmp_path / "p.parquet"), "--output-dir", str(tmp_path / "out")]) == 0
    assert "| brier" in capsys.readouterr().out
    assert (tmp_path / "out" / "evaluation.html").exists()
    (tmp_path / "no.parquet").write_text("text")
    assert main(["evaluate", str(tmp_path / "no.parquet")]) == 2
    assert "not a Parquet file" in capsys.readouterr().err
    content["patient"][3] = None
    pq.write_table(pa.table(content), tmp_path / "gap.parquet")
    assert main(["evaluate", str(tmp_path / "gap.parquet")]) == 2
    assert "no value in 1 of 160 rows" in capsys.readouterr().err
    assert main(["evaluate", "some/model"]) == 2


def written(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_the_probability_that_is_stated_is_evaluated(tmp_path):
    columns = predictions()
    cool = expit(columns["logits"][:, 1] / 3)
    given = {**columns, "logits": list(columns["logits"]), "probability": cool, "part": ["test"] * len(cool)}
    with pytest.warns(UserWarning, match=r"disagree in \d+ of 160 rows .*probability is evaluated"):
        result = table(sections(read_predictions(written(tmp_path / "p.parquet", **given))), "Metrics")
    assert float(result["brier"]["by image"]) == pytest.approx(metrics.brier(columns["label"], cool), abs=1e-4)


def test_the_last_epoch_is_the_largest_number(tmp_path):
    label, patient = np.tile([0, 1], 20), [f"p{i}" for i in range(40)]
    right, wrong = np.where(label == 1, 0.9, 0.1), np.where(label == 1, 0.1, 0.9)
    columns = {"label": [*label, *label], "patient": patient * 2, "probability": [*wrong, *right]}
    for epochs in (["9"] * 40 + ["10"] * 40, [9.0] * 40 + [10.0] * 40):
        known = read_predictions(written(tmp_path / "p.parquet", **columns, epoch=epochs))
        assert np.array_equal(known["probability"], right)
    for epochs, unknown in (([9.0] * 79 + [float("nan")], 1), (["last"] * 80, 80), ([9] * 79 + [None], 1)):
        with pytest.raises(ValueError, match=f"no value, or no number, in {unknown} of 80"):
            read_predictions(written(tmp_path / "p.parquet", **columns, epoch=epochs))


def test_what_a_table_lacks_is_said_with_file_and_row(tmp_path, capsys):
    columns = {"label": [0, 1, 1], "patient": ["a", "b", "c"], "filename": ["x", "y", "y"]}
    with pytest.raises(ValueError, match=r"p\.parquet: column 'logits' has not two numbers.* in 1 of 3 rows.*row 1"):
        read_predictions(written(tmp_path / "p.parquet", **columns, logits=[[0.0, 1.0], [1.0], [0.0, 2.0]]))
    for gap in (None, float("nan")):
        with pytest.raises(ValueError, match=r"column 'probability' has no value in 1 of 3 rows"):
            read_predictions(written(tmp_path / "p.parquet", **columns, probability=[0.1, gap, 0.2]))
    twice = {**columns, "patient": ["a", "b", "b"], "probability": [0.1, 0.9, 0.9]}
    with pytest.warns(UserWarning, match="1 of 3 rows are of an image that is there already"):
        read_predictions(written(tmp_path / "P.PARQUET", **twice))
    assert main(["evaluate", str(tmp_path / "P.PARQUET"), "--output-dir", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "absent.parquet")]) == 2
    assert "there is no such file" in capsys.readouterr().err
