"""How tensors come from the host's memory to a device while it computes, and how either says that it is full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["CudaLane", "HostLane", "Lane", "is_out_of_memory", "to_device"]

_NO_MEMORY = ("can't allocate memory", "not enough memory")  # of torch's allocator for CPUs


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, or itself on a CPU; nothing waits for the copy."""
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # the pinned memory is not used again before it is done


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


class Lane(Protocol):
    """How weights come to a device while it computes. Marks are points in the work that it was given."""

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any) -> Any:
        """Copy sources to targets, (target, source) each, once the device has passed a mark; the mark of their end.

        It is called in a thread of its own.
        """
        ...

    def mark(self) -> Any:
        """All that the device was told to compute so far."""
        ...

    def wait(self, mark: Any) -> None:
        """What the device is told to compute from now on begins after a mark."""
        ...


class HostLane:
    """Copies within the host's memory, done when they return."""

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any) -> None:
        for target, source in pairs:
            target.copy_(source)

    def mark(self) -> None:
        """There is nothing to wait for."""

    def wait(self, mark: Any) -> None:
        """It is done."""


class CudaLane:
    """Copies to a CUDA device in a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: torch.cuda.Event | None) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            for target, source in pairs:
                target.copy_(source if source.is_pinned() else source.pin_memory(), non_blocking=True)
            return self._stream.record_event()

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self._device).record_event()

    def wait(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)
