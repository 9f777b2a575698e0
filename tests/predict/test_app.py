"""The page: what it answers, what it says of bad input, and, in a headless Chromium, that people can use it."""

import builtins
import shutil
from functools import partial

import numpy as np
import pytest
from PIL import Image

from magdg import main
from magnification_invariant.files import read_json, write_json
from magnification_invariant.predict import Classifier, app
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


@pytest.fixture(scope="module")
def answer(classifier):
    return partial(app._answer, classifier, None)


def test_the_answer_is_the_classifiers(answer, classifier, files):
    shown, note, map_figure, charts, similar = answer(str(files / "tissue.png"), "0.3", None)
    (row,) = classifier.predict(files / "tissue.png", 0.3)
    assert shown == {"malignant": row["probability"], "benign": pytest.approx(1 - row["probability"])}
    assert f"{row['mpp']:.3g} um/px" in note and "not recorded" in note and similar == []
    curve, bars = charts.axes
    assert curve.lines[0].get_ydata()[-1] == pytest.approx(row["probability"], abs=1e-4)
    assert [bar.get_height() for bar in bars.patches] == pytest.approx(row["signature"])
    assert len(map_figure.axes) == 2


def test_the_scale_comes_from_the_page_or_from_the_file(answer, files):
    by_file = answer(str(files / "scaled.tif"), "", None)
    assert (
        by_file[0]
        == answer(str(files / "scaled.tif"), "0.3", None)[0]
        != answer(str(files / "scaled.tif"), "0.1", None)[0]
    )
    by_name = answer(str(files / "tissue.png"), "", "scanner, objective 20x")
    assert by_name[0] == answer(str(files / "tissue.png"), "0.5", None)[0]
    assert "**Careful:** 2 um/px is coarser" in answer(str(files / "tissue.png"), "2", None)[1]


@pytest.mark.parametrize("name", ["grey16.png", "cmyk.jpg", "alpha.png", "animated.webp"])
def test_unusual_images_are_answered(answer, files, name):
    shown, note, *_ = answer(str(files / name), "0.3", None)
    assert set(shown) == {"malignant", "benign"} and ("frames" in note) == (name == "animated.webp")


@pytest.mark.parametrize(
    ("name", "mpp", "message"),
    [
        (None, 0.3, "Choose an image"),
        ("tissue.png", None, "scale is not known"),
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
    with pytest.raises(gr.Error) as raised:
        answer(name and str(files / name), "" if mpp is None else str(mpp), None)
    assert message in raised.value.message and "/" not in raised.value.message.replace("um/px", "")


def test_the_most_similar_cases(classifier, breakhis_tree, tmp_path):
    from magnification_invariant.data import load_breakhis
    from magnification_invariant.predict.search import SignatureIndex, build_index

    ds = load_breakhis(breakhis_tree)
    build_index(classifier, ds, tmp_path)
    image = ds[0]["image"].filename
    similar = app._answer(classifier, SignatureIndex.load(tmp_path), image, "0.7", None)[-1]
    assert len(similar) == 5 and all(isinstance(picture, Image.Image) for picture, _ in similar)


def test_a_model_that_knows_no_scale_answers_at_the_first_click(classifier, tiny_model, files, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {k: v for k, v in config.items() if k not in ("base_range", "mpp_range")})
    page = app.build(folder)
    (predict,) = [fn for fn in page.fns.values() if fn.api_name == "predict"]
    shown, note, map_figure, charts, _ = predict.fn(str(files / "tissue.png"), "", None)
    protocol = classifier.predict(files / "tissue.png", 0.3, view="protocol")[0]["probability"]
    assert shown["malignant"] == pytest.approx(protocol) and "scale is not known" in note
    assert len(map_figure.axes) == 2 and "knows no scale" in charts.axes[0].get_title()
    assert "0.45 um/px" in predict.fn(str(files / "tissue.png"), "0.12", None)[1]  # its field, where that is known


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


@pytest.fixture(scope="module")
def url(tiny_model):
    page = app.build(tiny_model)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **app.LAUNCH)
    yield url
    page.close()


@pytest.fixture
def new_user(url, monkeypatch):
    webdriver = pytest.importorskip("selenium.webdriver")
    found = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in found:
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    monkeypatch.setenv("SE_OFFLINE", "true")
    browsers = []

    def start():
        options = webdriver.ChromeOptions()
        options.binary_location = found[0]
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1900"):
            options.add_argument(argument)
        browser = webdriver.Chrome(options, webdriver.ChromeService(found[1]))
        browsers.append(browser)
        browser.set_page_load_timeout(WAIT)
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

    def until(self, condition):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, WAIT).until(lambda _: condition())

    def open(self):
        self.browser.get(self.url)
        self.until(lambda: self.find("#image input[type=file]") and self.find("#predict"))

    def upload(self, path):
        self.find("#image input[type=file]")[0].send_keys(str(path))

    def predict(self, path, mpp=None):
        self.upload(path)
        self.until(lambda: path.stem in self.find("#image")[0].text)
        if mpp is not None:
            (number,) = self.find("#mpp input, #mpp textarea")
            number.clear()
            number.send_keys(str(mpp))
        self.find("#predict")[0].click()

    def answer(self):
        self.until(lambda: "%" in self.find("#answer")[0].text and self.find("#charts img, #charts canvas"))
        return self.find("#answer")[0].text

    def toast(self):
        return self.until(lambda: " ".join(each.text for each in self.find(".toast-body")).strip())


def percent(classifier, path, mpp):
    (row,) = classifier.predict(path, mpp)
    return row["prediction"], f"{max(row['probability'], 1 - row['probability']):.0%}"


@pytest.mark.slow
def test_in_a_browser(new_user, classifier, files, tmp_path):
    user = new_user()
    user.browser.save_screenshot(str(tmp_path / "empty.png"))
    user.predict(files / "tissue.png", 0.3)
    label, share = percent(classifier, files / "tissue.png", 0.3)
    text = user.answer()
    assert label in text and share in text
    assert "research model, not a medical device" in user.find("body")[0].text
    user.browser.save_screenshot(str(tmp_path / "answer.png"))

    for name, mpp, message in (
        ("tissue.png", None, "scale is not known"),
        ("tissue.png", 40, "if you mean a magnification of 40"),
        ("huge.png", 0.3, "100 megapixels; this page takes 25"),
        ("text.png", 0.3, "cannot identify"),
    ):
        user.open()
        user.predict(files / name, mpp)
        assert message in user.toast()
    user.browser.save_screenshot(str(tmp_path / "error.png"))
    user.open()
    user.upload(files / "notes.txt")
    assert "file type" in user.toast()


@pytest.mark.slow
def test_two_users_at_once(new_user, classifier, files):
    users = [new_user(), new_user()]
    names = ("tissue.png", "other.png")
    for user, name in zip(users, names, strict=True):
        user.predict(files / name, 0.3)
    for user, name in zip(users, names, strict=True):
        label, share = percent(classifier, files / name, 0.3)
        text = user.answer()
        assert label in text and share in text
