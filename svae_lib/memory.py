r"""How much memory an update needs, which batch would fit, and who keeps what is freed."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

USABLE = 0.9  # of all there is; the rest is lost between blocks

# What is freed ---------------------------------------------------------------------------------------

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # of glibc's mallopt


def keep_freed() -> None:
    r"""Let this process keep memory that was freed, for whatever asks next, instead of returning it to the system.

    An update frees and asks for the same tens of megabytes again and again, and the system would hand them out page by
    page, each filled with zeros first: 4,000 to 7,000 pages for the VAE of A.1, and a quarter of its time on one core.
    The most that is held at once stays the same. Where the C library is not glibc nothing happens.
    """
    if set_option := getattr(_glibc(), "mallopt", None):
        set_option(MMAP_MAX, 0)
        set_option(TRIM_THRESHOLD, -1)


def return_freed() -> None:
    r"""Return to the system, once, what `keep_freed` has kept."""
    if trim := getattr(_glibc(), "malloc_trim", None):
        trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


# What is needed --------------------------------------------------------------------------------------


def ran_out(error: RuntimeError) -> bool:
    r"""Whether an exception says that memory ran out, a device's or the CPU's."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def advice(attempt: Callable[[int], None], failed: int, device: torch.device) -> str:
    r"""What to do where an update with a batch of `failed` ran out of memory, in one sentence."""
    fits = largest_batch(attempt, failed, device)
    if fits:
        return f"a batch of {failed} does not fit into the memory of {device}; about {fits} would: set batch={fits}"
    return f"not even a few samples fit into the memory of {device}; choose smaller nets"


def largest_batch(attempt: Callable[[int], None], failed: int, device: torch.device) -> int:
    r"""About the largest batch below `failed` that `attempt(batch)` has memory for; 0 if there is none.

    Memory is a fixed part and a part for each sample. Both are measured with a 64th and a 32nd of the batch that
    failed, or with smaller ones if these fail too. More than half of it is never promised: there may be a limit that
    the system does not tell.
    """
    small = max(2, failed // 64)  # one sample is none for batch normalisation
    while 2 <= small < failed // 2:
        try:
            less, more = (peak(partial(attempt, size), device) for size in (small, 2 * small))
        except RuntimeError as error:
            if not ran_out(error):
                raise
            small //= 64
            continue
        per_sample = max((more - less) / small, 1)
        room = USABLE * available(device) - more
        return min(2 * small + max(0, int(room / per_sample)), failed // 2)
    return 0


def peak(work: Callable[[], None], device: torch.device) -> int:
    r"""The most bytes held at once while `work` runs, data and nets included; 0 where the system does not say."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    return_freed()  # or it would count as held
    with suppress(OSError):  # not Linux, or not permitted
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    work()
    return _read("/proc/self/status", "VmHWM")


def available(device: torch.device) -> int:
    r"""Bytes that this process may hold: what it has and what is free; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return _read("/proc/meminfo", "MemAvailable") + _read("/proc/self/status", "VmRSS")


def _read(file: str, name: str) -> int:
    """An entry of Linux's lists of kilobytes, in bytes."""
    with suppress(OSError):
        lines = (line.split() for line in Path(file).read_text().splitlines())
        return next((1024 * int(line[1]) for line in lines if line[0] == f"{name}:"), 0)
    return 0
