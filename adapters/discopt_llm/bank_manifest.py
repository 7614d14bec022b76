"""The manifest of a bank, bank.json: what was asked for, what every level of every layer costs, and the block files.

While a bank is built the manifest holds its header alone: everything that must be the same for a build to go on.
Nothing in it depends on when or where it was written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from discopt.encoding import checksum, plain, restore
from discopt_llm.bank_forms import VALUE_BITS, Costs
from discopt_llm.errors import BankError, one_line, short
from discopt_llm.layers import EMBEDDING, GGUF
from discopt_llm.parts import LayerKind

__all__ = [
    "MANIFEST",
    "BankLayer",
    "BlockFile",
    "Manifest",
    "block_name",
    "block_numbers",
    "check_header",
    "check_inside",
    "check_layers",
    "expect",
    "is_manifest",
]

MANIFEST = "bank.json"
FORMAT = "discopt-bank"
VERSION = 1
KINDS = ("quantization", "sparsity", "gguf")
ENDS = (["embedding"], ["embedding", "head"])  # that a bank of kind gguf may have: a tied head is the embedding
BUILD_AGAIN = "build the bank again"

_LARGEST = 2**53  # of the integers in a manifest: beyond any model, and exact in every reader of JSON


@dataclass(frozen=True, eq=False)
class BankLayer:
    """A layer as a bank knows it, with what its levels cost; m levels, 0 = most compressed.

    Costs of levels that the layer does not have are 0.
    """

    name: str
    block: int  # EMBEDDING, or the number of blocks for the head
    kind: LayerKind
    input: int  # layers of one block with one number read the same input
    matrices: int  # E: 1, or the number of experts
    rows: int
    columns: int
    transposed: bool  # stored (in, out) in the model
    present: NDArray[np.bool_]  # (m,)
    weights: NDArray[np.int64]  # (m,) that are kept
    bits: NDArray[np.int64]  # (m,) of their codes or values alone
    bytes: NDArray[np.int64]  # (m,) stored, with scales and zero points or mask
    errors: NDArray[np.float64]  # (m,) tr(ΔW H ΔWᵀ) / tr(W H Wᵀ), lower is better; NaN where there is no level
    outliers: Mapping[str, float]  # share of weights above so many times the layer's mean (OWL)

    def __post_init__(self) -> None:
        m = len(self.present)
        for field, kind in (*((name, np.int64) for name in Costs._fields), ("errors", np.float64)):
            object.__setattr__(self, field, _frozen(getattr(self, field), kind, m, field))
        object.__setattr__(self, "present", _frozen(self.present, np.bool_, m, "present"))
        if self.kind not in get_args(LayerKind):
            raise ValueError(f"kind must be one of {', '.join(get_args(LayerKind))}, got {short(self.kind)}")
        if min(self.matrices, self.rows, self.columns) < 1 or self.dense > _LARGEST:
            raise ValueError(f"matrices, rows and columns must be at least 1, got {self.shape}")
        if min(self.block if self.kind != "embedding" else 0, self.input) < 0:
            raise ValueError(f"block and input must not be negative, got {self.block} and {self.input}")
        if not self.present.any():
            raise ValueError(f"{self.name} must have a level, got none of {m}")
        costs = np.stack([self.weights, self.bits, self.bytes])
        highest = np.array([self.dense, self.dense * VALUE_BITS, _LARGEST])[:, None] * self.present
        if wrong := np.argwhere((costs < 0) | (costs > highest)).tolist():
            cost, level = wrong[0]
            raise ValueError(
                f"{Costs._fields[cost]} of level {level} must be 0 to {highest[cost, level]}, got {costs[cost, level]}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, R, C)."""
        return self.matrices, self.rows, self.columns

    @property
    def dense(self) -> int:
        """Number of weights when nothing is left out, E·R·C."""
        return self.matrices * self.rows * self.columns

    def costs(self, level: int) -> Costs:
        return Costs(int(self.weights[level]), int(self.bits[level]), int(self.bytes[level]))

    def to_json(self) -> dict[str, Any]:
        """In the types JSON has."""
        return {field: plain(getattr(self, field), exact=True) for field in _FIELDS}

    @classmethod
    def from_json(cls, data: Any, levels: int) -> BankLayer:
        """The inverse of `to_json` for so many levels; ValueError for anything malformed."""
        data = expect(data, dict, "a layer")
        if data.keys() != _FIELDS.keys():
            raise ValueError(f"a layer must have {', '.join(_FIELDS)}, got {', '.join(data) or 'nothing'}")
        values = {field: expect(data[field], kind, field) for field, kind in _FIELDS.items()}
        for field, kind in _LISTS.items():
            items = [_number(item, kind, f"{field} of a level") for item in values[field]]
            if len(items) != levels:
                raise ValueError(f"{field} must have {levels} entries, one a level, got {len(items)}")
            values[field] = np.array(items, dtype={float: np.float64, int: np.int64, bool: np.bool_}[kind])
        values["outliers"] = {k: _number(v, float, f"outliers {k}") for k, v in values["outliers"].items()}
        return cls(**values)


_FIELDS: dict[str, type] = {
    "name": str,
    "block": int,
    "kind": str,
    "input": int,
    "matrices": int,
    "rows": int,
    "columns": int,
    "transposed": bool,
    "present": list,
    "weights": list,
    "bits": list,
    "bytes": list,
    "errors": list,
    "outliers": dict,
}
_LISTS = {"present": bool, "weights": int, "bits": int, "bytes": int, "errors": float}


@dataclass(frozen=True)
class BlockFile:
    """A block's file as it was when the bank was finished."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, eq=False)
class Manifest:
    """The content of bank.json; before the bank is finished it lists no files and no layers."""

    header: dict[str, Any]
    complete: bool
    files: tuple[BlockFile, ...] = ()  # one a block
    layers: tuple[BankLayer, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Of everything that the bank says and holds."""
        return checksum({"header": self.header, "files": self._listed_files, "layers": self._listed_layers})

    def to_json(self) -> str:
        """The file's content, a line for each file and layer."""
        head = {"format": FORMAT, "version": VERSION, "complete": self.complete, "header": self.header}
        head["fingerprint"] = self.fingerprint
        lists = {"files": self._listed_files, "layers": self._listed_layers} if self.complete else {}
        lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in head.items()]
        for key, entries in lists.items():
            listed = ",\n    ".join(json.dumps(entry, allow_nan=False) for entry in entries)
            lines.append(f"{json.dumps(key)}: [\n    {listed}\n  ]")
        return "{\n  " + ",\n  ".join(lines) + "\n}\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a bank's folder; BankError if there is none, or it is not what was written."""
        path = folder / MANIFEST
        check_inside(path)
        try:
            text = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            reason = f"it has no {MANIFEST}" if folder.is_dir() else "there is no such folder"
            raise BankError(f"{folder} is not a bank: {reason}") from None
        except (OSError, ValueError) as error:  # ValueError: a path with a null byte
            raise BankError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
        try:
            data = expect(json.loads(text, parse_constant=_refuse_constant), dict, "the file")
            if data.get("format") != FORMAT:
                raise BankError(f"{path} is not ours: expected format {FORMAT!r}, got {short(data.get('format'))}")
            if data.get("version") != VERSION or isinstance(data["version"], bool):
                raise BankError(f"{path}: expected version {VERSION}, got {short(data.get('version'))}")
            return cls._of(data)
        except (ValueError, OverflowError, RecursionError) as error:
            raise BankError(f"{path} is damaged: {one_line(error)}; {BUILD_AGAIN}") from None

    @classmethod
    def _of(cls, data: Mapping[str, Any]) -> Manifest:
        header = expect(data.get("header"), dict, "header")
        check_header(header)
        if not expect(data.get("complete"), bool, "complete"):
            return cls(header, complete=False)._checked(data)
        files = tuple(_file(entry) for entry in expect(data.get("files"), list, "files"))
        numbers = block_numbers(header)
        if len(files) != len(numbers):
            raise ValueError(f"files must name one for each of {len(numbers)} blocks, got {len(files)}")
        for file, number in zip(files, numbers, strict=True):
            if file.name != (name := block_name(number, header)):  # a plain name, never a path
                raise ValueError(f"the file of block {number} must be {name}, got {short(file.name)}")
        entries = expect(data.get("layers"), list, "layers")
        manifest = cls(header, True, files, tuple(BankLayer.from_json(x, len(header["labels"])) for x in entries))
        check_layers(manifest.layers, header)
        return manifest._checked(data)

    def _checked(self, data: Mapping[str, Any]) -> Self:
        """This, if its fingerprint is the one in the file: it covers all but the three words before it."""
        fingerprint = expect(data.get("fingerprint"), str, "fingerprint")
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"its content does not match its fingerprint: expected {self.fingerprint[:12]}, "
                f"got {short(fingerprint[:12])}"
            )
        return self

    @property
    def _listed_files(self) -> list[dict[str, Any]]:
        return [{**vars(file)} for file in self.files]

    @property
    def _listed_layers(self) -> list[dict[str, Any]]:
        return [layer.to_json() for layer in self.layers]


def is_manifest(path: Path) -> bool:
    """Whether the file is the manifest of a bank, even a damaged one or a newer version's."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT


def check_inside(path: Path) -> None:
    """Raise BankError for a link that leads out of the bank's folder: whoever gave the bank chose where to."""
    if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
        raise BankError(f"{path} is a link that leads out of the bank; put the file itself there")


def block_numbers(header: Mapping[str, Any]) -> range:
    """The numbers of a bank's blocks, with those that stand for embedding and head where it has levels of them."""
    ends = header.get("ends", [])
    return range(EMBEDDING if "embedding" in ends else 0, header["blocks"] + ("head" in ends))


def block_name(block: int, header: Mapping[str, Any]) -> str:
    """The name of a block's file."""
    return f"{_ends(header).get(block, f'block-{block:05}')}.safetensors"


def check_header(header: Mapping[str, Any]) -> None:
    """Raise ValueError unless the header says kind, settings, labels, model, calibration and number of blocks."""
    kind = expect(header.get("kind"), str, "kind")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {short(kind)}")
    expect(header.get("settings"), dict, "settings")
    labels = [expect(label, str, "a label") for label in expect(header.get("labels"), list, "labels")]
    if not labels or not all(labels) or any("/" in label for label in labels) or len({*labels}) < len(labels):
        raise ValueError(f"labels must be different names without a slash, got {short(labels)}")
    model = expect(header.get("model"), dict, "model")
    expect(model.get("source"), str, "model's source")
    expect(model.get("fingerprint"), str, "model's fingerprint")
    expect(header.get("calibration"), dict, "calibration")
    if (blocks := expect(header.get("blocks"), int, "blocks")) < 1:
        raise ValueError(f"blocks must be at least 1, got {blocks}")
    if (kind == GGUF) != ("ends" in header) or header.get("ends", ENDS[0]) not in ENDS:
        raise ValueError(f"ends must be one of {ENDS} of kind {GGUF} alone, got {short(header.get('ends'))}")


def check_layers(layers: Sequence[BankLayer], header: Mapping[str, Any]) -> None:
    """Raise ValueError unless there are layers, with names of their own, block by block."""
    if not layers:
        raise ValueError("expected at least one layer, got none")
    numbers, known = [layer.block for layer in layers], block_numbers(header)
    if numbers != sorted(numbers) or any(number not in known for number in numbers):
        raise ValueError(f"layers must come block by block, {known[0]} to {known[-1]}, got {short(numbers)}")
    for layer in layers:
        if _ends(header).get(layer.block) != (layer.kind if layer.kind in _ends(header).values() else None):
            raise ValueError(f"{layer.name} must be at its end of the model, got {layer.kind} in block {layer.block}")
    name, times = Counter(layer.name for layer in layers).most_common(1)[0]
    if times > 1:
        raise ValueError(f"names of layers must differ, got {short(name)} {times} times")


def expect(value: Any, kind: type, what: str) -> Any:
    """The value, if it is of this kind as JSON has them; ValueError, naming `what`, if not."""
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        words = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number"}
        raise ValueError(f"{what} must be {words.get(kind, 'true or false')}, got {short(value)}")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError(f"{what} must be a whole number below 2^53, got {short(value)}")
    return value


def _ends(header: Mapping[str, Any]) -> dict[int, str]:
    """The kinds of layers that have a block of their own, by its number."""
    return {EMBEDDING: "embedding", header["blocks"]: "head"}


def _number(value: Any, kind: type, what: str) -> Any:
    """As `expect`, of a number that need not be finite."""
    coded = isinstance(value, dict) and isinstance(value.get("float"), str)
    return expect(restore(value) if coded else value, kind, what)


def _file(entry: Any) -> BlockFile:
    entry = expect(entry, dict, "a file")
    kinds = {"name": str, "bytes": int, "sha256": str}
    return BlockFile(**{field: expect(entry.get(field), kind, f"a file's {field}") for field, kind in kinds.items()})


def _frozen(values: ArrayLike, kind: type, m: int, what: str) -> NDArray[Any]:
    array: NDArray[Any] = np.array(values, dtype=kind)
    if array.shape != (m,):
        raise ValueError(f"{what} must have shape ({m},), got {array.shape}")
    array.setflags(write=False)
    return array


def _refuse_constant(name: str) -> None:
    raise ValueError(f"expected strict JSON, got {name}")
