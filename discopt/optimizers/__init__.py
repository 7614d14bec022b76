"""Search algorithms, one file each, all with the same ask and tell."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from discopt.optimizers.additive import Additive
from discopt.optimizers.annealing import Annealing
from discopt.optimizers.base import Measurement, Optimizer, StopReason
from discopt.optimizers.evopress import EvoPress, EvoPressSettings, Stage
from discopt.optimizers.exhaustive import Exhaustive
from discopt.optimizers.genetic import Genetic
from discopt.optimizers.learning import Learning
from discopt.optimizers.learning_settings import LearningSettings
from discopt.optimizers.local import HillClimbing
from discopt.optimizers.plan import Plan
from discopt.optimizers.random import RandomSearch
from discopt.space import SearchSpace

__all__ = [
    "ALGORITHMS",
    "Additive",
    "Annealing",
    "EvoPress",
    "EvoPressSettings",
    "Exhaustive",
    "Genetic",
    "HillClimbing",
    "Learning",
    "LearningSettings",
    "Measurement",
    "Optimizer",
    "Plan",
    "RandomSearch",
    "Stage",
    "StopReason",
]

START_CANDIDATES = 16
STAGING = 8  # EvoPress's first stage keeps one in so many offspring, at a fidelity so many times lower


def _planned(search: Callable[..., Optimizer]) -> Callable[[SearchSpace, Plan, int], Optimizer]:
    return lambda space, plan, seed: search(space, plan, seed=seed)


def _evopress(space: SearchSpace, plan: Plan, seed: int, *, offspring: int | None = None) -> Optimizer:
    """The paper's search within a plan: as many generations as it pays for, all of them full ones.

    Two stages where the fidelity leaves room for a lower one. Switches within groups where no budget has to cross
    them, else exchanges.
    """
    offspring = offspring or plan.batch
    last = Stage(1, plan.fidelity)
    stages: tuple[Stage, ...] = (last,)
    if offspring > 1 and plan.fidelity > 1:
        stages = (Stage(max(1, offspring // STAGING), max(1, plan.fidelity // STAGING)), last)
    candidates = min(START_CANDIDATES, plan.evaluations)
    start = 0 if plan.start else candidates * stages[0].fidelity
    settings = EvoPressSettings(
        offspring=offspring,
        stages=stages,
        start=plan.start or "auto",
        start_candidates=candidates,
        rule="within" if space.even else "exchange",
    )
    generations = max(1, (plan.total_fidelity - start) // settings.generation_fidelity)
    return EvoPress(space, replace(settings, generations=generations), seed=seed)


ALGORITHMS: dict[str, Callable[[SearchSpace, Plan, int], Optimizer]] = {
    "learning": _planned(Learning),
    "random": _planned(RandomSearch),
    "exhaustive": _planned(Exhaustive),
    "hill-climbing": _planned(HillClimbing),
    "annealing": _planned(Annealing),
    "genetic": _planned(Genetic),
    "additive": _planned(Additive),
    "evopress": _evopress,
    "evopress-1": partial(_evopress, offspring=1),
}
"""Every algorithm by name, made from a space, a plan and a seed."""
