"""Profiles as files: JSON with the model they belong to, and the text format of depth pruning.

The text format is the one of EvoPress' official code: a line for every block that says what is *dropped* there, one
of `none`, `attn`, `mlp` and `attn+mlp`. It names no model and no unit, so it is read as drop decisions: a (blocks, 2)
array, True where the block's attention (column 0) or MLP (column 1) is dropped. Units come in the order of the
blocks; with unit "sublayer" unit 2b is block b's attention and unit 2b + 1 its MLP, with unit "pair" unit p is the
blocks 2p and 2p + 1, the last block of an odd number being a unit alone. Level 0 is dropped, level 1 kept.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from discopt.folder import write_atomic
from discopt.space import Levels
from discopt_llm.errors import ProfileError

__all__ = [
    "DROP_UNITS",
    "Decisions",
    "Profile",
    "decisions_from_levels",
    "decisions_from_text",
    "levels_from_decisions",
    "number_of_units",
    "read_profile",
    "text_from_decisions",
    "write_decisions",
]

Decisions = NDArray[np.bool_]  # (blocks, 2): attention dropped, MLP dropped

FORMAT = "discopt-profile"
VERSION = 1
DROP_UNITS = ("sublayer", "block", "pair")
DROP_WORDS = {"none": (False, False), "attn": (True, False), "mlp": (False, True), "attn+mlp": (True, True)}


@dataclass(frozen=True)
class _Kind:
    """What a kind of compression may say in a profile."""

    units: tuple[str, ...]
    levels: int | None  # number of levels of a unit; None if it depends on the unit


_REPR = reprlib.Repr()
_REPR.maxstring = 100  # characters of a wrong value or a unit's name in an error message
_KINDS = {"drop": _Kind(DROP_UNITS, levels=2)}


@dataclass(frozen=True, eq=False)
class Profile:
    """A profile with the model it belongs to, as a file holds it."""

    kind: str  # "drop"
    unit: str  # what a unit is: for "drop" one of DROP_UNITS
    model_source: str  # where the model came from, for people
    model_fingerprint: str  # models.fingerprint of it
    names: tuple[str, ...]  # (n,) the units' names
    levels: Levels  # (n,) 0 = most compressed

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {_short(self.kind)}")
        kind = _KINDS[self.kind]
        if self.unit not in kind.units:
            raise ValueError(f"unit must be one of {', '.join(kind.units)}, got {_short(self.unit)}")
        levels = np.asarray(self.levels)
        if levels.ndim != 1 or levels.dtype.kind not in "iu" or len(levels) == 0:
            raise ValueError(f"levels must be integers of shape (n,), n >= 1, got {levels.dtype} {levels.shape}")
        if len(self.names) != len(levels):
            raise ValueError(f"expected a name for each of {len(levels)} units, got {len(self.names)}")
        highest = np.iinfo(np.int16).max if kind.levels is None else kind.levels - 1
        wrong = np.flatnonzero((levels < 0) | (levels > highest))
        if len(wrong):
            raise ValueError(f"level of {self.names[wrong[0]]} must be 0 to {highest}, got {levels[wrong[0]]}")
        name, times = Counter(self.names).most_common(1)[0]
        if times > 1:
            raise ValueError(f"unit names must differ, got {_short(name)} {times} times")
        frozen = levels.astype(np.int16)
        frozen.setflags(write=False)
        object.__setattr__(self, "levels", frozen)
        object.__setattr__(self, "names", tuple(self.names))

    def check_model(self, fingerprint: str, unit_names: Sequence[str]) -> None:
        """Raise ProfileError, saying what differs, unless the profile belongs to this model with these units."""
        mine, theirs = self.names, tuple(unit_names)
        belongs = f"the profile belongs to {' '.join(self.model_source.split())}"
        if len(mine) != len(theirs):
            raise ProfileError(f"{belongs} and has {len(mine)} units, but this model has {len(theirs)}")
        for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            if a != b:
                raise ProfileError(f"{belongs}: its unit {index} is {_short(a)}, but this model's is {_short(b)}")
        if fingerprint != self.model_fingerprint:
            raise ProfileError(
                f"{belongs}, whose weights differ from this model's "
                f"(fingerprint {self.model_fingerprint[:12]}, here {fingerprint[:12]})"
            )

    def to_json(self) -> str:
        """The file's content, a line for each unit."""
        model = {"source": self.model_source, "fingerprint": self.model_fingerprint}
        head = {"format": FORMAT, "version": VERSION, "kind": self.kind, "unit": self.unit, "model": model}
        units = [json.dumps({"name": n, "level": x}) for n, x in zip(self.names, self.levels.tolist(), strict=True)]
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        listed = ",\n    ".join(units)
        return "{\n  " + ",\n  ".join(lines) + ',\n  "units": [\n    ' + listed + "\n  ]\n}\n"

    @classmethod
    def from_json(cls, text: str, where: str = "profile") -> Profile:
        """The inverse of `to_json`; raises ProfileError, beginning with `where`, for anything malformed."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ProfileError(f"{where}: not JSON: {_one_line(error)}") from None
        data = _expect(data, dict, where, "the file")
        if data.get("format") != FORMAT:
            raise ProfileError(f"{where}: expected format {FORMAT!r}, got {_short(data.get('format'))}")
        if data.get("version") != VERSION or isinstance(data["version"], bool):
            raise ProfileError(f"{where}: expected version {VERSION}, got {_short(data.get('version'))}")
        model = _expect(data.get("model"), dict, where, "model")
        source = _expect(model.get("source"), str, where, "model's source")
        fingerprint = _expect(model.get("fingerprint"), str, where, "model's fingerprint")
        names, levels = [], []
        for index, entry in enumerate(_expect(data.get("units"), list, where, "units")):
            entry = _expect(entry, dict, where, f"unit {index}")
            names.append(_expect(entry.get("name"), str, where, f"name of unit {index}"))
            levels.append(_expect(entry.get("level"), int, where, f"level of unit {index}"))
        if not names:
            raise ProfileError(f"{where}: the profile has no units")
        kind = _expect(data.get("kind"), str, where, "kind")
        unit = _expect(data.get("unit"), str, where, "unit")
        try:
            return cls(kind, unit, source, fingerprint, tuple(names), np.array(levels, dtype=np.int64))
        except (ValueError, OverflowError) as error:
            raise ProfileError(f"{where}: {_one_line(error)}") from None

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON file, whole or not at all; raises RunFolderError if it cannot be written."""
        write_atomic(path, self.to_json())


def read_profile(path: str | os.PathLike[str], *, blocks: int | None = None) -> Profile | Decisions:
    """Read a profile: a JSON file or a run folder -> Profile, a text file -> drop decisions (blocks, 2).

    `blocks` is the number a text file must have lines for. Raises ProfileError for a file that cannot be read.
    """
    file = Path(path)
    try:
        if file.is_dir():
            file = file / "profile.json"
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ProfileError(f"{file}: not a profile: byte {error.start} is not UTF-8 text") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise ProfileError(f"cannot read the profile {file}: {getattr(error, 'strerror', None) or error}") from None
    if text.lstrip().startswith("{"):
        return Profile.from_json(text, str(file))
    return decisions_from_text(text, blocks, str(file))


def decisions_from_text(text: str, blocks: int | None = None, where: str = "profile") -> Decisions:
    """Parse the text format -> (blocks, 2) bool; raises ProfileError, beginning with `where`, if it is malformed."""
    lines = text.rstrip().splitlines()
    if not lines:
        raise ProfileError(f"{where}: the profile is empty")
    for number, line in enumerate(lines, start=1):
        if line.strip() not in DROP_WORDS:
            raise ProfileError(f"{where}, line {number}: expected one of {', '.join(DROP_WORDS)}, got {_short(line)}")
    if blocks is not None and len(lines) != blocks:
        raise ProfileError(f"{where}: expected a line for each of {blocks} blocks, got {len(lines)}")
    return np.array([DROP_WORDS[line.strip()] for line in lines], dtype=np.bool_)


def text_from_decisions(decisions: ArrayLike) -> str:
    """The text format of drop decisions (blocks, 2)."""
    words = {dropped: word for word, dropped in DROP_WORDS.items()}
    return "".join(f"{words[attention, mlp]}\n" for attention, mlp in _check_decisions(decisions).tolist())


def write_decisions(path: str | os.PathLike[str], decisions: ArrayLike) -> None:
    """Write the text format, whole or not at all; raises RunFolderError if it cannot be written."""
    write_atomic(path, text_from_decisions(decisions))


def number_of_units(blocks: int, unit: str) -> int:
    """n, the units that `blocks` blocks have."""
    if unit not in DROP_UNITS:
        raise ValueError(f"unit must be one of {', '.join(DROP_UNITS)}, got {unit!r}")
    return {"sublayer": 2 * blocks, "block": blocks, "pair": (blocks + 1) // 2}[unit]


def levels_from_decisions(decisions: ArrayLike, unit: str) -> Levels:
    """Drop decisions (blocks, 2) -> levels (n,); raises ProfileError if they split a unit."""
    dropped = _check_decisions(decisions)
    blocks = len(dropped)
    n = number_of_units(blocks, unit)
    if unit == "sublayer":
        return np.where(dropped.reshape(n), 0, 1).astype(np.int16)
    split = np.flatnonzero(dropped[:, 0] != dropped[:, 1])
    if len(split):
        part = "attention" if dropped[split[0], 0] else "MLP"
        raise ProfileError(f"block {split[0]} loses only its {part}, which units of kind {unit!r} cannot express")
    whole = dropped[:, 0]
    if unit == "pair":
        odd = np.flatnonzero(whole[0 : blocks - 1 : 2] != whole[1::2])
        if len(odd):
            first = 2 * int(odd[0])
            lost = first if whole[first] else first + 1
            raise ProfileError(f"of the pair of blocks {first} and {first + 1} only {lost} is dropped")
        whole = whole[::2]
    return np.where(whole, 0, 1).astype(np.int16)


def decisions_from_levels(levels: ArrayLike, unit: str, blocks: int) -> Decisions:
    """Levels (n,), 0 dropped and 1 kept -> drop decisions (blocks, 2)."""
    x = np.asarray(levels)
    n = number_of_units(blocks, unit)
    if x.shape != (n,):
        raise ValueError(f"levels of {blocks} blocks by {unit} must have shape ({n},), got {x.shape}")
    if not np.isin(x, (0, 1)).all():
        raise ValueError(f"levels must be 0 (dropped) or 1 (kept), got {sorted(set(x.tolist()))}")
    dropped = x == 0
    if unit == "sublayer":
        return dropped.reshape(blocks, 2)
    whole = dropped if unit == "block" else np.repeat(dropped, 2)[:blocks]
    return np.stack((whole, whole), axis=1)


def _check_decisions(decisions: ArrayLike) -> Decisions:
    dropped = np.asarray(decisions)
    if dropped.ndim != 2 or dropped.shape[1] != 2 or dropped.dtype != np.bool_:
        raise ValueError(f"decisions must be bool of shape (blocks, 2), got {dropped.dtype} {dropped.shape}")
    return dropped


def _expect(value: Any, kind: type, where: str, what: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {dict: "an object", list: "a list", str: "text", int: "a whole number"}
        raise ProfileError(f"{where}: {what} must be {words[kind]}, got {_short(value)}")
    return value


def _short(value: object) -> str:
    return _REPR.repr(value)


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
