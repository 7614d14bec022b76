"""The seam between a search algorithm and the one loop that runs it."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from discopt.arrays import pack, unpack
from discopt.candidates import Candidates
from discopt.objective import Losses, Query
from discopt.space import Levels, SearchSpace


class StopReason(enum.Enum):
    """Why a search ended."""

    GENERATIONS = "all generations are done"
    EXHAUSTED = "no other feasible profile is in reach"
    EVALUATIONS = "the limit of evaluations is reached"
    FIDELITY = "the limit of total fidelity is reached"
    TIME = "the time limit is reached"
    TARGET = "the target loss is reached"
    STAGNATION = "no improvement for the allowed number of generations"
    CALLBACK = "a callback asked to stop"
    INTERRUPTED = "interrupted; resume to go on"


@dataclass(frozen=True, eq=False)
class Measurement:
    """A profile and what it lost; lower is better. `loss` is NaN and `fidelity` 0 if it was never measured."""

    profile: Levels  # (n,)
    loss: float
    fidelity: int
    seed: int = 0
    standard_error: float | None = None  # of the mean over the samples, where the objective gave losses per sample

    @classmethod
    def unmeasured(cls, profile: Levels) -> Measurement:
        return cls(profile, math.nan, 0)

    @classmethod
    def of_row(cls, query: Query, losses: Losses, row: int) -> Measurement:
        """Row `row` of a query and its answer, (k,) or (k, s)."""
        if losses.ndim == 1:
            return cls(query.row(row), float(losses[row]), query.fidelity, query.seed)
        samples = losses[row]
        error = float(samples.std(ddof=1) / math.sqrt(len(samples))) if len(samples) > 1 else None
        return cls(query.row(row), float(samples.mean()), query.fidelity, query.seed, error)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; a loss that is not finite becomes None."""
        loss = self.loss if math.isfinite(self.loss) else None
        return {**vars(self), "profile": [int(level) for level in self.profile], "loss": loss}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Measurement:
        loss = math.nan if values["loss"] is None else values["loss"]
        return cls(**{**values, "profile": np.asarray(values["profile"], dtype=np.int16), "loss": loss})


class Optimizer(Protocol):
    """A search as a state machine: `ask` for a query, `tell` its losses, until `done`."""

    @property
    def space(self) -> SearchSpace: ...

    @property
    def done(self) -> bool: ...

    @property
    def stop(self) -> StopReason | None:
        """Why the search is done; None while it is not."""
        ...

    @property
    def best(self) -> Measurement:
        """The best profile so far with its latest measurement."""
        ...

    @property
    def start(self) -> Measurement | None:
        """The profile the search started from: the best start candidate, or the given one; None while unknown."""
        ...

    @property
    def generation(self) -> int:
        """Finished generations."""
        ...

    @property
    def improved_at(self) -> int:
        """The generation that last found a better profile, measured on one sample with the one before."""
        ...

    @property
    def fraction(self) -> float:
        """Share of the planned work that is done, by fidelity: 0 to 1."""
        ...

    def describe(self) -> dict[str, Any]:
        """Where the pending query belongs, for the trace: at least `generation` and `stage`, counted from 1."""
        ...

    def ask(self) -> Query:
        """The next query; the same one until it is told. Raises ValueError when done."""
        ...

    def tell(self, query: Query, losses: Losses) -> None:
        """Take the losses of the last query: (k,) or (k, s)."""
        ...

    def state(self) -> dict[str, Any]:
        """All that the future depends on, as JSON values."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()` of an optimizer with the same space and settings; raises ValueError for others."""
        ...


def check_answer(asked: Query | None, query: Query) -> None:
    """Raise ValueError unless `query` is the pending one, or an equal copy of it."""
    if asked is None:
        raise ValueError("the search is done: nothing was asked")
    same = query.seed == asked.seed and query.fidelity == asked.fidelity
    if query is not asked and not (same and np.array_equal(query.population, asked.population)):
        raise ValueError(
            f"tell expects the answer to the last ask (seed {asked.seed}, fidelity {asked.fidelity}), "
            f"got seed {query.seed}, fidelity {query.fidelity}"
        )


def check_state(state: dict[str, Any], algorithm: str, space: SearchSpace) -> None:
    """Raise ValueError unless the state is that of the algorithm on a space of this shape."""
    if state.get("algorithm") != algorithm or state.get("shape") != [space.n, space.m]:
        raise ValueError(
            f"expected the state of {algorithm} on {space.n} units of {space.m} levels, "
            f"got {state.get('algorithm')} on {state.get('shape')}"
        )


def distinct(population: Levels) -> Levels:
    """The different rows, in the order of their first appearance: (k, n) -> (at most k, n)."""
    _, first = np.unique(population, axis=0, return_index=True)
    return population[np.sort(first)]


def pack_query(query: Query | None) -> dict[str, Any] | None:
    if query is None:
        return None
    candidates = {name: pack(array) for name, array in vars(query.candidates).items()}
    return {"candidates": candidates, "fidelity": query.fidelity, "seed": query.seed, "fresh": query.fresh}


def unpack_query(packed: dict[str, Any] | None) -> Query | None:
    if packed is None:
        return None
    candidates = Candidates(**{name: unpack(array) for name, array in packed["candidates"].items()})
    return Query(candidates, packed["fidelity"], packed["seed"], fresh=packed["fresh"])
