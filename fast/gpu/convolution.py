"""3x3 convolutions and their gradients.

Images are channels last: a pixel's channels lie side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast.gpu import jit, shares, tl
from fast.native import N_FILTERS

ROWS, WARPS = 128, 8  # pixels that a program makes, and its warps
PARTS_OF_FILTERS = 256  # programs that share the gradient of the filters at most; how they work, by the number of channels:
OF_FILTERS = {
    3: {"ROWS": 64, "num_warps": 8, "num_stages": 3},
    32: {"ROWS": 32, "num_warps": 4, "num_stages": 2},
}
# Tensor cores multiply float32 as three products of TF32, which together are nearly as precise.
PRECISION = "tf32x3"


@jit
def _seen(x, at, row, column, tap, P, H, W, C: tl.constexpr):
    """What 3x3 filters see around pixels ``at`` [ROWS, 1], [ROWS, 32]: of 32 channels what lies at
    place ``tap`` of the nine; of 3 channels all nine places, channel by channel.
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
    """The weights of what ``_seen`` takes, [filter, 32]."""
    out, number = tl.arange(0, 32)[:, None], tl.arange(0, 32)[None, :]
    if C == 3:
        return tl.load(weight + out * 27 + number, number < 27, 0.0)
    return tl.load(weight + (out * C + number) * 9 + tap)


@jit
def _convolve(
    x, weight, y, P, H, W,
    BACK: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A 3x3 convolution to 32 channels; or, if BACK, from the gradient of one's output to that of
    its input.
    """
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    row, column = at // W % H, at % W
    total = tl.zeros([ROWS, 32], tl.float32)
    for tap in range(1 if C == 3 else 9):
        seen = _seen(x, at, row, column, tap, P, H, W, C)
        if BACK:
            total = tl.dot(
                seen, _filters(weight, 8 - tap, C).to(seen.dtype), total, input_precision=PRECISION
            )
        else:
            total = tl.dot(
                seen,
                tl.trans(_filters(weight, tap, C).to(seen.dtype)),
                total,
                input_precision=PRECISION,
            )
    tl.store(y + at * 32 + tl.arange(0, 32)[None, :], total, at < P)


@jit
def _filters_backward(
    x, grad, parts, P, PER, H, W, C: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Each program's share of the gradient of the filters; of 32 channels, for one of their three
    lines.
    """
    part, line = tl.program_id(0), tl.program_id(1) * 3
    out, number = tl.arange(0, 32)[:, None], tl.arange(0, 32)[None, :]
    left, middle, right = (
        tl.zeros([32, 32], tl.float32),
        tl.zeros([32, 32], tl.float32),
        tl.zeros([32, 32], tl.float32),
    )
    for start in range(part * PER, part * PER + PER, ROWS):
        at = start + tl.arange(0, ROWS)[:, None]
        row, column = at // W % H, at % W
        d = tl.trans(tl.load(grad + at * 32 + number, at < P, 0.0))
        left = tl.dot(
            d, _seen(x, at, row, column, line, P, H, W, C), left, input_precision=PRECISION
        )
        if C == 32:
            middle = tl.dot(
                d,
                _seen(x, at, row, column, line + 1, P, H, W, C),
                middle,
                input_precision=PRECISION,
            )
            right = tl.dot(
                d, _seen(x, at, row, column, line + 2, P, H, W, C), right, input_precision=PRECISION
            )
    if C == 3:
        tl.store(parts + part * 32 * 27 + out * 27 + number, left, number < 27)
    else:
        places = parts + ((part * 32 + out) * 32 + number) * 9 + line
        tl.store(places, left)
        tl.store(places + 1, middle)
        tl.store(places + 2, right)


class Convolution(torch.autograd.Function):
    """A 3x3 convolution, padded by 1, without bias: (x [B, 3 or 32, H, W], weight [32, 3 or 32, 3,
    3]) -> [B, 32, H, W] in x's dtype, channels last; the filters' gradient is in theirs.
    """

    @staticmethod
    def forward(ctx, x, weight):
        x, weight = x.contiguous(memory_format=torch.channels_last), weight.contiguous()
        ctx.save_for_backward(x, weight)
        return _passed(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        _, channels, *size = x.shape
        of_images, pixels = channels == 3, x[:, 0].numel()
        how = {"C": channels, "PRECISION": PRECISION, **OF_FILTERS[channels]}
        per, programs = shares(pixels, how["ROWS"], PARTS_OF_FILTERS)
        parts = weight.new_empty(*programs, *weight.shape)
        _filters_backward[(*programs, 1 if of_images else 3)](
            x, grad, parts, pixels, per, *size, **how
        )
        of_x = None
        if ctx.needs_input_grad[0] and of_images:  # nothing wants it but a check
            of_x = torch.nn.grad.conv2d_input(x.shape, weight.to(x.dtype), grad, padding=1)
        elif ctx.needs_input_grad[0]:
            of_x = _passed(grad, weight, back=True)
        return of_x, parts.sum(0)


def _passed(x: Tensor, weight: Tensor, back: bool = False) -> Tensor:
    """``_convolve`` of channels-last images."""
    n, channels, *size = x.shape
    out = torch.empty(
        n, N_FILTERS, *size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    pixels, how = (
        x[:, 0].numel(),
        {"BACK": back, "C": channels, "ROWS": ROWS, "PRECISION": PRECISION, "num_warps": WARPS},
    )
    _convolve[(-(-pixels // ROWS),)](x, weight, out, pixels, *size, **how)
    return out
