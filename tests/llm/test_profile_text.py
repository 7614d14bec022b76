"""The text formats of EvoPress' official code, and what they say as levels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discopt_llm import profile_text as profile_text_module
from discopt_llm.errors import ProfileError
from discopt_llm.profile import Profile, read_profile
from discopt_llm.profile_text import (
    DROP_UNITS,
    decisions_from_levels,
    decisions_from_text,
    labels_from_levels,
    labels_from_text,
    levels_from_decisions,
    levels_from_labels,
    number_of_units,
    text_from_decisions,
    text_from_labels,
)

OFFICIAL = "none\nattn\nmlp\nattn+mlp\n"
DECISIONS = np.array([[False, False], [True, False], [False, True], [True, True]])

# A layer a line, as the official search writes them: the last line has no end.
OFFICIAL_LABELS = """model.layers.0.self_attn.q_proj: 5
model.layers.0.self_attn.k_proj: 1
model.layers.0.mlp.gate_proj: 0
model.layers.0.mlp.up_proj: 0
model.layers.0.mlp.down_proj: -4"""
LABELS = {
    "model.layers.0.self_attn.q_proj": "5",
    "model.layers.0.self_attn.k_proj": "1",
    "model.layers.0.mlp.gate_proj": "0",
    "model.layers.0.mlp.up_proj": "0",
    "model.layers.0.mlp.down_proj": "-4",
}
STEPS = ["5", "1", "0", None, "-4"]
LAYERS = [(name,) for name in LABELS]
RUNTIME = [*LAYERS[:2], (*LAYERS[2], *LAYERS[3]), LAYERS[4]]


# Depth pruning


def test_the_text_format_says_what_is_dropped_in_each_block(tmp_path: Path) -> None:
    assert np.array_equal(decisions_from_text(OFFICIAL), DECISIONS)
    assert text_from_decisions(DECISIONS) == OFFICIAL
    (tmp_path / "layer_drop_config.txt").write_text(text_from_decisions(DECISIONS))
    back = read_profile(tmp_path / "layer_drop_config.txt", blocks=4)
    assert not isinstance(back, Profile)
    assert np.array_equal(back, DECISIONS)


@pytest.mark.parametrize("text", [OFFICIAL.rstrip(), OFFICIAL + "\n\n", OFFICIAL.replace("\n", " \r\n")])
def test_line_ends_and_trailing_blank_lines_do_not_matter(text: str) -> None:
    assert np.array_equal(decisions_from_text(text, 4), DECISIONS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("none\nboth\n", r"line 2: expected one of none, attn, mlp, attn\+mlp, got 'both'"),
        ("none\n\nmlp\n", r"line 2: expected one of none, attn, mlp, attn\+mlp, got ''"),
        ("none\nmlp+attn\n", r"line 2: expected one of .*, got 'mlp\+attn'"),
        ("none\nmlp\n", "expected a line for each of 3 blocks, got 2"),
        ("", "the profile is empty"),
    ],
)
def test_a_damaged_text_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        decisions_from_text(text, 3)


# Units and decisions


@pytest.mark.parametrize(
    ("unit", "blocks", "n"),
    [("sublayer", 5, 10), ("block", 5, 5), ("pair", 4, 2), ("pair", 5, 3), ("pair", 1, 1)],
)
def test_the_last_block_of_an_odd_number_is_a_unit_alone(unit: str, blocks: int, n: int) -> None:
    assert number_of_units(blocks, unit) == n


@pytest.mark.parametrize("unit", DROP_UNITS)
@given(blocks=st.integers(1, 9), data=st.data())
def test_levels_come_back_from_decisions_and_from_text(unit: str, blocks: int, data: st.DataObject) -> None:
    n = number_of_units(blocks, unit)
    levels = np.array(data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)), dtype=np.int16)
    decisions = decisions_from_levels(levels, unit, blocks)
    assert decisions.shape == (blocks, 2)
    assert decisions.dtype == np.bool_
    assert np.array_equal(levels_from_decisions(decisions, unit), levels)
    read = decisions_from_text(text_from_decisions(decisions), blocks)
    assert np.array_equal(levels_from_decisions(read, unit), levels)


@pytest.mark.parametrize(
    ("unit", "levels", "text"),
    [
        ("sublayer", [1, 1, 0, 1, 1, 0, 0, 0], OFFICIAL),
        ("block", [1, 0, 0, 1], "none\nattn+mlp\nattn+mlp\nnone\n"),
        ("pair", [1, 0, 1], "none\nnone\nattn+mlp\nattn+mlp\nnone\n"),
        ("pair", [0, 1, 0], "attn+mlp\nattn+mlp\nnone\nnone\nattn+mlp\n"),
    ],
)
def test_level_zero_drops_the_unit(unit: str, levels: list[int], text: str) -> None:
    decisions = decisions_from_text(text)
    assert levels_from_decisions(decisions, unit).tolist() == levels
    assert text_from_decisions(decisions_from_levels(levels, unit, len(decisions))) == text


@pytest.mark.parametrize(
    ("unit", "text", "message"),
    [
        ("block", OFFICIAL, "block 1 loses only its attention, which units of kind 'block' cannot express"),
        ("pair", "none\nnone\nmlp\nmlp\n", "block 2 loses only its MLP, which units of kind 'pair' cannot express"),
        ("pair", "none\nnone\nattn+mlp\nnone\n", "of the pair of blocks 2 and 3 only 2 is dropped"),
        ("pair", "none\nattn+mlp\nnone\n", "of the pair of blocks 0 and 1 only 1 is dropped"),
    ],
)
def test_decisions_that_split_a_unit_are_refused(unit: str, text: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        levels_from_decisions(decisions_from_text(text), unit)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: number_of_units(3, "layer"), "unit must be one of sublayer, block, pair, got 'layer'"),
        (lambda: levels_from_decisions(np.ones((3, 2)), "block"), r"must be bool of shape \(blocks, 2\), got float64"),
        (lambda: text_from_decisions(np.ones((2, 3), dtype=bool)), r"must be bool of shape .*, got bool \(2, 3\)"),
        (
            lambda: decisions_from_levels([1, 0], "pair", 5),
            r"levels of 5 blocks by pair must have shape \(3,\), got \(2,\)",
        ),
        (
            lambda: decisions_from_levels([1, 2], "block", 2),
            r"levels must be 0 \(dropped\) or 1 \(kept\), got \[1, 2\]",
        ),
    ],
)
def test_arrays_of_another_shape_or_value_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# Labels of layers


def test_the_official_lines_give_each_layer_its_label(tmp_path: Path) -> None:
    path = tmp_path / "configuration.txt"
    path.write_text(OFFICIAL_LABELS)
    back = read_profile(path, blocks=7)
    assert back == LABELS
    assert isinstance(back, dict)
    assert list(back) == list(LABELS)  # in the order of the file
    assert text_from_labels(back) == OFFICIAL_LABELS + "\n"


@pytest.mark.parametrize(
    "text",
    [OFFICIAL_LABELS + "\n \n", OFFICIAL_LABELS.replace("\n", " \r\n"), OFFICIAL_LABELS.replace(": ", ":")],
)
def test_white_space_around_names_and_labels_does_not_matter(text: str) -> None:
    assert labels_from_text(text) == LABELS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "file: the profile is empty"),
        ("a: 3\n\nb: 3", "file, line 2: expected a layer and its label, such as 'layers.0.up_proj: 3', got ''"),
        ("a: 3\nb 3", "file, line 2: expected a layer and its label, .*, got 'b 3'"),
        ("a: 3\n: 3", "file, line 2: expected a layer and its label, .*, got ': 3'"),
        ("a b: 3", "file, line 1: expected a layer and its label, .*, got 'a b: 3'"),
        ("a: 3\nb:", "file, line 2: expected a label such as 3, -2, Q4_K, drop, quantization:3 or sparsity:-2, got ''"),
        ("a: 3.0", "file, line 1: expected a label such as .*, got '3.0'"),
        ("a: +3", r"file, line 1: expected a label such as .*, got '\+3'"),
        ("a: 03", "file, line 1: expected a label such as .*, got '03'"),
        ("a: -0", "file, line 1: expected a label such as .*, got '-0'"),
        ("a: ٣", "file, line 1: expected a label such as .*, got '٣'"),
        ("a: 3: 4", "file, line 1: expected a label such as .*, got '3: 4'"),
        ("a: quantization:-3", "file, line 1: expected a label such as .*, got 'quantization:-3'"),
        ("a: " + "9" * 9999, "file, line 1: expected a label such as .*, got '9+[.]{3}9+'"),
        ("a: 3\nb: 4\na: 3", "file, line 3: expected a line for each layer, got 'a' again after line 1"),
    ],
)
def test_damaged_lines_are_refused(text: str, message: str) -> None:
    with pytest.raises(ProfileError, match=f"^{message}$") as caught:
        labels_from_text(text, "file")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({}, "expected a label for at least one layer, got none"),
        ({"a b": "3"}, "name must have neither spaces nor colons, got 'a b'"),
        ({"a\nb": "3"}, r"name must have neither spaces nor colons, got 'a\\nb'"),
        ({"{": "3"}, "name must have neither spaces nor colons, got '{'"),
        ({"a": "three"}, "the label of a must be such as 3, -2, drop or quantization:3, got 'three'"),
    ],
)
def test_only_labels_that_can_be_read_back_are_written(labels: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_from_labels(labels)


NAMES = st.text(max_size=12).filter(profile_text_module._is_layer_name)
ANY_LABEL = (
    st.integers(-9999, 9999).map(str)
    | st.just("drop")
    | st.integers(1, 99).map("quantization:{}".format)
    | st.integers(-9999, 9999).map("sparsity:{}".format)
)


@given(st.dictionaries(NAMES, ANY_LABEL, min_size=1))
def test_all_labels_come_back_from_their_text(labels: dict[str, str]) -> None:
    back = labels_from_text(text_from_labels(labels))
    assert back == labels
    assert list(back) == list(labels)


def test_labels_become_levels_and_come_back() -> None:
    assert levels_from_labels(LABELS, LAYERS, [STEPS] * 5).tolist() == [0, 1, 2, 2, 4]
    assert levels_from_labels(LABELS, RUNTIME, [STEPS] * 4).tolist() == [0, 1, 2, 4]
    assert levels_from_labels(LABELS, RUNTIME, [STEPS] * 4).dtype == np.int16
    assert labels_from_levels([0, 1, 2, 4], RUNTIME, [STEPS] * 4) == LABELS
    assert text_from_labels(labels_from_levels([0, 1, 2, 4], RUNTIME, [STEPS] * 4)) == OFFICIAL_LABELS + "\n"


def test_the_order_of_the_lines_does_not_matter() -> None:
    turned = dict(reversed(LABELS.items()))
    assert levels_from_labels(turned, RUNTIME, [STEPS] * 4).tolist() == [0, 1, 2, 4]


@given(st.data())
def test_levels_of_any_units_come_back_from_their_labels(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=6))
    units = [[f"layer{u}.{i}" for i in range(size)] for u, size in enumerate(sizes)]
    rows = st.lists(ANY_LABEL, min_size=1, max_size=5, unique=True).flatmap(
        lambda labels: st.permutations([*labels, None, None])
    )
    known = data.draw(st.lists(rows, min_size=len(units), max_size=len(units)))
    levels = [data.draw(st.sampled_from([j for j, x in enumerate(row) if x is not None])) for row in known]
    labels = labels_from_levels(levels, units, known)
    assert levels_from_labels(labels, units, known).tolist() == levels
    assert levels_from_labels(labels_from_text(text_from_labels(labels)), units, known).tolist() == levels


@pytest.mark.parametrize(
    ("change", "units", "message"),
    [
        (
            {"model.layers.1.mlp.up_proj": "0"},
            LAYERS,
            "names layers that are not searched here: 'model.layers.1.mlp.up_proj'; those that are: "
            "'model.layers.0.self_attn.q_proj', .* and 1 more",
        ),
        (dict.fromkeys("abcdef", "0"), LAYERS, "not searched here: 'a', 'b', 'c', 'd' and 2 more; those that are"),
        (
            {"model.layers.0.mlp.up_proj": None},
            LAYERS,
            "the profile has labels for 4 of 5 layers, not 'model.layers.0.mlp.up_proj'$",
        ),
        (
            {"model.layers.0.mlp.up_proj": "3"},
            LAYERS,
            "the label of model.layers.0.mlp.up_proj must be one of 5, 1, 0, -4, got '3'",
        ),
        (
            {"model.layers.0.mlp.up_proj": "1"},
            RUNTIME,
            "model.layers.0.mlp.gate_proj and model.layers.0.mlp.up_proj are one unit here and must have one label, "
            "got '0' and '1'",
        ),
    ],
)
def test_labels_of_other_layers_or_levels_are_refused_by_name(
    change: dict[str, str | None], units: list[tuple[str, ...]], message: str
) -> None:
    labels = {name: label for name, label in {**LABELS, **change}.items() if label is not None}
    with pytest.raises(ProfileError, match=message) as caught:
        levels_from_labels(labels, units, [STEPS] * len(units))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: labels_from_levels([0], LAYERS, [STEPS] * 5),
            r"levels must be integers of shape \(5,\), got int64 \(1",
        ),
        (lambda: labels_from_levels([0.0], [("a",)], [["3"]]), r"of shape \(1,\), got float64 \(1,\)"),
        (lambda: labels_from_levels([1], [("a",)], [["3", None]]), "expected a level that a has, got 1"),
        (lambda: labels_from_levels([-1], [("a",)], [["3"]]), "expected a level that a has, got -1"),
        (lambda: labels_from_levels([9], [("a",)], [["3"]]), "expected a level that a has, got 9"),
        (lambda: levels_from_labels({}, [], []), "at least one unit, got 0 for 0 units"),
        (lambda: levels_from_labels(LABELS, LAYERS, [STEPS]), "at least one unit, got 1 for 5 units"),
        (lambda: levels_from_labels({}, [("a", "a")], [["3"]]), "in one unit, got 'a' in units 0 and 0"),
        (lambda: levels_from_labels({}, [()], [["3"]]), "unit 0 must have layers and different labels, got"),
        (lambda: levels_from_labels({}, [("a",)], [[None]]), "unit 0 must have layers and different labels, got"),
        (lambda: levels_from_labels({}, [("a",)], [["3", "3"]]), "unit 0 must have layers and different labels, got"),
    ],
)
def test_units_or_levels_that_do_not_fit_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_everything_public_is_listed() -> None:
    assert len(profile_text_module.__all__) == len(set(profile_text_module.__all__))
    assert all(hasattr(profile_text_module, name) for name in profile_text_module.__all__)
