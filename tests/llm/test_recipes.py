"""Which levels the kinds of banks have, and what they cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from discopt_llm import recipes
from discopt_llm.bank import Bank, Sparse, form_costs
from discopt_llm.layers import Layer, read_layers
from discopt_llm.quantization import QuantizationSettings
from discopt_llm.recipes import QuantizationRecipe, SparsityRecipe
from discopt_llm.sparsity import SparsitySettings
from tests.llm.banks import KINDS, RECIPES, loaded
from tests.llm.families import FAMILIES


def layers_of(family: str) -> tuple[Layer, ...]:
    return read_layers(loaded(family).model, loaded(family).anatomy)


def sparse(**changes: Any) -> SparsityRecipe:
    options: dict[str, Any] = {"target": 0.6, "levels": 7, "step": 100, "values": torch.float16}
    return SparsityRecipe(SparsitySettings(), **{**options, **changes})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_levels_cost_what_was_planned(family: str, kind: str, bank_of: Callable[[str, str], Bank]) -> None:
    bank = bank_of(family, kind)
    for layer, stored in zip(layers_of(family), bank.layers, strict=True):
        planned = RECIPES[kind].planned(layer)
        assert np.isnan(planned.errors).all()
        assert stored.shape == planned.shape == (layer.matrices, layer.rows, layer.columns)
        for level in range(len(bank.labels)):
            assert stored.costs(level) == planned.costs(level)
            if planned.present[level]:
                assert form_costs(bank.form(layer.index, level, torch.device("cpu"))) == planned.costs(level)


def test_a_width_is_the_label_of_its_level() -> None:
    recipe = QuantizationRecipe(QuantizationSettings(bits=(2, 4, 8), group_size=None, symmetric=True))
    assert recipe.labels == ("2", "4", "8")
    (layer, *_) = layers_of("llama")
    planned = recipe.planned(layer)
    assert planned.bits.tolist() == [layer.weights * b for b in (2, 4, 8)]
    assert planned.bytes.tolist() == [layer.weights * b // 8 + 2 * layer.rows for b in (2, 4, 8)]


def test_steps_are_equal_in_every_layer_and_count_from_the_target() -> None:
    recipe = sparse()
    assert recipe.labels == ("3", "2", "1", "0", "-1", "-2", "-3")
    for layer in layers_of("qwen2_moe"):
        zeros, present = recipe.zeros(layer), recipe.present(layer)
        assert (np.diff(zeros) == -100).all()
        assert 0 <= zeros[3] - 0.6 * layer.weights < 1  # no fewer zeros than asked for
        planned = recipe.planned(layer)
        assert (planned.present == present).all() and present[3]
        assert (planned.weights == np.where(present, layer.weights - zeros, 0)).all()


def test_a_layer_lacks_levels_that_would_have_more_zeros_than_weights_or_fewer_than_none() -> None:
    _, k, *_ = layers_of("llama")
    assert k.weights == 512
    assert sparse().present(k).tolist() == [False, True, True, True, True, True, True]  # 608 zeros are too many
    assert sparse(step=300).present(k).tolist() == [False, False, False, True, True, False, False]
    assert sparse(target=0.5, step=128).zeros(k).tolist() == [640, 512, 384, 256, 128, 0, -128]
    assert sparse(target=0.5, step=128).present(k).tolist() == [False, True, True, True, True, True, False]


def test_a_target_is_the_decimal_number_that_was_written() -> None:
    (layer, *_) = layers_of("llama")
    assert layer.weights == 1024
    assert sparse(target=0.7).zeros(layer)[3] == 717  # 716.8
    assert sparse(target=0.3).zeros(layer)[3] == 308  # 307.2
    assert sparse(target=0.75).zeros(layer)[3] == 768  # exactly


@pytest.mark.parametrize(("target", "step"), [(0.6, 100), (0.37, 77), (0.9, 1)])
def test_experts_share_a_layers_zeros_as_evenly_as_can_be(target: float, step: int) -> None:
    recipe = sparse(target=target, step=step)
    layer = layers_of("mixtral")[-1]
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(layer.rows, layer.columns, generator=generator)
    solved = [recipe.solve([layer], [W], torch.eye(layer.columns), e) for e in range(layer.matrices)]
    for level in np.flatnonzero(recipe.present(layer)).tolist():
        forms: list[Any] = [one.forms[0][level] for one in solved]
        zeros = [int((~form.keep).sum()) for form in forms]
        assert sum(zeros) == recipe.zeros(layer)[level]
        assert max(zeros) - min(zeros) <= 1


def test_levels_solved_a_few_at_a_time_are_those_solved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = [layer for layer in layers_of("llama") if (layer.block, layer.input) == (1, 0)]
    weights = [layer.to_matrices(layer.parameter)[0] for layer in stack]
    x = torch.randn(200, stack[0].columns, generator=torch.Generator().manual_seed(0))
    recipe = sparse(step=20)
    whole = recipe.solve(stack, weights, x.T @ x / 200, 0)
    monkeypatch.setattr(recipes, "SOLVED_BYTES", 2 * sum(W.nbytes for W in weights))
    parts = recipe.solve(stack, weights, x.T @ x / 200, 0)
    np.testing.assert_array_equal(parts.errors, whole.errors)
    for mine, theirs in zip(itertools.chain(*parts.forms), itertools.chain(*whole.forms), strict=True):
        assert isinstance(mine, Sparse) and isinstance(theirs, Sparse)
        assert torch.equal(mine.keep, theirs.keep) and torch.equal(mine.values, theirs.values)


def test_what_is_described_tells_recipes_apart() -> None:
    quantized = [QuantizationRecipe(QuantizationSettings(bits=bits)) for bits in ((2, 3), (2, 4))]
    others = [sparse(), sparse(target=0.5), sparse(levels=9), sparse(step=7), sparse(values=torch.bfloat16)]
    for a, b in itertools.combinations([*quantized, *others], 2):
        assert a.described != b.described
    assert sparse().described["values"] == "float16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": 0.0}, "target must be above 0 and below 1, got 0.0"),
        ({"target": 1.0}, "target must be above 0 and below 1, got 1.0"),
        ({"target": float("nan")}, "target must be above 0 and below 1, got nan"),
        ({"levels": 4}, "levels must be an odd number up to 32,767, so that one lies at the target, got 4"),
        ({"levels": -1}, "levels must be an odd number.*, got -1"),
        ({"levels": 10**9 + 1}, "levels must be an odd number.*, got 1000000001"),
        ({"step": 0}, "step must be at least 1 weight, got 0"),
        ({"values": torch.float32}, "values must be float16 or bfloat16, got torch.float32"),
    ],
)
def test_values_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse(**changes)
