"""What the evaluator has to compute for a population: which rows differ, from where on, and how the work is cut.

Every row becomes codes, one for each place where units decide: the embedding, the blocks in their order, the head.
Rows with equal codes up to a place are one hidden state there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from discopt_llm.layers import EMBEDDING

__all__ = ["TEACHER", "UNTOUCHED", "Counts", "Cut", "Levels", "Limits", "Plan", "Row"]

Row = tuple[int, ...]  # the levels of the units that decide about one place: a block, the embedding or the head

TEACHER = -1  # the level of a unit that is as the teacher has it
UNTOUCHED: Row = (-1,)  # stands for all rows under which a block passes hidden states on as they are


class Levels(Protocol):
    """Where the levels of units come from: dropping, or a bank.

    The embedding and the head are called blocks EMBEDDING and B, the number of blocks; nothing is asked about one of
    them that no unit decides about.
    """

    @property
    def block_units(self) -> tuple[NDArray[np.intp], ...]:
        """For each block, the units that decide about it; a unit may decide about several blocks."""
        ...

    @property
    def end_units(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """The units that decide about the embedding, and about the head; one of a tied embedding is in both."""
        ...

    def dense_row(self, block: int) -> Row | None:
        """The row that leaves a block as the teacher has it; None if the teacher's weights are none of the levels."""
        ...

    def runs(self, block: int, row: Row) -> int:
        """How many of the block's two sub-blocks do any work under this row."""
        ...

    def applied_(self, block: int, row: Row | None) -> AbstractContextManager[None]:
        """The block as the row has it (None: as the teacher has it), while inside.

        A tied weight may be replaced for both ends at once: while one of them is applied, the other is not run.
        """
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


@dataclass(frozen=True)
class Limits:
    """How much of the work may be held at once."""

    state_bytes: int  # of hidden states
    token_bytes: int  # of one token's hidden state
    call_tokens: int  # in one call of a block
    logit_rows: int  # positions in a chunk of logits

    def held(self, length: int) -> int:
        """How many states of one sequence of so many tokens there is room for."""
        return self.state_bytes // (length * self.token_bytes)

    def per_call(self, length: int) -> int:
        """How many sequences of so many tokens run in one call of a block."""
        return max(1, min(self.call_tokens // length, self.held(length) // 2))

    def halved(self, length: int) -> Limits | None:
        """Half as much at once; None if it is one student on one sequence of so many tokens already."""
        if self.state_bytes < 2 * length * self.token_bytes and self.call_tokens <= length and self.logit_rows == 1:
            return None
        state, call, rows = (max(1, n // 2) for n in (self.state_bytes, self.call_tokens, self.logit_rows))
        return Limits(state, self.token_bytes, call, rows)


@dataclass(frozen=True, eq=False)
class Plan:
    """A population and the teacher as rows of codes for the embedding, each of B blocks and the head.

    Equal codes mean equal work. The embedding has column 0, block b column b + 1.
    """

    rows: NDArray[np.intp]  # (K, B+2) distinct, in lexicographic order, so that common beginnings are neighbours
    keys: tuple[tuple[Row | None, ...], ...]  # (B+2,) what the codes stand for
    passes: tuple[tuple[int, ...], ...]  # (B+2,) the sub-blocks that run under the codes
    row_of: NDArray[np.intp]  # (k,) where each row of the population went
    teacher: int  # where the teacher went

    @property
    def asked(self) -> frozenset[int]:
        """The rows that the population asks for: all, but perhaps not the teacher."""
        return frozenset(self.row_of.tolist())

    @classmethod
    def of(cls, population: NDArray[np.integer], levels: Levels, transparent: Sequence[bool]) -> Plan:
        """Encode a population (k, n), and the teacher after it."""
        columns, keys, passes = [], [], []
        embedding, head = levels.end_units
        for place, units in enumerate((embedding, *levels.block_units, head), start=EMBEDDING):
            is_block = 0 <= place < len(levels.block_units)
            dense = levels.dense_row(place) if len(units) else None
            rows: list[Row | None] = [_row(row, dense) for row in population[:, units].tolist()]
            rows.append(dense)
            runs = {row: _runs(levels, place, row) if is_block else 0 for row in set(rows)}
            untouched = is_block and transparent[place]
            key_of = {row: UNTOUCHED if untouched and not runs[row] else row for row in runs}
            found = sorted(set(key_of.values()), key=lambda key: (key is not None, key or ()))
            columns.append([found.index(key_of[row]) for row in rows])
            keys.append(tuple(found))
            passes.append(tuple(0 if key == UNTOUCHED else runs[key] for key in found))
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


def _runs(levels: Levels, block: int, row: Row | None) -> int:
    return 2 if row is None else levels.runs(block, row)


def _row(levels: list[int], dense: Row | None) -> Row | None:
    """The row of a place; the teacher's levels stand in for TEACHER where they are known."""
    if all(level == TEACHER for level in levels):
        return dense
    if dense is None or TEACHER not in levels:
        return tuple(levels)
    return tuple(known if level == TEACHER else level for level, known in zip(levels, dense, strict=True))


@dataclass(frozen=True, eq=False)
class Cut:
    """A piece of the work that fits the memory: so many sequences of one length, by slices of the rows.

    What runs in one call, `per_call` sequences of one state or the rest of them, depends on the length and the limits
    alone and never on how many rows there are, so that losses of a row do not depend on the other rows.
    """

    sequences: int
    per_call: int  # sequences; it divides `sequences`, unless there are no more
    slices: tuple[NDArray[np.intp], ...]  # of the plan's rows; the one with the teacher, whom all need, is first

    @classmethod
    def of(cls, plan: Plan, length: int, sequences: int, limits: Limits) -> Cut:
        """The first cut of so many sequences of so many tokens each."""
        K = len(plan.rows)
        per_call = min(sequences, limits.per_call(length))
        fitting = max(2, limits.held(length) // per_call)  # states of one call
        count = 1 if fitting >= K else -(-K // (fitting - 1))  # one is the teacher's
        slices = sorted(np.array_split(np.arange(K), count), key=lambda part: plan.teacher not in part)
        return cls(min(sequences, max(1, fitting // K) * per_call), per_call, tuple(slices))
