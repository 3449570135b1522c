"""Several episodes at once on a CPU, and the memory allocator."""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import torch


def parallel_map(function: Callable, items: Iterable, n_threads: int) -> Iterator:
    """Compute ``map(function, items)`` on threads with one PyTorch core each.

    Results come in the order of ``items``, which is read ahead by at most ``n_threads`` items.
    """
    with ThreadPoolExecutor(n_threads, initializer=_use_one_core) as pool:
        yield from in_order(pool, function, items, n_threads)


def in_order(pool: Executor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """``pool.map(function, items)`` that reads at most ``ahead`` items ahead."""
    futures: deque = deque()
    try:
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) > ahead:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()


def _use_one_core() -> None:
    # At its first operation a thread takes the number that any thread set last, unless it has read
    # the number before: read, then set.
    torch.get_num_threads()
    torch.set_num_threads(1)


def keep_freed_memory(keep: bool = True) -> None:
    """Make glibc keep large freed blocks for the next episode instead of unmapping them.

    Without glibc this does nothing.

    Args:
        keep: False restores the thresholds that glibc reaches by itself.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << (30 if keep else 25))  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1 if keep else 1 << 26)  # M_TRIM_THRESHOLD
