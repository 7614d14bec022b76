"""The user's file in the tests of `discopt compare`: small problems, and algorithms that behave and misbehave."""

OWN = '''
import os, time
import numpy as np
from discopt import EvoPress, EvoPressSettings, RandomSearch, SearchSpace, Stage
from discopt.problems import Problem

SPACE = SearchSpace.cardinality(12, 4)
WEIGHT = np.arange(12) / 8  # best: the last four

def total(population):
    return -(population * WEIGHT).sum(axis=1)

def sampled(population, fidelity, seed):
    return total(population) + np.random.default_rng(seed).normal(size=len(population)) / fidelity

linear = Problem("linear", SPACE, total, optimum=-4.75, note="The last four are best.")
unknown = Problem("unknown", SPACE, total)
noisy = Problem("noisy", SPACE, sampled, optimum=-4.75, truth=total, fidelity=8)

def slow():
    def loss(population):
        time.sleep(float(os.environ.get("PAUSE", "0.0")))
        return total(population)
    return Problem("slow", SPACE, loss, optimum=-4.75)

def wrong():
    return Problem("wrong", SPACE, lambda population: 1 / 0)

def evolve(space, plan, seed):
    settings = EvoPressSettings(generations=plan.evaluations, offspring=4, stages=(Stage(1, plan.fidelity),))
    return EvoPress(space, settings, seed=seed)

def draw(space, plan, seed):
    return RandomSearch(space, plan, seed=seed)

class Infeasible(RandomSearch):
    """All ones, which is far above the budget."""
    def _propose(self):
        return np.ones((4, 12), dtype=np.int16)
    @property
    def best(self):
        from discopt import Measurement
        return Measurement.unmeasured(np.ones(12, dtype=np.int16))

def infeasible(space, plan, seed):
    return Infeasible(space, plan, seed=seed)

def refuses(space, plan, seed):
    raise ValueError(f"expected a smaller space, got {space.n} units")

def absent(space, plan, seed):
    import a_package_that_is_not_there

class Breaks(RandomSearch):
    def _learn(self, population, losses):
        raise TypeError("a bug\\nof two lines")

def breaks(space, plan, seed):
    return Breaks(space, plan, seed=seed)

def dies(space, plan, seed):
    os._exit(3)

GOOD = {"draw": draw, "evopress": evolve}
BAD = {"infeasible": infeasible, "refuses": refuses, "absent": absent, "breaks": breaks}
DEADLY = {"dies": dies}
NOT = [draw]
'''
