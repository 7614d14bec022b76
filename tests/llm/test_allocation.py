"""Baselines over the levels of a bank: budgets met exactly, and what each of them means."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from discopt.separable import solve_separable
from discopt.space import SearchSpace
from discopt_llm.allocation import OWL_SPREADS, Measured, additive, owl, uniform
from discopt_llm.bank import Bank, BankLayer
from discopt_llm.budget import Budget
from discopt_llm.evaluator import TEACHER, Evaluator
from discopt_llm.fitness import KL
from discopt_llm.genome import DROP_LABEL, Genome, bank_genome, mixed_genome
from discopt_llm.layers import read_layers
from discopt_llm.levels import BankLevels
from tests.llm.banks import KINDS, loaded
from tests.llm.test_evaluator import text

BankOf = Callable[[str, str], Bank]
MULTIPLES = ("3", "5")


def bits(amount: str) -> Budget:
    return Budget("bits", Fraction(amount))


def sparsity(amount: str) -> Budget:
    return Budget("sparsity", Fraction(amount))


def relative_size(amount: str) -> Budget:
    return Budget("size", Fraction(amount), relative=True)


def genome_of(family: str, kind: str, bank_of: BankOf, unit: str = "layer") -> Genome:
    bank = bank_of(family, kind)
    return bank_genome(bank.layers, bank.labels, kind, unit, 1000)


def union_of(family: str, kinds: Sequence[str], bank_of: BankOf, *, unit: str = "layer", drop: bool = True) -> Genome:
    banks = {kind: bank_of(family, kind) for kind in kinds}
    return mixed_genome({k: (b.layers, b.labels) for k, b in banks.items()}, unit, 1000, drop=drop)


def cost_of(space: SearchSpace, profile: NDArray[np.integer]) -> int:
    return int(space.cost_of(profile[None])[0, 0])


# -- uniform -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["layer", "runtime"])
def test_a_whole_budget_is_one_level_for_all(unit: str, bank_of: BankOf) -> None:
    genome = genome_of("llama", "quantization", bank_of, unit)
    for amount, level in (("2", 0), ("3", 1), ("4", 2), ("6", 3)):
        profile = uniform(genome, genome.space(bits(amount), "size"))
        assert profile.tolist() == [level] * genome.n
    sparse = genome_of("llama", "sparsity", bank_of, unit)
    assert set(sparse.labels_of(uniform(sparse, sparse.space(sparsity("0.5"), "none")))) == {"0"}


@pytest.mark.parametrize("amount", ["2.25", "3.5", "5"])
def test_what_a_fractional_budget_leaves_is_spread_evenly(amount: str, bank_of: BankOf) -> None:
    genome = genome_of("llama", "quantization", bank_of)
    space = genome.space(bits(amount), "none")
    profile = uniform(genome, space)
    assert np.ptp(profile) == 1
    assert space.feasible(profile[None])[0]
    smallest = np.diff(space.cost[0], axis=1)[:, profile.min()].min()
    assert space.budget[0] - cost_of(space, profile) < 2 * smallest
    raised = np.bincount(genome.block_of, weights=profile > profile.min())
    assert np.ptp(raised) <= 3  # every block has its part


@pytest.mark.parametrize("amount", ["3", "2.5"])
def test_of_mixed_kinds_one_width_is_that_of_quantization_alone(amount: str, bank_of: BankOf) -> None:
    alone, mixed = genome_of("llama", "quantization", bank_of), union_of("llama", ["quantization"], bank_of)
    spaces = [
        alone.space(Budget("bpw", Fraction(amount) + Fraction(5, 2)), "none"),
        mixed.space(Budget("bpw", Fraction(amount) + Fraction(5, 2)), "none"),
    ]
    expected, found = uniform(alone, spaces[0]), uniform(mixed, spaces[1])
    assert mixed.labels_of(found) == tuple(f"quantization:{label}" for label in alone.labels_of(expected))
    assert cost_of(spaces[0], expected) == cost_of(spaces[1], found) <= spaces[1].budget[0]


@pytest.mark.parametrize(("size", "unit"), [("0.35", "layer"), ("0.5", "layer"), ("0.7", "layer"), ("0.5", "runtime")])
def test_of_mixed_kinds_all_units_are_of_the_one_with_less_error(size: str, unit: str, bank_of: BankOf) -> None:
    genome = union_of("llama", KINDS, bank_of, unit=unit)
    space = genome.space(relative_size(size), "none")
    profile = uniform(genome, space)
    assert space.feasible(profile[None])[0]
    labels = [label.partition(":") for label in genome.labels_of(profile)]
    assert len({kind for kind, _, _ in labels}) == 1
    (own,) = {kind for kind, _, _ in labels}
    assert own in KINDS and len({label for _, _, label in labels}) <= 3  # one, a step up, where it is absent another
    (other,) = {*KINDS} - {own}
    rival = union_of("llama", [other], bank_of, unit=unit)
    rivals = uniform(rival, rival.space(relative_size(size), "none"))
    if DROP_LABEL not in rival.labels_of(rivals):
        errors = [g.errors[np.arange(g.n), p].sum() for g, p in ((genome, profile), (rival, rivals))]
        assert errors[0] <= errors[1]


def test_where_no_kind_serves_all_units_uniform_is_still_within_the_budget(bank_of: BankOf) -> None:
    genome = union_of("llama", ["quantization"], bank_of)
    space = genome.space(relative_size("0.05"), "none")  # less than the smallest forms of all
    profile = uniform(genome, space)
    assert space.feasible(profile[None])[0]
    assert DROP_LABEL in genome.labels_of(profile)


# -- additive ------------------------------------------------------------------------------------------------------


def first_units(genome: Genome, count: int) -> Genome:
    """The genome of the first units alone."""
    costs = genome.costs
    tables = {name: getattr(costs, name)[:count] for name in ("weights", "bits", "bytes", "dense")}
    cut = {
        name: getattr(genome, name)[:count]
        for name in ("names", "layers", "layer_names", "forms", "labels", "errors", "sub_block")
    }
    return replace(genome, costs=replace(costs, **tables), **cut)


@pytest.mark.parametrize(
    ("kind", "count", "budget"),
    [
        ("quantization", 6, bits("3")),
        ("quantization", 6, bits("2.37")),
        ("quantization", 6, Budget("bpw", Fraction(5))),
        ("sparsity", 4, sparsity("0.5")),
        ("sparsity", 4, sparsity("0.61")),
        ("mixed", 4, Budget("bpw", Fraction(4))),
        ("mixed", 4, Budget("bpw", Fraction(15, 2))),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_additive_is_the_best_of_all_profiles(
    family: str, kind: str, count: int, budget: Budget, bank_of: BankOf
) -> None:
    whole = union_of(family, KINDS, bank_of) if kind == "mixed" else genome_of(family, kind, bank_of)
    genome = first_units(whole, count)
    space = genome.space(budget, "none")
    profile = additive(genome, space)
    every = np.array([*itertools.product(*(np.flatnonzero(row) for row in genome.present))], dtype=np.int16)
    every = every[space.feasible(every)]
    best = genome.errors[np.arange(count), every].sum(axis=1).min()
    assert space.feasible(profile[None])[0]
    assert genome.errors[np.arange(count), profile].sum() == pytest.approx(best, rel=1e-9)


# -- OWL -----------------------------------------------------------------------------------------------------------


def bank_layer(name: str, block: int, share: float, rows: int = 32) -> BankLayer:
    """A layer of 32 * rows weights with 33 levels 32 weights apart, around half of them."""
    weights = 16 * rows + 32 * np.arange(-16, 17)
    m = len(weights)
    return BankLayer(
        name=name,
        block=block,
        kind="attention",
        input=0,
        matrices=1,
        rows=rows,
        columns=32,
        transposed=False,
        present=(weights >= 0) & (weights <= 32 * rows),
        weights=np.clip(weights, 0, 32 * rows) * ((weights >= 0) & (weights <= 32 * rows)),
        bits=16 * np.clip(weights, 0, 32 * rows) * ((weights >= 0) & (weights <= 32 * rows)),
        bytes=(4 * rows + 2 * np.clip(weights, 0, 32 * rows)) * ((weights >= 0) & (weights <= 32 * rows)),
        errors=np.linspace(1, 0.1, m),
        outliers={multiple: share / float(multiple) for multiple in MULTIPLES},
    )


def toy(shares: Sequence[float], rows: Sequence[int] | None = None) -> tuple[Any, Genome]:
    """A bank of a layer for each block, with these shares of outliers."""
    heights = rows or [32] * len(shares)
    layers = [bank_layer(f"{b}.q", b, share, r) for b, (share, r) in enumerate(zip(shares, heights, strict=True))]

    class ToyBank:
        pass

    bank: Any = ToyBank()
    bank.layers = layers
    return bank, bank_genome(layers, [str(i) for i in range(16, -17, -1)], "sparsity", "layer", 0)


def densities(genome: Genome, profiles: NDArray[np.integer]) -> NDArray[np.float64]:
    """Share of the weights that each unit keeps, (k, n)."""
    return genome.costs.weights[np.arange(genome.n), profiles] / genome.costs.dense


def test_owl_is_its_formula_where_the_levels_are_fine_enough() -> None:
    shares = np.array([0.1, 0.2, 0.3, 0.6])
    bank, genome = toy(shares.tolist())
    profiles = owl(bank, genome, genome.space(sparsity("0.5"), "none"))
    found = densities(genome, profiles)
    for width in OWL_SPREADS:
        wanted = 0.5 + 2 * width * (shares - shares.mean()) / np.ptp(shares)
        assert np.abs(found - wanted).max(axis=1).min() <= 1 / 32  # a step, or half of one and what the budget asks


@pytest.mark.parametrize("amount", ["0.5", "0.37", "0.7"])
def test_owl_spends_the_whole_budget_around_its_target(amount: str) -> None:
    bank, genome = toy([0.1, 0.2, 0.3, 0.6, 0.15], rows=[32, 32, 64, 16, 32])
    space = genome.space(sparsity(amount), "none")
    for profile in owl(bank, genome, space):
        assert space.feasible(profile[None])[0]
        assert space.budget[0] - cost_of(space, profile) < 32
        assert genome.costs.measures(profile)["sparsity"] - Fraction(amount) < Fraction(
            32, int(genome.costs.dense.sum())
        )


def test_a_block_with_more_outliers_keeps_more() -> None:
    shares = [0.3, 0.1, 0.6, 0.2]
    bank, genome = toy(shares)
    profiles = owl(bank, genome, genome.space(sparsity("0.5"), "none"))
    widest = profiles[np.argmax(np.ptp(densities(genome, profiles), axis=1))]
    assert np.argsort(widest, kind="stable").tolist() == np.argsort(shares).tolist()
    assert np.ptp(densities(genome, widest[None])) == pytest.approx(2 * max(OWL_SPREADS), abs=1 / 16)


def test_equal_shares_give_the_uniform_profile() -> None:
    bank, genome = toy([0.2] * 4)
    space = genome.space(sparsity("0.5"), "none")
    assert owl(bank, genome, space).tolist() == [uniform(genome, space).tolist()]


@pytest.mark.parametrize("unit", ["layer", "runtime"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
def test_owl_on_a_bank_spends_what_uniform_spends(family: str, unit: str, bank_of: BankOf) -> None:
    bank, genome = bank_of(family, "sparsity"), genome_of(family, "sparsity", bank_of, unit)
    for budget in (sparsity("0.5"), sparsity("0.6"), relative_size("0.6")):
        space = genome.space(budget, "none")
        profiles = owl(bank, genome, space)
        assert 1 <= len(profiles) <= len(OWL_SPREADS) * len(bank.layers[0].outliers)
        assert space.feasible(profiles).all()
        assert len(np.unique(profiles, axis=0)) == len(profiles)
        cost = space.cost_of(profiles)[:, 0]
        assert (cost >= cost_of(space, uniform(genome, space)) - (120 if unit == "layer" else 360)).all()
        assert all(space.is_full(profile) for profile in profiles)


# -- measured ------------------------------------------------------------------------------------------------------


def test_the_best_of_several_profiles_is_chosen_by_its_loss(bank_of: BankOf) -> None:
    bank, model = bank_of("llama", "quantization"), loaded("llama")
    genome = genome_of("llama", "quantization", bank_of)
    levels = BankLevels(model, read_layers(model.model, model.anatomy), genome, [bank])
    evaluator, sample = Evaluator(model, levels), text(12, 12, 9)
    population = genome.space(bits("3"), "none").random(11, np.random.default_rng(0))
    (losses,) = evaluator.measure(population, sample, [KL()])
    profile, tokens = Measured(evaluator, sample, KL(), quiet=True).best("random profiles", population)
    assert profile.tolist() == population[losses.mean(axis=1).argmin()].tolist()
    assert tokens == 11 * (12 + 12 + 9)


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    class Broken:
        def measure(self, population: NDArray[Any], *_: Any) -> list[NDArray[np.float64]]:
            return [np.where(population[:, :1] == 0, np.nan, population[:, :1].astype(float))]

    evaluator: Any = Broken()
    sample: list[Tensor] = text(4)
    population = np.array([[0], [3], [2]], dtype=np.int16)
    assert Measured(evaluator, sample, KL(), quiet=True).best("x", population)[0].tolist() == [2]


def test_units_measured_alone_give_the_exact_minimum_of_a_loss_that_adds_up(bank_of: BankOf) -> None:
    genome = genome_of("llama", "quantization", bank_of)
    space = genome.space(bits("2.75"), "size")
    importance = np.random.default_rng(0).random(genome.n) ** 3

    class Additive:
        def measure(self, population: NDArray[Any], *_: Any) -> list[NDArray[np.float64]]:
            known = population != TEACHER
            losses = np.where(known, importance * genome.errors[np.arange(genome.n), population * known], 0)
            return [0.5 + losses.sum(axis=1, keepdims=True)]  # a teacher has a loss too, such as its perplexity

    evaluator: Any = Additive()
    effects, tokens = Measured(evaluator, text(4, 3), KL(), quiet=True).effects(genome, uniform(genome, space))
    loss = importance[:, None] * genome.errors
    profile, expected = solve_separable(space, effects), solve_separable(space, loss)
    units = np.arange(genome.n)
    assert loss[units, profile].sum() == pytest.approx(loss[units, expected].sum())
    assert loss[units, profile].sum() < loss[units, additive(genome, space)].sum()
    assert tokens == (genome.n + 1) * 7


def test_a_unit_that_seems_to_cost_nothing_is_not_free(bank_of: BankOf) -> None:
    genome = genome_of("llama", "quantization", bank_of)
    space = genome.space(bits("3"), "size")

    class Noisy:
        def measure(self, population: NDArray[Any], *_: Any) -> list[NDArray[np.float64]]:
            return [np.where(population[:, :1] != TEACHER, -1.0, (population != TEACHER).sum(axis=1, keepdims=True))]

    evaluator: Any = Noisy()
    effects, _ = Measured(evaluator, text(4), KL(), quiet=True).effects(genome, uniform(genome, space))
    profile = solve_separable(space, effects)
    assert space.is_full(profile)
    assert profile[0] == 0
