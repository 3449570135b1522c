"""Triton kernels for a GPU; Triton comes with PyTorch's CUDA builds.

Each kernel replaces PyTorch code of ``fast/``. ``works`` decides: a kernel runs where Triton is
installed and where, at its first use, it compiles and agrees with that code. Without Triton the
modules of this folder can still be imported; nothing then calls their kernels.
"""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor
from tqdm import tqdm

from utils import first_line, out_of_memory

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # PyTorch without CUDA
    triton = tl = None

    def jit(function: Callable) -> Callable:
        return function


TINY = 1e-20
INT32 = 2**31  # kernels compute offsets in int32
_works: dict[tuple, bool] = {}  # by (kernel, variant, dtype, device)


def works(
    kernel: Callable,
    eager: Callable,
    tolerance: float,
    x: Tensor,
    results: Callable[[Callable], Iterable[Tensor]],
    variant: Hashable = None,
) -> bool:
    """Whether a kernel can replace PyTorch code; checked at the first use of each variant.

    Args:
        kernel, eager: the two implementations.
        tolerance: largest mean absolute difference of a result, relative to its mean size.
        x: a float32 tensor on the device in question.
        results: (implementation) -> the tensors to compare.
        variant: what the compiled kernel depends on besides ``x``'s dtype and device, such as
            channels.
    """
    if not x.is_cuda or x.dtype != torch.float32 or triton is None:
        return False
    key = kernel, variant, x.dtype, x.device
    if key not in _works:
        _works[key] = _agrees(kernel, eager, tolerance, results, variant)
    return _works[key]


def _agrees(kernel, eager, tolerance, results, variant=None) -> bool:
    try:
        _triton_home()
        pairs = zip(results(kernel), results(eager), strict=True)
        found = [((a - b).abs().mean() / (b.abs().mean() + TINY)).item() for a, b in pairs]
        difference = max(found, key=lambda d: (math.isnan(d), d))
    except Exception as e:  # a compiler's errors are of many types
        if out_of_memory(e):  # which says nothing about the kernel
            raise
        problem = f"{type(e).__name__}: {first_line(e)}"
    else:
        if difference <= tolerance:
            return True
        problem = f"differs from PyTorch's code by {difference:.3g} of its results"
    name = kernel.__name__ if variant is None else f"{kernel.__name__} ({variant})"
    tqdm.write(f"without the Triton kernel {name}, so a little slower: {problem}")
    return False


@functools.cache
def _triton_home() -> tempfile.TemporaryDirectory | None:
    """Where there is no home folder, a temporary one: Triton would make one called "~" here."""
    if os.path.expanduser("~") != "~" or "TRITON_HOME" in os.environ:
        return None
    folder = tempfile.TemporaryDirectory(prefix="triton-")
    os.environ["TRITON_HOME"] = folder.name
    return folder


def launch(
    kernel: Callable, programs: tuple[int, ...], x: Tensor, *args: object, **options: object
) -> None:
    """Run a kernel on the device of its first argument, whichever is the current one."""
    with torch.cuda.device_of(x):
        kernel[programs](x, *args, **options)


def shares(n: int, rows: int, max_programs: int) -> tuple[int, tuple[int]]:
    """Divide n pixels, windows or coordinates among at most ``max_programs`` programs.

    Returns:
        The share of a program, a multiple of ``rows``, and the grid, (number of programs,).
    """
    share = -(-n // (rows * max_programs)) * rows
    return share, (-(-n // share),)
