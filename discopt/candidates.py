"""Populations held as a few profiles and the levels in which each row differs from one of them.

Offspring differ from their parents in a handful of units. Held so, making, comparing and choosing them costs as much
as their changes do, whatever the number of units; rows are built where somebody asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Self

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.intp]
Profiles = NDArray[np.int16]


@dataclass(frozen=True, eq=False)
class Candidates:
    """Row i is `bases[base[i]]` with unit `unit[j]` at `level[j]` for every j of `start[i]:start[i + 1]`."""

    bases: Profiles  # (p, n) levels
    base: Rows  # (k,)
    start: Rows  # (k + 1,) from 0 to c
    unit: Rows  # (c,) different ones within a row
    level: Profiles  # (c,)

    def __post_init__(self) -> None:
        if self.bases.ndim != 2:
            raise ValueError(f"population must have shape (k, n), got {self.bases.shape}")
        if self.start.shape != (len(self.base) + 1,):
            raise ValueError(f"start must have shape ({len(self.base) + 1},), got {self.start.shape}")
        if not len(self.unit) == len(self.level) == self.start[-1]:
            raise ValueError(
                f"there must be a unit and a level for each of {self.start[-1]} changes, "
                f"got {len(self.unit)} and {len(self.level)}"
            )

    @classmethod
    def of_rows(cls, population: Profiles) -> Self:
        """Every row a profile of its own, nothing changed: (k, n)."""
        k = len(population)
        return cls(
            population, np.arange(k), np.zeros(k + 1, np.intp), np.empty(0, dtype=np.intp), np.empty(0, dtype=np.int16)
        )

    @classmethod
    def changed(cls, bases: Profiles, base: Sequence[int], changes: Sequence[dict[int, int]]) -> Self:
        """A row for each dict of new levels by unit, k of them, and the index of the profile (p, n) it changes."""
        levels = [change.values() for change in changes]
        return cls(
            bases,
            np.array(base, dtype=np.intp),
            np.array([0, *accumulate(map(len, changes))], dtype=np.intp),
            np.fromiter(chain.from_iterable(changes), dtype=np.intp),
            np.fromiter(chain.from_iterable(levels), dtype=np.int16),
        )

    def __len__(self) -> int:
        return len(self.base)

    def rows(self) -> Profiles:
        """The profiles, (k, n), in an array of their own."""
        rows = self.bases[self.base]
        rows[np.repeat(np.arange(len(rows)), self.start[1:] - self.start[:-1]), self.unit] = self.level
        return rows

    def row(self, index: int) -> Profiles:
        """One profile, (n,), in an array of its own."""
        row: Profiles = self.bases[self.base[index]].copy()
        first, end = self.start[index : index + 2].tolist()
        row[self.unit[first:end]] = self.level[first:end]
        return row

    def take(self, index: Rows) -> Candidates:
        """The rows of those indices, (i,)."""
        size = self.start[index + 1] - self.start[index]
        start = np.concatenate([[0], size.cumsum()])
        change = np.arange(start[-1]) + np.repeat(self.start[index] - start[:-1], size)
        return Candidates(self.bases, self.base[index], start, self.unit[change], self.level[change])

    def followed_by(self, profiles: Profiles) -> Candidates:
        """These rows and then the given profiles, (q, n); where those are the bases, nothing is copied."""
        q = len(profiles)
        bases = self.bases if profiles is self.bases else np.concatenate([self.bases, profiles])
        base = np.concatenate([self.base, np.arange(len(bases) - q, len(bases))])
        start = np.concatenate([self.start, self.start[-1:].repeat(q)])
        return Candidates(bases, base, start, self.unit, self.level)
