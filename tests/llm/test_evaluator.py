"""The evaluator against one whole forward per student, on every family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from discopt_llm.anatomy import read_anatomy
from discopt_llm.drop import DropLevels, Unit
from discopt_llm.evaluator import Evaluator, Row
from discopt_llm.fitness import KL, Disagreement, Fitness, Logits, Perplexity, TopKKL, TotalVariation
from discopt_llm.models import LoadedModel
from tests.llm import reference
from tests.llm.families import FAMILIES, LAYERS, VOCABULARY, tiny, tiny_tokenizer

ALL = (KL(), TopKKL(20), Perplexity(), TotalVariation())
FORMULAS = (reference.kl, reference.kl_top(20), reference.negative_log_likelihood, reference.total_variation)


def read(model: PreTrainedModel) -> LoadedModel:
    return LoadedModel(model, tiny_tokenizer(), "test", read_anatomy(model))


@cache
def loaded(family: str) -> LoadedModel:
    return read(FAMILIES[family]())


def text(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY - 4, (length,), generator=generator) for length in lengths]


def students(n: int, k: int, seed: int = 0) -> NDArray[np.int16]:
    """Random rows, some of them twice, the dense row, and the row without anything: (k + 5, n)."""
    rng = np.random.default_rng(seed)
    rows = (rng.random((k, n)) < 0.75).astype(np.int16)
    return np.concatenate([rows, rows[:3], np.ones((1, n), np.int16), np.zeros((1, n), np.int16)])


def close(found: NDArray[np.float64], expected: NDArray[np.float64], tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("unit", get_args(Unit))
@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_one_whole_forward_per_student(family: str, unit: Unit) -> None:
    model = loaded(family)
    levels = DropLevels(model.anatomy, unit)
    population, sequences = students(len(levels.names), 4), text(12, 12, 12, 5)
    found = Evaluator(model, levels).measure(population, sequences, ALL)
    expected = reference.plain_losses(model.model, levels, population, sequences, FORMULAS)
    for losses, plain in zip(found, expected, strict=True):
        assert losses.shape == (len(population), len(sequences))
        assert losses.dtype == np.float64
        close(losses, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_row_has_no_divergence_and_others_have(family: str) -> None:
    model = loaded(family)
    levels = DropLevels(model.anatomy)
    (kl,) = Evaluator(model, levels).measure(students(len(levels.names), 3), text(12, 12), [KL()])
    assert kl[-2].max() < 1e-6
    assert kl[[0, 1, 2, -1]].min() > 1e-3


def test_the_mean_over_sequences_is_the_mean_over_positions() -> None:
    model = loaded("llama")
    levels = DropLevels(model.anatomy)
    population, sequences = students(len(levels.names), 2), text(16, 16, 3, 1)
    kl, nll = Evaluator(model, levels).measure(population, sequences, [KL(), Perplexity()])
    plain_kl, plain_nll = (
        np.stack(
            [
                reference.plain_losses(model.model, levels, population, [ids], [formula])[0][:, 0] * positions
                for ids, positions in zip(sequences, counted, strict=True)
                if positions
            ]
        ).sum(axis=0)
        / sum(counted)
        for formula, counted in ((reference.kl, (16, 16, 3, 1)), (reference.negative_log_likelihood, (15, 15, 2, 0)))
    )
    close(kl.mean(axis=1), plain_kl)
    close(nll.mean(axis=1), plain_nll)


@pytest.mark.parametrize("memory_bytes", [1, 20_000, 60_000, 200_000])
@pytest.mark.parametrize("tokens_per_call", [1, 30, 1000])
def test_the_result_does_not_depend_on_how_the_work_is_cut(memory_bytes: int, tokens_per_call: int) -> None:
    model = loaded("qwen2")
    levels = DropLevels(model.anatomy)
    population, sequences = students(len(levels.names), 9), text(12, 7, 12, 12, 12, 12)
    whole = Evaluator(model, levels).measure(population, sequences, ALL)
    cut = Evaluator(model, levels, memory_bytes=memory_bytes, tokens_per_call=tokens_per_call)
    for losses, expected in zip(cut.measure(population, sequences, ALL), whole, strict=True):
        close(losses, expected)


def test_less_memory_means_less_sharing_and_no_more_work_than_plain() -> None:
    model = loaded("llama")
    levels = DropLevels(model.anatomy)
    population, sequences = students(len(levels.names), 20)[:20], text(12, 12, 12)
    passes = []
    for memory_bytes in (1, 50_000, 10**8):
        evaluator = Evaluator(model, levels, memory_bytes=memory_bytes)
        evaluator.measure(population, sequences, [KL()])
        passes.append(evaluator.counts.passes)
    assert passes[0] > passes[1] > passes[2]
    assert passes[0] <= evaluator.counts.plain_passes


@pytest.mark.parametrize("memory_bytes", [30_000, None])
def test_hidden_states_stay_within_their_share_of_the_memory(
    memory_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("llama")
    levels = DropLevels(model.anatomy)
    evaluator = Evaluator(model, levels, memory_bytes=memory_bytes)
    held = []
    step = evaluator._step

    def watched(*args: Any) -> list[Tensor]:
        states = step(*args)
        storages = {state.untyped_storage().data_ptr(): state.untyped_storage().nbytes() for state in states}
        held.append(sum(storages.values()))
        return states

    monkeypatch.setattr(evaluator, "_step", watched)
    evaluator.measure(students(len(levels.names), 20), text(*[12] * 8), [KL()])
    rows, tokens, width = 23, 8 * 12, model.anatomy.blocks[0].form.width
    assert max(held) <= (15_000 if memory_bytes else rows * tokens * width * 4)


def test_reordering_rows_reorders_losses() -> None:
    model = loaded("gpt2")
    levels = DropLevels(model.anatomy)
    population, sequences = students(len(levels.names), 8), text(12, 12)
    order = np.random.default_rng(0).permutation(len(population))
    evaluator = Evaluator(model, levels)
    (losses,) = evaluator.measure(population, sequences, [KL()])
    (reordered,) = evaluator.measure(population[order], sequences, [KL()])
    assert (reordered == losses[order]).all()


def test_a_row_measured_alone_has_the_same_loss() -> None:
    model = loaded("olmoe")
    levels = DropLevels(model.anatomy)
    population, sequences = students(len(levels.names), 5), text(12, 12)
    evaluator = Evaluator(model, levels)
    (together,) = evaluator.measure(population, sequences, [KL()])
    alone = [evaluator.measure(row[None], sequences, [KL()])[0][0] for row in population]
    close(together, np.stack(alone), 1e-5)


def test_equal_rows_are_computed_once() -> None:
    model = loaded("llama")
    levels = DropLevels(model.anatomy)
    row = np.array([[1, 0, 1, 1, 1, 1, 0, 1]], dtype=np.int16)
    counts = []
    for copies in (1, 5):
        evaluator = Evaluator(model, levels)
        losses = evaluator.measure(np.repeat(row, copies, axis=0), text(12), [KL()])[0]
        assert (losses == losses[0]).all()
        counts.append((evaluator.counts.passes, evaluator.counts.projected))
    assert counts[0] == counts[1]


def test_the_passes_that_remain_are_those_after_the_first_difference() -> None:
    model = loaded("llama")
    evaluator = Evaluator(model, DropLevels(model.anatomy))
    population = np.ones((2, 2 * LAYERS), dtype=np.int16)
    population[0, 4] = population[1, 7] = 0  # the attention of block 2, the MLP of block 3
    evaluator.measure(population, text(10), [KL()])
    # Blocks 0 and 1 once, block 2 for two classes, block 3 for each of the two students and the teacher.
    assert evaluator.counts.passes == 10 * (2 + 2 + (1 + 2) + (2 + 1 + 2))
    assert evaluator.counts.plain_passes == 10 * (7 + 7 + 8)
    assert evaluator.counts.projected == evaluator.counts.plain_projected == 10 * 3
    assert evaluator.counts.share == 12 / 22


def test_a_block_without_sub_blocks_is_not_run() -> None:
    model = loaded("llama")
    calls = []
    hook = model.anatomy.blocks[1].mlp.modules[0].register_forward_hook(lambda *_: calls.append(1))
    evaluator = Evaluator(model, DropLevels(model.anatomy, "block"))
    try:
        evaluator.measure(np.array([[1, 0, 1, 1]], dtype=np.int16), text(10), [KL()])
    finally:
        hook.remove()
    assert len(calls) == 1  # of the teacher


def test_a_block_that_does_something_without_its_sub_blocks_is_run() -> None:
    model = read(tiny("OPT", do_layer_norm_before=False))  # the norms are on the residual stream
    assert not any(block.transparent for block in model.anatomy.blocks)
    levels = DropLevels(model.anatomy, "block")
    population, sequences = students(LAYERS, 4), text(12)
    (found,) = Evaluator(model, levels).measure(population, sequences, [KL()])
    (expected,) = reference.plain_losses(model.model, levels, population, sequences, [reference.kl])
    close(found, expected)


def test_the_model_is_left_as_it_was() -> None:
    model = loaded("gemma2")
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    forwards = {name: module.forward for name, module in model.model.named_modules()}
    ids = text(12)[0][None]
    logits = model.model(input_ids=ids).logits
    levels = DropLevels(model.anatomy)
    Evaluator(model, levels).measure(students(len(levels.names), 4), text(12, 12), ALL)
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())
    assert {name: module.forward for name, module in model.model.named_modules()} == forwards
    assert torch.equal(model.model(input_ids=ids).logits, logits)


@dataclass(frozen=True)
class SquaredDistance:
    """A fitness of a user's own: mean squared difference of centred logits."""

    name: str = "squared error"
    predicts: bool = False

    def target(self, teacher: Logits) -> Tensor:
        return teacher.values - teacher.values.mean(dim=-1, keepdim=True)

    def losses(self, target: Tensor, student: Logits) -> Tensor:
        return (student.values - student.values.mean(dim=-1, keepdim=True) - target).square().mean(dim=-1)


def test_a_fitness_of_ones_own_plugs_in() -> None:
    def formula(teacher: Tensor, student: Tensor, _: Tensor) -> Tensor:
        return (teacher - student).var(dim=-1, correction=0)

    model = loaded("phi3")
    levels = DropLevels(model.anatomy)
    population, sequences = students(len(levels.names), 4), text(12, 6)
    fitness: Fitness = SquaredDistance()
    (found,) = Evaluator(model, levels).measure(population, sequences, [fitness])
    (expected,) = reference.plain_losses(model.model, levels, population, sequences, [formula])
    close(found, expected)


class ScaledLevels:
    """A stand-in for a bank: levels are weights, and the teacher's are none of them.

    One unit for the attention and one for the MLP of each block; level l scales their output by 0.6 + 0.2 l.
    """

    def __init__(self, anatomy: Any) -> None:
        self.blocks = anatomy.blocks
        self.block_units = tuple(np.array([2 * b, 2 * b + 1]) for b in range(len(self.blocks)))
        self.end_units = (np.empty(0, dtype=np.intp), np.empty(0, dtype=np.intp))
        self.loads: list[tuple[int, Row | None]] = []

    def dense_row(self, block: int) -> Row | None:
        return None

    def runs(self, block: int, row: Row) -> int:
        return 2

    @contextmanager
    def applied_(self, block: int, row: Row | None) -> Iterator[None]:
        self.loads.append((block, row))
        parts = (self.blocks[block].attention, self.blocks[block].mlp)
        kept: list[tuple[Tensor, Tensor]] = []
        for part, level in zip(parts, row or (), strict=row is not None):
            for name in part.outputs:
                weight = self.blocks[block].module.get_parameter(name.removeprefix(f"{self.blocks[block].name}."))
                kept.append((weight, weight.clone()))
                weight.mul_(0.6 + 0.2 * level)
        try:
            yield
        finally:
            for weight, value in kept:
                weight.copy_(value)


@pytest.mark.parametrize("memory_bytes", [1, None])
def test_levels_that_are_weights_plug_in(memory_bytes: int | None) -> None:
    model = loaded("mistral")
    levels = ScaledLevels(model.anatomy)
    population = np.random.default_rng(0).integers(0, 2, (5, 2 * LAYERS)).astype(np.int16)
    population[3:, :4] = population[0, :4]
    sequences = text(12, 12, 5)
    found = Evaluator(model, levels, memory_bytes=memory_bytes).measure(population, sequences, ALL)
    expected = reference.plain_losses(model.model, levels, population, sequences, FORMULAS)
    for losses, plain in zip(found, expected, strict=True):
        close(losses, plain)


def test_each_row_of_a_block_is_loaded_once_per_walk() -> None:
    model = loaded("mistral")
    levels = ScaledLevels(model.anatomy)
    population = np.random.default_rng(1).integers(0, 2, (12, 2 * LAYERS)).astype(np.int16)
    Evaluator(model, levels).measure(population, text(12, 12), [KL()])
    assert len(levels.loads) == len(set(levels.loads))
    assert {row for _, row in levels.loads} >= {None, (0, 0), (1, 1)}


def test_agreement_is_one_minus_disagreement() -> None:
    model = loaded("llama")
    levels = DropLevels(model.anatomy)
    population, sequences = students(len(levels.names), 4), text(12, 12)
    (found,) = Evaluator(model, levels).measure(population, sequences, [Disagreement()])
    (expected,) = reference.plain_losses(model.model, levels, population, sequences, [reference.disagreement])
    assert (found[-2] == 0).all()
    close(found, expected)


def test_without_a_fitness_only_the_blocks_are_run() -> None:
    model = loaded("llama")
    levels = DropLevels(model.anatomy)
    evaluator = Evaluator(model, levels)
    assert evaluator.measure(students(len(levels.names), 4), text(12), []) == []
    assert evaluator.counts.passes > 0
    assert evaluator.counts.projected == 0


def test_an_empty_population_has_no_losses() -> None:
    model = loaded("llama")
    levels = DropLevels(model.anatomy)
    (losses,) = Evaluator(model, levels).measure(np.empty((0, len(levels.names)), np.int16), text(12, 5), [KL()])
    assert losses.shape == (0, 2)


def test_half_precision_comes_close_to_the_reference() -> None:
    model = read(tiny("Llama").to(torch.bfloat16))
    levels = DropLevels(model.anatomy)
    population, sequences = students(len(levels.names), 4), text(12, 12)
    (found,) = Evaluator(model, levels).measure(population, sequences, [KL()])
    (expected,) = reference.plain_losses(model.model, levels, population, sequences, [reference.kl])
    np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.01)


def test_what_does_not_fit_is_refused() -> None:
    model = loaded("llama")
    levels = DropLevels(model.anatomy)
    evaluator = Evaluator(model, levels)
    dense = np.ones((1, len(levels.names)), dtype=np.int16)
    with pytest.raises(ValueError, match=r"shape \(k, 8\), got \(1, 7\)"):
        evaluator.measure(dense[:, 1:], text(12), [KL()])
    with pytest.raises(ValueError, match=r"got torch.int64 of shape \(1, 12\)"):
        evaluator.measure(dense, [text(12)[0][None]], [KL()])
    with pytest.raises(ValueError, match=r"kl needs a position to measure, got sequences of \[\]"):
        evaluator.measure(dense, [], [KL()])
    with pytest.raises(ValueError, match=r"ppl needs a position to measure, got sequences of \[1, 1\]"):
        evaluator.measure(dense, text(1, 1), [Perplexity()])
    with pytest.raises(ValueError, match="memory_bytes must be at least 1, got 0"):
        Evaluator(model, levels, memory_bytes=0)
    three = replace(model.anatomy, blocks=model.anatomy.blocks[:3])
    with pytest.raises(ValueError, match="levels for 4 blocks, got 3"):
        Evaluator(model, DropLevels(three))


def test_a_fitness_that_answers_one_number_is_refused() -> None:
    @dataclass(frozen=True)
    class OneNumber(SquaredDistance):
        def losses(self, target: Tensor, student: Logits) -> Tensor:
            return super().losses(target, student).mean()

    model = loaded("llama")
    levels = DropLevels(model.anatomy)
    with pytest.raises(ValueError, match=r"squared error must give losses of shape \(12,\), got \(\)"):
        Evaluator(model, levels).measure(np.ones((1, len(levels.names)), np.int16), text(12), [OneNumber()])
