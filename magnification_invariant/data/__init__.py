"""Images in, rows and pixels out: tables of images, patient-disjoint splits, decoded pixels, augmentation.

Names are imported when they are first used, so that importing the package costs neither torch nor datasets.
"""

from importlib import import_module

_PUBLIC = {
    "load_breakhis": "breakhis",
    "load_virtual_slides": "virtual",
    "load_table": "table",
    "load_embeddings": "vectors",
    "describe": "table",
    "verify": "verification",
    "Split": "splits",
    "Folds": "splits",
    "deal_folds": "splits",
    "leave_one_domain_out": "splits",
    "leave_one_magnification_out": "splits",
    "assert_disjoint": "splits",
    "rescale": "scale",
    "digital_zoom": "scale",
    "read_mpp": "stated_scale",
    "PixelCache": "pixels",
    "ViewCache": "pixels",
    "VectorCache": "vectors",
    "show": "views",
    "view_mpp": "views",
    "cache_height": "views",
    "random_view": "views",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
