"""Allocation of a budget over units with several levels: bits to layers, money to projects.

The error of a unit about halves with each level, as a weight's does with each bit. Losses are sums of squared
errors, with or without interaction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from discopt.objective import Losses, Query
from discopt.problem import Problem
from discopt.problems.exact import exhaustive_minimum, how_known, separable_minimum
from discopt.problems.prices import dearest_within, relative_cost, total_cost
from discopt.problems.tables import sum_entries
from discopt.space import Ints, SearchSpace

SIZES = (1, 2, 3, 5, 8)  # cost of a level step where costs are unequal


def separable(
    n: int = 64,
    m: int = 5,
    *,
    costs: str = "equal",
    resources: int = 1,
    share: float = 0.5,
    priced: bool = False,
    seed: int = 0,
) -> Problem:
    """A sum of one error per unit and level, which fall unevenly as levels rise.

    A step up costs 1 in every unit ("equal" costs), or a random size per unit ("unequal"), and of a second of the
    `resources` always a random size. Budgets are `share` of the dearest profile's costs. The optimum is found by
    integer programming, which takes long from about 5,000 units on. `priced` lowers the budgets a little, to where a
    price proves the optimum (`discopt.problems.prices`) at any number of units.
    """
    rng = np.random.default_rng(seed)
    cost, budget = unit_costs(n, m, costs, resources, share, rng)
    table = halving_errors(n, m, rng) ** 2 / n
    if priced:
        weighed = relative_cost(cost, budget)
        best = dearest_within(lambda price: (table + price * weighed).argmin(axis=1), cost, budget)
        space = SearchSpace.build(cost, total_cost(cost, best))
        optimum = float(table[np.arange(n), best].sum())
    else:
        space = SearchSpace.build(cost, budget)
        optimum, _ = separable_minimum(space, table)
    return Problem(
        name=_name("separable", costs, resources),
        space=space,
        objective=_Separable(table),
        optimum=optimum,
        note=f"mean squared error of the units; the optimum by {'a price' if priced else 'integer programming'}",
    )


def quadratic(
    n: int = 8,
    m: int = 4,
    *,
    interaction: float = 0.8,
    costs: str = "equal",
    resources: int = 1,
    share: float = 0.5,
    seed: int = 0,
) -> Problem:
    """Errors that interact: e' ((1 - interaction) I + interaction C) e / n, where e_i is unit i's error at its level.

    C is a random correlation matrix of rank about n / 4, so that errors add up or cancel, and dropping one more unit
    may even help. Without interaction it is `separable`, whose costs it has. The optimum is known while all profiles
    can be looked at.
    """
    if not 0 <= interaction <= 1:
        raise ValueError(f"interaction must lie from 0 to 1, got {interaction}")
    rng = np.random.default_rng(seed)
    space = SearchSpace.build(*unit_costs(n, m, costs, resources, share, rng))
    table = halving_errors(n, m, rng)
    direction = rng.standard_normal((n, max(2, n // 4)))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    objective = _Quadratic(table, direction, interaction)
    best = exhaustive_minimum(space, lambda x: objective.evaluate(Query(x, 1, 0)))
    return Problem(
        name=_name("quadratic", costs, resources),
        space=space,
        objective=objective,
        optimum=best[0] if best else None,
        note=f"squared errors with interaction {interaction}; {how_known(best)}",
    )


@dataclass(frozen=True, eq=False)
class _Separable:
    table: NDArray[np.float64]  # (n, m)

    def evaluate(self, query: Query) -> Losses:
        return sum_entries(self.table, query.population)


@dataclass(frozen=True, eq=False)
class _Quadratic:
    table: NDArray[np.float64]  # (n, m) errors
    direction: NDArray[np.float64]  # (n, d) of unit length; C = direction direction'
    interaction: float

    def evaluate(self, query: Query) -> Losses:
        e = self.table[np.arange(len(self.table)), query.population]  # (k, n)
        own = (e**2).sum(axis=1)
        joint = ((e @ self.direction) ** 2).sum(axis=1)  # e' C e
        return ((1 - self.interaction) * own + self.interaction * joint) / len(self.table)


def unit_costs(n: int, m: int, costs: str, resources: int, share: float, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Costs that rise by the same step from level to level, and `share` of their dearest: (r, n, m), (r,)."""
    if n < 2 or m < 2:
        raise ValueError(f"expected at least 2 units and 2 levels, got n = {n} and m = {m}")
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie from 0 to 1, got {share}")
    if costs not in ("equal", "unequal"):
        raise ValueError(f"costs must be equal or unequal, got {costs!r}")
    if resources not in (1, 2):
        raise ValueError(f"resources must be 1 or 2, got {resources}")
    sizes = [rng.choice(SIZES, n) if costs == "unequal" else np.ones(n, dtype=np.int64)]
    sizes += [rng.choice(SIZES, n) for _ in range(resources - 1)]
    cost: Ints = np.stack(sizes)[:, :, None] * np.arange(m)
    return cost, (share * cost[:, :, -1].sum(axis=1)).astype(np.int64)


def _name(kind: str, costs: str, resources: int) -> str:
    return "-".join([kind, *["unequal"] * (costs == "unequal"), *["2r"] * (resources == 2)])


def halving_errors(n: int, m: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Errors (n, m) that about halve from level to level, from a random size per unit on, and never rise."""
    first = rng.lognormal(sigma=0.7, size=(n, 1))
    jitter = rng.lognormal(sigma=0.3, size=(n, m))
    return -np.sort(-first * jitter * 0.5 ** np.arange(m), axis=1)
