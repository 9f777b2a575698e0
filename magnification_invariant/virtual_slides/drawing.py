"""A field of a patient's tissue as a picture: materials on a canvas, texture, Beer-Lambert's law, lens and sensor."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .optics import Optics, native_mpp
from .tissue import N_SITES, PALE, PALE_SHARE, tissue_site, virtual_patient


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
    sites = [tissue_site(patient, i, j) for j in rows for i in columns]

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
        site = tissue_site(patient, *(int(v) for v in rng.integers(10, N_SITES - 10, 2)))
        if site.edge:
            break
    centre = site.centre + _offset(rng, site, anchor)
    if nested and magnification != 40:
        rng = np.random.default_rng([302, seed, patient, magnification, k])
        span = np.array([700, 460]) / 2
        room = span * (native_mpp(40) - native_mpp(magnification))
        i, j = (centre / p.pitch).astype(int)
        near = [tissue_site(patient, a, b) for a in range(i - 5, i + 5) for b in range(j - 4, j + 5)]
        near = [s for s in near if s.edge and (abs(s.centre - centre) < room).all()] or [site]
        site = near[int(rng.integers(len(near)))]
        centre = np.clip(site.centre + _offset(rng, site, magnification), centre - room, centre + room)
    return float(centre[0]), float(centre[1])


def _offset(rng, site, magnification):
    # So spread that glands and nests fill the field with equal shares of white, epithelium and stroma.
    angle = rng.uniform(0, 2 * np.pi)
    r = site.edge + rng.normal(2.8, 4.8) if magnification == 400 else 2.7 * site.edge * math.sqrt(rng.uniform())
    return r * np.array([math.cos(angle), math.sin(angle)])
