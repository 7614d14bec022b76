"""What a comparison found: from the lines of its runs to the numbers of its report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from discopt.compare_runs import DONE, FAILED, ProblemFacts, checkpoints
from discopt.compare_statistics import (
    ALPHA,
    Gaps,
    expected_running_time,
    holm,
    normalised,
    quartiles,
    rank,
    signed_rank,
    success_rate,
)

Line = Mapping[str, Any]  # of runs.jsonl


@dataclass(frozen=True)
class Reference:
    """The loss with gap 0: the problem's, unless a run beat it or there is none."""

    loss: float
    known: float | None  # before the comparison
    source: str
    beaten_by: str | None = None  # the algorithm whose run is better than `known`
    random: float = 1.0  # the loss with gap 1


@dataclass(frozen=True, eq=False)
class Comparison:
    """All runs of p problems, a algorithms and s seeds, with their gaps at t points."""

    problems: tuple[ProblemFacts, ...]
    algorithms: tuple[str, ...]
    budgets: tuple[int, ...]  # full measurements
    default: str | None
    tolerance: float
    lines: tuple[tuple[tuple[Line, ...], ...], ...]  # p x a x s
    references: tuple[Reference, ...]  # p
    gaps: Gaps  # (p, a, s, t)

    @classmethod
    def of_runs(
        cls,
        problems: Sequence[ProblemFacts],
        algorithms: tuple[str, ...],
        lines: Sequence[Line],
        budgets: tuple[int, ...],
        default: str | None,
        tolerance: float,
    ) -> Comparison:
        """From the lines of runs.jsonl, one for every problem, algorithm and seed."""
        by_key = {(line["problem"], line["algorithm"], line["seed"]): line for line in lines}
        seeds = sorted({line["seed"] for line in lines})
        table = tuple(
            tuple(tuple(by_key[facts.name, name, seed] for seed in seeds) for name in algorithms) for facts in problems
        )
        references = tuple(_reference(facts, rows) for facts, rows in zip(problems, table, strict=True))
        count = len(checkpoints(budgets))
        gaps = np.array(
            [
                [[_gaps(line, reference, count) for line in cell] for cell in rows]
                for rows, reference in zip(table, references, strict=True)
            ]
        )
        return cls(tuple(problems), algorithms, budgets, default, tolerance, table, references, gaps)

    @property
    def points(self) -> tuple[int, ...]:
        return checkpoints(self.budgets)

    @cached_property
    def at_budgets(self) -> Gaps:
        """Gaps at the budgets, (p, a, s, b)."""
        return self.gaps[..., np.isin(self.points, self.budgets)]

    @cached_property
    def quartiles(self) -> Gaps:
        """Lower quartile, median and upper quartile over the seeds at the budgets, (3, p, a, b)."""
        return np.stack(quartiles(np.moveaxis(self.at_budgets, 2, 0)))

    @property
    def medians(self) -> Gaps:
        """(p, a, b)."""
        return self.quartiles[1]

    @cached_property
    def best(self) -> NDArray[np.bool_]:
        """Which medians are the lowest for their problem and budget, ties too, (p, a, b)."""
        lowest = np.where(np.isnan(self.medians), np.inf, self.medians).min(axis=1, keepdims=True)
        return (self.medians == lowest) & np.isfinite(lowest)

    @cached_property
    def p_values(self) -> Gaps:
        """Of the pairs of runs of the default and of each other algorithm, Holm-corrected, (p, a, b); NaN: no test."""
        p = np.full(self.medians.shape, np.nan)
        if self.default is None:
            return p
        default = self.algorithms.index(self.default)
        for i, b in np.ndindex(len(self.problems), len(self.budgets)):
            if np.isnan(self.medians[i, default, b]):
                continue
            tested = [a for a in np.flatnonzero(~np.isnan(self.medians[i, :, b])) if a != default]
            runs = self.at_budgets[i, :, :, b]
            p[i, tested, b] = holm([signed_rank(runs[default], runs[a]) for a in tested])
        return p

    @cached_property
    def running_times(self) -> Gaps:
        """Expected running time to the tolerance, in full measurements, (p, a); inf: never reached."""
        shape = self.gaps.shape[:2]
        times = [expected_running_time(self.gaps[i], self.points, self.tolerance) for i in np.ndindex(shape)]
        return np.where(np.isnan(self.medians[..., -1]), np.nan, np.reshape(times, shape))

    @property
    def everywhere(self) -> NDArray[np.bool_]:
        """Which algorithms apply to every problem, (a,)."""
        return np.logical_and.reduce(~np.isnan(self.medians), axis=(0, 2))

    @property
    def subsets(self) -> dict[str, NDArray[np.intp]]:
        """The problems that are looked at together, by name; (p',) each."""
        multimodal = np.array([facts.multimodal for facts in self.problems])
        subsets = {"all": np.arange(len(self.problems))}
        if 0 < multimodal.sum() < len(multimodal):
            subsets["multimodal"] = np.flatnonzero(multimodal)
        return subsets


def summarise(comparison: Comparison) -> dict[str, Any]:
    """The numbers of the report, as JSON values but for numbers that are not finite."""
    c = comparison
    return {
        "algorithms": list(c.algorithms),
        "budgets": list(c.budgets),
        "default": c.default,
        "tolerance": c.tolerance,
        "alpha": ALPHA,
        "problems": [
            {**asdict(facts), "reference": asdict(reference)}
            for facts, reference in zip(c.problems, c.references, strict=True)
        ],
        "rows": [row for budget in range(len(c.budgets)) for row in _overall(c, budget)],
        "cells": [_cell(c, p, a, b) for p, a, b in np.ndindex(c.medians.shape)],
        "runs": [_runs(c, p, a) for p, a in np.ndindex(c.medians.shape[:2])],
        "ranks": [_ranks(c, subset, b) for subset in c.subsets for b in range(len(c.budgets))],
        "tests": [row for subset in c.subsets for b in range(len(c.budgets)) for row in _tests(c, subset, b)],
        "exceptions": [row for p, b in np.ndindex(len(c.problems), len(c.budgets)) for row in _exceptions(c, p, b)],
    }


def numbers(comparison: Comparison) -> dict[str, Any]:
    """All gaps, and those behind the curves, by problem and algorithm, as JSON values but for numbers not finite."""
    c = comparison
    low, median, high = quartiles(np.moveaxis(c.gaps, 2, 0))

    def by_name(values: Gaps) -> dict[str, dict[str, Any]]:
        return {
            facts.name: dict(zip(c.algorithms, rows, strict=True))
            for facts, rows in zip(c.problems, values, strict=True)
        }

    return {
        "format": "discopt-comparison-numbers",
        "version": 1,
        "points": list(c.points),
        "budgets": list(c.budgets),
        "gaps": by_name(c.at_budgets),  # one row per seed, one column per budget
        "median": by_name(median),
        "lower_quartile": by_name(low),
        "upper_quartile": by_name(high),
        "expected_running_time": by_name(c.running_times),
    }


def _reference(facts: ProblemFacts, rows: Sequence[Sequence[Line]]) -> Reference:
    """The better one of what was known and the best that any run found."""
    found = [(line["best"], line["algorithm"]) for cell in rows for line in cell if line.get("best") is not None]
    best, algorithm = min(found, default=(math.inf, ""))
    known = facts.reference
    if known is None:
        loss = best if found else facts.random
        return Reference(loss, None, f"best of this comparison, by {algorithm}", random=facts.random)
    rounding = 1e-9 * max(1.0, abs(known))
    if best < known - rounding:
        return Reference(best, known, facts.source, beaten_by=algorithm, random=facts.random)
    return Reference(known, known, facts.source, random=facts.random)


def _gaps(line: Line, reference: Reference, points: int) -> Gaps:
    """(t,)"""
    if line["status"] != DONE:
        return np.full(points, np.inf if line["status"] == FAILED else np.nan)
    losses = [math.inf if loss is None else loss for loss in line["losses"]]
    return normalised(losses, reference.loss, reference.random)


def _overall(c: Comparison, b: int) -> list[dict[str, Any]]:
    """How each algorithm did over all problems with this budget; the ranks are of those that apply to all."""
    ranks = np.full(len(c.algorithms), np.nan)
    if c.everywhere.any():
        ranks[c.everywhere] = rank(c.medians[:, c.everywhere, b]).ranks
    rows = []
    for a, name in enumerate(c.algorithms):
        applies = ~np.isnan(c.medians[:, a, b])
        success = success_rate(np.moveaxis(c.at_budgets[applies, a, :, b], 1, 0), c.tolerance)
        rows.append(
            {
                "budget": c.budgets[b],
                "algorithm": name,
                "problems": int(applies.sum()),
                "mean_rank": float(ranks[a]),
                "median_gap": float(np.median(c.medians[applies, a, b])) if applies.any() else math.nan,
                "best_on": int(c.best[:, a, b].sum()),
                "success": float(success.mean()) if applies.any() else math.nan,
            }
        )
    return rows


def _cell(c: Comparison, p: int, a: int, b: int) -> dict[str, Any]:
    low, median, high = c.quartiles[:, p, a, b].tolist()
    spend = c.budgets[b] * c.problems[p].fidelity
    return {
        "problem": c.problems[p].name,
        "algorithm": c.algorithms[a],
        "budget": c.budgets[b],
        "median": median,
        "lower_quartile": low,
        "upper_quartile": high,
        "best": bool(c.best[p, a, b]),
        "tied": bool(c.best[p, a, b] and c.best[p, :, b].sum() > 1),
        "success": float(success_rate(c.at_budgets[p, a, :, b], c.tolerance)),
        "p_holm": float(c.p_values[p, a, b]),
        "against_default": _verdict(c, p, a, b),
        "out_of_time": sum(bool(line.get("out_of_time")) and line["total_fidelity"] < spend for line in c.lines[p][a]),
    }


def _verdict(c: Comparison, p: int, a: int, b: int) -> str | None:
    """How the algorithm compares with the default: better, worse, or neither where chance would do."""
    if np.isnan(c.p_values[p, a, b]) or c.default is None:
        return None
    mine, default = c.medians[p, a, b], c.medians[p, c.algorithms.index(c.default), b]
    if c.p_values[p, a, b] > ALPHA or mine == default:
        return "neither"
    return "better" if mine < default else "worse"


def _runs(c: Comparison, p: int, a: int) -> dict[str, Any]:
    """What does not depend on the budget."""
    lines = c.lines[p][a]
    done = [line for line in lines if line["status"] == DONE]

    def over_runs(key: str, statistic: Callable[[list[float]], Any]) -> float:
        values = [line[key] for line in done if line[key] is not None]
        return float(statistic(values)) if values else math.nan

    return {
        "problem": c.problems[p].name,
        "algorithm": c.algorithms[a],
        "status": dict(Counter(line["status"] for line in lines)),
        "reason": next((line["reason"] for line in lines if line["status"] != DONE), None),
        "overhead_seconds": over_runs("overhead", np.median),
        "seconds": over_runs("seconds", np.median),
        "evaluations": over_runs("evaluations", np.median),
        "spent": over_runs("total_fidelity", np.median) / c.problems[p].fidelity,
        "feasible": over_runs("feasible", np.mean),
        "feasible_rows": over_runs("feasible_rows", np.mean),
        "expected_running_time": float(c.running_times[p, a]),
        "out_of_time": sum(line["out_of_time"] for line in done),
    }


def _ranks(c: Comparison, subset: str, b: int) -> dict[str, Any]:
    problems = c.subsets[subset]
    names = [name for name, applies in zip(c.algorithms, c.everywhere, strict=True) if applies]
    found = rank(c.medians[problems][:, c.everywhere, b]) if names else None
    return {
        "problems": subset,
        "count": len(problems),
        "budget": c.budgets[b],
        "ranks": dict(zip(names, found.ranks.tolist(), strict=True)) if found else {},
        "friedman": found.statistic if found else math.nan,
        "p": found.p if found else math.nan,
        "critical_difference": found.critical_difference if found else math.nan,
    }


def _tests(c: Comparison, subset: str, b: int) -> list[dict[str, Any]]:
    """The default against each other algorithm: signed-rank tests over the problems' median gaps."""
    if c.default is None:
        return []
    medians = c.medians[c.subsets[subset], :, b]
    default = medians[:, c.algorithms.index(c.default)]
    pairs = {
        name: ~np.isnan(medians[:, a]) & ~np.isnan(default)
        for a, name in enumerate(c.algorithms)
        if name != c.default and not np.isnan(medians[:, a] + default).all()
    }
    other = {name: medians[both, c.algorithms.index(name)] for name, both in pairs.items()}
    mine = {name: default[both] for name, both in pairs.items()}
    p = [signed_rank(mine[name], other[name]) for name in pairs]
    return [
        {
            "problems": subset,
            "budget": c.budgets[b],
            "algorithm": name,
            "default_better": int((mine[name] < other[name]).sum()),
            "ties": int((mine[name] == other[name]).sum()),
            "default_worse": int((mine[name] > other[name]).sum()),
            "p": p[i],
            "p_holm": corrected,
        }
        for i, (name, corrected) in enumerate(zip(pairs, holm(p), strict=True))
    ]


def _exceptions(c: Comparison, p: int, b: int) -> list[dict[str, Any]]:
    """The algorithms whose median gap is lower than the default's, best first."""
    if c.default is None:
        return []
    default = c.medians[p, c.algorithms.index(c.default), b]
    better = [a for a in np.argsort(c.medians[p, :, b]) if c.medians[p, a, b] < default]
    return [
        {
            "problem": c.problems[p].name,
            "budget": c.budgets[b],
            "default_median": float(default),
            "algorithm": c.algorithms[a],
            "median": float(c.medians[p, a, b]),
            "p_holm": float(c.p_values[p, a, b]),
            "significant": _verdict(c, p, a, b) == "better",
        }
        for a in better
    ]
