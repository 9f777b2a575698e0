"""The report of cells whose every prediction is known."""

import json
import shutil
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from PIL import Image

from magdg import main
from magnification_invariant import metrics
from magnification_invariant.data import load_breakhis
from magnification_invariant.data.images import EncodedImages
from magnification_invariant.metrics.intervals import Difference
from magnification_invariant.records import evaluate, prediction_table, write_json
from magnification_invariant.report import contents, pictures, signatures
from magnification_invariant.report.contents import compare, default_pairs, sections
from magnification_invariant.report.dimensions import PARTS, measure
from magnification_invariant.report.page import page, write
from magnification_invariant.report.runs import by_title, difference, estimate, read_runs, spread
from magnification_invariant.signatures import SignatureProjector, write_embeddings

PATIENTS, IMAGES = 24, 2


def write_cell(root, method, held_out, fold=0, seed=0, *, skill=1.0, start=None):
    """A finished cell's folder: every patient at three seen magnifications and the unseen one."""
    folder = root / f"{method.replace('/', '.')}-lomo{held_out}-fold{fold}-seed{seed}"
    folder.mkdir(parents=True)
    magnifications = [m for m in (40, 100, 200, 400) if m != held_out]
    rng = np.random.default_rng([held_out, fold, seed])  # the same noise for every method
    tables, tensors = [], {}
    for part, domains in (("val", magnifications), ("test", [held_out]), ("test_source", magnifications)):
        n = PATIENTS * IMAGES * len(domains)
        patient = np.resize(np.repeat(np.arange(PATIENTS), IMAGES), n) + 100 * (part == "val")
        label, domain = patient % 2, np.repeat(domains, PATIENTS * IMAGES)
        columns = {"patient": patient.astype(str), "slide": patient.astype(str), "label": label, "domain": domain}
        columns |= {"filename": np.array([f"{part}{i}.png" for i in range(n)]), "mpp": np.full(n, 0.5)}
        score = skill * (2 * label - 1) + rng.standard_normal(n)
        about = {"part": part, "fold": fold, "held_out": held_out, "method": method, "seed": seed}
        for epoch in (0, 1):
            logits = np.stack([np.zeros(n), score * (epoch + 1)], 1)
            tables.append(prediction_table(columns, np.arange(n), logits, epoch=epoch, **about))
        tensors[f"{part}.embedding"] = np.stack([score, rng.standard_normal(n), domain / 100], 1).astype(np.float32)
    tensors["train.embedding"] = tensors["val.embedding"]
    records = pa.concat_tables(tables)
    pq.write_table(records, folder / "predictions.parquet")
    safetensors.numpy.save_file(tensors, folder / "embeddings.safetensors")
    last = records.filter(pa.array(np.asarray(records["epoch"]) == 1))
    results = {"temperature": 1.5, "parts": evaluate(last, 1.5), "uncalibrated": evaluate(last)}
    results["signature"] = {"size": 1 + (method == "erm"), "width": 3, "live": 3, "jaccard": 0.5, "nogueira": 0.4}
    results["signature"] |= {"chance_jaccard": 0.1, "jaccard_pairs": [0.5] * 3, "test": results["parts"]["test"]}
    results["signature"]["curve"] = {"size": [0, 1, 2], "val": [0.7, 0.6, 0.5], "test": [0.7, 0.6, 0.5]}
    write_json(folder / "results.json", results)
    arguments = {"method": method, "zoom": False, "held_out": held_out, "fold": fold, "seed": seed, "data": "d"}
    config = {
        "arguments": arguments,
        "start": start or {},
        "recipe_sha256": "r",
        "versions": {"torch": "2"},
        "git": None,
    }
    write_json(folder / "config.json", config)
    (folder / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "domain_accuracy": 0.4}) + "\n")
    return folder


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for held_out in (40, 200):
        for seed in (0, 1):
            write_cell(root, "erm", held_out, seed=seed, skill=0.8)
            write_cell(root, "dann", held_out, seed=seed, skill=1.3, start={"saw_test": True})
    return root


def test_the_estimand_by_hand(cells):
    """Brier averaged over seeds, then held-outs, at each run's temperature: a plain mean of the runs' figures."""
    groups = by_title(read_runs([cells]))

    def brier(run):
        p = run.part("test")
        return metrics.brier(p["label"], p["probability"], metrics.patient_weights(p["patient"]))

    by_run = {title: np.mean([brier(run) for run in runs]) for title, runs in groups.items()}
    assert estimate(groups["erm"]).value == pytest.approx(by_run["erm"])
    found = difference(groups["dann"], groups["erm"])
    assert found.difference == pytest.approx(by_run["dann"] - by_run["erm"])
    assert found.low < found.difference < found.high < 0 and found.p_value < 0.01
    auc = np.mean([metrics.auc(*(run.part("test")[k] for k in ("label", "probability"))) for run in groups["erm"]])
    assert estimate(groups["erm"], "auc").value == pytest.approx(auc)
    deviation = [np.std([brier(r) for r in groups["erm"] if r.held_out == h], ddof=1) for h in (40, 200)]
    assert spread(groups["erm"])["seed"] == pytest.approx(np.sqrt(np.mean(np.square(deviation))))
    assert np.isnan(spread(groups["erm"])["fold"])


def test_the_family(cells):
    groups = by_title(read_runs([cells]))
    found = compare(groups, default_pairs(list(groups)))
    assert [(c.metric, c.where) for c in found] == [
        ("brier", "all held-outs"),
        ("auc", "all held-outs"),
        ("f1", "all held-outs"),
        ("brier", "40X held out"),
        ("brier", "200X held out"),
    ]
    assert [c.adjusted for c in found[1:]] == pytest.approx(metrics.holm([c.found.p_value for c in found[1:]]))
    assert found[0].adjusted == found[0].found.p_value
    with pytest.raises(ValueError, match="no finished runs of gan"):
        compare(groups, [("gan", "erm")])


def test_default_pairs():
    titles = ["coral", "erm", "dann", "erm + zoom", "dann + zoom", "gan + zoom"]
    pairs = [("dann", "erm"), ("dann + zoom", "erm + zoom"), ("coral", "erm"), ("gan + zoom", "erm + zoom")]
    assert default_pairs(titles) == pairs
    assert default_pairs(["dann"]) == []


def test_what_the_report_says(cells, tmp_path):
    found = dict(sections([cells]))
    assert found["What can and cannot be concluded"][0].startswith("On these patients dann is better than erm")
    backwards = dict(sections([cells], [("erm", "dann")]))["What can and cannot be concluded"][0]
    assert "WORSE" in backwards
    table = found["Each held-out magnification"][1]
    assert [row[0] for row in table.rows] == ["dann *", "erm", "dann *", "erm"]
    assert "the start had seen the test" in found["Each held-out magnification"][2]
    paper = found["Beside the paper"][1]
    assert [row[2] for row in paper.rows] == ["paper", "ours"] * 3 and paper.rows[3][3] == "not run"
    assert [picture.name for picture in found["Training"]] == ["training"]
    rules = [row[1] for row in found["Which epoch counts"][1].rows]
    assert any(rule.startswith("oracle") for rule in rules) and "last epoch (primary)" in rules
    files = write(tmp_path, "report", "Title", found.items())
    assert all(file.stat().st_size for file in files)


def test_where_interval_and_test_disagree_nothing_is_concluded(cells):
    groups = by_title(read_runs([cells]))
    first, *others = compare(groups, [("dann", "erm")])
    for p_value, wanted in (
        (0.3, "Interval and test disagree, and nothing"),
        (0.01, "On these patients dann is better"),
    ):
        found = Difference(-0.01, -0.02, -0.001, p_value)
        headline = contents._conclusions(groups, [first._replace(found=found), *others])[0]
        assert headline.startswith(wanted) and f"p = {p_value:.4f}" in headline


def test_training_curves_are_means_over_runs_of_every_stage(tmp_path, monkeypatch):
    drawn, make = [], pictures._figure
    monkeypatch.setattr(pictures, "_figure", lambda *n: drawn.append(make(*n)) or drawn[-1])
    for seed in (0, 1):
        folder = write_cell(tmp_path, "gan", 40, seed=seed)
        logs = [{"epoch": k, "loss": 9.0, "class_loss": 1 / (k + 1) + seed, "coeff": k / 2} for k in range(3)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs))
        (folder / "prepare.jsonl").write_text(json.dumps({"epoch": 0, "real_loss": 0.5}) + "\n")
    pictures.curves(read_runs([tmp_path]), tmp_path / "curves.png")
    ((_, (before, after)),) = drawn
    assert "gan" in before.get_title() and [line.get_label() for line in before.lines] == ["real loss"]
    assert {line.get_label(): list(line.get_ydata()) for line in after.lines} == {
        "class loss": pytest.approx([1.5, 1.0, 1 / 3 + 0.5]),
        "coeff": [0, 0.5, 1],
    }
    assert Image.open(tmp_path / "curves.png").format == "PNG"


def test_the_command_reads_signatures_and_refits_them_when_asked(cells, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(signatures, "patient_stability", lambda folder, n: asked.append((folder.name, n)))
    monkeypatch.setattr(signatures, "_between_networks", lambda signed: [f"compared: {', '.join(signed)}"])
    command = ["report", str(cells), "--output-dir", str(tmp_path)]
    assert main(command) == 0 and not asked
    text = (tmp_path / "report.md").read_text()
    rows = [line for line in text.partition("## Signatures\n")[2].partition("\n## ")[0].splitlines() if "| " in line]
    groups = by_title(read_runs([cells]))
    for row, title, size in zip(rows[1:], ("dann", "erm"), (1, 2), strict=True):
        cells_of_row = [cell.strip() for cell in row.strip("|").split("|")]
        auc = np.mean([run.results["parts"]["test"]["patient_balanced"]["auc"] for run in groups[title]])
        star = " *" * (title == "dann")  # its start had seen the test
        assert cells_of_row[:5] == [title + star, "4", "0", f"{size} ({size}-{size})", "3"]
        assert cells_of_row[-3] == f"{auc:.3f}"
    assert "Stability between networks" not in text
    assert main([*command, "--refits", "30"]) == 0
    assert sorted(asked) == sorted((run.folder.name, 30) for run in read_runs([cells]))
    assert "compared: dann, erm" in (tmp_path / "report.md").read_text()


def test_the_command_writes_what_dimensions_respond_to(breakhis_tree, tiny_model, tmp_path, capsys):
    """Three dimensions that are known: the magnification, the haematoxylin of an image, and its row."""
    pytest.importorskip("skimage")
    ds, cell, projector = (
        load_breakhis(breakhis_tree),
        tmp_path / "cell",
        SignatureProjector.from_pretrained(tiny_model),
    )
    rows = np.random.default_rng(0).permutation(len(ds))
    embedding = np.zeros((len(ds), projector.width), np.float32)
    known = np.log(ds["magnification"]), measure(EncodedImages(ds), np.arange(len(ds)), np.array(ds["mpp"]))[:, 3]
    for dimension, values in zip(projector.indices, (*known, np.arange(len(ds))), strict=True):
        embedding[:, dimension] = values
    columns = {"filename": "filename", "patient": "patient", "label": "label", "domain": "magnification"}
    parts = {}
    for part, of in zip(PARTS, np.split(rows, [8, 16]), strict=True):
        keys = {name: np.array(ds[column])[of] for name, column in columns.items()}
        parts[part] = [embedding[of]], {"row": of} | keys
    shutil.copytree(tiny_model, cell / "model")
    write_embeddings(cell / "embeddings.safetensors", parts, embedding="penultimate")
    runs, out = write_cell(tmp_path, "erm", 200), tmp_path / "out"
    command = ["report", str(runs), "--output-dir", str(out), "--dimensions", str(cell), "--data", str(breakhis_tree)]
    assert main(command) == 2 and f"{cell} is no finished cell" in capsys.readouterr().err
    for name in ("config.json", "results.json"):
        (cell / name).write_text("{}")

    assert main(command) == 0
    assert {file.name for file in out.glob("*.*")} == {"report.md", "report.html", "dimensions.md", "dimensions.html"}
    text = (out / "dimensions.md").read_text()
    assert text.startswith("# What the signature of cell responds to\n")
    table = [line for line in text.splitlines() if line.startswith(("| 3 ", "| 10 ", "| 40 "))]
    found = {row[0]: row[1:] for row in ([cell.strip() for cell in line.strip("|").split("|")] for line in table)}
    assert list(found) == ["10", "3", "40"]  # by weight
    assert [found[d][0] for d in found] == ["benign", "malignant", "malignant"]
    assert found["3"][1] == "+1.00" and found["10"][-1] == "+1.00"
    assert abs(float(found["40"][1])) < 0.9
    assert len(list((out / "dimensions").glob("*.png"))) == (out / "dimensions.html").read_text().count("<img ") == 3

    other = tmp_path / "other"
    shutil.copytree(breakhis_tree, other)
    next(other.rglob("*.png")).unlink()
    assert main([*command[:-1], str(other)]) == 2
    assert f"{cell} was made from another table than this one" in capsys.readouterr().err


def test_a_method_cannot_inject_html(tmp_path):
    evil = "<img src=x onerror=alert(1)>:M"
    for method in ("erm", evil):
        write_cell(tmp_path, method, 200)
    text = page("t", sections([tmp_path]))
    assert "<img src=x" not in text and "&lt;img src=x" in text


def test_the_probe_is_compared_with_that_of_erm_of_the_same_run(tmp_path):
    write_cell(tmp_path, "erm", 200)
    write_cell(tmp_path, "erm", 200, seed=1)
    file = write_cell(tmp_path, "dann", 200) / "embeddings.safetensors"
    tensors = safetensors.numpy.load_file(file)
    blind = {name: x * np.array([1, 1, 0], np.float32) for name, x in tensors.items()}  # the third is the magnification
    safetensors.numpy.save_file(blind, file)
    dann, erm = dict(sections([tmp_path]))["What embeddings tell of the acquisition"][1].rows
    assert erm[4] == "-" and float(erm[2].split()[0]) == 1 and float(dann[2].split()[0]) < 0.5
    difference, low, high = (float(text.strip("[,]")) for text in dann[4].split())
    assert difference == pytest.approx(float(dann[2].split()[0]) - 1, abs=0.0011)
    assert low < difference < high < 0


def test_too_few_patients_conclude_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PATIENTS", 8)
    for method in ("erm", "dann"):
        write_cell(tmp_path, method, 200)
    assert "nothing can be concluded" in sections([tmp_path])[0][1][0]


def test_bad_folders_are_refused(cells, tmp_path):
    with pytest.raises(ValueError, match="no finished cell"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match="the same cell"):
        read_runs([cells, next(cells.iterdir())])
    assert main(["report", str(tmp_path)]) == 2


@pytest.mark.slow
def test_a_browser_shows_every_picture(cells, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium")
    assert main(["report", str(cells), "--output-dir", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    # The page itself allows no script; the copy that is looked at says how its pictures fared.
    script = (
        "<script>onload = () => document.title = JSON.stringify([...document.images].map(i => i.naturalWidth))</script>"
    )
    copy = tmp_path / "copy.html"
    copy.write_text(
        text.replace("default-src 'none'", "script-src 'unsafe-inline'").replace("</body>", script + "</body>")
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path}"]
    done = subprocess.run([browser, *options, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120)
    widths = json.loads(done.stdout.partition("<title>")[2].partition("</title>")[0])
    assert len(widths) == text.count("<img ") >= 6 and min(widths) > 100
    done = subprocess.run(
        [browser, *options, "--dump-dom", (tmp_path / "report.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr and "<h1>" in done.stdout
