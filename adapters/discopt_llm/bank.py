"""Banks: the stored weights of every layer at every level, from which searches and their results take them.

A bank is a folder: `bank.json` (what was asked for, what every level costs, the files and their checksums) and
`block-00000.safetensors` ... (the packed forms of one block's layers each), of kind "gguf" also
`embedding.safetensors` and, unless it is tied to that, `head.safetensors`. `Bank` reads one, memory-mapped, and
unpacks a level on the device that asks for it. `BankWriter` makes one block by block; killed at any point it goes on
after the blocks it has finished, and ends in the same bytes.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discopt.encoding import plain
from discopt.files import write_atomic
from discopt.lock import FolderLock
from discopt_llm.bank_blocks import StoredBlock, encode_block
from discopt_llm.bank_forms import (
    Costs,
    Form,
    Ggml,
    Sparse,
    dense_weights,
    form_costs,
    ggml_costs,
    quantized_costs,
    sparse_costs,
)
from discopt_llm.bank_manifest import (
    BUILD_AGAIN,
    MANIFEST,
    BankLayer,
    BlockFile,
    Manifest,
    block_name,
    block_numbers,
    check_header,
    check_inside,
    check_layers,
    is_manifest,
)
from discopt_llm.errors import BankError, one_line
from discopt_llm.layers import Layer

__all__ = [
    "Bank",
    "BankLayer",
    "BankWriter",
    "Costs",
    "Form",
    "Ggml",
    "Sparse",
    "form_costs",
    "ggml_costs",
    "quantized_costs",
    "sparse_costs",
]

_BLOCK_FILES = ("block-[0-9][0-9][0-9][0-9][0-9].safetensors", "embedding.safetensors", "head.safetensors")
_COMPARED = ("name", "block", "kind", "input", "matrices", "rows", "columns", "transposed")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Bank:
    """A finished bank. Open one with `open`."""

    path: Path
    header: Mapping[str, Any]  # what it was asked to be
    layers: tuple[BankLayer, ...]  # in the order of blocks and of use
    fingerprint: str  # of all it says and holds
    _blocks: _Blocks = field(repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Bank:
        """Raise BankError unless the folder holds a whole bank.

        `verify` reads all files once and compares their checksums; without it only their sizes are looked at.
        """
        path = Path(path)
        manifest = Manifest.read(path)
        if not manifest.complete:
            blocks = block_numbers(manifest.header)
            built = sum((path / block_name(block, manifest.header)).is_file() for block in blocks)
            raise BankError(
                f"the bank {path} is unfinished: {built} of {len(blocks)} blocks are built; "
                "build it with the same options to go on"
            )
        for file in manifest.files:
            _check_file(path / file.name, file, verify=verify)
        return cls(path, manifest.header, manifest.layers, manifest.fingerprint, _Blocks(path, manifest.header))

    @property
    def kind(self) -> str:
        """ "quantization", "sparsity" or "gguf"."""
        return self.header["kind"]

    @property
    def settings(self) -> Mapping[str, Any]:
        """Of the method that made the levels."""
        return self.header["settings"]

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the levels, (m,): "2".."6" bits, "8".."-8" steps sparser than the target, or types of ggml."""
        return tuple(self.header["labels"])

    @property
    def model(self) -> Mapping[str, str]:
        """The "source" of the model it was made from, and its "fingerprint"."""
        return self.header["model"]

    @property
    def calibration(self) -> Mapping[str, Any]:
        """The text it was made on."""
        return self.header["calibration"]

    def check_model(self, fingerprint: str, layers: Sequence[Layer]) -> None:
        """Raise BankError, saying what differs, unless the bank was made from this model with these layers."""
        belongs = f"the bank {self.path} belongs to {' '.join(self.model['source'].split())}"
        if len(self.layers) != len(layers):
            raise BankError(f"{belongs} and has {len(self.layers)} layers, but this model has {len(layers)}")
        for index, (mine, theirs) in enumerate(zip(self.layers, layers, strict=True)):
            for what in _COMPARED:
                a, b = getattr(mine, what), getattr(theirs, what)
                if a != b:
                    where = f"layer {index}" if what == "name" else mine.name
                    raise BankError(f"{belongs}: its {where} has the {what} {a}, but this model's has {b}")
        if fingerprint != self.model["fingerprint"]:
            raise BankError(
                f"{belongs}, whose weights differ from this model's "
                f"(fingerprint {self.model['fingerprint'][:12]}, here {fingerprint[:12]})"
            )

    def form(self, layer: int, level: int, device: torch.device) -> Form:
        """A layer at a level; its packed parts are moved to the device and unpacked there.

        Raises ValueError for a layer or level that is not there, BankError for a file that has changed.
        """
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"layer must be 0 to {len(self.layers) - 1}, got {layer}")
        return self._blocks.form(self.layers[layer], level, device)

    def weights(self, layer: int, level: int, device: torch.device) -> Tensor:
        """The weights of a layer at a level, (E, R, C) float32: those that the solver ended with."""
        return dense_weights(self.form(layer, level, device))


class BankWriter:
    """Builds a bank, and goes on where an earlier one was stopped. Make one with `begin`; one process at a time."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.header = header
        self._blocks = _Blocks(path, header)
        self._files: dict[int, BlockFile] = {}
        self._layers: dict[int, tuple[BankLayer, ...]] = {}
        self._lock = FolderLock(path, "the bank").acquire()

    @classmethod
    def begin(cls, path: str | os.PathLike[str], header: Mapping[str, Any], *, force: bool = False) -> BankWriter:
        """Make the folder, or go on with the unfinished bank in it.

        header: kind, settings, labels, model (source and fingerprint), calibration, blocks (their number), and
            whatever else decides about the bytes of the bank.
        force: replace the bank in the folder, finished or not; nothing but a bank is ever replaced.

        The writer holds the folder's lock until it has finished or is forgotten.

        Raises BankError for a folder that holds anything else of these names, a finished bank, or one that was begun
        with another header, saying what differs; RunFolderError, with the owner's name, for one that another process
        writes; ValueError for a header that lacks something.
        """
        path = Path(path)
        asked: dict[str, Any] = plain(header, exact=True)
        check_header(asked)
        if path.exists() and not path.is_dir():
            raise BankError(f"{path} is a file, not a folder; choose another one for the bank")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_make(path, error) from error
        writer = cls(path, asked)  # holds it from here on
        try:
            writer._take_over(force=force)
        except BaseException as error:
            writer._lock.release()
            if isinstance(error, OSError):
                raise _cannot_make(path, error) from error
            raise
        return writer

    def _take_over(self, *, force: bool) -> None:
        """Begin the manifest, or take over the blocks of an unfinished bank."""
        begun = _begun(self.path, self.header, force=force)
        _remove(self.path, blocks=begun is None)
        if begun is None:
            write_atomic(self.path / MANIFEST, Manifest(self.header, complete=False).to_json())
        else:
            self._read_finished()

    @property
    def finished(self) -> frozenset[int]:
        """The blocks that are written."""
        return frozenset(self._files)

    @property
    def layers(self) -> tuple[BankLayer, ...]:
        """Those of the finished blocks, in the order of blocks."""
        return tuple(layer for block in sorted(self._layers) for layer in self._layers[block])

    def write_block(self, block: int, layers: Sequence[BankLayer], forms: Mapping[tuple[str, int], Form]) -> None:
        """Write a block whole and flushed: its layers in order, and the form of each (layer name, level) there is.

        Raises ValueError for forms that are not what the layers say, RunFolderError if the file cannot be written.
        """
        numbers = block_numbers(self.header)
        if block not in numbers or block in self._files:
            raise ValueError(f"expected a block of {numbers[0]} to {numbers[-1]} not yet written, got {block}")
        data = encode_block(self.header, block, layers, forms)
        name = block_name(block, self.header)
        write_atomic(self.path / name, data)
        self._layers[block] = tuple(layers)
        self._files[block] = BlockFile(name, len(data), hashlib.sha256(data).hexdigest())

    def form(self, block: int, name: str, level: int, device: torch.device) -> Form:
        """As `Bank.form`, of a layer in a finished block; ValueError if there is none of this name."""
        for layer in self._layers.get(block, ()):
            if layer.name == name:
                return self._blocks.form(layer, level, device)
        raise ValueError(f"expected a layer in a finished block, got {name} in block {block}")

    def weights(self, block: int, name: str, level: int, device: torch.device) -> Tensor:
        """As `Bank.weights`, of a layer in a finished block."""
        return dense_weights(self.form(block, name, level, device))

    def finish(self) -> Bank:
        """Write the manifest; the bank can be opened from now on. Raises ValueError if blocks are missing."""
        if missing := sorted({*block_numbers(self.header)} - self.finished):
            count = len(block_numbers(self.header))
            raise ValueError(f"expected all {count} blocks to be written, got none for {missing}")
        check_layers(self.layers, self.header)
        files = tuple(self._files[block] for block in sorted(self._files))
        write_atomic(self.path / MANIFEST, Manifest(self.header, True, files, self.layers).to_json())
        self._lock.release()
        return Bank.open(self.path, verify=False)  # each file was flushed, or read and verified, by this very process

    def _read_finished(self) -> None:
        """Take over the blocks that are whole; a torn one is built again."""
        for block in block_numbers(self.header):
            file = self.path / block_name(block, self.header)
            if not os.path.lexists(file):
                continue
            try:
                check_inside(file)
                stored = StoredBlock.open(file, self.header, block)
                stored.verify()
                size, sha256 = file.stat().st_size, _sha256(file)
            except (BankError, OSError) as error:
                _log.warning("block %d is built again: %s", block, error)
                continue
            self._layers[block] = stored.layers
            self._files[block] = BlockFile(file.name, size, sha256)


class _Blocks:
    """The block files of a bank, opened when first asked for."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self._path, self._header = path, header
        self._opened: dict[int, StoredBlock] = {}

    def form(self, layer: BankLayer, level: int, device: torch.device) -> Form:
        block = layer.block
        if block not in self._opened:
            file = self._path / block_name(block, self._header)
            self._opened[block] = StoredBlock.open(file, self._header, block)
        return self._opened[block].form(layer, level, device)


def _cannot_make(path: Path, error: OSError) -> BankError:
    return BankError(f"cannot make the bank {path}: {error.strerror or error}")


def _begun(path: Path, header: Mapping[str, Any], *, force: bool) -> dict[str, Any] | None:
    """The header of the unfinished bank in the folder to go on with; None to begin one; BankError to keep off."""
    if not os.path.lexists(path / MANIFEST):
        if stray := sorted(file for pattern in _BLOCK_FILES for file in path.glob(pattern)):
            raise BankError(f"{path} holds {stray[0].name} but no {MANIFEST}; choose another folder for the bank")
        return None
    if not is_manifest(path / MANIFEST):
        raise BankError(f"{path} holds a {MANIFEST} that is not a bank's; choose another folder for the bank")
    if force:
        return None
    manifest = Manifest.read(path)
    if manifest.complete:
        raise BankError(f"{path} holds a finished bank already; use it, choose another folder, or replace it by force")
    if different := _difference(manifest.header, header):
        raise BankError(
            f"{path} holds an unfinished bank that was begun with other options ({one_line(different)}); "
            "use those to go on, choose another folder, or replace it by force"
        )
    return manifest.header


def _difference(there: Any, here: Any, name: str = "") -> str:
    """What first differs between the header in a folder and another one, in words; empty if nothing does."""
    if not isinstance(there, Mapping) or not isinstance(here, Mapping):
        return "" if there == here and type(there) is type(here) else f"{name}: {there!r} there, {here!r} here"
    for key in dict.fromkeys((*there, *here)):
        path = f"{name} {key}".lstrip()
        if key not in there or key not in here:
            return f"{path}: only {'there' if key in there else 'here'}"
        if found := _difference(there[key], here[key], path):
            return found
    return ""


def _remove(path: Path, *, blocks: bool) -> None:
    """Remove the temporary files of a process that was killed while writing, and block files if asked to."""
    names = (MANIFEST, *_BLOCK_FILES)
    patterns = [*(f".{name}.*.tmp" for name in names), *(_BLOCK_FILES if blocks else ())]
    for leftover in (file for pattern in patterns for file in path.glob(pattern)):
        leftover.unlink(missing_ok=True)


def _check_file(path: Path, expected: BlockFile, *, verify: bool) -> None:
    check_inside(path)
    try:
        size = path.stat().st_size
        changed = size == expected.bytes and verify and _sha256(path) != expected.sha256
    except FileNotFoundError:
        raise BankError(f"{path} is missing; {BUILD_AGAIN}") from None
    except OSError as error:
        raise BankError(f"cannot read {path}: {error.strerror or error}") from error
    if size != expected.bytes:
        raise BankError(f"{path} is damaged: expected {expected.bytes} bytes, got {size}; {BUILD_AGAIN}")
    if changed:
        raise BankError(f"{path} is damaged: its checksum is not the one in {MANIFEST}; {BUILD_AGAIN}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
