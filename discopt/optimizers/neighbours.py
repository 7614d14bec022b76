"""Random neighbours of a profile, near ones to be measured one by one, and far ones to start again from."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from discopt.arrays import pack, unpack
from discopt.exchange import exchange
from discopt.mutation import level_switch
from discopt.space import Levels, SearchSpace

POOL = 64  # exchanges drawn together
ONE = np.ones(1, dtype=np.intp)
TRIES = 8  # restarts drawn, of which one must differ from the best
FIRST_KICK = 2  # moves of the first restart from a profile
LARGEST_KICK = 0.5  # of all moves; after that, restarts are random


class Neighbours:
    """Profiles one move away: a random step up or down, and what fills the budget again.

    Where all steps cost the same, that is a level switch, drawn by itself. Else it is an exchange (`discopt.exchange`),
    and those are drawn by the pool. One that was drawn for an earlier profile serves a later one as well, where the
    units it changes are still as they were and the budget allows; but units that just changed would then rest, so that
    a pool is left when more than `drift` of them have.
    """

    def __init__(self, space: SearchSpace, rng: np.random.Generator, *, drift: int = 0) -> None:
        self._space, self._rng, self._drift = space, rng, drift
        self._even = space.even
        self._switches = False  # once profiles of equal steps are full, they stay so
        self._home = space.cheapest()  # (n,) the profile that the pool was drawn for
        self._pool = np.empty((0, space.n), dtype=np.int16)  # those not used yet, the last one next

    def draw(self, profile: Levels) -> Levels | None:
        """A neighbour of a feasible profile, (n,) -> (n,); None if there is none."""
        if self._even:
            self._switches = self._switches or self._space.is_full(profile)
        if self._switches:
            neighbour: Levels = level_switch(profile[None], ONE, self._space, self._rng)[0]
            return neighbour if (neighbour != profile).any() else None
        drawn = self._next(profile)
        if drawn is None:
            self._home = profile
            self._pool = _exchanged(profile, np.ones(POOL, dtype=np.intp), self._space, self._rng)
            drawn = self._next(profile)
        return drawn

    def _next(self, profile: Levels) -> Levels | None:
        """The next of the pool that can be made of the profile, None if there is none left."""
        moved = profile != self._home
        if np.count_nonzero(moved) > self._drift:
            return None
        while len(self._pool):
            drawn, self._pool = self._pool[-1], self._pool[:-1]
            changed = drawn != self._home
            if changed.any() and not (changed & moved).any():
                neighbour = np.where(changed, drawn, profile)
                if (self._space.cost_of(neighbour[None])[0] <= self._space.budget).all():
                    return neighbour
        return None

    def state(self) -> dict[str, Any]:
        """As JSON values, without the generator."""
        return {"home": pack(self._home), "pool": pack(self._pool), "switches": self._switches}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self._home, self._pool, self._switches = unpack(state["home"]), unpack(state["pool"]), state["switches"]


class Restarts:
    """Where searches start again that have come to an end: some random moves away from the best profile.

    Two moves at first, one more each time that led to nothing better, and after half of all a random profile, from
    where it begins anew.
    """

    def __init__(self, space: SearchSpace, rng: np.random.Generator) -> None:
        self._space, self._rng = space, rng
        self.kick = FIRST_KICK - 1  # moves of the last restart

    def draw(self, best: Levels, *, better: bool) -> Levels | None:
        """A feasible profile, (n,) -> (n,); None if none other is reached. `better`: whether the best is new."""
        self.kick = FIRST_KICK if better else self.kick + 1
        if self.kick > max(FIRST_KICK, LARGEST_KICK * self._space.moves.count):
            self.kick = FIRST_KICK - 1
            starts = self._space.random(TRIES, self._rng)
        else:
            starts = _exchanged(best, np.full(TRIES, self.kick), self._space, self._rng)
        others = starts[(starts != best).any(axis=1)]
        return others[0] if len(others) else None


def _exchanged(profile: Levels, number: NDArray[np.intp], space: SearchSpace, rng: np.random.Generator) -> Levels:
    """A feasible profile (n,) after so many random moves each, budget filled again: (k,) -> (k, n)."""
    rows = np.repeat(profile[None], len(number), axis=0)
    return exchange(rows, space.budget - space.cost_of(rows), number, space, rng)
