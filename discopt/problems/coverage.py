"""Budgeted maximum coverage: where to build, at unequal prices, to reach most people."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from discopt.objective import Losses, Query
from discopt.problem import Problem
from discopt.problems.exact import coverage_minimum
from discopt.space import SearchSpace

MAX_PRICE = 9


def coverage(
    sites: int = 40, places: int = 200, *, radius: float = 0.15, share: float = 0.25, seed: int = 0
) -> Problem:
    """The share of people out of reach of every open site.

    Sites and places lie at random in the unit square; a site reaches the places within `radius`. Places have random
    numbers of people, sites random prices from 1 to 9, and the budget is `share` of all prices. The optimum is exact,
    by integer programming; with many more sites than 100 that takes long.
    """
    if sites < 2 or places < 1:
        raise ValueError(f"expected at least 2 sites and 1 place, got {sites} and {places}")
    if radius <= 0 or not 0 < share <= 1:
        raise ValueError(f"expected a radius above 0 and a share in (0, 1], got {radius} and {share}")
    rng = np.random.default_rng(seed)
    apart = np.linalg.norm(rng.random((sites, 1, 2)) - rng.random((1, places, 2)), axis=2)
    people = rng.integers(1, 100, places).astype(np.float64)
    price = rng.integers(1, MAX_PRICE + 1, sites)
    cost = np.stack([np.zeros_like(price), price], axis=1)
    space = SearchSpace.build(cost, max(1, int(share * price.sum())), names=[f"site{i}" for i in range(sites)])
    covers = apart <= radius  # (sites, places)
    weight = people / people.sum()
    optimum, _ = coverage_minimum(space, covers, weight)
    return Problem(
        name="coverage",
        space=space,
        objective=_Coverage(covers.astype(np.float32), weight),
        optimum=optimum,
        note="share of people no open site reaches; the optimum by integer programming",
    )


@dataclass(frozen=True, eq=False)
class _Coverage:
    covers: NDArray[np.float32]  # (n, p) 1 where unit i covers point j
    weight: NDArray[np.float64]  # (p,)

    def evaluate(self, query: Query) -> Losses:
        times_covered = query.population.astype(np.float32) @ self.covers  # (k, p), exact: small whole numbers
        return np.where(times_covered == 0, self.weight, 0.0).sum(axis=1)
