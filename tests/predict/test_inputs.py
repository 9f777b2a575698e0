"""What people hold in their hands, and the folders that they search through: predicted, or said in one sentence."""

import io
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from magnification_invariant.data.images import to_rgb
from magnification_invariant.predict import Classifier, Item, find_images, items_of
from magnification_invariant.predict.inputs import open_item, pillow_warnings, scale_of

PIXELS = np.random.default_rng(0).integers(1, 256, (80, 100, 3), dtype=np.uint8)


def shown(images) -> list[np.ndarray]:
    return [np.asarray(to_rgb(open_item(item.image))) for item in items_of(images)]


def content(kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "a.png").write_bytes(content())
    return tmp_path / "a.png"


HELD = {
    "path": lambda path: path,
    "text": str,
    "folder": lambda path: path.parent,
    "pattern": lambda path: f"{path.parent}/*.png",
    "bytes": lambda path: path.read_bytes(),
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "BytesIO, read to its end": lambda path: (lambda file: file.read() and file)(io.BytesIO(path.read_bytes())),
    "open file": lambda path: path.open("rb"),
    "PIL image": Image.open,
    "array": lambda path: PIXELS,
    "array, colours first": lambda path: PIXELS.transpose(2, 0, 1),
    "array of 16 bits": lambda path: PIXELS.astype(np.uint16) * 257,
    "tensor": lambda path: torch.from_numpy(PIXELS),
    "tensor, colours first": lambda path: torch.from_numpy(PIXELS).permute(2, 0, 1),
    "batch": lambda path: torch.from_numpy(PIXELS)[None],
    "list": lambda path: [io.BytesIO(path.read_bytes())],
    "generator": lambda path: (each for each in [path]),
    "Dataset": lambda path: datasets.Dataset.from_dict({"image": [str(path)]}).cast_column("image", datasets.Image()),
}


@pytest.mark.parametrize("kind", HELD)
def test_whatever_holds_an_image(path, kind):
    (pixels,) = shown(HELD[kind](path))
    assert np.array_equal(pixels, PIXELS)


@pytest.mark.parametrize(
    "wrong",
    [None, 5, ["a", None], object(), [torch.zeros(3, 9, 9)], {"image": 1}, io.StringIO("text"), np.str_, [[PIXELS]]],
    ids=lambda wrong: type(wrong).__name__,  # a repr has addresses, which differ from process to process
)
def test_what_is_no_image_is_said_in_one_sentence(path, wrong):
    wrong = [path, *wrong[1:]] if isinstance(wrong, list) and wrong[0] == "a" else wrong
    with pytest.raises((ValueError, FileNotFoundError), match=r"what is taken is a path, a folder|no file, no pattern"):
        items_of(wrong)


def test_arrays_that_are_no_pictures():
    for array in (np.zeros((0, 0, 3), np.uint8), np.zeros((0, 5), np.uint8)):
        with pytest.raises(ValueError, match="no pixels"):
            shown(array)
    for array in (np.zeros((64, 64, 3)), np.zeros((5, 64, 64), np.uint8), np.zeros(5, np.uint8)):
        with pytest.raises(ValueError, match=r"must be \(height, width"):
            shown(array)


def test_the_same_picture_has_the_same_scale_by_every_way_in(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(content("TIFF", resolution=40_000, resolution_unit=3))  # 0.25 um/px
    decoded = Image.open(io.BytesIO(path.read_bytes()))
    decoded.load()
    embedded = datasets.Dataset.from_dict({"image": [{"path": None, "bytes": path.read_bytes()}]})
    table = datasets.Dataset.from_dict({"image": [str(path)]}).cast_column("image", datasets.Image())
    embedded = embedded.cast_column("image", datasets.Image())
    ways = [path, path.read_bytes(), io.BytesIO(path.read_bytes()), Image.open(path), decoded, table, embedded]
    ways += [table[0]["image"], embedded[0]["image"]]
    for images in ways:
        (item,) = items_of(images)
        assert scale_of(item.image).mpp == pytest.approx(0.25)
        assert np.array_equal(np.asarray(to_rgb(open_item(item.image))), PIXELS)
    assert scale_of(Image.open(path).resize((10, 10))).mpp is None  # of other pixels nothing is known
    assert scale_of(PIXELS).mpp is None


def test_odd_names_and_things_do_not_stop_the_others(tiny_model, path, tmp_path):
    folder = path.parent
    shutil.copy(path, os.fsencode(folder) + b"/f\xe4rbung.png")
    (folder / "._a.png").write_bytes(b"of macOS")
    os.mkfifo(folder / "pipe.png")
    with pytest.warns(UserWarning, match=r"1 of 3 images below .* are left out, .*pipe\.png"):
        found = find_images([folder])
    assert len(found) == 2 and found[0] == path
    pipe = folder / "pipe.png"
    classifier = Classifier.from_pretrained(tiny_model, device="cpu")
    good, odd, hanging, lost = classifier.iterate([*items_of([*found, pipe], 0.5), Item("none", b"", 0.5)])
    assert good["probability"] == odd["probability"] and odd["filename"].endswith("f\\xe4rbung.png")
    assert hanging["error"] == f"{pipe} is not a regular file" and "cannot identify" in lost["error"]
    shutil.copy(__file__, os.fsencode(folder) + b"/text\xe4.png")
    (text,) = classifier.iterate(items_of(os.fsdecode(os.fsencode(folder) + b"/text\xe4.png"), 0.5))
    text["error"].encode()  # can be written


def test_what_is_doubtful_about_the_pixels_stands_in_the_row(tiny_model):
    classifier = Classifier.from_pretrained(tiny_model, device="cpu")
    clear = np.dstack([PIXELS, np.full(PIXELS.shape[:2], 255, np.uint8)])
    clear[:, :50] = 0
    white = PIXELS.copy()
    white[:, :50] = 255
    twelve, flat = PIXELS.astype(np.uint16) << 4, np.full((80, 100, 3), 230, np.uint8)
    rows = list(classifier.iterate(items_of([clear, white, twelve, PIXELS, flat], 0.5)))
    assert not any(row["error"] for row in rows)
    assert rows[0]["logits"] == rows[1]["logits"] and rows[2]["logits"] == rows[3]["logits"]
    for row, said in zip(rows, ["transparent parts", "", "have 12 bits", "", "a field of one colour"], strict=True):
        assert said in (row["warning"] or "")


def test_what_pillow_warns_of_is_heard_by_the_thread_that_decodes():
    both = Barrier(2)

    def decode(name: str) -> list[str]:
        notes = []
        with pillow_warnings(notes):
            both.wait()
            for message in (f"{name} is odd", f"{name} is odd"):  # as Pillow would, said once
                warnings.warn_explicit(message, UserWarning, "TiffImagePlugin.py", 1, "PIL.TiffImagePlugin")
            both.wait()
        return notes

    before = warnings.filters[:], warnings.showwarning
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(decode, ["one", "other"])) == [["one is odd"], ["other is odd"]]
    assert (warnings.filters[:], warnings.showwarning) == before
    with pytest.warns(UserWarning, match="elsewhere"), pillow_warnings([]), ThreadPoolExecutor(1) as pool:
        pool.submit(warnings.warn, "elsewhere", UserWarning).result()
