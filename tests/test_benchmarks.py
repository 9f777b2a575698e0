"""Every script of `benchmarks/` and `examples/` imports names that exist, and says what it does."""

import ast
import runpy
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")])
OURS = ("magnification_invariant", "magdg")


def missing_names(source: str) -> list[str]:
    """What a script imports of ours, also inside functions, and does not exist."""
    missing = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
            names = [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names if alias.name.split(".")[0] in OURS]
        else:
            continue
        missing += [f"line {node.lineno}: {'.'.join(filter(None, name))}" for name in names if not exists(*name)]
    return missing


def exists(module: str, name: str | None) -> bool:
    try:
        found = import_module(module)
        if name is not None and not hasattr(found, name):
            import_module(f"{module}.{name}")  # a module of a package that nobody has imported yet
    except ModuleNotFoundError:
        return False
    return True


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_a_script_imports_exists(script):
    assert not missing_names(script.read_text(encoding="utf-8"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(str(script.parent))  # as Python does for a script: scripts import each other
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_a_missing_name_is_seen():
    source = "from magdg import main, nothing\ndef f():\n    import magnification_invariant.gone\n    from os import no"
    assert missing_names(source) == ["line 1: magdg.nothing", "line 3: magnification_invariant.gone"]


def test_precision_of_retrieval_counts_other_patients_of_the_class():
    precision = runpy.run_path(str(ROOT / "benchmarks" / "signature_table.py"))["precision"]
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((60, 8)).astype(np.float32)
    patient = rng.integers(9, size=60)
    label, query, gallery = patient % 2, rng.random(60) < 0.5, rng.random(60) < 0.7
    shares, weight = [], []
    for i in np.flatnonzero(query):
        others = [j for j in np.flatnonzero(gallery) if patient[j] != patient[i]]
        others.sort(key=lambda j: -float(vectors[i] @ vectors[j]))
        same = label[others] == label[i]
        shares.append([same.mean(), same[:5].mean(), same[:10].mean()])
        weight.append(1 / np.sum(patient[query] == patient[i]))
    expected = np.average(shares, axis=0, weights=weight)
    assert precision(vectors, {"label": label, "patient": patient}, query, gallery) == pytest.approx(expected)
