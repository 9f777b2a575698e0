"""The demo as it is typed, but for a single epoch; what it concludes is tested on runs whose truth is known."""

import re

import pytest
from fabricated import write_run

from magdg import demo, main
from magnification_invariant.records import NORMALISED
from magnification_invariant.report.runs import difference, estimate


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_demo_ends_with_a_table_pictures_and_the_packaged_model(tmp_path, capsys):
    assert main(["demo", "--epochs", "1", "--output-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\| erm  \| 0\.\d{3} \[", out) and re.search(r"\| dann \| 0\.\d{3} \[", out)
    assert re.search(r"pretrained=True\), asked about .*: benign 0\.\d\d, malignant 0\.\d\d", out, re.DOTALL)
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures >= {"cost.png", "slides.png", "reliability.png", "embedding_erm.png", "embedding_dann.png"}


def test_the_conclusion_is_what_the_records_say(tmp_path):
    skills = {"erm": 0.2, "dann": 1.0}
    runs = [write_run(tmp_path, method, 40, skill=skill, scaled=2.0) for method, skill in skills.items()]
    text, rows = demo.conclusion(runs)
    for run in runs:
        values = [estimate([run], "auc", part) for part in ("test", NORMALISED, "test_source")]
        values.append(difference([run], [run], "auc", NORMALISED, "test"))
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {run.method} "))
        assert all("{:.3f} [{:.3f}, {:.3f}]".format(*value) in line for value in values)
        assert rows[run.method]["test"].value < rows[run.method][NORMALISED].value
