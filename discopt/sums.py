"""Whether a loss is a sum over the units, and where the sum is lowest if it is.

If the changes of several children of one parent, of which no two touch the same unit, are made at once, a sum changes
by the sum of what each changed, exactly. So one more measurement decides, and hardly any other loss passes two.

The effects of levels are then a linear regression. Until there are as many measurements as effects, draws from its
posterior are minimised exactly (Thompson sampling): what is not known yet is measured where it may matter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from discopt.arrays import pack, unpack
from discopt.separable import solve_separable
from discopt.space import Levels, SearchSpace
from discopt.surrogate import level_features

Floats = NDArray[np.float64]

PROOFS = 2  # that a loss is taken for a sum after
LEAST_CHILDREN = 2  # in a proof
CLOSE = 1e-9  # of the changes' sizes
MISFIT = 1e-3  # of the largest difference of losses, that effects may leave unexplained
RIDGE = 1e-9  # of the mean square of a measurement's features
ROWS = 1500  # measurements that effects are computed from, at most
CELLS = 1 << 13  # units times levels, at most: beyond, a draw takes seconds


class Sums:
    """Proofs that a loss is a sum, made on the way of a search whose measurements are exact."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self._proofs = 0 if space.n * space.m <= CELLS else None  # None: it is no sum
        self.solved = False  # its lowest profile was measured, and nothing is left to draw
        self._union: tuple[Levels, float, float] | None = None  # a profile, what it must lose, and how exactly

    @property
    def proven(self) -> bool:
        """Whether the loss is taken for a sum."""
        return self._proofs is not None and self._proofs >= PROOFS

    @property
    def open(self) -> bool:
        """Whether it is not decided yet."""
        return self._proofs is not None and self._proofs < PROOFS

    @property
    def probe(self) -> Levels:
        """The profile that would prove or refute it: (1, n), or (0, n)."""
        if self._union is None:
            return np.empty((0, self.space.n), dtype=np.int16)
        return self._union[0][None]

    def learn(self, parent: Levels, loss: float, children: Levels, losses: Floats) -> None:
        """Take in what a parent (n,) and its children (k, n) lost, among them perhaps the probe."""
        if self._proofs is None or not self.open:
            return
        union, self._union = self._union, None
        if union is not None:
            profile, expected, close = union
            for measured in losses[(children == profile).all(axis=1)]:
                if abs(measured - expected) > close:
                    self._proofs = None
                    return
                self._proofs += 1
        if self.open:
            self._union = self._united(parent, loss, children, losses)

    def draws(self, profiles: Levels, losses: Floats, count: int, rng: np.random.Generator) -> Levels:
        """The best profiles of a sum that these (k, n) with losses (k,) leave possible, likeliest first: (count, n).

        None where they show that it is no sum after all: (0, n).
        """
        effects = draw_effects(self.space, profiles, losses, count, rng)
        explained = effects[0, np.arange(self.space.n), profiles].sum(axis=1)
        misfit = (losses - losses[0]) - (explained - explained[0])
        if np.ptp(misfit) > MISFIT * np.ptp(losses):
            self._proofs = self._union = None
            return profiles[:0]
        return np.stack([solve_separable(self.space, table, exact=not row) for row, table in enumerate(effects)])

    def _united(
        self, parent: Levels, loss: float, children: Levels, losses: Floats
    ) -> tuple[Levels, float, float] | None:
        """The changes of as many children as fit together, and what a sum would make of them."""
        if not np.isfinite(loss):
            return None
        union, total, size, number = parent, loss, 0.0, 0
        changes = children != parent
        for row in np.argsort(changes.sum(axis=1), kind="stable"):  # the small changes first, so that many fit
            child, measured, changed = children[row], losses[row], changes[row]
            both = np.where(changed, child, union)
            apart = changed.any() and not (changed & (union != parent)).any()
            if apart and np.isfinite(measured) and self.space.feasible(both[None])[0]:
                union, number = both, number + 1
                total, size = total + (measured - loss), size + abs(measured - loss)
        return (union, total, CLOSE * (size + abs(loss))) if number >= LEAST_CHILDREN and size > 0 else None

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        union = None if self._union is None else [pack(self._union[0]), *self._union[1:]]
        return {"proofs": self._proofs, "solved": self.solved, "union": union}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self._proofs, self.solved, union = state["proofs"], state["solved"], state["union"]
        self._union = None if union is None else (unpack(union[0]), union[1], union[2])


def draw_effects(space: SearchSpace, profiles: Levels, losses: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Effects of levels, drawn from what profiles (k, n) with exact losses (k,) leave possible: (count, n, m).

    The first is the mean. Levels of a unit are a priori as alike as in `discopt.surrogate`; draws are made by
    Matheron's rule.
    """
    from scipy.linalg import cho_factor, cho_solve

    levels = level_features(space.n, space.m).astype(np.float64)
    best = int(losses.argmin())
    features = levels[profiles].reshape(len(profiles), -1)
    features -= features[best]  # only differences count
    target = losses - losses[best]
    gram = features @ features.T
    gram[np.diag_indices_from(gram)] += RIDGE * max(float(np.trace(gram)) / len(gram), RIDGE)
    factor = cho_factor(gram, lower=True, overwrite_a=True, check_finite=False)
    spread = np.sqrt(max(float((target * cho_solve(factor, target)).mean()), 0.0))  # of an effect, likeliest
    drawn = spread * rng.standard_normal((count, features.shape[1]))
    drawn[0] = 0.0
    weights = drawn
    for _ in range(2):  # the second time for what the ridge held back
        weights = weights + cho_solve(factor, (target - weights @ features.T).T, check_finite=False).T @ features
    effects: Floats = weights.reshape(count, space.n, -1) @ levels.T
    return effects
