"""The page: what it answers, what it says of bad input, and, in a headless Chromium, that people can use it."""

import base64
import builtins
import csv
import io
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from magdg import main
from magnification_invariant.data import load_breakhis, load_virtual_slides
from magnification_invariant.files import read_json, write_json
from magnification_invariant.predict import Classifier, app
from magnification_invariant.predict.search import SignatureIndex, build_index
from magnification_invariant.predict.tables import SCHEMA
from magnification_invariant.virtual_slides import render_field, virtual_field

gr = pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def classifier(tiny_model):
    return Classifier.from_pretrained(tiny_model, device="cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uploads")
    tissue = [Image.fromarray(render_field(p, 0.3, virtual_field(p, 100, 0), (320, 240))) for p in (0, 1)]
    tissue[0].save(folder / "tissue.png")
    tissue[1].save(folder / "other.png")
    tissue[0].save(folder / "scaled.tif", resolution=1e4 / 0.3, resolution_unit=3)
    Image.fromarray(np.asarray(tissue[0].convert("L")).astype(np.uint16) * 257).save(folder / "grey16.png")
    tissue[0].convert("CMYK").save(folder / "cmyk.jpg")
    tissue[0].convert("RGBA").save(folder / "alpha.png")
    tissue[0].save(folder / "animated.webp", save_all=True, append_images=[tissue[1]])
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    Image.new("L", (10_000, 10_000)).save(folder / "huge.png")
    (folder / "text.png").write_text("not an image")
    (folder / "notes.txt").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "truncated.png").write_bytes((folder / "tissue.png").read_bytes()[:20_000])
    return folder


class Answer:
    """What the page shows of images, by name."""

    def __init__(self, classifier, paths, mpp="", known=None, cases=None):
        paths = [str(path) for path in paths] if isinstance(paths, list) else paths and [str(paths)]
        values = app._answer(classifier, cases, paths, mpp, known)
        self.shown, self.note, self.figure, self.similar, self.table, self.download, self.rows = values


@pytest.fixture(scope="module")
def answer(classifier):
    return partial(Answer, classifier)


def test_the_answer_is_the_classifiers(answer, classifier, files):
    given = answer(files / "tissue.png", "0.3")
    (row,) = classifier.predict(files / "tissue.png", 0.3)
    assert given.shown == {"malignant": row["probability"], "benign": pytest.approx(1 - row["probability"])}
    assert f"{row['mpp']:.3g} um/px" in given.note and "not recorded" in given.note and given.similar == []
    view, heat, curve, bars = given.figure.axes
    np.testing.assert_array_equal(
        view.images[0].get_array(), classifier.view_of(Image.open(files / "tissue.png"), 0.3)[0].pixels
    )
    assert len(heat.images) == 2  # the grey tissue, and the map over it
    assert curve.lines[0].get_ydata()[-1] == pytest.approx(row["probability"], abs=1e-4)
    assert [bar.get_height() for bar in bars.patches] == pytest.approx(row["signature"])
    assert not given.table.visible and not given.download.visible


def test_the_scale_comes_from_the_page_or_from_the_file(answer, files):
    by_file = answer(files / "scaled.tif").shown
    assert by_file == answer(files / "scaled.tif", "0.3").shown != answer(files / "scaled.tif", "0.1").shown
    by_name = answer(files / "tissue.png", "", "scanner, objective 20x").shown
    assert by_name == answer(files / "tissue.png", "0.5").shown
    assert "**Careful:** 2 um/px is coarser" in answer(files / "tissue.png", "2").note


def test_scope_is_said(files):
    packaged = Classifier.from_pretrained(app.DEFAULT_MODEL, device="cpu")
    noise = files / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)).save(noise)
    (row,) = packaged.predict(files / "tissue.png", 0.3)
    said = f"**Scope:** in, stranger than {row['scope_percentile']:.0f} % of known images."
    assert row["in_scope"] and said in Answer(packaged, files / "tissue.png", "0.3").note
    note = Answer(packaged, noise, "0.3").note
    assert "**Scope:** OUT, stranger than 100 %" in note and "it is out of the model's scope" in note


@pytest.mark.parametrize("name", ["grey16.png", "cmyk.jpg", "alpha.png", "animated.webp"])
def test_unusual_images_are_answered(answer, files, name):
    given = answer(files / name, "0.3")
    assert set(given.shown) == {"malignant", "benign"} and ("frames" in given.note) == (name == "animated.webp")


@pytest.mark.parametrize(
    ("name", "mpp", "message"),
    [
        (None, 0.3, "Choose an image"),
        ("tissue.png", None, "scale is not known: the file does not state it; say its micrometres per pixel (mpp)"),
        ("tissue.png", "a lot", "a number like 0.25, not 'a lot'"),
        ("tissue.png", 0, "positive finite number"),
        ("tissue.png", -1, "positive finite number"),
        ("tissue.png", float("nan"), "positive finite number"),
        ("tissue.png", 40, "if you mean a magnification of 40"),
        ("text.png", 0.3, "cannot identify"),
        ("empty.png", 0.3, "cannot identify"),
        ("truncated.png", 0.3, "truncated"),
        ("pixel.png", 0.3, "the field is too small"),
        ("huge.png", 0.3, "100 megapixels; this page takes 25"),
    ],
)
def test_bad_input_is_said_in_plain_words(answer, files, name, mpp, message):
    given = answer(name and files / name, "" if mpp is None else str(mpp))
    assert message in given.note and "/" not in given.note.replace("um/px", "")
    assert given.shown is None and given.figure is None and given.similar == []


def test_several_images_make_a_table_to_download(answer, classifier, files, tmp_path):
    names = ["other.png", "text.png", "tissue.png"]
    given = answer([files / name for name in names], "0.3")
    good = {row["filename"]: row for row in classifier.predict([files / names[0], files / names[2]], 0.3)}
    good = {name: good[str(files / name)] for name in (names[0], names[2])}
    assert given.shown["malignant"] == good["other.png"]["probability"]  # the first one's
    assert given.table.visible and given.download.visible
    shown = given.table.value["data"]
    assert [row[0] for row in shown] == names and shown[2][1] == f"{good['tissue.png']['probability']:.3g}"
    assert shown[1][1] == "" and shown[1][5].startswith("not predicted: cannot identify")
    (content,) = re.findall('href="data:text/csv;base64,([^"]*)"', given.download.value)
    lines = list(csv.DictReader(io.StringIO(base64.b64decode(content).decode())))
    assert [line["filename"] for line in lines] == names and list(lines[0]) == SCHEMA.names
    assert float(lines[2]["probability"]) == good["tissue.png"]["probability"]
    assert "cannot identify" in lines[1]["error"] and lines[1]["probability"] == ""
    again = app._shown(classifier, None, given.rows[2])  # a click on its row
    assert again[0]["malignant"] == good["tissue.png"]["probability"] and "**tissue.png**" in again[1]


def test_the_most_similar_cases(classifier, answer, breakhis_tree, tmp_path):
    ds = load_breakhis(breakhis_tree)
    build_index(classifier, ds, tmp_path)
    similar = answer(ds[0]["image"].filename, "0.7", cases=SignatureIndex.load(tmp_path)).similar
    assert len(similar) == 5 and all(isinstance(picture, Image.Image) for picture, _ in similar)


def test_a_model_that_knows_no_scale_answers_at_the_first_click(classifier, tiny_model, files, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {k: v for k, v in config.items() if k not in ("base_range", "mpp_range")})
    page = app.build(folder)
    (predict,) = [fn for fn in page.fns.values() if fn.api_name == "predict"]
    shown, note, figure, *_ = predict.fn([str(files / "tissue.png")], "", None)
    protocol = classifier.predict(files / "tissue.png", 0.3, view="protocol")[0]["probability"]
    assert shown["malignant"] == pytest.approx(protocol) and "scale is not known" in note
    assert "knows no scale" in figure.axes[2].get_title()
    assert "0.45 um/px" in predict.fn([str(files / "tissue.png")], "0.12", None)[1]  # its field, where that is known


def test_a_model_that_is_not_there():
    with pytest.raises(OSError, match="neither a folder nor a Hub repository"):
        app.build("nobody/nothing")


def test_what_to_install_is_said(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(builtins, "__import__", partial(_without, builtins.__import__, "gradio"))
    assert main(["app", str(tiny_model)]) == 2
    assert "pip install 'magnification-invariant[app]'" in capsys.readouterr().err


def _without(original, missing, name, *args, **kwargs):
    if name == missing:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return original(name, *args, **kwargs)


# ------------------------------------------------------------------------------------------------------ in a browser

WAIT = 240  # seconds
SCREEN = (1300, 900)


@pytest.fixture(scope="module")
def url(tiny_model):
    yield from served(app.build(tiny_model))


def served(page):
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **app.LAUNCH)
    yield url
    page.close()


@pytest.fixture
def new_user(monkeypatch, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    monkeypatch.setenv("SE_OFFLINE", "true")
    browsers = []

    def start(url):
        options = webdriver.ChromeOptions()
        options.binary_location = paths[0]
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
        browser = webdriver.Chrome(options, webdriver.ChromeService(paths[1]))
        browsers.append(browser)
        browser.set_page_load_timeout(WAIT)
        screen = {"width": SCREEN[0], "height": SCREEN[1], "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        return User(browser, url)

    yield start
    for browser in browsers:
        browser.quit()


class User:
    """Somebody with a browser."""

    def __init__(self, browser, url):
        self.browser, self.url = browser, url
        self.open()

    def find(self, selector):
        from selenium.webdriver.common.by import By

        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return " ".join(each.text for each in self.find(selector))

    def until(self, condition):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, WAIT).until(lambda _: condition())

    def open(self):
        self.browser.get(self.url)
        self.until(
            lambda: self.find("#image input[type=file]") and self.find("#predict") and self.find("#examples img")
        )

    def upload(self, *paths):
        self.find("#image input[type=file]")[0].send_keys("\n".join(map(str, paths)))

    def predict(self, *paths, mpp=None):
        self.upload(*paths)
        self.until(lambda: len(self.find("#image .download")) == len(paths))
        if mpp is not None:
            (number,) = self.find("#mpp input, #mpp textarea")
            number.clear()
            number.send_keys(str(mpp))
        self.find("#predict")[0].click()

    def answer(self, name):
        """Waits for what is said of an image, and gives its probabilities."""
        self.until(lambda: name in self.text("#note strong") and self.find("#picture img"))
        return self.text("#answer")

    def bottom(self, selector):
        """How far down the page an element goes, pixels."""
        return max(each.rect["y"] + each.rect["height"] for each in self.find(selector))


def percent(classifier, path, mpp=None):
    (row,) = classifier.predict(path, mpp)
    return row["prediction"], f"{max(row['probability'], 1 - row['probability']):.0%}"


@pytest.mark.slow
def test_in_a_browser(new_user, url, classifier, files):
    user = new_user(url)
    user.predict(files / "tissue.png", mpp=0.3)
    text = user.answer("tissue.png")
    assert all(part in text for part in percent(classifier, files / "tissue.png", 0.3))
    assert "research model, not a medical device" in user.text("body")
    for name, mpp, message in (
        ("tissue.png", None, "tissue.png was not predicted: its scale is not known"),
        ("tissue.png", 40, "if you mean a magnification of 40"),
        ("huge.png", 0.3, "100 megapixels; this page takes 25"),
        ("text.png", 0.3, "cannot identify"),
    ):
        user.open()
        user.predict(files / name, mpp=mpp)
        user.until(lambda message=message: message in user.text("#note"))
        assert "%" not in user.text("#answer") and not user.find(".toast-body")
    user.open()
    user.upload(files / "notes.txt")
    user.until(lambda: "file type" in user.text(".toast-body"))


@pytest.mark.slow
def test_several_images_in_a_browser(new_user, url, classifier, files, tmp_path):
    user = new_user(url)
    user.predict(files / "other.png", files / "text.png", files / "tissue.png", mpp=0.3)
    assert all(part in user.answer("other.png") for part in percent(classifier, files / "other.png", 0.3))
    user.find("#download a")[0].click()
    downloaded = tmp_path / "downloads/predictions.csv"
    user.until(downloaded.is_file)
    rows = {row["filename"]: row for row in csv.DictReader(downloaded.open(newline=""))}
    (alone,) = classifier.predict(files / "tissue.png", 0.3)
    assert float(rows["tissue.png"]["probability"]) == pytest.approx(alone["probability"])
    assert "cannot identify" in rows["text.png"]["error"]
    (cell,) = [cell for cell in user.find("#table [role=gridcell]") if cell.text == "tissue.png"]
    cell.click()
    assert all(part in user.answer("tissue.png") for part in percent(classifier, files / "tissue.png", 0.3))


@pytest.mark.slow
def test_two_users_at_once(new_user, url, classifier, files):
    users = [new_user(url), new_user(url)]
    names = ("tissue.png", "other.png")
    for user, name in zip(users, names, strict=True):
        user.predict(files / name, mpp=0.3)
    for user, name in zip(users, names, strict=True):
        text = user.answer(name)
        assert all(part in text for part in percent(classifier, files / name, 0.3))


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    """The page as `magdg app --index` serves it: the packaged model, and cases to find."""
    folder = tmp_path_factory.mktemp("cases")
    model = Classifier.from_pretrained(app.DEFAULT_MODEL, device="cpu")
    slides = load_virtual_slides(6, images_per_magnification=1, size=(175, 115), write_to=folder / "slides")
    build_index(model, slides, folder / "index")
    for url in served(app.build(index=folder / "index")):
        yield model, url


@pytest.mark.slow
def test_the_packaged_model_fits_one_screen(new_user, packaged):
    user = new_user(packaged[1])
    thumbnails = user.find("#examples img")
    assert len(thumbnails) == 2 and all(each.size["height"] > 50 for each in thumbnails)
    thumbnails[1].click()  # is answered at once, at the scale that its file states
    assert "malignant" in user.answer("virtual malignant.tif")
    user.until(lambda: len(user.find("#similar img")) == 5)
    assert "Scope: in" in user.text("#note")
    for part in ("#answer", "#note", "#picture", "#similar", "#examples", "#predict"):
        assert 0 < user.bottom(part) <= SCREEN[1], part


@pytest.mark.slow
def test_the_packaged_model_answers_a_real_image(new_user, packaged):
    model, url = packaged
    real = sorted((Path(__file__).parents[3] / "shared" / "breakhis-real").rglob("*-100-*.png"))
    if not real:
        pytest.skip("no real image here")
    user = new_user(url)
    user.predict(real[0])
    user.until(lambda: "scale is not known" in user.text("#note"))
    user.open()
    user.predict(real[0], mpp=0.197)
    assert all(part in user.answer(real[0].name) for part in percent(model, real[0], 0.197))
