"""Is this BreaKHis, and all of it? A table held against the published file list, and equal pixels found."""

import hashlib
import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePath

import numpy as np

from magnification_invariant.data.breakhis import LABELS, MPP, SUBTYPES, is_ductal_copy, name_fields
from magnification_invariant.data.images import EncodedImages, name_of, open_image, to_rgb
from magnification_invariant.data.published import MAGNIFICATIONS, slides

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
        for label, letter in zip(LABELS, "BM", strict=True):
            subtypes = [SUBTYPES[code] for code in sorted({s.code[2:] for s in slides() if s.code[0] == letter})]
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
        pixels: Also decode every image, in threads, and find those with equal pixels (about 10 ms an image and core).

    Raises:
        ValueError: A column is missing, or an image cannot be decoded; its file is named.
    """
    columns = {name: ds[name][:] for name in ("filename", "label", "subtype", "magnification", "patient", "slide")}
    stems = [PurePath(name).stem for name in columns["filename"]]
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    published = {name: slide for slide in slides() for name in slide.names}

    unknown = [name for name in stems if name not in published]
    missing = sorted(published.keys() - set(stems))
    twice = [name for name, n in Counter(stems).items() if n > 1]
    contradicted = [row["filename"] for row in rows if (name_fields(row["filename"]) or {}).items() - row.items()]
    differences, notes = [], []
    if unknown:
        differences.append(f"{_images(unknown)} not in the published list")
    if contradicted:
        differences.append(f"{_images(contradicted)} whose columns contradict the file name")
    if twice:
        differences.append(f"{_images(twice)} more than once")
    ductal = {name for name in published if is_ductal_copy(published[name].slide, SUBTYPES[published[name].code[2:]])}
    if set(missing) == ductal:
        notes.append(f"Left out: the ductal copy of slide 14-13412 ({len(ductal)} images), which is filed twice.")
    elif missing:
        differences.append(f"{_images(missing)} missing")
    complete = not missing or set(missing) == ductal
    kind = "not BreaKHis" if unknown or contradicted or twice else "full copy" if complete else "known subset"

    native = sum(
        np.isclose(mpp, MPP.get(m, np.nan)) for mpp, m in zip(ds["mpp"], columns["magnification"], strict=True)
    )
    if native < len(rows):
        notes.append(f"{len(rows) - native:,} images are not of the original pixel size: resized or cropped.")
    duplicates = None
    if pixels:
        groups = _equal_pixels(ds)
        duplicates = [[columns["filename"][i] for i in group] for group in groups]
        notes += _about_duplicates(groups, columns)

    there = Counter(zip(columns["subtype"], columns["magnification"], strict=True))
    folders = Counter(subtype for subtype, _ in set(zip(columns["subtype"], columns["slide"], strict=True)))
    listed = Counter({(SUBTYPES[s.code[2:]], m): 0 for s in slides() for m in MAGNIFICATIONS})
    for slide in slides():
        listed.update({(SUBTYPES[slide.code[2:]], m): len(numbers) for m, numbers in slide.images.items()})
    listed_folders = Counter(SUBTYPES[slide.code[2:]] for slide in slides())
    patients = {name_fields(name)["patient"] for name in published}
    return Verification(
        kind=kind,
        counts={key: (there[key], n) for key, n in listed.items()},
        slides={subtype: (folders[subtype], n) for subtype, n in listed_folders.items()},
        patients=(len(set(columns["patient"])), len(patients)),
        differences=differences,
        notes=notes,
        duplicates=duplicates,
    )


def _equal_pixels(ds) -> list[list[int]]:
    """Rows with equal pixels, a group each."""
    images = EncodedImages(ds)

    def digest(i: int) -> bytes:
        encoded = images[i]
        try:
            with open_image(encoded) as image:
                rgb = to_rgb(image)
                return hashlib.blake2b(rgb.tobytes(), digest_size=16, key=repr(rgb.size).encode()).digest()
        except Exception as error:
            raise ValueError(f"cannot decode the image {name_of(encoded)}: {error}") from error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(digest, range(len(images)))
        rows = defaultdict(list)
        for i, key in enumerate(digests):
            rows[key].append(i)
    return [group for group in rows.values() if len(group) > 1]


def _about_duplicates(groups: list[list[int]], columns: dict[str, list]) -> list[str]:
    if not groups:
        return ["No two images have equal pixels."]
    lines = [f"{len(groups):,} groups of images with equal pixels:"]
    for what, column in (("patients", "patient"), ("classes", "label"), ("subtypes", "subtype")):
        across = [group for group in groups if len({columns[column][i] for i in group}) > 1]
        known = sum(len({columns["slide"][i] for i in group} | {"14-13412"}) == 1 for group in across)
        lines.append(f"  {len(across):,} across {what}" + f" ({known:,} of them slide 14-13412)" * bool(known))
        if what != "subtypes":  # a leak, or a wrong label
            named = [" = ".join(columns["filename"][i] for i in group) for group in across[:_SHOWN]]
            lines += [f"!   {names}" for names in named]
    return lines


def _images(names: list[str]) -> str:
    shown = ", ".join(map(repr, sorted(names)[:_SHOWN]))
    return f"{len(names):,} images ({shown}{', ...' * (len(names) > _SHOWN)})"


def _of(pair) -> str:
    return f"{pair[0]}/{pair[1]}"


def _line(name: str, cells) -> str:
    return f"{name:22}" + "".join(f"{cell:>12}" for cell in cells)
