"""Levels of banks in the evaluator, against whole models with the same weights, on every family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from discopt_llm.bank import Bank
from discopt_llm.errors import BankError
from discopt_llm.evaluator import TEACHER, Evaluator
from discopt_llm.fitness import KL, Perplexity
from discopt_llm.genome import DROP_LABEL, Genome, bank_genome, mixed_genome
from discopt_llm.layers import Layer, read_layers
from discopt_llm.levels import BankLevels
from discopt_llm.replay import skipped_, weights_replaced_
from tests.llm import reference
from tests.llm.banks import KINDS, calibration, loaded, read
from tests.llm.families import FAMILIES, LAYERS, tiny
from tests.llm.test_evaluator import close, text

ALL = (KL(), Perplexity())
FORMULAS = (reference.kl, reference.negative_log_likelihood)
BankOf = Callable[[str, str], Bank]
CPU = torch.device("cpu")


def layers_of(family: str) -> tuple[Layer, ...]:
    return read_layers(loaded(family).model, loaded(family).anatomy)


def outside(family: str) -> int:
    """Parameters that no layer holds."""
    return loaded(family).model.num_parameters() - sum(layer.weights for layer in layers_of(family))


def bank_levels(family: str, kind: str, bank_of: BankOf, *, unit: str = "layer", **options: Any) -> BankLevels:
    """Of one kind, or of both and dropping."""
    if kind != "mixed":
        banks = [bank_of(family, kind)]
        genome = bank_genome(banks[0].layers, banks[0].labels, kind, unit, outside(family))
    else:
        banks = [bank_of(family, kind) for kind in KINDS]
        tables = {bank.kind: (bank.layers, bank.labels) for bank in banks}
        genome = mixed_genome(tables, unit, outside(family), drop=True)
    return BankLevels(loaded(family), layers_of(family), genome, banks, **options)


def random_profiles(genome: Genome, k: int, seed: int = 0) -> NDArray[np.int16]:
    """Levels that the units have, some sub-blocks dropped where they can be: (k, n)."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((k, genome.n), dtype=np.int16)
    for row in rows:
        gone = {part for part in dict.fromkeys(genome.sub_block) if rng.random() < 0.3}
        for unit, labels in enumerate(genome.labels):
            can = [j for j, label in enumerate(labels) if label not in (None, DROP_LABEL)]
            row[unit] = 0 if labels[0] == DROP_LABEL and genome.sub_block[unit] in gone else rng.choice(can)
    return rows


def snapshot(family: str) -> dict[str, tuple[int, torch.Tensor]]:
    return {name: (p.data_ptr(), p.clone()) for name, p in loaded(family).model.named_parameters()}


def assert_untouched(family: str, before: dict[str, tuple[int, torch.Tensor]]) -> None:
    for name, parameter in loaded(family).model.named_parameters():
        assert parameter.data_ptr() == before[name][0] and torch.equal(parameter, before[name][1]), name
    assert not any("forward" in vars(module) for module in loaded(family).model.modules())


# -- parity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["quantization", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_equal_one_whole_forward_per_student(family: str, kind: str, bank_of: BankOf) -> None:
    levels = bank_levels(family, kind, bank_of)
    population, sequences, before = random_profiles(levels.genome, 4), text(12, 12, 5), snapshot(family)
    population = np.concatenate([population, population[:2]])
    found = Evaluator(loaded(family), levels).measure(population, sequences, ALL)
    assert_untouched(family, before)
    expected = reference.plain_losses(loaded(family).model, levels, population, sequences, FORMULAS)
    for losses, plain in zip(found, expected, strict=True):
        close(losses, plain)
    assert_untouched(family, before)


@pytest.mark.parametrize("kind", ["sparsity", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_a_model_with_the_weights_of_the_banks(family: str, kind: str, bank_of: BankOf) -> None:
    model, levels = loaded(family), bank_levels(family, kind, bank_of)
    genome = levels.genome
    population, sequences = random_profiles(genome, 2, seed=1), text(12, 12)
    found = Evaluator(model, levels).measure(population, sequences, ALL)
    names = {id(p): name for name, p in model.model.named_parameters()}
    for row, profile in enumerate(population):
        weights, gone = {}, []
        for unit, level in enumerate(profile.tolist()):
            form, (block, part) = genome.forms[unit][level], genome.sub_block[unit]
            if form is None:
                gone.append(getattr(model.anatomy.blocks[block], part))
                continue
            for layer in (levels.layers[i] for i in genome.layers[unit]):
                stored = levels.banks[form.bank].weights(layer.index, form.level, CPU)
                weights[names[id(layer.parameter)]] = layer.to_parameter(stored)
        teacher = reference.plain_losses(model.model, NOTHING, NOTHING_ROW, sequences, FORMULAS[1:])
        with weights_replaced_(model.model, weights), skipped_(dict.fromkeys(gone)):
            student = reference.plain_losses(model.model, NOTHING, NOTHING_ROW, sequences, FORMULAS[1:])
        close(found[1][row : row + 1], student[0])
        assert not np.allclose(student[0], teacher[0])


class _Nothing:
    """No unit decides about any block."""

    block_units: tuple[NDArray[np.intp], ...] = ()
    end_units = (np.empty(0, dtype=np.intp), np.empty(0, dtype=np.intp))


NOTHING: Any = _Nothing()
NOTHING_ROW = np.zeros((1, 0), dtype=np.int16)


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_units_that_engines_fuse_switch_together(family: str, kind: str, bank_of: BankOf) -> None:
    runtime, alone = (bank_levels(family, kind, bank_of, unit=unit) for unit in ("runtime", "layer"))
    population, sequences = random_profiles(runtime.genome, 3, seed=2), text(12, 9)
    found = Evaluator(loaded(family), runtime).measure(population, sequences, ALL)
    expected = reference.plain_losses(loaded(family).model, runtime, population, sequences, FORMULAS)
    close(np.stack(found), np.stack(expected))
    if kind != "mixed":
        unit_of = {i: u for u, members in enumerate(runtime.genome.layers) for i in members}
        spread = population[:, [unit_of[i] for i in range(alone.genome.n)]]
        close(np.stack(Evaluator(loaded(family), alone).measure(spread, sequences, ALL)), np.stack(found))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_the_teacher_is_the_dense_model(family: str, bank_of: BankOf) -> None:
    levels = bank_levels(family, "mixed", bank_of)
    dense = np.full((1, levels.genome.n), TEACHER, dtype=np.int16)
    population, sequences = np.concatenate([random_profiles(levels.genome, 1), dense]), text(12, 12)
    kl, nll = Evaluator(loaded(family), levels).measure(population, sequences, ALL)
    assert kl[1].max() < 1e-6 < kl[0].min()
    plain = reference.plain_losses(loaded(family).model, NOTHING, NOTHING_ROW, sequences, FORMULAS[1:])
    close(nll[1:], plain[0])


def test_with_everything_dropped_nothing_is_run(bank_of: BankOf) -> None:
    levels = bank_levels("llama", "mixed", bank_of)
    evaluator = Evaluator(loaded("llama"), levels)
    evaluator.measure(np.zeros((1, levels.genome.n), dtype=np.int16), text(12), ALL)
    assert evaluator.counts.passes == 2 * LAYERS * 12  # the teacher's alone
    assert levels.dropped(np.zeros(levels.genome.n, dtype=np.int16)).all()


# -- weights that stay unpacked ------------------------------------------------------------------------------------


@contextmanager
def unpacked(levels: BankLevels) -> Iterator[list[str]]:
    """Notes the layers that are unpacked."""
    names: list[str] = []
    real = BankLevels.parameter

    def noted(self: BankLevels, layer: Layer, form: Any) -> torch.Tensor:
        names.append(layer.name)
        return real(self, layer, form)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BankLevels, "parameter", noted)
        yield names


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "gpt2"])
def test_a_bound_on_memory_changes_no_loss(family: str, bank_of: BankOf) -> None:
    free = bank_levels(family, "mixed", bank_of)
    population, sequences = random_profiles(free.genome, 5, seed=3), text(12, 12)
    expected = Evaluator(loaded(family), free).measure(population, sequences, ALL)
    one_layer = max(layer.parameter.nbytes for layer in free.layers)
    for memory_bytes in (0, one_layer, 10 * one_layer):
        levels = bank_levels(family, "mixed", bank_of, memory_bytes=memory_bytes)
        for _ in range(2):
            found = Evaluator(loaded(family), levels).measure(population, sequences, ALL)
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        assert levels._resident._bytes <= memory_bytes
        assert levels._resident._bytes == sum(t.nbytes for t in levels._resident._held.values())


def test_a_level_is_unpacked_once_where_memory_allows(bank_of: BankOf) -> None:
    levels = bank_levels("llama", "quantization", bank_of)
    population = random_profiles(levels.genome, 6, seed=4)
    used = {(unit, level) for row in population.tolist() for unit, level in enumerate(row)}
    with unpacked(levels) as names:
        for _ in range(3):
            Evaluator(loaded("llama"), levels).measure(population, text(12), ALL)
    assert len(names) == len(used)


def test_the_least_recently_used_weights_go_first_and_one_that_never_fits_displaces_none(bank_of: BankOf) -> None:
    _, k, v, _, gate, *_ = layers_of("llama")
    assert k.parameter.nbytes == v.parameter.nbytes < gate.parameter.nbytes / 2
    levels = bank_levels("llama", "quantization", bank_of, memory_bytes=2 * k.parameter.nbytes)
    with unpacked(levels) as names:
        for layer, level in ((k, 0), (v, 0), (k, 0), (v, 1), (k, 0), (v, 0), (gate, 0), (k, 0), (v, 0)):
            form = levels.genome.forms[layer.index][level]
            assert form is not None
            levels._weights(layer, form)
    assert [name.rpartition(".")[2][0] for name in names] == ["k", "v", "v", "v", "g"]


# -- the model and the levels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_nothing_stays_applied_also_after_an_error(family: str, bank_of: BankOf) -> None:
    levels, before = bank_levels(family, "mixed", bank_of), snapshot(family)
    (profile,) = random_profiles(levels.genome, 1)
    for block, units in enumerate(levels.block_units):
        row = tuple(profile[units].tolist())
        with pytest.raises(RuntimeError, match="inside"), levels.applied_(block, row):
            raise RuntimeError("inside")
        assert_untouched(family, before)
        with levels.applied_(block, None):
            assert_untouched(family, before)


def test_an_error_in_the_middle_of_a_measurement_leaves_the_model_as_it_was(
    bank_of: BankOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels, before = bank_levels("llama", "quantization", bank_of), snapshot("llama")
    left = iter(range(9))

    def fail(self: BankLevels, layer: Layer, form: Any) -> torch.Tensor:
        if next(left, None) is None:
            raise BankError("changed while it was read")
        return real(self, layer, form)

    real = BankLevels.parameter
    monkeypatch.setattr(BankLevels, "parameter", fail)
    with pytest.raises(BankError, match="while it was read"):
        Evaluator(loaded("llama"), levels).measure(random_profiles(levels.genome, 3), text(12), ALL)
    assert_untouched("llama", before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_of_a_profile_are_those_that_are_applied(family: str, bank_of: BankOf) -> None:
    model, levels = loaded(family), bank_levels(family, "mixed", bank_of)
    (profile,) = random_profiles(levels.genome, 1, seed=5)
    dense = {name: p.clone() for name, p in model.model.named_parameters()}
    replaced = levels.weights(profile)
    gone = levels.dropped(profile)
    for block, units in enumerate(levels.block_units):
        part = model.anatomy.blocks[block]
        for of_kind, is_gone in zip(("attention", "mlp"), gone[block].tolist(), strict=True):
            mine = [u for u in units if levels.genome.sub_block[u][1] == of_kind]
            assert {profile[u] == 0 for u in mine} == {is_gone}
        with levels.applied_(block, tuple(profile[units].tolist())):
            for name, parameter in part.module.named_parameters(prefix=part.name):
                expected = levels.parameter(*replaced[name]) if name in replaced else dense[name]
                assert torch.equal(parameter, expected), name
    kept = [layer for layer in levels.layers if not gone[layer.block, int(layer.kind == "mlp")]]  # attention, then MLP
    assert {layer.parameter_name for layer in kept} == replaced.keys()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_weights_unpacked_in_one_mode_serve_in_the_others(mode: Callable[[], Any], bank_of: BankOf) -> None:
    levels = bank_levels("llama", "quantization", bank_of)
    (profile,) = random_profiles(levels.genome, 1, seed=6)
    row, ids = tuple(profile[levels.block_units[0]].tolist()), text(12)[0][None]
    model, answers = loaded("llama").model, []
    for context in (mode, torch.inference_mode, torch.no_grad, torch.enable_grad):
        with context(), levels.applied_(0, row):
            answers.append(model(ids, use_cache=False).logits)
            assert not any(p.is_inference() for p in model.parameters())
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_weights_have_the_data_type_of_the_model(bank_of: BankOf) -> None:
    # Values that half precision holds have the fingerprint of the model in single precision.
    model = read(tiny("Llama", num_key_value_heads=2).bfloat16())
    bank = bank_of("llama", "quantization")
    layers = read_layers(model.model, model.anatomy)
    genome = bank_genome(bank.layers, bank.labels, bank.kind, "layer", 0)
    levels = BankLevels(model, layers, genome, [bank])
    form = genome.forms[3][1]
    assert form is not None
    weights = levels.parameter(layers[3], form)
    assert weights.dtype == torch.bfloat16 and weights.shape == layers[3].parameter.shape
    assert torch.equal(weights, layers[3].to_parameter(bank.weights(3, 1, CPU)).bfloat16())
    (kl,) = Evaluator(model, levels).measure(random_profiles(genome, 1), text(12), [KL()])
    assert kl.min() > 0


def test_bytes_are_what_the_units_and_the_rest_are_stored_in(bank_of: BankOf) -> None:
    levels = bank_levels("qwen2", "quantization", bank_of)
    (profile,) = random_profiles(levels.genome, 1)
    bank, model = levels.banks[0], loaded("qwen2").model
    stored = sum(int(layer.bytes[level]) for layer, level in zip(bank.layers, profile, strict=True))
    assert levels.bytes_of(model, profile) == stored + 2 * outside("qwen2")
    assert levels.bytes_of(model, np.full(levels.genome.n, TEACHER)) == 2 * model.num_parameters()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_unit_may_be_as_the_teacher_has_it(family: str, bank_of: BankOf) -> None:
    levels = bank_levels(family, "quantization", bank_of)
    population = np.full((3, levels.genome.n), TEACHER, dtype=np.int16)
    population[0, 2] = population[1, 5:9] = 0
    sequences = text(12, 7)
    (found,) = Evaluator(loaded(family), levels).measure(population, sequences, [KL()])
    (plain,) = reference.plain_losses(loaded(family).model, levels, population, sequences, [reference.kl])
    np.testing.assert_allclose(found, plain, rtol=2e-5, atol=2e-5)
    assert found[:2].min() > 1e-4 and found[2].max() < 1e-6
    assert len(levels.weights(population[0])) == len(levels.genome.layers[2])


# -- refusals ------------------------------------------------------------------------------------------------------


def test_levels_that_a_unit_does_not_have_are_refused(bank_of: BankOf) -> None:
    levels = bank_levels("llama", "sparsity", bank_of)  # of which the smallest layers lack the outer ones
    middle = np.full(levels.genome.n, 4, dtype=np.int16)
    for level in (0, 9):
        profile = middle.copy()
        profile[1] = level
        with pytest.raises(ValueError, match=rf"layers\.0\.self_attn\.k_proj, which has no level {level}"):
            levels.weights(profile)
        with pytest.raises(ValueError, match=f"no level {level}"):
            Evaluator(loaded("llama"), levels).measure(profile[None], text(12), ALL)


def test_half_a_dropped_sub_block_is_refused(bank_of: BankOf) -> None:
    levels = bank_levels("llama", "mixed", bank_of)
    profile = np.ones(levels.genome.n, dtype=np.int16)
    profile[5] = 0
    with pytest.raises(ValueError, match=r"the layers of model\.layers\.0\.mlp must be dropped all together"):
        Evaluator(loaded("llama"), levels).measure(profile[None], text(12), ALL)


def test_a_bank_of_another_model_is_refused(bank_of: BankOf) -> None:
    bank, model = bank_of("llama", "quantization"), read(tiny("Llama", seed=1, num_key_value_heads=2))
    genome = bank_genome(bank.layers, bank.labels, bank.kind, "layer", 0)
    with pytest.raises(BankError, match="whose weights differ from this model's"):
        BankLevels(model, read_layers(model.model, model.anatomy), genome, [bank])


def test_a_negative_bound_is_refused(bank_of: BankOf) -> None:
    with pytest.raises(ValueError, match="memory_bytes must not be negative, got -1"):
        bank_levels("llama", "quantization", bank_of, memory_bytes=-1)


def test_calibration_text_measures_as_any_other(bank_of: BankOf) -> None:
    levels = bank_levels("llama", "quantization", bank_of)
    uniform = np.repeat(np.arange(4, dtype=np.int16)[:, None], levels.genome.n, axis=1)
    (kl,) = Evaluator(loaded("llama"), levels).measure(uniform, [*calibration().sequences], [KL()])
    assert (np.diff(kl.mean(axis=1)) < 0).all()  # more bits, less loss
