"""Feature selection for a ridge regression on scikit-learn's diabetes data: a real problem that is noisy by itself.

Units are features, level 1 is "in the model", and the budget is their number. Fidelity is how many of the 442
patients are looked at; the more, the less the loss depends on which. Needs scikit-learn (extra `bench`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from discopt.objective import Losses, Query
from discopt.problem import Problem
from discopt.problems.exact import exhaustive_minimum, how_known
from discopt.space import SearchSpace

PATIENTS = 442
FOLDS = 5
MIN_ROWS = 10 * FOLDS


def feature_selection(features: int = 8, *, degree: int = 2, ridge: float = 1.0) -> Problem:
    """Cross-validated squared error of a ridge regression on at most `features` features, over the target's variance.

    `degree` 1 has the 10 measured features and a known optimum (at all 442 rows), 2 adds squares and products, 65 in
    all. Losses are (k, 5), one per fold. Raises ImportError with what to install if scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_diabetes
        from sklearn.preprocessing import PolynomialFeatures
    except ImportError as error:
        raise ImportError("feature selection needs scikit-learn: pip install 'discopt-search[bench]'") from error
    if degree not in (1, 2):
        raise ValueError(f"degree must be 1 or 2, got {degree}")
    if not ridge > 0:
        raise ValueError(f"ridge must be above 0, got {ridge}")
    data = load_diabetes()
    polynomial = PolynomialFeatures(degree, include_bias=False)
    X = _standard(polynomial.fit_transform(data.data))
    names = [name.replace(" ", "*") for name in polynomial.get_feature_names_out(data.feature_names)]
    if not 0 < features < len(names):
        raise ValueError(f"features must lie between 0 and {len(names)}, got {features}")
    space = SearchSpace.cardinality(len(names), features, names=names)
    order = np.random.default_rng(0).permutation(len(X))
    objective = _Ridge(X[order], _standard(data.target[order]), ridge)
    best = exhaustive_minimum(space, lambda x: objective.evaluate(Query(x, len(X), 0)).mean(axis=1))
    return Problem(
        name="feature-selection",
        space=space,
        objective=objective,
        optimum=best[0] if best else None,
        note=f"squared error in {FOLDS}-fold cross-validation, 1 being that of the mean; {how_known(best)}",
        fidelity=PATIENTS,
    )


@dataclass(frozen=True, eq=False)
class _Ridge:
    X: NDArray[np.float64]  # (N, p) standardised
    y: NDArray[np.float64]  # (N,) standardised
    ridge: float

    def evaluate(self, query: Query) -> Losses:
        if not MIN_ROWS <= query.fidelity <= len(self.y):
            raise ValueError(f"fidelity must be from {MIN_ROWS} to {len(self.y)} rows, got {query.fidelity}")
        kept = query.population != 0  # (k, p)
        folds = self._folds(query.fidelity, query.seed)
        return np.stack([self._error(kept, folds, held_out) for held_out in range(FOLDS)], axis=1)

    def _folds(self, rows: int, seed: int) -> list[NDArray[np.intp]]:
        """Rows drawn without replacement, about equally many from each of the five parts of the data."""
        rng = np.random.default_rng(seed)
        parts = np.array_split(np.arange(len(self.y)), FOLDS)
        sizes = [len(part) for part in np.array_split(np.arange(rows), FOLDS)]
        return [np.sort(rng.permutation(part)[:size]) for part, size in zip(parts, sizes, strict=True)]

    def _error(self, kept: NDArray[np.bool_], folds: list[NDArray[np.intp]], held_out: int) -> Losses:
        """Mean squared error on one fold of the models trained on the others, (k,)."""
        train = np.concatenate([rows for fold, rows in enumerate(folds) if fold != held_out])
        X, y = self.X[train], self.y[train]
        X_mean, y_mean = X.mean(axis=0), y.mean()
        X, y = X - X_mean, y - y_mean
        p = X.shape[1]
        # (X'X + ridge I) w = X'y on the kept features; a row and column of I keeps the others at w = 0
        A = np.where(kept[:, :, None] & kept[:, None, :], X.T @ X, 0.0)
        A[:, np.arange(p), np.arange(p)] += np.where(kept, self.ridge, 1.0)
        b = np.where(kept, X.T @ y, 0.0)
        w = np.linalg.solve(A, b[:, :, None])[:, :, 0]  # (k, p)
        test = folds[held_out]
        residual = (self.y[test] - y_mean) - w @ (self.X[test] - X_mean).T  # (k, rows)
        return (residual**2).mean(axis=1)


def _standard(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return (values - values.mean(axis=0)) / values.std(axis=0)
