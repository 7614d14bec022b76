"""Banks of tiny models: plans that are built in well under a second, and builds that are stopped or watched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from discopt_llm.anatomy import read_anatomy
from discopt_llm.bank import BankWriter
from discopt_llm.build import DENSE, BankPlan
from discopt_llm.calibration import Calibration
from discopt_llm.layers import Layer, layers_for
from discopt_llm.models import LoadedModel
from discopt_llm.quantization import QuantizationSettings
from discopt_llm.recipes import GgmlRecipe, QuantizationRecipe, Recipe, SolvedStack, SparsityRecipe
from discopt_llm.sparsity import SparsitySettings
from tests.documents import names
from tests.llm.families import FAMILIES, VOCABULARY, tiny_tokenizer

KINDS = ("quantization", "sparsity")
WIDTHS = (2, 3, 4, 6)
RECIPES: dict[str, Recipe] = {
    # Groups that do not divide the columns, and steps of which the smallest layers cannot make all.
    "quantization": QuantizationRecipe(QuantizationSettings(bits=WIDTHS, group_size=12)),
    "sparsity": SparsityRecipe(SparsitySettings(), target=0.5, levels=9, step=120, values=torch.float16),
    # Blocks that do not divide all rows, and what takes any.
    "gguf": GgmlRecipe(("Q4_0", "Q5_1", "Q8_0", "F16"), imatrix=False),
}


def read(model: PreTrainedModel) -> LoadedModel:
    return LoadedModel(model, tiny_tokenizer(), "test", read_anatomy(model))


@cache
def loaded(family: str) -> LoadedModel:
    return read(FAMILIES[family]())


def calibration(count: int = 12, length: int = 16, seed: int = 0) -> Calibration:
    generator = torch.Generator().manual_seed(seed)
    return Calibration(torch.randint(VOCABULARY - 4, (count, length), generator=generator), "test")


def plan(
    model: LoadedModel,
    kind: str,
    propagate: str = DENSE,
    *,
    text: Calibration | None = None,
    recipe: Recipe | None = None,
) -> BankPlan:
    return BankPlan(model, layers_for(model, kind), recipe or RECIPES[kind], text or calibration(), propagate)


@dataclass(frozen=True, eq=False)
class Watched:
    """A recipe that notes what it is asked to solve."""

    recipe: Any
    H: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # by layer and expert
    solves: Counter[int] = field(default_factory=Counter)  # by block

    def __getattr__(self, name: str) -> Any:
        return getattr(self.recipe, name)

    def solve(self, layers: Sequence[Layer], weights: Sequence[Tensor], H: Tensor, expert: int) -> SolvedStack:
        self.solves[layers[0].block] += 1
        self.H.update({(layer.name, expert): H for layer in layers})
        return self.recipe.solve(layers, weights, H, expert)  # type: ignore[no-any-return]


def watched(model: LoadedModel, kind: str, propagate: str = "dense", **options: Any) -> tuple[BankPlan, Watched]:
    recipe = Watched(options.pop("recipe", RECIPES[kind]))
    return plan(model, kind, propagate, recipe=recipe, **options), recipe


class Stopped(Exception):  # noqa: N818
    pass


@contextmanager
def stopped_after(blocks: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The next block after so many is solved, but not written."""
    write = BankWriter.write_block
    left = blocks

    def fail(self: BankWriter, *args: Any) -> None:
        nonlocal left
        if not left:
            raise Stopped
        left -= 1
        write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(BankWriter, "write_block", fail)
        with pytest.raises(Stopped):
            yield


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in sorted(names(folder))}
