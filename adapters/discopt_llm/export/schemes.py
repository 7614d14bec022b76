"""Quantized layers as tensors of the compressed-tensors format `pack-quantized`, and the config that describes them.

A code q and a zero point z of our forms are unsigned; there they are signed, both less 2^(bits - 1), so that the
weights, scale * (q - z), are the same. The library packs them into words of 32 bits: codes along a row, zero points
along a column. Everything here needs the library (extra `export`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from discopt.errors import DiscoptError
from discopt_llm.quantization import Quantized

__all__ = [
    "Scheme",
    "check_library",
    "library",
    "packed_tensors",
    "quantization_config",
    "reads_zero_points",
    "unpacked_weights",
    "zero_points_mended_",
    "zeros_of",
]

FORMAT = "pack-quantized"


@dataclass(frozen=True)
class Scheme:
    """How a layer is quantized."""

    bits: int
    symmetric: bool
    group_size: int | None  # columns that share a scale; None: all of a row

    @classmethod
    def of(cls, form: Quantized) -> Scheme:
        """Of a quantized layer."""
        whole = form.group_size >= form.codes.shape[-1]
        return cls(form.bits, form.zeros is None, None if whole else form.group_size)

    @property
    def words(self) -> str:
        """For people: "4 bits with zero points in groups of 64"."""
        zeros = "" if self.symmetric else " with zero points"
        return f"{self.bits} bits{zeros} in {'rows' if self.group_size is None else f'groups of {self.group_size}'}"

    @property
    def arguments(self) -> dict[str, Any]:
        """As a config has it."""
        strategy = "channel" if self.group_size is None else "group"
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": strategy,
            "group_size": self.group_size,
            "dynamic": False,
        }


def check_library() -> None:
    """Raise DiscoptError if the compressed-tensors library is not installed."""
    try:
        import compressed_tensors  # noqa: F401
    except ModuleNotFoundError as error:
        raise DiscoptError("this format needs the extra export: pip install 'discopt-search[export]'") from error


def library() -> str:
    """The library and its version, for people."""
    return f"compressed-tensors {version('compressed-tensors')}"


def packed_tensors(form: Quantized) -> dict[str, Tensor]:
    """The tensors of a layer (1, R, C) by their names in its module."""
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    if len(form.codes) != 1:
        raise ValueError(f"expected one matrix, got {len(form.codes)}")
    tensors = {
        "weight_packed": pack_to_int32(_signed(form.codes[0], form.bits), form.bits),
        "weight_scale": form.scales[0].contiguous(),
        "weight_shape": torch.tensor(form.codes.shape[1:]),
    }
    if form.zeros is not None:
        tensors["weight_zero_point"] = pack_to_int32(_signed(form.zeros[0], form.bits), form.bits, packed_dim=0)
    return tensors


def unpacked_weights(tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """What the library makes of these tensors, (R, C) float32: no bit is lost in it."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor

    wide = {**tensors, "weight_scale": tensors["weight_scale"].float()}
    weights: Tensor = PackedQuantizationCompressor.decompress(wide, _library_scheme(scheme, []))["weight"]
    return weights


def zeros_of(rows: int, columns: int, bits: int) -> Quantized:
    """A layer (1, R, C) of zeros, a scale for each row."""
    codes = torch.full((1, rows, columns), 1 << (bits - 1), dtype=torch.uint8)
    return Quantized(codes, torch.ones((1, rows, 1), dtype=torch.float16), None, bits, columns)


def quantization_config(modules: Mapping[str, Scheme], ignored: Sequence[str]) -> dict[str, Any]:
    """What config.json says of the modules that are packed, by their schemes, and of other linear ones."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    members: dict[Scheme, list[str]] = {}
    for name, scheme in modules.items():
        members.setdefault(scheme, []).append(name)
    ordered = sorted(members, key=lambda scheme: (scheme.bits, not scheme.symmetric, scheme.group_size or 0))
    groups = {f"group_{i}": _library_scheme(scheme, members[scheme]) for i, scheme in enumerate(ordered)}
    config = QuantizationConfig(
        config_groups=groups,
        format=FORMAT,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(ignored),
    )
    dumped: dict[str, Any] = config.model_dump(mode="json")
    return dumped


def reads_zero_points() -> bool:
    """Whether transformers can load zero points with the library that is installed.

    transformers makes a packed model without memory first and asks the library for the shapes of its tensors; releases
    0.18 to 0.20 name that of packed codes, but leave zero points as they are unpacked.
    """
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor

    bits, rows = 4, 64
    scheme = _library_scheme(Scheme(bits, False, None), [])
    with torch.device("meta"):
        tensors = {
            "weight": torch.empty(rows, 32),
            "weight_scale": torch.empty(rows, 1),
            "weight_zero_point": torch.empty(rows, 1, dtype=torch.int8),
        }
        packed = PackedQuantizationCompressor.compress(tensors, scheme)
    return len(packed["weight_zero_point"]) == rows * bits // 32


@contextmanager
def zero_points_mended_() -> Iterator[None]:
    """The library with what `reads_zero_points` asks for, while inside; transformers loads all that we write then."""
    if reads_zero_points():
        yield
        return
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor

    before = PackedQuantizationCompressor.__dict__["compress"]

    def compress(cls: Any, state_dict: Any, scheme: Any) -> Any:
        packed = before.__func__(cls, state_dict, scheme)
        zeros = packed.get("weight_zero_point")
        if zeros is not None and zeros.is_meta:
            rows, groups = zeros.shape
            words = -(-rows * scheme.weights.num_bits // 32)
            packed["weight_zero_point"] = torch.empty((words, groups), dtype=torch.int32, device="meta")
        return packed

    PackedQuantizationCompressor.compress = classmethod(compress)
    try:
        yield
    finally:
        PackedQuantizationCompressor.compress = before


def _library_scheme(scheme: Scheme, targets: list[str]) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(targets=targets, weights=QuantizationArgs(**scheme.arguments), format=FORMAT)


def _signed(codes: Tensor, bits: int) -> Tensor:
    return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
