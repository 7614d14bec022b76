"""Sparse forms of a layer: SparseGPT (Frantar and Alistarh, 2023), Wanda (Sun et al., 2023), or plain magnitude.

Every level of every layer has exactly as many zeros as asked for, so that layers can trade them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from discopt_llm.hessian import factor, quadratic_form
from discopt_llm.sweep import BLOCK, checked, chunks, sweep_, transposed

__all__ = ["Pruned", "SparsitySettings", "outlier_share", "prune"]

Method = Literal["sparsegpt", "wanda", "magnitude"]


@dataclass(frozen=True)
class SparsitySettings:
    """How layers are made sparse; checks itself."""

    method: Method = "sparsegpt"
    damping: float = 0.01  # relative to the mean diagonal of H

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"expected a method of {', '.join(get_args(Method))}, got {self.method!r}")
        if not (math.isfinite(self.damping) and self.damping >= 0.0):
            raise ValueError(f"expected a finite damping of at least 0, got {self.damping}")


@dataclass(frozen=True, eq=False)
class Pruned:
    """All levels of one weight matrix, or of several that share their input, stacked by rows."""

    weights: Tensor  # (levels, R, C) float32, or float64 if W or H were; zero where not kept
    keep: Tensor  # (levels, R, C) bool
    row_errors: Tensor  # (levels, R) float64: diag(dW H dW^T), undamped
    row_norms: Tensor  # (R,) float64: diag(W H W^T)


@torch.no_grad()
def prune(
    W: Tensor, H: Tensor, zeros: Sequence[Sequence[int]], rows: Sequence[int], settings: SparsitySettings
) -> Pruned:
    """Make weights W (R, C) sparse at every level, given the second moment H (C, C) of their input.

    W stacks layers of `rows` rows each; `zeros` (levels, layers) says how many weights of each become zero. SparseGPT
    chooses them in blocks of columns, each with its share; the weights of dead inputs become 0. Wanda gives every row
    its share. Magnitude compares a layer's weights with one another, and so does any method where H is all zeros (no
    token came). Raises ValueError for counts that do not fit, values that are not finite, or an H that is no second
    moment.
    """
    W, H = checked(W, H)
    R, C = W.shape
    if sum(rows) != R or any(r < 1 for r in rows):
        raise ValueError(f"expected rows of the layers that add up to {R}, got {list(rows)}")
    for counts in zeros:
        if len(counts) != len(rows) or any(not 0 <= k <= r * C for k, r in zip(counts, rows, strict=False)):
            raise ValueError(f"expected zeros of 0 to {[r * C for r in rows]} for the layers, got {list(counts)}")
    L = len(zeros)
    weights, keep = W.new_empty((L, R, C)), W.new_empty((L, R, C), dtype=torch.bool)
    errors = torch.empty((L, R), device=W.device, dtype=torch.float64)
    method = settings.method if H.any() else "magnitude"
    factored = factor(H, settings.damping) if method == "sparsegpt" else None

    first = 0
    for layer, r in enumerate(rows):
        own = slice(first, first + r)
        if factored is not None:
            w = W[own].T.clone(memory_format=torch.contiguous_format)  # (C, r), never a view
            w[factored.dead] = 0
            parts = list(chunks(L, r, C, W.device))
            buffer = transposed(C, parts[0][1] * r, W)  # one for all parts: fresh memory is slow
            for start, stop in parts:
                some = slice(start, stop)
                counts = [level[layer] for level in zeros[some]]
                choice = _Masking(w, counts, factored.U.diagonal(), weights[some, own], keep[some, own])
                E = buffer[:, : (stop - start) * r]
                E.unflatten(1, (-1, r)).copy_(w[:, None])
                errors[some, own] = sweep_(E, factored, BLOCK, choice).view(-1, r)
        else:
            ranks = _ranks(W[own], H, by_row=method == "wanda")
            for i, level in enumerate(zeros):
                keep[i, own] = ranks >= _shares(level[layer], r if method == "wanda" else 1, W.device)[:, None]
                weights[i, own] = torch.where(keep[i, own], W[own], 0.0)
                errors[i, own] = quadratic_form(weights[i, own] - W[own], H)
        first += r
    return Pruned(weights, keep, errors, quadratic_form(W, H))


@torch.no_grad()
def outlier_share(W: Tensor, H: Tensor, multiples: Sequence[float]) -> Tensor:
    """Share of the weights W (R, C) whose |w| ||x|| is above each multiple of the mean: (len(multiples),) float64.

    The layerwise outlier distribution of OWL (Yin et al., 2023, Section 3.2). With an H (C, C) of zeros, of |w| alone.
    """
    W, H = checked(W, H)
    scores = W.abs() * _input_norms(H)
    mean = scores.mean(dtype=torch.float64)
    return torch.stack([(scores > multiple * mean).double().mean() for multiple in multiples])


class _Masking:
    """The least salient weights of a block become zero, the others stay: the choice that makes the sweep SparseGPT."""

    def __init__(self, w: Tensor, zeros: Sequence[int], diagonal: Tensor, weights: Tensor, keep: Tensor) -> None:
        """A layer w (C, r), its zeros at every level (L,) and where the levels go, (L, r, C); diagonal of U (C,)."""
        (C, r), L = w.shape, len(zeros)
        self._w, self._zeros, self._diagonal = w, zeros, diagonal
        self._weights, self._all_kept = weights, keep
        self._values = transposed(min(BLOCK, C), L * r, w).unflatten(1, (L, r))
        self._keep = transposed(min(BLOCK, C), L * r, w).unflatten(1, (L, r))  # 1 or 0
        self._start = 0

    def begin(self, start: int, W: Tensor) -> None:
        """Choose the block's zeros by w^2 / U_jj^2, the loss of removing a weight (Algorithm 1)."""
        self._start = start
        C, stop = len(self._w), start + len(W)
        scores = (W / self._diagonal[start:stop, None]).abs_().view(len(W), *self._values.shape[1:])
        for i, zeros in enumerate(self._zeros):
            share = zeros * stop // C - zeros * start // C  # the shares of all blocks add up to `zeros`
            kept = _without_least(scores[:, i].flatten(), share)
            self._keep[: len(W), i] = kept.view(len(W), -1)

    def column(self, j: int, w: Tensor) -> Tensor:
        """Zeros where the mask says so."""
        place = j - self._start
        return torch.mul(w, self._keep[place].flatten(), out=self._values[place].flatten())

    def end(self, start: int, stop: int) -> Tensor:
        """Store the block."""
        values = self._values[: stop - start].add_(0.0)  # makes -0 a plain 0
        self._weights[:, :, start:stop] = values.permute(1, 2, 0)
        self._all_kept[:, :, start:stop] = self._keep[: stop - start].permute(1, 2, 0)
        return values.sub_(self._w[start:stop, None]).flatten(1)


def _without_least(scores: Tensor, count: int) -> Tensor:
    """1 for the scores (n,) but exactly `count` of the smallest, which get 0."""
    fewer_out = 2 * count <= len(scores)
    chosen = scores.topk(count if fewer_out else len(scores) - count, largest=not fewer_out, sorted=False).indices
    return torch.full_like(scores, fewer_out).index_fill_(0, chosen, not fewer_out)


def _ranks(W: Tensor, H: Tensor, *, by_row: bool) -> Tensor:
    """Places of the weights (R, C) by rising |w|, or within each row by |w| ||x|| (Wanda); equal ones in order."""
    scores = W.abs() * _input_norms(H) if by_row else W.abs().view(1, -1)
    order = scores.argsort(dim=1, stable=True)
    places = torch.arange(scores.shape[1], device=W.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view(W.shape)


def _shares(zeros: int, parts: int, device: torch.device) -> Tensor:
    """`zeros` in as even parts as there are, (parts,), spread so that they add up."""
    return (torch.arange(parts + 1, device=device) * zeros // parts).diff()


def _input_norms(H: Tensor) -> Tensor:
    """Root mean square of every input, (C,); ones where no token came."""
    diagonal = H.diagonal()
    return torch.where(diagonal.any(), diagonal, torch.ones_like(diagonal)).sqrt()
