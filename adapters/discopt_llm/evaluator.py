"""A population of students through one model, block by block, with everything they share computed once.

Students of a generation differ in a few decisions. The model is therefore walked once for all of them: those that
were decided alike up to a block are one hidden state, those with the same row of levels for the block run through
its weights together, and a block that a row empties passes hidden states on untouched. The teacher walks along as
one more student, and keeps its last hidden state, not its logits: the head is applied to a chunk of positions at a
time, to the teacher and then to each student, so that no full matrix of logits ever exists. Where students have
embeddings of their own the walk begins with as many hidden states; those with the same head are projected together.

A call of a block or of the head is always of one student. Calls of several together would be larger where a student
has few tokens, but how a product is rounded depends on its size, and so a loss would depend on who else is measured.
On a CPU larger calls are no faster. On CUDA a stage of 2048 tokens runs in calls of 2048 tokens; weights are still
brought and unpacked once for all students with the same row of levels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from discopt_llm.anatomy import Arguments, Block, check_same, embed, last_hidden, project, run_block
from discopt_llm.errors import MemoryPlanError, ModelError
from discopt_llm.evaluator_plan import TEACHER, UNTOUCHED, Counts, Cut, Levels, Plan, Row
from discopt_llm.fitness import Fitness, Logits
from discopt_llm.lanes import is_out_of_memory, to_device
from discopt_llm.layers import EMBEDDING
from discopt_llm.memory import TOKENS_PER_CALL, Memory, MemoryPlan, ModelSizes, StoredLevels, total_memory
from discopt_llm.report_words import size_words
from discopt_llm.residency import on_device_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from discopt_llm.models import LoadedModel

__all__ = ["TEACHER", "TOKENS_PER_CALL", "Counts", "Evaluator", "Levels", "Measurer", "Row", "total_memory"]

_Score = tuple[list[int], list[int], Tensor]  # rows (k,) of a plan, columns (s,), and their float64 sums (f, k, s)

_log = logging.getLogger(__name__)


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

    memory: bound on all that is held; the model must have been loaded with the same. The blocks that `plan` finds
        place for are brought to the device, the levels of a bank keep to their part, and `say` hears the plan.
        MemoryPlanError if it is too little.
    memory_bytes: bound on hidden states and activations alone, on the model's device and besides its weights. Where it
        is too small for all students on all sequences, the sequences are cut into micro-batches, and where one call is
        too much, the population into slices; one student on one sequence is always held. None: what the plan gives.
    tokens_per_call: at most this many tokens run through a block in one call, or one sequence if that is longer.
        None: what suits the device.

    Where memory runs out all the same, half as much is held from then on, and `say` hears that too.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        levels: Levels,
        *,
        memory: Memory = Memory(),  # noqa: B008, it is frozen
        memory_bytes: int | None = None,
        tokens_per_call: int | None = None,
        say: Callable[[str], None] = _log.warning,
    ) -> None:
        for name, value in (("memory_bytes", memory_bytes), ("tokens_per_call", tokens_per_call)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.model, self.anatomy, self.levels = loaded.model, loaded.anatomy, levels
        if len(levels.block_units) != len(self.anatomy.blocks):
            raise ValueError(f"expected levels for {len(self.anatomy.blocks)} blocks, got {len(levels.block_units)}")
        self.device: torch.device = loaded.device
        self.counts = Counts()  # of all measurements so far
        self.say = say
        stored = levels if isinstance(levels, StoredLevels) else None
        sizes = None if stored is None else stored.sizes
        self.plan = MemoryPlan.of(memory, self.device, ModelSizes.of(loaded), sizes, working=memory_bytes)
        self.limits = self.plan.limits(tokens_per_call)
        if self.plan.bound is not None:
            loaded.place_(self.plan.resident)
            if stored is not None:
                stored.keep_(packed=self.plan.packed, unpacked=self.plan.unpacked)
            say(self.plan.sentence)
        self._units = 1 + max(int(unit) for units in (*levels.block_units, *levels.end_units) for unit in units)
        self._arguments_checked = False

    @torch.inference_mode()
    def measure(
        self, population: NDArray[np.integer], sequences: Sequence[Tensor], fitnesses: Sequence[Fitness]
    ) -> list[NDArray[np.float64]]:
        """Losses of every row (k, n) on every sequence of token ids (L_i,): one (k, s) per fitness, lower is better.

        A column is the sum of a sequence's losses, scaled so that the mean over columns is the exact mean over
        positions. Rows that are equal, or equal up to some block, are computed once up to there. The losses of a row
        do not depend on the other rows, to the last bit; how much memory there is changes them by rounding alone. A
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
        scores = self._scores(plan, lengths, sequences, fitnesses)
        self.counts += plan.plain_counts(int(lengths.sum()), heads=bool(fitnesses))
        sums = np.zeros((len(fitnesses), len(plan.rows), len(sequences)))
        if scores:  # all come at once: the one time that the device is waited for
            values = torch.cat([score.flatten() for *_, score in scores]).cpu().split([s.numel() for *_, s in scores])
            for (asked, columns, score), of_score in zip(scores, values, strict=True):
                sums[:, np.array(asked)[:, None], columns] = of_score.view(score.shape).numpy()
        return [total * (len(lengths) / n.sum()) for total, n in zip(sums[:, plan.row_of], measured, strict=True)]

    # -- micro-batches -----------------------------------------------------------------------------------------

    def _scores(
        self, plan: Plan, lengths: NDArray[np.int64], sequences: Sequence[Tensor], fitnesses: Sequence[Fitness]
    ) -> list[_Score]:
        """The sums of all losses, still on their way through the device."""
        scores: list[_Score] = []
        for length in np.unique(lengths).tolist():
            self.plan.check_length(length)
            left = np.flatnonzero(lengths == length).tolist()
            while left:
                cut = Cut.of(plan, length, len(left), self.limits)
                done = self._tried(plan, cut, left[: cut.sequences], sequences, fitnesses)
                if done is None:
                    self._hold_less_(length)
                    continue
                scores += done
                left = left[cut.sequences :]
        return scores

    def _tried(self, *args: Any) -> list[_Score] | None:
        """A micro-batch; None where memory ran out, with nothing left of it: its tensors go with the error."""
        counts = self.counts
        try:
            return list(self._micro_batch(*args))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.counts = counts
        return None

    def _hold_less_(self, length: int) -> None:
        """Halve what is held at once, for the rest of the run."""
        limits = self.limits.halved(length)
        if limits is None:
            raise MemoryPlanError(
                f"out of memory with one student on one sequence of {length:,} tokens; it takes shorter sequences, or "
                "less beside it on the device"
            )
        self.limits = limits
        if isinstance(self.levels, StoredLevels):
            self.levels.let_go_()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.say(
            f"out of memory: hidden states halved to {size_words(limits.state_bytes)}, calls to at most "
            f"{limits.call_tokens:,} tokens"
        )

    def _micro_batch(
        self,
        plan: Plan,
        cut: Cut,
        columns: list[int],
        sequences: Sequence[Tensor],
        fitnesses: Sequence[Fitness],
    ) -> Iterator[_Score]:
        calls = to_device(torch.stack([sequences[i] for i in columns]), self.device).split(cut.per_call)
        teacher: Sequence[Tensor] = ()
        for part in cut.slices:
            last = self._walk(plan, part, calls)
            teacher = teacher or last[plan.teacher]
            asked = [row for row in part.tolist() if row in plan.asked]
            if fitnesses and asked:
                of_calls = [
                    self._score(
                        teacher[i], [(last[row][i], plan.keys[-1][plan.rows[row, -1]]) for row in asked], ids, fitnesses
                    )
                    for i, ids in enumerate(calls)
                ]
                yield asked, columns, torch.cat(of_calls, dim=-1)
            del last

    # -- the blocks --------------------------------------------------------------------------------------------

    def _walk(self, plan: Plan, part: NDArray[np.intp], calls: Sequence[Tensor]) -> dict[int, list[Tensor]]:
        """Last hidden states of some of the plan's rows on the token ids of calls (N, L): row -> (N, L, d') each."""
        codes, class_of = np.unique(plan.rows[part, 0], return_inverse=True)
        # The states are those of classes: rows that were decided alike so far.
        states, arguments = self._embed([plan.keys[0][code] for code in codes], calls)
        for b, (block, replay) in enumerate(zip(self.anatomy.blocks, arguments, strict=True), start=1):
            pairs = np.stack([class_of, plan.rows[part, b]], axis=1)
            children, inverse = np.unique(pairs, axis=0, return_inverse=True)
            class_of = inverse.reshape(-1)
            with on_device_(block.module):
                states = self._step(block, replay, plan, children, states, len(calls[0]))
        last: list[list[Tensor]] = []
        while states:  # one by one, so that the states before the tail and after it are not all held at once
            last.append([last_hidden(self.anatomy, piece) for piece in states.pop(0).split(len(calls[0]))])
        return {row: last[c] for row, c in zip(part.tolist(), class_of.tolist(), strict=True)}

    def _embed(self, rows: Iterable[Row | None], calls: Sequence[Tensor]) -> tuple[list[Tensor], tuple[Arguments, ...]]:
        """States before the blocks (N, L, d) under each of the embedding's rows, and what replays the blocks."""
        teacher, arguments = self._embedded(calls)
        states = []
        for row in rows:
            if row is None:
                states.append(teacher)
                continue
            with self.levels.applied_(EMBEDDING, row):
                hidden, own = self._embedded(calls)
            self._check_arguments(arguments, own)
            states.append(hidden)
        return states, arguments

    def _embedded(self, calls: Sequence[Tensor]) -> tuple[Tensor, tuple[Arguments, ...]]:
        """As the embedding is now, call by call."""
        hidden, arguments = embed(self.model, self.anatomy, calls[0])
        if len(calls) == 1:
            return hidden, arguments
        states = hidden.new_empty((sum(len(ids) for ids in calls), *hidden.shape[1:]))
        for piece, ids in zip(states.split(len(calls[0])), calls, strict=True):
            piece.copy_(hidden if ids is calls[0] else embed(self.model, self.anatomy, ids)[0])
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
        per_call: int,
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
                for child in group:
                    _run(block, replay, states[parent_of[child]], after[child], per_call)
            self.counts += Counts(passes=plan.passes[block.index + 1][code] * len(group) * tokens)
        return after

    # -- the head ----------------------------------------------------------------------------------------------

    def _score(
        self,
        teacher: Tensor,
        students: Sequence[tuple[Tensor, Row | None]],
        ids: Tensor,
        fitnesses: Sequence[Fitness],
    ) -> Tensor:
        """Sums over the measured positions, float64 (f, k, N), from last hidden states (N, L, d') and rows of heads."""
        N, L = ids.shape
        of_head: dict[Row | None, list[int]] = {}
        for i, (_, row) in enumerate(students):
            of_head.setdefault(row, []).append(i)
        next_tokens = ids.roll(-1, dims=1).flatten()  # of a last position a token that counts for nothing
        losses = torch.empty((len(fitnesses), len(students), N * L), dtype=torch.float32, device=self.device)
        for start in range(0, N * L, self.limits.logit_rows):
            chunk = slice(start, start + self.limits.logit_rows)
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


def _run(block: Block, replay: Arguments, source: Tensor, target: Tensor, per_call: int) -> None:
    """The block as it is now, from a state (N, L, d) to another, which may be the same tensor."""
    for x, y in zip(source.split(per_call), target.split(per_call), strict=True):
        # Always a copy: a block that works in place would spoil a state that other rows still need.
        y.copy_(run_block(block, x.clone(), replay))


def _checked(fitness: Fitness, losses: Tensor, next_tokens: Tensor) -> Tensor:
    if losses.shape != next_tokens.shape:
        shape, got = tuple(next_tokens.shape), tuple(losses.shape)
        raise ValueError(f"{fitness.name} must give losses of shape {shape}, got {got}")
    return losses


def _length(ids: Tensor) -> int:
    if ids.ndim != 1 or len(ids) == 0 or ids.is_floating_point():
        raise ValueError(f"a sequence must be token ids of shape (L,), got {ids.dtype} of shape {tuple(ids.shape)}")
    return len(ids)
