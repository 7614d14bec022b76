"""Where a search with exact measurements looks: around one profile after another, each until it gets no better.

Iterated local search (Lourenço, Martin, Stützle, 2003) with crossover, as in memetic algorithms: the next basin begins
some random moves away from the best profile, more of them each time that led to nothing, or between two of the best.
A model that knows the best profile leads back to it from anywhere, so a basin keeps half as far from it as it began.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from discopt import proposals
from discopt.arrays import pack, unpack
from discopt.exchange import exchange
from discopt.objective import Losses
from discopt.space import Levels, SearchSpace

PATIENCE, PATIENCE_PER_UNIT = 24, 0.4  # measurements in a basin, at least and per unit, that may fail to be better
FIRST_KICK, LARGEST_KICK = 2, 0.5  # moves away from the best: the least, and the most, in units
CROSSED = 0.5  # of the basins that begin between two of the best, once there are some
LEAST_ELITE = 4  # of which two are crossed
STARTS = 16  # among which the model chooses
APART = 0.5  # of the units that a basin's start differs from the best profile in, all its profiles have to


class Basins:
    """The profile that candidates come from, and when and where to go on elsewhere."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.center: Levels | None = None  # (n,) None before anything was measured
        self.loss = math.inf  # of the center
        self._idle = 0  # measurements since it became better
        self.moving = False  # whether the next measurement begins a basin, and says nothing of how good candidates are
        self._peak_profile: Levels | None = None  # the best when the last basin was left
        self._apart = 0  # units that profiles of this basin differ from it in, at least
        self._kick = FIRST_KICK - 1
        self._peak = math.inf  # the best loss when the last basin was left

    @property
    def stuck(self) -> bool:
        """Whether the center has not become better for long."""
        return self._idle > max(PATIENCE, self.space.n * PATIENCE_PER_UNIT)

    def learn(self, population: Levels, means: Losses) -> None:
        """Take in what profiles (k, n) lost, (k,), NaN being no value."""
        row = int(means.argmin())
        better = bool(means[row] < self.loss)
        self._idle = 0 if better or self.moving else self._idle + len(means)
        if self.center is None or means[row] <= self.loss or self.moving:
            self.center, self.loss = population[row], float(means[row])
        if self.moving and self._peak_profile is not None:
            self._apart = int(APART * (self.center != self._peak_profile).sum())
        self.moving = False

    def starts(self, best: Levels, loss: float, elite: Levels, rng: np.random.Generator) -> Levels:
        """Where the next basin may begin, (STARTS, n), given the best profile (n,), its loss, and an elite (p, n)."""
        self._kick = FIRST_KICK if loss < self._peak else self._kick + 1
        self._peak = min(self._peak, loss)
        if self._kick > LARGEST_KICK * self.space.n:
            self._kick = FIRST_KICK
        if len(elite) >= LEAST_ELITE and rng.random() < CROSSED:
            return proposals.crossed(elite, STARTS, self.space, rng)
        rows = np.repeat(best[None], STARTS, axis=0)
        slack = self.space.budget - self.space.cost_of(rows)
        return exchange(rows, slack, np.full(STARTS, self._kick), self.space, rng)

    def move(self, best: Levels) -> None:
        """The next measurement is the start of a basin, away from the best profile (n,)."""
        self.moving, self._peak_profile = True, best

    def inside(self, profiles: Levels) -> NDArray[np.bool_]:
        """Which of the profiles (k, n) are not too near to the one that the basin is to be away from: (k,)."""
        if self._peak_profile is None:
            return np.ones(len(profiles), dtype=bool)
        inside: NDArray[np.bool_] = (profiles != self._peak_profile).sum(axis=1) >= self._apart
        return inside

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        center = None if self.center is None else pack(self.center)
        peak = None if self._peak_profile is None else pack(self._peak_profile)
        rest = {name: getattr(self, name) for name in ("loss", "moving", "_idle", "_apart", "_kick", "_peak")}
        return {"center": center, "peak": peak, "rest": rest}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.center = None if state["center"] is None else unpack(state["center"])
        self._peak_profile = None if state["peak"] is None else unpack(state["peak"])
        for name, value in state["rest"].items():
            setattr(self, name, value)
