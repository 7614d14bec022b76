"""Embeddings and heads with levels of their own, against whole models that have their weights, on every family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from discopt_llm.bank import BankLayer
from discopt_llm.drop import DropLevels
from discopt_llm.errors import ModelError
from discopt_llm.evaluator import TEACHER, Evaluator, Row
from discopt_llm.fitness import KL, Perplexity
from discopt_llm.genome import bank_genome
from discopt_llm.layers import EMBEDDING, Layer, layers_for
from discopt_llm.levels import BankLevels
from discopt_llm.models import LoadedModel
from discopt_llm.replay import forward_replaced_, weights_replaced_
from tests.llm import reference
from tests.llm.families import FAMILIES, HIDDEN, LAYERS, VOCABULARY
from tests.llm.test_evaluator import ALL, FORMULAS, close, read, text

STEPS = (0.2, 0.05)  # of the grids that the levels of an end round weights to
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@cache
def loaded(family: str, tied: bool) -> LoadedModel:
    """A model of a family whose head has the embedding's weights, or has its own."""
    model = FAMILIES[family]()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if tied:
        head.weight = embedding.weight
    elif head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.flip(0).clone(), requires_grad=False)
    return read(model)


def ends_of(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def rounded(weight: Tensor, level: int) -> Tensor:
    return (weight / STEPS[level]).round() * STEPS[level]


class EndLevels:
    """Depth pruning, an embedding as the first unit and a head as the last; the first is both if they are tied."""

    def __init__(self, model: LoadedModel) -> None:
        self.drop = DropLevels(model.anatomy)
        self.block_units = tuple(units + 1 for units in self.drop.block_units)
        self.modules = dict(zip((EMBEDDING, LAYERS), ends_of(model.model), strict=True))
        self.tied = self.modules[EMBEDDING].weight is self.modules[LAYERS].weight
        self.n = 1 + len(self.drop.names) + (not self.tied)
        self.end_units = np.array([0]), np.array([0 if self.tied else self.n - 1])
        self.applied: list[tuple[int, Row | None]] = []  # to an end

    def dense_row(self, block: int) -> Row | None:
        return None if block in self.modules else self.drop.dense_row(block)

    def runs(self, block: int, row: Row) -> int:
        return self.drop.runs(block, row)

    @contextmanager
    def applied_(self, block: int, row: Row | None) -> Iterator[None]:
        if block not in self.modules:
            with self.drop.applied_(block, row):
                yield
            return
        self.applied.append((block, row))
        weight, is_changed = self.modules[block].weight, row is not None and row != (TEACHER,)
        with weights_replaced_(self.modules[block], {"weight": rounded(weight, row[0])} if is_changed else {}):
            yield

    def students(self, k: int, seed: int = 0) -> NDArray[np.int16]:
        """Random rows, one of them twice, the dense row, and rows that differ from it in one unit: (k + 5, n)."""
        rng = np.random.default_rng(seed)
        rows = (rng.random((k, self.n)) < 0.75).astype(np.int16)
        ends = np.unique(np.concatenate(self.end_units))
        rows[:, ends] = rng.integers(TEACHER, len(STEPS), (k, len(ends)))
        others = self.dense(4)
        for row, unit in zip(others[1:], [*ends, self.n // 2], strict=False):
            row[unit] = 0
        return np.concatenate([rows, rows[:1], others])

    def dense(self, k: int) -> NDArray[np.int16]:
        rows = np.ones((k, self.n), dtype=np.int16)
        rows[:, np.concatenate(self.end_units)] = TEACHER
        return rows


@torch.no_grad()
def student(model: LoadedModel, levels: EndLevels, row: NDArray[np.integer]) -> PreTrainedModel:
    """A model of its own with the weights of a row, the outputs of dropped sub-blocks zero."""
    copy = deepcopy(model.model)
    ends = ends_of(copy)[:1] if levels.tied else ends_of(copy)
    for units, module in zip(levels.end_units, ends, strict=False):
        if (level := int(row[units[0]])) != TEACHER:
            module.weight.copy_(rounded(module.weight, level))
    for unit, parts in enumerate(levels.drop.units, start=1):
        for name in (name for part in parts for name in part.outputs if not row[unit]):
            copy.get_parameter(name).zero_()
    return copy


# -- parity --------------------------------------------------------------------------------------------------------


@TIED
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_equal_those_of_whole_models_with_these_weights(family: str, tied: bool) -> None:
    model = loaded(family, tied)
    levels = EndLevels(model)
    assert levels.tied == tied
    population, sequences = levels.students(2), text(12, 12, 5)
    found = Evaluator(model, levels).measure(population, sequences, ALL)
    teacher = reference.logits(model.model, sequences)
    students = [reference.logits(student(model, levels, row), sequences) for row in population]
    for losses, plain in zip(found, reference.losses_between(teacher, students, sequences, FORMULAS), strict=True):
        close(losses, plain)
    kl = found[0].mean(axis=1)
    assert kl[3] < 1e-6  # the dense row
    assert min(*kl[:3], *kl[4:6]) > 1e-4
    assert tied or kl[4] != kl[5]  # the embedding's level alone, and the head's


@TIED
def test_the_plain_reference_switches_ends_as_well(tied: bool) -> None:
    model = loaded("gemma2", tied)
    levels = EndLevels(model)
    population, sequences = levels.students(4), text(12, 5)
    found = Evaluator(model, levels).measure(population, sequences, ALL)
    expected = reference.plain_losses(model.model, levels, population, sequences, FORMULAS)
    close(np.stack(found), np.stack(expected))


@TIED
@pytest.mark.parametrize(("memory_bytes", "tokens_per_call"), [(1, 1), (20_000, 1000), (60_000, 30)])
def test_the_result_does_not_depend_on_how_the_work_is_cut(memory_bytes: int, tokens_per_call: int, tied: bool) -> None:
    model = loaded("llama", tied)
    levels = EndLevels(model)
    population, sequences = levels.students(4), text(12, 7, 12)
    whole = Evaluator(model, levels).measure(population, sequences, ALL)
    cut = Evaluator(model, levels, memory_bytes=memory_bytes, tokens_per_call=tokens_per_call)
    for losses, expected in zip(cut.measure(population, sequences, ALL), whole, strict=True):
        close(losses, expected)


@TIED
def test_reordering_rows_reorders_losses(tied: bool) -> None:
    model = loaded("gpt2", tied)
    levels = EndLevels(model)
    population, sequences = levels.students(8), text(12, 12)
    order = np.random.default_rng(0).permutation(len(population))
    evaluator = Evaluator(model, levels)
    (losses,) = evaluator.measure(population, sequences, [KL()])
    (reordered,) = evaluator.measure(population[order], sequences, [KL()])
    assert (reordered == losses[order]).all()


@TIED
def test_a_row_measured_alone_has_the_same_loss(tied: bool) -> None:
    model = loaded("opt", tied)
    levels = EndLevels(model)
    population, sequences = levels.students(5), text(12, 12)
    evaluator = Evaluator(model, levels)
    (together,) = evaluator.measure(population, sequences, [KL()])
    close(together, np.stack([evaluator.measure(row[None], sequences, [KL()])[0][0] for row in population]), 1e-5)


# -- what is shared ------------------------------------------------------------------------------------------------


@TIED
def test_with_the_ends_of_the_teacher_nothing_changes_to_the_last_bit(tied: bool) -> None:
    model = loaded("qwen2", tied)
    levels = EndLevels(model)
    population, sequences = levels.students(9), text(12, 12, 7)
    population[:, np.concatenate(levels.end_units)] = TEACHER
    ends, plain = Evaluator(model, levels, memory_bytes=60_000), Evaluator(model, levels.drop, memory_bytes=60_000)
    found = ends.measure(population, sequences, ALL)
    expected = plain.measure(population[:, 1 : 1 + len(levels.drop.names)], sequences, ALL)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert ends.counts == plain.counts
    assert levels.applied == []


def test_students_with_one_embedding_share_blocks_and_those_with_other_embeddings_share_none() -> None:
    model = loaded("llama", False)
    evaluator = Evaluator(model, levels := EndLevels(model))
    population = levels.dense(4)
    population[:3, 0] = 0, 0, 1
    population[1, 1 + 4] = population[3, 1 + 7] = 0  # the attention of block 2; the MLP of block 3
    evaluator.measure(population, text(10), [KL()])
    # One state under the first embedding until block 2, one under the second, and the teacher's until block 3.
    states = (3, 3, 4, 5)
    assert evaluator.counts.passes == 10 * (2 * sum(states) - 2)
    assert evaluator.counts.plain_passes == 10 * (7 + 7 + 8 + 8 + 8)
    assert evaluator.counts.projected == evaluator.counts.plain_projected == 10 * 5
    assert levels.applied == [(EMBEDDING, (0,)), (EMBEDDING, (1,))]


def test_students_that_differ_in_their_heads_run_through_the_blocks_once() -> None:
    model = loaded("llama", False)
    evaluator = Evaluator(model, levels := EndLevels(model))
    population = levels.dense(5)
    population[:, -1] = 0, 1, 1, TEACHER, 0
    (kl,) = evaluator.measure(population, text(10), [KL()])
    assert kl[3] < 1e-6 < kl[1] < kl[0]
    assert kl[0] == kl[4] and kl[1] == kl[2]
    assert evaluator.counts.passes == 10 * 2 * LAYERS
    assert evaluator.counts.projected == 10 * (1 + 3)
    assert evaluator.counts.plain_projected == 10 * (1 + 5)


@TIED
def test_a_row_of_an_end_is_applied_once_a_walk_and_once_a_chunk_of_logits(tied: bool) -> None:
    model = loaded("mistral", tied)
    evaluator = Evaluator(model, levels := EndLevels(model), memory_bytes=10**7)
    population, sequences = levels.students(20), text(*[100] * 10)
    evaluator.measure(population, sequences, [KL()])
    chunks = -(-1000 // evaluator.limits.logit_rows)
    assert chunks == 2
    expected = [(end, (level,)) for end, times in ((EMBEDDING, 1), (LAYERS, chunks)) for level in (0, 1) * times]
    assert sorted(levels.applied) == sorted(expected)


@TIED
def test_the_model_is_left_as_it_was(tied: bool) -> None:
    model = loaded("gemma2", tied)
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.model.state_dict().items()}
    levels = EndLevels(model)
    Evaluator(model, levels).measure(levels.students(4), text(12, 12), [KL(), Perplexity()])
    for name, value in model.model.state_dict().items():
        assert value.data_ptr() == before[name][0] and torch.equal(value, before[name][1]), name


# -- banks -----------------------------------------------------------------------------------------------------


class GridBank:
    """Stands in for a bank that has forms of the ends: levels round weights to grids."""

    kind, labels = "gguf", ("coarse", "fine")

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.dense = [layer.to_matrices(layer.parameter).clone() for layer in layers]
        self.layers = [
            BankLayer(
                **{field: getattr(layer, field) for field in ("name", "block", "kind", "input", "matrices")},
                **{field: getattr(layer, field) for field in ("rows", "columns", "transposed")},
                present=np.ones(2, dtype=np.bool_),
                weights=np.full(2, layer.weights),
                bits=layer.weights * np.array([4, 8]),
                bytes=layer.weights * np.array([4, 8]) // 8,
                errors=np.array([0.5, 0.1]),
                outliers={},
            )
            for layer in layers
        ]

    def check_model(self, fingerprint: str, layers: Sequence[Layer]) -> None:
        assert [layer.name for layer in self.layers] == [layer.name for layer in layers]

    def weights(self, layer: int, level: int, device: torch.device) -> Tensor:
        return rounded(self.dense[layer], level).to(device)


def bank_levels(family: str, tied: bool, unit: str = "layer") -> BankLevels:
    model = loaded(family, tied)
    layers = layers_for(model, "gguf")
    bank: Any = GridBank(layers)
    outside = model.model.num_parameters() - sum(layer.weights for layer in layers)
    return BankLevels(model, layers, bank_genome(bank.layers, bank.labels, "gguf", unit, outside), [bank])


def profiles(levels: BankLevels, k: int) -> NDArray[np.int16]:
    """Random levels, and rows in which one end alone differs from the teacher: (k + 2, n)."""
    rows = np.random.default_rng(0).integers(0, 2, (k + 2, levels.genome.n)).astype(np.int16)
    rows[k:] = TEACHER
    rows[k, levels.end_units[0]] = rows[k + 1, levels.end_units[1]] = 0
    return rows


@TIED
@pytest.mark.parametrize(
    ("family", "unit"), [("llama", "runtime"), ("gemma2", "layer"), ("gpt2", "layer"), ("opt", "layer")]
)
def test_banks_with_forms_of_the_ends_equal_whole_models(family: str, unit: str, tied: bool) -> None:
    model, levels = loaded(family, tied), bank_levels(family, tied, unit)
    population, sequences = profiles(levels, 2), text(12, 5)
    found = Evaluator(model, levels).measure(population, sequences, ALL)
    students = []
    for profile in population:
        copy = deepcopy(model.model)
        for unit_layers, level in zip(levels.genome.layers, profile.tolist(), strict=True):
            for layer in (levels.layers[i] for i in unit_layers if level != TEACHER):
                copy.get_parameter(layer.parameter_name).copy_(rounded(layer.parameter, level))
        students.append(reference.logits(copy, sequences))
    teacher = reference.logits(model.model, sequences)
    expected = reference.losses_between(teacher, students, sequences, FORMULAS)
    close(np.stack(found), np.stack(expected))


@TIED
def test_the_weights_of_a_profile_name_those_of_the_ends_and_a_tied_one_once(tied: bool) -> None:
    levels = bank_levels("llama", tied)
    (profile, *_, head) = profiles(levels, 1)
    named = levels.weights(profile)
    inside = [layer.parameter_name for layer in loaded("llama", tied).layers]
    expected = ["model.embed_tokens.weight", *inside, *([] if tied else ["lm_head.weight"])]
    assert [*named] == expected
    assert [*levels.weights(head)] == [expected[0] if tied else expected[-1]]
    with levels.applied_(LAYERS, (profile[levels.end_units[1][0]],)):
        applied = loaded("llama", tied).model.lm_head.weight.clone()
    assert torch.equal(applied, levels.parameter(*named[expected[0] if tied else expected[-1]]))
    assert not levels.dropped(profile).any()


@TIED
def test_the_ends_count_among_the_bytes_a_tied_one_once(tied: bool) -> None:
    levels = bank_levels("llama", tied)
    model, n = loaded("llama", tied).model, levels.genome.n
    ends = levels.genome.costs.dense[np.unique(np.concatenate(levels.end_units))]
    assert ends.tolist() == [VOCABULARY * HIDDEN] * (1 if tied else 2)
    assert levels.bytes_of(model, np.full(n, TEACHER)) == 2 * model.num_parameters()
    fine, coarse = np.ones(n, dtype=np.int16), np.ones(n, dtype=np.int16)
    coarse[np.concatenate(levels.end_units)] = 0
    assert levels.bytes_of(model, fine) - levels.bytes_of(model, coarse) == ends.sum() // 2


@TIED
def test_an_end_is_unpacked_once_for_all_that_use_it(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = bank_levels("llama", tied)
    names: list[str] = []
    real = BankLevels.parameter
    monkeypatch.setattr(
        BankLevels, "parameter", lambda self, layer, form: names.append(layer.name) or real(self, layer, form)
    )
    population = np.full((2, levels.genome.n), TEACHER, dtype=np.int16)
    population[:, np.concatenate(levels.end_units)] = [[0], [1]]
    for _ in range(2):
        Evaluator(loaded("llama", tied), levels).measure(population, text(12, 5), ALL)
    assert sorted(names) == sorted(2 * ["model.embed_tokens", *([] if tied else ["lm_head"])])


# -- refusals ------------------------------------------------------------------------------------------------------


def test_a_model_whose_blocks_are_told_of_the_embedding_is_refused_where_that_differs() -> None:
    model = read(FAMILIES["llama"]())
    rotary, embedding = model.model.model.rotary_emb, model.model.get_input_embeddings()
    plain = rotary.forward

    def told(*args: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = plain(*args, **kwargs)
        return cos + embedding.weight.mean(), sin

    levels = EndLevels(model)
    population, others = levels.dense(2), levels.dense(2)
    population[0, 0], others[0, -1], others[1, 3] = 1, 1, 0
    with forward_replaced_(rotary, told):
        (kl,) = Evaluator(model, levels).measure(others, text(12), [KL()])
        assert kl.min() > 1e-6
        match = r"cannot switch the embedding of LlamaForCausalLM: .* model\.layers\.0 .* depends on the embedding"
        with pytest.raises(ModelError, match=match):
            Evaluator(model, levels).measure(population, text(12), [KL()])


def test_a_population_without_the_units_of_the_ends_is_refused() -> None:
    model = loaded("llama", False)
    levels = EndLevels(model)
    with pytest.raises(ValueError, match=r"shape \(k, 10\), got \(3, 8\)"):
        Evaluator(model, levels).measure(levels.dense(3)[:, 1:-1], text(12), [KL()])
