"""Baselines over the levels of a bank: each a function from the bank's own levels to a profile of the same budget.

Additive: the sum of the units' relative layer errors tr(ΔW H ΔWᵀ) / tr(W H Wᵀ), or of the losses of each unit measured
alone, minimised exactly (as SPDY's dynamic programming does; Frantar and Alistarh, 2022, arXiv 2201.13096). OWL: a
block with more outliers among |W|·‖x‖ keeps more weights (Yin et al., 2024, arXiv 2310.05175).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from discopt.errors import BudgetError
from discopt.progress import task
from discopt.separable import solve_separable
from discopt.space import Levels, SearchSpace
from discopt_llm.bank import Bank
from discopt_llm.evaluator import TEACHER, Measurer
from discopt_llm.fitness import Fitness
from discopt_llm.genome import Genome
from discopt_llm.heuristics import Remembered

__all__ = ["Measured", "additive", "owl", "uniform"]

OWL_SPREADS = (0.02, 0.05, 0.08, 0.15)  # λ: how far the densities of blocks may lie from the target
LEAST_EFFECT = 0.01  # of the median: what measuring a unit alone adds to the loss, at least
BATCH = 16  # profiles measured between two steps of the progress bar


def uniform(genome: Genome, space: SearchSpace) -> Levels:
    """One level for all units, as far as the budget allows, and what is left spread evenly: (n,).

    Where kinds are mixed that is one width, or one number of steps, for all; of the kinds the one with the smallest
    sum of relative layer errors.
    """
    if genome.kind != "mixed":
        return space.nearest_uniform()
    banks = sorted({form.bank for row in genome.forms for form in row if form is not None})
    found = [profile for bank in banks if (profile := _uniform_of(bank, genome, space)) is not None]
    errors = [genome.errors[np.arange(genome.n), profile].sum() for profile in found]
    return found[int(np.argmin(errors))] if found else space.nearest_uniform()


def _uniform_of(bank: int, genome: Genome, space: SearchSpace) -> Levels | None:
    """The uniform profile of one bank's levels, (n,); None where a unit has none, or they are over the budget."""
    last = max(form.level for row in genome.forms for form in row if form is not None)
    place = np.full((genome.n, last + 1), -1, dtype=np.int16)  # of the bank's levels among those of the unit
    for unit, row in enumerate(genome.forms):
        for level, form in enumerate(row):
            if form is not None and form.bank == bank:
                place[unit, form.level] = level
    allowed = place >= 0
    if not allowed.any(axis=1).all():
        return None
    units = np.arange(genome.n)
    try:
        own = SearchSpace.build(space.cost[:, units[:, None], place], space.budget, group="none", allowed=allowed)
    except BudgetError:
        return None
    return place[units, own.nearest_uniform()]


def additive(genome: Genome, space: SearchSpace) -> Levels:
    """The profile with the smallest sum of relative layer errors, exactly: (n,)."""
    return solve_separable(space, genome.errors)


def owl(bank: Bank, genome: Genome, space: SearchSpace) -> Levels:
    """OWL's profiles for all of its grid of λ and M: (k, n), different ones.

    A block's share of outliers, mapped linearly to densities within λ of the target, says how many of its weights
    to keep. Of the profiles that spend the budget, the nearest to that is taken, in squares of the densities'
    differences, each weight counted.
    """
    dense = genome.costs.dense.astype(np.float64)
    of_blocks = np.bincount(genome.block_of, dense)
    target = genome.costs.weights[np.arange(genome.n), uniform(genome, space)].sum() / dense.sum()
    density = genome.costs.weights / dense[:, None]
    profiles = []
    for multiple in bank.layers[0].outliers:
        share = _block_outliers(bank, multiple)
        centred = (share - np.average(share, weights=of_blocks)) / (np.ptp(share) or 1.0)
        for width in OWL_SPREADS:
            wanted = np.clip(target + 2 * width * centred, 0, 1)[genome.block_of]
            distance = np.where(genome.present, dense[:, None] * (density - wanted[:, None]) ** 2, np.inf)
            profiles.append(solve_separable(space, distance - _price(distance, space.cost[0]) * space.cost[0]))
    return np.unique(np.stack(profiles), axis=0)


def _price(loss: NDArray[np.float64], cost: NDArray[np.int64]) -> float:
    """What makes every step up worth its cost: the most that a step adds to a loss (n, m), for each unit of cost."""
    steps = np.isfinite(loss[:, 1:]) & np.isfinite(loss[:, :-1]) & (cost[:, 1:] > cost[:, :-1])
    added = (loss[:, 1:][steps] - loss[:, :-1][steps]) / (cost[:, 1:] - cost[:, :-1])[steps]
    return float(added.max(initial=0.0))


def _block_outliers(bank: Bank, multiple: str) -> NDArray[np.float64]:
    """The share of outliers in each block, (blocks,)."""
    block = np.array([layer.block for layer in bank.layers])
    weights = np.array([layer.dense for layer in bank.layers], dtype=np.float64)
    share = np.array([layer.outliers[multiple] for layer in bank.layers])
    return np.bincount(block, weights * share) / np.bincount(block, weights)


@dataclass(frozen=True, eq=False)
class Measured:
    """What takes measuring: losses of profiles on one sample of text."""

    evaluator: Measurer
    sample: Sequence[Tensor]
    fitness: Fitness
    quiet: bool = False
    remembered: Remembered | None = None  # where to look, before measuring, and to put what was measured

    def best(self, what: str, population: Levels) -> tuple[Levels, int]:
        """The profile of a population (k, n) with the lowest loss, (n,), and the tokens it took to find it."""
        return population[int(np.argmin(self._losses(what, population)))], self._tokens(population)

    def random(self, space: SearchSpace, count: int, seed: int) -> tuple[Levels, int]:
        """The best of so many random profiles, (n,), and the tokens it took to find it."""
        return self.best("random profiles", space.random(count, np.random.default_rng((seed, 1))))

    def effects(self, genome: Genome, centre: Levels) -> tuple[NDArray[np.float64], int]:
        """What each level of a unit adds to the loss by itself, (n, m), and the tokens it took to measure that.

        Each unit is measured once: at its level of `centre` (n,), all others being the teacher's. There a loss has no
        noise of other units' errors in it; around a compressed profile the effect of one unit drowns in that. Its
        other levels are taken to lose in proportion to their layer errors.
        """
        units = np.arange(genome.n)
        alone = np.full((genome.n + 1, genome.n), TEACHER, dtype=np.int16)
        alone[units, units] = centre  # the last row is the teacher
        losses = self._losses("units", alone)
        effect = losses[:-1] - losses[-1]
        floor = max(LEAST_EFFECT * float(np.median(effect)), np.finfo(float).tiny)  # noise must not make a unit free
        error = genome.errors[units, centre]
        weight = np.maximum(effect, floor) / np.where(error > 0, error, 1.0)
        return weight[:, None] * genome.errors, self._tokens(alone)

    def _losses(self, what: str, population: Levels) -> NDArray[np.float64]:
        """Mean losses of a population (k, n), (k,); infinite where one is not a number."""
        if self.remembered is None:
            return self._measured(what, population)
        name = self.fitness.name
        return self.remembered.losses(population, self.sample, name, lambda rows: self._measured(what, rows))

    def _measured(self, what: str, population: Levels) -> NDArray[np.float64]:
        """`_losses`, measured now."""
        means: list[float] = []
        with task(what, len(population), unit="profiles", quiet=self.quiet) as progress:
            for start in range(0, len(population), BATCH):
                part = population[start : start + BATCH]
                (losses,) = self.evaluator.measure(part, self.sample, [self.fitness])
                means += np.nan_to_num(losses.mean(axis=1), nan=np.inf).tolist()
                progress.advance(len(part))
        return np.array(means)

    def _tokens(self, population: Levels) -> int:
        return len(population) * sum(map(len, self.sample))
