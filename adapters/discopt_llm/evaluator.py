"""A population of students through one model, block by block, with everything they share computed once.

Students of a generation differ in a few decisions. The model is therefore walked once for all of them: those that
were decided alike up to a block are one hidden state, those with the same row of levels for the block run through
its weights together, and a block that a row empties passes hidden states on untouched. The teacher walks along as
one more student, and keeps its last hidden state, not its logits: the head is applied to a chunk of positions at a
time, to the teacher and then to each student, so that no full matrix of logits ever exists.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from discopt_llm.anatomy import Arguments, Block, embed, last_hidden, project, run_block
from discopt_llm.fitness import Fitness, Logits

if TYPE_CHECKING:
    from discopt_llm.models import LoadedModel

__all__ = ["TEACHER", "Counts", "Evaluator", "Levels", "Row", "total_memory"]

Row = tuple[int, ...]  # the levels of the units that decide about one block

TEACHER = -1  # the level of a unit that is as the teacher has it
_UNTOUCHED: Row = (-1,)  # stands for all rows under which a block passes hidden states on as they are

# More tokens in one call of a block make its matrix products no faster; on a CPU its activations leave the cache.
TOKENS_PER_CALL = {"cpu": 1024, "cuda": 16384}
# A chunk of logits, bytes: large enough for an efficient product with the head, small enough for the CPU's cache.
LOGIT_BYTES = {"cpu": 3 * 2**23, "cuda": 2**28}
MOST_ON_CPU = 2**32  # bytes; more than this for hidden states saves no time there
UNKNOWN_MEMORY = 2**33  # bytes that a host is taken to have if its system does not say


class Levels(Protocol):
    """Where the levels of units come from: dropping, or a bank."""

    @property
    def block_units(self) -> tuple[NDArray[np.intp], ...]:
        """For each block, the units that decide about it; a unit may decide about several blocks."""
        ...

    def dense_row(self, block: int) -> Row | None:
        """The row that leaves a block as the teacher has it; None if the teacher's weights are none of the levels."""
        ...

    def runs(self, block: int, row: Row) -> int:
        """How many of the block's two sub-blocks do any work under this row."""
        ...

    def applied_(self, block: int, row: Row | None) -> AbstractContextManager[None]:
        """The block as the row has it (None: as the teacher has it), while inside."""
        ...


@dataclass(frozen=True)
class Counts:
    """What was computed, and what one whole forward per row of the population and one of the teacher would take."""

    passes: int = 0  # tokens through a sub-block
    plain_passes: int = 0
    projected: int = 0  # positions through the head
    plain_projected: int = 0

    @property
    def share(self) -> float:
        """Share of the sub-block passes that remain."""
        return self.passes / self.plain_passes if self.plain_passes else 1.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.passes + other.passes,
            self.plain_passes + other.plain_passes,
            self.projected + other.projected,
            self.plain_projected + other.plain_projected,
        )


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
        self._units = 1 + max(int(unit) for units in levels.block_units for unit in units)

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
        plan = _Plan.of(rows, self.levels, [block.transparent for block in self.anatomy.blocks])
        limits = self._limits()
        sums = torch.zeros((len(fitnesses), len(plan.rows), len(sequences)), dtype=torch.float64, device=self.device)
        for columns, slices in _cuts(plan, lengths, limits):
            ids = torch.stack([sequences[i] for i in columns]).to(self.device)
            teacher: Tensor | None = None
            for part in slices:
                last = self._walk(plan, part, ids, limits)
                teacher = last[plan.teacher] if teacher is None else teacher
                asked = [row for row in part.tolist() if row in plan.asked]
                if fitnesses and asked:
                    score = self._score(teacher, [last[row] for row in asked], ids, fitnesses, limits)
                    sums[:, torch.tensor(asked)[:, None], torch.tensor(columns)] = score
                del last
        self.counts += plan.plain_counts(int(lengths.sum()), heads=bool(fitnesses))
        answer = sums.cpu().numpy()[:, plan.row_of]
        return [total * (len(lengths) / n.sum()) for total, n in zip(answer, measured, strict=True)]

    # -- the blocks --------------------------------------------------------------------------------------------

    def _walk(self, plan: _Plan, part: NDArray[np.intp], ids: Tensor, limits: _Limits) -> dict[int, Tensor]:
        """Last hidden states of some of the plan's rows on token ids (N, L): row -> (N, L, d')."""
        hidden, arguments = embed(self.model, self.anatomy, ids)
        states = [hidden]  # of the classes: rows that were decided alike so far
        class_of = np.zeros(len(part), dtype=np.intp)
        for b, (block, replay) in enumerate(zip(self.anatomy.blocks, arguments, strict=True)):
            pairs = np.stack([class_of, plan.rows[part, b]], axis=1)
            children, inverse = np.unique(pairs, axis=0, return_inverse=True)
            class_of = inverse.reshape(-1)
            states = self._step(block, replay, plan, children, states, limits)
        last: list[Tensor] = []
        while states:  # one by one, so that the states before the tail and after it are not all held at once
            last.append(last_hidden(self.anatomy, states.pop(0)))
        return {row: last[c] for row, c in zip(part.tolist(), class_of.tolist(), strict=True)}

    def _step(
        self,
        block: Block,
        replay: Arguments,
        plan: _Plan,
        children: NDArray[np.intp],
        states: Sequence[Tensor],
        limits: _Limits,
    ) -> list[Tensor]:
        """States after a block; children (c, 2) name their parent among the states and their row among the keys."""
        parent_of, code_of = children.T
        readers = np.bincount(parent_of)  # children that still need their parent's state
        after = [states[parent] for parent in parent_of]  # stays so where the row leaves the block untouched
        tokens = states[0].shape[:2].numel()
        for code in np.unique(code_of):
            row = plan.keys[block.index][code]
            if row == _UNTOUCHED:
                continue
            group = np.flatnonzero(code_of == code)
            readers[parent_of[group]] -= 1
            for child in group:
                if readers[parent_of[child]]:  # else the last child takes its parent's place
                    after[child] = torch.empty_like(after[child])
            with self.levels.applied_(block.index, row):
                _run(block, replay, [states[i] for i in parent_of[group]], [after[i] for i in group], limits)
            self.counts += Counts(passes=plan.passes[block.index][code] * len(group) * tokens)
        return after

    # -- the head ----------------------------------------------------------------------------------------------

    def _score(
        self, teacher: Tensor, students: Sequence[Tensor], ids: Tensor, fitnesses: Sequence[Fitness], limits: _Limits
    ) -> Tensor:
        """Sums over the measured positions, float64 (f, k, N), from last hidden states (N, L, d')."""
        N, L = ids.shape
        next_tokens = ids.roll(-1, dims=1).flatten()  # of a last position a token that counts for nothing
        losses = torch.empty((len(fitnesses), len(students), N * L), dtype=torch.float32, device=self.device)
        for start in range(0, N * L, limits.logit_rows):
            chunk = slice(start, start + limits.logit_rows)
            tokens = next_tokens[chunk]
            logits = self._logits(teacher, chunk, tokens)
            targets = [fitness.target(logits) for fitness in fitnesses]
            for i, student in enumerate(students):
                logits = self._logits(student, chunk, tokens)
                for f, fitness in enumerate(fitnesses):
                    values = fitness.losses(targets[f], logits)
                    if values.shape != tokens.shape:
                        raise ValueError(
                            f"{fitness.name} must give losses of shape {tuple(tokens.shape)}, got {tuple(values.shape)}"
                        )
                    losses[f, i, chunk] = values
            self.counts += Counts(projected=len(tokens) * (1 + len(students)))
        of_sequence = losses.unflatten(-1, (N, L))
        return torch.stack(
            [
                of_sequence[f, ..., : L - int(fitness.predicts)].sum(dim=-1, dtype=torch.float64)
                for f, fitness in enumerate(fitnesses)
            ]
        )

    def _logits(self, hidden: Tensor, chunk: slice, next_tokens: Tensor) -> Logits:
        """Logits of a chunk of all positions of last hidden states (N, L, d')."""
        return Logits(project(self.model, self.anatomy, hidden.flatten(0, 1)[chunk]).float(), next_tokens)

    # -- memory ------------------------------------------------------------------------------------------------

    def _limits(self) -> _Limits:
        """Half of the memory is for hidden states, the rest for what a block or the head computes in a call."""
        kind = "cpu" if self.device.type == "cpu" else "cuda"
        total = total_memory(self.device)
        memory = self.memory_bytes or (total // 4 if kind == "cuda" else min(total // 8, MOST_ON_CPU))
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        widest = max(size for p in self.anatomy.blocks[0].module.parameters() for size in p.shape[-2:])
        element = self.model.dtype.itemsize
        activations = 8 * widest * element  # of a token in a block, about
        return _Limits(
            state_bytes=memory // 2,
            token_bytes=self.anatomy.blocks[0].form.width * element,
            call_tokens=self.tokens_per_call or min(TOKENS_PER_CALL[kind], memory // 2 // activations),
            logit_rows=max(1, min(LOGIT_BYTES[kind], memory // 16) // (4 * vocabulary)),
        )


@dataclass(frozen=True)
class _Limits:
    """How much of the work may be held at once."""

    state_bytes: int  # of hidden states
    token_bytes: int  # of one token's hidden state
    call_tokens: int  # in one call of a block
    logit_rows: int  # positions in a chunk of logits


@dataclass(frozen=True, eq=False)
class _Plan:
    """A population and the teacher as rows of codes, one per block; equal codes mean equal work."""

    rows: NDArray[np.intp]  # (K, blocks) distinct, in lexicographic order, so that common beginnings are neighbours
    keys: tuple[tuple[Row | None, ...], ...]  # for each block, what its codes stand for
    passes: tuple[tuple[int, ...], ...]  # for each block, the sub-blocks that run under its codes
    row_of: NDArray[np.intp]  # (k,) where each row of the population went
    teacher: int  # where the teacher went

    @property
    def asked(self) -> frozenset[int]:
        """The rows that the population asks for: all, but perhaps not the teacher."""
        return frozenset(self.row_of.tolist())

    @classmethod
    def of(cls, population: NDArray[np.integer], levels: Levels, transparent: Sequence[bool]) -> _Plan:
        """Encode a population (k, n), and the teacher after it."""
        columns, keys, passes = [], [], []
        for b, units in enumerate(levels.block_units):
            dense = levels.dense_row(b)
            rows: list[Row | None] = [_row(row, dense) for row in population[:, units].tolist()]
            rows.append(dense)
            runs = {row: 2 if row is None else levels.runs(b, row) for row in set(rows)}
            key_of = {row: _UNTOUCHED if transparent[b] and not runs[row] else row for row in runs}
            found = sorted(set(key_of.values()), key=lambda key: (key is not None, key or ()))
            columns.append([found.index(key_of[row]) for row in rows])
            keys.append(tuple(found))
            passes.append(tuple(0 if key == _UNTOUCHED else runs[key] for key in found))
        distinct, inverse = np.unique(np.array(columns, dtype=np.intp).T, axis=0, return_inverse=True)
        index = inverse.reshape(-1)
        return cls(distinct, tuple(keys), tuple(passes), index[:-1], int(index[-1]))

    def plain_counts(self, tokens: int, *, heads: bool) -> Counts:
        """What one whole forward per row of the population, and one of the teacher, would take."""
        passes = sum(np.asarray(p)[codes] for p, codes in zip(self.passes, self.rows.T, strict=True))
        walked = np.append(self.row_of, self.teacher)
        return Counts(
            plain_passes=int(passes[walked].sum()) * tokens, plain_projected=len(walked) * tokens if heads else 0
        )


def _row(levels: list[int], dense: Row | None) -> Row | None:
    """The row of a block; the teacher's levels stand in for TEACHER where they are known."""
    if all(level == TEACHER for level in levels):
        return dense
    if dense is None or TEACHER not in levels:
        return tuple(levels)
    return tuple(known if level == TEACHER else level for level, known in zip(levels, dense, strict=True))


def _cuts(
    plan: _Plan, lengths: NDArray[np.int64], limits: _Limits
) -> Iterator[tuple[list[int], list[NDArray[np.intp]]]]:
    """Micro-batches that fit the memory: sequences of one length, and the slices of rows to walk them with.

    The slice with the teacher comes first, for the other slices are compared with it.
    """
    K = len(plan.rows)
    for length in np.unique(lengths):
        state = int(length) * limits.token_bytes
        held = max(1, limits.state_bytes // state)  # states of one sequence
        slices = np.array_split(np.arange(K), 1 if held >= K else -(-K // max(1, held - 1)))  # 1 is the teacher's
        slices.sort(key=lambda part: plan.teacher not in part)
        columns = np.flatnonzero(lengths == length).tolist()
        size = max(1, held // K)
        for start in range(0, len(columns), size):
            yield columns[start : start + size], slices


def _run(block: Block, replay: Arguments, inputs: Sequence[Tensor], outputs: Sequence[Tensor], limits: _Limits) -> None:
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
