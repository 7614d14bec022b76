"""Depth pruning in GGUF files: blocks left out, sub-blocks as llama.cpp's `deci` architecture has them, or zeros.

Blocks that lost both sub-blocks are left out and the others renumbered. For Llama-like models what else is dropped is
absent in the file as well: `deci` has numbers of heads and a width of the MLP for every layer, 0 where there is none.
Two things it cannot say: an MLP is not left out beside an attention (its code then forgets the attention), so the
smallest MLP of zeros stands there; and the first layer tells the size of a head, so it always has an attention, with
one head of zeros if need be. Other architectures keep dropped sub-blocks, with output projections of zeros.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from gguf import Keys
from numpy.typing import NDArray

from discopt_llm.anatomy import Anatomy
from discopt_llm.export.gguf_contents import Contents, Stored
from discopt_llm.export.gguf_families import Family, Fields, value
from discopt_llm.export.gguf_layout import Layout, interleaved

__all__ = ["Pruned", "pruned"]

DECI = "deci"
LEAST_WIDTH = 32  # of an MLP of zeros: a block of the types that matrices are quantized to
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_HEADS, _KV_HEADS, _WIDTH = "attention.head_count", "attention.head_count_kv", "feed_forward_length"
_HEAD_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")


@dataclass(frozen=True, eq=False)
class Pruned:
    """A file without what was dropped."""

    contents: Contents
    kept: tuple[int, ...]  # blocks that it has
    words: str  # for people: what it has and what not


def pruned(contents: Contents, dropped: NDArray[np.bool_], anatomy: Anatomy, family: Family, layout: Layout) -> Pruned:
    """A file without the dropped sub-blocks, (blocks, 2) attention and MLP, of a file with all of them."""
    n = len(dropped)
    whole = [bool(dropped[i].all()) and anatomy.blocks[i].transparent for i in range(n)]
    kept = tuple(i for i in range(n) if not whole[i]) or (0,)
    if family.alternating and any(new % 2 != old % 2 for new, old in enumerate(kept)):
        kept = tuple(range(n))  # renumbered, layers would swap sliding windows for full attention
    gone = dropped[list(kept)]
    words = [f"{len(kept)} of {n} layers"] if len(kept) < n else [f"all {n} layers"]
    if not gone.any():
        return Pruned(_renumbered(contents, kept), kept, words[0])
    counts = " and ".join(f"{count} {kind}" for count, kind in zip(gone.sum(axis=0), ("attention", "MLP"), strict=True))
    if family.deci and not any("_exps." in name for name in contents.tensors):
        words.append(f"{counts} sub-blocks left out (architecture {DECI})")
        return Pruned(_deci(_renumbered(contents, kept), gone, family), kept, ", ".join(words))
    words.append(f"{counts} sub-blocks dropped by output projections of zeros, which makes the file no smaller")
    silent = _silent(contents, dropped, kept, anatomy, layout)
    return Pruned(_renumbered(silent, kept), kept, ", ".join(words))


def _renumbered(contents: Contents, kept: Sequence[int]) -> Contents:
    """With these blocks only, in this order; lists with a value for every block are cut with them."""
    before = contents.own("block_count")
    tensors = {}
    for name, tensor in contents.tensors.items():
        if not (found := _BLOCK.fullmatch(name)):
            tensors[name] = tensor
        elif int(found[1]) in kept:
            tensors[f"blk.{kept.index(int(found[1]))}.{found[2]}"] = tensor
    fields = dict(contents.fields)
    for key, old in fields.items():
        if key.startswith(f"{contents.arch}.") and isinstance(old.value, list) and len(old.value) == before:
            fields[key] = replace(old, value=[old.value[i] for i in kept])
    fields[f"{contents.arch}.block_count"] = value(len(kept))
    return Contents(fields, tensors)


def _silent(
    contents: Contents, dropped: NDArray[np.bool_], kept: Sequence[int], anatomy: Anatomy, layout: Layout
) -> Contents:
    """With zeros for the output projections of what was dropped from the blocks that stay."""
    tensors = dict(contents.tensors)
    for i in kept:
        block = anatomy.blocks[i]
        for part, gone in zip((block.attention, block.mlp), dropped[i], strict=True):
            for name in [name for output in part.outputs if gone for name in layout.names(output)]:
                tensors[name] = Stored.zeros(tensors[name].weights, tensors[name].type)
    return replace(contents, tensors=tensors)


def _deci(contents: Contents, gone: NDArray[np.bool_], family: Family) -> Contents:
    """As llama.cpp's `deci`, without the sub-blocks that are gone, (layers, 2); the file has these layers only."""
    hidden, heads = contents.own("embedding_length"), contents.own(_HEADS)
    kv_heads, width = contents.own(_KV_HEADS) or heads, contents.own(_WIDTH)
    size = contents.own("attention.key_length") or hidden // heads
    per_layer: dict[str, list[int]] = {_HEADS: [], _KV_HEADS: [], _WIDTH: []}
    tensors = {}
    for name, tensor in contents.tensors.items():
        found = _BLOCK.fullmatch(name)
        if found is None or not gone[int(found[1]), 0 if found[2].startswith("attn") else 1]:
            tensors[name] = _turned(tensor, name, family, heads, kv_heads)
    for layer, (no_attention, no_mlp) in enumerate(gone.tolist()):
        own_heads = (0, 0) if no_attention else (heads, kv_heads)
        own_width = 0 if no_mlp else width
        if no_attention and layer == 0:
            own_heads = (1, 1)
            tensors["blk.0.attn_norm.weight"] = contents.tensors["blk.0.attn_norm.weight"]
            for part in ("q", "k", "v"):
                tensors[f"blk.0.attn_{part}.weight"] = Stored.zeros((size, hidden))
            tensors["blk.0.attn_output.weight"] = Stored.zeros((hidden, size))
        if no_mlp and own_heads[0]:
            own_width = LEAST_WIDTH
            norm = f"blk.{layer}.ffn_norm.weight"
            tensors[norm] = contents.tensors[norm]
            for part in ("gate", "up"):
                tensors[f"blk.{layer}.ffn_{part}.weight"] = Stored.zeros((LEAST_WIDTH, hidden))
            tensors[f"blk.{layer}.ffn_down.weight"] = Stored.zeros((hidden, LEAST_WIDTH))
        for key, number in zip(per_layer, (*own_heads, own_width), strict=True):
            per_layer[key].append(number)
    own: Fields = {f"{DECI}.{key}": value(numbers) for key, numbers in per_layer.items()}
    own |= {f"{DECI}.{key}": value(size) for key in _HEAD_SIZES}
    own[Keys.General.ARCHITECTURE] = value(DECI)
    prefix = f"{contents.arch}."
    kept = {re.sub(f"^{re.escape(prefix)}", f"{DECI}.", key): field for key, field in contents.fields.items()}
    return Contents(kept | own, tensors)


def _turned(tensor: Stored, name: str, family: Family, heads: int, kv_heads: int) -> Stored:
    """With rows in the order of `deci`, which rotates neighbouring pairs."""
    found = _BLOCK.fullmatch(name)
    numbers = {"attn_q": heads, "attn_k": kv_heads}
    if family.rows == "interleaved" or found is None or (part := found[2].partition(".")[0]) not in numbers:
        return tensor
    rows = tensor.weights[0]
    order = interleaved(rows, numbers[part])
    return tensor.changed(lambda data: data.reshape(rows, -1)[order].reshape(data.shape))
