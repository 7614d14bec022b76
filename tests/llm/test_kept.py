"""What is kept of a bank's levels between their uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from discopt_llm.genome import Form
from discopt_llm.levels import _Kept
from tests.llm.banks import KINDS
from tests.llm.test_levels import BankOf, bank_levels

PLACES = 10


def rounds(kept: _Kept[int], count: int, *, per_block: int = 2, first: int = 0) -> list[int]:
    """How many of the blocks' values were made in each round; each block asks for its values twice."""
    made: list[int] = []
    for _ in range(count):
        made.append(0)
        for place in range(PLACES):
            for key in [*range(first, first + per_block)] * 2:

                def make(at: int = len(made) - 1) -> int:
                    made[at] += 1
                    return 0

                kept.get((100 * place + key, Form(0, 0)), place, 1, make)
                assert kept._bytes <= kept.memory_bytes
                assert kept._bytes == sum(entry.nbytes for entry in kept._held.values())
    return made


@pytest.mark.parametrize("most", range(2, 21))
def test_of_a_cycle_that_is_too_long_as_much_is_kept_as_there_is_place_for(most: int) -> None:
    made = rounds(_Kept(most, PLACES), 6)
    assert made[0] == 20  # once each, though asked for twice
    assert all(20 - most <= again <= 22 - most for again in made[1:])  # two places are for what is being asked for


def test_what_is_asked_for_no_more_makes_room() -> None:
    kept: _Kept[int] = _Kept(20, PLACES)
    assert rounds(kept, 2) == [20, 0]
    assert rounds(kept, 3, first=50) == [20, 0, 0]


def test_a_lower_bound_lets_go_at_once() -> None:
    kept: _Kept[int] = _Kept(20, PLACES)
    rounds(kept, 1)
    kept.bound_(7)
    assert kept._bytes == len(kept._held) == 7
    kept.bound_(0)
    assert not kept._held


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_levels_that_are_kept_as_they_are_stored_are_the_same(family: str, kind: str, bank_of: BankOf) -> None:
    levels = bank_levels(family, kind, bank_of)
    forms = [
        (levels.layers[i], form)
        for members, of_unit in zip(levels.genome.layers, levels.genome.forms, strict=True)
        for form in of_unit
        if form is not None
        for i in members
    ]
    plain = [levels.parameter(layer, form) for layer, form in forms]
    levels.keep_(packed=levels.sizes.packed, unpacked=0)
    for _ in range(2):
        for (layer, form), expected in zip(forms, plain, strict=True):
            assert torch.equal(levels.parameter(layer, form), expected)
    assert levels._packed._bytes == levels.sizes.packed
    held: Any = levels._packed._held.values()
    parts = [part for entry in held for part in entry.value[0].values()]
    assert sum(part.nbytes for part in parts) == levels.sizes.packed
