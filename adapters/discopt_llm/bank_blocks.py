"""One block of a bank: a safetensors file with the packed forms of its layers, which says itself whether it is whole.

The tensor `NAME/LABEL/PART` is a part of the layer NAME at the level LABEL. The file's metadata names the bank it
belongs to, by the checksum of its header, describes layers and forms, and has a checksum of itself and of all
tensors, so a build that was killed can tell which blocks are finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from discopt.encoding import checksum
from discopt_llm.bank_forms import Form, form_costs, form_shape, from_parts, to_parts
from discopt_llm.bank_manifest import BUILD_AGAIN, BankLayer, check_layers, expect
from discopt_llm.errors import BankError, one_line

__all__ = ["StoredBlock", "encode_block"]

FORMAT = "discopt-bank-block"
VERSION = 1
KEY = "discopt"  # the one entry of the metadata: several would have no fixed order


def encode_block(
    header: Mapping[str, Any], block: int, layers: Sequence[BankLayer], forms: Mapping[tuple[str, int], Form]
) -> bytes:
    """The file of a block: `forms` by layer name and level, one for every level that a layer has.

    The same input gives the same bytes. Raises ValueError for forms that are missing, more than asked for, or not
    what the layers say they are.
    """
    _check_forms(block, layers, forms, header)
    tensors: dict[str, Tensor] = {}
    described: dict[str, list[dict[str, Any] | None]] = {}
    for layer in layers:
        described[layer.name] = []
        for level, label in enumerate(header["labels"]):
            form = forms.get((layer.name, level))
            parts, description = ({}, None) if form is None else to_parts(form)
            tensors |= {f"{layer.name}/{label}/{part}": tensor for part, tensor in parts.items()}
            described[layer.name].append(description)
    state = {
        "header": checksum(header),
        "block": block,
        "layers": [layer.to_json() for layer in layers],
        "forms": described,
        "tensors": _digest(tensors, tensors.__getitem__),
    }
    document = {"format": FORMAT, "version": VERSION, "checksum": checksum(state), "state": state}
    return save(tensors, {KEY: json.dumps(document, allow_nan=False)})


class StoredBlock:
    """A block's file, memory-mapped. Forms are read from it as they are asked for; nothing is kept."""

    def __init__(self, path: Path, file: Any, header: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        self.path = path
        self.labels: Sequence[str] = header["labels"]
        self.layers = tuple(BankLayer.from_json(entry, len(self.labels)) for entry in state["layers"])
        self._file = file  # safetensors' reader, which has no types
        self._forms = state["forms"]
        self._tensors = state["tensors"]

    @classmethod
    def open(cls, path: Path, header: Mapping[str, Any], block: int) -> StoredBlock:
        """Raises BankError if it is no whole file of this block of the bank with this header."""
        try:
            file: Any = safe_open(path, "pt")
            state = _state(file.metadata() or {})
            found = cls(path, file, header, state)
            check_layers(found.layers, header)
        except FileNotFoundError:
            raise BankError(f"{path} is missing; {BUILD_AGAIN}") from None
        except (OSError, SafetensorError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise _damaged(path, error) from None
        if state.get("header") != checksum(header) or state.get("block") != block:
            raise BankError(f"{path} is not block {block} of this bank; {BUILD_AGAIN}")
        return found

    def verify(self) -> None:
        """Raise BankError unless all tensors are what was written; reads the whole file."""
        try:
            digest = _digest(self._file.keys(), self._file.get_tensor)
        except SafetensorError as error:
            raise _damaged(self.path, error) from None
        if digest != self._tensors:
            raise _damaged(self.path, ValueError("its tensors have changed since they were written"))

    def form(self, layer: BankLayer, level: int, device: torch.device) -> Form:
        """A layer at a level, on the device.

        Raises ValueError for a level that the layer does not have, BankError if the file does not hold it as promised.
        """
        if not 0 <= level < len(self.labels):
            raise ValueError(f"level must be 0 to {len(self.labels) - 1}, got {level}")
        if not layer.present[level]:
            raise ValueError(f"expected a level that {layer.name} has, got {self.labels[level]!r}")
        prefix = f"{layer.name}/{self.labels[level]}/"
        try:
            described = self._forms[layer.name][level]
            form = from_parts(lambda part: self._file.get_tensor(prefix + part), described, layer.shape, device)
        except (SafetensorError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise _damaged(self.path, error) from None
        if form_costs(form) != layer.costs(level):
            raise _damaged(
                self.path,
                ValueError(f"expected {prefix[:-1]} to cost {layer.costs(level)}, got {form_costs(form)}"),
            )
        return form


def _state(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    document = expect(json.loads(metadata.get(KEY, "null")), dict, "its metadata")
    if (document.get("format"), document.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"expected {FORMAT} {VERSION}, got {document.get('format')} {document.get('version')}")
    state: Mapping[str, Any] = expect(document.get("state"), dict, "its state")
    if document.get("checksum") != checksum(state):
        raise ValueError("its metadata does not match its checksum")
    return state


def _check_forms(
    block: int, layers: Sequence[BankLayer], forms: Mapping[tuple[str, int], Form], header: Mapping[str, Any]
) -> None:
    labels = header["labels"]
    for layer in layers:
        if layer.block != block or len(layer.present) != len(labels):
            raise ValueError(
                f"{layer.name} must be of block {block} and have {len(labels)} levels, "
                f"got block {layer.block} and {len(layer.present)} levels"
            )
    check_layers(layers, header)
    wanted = {(layer.name, level): layer for layer in layers for level in layer.present.nonzero()[0].tolist()}
    if different := sorted(wanted.keys() ^ forms.keys()):
        name, level = different[0]
        verb = "lack" if different[0] in wanted else "must not hold"
        raise ValueError(f"expected one form for each level of each layer, got forms that {verb} {name} at {level}")
    for (name, level), layer in wanted.items():
        form = forms[name, level]
        if form_shape(form) != layer.shape:
            raise ValueError(f"{name} at level {level} must have shape {layer.shape}, got {form_shape(form)}")
        if form_costs(form) != layer.costs(level):
            raise ValueError(f"{name} at level {level} must cost {layer.costs(level)}, got {form_costs(form)}")


def _digest(names: Iterable[str], read: Callable[[str], Tensor]) -> str:
    """SHA-256 of tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name in sorted(names):
        tensor = read(name)
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _damaged(path: Path, error: Exception) -> BankError:
    return BankError(f"{path} is damaged: {one_line(error)}; {BUILD_AGAIN}")
