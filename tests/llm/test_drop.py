"""Depth pruning as levels, and its search space."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch.func import functional_call

from discopt.errors import BudgetError
from discopt_llm.anatomy import Anatomy, read_anatomy
from discopt_llm.drop import DropLevels, Unit, blocks_to_drop, drop_space
from discopt_llm.evaluator import TEACHER
from tests.llm.families import FAMILIES, tiny


@cache
def llama(layers: int = 4) -> Any:
    return tiny("Llama", num_hidden_layers=layers)


@cache
def anatomy(layers: int = 4) -> Anatomy:
    return read_anatomy(llama(layers))


def profile(*levels: int) -> np.ndarray:
    return np.array(levels, dtype=np.int16)


@pytest.mark.parametrize(
    ("unit", "names"),
    [
        ("sublayer", ["model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.1.self_attn"]),
        ("block", ["model.layers.0", "model.layers.1", "model.layers.2"]),
        ("pair", ["model.layers.0+1", "model.layers.2+3", "model.layers.4"]),
    ],
)
def test_units_are_named_after_what_they_drop(unit: Unit, names: list[str]) -> None:
    levels = DropLevels(anatomy(5), unit)
    assert list(levels.names[:3]) == names
    assert (
        len(levels.units) == len(levels.names) == len(levels.blocks_of) == {"sublayer": 10, "block": 5, "pair": 3}[unit]
    )
    assert sum(levels.units, ()) == anatomy(5).sub_blocks


@pytest.mark.parametrize(
    ("unit", "levels", "dropped"),
    [
        ("sublayer", (1, 1, 0, 1, 1, 0, 0, 0), [[0, 0], [1, 0], [0, 1], [1, 1]]),
        ("block", (1, 0, 1, 0), [[0, 0], [1, 1], [0, 0], [1, 1]]),
        ("pair", (0, 1), [[1, 1], [1, 1], [0, 0], [0, 0]]),
    ],
)
def test_a_profile_says_which_sub_blocks_go(unit: Unit, levels: tuple[int, ...], dropped: list[list[int]]) -> None:
    found = DropLevels(anatomy(), unit).dropped(profile(*levels))
    assert found.dtype == np.bool_
    assert found.astype(int).tolist() == dropped


def test_a_pair_that_is_cut_short_is_one_block() -> None:
    found = DropLevels(anatomy(5), "pair").dropped(profile(1, 1, 0))
    assert found.tolist() == [[False, False]] * 4 + [[True, True]]


@pytest.mark.parametrize("unit", get_args(Unit))
def test_blocks_and_units_point_at_each_other(unit: Unit) -> None:
    levels = DropLevels(anatomy(5), unit)
    for block, units in enumerate(levels.block_units):
        assert units.tolist() == [u for u, blocks in enumerate(levels.blocks_of) if block in blocks]
        assert levels.runs(block, levels.dense_row(block)) == 2
        assert levels.runs(block, (0,) * len(units)) == 0


@pytest.mark.parametrize("unit", get_args(Unit))
@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_equals_zeroing_the_outputs(family: str, unit: Unit) -> None:
    model = FAMILIES[family]()
    levels = DropLevels(read_anatomy(model), unit)
    ids = torch.randint(200, (2, 9), generator=torch.Generator().manual_seed(0))
    row = np.random.default_rng(0).integers(0, 2, len(levels.units))
    row[0], row[-1] = 0, 1
    parameters = dict(model.named_parameters())
    outputs = [n for unit_, level in zip(levels.units, row, strict=True) if not level for p in unit_ for n in p.outputs]
    zeroed = functional_call(model, {n: torch.zeros_like(parameters[n]) for n in outputs}, (ids,)).logits
    before = model(ids).logits
    contexts = [levels.applied_(b, tuple(row[units].tolist())) for b, units in enumerate(levels.block_units)]
    for context in contexts:
        context.__enter__()
    dropped = model(ids).logits
    for context in reversed(contexts):
        context.__exit__(None, None, None)
    torch.testing.assert_close(dropped, zeroed, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(dropped, before, atol=1e-3)
    assert torch.equal(model(ids).logits, before)


def test_the_teacher_is_applied_as_everything_kept() -> None:
    levels = DropLevels(anatomy(), "block")
    ids = torch.arange(9)[None]
    expected = llama()(ids).logits
    with levels.applied_(1, None), levels.applied_(2, (1,)):
        assert torch.equal(llama()(ids).logits, expected)


def test_parameters_and_bytes_of_what_goes_are_counted() -> None:
    levels = DropLevels(anatomy())
    block = llama().model.layers[1]
    attention, mlp = (sum(p.numel() for p in part.parameters()) for part in (block.self_attn, block.mlp))
    levels_of = {"nothing": (1,) * 8, "one of each": (1, 1, 0, 1, 1, 0, 1, 1), "all": (0,) * 8}
    counted = {name: levels.parameters_dropped(profile(*row)) for name, row in levels_of.items()}
    assert counted == {"nothing": 0, "one of each": attention + mlp, "all": 4 * (attention + mlp)}
    whole = levels.bytes_of(llama(), profile(*levels_of["nothing"]))
    assert whole == levels.bytes_of(llama(), profile(*[TEACHER] * 8)) == sum(p.nbytes for p in llama().parameters())
    assert levels.bytes_of(llama(), profile(*levels_of["one of each"])) == whole - 4 * (attention + mlp)


def test_a_profile_that_is_none_is_refused() -> None:
    levels = DropLevels(anatomy(), "block")
    for bad in ((1, 1, 1), (1, 2, 1, 1), (1, -1, 1, 1)):
        with pytest.raises(ValueError, match=r"expected a profile of 4 levels 0 or 1, got \["):
            levels.dropped(profile(*bad))


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a unit of sublayer, block, pair, got 'head'"):
        DropLevels(anatomy(), "head")  # type: ignore[arg-type]


# -- the space -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("unit", get_args(Unit))
def test_random_profiles_drop_what_was_asked(unit: Unit, sparsity: float) -> None:
    space = drop_space(anatomy(8), sparsity, unit=unit)
    levels = DropLevels(anatomy(8), unit)
    gone = blocks_to_drop(8, sparsity, unit)
    assert space.names == levels.names
    for row in space.random(5, np.random.default_rng(0)):
        assert levels.dropped(row).sum(axis=0).tolist() == [gone, gone]


def test_attention_and_mlp_have_budgets_and_groups_of_their_own() -> None:
    space = drop_space(anatomy(), 0.5)
    assert space.budget.tolist() == [2, 2]
    assert space.cost_of(np.array([[1, 0] * 4, [0, 1] * 4])).tolist() == [[4, 0], [0, 4]]
    assert len(set(space.group[::2])) == len(set(space.group[1::2])) == 1
    assert space.group[0] != space.group[1]


def test_only_units_of_one_size_trade() -> None:
    space = drop_space(anatomy(5), 0.6, unit="pair")
    assert space.budget.tolist() == [2]
    assert space.cost_of(np.eye(3, dtype=np.int16)).ravel().tolist() == [2, 2, 1]
    assert space.group[0] == space.group[1] != space.group[2]


@pytest.mark.parametrize("unit", get_args(Unit))
def test_protected_blocks_are_kept(unit: Unit) -> None:
    space = drop_space(anatomy(8), 0.5, unit=unit, protect=(0, 7))
    levels = DropLevels(anatomy(8), unit)
    rows = space.random(20, np.random.default_rng(0))
    assert not any(levels.dropped(row)[[0, 7]].any() for row in rows)
    assert all(levels.dropped(row).sum() == 8 for row in rows)


@pytest.mark.parametrize(
    ("blocks", "sparsity", "unit", "expected"),
    [
        (30, 0.2, "sublayer", 6),
        (30, 0.25, "block", 8),  # 7.5
        (10, 0.25, "block", 3),  # 2.5
        (32, 0.37, "sublayer", 12),  # 11.84
        (30, 0.25, "pair", 8),
        (30, 0.2, "pair", 6),
        (30, 0.23, "pair", 6),  # 6.9: 6 or 8
        (31, 0.23, "pair", 7),  # the last block is a unit alone
        (4, 0.0, "pair", 0),
        (4, 0.99, "block", 4),
        (4, 0.01, "block", 0),
    ],
)
def test_a_share_is_rounded_to_whole_units(blocks: int, sparsity: float, unit: Unit, expected: int) -> None:
    assert blocks_to_drop(blocks, sparsity, unit) == expected


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 20.0, float("nan")])
def test_a_sparsity_outside_zero_to_one_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match=rf"sparsity must be in \[0, 1\), got {sparsity}"):
        drop_space(anatomy(), sparsity)


def test_a_block_that_is_not_there_cannot_be_protected() -> None:
    with pytest.raises(ValueError, match=r"must be in 0\.\.3, got 4, -1"):
        drop_space(anatomy(), 0.5, protect=(0, 4, -1))


@pytest.mark.parametrize("unit", get_args(Unit))
def test_protecting_too_much_is_refused(unit: Unit) -> None:
    with pytest.raises(BudgetError, match=r"the cheapest costs (3|4)"):
        drop_space(anatomy(), 0.5, unit=unit, protect=(0, 1, 2))
