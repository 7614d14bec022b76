"""Quantized forms of a layer, all widths in one sweep: GPTQ (Frantar et al., 2022) or rounding to nearest.

Weights become scale * (code - zero). Codes are integers of the width; every group of columns of a row has a scale in
half precision and, unless symmetric, a zero point, so that a weight of 0 stays 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from discopt_llm.hessian import Factor, factor, quadratic_form
from discopt_llm.sweep import BLOCK, checked, chunks, sweep_, transposed

__all__ = ["QuantizationSettings", "Quantized", "Solved", "quantize"]

Method = Literal["gptq", "rtn"]
Scales = Literal["minmax", "mse"]

_WIDTHS = range(2, 9)
_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # positive numbers of half precision
_SHRINKS = tuple(1 - i / 20 for i in range(1, 15))  # of a group's range, tried by "mse"


@dataclass(frozen=True)
class QuantizationSettings:
    """How layers are quantized; checks itself."""

    bits: tuple[int, ...]  # widths, ascending
    method: Method = "gptq"
    group_size: int | None = 128  # columns that share a scale; None: a whole row
    symmetric: bool = False
    act_order: bool = False  # solve the inputs with the largest second moment first; scales are then set beforehand
    damping: float = 0.01  # relative to the mean diagonal of H
    scales: Scales = "minmax"  # "mse": the range of each group shrunk to the least squared rounding error

    def __post_init__(self) -> None:
        if not self.bits or any(b not in _WIDTHS for b in self.bits) or list(self.bits) != sorted(set(self.bits)):
            raise ValueError(f"expected distinct ascending bits of {_WIDTHS[0]} to {_WIDTHS[-1]}, got {self.bits}")
        if self.method not in get_args(Method):
            raise ValueError(f"expected a method of {', '.join(get_args(Method))}, got {self.method!r}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"expected a group size of at least 1, or None, got {self.group_size}")
        if not (math.isfinite(self.damping) and self.damping >= 0.0):
            raise ValueError(f"expected a finite damping of at least 0, got {self.damping}")
        if self.scales not in get_args(Scales):
            raise ValueError(f"expected scales of {', '.join(get_args(Scales))}, got {self.scales!r}")


@dataclass(frozen=True, eq=False)
class Quantized:
    """A layer's weights in integers of one width; leading dimensions are free."""

    codes: Tensor  # (..., R, C) uint8
    scales: Tensor  # (..., R, G) float16, positive
    zeros: Tensor | None  # (..., R, G) uint8, the code of 0; None: symmetric, 2^(bits - 1) everywhere
    bits: int
    group_size: int  # columns of a group; the last may be smaller

    def dequantized(self) -> Tensor:
        """scale * (code - zero), (..., R, C) float32: exactly what the solver made of the weights.

        No bit is lost: 11 significant bits of a half-precision scale times at most 8 of an integer fit into 24.
        """
        columns = self.codes.shape[-1]
        weights = torch.empty(self.codes.shape, device=self.codes.device, dtype=torch.float32)
        scales = self.scales.float()
        zeros = torch.full_like(scales, 2 ** (self.bits - 1)) if self.zeros is None else self.zeros.float()
        whole = columns - columns % self.group_size
        groups = whole // self.group_size
        for start, stop, first, last in ((0, whole, 0, groups), (whole, columns, groups, groups + 1)):
            if start < stop:
                shape = (last - first, -1)
                codes = self.codes[..., start:stop].unflatten(-1, shape)
                part = torch.sub(codes, zeros[..., first:last, None]).mul_(scales[..., first:last, None])
                weights[..., start:stop] = part.flatten(-2)
        return weights


@dataclass(frozen=True, eq=False)
class Solved:
    """All widths of one weight matrix, or of several that share their input, stacked by rows."""

    forms: tuple[Quantized, ...]  # one per width, in the order of the settings
    row_errors: Tensor  # (widths, R) float64: diag(dW H dW^T), undamped
    row_norms: Tensor  # (R,) float64: diag(W H W^T)


@torch.no_grad()
def quantize(W: Tensor, H: Tensor, settings: QuantizationSettings) -> Solved:
    """Quantize weights W (R, C) to every width, given the second moment H (C, C) of their input.

    Rows are independent, so matrices with a common input may be stacked. With GPTQ the weights of dead inputs become
    0; with an H of zeros (no token came) it rounds to nearest. Raises ValueError for values that are not finite or
    an H that is no second moment.
    """
    W, H = checked(W, H)
    (R, C), L = W.shape, len(settings.bits)
    size = min(settings.group_size or C, C)
    G = -(-C // size)
    codes = torch.empty((L, R, C), device=W.device, dtype=torch.uint8)
    scales = torch.empty((L, R, G), device=W.device, dtype=torch.float16)
    zeros = torch.empty((L, R, G), device=W.device, dtype=torch.uint8)
    errors = torch.empty((L, R), device=W.device, dtype=torch.float64)
    feeds_back = settings.method == "gptq" and bool(H.any())
    factored = factor(H, settings.damping, act_order=settings.act_order) if feeds_back else None

    parts = list(chunks(R, L, C, W.device))
    buffer = transposed(C, L * parts[0][1], W)  # one for all parts: fresh memory is slow
    for start, stop in parts:
        rows = slice(start, stop)
        w = W[rows].T.clone(memory_format=torch.contiguous_format)  # (C, r), never a view
        rounding = _Rounding(w, settings, size, codes[:, rows], factored)
        errors[:, rows] = (
            quadratic_form(rounding.to_nearest(), H) if factored is None else rounding.with_feedback(buffer)
        )
        scales[:, rows] = rounding.scales.permute(1, 2, 0)
        zeros[:, rows] = rounding.zeros.permute(1, 2, 0)

    forms = tuple(
        Quantized(codes[i], scales[i], None if settings.symmetric else zeros[i], bits, size)
        for i, bits in enumerate(settings.bits)
    )
    return Solved(forms, errors, quadratic_form(W, H))


class _Rounding:
    """Columns become the nearest points of their group's grid: the choice that makes the sweep GPTQ.

    Everything is transposed, and N runs over L widths, then r rows.
    """

    def __init__(
        self, w: Tensor, settings: QuantizationSettings, size: int, codes: Tensor, factored: Factor | None
    ) -> None:
        """Weights w (C, r), rounded in groups of `size` columns; their codes are written to (L, r, C)."""
        (C, r), L = w.shape, len(settings.bits)
        G = -(-C // size)
        self._settings, self._size, self._codes, self._factored = settings, size, codes, factored
        self._top = torch.tensor([2**b - 1 for b in settings.bits], device=w.device, dtype=w.dtype)[:, None]  # (L, 1)
        self.scales = w.new_empty((G, L, r))
        self.zeros = w.new_empty((G, L, r))
        self._lower = w.new_empty((G, L, r))  # the smallest code less the zero point
        self._upper = w.new_empty((G, L, r))  # the largest

        self._order = None if factored is None else factored.order
        if factored is not None:
            w[factored.dead] = 0
        self._static = G == 1 or self._order is not None  # else the grid of a group waits for its turn
        if self._static:
            for g, part in enumerate(w.split(size)):
                self._set_grid(g, part[:, None].expand(-1, L, -1))
        self._w = w if self._order is None else w[self._order]  # in solving order
        places = range(C) if self._order is None else self._order.tolist()
        self._groups = [j // size for j in places]
        self._block = BLOCK if self._static else size
        self._integers = transposed(min(self._block, C), L * r, w).unflatten(1, (L, r))  # code less zero point
        self._values = transposed(min(self._block, C), L * r, w).unflatten(1, (L, r))  # what the weights become
        self._start = 0

    def with_feedback(self, buffer: Tensor) -> Tensor:
        """GPTQ, in a buffer (C, at least N); returns diag(dW H dW^T), (L, r) float64."""
        assert self._factored is not None
        L, r = self.scales.shape[1:]
        W = buffer[:, : L * r]
        W.unflatten(1, (L, r)).copy_(self._w[:, None])  # one copy of the weights for each width
        return sweep_(W, self._factored, self._block, self).view(L, r)

    def to_nearest(self) -> Tensor:
        """Round the weights as they are; returns dW (L, r, C)."""
        changes = []
        for start in range(0, len(self._w), self._block):
            W = self._w[start : start + self._block, None].repeat(1, len(self._top), 1).flatten(1)
            self.begin(start, W)
            for j, w in enumerate(W, start):
                self.column(j, w)
            changes.append(self.end(start, start + len(W)).clone())
        return torch.cat(changes).view(len(self._w), *self.scales.shape[1:]).permute(1, 2, 0)

    def begin(self, start: int, W: Tensor) -> None:
        """Set the grid of a group by its present weights, unless it is set."""
        self._start = start
        if not self._static:
            self._set_grid(start // self._size, W.view(len(W), *self.scales.shape[1:]))

    def column(self, j: int, w: Tensor) -> Tensor:
        """Round column j to the grid of its group."""
        g, place = self._groups[j], j - self._start
        w, scale, integers = w.view(self.scales.shape[1:]), self.scales[g], self._integers[place]
        torch.div(w, scale, out=integers).round_()
        torch.clamp(integers, self._lower[g], self._upper[g], out=integers)
        return torch.mul(integers, scale, out=self._values[place]).flatten()

    def end(self, start: int, stop: int) -> Tensor:
        """Store the codes of a block."""
        integers, values = self._integers[: stop - start], self._values[: stop - start]
        if self._order is None:
            integers.add_(self.zeros[start // self._size])
            self._codes[:, :, start:stop] = integers.permute(1, 2, 0)
        else:
            places = self._order[start:stop]
            integers.add_(self.zeros[places // self._size])
            self._codes[:, :, places] = integers.to(torch.uint8).permute(1, 2, 0)
        return values.sub_(self._w[start:stop, None]).flatten(1)

    def _set_grid(self, g: int, W: Tensor) -> None:
        """The grid of group g by its weights (g, L, r)."""
        self.scales[g], self.zeros[g] = _grid(W, self._top, self._settings)
        torch.neg(self.zeros[g], out=self._lower[g])
        torch.sub(self._top, self.zeros[g], out=self._upper[g])


def _grid(W: Tensor, top: Tensor, settings: QuantizationSettings) -> tuple[Tensor, Tensor]:
    """Scales and zero points, (L, r) each, of a group's weights W (g, L, r) for largest codes `top` (L, 1)."""
    lowest, highest = W.amin(0).clamp_(max=0.0), W.amax(0).clamp_(min=0.0)
    if settings.symmetric:
        highest = torch.maximum(highest, -lowest)
        lowest = -highest
    scale, zero = _affine(lowest, highest, top, settings.symmetric)
    if settings.scales == "mse":
        least = _squared_error(W, scale, zero, top)
        for shrink in _SHRINKS:
            candidate = _affine(shrink * lowest, shrink * highest, top, settings.symmetric)
            error = _squared_error(W, *candidate, top)
            better = error < least
            least = torch.where(better, error, least)
            scale, zero = torch.where(better, candidate[0], scale), torch.where(better, candidate[1], zero)
    return scale, zero


def _affine(lowest: Tensor, highest: Tensor, top: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The grid from `lowest` <= 0 to `highest` >= 0; a group of zeros gets a scale of 1."""
    scale = (highest - lowest) / top
    scale = torch.where(scale == 0, 1.0, scale.clamp(_SMALLEST, _LARGEST)).half().to(scale)
    if symmetric:
        return scale, ((top + 1) / 2).expand_as(scale)
    return scale, torch.minimum((-lowest / scale).round_(), top)


def _squared_error(W: Tensor, scale: Tensor, zero: Tensor, top: Tensor) -> Tensor:
    return (W / scale).round_().clamp_(-zero, top - zero).mul_(scale).sub_(W).square_().sum(0)
