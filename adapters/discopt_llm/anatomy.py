"""Where a model's decoder blocks are, and what is attention and what is MLP in them.

Nothing here knows a model family by name. The structure is read from one forward pass of a few tokens and proved on
it: `parts` tells the parts of a block apart, and the blocks replayed one after another must give the model's own
logits. A model that fails any of it is refused with what was looked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from discopt_llm.errors import ModelError, typed_line
from discopt_llm.parts import Kind, Part, close, read_parts
from discopt_llm.replay import (
    Arguments,
    OutputForm,
    embed,
    first_tensor,
    last_hidden,
    project,
    run_block,
    skipped_,
)
from discopt_llm.residency import on_device_

__all__ = [
    "Anatomy",
    "Arguments",
    "Block",
    "SubBlock",
    "block_modules",
    "check_same",
    "embed",
    "last_hidden",
    "project",
    "read_anatomy",
    "run_block",
    "skipped_",
]

PROBE_TOKENS = 8
PROBE_VOCABULARY = 1000  # probe tokens come from the first so many
LOGITS_SLACK = 8.0  # roundings of one part, as they have grown after all blocks


@dataclass(frozen=True, eq=False)
class SubBlock:
    """The attention or the MLP of one block; a whole mixture of experts is one MLP."""

    kind: Kind
    name: str  # dotted, "model.layers.3.self_attn"; of layers loose on the block, its name and ".mlp"
    modules: tuple[nn.Module, ...]  # one, or loose layers in the order they run
    outputs: tuple[str, ...]  # full names of the parameters that, all zero, make it contribute nothing
    parameters: int  # number of weights
    form: OutputForm  # of the last module


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder block."""

    index: int
    name: str
    module: nn.Module
    attention: SubBlock
    mlp: SubBlock
    transparent: bool  # with both sub-blocks dropped, the output equals the input exactly
    form: OutputForm


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The blocks of a model, and the way from the last of them to the head."""

    blocks: tuple[Block, ...]
    backbone: nn.Module  # owns the list of blocks
    layers_name: str  # dotted path of that list
    tail: tuple[nn.Module, ...]  # what the backbone calls after the last block, in order
    output_type: Callable[..., Any]  # makes the backbone's output of a last_hidden_state

    @property
    def sub_blocks(self) -> tuple[SubBlock, ...]:
        """Attention and MLP of every block, in order: 2 x the number of blocks."""
        return tuple(part for block in self.blocks for part in (block.attention, block.mlp))


@torch.no_grad()
def read_anatomy(model: nn.Module) -> Anatomy:
    """Find and prove the structure of a causal language model; raises ModelError with what was not found.

    The model is left as it was. The cost is that of a few forward passes of a few tokens, and memory for one
    sub-block.
    """
    with _evaluating(model):
        try:
            ids = _probe_ids(model)
            anatomy = _read(model, ids[:1])
            _check_replay(model, anatomy, ids)
        except ModelError as error:
            raise ModelError(f"cannot read {type(model).__name__}: {error}") from error
    return anatomy


def block_modules(model: nn.Module) -> list[nn.Module]:
    """What may be the blocks of a model that is yet to be run, in order: members of lists as long as it is deep."""
    depth = _text_config(model).num_hidden_layers
    lists = {name: module for name, module in model.named_modules() if _may_hold_blocks(module, depth)}
    outer = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    return [*dict.fromkeys(block for blocks in outer for block in blocks.children())]


def check_same(anatomy: Anatomy, one: Sequence[Arguments], other: Sequence[Arguments], differing: str) -> None:
    """Raise ModelError unless the blocks were called with the same besides hidden states, though something differed."""
    for block, a, b in zip(anatomy.blocks, one, other, strict=True):
        pairs = [*zip(a.tensors(), b.tensors(), strict=False)]
        if len(a.tensors()) != len(b.tensors()) or not all(torch.equal(x, y) for x, y in pairs):
            raise ModelError(
                f"looked for blocks that see {differing} in their hidden states only, but what {block.name} is called "
                f"with besides depends on {differing}"
            )


@dataclass(frozen=True, eq=False)
class _Trace:
    """What one forward pass shows of some modules."""

    entered: list[nn.Module]
    calls: Mapping[nn.Module, list[tuple[Any, Any, Any]]]  # (args, kwargs, output)

    @classmethod
    def of(cls, model: nn.Module, ids: Tensor, watched: set[nn.Module]) -> _Trace:
        entered: list[nn.Module] = []
        calls: dict[nn.Module, list[tuple[Any, Any, Any]]] = defaultdict(list)

        def enter(module: nn.Module, _: Any) -> None:
            entered.append(module)

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls[module].append((args, kwargs, output))

        with ExitStack() as stack:
            for module in watched:
                stack.enter_context(module.register_forward_pre_hook(enter))
                stack.enter_context(module.register_forward_hook(leave, with_kwargs=True))
            _logits(model, ids)
        return cls(entered, calls)


def _read(model: nn.Module, ids: Tensor) -> Anatomy:
    """Anatomy from a pass of token ids (1, L), each kind of block proved by itself."""
    depth = _text_config(model).num_hidden_layers
    modules = dict(model.named_modules())
    lists = {name: m for name, m in modules.items() if _may_hold_blocks(m, depth)}
    owners = {name: modules[name.rpartition(".")[0]] for name in lists}
    children = {
        child for owner in owners.values() for child in owner.children() if not isinstance(child, nn.ModuleList)
    }
    trace = _Trace.of(model, ids, children | {*owners.values()} | {block for m in lists.values() for block in m})
    name = _blocks_name(lists, trace, depth)
    backbone = owners[name]
    output = trace.calls[backbone][0][2] if trace.calls[backbone] else None
    if not hasattr(output, "last_hidden_state"):
        raise ModelError(
            f"expected its {type(backbone).__name__}, which owns {name}, to return a last_hidden_state, "
            f"got {type(output).__name__}"
        )
    last = len(trace.entered) - trace.entered[::-1].index(lists[name][-1])
    tail = tuple(module for module in trace.entered[last:] if module in {*backbone.children()})
    return Anatomy(tuple(_blocks(lists[name], name, trace)), backbone, name, tail, type(output))


def _may_hold_blocks(module: nn.Module, depth: int) -> TypeGuard[nn.ModuleList]:
    return isinstance(module, nn.ModuleList) and len(module) == depth > 0


def _blocks_name(lists: Mapping[str, nn.ModuleList], trace: _Trace, depth: int) -> str:
    """The one list whose members ran once each, in order; not one inside another."""
    found = []
    for name, blocks in lists.items():
        members = {*blocks}
        if [module for module in trace.entered if module in members] == [*blocks]:
            found.append(name)
    found = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(found) != 1:
        raise ModelError(
            f"looked for one list of {depth} blocks (num_hidden_layers in its config), each run once and in order, "
            f"found {' and '.join(found) or 'none'}"
        )
    places: dict[nn.Module, int] = {}
    for index, block in enumerate(lists[found[0]]):
        if places.setdefault(block, index) != index:
            raise ModelError(
                f"looked for blocks that run once each, but {found[0]}.{places[block]} and {found[0]}.{index} are one"
            )
    return found[0]


def _blocks(layers: nn.ModuleList, layers_name: str, trace: _Trace) -> Iterator[Block]:
    parts_of: dict[Hashable, tuple[Part, Part]] = {}  # each kind of block is read once
    for index, module in enumerate(layers):
        name = f"{layers_name}.{index}"
        args, kwargs, output = trace.calls[module][0]
        try:
            hidden, arguments = Arguments.of_call(args, kwargs)
            kind = _signature(module)
            if kind not in parts_of:
                with on_device_(module):
                    parts_of[kind] = read_parts(module, arguments, hidden)
            form = OutputForm.of_call(hidden, output)
        except (ModelError, ValueError) as error:
            raise ModelError(f"in {name} ({type(module).__name__}) {error}") from error
        attention, mlp = (_sub_block(part, module, f"{name}.") for part in parts_of[kind])
        with skipped_([attention, mlp]):
            transparent = torch.equal(first_tensor(arguments.call(module, hidden)), hidden)
        yield Block(index, name, module, attention, mlp, transparent, form)


def _sub_block(part: Part, block: nn.Module, prefix: str) -> SubBlock:
    modules = part.modules(block)
    outputs = tuple(prefix + output for output in part.outputs)
    size = sum(parameter.numel() for module in modules for parameter in module.parameters())
    return SubBlock(part.kind, prefix + part.name, modules, outputs, size, part.form)


def _signature(block: nn.Module) -> Hashable:
    """Blocks with equal signatures have the same parts under the same names."""
    classes = tuple((name, type(module)) for name, module in block.named_modules())
    return classes, tuple((name, parameter.shape) for name, parameter in block.named_parameters())


def _check_replay(model: nn.Module, anatomy: Anatomy, ids: Tensor) -> None:
    """Blocks replayed on (2, L) tokens, with the arguments of one sequence, must give the model's own logits."""
    (_, one), (_, other) = embed(model, anatomy, ids[:1]), embed(model, anatomy, ids[1:])
    check_same(anatomy, one, other, "the tokens")
    hidden, arguments = embed(model, anatomy, ids)
    expected = _logits(model, ids)
    try:
        for block, recorded in zip(anatomy.blocks, arguments, strict=True):
            given = hidden.clone()
            output = run_block(block, hidden, recorded)
            if not torch.equal(hidden, given):
                raise ModelError(f"looked for blocks that leave their input alone, but {block.name} writes into it")
            hidden = output
        logits = project(model, anatomy, last_hidden(anatomy, hidden))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"looked for blocks that run one by one, but got {typed_line(error)}") from error
    if not close(expected, logits, LOGITS_SLACK):
        raise ModelError(
            "looked for blocks that pass on hidden states and nothing else, but running them one by one gives other "
            "logits than the model"
        )


def _probe_ids(model: nn.Module) -> Tensor:
    """Two sequences of ordinary tokens, (2, L), no token twice."""
    config = _text_config(model)
    special = {getattr(config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")}
    plain = [token for token in range(min(config.vocab_size, PROBE_VOCABULARY)) if token not in special]
    if len(plain) < 2 * PROBE_TOKENS:
        raise ModelError(f"expected a vocabulary of at least {2 * PROBE_TOKENS} ordinary tokens, got {len(plain)}")
    order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0))[: 2 * PROBE_TOKENS]
    return torch.tensor(plain)[order].reshape(2, PROBE_TOKENS).to(next(model.parameters()).device)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("num_hidden_layers", "vocab_size"):
        if not isinstance(getattr(config, name, None), int):
            raise ModelError(f"looked for {name} in its config, found none")
    return config


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's own logits (B, L, V) for token ids (B, L)."""
    try:
        output = model(input_ids=ids, use_cache=False)
    except Exception as error:  # a model's own code may raise anything
        raise ModelError(f"expected it to run on token ids alone, got {typed_line(error)}") from error
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"expected it to answer token ids {tuple(ids.shape)} with logits for each, got {got}")
    return logits


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while inside; afterwards every module has its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
