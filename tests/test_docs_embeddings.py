"""The Python of docs/embeddings.md runs as it stands, and its commands are the commands' own."""

import re
from pathlib import Path

import pytest

from magnification_invariant.lomo.embedded import VECTOR_FIT
from magnification_invariant.models import VECTOR_MODELS

PAGE = (Path(__file__).parents[1] / "docs" / "embeddings.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:timm has no weights")
def test_your_foundation_model_in_ten_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/embeddings.md", "exec"), {})
    out = capsys.readouterr().out
    for method in ("constant", "l2", "erm", "dann"):
        assert f"| {method} " in out


def test_its_commands_parse():
    from magdg import embed, lomo

    (commands,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for command, line in zip((embed, lomo), commands.splitlines(), strict=False):
        parser = getattr(command, "Parser", __import__("argparse").ArgumentParser)()
        command.add_arguments(parser)
        parser.parse_args(line.partition("   #")[0].split()[2:])


def test_its_figures_are_the_defaults():
    assert all(name in PAGE for name in VECTOR_MODELS)
    assert VECTOR_FIT == {"epochs": 10, "batch_size": 256, "learning_rate": 0.003}
    assert "10 epochs, batches of 256, a\nlearning rate of 0.003" in PAGE
