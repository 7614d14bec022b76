"""Noise that falls with fidelity, on any problem.

At fidelity f the noise of a row has mean 0 and standard deviation sigma / sqrt(f) over seeds; it is a pure function of
(row, fidelity, seed). Two kinds:

- "shared": the sample perturbs the effect of every unit and level a little, and a row's noise is the scaled sum over
  its units. Rows that differ in d of n units differ in noise by sqrt(2 d / n) of the above only, as two nearly equal
  models do on one sample of text: comparing candidates on one sample pays.
- "independent": the noise of different rows is unrelated, even on one sample; nothing is gained from sharing it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from discopt.objective import Losses, Objective, Query, as_objective, mean_loss
from discopt.problem import Problem
from discopt.space import Levels

KINDS = ("shared", "independent")


def noisy(problem: Problem, sigma: float | None = None, *, kind: str = "shared", samples: int | None = None) -> Problem:
    """The problem with noise of standard deviation sigma / sqrt(fidelity) added to its noise-free loss.

    `sigma` is that of a measurement at fidelity 1, by default the problem's own spread among random profiles. With
    `samples`, the answer is (k, s), one column per sample, s = min(samples, fidelity): their mean has the noise above.
    Only the noise depends on the fidelity; the optimum stays.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be shared or independent, got {kind!r}")
    sigma = problem.spread() if sigma is None else sigma
    if not (sigma >= 0 and math.isfinite(sigma)):
        raise ValueError(f"sigma must be finite and not negative, got {sigma}")
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    truth = as_objective(problem.truth if problem.truth is not None else problem.objective)
    return replace(
        problem,
        name=f"noisy-{problem.name}",
        objective=_Noisy(truth, problem.fidelity, problem.space.m, sigma, kind, samples),
        note=f"{problem.note}; {kind} noise of {sigma:.3g} / sqrt(fidelity)",
        truth=truth,
    )


@dataclass(frozen=True, eq=False)
class _Noisy:
    truth: Objective
    true_fidelity: int
    m: int
    sigma: float
    kind: str
    samples: int | None

    def evaluate(self, query: Query) -> Losses:
        exact = mean_loss(self.truth.evaluate(Query(query.population, self.true_fidelity, query.seed)))
        columns = 1 if self.samples is None else min(self.samples, query.fidelity)
        draw = _shared if self.kind == "shared" else _independent
        rng = np.random.default_rng([query.seed, query.fidelity])
        noise = np.stack([draw(query.population, self.m, rng) for _ in range(columns)], axis=1)  # (k, s)
        losses = exact[:, None] + self.sigma * math.sqrt(columns / query.fidelity) * noise
        return losses[:, 0] if self.samples is None else losses


def _shared(population: Levels, m: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Standard normal for each row, the nearer the more alike: (k, n) -> (k,)."""
    n = population.shape[1]
    effect = rng.standard_normal((n, m))
    return effect[np.arange(n), population].sum(axis=1) / math.sqrt(n)


def _independent(population: Levels, m: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Standard normal for each row, unrelated between rows: (k, n) -> (k,), by a hash of the row."""
    n = population.shape[1]
    key = rng.integers(2**64, size=(n, m), dtype=np.uint64)
    row = np.bitwise_xor.reduce(key[np.arange(n), population], axis=1)  # Zobrist hashing
    uniform = ((row >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53
    return ndtri(uniform)
