"""Optima that are certain: of separable losses by integer programming, of small spaces by looking at every profile."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from discopt.enumeration import count_profiles, feasible_profiles
from discopt.objective import Losses
from discopt.separable import solve_separable
from discopt.space import Levels, SearchSpace

MAX_PROFILES = 1 << 18  # feasible ones; above this, `exhaustive_minimum` gives up


def separable_minimum(space: SearchSpace, table: NDArray[np.float64]) -> tuple[float, Levels]:
    """Lowest sum_i table[i, x_i] of the space, and a profile that has it: table (n, m) -> loss, (n,)."""
    x = solve_separable(space, table)
    return float(table[np.arange(space.n), x].sum()), x


def coverage_minimum(
    space: SearchSpace, covers: NDArray[np.bool_], weight: NDArray[np.float64]
) -> tuple[float, Levels]:
    """Lowest weight left uncovered, and a profile that has it: covers (n, p), weight (p,) -> loss, (n,).

    Level 1 of unit i covers the points covers[i]. Binary variables: the n units, then the p points that stay bare.
    """
    n, p = covers.shape
    covered_or_bare = csr_array(np.hstack([covers.T.astype(np.float64), np.eye(p)]))
    cost = np.hstack([space.cost[:, :, 1] - space.cost[:, :, 0], np.zeros((space.r, p), dtype=np.int64)])
    constraints = [
        LinearConstraint(covered_or_bare, lb=1),
        LinearConstraint(cost, ub=space.budget - space.cost[:, :, 0].sum(axis=1)),
    ]
    x = _solve(np.concatenate([np.zeros(n), weight]), constraints)[:n].astype(np.int16)
    assert space.feasible(x[None])[0]
    bare = ~covers[x == 1].any(axis=0)
    return float(weight[bare].sum()), x


def exhaustive_minimum(space: SearchSpace, loss: Callable[[Levels], Losses]) -> tuple[float, Levels] | None:
    """Lowest loss of the space, and the first profile that has it; None if there are too many profiles to look at."""
    if count_profiles(space, MAX_PROFILES) is None:
        return None
    best: tuple[float, Levels] | None = None
    for population in feasible_profiles(space):
        losses = loss(population)
        row = int(losses.argmin())
        if best is None or losses[row] < best[0]:
            best = float(losses[row]), population[row]
    return best


def how_known(best: tuple[float, Levels] | None) -> str:
    """The words of a problem's note about its `exhaustive_minimum`."""
    return "the optimum is not known at this size" if best is None else "the optimum by looking at every profile"


def _solve(loss: NDArray[np.float64], constraints: list[LinearConstraint]) -> NDArray[np.bool_]:
    """The binary variables (v,) with the lowest total loss."""
    result = milp(
        loss,
        integrality=np.ones(len(loss)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None or result.status != 0:
        raise ArithmeticError(f"the integer program was not solved: {result.message}")
    return result.x > 0.5
