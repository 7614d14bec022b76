"""The attention and the MLP of one decoder block, told apart and proved on a recorded input.

A block's parts are its direct children with weight matrices; layers that lie loose on the block form one part. The
part that mixes tokens is the attention. Which parameters silence a part is found by zeroing, never by their names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from discopt_llm.errors import ModelError
from discopt_llm.replay import Arguments, OutputForm, StopForward, dropped_, first_tensor

Kind = Literal["attention", "mlp"]
LayerKind = Literal["attention", "mlp", "embedding", "head"]  # of a weight matrix: what it belongs to


@dataclass(frozen=True, eq=False)
class Part:
    """A sub-block as any block of its kind has it; names are relative to the block."""

    kind: Kind
    name: str
    children: tuple[str, ...]  # one, or loose layers in the order they run
    outputs: tuple[str, ...]  # parameters that, all zero, make it contribute nothing
    form: OutputForm  # of the last child

    def modules(self, block: nn.Module) -> tuple[nn.Module, ...]:
        """The part in a block."""
        return tuple(block.get_submodule(child) for child in self.children)


def read_parts(block: nn.Module, arguments: Arguments, hidden: Tensor) -> tuple[Part, Part]:
    """Attention and MLP of a block that answers `hidden` (1, L, d); raises ModelError with what was not found."""
    probe = _BlockProbe(block, arguments, hidden)
    calls = probe.calls()
    loose = tuple(child for child in calls if not [*block.get_submodule(child).children()])
    groups = [(child,) for child in calls if child not in loose] + ([loose] if loose else [])
    mixing = [probe.mixes_tokens(group) for group in groups]
    if sorted(mixing) != [False, True]:
        found = [f"{'+'.join(g)} ({'mixes' if m else 'does not'})" for g, m in zip(groups, mixing, strict=True)]
        raise ModelError(
            "looked for one part with weights that mixes tokens (the attention) and one that does not (the MLP), "
            f"found {', '.join(found) or 'none'}"
        )
    parts: dict[Kind, Part] = {}
    for group, mixes in zip(groups, mixing, strict=True):
        kind: Kind = "attention" if mixes else "mlp"
        name = group[0] if len(group) == 1 else "mlp"
        parts[kind] = Part(kind, name, group, probe.silencing(group), OutputForm.of_call(*calls[group[-1]]))
        probe.check_dropping(parts[kind])
    return parts["attention"], parts["mlp"]


class _BlockProbe:
    """Runs one block with other values for some parameters, and looks at what its parts answer."""

    def __init__(self, block: nn.Module, arguments: Arguments, hidden: Tensor) -> None:
        self.block, self.arguments, self.hidden = block, arguments, hidden
        self.parameters = dict(block.named_parameters())
        generator = torch.Generator().manual_seed(0)
        # Zeros, in a fresh bias or a model that was pruned before, say nothing about the structure.
        self.values = {n: _random_like(p, generator) for n, p in self.parameters.items() if not p.any()}

    def calls(self) -> dict[str, tuple[Tensor, Any]]:
        """Hidden states and output of every child with weight matrices that runs, in the order they end."""
        seen: dict[str, list[tuple[Tensor, Any]]] = defaultdict(list)

        def note(child: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                seen[child].append((Arguments.of_call(args, kwargs)[0], output))

            return hook

        with ExitStack() as stack:
            for child, module in self.block.named_children():
                if any(parameter.dim() > 1 for parameter in module.parameters()):
                    stack.enter_context(module.register_forward_hook(note(child), with_kwargs=True))
            self.arguments.call(self.block, self.hidden)
        if often := [child for child, calls in seen.items() if len(calls) > 1]:
            raise ModelError(f"expected each part to run once, but {', '.join(often)} runs several times")
        return {child: calls[0] for child, calls in seen.items()}

    def answer(self, children: tuple[str, ...], zero: Mapping[str, Tensor], *, perturbed: bool = False) -> Tensor:
        """What the part answers (..., L, d) with some parameters zero, or with another first token at its input."""
        seen: list[Tensor] = []

        def stop(_: nn.Module, __: Any, output: Any) -> None:
            seen.append(first_tensor(output))
            raise StopForward

        def perturb(_: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden, arguments = Arguments.of_call(args, kwargs)
            hidden = hidden.clone()
            hidden[..., 0, :] = -4 * hidden[..., 0, :].flip(-1)
            return arguments.filled(hidden)

        with ExitStack() as stack:
            if perturbed:
                first = self.block.get_submodule(children[0])
                stack.enter_context(first.register_forward_pre_hook(perturb, with_kwargs=True))
            stack.enter_context(self.block.get_submodule(children[-1]).register_forward_hook(stop))
            with suppress(StopForward):
                self.run(zero)
        return seen[0]

    def run(self, zero: Mapping[str, Tensor]) -> Tensor:
        """The block's output with some parameters zero."""
        args, kwargs = self.arguments.filled(self.hidden)
        return first_tensor(functional_call(self.block, {**self.values, **zero}, args, kwargs))

    def mixes_tokens(self, children: tuple[str, ...]) -> bool:
        """Whether a change of the first token moves what the part answers for later ones."""
        plain, moved = (self.answer(children, {}, perturbed=p)[..., 1:, :] for p in (False, True))
        return not close(plain, moved)

    def silencing(self, children: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the parameters that must be zero for the part to answer zero, and of no others.

        Parameters are zeroed from the last used backwards until the part is silent, then given back their values
        from the first used on as long as it stays so. What cannot be given back are its output projections.
        """
        label = "+".join(children)
        used, unused = self.in_order_of_use(children)
        zero: dict[str, Tensor] = {}
        for name in reversed(used):
            zero[name] = torch.zeros_like(self.parameters[name])
            if not self.answer(children, zero).any():
                break
        else:
            raise ModelError(
                f"looked for parts that only contribute, but {label} answers something even with all its parameters "
                "zero: it adds the residual inside"
            )
        for name in [n for n in used if n in zero]:
            kept = zero.pop(name)
            if self.answer(children, zero).any():
                zero[name] = kept
        if not zero:
            raise ModelError(f"looked for parts that contribute, but {label} answers zero whatever its weights are")
        # An expert that no probe token chose has the same outputs as those that were chosen.
        patterns = {_pattern(name) for name in zero}
        return tuple(n for n in self.parameters if n in zero or (n in unused and _pattern(n) in patterns))

    def in_order_of_use(self, children: tuple[str, ...]) -> tuple[list[str], set[str]]:
        """The part's parameters in the order in which operations first read them, and those that none reads."""
        prefixes = tuple(f"{child}." for child in children)
        names = {id(p): n for n, p in self.parameters.items() if n.startswith(prefixes)}
        with _ParameterUse(names) as use:
            self.arguments.call(self.block, self.hidden)
        return [*use.order], {*names.values()} - {*use.order}

    def check_dropping(self, part: Part) -> None:
        """A dropped part and one with zeroed outputs must give the same block output."""
        zeroed = self.run({n: torch.zeros_like(self.parameters[n]) for n in part.outputs})
        with dropped_(part.modules(self.block), part.form):
            dropped = self.run({})
        if not close(zeroed, dropped):
            raise ModelError(
                f"looked for parts whose output is only added to the residual, but dropping {part.name} and zeroing "
                f"{', '.join(part.outputs)} give different outputs"
            )


class _ParameterUse(TorchFunctionMode):
    """Notes in which order operations that make tensors first read some parameters, by their ids."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.order: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(output)):
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self.names:
                    self.order.setdefault(self.names[id(leaf)])
        return output


def close(reference: Tensor, other: Tensor, slack: float = 1.0) -> bool:
    """Whether two results are equal up to rounding: `slack` roundings, relative, in the 2-norm."""
    if reference.shape != other.shape:
        return False
    tolerance = slack * max(torch.finfo(reference.dtype).eps, 1e-5)
    difference = torch.linalg.vector_norm((reference - other).double())
    return bool(difference <= tolerance * torch.linalg.vector_norm(reference.double()))


def _random_like(parameter: Tensor, generator: torch.Generator) -> Tensor:
    scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.02  # biases must not drown the input
    return (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.device, parameter.dtype)


def _pattern(name: str) -> str:
    """The name without positions in lists: equal for the same parameter of every expert."""
    return ".".join("#" if step.isdigit() else step for step in name.split("."))
