"""The profile that minimises a sum of one loss per unit: the additive solution, exact.

A multiple-choice knapsack with one binary variable per unit and allowed level. Its linear relaxation prices every
variable; the few that may matter go to a mixed-integer solver (the core of Balas and Zemel, "An algorithm for large
zero-one knapsack problems", Operations Research 1980), and the prices prove that the others do not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from discopt.errors import BudgetError
from discopt.space import Ints, Levels, SearchSpace

if TYPE_CHECKING:
    from scipy.sparse import csr_array

CORE = 32  # variables beside one per unit in the first core
CUTS = 16  # profiles over the budget, let through by the solver's tolerance, that are forbidden one by one
TIGHTENINGS = 64  # times that the budget is lowered after that, by twice as much each time
LOSS_SCALE = 1e3  # of a unit's losses for the solver, whose tolerances are absolute
COST_SCALE = 2**10
ROUNDED = 1e-6  # share of a unit that a level has at least, to count
MARGIN = 1e-6  # of the relaxation's loss


def solve_separable(space: SearchSpace, loss: ArrayLike, *, exact: bool = True) -> Levels:
    """The profile x of the space with the lowest sum_i loss[i, x_i]: loss (n, m), lower is better -> (n,).

    A loss that is not finite forbids its level. Without `exact` it is the linear relaxation's, each unit that this
    splits at the cheaper of its levels, where that is in the space: some times faster, and all but a few units of the
    optimum. Raises ValueError for a unit without another, and BudgetError where
    no profile of the other levels is in the space.
    """
    table = np.asarray(loss, dtype=np.float64)
    if table.shape != (space.n, space.m):
        raise ValueError(f"loss must have shape {(space.n, space.m)}, got {table.shape}")
    possible = space.allowed & np.isfinite(table)
    if not possible.any(axis=1).all():
        unit = int(np.flatnonzero(~possible.any(axis=1))[0])
        raise ValueError(f"every unit needs an allowed level of finite loss, got none for unit {space.names[unit]!r}")
    program = _Program.of(space, table, possible)
    if not exact and (profile := _rounded(space, program)) is not None:
        return profile
    spare = program.spare
    for attempt in range(CUTS + TIGHTENINGS):
        chosen = _optimum(program)
        over = program.cost[:, chosen].sum(axis=1) - spare
        if (over <= 0).all():
            profile = np.zeros(space.n, dtype=np.int16)
            profile[program.unit[chosen]] = program.level[chosen]
            return space.check(profile)
        if attempt < CUTS:
            program = program.without(chosen)
        else:
            program = replace(program, spare=spare - (np.maximum(over, 0) << min(attempt - CUTS, 32)))
    raise ArithmeticError(f"the integer program's answers stay over the budget, at last by {over.tolist()}")


@dataclass(frozen=True, eq=False)
class _Program:
    """min loss' x over binary x (v,) with ones x = 1, cost x <= spare, ties x = 0 and cuts x <= n - 1."""

    unit: NDArray[np.intp]  # (v,)
    level: NDArray[np.intp]  # (v,)
    loss: NDArray[np.float64]  # (v,) above the unit's lowest, scaled
    cost: Ints  # (r, v) above the unit's lowest level, in the largest common unit
    spare: Ints  # (r,)
    ones: csr_array  # (n, v) one level for each unit
    ties: csr_array  # (t, v) neighbours in a bundle are at their lowest level both or neither
    cuts: csr_array  # (c, v) the variables of a profile that is forbidden

    @classmethod
    def of(cls, space: SearchSpace, table: NDArray[np.float64], possible: NDArray[np.bool_]) -> _Program:
        from scipy.sparse import csr_array

        unit, level = np.nonzero(possible)
        lowest = space.cheapest()
        cost = space.cost[:, unit, level] - space.cost[:, unit, lowest[unit]]
        common = np.maximum(np.gcd.reduce(cost, axis=1), 1)
        above = table[unit, level] - np.where(possible, table, np.inf).min(axis=1)[unit]
        is_low = csr_array((1.0 * (level == lowest[unit]), (unit, np.arange(len(unit)))), shape=(space.n, len(unit)))
        one, other = (
            np.concatenate([units[part] for units in space.bundles] or [np.empty(0, dtype=np.intp)])
            for part in (slice(None, -1), slice(1, None))
        )
        return cls(
            unit=unit,
            level=level,
            loss=above * (LOSS_SCALE / (above.mean() or 1.0)),
            cost=cost // common[:, None],
            spare=(space.budget - space.cost_of(lowest[None])[0]) // common,
            ones=csr_array((np.ones(len(unit)), (unit, np.arange(len(unit)))), shape=(space.n, len(unit))),
            ties=is_low[one] - is_low[other],
            cuts=csr_array((0, len(unit))),
        )

    @property
    def limits(self) -> tuple[csr_array, NDArray[np.float64]]:
        """What must not be passed, costs scaled for the solver: (r + c, v), (r + c,)."""
        from scipy.sparse import csr_array, vstack

        scale = COST_SCALE / np.maximum(self.cost.max(axis=1), 1)
        rows = vstack([csr_array(self.cost * scale[:, None]), self.cuts], format="csr")
        return rows, np.append(self.spare * scale, np.full(self.cuts.shape[0], self.ones.shape[0] - 1))

    def without(self, chosen: NDArray[np.intp]) -> _Program:
        """The program that forbids the profile of these variables, (n,)."""
        from scipy.sparse import csr_array, vstack

        cut = csr_array(
            (np.ones(len(chosen)), (np.zeros(len(chosen), dtype=np.intp), chosen)), shape=(1, len(self.unit))
        )
        return replace(self, cuts=vstack([self.cuts, cut], format="csr"))

    def only(self, core: NDArray[np.bool_]) -> _Program:
        """The program with the other variables at 0."""
        return replace(
            self,
            unit=self.unit[core],
            level=self.level[core],
            loss=self.loss[core],
            cost=self.cost[:, core],
            ones=self.ones[:, core],
            ties=self.ties[:, core],
            cuts=self.cuts[:, core],
        )


def _rounded(space: SearchSpace, program: _Program) -> Levels | None:
    """The relaxation's profile (n,), rounded to cheaper levels; None if the space does not have it."""
    result = _relaxed(program)
    part = result.x > ROUNDED
    order = np.lexsort((program.cost.sum(axis=0), program.unit))
    order = order[part[order]]
    unit, first = np.unique(program.unit[order], return_index=True)
    profile = np.zeros(space.n, dtype=np.int16)
    profile[unit] = program.level[order][first]
    return profile if len(unit) == space.n and space.feasible(profile[None])[0] else None


def _optimum(program: _Program) -> NDArray[np.intp]:
    """The variables that are 1 at the optimum, (n,)."""
    result = _relaxed(program)
    bound, price = float(result.fun), np.maximum(result.lower.marginals, 0.0)
    limit = np.sort(price)[: program.ones.shape[0] + CORE][-1]
    while True:
        core = price <= limit
        chosen = _integer_optimum(program.only(core))
        if chosen is not None:
            chosen = np.flatnonzero(core)[chosen]
            gap = (program.loss[chosen].sum() - bound) * (1 + 1e-9) + MARGIN
            if core.all() or gap <= limit:
                return chosen  # a profile with any other variable loses more than the gap to the bound
            limit = gap
        elif core.all():
            raise BudgetError("no profile of the space has a finite loss, got losses that forbid too many levels")
        else:
            limit = np.inf


def _relaxed(program: _Program) -> Any:
    """The linear relaxation's answer, as scipy has it."""
    from scipy.optimize import linprog
    from scipy.sparse import vstack

    cost, spare = program.limits
    equal = vstack([program.ones, program.ties], format="csr")
    right = np.concatenate([np.ones(program.ones.shape[0]), np.zeros(program.ties.shape[0])])
    result = linprog(program.loss, A_ub=cost, b_ub=spare, A_eq=equal, b_eq=right, bounds=(0, None), method="highs")
    if result.status == 2:
        raise BudgetError("no profile of the space has a finite loss, got losses that forbid too many levels")
    if result.status != 0:
        raise ArithmeticError(f"the linear relaxation was not solved: {result.message}")
    return result


def _integer_optimum(program: _Program) -> NDArray[np.intp] | None:
    """The variables that are 1 at the optimum, (n,); None where the program has no solution."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    cost, spare = program.limits
    constraints = [LinearConstraint(program.ones, 1, 1), LinearConstraint(cost, ub=spare)]
    if program.ties.shape[0]:
        constraints.append(LinearConstraint(program.ties, 0, 0))
    result = milp(
        program.loss,
        integrality=np.ones(len(program.loss)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if result.status == 2:
        return None
    if result.x is None or result.status != 0:
        raise ArithmeticError(f"the integer program was not solved: {result.message}")
    chosen: NDArray[np.intp] = np.flatnonzero(result.x > 0.5)
    return chosen
