"""The units of a run with what each of their levels is and costs, as units.json holds them for reports.

Read without the model and the bank: a report can be made again where neither is at hand.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from discopt.errors import RunFolderError
from discopt.sealed import sealed_text

if TYPE_CHECKING:
    from discopt_llm.drop import DropLevels
    from discopt_llm.genome import Genome
    from discopt_llm.profile import Profile

__all__ = ["Place", "Units", "form_words", "short_names"]

FORMAT = "discopt-units"
VERSION = 1
DROPPED, KEPT = "drop", "keep"  # labels of what is dropped, and of the other level of depth pruning
_SUB_BLOCKS = ("attention", "MLP")
Place = tuple[int, str]  # the block and what the unit is called there; -1 and `blocks` are embedding and head


@dataclass(frozen=True, eq=False)
class Units:
    """n units of up to m levels. Costs are None where a run did not write them down."""

    kind: str  # of the profile
    names: tuple[str, ...]  # (n,)
    places: tuple[tuple[Place, ...], ...]  # (n,) where each unit is drawn; a unit of whole blocks has several
    blocks: int  # of the model
    labels: tuple[tuple[str | None, ...], ...]  # (n, m); None: the unit has no such level, or none that is known
    bytes: NDArray[np.int64] | None = None  # (n, m) stored
    kept: NDArray[np.int64] | None = None  # (n, m) weights that are not zero
    weights: NDArray[np.int64] | None = None  # (n,)

    def __post_init__(self) -> None:
        n, m = len(self.names), max(map(len, self.labels), default=0)
        if n == 0 or m == 0 or {len(row) for row in self.labels} != {m} or len(self.labels) != n:
            raise ValueError(f"labels must have shape ({n}, m), n and m at least 1, got {len(self.labels)} rows")
        if len(self.places) != n or not all(self.places):
            raise ValueError(f"expected a place for each of {n} units, got {sum(map(bool, self.places))}")
        for name, shape in (("bytes", (n, m)), ("kept", (n, m)), ("weights", (n,))):
            table = getattr(self, name)
            if table is not None and table.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {table.shape}")

    @property
    def n(self) -> int:
        """Number of units."""
        return len(self.names)

    @cached_property
    def zeros(self) -> NDArray[np.float64] | None:
        """Share of zeros of every level, (n, m)."""
        if self.kept is None or self.weights is None:
            return None
        return 1 - self.kept / self.weights[:, None]

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """What units are called in their blocks: the embedding's first, the head's last."""
        first_block: dict[str, int] = {}
        for places in self.places:
            for block, column in places:
                first_block.setdefault(column, block)
        return tuple(sorted(first_block, key=lambda column: (first_block[column] >= 0) + (column in self._of_head)))

    @cached_property
    def _of_head(self) -> set[str]:
        return {column for places in self.places for block, column in places if block >= self.blocks}

    @cached_property
    def ranked(self) -> tuple[str, ...]:
        """All labels, the cheapest first: by mean bytes of a weight where they are known, else by their levels."""
        ranks: dict[str, list[float]] = {}
        for unit, row in enumerate(self.labels):
            for level, label in enumerate(row):
                if label is not None:
                    ranks.setdefault(label, []).append(self._cost(unit, level))
        return tuple(sorted(ranks, key=lambda label: (label != DROPPED, float(np.mean(ranks[label])))))

    def _cost(self, unit: int, level: int) -> float:
        if self.bytes is None or self.weights is None:
            return float(level)
        return float(self.bytes[unit, level] / self.weights[unit])

    def share(self, unit: int, level: int) -> float:
        """How dear a level is among all: 0 for the cheapest, 1 for the dearest; by rank, or by the zeros it has."""
        if self.kind == "sparsity" and self.zeros is not None:
            known = self.zeros[np.array([[label is not None for label in row] for row in self.labels])]
            least, most = float(known.min()), float(known.max())
            return (most - float(self.zeros[unit, level])) / max(most - least, 1e-9)
        ranked = [label for label in self.ranked if label != DROPPED]
        label = self.labels[unit][level]
        return ranked.index(label) / max(len(ranked) - 1, 1) if label in ranked else 0.0

    def word(self, unit: int, level: int) -> str:
        """A level in a small space: "3", "52" or, where kinds are mixed, "52%", "Q4_K", "×" if dropped, "" if kept."""
        label = self.labels[unit][level]
        if label in (DROPPED, KEPT, None):
            return {DROPPED: "×", KEPT: "", None: str(level)}[label]
        kind, _, rest = label.rpartition(":")
        if self.zeros is not None and "sparsity" in (self.kind, kind):
            return f"{100 * self.zeros[unit, level]:.0f}{'%' if kind else ''}"
        return rest

    def words(self, unit: int, level: int) -> str:
        """A level in full: "3 bits, 93.3 KB"."""
        label = self.labels[unit][level]
        if label is None:
            return f"level {level}"
        kind, _, rest = label.rpartition(":")
        if "sparsity" in (self.kind, kind):
            return f"{int(rest):+d} steps" if self.zeros is None else f"{self.zeros[unit, level]:.1%} zeros"
        return form_words(label)

    def heading(self, label: str) -> str:
        """A label over all that have it: "3 bits", "2 steps sparser", "dropped"."""
        kind, _, steps = label.rpartition(":")
        if "sparsity" not in (self.kind, kind):
            return form_words(label)
        way = "sparser" if int(steps) > 0 else "denser"
        return f"{abs(int(steps))} steps {way}" if int(steps) else "the target sparsity"

    def to_json(self) -> str:
        """units.json's content."""
        tables = {name: getattr(self, name) for name in ("bytes", "kept", "weights")}
        fields = {name: getattr(self, name) for name in ("kind", "names", "places", "blocks", "labels")}
        document = {"format": FORMAT, "version": VERSION, **fields, **tables}
        return sealed_text(document)

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """The inverse of `to_json`, of what it parses to; raises RunFolderError for what it has not made."""
        try:
            if (data["format"], data["version"]) != (FORMAT, VERSION):
                raise ValueError(f"expected {FORMAT} {VERSION}, got {data['format']} {data['version']}")
            tables = {
                name: None if data[name] is None else np.array(data[name], dtype=np.int64)
                for name in ("bytes", "kept", "weights")
            }
            return cls(
                kind=str(data["kind"]),
                names=tuple(map(str, data["names"])),
                places=tuple(tuple((int(b), str(c)) for b, c in places) for places in data["places"]),
                blocks=int(data["blocks"]),
                labels=tuple(tuple(row) for row in data["labels"]),
                **tables,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RunFolderError(f"units.json is damaged: {error}") from error

    @classmethod
    def of_genome(cls, genome: Genome, blocks: int) -> Self:
        """Of a search over banks."""
        columns = short_names(genome.names, genome.block_of.tolist())
        return cls(
            kind=genome.kind,
            names=genome.names,
            places=tuple(((block, column),) for block, column in zip(genome.block_of.tolist(), columns, strict=True)),
            blocks=blocks,
            labels=genome.labels,
            bytes=genome.costs.bytes,
            kept=genome.costs.weights,
            weights=genome.costs.dense,
        )

    @classmethod
    def of_sub_blocks(cls, levels: DropLevels) -> Self:
        """Of depth pruning; bytes are those in the data type that the model is loaded in."""
        sizes = [
            sum(p.nbytes for part in parts for module in part.modules for p in module.parameters())
            for parts in levels.units
        ]
        weights = np.array([sum(part.parameters for part in parts) for parts in levels.units])
        return cls(
            kind="drop",
            names=levels.names,
            places=_sub_block_places(levels.unit, len(levels.anatomy.blocks)),
            blocks=len(levels.anatomy.blocks),
            labels=((DROPPED, KEPT),) * len(levels.names),
            bytes=np.outer(sizes, (0, 1)),
            kept=np.outer(weights, (0, 1)),
            weights=weights,
        )

    @classmethod
    def of_profile(cls, profile: Profile) -> Self:
        """As far as profile.json says: the places by the units' names, and only the labels of the levels they have."""
        if profile.kind == "drop":
            per_block = {"sublayer": 0.5, "block": 1, "pair": 2}[profile.unit]
            named = [name.rpartition(".")[2] for name in profile.names]
            short = int(profile.unit == "pair" and "+" not in named[-1])  # the last of an odd number of blocks
            blocks = int(per_block * len(named)) - short
            places = _sub_block_places(profile.unit, blocks)
            return cls("drop", profile.names, places, blocks, ((DROPPED, KEPT),) * len(named))
        blocks, of = _blocks_by_name(profile.names)
        places = tuple(((b, column),) for b, column in zip(of, short_names(profile.names, of), strict=True))
        m = 1 + int(profile.levels.max())
        own = zip(profile.levels.tolist(), profile.labels, strict=True)
        labels = tuple(tuple(label if level == known else None for level in range(m)) for known, label in own)
        return cls(profile.kind, profile.names, places, blocks, labels)


def _blocks_by_name(names: Sequence[str]) -> tuple[int, list[int]]:
    """How many blocks there are, and the block of each unit (n,): the first number in "model.layers.3.mlp".

    Names without one are those of the embedding and, behind the blocks, of the head.
    """
    found = [re.search(r"(?:^|\.)(\d+)(?=\.|$)", name) for name in names]
    blocks = 1 + max((int(match[1]) for match in found if match), default=-1)
    last = max((unit for unit, match in enumerate(found) if match), default=-1)
    return blocks, [int(match[1]) if match else blocks if unit > last else -1 for unit, match in enumerate(found)]


def _sub_block_places(unit: str, blocks: int) -> tuple[tuple[Place, ...], ...]:
    """Where the units of depth pruning are: those of whole blocks are drawn at each of their sub-blocks."""
    every = [(block, column) for block in range(blocks) for column in _SUB_BLOCKS]
    size = {"sublayer": 1, "block": 2, "pair": 4}[unit]
    return tuple(tuple(every[i : i + size]) for i in range(0, len(every), size))


def short_names(names: Sequence[str], blocks: Sequence[int]) -> list[str]:
    """What units are called in their block, (n,): "q_proj+k_proj", "attn.c_proj", "mlp.c_proj"."""
    split = [name.split("+") for name in names]
    paths = [first.split(".") for first, *_ in split]
    depth = np.ones(len(names), dtype=int)
    while True:
        short = ["+".join([".".join(p[-d:]), *more]) for p, d, (_, *more) in zip(paths, depth, split, strict=True)]
        count = Counter(zip(blocks, short, strict=True))
        clashing = {name for (_, name), times in count.items() if times > 1}
        deeper = np.array([name in clashing and d < len(p) for name, d, p in zip(short, depth, paths, strict=True)])
        if not deeper.any():
            return short
        depth += deeper


def form_words(label: str) -> str:
    """A level's label for people: "3 bits", "sparse", "dropped", "Q4_K"."""
    if label in (DROPPED, KEPT):
        return {DROPPED: "dropped", KEPT: "kept"}[label]
    if label.startswith("sparsity:"):
        return "sparse"
    rest = label.rpartition(":")[2]
    return f"{rest} bits" if rest.isdecimal() else rest
