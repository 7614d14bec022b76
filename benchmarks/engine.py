"""What a candidate costs without its measurement, in ours and other libraries: `python benchmarks/engine.py`.

All minimise a loss that is 0 everywhere, over n units of five levels, in generations of lambda candidates. Ours keep
the budget, drop duplicates and write a trace, as `minimize` runs them; the others search without a budget, by their
own loops where they have one. The time is the processor's, of many generations less that of two. "evopress, moves"
has an objective that reads moves, "evopress, rows" one that has the rows built. "list code" is the plainest code for
level switches on lists: copy the parent, switch, look it up among the others. A size is left out (null) for a library
that would take more than LIMIT seconds for it by its time at the size before.

Needs `pip install 'discopt-search[peers]'`.
"""

from __future__ import annotations

import argparse
import logging
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import record

from discopt import EvoPressSettings, Query, SearchSpace, Stage, minimize
from discopt.folder import distribution_version

UNITS = (32, 224, 2_000, 20_000)
OFFSPRING = (16, 128)
LEVELS = 5
SECONDS = 0.5  # of generations that are timed, about
GENERATIONS = 2_000  # timed at most
REPEATS = 5
LIMIT = 30.0
PACKAGES = ("deap", "nevergrad", "numpy", "optuna", "pygad", "pymoo", "scipy")

Run = Callable[[int, int, int, int], Any]  # n, lambda, generations, seed


class OnMoves:
    def evaluate(self, query: Query) -> np.ndarray:
        return np.zeros(len(query))


class OnRows:
    def evaluate(self, query: Query) -> np.ndarray:
        return np.zeros(len(query.population))


def evopress(objective: OnMoves | OnRows) -> Run:
    def run(n: int, count: int, generations: int, seed: int) -> None:
        space = SearchSpace.build(np.tile(np.arange(LEVELS), (n, 1)), 2 * n)
        settings = EvoPressSettings(generations, count, stages=(Stage(1, 1),), start="uniform")
        minimize(objective, space, settings, seed=seed)

    return run


def list_code(n: int, count: int, generations: int, seed: int) -> None:
    rng = random.Random(seed)
    parent = [2] * n
    for _ in range(generations):
        children: list[list[int]] = []
        while len(children) < count:
            child = list(parent)
            for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
                lowered, raised = rng.randrange(n), rng.randrange(n)
                while child[lowered] == 0:
                    lowered = rng.randrange(n)
                while child[raised] == LEVELS - 1 or raised == lowered:
                    raised = rng.randrange(n)
                child[lowered] -= 1
                child[raised] += 1
            if child != parent and child not in children:
                children.append(child)
        losses = [0.0 for _ in children]
        parent = children[min(range(count), key=losses.__getitem__)]


def differential_evolution(n: int, count: int, generations: int, seed: int) -> None:
    from scipy.optimize import differential_evolution as minimise

    start = np.random.default_rng(seed).integers(LEVELS, size=(count, n)).astype(float)
    bounds, whole = [(0, LEVELS - 1)] * n, np.ones(n, dtype=bool)
    never = {"tol": 0, "atol": -1}  # that a spread of 0 ends it
    minimise(lambda x: 0.0, bounds, maxiter=generations, init=start, integrality=whole, polish=False, rng=seed, **never)


def pygad(n: int, count: int, generations: int, seed: int) -> None:
    from pygad import GA

    GA(
        num_generations=generations,
        num_parents_mating=count // 2,
        fitness_func=lambda ga, solution, index: 0.0,
        sol_per_pop=count,
        num_genes=n,
        gene_type=int,
        gene_space=list(range(LEVELS)),
        crossover_type="uniform",
        mutation_num_genes=2,
        random_seed=seed,
        suppress_warnings=True,
        logger=logging.getLogger("silent"),
    ).run()


def pymoo(n: int, count: int, generations: int, seed: int) -> None:
    from pymoo.algorithms.soo.nonconvex.ga import GA
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.ux import UniformCrossover
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling
    from pymoo.optimize import minimize as minimise

    class Flat(Problem):
        def _evaluate(self, x: np.ndarray, out: dict[str, Any], *_: Any, **__: Any) -> None:
            out["F"] = np.zeros((len(x), 1))

    algorithm = GA(
        pop_size=count,
        sampling=IntegerRandomSampling(),
        crossover=UniformCrossover(),
        mutation=PM(vtype=float, repair=RoundingRepair()),
        eliminate_duplicates=True,
    )
    minimise(Flat(n_var=n, n_obj=1, xl=0, xu=LEVELS - 1, vtype=int), algorithm, ("n_gen", generations), seed=seed)


def nevergrad(n: int, count: int, generations: int, seed: int) -> None:
    import nevergrad as ng

    units = ng.p.Array(init=np.full(n, 2.0), lower=0, upper=LEVELS - 1).set_integer_casting()
    units.random_state.seed(seed)
    optimizer = ng.optimizers.DiscreteOnePlusOne(units, budget=count * generations)
    for _ in range(count * generations):
        optimizer.tell(optimizer.ask(), 0.0)


def optuna(n: int, count: int, generations: int, seed: int) -> None:
    import optuna as library

    library.logging.set_verbosity(library.logging.ERROR)
    study = library.create_study(sampler=library.samplers.TPESampler(seed=seed))
    ranges = {f"x{i}": library.distributions.IntDistribution(0, LEVELS - 1) for i in range(n)}
    for _ in range(count * generations):
        study.tell(study.ask(ranges), 0.0)


def deap(n: int, count: int, generations: int, seed: int) -> None:
    from deap import algorithms, base, tools

    class Fitness(base.Fitness):
        weights = (-1.0,)

    class Individual(list[int]):
        def __init__(self, genes: list[int]) -> None:
            super().__init__(genes)
            self.fitness = Fitness()

    random.seed(seed)
    toolbox = base.Toolbox()
    toolbox.register("mate", tools.cxUniform, indpb=0.5)
    toolbox.register("mutate", tools.mutUniformInt, low=0, up=LEVELS - 1, indpb=2 / n)
    toolbox.register("select", tools.selBest)
    toolbox.register("evaluate", lambda individual: (0.0,))
    start = [Individual([2] * n)]
    algorithms.eaMuPlusLambda(start, toolbox, 1, count, 0.0, 1.0, generations, verbose=False)


ENGINES: dict[str, Run] = {
    "evopress, moves": evopress(OnMoves()),
    "evopress, rows": evopress(OnRows()),
    "list code": list_code,
    "scipy differential evolution": differential_evolution,
    "pygad": pygad,
    "pymoo GA": pymoo,
    "DEAP (1 + lambda)": deap,
    "nevergrad (1 + 1)": nevergrad,
    "optuna TPE": optuna,
}


def cpu_seconds(run: Run, n: int, count: int, generations: int, seed: int) -> float:
    start = time.process_time()
    run(n, count, generations, seed)
    return time.process_time() - start


def microseconds(run: Run, n: int, count: int, seed: int) -> tuple[float, int]:
    """Of one candidate, and the number of generations that were timed."""
    run(n, count, 1, seed)
    few = cpu_seconds(run, n, count, 2, seed)
    trial = max(1e-5, (cpu_seconds(run, n, count, 6, seed) - few) / 4)
    generations = int(np.clip(SECONDS / trial, 4, GENERATIONS))
    repeats = REPEATS if trial * generations < 2 else 1
    few = min([few, *(cpu_seconds(run, n, count, 2, seed + i) for i in range(repeats))])
    many = min(cpu_seconds(run, n, count, 2 + generations, seed + i) for i in range(repeats))
    return 1e6 * (many - few) / (generations * count), generations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=record.HERE / "results" / "engine.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for name in arguments.only:
        for count in OFFSPRING:
            before = 0.0  # microseconds at the size before
            for i, n in enumerate(UNITS):
                expected = 15 * count * before * n / UNITS[max(0, i - 1)] / 1e6  # at least so many generations are run
                cost, generations = None, 0
                if expected < LIMIT:
                    cost, generations = microseconds(ENGINES[name], n, count, arguments.seed)
                before = cost if cost is not None else np.inf
                rows.append(
                    {"engine": name, "units": n, "offspring": count, "us_per_candidate": cost, "timed": generations}
                )
                print(f"{name:30} {n:7,} {count:4} {'' if cost is None else format(cost, '12.2f'):>12}", flush=True)
    versions = {package: distribution_version(package) for package in PACKAGES}
    record.write(arguments.out, {"levels": LEVELS, "packages": versions, "rows": rows}, seed=arguments.seed)


if __name__ == "__main__":
    main()
