"""Profiles as files: JSON with the model and the banks they belong to, and the text formats of EvoPress' official code.

A profile of a depth-pruning run says the level of every unit. One of a search over banks also says which banks, and
each level's label: what it stands for, in the words of the official files (see `profile_text`), so that the file can
be read without the bank.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from discopt.files import write_atomic
from discopt.sealed import SealError, sealed, unsealed
from discopt.space import Levels
from discopt_llm.errors import ProfileError, one_line, short
from discopt_llm.profile_text import (
    DROP_UNITS,
    DROP_WORDS,
    LABEL_PATTERNS,
    Decisions,
    LayerLabels,
    decisions_from_text,
    labels_from_text,
)

__all__ = ["BANK_UNITS", "BankReference", "Profile", "read_profile"]

FORMAT = "discopt-profile"
VERSION = 1
EDITED = "search again, or give a profile written by hand as text: profile.txt of a run shows how"
BANK_UNITS = ("layer", "runtime")  # a layer, or the layers that inference engines fuse


@dataclass(frozen=True)
class _Kind:
    """What a kind of compression may say in a profile."""

    units: tuple[str, ...] = BANK_UNITS
    levels: int | None = None  # number of levels of a unit; None if it depends on the bank
    banks: tuple[int, ...] = (1,)  # how many banks its levels may come from
    label: re.Pattern[str] | None = None  # what the labels of its levels look like; None: they have none
    example: str = ""  # of labels


_KINDS = {
    "drop": _Kind(DROP_UNITS, levels=2, banks=(0,)),
    "quantization": _Kind(label=LABEL_PATTERNS["quantization"], example="3"),
    "sparsity": _Kind(label=LABEL_PATTERNS["sparsity"], example="-2"),
    "gguf": _Kind(label=LABEL_PATTERNS["gguf"], example="Q4_K"),
    "mixed": _Kind(banks=(1, 2), label=LABEL_PATTERNS["mixed"], example="drop, quantization:3 or sparsity:-2"),
}
BANK_KINDS = tuple(LABEL_PATTERNS)


@dataclass(frozen=True)
class BankReference:
    """The bank that a profile's levels come from."""

    path: str  # as it was given, for people
    fingerprint: str  # Bank.fingerprint of it


@dataclass(frozen=True, eq=False)
class Profile:
    """A profile with the model it belongs to, as a file holds it."""

    kind: str  # "drop", "quantization", "sparsity", "gguf" or "mixed"
    unit: str  # what a unit is: for "drop" one of DROP_UNITS, else one of BANK_UNITS
    model_source: str  # where the model came from, for people
    model_fingerprint: str  # models.fingerprint of it
    names: tuple[str, ...]  # (n,) the units' names
    levels: Levels  # (n,) 0 = most compressed
    banks: tuple[BankReference, ...] = ()  # none for "drop", one or, if mixed, two for the others
    labels: tuple[str, ...] = ()  # (n,) what each unit's level stands for; none for "drop"

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {short(self.kind)}")
        kind = _KINDS[self.kind]
        if self.unit not in kind.units:
            raise ValueError(f"unit must be one of {', '.join(kind.units)}, got {short(self.unit)}")
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
            raise ValueError(f"unit names must differ, got {short(name)} {times} times")
        self._check_labels(kind)
        frozen = levels.astype(np.int16)
        frozen.setflags(write=False)
        object.__setattr__(self, "levels", frozen)
        for name in ("names", "banks", "labels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def _check_labels(self, kind: _Kind) -> None:
        if len(self.banks) not in kind.banks:
            expected = " or ".join(map(str, kind.banks))
            raise ValueError(f"number of banks of kind {self.kind!r} must be {expected}, got {len(self.banks)}")
        if len({bank.fingerprint for bank in self.banks}) < len(self.banks):
            raise ValueError(f"the banks must differ, got {short(self.banks[0].fingerprint)} {len(self.banks)} times")
        if len(self.labels) != (len(self.names) if kind.label else 0):
            expected = f"a label for each of {len(self.names)} units" if kind.label else "no labels"
            raise ValueError(f"expected {expected} of kind {self.kind!r}, got {len(self.labels)}")
        for name, label in zip(self.names, self.labels, strict=False):
            if kind.label and not kind.label.fullmatch(label):
                raise ValueError(f"label of {name} must be such as {kind.example}, got {short(label)}")

    def check_model(self, fingerprint: str, unit_names: Sequence[str]) -> None:
        """Raise ProfileError, saying what differs, unless the profile belongs to this model with these units."""
        mine, theirs = self.names, tuple(unit_names)
        belongs = f"the profile belongs to {' '.join(self.model_source.split())}"
        if len(mine) != len(theirs):
            raise ProfileError(f"{belongs} and has {len(mine)} units, but this model has {len(theirs)}")
        for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            if a != b:
                raise ProfileError(f"{belongs}: its unit {index} is {short(a)}, but this model's is {short(b)}")
        if fingerprint != self.model_fingerprint:
            raise ProfileError(
                f"{belongs}, whose weights differ from this model's "
                f"(fingerprint {self.model_fingerprint[:12]}, here {fingerprint[:12]})"
            )

    def check_banks(self, fingerprints: Sequence[str]) -> None:
        """Raise ProfileError, saying what differs, unless these are the banks that the levels come from, in order."""
        if len(fingerprints) != len(self.banks):
            raise ProfileError(f"the profile's levels come from {len(self.banks)} banks, got {len(fingerprints)}")
        for bank, fingerprint in zip(self.banks, fingerprints, strict=True):
            if bank.fingerprint != fingerprint:
                raise ProfileError(
                    f"the profile's levels come from the bank {' '.join(bank.path.split())}, which differs from this "
                    f"one (fingerprint {bank.fingerprint[:12]}, here {fingerprint[:12]})"
                )

    def to_json(self) -> str:
        """The file's content, sealed, a line for each unit."""
        model = {"source": self.model_source, "fingerprint": self.model_fingerprint}
        head = {"format": FORMAT, "version": VERSION, "kind": self.kind, "unit": self.unit, "model": model}
        if self.banks:
            head["banks"] = [{"path": bank.path, "fingerprint": bank.fingerprint} for bank in self.banks]
        entries = [{"name": n, "level": x} for n, x in zip(self.names, self.levels.tolist(), strict=True)]
        for entry, label in zip(entries, self.labels, strict=False):
            entry["label"] = label
        whole = sealed({**head, "units": entries})
        units = [json.dumps(entry) for entry in whole.pop("units")]
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in whole.items()]
        listed = ",\n    ".join(units)
        return "{\n  " + ",\n  ".join(lines) + ',\n  "units": [\n    ' + listed + "\n  ]\n}\n"

    @classmethod
    def from_json(cls, text: str, where: str = "profile") -> Profile:
        """The inverse of `to_json`; raises ProfileError, beginning with `where`, for anything else than it wrote."""
        try:
            data = unsealed(text, FORMAT, VERSION)
        except SealError as error:
            raise ProfileError(f"{where} {error.sentence(EDITED)}") from None
        model = _expect(data.get("model"), dict, where, "model")
        source = _expect(model.get("source"), str, where, "model's source")
        fingerprint = _expect(model.get("fingerprint"), str, where, "model's fingerprint")
        banked = data.get("kind") in BANK_KINDS
        names, levels, labels = [], [], []
        for index, entry in enumerate(_expect(data.get("units"), list, where, "units")):
            entry = _expect(entry, dict, where, f"unit {index}")
            names.append(_expect(entry.get("name"), str, where, f"name of unit {index}"))
            levels.append(_expect(entry.get("level"), int, where, f"level of unit {index}"))
            if banked:
                labels.append(_expect(entry.get("label"), str, where, f"label of unit {index}"))
        if not names:
            raise ProfileError(f"{where}: the profile has no units")
        kind = _expect(data.get("kind"), str, where, "kind")
        unit = _expect(data.get("unit"), str, where, "unit")
        banks = _banks(data.get("banks"), where) if banked else ()
        try:
            return cls(
                kind=kind,
                unit=unit,
                model_source=source,
                model_fingerprint=fingerprint,
                names=tuple(names),
                levels=np.array(levels, dtype=np.int64),
                banks=banks,
                labels=tuple(labels),
            )
        except (ValueError, OverflowError) as error:
            raise ProfileError(f"{where}: {one_line(error)}") from None

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON file, whole or not at all; raises RunFolderError if it cannot be written."""
        write_atomic(path, self.to_json())


def read_profile(path: str | os.PathLike[str], *, blocks: int | None = None) -> Profile | Decisions | LayerLabels:
    """Read a profile: a JSON file or a run folder -> Profile, a text file -> drop decisions (blocks, 2) or labels.

    `blocks` is the number a text file of drop decisions must have lines for. Raises ProfileError for a file that
    cannot be read.
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
    first = next(iter(text.splitlines()), "").strip()
    if ":" in first:
        return labels_from_text(text, str(file))
    if text.strip() and first not in DROP_WORDS:
        raise ProfileError(
            f"{file}, line 1: expected JSON, one of {', '.join(DROP_WORDS)}, "
            f"or a layer and its label such as 'layers.0.up_proj: 3', got {short(first)}"
        )
    return decisions_from_text(text, blocks, str(file))


def _banks(value: Any, where: str) -> tuple[BankReference, ...]:
    banks = []
    for index, entry in enumerate(_expect(value, list, where, "banks")):
        entry = _expect(entry, dict, where, f"bank {index}")
        path = _expect(entry.get("path"), str, where, f"path of bank {index}")
        fingerprint = _expect(entry.get("fingerprint"), str, where, f"fingerprint of bank {index}")
        banks.append(BankReference(path, fingerprint))
    return tuple(banks)


def _expect(value: Any, kind: type, where: str, what: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {dict: "an object", list: "a list", str: "text", int: "a whole number"}
        raise ProfileError(f"{where}: {what} must be {words[kind]}, got {short(value)}")
    return value
