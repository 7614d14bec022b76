"""Units and their levels: exact costs, ties of runtime units, and the union of kinds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discopt.errors import BudgetError
from discopt_llm.bank import Bank, BankLayer
from discopt_llm.budget import Budget
from discopt_llm.genome import DROP_LABEL, Form, Genome, bank_genome, mixed_genome
from tests.llm.banks import KINDS
from tests.llm.families import FAMILIES, LAYERS

BankOf = Callable[[str, str], Bank]
REST = 1000


def genome_of(family: str, kind: str, bank_of: BankOf, unit: str = "layer", *, drop: bool = True) -> Genome:
    if kind == "mixed":
        banks = [bank_of(family, kind) for kind in KINDS]
        return mixed_genome({bank.kind: (bank.layers, bank.labels) for bank in banks}, unit, REST, drop=drop)
    bank = bank_of(family, kind)
    return bank_genome(bank.layers, bank.labels, kind, unit, REST)


def layer(
    name: str,
    bytes: Sequence[int],
    errors: Sequence[float],
    *,
    block: int = 0,
    kind: Any = "attention",
    input: int = 0,
    present: Sequence[bool] | None = None,
) -> BankLayer:
    """A layer of 8 x 16 weights."""
    m = len(bytes)
    has = np.array(present or [True] * m)
    return BankLayer(
        name=name,
        block=block,
        kind=kind,
        input=input,
        matrices=1,
        rows=8,
        columns=16,
        transposed=False,
        present=has,
        weights=np.where(has, 128, 0),
        bits=np.where(has, 8 * np.array(bytes), 0),
        bytes=np.where(has, bytes, 0),
        errors=np.where(has, errors, np.nan),
        outliers={"5": 0.1},
    )


# -- one bank ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["layer", "runtime"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_costs_add_up_exactly(family: str, kind: str, unit: str, bank_of: BankOf) -> None:
    bank, genome = bank_of(family, kind), genome_of(family, kind, bank_of, unit)
    assert sorted(i for members in genome.layers for i in members) == [*range(len(bank.layers))]
    rng = np.random.default_rng(0)
    for _ in range(3):
        profile = np.array([rng.choice(np.flatnonzero(row)) for row in genome.present], dtype=np.int16)
        of_layer = {
            i: genome.forms[u][level] for u, level in enumerate(profile.tolist()) for i in genome.layers[u]
        }  # every layer at the level of its unit
        total = defaultdict[str, int](int)
        for i, form in of_layer.items():
            assert form is not None and form.bank == 0
            for what, cost in bank.layers[i].costs(form.level)._asdict().items():
                total[what] += cost
        dense = sum(stored.dense for stored in bank.layers)
        assert genome.costs.measures(profile) == {
            "bits": Fraction(total["bits"], dense),
            "bpw": Fraction(8 * total["bytes"], dense),
            "bytes": total["bytes"] + 2 * REST,
            "size": Fraction(total["bytes"] + 2 * REST, 2 * dense + 2 * REST),
            "sparsity": 1 - Fraction(total["weights"], dense),
        }
        errors = sum(bank.layers[i].errors[form.level] for i, form in of_layer.items() if form)
        assert genome.errors[np.arange(genome.n), profile].sum() == pytest.approx(errors)
        assert genome.labels_of(profile) == tuple(bank.labels[level] for level in profile)


RUNTIME = {
    "llama": ["q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "opt": ["q_proj+k_proj+v_proj", "out_proj", "fc1", "fc2"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "c_proj"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "mixtral": ["q_proj+k_proj+v_proj", "o_proj", "gate_up_proj", "down_proj"],
    "qwen2_moe": ["q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj", "gate_up_proj", "down_proj"],
}


@pytest.mark.parametrize("family", RUNTIME)
def test_a_runtime_unit_is_what_engines_fuse(family: str, bank_of: BankOf) -> None:
    genome = genome_of(family, "quantization", bank_of, "runtime")
    assert [name.rpartition(".")[2] for name in genome.names] == RUNTIME[family] * LAYERS
    assert genome.block_of.tolist() == [b for b in range(LAYERS) for _ in RUNTIME[family]]
    for name, names in zip(genome.names, genome.layer_names, strict=True):
        assert name.split("+")[0] == names[0]
        assert len({path.rpartition(".")[0] for path in names}) == 1


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_level_is_absent_between_two_that_are_there(family: str, kind: str, bank_of: BankOf) -> None:
    for unit in ("layer", "runtime"):
        genome = genome_of(family, kind, bank_of, unit)
        for present, costs, errors in zip(genome.present, genome.costs.bytes, genome.errors, strict=True):
            levels = np.flatnonzero(present)
            assert (np.diff(levels) == 1).all()
            assert (np.diff(costs[levels]) > 0).all() and (np.diff(costs) >= 0).all()
            assert np.isfinite(errors[levels]).all() and np.isinf(errors[~present]).all()


def test_units_without_a_level_cost_there_what_the_nearest_does() -> None:
    layers = [
        layer("a.q", [1, 2, 3, 4], [3, 2, 1, 0], present=[False, True, True, False]),
        layer("a.k", [5, 6, 7, 8], [3, 2, 1, 0]),
        layer("b.q", [5, 6, 7, 8], [3, 2, 1, 0], block=1),
    ]
    genome = bank_genome(layers, ["a", "b", "c", "d"], "quantization", "runtime", 0)
    assert genome.labels == ((None, "b", "c", None), ("a", "b", "c", "d"))
    assert genome.costs.bytes.tolist() == [[8, 8, 10, 10], [5, 6, 7, 8]]
    assert genome.names == ("a.q+k", "b.q")
    assert genome.errors.tolist() == [[np.inf, 4, 2, np.inf], [3, 2, 1, 0]]
    with pytest.raises(ValueError, match=r"unit a\.q\+k, which has no level 3"):
        genome.labels_of(np.array([3, 0]))
    with pytest.raises(ValueError, match=r"unit a\.q\+k, which has no level -1"):
        genome.labels_of(np.array([-1, 0]))
    with pytest.raises(ValueError, match=r"must have shape \(2,\), got \(3,\)"):
        genome.labels_of(np.array([1, 0, 0]))


# -- groups --------------------------------------------------------------------------------------------------------


def groups_of(genome: Genome, group: str, budget: str = "4") -> set[frozenset[str]]:
    space = genome.space(Budget("bits", Fraction(budget)), group)
    names = [name.split(".", 2)[2] for name in genome.names]
    return {frozenset(names[i] for i in np.flatnonzero(space.group == g)) for g in np.unique(space.group)}


def test_groups_by_size_name_and_none(bank_of: BankOf) -> None:
    genome = genome_of("llama", "quantization", bank_of)
    per_block = [name.split(".", 2)[2] for name in genome.names]
    assert [len(groups_of(genome, group)) for group in ("size", "name", "none")] == [3, 7, 1]
    sizes = {frozenset(f"{b}.{n}" for b in range(LAYERS) for n in names) for names in _SIZES}
    assert groups_of(genome, "size") == sizes
    stems = [name.split(".", 1)[1] for name in per_block[:7]]
    assert groups_of(genome, "name") == {frozenset(f"{b}.{stem}" for b in range(LAYERS)) for stem in stems}
    assert groups_of(genome, "none") == {frozenset(per_block)}


_SIZES = (
    ("self_attn.q_proj", "self_attn.o_proj"),
    ("self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


def test_groups_of_runtime_units_are_by_size(bank_of: BankOf) -> None:
    genome = genome_of("llama", "quantization", bank_of, "runtime")
    found = groups_of(genome, "runtime")
    assert len(found) == 4 and all(len(names) == LAYERS for names in found)
    assert all(genome.space(Budget("bits", Fraction(3)), "runtime").group == np.tile([0, 1, 2, 3], LAYERS))


def test_layers_of_one_last_name_but_different_places_are_no_group(bank_of: BankOf) -> None:
    names = {name for group in groups_of(genome_of("gpt2", "quantization", bank_of), "name") for name in group}
    groups = groups_of(genome_of("gpt2", "quantization", bank_of), "name")
    assert len(groups) == 4 and len(names) == 4 * LAYERS


def test_separate_experts_of_one_name_are_one_group() -> None:
    names = [f"model.layers.{b}.mlp.experts.{e}.up" for b in range(2) for e in range(3)]
    layers = [layer(name, [1, 2], [2, 1], block=i // 3, input=i) for i, name in enumerate(names)]
    genome = bank_genome(layers, ["2", "3"], "quantization", "layer", 0)
    assert genome.space(Budget("bpw", Fraction(1, 10)), "name").group.tolist() == [0] * 6


@pytest.mark.parametrize("group", ["size", "name", "runtime"])
def test_units_of_a_group_step_alike(group: str, bank_of: BankOf) -> None:
    genome = genome_of("qwen2", "quantization", bank_of, "runtime" if group == "runtime" else "layer")
    space = genome.space(Budget("bits", Fraction(3)), group)
    for g in np.unique(space.group):
        assert len(np.unique(np.diff(space.cost[0, space.group == g], axis=1), axis=0)) == 1


@pytest.mark.parametrize("group", ["size", "name", "none"])
def test_any_two_layers_can_trade_sparsity(group: str, bank_of: BankOf) -> None:
    genome = genome_of("qwen2_moe", "sparsity", bank_of)
    space = genome.space(Budget("sparsity", Fraction(1, 2)), group)
    assert space.steady
    assert np.unique(np.diff(space.cost[0], axis=1)[space.allowed[:, 1:] & space.allowed[:, :-1]]).tolist() == [120]


# -- the union of kinds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["layer", "runtime"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_union_is_ordered_by_bytes_without_what_a_cheaper_form_beats(
    family: str, unit: str, bank_of: BankOf
) -> None:
    genome = genome_of(family, "mixed", bank_of, unit)
    banks = [bank_of(family, kind) for kind in KINDS]
    for u, members in enumerate(genome.layers):
        every = {}  # (bytes, error) by form
        for b, bank in enumerate(banks):
            for level in range(len(bank.labels)):
                if all(bank.layers[i].present[level] for i in members):
                    every[Form(b, level)] = (
                        sum(int(bank.layers[i].bytes[level]) for i in members),
                        sum(float(bank.layers[i].errors[level]) for i in members),
                    )
        kept = [form for form in genome.forms[u] if form is not None]
        assert genome.labels[u][0] == DROP_LABEL and genome.forms[u][0] is None
        assert genome.costs.bytes[u, 0] == genome.costs.bits[u, 0] == genome.costs.weights[u, 0] == 0
        assert genome.errors[u, 0] == len(members)
        assert [every[form][0] for form in kept] == sorted({every[form][0] for form in kept})
        for form, (size, error) in every.items():
            beaten = any((s <= size and e < error) or (s < size and e <= error) for s, e in every.values())
            assert beaten == (form not in kept)
        for j, form in enumerate(genome.forms[u]):
            if form is not None:
                bank = banks[form.bank]
                assert genome.labels[u][j] == f"{bank.kind}:{bank.labels[form.level]}"
                assert (genome.costs.bytes[u, j], genome.errors[u, j]) == every[form]


def test_both_kinds_are_among_the_levels(bank_of: BankOf) -> None:
    labels = {label for row in genome_of("llama", "mixed", bank_of).labels for label in row if label}
    assert {label.partition(":")[0] for label in labels} == {*KINDS, DROP_LABEL}


def test_without_dropping_the_union_begins_with_its_smallest_form(bank_of: BankOf) -> None:
    genome = genome_of("llama", "mixed", bank_of, drop=False)
    assert DROP_LABEL not in {label for row in genome.labels for label in row}
    assert all(row[0] is not None for row in genome.forms)
    assert genome.space(Budget("size", Fraction(1, 2), relative=True), "none").bundles == ()


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "gpt_neox"])
def test_the_layers_of_a_sub_block_are_dropped_together(family: str, bank_of: BankOf) -> None:
    genome = genome_of(family, "mixed", bank_of)
    space = genome.space(Budget("size", Fraction(1, 4), relative=True), "none")
    assert len(space.bundles) == 2 * LAYERS
    for units in space.bundles:
        assert len({genome.sub_block[u] for u in units}) == 1
    for row in space.random(20, np.random.default_rng(0)):
        for part in dict.fromkeys(genome.sub_block):
            of_part = [row[u] == 0 for u in range(genome.n) if genome.sub_block[u] == part]
            assert all(of_part) or not any(of_part)


def test_equal_bytes_keep_the_smaller_error_and_equal_errors_the_fewer_bytes() -> None:
    first = [layer("q", [10, 20, 30], [0.9, 0.5, 0.1])]
    second = [layer("q", [10, 15, 20, 40], [0.8, 0.5, 0.6, 0.1])]
    banks = {"quantization": (first, "234"), "sparsity": (second, "9876")}
    genome = mixed_genome(banks, "layer", 0, drop=False)
    assert genome.labels == (("sparsity:9", "sparsity:8", "quantization:4"),)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_union_of_any_banks_has_growing_bytes_and_shrinking_errors(data: st.DataObject) -> None:
    numbers = st.lists(st.integers(1, 40), min_size=1, max_size=6)
    banks = {}
    for kind in KINDS:
        sizes = data.draw(numbers)
        errors = data.draw(st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes)))
        banks[kind] = ([layer("q", sizes, [e / 10 for e in errors])], [str(i) for i in range(len(sizes))])
    genome = mixed_genome(banks, "layer", 0, drop=data.draw(st.booleans()))
    start = int(genome.labels[0][0] == DROP_LABEL)
    assert genome.present.all()
    assert (np.diff(genome.costs.bytes[0]) > 0).all() and (np.diff(genome.errors[0][start:]) < 0).all()


# -- budgets and refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "budget", "message"),
    [
        ("quantization", Budget("bits", Fraction(1)), "an average of 1 bits is out of reach.*2 to 6.*nearest is 2"),
        ("quantization", Budget("bits", Fraction(7)), "an average of 7 bits is out of reach.*2 to 6.*nearest is 6"),
        ("sparsity", Budget("sparsity", Fraction(95, 100)), "a sparsity of 95% is out of reach.*nearest is 87.5%"),
        ("mixed", Budget("size", Fraction(1)), "a size of 1B is out of reach.*nearest is 2KB"),
        ("mixed", Budget("size", Fraction(2), relative=True), "a size of 2x is out of reach"),
    ],
)
def test_a_budget_out_of_reach_is_refused_with_the_nearest(
    kind: str, budget: Budget, message: str, bank_of: BankOf
) -> None:
    with pytest.raises(BudgetError, match=message):
        genome_of("llama", kind, bank_of).space(budget, "none")


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_random_profiles_of_the_space_have_levels_that_are_there_and_meet_the_budget(
    kind: str, bank_of: BankOf
) -> None:
    genome = genome_of("qwen2", kind, bank_of)
    budget = Budget("size", Fraction(2, 5), relative=True)
    for row in genome.space(budget, "none").random(10, np.random.default_rng(0)):
        assert genome.costs.measures(row)["size"] <= Fraction(2, 5)
        assert len(genome.labels_of(row)) == genome.n


def test_values_that_make_no_sense_are_refused(bank_of: BankOf) -> None:
    bank, genome = bank_of("llama", "quantization"), genome_of("llama", "quantization", bank_of)
    with pytest.raises(ValueError, match="group must be one of size, name, none, runtime, got 'kind'"):
        genome.space(Budget("bits", Fraction(3)), "kind")
    with pytest.raises(ValueError, match="unit must be layer or runtime, got 'block'"):
        bank_genome(bank.layers, bank.labels, bank.kind, "block", 0)
    with pytest.raises(ValueError, match="expected banks of the same layers, got none"):
        mixed_genome({}, "layer", 0, drop=True)
    other = [replace(stored, name=f"other.{stored.name}") for stored in bank.layers]
    banks = {"quantization": (bank.layers, bank.labels), "sparsity": (other, bank.labels)}
    with pytest.raises(ValueError, match="expected banks of the same layers, got quantization, sparsity"):
        mixed_genome(banks, "layer", 0, drop=True)
