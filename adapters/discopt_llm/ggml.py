"""The types in which llama.cpp stores matrices: how large they are, what rows they take, and quantizing to them.

A type is one that the gguf library can read back and that takes no more than the 16 bits of a dense weight. Its own
quantizers, in NumPy, make some of them; the others, and all of them with an importance matrix, ggml itself makes
(see `ggml_native`). What they can do is asked of the libraries, not written down here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from discopt_llm.errors import BankError
from discopt_llm.ggml_native import INSTALL, PACKAGE, Native, can_read, load_native

__all__ = [
    "GgmlType",
    "check_makeable",
    "default_types",
    "dequantize",
    "has_native",
    "importance_of",
    "libraries",
    "parse_types",
    "quantize",
    "types",
]

DENSE_BITS = 16
LARGEST = 65504.0  # of half precision, in which scales are stored
LEAST_IMPORTANCE = 1e-6  # of the mean; ggml divides by sums of it

# What llama.cpp itself gives rows that K-types do not divide, by its table of fallbacks.
_DEFAULT_NUMPY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_DEFAULT_NATIVE = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
_DEFAULT_SHORT = ("IQ4_NL", "Q5_0", "Q5_1")
_DEFAULT_ANY = "F16"


@dataclass(frozen=True)
class GgmlType:
    """A type; every row is a whole number of blocks."""

    kind: GGMLQuantizationType
    weights: int  # of a block
    bytes: int  # of a block

    @property
    def name(self) -> str:
        return self.kind.name

    @property
    def bits(self) -> Fraction:
        """Bits per weight, with scales."""
        return Fraction(8 * self.bytes, self.weights)

    def takes(self, columns: int) -> bool:
        """Whether rows of so many weights can be stored."""
        return columns % self.weights == 0

    def row_bytes(self, columns: int) -> int:
        """Of a row of so many weights; ValueError for one that it does not take."""
        if not self.takes(columns):
            raise ValueError(f"{self.name} takes rows of a multiple of {self.weights} weights, got {columns}")
        return columns // self.weights * self.bytes


@cache
def types() -> dict[str, GgmlType]:
    """All types by name, from the fewest bits to the most.

    Of equal ones the better comes later: those with larger blocks, and of these the non-linear ones (IQ).
    """
    found = []
    for kind, (weights, size) in GGML_QUANT_SIZES.items():
        if 8 * size <= DENSE_BITS * weights and can_read(kind):
            found.append(GgmlType(kind, weights, size))
    found.sort(key=lambda t: (t.bits, t.weights, t.name.startswith("IQ"), -t.kind))
    return {t.name: t for t in found}


def has_native() -> bool:
    """Whether ggml's own quantizers are there."""
    return load_native() is not None


def parse_types(names: Iterable[str]) -> tuple[str, ...]:
    """Names in any case and order -> those of the types, from the fewest bits to the most, each once.

    Raises ValueError for one that is none.
    """
    asked = {name.upper() for name in names}
    if unknown := sorted(asked - types().keys()):
        plain = [name for name in types() if name in _in_numpy()]
        others = [name for name in types() if name not in _in_numpy()]
        raise ValueError(
            f"types must be among {', '.join(plain)} or, with the package {PACKAGE}, {', '.join(others)}, "
            f"got {', '.join(unknown)}"
        )
    return tuple(name for name in types() if name in asked)


def check_makeable(names: Sequence[str], *, imatrix: bool) -> None:
    """Raise BankError unless all these types can be made here, with an importance matrix or without one."""
    native = load_native()
    if native is None:
        if imatrix:
            raise BankError(
                f"an importance matrix needs the package {PACKAGE} ({INSTALL}); leave it out for plain types"
            )
        if lacking := [name for name in names if name not in _in_numpy()]:
            raise BankError(f"{', '.join(lacking)} need the package {PACKAGE}: {INSTALL}")
        return
    for name in names:
        kind = types()[name].kind
        if name not in _in_numpy() and not native.knows(kind):
            raise BankError(f"the package {PACKAGE} does not know {name}: {INSTALL} --upgrade")
        if not imatrix and name not in _in_numpy() and native.needs_importance(kind):
            raise BankError(f"{name} cannot be made without an importance matrix")


def libraries(names: Sequence[str], *, imatrix: bool) -> tuple[str, ...]:
    """The packages besides gguf that these types are made by."""
    return () if not imatrix and all(name in _in_numpy() for name in names) else (PACKAGE,)


def default_types(columns: Iterable[int]) -> tuple[str, ...]:
    """What suits layers of these lengths of rows: a ladder for each of them, of the types that can be made here.

    With ggml's own quantizers those are the K-types and Q8_0, and for rows that K-types do not divide the types that
    llama.cpp itself falls back on; else those of NumPy. F16 is among them where nothing shorter takes the rows.
    """
    lengths = {*columns}
    names = [*(_DEFAULT_NATIVE if has_native() else _DEFAULT_NUMPY)]
    if has_native() and not all(types()["Q4_K"].takes(length) for length in lengths):
        names += _DEFAULT_SHORT
    if not all(types()["Q8_0"].takes(length) for length in lengths):
        names.append(_DEFAULT_ANY)
    return tuple(name for name in parse_types(names) if any(types()[name].takes(length) for length in lengths))


def importance_of(H: Tensor) -> Tensor:
    """What every column weighs in llama.cpp's importance matrix, (C,) float32 with a mean of 1: the diagonal of H.

    H (C, C) is the second moment of the inputs. Inputs that are never there count a little, since ggml divides by
    sums of it, and all the same where none is.
    """
    diagonal = H.diagonal().double()
    mean = diagonal.mean()
    if not mean > 0:
        return torch.ones_like(diagonal, dtype=torch.float32)
    return (diagonal / mean).clamp(min=LEAST_IMPORTANCE).float()


def quantize(W: Tensor, name: str, importance: Tensor | None = None) -> Tensor:
    """Rows W (R, C) in a type: (R, row bytes) uint8 on the CPU.

    importance: (C,), positive; errors of the columns count so much. None: all the same, by the plain algorithm of
        the type. Raises ValueError for rows that the type does not take, or weights that are too large for it.
    """
    found = types()[name]
    found.row_bytes(W.shape[-1])
    rows = W.detach().float().cpu().contiguous().numpy()
    if not np.abs(rows).max(initial=0.0) <= LARGEST:  # a NaN is not
        raise ValueError(f"weights must be finite and at most {LARGEST:g} to be stored as {name}, got others")
    if importance is None and name in _in_numpy():
        return torch.from_numpy(gguf.quants.quantize(rows, found.kind).view(np.uint8))
    weighing = None if importance is None else importance.float().cpu().numpy()
    return torch.from_numpy(_native(name).quantize(rows, found.kind, weighing, torch.get_num_threads()))


def dequantize(data: Tensor, name: str) -> Tensor:
    """Stored rows (..., row bytes) uint8 -> their weights (..., C) float32, as gguf reads them, on the same device."""
    weights = gguf.quants.dequantize(data.cpu().contiguous().numpy(), types()[name].kind)
    return torch.from_numpy(weights).to(data.device)


def _native(name: str) -> Native:
    native = load_native()
    if native is None:
        raise BankError(f"{name} needs the package {PACKAGE}: {INSTALL}")
    return native


@cache
def _in_numpy() -> frozenset[str]:
    """The types that gguf quantizes to by itself."""
    return frozenset(name for name, found in types().items() if _can_write(found))


def _can_write(found: GgmlType) -> bool:
    try:
        gguf.quants.quantize(np.zeros((1, found.weights), dtype=np.float32), found.kind)
    except NotImplementedError:
        return False
    return True
