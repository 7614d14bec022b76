"""The forms in which a bank stores a layer, what they cost, and the packed tensors they become on disk.

Quantized: codes of their true width, scales, and zero points of that width. Sparse: a bit for every weight and the
values of those that stay. Ggml: the bytes that llama.cpp reads. `from_parts(to_parts(form))` is the form again, bit
by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from discopt_llm import ggml
from discopt_llm.lanes import to_device
from discopt_llm.packing import pack_bits, packed_size, unpack_bits
from discopt_llm.quantization import Quantized

__all__ = [
    "Costs",
    "Form",
    "Ggml",
    "Sparse",
    "dense_weights",
    "form_costs",
    "form_shape",
    "from_parts",
    "ggml_costs",
    "quantized_costs",
    "sparse_costs",
    "to_parts",
]

VALUE_BITS = 16  # of scales, and of the weights that pruning keeps
VALUE_DTYPES = (torch.float16, torch.bfloat16)


class Costs(NamedTuple):
    """What one form of a layer costs."""

    weights: int  # that are kept
    bits: int  # of their codes or values alone
    bytes: int  # stored, with scales and zero points or mask


@dataclass(frozen=True, eq=False)
class Sparse:
    """A layer of which some weights are zero."""

    keep: Tensor  # (E, R, C) bool
    values: Tensor  # (nnz,) float16 or bfloat16: the others, in row-major order

    def __post_init__(self) -> None:
        if self.keep.dtype != torch.bool or self.keep.ndim != 3:
            raise ValueError(f"keep must be bool of shape (E, R, C), got {self.keep.dtype} {tuple(self.keep.shape)}")
        if self.values.dtype not in VALUE_DTYPES or self.values.ndim != 1:
            shape = tuple(self.values.shape)
            raise ValueError(f"values must be float16 or bfloat16 of shape (nnz,), got {self.values.dtype} {shape}")

    @classmethod
    def of(cls, weights: Tensor, keep: Tensor, dtype: torch.dtype) -> Sparse:
        """The weights (E, R, C) where `keep` (E, R, C) is True, rounded to `dtype`."""
        values = weights[keep].to(dtype)
        if not bool(values.isfinite().all()):
            raise ValueError(f"weights must be finite in {dtype}, got one that is not")
        return cls(keep, values)

    def dense(self) -> Tensor:
        """The weights with their zeros, (E, R, C) float32."""
        zeros = torch.zeros(self.keep.shape, dtype=torch.float32, device=self.keep.device)
        return zeros.masked_scatter_(self.keep, self.values.float())


@dataclass(frozen=True, eq=False)
class Ggml:
    """A layer as llama.cpp stores it: every row in blocks of one of its types, one after another."""

    type: str  # "Q4_K"
    data: Tensor  # (E, R, bytes of a row) uint8
    columns: int  # C

    def __post_init__(self) -> None:
        if self.type not in ggml.types():
            raise ValueError(f"type must be one of {', '.join(ggml.types())}, got {self.type!r}")
        size = ggml.types()[self.type].row_bytes(self.columns)
        shape = tuple(self.data.shape)
        if self.data.dtype != torch.uint8 or len(shape) != 3 or shape[-1] != size:
            raise ValueError(f"data must be uint8 of shape (E, R, {size}), got {self.data.dtype} {shape}")

    def dense(self) -> Tensor:
        """The weights, (E, R, C) float32, as the gguf library reads them."""
        return ggml.dequantize(self.data, self.type)


Form: TypeAlias = Quantized | Sparse | Ggml


def quantized_costs(
    matrices: int, rows: int, columns: int, bits: int, group_size: int | None, *, symmetric: bool
) -> Costs:
    """Of (E, R, C) weights with a scale, and unless symmetric a zero point, for every group of a row."""
    weights = matrices * rows * columns
    groups = matrices * rows * (1 if group_size is None else -(-columns // group_size))
    zeros = 0 if symmetric else packed_size(groups, bits)
    return Costs(weights, weights * bits, packed_size(weights, bits) + groups * VALUE_BITS // 8 + zeros)


def sparse_costs(weights: int, kept: int) -> Costs:
    """Of a mask for all weights and the values of those that are kept."""
    return Costs(kept, kept * VALUE_BITS, packed_size(weights, 1) + kept * VALUE_BITS // 8)


def ggml_costs(matrices: int, rows: int, columns: int, name: str) -> Costs:
    """Of (E, R, C) weights in a type of ggml; its scales count among the bits, for no reader tells them apart."""
    size = matrices * rows * ggml.types()[name].row_bytes(columns)
    return Costs(matrices * rows * columns, 8 * size, size)


def form_costs(form: Form) -> Costs:
    """What a form costs; from its shapes alone."""
    if isinstance(form, Sparse):
        return sparse_costs(form.keep.numel(), form.values.numel())
    E, R, C = form_shape(form)
    if isinstance(form, Ggml):
        return ggml_costs(E, R, C, form.type)
    return quantized_costs(E, R, C, form.bits, form.group_size, symmetric=form.zeros is None)


def form_shape(form: Form) -> tuple[int, int, int]:
    """(E, R, C)."""
    if isinstance(form, Ggml):
        return form.data.shape[0], form.data.shape[1], form.columns
    E, R, C = form.keep.shape if isinstance(form, Sparse) else form.codes.shape
    return E, R, C


def dense_weights(form: Form) -> Tensor:
    """The weights that a form stands for, (E, R, C) float32."""
    return form.dequantized() if isinstance(form, Quantized) else form.dense()


def to_parts(form: Form) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The packed tensors of a form, on the CPU, and what else it takes to read them, as JSON values."""
    if isinstance(form, Sparse):
        if (kept := int(form.keep.sum())) != form.values.numel():
            raise ValueError(f"expected a value for each of the {kept} weights kept, got {form.values.numel()}")
        parts = {"keep": pack_bits(form.keep.to(torch.uint8), 1), "values": form.values}
        described: dict[str, Any] = {"form": "sparse"}
    elif isinstance(form, Ggml):
        parts = {"data": form.data}
        described = {"form": "ggml", "type": form.type}
    else:
        parts = {"codes": pack_bits(form.codes, form.bits), "scales": form.scales}
        if form.zeros is not None:
            parts["zeros"] = pack_bits(form.zeros, form.bits)
        described = {
            "form": "quantized",
            "bits": form.bits,
            "group_size": form.group_size,
            "symmetric": form.zeros is None,
        }
    return {name: part.detach().cpu().contiguous() for name, part in parts.items()}, described


def from_parts(
    read: Callable[[str], Tensor], described: Mapping[str, Any], shape: tuple[int, int, int], device: torch.device
) -> Form:
    """The form (E, R, C) whose packed tensors `read` gives by name; they are moved to the device and unpacked there.

    Raises KeyError, TypeError or ValueError if the tensors and the description do not make a form of this shape.
    """
    E, R, C = shape

    def packed(name: str, bits: int, shape: tuple[int, ...]) -> Tensor:
        count = torch.Size(shape).numel()
        return unpack_bits(to_device(read(name), device), bits, count).view(shape)

    def values(name: str) -> Tensor:
        part = read(name)
        return part.clone() if device.type == "cpu" else to_device(part, device)  # not a piece of the file

    if described["form"] == "sparse":
        return Sparse(packed("keep", 1, shape).view(torch.bool), values("values"))
    if described["form"] == "ggml":
        form = Ggml(described["type"], values("data"), C)
        if form_shape(form) != shape:
            raise ValueError(f"expected data of shape {shape}, got {form_shape(form)}")
        return form
    if described["form"] != "quantized":
        raise ValueError(f"expected a form of quantized, sparse or ggml, got {described['form']!r}")
    bits, group_size = described["bits"], described["group_size"]
    groups = (E, R, -(-C // group_size))
    scales = values("scales")
    if scales.dtype != torch.float16 or scales.shape != groups:
        raise ValueError(f"expected scales as float16 of shape {groups}, got {scales.dtype} {tuple(scales.shape)}")
    zeros = None if described["symmetric"] else packed("zeros", bits, groups)
    return Quantized(packed("codes", bits, shape), scales, zeros, bits, group_size)
