"""The set of profiles a search may visit: levels, their integer costs, and the budgets.

Costs are integers, so whether a profile meets its budget is exact. Within a unit a higher level costs at least as
much in every resource; the cheapest profile is therefore the lowest allowed level everywhere, and a budget can be
met exactly when that profile meets it.

Units can be tied into bundles that leave their lowest level together: the layers of a sub-block that is dropped as a
whole or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from discopt.errors import BudgetError
from discopt.moves import Moves

Ints = NDArray[np.int64]
Levels = NDArray[np.int16]
MAX_LEVELS = np.iinfo(np.int16).max
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """Profiles x in [m]^n with sum_i cost[r, i, x_i] <= budget[r] for every resource r.

    Units with one label in `together` are at their lowest allowed level all, or none of them.

    Use `SearchSpace.build` or `SearchSpace.cardinality`; the plain constructor takes the arrays as they are stored.
    Raises ValueError for arrays that do not fit together and BudgetError for a budget that no profile meets.
    """

    cost: Ints  # (r, n, m), non-decreasing over the allowed levels of a unit
    budget: Ints  # (r,)
    group: Ints  # (n,) units of one group may trade levels
    names: tuple[str, ...]  # (n,)
    allowed: NDArray[np.bool_]  # (n, m)
    together: Ints  # (n,)

    def __post_init__(self) -> None:
        if self.cost.ndim != 3 or 0 in self.cost.shape:
            raise ValueError(f"cost must have shape (r, n, m), none of them 0, got {self.cost.shape}")
        r, n, m = self.cost.shape
        expected = {"budget": (r,), "group": (n,), "allowed": (n, m), "together": (n,)}
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {getattr(self, name).shape}")
        if self.group.min() < 0:
            raise ValueError(f"group numbers must not be negative, got {self.group.min()}")
        if m > MAX_LEVELS:
            raise ValueError(f"a unit can have at most {MAX_LEVELS} levels, got {m}")
        if len(self.names) != n or len(set(self.names)) != n:
            raise ValueError(
                f"names must be {n} different strings, got {len(set(self.names))} different of {len(self.names)}"
            )
        if not self.allowed.any(axis=1).all():
            unit = int(np.flatnonzero(~self.allowed.any(axis=1))[0])
            raise ValueError(f"every unit needs an allowed level, got none for unit {self.names[unit]!r}")
        self._check_costs()
        movable = self.allowed.sum(axis=1) > 1
        for units in self.bundles:
            if not movable[units].all():
                names = [self.names[units[movable[units] == able][0]] for able in (False, True)]
                raise ValueError(
                    "units that go together need a second allowed level all, or none of them, "
                    f"got none for {names[0]!r} and one for {names[1]!r}"
                )

    def _check_costs(self) -> None:
        for table, limit in zip(self.cost, self.budget.tolist(), strict=True):
            low = sum(np.minimum(table.min(axis=1), 0).tolist())
            high = sum(np.maximum(table.max(axis=1), 0).tolist())
            # Sums of costs, their differences, and what is left of the budget or exceeds it are no larger than these.
            if (most := max(high - low, limit - low, high - limit)) > np.iinfo(np.int64).max:
                raise ValueError(
                    f"costs, and what they leave of the budget, must fit 64 bits in sum, got up to {most}; "
                    "count in a larger unit"
                )
        is_step = self.allowed & (self._above >= 0)
        steps = np.take_along_axis(self.cost, np.maximum(self._above, 0)[None].astype(np.intp), axis=2) - self.cost
        if (is_step & (steps < 0)).any():
            resource, unit, level = (int(i) for i in np.argwhere(is_step & (steps < 0))[0])
            raise ValueError(
                f"a higher level must not cost less, got a step of {steps[resource, unit, level]} "
                f"from level {level} of unit {self.names[unit]!r} (resource {resource})"
            )
        cheapest, dearest = (self.cost_of(x[None])[0] for x in (self.cheapest(), self.dearest()))
        if (cheapest > self.budget).any():
            raise BudgetError(
                f"no profile meets the budget {_numbers(self.budget)}: "
                f"the cheapest costs {_numbers(cheapest)}, the dearest {_numbers(dearest)}"
            )

    @classmethod
    def build(
        cls,
        cost: ArrayLike | Sequence[Sequence[int]],
        budget: int | Sequence[int] | Ints,
        *,
        group: str | Sequence[int | str] | Ints = "size",
        names: Sequence[str] | None = None,
        allowed: ArrayLike | None = None,
        together: Sequence[int | str] | Ints | None = None,
    ) -> SearchSpace:
        """A space from costs (n, m) or (r, n, m), or from n lists of different lengths, and a budget per resource.

        `group` is "size" (units whose level steps cost the same may trade), "none" (all units are one group), or a
        label per unit. `allowed` (n, m) forbids levels. `together` is a label per unit: units with the same one are at
        their lowest allowed level all or none. Raises TypeError for costs that are not integers.
        """
        table, legal = _cost_table(cost)
        if allowed is not None:
            given = np.asarray(allowed, dtype=bool)
            if given.shape != legal.shape:
                raise ValueError(f"allowed must have shape {legal.shape}, got {given.shape}")
            legal = legal & given
        _r, n, _ = table.shape
        return cls(
            cost=table,
            budget=_integers(np.atleast_1d(np.asarray(budget)), "budget"),
            group=_groups(group, table, legal),
            names=tuple(names) if names is not None else tuple(f"unit{i}" for i in range(n)),
            allowed=legal,
            together=_numbered(together, n, "together") if together is not None else np.arange(n),
        )

    @classmethod
    def cardinality(cls, n: int, ones: int, names: Sequence[str] | None = None) -> SearchSpace:
        """Bit strings x in {0, 1}^n with at most `ones` ones."""
        return cls.build(np.tile([0, 1], (n, 1)), ones, names=names)

    @property
    def r(self) -> int:
        """Number of resources."""
        return int(self.cost.shape[0])

    @property
    def n(self) -> int:
        """Number of units."""
        return int(self.cost.shape[1])

    @property
    def m(self) -> int:
        """Number of levels of the units that have most."""
        return int(self.cost.shape[2])

    @cached_property
    def up(self) -> Levels:
        """The next allowed level above each level, (n, m); -1 where there is none that a unit can take by itself."""
        table = self._above.copy()
        bundled = self._bundled
        table[bundled, self.cheapest()[bundled]] = -1
        return table

    @cached_property
    def down(self) -> Levels:
        """The next allowed level below each level, (n, m); -1 where there is none that a unit can take by itself."""
        table = _next_allowed(self.allowed, range(self.m))
        lowest = np.where(self._bundled, self.cheapest(), -1)
        return np.where(table == lowest[:, None], np.int16(-1), table)

    @cached_property
    def _above(self) -> Levels:
        """The next allowed level above each level, (n, m); -1 where there is none."""
        return _next_allowed(self.allowed, range(self.m - 1, -1, -1))

    @cached_property
    def bundles(self) -> tuple[NDArray[np.intp], ...]:
        """The units of each label that more than one has, and that can leave their lowest level."""
        order = np.argsort(self.together, kind="stable")
        labels = np.split(order, np.flatnonzero(np.diff(self.together[order])) + 1)
        movable = self.allowed.sum(axis=1) > 1
        return tuple(units for units in labels if len(units) > 1 and movable[units].any())

    @cached_property
    def _bundled(self) -> NDArray[np.bool_]:
        """Which units are in a bundle, (n,)."""
        return np.isin(np.arange(self.n), np.concatenate(self.bundles) if self.bundles else [])

    @cached_property
    def moves(self) -> Moves:
        """The single moves of profiles, of units and bundles."""
        return Moves(self)

    @cached_property
    def _step_cost(self) -> Ints:
        """What going up by itself from each allowed level costs, (r, n, m); 0 where there is no step."""
        is_step = self.allowed & (self.up >= 0)
        above = np.take_along_axis(self.cost, np.maximum(self.up, 0)[None].astype(np.int64), axis=2)
        return np.where(is_step, above - self.cost, 0)

    @cached_property
    def steady(self) -> bool:
        """Whether all steps of every group cost the same, so that a switch leaves the cost as it is."""
        unit, level = np.nonzero(self.allowed & (self.up >= 0))
        steps = self._step_cost[:, unit, level]  # (r, steps)
        groups = self.group[unit]
        return all(bool((steps[:, groups == g] == steps[:, groups == g][:, :1]).all()) for g in np.unique(groups))

    @cached_property
    def even(self) -> bool:
        """Whether any unit may trade with any other by a switch, and the cost stays as it is."""
        return self.steady and not self.bundles and len(np.unique(self.group)) == 1

    @cached_property
    def group_members(self) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
        """Units sorted by group (n,), and for each group where it starts there and how many it has (groups,)."""
        size = np.bincount(self.group)
        return np.argsort(self.group, kind="stable"), np.cumsum(size) - size, size

    def cheapest(self) -> Levels:
        """The lowest allowed level of every unit, (n,)."""
        lowest: Levels = self.allowed.argmax(axis=1).astype(np.int16)
        return lowest

    def dearest(self) -> Levels:
        """The highest allowed level of every unit, (n,); it may be over the budget."""
        highest: Levels = (self.m - 1 - self.allowed[:, ::-1].argmax(axis=1)).astype(np.int16)
        return highest

    @cached_property
    def second(self) -> Levels:
        """The allowed level next to the lowest of every unit, (n,); the lowest itself where it is the only one."""
        lowest = self.cheapest()
        return np.maximum(self._above[np.arange(self.n), lowest], lowest)

    def uniform(self) -> Levels | None:
        """The dearest feasible profile with one level everywhere, (n,); None if there is none."""
        for level in range(self.m - 1, -1, -1):
            profile = np.full(self.n, level, dtype=np.int16)
            if self.feasible(profile[None])[0]:
                return profile
        return None

    def cost_of(self, population: NDArray[np.integer]) -> Ints:
        """Exact costs: (k, n) -> (k, r)."""
        units = np.arange(self.n)
        return np.stack([table[units, population].sum(axis=1, dtype=np.int64) for table in self.cost], axis=1)

    def feasible(self, population: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Whether all levels are allowed, bundles whole, and every budget holds: (k, n) -> (k,)."""
        legal: NDArray[np.bool_] = self.allowed[np.arange(self.n), population].all(axis=1)
        affordable: NDArray[np.bool_] = np.all(self.cost_of(population) <= self.budget, axis=1)
        return legal & affordable & ~self._torn(population).any(axis=1)

    def _torn(self, population: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Which bundles have units at their lowest level and others that are not, (k, bundles)."""
        if not self.bundles:
            return np.zeros((len(population), 0), dtype=bool)
        units = np.concatenate(self.bundles)
        first = np.cumsum([0, *map(len, self.bundles[:-1])])
        low = population[:, units] == self.cheapest()[units]
        torn: NDArray[np.bool_] = np.logical_or.reduceat(low, first, axis=1)
        return torn & ~np.logical_and.reduceat(low, first, axis=1)

    def is_full(self, profile: NDArray[np.integer]) -> bool:
        """Whether no single step up, of a unit or a bundle, fits what is left of the budget."""
        price = self.moves.prices(np.asarray(profile)[None], np.arange(self.moves.count)[None], up=True)[:, 0]
        left = self.budget - self.cost_of(profile[None])[0]
        return not ((price >= 0) & (price <= left[:, None])).all(axis=0).any()

    def check(self, profile: ArrayLike) -> Levels:
        """The profile as (n,) int16; raises ValueError if it is not one of this space."""
        levels = np.asarray(profile)
        if levels.shape != (self.n,) or not np.issubdtype(levels.dtype, np.integer):
            raise ValueError(f"a profile must be {self.n} integers, got shape {levels.shape} of {levels.dtype}")
        outside = (levels < 0) | (levels >= self.m)
        if outside.any() or not self.allowed[np.arange(self.n), levels].all():
            bad = outside if outside.any() else ~self.allowed[np.arange(self.n), levels]
            unit = int(np.flatnonzero(bad)[0])
            raise ValueError(f"level {levels[unit]} of unit {self.names[unit]!r} is not allowed")
        if (torn := self._torn(levels[None])[0]).any():
            units = self.bundles[int(torn.argmax())]
            low, high = (self.names[units[(levels == self.cheapest())[units] == is_low][0]] for is_low in (True, False))
            raise ValueError(
                f"units that go together leave their lowest level together, got {low!r} there, {high!r} not"
            )
        if not self.feasible(levels[None])[0]:
            cost = self.cost_of(levels[None])[0]
            raise ValueError(f"a profile must cost at most {_numbers(self.budget)}, got {_numbers(cost)}")
        return levels.astype(np.int16)

    def random(self, k: int, rng: np.random.Generator) -> Levels:
        """Random feasible profiles that spend the budget as far as steps fit: (k, n).

        Every row takes all steps of all units in a random order and climbs those that still fit; before them, those
        of the bundles. With two levels of equal cost this draws subsets uniformly.
        """
        rows = [self._fill(self.cheapest(), rng) for _ in range(k)]
        return np.stack(rows) if rows else np.empty((0, self.n), dtype=np.int16)

    def nearest_uniform(self) -> Levels:
        """The dearest feasible profile with one level everywhere, and the rest of the budget spent evenly: (n,).

        What `uniform` leaves is spent on steps of different units (or bundles), at most one for each, until no
        further one fits. Units take their turns in the order of the fractional parts of i * golden ratio, so that
        those raised lie evenly among all units and among every second, third or seventh of them. Without a uniform
        profile, turns are taken from the cheapest profile on, as long as any step fits.
        """
        base = self.uniform()
        profile = self.cheapest() if base is None else base
        order = np.argsort(np.arange(self.n) * GOLDEN % 1.0, kind="stable")
        left = self.budget - self.cost_of(profile[None])[0]
        while True:
            climbed, left = self._climb_once(profile, order, left)
            if base is not None or (climbed == profile).all():
                return climbed
            profile = climbed

    def _climb_once(self, profile: Levels, order: NDArray[np.intp], left: Ints) -> tuple[Levels, Ints]:
        """One step of each unit in turn, or of its bundle, where it fits: the profile (n,), and what is left (r,)."""
        low = profile[order] == self.cheapest()[order]
        moves = np.where(low, self.moves.bundle_of(order), order)
        moves = moves[np.sort(np.unique(moves, return_index=True)[1])]  # a bundle has one turn
        price = self.moves.prices(profile[None], moves[None], up=True)[:, 0]
        moves, price = moves[price.min(axis=0) >= 0], price[:, price.min(axis=0) >= 0]
        climbed = profile.copy()
        while len(moves):
            price = price[:, (fits := (price <= left[:, None]).all(axis=0))]  # what does not, never will: less is left
            moves = moves[fits]
            taken = int((np.cumsum(price, axis=1) <= left[:, None]).all(axis=0).sum())
            _, unit, alone = self.moves.units_of(np.zeros(taken, dtype=np.intp), moves[:taken])
            climbed[unit] = np.where(alone, self.up[unit, profile[unit]], self.second[unit])
            left = left - price[:, :taken].sum(axis=1)
            moves, price = moves[taken:], price[:, taken:]
        return climbed, left

    def _fill(self, profile: Levels, rng: np.random.Generator) -> Levels:
        """Climb steps from a profile in a random order, as long as they fit: (n,) -> (n,)."""
        profile = self._lift(profile, rng)
        left = self.budget - self.cost_of(profile[None])[0]
        climbs = ~self._bundled | (profile > self.cheapest())
        unit, level = np.nonzero(
            self.allowed & (self.up >= 0) & (np.arange(self.m) >= profile[:, None]) & climbs[:, None]
        )
        shuffled = rng.permutation(unit)
        steps = np.empty_like(unit)
        steps[np.argsort(shuffled, kind="stable")] = np.arange(len(unit))  # a unit's steps stay in their order
        climbed = profile.copy()
        while len(steps):
            price = self._step_cost[:, unit[steps], level[steps]]
            fits = (np.cumsum(price, axis=1) <= left[:, None]).all(axis=0)
            taken = len(steps) if fits.all() else int(fits.argmin())
            climb = steps[:taken]
            np.maximum.at(climbed, unit[climb], self.up[unit[climb], level[climb]])
            left = left - price[:, :taken].sum(axis=1)
            # A unit stops for good below a step that no longer fits, for what is left never grows.
            rest, dear = steps[taken:], (price[:, taken:] > left[:, None]).any(axis=0)
            ceiling = np.full(self.n, self.m)
            np.minimum.at(ceiling, unit[rest[dear]], level[rest[dear]])
            steps = rest[level[rest] < ceiling[unit[rest]]]
        return climbed

    def _lift(self, profile: Levels, rng: np.random.Generator) -> Levels:
        """The steps of the bundles in a random order, as long as they fit: (n,) -> (n,)."""
        lifts = np.arange(self.n, self.moves.count)
        lifted = profile[None].copy()
        price = self.moves.prices(lifted, lifts[None], up=True)[:, 0]  # (r, bundles)
        left = self.budget - self.cost_of(lifted)[0]
        for number in rng.permutation(len(lifts)) if len(lifts) else ():
            if price[:, number].min() >= 0 and (price[:, number] <= left).all():
                self.moves.make_(lifted, np.array([0]), lifts[number : number + 1], up=True)
                left = left - price[:, number]
        return lifted[0]


def _next_allowed(allowed: NDArray[np.bool_], levels: range) -> Levels:
    """The allowed level last met before each level, in the given order: (n, m); -1 where there is none."""
    table = np.full(allowed.shape, -1, dtype=np.int16)
    last = np.full(len(allowed), -1, dtype=np.int16)
    for level in levels:
        table[:, level] = last
        last = np.where(allowed[:, level], np.int16(level), last)
    return table


def _cost_table(cost: ArrayLike | Sequence[Sequence[int]]) -> tuple[Ints, NDArray[np.bool_]]:
    """Costs as (r, n, m), units with fewer levels padded with forbidden ones, and which levels exist, (n, m)."""
    if isinstance(cost, list | tuple) and cost and all(isinstance(c, list | tuple | np.ndarray) for c in cost):
        rows = [np.asarray(c) for c in cost]
        if all(row.ndim == 1 for row in rows) and len({len(row) for row in rows}) > 1:
            m = max(len(row) for row in rows)
            table = np.stack(
                [np.pad(_integers(row, "cost"), (0, m - len(row)), mode="edge") for row in rows if len(row)]
            )
            if len(table) < len(rows):
                raise ValueError("every unit needs at least one level, got a unit with none")
            return table[None], np.arange(m) < np.array([len(row) for row in rows])[:, None]
    table = _integers(np.asarray(cost), "cost")
    if table.ndim == 2:
        table = table[None]
    if table.ndim != 3:
        raise ValueError(f"cost must have shape (n, m) or (r, n, m), got {table.shape}")
    return table, np.ones(table.shape[1:], dtype=bool)


def _integers(values: NDArray[np.generic], what: str) -> Ints:
    if values.dtype.kind not in "iu":
        raise TypeError(f"{what} must be integers of 64 bits, so that feasibility is exact, got {values.dtype}")
    if values.dtype.kind == "u" and values.max(initial=0) > np.iinfo(np.int64).max:
        raise ValueError(f"{what} must fit 64 bits with a sign, got up to {values.max()}")
    return values.astype(np.int64)


def _groups(group: str | Sequence[int | str] | Ints, cost: Ints, allowed: NDArray[np.bool_]) -> Ints:
    n = cost.shape[1]
    if isinstance(group, str):
        if group == "none":
            return np.zeros(n, dtype=np.int64)
        if group != "size":
            raise ValueError(f"group must be 'size', 'none' or a label per unit, got {group!r}")
        labels: list[object] = [_step_signature(cost[:, i][:, allowed[i]]) for i in range(n)]
    else:
        labels = list(group)
    return _numbered(labels, n, "group")


def _numbered(labels: Sequence[object] | Ints, n: int, what: str) -> Ints:
    """Labels as numbers in the order of their first appearance, (n,)."""
    if len(labels) != n:
        raise ValueError(f"{what} must have a label for each of the {n} units, got {len(labels)}")
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)


def _step_signature(cost: Ints) -> tuple[tuple[int, ...], ...]:
    """What the steps of a unit cost, (r, levels) -> one entry if they all cost the same, else each of them."""
    steps = [tuple(int(c) for c in step) for step in np.diff(cost, axis=1).T]
    return tuple(steps[:1]) if len(set(steps)) == 1 else tuple(steps)


def _numbers(values: Ints) -> str:
    return ", ".join(str(int(v)) for v in values)
