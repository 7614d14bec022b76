"""Where a search with exact measurements looks: around one profile after another, each until it gets no better.

Iterated local search (Lourenço, Martin, Stützle, 2003) with crossover, as in memetic algorithms: the next basin begins
some random moves away from the best profile, more of them each time that led to nothing, or between two of the best.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

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


class Basins:
    """The profile that candidates come from, and when and where to go on elsewhere."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.center: Levels | None = None  # (n,) None before anything was measured
        self.loss = math.inf  # of the center
        self._idle = 0  # measurements since it became better
        self._moving = False  # whether the next measurement is the start of a basin
        self._kick = FIRST_KICK - 1
        self._peak = math.inf  # the best loss when the last basin was left

    @property
    def moving(self) -> bool:
        """Whether what is measured next begins a basin, and says nothing of how good the candidates are."""
        return self._moving

    @property
    def stuck(self) -> bool:
        """Whether the center has not become better for long."""
        return self._idle > max(PATIENCE, self.space.n * PATIENCE_PER_UNIT)

    def learn(self, population: Levels, means: Losses) -> None:
        """Take in what profiles (k, n) lost, (k,), NaN being no value."""
        row = int(means.argmin())
        better = bool(means[row] < self.loss)
        self._idle = 0 if better or self._moving else self._idle + len(means)
        if self.center is None or means[row] <= self.loss or self._moving:
            self.center, self.loss = population[row], float(means[row])
        self._moving = False

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

    def move(self) -> None:
        """The next measurement is the start of a basin."""
        self._moving = True

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        center = None if self.center is None else pack(self.center)
        rest = {name: getattr(self, name) for name in ("loss", "_idle", "_moving", "_kick", "_peak")}
        return {"center": center, "rest": rest}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.center = None if state["center"] is None else unpack(state["center"])
        for name, value in state["rest"].items():
            setattr(self, name, value)
