"""Depth pruning as a source of levels: every unit is dropped (level 0) or kept (level 1).

Units are attention and MLP sub-blocks, whole blocks, or pairs of consecutive blocks. A dropped sub-block contributes
nothing to the residual stream and costs nothing to run (EvoPress, Section 4.1).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import nn

from discopt.space import SearchSpace
from discopt_llm.anatomy import Anatomy, SubBlock, skipped_
from discopt_llm.evaluator import TEACHER
from discopt_llm.profile_text import decisions_from_levels

__all__ = ["DropLevels", "Unit", "blocks_to_drop", "drop_space"]

Unit = Literal["sublayer", "block", "pair"]


@dataclass(frozen=True, eq=False)
class DropLevels:
    """The units of depth pruning in a model, in the order of its blocks; attention comes before MLP."""

    anatomy: Anatomy
    unit: Unit = "sublayer"

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise ValueError(f"expected a unit of {', '.join(get_args(Unit))}, got {self.unit!r}")

    @cached_property
    def units(self) -> tuple[tuple[SubBlock, ...], ...]:
        """The sub-blocks that go with each unit, (n,)."""
        parts = self.anatomy.sub_blocks
        size = {"sublayer": 1, "block": 2, "pair": 4}[self.unit]
        return tuple(parts[i : i + size] for i in range(0, len(parts), size))

    @cached_property
    def blocks_of(self) -> tuple[tuple[int, ...], ...]:
        """The indices of the blocks that each unit is made of, (n,); a pair that is cut short has one."""
        n = len(self.anatomy.blocks)
        if self.unit == "pair":
            return tuple(tuple(range(i, min(i + 2, n))) for i in range(0, n, 2))
        return tuple((i,) for i in range(n) for _ in range(2 if self.unit == "sublayer" else 1))

    @cached_property
    def block_units(self) -> tuple[NDArray[np.intp], ...]:
        """For each block, the units that decide about it."""
        deciding: list[list[int]] = [[] for _ in self.anatomy.blocks]
        for unit, blocks in enumerate(self.blocks_of):
            for block in blocks:
                deciding[block].append(unit)
        return tuple(np.array(units, dtype=np.intp) for units in deciding)

    @property
    def end_units(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """None: embedding and head stay as they are."""
        return np.empty(0, dtype=np.intp), np.empty(0, dtype=np.intp)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the units, (n,): of a sub-block its own, of blocks "model.layers.3" or "model.layers.4+5"."""
        if self.unit == "sublayer":
            return tuple(part.name for part in self.anatomy.sub_blocks)
        blocks = self.anatomy.blocks
        return tuple("+".join([blocks[i].name, *(str(j) for j in others)]) for i, *others in self.blocks_of)

    def dense_row(self, block: int) -> tuple[int, ...]:
        """The teacher's levels of a block: everything kept."""
        return (1,) * len(self.block_units[block])

    def runs(self, block: int, row: tuple[int, ...]) -> int:
        """How many of the block's sub-blocks are kept."""
        return sum(row) if self.unit == "sublayer" else 2 * row[0]

    def applied_(self, block: int, row: tuple[int, ...] | None) -> AbstractContextManager[None]:
        """The block's sub-blocks dropped as the row says, while inside."""
        parts = (self.anatomy.blocks[block].attention, self.anatomy.blocks[block].mlp)
        levels = (1, 1) if row is None else row if self.unit == "sublayer" else row * 2
        return skipped_(part for part, level in zip(parts, levels, strict=True) if level == 0)

    def dropped(self, profile: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Which sub-blocks a profile (n,) drops: (blocks, 2), attention then MLP."""
        kept = np.where(self._gone(profile), 0, 1)
        return decisions_from_levels(kept, self.unit, len(self.anatomy.blocks))

    def parameters_dropped(self, profile: NDArray[np.integer]) -> int:
        """Number of parameters in the sub-blocks that a profile (n,) drops; the norms beside them stay."""
        return sum(part.parameters for part in self._dropped_parts(profile))

    def bytes_of(self, model: nn.Module, profile: NDArray[np.integer]) -> int:
        """What the student of a profile (n,), or of one of TEACHER throughout, takes in memory, bytes."""
        whole = sum(p.nbytes for p in model.parameters())  # tied ones once
        if (np.asarray(profile) == TEACHER).all():
            return whole
        return whole - sum(
            p.nbytes for part in self._dropped_parts(profile) for m in part.modules for p in m.parameters()
        )

    def _gone(self, profile: NDArray[np.integer]) -> NDArray[np.bool_]:
        levels = np.asarray(profile)
        if levels.shape != (len(self.units),) or not np.isin(levels, (0, 1)).all():
            raise ValueError(f"expected a profile of {len(self.units)} levels 0 or 1, got {levels.tolist()}")
        return levels == 0

    def _dropped_parts(self, profile: NDArray[np.integer]) -> Iterable[SubBlock]:
        return (part for unit in np.flatnonzero(self._gone(profile)) for part in self.units[unit])


def drop_space(
    anatomy: Anatomy, sparsity: float, *, unit: Unit = "sublayer", protect: Collection[int] = ()
) -> SearchSpace:
    """Profiles of `DropLevels(anatomy, unit)` that drop a share of the blocks; blocks in `protect` are kept.

    With sublayers, that share of the attentions and as many MLPs go; these are two resources, each a group. With
    blocks and pairs the cost is counted in blocks, of which `blocks_to_drop` go. Raises ValueError for a sparsity
    outside [0, 1) or a block that is not there, and BudgetError if so many are protected that too few can go.
    """
    levels = DropLevels(anatomy, unit)
    n = len(anatomy.blocks)
    kept = n - blocks_to_drop(n, sparsity, unit)
    if bad := [i for i in protect if not 0 <= i < n]:
        raise ValueError(f"blocks to protect must be in 0..{n - 1}, got {', '.join(map(str, bad))}")
    size = np.array([len(blocks) for blocks in levels.blocks_of])
    if unit == "sublayer":
        kind = np.arange(2 * n) % 2
        cost = np.stack([np.outer(kind == r, (0, 1)) for r in (0, 1)])
        budget, group = [kept, kept], kind
    else:
        cost = np.outer(size, (0, 1))
        budget, group = [kept], size
    shielded = [any(i in protect for i in blocks) for blocks in levels.blocks_of]
    allowed = np.array([(not shield, True) for shield in shielded])
    return SearchSpace.build(cost, budget, group=group.tolist(), names=levels.names, allowed=allowed)


def blocks_to_drop(blocks: int, sparsity: float, unit: Unit = "sublayer") -> int:
    """How many blocks (attentions, and MLPs, each) a sparsity really means: the nearest number, halves up.

    With pairs and an even number of blocks it is the nearest even number. Raises ValueError for a sparsity outside
    [0, 1).
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    step = 2 if unit == "pair" and blocks % 2 == 0 else 1
    return step * math.floor(sparsity * blocks / step + 0.5)
