"""Kernels for a GPU in Triton, which comes with PyTorch's CUDA builds.

Each replaces PyTorch code of ``fast/``, and ``replaced`` chooses: the kernel where Triton is there
and, at its first use, compiles and agrees with that code; otherwise the code. Without Triton the
modules of this folder can be imported, too: ``jit`` then leaves a kernel as it is, and nothing
calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from tqdm import tqdm

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # PyTorch without CUDA
    triton = tl = None

    def jit(function: Callable) -> Callable:
        return function


TINY = 1e-20
_works: dict[Callable, bool] = {}  # by kernel


def replaced(
    kernel: Callable[..., Tensor], code: Callable[..., Tensor], tolerance: float, *args: Tensor
) -> Tensor:
    """``kernel(*args)`` if it works here, else ``code(*args)``; ``tolerance`` as in ``works``."""
    chosen = (
        kernel
        if works(kernel, code, tolerance, args[0], lambda function: [function(*args)])
        else code
    )
    return chosen(*args)


def works(
    kernel: Callable,
    code: Callable,
    tolerance: float,
    x: Tensor,
    results: Callable[[Callable], Iterable[Tensor]],
) -> bool:
    """Whether a kernel can stand in for PyTorch's code, decided at its first use.

    Args:
        kernel, code: the two functions.
        tolerance: largest mean difference between their results, as a share of their size.
        x: a tensor on the device in question.
        results: calls one of the two.
    """
    if not x.is_cuda or x.dtype != torch.float32 or triton is None:
        return False
    if kernel not in _works:
        _works[kernel] = _agrees(kernel, code, tolerance, results)
    return _works[kernel]


def _agrees(
    kernel: Callable,
    code: Callable,
    tolerance: float,
    results: Callable[[Callable], Iterable[Tensor]],
) -> bool:
    try:
        pairs = zip(results(kernel), results(code), strict=True)
        difference = max(((a - b).abs().mean() / (b.abs().mean() + TINY)).item() for a, b in pairs)
    except Exception as e:  # a compiler's errors are of many types
        wrong = f"{type(e).__name__}: {next(iter(str(e).splitlines()), '')}"
    else:
        if difference <= tolerance:
            return True
        wrong = f"differs from PyTorch's code by {difference:.3g} of its results"
    tqdm.write(f"without the Triton kernel {kernel.__name__}, so a little slower: {wrong}")
    return False


def shares(n: int, rows: int, parts: int) -> tuple[int, tuple[int]]:
    """How many of n pixels, windows or coordinates a program works on, ``rows`` at once, and the
    ``parts`` programs at most.
    """
    per = -(-n // (rows * parts)) * rows
    return per, (-(-n // per),)
