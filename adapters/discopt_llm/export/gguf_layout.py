"""Which tensors of a GGUF file a model's parameter becomes, and in which order its rows lie there.

Every difference is one of rows, so that it holds for the bytes of rows that are quantized one by one as well:
llama.cpp rotates neighbouring pairs where transformers rotates halves (`interleaved`), keeps q, k and v of all heads
apart where GPT-NeoX has them head by head (`fused`), and has the gates and the up projections of experts in two
tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig

from discopt_llm.errors import ModelError
from discopt_llm.export.gguf_families import Family

__all__ = ["Layout", "Place", "interleaved"]

_GATE_UP = "experts.gate_up_proj"


@dataclass(frozen=True, eq=False)
class Place:
    """A tensor of the file, and the rows of a parameter that it has."""

    name: str  # "blk.0.attn_q.weight"
    rows: NDArray[np.intp] | None = None  # None: all, as they are

    def of(self, array: NDArray[Any], *, vector: bool) -> NDArray[Any]:
        """Its rows of what is stored of a parameter, (..., R, x), or (R,) of a vector."""
        if self.rows is None:
            return array
        return array[self.rows] if vector else array[..., self.rows, :]


@dataclass(frozen=True, eq=False)
class Layout:
    """The tensors of one model in a GGUF file."""

    family: Family
    config: PretrainedConfig

    def names(self, parameter: str) -> tuple[str, ...]:
        """What a parameter is called in the file, by its full name; ModelError if the family has no place for it."""
        base, dot, ending = parameter.rpartition(".")
        if not dot or ending not in ("weight", "bias"):
            base, ending = parameter, "weight"
        parts: tuple[str, ...] = (base,)
        if base.endswith(_GATE_UP):
            stem = base.removesuffix("gate_up_proj")
            parts = (f"{stem}gate_proj", f"{stem}up_proj")
        return tuple(f"{self._name(part)}.{ending}" for part in parts)

    def places(self, parameter: str, rows: int) -> tuple[Place, ...]:
        """The same for a parameter with so many rows, with those that go there."""
        names = self.names(parameter)
        if len(names) > 1:
            return tuple(map(Place, names, np.split(np.arange(rows), len(names))))
        return (Place(names[0], self._order(names[0].split(".")[-2], rows)),)

    def _name(self, base: str) -> str:
        name: str | None = self._names.get_name(base)
        if name is None:
            raise ModelError(f"llama.cpp's {self.family.name} has no tensor for {base}")
        return name

    @cached_property
    def _names(self) -> gguf.TensorNameMap:
        return gguf.get_tensor_name_map(self.family.arch, self.config.num_hidden_layers)

    def _order(self, tensor: str, rows: int) -> NDArray[np.intp] | None:
        if self.family.rows == "interleaved" and tensor in (heads := _heads(self.config)):
            return interleaved(rows, heads[tensor])
        if self.family.rows == "fused" and tensor == "attn_qkv":
            return np.arange(rows).reshape(self.config.num_attention_heads, 3, -1).swapaxes(0, 1).reshape(-1)
        return None


def interleaved(rows: int, heads: int) -> NDArray[np.intp]:
    """The order in which the two halves of every head's rows alternate."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _heads(config: PretrainedConfig) -> Mapping[str, int]:
    """Of the projections that are rotated."""
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
