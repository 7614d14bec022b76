"""Other libraries behind discopt's ask and tell: `discopt compare --algorithms benchmarks/peers.py:PEERS`.

Each has the budget handled in the way that serves it best: what a library proposes is lowered by random moves until
the budget holds and raised until nothing fits, as `discopt.exchange` does it, and the library is told the loss of the
repaired profile as that profile's own. Needs `pip install 'discopt-search[peers]'`.
"""

from __future__ import annotations

import random
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from discopt import Optimizer, Plan, SearchSpace, StopReason
from discopt.candidates import Candidates
from discopt.exchange import exchange
from discopt.objective import Losses
from discopt.optimizers.one_sample import OneSample
from discopt.space import Levels

Genes = NDArray[np.int64]  # a number in 0..count - 1 for each unit that can move

PRECISION = 10**9  # CP-SAT's objective has whole numbers: the largest effect as one
SOLVER_TIME = 60  # CP-SAT's deterministic seconds at most
MAX_SEED = 2**31


class Coding:
    """Profiles as the numbers that a library varies, and profiles of the space from whatever it made of them."""

    def __init__(self, space: SearchSpace, rng: np.random.Generator) -> None:
        self._space, self._rng = space, rng
        count = space.allowed.sum(axis=1)
        self.units = np.flatnonzero(count > 1)
        self.count: list[int] = count[self.units].tolist()
        self._level = np.argsort(~space.allowed, axis=1, kind="stable").astype(np.int16)  # (n, m)
        self._gene = space.allowed.cumsum(axis=1) - 1  # (n, m)

    def genes(self, profiles: Levels) -> Genes:
        """(k, n) -> (k, units)."""
        return self._gene[self.units, profiles[:, self.units]].astype(np.int64)

    def repaired(self, genes: Genes) -> Levels:
        """Feasible profiles that spend their budget, near the given ones: (k, units) -> (k, n)."""
        space = self._space
        rows = np.tile(space.cheapest(), (len(genes), 1))
        rows[:, self.units] = self._level[self.units, genes]
        lowest = space.cheapest()
        for units in space.bundles:  # as most of its units have it
            low = rows[:, units] == lowest[units]
            down = low.mean(axis=1, keepdims=True) > 0.5
            rows[:, units] = np.where(down, lowest[units], np.where(low, space.second[units], rows[:, units]))
        none = np.zeros(len(rows), dtype=np.intp)
        return exchange(rows, space.budget - space.cost_of(rows), none, space, self._rng)


class Peer(OneSample):
    """A search of another library. What it offers is measured in queries of the plan's size, then given back whole."""

    package: ClassVar[str]  # what it needs, by its import name

    def __init__(self, space: SearchSpace, plan: Plan, *, seed: int) -> None:
        super().__init__(space, plan, seed=seed)
        self._library = _library(self.package, self.algorithm)
        self._seed_of_peer = seed
        self._restart()
        self._next()

    @property
    def population(self) -> int:
        """Profiles in a generation, where there is one: of 20, 50 and 100 the best on an interacting quadratic."""
        return 20 if self.plan.evaluations <= 1000 else 50

    @abstractmethod
    def _begin(self, first: Genes, seed: int) -> None:
        """Make the library's optimizer; `first` (population, units) are random profiles and before them the start."""

    @abstractmethod
    def _offer(self) -> Genes | None:
        """What the library asks for next, (k, units); None when it has nothing more."""

    @abstractmethod
    def _accept(self, genes: Genes, losses: list[float]) -> None:
        """Tell the library what its last offer lost, once repaired to `genes` (k, units)."""

    def _restart(self) -> None:
        self._told: list[list[float]] = []
        self._offered = np.empty((0, self.space.n), dtype=np.int16)
        self._done = 0  # rows of the offer that were measured
        rng = np.random.default_rng(self._seed_of_peer)
        self._coding = Coding(self.space, rng)
        first = np.concatenate([self._first()[None], self.space.random(self.population - 1, rng)])
        self._begin(self._coding.genes(first), int(rng.integers(MAX_SEED)))

    def _propose(self) -> Levels | StopReason:
        if self._done == len(self._offered):
            genes = self._offer()
            if genes is None or not len(genes):
                return StopReason.EXHAUSTED
            self._offered, self._done, self._losses = self._coding.repaired(genes), 0, list[float]()
        return self._offered[self._done : self._done + self.plan.batch]

    def _learn(self, population: Levels, losses: Losses) -> None:
        self._told.append(losses.tolist())
        self._losses += losses.tolist()
        self._done += len(losses)
        if self._done == len(self._offered):
            self._accept(self._coding.genes(self._offered), self._losses)

    def _memory(self) -> dict[str, Any]:
        return {"told": self._told}

    def _recall(self, memory: dict[str, Any]) -> None:
        """No library gives its whole state away: what it was told is told again."""
        self._restart()
        for losses in memory["told"]:
            population = self._propose()
            assert not isinstance(population, StopReason)
            self._learn(population[: len(losses)], np.array(losses))
        if self.stop is None:
            self._propose()


class Nevergrad(Peer):
    """One of nevergrad's optimizers over ordered choices. It is told the repaired profile as a child of its own."""

    package = "nevergrad"
    kind: ClassVar[str]

    def _begin(self, first: Genes, seed: int) -> None:
        ng, count = self._library, self._coding.count
        self._alike = len(set(count)) == 1
        if self._alike:
            parameters = ng.p.TransitionChoice(range(count[0]), repetitions=len(count))
        else:
            parameters = ng.p.Tuple(*(ng.p.TransitionChoice(range(c)) for c in count))
        parameters.random_state.seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of optimizers that it tries and cannot use here
            optimizer = ng.optimizers.registry[self.kind](parameters, budget=self.plan.evaluations)
        # What NGOpt is told of profiles that it did not ask for does not reach the optimizer that it chose.
        self._optimizer = getattr(optimizer, "optim", optimizer)
        self._optimizer.suggest(tuple(first[0].tolist()))

    def _offer(self) -> Genes:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._candidate = self._optimizer.ask()
        return np.array([self._candidate.value], dtype=np.int64)

    def _accept(self, genes: Genes, losses: list[float]) -> None:
        value = tuple(genes[0].tolist())
        same = value == tuple(self._candidate.value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            told = self._candidate if same else self._candidate.spawn_child(new_value=value)
            self._optimizer.tell(told, losses[0])


class OnePlusOne(Nevergrad):
    """nevergrad's (1+1) evolution for discrete variables."""

    algorithm = "nevergrad-1+1"
    kind = "DiscreteOnePlusOne"


class NGOpt(Nevergrad):
    """What nevergrad's NGOpt picks by the problem and the budget: for ordered choices, Lengler's (1+1)."""

    algorithm = "nevergrad-ngopt"
    kind = "NGOpt"


class Pymoo(Peer):
    """pymoo's genetic algorithm: integers, uniform crossover, repair as its operator, duplicates eliminated."""

    algorithm = "pymoo-ga"
    package = "pymoo.algorithms.soo.nonconvex.ga"

    def _begin(self, first: Genes, seed: int) -> None:
        coding = self._coding
        high = np.array(coding.count) - 1
        problem = import_module("pymoo.core.problem").Problem(n_var=len(high), n_obj=1, xl=0, xu=high, vtype=int)

        class Repair(import_module("pymoo.core.repair").Repair):  # type: ignore[misc]
            def _do(self, problem: object, X: NDArray[np.float64], **_: object) -> Genes:
                return coding.genes(coding.repaired(np.clip(np.rint(X), 0, high).astype(np.int64)))

        self._optimizer = self._library.GA(
            pop_size=self.population,
            sampling=first,
            crossover=import_module("pymoo.operators.crossover.ux").UniformCrossover(),
            repair=Repair(),
            eliminate_duplicates=True,
        )
        never = import_module("pymoo.core.termination").NoTermination()
        self._optimizer.setup(problem, termination=never, seed=seed, verbose=False)

    def _offer(self) -> Genes | None:
        self._population = self._optimizer.ask()
        return None if self._population is None else self._population.get("X").astype(np.int64)

    def _accept(self, genes: Genes, losses: list[float]) -> None:
        self._population.set("X", genes)
        self._population.set("F", np.array(losses)[:, None])
        self._optimizer.tell(infills=self._population)


class Optuna(Peer):
    """Optuna's tree-structured Parzen estimator. Slow: every trial looks at all trials before it for every unit.

    A profile that was repaired is added as a trial of its own; the one that was asked for counts as failed.
    """

    algorithm = "optuna-tpe"
    package = "optuna"

    def _begin(self, first: Genes, seed: int) -> None:
        optuna = self._library
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        self._ranges = {
            f"x{i}": optuna.distributions.IntDistribution(0, count - 1) for i, count in enumerate(self._coding.count)
        }
        self._study.enqueue_trial(self._named(first[0]))

    def _offer(self) -> Genes:
        self._trial = self._study.ask(self._ranges)
        return np.array([[self._trial.params[name] for name in self._ranges]], dtype=np.int64)

    def _accept(self, genes: Genes, losses: list[float]) -> None:
        optuna, values = self._library, self._named(genes[0])
        if values == self._trial.params:
            self._study.tell(self._trial, losses[0])
            return
        self._study.tell(self._trial, state=optuna.trial.TrialState.FAIL)
        self._study.add_trial(optuna.trial.create_trial(params=values, distributions=self._ranges, value=losses[0]))

    def _named(self, genes: Genes) -> dict[str, int]:
        return dict(zip(self._ranges, genes.tolist(), strict=True))


class Deap(Peer):
    """DEAP's (mu + lambda) loop: uniform crossover, uniform integer mutation of one unit on average, the best stay."""

    algorithm = "deap-mu+lambda"
    package = "deap"

    def _begin(self, first: Genes, seed: int) -> None:
        base, tools = import_module("deap.base"), import_module("deap.tools")
        self._algorithms, self._select = import_module("deap.algorithms"), tools.selBest
        self._random = random.Random(seed).getstate()

        class Fitness(base.Fitness):  # type: ignore[misc]
            weights = (-1.0,)

        class Individual(list[int]):
            def __init__(self, genes: list[int]) -> None:
                super().__init__(genes)
                self.fitness = Fitness()

        self._toolbox = base.Toolbox()
        self._toolbox.register("mate", tools.cxUniform, indpb=0.5)
        high = [count - 1 for count in self._coding.count]
        self._toolbox.register("mutate", tools.mutUniformInt, low=0, up=high, indpb=1 / len(high))
        self._population: list[Any] = []
        self._children: list[Any] = [Individual(genes) for genes in first.tolist()]

    def _offer(self) -> Genes:
        if self._population:
            with self._its_random():
                self._children = self._algorithms.varOr(self._population, self._toolbox, self.population, 0.5, 0.5)
        return np.array(self._children, dtype=np.int64)

    def _accept(self, genes: Genes, losses: list[float]) -> None:
        for child, repaired, loss in zip(self._children, genes.tolist(), losses, strict=True):
            child[:] = repaired
            child.fitness.values = (loss,)
        self._population = self._select(self._population + self._children, self.population)

    @contextmanager
    def _its_random(self) -> Iterator[None]:
        """DEAP draws from the random module; what the rest of the process draws there stays as it is."""
        ours = random.getstate()
        random.setstate(self._random)
        try:
            yield
        finally:
            self._random = random.getstate()
            random.setstate(ours)


class CpSat(OneSample):
    """OR-Tools CP-SAT on what single changes of the start lose: exact where the loss is a sum over the units.

    The changes are measured as they are, over the budget or not, the smaller ones if the plan does not reach for all;
    levels that were not measured are forbidden. On other problems the answer is that of the additive model, and may be
    no better than the start. Spaces with units that go together are refused.
    """

    algorithm = "cp-sat"

    def __init__(self, space: SearchSpace, plan: Plan, *, seed: int) -> None:
        super().__init__(space, plan, seed=seed)
        self._cp_model = _library("ortools.sat.python.cp_model", self.algorithm)
        if space.bundles:
            raise ValueError(f"cp-sat takes no units that go together, got {len(space.bundles)} sets of them")
        base = self._first()
        changes = space.allowed.copy()
        changes[np.arange(space.n), base] = False
        unit, level = np.nonzero(changes)
        small = np.argsort(np.abs(level - base[unit]), kind="stable")[: max(0, plan.evaluations - 2)]
        self._unit, self._level = unit[small], level[small]
        self._rows = Candidates.changed(
            base[None], [0] * (len(small) + 1), [{}, *({u: x} for u, x in zip(unit[small], level[small], strict=True))]
        )
        self._losses: list[float] = []  # of the start and then its changes
        self._solver_seed = seed
        self._next()

    def _propose(self) -> Levels | StopReason:
        done = len(self._losses)
        if done < len(self._rows):
            return self._rows.take(np.arange(done, min(done + self.plan.batch, len(self._rows)))).rows()
        if done == len(self._rows):
            return self._solve()[None]
        return StopReason.EXHAUSTED

    def _learn(self, population: Levels, losses: Losses) -> None:
        self._losses += losses.tolist()

    def _memory(self) -> dict[str, Any]:
        return {"losses": self._losses}

    def _recall(self, memory: dict[str, Any]) -> None:
        self._losses = memory["losses"]

    def _solve(self) -> Levels:
        """The profile with the least sum of effects, (n,)."""
        space, model = self.space, self._cp_model.CpModel()
        base = self._rows.bases[0]
        effect = np.array(self._losses[1:]) - self._losses[0]
        known = np.isfinite(effect)
        unit, level, effect = self._unit[known], self._level[known], effect[known]
        taken = [model.new_bool_var("") for _ in unit]
        for i in np.unique(unit):
            model.add_at_most_one(taken[j] for j in np.flatnonzero(unit == i))  # none: the unit stays
        left = space.budget - space.cost_of(base[None])[0]
        for r in range(space.r):
            step = space.cost[r, unit, level] - space.cost[r, unit, base[unit]]
            model.add(sum(int(c) * x for c, x in zip(step, taken, strict=True)) <= int(left[r]))
        scale = PRECISION / max(np.abs(effect).max(initial=0), np.finfo(float).tiny)
        model.minimize(sum(round(e * scale) * x for e, x in zip(effect, taken, strict=True)))
        solver = self._cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = self._solver_seed
        solver.parameters.max_deterministic_time = SOLVER_TIME
        solver.solve(model)
        chosen = [j for j, x in enumerate(taken) if solver.boolean_value(x)]
        profile = base.copy()
        profile[unit[chosen]] = level[chosen]
        return profile


def _library(package: str, algorithm: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f"{algorithm} needs {package}: pip install 'discopt-search[peers]'") from error


def _factory(kind: type[Peer] | type[CpSat]) -> Callable[[SearchSpace, Plan, int], Optimizer]:
    return lambda space, plan, seed: kind(space, plan, seed=seed)


PEERS: dict[str, Callable[[SearchSpace, Plan, int], Optimizer]] = {
    kind.algorithm: _factory(kind) for kind in (CpSat, Deap, OnePlusOne, NGOpt, Optuna, Pymoo)
}
"""Every peer by name, made from a space, a plan and a seed."""

QUICK = {kind.algorithm: _factory(kind) for kind in (CpSat, Deap, OnePlusOne, Pymoo)}
"""Those fit for many measurements: optuna's takes longer with each, and NGOpt is a (1+1) search here as well."""

LONG = {name: factory for name, factory in QUICK.items() if name != OnePlusOne.algorithm}
"""The same without nevergrad, which takes half a minute for 10,000."""
