"""Profiles as JSON, how files are told apart, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from discopt.encoding import checksum
from discopt.errors import RunFolderError
from discopt_llm import profile as profile_module
from discopt_llm.errors import ProfileError
from discopt_llm.profile import BANK_UNITS, BankReference, Profile, read_profile
from discopt_llm.profile_text import DROP_UNITS, Decisions, LayerLabels, labels_from_text, text_from_labels

BANK = BankReference("banks/gptq", "b" * 64)
OTHER_BANK = BankReference("banks/sparsegpt", "c" * 64)
# As the program writes it.
FILE = b"""{
  "format": "discopt-profile",
  "version": 1,
  "checksum": "5e2d059d26a384d4a2a1e723f922dd84e05b8a7af3e3ea0becf5daab59e5fab2",
  "kind": "drop",
  "unit": "block",
  "model": {"source": "a/model", "fingerprint": "0123"},
  "units": [
    {"name": "model.layers.0", "level": 1},
    {"name": "model.layers.1", "level": 0}
  ]
}
"""


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


def make_banked(**changes: Any) -> Profile:
    values: dict[str, Any] = {
        "kind": "mixed",
        "unit": "layer",
        "names": ("q_proj", "k_proj", "up_proj"),
        "levels": np.array([0, 2, 5]),
        "banks": (BANK, OTHER_BANK),
        "labels": ("drop", "quantization:3", "sparsity:-2"),
    }
    return make(**{**values, **changes})


def same(a: Profile, b: Profile) -> bool:
    fields = ("kind", "unit", "model_source", "model_fingerprint", "names", "banks", "labels")
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


LABELS = {
    "quantization": st.integers(1, 99).map(str),
    "sparsity": st.integers(-9999, 9999).map(str),
    "mixed": st.just("drop")
    | st.integers(1, 99).map("quantization:{}".format)
    | st.integers(-9999, 9999).map("sparsity:{}".format),
}
BANKS = st.builds(BankReference, st.text(max_size=20), st.text(max_size=20))


@pytest.mark.parametrize("kind", LABELS)
@given(
    unit=st.sampled_from(BANK_UNITS),
    names=st.lists(st.text(max_size=8), min_size=1, max_size=12, unique=True),
    data=st.data(),
)
def test_every_profile_of_levels_from_banks_comes_back_from_its_text(
    kind: str, unit: str, names: list[str], data: st.DataObject
) -> None:
    n = len(names)
    banks = st.lists(BANKS, min_size=1, max_size=2 if kind == "mixed" else 1, unique_by=lambda bank: bank.fingerprint)
    profile = make(
        kind=kind,
        unit=unit,
        names=tuple(names),
        levels=np.array(data.draw(st.lists(st.integers(0, 2**15 - 1), min_size=n, max_size=n))),
        banks=tuple(data.draw(banks)),
        labels=tuple(data.draw(st.lists(LABELS[kind], min_size=n, max_size=n))),
    )
    assert same(Profile.from_json(profile.to_json()), profile)


def test_a_file_of_this_version_is_read_and_written_as_before(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(FILE)
    old = read_profile(path)
    assert isinstance(old, Profile)
    assert (old.kind, old.unit, old.model_source, old.model_fingerprint) == ("drop", "block", "a/model", "0123")
    assert (old.names, old.levels.tolist()) == (("model.layers.0", "model.layers.1"), [1, 0])
    assert (old.banks, old.labels) == ((), ())
    old.write(path)
    assert path.read_bytes() == FILE


def test_the_file_says_which_banks_and_what_the_levels_stand_for() -> None:
    data = json.loads(make_banked().to_json())
    assert data["banks"] == [
        {"path": "banks/gptq", "fingerprint": "b" * 64},
        {"path": "banks/sparsegpt", "fingerprint": "c" * 64},
    ]
    assert data["units"][1] == {"name": "k_proj", "level": 2, "label": "quantization:3"}
    assert "banks" not in make().to_json() and "label" not in make().to_json()


def test_the_file_says_format_version_kind_unit_model_and_units() -> None:
    data = json.loads(make().to_json())
    assert len(data.pop("checksum")) == 64
    assert data == {
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
        ({"kind": "prune"}, "kind must be one of drop, quantization, sparsity, gguf, mixed, got 'prune'"),
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit": "sublayer"}, "unit must be one of layer, runtime, got 'sublayer'"),
        ({"banks": ()}, "number of banks of kind 'mixed' must be 1 or 2, got 0"),
        ({"kind": "quantization"}, "number of banks of kind 'quantization' must be 1, got 2"),
        ({"banks": (BANK, BANK)}, "the banks must differ, got 'b+.*' 2 times"),
        ({"labels": ("drop",)}, "expected a label for each of 3 units of kind 'mixed', got 1"),
        ({"labels": ("drop", "3", "drop")}, "label of k_proj must be such as drop, quantization:3 .*, got '3'"),
        ({"levels": np.array([0, 2**15, 0])}, "level of k_proj must be 0 to 32767, got 32768"),
        (
            {"kind": "drop", "unit": "block", "levels": np.ones(3, dtype=int)},
            "number of banks of kind 'drop' must be 0, got 2",
        ),
        (
            {"kind": "drop", "unit": "block", "banks": (), "levels": np.ones(3, dtype=int)},
            "expected no labels of kind 'drop', got 3",
        ),
        (
            {"kind": "sparsity", "banks": (BANK,), "labels": ("-2", "+1", "0")},
            r"label of k_proj must be such as -2, got '\+1'",
        ),
        (
            {"kind": "quantization", "banks": (BANK,), "labels": ("2", "3", "-3")},
            "label of up_proj must be such as 3, got '-3'",
        ),
    ],
)
def test_labels_and_banks_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_banked(**changes)


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


def signed(data: Any) -> Any:
    """With a checksum that fits, as somebody might who writes profiles by hand."""
    content = {key: value for key, value in data.items() if key != "checksum"}
    try:
        return {**content, "checksum": checksum(content)}
    except ValueError:  # NaN
        return content


def refuses(profile: Profile, change: Callable[[Any], None], message: str, path: Path) -> None:
    """The file of a profile that was changed is refused in one line, with or without a checksum that fits."""
    data = json.loads(profile.to_json())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ProfileError, match=r"profile\.json (is|was) "):
        read_profile(path)
    path.write_text(json.dumps(signed(data)))
    with pytest.raises(ProfileError, match=rf"profile\.json.*{message}") as caught:
        read_profile(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("format", to="other"), "expected the format 'discopt-profile', got 'other'"),
        (changed("format", to=...), "expected the format 'discopt-profile', got None"),
        (changed("version", to=2), "written by a newer discopt .*; update discopt"),
        (changed("version", to=True), "it has no format version"),
        (changed("version", to=...), "it has no format version"),
        (changed("kind", to="prune"), "kind must be one of drop, quantization, sparsity, gguf, mixed, got 'prune'"),
        (changed("kind", to=["mixed"]), r"kind must be text, got \['mixed'\]"),
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
        (changed("units", 1, "level", to=float("nan")), "it has no checksum"),
        (changed("units", 1, "level", to=2), "level of layers.0.mlp must be 0 to 1, got 2"),
        (changed("units", 1, "level", to=10**40), "too large"),
    ],
)
def test_a_damaged_json_file_is_refused(change: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    refuses(make(), change, message, tmp_path / "profile.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("banks", to=...), "banks must be a list, got None"),
        (changed("banks", to=[]), "number of banks of kind 'mixed' must be 1 or 2, got 0"),
        (changed("banks", 1, to="path"), "bank 1 must be an object, got 'path'"),
        (changed("banks", 0, "path", to=3), "path of bank 0 must be text, got 3"),
        (changed("banks", 0, "fingerprint", to=None), "fingerprint of bank 0 must be text, got None"),
        (changed("banks", 0, "fingerprint", to="c" * 64), "the banks must differ, got 'c+.*' 2 times"),
        (changed("units", 1, "label", to=...), "label of unit 1 must be text, got None"),
        (changed("units", 1, "label", to=3), "label of unit 1 must be text, got 3"),
        (changed("units", 1, "label", to="quantization:0"), "label of k_proj must be such as .*, got 'quantization:0'"),
        (changed("units", 1, "level", to=2**15), "level of k_proj must be 0 to 32767, got 32768"),
        (changed("unit", to="block"), "unit must be one of layer, runtime, got 'block'"),
        (changed("kind", to="drop"), "unit must be one of sublayer, block, pair, got 'layer'"),
    ],
)
def test_a_damaged_file_of_levels_from_banks_is_refused(
    change: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    refuses(make_banked(), change, message, tmp_path / "profile.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the profile is empty"),
        (b" \n\n", "the profile is empty"),
        (b"{", "is damaged: it is not whole JSON .Expecting property name"),
        (b'{"a":' * 100_000, "not whole JSON "),
        (b'{"a": ' + b"9" * 5000 + b"}", "not whole JSON .Exceeds the limit"),
        (b"none\n\xff\n", "not a profile: byte 5 is not UTF-8 text"),
        (b"[]", r"line 1: expected JSON, one of none, attn, .*, or a layer and its label such as .*, got '\[\]'"),
        (b"\nnone\n", r"line 1: expected JSON, .*, got ''"),
        (b"none\na: 3\n", "line 2: expected one of none, attn, .*, got 'a: 3'"),
        (b"a: 3\nnone\n", "line 2: expected a layer and its label, such as .*, got 'none'"),
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
PLACES = ["banks", "format", "version", "kind", "unit", "model", "model source", "model fingerprint", "units", "more"]
GOOD = make().to_json().encode()
GOOD_BANKED = make_banked().to_json().encode()
GOOD_LABELS = b"layers.0.q_proj: 3\nlayers.0.k_proj: -2\nlayers.0.up_proj: drop\nlayers.1.q_proj: quantization:4\n"


@st.composite
def damaged_profiles(draw: st.DrawFn) -> bytes:
    """A good file with another value somewhere, or with a byte or two wrong."""
    good = draw(st.sampled_from([GOOD, GOOD_BANKED]))
    data = json.loads(good)
    if draw(st.booleans()):
        changed(*draw(st.sampled_from(PLACES)).split(), to=draw(JSON))(data)
        return json.dumps(signed(data)).encode()
    if draw(st.booleans()):
        field = draw(st.sampled_from([(), ("name",), ("level",), ("label",)]))
        changed("units", draw(st.integers(0, 2)), *field, to=draw(JSON))(data)
        return json.dumps(signed(data)).encode()
    cut = draw(st.integers(0, len(good)))
    return good[:cut] + draw(st.binary(max_size=2)) + good[cut + 1 :]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=80)
    | st.text('{}[]":, none attn mlp+-.0123\n', max_size=40).map(str.encode)
    | damaged_profiles()
)
def test_whatever_a_file_holds_only_a_profile_error_comes_out(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes(content)
    check_any_answer(path)


def test_ten_thousand_files_with_wrong_bytes_give_profiles_or_profile_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = bytearray()
    monkeypatch.setattr(Path, "read_bytes", lambda path: bytes(content))  # the disk is slow, and not in question
    rng = np.random.default_rng(0)
    sources = [GOOD, GOOD_BANKED, GOOD_LABELS, b"none\nattn\nmlp\nattn+mlp\n"]
    spare = b'{}[]":,\n 0123456789-eE.\\utrflsn\xff\x00\xe2\x80\xa8'
    refused = 0
    for _ in range(10_000):
        content = bytearray(sources[rng.integers(len(sources))])
        for _ in range(rng.integers(1, 4)):
            at = rng.integers(len(content) + 1)
            cut = rng.integers(3)
            content[at : at + cut] = rng.choice(list(spare), rng.integers(3)).astype(np.uint8).tobytes()
        refused += check_any_answer(Path("p"))
    assert 2_000 < refused < 10_000  # some inputs stay good, most do not


def check_any_answer(path: Path) -> bool:
    """Whether a file is refused; an error has one line, and what is read comes back from what is written of it."""
    answer = profile_or_error(path)
    if isinstance(answer, ProfileError):
        assert len(str(answer).splitlines()) == 1
        return True
    if isinstance(answer, Profile):
        assert same(Profile.from_json(answer.to_json()), answer)
    elif isinstance(answer, dict):
        assert labels_from_text(text_from_labels(answer)) == answer
    else:
        assert answer.ndim == 2
    return False


def profile_or_error(path: Path) -> Profile | Decisions | LayerLabels | ProfileError:
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


# The banks it belongs to


def test_a_profile_of_these_banks_is_accepted() -> None:
    make_banked().check_banks(["b" * 64, "c" * 64])
    make().check_banks([])


@pytest.mark.parametrize(
    ("fingerprints", "message"),
    [
        (["b" * 64], "levels come from 2 banks, got 1"),
        (["b" * 64, "d" * 64], "come from the bank banks/sparsegpt, which differs .*cccccccccccc, here dddddddddddd"),
    ],
)
def test_a_profile_of_other_banks_is_refused_with_the_difference(fingerprints: list[str], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        make_banked().check_banks(fingerprints)


def test_everything_public_is_listed() -> None:
    assert len(profile_module.__all__) == len(set(profile_module.__all__))
    assert all(hasattr(profile_module, name) for name in profile_module.__all__)
