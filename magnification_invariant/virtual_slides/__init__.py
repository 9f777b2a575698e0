"""Virtual slides: procedural H&E in micrometres. They teach and test software; they are no evidence about patients."""

from .dataset import GENERATOR_VERSION as GENERATOR_VERSION
from .dataset import SIDECAR as SIDECAR
from .dataset import Cohort as Cohort
from .dataset import draw_slides as draw_slides
from .drawing import render_field as render_field
from .drawing import virtual_field as virtual_field
from .optics import Optics as Optics
from .optics import native_mpp as native_mpp
from .optics import virtual_optics as virtual_optics
from .tissue import YEAR as YEAR
from .tissue import Patient as Patient
from .tissue import virtual_patient as virtual_patient
