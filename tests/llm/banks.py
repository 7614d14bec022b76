"""Banks of tiny models: plans that are built in well under a second."""

from __future__ import annotations

from functools import cache

import torch
from transformers import PreTrainedModel

from discopt_llm.anatomy import read_anatomy
from discopt_llm.build import DENSE, BankPlan
from discopt_llm.calibration import Calibration
from discopt_llm.layers import read_layers
from discopt_llm.models import LoadedModel
from discopt_llm.quantization import QuantizationSettings
from discopt_llm.recipes import QuantizationRecipe, Recipe, SparsityRecipe
from discopt_llm.sparsity import SparsitySettings
from tests.llm.families import FAMILIES, VOCABULARY, tiny_tokenizer

KINDS = ("quantization", "sparsity")
WIDTHS = (2, 3, 4, 6)
RECIPES: dict[str, Recipe] = {
    # Groups that do not divide the columns, and steps of which the smallest layers cannot make all.
    "quantization": QuantizationRecipe(QuantizationSettings(bits=WIDTHS, group_size=12)),
    "sparsity": SparsityRecipe(SparsitySettings(), target=0.5, levels=9, step=120, values=torch.float16),
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
    layers = read_layers(model.model, model.anatomy)
    return BankPlan(model, layers, recipe or RECIPES[kind], text or calibration(), propagate)
