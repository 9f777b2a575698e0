"""The code of README and docs/ runs, their commands are the commands' own, and their links lead somewhere."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

import magdg

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
RECORDS = [ROOT / "CHANGELOG.md", *sorted((ROOT / "benchmarks" / "results").glob("*.md"))]
# Run elsewhere: README's by hub/test_card.py, the next by test_docs_embeddings.py; hub.md is what a script printed.
ELSEWHERE = {"README.md", "embeddings.md", "hub.md"}
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8") and page.name not in ELSEWHERE]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def folder(tmp_path, monkeypatch, breakhis_tree) -> Path:
    """Where the reader of a page is: BreaKHis lies in path/to, files that the page writes can be imported."""
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "BreaKHis_v1").symlink_to(breakhis_tree / "BreaKHis_v1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


def write_files(page: Path, folder: Path) -> None:
    """The page's own modules: blocks that begin with ``# NAME.py``."""
    for code in blocks(page, "python"):
        if name := re.match(r"# (\w+\.py)\n", code):
            (folder / name[1]).write_text(code, encoding="utf-8")


@pytest.mark.filterwarnings("ignore:timm has no weights", "ignore:.*allow no interval")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_runs(page, folder):
    write_files(page, folder)
    space = {"__name__": "page"}
    for code in blocks(page, "python"):
        # Tables of 30 patients are for readers; 6 say here whether it runs.
        exec(compile(code.replace("load_virtual_slides(30,", "load_virtual_slides(6,"), str(page), "exec"), space)


def command_lines(page: Path) -> list[list[str]]:
    """Words of every command in the page's bash blocks, without comments."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def parse_magdg(words: list[str]) -> None:
    command = importlib.import_module(f"magdg.{words[0]}")
    parser = getattr(command, "Parser", ArgumentParser)(prog=f"magdg {words[0]}")
    command.add_arguments(parser)
    parser.parse_args(words[1:])


@pytest.mark.parametrize("page", [page for page in PAGES if "```bash" in page.read_text(encoding="utf-8")], ids=name_of)
def test_commands_parse(page, folder):
    """`magdg` by the real parsers, `make` by its targets; of others the script is there."""
    write_files(page, folder)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for words in command_lines(page):
        if "magdg" in words:
            assert words[words.index("magdg") + 1] in magdg.COMMANDS
            parse_magdg(words[words.index("magdg") + 1 :])
        elif words[0] == "make":
            assert words[1] in targets, words
        elif scripts := [word for word in words if word.endswith(".py")]:
            assert (ROOT / scripts[0]).is_file(), words
        else:
            assert words[:2] == ["hf", "auth"], words


def anchor(heading: str) -> str:
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower()))


@pytest.mark.parametrize("page", PAGES + RECORDS, ids=name_of)
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        place, _, part = target.partition("#")
        if re.match("[a-z]+:", target) or "api/" in place:  # the reference is made with the site
            continue
        file = page.parent / place if place else page
        assert file.exists(), f"{page.name} links to {target}"
        if part:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert part in map(anchor, headings), f"{page.name} links to {target}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("mkdocs", path=Path(sys.executable).parent), reason="needs the extra [docs]")
def test_the_site_builds(tmp_path):
    """Every page, link and public name; a warning is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api" / "magnification_invariant.metrics" / "index.html").read_text(encoding="utf-8")
    assert "cluster_interval" in page and "holm" in page
