"""Memory of the process, names of devices: keep what glibc would give back to the kernel between forward passes, and read the peak."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys

import torch

# Parameters of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# The largest threshold glibc accepts on 64 bit (half of its HEAP_MAX_SIZE). Larger blocks, such as the weights of a big
# model, are still mapped one by one and so go back to the system when they are freed.
LARGEST_MMAP_THRESHOLD = 32 * 1024 * 1024


@functools.cache
def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks up to 32 MiB for the next forward pass; True if both settings were accepted.

    By default every activation above 128 KiB may be mapped afresh and faulted in page by page in each layer. Acts once
    per process; does nothing and returns False on anything but Linux with glibc. The process then holds its peak of
    small and medium blocks until it ends.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes at the peak so far: of this process (resident) for the CPU, of torch's allocator for a CUDA device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU's on a device, without waiting for it: over pinned memory where that is CUDA's."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def forget_peak(device: torch.device) -> None:
    """Begin to measure `peak_memory` anew where that can be done: on CUDA."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def device_label(device: torch.device | str) -> str:
    """What a result's key calls a device: "cpu", or the GPU's name; figures of two kinds of device are kept apart."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else str(torch.device(device).type)
