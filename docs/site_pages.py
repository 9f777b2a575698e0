"""What `mkdocs.yml` cannot say: pages that lie outside of docs/, and the reference of every public name.

Links between files are those of the repository, where they can be followed as well; here they are turned to the same
files' places in the site.
"""

import re
from importlib import import_module
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/results/*", "hub_cards/*/*.md", "hub_cards/*/*.png")
PACKAGE = "magnification_invariant"
# What has a list of public names, and modules that are public as they stand.
LISTED = ("", "data", "models", "tasks", "metrics", "signatures", "predict", "hub")
WHOLE = {
    "virtual_slides": ["dataset", "drawing", "optics", "tissue"],
    "engine": [""],
    "records": [""],
    "model_folder": [""],
    "lomo": ["cell", "run", "grid", "embedded"],
    "report": ["table", "runs", "contents", "evaluation", "signatures", "zoom"],
}


def public_names() -> dict[str, list[str]]:
    """By module, where each of its public names is defined, as `mkdocstrings` wants it."""
    pages = {}
    for room in LISTED:
        module = import_module(f"{PACKAGE}.{room}".rstrip("."))
        names = [name for name in module.__all__ if name != "__version__"]
        pages[module.__name__] = [place_of(getattr(module, name), name) for name in names]
    for room, parts in WHOLE.items():
        pages[f"{PACKAGE}.{room}"] = [f"{PACKAGE}.{room}.{part}".rstrip(".") for part in parts]
    return pages


def place_of(thing, name: str) -> str:
    """Dotted name of where a public function, class or constant is defined."""
    if getattr(thing, "__qualname__", None) and str(getattr(thing, "__module__", "")).startswith(PACKAGE):
        return f"{thing.__module__}.{thing.__qualname__}"
    for file in sorted((ROOT / PACKAGE).rglob("*.py")):
        if re.search(rf"^{name}\b[^=\n]* = ", file.read_text(encoding="utf-8"), re.MULTILINE):
            return f"{'.'.join(file.relative_to(ROOT).with_suffix('').parts)}.{name}"
    raise ValueError(f"nothing defines {name}")


def api_pages() -> dict[str, str]:
    """Markdown by the file's place: a page a module, and their contents."""
    pages, lines = {}, ["# Public names"]
    for module, names in public_names().items():
        about = (import_module(module).__doc__ or "").strip().splitlines()[0]
        lines.append(f"\n- [`{module}`]({module}.md): {about}")
        # One name has one place; the package itself gives what is defined in its rooms.
        blocks = [f"- [`{name.rpartition('.')[2]}`][{name}]" if module == PACKAGE else f"::: {name}" for name in names]
        pages[f"api/{module}.md"] = "\n\n".join([f"# `{module}`", about, *blocks]) + "\n"
    return {"api/index.md": "\n".join(lines) + "\n"} | pages


def on_files(files, config):
    """Adds the pages from outside of docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for name, content in api_pages().items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links of the repository to those of the site."""
    source = page.file.src_uri
    in_repository = source if any(Path(source).match(pattern) for pattern in OUTSIDE) else join("docs", source)

    def turned(link: re.Match) -> str:
        target, _, anchor = link[2].partition("#")
        if not target or re.match("[a-z]+:", target):
            return link[0]
        place = normpath(join(dirname(in_repository), target)).removeprefix("docs/")
        place = "index.md" if place == "README.md" else place
        return f"{link[1]}({relpath(place, dirname(source) or '.')}{'#' + anchor if anchor else ''})"

    if source.startswith("api/"):
        return markdown
    text = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else re.sub(r"(\])\(([^)\s]+)\)", turned, part) for part in text)
