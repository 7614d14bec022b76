"""Profiles as JSON, the text format of depth pruning, and what is refused of both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from discopt.errors import RunFolderError
from discopt_llm import profile as profile_module
from discopt_llm.errors import ProfileError
from discopt_llm.profile import (
    DROP_UNITS,
    Decisions,
    Profile,
    decisions_from_levels,
    decisions_from_text,
    levels_from_decisions,
    number_of_units,
    read_profile,
    text_from_decisions,
    write_decisions,
)

OFFICIAL = "none\nattn\nmlp\nattn+mlp\n"
DECISIONS = np.array([[False, False], [True, False], [False, True], [True, True]])


def make(**changes: Any) -> Profile:
    values: dict[str, Any] = {
        "kind": "drop",
        "unit": "sublayer",
        "model_source": "a/model",
        "model_fingerprint": "f" * 64,
        "names": ("layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.1.mlp"),
        "levels": np.array([1, 0, 1, 1], dtype=np.int16),
    }
    return Profile(**{**values, **changes})


def same(a: Profile, b: Profile) -> bool:
    fields = ("kind", "unit", "model_source", "model_fingerprint", "names")
    return all(getattr(a, f) == getattr(b, f) for f in fields) and np.array_equal(a.levels, b.levels)


# JSON


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    make().write(tmp_path / "profile.json")
    back = read_profile(tmp_path / "profile.json")
    assert isinstance(back, Profile)
    assert same(back, make())
    assert back.levels.dtype == np.int16


@given(
    st.lists(st.text(max_size=8), min_size=1, max_size=12, unique=True),
    st.sampled_from(DROP_UNITS),
    st.text(max_size=20),
    st.text(max_size=20),
    st.randoms(use_true_random=False),
)
def test_every_profile_comes_back_from_its_text(
    names: list[str], unit: str, source: str, fingerprint: str, random: Any
) -> None:
    levels = np.array([random.randint(0, 1) for _ in names])
    profile = make(unit=unit, model_source=source, model_fingerprint=fingerprint, names=tuple(names), levels=levels)
    assert same(Profile.from_json(profile.to_json()), profile)


def test_the_file_says_format_version_kind_unit_model_and_units() -> None:
    assert json.loads(make().to_json()) == {
        "format": "discopt-profile",
        "version": 1,
        "kind": "drop",
        "unit": "sublayer",
        "model": {"source": "a/model", "fingerprint": "f" * 64},
        "units": [
            {"name": "layers.0.attn", "level": 1},
            {"name": "layers.0.mlp", "level": 0},
            {"name": "layers.1.attn", "level": 1},
            {"name": "layers.1.mlp", "level": 1},
        ],
    }
    assert '\n    {"name": "layers.0.mlp", "level": 0},\n' in make().to_json()  # a line for each unit


@pytest.mark.parametrize("before", ["\ufeff", "\n  "])
def test_a_byte_order_mark_or_white_space_before_the_json_does_not_matter(before: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(before + make().to_json(), encoding="utf-8")
    back = read_profile(path)
    assert isinstance(back, Profile)
    assert same(back, make())


def test_a_run_folder_is_read_as_its_profile(tmp_path: Path) -> None:
    make().write(tmp_path / "profile.json")
    back = read_profile(tmp_path)
    assert isinstance(back, Profile)
    assert same(back, make())


def test_levels_are_a_copy_that_cannot_be_written() -> None:
    levels = np.array([1, 0, 1, 1])
    profile = make(levels=levels)
    levels[0] = 0
    assert profile.levels[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        profile.levels[0] = 0


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profile.json"
    make().write(path)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunFolderError, match="No space left on device"):
        make(levels=np.zeros(4, dtype=np.int16)).write(path)
    monkeypatch.undo()
    back = read_profile(path)
    assert isinstance(back, Profile)
    assert same(back, make())
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "sparsity"}, "kind must be one of drop, got 'sparsity'"),
        ({"unit": "layer"}, "unit must be one of sublayer, block, pair, got 'layer'"),
        (
            {"levels": np.ones((2, 2), dtype=int)},
            r"levels must be integers of shape \(n,\), n >= 1, got int64 \(2, 2\)",
        ),
        ({"levels": np.ones(4)}, r"levels must be integers of shape .* got float64 \(4,\)"),
        ({"names": (), "levels": np.ones(0, dtype=int)}, r"levels must be integers .* got int64 \(0,\)"),
        ({"names": ("a",)}, "expected a name for each of 4 units, got 1"),
        ({"names": ("a", "b", "a", "c")}, "unit names must differ, got 'a' 2 times"),
        ({"levels": np.array([1, 2, 0, 1])}, r"level of layers.0.mlp must be 0 to 1, got 2"),
        ({"levels": np.array([1, 1, -1, 1])}, r"level of layers.1.attn must be 0 to 1, got -1"),
        ({"levels": np.array([1, 1, 2**16, 1])}, r"level of layers.1.attn must be 0 to 1, got 65536"),
    ],
)
def test_a_profile_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def changed(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        *way, last = path
        for step in way:
            data = data[step]
        if to is ...:
            del data[last]
        else:
            data[last] = to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("format", to="other"), "expected format 'discopt-profile', got 'other'"),
        (changed("format", to=...), "expected format 'discopt-profile', got None"),
        (changed("version", to=2), "expected version 1, got 2"),
        (changed("version", to=True), "expected version 1, got True"),
        (changed("version", to=...), "expected version 1, got None"),
        (changed("kind", to="prune"), "kind must be one of drop, got 'prune'"),
        (changed("kind", to=...), "kind must be text, got None"),
        (changed("unit", to="layer"), "unit must be one of sublayer, block, pair, got 'layer'"),
        (changed("unit", to=3), "unit must be text, got 3"),
        (changed("model", to=[]), r"model must be an object, got \[\]"),
        (changed("model", "source", to=...), "model's source must be text, got None"),
        (changed("model", "fingerprint", to=1.5), "model's fingerprint must be text, got 1.5"),
        (changed("units", to={}), r"units must be a list, got \{\}"),
        (changed("units", to=[]), "the profile has no units"),
        (changed("units", 1, to="mlp"), "unit 1 must be an object, got 'mlp'"),
        (changed("units", 1, "name", to=...), "name of unit 1 must be text, got None"),
        (changed("units", 1, "name", to="layers.0.attn"), "unit names must differ, got 'layers.0.attn' 2 times"),
        (changed("units", 1, "level", to=...), "level of unit 1 must be a whole number, got None"),
        (changed("units", 1, "level", to=True), "level of unit 1 must be a whole number, got True"),
        (changed("units", 1, "level", to=1.0), "level of unit 1 must be a whole number, got 1.0"),
        (changed("units", 1, "level", to=float("nan")), "level of unit 1 must be a whole number, got nan"),
        (changed("units", 1, "level", to=2), "level of layers.0.mlp must be 0 to 1, got 2"),
        (changed("units", 1, "level", to=10**40), "too large"),
    ],
)
def test_a_damaged_json_file_is_refused(change: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    data = json.loads(make().to_json())
    change(data)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ProfileError, match=rf"profile\.json: .*{message}") as caught:
        read_profile(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the profile is empty"),
        (b" \n\n", "the profile is empty"),
        (b"{", "not JSON: Expecting property name"),
        (b'{"a":' * 100_000, "not JSON: "),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b"none\n\xff\n", "not a profile: byte 5 is not UTF-8 text"),
        (b"[]", r"line 1: expected one of none, attn, mlp, attn\+mlp, got '\[\]'"),
    ],
)
def test_a_file_of_something_else_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=message):
        read_profile(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"cannot read the profile .*nosuch: No such file"):
        read_profile(tmp_path / "nosuch")
    with pytest.raises(ProfileError, match=r"cannot read the profile .*profile\.json: No such file"):
        read_profile(tmp_path)
    with pytest.raises(ProfileError, match=r"cannot read the profile .*null byte"):
        read_profile("a\0b")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PLACES = ["format", "version", "kind", "unit", "model", "model source", "model fingerprint", "units", "more"]
GOOD = make().to_json().encode()


@st.composite
def damaged_profiles(draw: st.DrawFn) -> bytes:
    """A good file with another value somewhere, or with a byte or two wrong."""
    if draw(st.booleans()):
        data = json.loads(GOOD)
        changed(*draw(st.sampled_from(PLACES)).split(), to=draw(JSON))(data)
        return json.dumps(data).encode()
    if draw(st.booleans()):
        data = json.loads(GOOD)
        changed("units", draw(st.integers(0, 3)), *draw(st.sampled_from([(), ("name",), ("level",)])), to=draw(JSON))(
            data
        )
        return json.dumps(data).encode()
    cut = draw(st.integers(0, len(GOOD)))
    return GOOD[:cut] + draw(st.binary(max_size=2)) + GOOD[cut + 1 :]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=80)
    | st.text('{}[]":, none attn mlp+\n', max_size=40).map(str.encode)
    | damaged_profiles()
)
def test_whatever_a_file_holds_only_a_profile_error_comes_out(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes(content)
    answer = profile_or_error(path)
    if isinstance(answer, ProfileError):
        assert len(str(answer).splitlines()) == 1
    elif isinstance(answer, Profile):
        assert same(Profile.from_json(answer.to_json()), answer)
    else:
        assert answer.ndim == 2


def profile_or_error(path: Path) -> Profile | Decisions | ProfileError:
    try:
        return read_profile(path)
    except ProfileError as error:
        return error


# The model it belongs to


def test_a_profile_of_this_model_is_accepted() -> None:
    make().check_model("f" * 64, list(make().names))


@pytest.mark.parametrize(
    ("fingerprint", "names", "message"),
    [
        ("f" * 64, ("a", "b"), "belongs to a/model and has 4 units, but this model has 2"),
        (
            "f" * 64,
            ("layers.0.attn", "layers.0.mlp", "h.1.attn", "layers.1.mlp"),
            "belongs to a/model: its unit 2 is 'layers.1.attn', but this model's is 'h.1.attn'",
        ),
        (
            "e" * 64,
            make().names,
            "belongs to a/model, whose weights differ .*fingerprint ffffffffffff, here eeeeeeeeeeee",
        ),
    ],
)
def test_a_profile_of_another_model_is_refused_with_the_difference(
    fingerprint: str, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ProfileError, match=message):
        make().check_model(fingerprint, names)


# The text format


def test_the_text_format_says_what_is_dropped_in_each_block(tmp_path: Path) -> None:
    assert np.array_equal(decisions_from_text(OFFICIAL), DECISIONS)
    assert text_from_decisions(DECISIONS) == OFFICIAL
    write_decisions(tmp_path / "layer_drop_config.txt", DECISIONS)
    assert (tmp_path / "layer_drop_config.txt").read_bytes() == OFFICIAL.encode()
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


def test_everything_public_is_listed() -> None:
    assert profile_module.__all__ == sorted(profile_module.__all__)
    assert all(hasattr(profile_module, name) for name in profile_module.__all__)
