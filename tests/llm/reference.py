"""The plain evaluation: one whole forward per row and sequence, full logits, formulas in double precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from discopt.objective import Losses, Query
from discopt_llm.calibration import Calibration
from discopt_llm.evaluator import Levels
from discopt_llm.layers import EMBEDDING

Formula = Callable[[Tensor, Tensor, Tensor], Tensor]  # teacher (L, V), student (L, V), token ids (L,) -> (L or L-1,)


def kl(teacher: Tensor, student: Tensor, _: Tensor) -> Tensor:
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kl_top(k: int) -> Formula:
    def formula(teacher: Tensor, student: Tensor, ids: Tensor) -> Tensor:
        best = [row.argsort(descending=True)[:k] for row in teacher]
        pairs = zip(teacher, student, best, strict=True)
        return torch.cat([kl(t[tokens][None], s[tokens][None], ids) for t, s, tokens in pairs])

    return formula


def negative_log_likelihood(_: Tensor, student: Tensor, ids: Tensor) -> Tensor:
    return -student.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]


def total_variation(teacher: Tensor, student: Tensor, _: Tensor) -> Tensor:
    return (teacher.softmax(-1) - student.softmax(-1)).abs().sum(-1) / 2


def disagreement(teacher: Tensor, student: Tensor, _: Tensor) -> Tensor:
    return (teacher.argmax(-1) != student.argmax(-1)).double()


@torch.no_grad()
def plain_losses(
    model: nn.Module,
    levels: Levels,
    population: NDArray[np.integer],
    sequences: Sequence[Tensor],
    formulas: Sequence[Formula],
) -> list[NDArray[np.float64]]:
    """What `Evaluator.measure` answers, one whole forward at a time: (k, n) -> one (k, s) per formula."""

    teacher, students = logits(model, sequences), []
    for row in population:
        with ExitStack() as stack:
            embedding, head = levels.end_units
            for place, units in enumerate((embedding, *levels.block_units, head), start=EMBEDDING):
                if len(units):
                    stack.enter_context(levels.applied_(place, tuple(row[units].tolist())))
            students.append(logits(model, sequences))
    return losses_between(teacher, students, sequences, formulas)


@torch.no_grad()
def logits(model: nn.Module, sequences: Sequence[Tensor]) -> list[Tensor]:
    """A whole forward per sequence: (L, V) each."""
    return [model(input_ids=ids[None], use_cache=False).logits[0].double() for ids in sequences]


def losses_between(
    teacher: Sequence[Tensor],
    students: Sequence[Sequence[Tensor]],
    sequences: Sequence[Tensor],
    formulas: Sequence[Formula],
) -> list[NDArray[np.float64]]:
    """Losses of students by their logits (L, V) on each sequence: one (k, s) per formula."""
    answer = []
    for formula in formulas:
        values = [[formula(*pair) for pair in zip(teacher, student, sequences, strict=True)] for student in students]
        sums = np.array([[of_sequence.sum().item() for of_sequence in of_row] for of_row in values])
        answer.append(sums * len(sequences) / sum(len(of_sequence) for of_sequence in values[0]))
    return answer


@dataclass(frozen=True)
class PlainObjective:
    """KL of one candidate at a time: what `CompressionObjective` answers, without sharing anything."""

    model: nn.Module
    levels: Levels
    calibration: Calibration

    def evaluate(self, query: Query) -> Losses:
        sample = self.calibration.sample(query.fidelity, query.seed)
        (losses,) = plain_losses(self.model, self.levels, query.population, sample, [kl])
        return losses
