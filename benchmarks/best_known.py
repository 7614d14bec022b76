"""Best known losses of the instances whose optimum is not certain: `python benchmarks/best_known.py [NAME ...]`.

A memetic algorithm: profiles that no change of one or two units betters are crossed, kicked and improved again; one
more search crosses what several seeds found, and what was known. What is lower than known goes into
`discopt/problems/best_known.json` with its profile. An instance with a known optimum can be named as a check of this
search. A lower loss found elsewhere is noted by `--update NAME=LOSS`.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from discopt import SearchSpace
from discopt.problems import Problem
from discopt.problems.suite import SUITE, best_known

FILE = Path(__file__).resolve().parents[1] / "discopt" / "problems" / "best_known.json"
PARENTS = 12
MAX_KICKED = 8  # units set at random after a crossover
REACH = 2048  # pairs tried for a child
CHUNK = 512  # profiles measured together
MAX_CHANGES = 512  # of one unit; above it, pairs of them are too many
SAME = 1e-9  # of the loss

Profile = Profiles = NDArray[np.int16]
Losses = NDArray[np.float64]
Found = tuple[float, Profile]  # a loss, and the profile (n,) that has it


class Counted:
    """The noise-free loss of a problem, and how many profiles it was asked for."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.evaluations = 0

    def __call__(self, population: Profiles) -> Losses:
        self.evaluations += len(population)
        return self._problem.loss(population)


def search(space: SearchSpace, loss: Counted, children: int, seed: int, start: list[Found]) -> Found:
    """A memetic algorithm whose first parents are the best of `start`, and random ones."""
    rng = np.random.default_rng(seed)
    x = sorted(start, key=lambda one: one[0])[:PARENTS]
    x += [improve(space, loss, profile) for profile in space.random(PARENTS - len(x), rng)]
    for _ in range(children):
        one, other = rng.choice(PARENTS, 2, replace=False)
        child = improve(space, loss, mixed(space, x[one][1], x[other][1], rng))
        known = any((child[1] == profile).all() for _, profile in x)
        worst = max(range(PARENTS), key=lambda i: x[i][0])
        if not known and child[0] < x[worst][0]:
            x[worst] = child
    found = min(x, key=lambda one: one[0])
    return improve(space, loss, found[1], reach=None)


def mixed(space: SearchSpace, one: Profile, other: Profile, rng: np.random.Generator) -> Profile:
    """Units of two feasible profiles, a few at random, and again of the first until it is feasible: (n,) -> (n,)."""
    child = np.where(rng.random(space.n) < rng.random(), one, other)
    kicked = rng.integers(space.n, size=rng.integers(MAX_KICKED + 1))
    child[kicked] = rng.integers(space.m, size=len(kicked))
    for unit in rng.permutation(space.n):
        if space.feasible(child[None])[0]:
            break
        child[unit] = one[unit]
    return child


def improve(space: SearchSpace, loss: Counted, x: Profile, reach: int | None = REACH) -> Found:
    """Change one or two units of a profile (n,) as long as that helps, by one level each where the space is large.

    Pairs are tried in the order of the sum of what each change does alone: the first `reach` of them, None for all.
    """
    now = float(loss(x[None])[0])
    longest = space.m if space.allowed.sum() <= MAX_CHANGES else 1
    while True:
        change = np.abs(np.arange(space.m) - x[:, None])
        unit, level = np.nonzero(space.allowed & (change > 0) & (change <= longest))
        alone = loss(_changed(x, unit[:, None], level[:, None])) - now
        one, other = _pairs(len(unit))
        single = one == other
        extra = space.cost[:, unit, level] - space.cost[:, unit, x[unit]]  # (r, changes)
        both = extra[:, one] + np.where(single, 0, extra[:, other])
        fits = (both <= (space.budget - space.cost_of(x[None])[0])[:, None]).all(axis=0)
        fits &= single | (unit[one] != unit[other])
        one, other = one[fits], other[fits]
        expected = alone[one] + np.where(one == other, 0, alone[other])
        order = np.arange(len(one))
        if reach is not None and reach < len(one):
            order = np.argpartition(expected, reach)[:reach]
        order = order[np.argsort(expected[order], kind="stable")]
        for first in range(0, len(order), CHUNK):
            a, b = one[order[first : first + CHUNK]], other[order[first : first + CHUNK]]
            children = _changed(x, unit[np.stack([a, b], axis=1)], level[np.stack([a, b], axis=1)])
            losses = loss(children)
            if losses.min() < now:
                x, now = children[losses.argmin()], float(losses.min())
                break
        else:
            return now, x


@cache
def _pairs(count: int) -> tuple[NDArray[np.intp], ...]:
    """Every two of so many changes, and each with itself: that one alone."""
    return np.triu_indices(count)


def _changed(x: Profile, unit: NDArray[np.intp], level: NDArray[np.intp]) -> Profiles:
    """The profile with other levels in the units of each row: (n,), (k, c), (k, c) -> (k, n)."""
    rows = np.tile(x, (len(unit), 1))
    np.put_along_axis(rows, unit, level.astype(x.dtype), axis=1)
    return rows


def look_for(name: str, seeds: int, children: int) -> dict[str, Any]:
    """The entry of an instance, from a search per seed, and one more that crosses what they found."""
    instance, start = SUITE[name], time.perf_counter()
    loss = Counted(instance.problem())
    space = instance.problem().space
    found = [search(space, loss, children, seed, start=[]) for seed in range(seeds)]
    known = best_known().get(name, {}).get("profile")
    before = [improve(space, loss, space.check(known))] if known else []
    best, profile = search(space, loss, children, seeds, start=found + before)
    agree = sum(other - best <= SAME * abs(best) for other, _ in found)
    source = (
        f"memetic search with exchange of pairs: {seeds} seeds of {children} children, then as many from what they "
        f"found{' and what was known' * bool(known)}; {loss.evaluations:,} evaluations; {agree} of the seeds found it"
    )
    print(f"{name}: {best:.9g}, {source}, {time.perf_counter() - start:.0f} s; before {instance.reference}", flush=True)
    return {"loss": best, "source": source, "profile": profile.tolist()}


def keep(name: str, entry: dict[str, Any]) -> None:
    """Write the entry if its loss is lower than known."""
    known = best_known()
    if name in known and known[name]["loss"] <= entry["loss"]:
        print(f"{name}: kept {known[name]['loss']}, which is no higher")
        return
    known[name] = entry
    rows = [f"  {json.dumps(key)}: {json.dumps(known[key])}" for key in sorted(known)]  # an instance, a line
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="instances; by default all without an optimum")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--children", type=int, default=200, help="of each seed")
    parser.add_argument("--update", metavar="NAME=LOSS", help="note a loss found elsewhere, and do not search")
    arguments = parser.parse_args()
    uncertain = [name for name, i in SUITE.items() if i.problem().optimum is None and i.problem().truth is None]
    if unknown := set(arguments.names) - set(SUITE):
        parser.error(f"expected NAMEs of {', '.join(SUITE)}, got {', '.join(sorted(unknown))}")
    if arguments.update:
        name, _, value = arguments.update.partition("=")
        try:
            entry = {"loss": float(value), "source": "found by a comparison"}
        except ValueError:
            parser.error(f"expected NAME=LOSS, got {arguments.update!r}")
        if name not in uncertain:
            parser.error(f"expected NAME=LOSS with a NAME of {', '.join(uncertain)}, got {arguments.update!r}")
        keep(name, entry)
        return
    for name in arguments.names or uncertain:
        entry = look_for(name, arguments.seeds, arguments.children)
        if name in uncertain:
            keep(name, entry)


if __name__ == "__main__":
    main()
