"""Whether signatures of different networks chose the same dimensions.

An index names a unit of one network. In another network the unit of that index is the same one only if both started
from the same weights and stayed near them; else units have to be matched by what they respond to. The primary measure
of stability is neither: it is refits on one backbone, `refit_stability`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from magnification_invariant.signatures.embeddings import live_dimensions, read_embeddings
from magnification_invariant.signatures.projector import SignatureProjector
from magnification_invariant.signatures.refits import agreement

SAME_CORRELATION, SAME_SHARE = 0.5, 0.5  # below either, units of one index are not taken for one unit
MATCHED = 0.5  # correlation below which two matched units are not taken for one


class SameUnits(NamedTuple):
    """Whether units of one index are one unit in two networks.

    Attributes:
        correlation: Median over units of the correlation of the two units of that index.
        share: Of units that no unit of the other network correlates with more than the one of their own index.
        comparable: Both are large enough.
    """

    correlation: float
    share: float
    comparable: bool


def unit_correlation(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Correlation of each unit of `a` (n, d) with each of `b` (n, e) over the same images: (d, e); 0 of dead ones."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or len(a) < 3:
        raise ValueError(f"activations of two networks on the same images (>= 3), not {a.shape} and {b.shape}")
    a, b = (np.where(live_dimensions(x), (x - x.mean(0)) / np.maximum(x.std(0), 1e-300), 0) for x in (a, b))
    return a.T @ b / len(a)


def same_units(a: ArrayLike, b: ArrayLike) -> SameUnits:
    """Holds the activations of two networks of one width on the same images against each other, index by index.

    Dimensions that are dead in either are left out.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        raise ValueError(f"networks of different width have no common indices: {a.shape} and {b.shape}")
    live = live_dimensions(a) & live_dimensions(b)
    if not live.any():
        return SameUnits(float("nan"), 0.0, False)
    r = unit_correlation(a[:, live], b[:, live])
    correlation, share = float(np.median(np.diag(r))), float(np.mean(r.argmax(axis=1) == np.arange(len(r))))
    return SameUnits(correlation, share, correlation >= SAME_CORRELATION and share >= SAME_SHARE)


def match_units(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Matches units one to one so that the sum of their correlations is largest (Hungarian method).

    Args:
        a: (n, d) activations on training images.
        b: (n, e) the other network's on the same ones. Labels and signatures have no part in it.

    Returns:
        Pairs (m, 2) of dimensions of `a` and `b`, and their correlations (m,). Dead dimensions have no partner.
    """
    from scipy.optimize import linear_sum_assignment

    r = unit_correlation(a, b)
    pairs = np.stack(linear_sum_assignment(-r), axis=1)
    pairs = pairs[live_dimensions(np.asarray(a))[pairs[:, 0]] & live_dimensions(np.asarray(b))[pairs[:, 1]]]
    return pairs, r[pairs[:, 0], pairs[:, 1]]


@dataclass(frozen=True, eq=False)
class SignedNetwork:
    """A network with its signature, as a finished cell records it.

    Attributes:
        name: What messages call it.
        initial_sha256: Digest of the weights that its training started from.
        embeddings: (n, d) of training images.
        keys: (n,) names of those images.
        signature: (k,) dimensions.
    """

    name: str
    initial_sha256: str
    embeddings: np.ndarray
    keys: np.ndarray
    signature: np.ndarray

    @classmethod
    def from_cell(cls, folder: str | Path) -> "SignedNetwork":
        """Reads a cell's folder.

        Raises:
            FileNotFoundError: It is not finished, or has no signature.
        """
        folder = Path(folder)
        start = json.loads((folder / "config.json").read_text())["start"]
        embeddings, keys = read_embeddings(folder / "embeddings.safetensors", "train")
        chosen = SignatureProjector.from_pretrained(folder / "model").indices
        return cls(folder.name, start["initial_sha256"], embeddings, keys["filename"], chosen)


def compare_networks(a: SignedNetwork, b: SignedNetwork, by: str) -> dict[str, Any]:
    """Compares the signatures of two networks over the training images that both have seen.

    Args:
        a: One network.
        b: The other.
        by: "index", for networks from one initialisation: figures are given only if `same_units` finds them comparable;
            or "matching", for any two: units are matched by `match_units`, pairs below `MATCHED` are left out.

    Returns:
        names, images, and how far units correspond (correlation and share, or correlation and the number matched);
        comparable; sizes of the two signatures and how many of their dimensions are compared (kept); jaccard,
        chance_jaccard and nogueira over live dimensions, None where the two are not comparable.

    Raises:
        ValueError: By index, if their records name different initial weights; or if they share too few images.
    """
    if by not in ("index", "matching"):
        raise ValueError(f"networks are compared by 'index' or 'matching', not {by!r}")
    if by == "index" and a.initial_sha256 != b.initial_sha256:
        raise ValueError(
            f"{a.name} and {b.name} started from different weights ({a.initial_sha256[:8]}, {b.initial_sha256[:8]}): "
            "an index names another unit in each. Compare them by='matching', or refit on one backbone "
            "(refit_stability)"
        )
    common, rows_a, rows_b = np.intersect1d(a.keys, b.keys, return_indices=True)
    if len(common) < 3:
        raise ValueError(
            f"{a.name} and {b.name} share {len(common)} training images: too few to compare their units on"
        )
    x, y = a.embeddings[rows_a], b.embeddings[rows_b]
    if by == "index":
        same = same_units(x, y)
        live = np.flatnonzero(live_dimensions(x) & live_dimensions(y))
        pairs, found = np.stack([live, live], axis=1), same._asdict()
    else:
        pairs, r = match_units(x, y)
        pairs, r = pairs[r >= MATCHED], r[r >= MATCHED]
        found = {"correlation": float(r.mean()) if len(r) else float("nan"), "comparable": bool(len(r))}
    supports = np.stack([np.isin(pairs[:, 0], a.signature), np.isin(pairs[:, 1], b.signature)])
    scores = dict.fromkeys(("jaccard", "chance_jaccard", "nogueira"))
    if found["comparable"]:
        measured = agreement(supports)
        scores = {name: measured[name] for name in scores}
    return {
        "names": [a.name, b.name],
        "by": by,
        "images": len(common),
        "width": x.shape[1],
        "live": len(pairs),
        **found,
        "sizes": [len(a.signature), len(b.signature)],
        "kept": supports.sum(axis=1).tolist(),
        **scores,
    }
