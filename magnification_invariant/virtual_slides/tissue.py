"""Tissue of a virtual patient, in micrometres: who the patient is, and what lies at every site of the section.

A patient is a number. It fixes a class, a stain and an endless section of breast tissue, so the same tissue can be
photographed at any um/px. Benign and malignant differ in what a pathologist looks at: loss of lumina, spread of
nuclear size and shape, lost polarity, crowding, nucleoli, mitoses. They do not differ in what a short cut would look
at. The composition of the tissue is paired by construction: a solid nest has the epithelial area of a gland and, as a
retraction cleft, the white area of its lumen.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

BENIGN = {"A": "adenosis", "F": "fibroadenoma", "PT": "phyllodes_tumor", "TA": "tubular_adenoma"}
MALIGNANT = {
    "DC": "ductal_carcinoma",
    "LC": "lobular_carcinoma",
    "MC": "mucinous_carcinoma",
    "PC": "papillary_carcinoma",
}
YEAR = 31  # of the slide ids; BreaKHis itself has years 14 and 15
PALE = 0.55  # share of its haematoxylin that the middle of a wholly vesicular nucleus lacks
PALE_SHARE = 0.62 * PALE  # the middle is 0.62 of the nucleus
N_SITES = 400  # a slide is N_SITES x N_SITES sites, about 2 cm
DARK = 0.03  # share of nuclei that are dark bodies: apoptotic, or mitoses where the grade is high
CROWD = 0.10  # how much less room a nucleus has at the highest grade
MARGIN = 0.4  # of the width of a cell, kept free of nuclei along the borders of a gland or nest
_ANGLES = np.arange(48) * (2 * np.pi / 48)
_WHITE = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Patient:
    """Truths about a patient; all lengths in micrometres. The first block depends on the class, the second does not.

    Attributes:
        number: The patient's seed and the number in its id (`31-00012`).
        label: 0 benign, 1 malignant.
        subtype: Abbreviation used by BreaKHis. A name only: the four subtypes of a class are not simulated.
        solid: Share of epithelial units without a lumen (loss of gland structure).
        atypia: Nuclear grade in [0, 1]; the five numbers below follow from it.
        size_cv: Coefficient of variation of nuclear diameter (anisokaryosis).
        irregularity: Relative amplitude of the nuclear outline's harmonics.
        polarity: 1 where nuclei stand in rows along the basal side, pointing to the lumen; 0 where they lie anyhow.
        nucleoli: Share of nuclei with a prominent nucleolus.
        mitoses: Share of the dark bodies that are mitoses; the others are apoptotic.
        diameter: Mean diameter of epithelial nuclei.
        spacing: Mean distance of neighbouring epithelial nuclei.
        pitch: Distance of epithelial units.
        epithelium: Share of sites that hold an epithelial unit.
        fat: Share of the other sites that hold an adipocyte.
        inflammation: Lymphocytes a site.
        fibre_angle: Main direction of the stroma's fibres in radians.
        looseness: 0 dense collagen, 1 loose stroma with white gaps.
        stain: Optical densities of unit haematoxylin and unit eosin, 2 x (R, G, B).
        chromatin: Haematoxylin at a nucleus' rim.
        vesicular: How much paler a nucleus is in the middle than at its rim; grade raises both, and not their mean.
        grain: Contrast of the chromatin's grain.
        cytoplasm: Haematoxylin and eosin of epithelial cytoplasm.
        collagen: Haematoxylin and eosin of stroma.
        secretion: Eosin in lumina and clefts.
        core: Mean share of a unit's area inside the border between epithelium and white.
    """

    number: int
    label: int
    subtype: str
    solid: float
    atypia: float
    size_cv: float
    irregularity: float
    polarity: float
    nucleoli: float
    mitoses: float
    diameter: float
    spacing: float
    pitch: float
    epithelium: float
    fat: float
    inflammation: float
    fibre_angle: float
    looseness: float
    stain: tuple[tuple[float, float, float], tuple[float, float, float]]
    chromatin: float
    vesicular: float
    grain: float
    cytoplasm: tuple[float, float]
    collagen: tuple[float, float]
    secretion: float
    core: float

    @property
    def id(self) -> str:
        """Patient id in BreaKHis' form, `31-00012`."""
        return f"{YEAR}-{self.number:05d}"

    @property
    def haematoxylin(self) -> float:
        """Mean haematoxylin of a nucleus, rim and middle together."""
        return self.chromatin * (1 - PALE_SHARE * self.vesicular)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@lru_cache(maxsize=4096)
def virtual_patient(number: int) -> Patient:
    """The patient of a number (>= 0). Of the patients 2k and 2k + 1 one is benign and one malignant."""
    if number < 0:
        raise ValueError(f"patient number must be 0 or more, got {number}")
    pair = np.random.default_rng([101, number // 2])
    label = int(pair.integers(2)) ^ (number % 2)
    rng = np.random.default_rng([102, number])
    sign = 2 * label - 1
    # Grade and architecture go with the class, not in step and with overlap: some benign tissue is atypical or
    # solid, some carcinomas are bland or form glands.
    atypia = _sigmoid(2.8 * sign + rng.standard_t(3))
    solid = _sigmoid(1.0 * sign + 0.5 * rng.standard_t(3))
    subtypes = list(MALIGNANT if label else BENIGN)
    jitter = rng.normal(0, 0.05, (2, 3))
    stain = np.array([[0.70, 0.68, 0.30], [0.10, 0.85, 0.32]]) * np.exp(jitter)
    stain *= np.exp(rng.normal(0, 0.12, (2, 1)))
    # Grade also clears the middle of nuclei. What it takes there it adds at the rim, so that the mean stays, and the
    # rims give back the power at 1 um that fewer and larger nuclei lack.
    pallor = 0.2 * (atypia - 0.5)
    diameter = 5.2 * math.exp(0.22 * rng.standard_normal())
    return Patient(
        number=number,
        label=label,
        subtype=subtypes[int(rng.integers(4))],
        solid=solid,
        atypia=atypia,
        size_cv=0.05 + 0.40 * atypia,
        irregularity=0.02 + 0.20 * atypia,
        polarity=1 - atypia,
        nucleoli=0.05 + 0.9 * atypia,
        mitoses=atypia,
        diameter=diameter,
        spacing=diameter * 1.25 * math.exp(0.09 * rng.standard_normal()),
        pitch=float(np.clip(58 * math.exp(0.30 * rng.standard_normal()), 42, 90)),
        epithelium=rng.uniform(0.5, 0.9),
        fat=rng.uniform(0.0, 0.7),
        inflammation=rng.gamma(1.0, 3.0),
        fibre_angle=rng.uniform(0, math.pi),
        looseness=rng.uniform(0.1, 0.9),
        stain=tuple(tuple(float(v) for v in row) for row in stain),
        chromatin=0.62 * (1 + 0.34 * pallor) * math.exp(0.15 * rng.standard_normal()),
        vesicular=rng.uniform(0.1, 0.7) + pallor,
        grain=rng.uniform(0.3, 1.1),
        cytoplasm=(0.13 * math.exp(0.3 * rng.standard_normal()), 0.30 * math.exp(0.25 * rng.standard_normal())),
        collagen=(0.07 * math.exp(0.3 * rng.standard_normal()), 0.30 * math.exp(0.35 * rng.standard_normal())),
        secretion=rng.uniform(0, 0.05),
        core=rng.uniform(0.39, 0.61),
    )


@dataclass
class Site:
    """What one site of the tissue holds: regions painted in order and cells, in micrometres."""

    centre: np.ndarray  # (2,)
    edge: float  # radius of the border between core and shell of its epithelial unit, 0 without one
    regions: list  # (polygon (n, 2), (haematoxylin, eosin, fibre weight, chromatin weight))
    epithelial: np.ndarray  # (n, 10) nuclei, see _nuclei
    stromal: np.ndarray  # (n, 10)


def _outline(rng, centre, radius, wobble, stretch=1.0, angle=0.0):
    """Closed smooth outline (48, 2) around `centre` with the area of a disc of `radius`."""
    k = np.arange(2, 7)[:, None]
    wave = rng.normal(0, wobble, (5, 1)) / (k - 1) ** 0.7 * np.cos(k * _ANGLES + rng.uniform(0, 2 * np.pi, (5, 1)))
    r = np.maximum(1 + wave.sum(0), 0.3)
    r *= radius / math.sqrt(np.mean(r**2))
    x, y = r * np.cos(_ANGLES) * math.sqrt(stretch), r * np.sin(_ANGLES) / math.sqrt(stretch)
    c, s = math.cos(angle), math.sin(angle)
    return np.stack([centre[0] + c * x - s * y, centre[1] + s * x + c * y], axis=1)


def _nuclei(rng, patient, points, direction):
    """Rows (x, y, half length, half width, angle, irregularity, phase, haematoxylin, vesicular, nucleolus)."""
    n = len(points)
    size = np.exp(rng.normal(0, patient.size_cv, n) - patient.size_cv**2)  # keeps the mean area, not the diameter
    aspect = np.exp(0.22 + rng.normal(0, 0.12, n))
    turn = rng.uniform(-np.pi / 2, np.pi / 2, n) * np.where(rng.random(n) < patient.polarity, 0.12, 1.0)
    half = patient.diameter / 2 * size
    out = np.empty((n, 10))
    out[:, :2] = points
    out[:, 2], out[:, 3] = half * np.sqrt(aspect), half / np.sqrt(aspect)
    out[:, 4] = direction + turn
    out[:, 5] = patient.irregularity * rng.uniform(0.4, 1.6, n)
    out[:, 6] = rng.uniform(0, 2 * np.pi, n)
    out[:, 7] = patient.chromatin * np.exp(rng.normal(0, 0.12, n))
    out[:, 8] = np.clip(rng.normal(patient.vesicular, 0.15, n), 0, 0.8)
    out[:, 9] = rng.random(n) < patient.nucleoli
    # As many dark bodies in every tissue: plates of mitosis where the grade is high, round apoptotic ones elsewhere.
    dark = rng.random(n) < DARK
    mitosis = dark & (rng.random(n) < patient.mitoses)
    out[dark, 2:4] = 0.36 * patient.diameter
    out[dark, 5] = 0.04
    out[dark, 7:] = (1.0, 0.0, 0.0)
    out[mitosis, 2:4] *= (1.6, 1 / 1.6)
    out[mitosis, 5] = 0.25
    return out


def _rows(rng, outline, centre, inner, cell_area, polarity):
    """Cells in rows parallel to an outline, between it and `inner` x itself: points (n, 2) and outward directions.

    Their number is the area over `cell_area` whether the room is a ring (`inner` > 0) or a disc (0).
    """
    o = outline - centre
    radius = np.sqrt(np.mean((o**2).sum(1)))
    n_rows = max(round(radius * (1 - inner) / math.sqrt(cell_area)), 1)
    shares = 1 - (np.arange(n_rows) + 0.5) / n_rows * (1 - inner)
    n = np.pi * radius**2 * (1 - inner**2) / cell_area * shares / shares.sum()
    n = np.maximum(np.floor(n + rng.random(n_rows)).astype(int), 1)
    closed = np.vstack([o, o[:1]])
    length = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(closed, axis=0).T))])
    disorder = 0.12 + 0.22 * (1 - polarity)
    at = np.concatenate([(np.arange(m) + rng.uniform()) / m for m in n])
    at = (at + rng.normal(0, disorder, len(at)) / np.repeat(n, n)) % 1 * length[-1]
    p = np.stack([np.interp(at, length, closed[:, 0]), np.interp(at, length, closed[:, 1])], axis=1)
    outward = np.arctan2(p[:, 1], p[:, 0])
    step = (1 - inner) / n_rows
    share = np.repeat(shares, n) + rng.normal(0, 0.8 * disorder * step, len(at))
    margin = min(MARGIN * math.sqrt(cell_area) / radius, 0.45 * (1 - inner))
    p *= np.clip(share, inner + (margin if inner else 0), 1 - margin)[:, None]
    return p + centre, outward


@lru_cache(maxsize=2048)
def tissue_site(number: int, i: int, j: int) -> Site:
    """Draw site (i, j) of a patient's tissue: the only place where tissue comes from, so every field agrees."""
    patient = virtual_patient(number)
    rng = np.random.default_rng([103, number, i, j])
    pitch = patient.pitch
    centre = np.array([(i + 0.5 * (j % 2) + rng.uniform(-0.13, 0.13)) * pitch, (j + rng.uniform(-0.13, 0.13)) * pitch])
    regions, epithelial, edge = [], np.empty((0, 10)), 0.0
    # Stroma first; epithelium is painted over what it covers.
    n_fibroblasts, n_lymphocytes = rng.poisson(6 * (pitch / 50) ** 2), rng.poisson(patient.inflammation)
    at = centre + rng.uniform(-0.5, 0.5, (n_fibroblasts, 2)) * pitch
    stromal = np.zeros((n_fibroblasts + n_lymphocytes, 10))
    stromal[:n_fibroblasts, :2] = at
    stromal[:n_fibroblasts, 2] = rng.uniform(2.2, 4.2, n_fibroblasts)
    stromal[:n_fibroblasts, 3] = rng.uniform(0.6, 1.1, n_fibroblasts)
    stromal[:n_fibroblasts, 4] = np.nan  # along the fibres, known when the field is drawn
    hub = centre + rng.uniform(-0.5, 0.5, 2) * pitch
    stromal[n_fibroblasts:, :2] = hub + rng.normal(0, 0.14 * pitch, (n_lymphocytes, 2))
    stromal[n_fibroblasts:, 2:4] = rng.uniform(1.6, 2.1, (n_lymphocytes, 1))
    stromal[:, 5], stromal[:, 6] = 0.05, rng.uniform(0, 6, len(stromal))
    stromal[:, 7] = patient.chromatin * np.where(np.arange(len(stromal)) < n_fibroblasts, 0.95, 1.25)
    if rng.random() < 0.12:  # a capillary with red cells
        c = centre + rng.uniform(-0.5, 0.5, 2) * pitch
        regions.append((_outline(rng, c, rng.uniform(3, 5), 0.1, 1.8, patient.fibre_angle), _WHITE))
        for _ in range(rng.integers(1, 4)):
            cell = c + rng.normal(0, 1.5, 2)
            regions.append((_outline(rng, cell, 1.7, 0.03), (0.0, 0.95, 0.0, 0.0)))
    if rng.random() < patient.epithelium:
        # A unit is a core and a shell. In a gland the core is lumen and the shell epithelium; in a solid nest the core
        # is epithelium and the shell a retraction space. Core and shell have the same area on average, so pictures of
        # both have the same composition, and with stroma half way between white and epithelium the same spectrum: hence
        # the pale collagen.
        solid = rng.random() < patient.solid
        radius = pitch * rng.uniform(0.32, 0.49)
        share = math.sqrt(patient.core + rng.uniform(-0.07, 0.07))
        shape = math.exp(abs(rng.normal(0, 0.2))), rng.uniform(0, np.pi)
        shell = _outline(rng, centre, radius, 0.04, *shape)
        core = _outline(rng, centre, radius * share, 0.04, *shape)
        cytoplasm, space = (*patient.cytoplasm, 0.0, 0.35), (0.0, patient.secretion, 0.0, 0.0)
        regions += [(shell, space if solid else cytoplasm), (core, cytoplasm if solid else space)]
        cell_area = 0.866 * patient.spacing**2 / (1 + CROWD * patient.atypia)
        rows = (core, centre, 0.0) if solid else (shell, centre, share)
        points, outward = _rows(rng, *rows, cell_area, patient.polarity)
        epithelial = _nuclei(rng, patient, points, outward)
        edge = radius * share
    elif rng.random() < patient.fat:
        bubble = _outline(rng, centre, pitch * rng.uniform(0.38, 0.5), 0.04, math.exp(rng.normal(0, 0.15)), angle=1.0)
        regions.append((bubble, (0.04, 0.5, 0.0, 0.0)))
        regions.append((centre + (bubble - centre) * 0.97, _WHITE))
    return Site(centre, edge, regions, epithelial, stromal)
