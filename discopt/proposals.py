"""Where a learning search gets its candidates, and which of a pool it takes: those that may gain most together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from discopt.archive import Archive
from discopt.factor import cholesky
from discopt.guided import cross, trade
from discopt.mutation import offspring
from discopt.space import Levels, SearchSpace
from discopt.surrogate import Posterior, Surrogate

Rows = NDArray[np.intp]

STEPS = 12  # of a descent on the model, at most
POOL = np.array([1, 1, 1, 1, 2, 2, 4, 8])  # moves of the offspring that each step chooses from
ERRORS = np.array([0.1, 0.3, 1.0, 3.0])  # random errors of their guide, over the mean size of an effect
SAMPLES = 128  # joint draws that expected gains are means of
TOURNAMENT = 2


class Batch:
    """Candidates of a generation and their sources."""

    def __init__(self, archive: Archive, n: int) -> None:
        self._archive = archive
        self.rows: Levels = np.empty((0, n), dtype=np.int16)
        self.sources: NDArray[np.int8] = np.empty(0, dtype=np.int8)

    def put(self, candidates: Levels, source: int) -> None:
        """All of these (k, n), whether they were measured before or not."""
        self._archive.remember(candidates)
        self.rows = np.concatenate([self.rows, candidates])
        self.sources = np.append(self.sources, np.full(len(candidates), source, dtype=np.int8))

    def take(self, candidates: Levels, count: int, source: int) -> int:
        """The first new ones of these (k, n), at most so many; returns how many there were."""
        new = screen(None, candidates, count, self._archive)
        self.put(new, source)
        return len(new)


def descend(
    model: Surrogate,
    starts: Levels,
    draw: Rows,
    radius: int,
    archive: Archive,
    space: SearchSpace,
    rng: np.random.Generator,
    inside: Callable[[Levels], NDArray[np.bool_]] | None = None,
) -> Levels:
    """The new profiles that draws of the model like best, on the way down from starts: (b, n), (b,) -> (at most b, n).

    A descent goes on from the best of several offspring as long as the draw expects it to be better, no more than
    `radius` units from its start, and `inside` what is allowed: (k, n) -> (k,).
    """
    best: dict[int, tuple[float, Levels]] = {}
    here, value = starts.copy(), model.values(starts, draw)
    going = np.arange(len(starts))
    for _ in range(STEPS):
        gains = model.gains(here[going], draw[going])
        of = np.repeat(np.arange(len(going)), len(POOL))
        error = np.abs(gains).mean(axis=(1, 2))[of] * rng.choice(ERRORS, size=len(of))
        children = trade(here[going][of], gains[of], np.tile(POOL, len(going)), error, space, rng)
        expected = model.values(children, draw[going][of])
        expected[(children != starts[going][of]).sum(axis=1) > radius] = np.inf
        if inside is not None:
            expected[~inside(children)] = np.inf
        table = expected.reshape(len(going), -1)
        fresh = np.where(archive.new(children), expected, np.inf).reshape(table.shape)
        for place, row in enumerate(going):
            child = int(fresh[place].argmin())
            if fresh[place, child] < best.get(int(row), (np.inf,))[0]:
                best[int(row)] = float(fresh[place, child]), children[place * len(POOL) + child]
        chosen = table.argmin(axis=1)
        lowest = table[np.arange(len(going)), chosen]
        better = lowest < value[going]
        here[going[better]] = children[(np.arange(len(going)) * len(POOL) + chosen)[better]]
        value[going[better]] = lowest[better]
        going = going[better]
        if not len(going):
            break
    found = np.array([profile for _, profile in best.values()], dtype=np.int16).reshape(-1, space.n)
    return found[archive.new(found)]  # two descents may have come by one profile


def crossed(elite: Levels, count: int, space: SearchSpace, rng: np.random.Generator) -> Levels:
    """Children of pairs of an elite (p, n), best first, each the better of some drawn: -> (count, n)."""
    parents = rng.integers(len(elite), size=(2, count, TOURNAMENT)).min(axis=2)
    return cross(elite[parents[0]], elite[parents[1]], space, rng)


def switched(parents: Levels, count: int, switches: int, space: SearchSpace, rng: np.random.Generator) -> Levels:
    """Offspring of parents (p, n) by up to `switches` level switches, the fewer the likelier: (at most count, n)."""
    weights = 1.0 / np.arange(1, switches + 1)
    rule = "within" if space.even else "exchange"
    return offspring(parents, count, space, rng, switches=tuple(weights), rule=rule)


def merged(parent: Levels, children: Levels, space: SearchSpace, rng: np.random.Generator) -> Levels:
    """The changes of all children (k, n) of a parent (n,) in one, the earlier child's where they differ: (1, n)."""
    one = parent.copy()
    for child in children:
        free = one == parent
        for units in space.bundles:
            free[units] = free[units].all()
        one = np.where(free, child, one)
    return one[None] if space.feasible(one[None])[0] else cross(one[None], one[None], space, rng)


def screen(model: Surrogate | None, candidates: Levels, count: int, archive: Archive) -> Levels:
    """The new ones among candidates (k, n) of which the model expects most, or the first: (at most count, n)."""
    fresh = candidates[archive.new(candidates)]
    if model is None or len(fresh) <= count:
        return fresh[:count]
    expected = model.values(fresh, np.zeros(len(fresh), dtype=np.intp))
    return fresh[np.argsort(expected, kind="stable")[:count]]


def choose(
    posterior: Posterior, incumbent: Levels, pool: Levels, count: int, rng: np.random.Generator
) -> NDArray[np.intp]:
    """Rows of the pool (k, n) that together are expected to improve most on the incumbent (n,): (at most count,).

    Greedily by the mean over joint draws of what the best of the chosen gains (q-EI; Ginsbourger et al., 2010).
    """
    mean, covariance = posterior.joint(np.concatenate([incumbent[None], pool]))
    half = cholesky(covariance)
    drawn = mean + rng.standard_normal((SAMPLES, len(mean))) @ half.T
    gain = drawn[:, :1] - drawn[:, 1:]  # (samples, k)
    best = np.zeros((SAMPLES, 1))
    chosen: list[int] = []
    for _ in range(min(count, len(pool))):
        expected = np.maximum(gain, best).mean(axis=0)
        expected[chosen] = -np.inf
        if expected.max() <= best.mean():  # nothing gains: by what is nearest to it
            expected = (gain / np.sqrt(np.diag(covariance)[1:] + 1e-300)).mean(axis=0)
            expected[chosen] = -np.inf
        row = int(expected.argmax())
        chosen.append(row)
        best = np.maximum(best, gain[:, row : row + 1])
    return np.array(chosen, dtype=np.intp)
