"""One report in two forms: a self-contained HTML page, and Markdown beside PNG files.

A report is a title and sections; a section is a heading and blocks: a text (a paragraph), a `Table` or a `Picture`.
All text is escaped, so that what a record, a card or a file name says stays text in the page.
"""

import base64
import html
import io
import math
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from string import Template

from magnification_invariant.files import locked, whole

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd }
p, figcaption { max-width: 46rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem }
th, td { padding: 0.25rem 0.6rem; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap }
figure { margin: 1.5rem 0 } img { max-width: 100% } figcaption { color: #555; font-size: 0.9rem }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


@dataclass(frozen=True)
class Table:
    """Text cells below a head of as many."""

    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG with what it shows in words.

    Attributes:
        name: of the file beside the Markdown, without suffix.
        caption: below the picture, and for those who cannot see it.
        png: the file's bytes.
    """

    name: str
    caption: str
    png: bytes

    @classmethod
    def drawn(cls, name: str, caption: str, draw: Callable, *arguments) -> "Picture":
        """Of a function that takes `arguments` and, last, a file to write the PNG to."""
        file = io.BytesIO()
        draw(*arguments, file)
        return cls(name, caption, file.getvalue())


Block = str | Table | Picture
Section = tuple[str, list[Block]]


def page(title: str, sections: Iterable[Section]) -> str:
    """The whole report as one HTML page that loads nothing and runs nothing."""
    parts = []
    for heading, blocks in sections:
        parts += [f"<h2>{html.escape(heading)}</h2>", *map(_html, blocks)]
    return _PAGE.substitute(title=html.escape(title), body="\n".join(parts))


def markdown(title: str, sections: Iterable[Section], pictures: str = ".") -> str:
    """The same as Markdown, with pictures from the folder `pictures`."""
    parts = [f"# {_text(title)}"]
    for heading, blocks in sections:
        parts += [f"## {_text(heading)}", *(_markdown(block, pictures) for block in blocks)]
    return "\n\n".join(parts) + "\n"


def write(
    folder: str | Path, name: str, title: str, sections: Iterable[Section], *, with_page: bool = True
) -> list[Path]:
    """Write ``name.md``, its pictures in the folder ``name`` and, on request, ``name.html``: all of them or none.

    Args:
        folder: To write to; made if needed.
        name: Of the report.
        title: Its first heading.
        sections: Read only here, so that whoever makes them as they are read has the place to himself meanwhile.
        with_page: Write the HTML.

    Returns:
        The files.

    Raises:
        Busy: Another process writes this report.
        CannotWrite: The disk is full or read-only.
        ValueError: The folder for the pictures, which is replaced, holds other files.
    """
    folder = Path(folder)
    if others := [path.name for path in (folder / name).glob("[!.]*") if path.suffix != ".png"]:
        raise ValueError(f"{folder / name} is no folder of a report's pictures, it holds {others[0]}: write elsewhere")
    with locked(folder / name), ExitStack() as renamed:  # the first of them last
        sections = list(sections)
        files = {folder / f"{name}.md": markdown(title, sections, name)}
        if with_page:
            files[folder / f"{name}.html"] = page(title, sections)
        for path, text in files.items():
            renamed.enter_context(whole(path)).write_text(text, encoding="utf-8")
        pictures = {f"{_stem(b.name)}.png": b.png for _, blocks in sections for b in blocks if isinstance(b, Picture)}
        if pictures:
            unfinished = renamed.enter_context(whole(folder / name))
            unfinished.mkdir()
            for file, png in pictures.items():
                (unfinished / file).write_bytes(png)
    return [*files, *(folder / name / file for file in pictures)]


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A table that also reads well as plain text; its cells are taken as they are."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    top = "| " + " | ".join(cell.ljust(w) for cell, w in zip(head, widths, strict=True)) + " |"
    return "\n".join([top, "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines])


def _html(block: Block) -> str:
    if isinstance(block, Picture):
        caption, data = html.escape(block.caption), base64.b64encode(block.png).decode()
        return (
            f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption>'
            "</figure>"
        )
    if isinstance(block, Table):
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.head)
        rows = "\n".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in block.rows)
        return f'<div class="wide"><table>\n<tr>{head}</tr>\n{rows}\n</table></div>'
    return f"<p>{html.escape(block)}</p>"


def _markdown(block: Block, pictures: str) -> str:
    if isinstance(block, Picture):
        caption = re.sub(r"([\[\]])", r"\\\1", _text(block.caption))
        return f"![{caption}]({pictures}/{_stem(block.name)}.png)"
    if isinstance(block, Table):
        head, *rows = [[_text(cell).replace("|", "\\|") for cell in row] for row in (block.head, *block.rows)]
        return markdown_table(head, rows)
    return _text(block)


def _text(text: str) -> str:
    return html.escape(" ".join(text.split()), quote=False).replace("&gt;", ">")


def _stem(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def number(value: float | None, digits: int = 3) -> str:
    """A cell of a table: the value, or a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def interval(low: float, high: float, digits: str = ".3f") -> str:
    """``[low, high]``, or nothing where there is none."""
    return "" if math.isnan(low) else f"[{low:{digits}}, {high:{digits}}]"
