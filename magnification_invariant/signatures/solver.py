"""L1-regularised logistic regression along a path of penalties.

`minimise  sum_i w_i log(1 + exp(-s_i (x_i'c + b))) + penalty * ||c||_1`, s = +-1, weights summing to 1, b unpenalised.

A prox-Newton method: at each penalty the loss is replaced by its quadratic model over a working set, model + L1 norm is
minimised, and a step that lowers the objective is taken, until the optimality (KKT) conditions of the *true* objective
hold to a stated tolerance. Three things make it fast: penalties fall from the largest useful one, each start from the
last solution; the sequential strong rule (Tibshirani et al., JRSS B 74(2), 2012) leaves most columns out, and the
conditions of all columns are checked before a penalty is left; and the curvature is computed once a penalty and used
again until progress slows, since a stale curvature changes the number of steps but not where they end. scikit-learn's
own solver of this kind can replace `_solve` once a released version has it.
"""

import warnings

import numpy as np
from numpy.typing import ArrayLike


def _mean_loss(eta: np.ndarray, y: np.ndarray, weight: np.ndarray) -> float:
    return float(weight @ (np.logaddexp(0, eta) - y * eta))


def _violation(gradient: np.ndarray, coef: np.ndarray, penalty: float) -> float:
    """Largest violation of the KKT conditions, in units of the penalty."""
    inside = np.maximum(np.abs(gradient) - penalty, 0)
    return float(np.max(np.where(coef != 0, np.abs(gradient + penalty * np.sign(coef)), inside), initial=0)) / penalty


def _minimise_model(
    hessian: np.ndarray, linear: np.ndarray, penalty: float, coef: np.ndarray, tol: float
) -> np.ndarray:
    """Minimises `u'Hu/2 - linear'u + penalty ||u||_1` from `coef`, for a positive definite H.

    Given which entries of u are not 0 and their signs, the values solve a linear system. A gradient step from the
    last values says what they may be (a semi-smooth Newton method), which is right after a few rounds or circles. Then
    a feature-sign search (Lee et al., NeurIPS 2006) lowers the model until it is done: it solves for the signs it has,
    goes there or to the best change of sign on the way, and lets others in wherever those are at rest: several at
    once, or, where together they do not lower the model, the first of them. Ends where the KKT conditions of the model
    hold to `tol`.
    """
    from scipy.linalg import cho_factor, cho_solve

    def solved(sign: np.ndarray) -> np.ndarray:
        values, support = np.zeros_like(coef), np.flatnonzero(sign)
        if support.size:
            factor = cho_factor(hessian[np.ix_(support, support)], lower=True, check_finite=False)
            values[support] = cho_solve(factor, linear[support] - penalty * sign[support], check_finite=False)
        return values

    trial, diagonal = coef, np.diag(hessian)
    for _ in range(3):
        step = trial - (hessian @ trial - linear) / diagonal
        trial = solved(np.sign(step) * (np.abs(step) > penalty / diagonal))
        if _violation(hessian @ trial - linear, trial, penalty) <= tol:
            return trial

    coef = min(coef, trial, key=lambda u: u @ (hessian @ u) / 2 - linear @ u + penalty * np.abs(u).sum())
    share = 0.3  # of the largest violation: what enters together with it
    for _ in range(10 * len(coef)):  # it ends long before, if rounding does not stop it
        gradient = hessian @ coef - linear
        if _violation(gradient, coef, penalty) <= tol:
            break
        sign = np.sign(coef)
        if _violation(gradient[sign != 0], coef[sign != 0], penalty) <= tol:
            excess = np.where(sign == 0, np.abs(gradient) - penalty, 0)
            enters = excess >= excess.max() * share
            sign[enters] = -np.sign(gradient[enters])
        change = solved(sign) - coef
        crossing = np.flatnonzero(coef * (coef + change) < 0)
        sizes = np.append(-coef[crossing] / change[crossing], 1.0)
        points = coef[:, None] + sizes * change[:, None]
        points[crossing, np.arange(len(crossing))] = 0.0
        value = sizes * (change @ gradient) + sizes**2 / 2 * (change @ hessian @ change)
        value += penalty * (np.abs(points).sum(axis=0) - np.abs(coef).sum())
        lower = value.min() < 0
        coef, share = (points[:, np.argmin(value)], 0.3) if lower else (coef, 1.0)
    return coef


def _checked(X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """X by columns, y and weights that sum to 1, as float64; else a ValueError."""
    X, y = np.asfortranarray(X, dtype=np.float64), np.asarray(y, np.float64)
    weight = np.ones(y.shape) if sample_weight is None else np.asarray(sample_weight, np.float64)
    if X.ndim != 2 or not X.size or y.shape != X.shape[:1] or weight.shape != y.shape:
        raise ValueError(f"X (n, p), y (n,) and sample_weight (n,) do not fit: {X.shape}, {y.shape}, {weight.shape}")
    if not np.isfinite(X).all() or not np.isfinite(weight).all() or weight.min() < 0 or weight.sum() <= 0:
        raise ValueError("X and sample_weight must be finite, and the weights non-negative with a positive sum")
    weight = weight / weight.sum()
    if not np.isin(y, (0, 1)).all() or len(np.unique(y[weight > 0])) < 2:
        raise ValueError("y must hold 0 and 1, both with weight: one class cannot be told apart")
    return X, y, weight


def l1_logistic_path(
    X: ArrayLike,
    y: ArrayLike,
    lambdas: ArrayLike | None = None,
    *,
    n_lambdas: int = 30,
    ratio: float = 1e-3,
    sample_weight: ArrayLike | None = None,
    tol: float = 1e-4,
    max_iter: int = 200,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Solves L1 logistic regression at falling penalties, with BLAS on one thread: more slow these sizes down.

    Args:
        X: (n, p) features on one scale; p may exceed n.
        y: (n,) labels, 0 or 1, both present.
        lambdas: Penalties in falling order. Default: `n_lambdas` of them, geometric, from the smallest one that keeps
            every coefficient at 0 down to `ratio` times it.
        n_lambdas: Length of the default path.
        ratio: Last over first penalty of the default path.
        sample_weight: (n,) non-negative weights, scaled to sum to 1.
        tol: Largest violation of the KKT conditions at each penalty, in units of that penalty.
        max_iter: Newton steps at one penalty; a ConvergenceWarning follows if they do not suffice.

    Returns:
        lambdas (L,), coefficients (L, p), intercepts (L,). `C = 1 / (n lambda)` in scikit-learn's terms.

    Raises:
        ValueError: On NaN, wrong shapes, one class, or penalties that are not positive and falling.
    """
    from sklearn import config_context
    from threadpoolctl import threadpool_limits

    X, y, weight = _checked(X, y, sample_weight)
    with threadpool_limits(1, "blas"), config_context(skip_parameter_validation=True):
        largest = np.abs(X.T @ (weight * (weight @ y - y))).max()
        if lambdas is None:
            if not largest > 1e-12 * np.abs(X).max():
                raise ValueError("no feature varies with y at all, so there is no path; are the features constant?")
            lambdas = largest * np.geomspace(1, ratio, n_lambdas)
        lambdas = np.asarray(lambdas, np.float64)
        if lambdas.ndim != 1 or not (lambdas > 0).all() or not (np.diff(lambdas) < 0).all():
            raise ValueError("lambdas must be positive and falling")
        return lambdas, *_path(X, y, weight, lambdas, tol, max_iter)


def _path(X, y, weight, lambdas, tol, max_iter) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients (L, p) and intercepts (L,) at falling penalties, each started from the one before."""
    from scipy.special import expit

    rate = weight @ y
    gradient = X.T @ (weight * (rate - y))
    coef, intercept = np.zeros(X.shape[1]), np.log(rate / (1 - rate))
    eta = np.full(len(y), intercept)
    coefs, intercepts = np.zeros((len(lambdas), X.shape[1])), np.zeros(len(lambdas))
    last = max(np.abs(gradient).max(), lambdas[0])
    for step, penalty in enumerate(lambdas):
        working = (coef != 0) | (np.abs(gradient) >= 2 * penalty - last)
        for _ in range(X.shape[1] + 1):
            index = np.flatnonzero(working)
            start = coef[index], intercept, eta
            coef[index], intercept, eta = _solve(X[:, index], y, weight, penalty, start, tol, max_iter)
            gradient = X.T @ (weight * (expit(eta) - y))
            missed = ~working & (np.abs(gradient) > penalty * (1 + tol))
            if not missed.any():
                break
            working |= missed
        coefs[step], intercepts[step], last = coef, intercept, penalty
    return coefs, intercepts


def _solve(X, y, weight, penalty, start, tol, max_iter):
    """Minimises the objective at one penalty over the columns of X (n, k), from and to coef, intercept, X coef + b."""
    from scipy.special import expit
    from sklearn.exceptions import ConvergenceWarning

    coef, intercept, eta = start
    objective = _mean_loss(eta, y, weight) + penalty * np.abs(coef).sum()
    before, curvature = np.inf, None
    for _ in range(max_iter):
        prob = expit(eta)
        residual = weight * (prob - y)
        gradient, slope = X.T @ residual, residual.sum()
        violation = max(_violation(gradient, coef, penalty), abs(slope) / penalty)
        if violation <= tol:
            return coef, intercept, eta
        if curvature is None or violation > before / 4:
            # The intercept is eliminated from the quadratic model, which leaves a problem in the coefficients alone.
            curvature = weight * np.maximum(prob * (1 - prob), 1e-10)
            total = curvature.sum()
            scaled = np.sqrt(curvature)[:, None] * X
            cross = X.T @ curvature
            hessian = scaled.T @ scaled
            ridge = 1e-9 * np.trace(hessian) / max(len(hessian), 1) + 1e-300
            hessian -= np.outer(cross, cross / total)
            hessian[np.diag_indices_from(hessian)] += ridge  # positive definite also for copies of a column
        before = violation
        if len(coef):
            target = hessian @ coef - gradient + cross * (slope / total)
            change = _minimise_model(hessian, target, penalty, coef, max(violation / 10, tol / 3)) - coef
        else:
            change = np.zeros(0)
        shift = -(slope + cross @ change) / total
        direction = X @ change + shift
        drop = gradient @ change + slope * shift + penalty * (np.abs(coef + change).sum() - np.abs(coef).sum())
        size = 1.0
        while size > 1e-10:
            trial = eta + size * direction
            value = _mean_loss(trial, y, weight) + penalty * np.abs(coef + size * change).sum()
            if value <= objective + 1e-4 * size * min(drop, 0) + 1e-15:
                break
            size /= 2
        coef, intercept, eta, objective = coef + size * change, intercept + size * shift, trial, value
    warnings.warn(
        f"the KKT conditions at penalty {penalty:.3g} hold to {violation:.1e} of it, not to {tol:.1e}, after "
        f"{max_iter} steps; raise max_iter or tol, or end the path earlier",
        ConvergenceWarning,
        stacklevel=4,
    )
    return coef, intercept, eta
