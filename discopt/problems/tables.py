"""Sums of table entries, the losses of most problems."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from discopt.objective import Losses

CHUNK = 1 << 15  # entries looked up together, so that they stay in the processor's cache


def sum_entries(table: NDArray[np.float64], column: NDArray[np.integer]) -> Losses:
    """sum_i table[i, column[r, i]] for every row r: (n, c), (k, n) -> (k,)."""
    n, columns = table.shape
    first, rows = np.arange(n) * columns, max(1, CHUNK // n)
    parts = [table.ravel()[first + column[i : i + rows]].sum(axis=1) for i in range(0, len(column), rows)]
    return np.concatenate([np.empty(0), *parts])
