"""Arrays as JSON values, for the states of searches."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


def pack(array: NDArray[np.generic]) -> dict[str, Any]:
    """An array as JSON values."""
    data = base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 1)).decode("ascii")
    return {"dtype": array.dtype.str, "shape": list(array.shape), "zlib": data}


def unpack(packed: dict[str, Any]) -> NDArray[Any]:
    """The array that `pack` was given."""
    data = zlib.decompress(base64.b64decode(packed["zlib"]))
    return np.frombuffer(data, dtype=np.dtype(packed["dtype"])).reshape(packed["shape"]).copy()
