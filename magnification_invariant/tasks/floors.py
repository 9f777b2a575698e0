"""Floors: predictors that need no network and see no tissue. They stand in every table, for a method to be better."""

from collections.abc import Callable

import numpy as np

from magnification_invariant.data.pixels import ViewCache

Predictor = Callable[[np.ndarray], np.ndarray]  # rows of the cache (n,) to log odds of the second class (n,)


def constant(views: ViewCache, rows: np.ndarray, label: np.ndarray, weight: np.ndarray) -> Predictor:
    """The same probability for every image: the weighted share of the second class in training."""
    share = np.average(label, weights=weight)
    return lambda rows: np.full(len(rows), np.log(share / (1 - share)))


def colour(views: ViewCache, rows: np.ndarray, label: np.ndarray, weight: np.ndarray) -> Predictor:
    """A logistic regression on what an image's stain alone tells."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(_colour_statistics(views, rows), label, logisticregression__sample_weight=weight)
    return lambda rows: model.decision_function(_colour_statistics(views, rows))


def _colour_statistics(views: ViewCache, rows: np.ndarray) -> np.ndarray:
    """Mean, spread and skewness of each colour channel's optical density (n, 9)."""

    def of_image(tiles: np.ndarray) -> np.ndarray:
        density = -np.log((tiles.transpose(1, 0, 2, 3).reshape(3, -1) + 1.0) / 256)
        mean, spread = density.mean(1), density.std(1) + 1e-6
        skewness = (((density - mean[:, None]) / spread[:, None]) ** 3).mean(1)
        return np.concatenate([mean, spread, skewness])

    return np.stack([of_image(tiles) for tiles in views.views(rows)])


# Each is fitted on training rows (n,) of the cache, their labels (n,), 0 or 1, and weights (n,).
FLOORS: dict[str, Callable[..., Predictor]] = {"constant": constant, "colour": colour}
READ_IMAGES = frozenset({"colour"})
