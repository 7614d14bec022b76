"""The column sweep behind GPTQ and SparseGPT: fix one input's weights after another, the later ones make up for it.

With U the factor of `hessian.factor`, fixing column j of W at Q_j leaves the error E_j = (W_j - Q_j) / U_jj, and every
later column k takes W_k - E_j U_jk (Frantar et al., 2022, eq. 5; 2023, Algorithm 1). In the end W - Q = E U. Here the
errors are kept as W_j - Q_j, and the rows of U are divided by U_jj instead.

Weights are kept transposed, (C, N): a column of W is contiguous, and N runs over rows and levels alike, so all widths
or sparsities of all stacked layers go through one operation. The lazy updates are nested rather than of one block size:
the left half of a range is solved, its errors are taken off the right half in one matrix product, then the right half
is solved. Only ranges of a few columns are updated one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from discopt_llm.hessian import Factor

__all__ = ["BLOCK", "Choice", "checked", "chunks", "sweep_", "transposed"]

BLOCK = 128  # columns of a block where the choice asks for no other

_COLUMNS = 8  # solved one by one, with rank-one updates
_WIDTH = {"cpu": 2**14}  # entries of a column treated at once: few enough for the cache, enough to hide the calls
_WIDTH_ELSEWHERE = 2**18
_LINE = 64  # bytes of a cache line
_ENTRIES = {"cpu": 2**26}  # of the whole buffer (C, N)
_ENTRIES_ELSEWHERE = 2**28


class Choice(Protocol):
    """What the columns of W become, block by block."""

    def begin(self, start: int, W: Tensor) -> None:
        """See the weights W (block, N) of the block that begins at column `start`; earlier errors are fed back."""

    def column(self, j: int, w: Tensor) -> Tensor:
        """What column j becomes, (N,), for its present weights w (N,), which are left alone."""

    def end(self, start: int, stop: int) -> Tensor:
        """The block is solved: its dW, what its columns became less what they were before the sweep, (block, N)."""


def sweep_(W: Tensor, factored: Factor, block: int, choice: Choice) -> Tensor:
    """Solve all columns of W (C, N), which are in solving order; what is left in W is of no use.

    Returns the undamped errors diag(dW H dW^T), (N,) float64: dW = E U makes dW (H + damping I) dW^T = E E^T.
    Nothing here waits for the device.
    """
    diagonal = factored.U.diagonal()
    U = factored.U / diagonal[:, None]
    weights = diagonal.square().reciprocal_()  # E E^T from errors that were not divided by U_jj
    errors = torch.zeros(W.shape[1], device=W.device, dtype=torch.float64)

    def solve(start: int, stop: int, grain: int, finish: Callable[[int, int], None]) -> None:
        if stop - start <= grain:
            finish(start, stop)
            return
        middle = start + ((stop - start - 1) // grain + 2) // 2 * grain
        solve(start, middle, grain, finish)
        W[middle:stop].addmm_(U[start:middle, middle:stop].T, W[start:middle], alpha=-1)
        solve(middle, stop, grain, finish)

    def solve_block(start: int, stop: int) -> None:
        choice.begin(start, W[start:stop])
        solve(start, stop, _COLUMNS, solve_columns)
        dW = choice.end(start, stop)
        errors.add_(weights[start:stop] @ W[start:stop].square())
        errors.sub_(dW.square_().sum(0), alpha=factored.damping)

    def solve_columns(start: int, stop: int) -> None:
        for j, w in enumerate(W[start:stop].unbind(), start):
            w.sub_(choice.column(j, w))
            if j + 1 < stop:
                W[j + 1 : stop].addr_(U[j, j + 1 : stop], w, alpha=-1)

    solve(0, len(W), block, solve_block)
    return errors.clamp_(min=0.0)


def chunks(count: int, width: int, columns: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Cut `count` things that each take `width` entries of a column into even ranges that suit the device."""
    most = min(_WIDTH.get(device.type, _WIDTH_ELSEWHERE), _ENTRIES.get(device.type, _ENTRIES_ELSEWHERE) // columns)
    parts = -(-count * width // max(most, width))
    step = -(-count // parts)
    return ((start, min(start + step, count)) for start in range(0, count, step))


def transposed(columns: int, width: int, like: Tensor) -> Tensor:
    """A buffer (columns, width) for columns of W, not filled.

    Its columns are an odd number of cache lines apart: at a power of two they would all compete for the same few
    places of the cache, which makes transposing several times slower and matrix products by a fifth.
    """
    line = _LINE // like.element_size()
    return like.new_empty((columns, (-(-width // line) | 3) * line))[:, :width]


def checked(W: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (R, C) and second moment (C, C) in the dtype to solve in: the wider of the two, at least float32.

    Raises ValueError for other shapes, two devices, or values that are not finite.
    """
    if W.ndim != 2 or 0 in W.shape:
        raise ValueError(f"expected W of shape (R, C), got {tuple(W.shape)}")
    if H.shape != (W.shape[1], W.shape[1]):
        raise ValueError(f"expected H of shape ({W.shape[1]}, {W.shape[1]}), got {tuple(H.shape)}")
    if W.device != H.device:
        raise ValueError(f"expected W and H on one device, got {W.device} and {H.device}")
    for name, values in (("W", W), ("H", H)):
        if not torch.isfinite(values).all():
            raise ValueError(f"expected finite {name}, got NaN or infinite values")
    dtype = torch.promote_types(torch.promote_types(W.dtype, H.dtype), torch.float32)
    return W.detach().to(dtype), H.detach().to(dtype)
