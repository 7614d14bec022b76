"""The weight matrices of a model, which quantization and sparsity give levels to, and their inputs.

Nothing here goes by names or classes. Every block is run on a few tokens and its matrix products are watched: a weight
of a sub-block that multiplies its input is a layer, the way it is read tells how it is stored, and the tensors that it
multiplies tell which layers share an input, so that their X^T X (GPTQ, Frantar et al., 2022, Section 3) is summed once.

The two ends, embedding and head, are layers too where a file stores them in forms of their own: see `layers_for`.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from discopt_llm.anatomy import PROBE_TOKENS, Anatomy, Block, embed, last_hidden, project, run_block
from discopt_llm.errors import ModelError
from discopt_llm.hessian import InputSum
from discopt_llm.parts import Kind, LayerKind
from discopt_llm.products import Collector, Probe, span, stacked
from discopt_llm.residency import on_device_

if TYPE_CHECKING:
    from discopt_llm.models import LoadedModel

__all__ = ["EMBEDDING", "Layer", "collecting_", "eager_experts_", "layers_for", "read_ends", "read_layers"]

EMBEDDING = -1  # stands for it where others say a block; the head is the block after the last
GGUF = "gguf"  # the kind of bank that has levels of embedding and head


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight matrix, or the stack of one matrix per expert; each is used as y = W x, W (R, C).

    An embedding is used as x = W^T e instead, where it is not the head as well.
    """

    index: int  # among all layers that go together, in the order of blocks and, within a block, of use
    name: str  # dotted path of the parameter, without a last ".weight"
    block: int  # EMBEDDING, or the number of blocks for the head, at the ends
    kind: LayerKind  # of the sub-block it belongs to, or which end it is
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
        stack = stacked(stored)
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
                with on_device_(block.module), Probe([weight.parameter for weight in of_block]) as probe:
                    hidden = run_block(block, hidden, replay)
                layers += _layers(block, of_block, probe, len(layers))
    except ModelError as error:
        raise ModelError(f"cannot read the layers of {type(model).__name__}: {error}") from error
    return tuple(layers)


def read_ends(model: PreTrainedModel, anatomy: Anatomy) -> tuple[Layer, ...]:
    """The embedding of tokens and the head, (vocabulary, hidden size) each; one layer where they are tied.

    Raises ModelError for ends that do anything else than to look up a token's row, and to multiply the last hidden
    states, or that share memory with another parameter. The cost is that of the ends on a few tokens.
    """
    owners = [model.get_input_embeddings(), model.get_output_embeddings()]
    try:
        weights = [getattr(owner, "weight", None) for owner in owners]
        embedding, head = (w if isinstance(w, nn.Parameter) and w.dim() == 2 else None for w in weights)
        if embedding is None or head is None:
            names = [type(owner).__name__ for owner in owners]
            raise ModelError(f"expected an embedding and a head with a matrix each, got {' and '.join(names)}")
        parameters = [embedding] if head is embedding else [embedding, head]
        _check_alone(model, owners, parameters)
        with torch.inference_mode(False), torch.no_grad(), Probe(parameters) as probe:
            hidden, _ = embed(model, anatomy, torch.arange(PROBE_TOKENS, device=model.device)[None])
            project(model, anatomy, last_hidden(anatomy, hidden))
        uses = [
            {*probe.others.get(key, ())} | {f"product, transposed: {p.transposed}" for p in probe.products.get(key, ())}
            for key in range(len(parameters))
        ]
        looked_up, multiplied = {"embedding"}, {"product, transposed: False"}
        if uses not in ([looked_up | multiplied], [looked_up, multiplied]):
            raise ModelError("expected an embedding that looks up rows, and a head that multiplies with its matrix")
    except ModelError as error:
        raise ModelError(f"cannot read the ends of {type(model).__name__}: {error}") from error
    paths = {module: path for path, module in model.named_modules()}
    places: list[tuple[LayerKind, int]] = [("embedding", EMBEDDING), ("head", len(anatomy.blocks))]
    return tuple(
        Layer(
            index=index,
            name=paths[owner],
            block=block,
            kind=kind,
            owner=owner,
            attribute="weight",
            transposed=False,
            matrices=1,
            rows=len(parameter),
            columns=parameter.shape[1],
            input=0,
        )
        for index, (parameter, owner, (kind, block)) in enumerate(zip(parameters, owners, places, strict=False))
    )


def layers_for(loaded: LoadedModel, kind: str) -> tuple[Layer, ...]:
    """The layers that a bank of this kind has of a model: those of its blocks, for kind "gguf" between its two ends.

    Raises ModelError as `read_layers` and `read_ends`.
    """
    if kind != GGUF:
        return loaded.layers
    embedding, *head = read_ends(loaded.model, loaded.anatomy)
    return tuple(replace(layer, index=i) for i, layer in enumerate((embedding, *loaded.layers, *head)))


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
    with eager_experts_(model), Collector({number: layer.parameter for number, layer in first.items()}, sums):
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
        E, *shape = stacked(self.parameter).shape
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
    spans = sorted((*span(parameter), path) for path, parameter in named if parameter.numel())
    for (_, end, path), (start, _, other) in pairwise(spans):
        if start < end and weights & {path, other}:
            raise ModelError(f"expected every layer to have weights of its own, but {path} and {other} share theirs")


def _check_alone(model: nn.Module, owners: Sequence[nn.Module], weights: Sequence[Tensor]) -> None:
    """Raise ModelError if anything but these modules has one of the weights, or overlaps with it."""
    mine = {id(owner) for owner in owners}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            for weight in weights:
                (start, end), (first, last) = span(weight), span(parameter)
                own = parameter is weight and id(module) in mine
                if parameter.numel() and first < end and start < last and not own:
                    name = f"{path}.{attribute}"
                    raise ModelError(f"expected embedding and head to have a matrix of their own, but {name} shares it")


def _layers(block: Block, weights: Sequence[_Weight], probe: Probe, start: int) -> Iterator[Layer]:
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


def _orientation(weights: Sequence[_Weight], keys: Sequence[int], probe: Probe) -> bool | None:
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


def _pattern(path: str) -> str:
    """The name without positions in lists: equal for the same parameter of every expert in a block."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", path)
