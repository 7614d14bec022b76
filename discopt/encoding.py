"""Values as strict JSON, which knows neither numpy's types nor numbers that are not finite."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def checksum(state: Any) -> str:
    """SHA-256 of the canonical JSON of `state`."""
    canonical = json.dumps(state, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def plain(obj: Any, *, exact: bool) -> Any:
    """`obj` in the types JSON has. `exact` keeps numbers that are not finite apart, else they are null."""
    if obj is None or isinstance(obj, bool | str):
        return obj
    if hasattr(obj, "tolist"):  # numpy's arrays and scalars
        return plain(obj.tolist(), exact=exact)
    if isinstance(obj, int):
        return int(obj)
    if isinstance(obj, float):
        return _plain_float(obj, exact)
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if isinstance(obj, Mapping):
        for key in obj:
            if not isinstance(key, str):
                raise TypeError(f"JSON objects have names as keys, got {key!r}")
        return {key: plain(value, exact=exact) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [plain(value, exact=exact) for value in obj]
    raise TypeError(f"expected something that can be written as JSON, got {type(obj).__name__}")


def _plain_float(number: float, exact: bool) -> Any:
    if math.isfinite(number):
        return float(number)
    if not exact:
        return None
    return {"float": "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"}


def restore(obj: Any) -> Any:
    """Undo what `plain` did to numbers that are not finite."""
    if isinstance(obj, dict):
        if obj.keys() == {"float"} and isinstance(obj["float"], str) and obj["float"] in _NOT_FINITE:
            return _NOT_FINITE[obj["float"]]
        return {key: restore(value) for key, value in obj.items()}
    if isinstance(obj, list):
        return [restore(value) for value in obj]
    return obj
