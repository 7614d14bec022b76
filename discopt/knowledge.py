"""All that a search has measured, and the model of the loss made of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from discopt.archive import Archive
from discopt.arrays import pack, unpack
from discopt.space import SearchSpace
from discopt.surrogate import PRODUCT, Posterior, Shape, best_shape

LEAST_ROWS, LEAST_MODEL = 4, 64  # measurements that a model is made of, and that must fit in it
KEPT = 3 / 4  # of the rows that a model may have, when it is made anew
GROWTH = 1 / 3  # of a model, by measurements that it learns one after the other, until it is made anew
REFIT = 1.5  # times as much spent after which the model's shape is looked for again


@dataclass
class _Known:
    """Which measurements the model knows: the rows of the archive that it began with, and all later ones."""

    rows: NDArray[np.intp]
    forgotten: int  # by the archive, which then has its rows in other places
    ends: list[int]  # how many rows the archive had each time that the model learned

    def is_old(self, archive: Archive, most: int) -> bool:
        """Whether the model should begin anew, of at most so many rows."""
        added = len(archive.losses) - self.ends[0]
        return self.forgotten != archive.forgotten or added > GROWTH * len(self.rows) or len(self.rows) + added > most


class Knowledge:
    """An archive of measurements, and the posterior of the loss, which learns what came since it was last asked for."""

    def __init__(self, space: SearchSpace, *, rows: int, cells: int, prior: NDArray[np.float64] | None = None) -> None:
        """The model has at most `rows` measurements, of `cells` levels in all; for the prior (n, m) see `Posterior`."""
        self.space = space
        self.archive = Archive(space.n)
        self._prior = prior
        self._most = min(rows, cells // (space.n * space.m))
        self._shape: tuple[int, Shape] | None = None  # and how much was spent when it was found
        self._known: _Known | None = None
        self._posterior: Posterior | None = None
        self._taken = 0  # of the known parts, in the posterior

    @property
    def rugged(self) -> bool:
        """Whether the likeliest model is a product over the units."""
        return self._shape is not None and self._shape[1].covariance.name == PRODUCT

    def model(self, spent: int, rng: np.random.Generator) -> Posterior | None:
        """The posterior of all that was measured; None where that is too little, or the space too large."""
        archive = self.archive
        if len(archive.losses) < LEAST_ROWS or self._most < LEAST_MODEL:
            return None
        if self._known is None or self._known.is_old(archive, self._most):
            rows = archive.chosen(int(self._most * KEPT))
            self._known, self._posterior = _Known(rows, archive.forgotten, [len(archive.losses)]), None
            if self._shape is None or spent > REFIT * self._shape[0]:
                near = self._shape[1] if self._shape is not None else None
                shuffled = archive.rows(_shuffled(rows, archive.groups[rows], rng))
                self._shape = spent, best_shape(self.space, *shuffled, prior=self._prior, near=near)
        elif len(archive.losses) > self._known.ends[-1]:
            self._known.ends.append(len(archive.losses))
        return self._posterior_of(self._known, self._shape)

    def _posterior_of(self, known: _Known, shape: tuple[int, Shape] | None) -> Posterior:
        """With all known rows in it, taken in as they were measured, so that a run that goes on has the same."""
        assert shape is not None
        if self._posterior is None:
            first = self.archive.rows(known.rows)
            self._posterior, self._taken = Posterior(self.space, shape[1], *first, prior=self._prior), 1
        for begin, end in itertools.pairwise(known.ends[self._taken - 1 :]):
            self._posterior.add(*self.archive.rows(slice(begin, end)))
        self._taken = len(known.ends)
        return self._posterior

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        known, shape = self._known, self._shape
        return {
            "archive": self.archive.to_dict(),
            "known": {**vars(known), "rows": pack(known.rows)} if known is not None else None,
            "shape": [shape[0], shape[1].to_dict()] if shape is not None else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.archive.restore(state["archive"])
        known, shape = state["known"], state["shape"]
        self._known = _Known(**{**known, "rows": unpack(known["rows"])}) if known else None
        self._shape = (shape[0], Shape.from_dict(shape[1])) if shape else None
        self._posterior = None


def _shuffled(rows: NDArray[np.intp], groups: NDArray[np.intp], rng: np.random.Generator) -> NDArray[np.intp]:
    """The rows (k,) in random order, those of one of the groups (k,) together."""
    order = rng.permutation(len(rows))
    group = groups[order]
    _, first, member = np.unique(np.where(group < 0, -1 - np.arange(len(rows)), group), True, True)
    return rows[order[np.argsort(first[member], kind="stable")]]
