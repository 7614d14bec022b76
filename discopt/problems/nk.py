"""NK landscapes under a budget: every unit's contribution depends on its own level and on those of K others.

Kauffman's model with random neighbours, K setting how rugged it is: 0 is separable, n - 1 has no structure at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from discopt.objective import Losses, Query
from discopt.problem import Problem
from discopt.problems.exact import exhaustive_minimum, how_known
from discopt.space import SearchSpace

MAX_ENTRIES = 1 << 26  # of the table of contributions


def nk(n: int = 16, budget: int = 8, k: int = 3, *, m: int = 2, seed: int = 0) -> Problem:
    """Mean contribution of the units, each uniform in (0, 1), with sum(x) <= budget.

    A budget left unspent is charged, at more than a step can gain, so that the optimum spends all of it. The optimum
    is known while all profiles can be looked at.
    """
    if not 0 <= k < n:
        raise ValueError(f"k must lie from 0 to n - 1 = {n - 1}, got {k}")
    if m < 2 or n * m ** (k + 1) > MAX_ENTRIES:
        raise ValueError(f"expected at least 2 levels and n * m^(k+1) at most {MAX_ENTRIES}, got m = {m} and k = {k}")
    if not 0 < budget <= n * (m - 1):
        raise ValueError(f"budget must lie from 1 to {n * (m - 1)}, got {budget}")
    rng = np.random.default_rng(seed)
    others = np.argsort(rng.random((n, n)) + 2 * np.eye(n), axis=1)[:, :k]  # never the unit itself
    depends = np.hstack([np.arange(n)[:, None], others])
    contribution = rng.random((n, m ** (k + 1)))
    charge = np.bincount(depends.ravel()).max() / n  # no step moves more contributions than this
    space = SearchSpace.build(np.tile(np.arange(m), (n, 1)), budget)
    objective = _NK(depends, contribution, m, budget, float(charge))
    best = exhaustive_minimum(space, lambda x: objective.evaluate(Query(x, 1, 0)))
    return Problem(
        name="nk",
        space=space,
        objective=objective,
        optimum=best[0] if best else None,
        note=f"mean contribution, each of {k + 1} units, plus {charge:.3g} per unspent step; {how_known(best)}",
    )


@dataclass(frozen=True, eq=False)
class _NK:
    depends: NDArray[np.intp]  # (n, K + 1) the units that decide about each contribution
    contribution: NDArray[np.float64]  # (n, m^(K + 1))
    m: int
    budget: int
    charge: float  # loss per unspent step

    def evaluate(self, query: Query) -> Losses:
        n, width = self.depends.shape
        digits = self.m ** np.arange(width)
        index = query.population.astype(np.int64)[:, self.depends] @ digits  # (k, n)
        unspent = self.budget - query.population.sum(axis=1, dtype=np.int64)
        return self.contribution[np.arange(n), index].mean(axis=1) + self.charge * unspent
