"""The units of a search over banks, and what each of their levels stands for.

A unit is a layer (one weight matrix, or a block's stack of experts), or the layers that inference engines fuse: those
of one sub-block that read the same input (q, k, v; gate, up). Of kind "gguf" the embedding and the head are units too.

The levels of a unit are forms that one bank holds, or the union of the forms of several banks and of dropping it,
ordered by stored bytes. In such a union a form is left out if a cheaper one has a smaller layer error, and the layers
of one sub-block are dropped all together or not at all: a sub-block without its output projection contributes nothing,
so its other layers would be paid for in vain.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from discopt.space import SearchSpace
from discopt_llm.bank import BankLayer
from discopt_llm.budget import Budget, CostTables
from discopt_llm.errors import BankError
from discopt_llm.ggml_file import rest_of
from discopt_llm.layers import GGUF

if TYPE_CHECKING:
    from discopt_llm.models import LoadedModel

__all__ = ["DROP_LABEL", "GROUPS", "Form", "Genome", "Tables", "bank_genome", "mixed_genome", "model_genome"]

Tables = Mapping[str, tuple[Sequence[BankLayer], Sequence[str]]]  # of banks by kind: layers and labels

GROUPS = ("size", "name", "none", "runtime")
DROP_LABEL = "drop"


@dataclass(frozen=True)
class Form:
    """A level of a bank."""

    bank: int  # its place among the banks of the search
    level: int


@dataclass(frozen=True, eq=False)
class Genome:
    """Units and their levels; n units, m levels of those that have most."""

    kind: str  # "quantization", "sparsity", "gguf" or "mixed"
    unit: str  # "layer" or "runtime"
    names: tuple[str, ...]  # (n,)
    layers: tuple[tuple[int, ...], ...]  # (n,) indices of the layers of each unit
    layer_names: tuple[tuple[str, ...], ...]  # (n,) names of the layers of each unit
    forms: tuple[tuple[Form | None, ...], ...]  # (n, m); None: the unit is dropped, or has no such level
    labels: tuple[tuple[str | None, ...], ...]  # (n, m); None: the unit has no such level
    costs: CostTables
    errors: NDArray[np.float64]  # (n, m) relative errors of the unit's layers, added up; inf: no such level
    sub_block: tuple[tuple[int, str], ...]  # (n,) block and kind of each unit; the ends are blocks of their own

    @property
    def n(self) -> int:
        """Number of units."""
        return len(self.names)

    @cached_property
    def present(self) -> NDArray[np.bool_]:
        """Which levels the units have, (n, m)."""
        return np.array([[label is not None for label in row] for row in self.labels])

    @cached_property
    def block_of(self) -> NDArray[np.intp]:
        """The block of each unit, (n,)."""
        return np.array([block for block, _ in self.sub_block], dtype=np.intp)

    def label(self, unit: int, level: int) -> str:
        """What a level of a unit is called; ValueError for one that it does not have."""
        label = self.labels[unit][level] if 0 <= level < len(self.labels[unit]) else None
        if label is None:
            raise ValueError(f"expected a level of unit {self.names[unit]}, which has no level {level}")
        return label

    def labels_of(self, profile: NDArray[np.integer]) -> tuple[str, ...]:
        """What the levels of a profile (n,) are called."""
        if profile.shape != (self.n,):
            raise ValueError(f"a profile must have shape ({self.n},), got {profile.shape}")
        return tuple(self.label(unit, level) for unit, level in enumerate(profile.tolist()))

    def space(self, budget: Budget, group: str) -> SearchSpace:
        """The profiles that meet the budget; raises BudgetError, with the nearest reachable one, if none does.

        `group` is "size" and "runtime" (units with as many weights may trade), "name" (those whose layers have the
        same names in their blocks; experts are all alike) or "none" (all).
        """
        self.costs.check(budget, self.present)
        cost, limit = self.costs.table(budget)
        droppable = [DROP_LABEL in labels for labels in self.labels]
        together = [place if drop else i for i, (place, drop) in enumerate(zip(self.sub_block, droppable, strict=True))]
        return SearchSpace.build(
            cost,
            limit,
            group=self._groups(group),
            names=self.names,
            allowed=self.present,
            together=[str(label) for label in together],
        )

    def _groups(self, group: str) -> list[str]:
        if group not in GROUPS:
            raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {group!r}")
        if group == "none":
            return ["all"] * self.n
        if group == "name":
            return [re.sub(r"(?<=\.)\d+(?=\.)", "#", " ".join(names)) for names in self.layer_names]
        return [str(weights) for weights in self.costs.dense.tolist()]


def model_genome(loaded: LoadedModel, banks: Tables, unit: str, *, drop: bool) -> Genome:
    """The units and levels that banks give a model; forms of one bank alone are all there, see `mixed_genome` for more.

    Raises BankError for kinds of banks that do not mix.
    """
    kind, *others = banks
    rest, rest_bytes = rest_of(loaded, kind)
    if others or drop:
        if GGUF in banks:
            raise BankError(f"levels of kind {GGUF} do not mix with others, got {', '.join((kind, *others))}")
        return mixed_genome(banks, unit, rest, drop=drop)
    layers, labels = banks[kind]
    return bank_genome(layers, labels, kind, unit, rest, rest_bytes)


def bank_genome(
    layers: Sequence[BankLayer],
    labels: Sequence[str],
    kind: str,
    unit: str,
    rest: int,
    rest_bytes: int | None = None,
) -> Genome:
    """The genome of one bank's layers; `rest` and `rest_bytes` are those of `CostTables`.

    A unit of several layers has the levels that all of them have; BankError if there is none.
    """
    units = _units(layers, unit)
    m = len(labels)
    present = np.array([np.all([layers[i].present for i in unit], axis=0) for unit in units])
    if bare := [members for members, has in zip(units, present, strict=True) if not has.any()]:
        raise BankError(f"{' and '.join(layers[i].name for i in bare[0])} are one unit, but have no level in common")
    forms = [[Form(0, j) if has[j] else None for j in range(m)] for has in present]
    named = [[labels[j] if has[j] else None for j in range(m)] for has in present]
    return _genome(kind, unit, units, [layers], forms, named, rest, rest_bytes)


def mixed_genome(banks: Tables, unit: str, rest: int, *, drop: bool) -> Genome:
    """The union of several banks' levels, and of dropping a sub-block; banks by kind, each with its labels."""
    tables = list(banks.values())
    if len({tuple(layer.name for layer in layers) for layers, _ in tables}) != 1:
        raise ValueError(f"expected banks of the same layers, got {', '.join(banks) or 'none'}")
    units = _units(tables[0][0], unit)
    forms: list[list[Form | None]] = []
    named: list[list[str | None]] = []
    for members in units:
        found = []
        for bank, (kind, (layers, labels)) in enumerate(banks.items()):
            for level, label in enumerate(labels):
                if all(layers[i].present[level] for i in members):
                    size = sum(int(layers[i].bytes[level]) for i in members)
                    error = sum(float(layers[i].errors[level]) for i in members)
                    found.append((size, error, Form(bank, level), f"{kind}:{label}"))
        kept = _undominated(found)
        forms.append([*([None] if drop else []), *(form for _, _, form, _ in kept)])
        named.append([*([DROP_LABEL] if drop else []), *(label for *_, label in kept)])
    m = max(map(len, forms))
    for form_row, label_row in zip(forms, named, strict=True):
        form_row += [None] * (m - len(form_row))
        label_row += [None] * (m - len(label_row))
    return _genome("mixed", unit, units, [layers for layers, _ in tables], forms, named, rest)


def _undominated(found: list[tuple[int, float, Form, str]]) -> list[tuple[int, float, Form, str]]:
    """By bytes, without those that a form no larger beats in layer error."""
    kept: list[tuple[int, float, Form, str]] = []
    for entry in sorted(found, key=lambda entry: entry[:2]):
        if not kept or entry[1] < kept[-1][1]:
            kept.append(entry)
    return kept


def _units(layers: Sequence[BankLayer], unit: str) -> list[tuple[int, ...]]:
    if unit == "layer":
        return [(i,) for i in range(len(layers))]
    if unit != "runtime":
        raise ValueError(f"unit must be layer or runtime, got {unit!r}")
    fused: dict[tuple[object, ...], list[int]] = {}
    for i, layer in enumerate(layers):
        fused.setdefault((layer.block, layer.kind, layer.input), []).append(i)
    return [tuple(members) for members in fused.values()]


def _genome(
    kind: str,
    unit: str,
    units: Sequence[tuple[int, ...]],
    banks: Sequence[Sequence[BankLayer]],
    forms: Sequence[Sequence[Form | None]],
    labels: Sequence[Sequence[str | None]],
    rest: int,
    rest_bytes: int | None = None,
) -> Genome:
    n, m = len(forms), len(forms[0])
    tables = {what: np.zeros((n, m), dtype=np.int64) for what in ("weights", "bits", "bytes")}
    errors = np.full((n, m), np.inf)
    for u, members in enumerate(units):
        for j, form in enumerate(forms[u]):
            if form is not None:
                of = [banks[form.bank][i] for i in members]
                for what, table in tables.items():
                    table[u, j] = sum(int(getattr(layer, what)[form.level]) for layer in of)
                errors[u, j] = sum(float(layer.errors[form.level]) for layer in of)
            elif labels[u][j] == DROP_LABEL:
                errors[u, j] = len(members)
    present = np.array([[label is not None for label in row] for row in labels])
    for table in tables.values():
        _pad_(table, present)
    first = banks[0]
    dense = np.array([sum(first[i].dense for i in members) for members in units], dtype=np.int64)
    return Genome(
        kind=kind,
        unit=unit,
        names=tuple("+".join([first[i].name, *(_last(first[j].name) for j in others)]) for i, *others in units),
        layers=tuple(units),
        layer_names=tuple(tuple(first[i].name for i in members) for members in units),
        forms=tuple(tuple(row) for row in forms),
        labels=tuple(tuple(row) for row in labels),
        costs=CostTables(**tables, dense=dense, rest=rest, rest_bytes=rest_bytes),
        errors=errors,
        sub_block=tuple((first[members[0]].block, first[members[0]].kind) for members in units),
    )


def _pad_(table: NDArray[np.int64], present: NDArray[np.bool_]) -> None:
    """Levels that are not there get the cost of the nearest one below that is, or else above."""
    n, m = table.shape
    for u in range(n):
        there = np.flatnonzero(present[u])
        if not len(there):
            continue
        nearest = np.maximum(np.searchsorted(there, np.arange(m), side="right") - 1, 0)
        table[u] = table[u, there[nearest]]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
