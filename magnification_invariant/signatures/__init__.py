"""Sparse signatures: the solver, the estimator, its stability and the frozen projector that is shared."""

from importlib import import_module

_PUBLIC = {
    "l1_logistic_path": "solver",
    "SparseSignature": "sparse_signature",
    "size_at_loss": "sparse_signature",
    "write_embeddings": "embeddings",
    "read_embeddings": "embeddings",
    "about_embeddings": "embeddings",
    "live_dimensions": "embeddings",
    "SignatureProjector": "projector",
    "weights_digest": "projector",
    "agreement": "refits",
    "refit_stability": "refits",
    "refit_supports": "refits",
    "stability_selection": "stable_selection",
    "match_units": "networks",
    "same_units": "networks",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str):
    # scikit-learn is imported only by those who fit a signature.
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
