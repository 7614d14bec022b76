"""Races: data goes to the candidates that may still win, and those that cannot are dropped.

All candidates of a round are measured on the same sample, so that what counts are paired differences. After a round a
candidate drops out if it is behind the leader by more than the error of that difference allows (as in F-race; Birattari
and others, GECCO 2002), or if it is not among the best share of them (successive halving; Jamieson and Talwalkar,
AISTATS 2016). The next round has fresh and more data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from discopt.arrays import pack, unpack
from discopt.objective import Losses
from discopt.space import Levels

Floats = NDArray[np.float64]

BEHIND = 2.0  # standard errors behind the leader, from which on a candidate cannot win


def rounds_to(full: int, first: int) -> tuple[int, ...]:
    """Fidelities of rounds, each four times the one before, from `first` to `full`."""
    rounds = [min(first, full)]
    while 4 * rounds[-1] < full:
        rounds.append(4 * rounds[-1])
    return (*rounds, full) if rounds[-1] < full else tuple(rounds)


def race_cost(candidates: int, rounds: tuple[int, ...], share: int) -> int:
    """What a race of so many, the incumbent among them, takes at most."""
    cost, others = 0, candidates - 1
    for fidelity in rounds:
        cost += (1 + others) * fidelity
        others = -(-others // share)
    return cost


class Race:
    """Candidates (k, n), the first of them the incumbent, which stays to the end.

    `fidelities` are those of the rounds, rising; at most one in `share` of the others goes on after each round.
    """

    def __init__(self, candidates: Levels, fidelities: tuple[int, ...], share: int = 4) -> None:
        if len(candidates) < 1 or not fidelities or share < 1:
            raise ValueError(
                f"expected candidates, rounds and a share of at least 1, got {len(candidates)}, {fidelities}, {share}"
            )
        self.candidates, self.fidelities, self.share = candidates, fidelities, share
        self.running = np.arange(len(candidates))  # those of the next round
        self.round = 0
        self.latest = np.full(len(candidates), np.nan)  # loss in the last round that each was in
        self._samples = np.empty((len(candidates), 0))  # NaN where a candidate was out
        self._weight = np.empty(0)  # (samples,) fidelity of each
        self._ends: list[int] = []  # samples after each round

    @property
    def done(self) -> bool:
        return self.round == len(self.fidelities) or (self.round > 0 and len(self.running) == 1)

    @property
    def fidelity(self) -> int:
        """Of the next round."""
        return self.fidelities[self.round]

    @property
    def population(self) -> Levels:
        """Of the next round."""
        return self.candidates[self.running]

    def tell(self, losses: Losses) -> None:
        """What the running candidates lost in this round: (k,) or (k, s)."""
        samples = np.where(np.isnan(losses), np.inf, losses).reshape(len(self.running), -1)
        block = np.full((len(self.candidates), samples.shape[1]), np.nan)
        block[self.running] = samples
        self._samples = np.hstack([self._samples, block])
        self._weight = np.append(self._weight, np.full(samples.shape[1], self.fidelity / samples.shape[1]))
        self._ends.append(len(self._weight))
        self.latest[self.running] = samples.mean(axis=1)
        self.round += 1
        self._drop()

    def _drop(self) -> None:
        means = self._means(self.running)
        leader = self.running[int(means.argmin())]
        others = self.running[1:]
        behind, error = self.differences(leader)
        hopeful = others[~(behind[others] > BEHIND * error[others])]
        order = hopeful[np.argsort(behind[hopeful], kind="stable")]
        kept = math.ceil(len(others) / self.share)
        self.running = np.concatenate([self.running[:1], np.sort(order[:kept])])

    def _means(self, rows: NDArray[np.intp]) -> Floats:
        """Mean losses of rows that were in all rounds so far."""
        return (self._samples[rows] @ self._weight) / self._weight.sum()

    def differences(self, reference: int) -> tuple[Floats, Floats]:
        """Mean difference of each candidate's loss to the reference's, and its standard error: (k,), (k,).

        Over the samples that both have; the error is infinite where there is only one.
        """
        both = ~np.isnan(self._samples) & ~np.isnan(self._samples[reference])
        with np.errstate(invalid="ignore"):
            apart = np.where(both, self._samples - self._samples[reference], 0.0)
        apart = np.where(np.isnan(apart), np.inf, apart)  # infinite losses of both
        weight = both * self._weight
        total = np.maximum(weight.sum(axis=1), 1e-300)
        count = both.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = (apart * weight).sum(axis=1) / total
            mean = np.where(np.isnan(mean), np.inf, mean)  # infinite losses of either
            squares = (weight / total[:, None]) ** 2 * (apart - mean[:, None]) ** 2
            error = np.sqrt(squares.sum(axis=1) * count / (count - 1))
        known = (count > 1) & np.isfinite(mean)
        known[reference] = False
        if known.any():  # few samples make for errors that are small by chance
            usual = np.median(error[known] ** 2 * count[known])
            error = np.sqrt(np.maximum(error**2, usual / np.maximum(count, 1)))
        error = np.where(known, error, np.where(np.isfinite(mean), np.inf, 0.0))
        error[reference] = 0.0
        return mean, error

    def fidelity_of(self, row: int) -> int:
        """How much data a candidate was measured on."""
        return round(float(self._weight[~np.isnan(self._samples[row])].sum()))

    def rounds(self) -> Iterator[tuple[int, NDArray[np.intp], Floats]]:
        """Of each round its fidelity, the candidates in it, and how much more than the incumbent each lost."""
        for fidelity, begin, end in zip(self.fidelities, [0, *self._ends], self._ends, strict=False):
            rows = np.flatnonzero(~np.isnan(self._samples[:, begin]))
            means = self._samples[rows, begin:end].mean(axis=1)
            with np.errstate(invalid="ignore"):
                yield fidelity, rows, means - means[0]  # NaN where both are infinite

    @property
    def winner(self) -> int:
        """The candidate that lost least in the last round among those in it; the incumbent where all lost as much."""
        last = self.last
        return int(last[self.latest[last].argmin()])

    @property
    def leader(self) -> int:
        """The candidate with the lowest mean over all rounds, of those in the last one."""
        return int(self.last[self._means(self.last).argmin()])

    @property
    def last(self) -> NDArray[np.intp]:
        """Candidates of the last round."""
        return np.flatnonzero(~np.isnan(self._samples[:, -1]))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "candidates": pack(self.candidates),
            "fidelities": list(self.fidelities),
            "share": self.share,
            "running": pack(self.running),
            "round": self.round,
            "latest": pack(self.latest),
            "samples": pack(self._samples),
            "weight": pack(self._weight),
            "ends": self._ends,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        race = cls(unpack(values["candidates"]), tuple(values["fidelities"]), values["share"])
        race.running, race.round, race._ends = unpack(values["running"]), values["round"], list(values["ends"])
        race.latest, race._samples, race._weight = (unpack(values[key]) for key in ("latest", "samples", "weight"))
        return race
