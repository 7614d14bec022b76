"""Small spaces with all that a search has to respect."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from discopt import SearchSpace

SIZES = np.array([1, 3, 2, 5, 1, 2, 3])
ALLOWED = np.ones((7, 3), dtype=bool)
ALLOWED[1, 0] = ALLOWED[3, 1] = ALLOWED[6, 2] = False


def _bundles() -> SearchSpace:
    cost = SIZES[:, None] * np.array([0, 1, 3])
    return SearchSpace.build(cost, 26, together=["a", "b", "a", "c", "a", "b", "d"])


def _two_resources() -> SearchSpace:
    levels = np.arange(3)
    cost = np.stack([SIZES[:, None] * levels, SIZES[::-1, None] * levels**2])
    return SearchSpace.build(cost, [17, 30])


def _everything() -> SearchSpace:
    cost = np.stack([SIZES[:, None] * np.array([0, 1, 3]), np.ones((7, 3), dtype=np.int64) * np.arange(3)])
    return SearchSpace.build(cost, [30, 9], allowed=ALLOWED, together=["a", "b", "a", "c", "d", "b", "e"])


SPACES: dict[str, Callable[[], SearchSpace]] = {
    "equal": lambda: SearchSpace.build(np.tile(np.arange(3), (7, 1)), 7),
    "unequal": lambda: SearchSpace.build(SIZES[:, None] * np.arange(3), 17),
    "two resources": _two_resources,
    "forbidden levels": lambda: SearchSpace.build(SIZES[:, None] * np.arange(3), 17, allowed=ALLOWED),
    "bundles": _bundles,
    "everything": _everything,
}
