"""Search algorithms, one file each, all with the same ask and tell."""

from collections.abc import Callable

from discopt.optimizers.base import Measurement, Optimizer, StopReason
from discopt.optimizers.evopress import EvoPress, EvoPressSettings, Stage
from discopt.optimizers.plan import Plan
from discopt.optimizers.random import RandomSearch
from discopt.space import SearchSpace

__all__ = [
    "ALGORITHMS",
    "EvoPress",
    "EvoPressSettings",
    "Measurement",
    "Optimizer",
    "Plan",
    "RandomSearch",
    "Stage",
    "StopReason",
]


def _random(space: SearchSpace, plan: Plan, seed: int) -> Optimizer:
    return RandomSearch(space, plan, seed=seed)


ALGORITHMS: dict[str, Callable[[SearchSpace, Plan, int], Optimizer]] = {
    "random": _random,
}
"""Every algorithm by name, made from a space, a plan and a seed."""
