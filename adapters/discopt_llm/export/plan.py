"""What is written of a student: which blocks, renumbered, and what of them is silent.

Blocks that lost both their sub-blocks are left out where the model allows it; other dropped sub-blocks stay silent.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from discopt_llm.anatomy import Anatomy, SubBlock
from discopt_llm.export.proof import UnfitError

__all__ = ["Plan", "count", "plans"]


@dataclass(frozen=True, eq=False)
class Plan:
    """One form a checkpoint may take."""

    anatomy: Anatomy
    dropped: NDArray[np.bool_]  # (blocks, 2)
    kept: tuple[int, ...]  # blocks that are written
    replaced: tuple[str, ...]  # parameters for which the student has other weights
    what: str  # what these weights are

    @property
    def left_out(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self.dropped)) if i not in self.kept)

    @property
    def zeroed(self) -> tuple[SubBlock, ...]:
        """Dropped sub-blocks of blocks that are written."""
        kept = [(b.attention, b.mlp) for b in (self.anatomy.blocks[i] for i in self.kept)]
        gone = self.dropped[list(self.kept)]
        return tuple(part for part, g in zip(itertools.chain(*kept), gone.flat, strict=True) if g)

    @property
    def silent(self) -> frozenset[str]:
        """Parameters that are written as zeros."""
        return frozenset(name for part in self.zeroed for name in part.outputs)

    @property
    def written(self) -> tuple[str, ...]:
        """Replaced parameters that are written, as the checkpoint calls them."""
        names = (self.renamed(name) for name in self.replaced if name not in self.silent)
        return tuple(name for name in names if name is not None)

    def renamed(self, name: str) -> str | None:
        """What a module or tensor is called in the checkpoint; None if it is left out."""
        prefix = f"{self.anatomy.layers_name}."
        if not name.startswith(prefix):
            return name
        block, _, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{self.kept.index(int(block))}.{rest}" if int(block) in self.kept else None

    def renumbered(self, name: str, value: Sequence[Any]) -> Sequence[Any]:
        """A list in the config: cut if it says something of every layer, renumbered if it is numbers of layers."""
        n = len(self.dropped)
        make = type(value)
        if len(value) == n and "token" not in name:
            return make(value[i] for i in self.kept)  # type: ignore[call-arg]
        if "layer" in name and all(type(i) is int and 0 <= i < n for i in value):
            return make(self.kept.index(i) for i in value if i in self.kept)  # type: ignore[call-arg]
        return value

    def sentence(self, refusal: UnfitError | None, silent: str) -> str:
        """What the checkpoint holds, and why not less.

        refusal: what was wrong with a smaller form. silent: what becomes of a sub-block that is dropped alone.
        """
        n, whole = len(self.dropped), np.flatnonzero(self.dropped.all(axis=1))
        parts = [f"{len(self.kept)} of {count(n, 'layer')}" if self.left_out else f"all {count(n, 'layer')}"]
        if self.left_out:
            parts.append(f"{count(len(self.left_out), 'block')} left out")
        if self.zeroed:
            parts.append(f"{count(len(self.zeroed), 'dropped sub-block')} {silent}")
        if self.written:
            parts.append(f"{count(len(self.written), 'weight tensor')} {self.what or 'replaced'}")
        if not self.dropped.any() and not self.written:
            parts.append("nothing dropped")
        if stuck := [i for i in self.kept if i in whole]:
            why = "a block by itself changes what passes through it"
            if refusal is not None:
                why = str(refusal)
            elif all(self.anatomy.blocks[i].transparent for i in stuck):
                why = "a model needs one"
            parts.append(f"{count(len(stuck), 'whole block')} could not be left out ({why})")
        return ", ".join(parts)


def plans(anatomy: Anatomy, dropped: NDArray[np.bool_], replaced: tuple[str, ...], what: str) -> Iterator[Plan]:
    """The forms to try for a student that drops sub-blocks (blocks, 2) and has other weights, the smallest first."""
    everything = tuple(range(len(dropped)))
    kept = tuple(i for i in everything if not (dropped[i].all() and anatomy.blocks[i].transparent))
    for blocks in dict.fromkeys((kept or everything[:1], everything)):
        yield Plan(anatomy, dropped, blocks, replaced, what)


def count(number: int, noun: str) -> str:
    """A number of things: "1 layer", "3 layers"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
