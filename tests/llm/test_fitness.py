"""Every fitness against its formula written out in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from discopt_llm.fitness import (
    KL,
    Disagreement,
    Fitness,
    Logits,
    Perplexity,
    TopKKL,
    TotalVariation,
    fitness_by_name,
)
from tests.llm import reference

C, V = 7, 1000


def logits(seed: int, noise: float = 0.0, scale: float = 4.0, offset: float = 0.0) -> Logits:
    """Random logits (C, V); noise moves them away from those of the same seed without noise."""
    generator = torch.Generator().manual_seed(seed)
    values = offset + scale * torch.randn(C, V, generator=generator)
    tokens = torch.randint(V, (C,), generator=generator)
    return Logits(values + noise * torch.randn(C, V, generator=generator), tokens)


FORMULAS = {
    KL(): reference.kl,
    TopKKL(50): reference.kl_top(50),
    Perplexity(): reference.negative_log_likelihood,
    TotalVariation(): reference.total_variation,
    Disagreement(): reference.disagreement,
}


def measured(fitness: Fitness, teacher: Logits, student: Logits) -> Tensor:
    return fitness.losses(fitness.target(teacher), student)


@pytest.mark.parametrize("noise", [1e-3, 0.1, 3.0])
@pytest.mark.parametrize("offset", [0.0, -30.0])
@pytest.mark.parametrize("fitness", FORMULAS, ids=lambda f: f.name)
def test_it_is_its_formula_in_double_precision(fitness: Fitness, noise: float, offset: float) -> None:
    teacher, student = logits(1, offset=offset), logits(1, noise=noise, offset=offset)
    ids = torch.cat([torch.tensor([0]), student.next_tokens[:-1]])  # at positions 1.. what came next at 0..
    expected = FORMULAS[fitness](teacher.values.double(), student.values.double(), ids)
    found = measured(fitness, teacher, student).double()[: len(expected)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fitness", [f for f in FORMULAS if f.name != "ppl"], ids=lambda f: f.name)
def test_a_student_with_the_teachers_logits_loses_nothing(fitness: Fitness) -> None:
    assert measured(fitness, logits(2), logits(2)).abs().max() == 0.0


@pytest.mark.parametrize("fitness", FORMULAS, ids=lambda f: f.name)
def test_logits_are_left_as_they_are(fitness: Fitness) -> None:
    teacher, student = logits(3), logits(4)
    first = measured(fitness, teacher, student)
    assert torch.equal(teacher.values, logits(3).values)
    assert torch.equal(student.values, logits(4).values)
    assert torch.equal(measured(fitness, teacher, student), first)


@pytest.mark.parametrize("fitness", FORMULAS, ids=lambda f: f.name)
def test_a_nan_shows_in_its_own_position_only(fitness: Fitness) -> None:
    teacher, student = logits(5), logits(6)
    student.values[2] = torch.nan
    finite = measured(fitness, teacher, student).isfinite()
    assert finite.tolist() == [i != 2 or fitness.name == "disagreement" for i in range(C)]


def test_top_k_over_the_whole_vocabulary_is_kl() -> None:
    teacher, student = logits(7), logits(8)
    full = measured(KL(), teacher, student)
    for k in (V, 10 * V):
        torch.testing.assert_close(measured(TopKKL(k), teacher, student), full, rtol=1e-5, atol=1e-5)


def test_adding_a_constant_to_logits_changes_nothing() -> None:
    teacher, student, shifted = logits(9), logits(10), logits(10, offset=5.0)
    for fitness in FORMULAS:
        torch.testing.assert_close(
            measured(fitness, teacher, student), measured(fitness, teacher, shifted), rtol=1e-5, atol=1e-5
        )


def test_total_variation_of_disjoint_certainties_is_one() -> None:
    certain = torch.full((2, V), -1e4)
    certain[:, 0] = 1e4
    other = certain.roll(1, dims=-1)
    tokens = torch.zeros(2, dtype=torch.long)
    assert measured(TotalVariation(), Logits(certain, tokens), Logits(other, tokens)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["kl", "kl-topk:512", "kl-topk:7", "ppl", "tv"])
def test_a_fitness_is_found_by_its_name(name: str) -> None:
    assert fitness_by_name(name).name == name


def test_top_k_takes_512_tokens_unless_told() -> None:
    assert fitness_by_name("kl-topk") == TopKKL(512)


@pytest.mark.parametrize("name", ["nll", "kl:5", "kl-topk:", "kl-topk:many", "kl-topk:-1", ""])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"expected a fitness of kl, .*, got '{name}'"):
        fitness_by_name(name)


def test_a_top_k_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        fitness_by_name("kl-topk:0")
