"""The two text formats of EvoPress' official code, and what they say as levels.

Depth pruning has a line for every block that says what is *dropped* there, one of `none`, `attn`, `mlp` and
`attn+mlp`. It names no model and no unit, so it is read as drop decisions: a (blocks, 2) array, True where the
block's attention (column 0) or MLP (column 1) is dropped. Units come in the order of the blocks; with unit "sublayer"
unit 2b is block b's attention and unit 2b + 1 its MLP, with unit "pair" unit p is the blocks 2p and 2p + 1, the last
block of an odd number being a unit alone. Level 0 is dropped, level 1 kept.

Quantization and sparsity have a line `layer.name: label` for every layer, in any order, the last perhaps without an
end. The label is a bit width, or by how many steps the layer is sparser (positive) or denser (negative) than the
target. For types of ggml, which the official code does not have, it is the type, such as `Q4_K`; where kinds are mixed,
which it does not do either, it is `quantization:3`, `sparsity:-2` or `drop`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from discopt.space import Levels
from discopt_llm.errors import ProfileError, short

__all__ = [
    "DROP_UNITS",
    "DROP_WORDS",
    "LABEL_PATTERNS",
    "Decisions",
    "Known",
    "LayerLabels",
    "decisions_from_levels",
    "decisions_from_text",
    "labels_from_levels",
    "labels_from_text",
    "levels_from_decisions",
    "levels_from_labels",
    "listed",
    "number_of_units",
    "text_from_decisions",
    "text_from_labels",
]

Decisions = NDArray[np.bool_]  # (blocks, 2): attention dropped, MLP dropped
LayerLabels = dict[str, str]  # layer name -> label, in the order of the file
Known = Sequence[Sequence[str | None]]  # (n, m) the label of each level of each unit; None: no such level

DROP_UNITS = ("sublayer", "block", "pair")
DROP_WORDS = {"none": (False, False), "attn": (True, False), "mlp": (False, True), "attn+mlp": (True, True)}
LISTED = 4  # names in an error message before "and 9 more"

_WIDTH, _STEPS = "[1-9][0-9]?", "0|-?[1-9][0-9]{0,3}"
LABEL_PATTERNS = {  # by the kind of the profile
    "quantization": re.compile(_WIDTH),
    "sparsity": re.compile(_STEPS),
    "gguf": re.compile("[A-Z]{1,5}[0-9]{1,2}(_[0-9A-Z]{1,3})?"),
    "mixed": re.compile(f"drop|quantization:({_WIDTH})|sparsity:({_STEPS})"),
}


def decisions_from_text(text: str, blocks: int | None = None, where: str = "profile") -> Decisions:
    """Parse the format of depth pruning -> (blocks, 2) bool; ProfileError, beginning with `where`, if malformed."""
    lines = _lines(text, where)
    for number, line in enumerate(lines, start=1):
        if line not in DROP_WORDS:
            raise ProfileError(f"{where}, line {number}: expected one of {', '.join(DROP_WORDS)}, got {short(line)}")
    if blocks is not None and len(lines) != blocks:
        raise ProfileError(f"{where}: expected a line for each of {blocks} blocks, got {len(lines)}")
    return np.array([DROP_WORDS[line] for line in lines], dtype=np.bool_)


def text_from_decisions(decisions: ArrayLike) -> str:
    """The text format of drop decisions (blocks, 2)."""
    words = {dropped: word for word, dropped in DROP_WORDS.items()}
    return "".join(f"{words[attention, mlp]}\n" for attention, mlp in _check_decisions(decisions).tolist())


def labels_from_text(text: str, where: str = "profile") -> LayerLabels:
    """Parse `layer.name: label` lines; raises ProfileError, beginning with `where`, if they are malformed."""
    labels: LayerLabels = {}
    for number, line in enumerate(_lines(text, where), start=1):
        name, colon, label = (part.strip() for part in line.partition(":"))
        at = f"{where}, line {number}"
        if not (colon and _is_layer_name(name)):
            raise ProfileError(
                f"{at}: expected a layer and its label, such as 'layers.0.up_proj: 3', got {short(line)}"
            )
        if not _is_label(label):
            raise ProfileError(
                f"{at}: expected a label such as 3, -2, Q4_K, drop, quantization:3 or sparsity:-2, got {short(label)}"
            )
        if name in labels:
            first = list(labels).index(name) + 1
            raise ProfileError(f"{at}: expected a line for each layer, got {short(name)} again after line {first}")
        labels[name] = label
    return labels


def text_from_labels(labels: Mapping[str, str]) -> str:
    """The `layer.name: label` lines; raises ValueError for what `labels_from_text` would not read back."""
    if not labels:
        raise ValueError("expected a label for at least one layer, got none")
    for name, label in labels.items():
        if not _is_layer_name(name):
            raise ValueError(f"a layer's name must have neither spaces nor colons, got {short(name)}")
        if not _is_label(label):
            raise ValueError(f"the label of {name} must be such as 3, -2, drop or quantization:3, got {short(label)}")
    return "".join(f"{name}: {label}\n" for name, label in labels.items())


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


def levels_from_labels(labels: Mapping[str, str], units: Sequence[Sequence[str]], known: Known) -> Levels:
    """Labels of layers -> levels (n,). `units` are the names of each unit's layers.

    Raises ProfileError for a layer that is in no unit, layers without a label, a label that a unit has no level for,
    and a unit whose layers have different labels. To allow missing layers, put their labels into `labels` first.
    """
    layers = _check_units(units, known)
    if strange := [name for name in labels if name not in layers]:
        raise ProfileError(
            f"the profile names layers that are not searched here: {listed(strange)}; "
            f"those that are: {listed(list(layers))}"
        )
    if missing := [name for name in layers if name not in labels]:
        raise ProfileError(f"the profile has labels for {len(labels)} of {len(layers)} layers, not {listed(missing)}")
    found = []
    for names, levels in zip(units, known, strict=True):
        label = labels[names[0]]
        for name in names[1:]:
            if labels[name] != label:
                raise ProfileError(
                    f"{names[0]} and {name} are one unit here and must have one label, "
                    f"got {short(label)} and {short(labels[name])}"
                )
        if label not in levels:
            existing = ", ".join(level for level in levels if level is not None)
            raise ProfileError(f"the label of {names[0]} must be one of {existing}, got {short(label)}")
        found.append(levels.index(label))
    return np.array(found, dtype=np.int16)


def labels_from_levels(levels: ArrayLike, units: Sequence[Sequence[str]], known: Known) -> LayerLabels:
    """Levels (n,) -> the label of every layer; the inverse of `levels_from_labels`."""
    _check_units(units, known)
    x = np.asarray(levels)
    if x.shape != (len(units),) or x.dtype.kind not in "iu":
        raise ValueError(f"levels must be integers of shape ({len(units)},), got {x.dtype} {x.shape}")
    labels: LayerLabels = {}
    for level, names, row in zip(x.tolist(), units, known, strict=True):
        label = row[level] if 0 <= level < len(row) else None
        if label is None:
            raise ValueError(f"expected a level that {names[0]} has, got {level}")
        labels.update(dict.fromkeys(names, label))
    return labels


def listed(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(short(name) for name in names[:LISTED]) + more


def _lines(text: str, where: str) -> list[str]:
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if not lines:
        raise ProfileError(f"{where}: the profile is empty")
    return lines


def _is_layer_name(name: str) -> bool:
    """Whether a name can stand in a line of its own and be told from JSON."""
    return bool(name) and name.isprintable() and not any(c in name for c in " :") and not name.startswith("{")


def _is_label(label: str) -> bool:
    return any(pattern.fullmatch(label) for pattern in LABEL_PATTERNS.values())


def _check_decisions(decisions: ArrayLike) -> Decisions:
    dropped = np.asarray(decisions)
    if dropped.ndim != 2 or dropped.shape[1] != 2 or dropped.dtype != np.bool_:
        raise ValueError(f"decisions must be bool of shape (blocks, 2), got {dropped.dtype} {dropped.shape}")
    return dropped


def _check_units(units: Sequence[Sequence[str]], known: Known) -> dict[str, int]:
    """The unit of every layer."""
    if not units or len(units) != len(known):
        raise ValueError(f"expected labels for each of at least one unit, got {len(known)} for {len(units)} units")
    unit_of: dict[str, int] = {}
    for unit, (names, row) in enumerate(zip(units, known, strict=True)):
        existing = [label for label in row if label is not None]
        if not names or not existing or len(set(existing)) < len(existing):
            raise ValueError(f"unit {unit} must have layers and different labels, got {names!r} and {row!r}")
        for name in names:
            if name in unit_of:
                raise ValueError(f"a layer must be in one unit, got {name!r} in units {unit_of[name]} and {unit}")
            unit_of[name] = unit
    return unit_of
