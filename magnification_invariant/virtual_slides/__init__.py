"""Virtual slides: procedural H&E in micrometres. They teach and test software; they are no evidence about patients."""

from .dataset import GENERATOR_VERSION, SIDECAR, Cohort, draw_slides
from .drawing import render_field, virtual_field
from .optics import Optics, native_mpp, virtual_optics
from .tissue import YEAR, Patient, virtual_patient

__all__ = [
    "GENERATOR_VERSION",
    "SIDECAR",
    "YEAR",
    "Cohort",
    "Optics",
    "Patient",
    "draw_slides",
    "native_mpp",
    "render_field",
    "virtual_field",
    "virtual_optics",
    "virtual_patient",
]
