"""Is this BreaKHis, and all of it? A table held against the published file list, and equal pixels found."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from magnification_invariant.data.breakhis import DUPLICATE_SLIDE, LABELS, MPP, SUBTYPES, is_ductal_copy, name_fields
from magnification_invariant.data.images import EncodedImages, name_of, open_image, to_rgb
from magnification_invariant.data.published import MAGNIFICATIONS, digests, slides

_SHOWN = 5


@dataclass(frozen=True)
class Verification:
    """What `verify` found; ``print`` shows it as one block.

    Attributes:
        kind: "full copy", "known subset" (every image is a published one, some are missing) or "not BreaKHis".
        counts: images by (subtype, magnification): how many there are, how many were published.
        slides: slide folders by subtype, the same way.
        patients: the same way.
        differences: from the published data, a line each; a copy without the ductal copy of slide 14-13412 is full.
        notes: what is worth knowing but no difference, a line each.
        duplicates: file names of images with equal pixels, a list a group; None if pixels were not looked at.
    """

    kind: str
    counts: dict[tuple[str, int], tuple[int, int]]
    slides: dict[str, tuple[int, int]]
    patients: tuple[int, int]
    differences: list[str]
    notes: list[str] = field(default_factory=list)
    duplicates: list[list[str]] | None = None

    def __str__(self) -> str:
        there, published = np.sum(list(self.counts.values()), 0)
        lines = [f"{self.kind}: {there:,} of BreaKHis's {published:,} images, {_of(self.patients)} patients", ""]
        lines.append(_line("images there/published", [*(f"{m}X" for m in MAGNIFICATIONS), "all", "slides"]))
        for label, subtypes in zip(LABELS, (list(SUBTYPES.values())[:4], list(SUBTYPES.values())[4:]), strict=True):
            lines += [self._row(f"  {subtype}", [subtype]) for subtype in subtypes]
            lines.append(self._row(label, subtypes))
        lines += [self._row("all", list(SUBTYPES.values())), ""]
        lines += [f"! {difference}" for difference in self.differences] or ["No difference from the published data."]
        return "\n".join(lines + self.notes)

    def _row(self, name: str, subtypes: list[str]) -> str:
        cells = [np.sum([self.counts[s, m] for s in subtypes], 0) for m in MAGNIFICATIONS]
        return _line(name, map(_of, [*cells, np.sum(cells, 0), np.sum([self.slides[s] for s in subtypes], 0)]))


def verify(ds, *, pixels: bool = True) -> Verification:
    """Holds a table of `load_breakhis` against the published data: names, classes, types, magnifications, slides.

    Args:
        ds: The table.
        pixels: Also read every file, in threads: hold it against the authors' archive (`folder_state`), and find images
            with equal pixels (about 10 ms an image and core).

    Raises:
        ValueError: A column is missing, or an image cannot be decoded; its file is named.
    """
    rows = ds.select_columns(["filename", "label", "subtype", "magnification", "patient", "slide", "mpp"]).to_list()
    stems = [PurePath(row["filename"]).stem for row in rows]
    published = {name: name_fields(name) or {} for slide in slides() for name in slide.names}
    ductal = {name for name, fields in published.items() if is_ductal_copy(fields["slide"], fields["subtype"])}
    missing = published.keys() - set(stems)
    wrong = {
        "not in the published list": [name for name in stems if name not in published],
        "whose columns contradict the file name": [
            row["filename"] for row in rows if (name_fields(row["filename"]) or {}).items() - row.items()
        ],
        "more than once": [name for name, n in Counter(stems).items() if n > 1],
    }
    differences = [f"{_images(names)} {what}" for what, names in wrong.items() if names]
    kind = "not BreaKHis" if differences else "known subset" if missing and missing != ductal else "full copy"
    notes = []
    if missing == ductal:
        notes.append(f"Left out: the ductal copy of slide 14-13412 ({len(ductal)} images), which is filed twice.")
    elif missing:
        differences.append(f"{_images(missing)} missing")
    resized = sum(not np.isclose(row["mpp"], MPP.get(row["magnification"], np.nan)) for row in rows)
    if resized:
        notes.append(f"{resized:,} images are not of the original pixel size: resized or cropped.")
    groups = []
    if pixels:
        stored = _files(ds)
        groups = _equal_pixels(stored)
        notes += _file_states(rows, stored)
        notes += _about_duplicates([[rows[i] for i in group] for group in groups])
    (images, folders, patients), (all_images, all_folders, all_patients) = _counts(rows), _counts(published.values())
    return Verification(
        kind=kind,
        counts={key: (images[key], n) for key, n in all_images.items()},
        slides={subtype: (folders[subtype], n) for subtype, n in all_folders.items()},
        patients=(patients, all_patients),
        differences=differences,
        notes=notes,
        duplicates=[[rows[i]["filename"] for i in group] for group in groups] if pixels else None,
    )


def _counts(rows: Iterable[dict]) -> tuple[Counter, Counter, int]:
    """Images by subtype and magnification, slide folders by subtype, and patients."""
    rows = list(rows)
    folders = {(row["subtype"], row["slide"]) for row in rows}
    return (
        Counter((row["subtype"], row["magnification"]) for row in rows),
        Counter(subtype for subtype, _ in folders),
        len({row["patient"] for row in rows}),
    )


STATES = ("intact", "re-encoded", "damaged", "incomplete")


def folder_state(key: tuple[str, str, int], stored: dict[str, tuple[str, int]]) -> str:
    """Whether the files of a slide at a magnification are the authors': one of `STATES`.

    Args:
        key: Slide, subtype's code and magnification, a key of `published.digests`.
        stored: Of each file there, by name: sha256 of its bytes, and how many.
    """
    images, size, digest = digests()[key]
    if len(stored) < images:
        return "incomplete"
    lines = "".join(f"{name}:{sha256}\n" for name, (sha256, _) in sorted(stored.items()))
    if hashlib.sha256(lines.encode()).hexdigest() == digest:
        return "intact"
    # Another encoding has another size by far more than a flipped bit or a cut end.
    return "damaged" if abs(sum(n for _, n in stored.values()) / size - 1) < 0.01 else "re-encoded"


class _File(NamedTuple):
    """One image's file: sha256 and number of its bytes, and a digest of its pixels."""

    sha256: str
    size: int
    pixels: bytes


def _files(ds) -> list[_File]:
    images = EncodedImages(ds)

    def look(i: int) -> _File:
        path, content = images[i]
        try:
            content = Path(path).read_bytes() if content is None else content
            with open_image((path, content)) as image:
                rgb = to_rgb(image)
        except Exception as error:
            raise ValueError(f"cannot decode the image {name_of((path, content))}: {error}") from error
        pixels = hashlib.blake2b(rgb.tobytes(), digest_size=16, key=repr(rgb.size).encode()).digest()
        return _File(hashlib.sha256(content).hexdigest(), len(content), pixels)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(look, range(len(images))))


def _file_states(rows: list[dict], stored: list[_File]) -> list[str]:
    """What `folder_state` says of all slide folders that are there, in lines: which are not the authors' files."""
    code = {subtype: letters for letters, subtype in SUBTYPES.items()}
    folders = defaultdict(dict)
    for row, file in zip(rows, stored, strict=True):
        key = row["slide"], code.get(row["subtype"]), row["magnification"]
        if key in digests():
            folders[key][row["filename"]] = file.sha256, file.size
    states = defaultdict(list)
    for key, files in folders.items():
        slide, subtype, magnification = key
        states[folder_state(key, files)].append(f"{slide} ({subtype}) {magnification}X")
    lines = [f"Files of {len(folders)} slides and magnifications, held against the authors' archive:"]
    for state in STATES:
        named = sorted(states[state])
        which = f": {', '.join(named[:_SHOWN])}{', ...' * (len(named) > _SHOWN)}" * bool(named and state != "intact")
        lines.append(f"{'!' if named and state == 'damaged' else ' '} {len(named):,} {state}{which}")
    return lines


def _equal_pixels(stored: list[_File]) -> list[list[int]]:
    """Rows with equal pixels, a group each."""
    rows = defaultdict(list)
    for i, file in enumerate(stored):
        rows[file.pixels].append(i)
    return [group for group in rows.values() if len(group) > 1]


def _about_duplicates(groups: list[list[dict]]) -> list[str]:
    if not groups:
        return ["No two images have equal pixels."]
    lines = [f"{len(groups):,} groups of images with equal pixels:"]
    for what, column in (("patients", "patient"), ("classes", "label"), ("subtypes", "subtype")):
        across = [group for group in groups if len({row[column] for row in group}) > 1]
        known = sum({row["slide"] for row in group} == {DUPLICATE_SLIDE} for group in across)
        lines.append(f"  {len(across):,} across {what}" + f" ({known:,} of them slide 14-13412)" * bool(known))
        if what != "subtypes":  # a leak, or a wrong label
            lines += ["!   " + " = ".join(row["filename"] for row in group) for group in across[:_SHOWN]]
    return lines


def _images(names: Collection[str]) -> str:
    shown = ", ".join(map(repr, sorted(names)[:_SHOWN]))
    return f"{len(names):,} images ({shown}{', ...' * (len(names) > _SHOWN)})"


def _of(pair) -> str:
    return f"{pair[0]}/{pair[1]}"


def _line(name: str, cells) -> str:
    return f"{name:22}" + "".join(f"{cell:>12}" for cell in cells)
