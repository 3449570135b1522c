"""Several episodes side by side on a CPU, and the memory allocator."""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


def parallel_map(function: Callable, items: Iterable, n_threads: int) -> Iterator:
    """``map(function, items)`` on threads to which PyTorch gives one core each; items are taken
    only as they are needed.
    """
    with ThreadPoolExecutor(n_threads, initializer=_one_core) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > n_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _one_core() -> None:
    # At its first operation a thread takes the number that any thread set last, unless it has asked
    # before: ask, then set.
    torch.get_num_threads()
    torch.set_num_threads(1)


def keep_freed_memory(keep: bool = True) -> None:
    """Ask glibc to keep large freed blocks for the next episode instead of returning them to the
    system page by page.

    It does nothing where there is no glibc.

    Args:
        keep: False for the thresholds that glibc arrives at by itself.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << (30 if keep else 25))  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1 if keep else 1 << 26)  # M_TRIM_THRESHOLD
