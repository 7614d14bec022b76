"""Problems to try a search on, most with a known optimum, each also with noise that falls with fidelity.

problem = discopt.problems.PROBLEMS["quadratic"](n=8, m=4, seed=1)
result = discopt.minimize(problem.objective, problem.space)
problem.gap(result.profile[None])  # 0 at the optimum
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from discopt.problem import Problem
from discopt.problems.allocation import quadratic, separable
from discopt.problems.bits import jump, leading_ones, linear, switch_constant
from discopt.problems.blocks import royal_road, trap
from discopt.problems.chain import chain
from discopt.problems.coverage import coverage
from discopt.problems.exact import exhaustive_minimum, separable_minimum
from discopt.problems.nk import nk
from discopt.problems.noise import noisy
from discopt.problems.regression import feature_selection

__all__ = [
    "PROBLEMS",
    "Problem",
    "chain",
    "coverage",
    "exhaustive_minimum",
    "feature_selection",
    "jump",
    "leading_ones",
    "linear",
    "nk",
    "noisy",
    "quadratic",
    "royal_road",
    "separable",
    "separable_minimum",
    "switch_constant",
    "trap",
]

_EXACT: dict[str, Callable[..., Problem]] = {
    "linear": linear,
    "leading-ones": leading_ones,
    "jump": jump,
    "royal-road": royal_road,
    "trap": trap,
    "separable": separable,
    "separable-unequal": partial(separable, costs="unequal"),
    "separable-unequal-2r": partial(separable, costs="unequal", resources=2),
    "quadratic": quadratic,
    "chain": chain,
    "nk": nk,
    "coverage": coverage,
}


def _make_noisy(
    make: Callable[..., Problem],
    *arguments: Any,
    sigma: float | None = None,
    kind: str = "shared",
    samples: int | None = None,
    **options: Any,
) -> Problem:
    return noisy(make(*arguments, **options), sigma, kind=kind, samples=samples)


PROBLEMS: dict[str, Callable[..., Problem]] = {
    **_EXACT,
    **{f"noisy-{name}": partial(_make_noisy, make) for name, make in _EXACT.items()},
    "feature-selection": feature_selection,
}
"""Every problem by name; a noisy one takes the arguments of the problem and those of `noisy`."""
