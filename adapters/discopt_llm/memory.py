"""What a device's memory is shared out to: weights, levels, hidden states; and what is asked of it.

A model goes round: measuring runs its blocks in their order, again and again. So those blocks that stay on the device
are always the same ones, for of a cycle too long to be held what was used last is needed last. The others, spread
evenly between them, take turns in two buffers, one of which is filled while the block in the other runs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from discopt_llm.budget import Budget
from discopt_llm.errors import MemoryPlanError
from discopt_llm.evaluator_plan import Limits
from discopt_llm.report_words import size_words

if TYPE_CHECKING:
    from discopt_llm.models import LoadedModel

__all__ = ["LevelSizes", "Memory", "MemoryPlan", "ModelSizes", "StoredLevels", "total_memory"]

# More tokens in one call of a block make its matrix products no faster; on a CPU its activations leave the cache.
TOKENS_PER_CALL = {"cpu": 1024, "cuda": 16384}
# A chunk of logits, bytes: large enough for an efficient product with the head, small enough for the CPU's cache.
LOGIT_BYTES = {"cpu": 3 * 2**23, "cuda": 2**28}
MOST_ON_CPU = 2**32  # bytes; more than this for hidden states saves no time there
UNKNOWN_MEMORY = 2**33  # bytes that a host is taken to have if its system does not say
WORKING_PART = 4  # the part of a bound that is to work with, where there is so much: a quarter
LOGITS_HELD = 6  # copies of a chunk of logits, about, that fitnesses make on the way
ACTIVATIONS_HELD = 8  # times the widest layer, about, that a block holds of a token


@dataclass(frozen=True)
class Memory:
    """At most so many bytes; None: no bound.

    device: of the model's device, for weights, levels, hidden states and activations.
    host: of the machine's own memory, besides Python, its libraries and what the system holds of mapped files. On a
        CPU device and host are one, and the lower bound is that of both.
    """

    device: int | None = None
    host: int | None = None

    def __post_init__(self) -> None:
        for name in ("device", "host"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"memory of the {name} must be at least 1 byte, got {value}")

    @classmethod
    def parse(cls, memory: str | None, host_memory: str | None = None) -> Memory:
        """Sizes as people write them, "16GiB" or "500MB"; raises ValueError for anything else."""
        return cls(_parsed("memory", memory), _parsed("host memory", host_memory))

    def on(self, device: torch.device) -> int | None:
        """The bound on what is held on a device, bytes."""
        bounds = [self.device] if device.type != "cpu" else [self.device, self.host]
        return min((bound for bound in bounds if bound is not None), default=None)


def _parsed(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        size = Budget.parse("size", text)
    except ValueError:
        size = None
    if size is None or size.relative or size.amount < 1:
        raise ValueError(f"{name} must be a size such as 16GiB or 500MB, got {text[:100]!r}")
    return int(size.amount)


@dataclass(frozen=True)
class ModelSizes:
    """What of a model takes memory, bytes."""

    ends: int  # all that stays on the device: embedding, tail and head, and what several blocks share
    blocks: tuple[int, ...]  # weights of each block
    state: int  # of one token between two blocks
    activation: int  # of one token inside a block, about
    vocabulary: int  # number of tokens

    @classmethod
    def of(cls, loaded: LoadedModel) -> ModelSizes:
        """Those of a model as it was loaded."""
        model, blocks = loaded.model, loaded.anatomy.blocks
        element = model.dtype.itemsize
        widest = max(size for p in blocks[0].module.parameters() for size in p.shape[-2:])
        if loaded.residency is None:
            sizes = tuple(sum(p.nbytes for p in block.module.parameters()) for block in blocks)
            ends = sum(p.nbytes for p in model.parameters()) - sum(sizes)
        else:
            sizes, ends = loaded.residency.sizes, loaded.residency.ends
        return cls(
            ends=ends,
            blocks=sizes,
            state=blocks[0].form.width * element,
            activation=ACTIVATIONS_HELD * widest * element,
            vocabulary=int(model.config.get_text_config().vocab_size),
        )

    def least_working(self, length: int) -> int:
        """What the teacher and one student on one sequence of so many tokens take besides weights, about."""
        return 2 * max(2 * length * self.state, length * self.activation, LOGITS_HELD * 4 * self.vocabulary)


@dataclass(frozen=True)
class LevelSizes:
    """What the levels of a bank take, bytes."""

    packed: int  # all that units have, as they are stored
    unpacked: int  # all of them as the model's weights
    row: int  # the largest block, once
    scratch: int  # while one layer is unpacked


@runtime_checkable
class StoredLevels(Protocol):
    """Levels that hold weights, within bounds."""

    @property
    def sizes(self) -> LevelSizes:
        """What all of them would take."""
        ...

    def keep_(self, *, packed: int, unpacked: int) -> None:
        """From now on keep at most so many bytes on the device, as stored and as weights; others are let go."""
        ...

    def let_go_(self) -> None:
        """Keep nothing, and from now on half as much."""
        ...


@dataclass(frozen=True)
class MemoryPlan:
    """Who gets which part of a device's memory, bytes. Make one with `of`."""

    bound: int | None  # None: none; the model is on the device as it was loaded
    fixed: int  # without which there is no plan: all but what is to work with, with no block resident
    model: ModelSizes
    resident: frozenset[int]  # the blocks that stay on the device
    packed: int  # of levels as they are stored
    unpacked: int  # of levels as weights; of a bank's at least one block's
    scratch: int  # to unpack a layer
    working: int  # of hidden states and activations
    kind: str  # of device: "cpu" or "cuda"

    @classmethod
    def of(
        cls,
        memory: Memory,
        device: torch.device,
        model: ModelSizes,
        levels: LevelSizes | None = None,
        *,
        working: int | None = None,
    ) -> MemoryPlan:
        """Share out the memory of a device; MemoryPlanError, with the least that would do, where it is too little.

        working: bytes for hidden states and activations. None: a quarter of the memory, on an unbounded CPU an
            eighth of it and at most 4 GiB; more where nothing else needs it.
        """
        kind = "cuda" if device.type == "cuda" else "cpu"
        total, bound = total_memory(device), memory.on(device)
        most = working or (total // 4 if kind == "cuda" else min(total // 8, MOST_ON_CPU))
        everything = frozenset(range(len(model.blocks)))
        if bound is None:
            return cls(None, 0, model, everything, 0, 0, 0, most, kind)
        need = levels or LevelSizes(0, 0, 0, 0)
        buffers = min(sum(model.blocks), 2 * max(model.blocks))
        fixed, least = model.ends + need.row + need.scratch + buffers, model.least_working(1)
        if bound < fixed + least:
            raise MemoryPlanError(
                f"{size_words(bound)} of memory is too little: embedding and head take {size_words(model.ends)}, two "
                f"blocks {size_words(buffers)}, levels {size_words(need.row + need.scratch)} and one student on one "
                f"token {size_words(least)}, at least {size_words(fixed + least)} together"
            )
        free = bound - fixed
        work = min(most, free, max(least, bound // WORKING_PART))
        spare = free - work
        # What is packed lies in the host's memory already where that is the device's; weights take time to unpack.
        packed = min(need.packed, spare) if kind == "cuda" else 0
        early = min(need.unpacked - need.row, spare // 2) if kind == "cpu" else 0
        spare -= packed + early
        resident = _resident(model.blocks, spare + buffers, buffers)
        spare -= sum(model.blocks[i] for i in resident) - (buffers if resident == everything else 0)
        late = min(need.unpacked - need.row - early, spare)
        work += min(most - work, spare - late)
        return cls(bound, fixed, model, resident, packed, need.row + early + late, need.scratch, work, kind)

    @property
    def streamed(self) -> int:
        """How many blocks take turns."""
        return len(self.model.blocks) - len(self.resident)

    @property
    def buffers(self) -> int:
        """Bytes of both buffers."""
        return min(sum(self.model.blocks), 2 * max(self.model.blocks)) if self.streamed else 0

    @property
    def resident_bytes(self) -> int:
        """Of the blocks that stay."""
        return sum(self.model.blocks[i] for i in self.resident)

    @property
    def total(self) -> int:
        """All that is planned to be held, bytes."""
        levels = self.packed + self.unpacked + self.scratch
        return self.model.ends + self.resident_bytes + self.buffers + levels + self.working

    @property
    def sentence(self) -> str:
        """The plan in one line, for people."""
        blocks = len(self.model.blocks)
        held = [f"embedding and head {size_words(self.model.ends)}"]
        held.append(f"{len(self.resident)} of {blocks} blocks {size_words(self.resident_bytes)}")
        if self.streamed:
            held.append(f"two buffers for the other {self.streamed} {size_words(self.buffers)}")
        if levels := self.packed + self.unpacked + self.scratch:
            held.append(f"levels {size_words(levels)}")
        tokens = self.working // 2 // self.model.state
        held.append(f"hidden states and activations {size_words(self.working)} ({tokens:,} tokens x students a pass)")
        bound = "no bound" if self.bound is None else size_words(self.bound)
        return f"memory: {bound}: {', '.join(held)}"

    def limits(self, tokens_per_call: int | None = None) -> Limits:
        """Half of what is to work with is for hidden states, the rest for what a block or the head computes in a call.

        tokens_per_call: at most this many. None: what suits the device.
        """
        fitting = self.working // 2 // self.model.activation
        logits = min(LOGIT_BYTES[self.kind], self.working // (2 * LOGITS_HELD + 4))
        return Limits(
            state_bytes=self.working // 2,
            token_bytes=self.model.state,
            call_tokens=tokens_per_call or min(TOKENS_PER_CALL[self.kind], fitting),
            logit_rows=max(1, logits // (4 * self.model.vocabulary)),
        )

    def check_length(self, length: int) -> None:
        """Raise MemoryPlanError if one student on one sequence of so many tokens does not fit."""
        least = self.model.least_working(length)
        if self.bound is not None and self.working < least:
            raise MemoryPlanError(
                f"a sequence of {length:,} tokens takes {size_words(least)} for hidden states and activations, got "
                f"{size_words(self.working)} in a plan of {size_words(self.bound)}; ask for "
                f"{size_words(max(self.fixed + least, WORKING_PART * least))} of memory, or for shorter sequences"
            )


def _resident(sizes: tuple[int, ...], space: int, buffers: int) -> frozenset[int]:
    """As many blocks as fit into a space of bytes, with the buffers of the others; those lie evenly between them."""
    count = len(sizes)
    if sum(sizes) <= space:
        return frozenset(range(count))
    for streamed in range(1, count):
        resident = [i for i in range(count) if (i + 1) * streamed // count == i * streamed // count]
        if sum(sizes[i] for i in resident) + buffers <= space:
            return frozenset(resident)
    return frozenset()


def total_memory(device: torch.device) -> int:
    """The memory of a CUDA device, or of the host, bytes.

    All of it, not what is free: how the work is cut decides how it is rounded, and the same run on the same machine
    should be the same to the last bit.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return UNKNOWN_MEMORY
