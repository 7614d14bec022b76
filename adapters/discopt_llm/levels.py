"""Levels of banks as the evaluator switches them: a block's layers get the weights of their levels, and give them back.

Weights are unpacked on the model's device when a stage first needs them and stay there as long as a memory budget
allows; the least recently used go first. Nothing is copied when a level is switched: parameters point elsewhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from discopt_llm.anatomy import SubBlock, skipped_
from discopt_llm.bank import Bank
from discopt_llm.evaluator import TEACHER, Row, total_memory
from discopt_llm.genome import DROP_LABEL, Form, Genome
from discopt_llm.layers import EMBEDDING, Layer
from discopt_llm.models import LoadedModel
from discopt_llm.replay import weights_replaced_

__all__ = ["BankLevels"]


class BankLevels:
    """The levels of a genome for the evaluator.

    layers: all layers that the banks hold, in their order.
    banks: those that the genome's forms number.
    memory_bytes: bound on unpacked weights that stay on the device, besides those in use. None: a quarter of the
        device's memory.
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
        self._resident = _Resident(total_memory(loaded.device) // 4 if memory_bytes is None else memory_bytes)

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
        """A layer's weights in a form, of the parameter's shape, data type and device; unpacked anew."""
        # Outside of inference mode, so that the tensors may serve inside of it and outside.
        with torch.inference_mode(False), torch.no_grad():
            matrices = self.banks[form.bank].weights(layer.index, form.level, self.loaded.device)
            return layer.to_parameter(matrices.to(layer.parameter.dtype))

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
        return self._resident.get((layer.index, form), lambda: self.parameter(layer, form))

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


class _Resident:
    """Tensors by key, the least recently used forgotten first once they pass a number of bytes."""

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self._held: OrderedDict[tuple[int, Form], Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[int, Form], make: Callable[[], Tensor]) -> Tensor:
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        tensor = make()
        if tensor.nbytes > self.memory_bytes:
            return tensor
        self._held[key] = tensor
        self._bytes += tensor.nbytes
        while self._bytes > self.memory_bytes:
            _, gone = self._held.popitem(last=False)
            self._bytes -= gone.nbytes
        return tensor
