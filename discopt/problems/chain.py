"""Chains of units in which neighbours depend on each other: a spin glass on a line, with several levels and prices.

Losses of neighbours are random, so that what is best for a unit changes with the one before it and the one behind
it, and single moves get stuck. In one dimension dynamic programming still finds the optimum, at any number of units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from discopt.objective import Losses, Query
from discopt.problem import Problem
from discopt.problems.allocation import halving_errors, unit_costs
from discopt.problems.prices import dearest_within, relative_cost, total_cost
from discopt.problems.tables import sum_entries
from discopt.space import SearchSpace


def chain(
    n: int = 64,
    m: int = 5,
    *,
    length: int = 16,
    strength: float = 1.0,
    costs: str = "unequal",
    resources: int = 1,
    share: float = 0.4,
    seed: int = 0,
) -> Problem:
    """Mean of the units' squared errors, and of a random loss up to `strength` of each unit with the next in its chain.

    Chains have `length` units. Costs are those of `separable`; the budgets are at most `share` of the dearest profile's
    costs, and such that a price proves the optimum.
    """
    if not 2 <= length <= n or n % length:
        raise ValueError(f"length must be from 2 to n = {n} and divide it, got {length}")
    if not strength >= 0:
        raise ValueError(f"strength must not be negative, got {strength}")
    rng = np.random.default_rng(seed)
    cost, budget = unit_costs(n, m, costs, resources, share, rng)
    table = (halving_errors(n, m, rng) ** 2)[:, :, None] + strength * rng.uniform(-1, 1, (n, m, m))
    table[length - 1 :: length] = table[length - 1 :: length, :, :1]  # the last of a chain has no next
    table /= n
    steps = np.ascontiguousarray(table.reshape(-1, length, m, m).transpose(1, 3, 2, 0))
    weighed = relative_cost(cost, budget).reshape(-1, length, m).transpose(1, 2, 0)
    best = dearest_within(lambda price: _shortest(steps, price * weighed), cost, budget)
    objective = _Chain(table.reshape(n, m * m), m)
    return Problem(
        name="chain",
        space=SearchSpace.build(cost, total_cost(cost, best)),
        objective=objective,
        optimum=float(objective.evaluate(Query(best[None].astype(np.int16), 1, 0))[0]),
        note=f"errors and random losses of neighbours in chains of {length}; the optimum by dynamic programming",
    )


@dataclass(frozen=True, eq=False)
class _Chain:
    table: NDArray[np.float64]  # (n, m * m) by the levels of the unit and of the next
    m: int

    def evaluate(self, query: Query) -> Losses:
        x = query.population
        return sum_entries(self.table, x * np.int32(self.m) + np.roll(x, -1, axis=1))


def _shortest(pair: NDArray[np.float64], own: NDArray[np.float64]) -> NDArray[np.intp]:
    """The profile with the lowest sum of own and pair losses: (length, m, m, c), (length, m, c) -> (n,).

    c chains side by side, `pair` by the level of the next unit, then by that of the unit.
    """
    length, m, _, chains = pair.shape
    rest = np.zeros((m, chains))  # lowest loss from the next unit on, by its level
    onward = []
    for unit in reversed(range(length)):
        total = pair[unit] + rest[:, None]
        onward.append(total.argmin(axis=0))
        rest = total.min(axis=0) + own[unit]
    level = rest.argmin(axis=0)
    profile = np.empty((chains, length), dtype=np.intp)
    for unit, following in enumerate(reversed(onward)):
        profile[:, unit] = level
        level = following[level, np.arange(chains)]
    return profile.ravel()
