"""The methods that `discopt llm compare` sets side by side, each a function of one context and a seed.

Whatever a method measures before it has its profile counts as its tokens: rows measured times tokens of the sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from discopt.objective import Query, evaluate, mean_loss
from discopt.optimizers.base import Optimizer, StopReason
from discopt.optimizers.evopress import EvoPress, EvoPressSettings
from discopt.progress import ProgressBar
from discopt.progress import task as progress_task
from discopt.run import Progress, minimize
from discopt.separable import solve_separable
from discopt.space import Levels as LevelNumbers
from discopt.space import SearchSpace
from discopt_llm import baselines
from discopt_llm.bank_search import BankTask
from discopt_llm.drop import DropLevels
from discopt_llm.drop_search import DropTask
from discopt_llm.errors import ModelError
from discopt_llm.evaluator import TEACHER, Measurer
from discopt_llm.fitness import Fitness, Perplexity, fitness_by_name
from discopt_llm.greedy import greedy_descent
from discopt_llm.request import Prepared
from discopt_llm.search import optimizer_of

__all__ = ["DENSE", "METHODS", "OURS", "REFERENCES", "TASKS", "Contender", "Context", "Found", "Point"]

DROP, SPARSITY, QUANTIZATION = TASKS = ("drop", "sparsity", "quantization")
DENSE, OURS = "dense", "learning"
REFERENCES = ("uniform", "additive", "measured")  # what ours must not be worse than
OURS_SHARE = 5  # the paper's search spends so many times the tokens of ours
BATCH = 16  # profiles measured between two steps of the progress bar


@dataclass(frozen=True, eq=False)
class Point:
    """What a search had found when it had spent so many tokens."""

    tokens: int
    profile: LevelNumbers  # (n,)


@dataclass(frozen=True, eq=False)
class Found:
    """What a method found."""

    profile: LevelNumbers  # (n,)
    tokens: int = 0
    trace: tuple[Point, ...] = ()  # of searches: every new best profile on the way, the start first


@dataclass(frozen=True, eq=False)
class Context:
    """What all methods share: the model, the levels, the budget and the text.

    The request of `prepared` is that of the task, with a number of generations, no baselines, and the start "auto".
    """

    prepared: Prepared
    task: DropTask | BankTask
    evaluator: Measurer
    quiet: bool = False

    @property
    def space(self) -> SearchSpace:
        """The profiles within the budget."""
        return self.task.space

    @property
    def fitness(self) -> Fitness:
        """The loss that is searched on."""
        return fitness_by_name(self.prepared.request.fitness)

    def asked(self, seed: int, **changes: Any) -> Context:
        """The same with another seed, and other options of the request."""
        request = replace(self.prepared.request, seed=seed, **changes)
        of_task: dict[str, Any] = {"request": request}
        return replace(self, prepared=replace(self.prepared, request=request), task=replace(self.task, **of_task))

    def losses(
        self, what: str, population: LevelNumbers, fidelity: int, seed: int, fitness: Fitness | None = None
    ) -> NDArray[np.float64]:
        """Mean losses of a population (k, n) on one sample, (k,); infinite where one is not a number."""
        objective = self.prepared.objective(self.evaluator, fitness)
        parts = []
        with progress_task(what, len(population), unit="profiles", quiet=self.quiet) as progress:
            for start in range(0, len(population), BATCH):
                part = population[start : start + BATCH]
                parts.append(mean_loss(evaluate(objective, Query(part, fidelity, seed))))
                progress.advance(len(part))
        return np.concatenate(parts)

    def search(self, label: str, optimizer: Optimizer, spent: int = 0) -> Found:
        """Run an optimizer to its end; `spent` tokens went into what it begins with."""
        trace = [] if optimizer.start is None else [Point(0, optimizer.start.profile)]

        def remember(progress: Progress) -> None:
            profile = progress.best.profile
            if not trace or not np.array_equal(trace[-1].profile, profile):
                trace.append(Point(spent + progress.line["total_fidelity"], profile))

        with ProgressBar(unit="tokens", label=label, quiet=self.quiet) as bar:
            objective = self.prepared.objective(self.evaluator)
            result = minimize(objective, self.space, optimizer=optimizer, callbacks=(bar, remember))
        if result.stop is StopReason.INTERRUPTED:
            raise KeyboardInterrupt
        return Found(result.profile, spent + result.total_fidelity, tuple(trace))


Run = Callable[[Context, int], Found]


@dataclass(frozen=True)
class Contender:
    """A method as it is chosen and shown."""

    title: str
    run: Run
    tasks: tuple[str, ...] = TASKS
    seeded: bool = True  # False: neither text nor chance has a say, so that one run is all there is


def _dense(context: Context, seed: int) -> Found:
    """The teacher itself."""
    return Found(np.full(context.space.n, TEACHER, dtype=np.int16))


def _evenly(context: Context, seed: int) -> Found:
    """One level for all as far as the budget allows; where units are dropped, those lie evenly."""
    return Found(context.space.nearest_uniform())


def _baseline(name: str) -> Run:
    """A baseline that the task knows by this name."""

    def run(context: Context, seed: int) -> Found:
        asked = context.asked(seed, baselines=(name,))
        methods = asked.task.heuristics(asked.prepared, context.evaluator, quiet=context.quiet).methods
        if not methods:
            raise ModelError(f"{METHODS[name].title} gives no profile that meets this budget")
        return Found(methods[0].profile, methods[0].tokens)

    return run


def _additive_measured(context: Context, seed: int) -> Found:
    """The least sum of measured losses: of units at their uniform levels, or dropped, alone."""
    if isinstance(context.task, BankTask):
        return _baseline("measured")(context, seed)
    fidelity = _score_tokens(context)
    rows = np.concatenate([baselines.without_unit(_dropped(context)), context.space.dearest()[None]])
    losses = context.losses("units", rows, fidelity, seed)
    effect = np.stack([losses[:-1] - losses[-1], np.zeros(context.space.n)], axis=1)  # of dropping, of keeping
    return Found(solve_separable(context.space, effect), len(rows) * fidelity)


def _perplexity(context: Context, seed: int) -> Found:
    """Shortened LLaMA: drop the blocks without which the perplexity is lowest."""
    fidelity = _score_tokens(context)
    rows, row_of = np.unique(baselines.without_block(_dropped(context)), axis=0, return_inverse=True)
    losses = context.losses("blocks", rows, fidelity, seed, Perplexity())
    return Found(baselines.drop_lowest(context.space, losses[row_of.reshape(-1)]), len(rows) * fidelity)


def _norm_ratio(context: Context, seed: int) -> Found:
    """Weight subcloning: drop the blocks that add least to their input, beside their output."""
    fidelity = _score_tokens(context)
    sample = context.prepared.calibration.sample(fidelity, seed)
    with progress_task("norm ratio", len(sample), unit="sequences", quiet=context.quiet) as progress:
        ratios = baselines.norm_ratios(context.prepared.loaded, sample, _dropped(context), done=progress.advance)
    return Found(baselines.drop_lowest(context.space, ratios), fidelity)


def _dropped(context: Context) -> DropLevels:
    assert isinstance(context.task, DropTask)
    return context.task.levels


def _score_tokens(context: Context) -> int:
    """Tokens that units or blocks are scored on."""
    return min(context.prepared.request.chosen.baseline_tokens, context.prepared.calibration.tokens)


def _greedy(context: Context, seed: int) -> Found:
    """Steps down one at a time, on the sample size of a first stage, as many profiles as EvoPress has offspring.

    Where units are dropped every round measures them all; where they have many levels that is out of reach, and a
    round measures anew only the step that looks best, until one does so that is measured. A unit's next step is taken
    to lose more in proportion to its layer errors.
    """
    settings = _paper_settings(context)
    fidelity, limit = settings.stages[0].fidelity, settings.generations * settings.offspring
    objective = context.prepared.objective(context.evaluator)
    with progress_task("greedy", limit, unit="profiles", quiet=context.quiet) as progress:

        def losses(population: LevelNumbers) -> NDArray[np.float64]:
            found = mean_loss(evaluate(objective, Query(population, fidelity, seed)))
            progress.advance(len(population))
            return found

        task = context.task
        at_once, errors = (1, task.genome.errors) if isinstance(task, BankTask) else (None, None)
        profile, measured = greedy_descent(context.space, losses, limit=limit, at_once=at_once, errors=errors)
    return Found(profile, measured * fidelity)


def _paper_settings(context: Context) -> EvoPressSettings:
    """Algorithm 1 as published: from the uniform profile, else from the best of random ones, and no rivals."""
    changes = context.task.changes()
    if changes.get("rule") == "exchange" and not context.space.bundles:
        changes["rule"] = "across"
    return context.prepared.request.settings(**changes, start="auto")


def _evopress(context: Context, seed: int) -> Found:
    """The paper's search."""
    return context.search("evopress", EvoPress(context.space, _paper_settings(context), seed=seed))


def _default_search(context: Context, seed: int) -> Found:
    """What the commands run by default, on a fifth of the paper's tokens; the heuristics that it begins with count."""
    asked = context.asked(seed, start="heuristics")
    heuristics = asked.task.heuristics(asked.prepared, context.evaluator, quiet=context.quiet)
    paper = _paper_settings(context)
    left = paper.generations / OURS_SHARE - heuristics.tokens / paper.generation_fidelity
    asked = asked.asked(seed, generations=max(1, round(left)))
    return asked.search(OURS, optimizer_of(asked.prepared, asked.task, heuristics), heuristics.tokens)


_BANKS = (SPARSITY, QUANTIZATION)

METHODS: dict[str, Contender] = {
    DENSE: Contender("dense", _dense, seeded=False),
    "uniform": Contender("uniform (evenly spread)", _evenly, seeded=False),
    "random": Contender("random (best of the start candidates)", _baseline("random")),
    "additive": Contender("additive (layer errors)", _baseline("additive"), _BANKS, seeded=False),
    "measured": Contender("additive (measured losses)", _additive_measured),
    "owl": Contender("OWL (best of its grid)", _baseline("owl"), (SPARSITY,)),
    "shortgpt": Contender("ShortGPT block influence", _baseline("shortgpt"), (DROP,)),
    "window": Contender("window cosine", _baseline("window"), (DROP,)),
    "perplexity": Contender("Shortened LLaMA perplexity", _perplexity, (DROP,)),
    "norm-ratio": Contender("norm ratio", _norm_ratio, (DROP,)),
    "influence": Contender("unit influence", _baseline("influence"), (DROP,)),
    "greedy": Contender("greedy, one by one", _greedy),
    "evopress": Contender("EvoPress (paper)", _evopress),
    OURS: Contender("ours", _default_search),
}
"""Every method by its name, in the order of the table."""
