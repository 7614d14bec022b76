"""discopt: minimise a noisy, expensive loss over discrete profiles under linear budgets.

result = discopt.minimize(loss, discopt.SearchSpace.cardinality(n=60, ones=12), seed=0)
"""

from discopt.errors import BudgetError, DiscoptError, ObjectiveError, RunFolderError
from discopt.folder import RunFolder
from discopt.objective import Objective, Query, as_objective
from discopt.optimizers import EvoPress, EvoPressSettings, Measurement, Optimizer, RandomSearch, Stage, StopReason
from discopt.run import Limits, Progress, Result, minimize
from discopt.space import SearchSpace

__all__ = [
    "BudgetError",
    "DiscoptError",
    "EvoPress",
    "EvoPressSettings",
    "Limits",
    "Measurement",
    "Objective",
    "ObjectiveError",
    "Optimizer",
    "Progress",
    "Query",
    "RandomSearch",
    "Result",
    "RunFolder",
    "RunFolderError",
    "SearchSpace",
    "Stage",
    "StopReason",
    "as_objective",
    "minimize",
]
