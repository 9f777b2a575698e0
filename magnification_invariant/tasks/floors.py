"""Floors: predictors that train no network. They stand in every table, for a method to be better."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from magnification_invariant import metrics
from magnification_invariant.data.pixels import ViewCache
from magnification_invariant.data.vectors import VectorCache

Predictor = Callable[[np.ndarray], np.ndarray]  # rows of the cache (n,) to log odds of the second class (n,)
PENALTIES = np.geomspace(1e-1, 1e4, 11)  # of `l2`, in units of an image's log-loss


class Labelled(NamedTuple):
    """Rows of a cache (n,), their labels (n,), 0 or 1, and their weights (n,), with which every patient weighs 1."""

    rows: np.ndarray
    label: np.ndarray
    weight: np.ndarray


def constant(views: ViewCache | VectorCache, train: Labelled, val: Labelled) -> Predictor:
    """The same probability for every image: the weighted share of the second class in training."""
    share = np.average(train.label, weights=train.weight)
    return lambda rows: np.full(len(rows), np.log(share / (1 - share)))


def l2(views: VectorCache, train: Labelled, val: Labelled) -> Predictor:
    """L2-penalised logistic regression on vectors, standardised by the training rows, to convergence.

    Of `PENALTIES` the one with the least weighted log-loss of the validation patients; its temperature is fitted on
    them too, as that of every network.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    vectors = views.vectors.cpu().numpy().astype(np.float64)
    scaler = StandardScaler().fit(vectors[train.rows], sample_weight=train.weight)
    x, held_out = scaler.transform(vectors[train.rows]), scaler.transform(vectors[val.rows])
    weight = train.weight * len(train.rows) / train.weight.sum()
    model, best = LogisticRegression(max_iter=2000, warm_start=True), (np.inf, None, None, None)
    for penalty in sorted(PENALTIES, reverse=True):
        model.set_params(C=1 / penalty).fit(x, train.label, sample_weight=weight)
        score = model.decision_function(held_out)
        loss = np.average(np.logaddexp(0, np.where(val.label == 1, -score, score)), weights=val.weight)
        if loss < best[0]:
            best = loss, model.coef_[0].copy(), model.intercept_[0], score
    _, coef, intercept, score = best
    logits = np.stack([np.zeros_like(score), score], 1)
    temperature = metrics.fit_temperature(logits, val.label, sample_weight=val.weight)
    return lambda rows: (scaler.transform(vectors[rows]) @ coef + intercept) / temperature


def colour(views: ViewCache, train: Labelled, val: Labelled) -> Predictor:
    """A logistic regression on what an image's stain alone tells."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(_colour_statistics(views, train.rows), train.label, logisticregression__sample_weight=train.weight)
    return lambda rows: model.decision_function(_colour_statistics(views, rows))


def _colour_statistics(views: ViewCache, rows: np.ndarray) -> np.ndarray:
    """Mean, spread and skewness of each colour channel's optical density (n, 9)."""

    def of_image(tiles: np.ndarray) -> np.ndarray:
        density = -np.log((tiles.transpose(1, 0, 2, 3).reshape(3, -1) + 1.0) / 256)
        mean, spread = density.mean(1), density.std(1) + 1e-6
        skewness = (((density - mean[:, None]) / spread[:, None]) ** 3).mean(1)
        return np.concatenate([mean, spread, skewness])

    return np.stack([of_image(tiles) for tiles in views.views(rows)])


FLOORS: dict[str, Callable[..., Predictor]] = {"constant": constant, "colour": colour, "l2": l2}
OF_IMAGES, OF_VECTORS = ("constant", "colour"), ("constant", "l2")  # which stand in the tables of each
READ_IMAGES = frozenset({"colour"})
