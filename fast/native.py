"""The hot loops in kernels/, compiled for this machine at first use, as autograd functions.

On a CPU, in float32 or bfloat16, they replace what learner.py, metalearner.py and augment.py in this folder compute in PyTorch,
which also runs where no C++ compiler is found, and for all other tensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parent / "kernels"
MAIN = FOLDER / "kernels.cpp"  # includes the rest
COMPILERS = ("g++", "c++")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fno-predictive-commoning", "-Wno-psabi"]  # the first one needs more registers than there are
DIGEST = 32  # bytes of a SHA-256
SLOWER = "without compiled kernels, at a third of the speed"
N_FILTERS, TILE = 32, 128  # C and TILE in kernels/

ANY_TYPE = ("augment", "meta_forward", "meta_backward")
BY_TYPE = ("block_forward", "block_backward", "block_eval", "first_forward", "first_backward", "first_eval", "patch_moments")
_TYPES = {"p": ctypes.c_void_p, "f": ctypes.c_float, "l": ctypes.c_int64}  # the letters of kernels.cpp
_SUFFIX = {torch.float32: "_float", torch.bfloat16: "_bfloat16"}


class Library:
    """The compiled kernels, or why there are none.

    Attributes:
        functions: by name; empty where nothing could be compiled.
        state: how it went, in words for people.
    """

    def __init__(self):
        self.functions = {}
        compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
        if compiler is None:
            self.state = f"{SLOWER} (no C++ compiler found: install g++, or set CXX)"
            return
        try:
            library = _load(compiler)
            for name in (*ANY_TYPE, *(name + suffix for name in BY_TYPE for suffix in _SUFFIX.values())):
                letters = ctypes.c_char_p.in_dll(library, f"{name}_arguments").value.decode()
                address = ctypes.c_void_p.in_dll(library, f"{name}_address").value
                self.functions[name] = ctypes.CFUNCTYPE(None, *(_TYPES[letter] for letter in letters))(address)
            self.state = f"kernels compiled by {Path(compiler).name}"
        except (OSError, ValueError, subprocess.SubprocessError) as e:
            self.functions = {}
            said = (getattr(e, "stderr", None) or str(e)).strip().splitlines()
            wrong = next((line for line in said if "error" in line), said[0] if said else type(e).__name__)
            self.state = f"{SLOWER} ({compiler} cannot compile kernels/: {wrong})"


def _openmp() -> list[str]:
    """The OpenMP runtime that PyTorch has loaded: with another one beside it, two pools of threads would fight."""
    maps = Path("/proc/self/maps")
    loaded = {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    return sorted(path for path in loaded if re.match(r"lib(gomp|iomp5|omp)\b", Path(path).name))[:1]


def _load(compiler: str) -> ctypes.CDLL:
    """Load the kernels, kept under ~/.cache (or XDG_CACHE_HOME) by all they depend on; compile them if they are missing."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    info = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if Path("/proc/cpuinfo").exists() else platform.processor()
    processor = [line for line in info.splitlines() if line.startswith(("model name", "flags", "Features"))]
    sources = [path.read_text() for path in (MAIN, *sorted(FOLDER.glob("*.h")))]
    openmp = _openmp()
    parts = (*sources, *FLAGS, version, platform.platform(), *processor, *openmp)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lstm-meta-learner"
    path = folder / f"kernels-{key}.so"
    with contextlib.suppress(OSError):
        content = path.read_bytes()
        if hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]:  # a damaged one would not just fail but crash
            return ctypes.CDLL(str(path))
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    keep = os.access(folder, os.W_OK)  # if not, they are compiled for this process alone
    with tempfile.TemporaryDirectory(prefix=".compile-", dir=folder if keep else None) as place:
        made, linked = f"{place}/kernels.o", f"{place}/kernels.so"
        for command in ([*FLAGS, "-c", str(MAIN), "-o", made], ["-shared", made, *openmp, "-o", linked]):
            subprocess.run([compiler, *command], capture_output=True, text=True, check=True, timeout=300)
        with open(linked, "r+b") as file:
            file.write(hashlib.sha256(file.read()).digest())  # what follows a library's last byte is nobody's
        library = ctypes.CDLL(linked)
        if keep:
            os.replace(linked, path)
        return library


@functools.cache
def library() -> Library:
    return Library()


def handles(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether there are kernels and ``x`` is of a type that they know, one of ``dtypes`` (float32 if none is named)."""
    return x.device.type == "cpu" and x.dtype in (dtypes or (torch.float32,)) and bool(library().functions)


def handles_block(x: Tensor, weight: Tensor) -> bool:
    """Whether there are kernels for a block with this input and these filters."""
    return handles(x, *_SUFFIX) and weight.dtype == torch.float32 and weight.shape[0] == N_FILTERS


def _call(name: str, *args) -> None:
    numbers = [a.data_ptr() if isinstance(a, Tensor) else a for a in args]
    library().functions[name](*numbers, torch.get_num_threads())


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _activation(x: Tensor, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    shape = (x.shape[0], N_FILTERS, height, width)
    return torch.empty(shape, dtype=dtype or x.dtype, memory_format=torch.channels_last)


def augment(
    pixels: Tensor,
    windows: Tensor,
    flip: Tensor,
    jitter: Tensor | None,
    order: Tensor | None,
    scale: tuple[Tensor, Tensor],
    out: Tensor,
) -> Tensor:
    """What ``augment.transform`` does: windows int64 [4, B, 2], flip bool [B], jitter float32 [B, 4], order int64 [B, 4], and
    scale the mean and the deviation, float32 [3] each."""
    n, _, height, width = pixels.shape
    args = [None if t is None else t.contiguous() for t in (pixels, windows, flip, jitter, order)]
    _call("augment", *args, *scale, out, out.shape[2], n, height, width)
    return out


class PatchMoments(NamedTuple):
    """Sums over all positions of the 3x3 patches (zero-padded) of a batch of images."""

    total: Tensor  # [27], float64
    product: Tensor  # [27, 27], float64
    count: int  # number of positions

    @staticmethod
    def of(x: Tensor) -> PatchMoments | None:
        """Moments of images [B, 3, H, W]; None where the kernels, which alone make use of them, do not handle these."""
        if not handles(x, *_SUFFIX):
            return None
        total, product = x.new_empty(27, dtype=torch.float64), x.new_empty(27, 27, dtype=torch.float64)
        _call("patch_moments" + _SUFFIX[x.dtype], _channels_last(x), total, product, x.shape[0], x.shape[2], x.shape[3])
        return PatchMoments(total, product, x.shape[0] * x.shape[2] * x.shape[3])


class FirstBlock(torch.autograd.Function):
    """(images, weight, gamma >= 0, beta, eps, their moments) -> output, batch mean [C], biased batch variance [C]."""

    @staticmethod
    def forward(ctx, x, weight, gamma, beta, eps, moments):
        n, _, height, width = x.shape
        x, w = _channels_last(x), weight.to(x.dtype).float().contiguous()
        out = _activation(x, height // 2, width // 2)
        where = _activation(x, height // 2, width // 2, torch.uint8)
        mean, var = torch.empty_like(gamma), torch.empty_like(gamma)
        args = (moments.total, moments.product, where, out, mean, var, n, height, width)
        _call("first_forward" + _SUFFIX[x.dtype], x, w, gamma, beta, eps, *args)
        ctx.save_for_backward(x, w, out, where, gamma, beta, mean, var, moments.total, moments.product)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    def backward(ctx, grad, _mean, _var):
        x, w, out, where, gamma, beta, mean, var, total, product = ctx.saved_tensors
        grad_w, grad_gamma, grad_beta = torch.empty_like(w), torch.empty_like(gamma), torch.empty_like(gamma)
        args = (gamma, beta, mean, var, ctx.eps, total, product, grad_w, grad_gamma, grad_beta, x.shape[0], *x.shape[2:])
        _call("first_backward" + _SUFFIX[x.dtype], _channels_last(grad), x, w, out, where, *args)
        return None, grad_w, grad_gamma, grad_beta, None, None


class Block(torch.autograd.Function):
    """(input, weight, gamma >= 0, beta, eps) -> output, batch mean [C], biased batch variance [C]."""

    @staticmethod
    def forward(ctx, x, weight, gamma, beta, eps):
        x, w = _channels_last(x), weight.to(x.dtype)
        y = _channels_last(F.conv2d(x, w, padding=1))
        n, _, height, width = y.shape
        pooled, out = (_activation(x, height // 2, width // 2) for _ in range(2))
        where = _activation(x, height // 2, width // 2, torch.uint8)
        mean, var = torch.empty_like(gamma), torch.empty_like(gamma)
        _call("block_forward" + _SUFFIX[x.dtype], y, gamma, beta, eps, pooled, where, out, mean, var, n, height, width)
        ctx.save_for_backward(x, w, pooled, where, gamma, beta, mean, var)
        ctx.eps, ctx.y = eps, y
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    def backward(ctx, grad, _mean, _var):
        x, w, pooled, where, gamma, beta, mean, var = ctx.saved_tensors
        y, ctx.y = ctx.y, None  # its memory becomes its gradient's, so there is no second time
        grad_gamma, grad_beta = torch.empty_like(gamma), torch.empty_like(gamma)
        args = (gamma, beta, mean, var, ctx.eps, grad_gamma, grad_beta, y.shape[0], y.shape[2], y.shape[3])
        _call("block_backward" + _SUFFIX[x.dtype], _channels_last(grad), pooled, where, y, *args)
        grad_x, grad_w, _ = torch.ops.aten.convolution_backward(
            y, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [ctx.needs_input_grad[0], True, False]
        )
        return grad_x, grad_w.to(gamma.dtype), grad_gamma, grad_beta, None


def train_block(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, moments: PatchMoments | None) -> Tensor:
    """See ``block.train_block``.

    The order here is convolution -> pooling -> normalisation -> ReLU. That is the same function: normalisation is an affine
    map a channel, which commutes with the maximum where its scale is positive, and a negative scale is folded into the sign of
    the filter. Normalisation and ReLU then touch a quarter of the numbers.

    The first block has two more liberties, since its input needs no gradient and its convolution is linear in the 27 numbers
    under each filter. The batch statistics of its output follow from the images' moments, the same in all updates of an
    episode, as does the part of its weight gradient that passes through those statistics; so its output, the largest tensor
    of the network, need not be stored at all.
    """
    sign = torch.where(norm.weight.detach() < 0, -1.0, 1.0)
    weight, gamma = conv.weight * sign.view(-1, 1, 1, 1), norm.weight * sign
    if x.shape[1] == 3:
        out, mean, var = FirstBlock.apply(x, weight, gamma, norm.bias, norm.eps, moments or PatchMoments.of(x))
    else:
        out, mean, var = Block.apply(x, weight, gamma, norm.bias, norm.eps)
    with torch.no_grad():
        count = x.shape[0] * x.shape[2] * x.shape[3]
        norm.running_mean.lerp_(mean * sign + conv.bias, norm.momentum)
        norm.running_var.lerp_(var * (count / max(count - 1, 1)), norm.momentum)
    return out


def eval_block(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """See ``block.eval_block``; builds no graph. The running statistics become part of the convolution's weight and bias."""
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight = (conv.weight * scale.view(-1, 1, 1, 1)).to(x.dtype)
    bias = (conv.bias - norm.running_mean) * scale + norm.bias
    x = _channels_last(x)
    n, channels, height, width = x.shape
    out = _activation(x, height // 2, width // 2)
    if channels == 3:
        _call("first_eval" + _SUFFIX[x.dtype], x, weight.float().contiguous(), bias, out, n, height, width)
    else:
        y = _channels_last(F.conv2d(x, weight, padding=1))
        _call("block_eval" + _SUFFIX[x.dtype], y, bias, out, n, height, width)
    return out


def lstm_state(cI: Tensor, hidden_size: int) -> Tensor:
    """Zeros for h or c of ``MetaStep``: [tiles, hidden_size, TILE], the coordinates in tiles that lie together in memory."""
    return cI.new_zeros(-(-cI.numel() // TILE), hidden_size, TILE)


class MetaStep(torch.autograd.Function):
    """One whole update of ``metalearner.MetaLearner`` after prep(loss): prep(grad), LSTM and cell.

    (weight [4H, 2+H] and bias [4H] of the LSTM, WF [H+2, 1], bF [1, 1], WI, bI, grad [P, 1], h and c as ``lstm_state`` makes
    them, f [P, 1], i [P, 1], theta [P, 1]) -> the new h, c, f, i, theta. The backward pass makes the gates again instead of
    keeping them.
    """

    @staticmethod
    def forward(ctx, weight, bias, wf, bf, wi, bi, grad, h, c, f, i, theta):
        state = [t.contiguous() for t in (h, c, f, i, theta)]
        new = [torch.empty_like(t) for t in state]
        weight, bias, grad = weight.contiguous(), bias.contiguous(), grad.contiguous()
        x = grad.new_empty(h.shape[0], 2, TILE)
        _call("meta_forward", weight, bias, wf, bf, wi, bi, grad, *state, x, *new, h.shape[1], grad.numel())
        ctx.save_for_backward(weight, bias, wf, wi, grad, x, *state, new[2], new[3])
        return tuple(new)

    @staticmethod
    def backward(ctx, *grads):
        weight, bias, wf, wi, *_ = saved = ctx.saved_tensors
        state = saved[6:11]
        made = [torch.empty_like(t) for t in (weight, bias, wf, wf[:1], wi, wi[:1], *state)]
        grads = [g.contiguous() for g in grads]
        _call("meta_backward", *saved, *grads, *made, state[0].shape[1], state[2].numel())
        return *made[:6], None, *made[6:]
