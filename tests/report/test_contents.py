"""The report of runs whose every prediction is known."""

import numpy as np
import pytest
from fabricated import write_run
from PIL import Image

from magdg import main
from magnification_invariant import metrics
from magnification_invariant.files import Busy, locked
from magnification_invariant.metrics.intervals import Difference
from magnification_invariant.records import NORMALISED
from magnification_invariant.report import contents, pictures, signatures
from magnification_invariant.report.contents import compare, default_pairs, sections
from magnification_invariant.report.page import page, write
from magnification_invariant.report.runs import (
    SCALED,
    by_title,
    difference,
    estimate,
    read_runs,
    rows_of,
    spread,
)
from magnification_invariant.report.table import markdown, summarise


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for held_out in (40, 200):
        for seed in (0, 1):
            write_run(root, "erm", held_out, seed=seed, skill=0.8, scaled=1.0)
            write_run(root, "dann", held_out, seed=seed, skill=1.3, scaled=1.3, start={"source": "w", "saw_test": True})
    write_run(root, "constant", 200, skill=0.0)
    return root


@pytest.fixture
def groups(root):
    return by_title(read_runs([root]))


@pytest.fixture
def nothing_is_drawn(monkeypatch):
    monkeypatch.setattr(contents.Picture, "drawn", lambda name, caption, *_: contents.Picture(name, caption, b"PNG"))


def brier(run, part="test"):
    p = run.part(part)
    return metrics.brier(p["label"], p["probability"], metrics.patient_weights(p["patient"]))


def test_the_estimand_by_hand(groups):
    """Brier averaged over seeds, then held-outs, at each run's temperature: a plain mean of the runs' figures."""
    mean = {title: np.mean([brier(run) for run in runs]) for title, runs in groups.items()}
    assert estimate(groups["erm"]).value == pytest.approx(mean["erm"])
    measured = difference(groups["dann"], groups["erm"])
    assert measured.difference == pytest.approx(mean["dann"] - mean["erm"])
    assert measured.low < measured.difference < measured.high < 0 and measured.p_value < 0.01
    auc = np.mean([metrics.auc(*(run.part("test")[k] for k in ("label", "probability"))) for run in groups["erm"]])
    assert estimate(groups["erm"], "auc").value == pytest.approx(auc)
    deviation = [np.std([brier(r) for r in groups["erm"] if r.held_out == h], ddof=1) for h in (40, 200)]
    assert spread(groups["erm"])["seed"] == pytest.approx(np.sqrt(np.mean(np.square(deviation))))
    assert np.isnan(spread(groups["erm"])["fold"])


def test_a_floor_is_compared_with_every_seed(groups):
    measured = difference(groups["erm"], groups["constant"])
    at_200 = [brier(run) for run in groups["erm"] if run.held_out == 200]
    assert measured.difference == pytest.approx(np.mean(at_200) - brier(*groups["constant"]))


def test_the_scale_normalised_row_is_the_same_runs_on_the_other_part(root, groups):
    rows = rows_of(groups)
    assert list(rows) == ["constant", "dann", "dann" + SCALED, "erm", "erm" + SCALED]
    by_hand = np.mean([brier(run, NORMALISED) - brier(run) for run in groups["erm"]])
    measured = difference(groups["erm"], groups["erm"], part_a=NORMALISED, part_b="test")
    assert measured.difference == pytest.approx(by_hand) and measured.high < 0
    same = difference(groups["dann"], groups["dann"], part_a=NORMALISED, part_b="test")
    assert same.difference == same.low == same.high == 0 and same.p_value == 1  # shown at the same scale
    summary = {(row["method"], row["held_out"]): row for row in summarise(sorted(root.iterdir()))}
    erm = [brier(run, NORMALISED) for run in groups["erm"] if run.held_out == 200]
    assert summary["erm" + SCALED, 200]["patient_balanced"]["brier"] == pytest.approx(np.mean(erm))
    assert summary["dann" + SCALED, 40]["patient_balanced"] == summary["dann", 40]["patient_balanced"]
    assert ("constant" + SCALED, 200) not in summary and "signature" not in summary["erm" + SCALED, 200]
    at_200 = [method for method, held_out in summary if held_out == 200]
    assert at_200 == ["constant", "dann", "dann" + SCALED, "erm", "erm" + SCALED]  # floors first
    assert "undo the shift where its size is known" in markdown(list(summary.values()))
    assert "scale-normalised" not in markdown(summarise(sorted(root.iterdir()), "val"), "val")


def test_the_family(groups):
    rows, pairs = rows_of(groups), default_pairs({title: groups[title] for title in ("dann", "erm")})
    compared = compare(rows, pairs)
    assert [(c.a, c.b, c.metric, c.where) for c in compared] == [
        ("dann", "erm", "brier", "all held-outs"),
        ("dann", "erm", "auc", "all held-outs"),
        ("dann", "erm", "f1", "all held-outs"),
        ("dann", "erm", "brier", "40X held out"),
        ("dann", "erm", "brier", "200X held out"),
        ("erm" + SCALED, "erm", "brier", "all held-outs"),  # and not dann's: there both views show the same
        ("dann", "erm" + SCALED, "brier", "all held-outs"),
    ]
    assert [c.adjusted for c in compared[1:]] == pytest.approx(metrics.holm([c.measured.p_value for c in compared[1:]]))
    assert compared[0].adjusted == compared[0].measured.p_value
    assert [c.primary for c in compared] == [True] + [False] * 6
    alone = compare(rows_of({"erm": groups["erm"]}), [])
    assert [(c.a, c.primary) for c in alone] == [("erm" + SCALED, False)]
    with pytest.raises(ValueError, match="no finished runs of gan"):
        compare(rows, [("gan", "erm")])


def test_a_view_that_undoes_nothing_is_no_test(tmp_path):
    write_run(tmp_path, "erm", 200, skill=0.8, scaled=0.8)
    rows = rows_of(by_title(read_runs([tmp_path])))
    assert "erm" + SCALED in rows and compare(rows, []) == []


def test_settings_are_rows_of_their_own(tmp_path):
    for epochs in (3, 5):
        write_run(tmp_path, "erm", 200, settings={"epochs": epochs, "model": "a", "calibrate": True}, skill=epochs / 5)
    write_run(tmp_path, "dann", 200, settings={"epochs": 5, "model": "b", "calibrate": True, "coeff": 0.1})
    zoom = {"epochs": 5, "model": "a", "zoom": 2.5}
    write_run(tmp_path, "erm", 200, settings=zoom)
    write_run(tmp_path, "dann", 200, settings=zoom | {"coeff": 0.1})
    write_run(tmp_path, "dann", 200, settings=zoom | {"coeff": 1.0}, split={"n_folds": 5, "split_seed": 0})
    groups = by_title(read_runs([tmp_path]))
    assert {title: len(runs) for title, runs in groups.items()} == {
        "dann": 1,
        "dann + zoom (coeff 0.1, n folds 4)": 1,
        "dann + zoom (coeff 1, n folds 5)": 1,
        "erm (epochs 3)": 1,
        "erm (epochs 5)": 1,
        "erm + zoom": 1,
    }
    assert estimate(groups["erm (epochs 3)"]).value > estimate(groups["erm (epochs 5)"]).value
    assert default_pairs(groups) == [
        ("dann", "erm (epochs 5)"),
        ("dann + zoom (coeff 0.1, n folds 4)", "erm + zoom"),
        ("dann + zoom (coeff 1, n folds 5)", "erm + zoom"),
    ]
    assert default_pairs({"dann": groups["dann"]}) == []
    write_run(tmp_path / "again", "erm", 200, settings={"epochs": 3, "model": "a", "calibrate": True})
    with pytest.raises(ValueError, match="are the same cell"):
        read_runs([tmp_path, tmp_path / "again"])


def test_what_the_report_says(root, tmp_path):
    report = dict(sections([root]))
    assert report["What can and cannot be concluded"][0].startswith(
        "On these patients, with these trained networks, dann is better than erm"
    )
    assert "undo the shift" in report["What can and cannot be concluded"][-1]
    table = report["Each held-out magnification"][1]
    four = ["dann *", f"dann{SCALED} *", "erm", "erm" + SCALED]
    assert [row[0] for row in table.rows] == [*four, "constant", *four]
    assert "the start had seen the test" in report["Each held-out magnification"][2]
    assert "not shown scale-normalised: a scale is not known" in report["Each held-out magnification"][3]
    paper = report["Beside the paper"][1]
    assert [row[2] for row in paper.rows] == ["paper", "ours"] * 3 and paper.rows[3][3] == "not run"
    assert [picture.name for picture in report["Training"]] == ["training"]
    assert all(file.stat().st_size for file in write(tmp_path, "report", "Title", report.items()))


def test_domains_that_are_texts(tmp_path):
    """Scanners, with letters that other programs take for something else."""
    scanners = ("scanner_a", "Zürich $x_$", "<b>")
    for method in ("erm", "dann"):
        write_run(tmp_path / "runs", method, scanners[1], domains=scanners, scaled=1.0, skill=1 + (method == "dann"))
    write_run(tmp_path / "runs", "colour", scanners[1], domains=scanners)
    files = write(tmp_path, "report", "Scanners", sections([tmp_path / "runs"]))
    text = (tmp_path / "report.html").read_text()
    assert "<td>Zürich $x_$</td>" in text and "<b>" not in text
    assert all(file.is_file() for file in files)
    assert "Zürich $x_$" in markdown(summarise((tmp_path / "runs").iterdir()))


def test_where_interval_and_test_disagree_nothing_is_concluded(groups):
    rows = rows_of(groups)
    first, *others = compare(rows, [("dann", "erm")])
    for p_value, wanted in (
        (0.3, "Interval and test disagree, and nothing"),
        (0.01, "On these patients, with these trained networks, dann is better"),
    ):
        measured = Difference(-0.01, -0.02, -0.001, p_value)
        headline = contents._conclusions(rows, [first._replace(measured=measured), *others])[0]
        assert headline.startswith(wanted) and f"p = {p_value:.4f}" in headline


def test_training_curves_are_means_over_runs_of_every_stage(tmp_path, monkeypatch):
    drawn, make = [], pictures._figure
    monkeypatch.setattr(pictures, "_figure", lambda *n: drawn.append(make(*n)) or drawn[-1])
    for seed in (0, 1):
        run = write_run(tmp_path, "gan", 40, seed=seed)
        losses = [{"epoch": k, "loss": 9.0, "class_loss": 1 / (k + 1) + seed, "coeff": k / 2} for k in range(3)]
        run.write_losses(losses)
        run.write_losses([{"epoch": 0, "real_loss": 0.5}], "prepare")
    pictures.curves(read_runs([tmp_path]), tmp_path / "curves.png")
    ((_, (before, after)),) = drawn
    assert "gan" in before.get_title() and [line.get_label() for line in before.lines] == ["real loss"]
    assert {line.get_label(): list(line.get_ydata()) for line in after.lines} == {
        "class loss": pytest.approx([1.5, 1.0, 1 / 3 + 0.5]),
        "coeff": [0, 0.5, 1],
    }
    assert Image.open(tmp_path / "curves.png").format == "PNG"


def test_the_command_reads_signatures_and_refits_them_when_asked(root, groups, tmp_path, monkeypatch, nothing_is_drawn):
    asked = []
    monkeypatch.setattr(signatures, "patient_stability", lambda run, n: asked.append((run, n)))
    assert main(["report", str(root), "--output-dir", str(tmp_path), "--refits", "30"]) == 0
    assert set(asked) == {(run, 30) for run in read_runs([root]) if run.is_network}
    text = (tmp_path / "report.md").read_text()
    rows = [line for line in text.partition("## Signatures\n")[2].partition("\n## ")[0].splitlines() if "| " in line]
    for row, title, size in zip(rows[1:], ("dann", "erm"), (1, 2), strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        auc = np.mean([run.results["parts"]["test"]["patient_balanced"]["auc"] for run in groups[title]])
        star = " *" * (title == "dann")  # its start had seen the test
        assert cells[:5] == [title + star, "4", "0", f"{size} ({size}-{size})", "3"] and cells[-3] == f"{auc:.3f}"


def test_a_method_cannot_inject_html(tmp_path, nothing_is_drawn):
    for method in ("erm", "<img src=x onerror=alert(1)>:M"):
        write_run(tmp_path, method, 200)
    text = page("t", sections([tmp_path]))
    assert "<img src=x" not in text and "&lt;img src=x" in text


def test_the_probe_is_compared_with_that_of_erm_of_the_same_run(tmp_path, nothing_is_drawn):
    write_run(tmp_path, "erm", 200)
    write_run(tmp_path, "erm", 200, seed=1)
    run = write_run(tmp_path, "dann", 200)
    parts = ("train", "val", "test", "test_source")
    blind = np.array([1, 1, 0], np.float32)  # the third is the magnification
    run.write_embeddings(
        {part: run.embeddings(part) * blind for part in parts}, {part: run.keys(part) for part in parts}
    )
    dann, erm = dict(sections([tmp_path]))["What embeddings tell of the acquisition"][1].rows
    assert erm[4] == "-" and float(erm[2].split()[0]) == 1 and float(dann[2].split()[0]) < 0.5
    minus, low, high = (float(text.strip("[,]")) for text in dann[4].split())
    assert minus == pytest.approx(float(dann[2].split()[0]) - 1, abs=0.0011)
    assert low < minus < high < 0


def test_too_few_patients_conclude_nothing(tmp_path):
    for method in ("erm", "dann"):
        write_run(tmp_path, method, 200, patients=8)
    rows = rows_of(by_title(read_runs([tmp_path])))
    with pytest.warns(UserWarning, match="allow no interval"):
        assert "nothing can be concluded" in contents._conclusions(rows, compare(rows, [("dann", "erm")]))[0]


def test_what_is_no_run_is_refused_in_one_sentence(root, tmp_path, capsys):
    with pytest.raises(ValueError, match="no finished cell"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match="the same cell"):
        read_runs([root, next(root.iterdir())])
    assert main(["report", str(tmp_path)]) == 2
    old = write_run(tmp_path, "erm", 40)
    old.write_config({"arguments": {"method": "erm"}})
    assert main(["report", str(tmp_path)]) == 2
    assert "version 0.1" in capsys.readouterr().err


def test_nobody_else_writes_the_report_meanwhile(root, tmp_path):
    """It is locked from the first record that is read, and the loser leaves what is there."""
    with locked(tmp_path / "report"), pytest.raises(Busy, match="being written by another process"):
        write(tmp_path, "report", "t", sections([root]))
    write(tmp_path, "report", "t", iter([("h", [])]))

    def locked_meanwhile():
        with pytest.raises(Busy):
            write(tmp_path, "report", "other", [])
        yield "h", []

    write(tmp_path, "report", "mine", locked_meanwhile())
    assert (tmp_path / "report.md").read_text().startswith("# mine")
