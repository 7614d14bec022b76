"""How the levels of each kind of bank are made: which there are, what they cost, and their solves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from discopt.space import MAX_LEVELS
from discopt_llm import ggml
from discopt_llm.bank import BankLayer, Form, Ggml, Sparse, ggml_costs, quantized_costs, sparse_costs
from discopt_llm.errors import BankError
from discopt_llm.hessian import quadratic_form
from discopt_llm.layers import GGUF, Layer
from discopt_llm.quantization import QuantizationSettings, Quantized, quantize
from discopt_llm.sparsity import SparsitySettings, prune

__all__ = ["GgmlRecipe", "QuantizationRecipe", "Recipe", "SolvedStack", "SparsityRecipe"]

SOLVED_BYTES = 2**31  # of pruned weights that are dense at a time
GGML_ROWS = 4096  # rows that are stored at a time, which bounds what is copied of an embedding


@dataclass(frozen=True, eq=False)
class SolvedStack:
    """Layers that share a Hessian, at every level: by layer and then by level, None where a layer lacks a level."""

    forms: tuple[tuple[Form | None, ...], ...]
    errors: NDArray[np.float64]  # (layers, m) sums of diag(ΔW H ΔWᵀ)
    norms: NDArray[np.float64]  # (layers,) sums of diag(W H Wᵀ)


class Recipe(Protocol):
    """How the levels of a kind of bank are made."""

    @property
    def kind(self) -> str: ...

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the levels, (m,)."""
        ...

    @property
    def described(self) -> dict[str, Any]:
        """All settings, as JSON values."""
        ...

    @property
    def libraries(self) -> tuple[str, ...]:
        """Packages besides torch that decide about the levels."""
        ...

    def planned(self, layer: Layer) -> BankLayer:
        """What a layer's levels will cost; the errors are not known yet, NaN."""
        ...

    def solve(self, layers: Sequence[Layer], weights: Sequence[Tensor], H: Tensor, expert: int) -> SolvedStack:
        """All levels of layers (R_l, C) that read the same input with second moment H (C, C).

        `expert` is which of their matrices these are.
        """
        ...


@dataclass(frozen=True)
class QuantizationRecipe:
    """A level for each bit width."""

    settings: QuantizationSettings
    kind: ClassVar[str] = "quantization"
    libraries: ClassVar[tuple[str, ...]] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(str(bits) for bits in self.settings.bits)

    @property
    def described(self) -> dict[str, Any]:
        return asdict(self.settings)

    def planned(self, layer: Layer) -> BankLayer:
        s = self.settings
        costs = [
            quantized_costs(layer.matrices, layer.rows, layer.columns, bits, s.group_size, symmetric=s.symmetric)
            for bits in s.bits
        ]
        return _planned(layer, costs)

    def solve(self, layers: Sequence[Layer], weights: Sequence[Tensor], H: Tensor, expert: int) -> SolvedStack:
        solved = quantize(torch.cat([*weights]), H, self.settings)
        ends = np.cumsum([0, *(len(W) for W in weights)])
        rows = [slice(a, b) for a, b in pairwise(ends.tolist())]
        forms = tuple(tuple(_rows_of(form, part) for form in solved.forms) for part in rows)
        return SolvedStack(forms, *_sums(solved.row_errors, solved.row_norms, rows))


@dataclass(frozen=True)
class SparsityRecipe:
    """Levels that are `step` zeros apart in every layer, as many above `target` as below.

    target: share of zeros of the level in the middle.
    levels: how many, an odd number.
    step: weights between two levels of any layer.
    values: data type of the weights that stay, float16 or bfloat16.
    """

    settings: SparsitySettings
    target: float
    levels: int
    step: int
    values: torch.dtype
    kind: ClassVar[str] = "sparsity"
    libraries: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 0 < self.target < 1:
            raise ValueError(f"target must be above 0 and below 1, got {self.target}")
        if not 1 <= self.levels <= MAX_LEVELS or self.levels % 2 == 0:
            raise ValueError(
                f"levels must be an odd number up to {MAX_LEVELS:,}, so that one lies at the target, got {self.levels}"
            )
        if self.step < 1:
            raise ValueError(f"step must be at least 1 weight, got {self.step}")
        if self.values not in (torch.float16, torch.bfloat16):
            raise ValueError(f"values must be float16 or bfloat16, got {self.values}")

    @property
    def labels(self) -> tuple[str, ...]:
        half = self.levels // 2
        return tuple(str(steps) for steps in range(half, -half - 1, -1))

    @property
    def described(self) -> dict[str, Any]:
        own = {"target": self.target, "levels": self.levels, "step": self.step, "values": str(self.values)[6:]}
        return {**asdict(self.settings), **own}

    def zeros(self, layer: Layer) -> NDArray[np.int64]:
        """Zeros of a layer at each level, (m,); not within 0..weights where it has no such level."""
        half = self.levels // 2
        middle = math.ceil(Fraction(str(self.target)) * layer.weights)  # no fewer than asked for, in any layer
        return middle + self.step * np.arange(half, -half - 1, -1, dtype=np.int64)

    def present(self, layer: Layer) -> NDArray[np.bool_]:
        """Which levels a layer has, (m,)."""
        zeros = self.zeros(layer)
        return (zeros >= 0) & (zeros <= layer.weights)

    def planned(self, layer: Layer) -> BankLayer:
        zeros, present = self.zeros(layer), self.present(layer)
        costs = [
            sparse_costs(layer.weights, layer.weights - int(z)) if has else None
            for z, has in zip(zeros, present, strict=True)
        ]
        return _planned(layer, costs)

    def solve(self, layers: Sequence[Layer], weights: Sequence[Tensor], H: Tensor, expert: int) -> SolvedStack:
        zeros = np.stack([np.clip(self.zeros(layer), 0, layer.weights) for layer in layers], axis=1)  # (m, layers)
        E = layers[0].matrices
        share = zeros * (expert + 1) // E - zeros * expert // E
        rows = [len(W) for W in weights]
        W = torch.cat([*weights])
        ends = np.cumsum([0, *rows])
        parts = [slice(a, b) for a, b in pairwise(ends.tolist())]
        forms: list[list[Form | None]] = [[] for _ in layers]
        errors = []
        at_once = max(1, SOLVED_BYTES // W.nbytes)
        for first in range(0, self.levels, at_once):
            pruned = prune(W, H, share[first : first + at_once].tolist(), rows, self.settings)
            errors.append(pruned.row_errors)
            for layer, part, of_layer in zip(layers, parts, forms, strict=True):
                present = self.present(layer)[first : first + at_once]
                of_layer += [
                    Sparse.of(pruned.weights[j, part][None], pruned.keep[j, part][None], self.values) if has else None
                    for j, has in enumerate(present)
                ]
        return SolvedStack(tuple(map(tuple, forms)), *_sums(torch.cat(errors), pruned.row_norms, parts))


@dataclass(frozen=True)
class GgmlRecipe:
    """A level for each of some types of ggml, from the fewest bits to the most; see `ggml.types`.

    A layer has those whose blocks its rows are made of. Raises BankError for types that cannot be made here.
    """

    types: tuple[str, ...]
    imatrix: bool  # the errors of a layer's inputs count by their mean squares, as llama.cpp's importance matrix has it
    kind: ClassVar[str] = GGUF

    def __post_init__(self) -> None:
        if not self.types or ggml.parse_types(self.types) != self.types:
            raise ValueError(f"types must be some of {', '.join(ggml.types())} in this order, got {self.types}")
        ggml.check_makeable(self.types, imatrix=self.imatrix)

    @property
    def labels(self) -> tuple[str, ...]:
        return self.types

    @property
    def described(self) -> dict[str, Any]:
        return {"method": GGUF, "types": [*self.types], "imatrix": self.imatrix}

    @property
    def libraries(self) -> tuple[str, ...]:
        return ("gguf", *ggml.libraries(self.types, imatrix=self.imatrix))

    def planned(self, layer: Layer) -> BankLayer:
        """Raises BankError for a layer whose rows none of the types takes."""
        shape = layer.matrices, layer.rows, layer.columns
        takes = [ggml.types()[name].takes(layer.columns) for name in self.types]
        if not any(takes):
            fitting = [name for name, kind in ggml.types().items() if kind.takes(layer.columns)]
            raise BankError(
                f"{layer.name} has rows of {layer.columns} weights, which {', '.join(self.types)} cannot hold; "
                f"add a type that can: {', '.join(fitting)}"
            )
        costs = [ggml_costs(*shape, name) if has else None for name, has in zip(self.types, takes, strict=True)]
        return _planned(layer, costs)

    def solve(self, layers: Sequence[Layer], weights: Sequence[Tensor], H: Tensor, expert: int) -> SolvedStack:
        importance = ggml.importance_of(H) if self.imatrix else None
        solved = [[_stored(W, H, name, importance) for name in self.types] for W in weights]
        return SolvedStack(
            forms=tuple(tuple(form for form, _ in of_layer) for of_layer in solved),
            errors=np.array([[error for _, error in of_layer] for of_layer in solved]),
            norms=np.array([float(quadratic_form(W, H).sum()) for W in weights]),
        )


def _stored(W: Tensor, H: Tensor, name: str, importance: Tensor | None) -> tuple[Ggml | None, float]:
    """Weights (R, C) in a type of ggml, as (1, R, C), and the sum of diag(ΔW H ΔWᵀ); None for rows it does not take."""
    if not ggml.types()[name].takes(W.shape[1]):
        return None, math.nan
    parts, error = [], 0.0
    for rows in W.split(GGML_ROWS):
        parts.append(ggml.quantize(rows, name, importance))
        error += float(quadratic_form(ggml.dequantize(parts[-1], name).to(rows) - rows, H).sum())
    return Ggml(name, torch.cat(parts)[None], W.shape[1]), error


def _rows_of(form: Quantized, rows: slice) -> Quantized:
    """Some rows of a form (R, C), as (1, R_l, C)."""
    zeros = None if form.zeros is None else form.zeros[None, rows]
    return replace(form, codes=form.codes[None, rows], scales=form.scales[None, rows], zeros=zeros)


def _sums(
    row_errors: Tensor, row_norms: Tensor, parts: Sequence[slice]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums over each layer's rows: (m, R), (R,) -> (layers, m), (layers,)."""
    errors, norms = row_errors.double().cpu().numpy(), row_norms.double().cpu().numpy()
    return (
        np.stack([errors[:, part].sum(axis=1) for part in parts]),
        np.array([norms[part].sum() for part in parts]),
    )


def _planned(layer: Layer, costs: Sequence[tuple[int, int, int] | None]) -> BankLayer:
    """A layer with the (weights, bits, bytes) of its levels, None where it lacks one."""
    present = np.array([cost is not None for cost in costs])
    table = np.array([cost or (0, 0, 0) for cost in costs], dtype=np.int64).T
    return BankLayer(
        name=layer.name,
        block=layer.block,
        kind=layer.kind,
        input=layer.input,
        matrices=layer.matrices,
        rows=layer.rows,
        columns=layer.columns,
        transposed=layer.transposed,
        present=present,
        weights=table[0],
        bits=table[1],
        bytes=table[2],
        errors=np.full(len(costs), np.nan),
        outliers={},
    )
