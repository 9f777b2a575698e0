"""A table held against the published data."""

import csv
import gzip
from collections import defaultdict
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from magdg import main
from magnification_invariant.data.breakhis import MPP, SUBTYPES, features, load_breakhis, name_fields
from magnification_invariant.data.published import MAGNIFICATIONS, digests, slides
from magnification_invariant.data.verification import folder_state, verify

NAMES = [name for slide in slides() for name in slide.names]


def table(names: list[str], **changed) -> datasets.Dataset:
    """Rows as `load_breakhis` gives them, without images."""
    rows = [{**name_fields(name), "image": None, "filename": f"{name}.png"} for name in names]
    rows = [{**row, "mpp": MPP[row["magnification"]], **changed} for row in rows]
    return datasets.Dataset.from_list(rows, features=features())


FULL = table(NAMES)


def test_the_packaged_list_is_the_published_one(breakhis_real):
    with gzip.open(breakhis_real / "manifest.csv.gz", "rt") as file:
        assert sorted(NAMES) == sorted(Path(row["filename"]).stem for row in csv.DictReader(file))


def test_the_packaged_list_has_the_published_counts():
    by = [(SUBTYPES[slide.code[2:]], m, len(slide.images[m])) for slide in slides() for m in MAGNIFICATIONS]
    counts = {(s, m): sum(n for t, k, n in by if (t, k) == (s, m)) for s in SUBTYPES.values() for m in MAGNIFICATIONS}
    assert [sum(n for (_, k), n in counts.items() if k == m) for m in MAGNIFICATIONS] == [1995, 2081, 2013, 1820]
    assert [counts["adenosis", m] for m in MAGNIFICATIONS] == [114, 113, 111, 106]
    assert [counts["ductal_carcinoma", m] for m in MAGNIFICATIONS] == [864, 903, 896, 788]
    assert (len(slides()), len({slide.slide for slide in slides()}), len(NAMES)) == (82, 81, 7909)


def test_a_full_copy():
    report = verify(FULL, pixels=False)
    assert (report.kind, report.differences, report.patients) == ("full copy", [], (70, 70))
    assert all(there == published for there, published in report.counts.values())
    assert {s: n for s, (n, _) in report.slides.items()} == dict(
        zip(SUBTYPES.values(), (4, 10, 3, 7, 38, 5, 9, 6), strict=True)
    )
    text = str(report)
    assert "full copy: 7,909 of BreaKHis's 7,909 images, 70/70 patients" in text
    assert "864/864" in text and "2480/2480" in text and "5429/5429" in text and "82/82" in text
    assert "No difference" in text


def test_a_copy_without_the_ductal_copy_of_the_slide_filed_twice_is_full():
    kept = [i for i, name in enumerate(NAMES) if "DC-14-13412-" not in name]
    report = verify(FULL.select(kept), pixels=False)
    assert len(kept) == 7786
    assert (report.kind, report.differences) == ("full copy", []) and "Left out: the ductal copy" in str(report)


def test_a_subset_says_what_is_missing():
    report = verify(FULL.select(range(1, 7909)), pixels=False)
    assert report.kind == "known subset"
    assert report.differences == [f"1 images ({NAMES[0]!r}) missing"]
    assert report.counts["adenosis", 40] == (113, 114)
    assert "! 1 images" in str(report) and "113/114" in str(report)


@pytest.mark.parametrize(
    ("ds", "why"),
    [
        (table([*NAMES, "SOB_B_A-14-22549AB-40-999"]), "1 images ('SOB_B_A-14-22549AB-40-999') not in the published"),
        (table([*NAMES, NAMES[5]]), f"1 images ({NAMES[5]!r}) more than once"),
        (table(NAMES[:3], label=1), "3 images ('SOB_B_A-14-22549AB-40-001.png'"),
        (table(NAMES[:3], patient="14-1"), "whose columns contradict the file name"),
        (table(["SOB_B_A-99-1-40-001"]), "not in the published list"),
    ],
)
def test_what_is_not_breakhis(ds, why):
    report = verify(ds, pixels=False)
    assert report.kind == "not BreaKHis" and why in str(report)


def test_resized_images_are_noted():
    assert "7,909 images are not of the original pixel size" in str(verify(table(NAMES, mpp=1.5), pixels=False))


@pytest.fixture
def with_copies(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "copies"
    folder.mkdir()

    def save(name: str, like: str | None = None, **options):
        path = folder / name
        if like is None:
            Image.fromarray(rng.integers(0, 256, (46, 70, 3), dtype=np.uint8)).save(path)
        else:
            Image.open(folder / like).save(path, **options)

    save("SOB_B_A-14-22549AB-40-001.png")
    save(
        "SOB_B_A-14-22549AB-40-002.png", "SOB_B_A-14-22549AB-40-001.png", compress_level=1
    )  # other bytes, equal pixels
    save("SOB_B_F-14-9133-40-001.tif", "SOB_B_A-14-22549AB-40-001.png")
    save("SOB_M_LC-14-13412-40-001.png")
    save("SOB_M_DC-14-13412-40-001.png", "SOB_M_LC-14-13412-40-001.png")
    save("SOB_M_MC-14-10147-40-001.png", "SOB_B_A-14-22549AB-40-001.png")
    save("SOB_M_MC-14-10147-40-002.png")
    return folder


def test_equal_pixels_are_found_across_patients_and_classes(with_copies):
    report = verify(load_breakhis(with_copies, drop_duplicate_slide=False))
    assert sorted(map(len, report.duplicates)) == [2, 4]
    text = str(report)
    assert "2 groups of images with equal pixels" in text
    assert "1 across patients" in text and "1 across classes" in text
    assert "2 across subtypes (1 of them slide 14-13412)" in text
    group = " = ".join(sorted(["SOB_B_A-14-22549AB-40-001.png", "SOB_B_A-14-22549AB-40-002.png"]))
    assert f"!   {group} = SOB_B_F-14-9133-40-001.tif = SOB_M_MC-14-10147-40-001.png" in text


def test_prepare(with_copies, tmp_path, capsys):
    assert main(["prepare", str(with_copies)]) == 0
    assert "known subset: 7 of BreaKHis's 7,909" in capsys.readouterr().out
    assert len(load_breakhis(with_copies)) == 6  # the ductal copy is left out
    assert main(["prepare", str(with_copies), "--strict"]) == 1

    (with_copies / "cat.png").write_bytes(b"")
    assert main(["prepare", str(with_copies)]) == 1
    shown = capsys.readouterr().out
    assert "not BreaKHis, or a damaged copy" in shown and "cat.png: not named as in BreaKHis" in shown
    assert main(["prepare", str(tmp_path / "nowhere")]) == 2


def test_a_slide_s_files_are_held_against_the_archive_s_digests():
    """The single hashes are facts of the archive; what is shipped follows from them, by slide and magnification."""
    listing = Path(__file__).parents[3] / "shared" / "reference" / "breakhis_file_sha256.tsv.gz"
    if not listing.is_file():
        pytest.skip(f"no {listing}")
    folders = defaultdict(dict)
    for line in gzip.decompress(listing.read_bytes()).decode().splitlines()[1:]:
        name, sha256, size = line.split("\t")
        fields = name_fields(name)
        code = next(code for code, subtype in SUBTYPES.items() if subtype == fields["subtype"])
        folders[fields["slide"], code, fields["magnification"]][name] = sha256, int(size)
    assert folders.keys() == digests().keys() and len(folders) == 328
    assert {folder_state(key, stored) for key, stored in folders.items()} == {"intact"}
    key, stored = next(iter(folders.items()))
    first, *others = stored
    sha256, size = stored[first]
    assert folder_state(key, {name: stored[name] for name in others}) == "incomplete"
    assert folder_state(key, stored | {first: ("0" * 64, size)}) == "damaged"  # a flipped bit
    assert folder_state(key, stored | {first: ("0" * 64, size - 900)}) == "damaged"  # a cut end
    assert folder_state(key, {name: ("0" * 64, n // 4) for name, (_, n) in stored.items()}) == "re-encoded"


def test_what_is_not_the_archive_s_is_named(breakhis_real):
    report = str(verify(load_breakhis(breakhis_real, drop_duplicate_slide=False)))
    assert "held against the authors' archive:" in report and "  0 intact" in report and " incomplete: " in report
