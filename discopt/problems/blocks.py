"""Bit strings whose units count by the block: plateaus and deception.

Units belong to blocks of equal size, in a random order. A block's loss depends on how many of its units are kept, and
only a block kept as a whole loses nothing. The budget pays for some of the blocks, so the optimum fills those.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from discopt.objective import Losses, Query
from discopt.problem import Problem
from discopt.problems.tables import sum_entries
from discopt.space import SearchSpace


def royal_road(n: int = 64, ones: int = 32, size: int = 4, *, seed: int = 0) -> Problem:
    """The share of the blocks that are not kept as a whole; nothing tells how much of a block is missing.

    Mitchell, Forrest and Holland, "The royal road for genetic algorithms", 1992, function R1, with a budget.
    """
    return _blocks("royal-road", n, ones, size, depth=0.0, unlike=0.0, seed=seed)


def trap(n: int = 60, ones: int = 30, size: int = 6, *, seed: int = 0) -> Problem:
    """Blocks of random weight that look best when all are about half full, and are best full or empty.

    Short of a full block a unit more gains the less the fuller its block is, so that every switch towards a full block
    but the last one loses. Traps as in Deb and Goldberg, "Analyzing deception in trap functions", 1993, bent so that
    they deceive under a budget too.
    """
    return _blocks("trap", n, ones, size, depth=0.25, unlike=0.5, seed=seed)


def _blocks(name: str, n: int, ones: int, size: int, *, depth: float, unlike: float, seed: int) -> Problem:
    """Blocks that lose their weight if empty, a part 1 - `depth` of it with one unit missing, and nothing if full.

    Weights are 1 +- `unlike`, scaled to a sum of 1.
    """
    if not 2 <= size <= n or n % size:
        raise ValueError(f"size must be from 2 to n = {n} and divide it, got {size}")
    if not 0 < ones < n:
        raise ValueError(f"ones must lie between 0 and n = {n}, got {ones}")
    rng = np.random.default_rng(seed)
    order = rng.permutation(n).reshape(-1, size)
    weight = rng.uniform(1 - unlike, 1 + unlike, len(order))
    missing = 1 - np.arange(size) / (size - 1)  # of a block that is not full: from 1 to 0
    table = np.outer(weight / weight.sum(), np.append(1 - depth * (1 - missing**2), 0.0))
    return Problem(
        name=name,
        space=SearchSpace.cardinality(n, ones),
        objective=_Blocks(order, table),
        optimum=_minimum(table, ones),
        note=f"blocks of {size} units that count as a whole; the optimum by dynamic programming",
    )


def _minimum(table: NDArray[np.float64], ones: int) -> float:
    """Lowest sum of table[b, u_b] with sum(u) <= ones: table (blocks, size + 1)."""
    best = np.zeros(ones + 1)  # with at most so many ones, in the blocks so far
    for row in table[:, : ones + 1]:
        best = np.min([np.append(np.full(u, np.inf), best[: ones + 1 - u] + row[u]) for u in range(len(row))], axis=0)
    return float(best[-1])


@dataclass(frozen=True, eq=False)
class _Blocks:
    order: NDArray[np.intp]  # (blocks, size) the units of each block
    table: NDArray[np.float64]  # (blocks, size + 1) loss by the number of kept units

    def evaluate(self, query: Query) -> Losses:
        kept = (query.population[:, self.order] != 0).sum(axis=2)  # (k, blocks)
        return sum_entries(self.table, kept)
