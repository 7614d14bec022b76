"""The problem set that searches are compared on: 16 to 100,000 units, 2 to 16 levels, each with a value to reach.

That value is the optimum where it is certain. Elsewhere it is the best known loss, of `best_known.json`, which
`benchmarks/best_known.py` makes and betters.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.resources import files
from typing import Any

from discopt.problem import Problem
from discopt.problems.allocation import quadratic, separable
from discopt.problems.bits import jump, leading_ones, linear
from discopt.problems.blocks import royal_road, trap
from discopt.problems.chain import chain
from discopt.problems.coverage import coverage
from discopt.problems.nk import nk
from discopt.problems.noise import noisy
from discopt.problems.regression import PATIENTS, feature_selection

FULL = 64  # fidelity of a full measurement where there is noise
SAMPLES = 8  # columns of a noisy measurement


@dataclass(frozen=True)
class Instance:
    """A problem of the set, and what is known about its minimum."""

    name: str
    make: Callable[[], Problem]
    multimodal: bool = False  # its own interactions, not the budget's steps, make optima of single exchanges
    fidelity: int = 1  # of a full measurement, as a plan takes it
    needs: str | None = None  # module without which `make` raises ImportError
    best: float | None = None  # lowest known noise-free loss where the optimum is not known
    source: str = ""  # how `best` was got

    def problem(self) -> Problem:
        """The problem, made once in a process."""
        return _made(self)

    @property
    def reference(self) -> float | None:
        """The loss to reach: the optimum, or else the best known."""
        optimum = self.problem().optimum
        return self.best if optimum is None else optimum


@cache
def _made(instance: Instance) -> Problem:
    return instance.make()


def best_known() -> dict[str, dict[str, Any]]:
    """Of each instance without a certain optimum, by name: `loss`, `source`, and the `profile` that has it, if kept."""
    return json.loads(files("discopt.problems").joinpath("best_known.json").read_text(encoding="utf-8"))


def _plain() -> list[Instance]:
    quadratic_64x5 = partial(quadratic, 64, 5)
    return [
        Instance("linear-64", partial(linear, 64, 48)),
        Instance("linear-100000", partial(linear, 100_000, 50_000)),
        Instance("leading-ones-32", partial(leading_ones, 32, 24)),
        Instance("royal-road-64", partial(royal_road, 64, 32)),
        Instance("jump-16", partial(jump, 16, 8, 3), multimodal=True),
        Instance("trap-60", partial(trap, 60, 30), multimodal=True),
        Instance("separable-64x5", partial(separable, 64, 5)),
        Instance("separable-64x5-unequal-2r", partial(separable, 64, 5, costs="unequal", resources=2)),
        Instance("separable-224x5-unequal", partial(separable, 224, 5, costs="unequal")),
        Instance("separable-20000x5", partial(separable, 20_000, 5, priced=True)),
        Instance("coverage-60", partial(coverage, 60)),
        Instance("quadratic-16x16", partial(quadratic, 16, 16, share=0.25), multimodal=True),
        Instance("quadratic-64x5", quadratic_64x5, multimodal=True),
        Instance("quadratic-64x5-unequal", partial(quadratic_64x5, costs="unequal"), multimodal=True),
        Instance("quadratic-64x5-unequal-2r", partial(quadratic_64x5, costs="unequal", resources=2), multimodal=True),
        Instance("quadratic-224x5-unequal", partial(quadratic, 224, 5, costs="unequal"), multimodal=True),
        Instance("nk-16", partial(nk, 16, 8), multimodal=True),
        Instance("nk-64", partial(nk, 64, 32), multimodal=True),
        Instance("nk-64x5", partial(nk, 64, 128, m=5), multimodal=True),
        Instance("chain-64x5-unequal", partial(chain, 64, 5), multimodal=True),
        Instance("chain-20000x4-unequal", partial(chain, 20_000, 4, length=50), multimodal=True),
        Instance("feature-selection", feature_selection, multimodal=True, fidelity=PATIENTS, needs="sklearn"),
    ]


def _noisy(plain: Instance, prefix: str, sigma: float = 1.0, kind: str = "shared") -> Instance:
    """With noise of `sigma` times the spread of random profiles at fidelity 1, and losses per sample."""
    make = partial(_make_noisy, plain.make, sigma, kind)
    return replace(plain, name=f"{prefix}-{plain.name}", make=make, fidelity=FULL)


def _make_noisy(make: Callable[[], Problem], sigma: float, kind: str) -> Problem:
    problem = make()
    return noisy(problem, sigma * problem.spread(), kind=kind, samples=SAMPLES)


def _suite() -> dict[str, Instance]:
    known = best_known()
    plain = {
        instance.name: replace(instance, best=known[instance.name]["loss"], source=known[instance.name]["source"])
        if instance.name in known
        else instance
        for instance in _plain()
    }
    with_noise = [
        _noisy(plain["linear-64"], "noisy", kind="independent"),
        _noisy(plain["separable-224x5-unequal"], "noisy"),
        _noisy(plain["quadratic-64x5"], "noisy"),
        _noisy(plain["quadratic-64x5"], "very-noisy", 4.0),
    ]
    return plain | {instance.name: instance for instance in with_noise}


SUITE = _suite()
"""Every instance by name."""
