"""Watching a model multiply: which of some weights are multiplied with which inputs, and sums over those inputs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from discopt_llm.hessian import InputSum

__all__ = ["Collector", "Probe", "Product", "span", "stacked"]


@dataclass(frozen=True)
class _Operands:
    """Where a function that multiplies X (..., C) by M (C, R) finds them among its arguments."""

    x: tuple[int, str]
    m: tuple[int, str]
    turned: bool = False  # it is given the transpose of M

    def of_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """X and M."""
        x, m = (args[place] if place < len(args) else kwargs[name] for place, name in (self.x, self.m))
        return x, m.mT if self.turned and m.dim() > 1 else m


_MATMUL = _Operands((0, "input"), (1, "other"))
_MM = _Operands((0, "input"), (1, "mat2"))
_ADDMM = _Operands((1, "mat1"), (2, "mat2"))
_PRODUCTS: dict[Callable[..., Any], _Operands] = {
    nn.functional.linear: _Operands((0, "input"), (1, "weight"), turned=True),
    torch.addmm: _ADDMM,
    Tensor.addmm: _ADDMM,
    torch.matmul: _MATMUL,
    Tensor.matmul: _MATMUL,
    Tensor.__matmul__: _MATMUL,
    torch.mm: _MM,
    Tensor.mm: _MM,
}
_SCALE_AND_SHIFT = {"add", "mul"}  # by the weights of a norm, or the biases of experts


class _Weights:
    """Which of some parameters, and which of its matrices, a tensor is a view of."""

    def __init__(self, parameters: Mapping[int, Tensor]) -> None:
        self.parameters = parameters
        self.spans = sorted((*span(parameter), key) for key, parameter in parameters.items() if parameter.numel())

    def key(self, tensor: Tensor) -> int | None:
        """The key of the parameter that a tensor is a view of."""
        address = tensor.data_ptr()
        place = bisect_right(self.spans, address, key=itemgetter(0)) - 1
        return self.spans[place][2] if place >= 0 and address < self.spans[place][1] else None

    def matrix(self, m: Tensor) -> tuple[int, int, bool] | None:
        """Key, number and orientation (True: as it is stored) of a matrix M (C, R); None if it is none, or a part."""
        key = self.key(m)
        if key is None or m.dim() != 2:
            return None
        stack = stacked(self.parameters[key])
        if stack.dim() != 3:
            return None
        number, rest = divmod(m.data_ptr() - stack.data_ptr(), stack.stride(0) * stack.element_size())
        for transposed, matrix in ((True, stack[number]), (False, stack[number].mT)):
            if rest == 0 and (matrix.shape, matrix.stride()) == (m.shape, m.stride()):
                return key, number, transposed
        return None


@dataclass(frozen=True)
class Product:
    """One product of an input with a weight."""

    transposed: bool
    input: Hashable  # equal for the very same tensor


class Probe(TorchFunctionMode):
    """Notes what is done with some parameters; they go by their positions."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.weights = _Weights(dict(enumerate(parameters)))
        self.products: dict[int, list[Product]] = {}  # in the order of their first
        self.others: dict[int, dict[str, None]] = {}  # names of functions that compute something else from them
        self.used: set[int] = set()
        self.inputs: list[Tensor] = []  # held, so that no two have one address

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not outputs:
            return output
        multiplied = self._note_product(func, args, kwargs)
        for leaf in tree_leaves((args, kwargs)):
            key = self.weights.key(leaf) if isinstance(leaf, Tensor) else None
            if key is None:
                continue
            self.used.add(key)
            is_view = all(self.weights.key(tensor) == key for tensor in outputs)
            name = func.__name__.strip("_")
            if key != multiplied and leaf.dim() > 1 and not is_view and name not in _SCALE_AND_SHIFT:
                self.others.setdefault(key, {})[name] = None
        return output

    def _note_product(self, func: Any, args: Any, kwargs: Any) -> int | None:
        """The key of the weight in a product."""
        if func not in _PRODUCTS:
            return None
        x, m = _PRODUCTS[func].of_call(args, kwargs)
        matrix = self.weights.matrix(m)
        if matrix is None:
            return None
        key, _, transposed = matrix
        strides = None if x.is_contiguous() else x.stride()
        same = (x.data_ptr(), x.shape[-1], x.numel(), strides, x._version)
        self.products.setdefault(key, []).append(Product(transposed, same))
        self.inputs.append(x)
        return key


class Collector(TorchFunctionMode):
    """Adds what weights are multiplied with to the sums of their numbers, one for each of their matrices."""

    def __init__(self, parameters: Mapping[int, Tensor], sums: Mapping[int, Sequence[InputSum]]) -> None:
        super().__init__()
        self.weights = _Weights(parameters)
        self.sums = sums

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            x, m = _PRODUCTS[func].of_call(args, kwargs)
            if (matrix := self.weights.matrix(m)) is not None:
                number, expert, _ = matrix
                self.sums[number][expert].add_(x)
        return func(*args, **kwargs)


def stacked(weight: Tensor) -> Tensor:
    """A matrix as a stack of one; anything else as it is."""
    return weight[None] if weight.dim() == 2 else weight


def span(tensor: Tensor) -> tuple[int, int]:
    """The addresses between which a tensor with elements lies in memory, from the first to behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()
