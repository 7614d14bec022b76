"""The second moment of a layer's inputs, and the triangular factor of its inverse that the solvers feed errors through.

For a layer y = W x the squared error of weights W + dW is tr(dW H dW^T) with H = E[x x^T]. GPTQ (Frantar et al., 2022,
Section 3.3) and SparseGPT (Frantar and Alistarh, 2023, Section 3) solve for it column by column and need of H only the
upper factor U of its inverse, U^T U = (H + damping I)^-1.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Factor", "InputSum", "factor", "quadratic_form"]

logger = logging.getLogger(__name__)

_ROWS = 2048  # treated at a time, which bounds what is copied of them
_FIRST = 1e-6  # what a relative damping of zero is raised to
_LARGEST = 100.0  # relative damping beyond which H is no second moment
_COLUMNS = 512  # no longer worth halving


class InputSum:
    """The second moment of one layer's inputs, summed batch by batch in `dtype`, whatever the inputs are in."""

    def __init__(self, columns: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        if columns < 1:
            raise ValueError(f"expected at least one column, got {columns}")
        self.tokens = 0
        self._sum = torch.zeros((columns, columns), device=device, dtype=dtype)

    @torch.no_grad()
    def add_(self, x: Tensor) -> None:
        """Add inputs (..., C), one token a row."""
        columns = len(self._sum)
        if x.ndim == 0 or x.shape[-1] != columns:
            raise ValueError(f"expected inputs of shape (..., {columns}), got {tuple(x.shape)}")
        rows = x.detach().reshape(-1, columns)
        for part in rows.split(_ROWS):
            part = part.to(self._sum)
            self._sum.addmm_(part.T, part)
        self.tokens += len(rows)

    @property
    def H(self) -> Tensor:
        """Mean of x x^T over the tokens, (C, C), a new tensor; zeros if no token came."""
        return self._sum / max(self.tokens, 1)


@dataclass(frozen=True, eq=False)
class Factor:
    """What the column sweep needs of H, in its order of columns."""

    U: Tensor  # (C, C) upper triangular, U^T U = (H + damping I)^-1 with columns and rows in solving order
    order: Tensor | None  # (C,) the input that is solved at each place; None: from first to last
    dead: Tensor  # (C,) bool, not in solving order: inputs that are always zero, so their weights are set to zero
    damping: float  # what was added to the diagonal of H in the end, in its units


@torch.no_grad()
def factor(H: Tensor, damping: float = 0.01, *, act_order: bool = False) -> Factor:
    """Factor the inverse of a damped second moment H (C, C).

    `damping` is relative to the mean diagonal of the inputs that are not dead. A factorisation that fails is tried
    again with tenfold damping, and a warning is logged with both values. With `act_order`, inputs are solved from the
    largest second moment to the smallest. An H of zeros (no token came) gives U = I, damping 1 and no dead inputs,
    which makes the sweep plain rounding. Raises ValueError for an H that is not square, finite and positive
    semidefinite.
    """
    if H.ndim != 2 or H.shape[0] != H.shape[1]:
        raise ValueError(f"expected H of shape (C, C), got {tuple(H.shape)}")
    if not (math.isfinite(damping) and damping >= 0.0):
        raise ValueError(f"expected a finite damping of at least 0, got {damping}")
    H = H.to(torch.promote_types(H.dtype, torch.float32))
    diagonal = H.diagonal()
    dead = diagonal == 0
    if not torch.isfinite(H).all():
        raise ValueError("expected a finite H, got NaN or infinite values")
    if (lowest := diagonal.min().item()) < 0:
        raise ValueError(f"expected a positive semidefinite H, got {lowest:g} on its diagonal")
    if dead.all():
        return Factor(torch.eye(len(H), device=H.device, dtype=H.dtype), None, torch.zeros_like(dead), 1.0)

    mean = diagonal[~dead].double().mean().item()
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else None
    # With J the matrix that reverses the order, J H J = L L^T gives H^-1 = U^T U for U = (J L J)^-1: one Cholesky
    # factorisation and one triangular inverse instead of two factorisations around an inverse.
    reverse = torch.arange(len(H), device=H.device).flip(0) if order is None else order.flip(0)
    flipped = H[reverse][:, reverse]
    undamped = torch.where(dead, torch.ones_like(diagonal), diagonal)[reverse]
    relative = damping
    while True:
        flipped.diagonal().copy_(undamped + relative * mean)
        L, info = torch.linalg.cholesky_ex(flipped)
        if not info.item() and torch.isfinite(U := _triangular_inverse(L.flip(0, 1))).all():
            return Factor(U, order, dead, relative * mean)
        raised = max(10 * relative, _FIRST)
        if raised > max(_LARGEST, damping):
            raise ValueError(f"expected a positive semidefinite H, got none even with a damping of {relative:g}")
        logger.warning("H is not positive definite with a relative damping of %g: raised it to %g", relative, raised)
        relative = raised


@torch.no_grad()
def quadratic_form(W: Tensor, H: Tensor) -> Tensor:
    """diag(W H W^T) of rows W (..., R, C) and a symmetric H (C, C): (..., R) float64, never negative."""
    parts = W.reshape(-1, W.shape[-1]).split(_ROWS)
    return torch.cat([_quadratic_form(part, H) for part in parts]).clamp_(min=0.0).view(W.shape[:-1])


def _quadratic_form(W: Tensor, H: Tensor) -> Tensor:
    """The same for rows (R, C), by halves: of the two equal products off the diagonal one is enough."""
    if (C := len(H)) <= _COLUMNS:
        return (W @ H).mul_(W).sum(-1).double()
    half = -(-C // (2 * _COLUMNS)) * _COLUMNS
    left, right = W[:, :half], W[:, half:]
    cross = (left @ H[:half, half:]).mul_(right).sum(-1).double()
    return _quadratic_form(left, H[:half, :half]) + 2 * cross + _quadratic_form(right, H[half:, half:])


def _triangular_inverse(M: Tensor) -> Tensor:
    """Inverse of an upper triangular M (n, n)."""
    if (n := len(M)) <= _COLUMNS:
        return torch.linalg.solve_triangular(M, torch.eye(n, device=M.device, dtype=M.dtype), upper=True)
    half = n // 2
    A, D = _triangular_inverse(M[:half, :half]), _triangular_inverse(M[half:, half:])
    inverse = torch.zeros_like(M)
    inverse[:half, :half], inverse[half:, half:] = A, D
    torch.mm(A, M[:half, half:] @ D, out=inverse[:half, half:]).neg_()
    return inverse
