"""A population measured by several processes: each takes some of the sequences, or of the students as well.

Sequences share nothing, so that they are what is cut first, between what runs in one call. Where there are fewer calls
than workers, students are cut too, into contiguous slices in the model's order: those that were decided alike up to a
block share all work up to there, and are neighbours in it, so that little of that is computed twice. A student's loss
does not depend on who is measured with it, nor on what else it is measured on, so that neither the number of workers
nor the loss of one changes a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from discopt.errors import WorkersError
from discopt.workers import slices
from discopt_llm.evaluator import Measurer
from discopt_llm.evaluator_plan import Counts, Plan
from discopt_llm.fitness import Fitness, fitness_by_name
from discopt_llm.heldout import MEASURES, StudentLevels

if TYPE_CHECKING:
    from discopt_llm.models import LoadedModel

__all__ = ["Answer", "Pool", "SpreadEvaluator", "measured"]

_HELDOUT = {fitness.name: fitness for fitness in MEASURES}


class Pool(Protocol):
    """Objects in other processes, as `discopt.workers.Workers` has them."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def call(
        self, method: str, arguments: Sequence[tuple[Any, ...]], *, valid: Callable[[Any], bool] = ...
    ) -> list[Any]:
        """See `Workers.call`."""
        ...


class Answer(NamedTuple):
    """What a worker says of a slice."""

    losses: list[NDArray[np.float64]]  # (k, s) for each fitness
    passes: int  # see `Counts`
    projected: int

    @property
    def finite(self) -> bool:
        """Whether all losses are; if not, another worker is asked as well."""
        return all(bool(np.isfinite(losses).all()) for losses in self.losses)


class SpreadEvaluator:
    """Measures populations of students as `Evaluator` does, by workers that answer `measure` with `measured`.

    They answer `per_call` with how many sequences of a length run in one call of a block.

    alone: makes an evaluator of this process, for when no worker is left.
    say: hears that.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        levels: StudentLevels,
        workers: Pool,
        *,
        alone: Callable[[], Measurer],
        say: Callable[[str], None],
    ) -> None:
        self.model, self.anatomy, self.levels = loaded.model, loaded.anatomy, levels
        self.counts = Counts()  # of all measurements so far
        self._workers, self._alone, self._say = workers, alone, say
        self._itself: Measurer | None = None
        self._per_call: dict[int, int] = {}  # sequences, by their length

    def measure(
        self, population: NDArray[np.integer], sequences: Sequence[Tensor], fitnesses: Sequence[Fitness]
    ) -> list[NDArray[np.float64]]:
        """See `Evaluator.measure`. Raises ValueError for a fitness that has no name here or in `fitness_by_name`."""
        rows = np.asarray(population)
        if rows.ndim != 2 or rows.shape[1] != len(self.levels.names):
            raise ValueError(f"population must have shape (k, {len(self.levels.names)}), got {rows.shape}")
        names = [_known(fitness).name for fitness in fitnesses]
        plan = Plan.of(rows, self.levels, [block.transparent for block in self.anatomy.blocks])
        # One row of each kind, in the order in which the evaluator walks them.
        _, first, inverse = np.unique(plan.row_of, return_index=True, return_inverse=True)
        place = inverse.reshape(-1)
        texts = [ids.cpu().numpy() for ids in sequences]
        answers, across = self._answers(rows[first], texts, names)
        for answer in answers:
            self.counts += Counts(passes=answer.passes, projected=answer.projected)
        self.counts += plan.plain_counts(sum(map(len, texts)), heads=bool(fitnesses))
        found = zip(*(answer.losses for answer in answers), strict=True)  # by fitness
        return [np.block([list(parts[i : i + across]) for i in range(0, len(parts), across)])[place] for parts in found]

    def _answers(
        self, rows: NDArray[np.integer], texts: Sequence[NDArray[np.int64]], names: Sequence[str]
    ) -> tuple[list[Answer], int]:
        """What is said of different rows, slice by slice, of each by slices of the texts; and how many of those."""
        if self._itself is None:
            try:
                of_texts = self._text_slices(texts)
                of_rows = slices(len(rows), max(1, len(self._workers) // len(of_texts))) or [slice(0)]
                calls = [(rows[part], texts[some], names) for part in of_rows for some in of_texts]
                return self._workers.call("measure", calls, valid=lambda answer: answer.finite), len(of_texts)
            except WorkersError as error:
                self._say(f"{error}; this process measures by itself")
                self._itself = self._alone()
        return [measured(self._itself, rows, texts, names)], 1

    def _text_slices(self, texts: Sequence[NDArray[np.int64]]) -> list[slice]:
        """Texts by what runs in one call, a part for each worker while there are calls; all, if their lengths differ.

        A column's scale is that of all the texts, which is each one's own only where they are equally long.
        """
        length = len(texts[0]) if texts else 0
        if any(len(ids) != length for ids in texts) or not length:
            return [slice(None)]
        if length not in self._per_call:
            (self._per_call[length],) = self._workers.call("per_call", [(length,)])
        step = self._per_call[length]
        parts = slices(-(-len(texts) // step), max(1, len(self._workers)))
        return [slice(part.start * step, part.stop * step) for part in parts]


def measured(
    evaluator: Measurer, rows: NDArray[np.integer], texts: Sequence[NDArray[np.int64]], names: Sequence[str]
) -> Answer:
    """What a worker answers: losses of rows (k, n) on token ids (L_i,), for fitnesses by their names."""
    before = evaluator.counts
    sequences = [torch.tensor(ids) for ids in texts]  # a copy: Ray's own memory cannot be written
    losses = evaluator.measure(rows, sequences, [_by_name(name) for name in names])
    after = evaluator.counts
    return Answer(losses, after.passes - before.passes, after.projected - before.projected)


def _by_name(name: str) -> Fitness:
    return _HELDOUT.get(name) or fitness_by_name(name)


def _known(fitness: Fitness) -> Fitness:
    if _by_name(fitness.name) != fitness:
        raise ValueError(f"workers know {fitness.name} as another fitness, got {fitness!r}")
    return fitness
