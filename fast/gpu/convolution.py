"""3x3 convolutions and their gradients, on channels-last images.

The kernels read the filters of 32 channels as [tap, out, in], so that a warp reads a row at once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast.gpu import jit, launch, shares, tl
from fast.native import N_FILTERS

ROWS, WARPS = 128, 8  # output pixels of a program, and its warps
PROGRAMS = 768  # most programs that share the filters' gradient
FILTERS_BACKWARD = {  # their options by the number of channels; a 32 x 32 product feeds two warps
    3: {"ROWS": 32, "num_warps": 2, "num_stages": 3},
    32: {"ROWS": 16, "num_warps": 2, "num_stages": 2},
}
# Tensor cores multiply float32 as three products of TF32, which together are nearly as precise.
PRECISION = "tf32x3"


@jit
def _patches(x, at, row, column, tap, P, H, W, C: tl.constexpr):
    """Inputs [ROWS, 32] of the filters at pixels ``at`` [ROWS, 1]: with 32 channels those of one
    ``tap`` of the nine; with 3 channels all 27, channel by channel.
    """
    number = tl.arange(0, 32)[None, :]
    if C == 3:
        channel, tap = number // 9, number % 9
    else:
        channel = number
    down, right = tap // 3 - 1, tap % 3 - 1
    row, column = row + down, column + right
    inside = (at < P) & (channel < C) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    return tl.load(x + (at + down * W + right) * C + channel, inside, 0.0)


@jit
def _filters(weight, tap, C: tl.constexpr):
    """The weights [filter, 32] of the inputs that ``_patches`` loads."""
    out, number = tl.arange(0, 32)[:, None], tl.arange(0, 32)[None, :]
    if C == 3:
        return tl.load(weight + out * 27 + number, number < 27, 0.0)
    return tl.load(weight + (tap * 32 + out) * C + number)


@jit
def _convolve(
    x, weight, y, P, H, W,
    BACK: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A convolution to 32 channels; with BACK, from its output's gradient to its input's."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    row, column = at // W % H, at % W
    total = tl.zeros([ROWS, 32], tl.float32)
    for tap in range(1 if C == 3 else 9):
        patches = _patches(x, at, row, column, tap, P, H, W, C)
        w = _filters(weight, 8 - tap if BACK else tap, C).to(patches.dtype)
        total = tl.dot(patches, w if BACK else tl.trans(w), total, input_precision=PRECISION)
    tl.store(y + at * 32 + tl.arange(0, 32)[None, :], total, at < P)


@jit
def _filters_backward(
    x, grad, parts, P, PER, H, W, C: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Each program's share of the filters' gradient; with 32 channels, of one of their 3 rows."""
    part, line = tl.program_id(0), tl.program_id(1) * 3
    out, number = tl.arange(0, 32)[:, None], tl.arange(0, 32)[None, :]
    left, middle = tl.zeros([32, 32], tl.float32), tl.zeros([32, 32], tl.float32)
    right = tl.zeros([32, 32], tl.float32)
    for start in range(part * PER, part * PER + PER, ROWS):
        at = start + tl.arange(0, ROWS)[:, None]
        row, column = at // W % H, at % W
        d = tl.trans(tl.load(grad + at * 32 + number, at < P, 0.0))
        patches = _patches(x, at, row, column, line, P, H, W, C)
        left = tl.dot(d, patches, left, input_precision=PRECISION)
        if C == 32:
            patches = _patches(x, at, row, column, line + 1, P, H, W, C)
            middle = tl.dot(d, patches, middle, input_precision=PRECISION)
            patches = _patches(x, at, row, column, line + 2, P, H, W, C)
            right = tl.dot(d, patches, right, input_precision=PRECISION)
    if C == 3:
        tl.store(parts + part * 32 * 27 + out * 27 + number, left, number < 27)
    else:
        places = parts + ((part * 9 + line) * 32 + out) * 32 + number
        tl.store(places, left)
        tl.store(places + 32 * 32, middle)
        tl.store(places + 2 * 32 * 32, right)


class Convolution(torch.autograd.Function):
    """A 3x3 convolution with padding 1, without bias.

    (x [B, 3 or 32, H, W], weight [32, 3 or 32, 3, 3]) -> [B, 32, H, W] in x's dtype, channels last.
    The filters' gradient has their dtype.
    """

    @staticmethod
    def forward(ctx, x, weight):
        x = x.contiguous(memory_format=torch.channels_last)
        filters = kernels_order(weight).contiguous()
        ctx.save_for_backward(x, filters)
        ctx.shape = weight.shape
        return convolve(x, filters)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, filters = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = None
        if ctx.needs_input_grad[0] and x.shape[1] == 3:  # only the self-check asks for it
            grad_x = torch.nn.grad.conv2d_input(x.shape, filters.to(x.dtype), grad, padding=1)
        elif ctx.needs_input_grad[0]:
            grad_x = convolve(grad, filters, back=True)
        grad_weight = filters.new_empty(ctx.shape)
        filters_gradient(x, grad, grad_weight)
        return grad_x, grad_weight


def kernels_order(weight: Tensor) -> Tensor:
    """Filters [32, 32, 3, 3] seen as the kernels read them, [3, 3, 32, 32], or back; all others as
    they are.
    """
    swaps = sorted(weight.shape) == [3, 3, N_FILTERS, N_FILTERS]
    return weight.permute(2, 3, 0, 1) if swaps else weight


def convolve(x: Tensor, filters: Tensor, back: bool = False) -> Tensor:
    """``_convolve`` of channels-last images by filters in ``kernels_order``, contiguous."""
    n, channels, *size = x.shape
    shape, pixels = (n, N_FILTERS, *size), x[:, 0].numel()
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    options = {"BACK": back, "C": channels, "ROWS": ROWS, "PRECISION": PRECISION}
    grid = (-(-pixels // ROWS),)
    launch(_convolve, grid, x, filters, out, pixels, *size, num_warps=WARPS, **options)
    return out


def filters_gradient(x: Tensor, grad: Tensor, out: Tensor) -> None:
    """Write the filters' gradient into ``out`` [32, C, 3, 3], from channels-last images ``x`` and
    the gradient of their convolution.
    """
    _, channels, *size = x.shape
    lines, pixels = 1 if channels == 3 else 3, x[:, 0].numel()
    options = {"C": channels, "PRECISION": PRECISION, **FILTERS_BACKWARD[channels]}
    per, programs = shares(pixels, 2 * options["ROWS"], PROGRAMS // lines)
    out = kernels_order(out)
    parts = out.new_empty(*programs, *out.shape)
    launch(_filters_backward, (*programs, lines), x, grad, parts, pixels, per, *size, **options)
    torch.sum(parts, 0, out=out)
