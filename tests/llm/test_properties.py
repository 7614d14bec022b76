"""What holds for any population, any packed form, any budget and any profile of the adapter."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from discopt import BudgetError
from discopt_llm import ggml
from discopt_llm.anatomy import read_anatomy
from discopt_llm.bank import BankLayer, Form, Ggml, form_costs
from discopt_llm.bank_forms import dense_weights, form_shape, from_parts, quantized_costs, to_parts
from discopt_llm.budget import MEASURES, Budget
from discopt_llm.drop import DropLevels
from discopt_llm.evaluator import TEACHER, Evaluator
from discopt_llm.fitness import KL, Perplexity, TopKKL
from discopt_llm.genome import Genome, bank_genome
from discopt_llm.models import LoadedModel
from discopt_llm.packing import pack_bits, packed_size, unpack_bits
from discopt_llm.profile import BankReference, Profile
from discopt_llm.profile_text import (
    LABEL_PATTERNS,
    decisions_from_levels,
    decisions_from_text,
    labels_from_levels,
    labels_from_text,
    levels_from_decisions,
    levels_from_labels,
    number_of_units,
    text_from_decisions,
    text_from_labels,
)
from tests.facts import Facts
from tests.llm import handmade
from tests.llm.families import FAMILIES, VOCABULARY, tiny_tokenizer

MANY = 400  # examples of each fact in the slow test
MODELS = ("llama", "gpt2", "mixtral")
ALL = (KL(), TopKKL(20), Perplexity())
LARGEST = 2**53  # integers of a manifest

facts = Facts()


# the evaluator


@cache
def loaded(family: str) -> LoadedModel:
    model = FAMILIES[family]()
    return LoadedModel(model, tiny_tokenizer(), "test", read_anatomy(model))


@cache
def evaluator(family: str, memory_bytes: int | None = None, tokens_per_call: int | None = None) -> Evaluator:
    model = loaded(family)
    levels = DropLevels(model.anatomy)
    return Evaluator(model, levels, memory_bytes=memory_bytes, tokens_per_call=tokens_per_call)


@cache
def text(*lengths: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(VOCABULARY - 4, (length,), generator=generator) for length in lengths)


def students(data: st.DataObject, family: str) -> NDArray[np.int16]:
    """Random rows, the teacher's level here and there: (k, n)."""
    n = len(DropLevels(loaded(family).anatomy).names)
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    rows = (rng.random((data.draw(st.integers(1, 7)), n)) < 0.75).astype(np.int16)
    rows[rng.random(rows.shape) < data.draw(st.sampled_from([0, 0.2]))] = TEACHER
    return rows


@facts(12)
def test_a_loss_does_not_depend_on_the_other_rows_or_their_order_and_on_the_memory_by_rounding(
    data: st.DataObject,
) -> None:
    family = data.draw(st.sampled_from(MODELS))
    sequences = text(*data.draw(st.sampled_from([(8, 8, 5), (12,), (6, 6)])))
    rows, others = students(data, family), students(data, family)
    order = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=9)))
    memory = data.draw(st.sampled_from([(None, None), (1, 4), (60_000, 30)]))
    expected = evaluator(family, *memory).measure(rows, sequences, ALL)
    again = evaluator(family, *memory).measure(np.concatenate([others, rows[order]]), sequences, ALL)
    whole = evaluator(family).measure(rows, sequences, ALL)
    for losses, found, other in zip(expected, again, whole, strict=True):
        np.testing.assert_array_equal(found[len(others) :], losses[order])
        np.testing.assert_allclose(losses, other, rtol=2e-5, atol=2e-5)


# packed forms


@facts(150)
def test_packed_codes_come_back(data: st.DataObject) -> None:
    bits = data.draw(st.integers(1, 8))
    shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 8, 63, 64, 65]), max_size=3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    codes = torch.randint(0, 1 << bits, tuple(shape), dtype=torch.uint8, generator=generator)
    packed = pack_bits(codes, bits)
    assert packed.shape == (packed_size(codes.numel(), bits),)
    assert torch.equal(unpack_bits(packed, bits, codes.numel()).view(codes.shape), codes)
    shifted = torch.cat([packed.new_zeros(3), packed])[3:]  # not at a multiple of 8 bytes, as in a file
    assert torch.equal(unpack_bits(shifted, bits, codes.numel()).view(codes.shape), codes)


@st.composite
def forms(draw: st.DrawFn) -> Form:
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 70))
    seed = draw(st.integers(0, 99))
    match draw(st.sampled_from(["quantized", "sparse", "ggml"])):
        case "quantized":
            bits, group_size = draw(st.integers(1, 8)), draw(st.integers(1, shape[2] + 2))
            return handmade.quantized(shape, bits, group_size, draw(st.booleans()), seed)
        case "sparse":
            kept = draw(st.integers(0, shape[0] * shape[1] * shape[2]))
            return handmade.sparse(shape, kept, draw(st.sampled_from([torch.float16, torch.bfloat16])), seed)
    name = draw(st.sampled_from(list(ggml.types())))
    columns = ggml.types()[name].weights * draw(st.integers(1, 3))
    size = ggml.types()[name].row_bytes(columns)
    generator = torch.Generator().manual_seed(seed)
    return Ggml(name, torch.randint(0, 256, (*shape[:2], size), dtype=torch.uint8, generator=generator), columns)


@facts(150)
def test_stored_forms_come_back_bit_by_bit_at_the_cost_they_were_said_to_have(data: st.DataObject) -> None:
    form = data.draw(forms())
    parts, described = to_parts(form)
    again = from_parts(parts.__getitem__, described, form_shape(form), handmade.CPU)
    assert handmade.same(form, again)
    assert sum(part.numel() * part.element_size() for part in parts.values()) == form_costs(form).bytes
    if not isinstance(form, Ggml):  # random bytes are NaN in some of its types
        assert torch.equal(dense_weights(form), dense_weights(again))


# budgets


@facts(300)
def test_a_budget_is_what_was_written(data: st.DataObject) -> None:
    measure = data.draw(st.sampled_from(MEASURES))
    number = Fraction(data.draw(st.integers(1, 10**12)), 10 ** data.draw(st.integers(0, 12)))
    budget = Budget(measure, number % 1 if measure == "sparsity" else number)
    assert Budget.parse(measure, str(budget)) == budget
    text = data.draw(st.text(st.sampled_from("0123456789.xX%KMGTiBb "), max_size=9))
    try:
        read = Budget.parse(measure, text)
    except ValueError as error:
        assert repr(text) in str(error)  # noqa: PT017
    else:
        assert Budget.parse(measure, str(read)) == read


@st.composite
def genomes(draw: st.DrawFn) -> Genome:
    """Of layers of any size that a manifest may state, at some widths; several layers are a unit here and there."""
    widths = sorted(draw(st.sets(st.integers(2, 8), min_size=1, max_size=5)))
    size = draw(st.sampled_from([10, 2**16, 2**22]))
    layers = []
    for i in range(draw(st.integers(1, 6))):
        shape = draw(st.integers(1, 3)), draw(st.integers(1, size)), draw(st.integers(1, size))
        forms = [quantized_costs(*shape, bits, draw(st.sampled_from([None, 32])), symmetric=False) for bits in widths]
        layers.append(_layer(f"layers.{i // 3}.{'abc'[i % 3]}", i // 3, i % 3 // 2, shape, forms))
    unit = draw(st.sampled_from(["layer", "runtime"]))
    return bank_genome(layers, [str(bits) for bits in widths], "quantization", unit, draw(st.integers(0, 2**40)))


def _layer(name: str, block: int, input: int, shape: tuple[int, int, int], costs: list[Any]) -> BankLayer:
    return BankLayer(
        name=name,
        block=block,
        kind="mlp",
        input=input,
        matrices=shape[0],
        rows=shape[1],
        columns=shape[2],
        transposed=False,
        present=np.ones(len(costs), dtype=np.bool_),
        weights=np.array([cost.weights for cost in costs]),
        bits=np.array([cost.bits for cost in costs]),
        bytes=np.array([cost.bytes for cost in costs]),
        errors=np.linspace(1, 0.1, len(costs)),
        outliers={"3": 0.1},
    )


@facts(120)
def test_a_profile_is_in_the_space_where_its_measure_meets_the_budget_and_nowhere_else(data: st.DataObject) -> None:
    genome = data.draw(genomes())
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = np.stack([rng.integers(0, genome.costs.weights.shape[1], size=genome.n, dtype=np.int16) for _ in range(4)])
    measure = data.draw(st.sampled_from(["bits", "bpw", "size"]))
    relative = measure == "size" and data.draw(st.booleans())
    met = [genome.costs.measures(row)[measure if relative or measure != "size" else "bytes"] for row in rows]
    amount = met[0] - data.draw(st.sampled_from([0, 0, Fraction(1, 10**9), Fraction(1)]))
    assume(amount > 0)
    budget = Budget(measure, amount, relative)
    try:
        space = genome.space(budget, data.draw(st.sampled_from(["size", "none", "name"])))
    except BudgetError:  # out of the levels' range
        exact = [
            genome.costs.measures(np.full(genome.n, level))[_key(budget)]
            for level in (0, genome.costs.weights.shape[1] - 1)
        ]
        assert amount < exact[0]
        return
    assert space.feasible(rows).tolist() == [value <= amount for value in met]
    for row in (*space.random(3, rng), space.nearest_uniform()):
        assert genome.costs.measures(row)[_key(budget)] <= amount
    kept = {name: getattr(genome.costs, name)[np.arange(genome.n), rows[1]].tolist() for name in ("bits", "bytes")}
    dense = sum(genome.costs.dense.tolist())
    assert genome.costs.measures(rows[1])["bits"] == Fraction(sum(kept["bits"]), dense)
    assert genome.costs.measures(rows[1])["bpw"] == Fraction(8 * sum(kept["bytes"]), dense)


def _key(budget: Budget) -> str:
    return "bytes" if budget.measure == "size" and not budget.relative else budget.measure


# profiles

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
NAMES = st.from_regex(r"[A-Za-zé_][\w.\-\[\]é]{0,11}", fullmatch=True)


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    kind = draw(st.sampled_from(["drop", *LABEL_PATTERNS]))
    names = tuple(draw(st.lists(WORDS, min_size=1, max_size=8, unique=True)))
    banks = {"drop": 0, "mixed": draw(st.integers(1, 2))}.get(kind, 1)
    labels = () if kind == "drop" else tuple(draw(st.from_regex(LABEL_PATTERNS[kind], fullmatch=True)) for _ in names)
    return Profile(
        kind=kind,
        unit=draw(st.sampled_from(["sublayer", "block", "pair"] if kind == "drop" else ["layer", "runtime"])),
        model_source=draw(WORDS),
        model_fingerprint=draw(WORDS),
        names=names,
        levels=np.array([draw(st.integers(0, 1 if kind == "drop" else 2**15 - 1)) for _ in names]),
        banks=tuple(BankReference(draw(WORDS), f"{i}{draw(WORDS)}") for i in range(banks)),
        labels=labels,
    )


@facts(120)
def test_a_profile_comes_back_from_its_file(data: st.DataObject) -> None:
    profile = data.draw(profiles())
    again = Profile.from_json(profile.to_json())
    for field, value in vars(profile).items():
        np.testing.assert_array_equal(getattr(again, field), value)
    assert again.to_json() == profile.to_json()


@facts(100)
def test_drop_decisions_come_back_from_text_and_levels(data: st.DataObject) -> None:
    blocks, unit = data.draw(st.integers(1, 9)), data.draw(st.sampled_from(["sublayer", "block", "pair"]))
    n = number_of_units(blocks, unit)
    levels = np.array(data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)), dtype=np.int16)
    decisions = decisions_from_levels(levels, unit, blocks)
    read = decisions_from_text(text_from_decisions(decisions), blocks)
    np.testing.assert_array_equal(read, decisions)
    np.testing.assert_array_equal(levels_from_decisions(read, unit), levels)


@facts(100)
def test_labels_come_back_from_text_and_levels(data: st.DataObject) -> None:
    pattern = LABEL_PATTERNS[data.draw(st.sampled_from(sorted(LABEL_PATTERNS)))]
    names = data.draw(st.lists(NAMES, min_size=2, max_size=8, unique=True))
    cut = data.draw(st.integers(1, len(names) - 1))
    units = [names[:cut], *([name] for name in names[cut:])]
    label = st.from_regex(pattern, fullmatch=True)
    known = [data.draw(st.lists(label, min_size=1, max_size=4, unique=True)) for _ in units]
    levels = np.array([data.draw(st.integers(0, len(row) - 1)) for row in known], dtype=np.int16)
    labels = labels_from_levels(levels, units, known)
    read = labels_from_text(text_from_labels(labels))
    assert read == labels
    np.testing.assert_array_equal(levels_from_labels(read, units, known), levels)


@pytest.mark.slow
@pytest.mark.parametrize("name", facts.names)
def test_it_also_holds_on_many_more(name: str) -> None:
    facts.check(name, MANY)
