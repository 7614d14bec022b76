"""Levels of banks as the evaluator switches them: a block's layers get the weights of their levels, and give them back.

Weights are unpacked on the model's device when a stage first needs them and stay there as long as a memory budget
allows, longest those of the blocks that come next. On CUDA levels may stay there as they are stored, too. Nothing is
copied when a level is switched: parameters point elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from discopt_llm.anatomy import SubBlock, skipped_
from discopt_llm.bank import Bank
from discopt_llm.bank_forms import dense_weights, from_parts, to_parts
from discopt_llm.evaluator_plan import TEACHER, Row
from discopt_llm.genome import DROP_LABEL, Form, Genome
from discopt_llm.lanes import to_device
from discopt_llm.layers import EMBEDDING, Layer
from discopt_llm.memory import LevelSizes, total_memory
from discopt_llm.models import LoadedModel
from discopt_llm.replay import weights_replaced_

__all__ = ["BankLevels"]

SCRATCH = {"cpu": 12, "cuda": 20}  # bytes for a weight that is unpacked, about: codes, single precision twice, sums

T = TypeVar("T")


class BankLevels:
    """The levels of a genome for the evaluator.

    layers: all layers that the banks hold, in their order.
    banks: those that the genome's forms number.
    memory_bytes: bound on unpacked weights that stay on the device, besides those in use. None: a quarter of the
        device's memory, until a plan for memory says more; see `keep_`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        layers: Sequence[Layer],
        genome: Genome,
        banks: Sequence[Bank],
        *,
        memory_bytes: int | None = None,
    ) -> None:
        for bank in banks:
            bank.check_model(loaded.fingerprint, layers)
        if memory_bytes is not None and memory_bytes < 0:
            raise ValueError(f"memory_bytes must not be negative, got {memory_bytes}")
        self.loaded, self.layers, self.genome, self.banks = loaded, tuple(layers), genome, tuple(banks)
        places = len(loaded.anatomy.blocks) + 2
        most = total_memory(loaded.device) // 4 if memory_bytes is None else memory_bytes
        self._resident: _Kept[Tensor] = _Kept(most, places)
        self._packed: _Kept[tuple[Mapping[str, Tensor], Mapping[str, Any]]] = _Kept(0, places)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the units, (n,)."""
        return self.genome.names

    @cached_property
    def block_units(self) -> tuple[NDArray[np.intp], ...]:
        """For each block, its units."""
        blocks = range(len(self.loaded.anatomy.blocks))
        return tuple(np.flatnonzero(self.genome.block_of == block) for block in blocks)

    @cached_property
    def end_units(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """The units of the embedding, and of the head: those of the embedding too if it is tied."""
        genome = self.genome
        embedding = np.flatnonzero(genome.block_of == EMBEDDING)
        head = np.flatnonzero(genome.block_of == len(self.loaded.anatomy.blocks))
        output = self.loaded.model.get_output_embeddings()
        tied = [u for u in embedding if any(self.layers[i].parameter is output.weight for i in genome.layers[u])]
        return embedding, np.concatenate([np.array(tied, dtype=np.intp), head])

    def dense_row(self, block: int) -> None:
        """No level of a bank is the teacher's."""

    def runs(self, block: int, row: Row) -> int:
        """How many of the block's sub-blocks are not dropped."""
        return 2 - len(self._dropped(block, row))

    @contextmanager
    def applied_(self, block: int, row: Row | None) -> Iterator[None]:
        """The layers of a block or an end with the weights of their levels, dropped sub-blocks skipped, while inside.

        A tied embedding is replaced for both ends.
        """
        if row is None:
            yield
            return
        with ExitStack() as stack:
            for layer, form in self._forms(block, row):
                # By its owner, which knows a tied parameter by one name.
                stack.enter_context(weights_replaced_(layer.owner, {layer.attribute: self._weights(layer, form)}))
            stack.enter_context(skipped_(self._dropped(block, row)))
            yield

    def dropped(self, profile: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Which sub-blocks a profile (n,) drops: (blocks, 2), attention then MLP."""
        blocks = self.loaded.anatomy.blocks
        gone = np.zeros((len(blocks), 2), dtype=np.bool_)
        for block in blocks:
            parts = self._dropped(block.index, tuple(np.asarray(profile)[self.block_units[block.index]].tolist()))
            gone[block.index] = [block.attention in parts, block.mlp in parts]
        return gone

    def weights(self, profile: NDArray[np.integer]) -> dict[str, tuple[Layer, Form]]:
        """What a profile (n,) replaces: parameter name -> layer and form; see `parameter`. A tied one is there once."""
        found = {}
        for block, units in self._units.items():
            row = tuple(np.asarray(profile)[units].tolist())
            found.update({layer.parameter_name: (layer, form) for layer, form in self._forms(block, row)})
        return found

    def parameter(self, layer: Layer, form: Form) -> Tensor:
        """A layer's weights in a form, of the parameter's shape and data type, on the model's device; unpacked anew."""
        # Outside of inference mode, so that the tensors may serve inside of it and outside.
        with torch.inference_mode(False), torch.no_grad():
            matrices = self._matrices(layer, form)
            return layer.to_parameter(matrices.to(layer.parameter.dtype))

    @cached_property
    def sizes(self) -> LevelSizes:
        """What all levels would take."""
        element, kind = self.loaded.dtype.itemsize, "cuda" if self.loaded.device.type == "cuda" else "cpu"
        used = {
            (i, form)
            for members, forms in zip(self.genome.layers, self.genome.forms, strict=True)
            for form in forms
            if form is not None
            for i in members
        }
        rows = np.zeros(len(self.loaded.anatomy.blocks) + 2, dtype=np.int64)  # the embedding comes last
        for i in {i for i, _ in used}:
            rows[self.layers[i].block] += self.layers[i].weights
        return LevelSizes(
            packed=sum(self._packed_bytes(i, form) for i, form in used),
            unpacked=sum(self.layers[i].weights for i, _ in used) * element,
            row=int(rows.max()) * element,
            scratch=max((self.layers[i].weights for i, _ in used), default=0) * SCRATCH[kind],
        )

    def keep_(self, *, packed: int, unpacked: int) -> None:
        """From now on keep at most so many bytes on the device, as stored and as weights; others are let go."""
        self._packed.bound_(packed)
        self._resident.bound_(unpacked)

    def let_go_(self) -> None:
        """Keep nothing, and from now on half as much."""
        for kept in (self._packed, self._resident):
            most = kept.memory_bytes // 2
            kept.bound_(0)
            kept.bound_(most)

    def bytes_of(self, model: nn.Module, profile: NDArray[np.integer]) -> int:
        """Size of a file with the student of a profile (n,): units as stored, and the rest as the genome counts it.

        TEACHER throughout: all in 16 bits.
        """
        costs = self.genome.costs
        if (np.asarray(profile) == TEACHER).all():
            return 2 * (int(costs.dense.sum()) + costs.rest)
        return int(costs.met(profile)["bytes"])

    @cached_property
    def _units(self) -> dict[int, NDArray[np.intp]]:
        """Units by block, the ends included."""
        embedding, head = self.end_units
        return dict(enumerate((embedding, *self.block_units, head), start=EMBEDDING))

    def _weights(self, layer: Layer, form: Form) -> Tensor:
        size = layer.weights * self.loaded.dtype.itemsize
        return self._resident.get((layer.index, form), layer.block, size, lambda: self.parameter(layer, form))

    def _matrices(self, layer: Layer, form: Form) -> Tensor:
        """(E, R, C) float32, from the bank or from what is kept of it."""
        bank, device = self.banks[form.bank], self.loaded.device
        if not self._packed.memory_bytes:
            return bank.weights(layer.index, form.level, device)

        def packed() -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
            parts, described = to_parts(bank.form(layer.index, form.level, device))
            return {name: to_device(part, device) for name, part in parts.items()}, described

        size = self._packed_bytes(layer.index, form)
        parts, described = self._packed.get((layer.index, form), layer.block, size, packed)
        shape = (layer.matrices, layer.rows, layer.columns)
        return dense_weights(from_parts(parts.__getitem__, described, shape, device))

    def _packed_bytes(self, index: int, form: Form) -> int:
        return self.banks[form.bank].layers[index].costs(form.level).bytes

    def _forms(self, block: int, row: Row) -> list[tuple[Layer, Form]]:
        """The layers of a block or an end that are neither dropped nor the teacher's, with their forms."""
        units = self._units[block].tolist()
        forms = [(unit, self._form(unit, level)) for unit, level in zip(units, row, strict=True) if level != TEACHER]
        return [(self.layers[i], form) for unit, form in forms if form is not None for i in self.genome.layers[unit]]

    def _form(self, unit: int, level: int) -> Form | None:
        """None: the unit is dropped."""
        self.genome.label(unit, level)
        return self.genome.forms[unit][level]

    def _dropped(self, block: int, row: Row) -> list[SubBlock]:
        """The sub-blocks of a block all of whose units are dropped."""
        if not 0 <= block < len(self.loaded.anatomy.blocks):
            return []
        anatomy = self.loaded.anatomy.blocks[block]
        parts: dict[str, SubBlock] = {part.kind: part for part in (anatomy.attention, anatomy.mlp)}
        running: set[str] = set()
        dropped: set[str] = set()
        for unit, level in zip(self.block_units[block].tolist(), row, strict=True):
            kind = self.genome.sub_block[unit][1]
            gone = level != TEACHER and self.genome.label(unit, level) == DROP_LABEL
            (dropped if gone else running).add(kind)
        if half := running & dropped:
            raise ValueError(f"the layers of {parts[half.pop()].name} must be dropped all together or not at all")
        return [part for kind, part in parts.items() if kind in dropped]


@dataclass(eq=False)
class _Entry(Generic[T]):
    value: T
    nbytes: int
    place: int  # its block
    round: int  # in which it was last asked for
    turn: int  # likewise


class _Kept(Generic[T]):
    """What blocks need, by key, within a number of bytes.

    Blocks come round and round. So what a block asked for that has just been passed comes last again, and is let go
    first (Belady, 1966); before it what was not asked for when its block last came by, and of one block what was not
    asked for the longest.
    """

    def __init__(self, memory_bytes: int, places: int) -> None:
        self.memory_bytes, self._places = memory_bytes, places
        self._held: dict[tuple[int, Form], _Entry[T]] = {}
        self._bytes = self._place = self._round = self._turn = 0

    def bound_(self, memory_bytes: int) -> None:
        """From now on at most so many bytes."""
        self.memory_bytes = memory_bytes
        self._make_room(0)

    def get(self, key: tuple[int, Form], place: int, nbytes: int, make: Callable[[], T]) -> T:
        """What is kept under a key, or made now and kept if it may be; `place` is the number of the block."""
        self._round += place < self._place
        self._place, self._turn = place, self._turn + 1
        if (entry := self._held.get(key)) is not None:
            entry.round, entry.turn = self._round, self._turn
            return entry.value
        if nbytes > self.memory_bytes:
            return make()
        self._make_room(nbytes)
        value = make()
        self._held[key] = _Entry(value, nbytes, place, self._round, self._turn)
        self._bytes += nbytes
        return value

    def _make_room(self, nbytes: int) -> None:
        while self._held and self._bytes + nbytes > self.memory_bytes:
            last = max(self._held, key=lambda key: self._needed(self._held[key]))
            self._bytes -= self._held.pop(last).nbytes

    def _needed(self, entry: _Entry[T]) -> tuple[bool, int, int]:
        """How late it is needed, about: greater is later."""
        passed = self._round - entry.round > (entry.place >= self._place)
        return passed, (entry.place - self._place) % self._places, -entry.turn
