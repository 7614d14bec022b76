"""The weight matrices of a model's blocks, which quantization and sparsity give levels to, and their inputs.

Nothing here goes by names or classes. Every block is run on a few tokens and its matrix products are watched: a weight
of a sub-block that multiplies its input is a layer, the way it is read tells how it is stored, and the tensors that it
multiplies tell which layers share an input, so that their X^T X (GPTQ, Frantar et al., 2022, Section 3) is summed once.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from discopt_llm.anatomy import PROBE_TOKENS, Anatomy, Block, embed, run_block
from discopt_llm.errors import ModelError
from discopt_llm.hessian import InputSum
from discopt_llm.parts import Kind

__all__ = ["Layer", "collecting_", "eager_experts_", "read_layers"]


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight matrix of a block, or the stack of one matrix per expert; each is used as y = W x, W (R, C)."""

    index: int  # among all layers of the model, in the order of blocks and, within a block, of use
    name: str  # dotted path of the parameter, without a last ".weight"
    block: int
    kind: Kind  # of the sub-block it belongs to
    owner: nn.Module  # has the parameter
    attribute: str  # as this
    transposed: bool  # stored (C, R) or (E, C, R)
    matrices: int  # E: 1, or the number of experts
    rows: int  # R, outputs
    columns: int  # C, inputs
    input: int  # of its block; layers with the same one multiply the very same tensors. Experts share with no layer.

    @property
    def parameter(self) -> nn.Parameter:
        """The weight as the model has it now."""
        parameter: nn.Parameter = getattr(self.owner, self.attribute)
        return parameter

    @property
    def parameter_name(self) -> str:
        """The full name of the parameter."""
        return f"{self.name}.weight" if self.attribute == "weight" else self.name

    @property
    def weights(self) -> int:
        """How many there are, of all matrices."""
        return self.matrices * self.rows * self.columns

    def to_matrices(self, stored: Tensor) -> Tensor:
        """From the parameter's shape to (E, R, C), a view."""
        if stored.shape != self.parameter.shape:
            raise ValueError(
                f"expected {self.name} to have shape {tuple(self.parameter.shape)}, got {tuple(stored.shape)}"
            )
        stack = _stack(stored)
        return stack.mT if self.transposed else stack

    def to_parameter(self, matrices: Tensor) -> Tensor:
        """From (E, R, C) to the parameter's shape, contiguous."""
        if matrices.shape != (self.matrices, self.rows, self.columns):
            shape = (self.matrices, self.rows, self.columns)
            raise ValueError(f"expected matrices of {self.name} of shape {shape}, got {tuple(matrices.shape)}")
        stack = matrices.mT if self.transposed else matrices
        return stack.reshape(self.parameter.shape).contiguous()


def read_layers(model: PreTrainedModel, anatomy: Anatomy) -> tuple[Layer, ...]:
    """Every weight of an attention or MLP that multiplies its input, in the order of blocks and of use.

    Routers and gates of mixtures (no more rows than there are experts) are no layers, nor is what only scales or
    shifts, whatever its shape. Raises ModelError with the name of a weight that is used in another way than in a
    product with its input, or that the model has in several places. The cost is one forward pass of a few tokens.
    """
    try:
        weights = [_weights(model, block) for block in anatomy.blocks]
        _check_unshared(model, [weight.path for of_block in weights for weight in of_block])
        layers: list[Layer] = []
        # Inference tensors have no version, without which a tensor changed in place would pass for the same input.
        with torch.inference_mode(False), torch.no_grad(), eager_experts_(model):
            hidden, arguments = embed(model, anatomy, torch.arange(PROBE_TOKENS, device=model.device)[None])
            for block, replay, of_block in zip(anatomy.blocks, arguments, weights, strict=True):
                with _Probe([weight.parameter for weight in of_block]) as probe:
                    hidden = run_block(block, hidden, replay)
                layers += _layers(block, of_block, probe, len(layers))
    except ModelError as error:
        raise ModelError(f"cannot read the layers of {type(model).__name__}: {error}") from error
    return tuple(layers)


@contextmanager
def collecting_(
    model: PreTrainedModel, layers_of_block: Sequence[Layer], *, dtype: torch.dtype = torch.float32
) -> Iterator[dict[int, tuple[InputSum, ...]]]:
    """Sum the inputs of a block's layers, in `dtype`, whenever the block runs: number of the input -> (E,) sums.

    While inside, the weights must stay where they are in memory, and experts run one by one.
    """
    if len(blocks := sorted({layer.block for layer in layers_of_block})) > 1:
        raise ValueError(f"expected layers of one block, got some of blocks {', '.join(map(str, blocks))}")
    first = {layer.input: layer for layer in reversed(layers_of_block)}  # of those that share an input, one adds it
    sums = {
        number: tuple(InputSum(layer.columns, layer.parameter.device, dtype) for _ in range(layer.matrices))
        for number, layer in sorted(first.items())
    }
    with eager_experts_(model), _Collector(first, sums):
        yield sums


@contextmanager
def eager_experts_(model: PreTrainedModel) -> Iterator[None]:
    """Experts run one by one while inside, each in products with its own matrices."""
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


# -- finding layers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Weight:
    """A parameter of a sub-block with at least two dimensions."""

    path: str
    kind: Kind
    owner: nn.Module
    attribute: str
    parameter: nn.Parameter
    experts: int  # in its sub-block; 0 if it is no mixture

    def matrices(self, transposed: bool) -> tuple[int, int, int]:
        """(E, R, C) if it is stored like that or transposed."""
        E, *shape = _stack(self.parameter).shape
        R, C = reversed(shape) if transposed else shape
        return E, R, C


def _weights(model: nn.Module, block: Block) -> list[_Weight]:
    """The parameters in a block's sub-blocks that may hold matrices, in the order in which the model has them."""
    paths = {module: path for path, module in model.named_modules()}
    weights = []
    for part in (block.attention, block.mlp):
        modules = dict.fromkeys(inner for module in part.modules for inner in module.modules())
        owned = [(m, a, p) for m in modules for a, p in m.named_parameters(recurse=False) if p.dim() > 1]
        stacks = [len(p) for _, _, p in owned if p.dim() == 3]
        lists = [len(m) for m in modules if isinstance(m, nn.ModuleList)]
        experts = max(stacks + lists, default=0)
        weights += [_Weight(f"{paths[m]}.{a}", part.kind, m, a, p, experts) for m, a, p in owned]
    return weights


def _check_unshared(model: nn.Module, paths: Iterable[str]) -> None:
    """Raise ModelError if a weight overlaps with any parameter of the model, also with itself under another name."""
    weights = {*paths}
    named = model.named_parameters(remove_duplicate=False)
    spans = sorted((*_span(parameter), path) for path, parameter in named if parameter.numel())
    for (_, end, path), (start, _, other) in pairwise(spans):
        if start < end and weights & {path, other}:
            raise ModelError(f"expected every layer to have weights of its own, but {path} and {other} share theirs")


def _layers(block: Block, weights: Sequence[_Weight], probe: _Probe, start: int) -> Iterator[Layer]:
    """The layers of a block that was probed; their indices begin at `start`."""
    alike: dict[Hashable, list[int]] = {}  # one weight, or the same one of each of many separate experts
    for key, weight in enumerate(weights):
        alike.setdefault((_pattern(weight.path), weight.parameter.shape), []).append(key)
    first_use = {key: i for i, key in enumerate(probe.products)}
    numbers: dict[Hashable, int] = {}
    for keys in sorted(alike.values(), key=lambda keys: min(first_use.get(key, len(weights)) for key in keys)):
        transposed = _orientation(weights, keys, probe)
        if transposed is None:
            continue
        for key in keys:
            weight = weights[key]
            E, R, C = weight.matrices(transposed)
            is_expert = weight.parameter.dim() == 3 or len(keys) > 1
            inputs = key if is_expert else tuple(product.input for product in probe.products[key])
            yield Layer(
                index=start,
                name=weight.path.removesuffix(".weight"),
                block=block.index,
                kind=weight.kind,
                owner=weight.owner,
                attribute=weight.attribute,
                transposed=transposed,
                matrices=E,
                rows=R,
                columns=C,
                input=numbers.setdefault(inputs, len(numbers)),
            )
            start += 1


def _orientation(weights: Sequence[_Weight], keys: Sequence[int], probe: _Probe) -> bool | None:
    """Whether weights that are alike are stored transposed; None if they are no layers.

    An expert that no token chose is like those that were chosen.
    """
    found = {product.transposed for key in keys for product in probe.products.get(key, [])}
    weight = weights[keys[0]]
    if weight.parameter.dim() == 2:
        shape = weight.parameter.shape
        rows = {weight.matrices(transposed)[1] for transposed in found} or {min(shape)}
        if max(rows) <= weight.experts:
            return None  # a router or a gate
    expected = f"expected a weight that multiplies its input, but {weight.path} of {tuple(weight.parameter.shape)}"
    if others := dict.fromkeys(name for key in keys for name in probe.others.get(key, [])):
        raise ModelError(f"{expected} is used by {' and '.join(others)}")
    if len(found) > 1:
        raise ModelError(f"{expected} is used both as it is and transposed")
    if not any(key in probe.used for key in keys):
        raise ModelError(f"{expected} is not used")
    return found.pop() if found else None


# -- watching products ---------------------------------------------------------------------------------------------


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
        self.spans = sorted((*_span(parameter), key) for key, parameter in parameters.items() if parameter.numel())

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
        stack = _stack(self.parameters[key])
        if stack.dim() != 3:
            return None
        number, rest = divmod(m.data_ptr() - stack.data_ptr(), stack.stride(0) * stack.element_size())
        for transposed, matrix in ((True, stack[number]), (False, stack[number].mT)):
            if rest == 0 and (matrix.shape, matrix.stride()) == (m.shape, m.stride()):
                return key, number, transposed
        return None


@dataclass(frozen=True)
class _Product:
    """One product of an input with a weight."""

    transposed: bool
    input: Hashable  # equal for the very same tensor


class _Probe(TorchFunctionMode):
    """Notes what is done with some parameters; they go by their positions."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.weights = _Weights(dict(enumerate(parameters)))
        self.products: dict[int, list[_Product]] = {}  # in the order of their first
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
        self.products.setdefault(key, []).append(_Product(transposed, same))
        self.inputs.append(x)
        return key


class _Collector(TorchFunctionMode):
    """Adds what the first layer of every input is multiplied with to that input's sums."""

    def __init__(self, first: Mapping[int, Layer], sums: Mapping[int, Sequence[InputSum]]) -> None:
        super().__init__()
        self.weights = _Weights({number: layer.parameter for number, layer in first.items()})
        self.sums = sums

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            x, m = _PRODUCTS[func].of_call(args, kwargs)
            if (matrix := self.weights.matrix(m)) is not None:
                number, expert, _ = matrix
                self.sums[number][expert].add_(x)
        return func(*args, **kwargs)


def _stack(weight: Tensor) -> Tensor:
    """A matrix as a stack of one; anything else as it is."""
    return weight[None] if weight.dim() == 2 else weight


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses between which a tensor with elements lies in memory, from the first to behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def _pattern(path: str) -> str:
    """The name without positions in lists: equal for the same parameter of every expert in a block."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", path)
