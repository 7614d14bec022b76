"""Optima proved by a price, at any size.

The profile that minimises loss + price * cost is the best of all profiles that cost no more than it does (Everett,
"Generalized Lagrange multiplier method for solving problems of optimum allocation of resources", Operations Research
1963). So a problem whose priced loss is easy to minimise has a known optimum once its budget is that profile's cost.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from discopt.space import Ints

HALVINGS = 24  # of the interval of prices

Profile = NDArray[np.integer]


def dearest_within(minimise: Callable[[float], Profile], cost: Ints, budget: Ints) -> Profile:
    """The answer of `minimise(price)` at the lowest price that keeps the budgets: cost (r, n, m), budget (r,) -> (n,).

    `minimise` returns a profile (n,) with the lowest loss + price * relative_cost. Raises ValueError where none keeps
    the budgets.
    """

    def keeps(profile: Profile) -> bool:
        return bool((total_cost(cost, profile) <= budget).all())

    best = minimise(0.0)
    if keeps(best):
        return best
    low, high = 0.0, 1.0
    while not keeps(best := minimise(high)):
        low, high = high, 4 * high
        if high > 1e30:
            raise ValueError(f"no price keeps the budget, got {budget.tolist()}")
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        profile = minimise(middle)
        if keeps(profile):
            high, best = middle, profile
        else:
            low = middle
    return best


def relative_cost(cost: Ints, budget: Ints) -> NDArray[np.float64]:
    """One price for all resources: their costs as parts of their budgets, summed: (r, n, m), (r,) -> (n, m)."""
    return np.tensordot(1 / np.maximum(budget, 1), cost, axes=1)


def total_cost(cost: Ints, profile: Profile) -> Ints:
    """What a profile costs in each resource: (r, n, m), (n,) -> (r,)."""
    return cost[:, np.arange(cost.shape[1]), profile].sum(axis=1)
