"""Whether values read from a file are of the types that a dataclass says its fields have."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from discopt.wording import one_line

__all__ = ["check_types"]


def check_types(kind: type, values: Mapping[str, Any]) -> None:
    """Raise ValueError unless each value is of the type of the field of that name.

    A whole number is a float as well, a boolean is no number, and a list is as good as a tuple. Names that are no
    fields, and fields that are not there, are left to the dataclass.
    """
    hints = get_type_hints(kind)
    for field in fields(kind):
        if field.name in values and not _is_of(values[field.name], hints[field.name]):
            raise ValueError(
                f"{field.name} must be of type {field.type}, got {one_line(repr(values[field.name]), 100)}"
            )


def _is_of(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_is_of(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is tuple:  # of one type, any number of it: tuple[int, ...]
        return isinstance(value, list | tuple) and all(_is_of(item, parts[0]) for item in value)
    if origin is not None:
        return isinstance(value, origin)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)
