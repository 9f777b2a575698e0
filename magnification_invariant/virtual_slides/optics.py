"""What the laboratory and the microscope add to a field: stain drift, light, blur and noise, blind to the class."""

import math
from dataclasses import dataclass

import numpy as np

MAGNIFICATIONS = (40, 100, 200, 400)
SESSIONS = 12  # microscope sessions of a data set


def native_mpp(magnification: int) -> float:
    """Micrometres per pixel of the 700 px wide images: 6.5 / (3.3 x objective), objective = magnification / 10."""
    return 6.5 / (3.3 * magnification / 10)


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


def virtual_optics(seed: int, patient: int, magnification: int, k: int, strength: int) -> Optics:
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
