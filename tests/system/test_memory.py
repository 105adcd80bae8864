import ctypes
import sys

import torch

from vqlib.system.memory import keep_freed_memory, peak_memory


def test_freed_memory_is_kept_on_glibc_and_asking_twice_is_harmless():
    first = keep_freed_memory()
    assert keep_freed_memory() is first
    if sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        assert first is True


def test_peak_memory_counts_bytes():
    block = torch.ones(16 * 1024 * 1024)  # 64 MiB, touched
    assert peak_memory() > block.numel() * block.element_size()
    assert peak_memory() < 2**40
