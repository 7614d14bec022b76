"""Cholesky factors that grow row by row, and factors in spite of rounding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

JITTERS = (0.0, 1e-9, 1e-7, 1e-5)  # added to the diagonal in turn, over its largest entry


class BlockFactor:
    """The Cholesky factor L of a matrix that grows: a first block, and the rows that were added to it.

    [[A, B], [B', C]] has the factor [[L_A, 0], [Z', L_C]] with Z = L_A^-1 B and L_C L_C' = C - Z' Z.
    """

    def __init__(self) -> None:
        self._first = np.empty((0, 0))  # L_A
        self._below = np.empty((0, 0))  # Z'
        self._last = np.empty((0, 0))  # L_C

    def add(self, with_known: Floats, own: Floats) -> None:
        """Rows whose products with those before are (N, k), and with each other (k, k)."""
        first = len(self._first)
        if not first:
            self._first, self._below = cholesky(own), np.empty((0, len(own)))
            return
        below = solved(self._first, with_known[:first]).T  # (k, N_A)
        left = with_known[first:] - self._below @ below.T
        right = solved(self._last, left).T if len(left) else left.T
        corner = cholesky(own - below @ below.T - right @ right.T)
        zeros = np.zeros((len(self._last), len(own)))
        self._last = np.asfortranarray(np.block([[self._last, zeros], [right, corner]]))
        self._below = np.concatenate([self._below, below])

    def halved(self, target: Floats) -> Floats:
        """L^-1 times (N, d)."""
        first = len(self._first)
        above = solved(self._first, target[:first])
        if not len(self._last):
            return above
        return np.concatenate([above, solved(self._last, target[first:] - self._below @ above)])

    def solve(self, target: Floats) -> Floats:
        """The matrix's inverse times (N, d)."""
        first = len(self._first)
        half = self.halved(target)
        if not len(self._last):
            return solved(self._first, half, transposed=True)
        rest = solved(self._last, half[first:], transposed=True)
        return np.concatenate([solved(self._first, half[:first] - self._below.T @ rest, transposed=True), rest])


def solved(factor: Floats, target: Floats, *, transposed: bool = False) -> Floats:
    """L^-1, or its transpose, of a lower (N, N) in Fortran's order times (N, d)."""
    from scipy.linalg.blas import dtrsm

    return dtrsm(1.0, factor, target, lower=1, trans_a=int(transposed))


def cholesky(matrix: Floats) -> Floats:
    """The lower factor of a positive definite matrix (k, k), or of one near it where rounding made it none."""
    from scipy import linalg

    size = max(float(np.diag(matrix).max(initial=0.0)), 1e-300)
    for jitter in JITTERS:
        try:
            lower = linalg.cholesky(matrix + jitter * size * np.eye(len(matrix)), lower=True, check_finite=False)
            return np.asfortranarray(lower)
        except linalg.LinAlgError:
            continue
    return np.asfortranarray(np.diag(np.sqrt(np.maximum(np.diag(matrix), JITTERS[-1] * size))))
