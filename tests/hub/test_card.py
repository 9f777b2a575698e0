"""Cards: what they say follows from the records, the Hub can read them, and their code runs."""

import json
import re
import shutil
from pathlib import Path

import pytest
from hub_client import run_client
from hub_server import HubServer
from huggingface_hub import ModelCard

from magnification_invariant.hub import render_card, stage

ROOT = Path(__file__).parents[2]
CARDS = sorted(path.parent for path in (ROOT / "hub_cards").glob("*/README.md"))


@pytest.fixture(scope="module")
def staged(tiny_run, tmp_path_factory) -> Path:
    return stage(tiny_run, "me/model", tmp_path_factory.mktemp("card") / "staged")


def test_the_hub_reads_the_metadata(staged):
    data = ModelCard.load(staged / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("timm", "image-classification", "apache-2.0")
    assert data.datasets == ["other"] and data.metrics == ["roc_auc", "f1", "brier_score"]
    results = json.loads((staged / "results.json").read_text())["parts"]
    found = {(r.dataset_split, r.metric_type): r.metric_value for r in data.eval_results}
    names = {"auc": "roc_auc", "f1": "f1", "brier": "brier_score"}
    assert found == {
        (part, name): round(results[part]["patient_balanced"][metric], 4)
        for part in ("test", "test_source")
        for metric, name in names.items()
    }


def test_every_section_is_there_and_numbers_are_the_records(staged):
    card = (staged / "README.md").read_text()
    sections = re.findall(r"^## (.*)", card, re.MULTILINE)
    assert sections == [
        "Use",
        "Scale",
        "Training data",
        "Protocol",
        "Results",
        "Signature",
        "Intended use and limits",
        "Compute",
        "Citation",
    ]
    results = json.loads((staged / "results.json").read_text())
    for part in results["parts"].values():
        for metric in ("auc", "f1", "brier", "expected_calibration_error"):
            assert f"| {part['patient_balanced'][metric]:.3f}" in card
    assert all(f"| {other} |" in card for other in ("erm", "constant", "colour"))
    assert f"/ {results['temperature']:.4f}).softmax(-1))  # benign, malignant" in card
    assert "not be used for diagnosis" in card and "200X was held out" in card
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", card):
        assert (staged / picture).read_bytes().startswith(b"\x89PNG")


def test_what_a_record_says_stays_text(staged, tmp_path):
    """Neither HTML nor template code in a record gets into the card's own."""
    folder = shutil.copytree(staged, tmp_path / "model")
    results = json.loads((folder / "results.json").read_text())
    results["record"]["arguments"]["method"] = "<img src=x onerror=alert(1)>{{ 7 * 7 }}"
    results["comparison"]["<script>alert(2)</script>"] = results["comparison"].pop("erm")
    (folder / "results.json").write_text(json.dumps(results))
    card = render_card(folder, "me/model")
    assert "<img" not in card and "<script" not in card and "{{ 7 * 7 }}" in card
    assert "&lt;script&gt;alert(2)" in card


def test_another_fold_than_the_one_fixed_beforehand_says_so(staged, tmp_path):
    folder = shutil.copytree(staged, tmp_path / "model")
    results = json.loads((folder / "results.json").read_text())
    results["record"]["arguments"]["fold"] = 2
    (folder / "results.json").write_text(json.dumps(results))
    assert "Fold 2 of 4, seed 0 - *not* the ones fixed" in " ".join(render_card(folder, "me/model").split())


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
def test_the_code_in_cards_and_readme_runs(tiny_run, breakhis_tree, tmp_path):
    """As a reader would run it, one block after the other; README's run and its slides are smaller ones here."""
    client = tmp_path / "client"
    run = shutil.copytree(tiny_run, client / "runs" / "dann-lomo200-fold0-seed0")
    (client / "path" / "to").mkdir(parents=True)
    (client / "path" / "to" / "BreaKHis_v1").symlink_to(breakhis_tree / "BreaKHis_v1")
    for name in ("field.png", "image.png"):
        shutil.copy(run / "model" / "fixture.png", client / name)
    readme = (ROOT / "README.md").read_text().replace("load_virtual_slides(30,", "load_virtual_slides(6,")
    readme = readme.replace("n_patients=40", "n_patients=10, images_per_magnification=1, size=(70, 46)")
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
run = "runs/dann-lomo200-fold0-seed0"
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
