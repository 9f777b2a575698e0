"""The same report as a page and as Markdown; what records say cannot become part of either's code."""

import base64
import re
from html.parser import HTMLParser

from magnification_invariant.report.page import Picture, Table, markdown, page, write

EVIL = "<script>alert(1)</script>\"'&|](x)"


def tags(text):
    found = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, dict(attrs)))

    Parser().feed(text)
    return found


def test_text_of_records_stays_text():
    sections = [(EVIL, [EVIL, Table([EVIL, "b"], [[EVIL, "2"]]), Picture(EVIL, EVIL, b"png")])]
    text = page(EVIL, sections)
    names = [tag for tag, _ in tags(text)]
    assert "script" not in names and names.count("img") == 1 and names.count("td") == 2
    (image,) = (attributes for tag, attributes in tags(text) if tag == "img")
    assert image["alt"] == EVIL and set(image) == {"alt", "src"}
    assert "<script" not in markdown(EVIL, sections)


def test_page_loads_nothing_from_elsewhere():
    text = page("t", [("h", [Picture("p", "c", b"\x89PNG")])])
    (source,) = re.findall(r'src="([^"]*)"', text)
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == b"\x89PNG"
    assert "href" not in text and "default-src 'none'" in text


def test_markdown_and_its_pictures(tmp_path):
    sections = [("Figures", ["A < b.", Table(["x", "y"], [["1", "a|b"]]), Picture("../roc", "curve", b"png")])]
    files = write(tmp_path, "report", "Title", sections)
    assert sorted(str(f.relative_to(tmp_path)) for f in files) == ["report.html", "report.md", "report/.._roc.png"]
    text = (tmp_path / "report.md").read_text()
    assert "A &lt; b." in text and r"a\|b" in text
    (target,) = re.findall(r"!\[curve\]\((.*)\)", text)
    assert (tmp_path / target).read_bytes() == b"png"


def test_a_picture_is_drawn_into_memory():
    picture = Picture.drawn("n", "c", lambda a, b, file: file.write(a + b), b"1", b"2")
    assert picture.png == b"12"
