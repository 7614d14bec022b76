"""Greedy descent: from the dearest profile, step by step down, whichever step adds least to the loss for what it saves.

Every step measured anew is the plain algorithm. The lazy one (Minoux, "Accelerated greedy algorithms for maximizing
submodular set functions", 1978) keeps what steps added when last measured, and measures anew only those at the top.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from discopt.space import Levels, SearchSpace

__all__ = ["greedy_descent"]

WORST = 1e9  # stands for a loss that is not finite, so that differences are

Losses = Callable[[Levels], NDArray[np.float64]]


def greedy_descent(
    space: SearchSpace,
    losses: Losses,
    *,
    limit: int,
    at_once: int | None = None,
    errors: NDArray[np.float64] | None = None,
) -> tuple[Levels, int]:
    """The profile (n,) where greedy steps down first meet the budget, and how many profiles were measured.

    losses: of a population (k, n), (k,), all on one sample; lower is better.
    limit: profiles to measure at most, or one more than there are units if that is more. After them steps go on by
        what was last measured.
    at_once: steps measured anew together, those of the lowest known loss for their cost first, until the best is one
        of them; None: all, before every step.
    errors: what levels lose by some cheap measure, (n, m). A unit's next step is taken to lose more than its last in
        proportion to them, until it is measured; None: as much.

    What the last steps saved too much is spent on taking steps back, the last ones first.
    """
    limit = max(limit, space.n + 1)
    profile = space.dearest()
    current = float(np.minimum(losses(profile[None]), WORST)[0])
    measured = 1
    price = np.full(space.n, -np.inf)  # what each unit's next step adds to the loss, for each unit of cost saved
    taken: list[int] = []
    while len(steps := _steps(space, profile)):
        saves = _saved(space, profile, steps)
        fresh: dict[int, float] = {}  # loss after each step that was measured from this profile
        while measured < limit:
            order = steps[np.argsort(price[steps], kind="stable")]
            if int(order[0]) in fresh:
                break
            stale = np.array([unit for unit in order.tolist() if unit not in fresh])
            batch = stale[: min(limit - measured, at_once or len(stale))]
            after = np.minimum(losses(_lowered(space, profile, batch)), WORST)
            measured += len(batch)
            price[batch] = (after - current) / saves[batch]
            fresh.update(zip(batch.tolist(), after.tolist(), strict=True))
        unit = int(steps[np.argmin(price[steps])])
        current = fresh.get(unit, current + price[unit] * saves[unit])
        if errors is not None:
            price[unit] = abs(price[unit]) * _growth(space, errors, unit, int(profile[unit]))
        profile = _lowered(space, profile, np.array([unit]))[0]
        taken.append(unit)
    for unit in reversed(taken):
        raised = profile.copy()
        raised[unit] = space.up[unit, profile[unit]]
        if space.feasible(raised[None])[0]:
            profile = raised
    return space.check(profile), measured


def _saved(space: SearchSpace, profile: Levels, steps: NDArray[np.intp]) -> NDArray[np.float64]:
    """What the steps down save of the resources that are over their budgets, (n,); 0 for other units."""
    over = space.cost_of(profile[None])[0] > space.budget
    saved = np.zeros(space.n)
    below = space.down[steps, profile[steps]]
    saved[steps] = (space.cost[:, steps, profile[steps]] - space.cost[:, steps, below])[over].sum(axis=0)
    return saved


def _growth(space: SearchSpace, errors: NDArray[np.float64], unit: int, level: int) -> float:
    """How many times the error, for the cost saved, that the step down from a level adds, the step after it does."""
    path = [level, int(space.down[unit, level])]
    path.append(int(space.down[unit, path[-1]]))
    if path[-1] < 0:
        return 1.0
    added = np.diff(errors[unit, path])
    saved = -np.diff(space.cost[:, unit, path].sum(axis=0))
    if not (np.isfinite(added) & (added > 0) & (saved > 0)).all():
        return 1.0
    return float((added[1] / saved[1]) / (added[0] / saved[0]))


def _steps(space: SearchSpace, profile: Levels) -> NDArray[np.intp]:
    """The units whose step down saves some of what is over the budget; none where it holds."""
    able: NDArray[np.intp] = np.flatnonzero(space.down[np.arange(space.n), profile] >= 0)
    return able[_saved(space, profile, able)[able] > 0]


def _lowered(space: SearchSpace, profile: Levels, units: NDArray[np.intp]) -> Levels:
    """The profile with each of the units one step down: (k, n)."""
    population = np.tile(profile, (len(units), 1))
    population[np.arange(len(units)), units] = space.down[units, profile[units]]
    return population
