"""Cards: what they say follows from the records, the Hub can read them, and their code runs."""

import json
import re
import shutil
from pathlib import Path

import pytest
from fabricated import add_model, write_run
from hub_client import run_client
from hub_server import HubServer
from huggingface_hub import ModelCard

from magnification_invariant.files import read_json, write_json
from magnification_invariant.hub import render_card, stage

ROOT = Path(__file__).parents[2]
CARDS = sorted(path.parent for path in (ROOT / "hub_cards").glob("*/README.md"))


@pytest.fixture(scope="module")
def staged(run, tmp_path_factory) -> Path:
    return stage(run, "me/model", tmp_path_factory.mktemp("card") / "staged")


def test_the_hub_reads_the_metadata(staged):
    data = ModelCard.load(staged / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("timm", "image-classification", "other")
    assert data.datasets == ["other"] and data.metrics == ["roc_auc", "f1", "brier_score"]
    results = read_json(staged / "results.json")["parts"]
    listed = {(r.dataset_split, r.metric_type): r.metric_value for r in data.eval_results}
    names = {"auc": "roc_auc", "f1": "f1", "brier": "brier_score"}
    assert listed == {
        (part, name): round(results[part]["patient_balanced"][metric], 4)
        for part in ("test", "test_normalised", "test_source")
        for metric, name in names.items()
    }


def test_every_section_is_there_and_numbers_are_the_records(staged):
    card = (staged / "README.md").read_text()
    sections = ["Use", "Scale", "Training data", "Protocol", "Results", "Signature"]
    sections += ["Scope", "Intended use and limits", "Compute", "Citation"]
    assert re.findall(r"^## (.*)", card, re.MULTILINE) == sections
    results = read_json(staged / "results.json")
    for part in results["parts"].values():
        for metric in ("auc", "f1", "brier", "expected_calibration_error"):
            assert f"| {part['patient_balanced'][metric]:.3f}" in card
    assert all(f"| {other} |" in card for other in ("erm", "constant", "colour"))
    assert "/ 1.5000).softmax(-1))  # benign, malignant" in card
    assert "not be used for diagnosis" in card and "200X was held out" in card
    assert "the same images, scale-normalised" in card and "dann - *not*" not in card
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", card):
        assert (staged / picture).read_bytes().startswith(b"\x89PNG")


def test_the_card_says_both_views_and_what_bare_timm_shows(staged):
    card, centre = (
        " ".join((staged / "README.md").read_text().split()),
        read_json(staged / "results.json")["centre_tile"],
    )
    assert "was 0.2 to 0.8 micrometres per pixel over the training images (`base_range`)" in card
    assert "shown 0.17 to 0.8 (`mpp_range`)" in card and "*protocol*" in card and "*normalised*" in card
    assert centre["timm"] != centre["package"]  # two tiles, of which timm shows the middle
    assert f"gives {centre['timm']:.3f} where the package gives {centre['package']:.3f}" in card


def test_what_a_record_says_stays_text(staged, tmp_path):
    """Neither HTML nor template code in a record gets into the card's own."""
    folder = shutil.copytree(staged, tmp_path / "model")
    results = read_json(folder / "results.json")
    results["record"]["cell"]["method"] = "<img src=x onerror=alert(1)>{{ 7 * 7 }}"
    results["comparison"]["<script>alert(2)</script>"] = results["comparison"].pop("erm")
    write_json(folder / "results.json", results)
    card = render_card(folder, "me/model")
    assert "<img" not in card and "<script" not in card and "{{ 7 * 7 }}" in card
    assert "&lt;script&gt;alert(2)" in card


def test_a_scanner_and_a_fold_that_was_not_fixed_beforehand(tmp_path):
    scanners = ("a", "Zürich <b>", "c")
    run = add_model(write_run(tmp_path, "erm", scanners[1], fold=2, domains=scanners), tmp_path)
    card = (stage(run.folder, "me/model", tmp_path / "staged") / "README.md").read_text()
    _, _, card = card.split("---\n", 2)  # what is shown, below the YAML
    assert "Zürich &lt;b&gt; was held out" in card and "<b>" not in card
    assert "Fold 2 of 4, seed 0 - *not* the ones fixed" in " ".join(card.split())


def test_a_split_that_was_read_from_a_file_has_no_number_of_folds(tmp_path):
    run = add_model(write_run(tmp_path, "erm", 200, split={"file_sha256": "0"}), tmp_path)
    card = (stage(run.folder, "me/model", tmp_path / "staged") / "README.md").read_text()
    assert "200X was held out altogether. Fold 0, seed 0, fixed beforehand." in " ".join(card.split())


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_published_cards_are_what_their_records_say(folder):
    """To renew them: `python benchmarks/train_virtual.py --cards-only`."""
    from magnification_invariant.models import HUB_NAMESPACE

    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card == render_card(folder, f"{HUB_NAMESPACE}/{folder.name}")
    packaged = ROOT / "magnification_invariant" / "weights" / folder.name
    for file in ("config.json", "results.json"):
        assert (folder / file).read_bytes() == (packaged / file).read_bytes()
    assert (packaged / "model.safetensors").is_file()


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_code_in_cards_and_readme_runs(run, breakhis_tree, tmp_path):
    """As a reader would run it, one block after the other; README's run is a smaller one here."""
    client = tmp_path / "client"
    run = shutil.copytree(run, client / "runs" / "dann-64px-lomo200-fold0-seed0")
    (client / "path" / "to").mkdir(parents=True)
    (client / "path" / "to" / "BreaKHis_v1").symlink_to(breakhis_tree / "BreaKHis_v1")
    for name in ("field.png", "image.png"):
        shutil.copy(run / "model" / "fixture.png", client / name)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (client / "readme.json").write_text(json.dumps(blocks(readme)))
    code = """
import re
import numpy as np
from magdg import main
from magnification_invariant.hub_files import resolve
from magnification_invariant.signatures import SignatureProjector, SparseSignature

# What the reader of the section on signatures has at hand: embeddings with a class, of patients.
patients = np.repeat([f"p{i}" for i in range(40)], 5)
y = np.repeat(np.arange(40) % 2, 5)
X = np.random.default_rng(0).normal(size=(200, 96)) + y[:, None] * (np.arange(96) < 5)
known = {"class_names": ["benign", "malignant"], "embedding": "penultimate", "source": "mine"}
run = "runs/dann-64px-lomo200-fold0-seed0"
signature = SparseSignature().fit(X, y, groups=patients)
SignatureProjector.from_signature(signature, **known).save_pretrained(run + "/model")

assert main(["push", run, "me/model"]) == 0
card = re.findall(r"^```python\\n(.*?)^```", resolve("me/model", "README.md").read_text(), re.M | re.S)
assert len(card) >= 3
space = {"X": X, "y": y, "patients": patients, "embeddings": X}
for block in [*card, *json.loads(Path("readme.json").read_text())]:
    print(block, flush=True)
    exec(block, space)
"""
    with HubServer() as hub:
        run_client(hub, client, code)
