"""The same report as a page and as Markdown; what records say cannot become part of either's code."""

import base64
import multiprocessing
import random
import re
from html.parser import HTMLParser

import pytest

from magnification_invariant.files import locked
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


def edition(number, lines=200):
    """Sections whose files are large enough for a kill to fall into their writing."""
    rows = [[str(number), str(line)] for line in range(lines)]
    picture = Picture("p", "c", bytes([number]) * 10**6)
    return [("Runs", [f"edition {number}", Table(["edition", "row"], rows), picture])]


def write_for_ever(folder):
    number = 0
    while True:
        number = number % 200 + 1
        write(folder, "report", "Title", edition(number))


@pytest.mark.slow
def test_a_writer_killed_at_random_moments_leaves_whole_files(tmp_path):
    """Each file is of one edition, and who comes next is not kept out."""
    rng, context = random.Random(0), multiprocessing.get_context("fork")
    write(tmp_path, "report", "Title", edition(0))
    for _ in range(30):
        process = context.Process(target=write_for_ever, args=(tmp_path,))
        process.start()
        process.join(rng.uniform(0.01, 0.15))
        process.kill()
        process.join()
        with locked(tmp_path / "report"):
            pass
        text = (tmp_path / "report.md").read_text()
        (number,) = {int(found) for found in re.findall(r"edition (\d+)", text)}
        assert text == markdown("Title", edition(number), "report")
        html = (tmp_path / "report.html").read_text()
        assert html.rstrip().endswith("</html>") and len(set(re.findall(r"edition (\d+)", html))) == 1
        png = (tmp_path / "report" / "p.png").read_bytes()
        assert len(png) == 10**6 and len(set(png)) == 1
    files = write(tmp_path, "report", "Title", edition(7))
    assert [path.read_bytes() for path in files[:1]] == [markdown("Title", edition(7), "report").encode()]
    left = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*files, tmp_path / ".report.lock"}
