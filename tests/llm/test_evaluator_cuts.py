"""How an evaluator cuts its work: losses that depend on nobody else, and less at once where memory runs out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from discopt_llm import evaluator as evaluator_module
from discopt_llm.drop import DropLevels
from discopt_llm.errors import MemoryPlanError
from discopt_llm.evaluator import Evaluator
from discopt_llm.evaluator_plan import Cut, Limits, Plan
from discopt_llm.fitness import KL, Disagreement, Perplexity, TotalVariation
from tests.llm.families import FAMILIES
from tests.llm.test_ends import EndLevels
from tests.llm.test_evaluator import close, loaded, students, text
from tests.llm.test_levels import BankOf, bank_levels, random_profiles

ALL = (KL(), Perplexity(), TotalVariation())
MEMORY = [None, 30_000]


def alone_and_together(measure: Any, population: NDArray[np.integer], rows: NDArray[np.intp]) -> None:
    """Rows have the same losses, to the last bit, in the whole population, in a part of it and alone."""
    together = np.stack(measure(population))
    part = np.stack(measure(population[rows]))
    assert np.array_equal(part, together[:, rows])
    for row in rows[:2]:
        assert np.array_equal(np.stack(measure(population[[row]]))[:, 0], together[:, row])


@pytest.mark.parametrize("memory_bytes", MEMORY)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_losses_of_a_row_do_not_depend_on_the_others(family: str, memory_bytes: int | None) -> None:
    model = loaded(family)
    levels = DropLevels(model.anatomy)
    evaluator = Evaluator(model, levels, memory_bytes=memory_bytes, tokens_per_call=40)
    population, sequences = students(len(levels.names), 3), text(12, 12, 12, 12, 7)
    order = np.random.default_rng(0).permutation(len(population))[:3]
    alone_and_together(lambda rows: evaluator.measure(rows, sequences, ALL), population, order)


@pytest.mark.parametrize("memory_bytes", [None, 6_000])
@pytest.mark.parametrize(("family", "kind"), [("llama", "mixed"), ("mixtral", "quantization")])
def test_the_losses_of_a_row_of_banks_do_not_depend_on_the_others(
    family: str, kind: str, memory_bytes: int | None, bank_of: BankOf
) -> None:
    levels = bank_levels(family, kind, bank_of)
    evaluator = Evaluator(loaded(family), levels, memory_bytes=memory_bytes)
    population, sequences = random_profiles(levels.genome, 7), text(12, 12, 12, 5)
    alone_and_together(lambda rows: evaluator.measure(rows, sequences, ALL), population, np.array([6, 2, 3]))


def test_the_losses_of_a_row_with_ends_of_its_own_do_not_depend_on_the_others() -> None:
    model = loaded("mistral")
    evaluator = Evaluator(model, levels := EndLevels(model), memory_bytes=30_000)
    alone_and_together(
        lambda rows: evaluator.measure(rows, text(12, 12, 12), ALL), levels.students(8), np.array([5, 1, 2])
    )


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([3, 8, 17]), min_size=1, max_size=4),
    memory_bytes=st.integers(3000, 100_000),
    tokens=st.integers(1, 60),
    k=st.integers(2, 6),
    seed=st.integers(0, 1000),
)
def test_any_part_of_a_population_has_the_losses_of_the_whole(
    lengths: list[int], memory_bytes: int, tokens: int, k: int, seed: int
) -> None:
    model = loaded("llama")
    levels = DropLevels(model.anatomy)
    evaluator = Evaluator(model, levels, memory_bytes=memory_bytes, tokens_per_call=tokens)
    population, sequences = students(len(levels.names), k, seed), text(*lengths, seed=seed)
    rows = np.random.default_rng(seed).permutation(len(population))[: 1 + seed % k]
    together = evaluator.measure(population, sequences, [KL()])[0]
    assert np.array_equal(evaluator.measure(population[rows], sequences, [KL()])[0], together[rows])


@settings(max_examples=200, deadline=None)
@given(
    k=st.integers(1, 200),
    length=st.integers(1, 50),
    sequences=st.integers(1, 40),
    state_bytes=st.integers(1, 10**5),
    call_tokens=st.integers(1, 500),
)
def test_a_cut_fits_has_all_rows_and_calls_of_any_population_alike(
    k: int, length: int, sequences: int, state_bytes: int, call_tokens: int
) -> None:
    limits = Limits(state_bytes, 4, call_tokens, 1)
    plan = Plan(np.zeros((k, 1), dtype=np.intp), (), (), np.arange(k), k // 2)
    cut = Cut.of(plan, length, sequences, limits)
    assert sorted(np.concatenate(cut.slices).tolist()) == list(range(k))
    assert plan.teacher in cut.slices[0]
    assert (
        cut.per_call
        == Cut.of(Plan(np.zeros((1, 1), np.intp), (), (), np.arange(1), 0), length, sequences, limits).per_call
    )
    assert cut.per_call <= cut.sequences <= sequences
    assert cut.sequences == sequences or cut.sequences % cut.per_call == 0
    assert cut.per_call == 1 or cut.per_call * length <= call_tokens
    states = max(len(part) + (plan.teacher not in part) for part in cut.slices)
    assert states * cut.sequences * length * 4 <= state_bytes or (cut.per_call == 1 and states <= 2)


# -- out of memory -------------------------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, tokens: int, error: Exception) -> list[int]:
    """Blocks fail on more than so many tokens; the sizes of all calls."""
    real, sizes = evaluator_module.run_block, []

    def run_block(block: Any, hidden: torch.Tensor, arguments: Any) -> torch.Tensor:
        sizes.append(hidden.shape[:2].numel())
        if sizes[-1] > tokens:
            raise error
        return real(block, hidden, arguments)

    monkeypatch.setattr(evaluator_module, "run_block", run_block)
    return sizes


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS)
def test_where_memory_runs_out_half_as_much_is_held_from_then_on(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("llama")
    levels = DropLevels(model.anatomy)
    population, sequences, lines = students(len(levels.names), 6), text(*[12] * 8, 5), list[str]()
    expected = Evaluator(model, levels).measure(population, sequences, ALL)
    evaluator = Evaluator(model, levels, memory_bytes=200_000, say=lines.append)
    sizes = failing(monkeypatch, 30, error)
    for _ in range(2):
        found = evaluator.measure(population, sequences, ALL)
        for losses, plain in zip(found, expected, strict=True):
            close(losses, plain)
    assert lines == [
        "out of memory: hidden states halved to 50.0 KB, calls to at most 32 tokens",
    ]
    assert sum(size > 30 for size in sizes) == len(lines)


def test_what_failed_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("llama")
    levels = DropLevels(model.anatomy)
    population, sequences = students(len(levels.names), 4), text(12, 12, 12, 12)
    plain = Evaluator(model, levels, memory_bytes=10**8)
    plain.measure(population, sequences, ALL)
    evaluator = Evaluator(model, levels, memory_bytes=10**8, say=lambda _: None)
    real, left = Evaluator._score, iter([1])

    def fail(self: Evaluator, *args: Any) -> torch.Tensor:
        if next(left, None):
            raise MemoryError
        return real(self, *args)

    monkeypatch.setattr(Evaluator, "_score", fail)
    evaluator.measure(population, sequences, ALL)
    assert evaluator.counts == plain.counts


def test_one_student_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch, bank_of: BankOf) -> None:
    levels = bank_levels("llama", "quantization", bank_of)
    lines: list[str] = []
    evaluator = Evaluator(loaded("llama"), levels, memory_bytes=10**6, say=lines.append)
    failing(monkeypatch, 0, ERRORS[0])
    kept = levels._resident.memory_bytes
    with pytest.raises(MemoryPlanError, match="out of memory with one student on one sequence of 12 tokens"):
        evaluator.measure(random_profiles(levels.genome, 3), text(12, 12), ALL)
    assert 3 < len(lines) < 40
    assert levels._resident.memory_bytes == kept >> len(lines)
    assert not levels._resident._held


def test_other_errors_come_out_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("llama")
    levels = DropLevels(model.anatomy)
    failing(monkeypatch, 0, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Evaluator(model, levels).measure(students(len(levels.names), 2), text(12), [Disagreement()])
