"""Sparse signatures: the solver, the estimator, its stability and the frozen projector that is shared."""

from importlib import import_module

_MODULES = {
    "solver": ["l1_logistic_path"],
    "sparse_signature": ["NothingToSelect", "SparseSignature", "live_dimensions", "size_at_loss"],
    "projector": ["SignatureProjector", "weights_digest"],
    "refits": ["agreement", "halves", "refit_stability", "refit_supports"],
}

__all__ = [name for names in _MODULES.values() for name in names]


def __getattr__(name: str):
    # scikit-learn is imported only by those who fit a signature.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
