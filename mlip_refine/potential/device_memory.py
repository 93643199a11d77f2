"""The memory of a device: how much is free, how much was used, and whether it ran out."""

from dataclasses import dataclass
from typing import Protocol

import torch

# TorchScript turns the allocator's own error into a plain RuntimeError that quotes it.
_SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class Memory(Protocol):
    """The memory of a device; all numbers are bytes."""

    def mark(self) -> int:
        """Start to look for a peak; returns what is in use now."""

    def peak(self) -> int:
        """Most that was in use at once since the mark."""

    def available(self) -> int:
        """How much more can be allocated now."""

    def release(self) -> None:
        """Give back what is held but not in use."""


@dataclass(frozen=True)
class CudaMemory:
    """The memory of a GPU as torch's allocator counts it, on the host: nothing here waits for a kernel.

    A mark resets the peak statistics of the device.
    """

    device: torch.device

    def mark(self) -> int:
        """Start to look for a peak; returns what is in use now."""
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """Most that was in use at once since the mark."""
        return torch.cuda.max_memory_allocated(self.device)

    def available(self) -> int:
        """What the device has free, and what the allocator holds for later."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def release(self) -> None:
        """Empty the allocator's cache."""
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, on a CPU or a GPU, in Python or in TorchScript."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
