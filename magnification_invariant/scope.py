"""Whether an image is like those that a model was trained on.

A network answers anything, a photograph of a cat too. What tells such an image is how unusual the mean and the spread
of every channel of an early stage are (`models.embed`; means over the image's tiles, as embeddings are): their
Mahalanobis distance to the training images, of a covariance shrunk after Ledoit and Wolf (2004). The distances of
images of patients that were not trained on say what is usual, every patient weighing the same: the threshold is their
99 % quantile.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from magnification_invariant.files import whole
from magnification_invariant.hub_files import resolve
from magnification_invariant.metrics import patient_weights
from magnification_invariant.model_folder import damage_of

FILE = "scope.safetensors"
FORMAT = "1"
LEVELS = 1000  # quantiles of the reference that are kept
PERCENT = 99  # of the reference are in scope


@dataclass(frozen=True, eq=False)
class Scope:
    """What statistics of an early stage are usual for one model.

    Attributes:
        stage: Whose statistics they are, as timm's `forward_intermediates` counts.
        mean: (d,) of the training images, float32.
        whitener: (d, d) lower triangular, float32: the inverse of the covariance's Cholesky factor, which makes the
            training images' statistics uncorrelated, of unit variance.
        reference: (`LEVELS`,) distances, float64: the patient-balanced quantiles at 1 / `LEVELS`, 2 / `LEVELS`, ... 1
            of images of patients that were not trained on.
        weights_sha256: Digest of the weights whose statistics they are.
    """

    stage: int
    mean: np.ndarray
    whitener: np.ndarray
    reference: np.ndarray
    weights_sha256: str

    def __post_init__(self):
        d = len(self.mean)
        shapes = {"mean": (d,), "whitener": (d, d), "reference": (LEVELS,)}
        wrong = {name: getattr(self, name).shape for name in shapes if getattr(self, name).shape != shapes[name]}
        if wrong:
            raise ValueError(f"a scope of {d} statistics cannot have {wrong}")
        if not all(np.isfinite(getattr(self, name)).all() for name in shapes):
            raise ValueError("the numbers of a scope must be finite")
        if (np.diff(self.reference) < 0).any():
            raise ValueError("the reference distances of a scope must rise")

    @classmethod
    def fit(
        cls, train: np.ndarray, other: np.ndarray, patient: ArrayLike, *, stage: int, weights_sha256: str
    ) -> "Scope":
        """The scope of a model.

        Args:
            train: (n, d) statistics of the images trained on.
            other: (m, d) of images of patients that were not trained on.
            patient: (m,) of the latter.
            stage: See the class, as `weights_sha256`.

        Raises:
            ValueError: All of `train` are alike, or a statistic is not finite.
        """
        from sklearn.covariance import LedoitWolf

        train = np.asarray(train, np.float64)
        if len(train) < 2 or not train.std(0).any():
            raise ValueError("the early stage says the same of all training images")
        fitted = LedoitWolf().fit(train)
        whitener = np.linalg.inv(np.linalg.cholesky(fitted.covariance_))
        arrays = fitted.location_.astype(np.float32), np.tril(whitener).astype(np.float32)
        distances = cls(stage, *arrays, np.zeros(LEVELS), weights_sha256).distance(other)
        return cls(stage, *arrays, _quantiles(distances, patient_weights(patient)), weights_sha256)

    @property
    def threshold(self) -> float:
        """The largest distance that is in scope."""
        return float(self.reference[PERCENT * LEVELS // 100 - 1])

    def distance(self, statistics: ArrayLike) -> np.ndarray:
        """Mahalanobis distances (n,) of statistics (n, d) to the training images, float64.

        Raises:
            ValueError: They are of another width.
        """
        statistics = np.asarray(statistics, np.float64)
        if statistics.ndim != 2 or statistics.shape[1] != len(self.mean):
            raise ValueError(f"this scope takes statistics (n, {len(self.mean)}), not {statistics.shape}")
        return np.linalg.norm((statistics - self.mean) @ self.whitener.T.astype(np.float64), axis=1)

    def share_out(self, statistics: ArrayLike, patient: ArrayLike) -> float:
        """Share of images (n, d) that are out of scope, every patient (n,) weighing the same."""
        return float(np.average(self.distance(statistics) > self.threshold, weights=patient_weights(patient)))

    def percentile(self, distance: ArrayLike) -> np.ndarray:
        """What percentage of the reference is no farther away, 0 to 100, in steps of 100 / `LEVELS`."""
        return np.searchsorted(self.reference, distance, side="right") * (100 / LEVELS)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes `scope.safetensors` into a folder, beside a model's own files; gives its path."""
        from safetensors.numpy import save_file

        packed = self.whitener[np.tril_indices(len(self.mean))]  # half the size of the square
        arrays = {"mean": self.mean, "whitener": packed, "reference": self.reference}
        about = {"format": FORMAT, "stage": str(self.stage), "weights_sha256": self.weights_sha256}
        with whole(Path(folder) / FILE) as unfinished:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, unfinished, about)
        return Path(folder) / FILE

    @classmethod
    def from_pretrained(cls, repo_or_folder: str | Path, revision: str | None = None) -> "Scope":
        """Reads what `save_pretrained` wrote, from a folder or a Hub repository.

        Raises:
            FileNotFoundError: There is none, or the repository cannot be reached.
            ValueError: The file is damaged, or a later version of this package wrote it: names it, and the way on.
        """
        from safetensors import SafetensorError, safe_open

        file = resolve(str(repo_or_folder), FILE, revision)
        try:
            with safe_open(file, "numpy") as opened:
                about = opened.metadata() or {}
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"{file} {damage_of(file)} ({error}): fetch it again (git lfs pull, magdg pull)"
            ) from error
        if about.get("format") != FORMAT:
            raise ValueError(f"{file} is not of format {FORMAT}: update magnification_invariant, or fetch it again")
        try:
            d = len(arrays["mean"])
            whitener = np.zeros((d, d), np.float32)
            whitener[np.tril_indices(d)] = arrays["whitener"]
            known = arrays["mean"], whitener, arrays["reference"], about["weights_sha256"]
            return cls(int(about["stage"]), *known)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{file} holds no scope ({error}): fetch it again (git lfs pull, magdg pull)") from error


def _quantiles(distances: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The least distances up to which 1 / `LEVELS`, 2 / `LEVELS`, ... 1 of the weight lies (`LEVELS`,)."""
    order = np.argsort(distances)
    share = np.cumsum(weight[order]) / weight.sum()
    levels = np.arange(1, LEVELS + 1) / LEVELS
    at = np.searchsorted(share, levels - 1e-9)  # a sum of weights falls short of its level by rounding
    return distances[order][np.minimum(at, len(order) - 1)]
