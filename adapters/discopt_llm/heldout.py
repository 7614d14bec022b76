"""Profiles side by side on text that no search has seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from discopt.progress import task
from discopt.space import Levels as LevelNumbers
from discopt_llm.calibration import Calibration
from discopt_llm.evaluator import Levels, Measurer
from discopt_llm.fitness import KL, Disagreement, Fitness, Perplexity

BATCH = 2  # sequences measured between two steps of the progress bar
MOST_NLL = 700.0  # nats; beyond it perplexity leaves the range of float64
MEASURES: tuple[Fitness, ...] = (KL(), Perplexity(), Disagreement())
Measure = Callable[[Sequence[Tensor]], list[NDArray[np.float64]]]  # sequences (L,) -> (k, s) of each of MEASURES


class StudentLevels(Levels, Protocol):
    """Levels whose students can be named, weighed and written."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the units, (n,)."""
        ...

    def bytes_of(self, model: nn.Module, profile: NDArray[np.integer]) -> int:
        """What the student of a profile (n,), or of one of TEACHER throughout, takes."""
        ...

    def dropped(self, profile: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Which sub-blocks a profile (n,) drops: (blocks, 2), attention then MLP."""
        ...


@dataclass(frozen=True, eq=False)
class Method:
    """A profile to compare, and what it took to find it."""

    name: str
    profile: LevelNumbers  # (n,); TEACHER throughout is the teacher itself
    tokens: int  # spent searching


@dataclass(frozen=True, eq=False)
class HeldoutScores:
    """What profiles lose on each sequence of held-out text, (k, s): means over the positions of a sequence."""

    kl: NDArray[np.float64]  # to the teacher, nats per token
    nll: NDArray[np.float64]  # nats per token
    disagreement: NDArray[np.float64]  # share of positions

    @property
    def kl_error(self) -> NDArray[np.float64]:
        """Standard error of the mean KL over sequences, (k,); NaN for a single one."""
        return standard_error(self.kl)

    def row(self, i: int) -> HeldoutScores:
        """Those of one profile, (1, s)."""
        return HeldoutScores(self.kl[[i]], self.nll[[i]], self.disagreement[[i]])


def standard_error(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of means over the last axis: (..., s) -> (...); NaN for a single value."""
    count = values.shape[-1]
    return values.std(axis=-1, ddof=1) / math.sqrt(count) if count > 1 else np.full(values.shape[:-1], np.nan)


def heldout_scores(
    evaluator: Measurer, population: LevelNumbers, heldout: Calibration, *, quiet: bool = False
) -> HeldoutScores:
    """Measure profiles (k, n) on all of the held-out text."""
    with task("held-out text", len(heldout.sequences), unit="sequences", quiet=quiet) as progress:
        return gather_scores(
            lambda batch: evaluator.measure(population, batch, MEASURES), heldout, advance=progress.advance
        )


def gather_scores(measure: Measure, heldout: Calibration, *, advance: Callable[[int], None]) -> HeldoutScores:
    """Measure all of a text, a few sequences at a time; `advance` hears of each few."""
    sequences = list(heldout.sequences)
    parts = []
    for first in range(0, len(sequences), BATCH):
        batch = sequences[first : first + BATCH]
        parts.append(measure(batch))
        advance(len(batch))
    # Sequences are equally long, so each column is its sequence's mean.
    return HeldoutScores(*(np.concatenate(columns, axis=1) for columns in zip(*parts, strict=True)))


def heldout_rows(
    evaluator: Measurer, levels: StudentLevels, methods: Sequence[Method], heldout: Calibration, *, quiet: bool = False
) -> list[dict[str, Any]]:
    """A table row for every method, measured on held-out text; see `score_rows`."""
    population = np.stack([method.profile for method in methods])
    return score_rows(heldout_scores(evaluator, population, heldout, quiet=quiet), evaluator.model, levels, methods)


def score_rows(
    scores: HeldoutScores, model: nn.Module, levels: StudentLevels, methods: Sequence[Method]
) -> list[dict[str, Any]]:
    """A table row for every method: `method`, `kl`, `kl_error`, `perplexity`, `agreement`, `tokens`, `bytes`.

    KL to the teacher is in nats per token, `kl_error` its standard error over sequences, `agreement` the share of
    positions where teacher and student find the same token likeliest, `tokens` what the search for the profile
    spent, and `bytes` what the student takes.
    """
    kl, nll, disagreement = scores.kl, scores.nll, scores.disagreement
    error = scores.kl_error
    return [
        {
            "method": method.name,
            "kl": _number(kl[i].mean()),
            "kl_error": _number(error[i]),
            "perplexity": _number(np.exp(min(nll[i].mean(), MOST_NLL))),
            "agreement": _number(1 - disagreement[i].mean()),
            "tokens": method.tokens,
            "bytes": levels.bytes_of(model, method.profile),
        }
        for i, method in enumerate(methods)
    ]


def _number(value: float) -> float | None:
    """None for a student that answers nothing finite."""
    return float(value) if math.isfinite(value) else None
