"""Building a bank: every layer of a model at every level, block by block with one pass of calibration text.

A block's calibration inputs run through it once. On the way the layers' inputs are summed up into their Hessians,
then all levels of the layers that share one are solved together, packed and written. The next block's inputs are
the dense block's outputs (`propagate` "dense"), which that same pass gives, or those of the block at one of its
levels, which take a second one (EvoPress uses the dense ones for sparsity and 3 bits for quantization). What comes
out of the last block goes into the head, where that has levels, or into the embedding that is tied to it; an embedding
that is not has no inputs: its errors are those of its rows. A build that was stopped goes on after the last block it
wrote: the inputs are brought there again, and nothing is solved twice. Where the dense model makes the inputs, blocks
do not depend on each other, and other processes may solve them.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discopt.encoding import plain
from discopt.folder import distribution_version
from discopt.progress import Task, task
from discopt_llm.anatomy import Arguments, Block, embed, last_hidden, run_block
from discopt_llm.bank import Bank, BankLayer, BankWriter, Ggml, Sparse
from discopt_llm.bank import Form as StoredForm
from discopt_llm.bank_manifest import MANIFEST, Manifest, block_numbers
from discopt_llm.calibration import Calibration
from discopt_llm.errors import BankError
from discopt_llm.evaluator import TOKENS_PER_CALL
from discopt_llm.hessian import InputSum
from discopt_llm.layers import EMBEDDING, GGUF, Layer, collecting_, eager_experts_
from discopt_llm.models import LoadedModel
from discopt_llm.quantization import Quantized
from discopt_llm.recipes import Recipe, SolvedStack
from discopt_llm.replay import weights_replaced_
from discopt_llm.residency import on_device_
from discopt_llm.sparsity import outlier_share

__all__ = ["BankPlan", "BlockSolver", "SolvedBlock", "Spread", "build_bank"]

DENSE = "dense"
OWL_MULTIPLES = (3.0, 5.0, 7.0, 10.0)  # a weight counts as an outlier above so many times the mean (OWL)
_SOLVE_STEPS = 8  # of the progress bar, for the solves of a block

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class BankPlan:
    """A bank that is to be built."""

    loaded: LoadedModel
    layers: tuple[Layer, ...]  # those of the recipe's kind, see `layers_for`
    recipe: Recipe
    calibration: Calibration
    propagate: str = DENSE  # or a label of the levels

    def __post_init__(self) -> None:
        known = (DENSE, *self.recipe.labels)
        if self.propagate not in known:
            raise BankError(f"the next block's inputs can be {', '.join(known)}, got {self.propagate!r}")
        lacking = [
            layer.name
            for layer in self.layers
            if self.propagate != DENSE
            and layer not in self.ends
            and not self.planned[layer.index].present[known.index(self.propagate) - 1]
        ]
        if lacking:
            raise BankError(
                f"level {self.propagate} cannot make the next block's inputs: {lacking[0]} does not have it"
            )

    @cached_property
    def planned(self) -> tuple[BankLayer, ...]:
        """All layers with the costs of their levels, before anything is solved."""
        return tuple(self.recipe.planned(layer) for layer in self.layers)

    @property
    def header(self) -> dict[str, Any]:
        """What the bank is: a build goes on only where all of it is the same."""
        text = self.calibration
        libraries = ("discopt-search", "torch", "transformers", *self.recipe.libraries)
        return {
            "kind": self.recipe.kind,
            "settings": self.recipe.described,
            "labels": list(self.recipe.labels),
            "propagate": self.propagate,
            "model": {"source": self.loaded.source, "fingerprint": self.loaded.fingerprint},
            "calibration": {
                "source": text.source,
                "fingerprint": text.fingerprint,
                "tokens": text.tokens,
                "sequence_length": text.sequence_length,
            },
            "dtype": str(self.loaded.dtype).removeprefix("torch."),
            "blocks": len(self.loaded.anatomy.blocks),
            "versions": {name: distribution_version(name) for name in libraries},
            **({"ends": [layer.kind for layer in self.ends]} if self.recipe.kind == GGUF else {}),
        }

    @property
    def ends(self) -> tuple[Layer, ...]:
        """Embedding and head, where they have levels; the last of them reads the last hidden states."""
        return tuple(layer for layer in self.layers if layer.kind in ("embedding", "head"))

    @property
    def head(self) -> int | None:
        """The number of the block that reads the last hidden states; EMBEDDING where that is tied, None without."""
        return self.ends[-1].block if self.ends else None

    def reached(self, number: int) -> int | None:
        """How many blocks of the model the text goes through to come to a block of the bank; None: it takes no text."""
        if number == self.head:
            return len(self.loaded.anatomy.blocks)
        return None if number == EMBEDDING else number


SolvedBlock = tuple[Sequence[BankLayer], Mapping[tuple[str, int], StoredForm]]  # layers, forms by name and level
Spread = Callable[[BankPlan, Sequence[int]], Iterable[tuple[int, SolvedBlock]]]  # blocks by number, as asked for


def build_bank(
    plan: BankPlan,
    out: Path,
    *,
    force: bool = False,
    quiet: bool = False,
    say: Callable[[str], None] = _log.info,
    spread: Spread | None = None,
) -> Bank:
    """Build a bank, or go on with one that was stopped; a finished one of the same plan is opened as it is.

    say: is told where there was nothing to build, and where `spread` cannot help.
    spread: solves the blocks instead of this process, where they do not depend on each other; to the same bytes.

    Raises BankError where something else is at `out`, RunFolderError if it cannot be written.
    """
    if not force and (found := _finished(plan, out)) is not None:
        say(f"{out} is there already, built with the same options")
        return found
    if spread is not None and plan.propagate != DENSE:
        say(
            "this bank is built by one process: a block's inputs come from the blocks before it at level "
            f"{plan.propagate}; workers can share the blocks of a bank whose inputs are the dense model's"
        )
        spread = None
    writer = BankWriter.begin(out, plan.header, force=force)
    missing = sorted({*block_numbers(plan.header)} - writer.finished, key=lambda block: (block == plan.head, block))
    if missing and spread is not None:
        with task("bank", len(missing), unit="blocks", quiet=quiet) as progress:
            for number, solved in spread(plan, missing):
                writer.write_block(number, *solved)
                progress.advance()
    elif missing:
        solver = BlockSolver(plan, None if plan.propagate == DENSE else writer)
        with task("bank", solver.steps(missing), quiet=quiet) as progress:
            for number in missing:
                writer.write_block(number, *solver.solve(number, progress))
    return writer.finish()


def _finished(plan: BankPlan, out: Path) -> Bank | None:
    """The bank at `out`, if it is this one and whole; BankError if it is damaged."""
    if not (out / MANIFEST).is_file():
        return None
    manifest = Manifest.read(out)
    return Bank.open(out) if manifest.complete and manifest.header == plain(plan.header, exact=True) else None


class BlockSolver:
    """Solves blocks of a bank, in any order; the text goes through the model as far as they need it.

    written: has the blocks whose levels make the inputs of those after them; None: the dense model makes them. Going
        back to an earlier block takes the text to the beginning again.
    """

    def __init__(self, plan: BankPlan, written: BankWriter | None = None) -> None:
        self.plan, self._written = plan, written
        self._batches = _batches(plan)
        self._inputs: _Inputs | None = None
        self._at = 0  # the block that the text has come to

    def steps(self, numbers: Sequence[int]) -> int:
        """Of the progress bar, to solve these blocks in the order of the model."""
        blocks = len(self.plan.loaded.anatomy.blocks)
        reached = [place for number in numbers if (place := self.plan.reached(number)) is not None]
        last, collected = max(reached, default=-1), sum(place < blocks for place in reached)
        passes = min(last + 1, blocks) if self._written is None else max(last, 0) + collected
        return (passes + (last == blocks)) * len(self._batches) + len(numbers) * _SOLVE_STEPS

    @torch.no_grad()
    def solve(self, number: int, progress: Task) -> SolvedBlock:
        """A block's layers with their errors, and the forms of all their levels."""
        plan, model = self.plan, self.plan.loaded.model
        blocks, place = plan.loaded.anatomy.blocks, plan.reached(number)
        sums: Mapping[int, Sequence[InputSum]] | None = None
        # In one way throughout, so that the inputs of a build that goes on, or is spread over several processes, are
        # those of one that was never stopped, to the last bit.
        with ExitStack() as stack:
            stack.enter_context(eager_experts_(model))
            if place is not None:
                inputs = self._brought(place, progress)
                if place == len(blocks):
                    sums = {0: (inputs.last_sum(plan, progress),)}
                else:
                    stack.enter_context(on_device_(blocks[place].module))
                    with collecting_(model, self._layers(place)) as sums:
                        inputs.advance_(blocks[place], progress, keep=self._written is None)
                    self._at += self._written is None
            solved = _solved(plan, number, sums)
        progress.advance(_SOLVE_STEPS)
        return solved

    def _brought(self, place: int, progress: Task) -> _Inputs:
        """The text, before this block of the model."""
        if self._inputs is None or self._at > place:
            self._inputs, self._at = _Inputs.embedded(self.plan, self._batches), 0
        for block in self.plan.loaded.anatomy.blocks[self._at : place]:
            with on_device_(block.module), self._as_written_(block.index):
                self._inputs.advance_(block, progress, keep=True)
            self._at += 1
        return self._inputs

    def _as_written_(self, block: int) -> AbstractContextManager[None]:
        """The block as it makes the inputs of the next, while inside."""
        if self._written is None:
            return nullcontext()
        weights = _level_weights(self.plan, self._written, self._layers(block))
        return weights_replaced_(self.plan.loaded.model, weights)

    def _layers(self, block: int) -> list[Layer]:
        return [layer for layer in self.plan.layers if layer.block == block]


class _Inputs:
    """The calibration text on its way through the model: what goes into the next block, held once, on the CPU."""

    def __init__(
        self, hidden: Tensor, arguments: Sequence[Arguments], batches: Sequence[slice], device: torch.device
    ) -> None:
        self.hidden, self.arguments, self.batches, self.device = hidden, arguments, batches, device

    @classmethod
    def embedded(cls, plan: BankPlan, batches: Sequence[slice]) -> _Inputs:
        """What goes into the first block."""
        loaded, sequences = plan.loaded, plan.calibration.sequences
        hidden = torch.empty(0)
        arguments: Sequence[Arguments] = ()
        for batch in batches:
            part, arguments = embed(loaded.model, loaded.anatomy, sequences[batch].to(loaded.device))
            if not batch.start:
                hidden = torch.empty((len(sequences), *part.shape[1:]), dtype=part.dtype)
            hidden[batch] = part
        return cls(hidden, arguments, batches, loaded.device)

    def advance_(self, block: Block, progress: Task, *, keep: bool) -> None:
        """Run a block on all of it; with `keep` its outputs take the inputs' place."""
        for batch in self.batches:
            output = run_block(block, self.hidden[batch].to(self.device), self.arguments[block.index])
            if keep:
                self.hidden[batch] = output
            progress.advance()

    def last_sum(self, plan: BankPlan, progress: Task) -> InputSum:
        """The second moment of what the head reads, once all blocks have run."""
        total: InputSum | None = None
        for batch in self.batches:
            last = last_hidden(plan.loaded.anatomy, self.hidden[batch].to(self.device))
            total = total or InputSum(last.shape[-1], self.device)
            total.add_(last)
            progress.advance()
        assert total is not None
        return total


def _batches(plan: BankPlan) -> list[slice]:
    """The sequences of the text that run through a block at a time."""
    kind = "cpu" if plan.loaded.device.type == "cpu" else "cuda"
    batch = max(1, TOKENS_PER_CALL[kind] // plan.calibration.sequence_length)
    return [slice(i, i + batch) for i in range(0, len(plan.calibration.sequences), batch)]


def _level_weights(plan: BankPlan, writer: BankWriter, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """The weights of a block's layers at the level that makes the next block's inputs."""
    level = plan.recipe.labels.index(plan.propagate)
    return {
        layer.parameter_name: layer.to_parameter(
            writer.weights(layer.block, layer.name, level, plan.loaded.device).to(layer.parameter.dtype)
        )
        for layer in layers
    }


def _solved(plan: BankPlan, block: int, sums: Mapping[int, Sequence[InputSum]] | None) -> SolvedBlock:
    """Solve all levels of a block; `sums` are by the number of the input, None where there is none."""
    layers = [layer for layer in plan.layers if layer.block == block]
    forms: dict[tuple[str, int], StoredForm] = {}
    described: dict[int, BankLayer] = {}
    by_input: dict[int, list[Layer]] = defaultdict(list)
    for layer in layers:
        by_input[layer.input].append(layer)
    for number, stack in by_input.items():
        empty = tuple(InputSum(stack[0].columns, plan.loaded.device) for _ in range(stack[0].matrices))
        solved, outliers = _solve(plan, stack, empty if sums is None else sums[number])
        for i, layer in enumerate(stack):
            for level, form in enumerate(solved.forms[i]):
                if form is not None:
                    forms[layer.name, level] = form
            planned, norm = plan.planned[layer.index], solved.norms[i] or 1.0
            errors = np.where(planned.present, solved.errors[i] / norm, np.nan)
            described[layer.index] = replace(planned, errors=errors, outliers=outliers[i])
    return [described[layer.index] for layer in layers], forms


def _solve(
    plan: BankPlan, stack: Sequence[Layer], sums: Sequence[InputSum]
) -> tuple[SolvedStack, list[dict[str, float]]]:
    """All levels of the layers with one input, and their shares of outliers.

    Experts count by the tokens that reached them. Where none came, H = I stands in for what is not known: of a lone
    expert, errors of zero at every level would call the lowest one as good as any. So it is for an embedding, whose
    rows are taken as they are.
    """
    matrices = [layer.to_matrices(layer.parameter.detach()) for layer in stack]
    solved: list[SolvedStack] = []
    shares: list[Tensor] = []
    for expert, one in enumerate(sums):
        weights = [W[expert].float() for W in matrices]
        H = one.H if one.tokens else torch.eye(stack[0].columns, device=weights[0].device)
        solved.append(plan.recipe.solve(stack, weights, H, expert))
        shares.append(torch.stack([outlier_share(W, H, OWL_MULTIPLES) for W in weights]))
    tokens = np.array([one.tokens for one in sums], dtype=np.float64)
    counted = tokens if tokens.any() else np.ones(len(sums))
    whole = SolvedStack(
        forms=tuple(
            tuple(_stacked([one.forms[i][j] for one in solved]) for j in range(len(plan.recipe.labels)))
            for i in range(len(stack))
        ),
        errors=np.tensordot(counted, np.stack([one.errors for one in solved]), axes=1),
        norms=np.tensordot(counted, np.stack([one.norms for one in solved]), axes=1),
    )
    keys = [f"{multiple:g}" for multiple in OWL_MULTIPLES]
    return whole, [dict(zip(keys, row, strict=True)) for row in torch.stack(shares).mean(dim=0).tolist()]


def _stacked(forms: Sequence[StoredForm | None]) -> StoredForm | None:
    """One form (1, R, C) for each expert -> one of all (E, R, C)."""
    first = forms[0]
    if isinstance(first, Quantized):
        quantized = [form for form in forms if isinstance(form, Quantized)]
        zeros = [form.zeros for form in quantized if form.zeros is not None]
        return replace(
            first,
            codes=torch.cat([form.codes for form in quantized]),
            scales=torch.cat([form.scales for form in quantized]),
            zeros=torch.cat(zeros) if zeros else None,
        )
    if isinstance(first, Ggml):
        return replace(first, data=torch.cat([form.data for form in forms if isinstance(form, Ggml)]))
    sparse = [form for form in forms if isinstance(form, Sparse)]
    if not sparse:
        return None
    return Sparse(torch.cat([form.keep for form in sparse]), torch.cat([form.values for form in sparse]))
