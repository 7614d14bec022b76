"""ggml's own quantizers, of llama.cpp: the C functions that the optional package xllamacpp carries along.

The package has no Python names for them; its extension module is a shared library like any other, and exports them.
They end the process where they are called wrongly, so all that they are given is checked before.
"""

from __future__ import annotations

import ctypes
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from discopt_llm.errors import BankError, one_line

__all__ = ["INSTALL", "PACKAGE", "Native", "can_read", "load_native"]

PACKAGE = "xllamacpp"
INSTALL = f"pip install {PACKAGE}"

_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {  # name -> type of the result and of the arguments, as in ggml.h
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p],
    ),
    "ggml_quantize_init": (None, [ctypes.c_int]),
    "ggml_quantize_requires_imatrix": (ctypes.c_bool, [ctypes.c_int]),
    "ggml_row_size": (ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]),
    "ggml_type_name": (ctypes.c_char_p, [ctypes.c_int]),
}


class Native:
    """The functions of one shared library; raises BankError for one that lacks any of them."""

    def __init__(self, path: Path) -> None:
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise BankError(f"cannot load {path}: {one_line(error)}; {INSTALL}") from error
        self._functions: dict[str, Any] = {}
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name, None)
            if function is None:
                raise BankError(f"expected {path} to export ggml's {name}, got none; {INSTALL} --upgrade")
            function.restype, function.argtypes = result, arguments
            self._functions[name] = function

    def knows(self, kind: GGMLQuantizationType) -> bool:
        """Whether the library has this type of weights, with blocks of the size that gguf takes them to have."""
        if not can_read(kind):  # among them types that ggml has for other things than weights, and cannot quantize to
            return False
        # Of a number that it does not know the name is still safe to ask for, and only that.
        name: bytes | None = self._functions["ggml_type_name"](int(kind))
        if name is None or name.decode().lower() != kind.name.lower():
            return False
        weights, size = GGML_QUANT_SIZES[kind]
        return bool(self._functions["ggml_row_size"](int(kind), weights) == size)

    def needs_importance(self, kind: GGMLQuantizationType) -> bool:
        """Whether the type cannot do without an importance matrix."""
        return bool(self._functions["ggml_quantize_requires_imatrix"](int(kind)))

    def quantize(
        self,
        rows: NDArray[np.float32],
        kind: GGMLQuantizationType,
        importance: NDArray[np.float32] | None,
        threads: int = 1,
    ) -> NDArray[np.uint8]:
        """Rows (R, C) in a type, (R, row bytes); `importance` (C,) weighs the squared errors of the columns.

        Rows are quantized one by one, so that the number of threads changes nothing. Raises ValueError for what ggml
        would end the process on.
        """
        R, C = rows.shape
        weights, size = GGML_QUANT_SIZES[kind]
        if not self.knows(kind) or C % weights:
            raise ValueError(f"expected a type of ggml that takes rows of {C}, got {kind.name}")
        if importance is None and self.needs_importance(kind):
            raise ValueError(f"{kind.name} needs an importance matrix, got none")
        if importance is not None and (importance.shape != (C,) or not (importance > 0).all()):
            raise ValueError(f"importance must be positive of shape ({C},), got {importance.shape}")
        source = np.ascontiguousarray(rows, dtype=np.float32)
        weighing = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
        out = np.empty((R, C // weights * size), dtype=np.uint8)
        self._functions["ggml_quantize_init"](int(kind))

        def part(start: int, stop: int) -> None:
            self._functions["ggml_quantize_chunk"](
                int(kind),
                source.ctypes.data,
                out.ctypes.data,
                start * C,
                stop - start,
                C,
                None if weighing is None else weighing.ctypes.data,
            )

        ends = np.linspace(0, R, min(threads, R) + 1).astype(int).tolist()
        with ThreadPoolExecutor(len(ends) - 1) as pool:  # a call of C lets other threads run
            for done in [pool.submit(part, *rows) for rows in pairwise(ends)]:
                done.result()
        return out


@cache
def can_read(kind: GGMLQuantizationType) -> bool:
    """Whether gguf can turn this type into weights."""
    try:
        gguf.quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


@cache
def load_native() -> Native | None:
    """The library; None where the package is not installed. Raises BankError for one without ggml's functions."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    files = sorted(file for folder in folders for file in folder.glob(f"{PACKAGE}*") if file.suffix in (".so", ".pyd"))
    if spec is None:
        return None
    if not files:
        raise BankError(f"expected the package {PACKAGE} to have an extension module, got none; {INSTALL}")
    return Native(files[0])
