"""Running parts of a model by themselves: its embedding, one block at a time, its tail and its head.

The arguments of every block (masks, rotary angles, whatever the family passes) are recorded for one sequence and
serve any hidden states of that length, in batches of any size. `read_anatomy` proves that this holds for a model
before anything here is used on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from discopt_llm.anatomy import Anatomy, Block, SubBlock

_MISSING = object()


class StopForward(Exception):  # noqa: N818, it is no error
    """Ends a forward pass once what it was run for has been seen."""


@dataclass(frozen=True, eq=False)
class Arguments:
    """What a module is called with besides its hidden states; the slot for them is empty."""

    positional: tuple[Any, ...]
    keyword: Mapping[str, Any]
    slot: int | str  # where the hidden states go: a position or a keyword

    @classmethod
    def of_call(cls, positional: tuple[Any, ...], keyword: Mapping[str, Any]) -> tuple[Tensor, Arguments]:
        """Take the hidden states, the first floating-point tensor, out of a call's arguments."""
        slots: list[tuple[int | str, Any]] = [*enumerate(positional), *keyword.items()]
        for slot, value in slots:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value, cls(*cls(positional, keyword, slot).filled(None), slot)
        names = [type(value).__name__ for value in positional] + [*keyword]
        raise ValueError(f"expected hidden states among the arguments, got {', '.join(names) or 'none'}")

    def filled(self, hidden: Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments with hidden states in their slot."""
        if isinstance(self.slot, int):
            before, after = self.positional[: self.slot], self.positional[self.slot + 1 :]
            return (*before, hidden, *after), dict(self.keyword)
        return self.positional, {**self.keyword, self.slot: hidden}

    def call(self, module: nn.Module, hidden: Tensor) -> Any:
        """The module's output for these hidden states."""
        positional, keyword = self.filled(hidden)
        return module(*positional, **keyword)

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, nested ones too, in a fixed order."""
        leaves = tree_leaves((self.positional, dict(self.keyword)))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class OutputForm:
    """How a module wraps its hidden states: a bare tensor, or a tuple that begins with it."""

    width: int  # size of the last dimension
    dtype: torch.dtype | None  # None: that of the input
    length: int | None  # of the tuple; None: a bare tensor

    @classmethod
    def of_call(cls, hidden: Tensor, output: Any) -> OutputForm:
        """Read the form off one call: its hidden states (..., d) and what came back."""
        first = first_tensor(output)
        dtype = None if first.dtype == hidden.dtype else first.dtype
        return cls(first.shape[-1], dtype, len(output) if isinstance(output, tuple) else None)

    def wrap(self, hidden: Tensor) -> Any:
        """Hidden states in this form; whatever else the tuple held is None."""
        return hidden if self.length is None else (hidden, *[None] * (self.length - 1))

    def zeros(self, hidden: Tensor) -> Any:
        """Zeros where the module would have answered hidden states (..., d)."""
        return self.wrap(hidden.new_zeros((*hidden.shape[:-1], self.width), dtype=self.dtype))


def first_tensor(output: Any) -> Tensor:
    """The hidden states in a module's output: the tensor itself, or the first element of a tuple."""
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, Tensor):
        raise ValueError(f"expected a tensor or a tuple that begins with one, got {type(output).__name__}")
    return first


@contextmanager
def forward_replaced_(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Answer calls of the module with another function; hooks, and a forward set before, are left as they were."""
    before = module.__dict__.get("forward", _MISSING)
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is _MISSING:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@contextmanager
def weights_replaced_(model: nn.Module, replaced: Mapping[str, Tensor]) -> Iterator[None]:
    """Give parameters other values while inside, by their full names. Nests; undone also after an error.

    A tensor of the parameter's data type and device stands in for it without a copy; any other is cast and moved
    first. The mapping is asked for one tensor at a time, so one that makes them when asked holds one of its own. A tied
    parameter is replaced wherever it is used, by any one of its names. Raises ValueError, with the model as it was,
    for a name that is no parameter's, for two names of one, for a tensor of another shape and for one that is not
    floating-point.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _check_names(parameters, replaced)
    # All are made before the first is used: some may be made of the model's own weights.
    values = {name: _standing_in(replaced[name], name, parameters[name]) for name in replaced}
    before = {name: parameters[name].data for name in values}
    try:
        for name, value in values.items():
            parameters[name].data = value
        yield
    finally:
        for name, value in before.items():
            parameters[name].data = value


@contextmanager
def skipped_(sub_blocks: Iterable[SubBlock]) -> Iterator[None]:
    """Drop sub-blocks while inside: they cost nothing and contribute zero. Nests; undone also after an error."""
    with ExitStack() as stack:
        for sub_block in sub_blocks:
            stack.enter_context(dropped_(sub_block.modules, sub_block.form))
        yield


@contextmanager
def dropped_(modules: Sequence[nn.Module], form: OutputForm) -> Iterator[None]:
    """Of modules that run one after another, the last answers zeros in its form and the others their input."""
    *inner, last = modules
    with ExitStack() as stack:
        for module in inner:
            stack.enter_context(forward_replaced_(module, _answer_input))
        stack.enter_context(forward_replaced_(last, lambda *a, **k: form.zeros(_answer_input(*a, **k))))
        yield


@torch.no_grad()
def embed(model: nn.Module, anatomy: Anatomy, ids: Tensor) -> tuple[Tensor, tuple[Arguments, ...]]:
    """Input of the first block for token ids (B, L), and what replays each block; no block is run.

    Returns the hidden states (B, L, d) and one `Arguments` per block, recorded for a single sequence of length L:
    they hold no token and broadcast over any batch, so record them once per length.
    """
    hidden, arguments = _record(model, anatomy, ids[:1])
    if len(ids) > 1:
        hidden, _ = _record(model, anatomy, ids)
    return hidden, arguments


def run_block(block: Block, hidden: Tensor, arguments: Arguments) -> Tensor:
    """One block on hidden states (B, L, d) -> (B, L, d), L as in the recording."""
    return first_tensor(arguments.call(block.module, hidden))


def last_hidden(anatomy: Anatomy, hidden: Tensor) -> Tensor:
    """From the last block's output (..., d) to what the head reads, (..., d'): the final norm, usually."""
    for module in anatomy.tail:
        hidden = first_tensor(module(hidden))
    return hidden


def project(model: nn.Module, anatomy: Anatomy, hidden: Tensor) -> Tensor:
    """Logits (..., V) of last hidden states (..., d') by the model's own head, with its scaling and capping."""
    output = anatomy.output_type(last_hidden_state=hidden.reshape(1, -1, hidden.shape[-1]))
    ids = torch.zeros((1, 1), dtype=torch.long, device=hidden.device)
    with forward_replaced_(anatomy.backbone, lambda *_, **__: output):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.reshape(*hidden.shape[:-1], logits.shape[-1])


def _check_names(parameters: Mapping[str, nn.Parameter], replaced: Iterable[str]) -> None:
    """All are names of parameters, one of each."""
    names: dict[int, str] = {}
    for name in replaced:
        if name not in parameters:
            raise ValueError(f"replaced weights must have full names of the model's parameters, got {name!r}")
        if (other := names.setdefault(id(parameters[name]), name)) != name:
            raise ValueError(f"replaced weights must have one name of a tied parameter, got {other} and {name}")


def _standing_in(tensor: Tensor, name: str, parameter: nn.Parameter) -> Tensor:
    """The tensor as the parameter stores its values; a copy only where it must be cast or moved."""
    if tensor.shape != parameter.shape:
        raise ValueError(f"expected {name} of shape {tuple(parameter.shape)}, got {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"expected {name} in floating point, got {tensor.dtype}")
    return tensor.detach().to(parameter.device, parameter.dtype)


def _record(model: nn.Module, anatomy: Anatomy, ids: Tensor) -> tuple[Tensor, tuple[Arguments, ...]]:
    calls: list[tuple[Tensor, Arguments]] = []

    def recorder(block: Block) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append(Arguments.of_call(args, kwargs))
            if block is anatomy.blocks[-1]:
                raise StopForward
            return block.form.wrap(calls[-1][0])

        return forward

    with ExitStack() as stack:
        for block in anatomy.blocks:
            stack.enter_context(forward_replaced_(block.module, recorder(block)))
        with suppress(StopForward):
            model(input_ids=ids, use_cache=False)
    return calls[0][0], tuple(arguments for _, arguments in calls)


def _answer_input(*args: Any, **kwargs: Any) -> Tensor:
    return Arguments.of_call(args, kwargs)[0]
