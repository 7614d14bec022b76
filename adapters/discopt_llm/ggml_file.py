"""What a GGUF file of a model holds besides the matrices that have levels: vectors, and what it says of the model."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from gguf import GGUFReader

from discopt_llm.layers import GGUF, layers_for
from discopt_llm.models import LoadedModel, gguf_file_of

__all__ = ["metadata_bytes", "rest_of"]

VECTOR_BYTES = 4  # of a weight of a norm, a bias, a router or a table of positions: llama.cpp wants them in F32
PER_STRING, PER_TOKEN = 8, 8  # bytes besides the text itself: a length; a token's type and its score
PER_TENSOR, FIELDS = 96, 4096  # about: a tensor's name, shape and place with its alignment; all other fields


def rest_of(loaded: LoadedModel, kind: str) -> tuple[int, int | None]:
    """How many parameters are outside of the layers of a kind of bank, tied ones once, and the bytes of all that a
    file holds besides those layers; None where that is 16 bits for each of them.
    """
    layers = layers_for(loaded, kind)
    rest = sum(p.numel() for p in loaded.model.parameters()) - sum(layer.weights for layer in layers)
    return rest, VECTOR_BYTES * rest + metadata_bytes(loaded) if kind == GGUF else None


def metadata_bytes(loaded: LoadedModel) -> int:
    """What a GGUF file of a model holds besides its tensors, bytes, with the gaps between them.

    Of a model that comes from such a file that is what there is in the file, else what its tokenizer comes to, about.
    """
    if (file := gguf_file_of(loaded.source)) is not None:
        return _outside_tensors(file)
    tokens = sum(len(token.encode()) + PER_STRING + PER_TOKEN for token in loaded.tokenizer.get_vocab())
    merges = sum(len(_joined(merge).encode()) + PER_STRING for merge in _merges(loaded))
    template = len(str(loaded.tokenizer.chat_template or "").encode())
    return tokens + merges + template + PER_TENSOR * len([*loaded.model.parameters()]) + FIELDS


@cache
def _outside_tensors(path: Path) -> int:
    return path.stat().st_size - sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors)


def _merges(loaded: LoadedModel) -> list[str | list[str]]:
    """Of a byte-pair tokenizer; none of another."""
    backend = getattr(loaded.tokenizer, "backend_tokenizer", None)
    merges: list[str | list[str]] = [] if backend is None else json.loads(backend.to_str())["model"].get("merges", [])
    return merges


def _joined(merge: str | list[str]) -> str:
    """A merge as a GGUF file has it: "a b"."""
    return merge if isinstance(merge, str) else " ".join(merge)
