"""Blocks whose weights are on the device only while they run, so that a model may be larger than its device.

Where they are otherwise they lie in the host's memory, pinned so that they can be copied while the device computes, or
in memory-mapped files. Two buffers on the device take turns: a block that begins to run has the next one copied into
the other buffer, by a thread of its own and on CUDA in a stream of its own. Parameters point to a buffer for the time
and nothing else about the model changes, so whatever runs a block, by itself or with the whole model, finds it there.
On a CPU everything is the same but for the stream, and files stand for the host's memory.
"""

from __future__ import annotations

import tempfile
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from discopt_llm.errors import MemoryPlanError, one_line
from discopt_llm.lanes import CudaLane, HostLane, Lane, to_device
from discopt_llm.report_words import size_words

__all__ = ["Residency", "on_device_"]

_ALIGNMENT = 256  # bytes between tensors of a buffer: where a device's own allocator would begin them
_MEMORY = ("/dev/", "/memfd:")  # the paths of what is mapped, but is no file on a disk


def on_device_(module: nn.Module) -> AbstractContextManager[None]:
    """The weights of a block on its device while inside; needed only where they are looked at, or it runs often."""
    forward = module.__dict__.get("forward")
    return forward.residency.block_(forward.index) if isinstance(forward, _Forward) else nullcontext()


class Residency:
    """Where the weights of a model's blocks are.

    model: on the host, as it was loaded. All of it but the weights that one block alone has goes to the device at
        once; no block is resident before `place_`.
    host: bound on the host's memory, bytes. Where not all blocks can be pinned within it, none is, and those that are
        not in a file yet are written to a temporary one. On a CPU that is so without a bound.

    Raises MemoryPlanError if a block cannot pass through the host's memory, or the file cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        device: torch.device,
        *,
        host: int | None = None,
        lane: Lane | None = None,
    ) -> None:
        self.device = device
        self._lane: Lane = lane or (CudaLane(device) if device.type == "cuda" else HostLane())
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._buffers: list[_Buffer] = []
        self._blocks = [_Block(of_block) for of_block in _own_parameters(model, blocks)]
        mine = {id(p) for block in self._blocks for p in block.parameters}
        files = _MappedFiles()
        self.ends = _move_(model, mine, device, files)  # bytes of what stays on the device
        self.held = self.most_held = self.ends  # bytes of weights on the device, now and at most so far
        self._pin = device.type == "cuda" and (host is None or sum(map(_pinned_bytes, self._blocks)) <= host)
        if device.type == "cuda" and host is not None and not self._pin:
            _check_passage(self._blocks, host)
        for block in self._blocks:
            if not self._pin and not all(map(files.hold, block.stored)):
                block.store_(_spilled(block.stored))
            block.in_file = block.stored if all(map(files.hold, block.stored)) or not self._pin else None
        for index, module in enumerate(blocks):
            module.__dict__["forward"] = _Forward(self, index, module.forward)

    @property
    def sizes(self) -> tuple[int, ...]:
        """What each block takes on the device, bytes."""
        return tuple(block.bytes for block in self._blocks)

    @torch.no_grad()
    def place_(self, resident: Collection[int]) -> None:
        """Let these blocks, and no others, stay on the device."""
        with torch.inference_mode(False):
            self._place_(resident)

    def _place_(self, resident: Collection[int]) -> None:
        self._drop_buffers()
        for index, block in enumerate(self._blocks):
            if block.resident and index not in resident:
                self._hold(-block.bytes)
                block.store_(block.in_file or [stored.cpu() for stored in block.stored])
                block.resident = False
        for index, block in enumerate(self._blocks):
            if index in resident and not block.resident:
                self._hold(block.bytes)
                block.store_(
                    [to_device(s, self.device) if self.device.type == "cuda" else s.clone() for s in block.stored]
                )
                block.resident = True
            elif index not in resident and self._pin:
                block.store_([s if s.is_pinned() else s.pin_memory() for s in block.stored])

    @contextmanager
    def block_(self, index: int) -> Iterator[None]:
        """A block's weights on the device while inside; those that were given other values keep them. Nests."""
        block = self._blocks[index]
        if block.resident or block.users:
            block.users += not block.resident
            try:
                yield
            finally:
                block.users -= not block.resident
            return
        buffer = self._bring(index)
        block.users, buffer.used = 1, True
        before = [(p, p.data) for p in block.parameters]
        try:
            for parameter, stored, view in zip(block.parameters, block.stored, buffer.views[index], strict=True):
                if parameter.data_ptr() == stored.data_ptr():
                    parameter.data = view
                elif parameter.device.type != self.device.type:
                    parameter.data = to_device(parameter.data, self.device)
            self._bring_next(index)
            yield
        finally:
            for parameter, value in before:
                parameter.data = value
            block.users, buffer.used = 0, False
            buffer.last = self._lane.mark()

    def _bring(self, index: int) -> _Buffer:
        """The buffer that holds a block; what is computed from now on finds it there."""
        found = [buffer for buffer in self._two_buffers() if buffer.holds == index]
        buffer = found[0] if found else self._free_buffer()
        if not found or buffer.coming is None:
            buffer.coming = self._fetch(buffer, index)
        try:
            self._lane.wait(buffer.coming.result())
        except BaseException:
            buffer.holds = None  # the next try copies again
            raise
        return buffer

    def _bring_next(self, index: int) -> None:
        """Begin to copy the block that takes turns next; after the last comes the first, of the next pass."""
        count = len(self._blocks)
        following = ((index + step) % count for step in range(1, count))
        after = next((i for i in following if not self._blocks[i].resident), None)
        free = [buffer for buffer in self._buffers if not buffer.used]
        if after is not None and free and all(buffer.holds != after for buffer in self._buffers):
            free[0].coming = self._fetch(free[0], after)

    def _fetch(self, buffer: _Buffer, index: int) -> Future[Any]:
        block = self._blocks[index]
        if index not in buffer.views:
            # Outside of inference mode, so that the tensors may serve inside of it and outside.
            with torch.inference_mode(False), torch.no_grad():
                buffer.views[index] = block.views(buffer.memory)
        pairs = [*zip(buffer.views[index], block.stored, strict=True)]
        buffer.holds = index
        return self._thread.submit(self._copy, pairs, buffer.last)

    @torch.no_grad()
    def _copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any) -> Any:
        return self._lane.copy(pairs, after)

    def _two_buffers(self) -> list[_Buffer]:
        if not self._buffers:
            size = max(block.bytes for block in self._blocks if not block.resident)
            streamed = sum(not block.resident for block in self._blocks)
            with torch.inference_mode(False):
                for _ in range(min(2, streamed)):
                    self._hold(size)
                    memory = torch.empty(size, dtype=torch.uint8, device=self.device)
                    # What had this memory before may still be computing.
                    self._buffers.append(_Buffer(memory, self._lane.mark()))
        return self._buffers

    def _free_buffer(self) -> _Buffer:
        free = [buffer for buffer in self._buffers if not buffer.used]
        if not free:
            raise RuntimeError(f"expected at most {len(self._buffers)} blocks to run inside of each other")
        return free[0]

    def _drop_buffers(self) -> None:
        for buffer in self._buffers:
            if buffer.coming is not None:
                buffer.coming.exception()  # wait for it
            self._hold(-buffer.memory.nbytes)
        if self._buffers and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._buffers.clear()

    def _hold(self, change: int) -> None:
        self.held += change
        self.most_held = max(self.most_held, self.held)


@dataclass(eq=False)
class _Forward:
    """What a block answers calls with whose weights are elsewhere while it does not run."""

    residency: Residency
    index: int
    forward: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.residency.block_(self.index):
            return self.forward(*args, **kwargs)


@dataclass(eq=False)
class _Block:
    """The weights of one block."""

    parameters: list[nn.Parameter]
    in_file: list[Tensor] | None = None  # memory-mapped
    resident: bool = False
    users: int = 0  # contexts that need it on the device

    def __post_init__(self) -> None:
        self.stored = [parameter.data for parameter in self.parameters]  # where they are while it does not run

    @property
    def bytes(self) -> int:
        """In a buffer."""
        return sum(_aligned(stored.nbytes) for stored in self.stored)

    def store_(self, tensors: list[Tensor]) -> None:
        """The same values elsewhere."""
        self.stored = tensors
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            parameter.data = tensor

    def views(self, memory: Tensor) -> list[Tensor]:
        """Parts of a buffer for all weights, one behind the other."""
        found, start = [], 0
        for stored in self.stored:
            found.append(memory[start : start + stored.nbytes].view(stored.dtype).view(stored.shape))
            start += _aligned(stored.nbytes)
        return found


@dataclass(eq=False)
class _Buffer:
    """Memory of the device for one block at a time."""

    memory: Tensor  # (bytes,) uint8
    last: Any  # the mark of the last use
    holds: int | None = None  # the block that is there, or on its way
    used: bool = False  # it runs
    coming: Future[Any] | None = None  # the mark of the copy's end
    views: dict[int, list[Tensor]] = field(default_factory=dict)  # by block


def _own_parameters(model: nn.Module, blocks: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """For each block the parameters that nothing else has."""
    owners: dict[int, set[int | None]] = {}
    place = {module: index for index, block in enumerate(blocks) for module in block.modules()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter.data_ptr(), set()).add(place.get(module))
    return [
        [p for p in block.parameters() if p.numel() and owners[p.data_ptr()] == {i}] for i, block in enumerate(blocks)
    ]


def _move_(model: nn.Module, but: Collection[int], device: torch.device, files: _MappedFiles) -> int:
    """All parameters and buffers on the device, but those with the ids `but`; their bytes, tied ones once."""
    moved: dict[Any, Tensor] = {}

    def on_device(tensor: Tensor) -> Tensor:
        key = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if key not in moved:
            moved[key] = tensor.clone() if device.type == "cpu" and files.hold(tensor) else tensor.to(device)
        return moved[key]

    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in but:
                parameter.data = on_device(parameter.data)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = on_device(buffer)
    return sum(tensor.nbytes for tensor in moved.values())


def _pinned_bytes(block: _Block) -> int:
    """What a block takes pinned: torch keeps such memory in pieces of powers of two."""
    return sum(1 << (stored.nbytes - 1).bit_length() for stored in block.stored)


def _check_passage(blocks: Sequence[_Block], host: int) -> None:
    """From a file weights pass through pinned memory: those of one block, and of the next while they are copied."""
    least = 2 * max(map(_pinned_bytes, blocks))
    if host < least:
        raise MemoryPlanError(
            f"{size_words(host)} of host memory is too little: two blocks on their way to the device take "
            f"{size_words(least)}"
        )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _spilled(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values, contiguous, in a memory-mapped file whose name is gone already: it goes when they do."""
    with tempfile.TemporaryDirectory(prefix="discopt-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "block.safetensors"
        try:
            save_file(
                {str(i): tensor.clone(memory_format=torch.contiguous_format) for i, tensor in enumerate(tensors)}, path
            )
            with safe_open(path, "pt") as file:
                return [file.get_tensor(str(i)) for i in range(len(tensors))]
        except (OSError, SafetensorError) as error:
            raise MemoryPlanError(
                f"cannot write the model's blocks to {folder}, to map them into memory: {one_line(error)}; the "
                "environment variable TMPDIR says where there is more room"
            ) from error


class _MappedFiles:
    """The parts of this process's memory that are mapped files; none where the system does not say."""

    def __init__(self) -> None:
        try:
            lines = Path("/proc/self/maps").read_text().splitlines()
        except OSError:
            lines = []
        spans = [line.split(maxsplit=5) for line in lines]
        self._spans = sorted(
            (*(int(end, 16) for end in span[0].split("-")),)
            for span in spans
            if len(span) > 5 and span[5].startswith("/") and not span[5].startswith(_MEMORY)
        )

    def hold(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in a file."""
        place = bisect_right(self._spans, tensor.data_ptr(), key=lambda span: span[0]) - 1
        return place >= 0 and tensor.data_ptr() < self._spans[place][1]
