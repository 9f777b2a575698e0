"""SparseSignature: which dimensions of an embedding carry the diagnosis, as a scikit-learn estimator."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_expit
from sklearn.base import BaseEstimator, ClassifierMixin, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data
from threadpoolctl import threadpool_limits

from magnification_invariant.signatures.projector import probabilities
from magnification_invariant.signatures.solver import l1_logistic_path


def live_dimensions(X: np.ndarray) -> np.ndarray:
    """Which columns of X (n, d) vary at all: a column is dead if float32 would not see it vary."""
    return X.std(axis=0, dtype=np.float64) > 1e-6 * np.abs(X).max(axis=0)


class NothingToSelect(ValueError):
    """The embedding has collapsed: no dimension tells anything."""


class SparseSignature(ClassifierMixin, OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """L1-regularised logistic regression on standardised embeddings; its support is the signature.

    The penalty is the largest whose log-loss lies within one standard error of the smallest (Breiman et al. 1984). The
    loss is that of patients that the coefficients have not seen, every patient weighing the same: the validation part
    handed to `fit`, or patient-grouped cross-validation with the scaling refitted in every fold.

    Args:
        n_lambdas: Penalties on the path.
        ratio: Last over first penalty of the path; the first one keeps every coefficient at 0.
        cv: Folds of the cross-validation that is used where `fit` gets no validation part.
        lambda_fraction: Fixes the penalty to this fraction of the first one: refits then differ in their data alone.
        tol: KKT tolerance of the solver, in units of the penalty.
        random_state: Seed of the deal of patients into folds.

    Attributes:
        classes_: (2,) labels; the second is the positive one.
        mean_, scale_: (d,) standardisation; dead dimensions have scale 1.
        live_: (d,) which dimensions vary at all. Dead ones never enter the signature.
        n_live_: Number of live dimensions.
        lambdas_: (L,) penalties, falling.
        path_coef_, path_intercept_: (L, d) and (L,).
        path_size_: (L,) size of the signature at each penalty.
        validation_loss_, validation_se_: (L,) patient-balanced log-loss in nats and its standard error over patients;
            None under `lambda_fraction`.
        lambda_, lambda_fraction_: The chosen penalty, and as a fraction of the first.
        coef_, intercept_: (1, d) and (1,), acting on standardised embeddings.
        signature_: (k,) indices of the chosen dimensions, rising. It can be empty, where nothing beats the base rate.
    """

    def __init__(
        self,
        n_lambdas: int = 30,
        ratio: float = 1e-3,
        cv: int = 5,
        lambda_fraction: float | None = None,
        tol: float = 1e-4,
        random_state: int = 0,
    ):
        self.n_lambdas = n_lambdas
        self.ratio = ratio
        self.cv = cv
        self.lambda_fraction = lambda_fraction
        self.tol = tol
        self.random_state = random_state

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        groups: ArrayLike | None = None,
        X_val: ArrayLike | None = None,
        y_val: ArrayLike | None = None,
        groups_val: ArrayLike | None = None,
    ) -> "SparseSignature":
        """Fits the path, chooses the penalty and keeps both.

        Args:
            X: (n, d) training embeddings.
            y: (n,) labels.
            groups: (n,) patient of each row; None makes every row its own patient.
            X_val: (m, d) embeddings of validation patients, with `y_val` and `groups_val` (m,); None cross-validates.
            y_val: Their labels.
            groups_val: Their patients.

        Raises:
            NothingToSelect: No dimension varies, or none differs between the classes.
            ValueError: On NaN, one class, too few patients for the folds, labels that training has not, or columns of
                other lengths.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        if (kind := type_of_target(y, input_name="y", raise_unknown=True)) != "binary":
            raise ValueError(f"Only binary classification is supported. The type of the target is {kind}.")
        self._check_parameters()
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"a signature tells classes apart, and y holds one class: {self.classes_.tolist()}")
        patients = _patient_codes(groups, len(y), "groups")

        with threadpool_limits(1, "blas"):
            self.mean_, self.scale_, self.live_ = _scaling(X)
            self.n_live_ = int(self.live_.sum())
            if not self.n_live_:
                raise NothingToSelect(f"all {X.shape[1]} dimensions are constant over the {len(X)} rows")
            scaled = self._scale(X)
            largest = float(np.abs(scaled.T @ (codes - codes.mean())).max()) / len(codes)
            if not largest > 1e-12:
                raise NothingToSelect("no dimension differs between the classes, so there is no path of penalties")
            end, length = self.ratio, self.n_lambdas
            if self.lambda_fraction is not None:  # as many warm starts on the way as the default path would take
                end = self.lambda_fraction
                length = max(2, round(self.n_lambdas * np.log(end) / np.log(self.ratio)))
            self.lambdas_ = largest * np.geomspace(1, end, length) if end < 1 else np.array([largest])
            self.path_coef_, self.path_intercept_ = self._paths(scaled, codes)
            self.path_size_ = (self.path_coef_ != 0).sum(axis=1)
            self._choose(X, codes, patients, X_val, y_val, groups_val)

        self.lambda_ = float(self.lambdas_[self._chosen])
        self.lambda_fraction_ = self.lambda_ / largest
        self.coef_, self.intercept_ = self.path_coef_[[self._chosen]], self.path_intercept_[[self._chosen]]
        self.signature_ = np.flatnonzero(self.coef_[0])
        return self

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def _check_parameters(self) -> None:
        if not (self.n_lambdas >= 2 and 0 < self.ratio < 1 and self.cv >= 2 and self.tol > 0):
            raise ValueError(f"n_lambdas and cv must be at least 2, 0 < ratio < 1 and tol > 0, not as in {self}")
        if self.lambda_fraction is not None and not 0 < self.lambda_fraction <= 1:
            raise ValueError(f"lambda_fraction must lie in (0, 1], not {self.lambda_fraction}")

    def _scale(self, X: np.ndarray) -> np.ndarray:
        return (X - self.mean_) / self.scale_ * self.live_

    def _paths(self, scaled: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Solves the path on standardised rows; dead columns are 0 and stay out by themselves."""
        return l1_logistic_path(np.asfortranarray(scaled), codes == 1, self.lambdas_, tol=self.tol)[1:]

    def _choose(self, X, codes, patients, X_val, y_val, groups_val) -> None:
        """Sets the place on the path from the losses of patients that were held out."""
        self.validation_loss_ = self.validation_se_ = None
        if self.lambda_fraction is not None:
            self._chosen = len(self.lambdas_) - 1
            return
        if X_val is not None:
            X_val, codes = self._known(X_val, y_val, "y_val")
            held_out = _patient_codes(groups_val, len(codes), "groups_val")
            if held_out.max() < 1:
                raise ValueError("choosing a penalty takes at least two validation patients")
            losses = _patient_losses(self._scale(X_val), codes, held_out, self.path_coef_, self.path_intercept_)
        else:
            losses = self._cross_validate(X, codes, patients)
        loss, se = losses.mean(axis=0), losses.std(axis=0, ddof=1) / np.sqrt(len(losses))
        best = int(np.argmin(loss))
        within = loss <= loss[best] + se[best]
        self._chosen = int(np.argmax(within))
        self.validation_loss_, self.validation_se_ = loss, se

    def loss_curve(self, X: ArrayLike, y: ArrayLike, groups: ArrayLike | None = None) -> np.ndarray:
        """Log-loss in nats of other patients, each weighing the same, at every point of the path: (L,).

        With `path_size_`, the curve by which methods are compared: the training patients also trained the network.
        """
        check_is_fitted(self)
        X, codes = self._known(X, y, "y")
        patients = _patient_codes(groups, len(codes), "groups")
        return _patient_losses(self._scale(X), codes, patients, self.path_coef_, self.path_intercept_).mean(axis=0)

    def _known(self, X: ArrayLike, y: ArrayLike, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Checked rows of other patients, and their class indices."""
        rows, y = validate_data(self, X, y, dtype=np.float64, reset=False)
        if not np.isin(y, self.classes_).all():
            raise ValueError(f"{name} holds labels that training has not: {np.setdiff1d(y, self.classes_).tolist()}")
        return np.asarray(rows), np.searchsorted(self.classes_, y)

    def _cross_validate(self, X: np.ndarray, codes: np.ndarray, patients: np.ndarray) -> np.ndarray:
        """Log-loss of each patient at each penalty, (patients, L), from a path that has not seen the patient."""
        fold = _deal(codes, patients, self.cv, self.classes_, self.random_state)
        losses = np.empty((patients.max() + 1, len(self.lambdas_)))
        inner = SparseSignature(tol=self.tol)
        inner.classes_, inner.lambdas_ = self.classes_, self.lambdas_
        for k in range(self.cv):
            held_out = (fold == k)[patients]
            inner.mean_, inner.scale_, inner.live_ = _scaling(X[~held_out])
            path = inner._paths(inner._scale(X[~held_out]), codes[~held_out])
            _, row = np.unique(patients[held_out], return_inverse=True)
            losses[fold == k] = _patient_losses(inner._scale(X[held_out]), codes[held_out], row, *path)
        return losses

    def _scores(self, X: ArrayLike) -> np.ndarray:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return self._scale(X) @ self.coef_.T + self.intercept_

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        """Log-odds of the second class, (n,)."""
        return self._scores(X)[:, 0]

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """Class probabilities (n, 2), in the order of `classes_`."""
        return probabilities(self._scores(X))

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Most probable class of each row, (n,)."""
        best = self.predict_proba(X).argmax(axis=1)
        return self.classes_[best]

    def transform(self, X: ArrayLike) -> np.ndarray:
        """Signatures (n, k): the standardised values of the chosen dimensions."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return ((X - self.mean_) / self.scale_)[:, self.signature_]

    def get_feature_names_out(self, input_features: ArrayLike | None = None) -> np.ndarray:
        """Names of the chosen dimensions, (k,): of the training data frame, of `input_features`, or x0, x1, ..."""
        return np.asarray(super().get_feature_names_out(input_features))[self.signature_]


def _scaling(X: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation (1 for the dead) and liveness of each column."""
    live = live_dimensions(X)
    return X.mean(axis=0), np.where(live, X.std(axis=0), 1.0), live


def size_at_loss(sizes: ArrayLike, losses: ArrayLike, loss: float) -> int | None:
    """Smallest signature on a path whose held-out log-loss is at most `loss`; None if none reaches it.

    Methods are compared so, at one loss in nats that all reach. `sizes` (L,) are a `path_size_`, `losses` (L,) a
    `loss_curve`.
    """
    sizes, losses = np.asarray(sizes), np.asarray(losses)
    return int(sizes[losses <= loss].min()) if (losses <= loss).any() else None


def _patient_codes(groups: ArrayLike | None, n_rows: int, name: str) -> np.ndarray:
    if groups is None:
        return np.arange(n_rows)
    groups = np.asarray(groups)
    if groups.shape != (n_rows,):
        raise ValueError(f"{name} must give one patient to each of the {n_rows} rows, not have shape {groups.shape}")
    return np.unique(groups, return_inverse=True)[1]


def _deal(codes: np.ndarray, patients: np.ndarray, n_folds: int, classes: np.ndarray, seed: int) -> np.ndarray:
    """Fold (patients,) of each patient: dealt class by class, so that no class leaves training with one of its two."""
    counts = np.zeros((patients.max() + 1, len(classes)))
    np.add.at(counts, (patients, codes), 1)
    if len(counts) < n_folds:
        raise ValueError(f"{n_folds} folds need as many patients, and there are {len(counts)}; lower cv")
    scarce = np.flatnonzero((counts > 0).sum(axis=0) < 2)
    if scarce.size:
        raise ValueError(
            f"class {classes[scarce[0]]!r} has a single patient, who cannot both train and validate; "
            "pass a validation part or lambda_fraction"
        )
    order = np.random.default_rng(seed).permutation(len(counts))
    order = order[np.argsort(counts.argmax(axis=1)[order], kind="stable")]
    fold = np.empty(len(counts), int)
    fold[order] = np.arange(len(counts)) % n_folds
    return fold


def _patient_losses(scaled, codes, patients, coef, intercept) -> np.ndarray:
    """Mean log-loss in nats of each patient's rows at each point of a path: (patients, L).

    Of standardised rows (m, d), class and patient indices (m,), coefficients (L, d) and intercepts (L,).
    """
    losses = -log_expit(np.where(codes == 1, 1, -1)[:, None] * (scaled @ coef.T + intercept))
    return np.stack([np.bincount(patients, loss) for loss in losses.T], axis=1) / np.bincount(patients)[:, None]
