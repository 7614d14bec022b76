"""EvoPress: (mu + lambda) evolution with level-switch mutation and multi-step selection.

Sieberling, Kuznedelev, Kurtic, Alistarh, "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search",
ICML 2025 (arXiv 2410.14649), Algorithm 1 and Section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from discopt.arrays import pack, unpack
from discopt.candidates import Candidates
from discopt.mutation import RULES, mutate
from discopt.objective import Losses, Query, mean_loss
from discopt.optimizers.base import (
    Measurement,
    StopReason,
    check_answer,
    check_state,
    distinct,
    pack_query,
    unpack_query,
)
from discopt.space import Levels, SearchSpace

MAX_SEED = 2**31
_CANDIDATES, _RIVALS, _GENERATIONS = "candidates", "rivals", "generations"  # what a query is for


@dataclass(frozen=True)
class Stage:
    """One step of the selection: measure at `fidelity`, keep the `survivors` best."""

    survivors: int
    fidelity: int

    def __post_init__(self) -> None:
        if self.survivors < 1 or self.fidelity < 1:
            raise ValueError(f"a stage needs at least 1 survivor and fidelity 1, got {self}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The stage written as SURVIVORS@FIDELITY, such as 8@2048."""
        parts = text.split("@")
        if len(parts) != 2 or not all(part.strip().isdecimal() and len(part) < 20 for part in parts):
            raise ValueError(f"a stage is written SURVIVORS@FIDELITY, such as 8@2048, got {text[:100]!r}")
        return cls(int(parts[0]), int(parts[1]))

    def __str__(self) -> str:
        return f"{self.survivors}@{self.fidelity}"


@dataclass(frozen=True)
class EvoPressSettings:
    """Settings of Algorithm 1; the published ones are in the paper's Table 8.

    `start` is "auto" (the uniform profile where it spends the budget, else "random"), "uniform", "random" (the best
    of `start_candidates` random profiles measured at `start_fidelity`) or a profile. `rivals` are other profiles, found
    by whatever means, that the start has to beat at the last stage's fidelity before the first generation; the paper
    has none. `switches[i]` is the weight of i + 1 switches in one mutation. `rule` is "within" groups, "across" them,
    or "exchange" (see `discopt.mutation`).
    """

    generations: int = 100
    offspring: int = 16  # lambda
    stages: tuple[Stage, ...] = (Stage(1, 1),)
    parents: int = 1  # mu
    start: str | tuple[int, ...] = "auto"
    start_candidates: int = 16
    start_fidelity: int | None = None  # that of the first stage
    rivals: tuple[tuple[int, ...], ...] = ()
    switches: tuple[float, ...] = (5, 3, 1)  # min(U{1..3}, U{1..3})
    rule: str = "within"

    def __post_init__(self) -> None:
        for name, least in (("generations", 0), ("offspring", 1), ("parents", 1), ("start_candidates", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.start_fidelity is not None and self.start_fidelity < 1:
            raise ValueError(f"start_fidelity must be at least 1, got {self.start_fidelity}")
        if not self.stages:
            raise ValueError("at least one stage is needed, got none")
        survivors = [stage.survivors for stage in self.stages]
        if any(late > early for early, late in zip([self.offspring, *survivors], survivors, strict=False)):
            raise ValueError(
                f"survivors must not grow from {self.offspring} offspring on, got {self.describe_stages()}"
            )
        if survivors[-1] != self.parents:
            raise ValueError(f"the last stage must keep the {self.parents} parents, got {self.describe_stages()}")
        fidelities = [stage.fidelity for stage in self.stages]
        if sorted(fidelities) != fidelities:
            raise ValueError(f"fidelity must not fall from stage to stage, got {self.describe_stages()}")
        if isinstance(self.start, str) and self.start not in ("auto", "uniform", "random"):
            raise ValueError(f"start must be auto, uniform, random or a profile, got {self.start!r}")
        if not all(0 <= weight < math.inf for weight in self.switches) or sum(self.switches) <= 0:
            raise ValueError(f"switches must be weights, not negative and not all 0, got {self.switches}")
        if self.rule not in RULES:
            raise ValueError(f"rule must be within, across or exchange, got {self.rule!r}")

    @property
    def generation_fidelity(self) -> int:
        """What a whole generation spends: candidates times fidelity, the parents in the last stage counted."""
        entrants = [self.offspring, *(stage.survivors for stage in self.stages)]
        offspring = sum(k * stage.fidelity for k, stage in zip(entrants, self.stages, strict=False))
        return offspring + self.parents * self.stages[-1].fidelity

    def describe_stages(self) -> str:
        return " ".join(str(stage) for stage in self.stages)

    @classmethod
    def starting_at(cls, profile: ArrayLike, **settings: Any) -> Self:
        """Settings with a start profile (n,)."""
        return cls(start=tuple(int(level) for level in np.asarray(profile)), **settings)


class EvoPress:
    """Algorithm 1 as an ask/tell optimizer; one ask/tell turn is one stage."""

    def __init__(self, space: SearchSpace, settings: EvoPressSettings | None = None, *, seed: int = 0) -> None:
        self.space = space
        self.settings = settings if settings is not None else EvoPressSettings()
        self.generation = 0
        self.improved_at = 0
        self.stop: StopReason | None = None
        self.start: Measurement | None = None
        self._rng = np.random.default_rng(seed)
        self._spent = 0
        self._phase = _CANDIDATES
        self._stage = 0  # index of the stage that `_query` belongs to
        self._query: Query | None = None
        self._rivals = np.array([space.check(np.asarray(rival)) for rival in self.settings.rivals], dtype=np.int16)
        given = self._given_start()
        self._draws_start = given is None
        if given is None:
            population = distinct(space.random(self.settings.start_candidates, self._rng))
            self._parents = population[:1]
            self._best = Measurement.unmeasured(population[0])
            self._ask(population, self._start_fidelity)
        else:
            self._parents = given[None]
            self._best = self.start = Measurement.unmeasured(given)
            self._meet_rivals()

    @property
    def done(self) -> bool:
        return self.stop is not None

    @property
    def best(self) -> Measurement:
        return self._best

    @property
    def fraction(self) -> float:
        s = self.settings
        start = s.start_candidates * self._start_fidelity if self._draws_start else 0
        if s.rivals:
            start += (len(s.rivals) + s.parents) * s.stages[-1].fidelity
        return 1.0 if self.done else min(1.0, self._spent / max(1, start + s.generations * s.generation_fidelity))

    def describe(self) -> dict[str, Any]:
        if self._phase == _GENERATIONS:
            return {"generation": self.generation + 1, "stage": self._stage + 1}
        return {"generation": 0, "stage": int(self._phase == _RIVALS)}

    def ask(self) -> Query:
        if self._query is None:
            raise ValueError(f"the search is done ({self.stop.value if self.stop else 'no query'}); check `done` first")
        return self._query

    def tell(self, query: Query, losses: Losses) -> None:
        check_answer(self._query, query)
        self._spent += query.fidelity * len(query)
        means = mean_loss(losses)
        order = means.argsort(kind="stable")  # ties: offspring before parents, for they come first
        if self._phase != _GENERATIONS:
            self._choose_start(query, losses, order)
        elif self._stage == len(self.settings.stages) - 1:
            self._choose_parents(query, losses, means, order)
        else:
            survivors = np.sort(order[: self.settings.stages[self._stage].survivors])
            self._begin_stage(self._stage + 1, query.candidates.take(survivors))

    def state(self) -> dict[str, Any]:
        return {
            "algorithm": "evopress",
            "shape": [self.space.n, self.space.m],
            "rng": self._rng.bit_generator.state,
            "generation": self.generation,
            "improved_at": self.improved_at,
            "stop": self.stop.name if self.stop else None,
            "start": self.start.to_dict() if self.start else None,
            "best": self._best.to_dict(),
            "parents": pack(self._parents),
            "phase": self._phase,
            "stage": self._stage,
            "spent": self._spent,
            "query": pack_query(self._query),
        }

    def restore(self, state: dict[str, Any]) -> None:
        check_state(state, "evopress", self.space)
        self._rng.bit_generator.state = state["rng"]
        self.generation = state["generation"]
        self.improved_at = state["improved_at"]
        self.stop = StopReason[state["stop"]] if state["stop"] else None
        self.start = Measurement.from_dict(state["start"]) if state["start"] else None
        self._best = Measurement.from_dict(state["best"])
        self._parents = unpack(state["parents"])
        self._phase = state["phase"]
        self._stage = state["stage"]
        self._spent = state["spent"]
        self._query = unpack_query(state["query"])

    @property
    def _start_fidelity(self) -> int:
        return self.settings.start_fidelity or self.settings.stages[0].fidelity

    def _given_start(self) -> Levels | None:
        start = self.settings.start
        if not isinstance(start, str):
            return self.space.check(np.asarray(start))
        uniform = self.space.uniform()
        if start == "uniform" and uniform is None:
            raise ValueError("start is 'uniform', but no profile with one level everywhere meets the budget")
        if start == "uniform" or (start == "auto" and uniform is not None and self.space.is_full(uniform)):
            return uniform
        return None

    def _ask(self, population: Levels | Candidates, fidelity: int) -> None:
        self._query = Query(population, fidelity, int(self._rng.integers(MAX_SEED)))

    def _choose_start(self, query: Query, losses: Losses, order: NDArray[np.intp]) -> None:
        """Algorithm 1, line 1: the best of the random profiles become the first parents, unless rivals beat them."""
        self._parents = np.array([query.row(row) for row in order[: self.settings.parents].tolist()])
        self._best = Measurement.of_row(query, losses, int(order[0]))
        if self._phase == _CANDIDATES:
            self.start = self._best
            self._meet_rivals()
        else:
            self._begin_generation()

    def _meet_rivals(self) -> None:
        if len(self._rivals):
            self._phase = _RIVALS
            self._ask(distinct(np.concatenate([self._rivals, self._parents])), self.settings.stages[-1].fidelity)
        else:
            self._begin_generation()

    def _begin_generation(self) -> None:
        self._phase = _GENERATIONS
        s = self.settings
        if self.generation >= s.generations:
            self._finish(StopReason.GENERATIONS)
            return
        children = mutate(self._parents, s.offspring, self.space, self._rng, switches=s.switches, rule=s.rule)
        if len(children) == 0 and self._best.fidelity == s.stages[-1].fidelity:
            self._finish(StopReason.EXHAUSTED)
            return
        first = 0
        while first < len(s.stages) - 1 and len(children) <= s.stages[first].survivors:
            first += 1  # nothing to choose between: all would survive
        self._begin_stage(first, children)

    def _begin_stage(self, stage: int, candidates: Candidates) -> None:
        self._stage = stage
        if stage == len(self.settings.stages) - 1:
            candidates = candidates.followed_by(self._parents)  # elitism against a fresh sample
        self._ask(candidates, self.settings.stages[stage].fidelity)

    def _choose_parents(self, query: Query, losses: Losses, means: Losses, order: NDArray[np.intp]) -> None:
        """Algorithm 1, last step: the best of offspring and parents, the latter known by their index."""
        first = len(query) - len(self._parents)  # of the parents
        if not math.isfinite(means[order[0]]):
            order = np.roll(np.arange(len(query)), len(self._parents))  # nothing was measured: stay
        chosen = order[: self.settings.parents].tolist()
        self.generation += 1
        if means[chosen[0]] < min(means[first:].tolist()):
            self.improved_at = self.generation
        self._best = Measurement.of_row(query, losses, chosen[0])
        self._parents = np.array([self._best.profile, *map(query.row, chosen[1:])])
        if not first:
            self._finish(StopReason.EXHAUSTED)
        else:
            self._begin_generation()

    def _finish(self, reason: StopReason) -> None:
        self.stop = reason
        self._query = None
