"""discopt: minimise a noisy, expensive loss over discrete profiles under linear budgets.

    result = discopt.minimize(loss, discopt.SearchSpace.cardinality(n=60, ones=12), seed=0)

Names are imported when they are first used, so that the command line answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from discopt.errors import BudgetError, DiscoptError, ObjectiveError, RunFolderError, WorkersError
    from discopt.executors import SpreadObjective, WorkersObjective
    from discopt.folder import RunFolder
    from discopt.objective import Objective, Query, as_objective
    from discopt.optimizers import (
        Additive,
        Annealing,
        EvoPress,
        EvoPressSettings,
        Exhaustive,
        Genetic,
        HillClimbing,
        Learning,
        LearningSettings,
        Measurement,
        Optimizer,
        Plan,
        RandomSearch,
        Stage,
        StopReason,
    )
    from discopt.problem import Problem
    from discopt.run import Limits, Progress, Result, minimize
    from discopt.separable import solve_separable
    from discopt.space import SearchSpace
    from discopt.workers import Workers, WorkersAt

__all__ = [
    "Additive",
    "Annealing",
    "BudgetError",
    "DiscoptError",
    "EvoPress",
    "EvoPressSettings",
    "Exhaustive",
    "Genetic",
    "HillClimbing",
    "Learning",
    "LearningSettings",
    "Limits",
    "Measurement",
    "Objective",
    "ObjectiveError",
    "Optimizer",
    "Plan",
    "Problem",
    "Progress",
    "Query",
    "RandomSearch",
    "Result",
    "RunFolder",
    "RunFolderError",
    "SearchSpace",
    "SpreadObjective",
    "Stage",
    "StopReason",
    "Workers",
    "WorkersAt",
    "WorkersError",
    "WorkersObjective",
    "as_objective",
    "minimize",
    "solve_separable",
]

_HOMES = {
    "errors": "BudgetError DiscoptError ObjectiveError RunFolderError WorkersError",
    "executors": "SpreadObjective WorkersObjective",
    "folder": "RunFolder",
    "objective": "Objective Query as_objective",
    "optimizers": "Additive Annealing EvoPress EvoPressSettings Exhaustive Genetic HillClimbing Learning "
    "LearningSettings Measurement Optimizer Plan RandomSearch Stage StopReason",
    "problem": "Problem",
    "run": "Limits Progress Result minimize",
    "separable": "solve_separable",
    "space": "SearchSpace",
    "workers": "Workers WorkersAt",
}


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names.split():
            value = getattr(import_module(f"discopt.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'discopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
