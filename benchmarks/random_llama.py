"""Llama-shaped models of random weights and their banks: made on the device, with nothing downloaded or trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from shapes import GROUP_SIZE, Shape
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from discopt_llm.anatomy import block_modules, read_anatomy
from discopt_llm.bank import Bank, BankWriter
from discopt_llm.memory import Memory
from discopt_llm.models import LoadedModel
from discopt_llm.quantization import QuantizationSettings
from discopt_llm.recipes import QuantizationRecipe
from discopt_llm.residency import Residency

DEVIATION = 0.02  # of the weights
POSITIONS = 8192


@torch.no_grad()
def random_llama(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int, memory: Memory) -> LoadedModel:
    """A model whose matrices are N(0, 0.02) and whose norms are 1; it has no tokenizer.

    With a bound on the device's memory it is kept on the host, and its blocks go to the device as they are needed.
    """
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=shape.tied,
    )
    kept = device if memory.on(device) is None else torch.device("cpu")
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # what it computed on "meta" is lost
    model.model.rotary_emb.to(kept)
    rng = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device=kept, recurse=False)
            for parameter in module.parameters(recurse=False):
                parameter.copy_(_random(parameter, device, rng))
    model.tie_weights()
    model.eval().requires_grad_(False)
    residency = None if memory.on(device) is None else Residency(model, block_modules(model), device, host=memory.host)
    return LoadedModel(model, None, f"Llama of random weights, seed {seed}", read_anatomy(model), residency)


def _random(parameter: Tensor, device: torch.device, rng: torch.Generator) -> Tensor:
    """Fresh values for a parameter, made on the device, which is the faster one."""
    values = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
    return values if parameter.dim() == 1 else values.normal_(std=DEVIATION, generator=rng)


@torch.no_grad()
def rounded_bank(loaded: LoadedModel, path: Path, widths: Sequence[int]) -> Bank:
    """A bank by rounding to nearest, solved on the model's device; without text its errors are those of the weights."""
    recipe = QuantizationRecipe(QuantizationSettings(bits=tuple(widths), method="rtn", group_size=GROUP_SIZE))
    header = {
        "kind": recipe.kind,
        "settings": recipe.described,
        "labels": list(recipe.labels),
        "propagate": "dense",
        "model": {"source": loaded.source, "fingerprint": loaded.fingerprint},
        "calibration": {},
        "blocks": len(loaded.anatomy.blocks),
    }
    writer = BankWriter.begin(path, header)
    for block in range(len(loaded.anatomy.blocks)):
        layers, forms = [], {}
        for layer in loaded.layers:
            if layer.block != block:
                continue
            W = layer.to_matrices(layer.parameter.detach())[0].to(loaded.device, torch.float32)
            solved = recipe.solve([layer], [W], torch.eye(layer.columns, device=loaded.device), 0)
            forms |= {(layer.name, level): form for level, form in enumerate(solved.forms[0])}
            layers.append(replace(recipe.planned(layer), errors=solved.errors[0] / solved.norms[0]))
        writer.write_block(block, layers, forms)
    return writer.finish()
