from __future__ import annotations

from discopt.report import align, format_rows, markdown_rows, profile_lines
from discopt.space import SearchSpace

ROWS = [
    {"method": "a|b", "kl": 0.123456789, "tokens": 1234567},
    {"method": "dense", "kl": None, "bytes": 12},
    {"method": "wide name", "kl": float("nan")},
]


def test_rows_become_columns_with_numbers_to_the_right() -> None:
    assert format_rows(ROWS).splitlines() == [
        "method          kl     tokens  bytes",
        "a|b        0.12346  1,234,567      -",
        "dense            -          -     12",
        "wide name        -          -      -",
    ]


def test_rows_become_a_markdown_table() -> None:
    assert markdown_rows(ROWS[:2]).splitlines() == [
        "| method | kl | tokens | bytes |",
        "| --- | ---: | ---: | ---: |",
        r"| a\|b | 0.12346 | 1,234,567 | - |",
        "| dense | - | - | 12 |",
    ]


def test_no_rows_are_an_empty_table() -> None:
    assert format_rows([]) == ""


def test_a_repeated_label_is_shown_once() -> None:
    assert align([("cost", "1"), ("cost", "2"), ("stopped", "x")]) == [
        ("cost   ", "1"),
        ("       ", "2"),
        ("stopped", "x"),
    ]


def test_a_profile_is_told_by_level_with_names_where_there_are_few() -> None:
    few = SearchSpace.cardinality(3, 3, names=["a", "b", "c"])
    assert profile_lines(few, [1, 0, 1]) == ["level 0: 1 unit: b", "level 1: 2 units: a, c"]
    many = SearchSpace.cardinality(1500, 3)
    assert profile_lines(many, [0] * 1500) == ["level 0: 1,500 units"]
