"""Banks of random forms, made by hand for no model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from discopt_llm.bank import BankLayer, BankWriter, Form, Sparse, form_costs
from discopt_llm.layers import Layer
from discopt_llm.quantization import Quantized

CPU = torch.device("cpu")
BITS = (2, 3, 5)
BLOCKS = 3
SHAPES = {  # of one block's layers, (E, R, C)
    "self_attn.q_proj": (1, 7, 21),
    "self_attn.k_proj": (1, 3, 21),
    "mlp.experts.down_proj": (3, 5, 9),
}


def quantized(shape: tuple[int, int, int], bits: int, group_size: int, symmetric: bool, seed: int) -> Quantized:
    E, R, C = shape
    generator = torch.Generator().manual_seed(seed)
    groups = (E, R, -(-C // group_size))
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)
    scales = torch.rand(groups, generator=generator).half() + 0.01
    zeros = torch.randint(0, 1 << bits, groups, dtype=torch.uint8, generator=generator)
    return Quantized(codes, scales, None if symmetric else zeros, bits, group_size)


def sparse(shape: tuple[int, int, int], kept: int, dtype: torch.dtype, seed: int) -> Sparse:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.zeros(math.prod(shape), dtype=torch.bool)
    keep[torch.randperm(len(keep), generator=generator)[:kept]] = True
    return Sparse.of(torch.randn(shape, generator=generator), keep.view(shape), dtype)


def parts_of(form: Form) -> dict[str, Tensor | None]:
    return {name: value for name, value in vars(form).items() if value is None or isinstance(value, Tensor)}


def same(a: Form, b: Form) -> bool:
    if type(a) is not type(b) or form_costs(a) != form_costs(b):
        return False
    pairs = zip(parts_of(a).values(), parts_of(b).values(), strict=True)
    return all(x is y if x is None or y is None else x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def header(**changes: Any) -> dict[str, Any]:
    own = {
        "kind": "quantization",
        "settings": {"bits": BITS, "group_size": 8, "method": "gptq"},
        "labels": [str(bits) for bits in BITS],
        "model": {"source": "a/model", "fingerprint": "f" * 64},
        "calibration": {"fingerprint": "c" * 64, "tokens": 4096},
        "propagate": "dense",
        "blocks": BLOCKS,
    }
    return {**own, **changes}


def described(name: str, block: int, shape: tuple[int, int, int], forms: Mapping[int, Form], m: int) -> BankLayer:
    costs = np.array([form_costs(forms[level]) if level in forms else (0, 0, 0) for level in range(m)])
    return BankLayer(
        name=name,
        block=block,
        kind="mlp" if "mlp" in name else "attention",
        input=int("mlp" in name),
        matrices=shape[0],
        rows=shape[1],
        columns=shape[2],
        transposed=False,
        present=np.array([level in forms for level in range(m)]),
        weights=costs[:, 0],
        bits=costs[:, 1],
        bytes=costs[:, 2],
        errors=np.array([0.5 / (level + 1) if level in forms else np.nan for level in range(m)]),
        outliers={"3": 0.25, "5": 0.1},
    )


def block_of(block: int) -> tuple[list[BankLayer], dict[tuple[str, int], Form]]:
    """What a builder makes of a block; the last layer of every block lacks the lowest level."""
    layers, forms = [], {}
    for i, (short, shape) in enumerate(SHAPES.items()):
        own = {
            level: quantized(shape, bits, 8, i == 1, 100 * block + 10 * i + bits)
            for level, bits in enumerate(BITS)
            if i < 2 or level > 0
        }
        name = f"layers.{block}.{short}"
        layers.append(described(name, block, shape, own, len(BITS)))
        forms |= {(name, level): form for level, form in own.items()}
    return layers, forms


def build(path: Path, stop: int = BLOCKS, **changes: Any) -> BankWriter:
    """A bank's first blocks."""
    writer = BankWriter.begin(path, header(**changes))
    for block in range(stop):
        if block not in writer.finished:
            writer.write_block(block, *block_of(block))
    return writer


def model_layers(**changes: Any) -> list[Layer]:
    """The layers of the model that `build` makes a bank of; `changes` are those of layer 4."""
    layers = []
    for block in range(BLOCKS):
        for one in block_of(block)[0]:
            fields = ("name", "block", "kind", "input", "matrices", "rows", "columns", "transposed")
            own = {field: getattr(one, field) for field in fields}
            own |= changes if len(layers) == 4 else {}
            layers.append(Layer(index=len(layers), owner=nn.Module(), attribute="weight", **own))
    return layers
