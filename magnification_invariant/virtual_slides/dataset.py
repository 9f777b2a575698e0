"""Procedural H&E in micrometres: a data set in the form of BreaKHis that needs no download.

A patient is a number. It fixes a class, a stain and an endless section of breast tissue drawn in micrometres, so the
same tissue can be photographed at any um/px. Benign and malignant differ in what a pathologist looks at: loss of
lumina, spread of nuclear size and shape, lost polarity, crowding, nucleoli, mitoses. They do not differ in what a
short cut would look at. The composition of the tissue is paired by construction: a solid nest has the epithelial
area of a gland and, as a retraction cleft, the white area of its lumen. Stain, optics and sessions are drawn without
looking at the class. The pictures teach and test software; they are not evidence about patients.

This file imports neither torch nor the rest of the package when it starts, because the rendering processes run it
as a script.
"""

import hashlib
import json
import math
import os
import struct
import subprocess
import sys
import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

__all__ = ["Optics", "Patient", "load_virtual_slides", "native_mpp", "render_field", "virtual_field", "virtual_patient"]

# Raise it whenever a pixel changes: cached folders of another version are then left alone and drawn anew.
GENERATOR_VERSION = 7
SIDECAR = "virtual_slides.json"
MAGNIFICATIONS = (40, 100, 200, 400)
BENIGN = {"A": "adenosis", "F": "fibroadenoma", "PT": "phyllodes_tumor", "TA": "tubular_adenoma"}
MALIGNANT = {
    "DC": "ductal_carcinoma",
    "LC": "lobular_carcinoma",
    "MC": "mucinous_carcinoma",
    "PC": "papillary_carcinoma",
}
YEAR = 31  # of the slide ids; BreaKHis itself has years 14 and 15
SESSIONS = 12  # microscope sessions of a data set
PALE = 0.55  # share of its haematoxylin that the middle of a wholly vesicular nucleus lacks
PALE_SHARE = 0.62 * PALE  # the middle is 0.62 of the nucleus
N_SITES = 400  # a slide is N_SITES x N_SITES sites, about 2 cm


def native_mpp(magnification: int) -> float:
    """Micrometres per pixel of the 700 px wide images: 6.5 / (3.3 x objective), objective = magnification / 10."""
    return 6.5 / (3.3 * magnification / 10)


# ---------------------------------------------------------------------------------------------------------- patients


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


# ------------------------------------------------------------------------------------------------------------ tissue


@dataclass
class _Site:
    """What one site of the tissue holds: regions painted in order and cells, in micrometres."""

    centre: np.ndarray  # (2,)
    edge: float  # radius of the border between core and shell of its epithelial unit, 0 without one
    regions: list  # (polygon (n, 2), (haematoxylin, eosin, fibre weight, chromatin weight))
    epithelial: np.ndarray  # (n, 10) nuclei, see _nuclei
    stromal: np.ndarray  # (n, 10)


_ANGLES = np.arange(48) * (2 * np.pi / 48)
_WHITE = (0.0, 0.0, 0.0, 0.0)
DARK = 0.03  # share of nuclei that are dark bodies: apoptotic, or mitoses where the grade is high
CROWD = 0.10  # how much less room a nucleus has at the highest grade
MARGIN = 0.4  # of the width of a cell, kept free of nuclei along the borders of a gland or nest


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
def _site(number: int, i: int, j: int) -> _Site:
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
    return _Site(centre, edge, regions, epithelial, stromal)


# ------------------------------------------------------------------------------------------------------------- noise


def _lattice(key: int, i, j):
    """Hashed standard uniform values of integer lattice points: same number wherever and at whatever um/px."""
    with np.errstate(over="ignore"):
        x = np.asarray(i, np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key * 0xD1B54A32D192ED03 % 2**64)
        x = x + np.asarray(j, np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _noise(key: int, period: float, x0: float, y0: float, mpp: float, size: tuple[int, int]) -> np.ndarray:
    """Smooth noise in [0, 1] with features of `period` um on a pixel grid whose corner is (x0, y0): (H, W) float32."""
    w, h = size
    left, top = math.floor(x0 / period) - 2, math.floor(y0 / period) - 2
    nx, ny = math.ceil(w * mpp / period) + 6, math.ceil(h * mpp / period) + 6
    values = _lattice(key, np.arange(left, left + nx)[None], np.arange(top, top + ny)[:, None])
    bx, by = x0 / period - left, y0 / period - top
    box = (bx, by, bx + w * mpp / period, by + h * mpp / period)
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BICUBIC, box=box))


def _strands(key: int, v: np.ndarray, mpp: float, low: float, high: float) -> np.ndarray:
    """Noise across the fibres: a table of 1-d noise over the coordinate v (um), four octaves, none below 2 px."""
    step = max(mpp * 0.5, 0.05)
    axis = np.arange(low - 2 * step, high + 3 * step, step)
    table = np.zeros(len(axis))
    weight = 0.0
    for octave, (period, amplitude) in enumerate(((1.1, 0.4), (2.6, 0.5), (6.0, 0.45), (15.0, 0.25))):
        weight += amplitude**2
        if period < 2 * mpp:
            continue
        k = np.arange(math.floor(axis[0] / period) - 1, math.ceil(axis[-1] / period) + 2)
        table += amplitude * (np.interp(axis, k * period, _lattice(key + octave, k + 2**20, 0)) - 0.5)
    table = (table / math.sqrt(weight) * 2.2 + 0.5).astype(np.float32)
    return table[((v - np.float32(axis[0])) * np.float32(1 / step)).astype(np.int32)]


# ------------------------------------------------------------------------------------------------------------ optics


@dataclass(frozen=True)
class Optics:
    """What the laboratory and the microscope add to a field; the defaults add nothing.

    Attributes:
        session: Number of the session, shared between magnifications and patients.
        haematoxylin, eosin: Factors on the stains' strength (drift by session).
        gain: White balance, factors on (R, G, B).
        blur: Standard deviation of the point spread, in micrometres.
        noise: Standard deviation of the sensor's noise in grey levels at full light.
        vignette: Share of light lost in the corners.
        off_axis: Centre of the vignette as shares of width and height, (0, 0) = middle.
    """

    session: int = 0
    haematoxylin: float = 1.0
    eosin: float = 1.0
    gain: tuple[float, float, float] = (0.93, 0.93, 0.93)
    blur: float = 0.0
    noise: float = 0.0
    vignette: float = 0.0
    off_axis: tuple[float, float] = (0.0, 0.0)


def _optics(seed: int, patient: int, magnification: int, k: int, strength: int) -> Optics:
    """Optics of image k; the class is not known here. Image k of every magnification is of the same session."""
    session = int(np.random.default_rng([201, seed, patient, k]).integers(SESSIONS))
    if strength == 0:
        return Optics(session=session)
    day = np.random.default_rng([202, seed, session])
    shot = np.random.default_rng([203, seed, patient, magnification, k])
    drift = np.exp(strength * (0.10 * day.standard_normal(2) + 0.05 * shot.standard_normal(2)))
    colour = 0.02 * day.standard_normal(3) + 0.015 * shot.standard_normal(3)
    light = 0.96 * np.exp(strength * (colour - 0.02 * abs(shot.standard_normal())))
    # Airy disc of the objective's numerical aperture and of the focus missed in this shot, both in um.
    aperture = {4: 0.10, 10: 0.25, 20: 0.40, 40: 0.65}[magnification // 10]
    blur = 0.5 * strength * 0.21 * 0.55 / aperture * math.exp(0.8 * shot.standard_normal())
    return Optics(
        session=session,
        haematoxylin=float(drift[0]),
        eosin=float(drift[1]),
        gain=tuple(float(v) for v in np.minimum(light, 1.0)),
        blur=blur,
        noise=float(strength * 1.5 * math.exp(0.3 * day.standard_normal())),
        vignette=float(strength * 0.12 * day.random()),
        off_axis=tuple(float(v) for v in day.normal(0, 0.08, 2)),
    )


# --------------------------------------------------------------------------------------------------------- rendering


def _polygons(nuclei, scale, x0, y0, n=16):
    """Outlines (len(nuclei), n, 2) in canvas pixels."""
    t = np.arange(n) * (2 * np.pi / n)
    x, y, a, b, angle, wobble, phase = nuclei[:, :7].T[:, :, None]
    r = 1 + wobble * (np.cos(3 * t + phase) + 0.8 * np.cos(2 * t + 2.3 * phase) + 0.6 * np.cos(5 * t + 1.7 * phase))
    u, v = a * r * np.cos(t), b * r * np.sin(t)
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([(x + c * u - s * v - x0) * scale, (y + s * u + c * v - y0) * scale], axis=-1)


def _ink(h, e, fibre, chromatin):
    return tuple(int(min(max(v, 0), 1) * 255 + 0.5) for v in (h, e, fibre, chromatin))


def render_field(
    patient: int,
    mpp: float,
    centre: tuple[float, float],
    size: tuple[int, int] = (700, 460),
    optics: Optics | None = None,
    noise_seed: int = 0,
) -> np.ndarray:
    """Photograph a rectangle of a patient's tissue.

    Args:
        patient: The patient's number.
        mpp: Micrometres per pixel, any positive number.
        centre: (x, y) of the field's middle on the slide, in micrometres; `virtual_field` picks one on epithelium.
        size: (width, height) in pixels.
        optics: Stain drift, blur, light and noise; None is a perfect microscope.
        noise_seed: Seed of the sensor's noise.

    Returns:
        (height, width, 3) uint8 RGB.
    """
    if not mpp > 0:
        raise ValueError(f"mpp must be positive, got {mpp}")
    p, optics = virtual_patient(patient), optics or Optics()
    (w, h), over = size, 2
    x0, y0 = centre[0] - w * mpp / 2, centre[1] - h * mpp / 2
    key = patient * 64
    # 1. Fibre coordinate: distance across the fibres, bent by slow noise; coarse, then enlarged.
    grid, coarse = 8, (math.ceil(w / 8) + 1, math.ceil(h / 8) + 1)
    gx = x0 + np.arange(coarse[0]) * mpp * grid
    gy = y0 + np.arange(coarse[1]) * mpp * grid
    v = gy[:, None] * math.cos(p.fibre_angle) - gx[None] * math.sin(p.fibre_angle)
    v = v + 120 * _noise(key, 170, x0 - mpp * grid / 2, y0 - mpp * grid / 2, mpp * grid, coarse)
    v = v + 22 * _noise(key + 1, 36, x0 - mpp * grid / 2, y0 - mpp * grid / 2, mpp * grid, coarse)
    slope = np.gradient(v, mpp * grid)
    fibres = np.arctan2(-slope[1], slope[0])
    # 2. Materials on a canvas of twice the size: haematoxylin, eosin, fibre weight, chromatin weight.
    scale = over / mpp
    canvas = Image.new("CMYK", (w * over, h * over), _ink(*p.collagen, 1.0, 0.0))
    draw = ImageDraw.Draw(canvas)
    margin = 0.75 * p.pitch
    rows = range(max(math.floor((y0 - margin) / p.pitch), 0), math.ceil((y0 + h * mpp + margin) / p.pitch) + 1)
    columns = range(max(math.floor((x0 - margin) / p.pitch) - 1, 0), math.ceil((x0 + w * mpp + margin) / p.pitch) + 1)
    sites = [_site(patient, i, j) for j in rows for i in columns]

    def draw_nuclei(nuclei, epithelial):
        reach = 1.5 * nuclei[:, 2]
        seen = (nuclei[:, 0] > x0 - reach) & (nuclei[:, 0] < x0 + w * mpp + reach)
        seen &= (nuclei[:, 1] > y0 - reach) & (nuclei[:, 1] < y0 + h * mpp + reach)
        nuclei = nuclei[seen]
        along = np.isnan(nuclei[:, 4])
        if along.any():
            ix = np.clip(((nuclei[:, 0] - x0) / (mpp * grid)).astype(int), 0, coarse[0] - 1)
            iy = np.clip(((nuclei[:, 1] - y0) / (mpp * grid)).astype(int), 0, coarse[1] - 1)
            nuclei[along, 4] = fibres[iy, ix][along]
        detail = mpp < 0.35
        outer = _polygons(nuclei, scale, x0, y0, 24 if mpp < 0.12 else 12)
        for row, outline in zip(nuclei, outer, strict=True):
            ink, pale = row[7], row[8] if epithelial else 0.1
            mean = ink * (1 - PALE_SHARE * pale)  # what rim and centre come to, for fields too coarse to show both
            draw.polygon(outline.ravel().tolist(), _ink(ink if detail else mean, 0.25, 0, 0.6 + 0.4 * pale))
            if detail and pale > 0.05:
                middle = row[:2] - (x0, y0)
                inner = (outline - middle * scale) * 0.79 + middle * scale
                draw.polygon(inner.ravel().tolist(), _ink(ink * (1 - PALE * pale), 0.25, 0, 0.6 + 0.4 * pale))
            if detail and epithelial and pale > 0:
                # One nucleolus or three chromocentres of the same area.
                bodies = (0,) if row[9] else (0, 2.1, 4.2)
                r = (0.22 * row[3] + 0.35) / math.sqrt(len(bodies))
                for turn in bodies:
                    away = (0.25 if row[9] else 0.5) * row[3]
                    c = row[:2] + away * np.array([math.cos(row[6] + turn), math.sin(row[6] + turn)]) - (x0, y0)
                    draw.ellipse([*((c - r) * scale), *((c + r) * scale)], _ink(ink * 1.7, 0.4, 0, 0))

    draw_nuclei(np.concatenate([s.stromal for s in sites]), epithelial=False)
    for site in sites:
        for polygon, ink in site.regions:
            draw.polygon(((polygon - (x0, y0)) * scale).ravel().tolist(), _ink(*ink))
    draw_nuclei(np.concatenate([s.epithelial for s in sites]), epithelial=True)
    material = np.asarray(canvas.reduce(over)).astype(np.float32) * np.float32(1 / 255)
    # 3. Texture: collagen strands and chromatin grain.
    corner = (0.5 / grid, 0.5 / grid, w / grid + 0.5 / grid, h / grid + 0.5 / grid)
    fine = Image.fromarray(v.astype(np.float32)).resize(size, Image.Resampling.BICUBIC, box=corner)
    fine = np.asarray(fine)
    low, high = float(fine.min()), float(fine.max())
    mix = np.clip(_noise(key + 2, 30, x0, y0, mpp, size) * 3 - 1, 0, 1)
    strand = _strands(key + 8, fine, mpp, low, high)
    strand += mix * (_strands(key + 16, fine, mpp, low, high) - strand)
    strand = np.clip(strand * (1 + p.looseness) + (0.55 - 0.9 * p.looseness), 0, 1.3)
    eosin = material[..., 1] * (1 + material[..., 2] * (1.25 * strand - 1))
    if mpp < 1.2:
        eosin = eosin * (0.75 + 0.5 * _noise(key + 40, 2.4, x0, y0, mpp, size))
    grain = np.zeros((h, w), np.float32)
    for octave, period in enumerate((0.5, 1.1)):
        if period > 2 * mpp:
            grain += _noise(key + 3 + octave, period, x0, y0, mpp, size) - np.float32(0.5)
    haematoxylin = material[..., 0] * (1 + material[..., 3] * grain * p.grain)
    # 4. Beer-Lambert, light, lens, sensor.
    stain = np.array(p.stain, np.float32) * np.array([[optics.haematoxylin * 1.1], [optics.eosin * 0.55]], np.float32)
    light = np.array(optics.gain, np.float32) * 255
    image = np.empty((h, w, 3), np.float32)
    for c in range(3):
        image[..., c] = np.exp(haematoxylin * (-2.303 * stain[0, c]) - eosin * (2.303 * stain[1, c])) * light[c]
    if optics.vignette:
        fx = ((np.arange(w) + 0.5) / w - 0.5 - optics.off_axis[0]).astype(np.float32) ** 2
        fy = ((np.arange(h) + 0.5) / h - 0.5 - optics.off_axis[1]).astype(np.float32) ** 2
        image *= (1 - optics.vignette * 2 * (fx[None] + fy[:, None]))[..., None]
    if optics.blur / mpp > 0.2:
        blurred = Image.fromarray(np.clip(image + 0.5, 0, 255).astype(np.uint8))
        image = np.asarray(blurred.filter(ImageFilter.GaussianBlur(optics.blur / mpp))).astype(np.float32)
    if optics.noise:
        rng = np.random.default_rng([204, noise_seed])
        image += rng.standard_normal((h, w, 3), np.float32) * np.float32(optics.noise)
    return np.clip(image + np.float32(0.5), 0, 255).astype(np.uint8)


def virtual_field(
    patient: int, magnification: int, k: int, *, seed: int = 0, nested: bool = False
) -> tuple[float, float]:
    """Middle (x, y) in micrometres of a patient's k-th field: on epithelium, where a pathologist takes the picture.

    With `nested` the field lies inside the k-th field at 40X; else every magnification has fields of its own.
    """
    p = virtual_patient(patient)
    anchor = 40 if nested else magnification
    rng = np.random.default_rng([301, seed, patient, anchor, k])
    while True:
        site = _site(patient, *(int(v) for v in rng.integers(10, N_SITES - 10, 2)))
        if site.edge:
            break
    centre = site.centre + _offset(rng, site, anchor)
    if nested and magnification != 40:
        rng = np.random.default_rng([302, seed, patient, magnification, k])
        span = np.array([700, 460]) / 2
        room = span * (native_mpp(40) - native_mpp(magnification))
        i, j = (centre / p.pitch).astype(int)
        near = [_site(patient, a, b) for a in range(i - 5, i + 5) for b in range(j - 4, j + 5)]
        near = [s for s in near if s.edge and (abs(s.centre - centre) < room).all()] or [site]
        site = near[int(rng.integers(len(near)))]
        centre = np.clip(site.centre + _offset(rng, site, magnification), centre - room, centre + room)
    return float(centre[0]), float(centre[1])


def _offset(rng, site, magnification):
    # So spread that glands and nests fill the field with equal shares of white, epithelium and stroma.
    angle = rng.uniform(0, 2 * np.pi)
    r = site.edge + rng.normal(2.8, 4.8) if magnification == 400 else 2.7 * site.edge * math.sqrt(rng.uniform())
    return r * np.array([math.cos(angle), math.sin(angle)])


# -------------------------------------------------------------------------------------------------------- the data set


def _plan(parameters: dict) -> list[dict]:
    """Every image of a data set: its path in the original tree and all that is needed to draw it."""
    images = []
    for number in range(parameters["first_patient"], parameters["first_patient"] + parameters["n_patients"]):
        p = virtual_patient(number)
        kind, kinds = ("malignant", MALIGNANT) if p.label else ("benign", BENIGN)
        code = f"{'M' if p.label else 'B'}_{p.subtype}"
        folder = f"BreaKHis_v1/histology_slides/breast/{kind}/SOB/{kinds[p.subtype]}/SOB_{code}_{p.id}"
        for magnification in parameters["magnifications"]:
            for k in range(parameters["images_per_magnification"]):
                name = f"SOB_{code}-{p.id}-{magnification}-{k + 1:03d}.png"
                path = f"{folder}/{magnification}X/{name}"
                images.append({"path": path, "patient": number, "magnification": magnification, "k": k})
    return images


def _draw(parameters: dict, item: dict) -> np.ndarray:
    seed, number, magnification, k = parameters["seed"], item["patient"], item["magnification"], item["k"]
    width, height = parameters["size"]
    return render_field(
        number,
        native_mpp(magnification) * 700 / width,
        virtual_field(number, magnification, k, seed=seed, nested=parameters["nested"]),
        (width, height),
        _optics(seed, number, magnification, k, parameters["nuisance"]),
        noise_seed=int(np.random.default_rng([205, seed, number, magnification, k]).integers(2**31)),
    )


def _write_png(path: Path, image: np.ndarray) -> None:
    """Write an RGB PNG, whole or not at all: one row filter and run lengths only, three times as fast as Pillow."""
    h, w, _ = image.shape
    flat = image.reshape(h, 3 * w)
    rows = np.empty((h, 1 + 3 * w), np.uint8)
    rows[:, 0] = 2  # PNG's filter "up": the difference to the row above
    rows[0, 1:] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    squeeze = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    data = squeeze.compress(rows) + squeeze.flush()
    head = struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", data), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    _write_whole(path, b"\x89PNG\r\n\x1a\n" + body)


def _write_whole(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    part.write_bytes(data)
    os.replace(part, path)


def _render_share(root: Path, share: int, shares: int):
    """Draw every `shares`-th missing image of the folder's plan; yields once an image."""
    parameters = json.loads((root / SIDECAR).read_text())["parameters"]
    for item in _plan(parameters)[share::shares]:
        path = root / item["path"]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_png(path, _draw(parameters, item))
            yield path


def _render(root: Path, missing: int, workers: int) -> None:
    """Draw what is missing. Workers are fresh interpreters that run this file alone: no torch, no fork, no guard."""
    from tqdm import tqdm

    workers = max(1, min(workers, missing // 8))
    with tqdm(total=missing, desc="virtual slides", unit="image", disable=None) as bar:
        if workers == 1:
            for _ in _render_share(root, 0, 1):
                bar.update()
            return
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        read, write = os.pipe()
        processes = []
        try:
            for share in range(workers):
                command = [sys.executable, "-P", __file__, str(root), str(share), str(workers)]
                processes.append(subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE, env=environment))
            os.close(write)
            with os.fdopen(read, "rb", buffering=0) as drawn:
                while news := drawn.read(4096):  # one byte an image; ends when every worker has ended
                    bar.update(len(news))
            for process in processes:
                error = process.communicate()[1].decode(errors="replace")
                if process.returncode:
                    raise RuntimeError(
                        f"a worker drawing virtual slides in {root} ended with code {process.returncode}; images drawn "
                        f"so far are kept, call again to go on.\n{error[-2000:]}"
                    )
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()


def load_virtual_slides(
    n_patients: int = 40,
    *,
    images_per_magnification: int = 4,
    magnifications: tuple[int, ...] = MAGNIFICATIONS,
    seed: int = 0,
    first_patient: int = 0,
    nuisance: int = 1,
    size: tuple[int, int] = (700, 460),
    nested: bool = False,
    write_to: str | os.PathLike | None = None,
    workers: int | None = None,
):
    """Procedural breast H&E in the form of BreaKHis; needs no download and no network.

    Images are drawn once, as PNG files in BreaKHis' original tree, and read by `load_breakhis`; a cut run goes on where
    it stopped. `virtual_slides.json` at the tree's root records the parameters and the truth about every patient
    (nuclei, architecture, stain) and image (place, session, optics).

    Args:
        n_patients: Number of patients, half of them malignant. Their numbers, which fix class, stain and tissue, are
            `first_patient`, `first_patient + 1`, ...
        images_per_magnification: Images of each patient at each magnification.
        magnifications: Of 40, 100, 200, 400.
        seed: Chooses fields, sessions and optics. A patient's tissue does not depend on it.
        first_patient: First patient number; disjoint ranges are different people.
        nuisance: Strength of stain drift, blur, noise, vignetting and white balance: 0 none, 1 usual, 2 strong.
        size: (width, height) in pixels with BreaKHis' proportions. The field of view stays BreaKHis' own (345 x 227 um
            at 40X), so half the width is twice the um/px.
        nested: Fields at 100X, 200X and 400X lie inside the 40X field of the same sequence number; by default every
            magnification has its own fields.
        write_to: Folder for the tree; default is a folder of the cache (`MAGDG_CACHE`, else
            `~/.cache/magnification_invariant`) named after the parameters.
        workers: Processes that draw; default is one a core. The bytes do not depend on it.

    Returns:
        A `datasets.Dataset` with the columns of `load_breakhis`.

    Raises:
        ValueError: If an argument is out of range.
        FileExistsError: If `write_to` holds slides of other parameters, or a tree that is not ours.
    """
    from magnification_invariant.data.breakhis import load_breakhis

    magnifications = tuple(magnifications)
    if n_patients < 1 or images_per_magnification < 1:
        raise ValueError(
            f"n_patients and images_per_magnification must be 1 or more, got {n_patients}, {images_per_magnification}"
        )
    if first_patient < 0 or seed < 0:
        raise ValueError(f"first_patient and seed must be 0 or more, got {first_patient}, {seed}")
    if not magnifications or set(magnifications) - set(MAGNIFICATIONS):
        raise ValueError(f"magnifications must be some of {MAGNIFICATIONS}, got {magnifications}")
    if nuisance not in (0, 1, 2):
        raise ValueError(f"nuisance must be 0 (none), 1 (usual) or 2 (strong), got {nuisance!r}")
    if size[0] < 32 or abs(size[0] / size[1] * 460 / 700 - 1) > 0.02:
        raise ValueError(
            f"size must be (width, height) in BreaKHis' proportions 700 x 460, such as (350, 230), got {size}"
        )
    parameters = {
        "generator_version": GENERATOR_VERSION,
        "n_patients": int(n_patients),
        "images_per_magnification": int(images_per_magnification),
        "magnifications": sorted(set(magnifications)),
        "seed": int(seed),
        "first_patient": int(first_patient),
        "nuisance": int(nuisance),
        "size": [int(v) for v in size],
        "nested": bool(nested),
    }
    if write_to is None:
        name = hashlib.sha256(json.dumps(parameters).encode()).hexdigest()[:16]
        cache = Path(os.environ.get("MAGDG_CACHE") or "~/.cache/magnification_invariant").expanduser()
        root = cache / "virtual_slides" / name
    else:
        root = Path(write_to).expanduser()
    sidecar = root / SIDECAR
    if sidecar.exists():
        found = json.loads(sidecar.read_text())["parameters"]
        if found != parameters:
            other = {k: found.get(k) for k in parameters if found.get(k) != parameters[k]}
            raise FileExistsError(f"{root} holds virtual slides drawn with {other}; choose another write_to")
    elif (root / "BreaKHis_v1").exists():
        raise FileExistsError(f"{root} holds a tree that was not drawn here (no {SIDECAR}); choose another write_to")
    plan = _plan(parameters)
    if not sidecar.exists():
        root.mkdir(parents=True, exist_ok=True)
        _write_whole(sidecar, json.dumps(_truths(parameters, plan), indent=1).encode())
    missing = sum(not (root / item["path"]).exists() for item in plan)
    if missing:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        _render(root, missing, workers or cores)
    return load_breakhis(root)


def _truths(parameters: dict, plan: list[dict]) -> dict:
    """Content of the sidecar file."""
    seed, numbers = parameters["seed"], sorted({item["patient"] for item in plan})
    images = []
    for item in plan:
        number, magnification, k = item["patient"], item["magnification"], item["k"]
        images.append(
            {
                "filename": item["path"].rsplit("/", 1)[1],
                "patient": virtual_patient(number).id,
                "label": virtual_patient(number).label,
                "magnification": magnification,
                "mpp": native_mpp(magnification) * 700 / parameters["size"][0],
                "centre": virtual_field(number, magnification, k, seed=seed, nested=parameters["nested"]),
                **asdict(_optics(seed, number, magnification, k, parameters["nuisance"])),
            }
        )
    patients = [{"id": virtual_patient(n).id, **asdict(virtual_patient(n))} for n in numbers]
    return {"parameters": parameters, "patients": patients, "images": images}


if __name__ == "__main__":  # a worker of _render
    for _ in _render_share(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])):
        os.write(1, b".")
