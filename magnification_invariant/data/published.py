"""What BreaKHis is: its slides and images, as published. A packaged table, 82 slides in 4 kB.

`breakhis_slides.csv` has a line a slide folder: its name, the sequence numbers of its images at each magnification
("1-29 31"), and in which of the five folds published with it the slide is tested.
"""

import csv
from functools import cache
from importlib.resources import files
from typing import NamedTuple

MAGNIFICATIONS = (40, 100, 200, 400)  # total optical


class Slide(NamedTuple):
    """One slide folder. Slide 14-13412 has two: it is filed as ductal and as lobular carcinoma.

    Attributes:
        code: "B_A", class and subtype.
        slide: "14-22549AB".
        images: sequence numbers of its images by magnification.
    """

    code: str
    slide: str
    images: dict[int, list[int]]

    @property
    def names(self) -> list[str]:
        """File names of its images, without suffix."""
        return [
            f"SOB_{self.code}-{self.slide}-{magnification}-{number:03}"
            for magnification, numbers in self.images.items()
            for number in numbers
        ]


@cache
def slides() -> tuple[Slide, ...]:
    """Every slide folder of the published data set."""
    text = files(__package__).joinpath("breakhis_slides.csv").read_text(encoding="ascii")
    return tuple(
        Slide(
            code=line["slide"][4:].partition("-")[0],
            slide=line["slide"].partition("-")[2],
            images={magnification: _numbers(line[str(magnification)]) for magnification in MAGNIFICATIONS},
        )
        for line in csv.DictReader(text.splitlines())
    )


@cache
def digests() -> dict[tuple[str, str, int], tuple[int, int, str]]:
    """Of the original files of a slide folder, by (slide, subtype's code, magnification): images, bytes and digest.

    The digest is sha256 over ``name:sha256`` and a newline of each file, in the order of the names; facts computed from
    the archive of the authors.
    """
    text = files(__package__).joinpath("breakhis_digests.csv").read_text(encoding="ascii")
    return {
        (line["slide"], line["subtype"], int(line["magnification"])): (
            int(line["images"]),
            int(line["bytes"]),
            line["sha256_of_sorted_file_sha256"],
        )
        for line in csv.DictReader(text.splitlines())
    }


def _numbers(ranges: str) -> list[int]:
    ends = [part.split("-") for part in ranges.split()]
    return [number for end in ends for number in range(int(end[0]), int(end[-1]) + 1)]
