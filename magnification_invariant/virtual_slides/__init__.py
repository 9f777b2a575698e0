"""Virtual slides: procedural H&E in micrometres."""

from magnification_invariant.virtual_slides.dataset import load_virtual_slides

__all__ = ["load_virtual_slides"]
