"""Functions of bit strings with at most `ones` ones, the textbook cases of evolutionary algorithms.

A one is a unit kept, a zero a unit dropped; which units are the good ones is random. All spend the whole budget at
their optimum. Names and definitions as in the theory of evolutionary algorithms (OneMax, LeadingOnes, Jump).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from discopt.objective import Losses, Query
from discopt.problem import Problem
from discopt.space import SearchSpace


def linear(n: int = 64, ones: int = 48, *, weights: str = "random", seed: int = 0) -> Problem:
    """The weight of the dropped units; weights are "random" in (0, 1), or "equal": 1 for `ones` units, else 0.

    The setting of EvoPress's Theorem 3.1, whose constant is `switch_constant`.
    """
    _check(n, ones)
    rng = np.random.default_rng(seed)
    if weights == "random":
        weight = rng.random(n)
    elif weights == "equal":
        weight = rng.permutation(np.repeat([1.0, 0.0], [ones, n - ones]))
    else:
        raise ValueError(f"weights must be random or equal, got {weights!r}")
    return Problem(
        name="linear",
        space=SearchSpace.cardinality(n, ones),
        objective=_Linear(weight),
        optimum=float(np.sort(weight)[: n - ones].sum()),
        note="total weight of the units at 0; the optimum keeps the heaviest",
    )


def switch_constant(generations: float, offspring: int, n: int, ones: int) -> float:
    """c in generations = c k (n - k) / lambda, k of n units being dropped (EvoPress, Theorem 3.1)."""
    return generations * offspring / (ones * (n - ones))


def leading_ones(n: int = 32, ones: int = 24, *, seed: int = 0) -> Problem:
    """How many ones the longest run of ones from the first unit lacks to `ones`, in a random order of the units."""
    _check(n, ones)
    return Problem(
        name="leading-ones",
        space=SearchSpace.cardinality(n, ones),
        objective=_LeadingOnes(np.random.default_rng(seed).permutation(n), ones),
        optimum=0.0,
        note="ones missing from the leading run; plateaus everywhere, and 0 only with all ones in front",
    )


def jump(n: int = 16, ones: int = 8, gap: int = 2, *, seed: int = 0) -> Problem:
    """How many of the `ones` good units are dropped; with fewer than `gap` of them, and not none, far worse.

    From the edge of the valley only `gap` switches at once reach the optimum; gap 1 is `linear` with equal weights.
    """
    _check(n, ones)
    if not 1 <= gap <= min(ones, n - ones):
        raise ValueError(f"gap must be from 1 to {min(ones, n - ones)}, got {gap}")
    good = np.random.default_rng(seed).permutation(np.repeat([True, False], [ones, n - ones]))
    return Problem(
        name="jump",
        space=SearchSpace.cardinality(n, ones),
        objective=_Jump(good, gap),
        optimum=0.0,
        note=f"good units missing; a valley {gap} wide lies before the optimum",
    )


@dataclass(frozen=True, eq=False)
class _Linear:
    weight: NDArray[np.float64]  # (n,)

    def evaluate(self, query: Query) -> Losses:
        return np.einsum("kn,n->k", query.population == 0, self.weight)  # four times faster than where and sum


@dataclass(frozen=True, eq=False)
class _LeadingOnes:
    order: NDArray[np.intp]  # (n,) the units from first to last
    ones: int

    def evaluate(self, query: Query) -> Losses:
        run = np.cumprod(query.population[:, self.order], axis=1, dtype=np.int64).sum(axis=1)
        return (self.ones - run).astype(np.float64)


@dataclass(frozen=True, eq=False)
class _Jump:
    good: NDArray[np.bool_]  # (n,)
    gap: int

    def evaluate(self, query: Query) -> Losses:
        missing = (query.population[:, self.good] == 0).sum(axis=1)
        in_valley = (missing > 0) & (missing < self.gap)
        valley = self.gap + int(self.good.sum()) - missing  # climbs towards the optimum's wrong side
        return np.where(in_valley, valley, missing).astype(np.float64)


def _check(n: int, ones: int) -> None:
    if not 0 < ones < n:
        raise ValueError(f"ones must lie between 0 and n = {n}, got {ones}")
