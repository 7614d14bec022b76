"""Building a bank: every layer of a model at every level, block by block with one pass of calibration text.

A block's calibration inputs run through it once. On the way the layers' inputs are summed up into their Hessians,
then all levels of the layers that share one are solved together, packed and written. The next block's inputs are
the dense block's outputs (`propagate` "dense"), which that same pass gives, or those of the block at one of its
levels, which take a second one (EvoPress uses the dense ones for sparsity and 3 bits for quantization). What comes
out of the last block goes into the head, where that has levels, or into the embedding that is tied to it; an embedding
that is not has no inputs: its errors are those of its rows. A build that was stopped goes on after the last block it
wrote: the inputs are brought there again, and nothing is solved twice.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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
from discopt_llm.sparsity import outlier_share

__all__ = ["BankPlan", "build_bank"]

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


def build_bank(
    plan: BankPlan, out: Path, *, force: bool = False, quiet: bool = False, say: Callable[[str], None] = _log.info
) -> Bank:
    """Build a bank, or go on with one that was stopped; a finished one of the same plan is opened as it is.

    say: is told where there was nothing to build.

    Raises BankError where something else is at `out`, RunFolderError if it cannot be written.
    """
    if not force and (found := _finished(plan, out)) is not None:
        say(f"{out} is there already, built with the same options")
        return found
    writer = BankWriter.begin(out, plan.header, force=force)
    # Throughout, so that the inputs of a build that goes on are those of one that was never stopped, to the last bit.
    with eager_experts_(plan.loaded.model):
        _build_missing(plan, writer, quiet=quiet)
    return writer.finish()


def _build_missing(plan: BankPlan, writer: BankWriter, *, quiet: bool) -> None:
    """Build the blocks that are not written yet; the text runs no further than through the last of them."""
    blocks = plan.loaded.anatomy.blocks
    missing = {*block_numbers(plan.header)} - writer.finished
    if not missing:
        return
    head = next((layer.block for layer in plan.ends[-1:] if layer.block in missing), None)
    if EMBEDDING in missing and head != EMBEDDING:
        _write(plan, writer, EMBEDDING, None)
    solved = [block.index for block in blocks if block.index in missing]
    if not solved and head is None:
        return
    inputs = _Inputs.embedded(plan)
    dense = plan.propagate == DENSE
    last = len(blocks) if head is not None else solved[-1]  # whose inputs are needed
    passes = (len(blocks[: last + 1]) if dense else len(solved) + last) + (head is not None)
    steps = passes * len(inputs.batches) + (len(solved) + (head is not None)) * _SOLVE_STEPS
    with task("bank", steps, quiet=quiet) as progress:
        for block in blocks[: last + 1]:
            mine = [layer for layer in plan.layers if layer.block == block.index]
            if block.index in missing:
                with collecting_(plan.loaded.model, mine) as sums:
                    inputs.advance_(block, progress, keep=dense)
                _write(plan, writer, block.index, sums)
                progress.advance(_SOLVE_STEPS)
            elif dense:
                inputs.advance_(block, progress, keep=True)
            if not dense and block.index < last:
                with weights_replaced_(plan.loaded.model, _level_weights(plan, writer, mine)):
                    inputs.advance_(block, progress, keep=True)
        if head is not None:
            _write(plan, writer, head, {0: (inputs.last_sum(plan, progress),)})
            progress.advance(_SOLVE_STEPS)


def _finished(plan: BankPlan, out: Path) -> Bank | None:
    """The bank at `out`, if it is this one and whole; BankError if it is damaged."""
    if not (out / MANIFEST).is_file():
        return None
    manifest = Manifest.read(out)
    return Bank.open(out) if manifest.complete and manifest.header == plain(plan.header, exact=True) else None


class _Inputs:
    """The calibration text on its way through the model: what goes into the next block, held once, on the CPU."""

    def __init__(self, hidden: Tensor, arguments: Sequence[Arguments], batch: int, device: torch.device) -> None:
        self.hidden, self.arguments, self.device = hidden, arguments, device
        self.batches = [slice(i, i + batch) for i in range(0, len(hidden), batch)]

    @classmethod
    @torch.no_grad()
    def embedded(cls, plan: BankPlan) -> _Inputs:
        """What goes into the first block."""
        loaded, sequences = plan.loaded, plan.calibration.sequences
        kind = "cpu" if loaded.device.type == "cpu" else "cuda"
        batch = max(1, TOKENS_PER_CALL[kind] // plan.calibration.sequence_length)
        hidden = torch.empty(0)
        arguments: Sequence[Arguments] = ()
        for start in range(0, len(sequences), batch):
            part, arguments = embed(loaded.model, loaded.anatomy, sequences[start : start + batch].to(loaded.device))
            if not start:
                hidden = torch.empty((len(sequences), *part.shape[1:]), dtype=part.dtype)
            hidden[start : start + batch] = part
        return cls(hidden, arguments, batch, loaded.device)

    @torch.no_grad()
    def advance_(self, block: Block, progress: Task, *, keep: bool) -> None:
        """Run a block on all of it; with `keep` its outputs take the inputs' place."""
        for batch in self.batches:
            output = run_block(block, self.hidden[batch].to(self.device), self.arguments[block.index])
            if keep:
                self.hidden[batch] = output
            progress.advance()

    @torch.no_grad()
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


def _level_weights(plan: BankPlan, writer: BankWriter, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """The weights of a block's layers at the level that makes the next block's inputs."""
    level = plan.recipe.labels.index(plan.propagate)
    return {
        layer.parameter_name: layer.to_parameter(
            writer.weights(layer.block, layer.name, level, plan.loaded.device).to(layer.parameter.dtype)
        )
        for layer in layers
    }


@torch.no_grad()
def _write(plan: BankPlan, writer: BankWriter, block: int, sums: Mapping[int, Sequence[InputSum]] | None) -> None:
    """Solve all levels of a block and write them; `sums` are by the number of the input, None where there is none."""
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
    writer.write_block(block, [described[layer.index] for layer in layers], forms)


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
