"""A population of students through one model, block by block, with everything they share computed once.

Students of a generation differ in a few decisions. The model is therefore walked once for all of them: those that
were decided alike up to a block are one hidden state, those with the same row of levels for the block run through
its weights together, and a block that a row empties passes hidden states on untouched. The teacher walks along as
one more student, and keeps its last hidden state, not its logits: the head is applied to a chunk of positions at a
time, to the teacher and then to each student, so that no full matrix of logits ever exists. Where students have
embeddings of their own the walk begins with as many hidden states; those with the same head are projected together.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from discopt_llm.anatomy import Arguments, Block, check_same, embed, last_hidden, project, run_block
from discopt_llm.errors import ModelError
from discopt_llm.evaluator_plan import TEACHER, UNTOUCHED, Counts, Levels, Limits, Plan, Row, cuts
from discopt_llm.fitness import Fitness, Logits
from discopt_llm.layers import EMBEDDING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from discopt_llm.models import LoadedModel

__all__ = ["TEACHER", "Counts", "Evaluator", "Levels", "Measurer", "Row", "total_memory"]

# More tokens in one call of a block make its matrix products no faster; on a CPU its activations leave the cache.
TOKENS_PER_CALL = {"cpu": 1024, "cuda": 16384}
# A chunk of logits, bytes: large enough for an efficient product with the head, small enough for the CPU's cache.
LOGIT_BYTES = {"cpu": 3 * 2**23, "cuda": 2**28}
MOST_ON_CPU = 2**32  # bytes; more than this for hidden states saves no time there
UNKNOWN_MEMORY = 2**33  # bytes that a host is taken to have if its system does not say


class Measurer(Protocol):
    """What measures populations of students: an `Evaluator`, or several in other processes."""

    model: PreTrainedModel
    counts: Counts  # of all measurements so far

    def measure(
        self, population: NDArray[np.integer], sequences: Sequence[Tensor], fitnesses: Sequence[Fitness]
    ) -> list[NDArray[np.float64]]:
        """See `Evaluator.measure`."""
        ...


class Evaluator:
    """Measures populations of students of one model against the model itself.

    memory_bytes: bound on hidden states and activations, on the model's device and besides its weights. Where it is
        too small for all students on all sequences, the sequences are cut into micro-batches, and where one sequence
        is too much, the population into slices; one student on one sequence is always held. None: a quarter of the
        device's memory, on a CPU an eighth of the machine's and at most 4 GiB.
    tokens_per_call: at most this many tokens run through a block in one call, or one sequence if that is longer.
        None: what suits the device.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        levels: Levels,
        *,
        memory_bytes: int | None = None,
        tokens_per_call: int | None = None,
    ) -> None:
        for name, value in (("memory_bytes", memory_bytes), ("tokens_per_call", tokens_per_call)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.model, self.anatomy, self.levels = loaded.model, loaded.anatomy, levels
        if len(levels.block_units) != len(self.anatomy.blocks):
            raise ValueError(f"expected levels for {len(self.anatomy.blocks)} blocks, got {len(levels.block_units)}")
        self.device: torch.device = self.model.device
        self.memory_bytes, self.tokens_per_call = memory_bytes, tokens_per_call
        self.counts = Counts()  # of all measurements so far
        self._units = 1 + max(int(unit) for units in (*levels.block_units, *levels.end_units) for unit in units)
        self._arguments_checked = False

    @torch.inference_mode()
    def measure(
        self, population: NDArray[np.integer], sequences: Sequence[Tensor], fitnesses: Sequence[Fitness]
    ) -> list[NDArray[np.float64]]:
        """Losses of every row (k, n) on every sequence of token ids (L_i,): one (k, s) per fitness, lower is better.

        A column is the sum of a sequence's losses, scaled so that the mean over columns is the exact mean over
        positions. Rows that are equal, or equal up to some block, are computed once up to there. The order of the rows
        does not matter; who else is in the population, and how the work is cut, change a loss by rounding alone. A
        unit of level TEACHER is as the teacher has it. Without a fitness only the blocks are run.
        """
        rows = np.asarray(population)
        if rows.ndim != 2 or rows.shape[1] != self._units:
            raise ValueError(f"population must have shape (k, {self._units}), got {rows.shape}")
        lengths = np.array([_length(ids) for ids in sequences], dtype=np.int64)
        measured = [lengths - int(fitness.predicts) for fitness in fitnesses]  # positions of each sequence
        for fitness, positions in zip(fitnesses, measured, strict=True):
            if positions.sum() < 1:
                raise ValueError(f"{fitness.name} needs a position to measure, got sequences of {lengths.tolist()}")
        plan = Plan.of(rows, self.levels, [block.transparent for block in self.anatomy.blocks])
        limits = self._limits()
        sums = torch.zeros((len(fitnesses), len(plan.rows), len(sequences)), dtype=torch.float64, device=self.device)
        for columns, slices in cuts(plan, lengths, limits):
            ids = torch.stack([sequences[i] for i in columns]).to(self.device)
            teacher: Tensor | None = None
            for part in slices:
                last = self._walk(plan, part, ids, limits)
                teacher = last[plan.teacher] if teacher is None else teacher
                asked = [row for row in part.tolist() if row in plan.asked]
                if fitnesses and asked:
                    students = [(last[row], plan.keys[-1][plan.rows[row, -1]]) for row in asked]
                    score = self._score(teacher, students, ids, fitnesses, limits)
                    sums[:, torch.tensor(asked)[:, None], torch.tensor(columns)] = score
                del last
        self.counts += plan.plain_counts(int(lengths.sum()), heads=bool(fitnesses))
        answer = sums.cpu().numpy()[:, plan.row_of]
        return [total * (len(lengths) / n.sum()) for total, n in zip(answer, measured, strict=True)]

    # -- the blocks --------------------------------------------------------------------------------------------

    def _walk(self, plan: Plan, part: NDArray[np.intp], ids: Tensor, limits: Limits) -> dict[int, Tensor]:
        """Last hidden states of some of the plan's rows on token ids (N, L): row -> (N, L, d')."""
        codes, class_of = np.unique(plan.rows[part, 0], return_inverse=True)
        # The states are those of classes: rows that were decided alike so far.
        states, arguments = self._embed([plan.keys[0][code] for code in codes], ids)
        for b, (block, replay) in enumerate(zip(self.anatomy.blocks, arguments, strict=True), start=1):
            pairs = np.stack([class_of, plan.rows[part, b]], axis=1)
            children, inverse = np.unique(pairs, axis=0, return_inverse=True)
            class_of = inverse.reshape(-1)
            states = self._step(block, replay, plan, children, states, limits)
        last: list[Tensor] = []
        while states:  # one by one, so that the states before the tail and after it are not all held at once
            last.append(last_hidden(self.anatomy, states.pop(0)))
        return {row: last[c] for row, c in zip(part.tolist(), class_of.tolist(), strict=True)}

    def _embed(self, rows: Iterable[Row | None], ids: Tensor) -> tuple[list[Tensor], tuple[Arguments, ...]]:
        """States before the blocks (N, L, d) under each of the embedding's rows, and what replays the blocks."""
        teacher, arguments = embed(self.model, self.anatomy, ids)
        states = []
        for row in rows:
            if row is None:
                states.append(teacher)
                continue
            with self.levels.applied_(EMBEDDING, row):
                hidden, own = embed(self.model, self.anatomy, ids)
            self._check_arguments(arguments, own)
            states.append(hidden)
        return states, arguments

    def _check_arguments(self, teacher: Sequence[Arguments], student: Sequence[Arguments]) -> None:
        """Those of the teacher must serve students with other embeddings; looked at once, as it is up to the code."""
        if self._arguments_checked:
            return
        try:
            check_same(self.anatomy, teacher, student, "the embedding")
        except ModelError as error:
            raise ModelError(f"cannot switch the embedding of {type(self.model).__name__}: {error}") from error
        self._arguments_checked = True

    def _step(
        self,
        block: Block,
        replay: Arguments,
        plan: Plan,
        children: NDArray[np.intp],
        states: Sequence[Tensor],
        limits: Limits,
    ) -> list[Tensor]:
        """States after a block; children (c, 2) name their parent among the states and their row among the keys."""
        parent_of, code_of = children.T
        readers = np.bincount(parent_of)  # children that still need their parent's state
        after = [states[parent] for parent in parent_of]  # stays so where the row leaves the block untouched
        tokens = states[0].shape[:2].numel()
        for code in np.unique(code_of):
            row = plan.keys[block.index + 1][code]
            if row == UNTOUCHED:
                continue
            group = np.flatnonzero(code_of == code)
            readers[parent_of[group]] -= 1
            for child in group:
                if readers[parent_of[child]]:  # else the last child takes its parent's place
                    after[child] = torch.empty_like(after[child])
            with self.levels.applied_(block.index, row):
                _run(block, replay, [states[i] for i in parent_of[group]], [after[i] for i in group], limits)
            self.counts += Counts(passes=plan.passes[block.index + 1][code] * len(group) * tokens)
        return after

    # -- the head ----------------------------------------------------------------------------------------------

    def _score(
        self,
        teacher: Tensor,
        students: Sequence[tuple[Tensor, Row | None]],
        ids: Tensor,
        fitnesses: Sequence[Fitness],
        limits: Limits,
    ) -> Tensor:
        """Sums over the measured positions, float64 (f, k, N), from last hidden states (N, L, d') and rows of heads."""
        N, L = ids.shape
        of_head: dict[Row | None, list[int]] = {}
        for i, (_, row) in enumerate(students):
            of_head.setdefault(row, []).append(i)
        next_tokens = ids.roll(-1, dims=1).flatten()  # of a last position a token that counts for nothing
        losses = torch.empty((len(fitnesses), len(students), N * L), dtype=torch.float32, device=self.device)
        for start in range(0, N * L, limits.logit_rows):
            chunk = slice(start, start + limits.logit_rows)
            tokens = next_tokens[chunk]
            logits = self._logits(teacher, chunk, tokens)
            targets = [fitness.target(logits) for fitness in fitnesses]
            for row, members in of_head.items():
                with self._head_applied_(row):
                    for i in members:
                        logits = self._logits(students[i][0], chunk, tokens)
                        for f, fitness in enumerate(fitnesses):
                            losses[f, i, chunk] = _checked(fitness, fitness.losses(targets[f], logits), tokens)
            self.counts += Counts(projected=len(tokens) * (1 + len(students)))
        of_sequence = losses.unflatten(-1, (N, L))
        return torch.stack(
            [
                of_sequence[f, ..., : L - int(fitness.predicts)].sum(dim=-1, dtype=torch.float64)
                for f, fitness in enumerate(fitnesses)
            ]
        )

    def _head_applied_(self, row: Row | None) -> AbstractContextManager[None]:
        return nullcontext() if row is None else self.levels.applied_(len(self.anatomy.blocks), row)

    def _logits(self, hidden: Tensor, chunk: slice, next_tokens: Tensor) -> Logits:
        """Logits of a chunk of all positions of last hidden states (N, L, d')."""
        return Logits(project(self.model, self.anatomy, hidden.flatten(0, 1)[chunk]).float(), next_tokens)

    # -- memory ------------------------------------------------------------------------------------------------

    def _limits(self) -> Limits:
        """Half of the memory is for hidden states, the rest for what a block or the head computes in a call."""
        kind = "cpu" if self.device.type == "cpu" else "cuda"
        total = total_memory(self.device)
        memory = self.memory_bytes or (total // 4 if kind == "cuda" else min(total // 8, MOST_ON_CPU))
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        widest = max(size for p in self.anatomy.blocks[0].module.parameters() for size in p.shape[-2:])
        element = self.model.dtype.itemsize
        activations = 8 * widest * element  # of a token in a block, about
        return Limits(
            state_bytes=memory // 2,
            token_bytes=self.anatomy.blocks[0].form.width * element,
            call_tokens=self.tokens_per_call or min(TOKENS_PER_CALL[kind], memory // 2 // activations),
            logit_rows=max(1, min(LOGIT_BYTES[kind], memory // 16) // (4 * vocabulary)),
        )


def _run(block: Block, replay: Arguments, inputs: Sequence[Tensor], outputs: Sequence[Tensor], limits: Limits) -> None:
    """The block as it is now, from inputs to outputs (N, L, d) each; an output may be the very tensor of its input."""
    sequences, length = inputs[0].shape[:2]
    per_call = max(1, limits.call_tokens // length)
    size = min(sequences, per_call)
    pieces = [
        pair for x, y in zip(inputs, outputs, strict=True) for pair in zip(x.split(size), y.split(size), strict=True)
    ]
    for start in range(0, len(pieces), per_call // size):
        sources, targets = zip(*pieces[start : start + per_call // size], strict=True)
        # Always a copy: a block that works in place would spoil a state that other rows still need.
        result = run_block(block, torch.cat(sources), replay)
        for target, piece in zip(targets, result.split([len(target) for target in targets]), strict=True):
            target.copy_(piece)


def _checked(fitness: Fitness, losses: Tensor, next_tokens: Tensor) -> Tensor:
    if losses.shape != next_tokens.shape:
        shape, got = tuple(next_tokens.shape), tuple(losses.shape)
        raise ValueError(f"{fitness.name} must give losses of shape {shape}, got {got}")
    return losses


def _length(ids: Tensor) -> int:
    if ids.ndim != 1 or len(ids) == 0 or ids.is_floating_point():
        raise ValueError(f"a sequence must be token ids of shape (L,), got {ids.dtype} of shape {tuple(ids.shape)}")
    return len(ids)


def total_memory(device: torch.device) -> int:
    """The memory of a CUDA device, or of the host, bytes.

    All of it, not what is free: how the work is cut decides how it is rounded, and the same run on the same machine
    should be the same to the last bit.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return UNKNOWN_MEMORY
