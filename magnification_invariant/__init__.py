"""Histopathology classifiers that keep working at a magnification they never saw.

Importing the package registers its models with timm; every other public name is imported when it is first used.
"""

from importlib import import_module

from magnification_invariant import models as _models  # noqa: F401  (registers the models with timm)
from magnification_invariant._version import __version__

_PUBLIC = {
    "load_breakhis": "data",
    "load_table": "data",
    "load_virtual_slides": "data",
    "load_embeddings": "data",
    "leave_one_magnification_out": "data",
    "leave_one_domain_out": "data",
    "assert_disjoint": "data",
    "PixelCache": "data",
    "add_domain_head": "models",
    "forward_domains": "models",
    "grad_reverse": "models",
    "dann_coeff": "models",
    "SparseSignature": "signatures",
    "fit": "engine",
    "load_vector_model": "model_folder",
    "Classifier": "predict",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
