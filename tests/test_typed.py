"""Types of values that were read, and what other people's errors say in a line of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pytest

from discopt.solve import SolveRequest
from discopt.typed import check_types
from discopt.wording import LONGEST, one_line


@dataclass(frozen=True)
class Asked:
    name: str
    count: int = 1
    share: float | None = None
    widths: tuple[int, ...] = ()
    exact: bool = False
    kind: Literal["a", "b"] = "a"
    options: Mapping[str, Any] | None = None


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"name": "x", "share": 1, "widths": [2, 3], "exact": True, "kind": "b", "options": {"a": None}},
        {"share": None, "options": None, "widths": (1,), "strange": object()},
    ],
)
def test_values_of_the_fields_types_pass(values: dict[str, Any]) -> None:
    check_types(Asked, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": None}, "name must be of type str, got None"),
        ({"count": 1.0}, "count must be of type int, got 1.0"),
        ({"count": True}, "count must be of type int, got True"),
        ({"share": "1"}, r"share must be of type float \| None, got '1'"),
        ({"share": False}, "got False"),
        ({"widths": [2, "3"]}, r"widths must be of type tuple\[int, ...\], got \[2, '3'\]"),
        ({"widths": 2}, "got 2"),
        ({"exact": 1}, "exact must be of type bool, got 1"),
        ({"kind": "c"}, "got 'c'"),
        ({"options": []}, r"got \[\]"),
    ],
)
def test_values_of_other_types_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_types(Asked, values)


def test_a_request_is_of_its_own_types() -> None:
    check_types(SolveRequest, asdict(SolveRequest("own.py:linear", stages=("1@8",), start_profile=(0, 1))))


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (ValueError("first\nsecond"), "first"),
        (KeyError(), "KeyError"),
        ("  tab\there \ud800 \u202e é 🙂", r"tab\there \ud800 \u202e é 🙂"),
        ("x" * (LONGEST + 1), "x" * (LONGEST - 3) + "..."),
        ("x" * LONGEST, "x" * LONGEST),
    ],
)
def test_whatever_is_said_becomes_one_line_that_can_be_printed(said: object, line: str) -> None:
    assert one_line(said) == line
