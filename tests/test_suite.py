"""The problem set of comparisons: what it covers, and that nothing is better than its references."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from discopt.mutation import offspring
from discopt.objective import Query
from discopt.problems.suite import FULL, SUITE, best_known

BEST = best_known()
TOLERANCE = 1e-9
LARGE = 1000  # units from which on climbing is left out

names = pytest.mark.parametrize("name", SUITE)


def made(name):
    instance = SUITE[name]
    if instance.needs and find_spec(instance.needs) is None:
        pytest.skip(f"needs {instance.needs}")
    return instance.problem()


def climbed(problem, seed, generations=40):
    """Where blind exchanges lead from a random profile: its loss."""
    rng = np.random.default_rng(seed)
    x = problem.space.random(1, rng)
    best = problem.loss(x)[0]
    for _ in range(generations):
        children = offspring(x, 32, problem.space, rng, switches=(1.0,), rule="exchange")
        losses = problem.loss(children)
        if losses.min() <= best:
            x, best = children[[losses.argmin()]], losses.min()
    return best


# What the set covers.


def test_every_instance_goes_by_its_name():
    assert all(name == instance.name for name, instance in SUITE.items())
    assert 20 <= len(SUITE) <= 30


def test_sizes_reach_from_16_to_100000_units_and_from_2_to_16_levels():
    spaces = [made(name).space for name in SUITE]
    assert min(s.n for s in spaces) == 16 and max(s.n for s in spaces) == 100_000
    assert min(s.m for s in spaces) == 2 and max(s.m for s in spaces) == 16


def test_costs_are_equal_and_unequal_with_one_resource_and_two():
    kinds = {(space.r, len(np.unique(space.group)) == 1) for space in (made(name).space for name in SUITE)}
    assert {(1, True), (1, False), (2, False)} <= kinds


def test_noise_is_shared_and_independent_small_and_large_and_comes_per_sample():
    noises = [made(name).objective for name in SUITE if SUITE[name].fidelity == FULL]
    assert {noise.kind for noise in noises} == {"shared", "independent"}
    spreads = [made(name).spread() for name in SUITE if SUITE[name].fidelity == FULL]
    assert {round(noise.sigma / spread) for noise, spread in zip(noises, spreads, strict=True)} == {1, 4}
    for name in SUITE:
        if SUITE[name].fidelity == FULL:
            x = made(name).space.random(3, np.random.default_rng(0))
            assert made(name).objective.evaluate(Query(x, FULL, 0)).shape == (3, 8)


@names
def test_a_full_measurement_is_free_of_noise_unless_the_objective_is_noisy(name):
    problem, instance = made(name), SUITE[name]
    assert problem.truth is not None or instance.fidelity == problem.fidelity


@pytest.mark.parametrize("name", ["quadratic-64x5", "nk-64x5", "trap-60", "jump-16", "chain-64x5-unequal"])
def test_climbing_a_multimodal_instance_ends_short_of_its_reference(name):
    assert SUITE[name].multimodal
    assert min(climbed(made(name), seed) for seed in range(4)) > SUITE[name].reference + TOLERANCE


# References.


@names
def test_every_instance_has_a_reference_and_says_how_it_is_known(name):
    problem, instance = made(name), SUITE[name]
    assert np.isfinite(instance.reference)
    if problem.optimum is None:
        assert instance.reference == instance.best and instance.source
    else:
        assert instance.best is None and problem.note


@names
def test_neither_random_nor_climbed_profiles_beat_the_reference(name):
    problem, instance = made(name), SUITE[name]
    few = problem.space.n > LARGE
    losses = problem.loss(problem.space.random(2 if few else 64, np.random.default_rng(1)))
    found = min(losses.min(), np.inf if few else climbed(problem, 1, generations=10))
    assert found >= instance.reference - TOLERANCE * max(1, abs(instance.reference))


@pytest.mark.parametrize("name", BEST)
def test_a_best_known_profile_is_feasible_and_has_its_loss(name):
    problem = made(name)
    assert SUITE[name].best == BEST[name]["loss"] and problem.optimum is None
    if "profile" in BEST[name]:
        profile = problem.space.check(BEST[name]["profile"])
        assert problem.loss(profile[None])[0] == pytest.approx(BEST[name]["loss"], rel=1e-9)


def test_the_file_of_best_known_losses_names_instances_only():
    assert set(BEST) <= set(SUITE)


# Repeatability.


def test_a_problem_is_made_once_in_a_process():
    assert SUITE["quadratic-64x5"].problem() is SUITE["quadratic-64x5"].problem()


def test_another_process_makes_the_same_problems():
    small = [name for name in SUITE if made(name).space.n <= 64 and SUITE[name].needs is None]
    script = f"""
import json, numpy as np
from discopt.objective import Query
from discopt.problems.suite import SUITE
answers = {{}}
for name in {small}:
    problem = SUITE[name].problem()
    x = problem.space.random(3, np.random.default_rng(0))
    losses = problem.objective.evaluate(Query(x, SUITE[name].fidelity, 7))
    answers[name] = [problem.space.budget.tolist(), losses.tolist(), SUITE[name].reference]
print(json.dumps(answers))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for name, (budget, losses, reference) in json.loads(done.stdout).items():
        problem = made(name)
        x = problem.space.random(3, np.random.default_rng(0))
        assert budget == problem.space.budget.tolist() and reference == SUITE[name].reference
        assert losses == problem.objective.evaluate(Query(x, SUITE[name].fidelity, 7)).tolist()
