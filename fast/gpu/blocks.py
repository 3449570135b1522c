"""The learner's blocks: a convolution, then normalisation, 2x2 max-pooling and ReLU.

Images are channels last: a pixel's C numbers lie side by side. Each program works on PER pixels or
2x2 windows, ROWS at once. Where a size is odd, the windows at the edge are cut, and pooling leaves
them out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fast.gpu import jit, shares, tl
from fast.gpu.convolution import Convolution
from fast.native import N_FILTERS

PARTS = 128  # programs at most, a power of two: about as many as a large GPU has processors
ROWS, WARPS = (
    64,
    16,
)  # windows of four pixels that one of them works on at once, and by how many warps


@jit
def _merged(n, mean, squares):
    """Mean and sum of squared deviations [C] of groups taken together: n [groups, 1], mean and
    squares [groups, C].
    """
    together = tl.sum(n * mean, 0) / tl.sum(n, 0)
    off = mean - together[None, :]
    return together, tl.sum(squares + n * off * off, 0)


@jit
def _moments(y, parts, P, PER, C: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """Mean and sum of squared deviations of each program's pixels, by Welford's method."""
    part, channel = tl.program_id(0), tl.arange(0, C)
    n = tl.zeros([ROWS, 1], tl.float32)
    mean, squares = tl.zeros([ROWS, C], tl.float32), tl.zeros([ROWS, C], tl.float32)
    for start in range(part * PER, part * PER + PER, ROWS):
        at = start + tl.arange(0, ROWS)[:, None]
        inside = at < P
        x = tl.load(y + at * C + channel[None, :], inside, 0.0).to(tl.float32)
        n += inside.to(tl.float32)
        off = x - mean
        mean += off * tl.where(inside, 1 / tl.maximum(n, 1.0), 0.0)
        squares += tl.where(inside, off * (x - mean), 0.0)
    mean, squares = _merged(n, mean, squares)
    tl.store(parts + part * C + channel, mean)
    tl.store(parts + (PARTS + part) * C + channel, squares)


@jit
def _pixel(at, k, N, H, W):
    """Where pixel k of the windows ``at`` lies, and whether the image has it."""
    wide, high = (W + 1) // 2, (H + 1) // 2
    column, row = at % wide * 2 + k % 2, at // wide % high * 2 + k // 2
    return (at // wide // high * H + row) * W + column, (at < N) & (row < H) & (column < W)


@jit
def _pooled(at, H, W):
    """Where the maximum of the windows ``at`` lies."""
    wide, high = (W + 1) // 2, (H + 1) // 2
    return (at // wide // high * (H // 2) + at // wide % high) * (W // 2) + at % wide


@jit
def _largest(y, at, N, H, W, mean, scale, beta, C: tl.constexpr):
    """The largest normalised pixel of windows as PyTorch picks it: its value, what it was, its
    number; and uncut windows.

    ``fma`` rounds in one way wherever it is compiled: the backward pass must pick the same pixel.
    """
    channel = tl.arange(0, C)[None, :]
    for k in tl.static_range(4):
        place, inside = _pixel(at, k, N, H, W)
        x = tl.load(y + place * C + channel, inside, 0.0).to(tl.float32)
        z = tl.fma(
            x - mean[None, :], scale[None, :] + tl.zeros_like(x), beta[None, :] + tl.zeros_like(x)
        )
        z = z.to(y.dtype.element_ty).to(tl.float32)
        if k == 0:
            best, raw, which = z, x, tl.zeros(z.shape, tl.int32)
        else:
            better = (z > best) | (z != z)
            best, raw, which = (
                tl.where(better, z, best),
                tl.where(better, x, raw),
                tl.where(better, k, which),
            )
    return best, raw, which, inside  # pixel 3 is there if all are


@jit
def _block_forward(
    y, parts, gamma, beta, bias, running_mean, running_var, used, out, momentum, eps, P, PER_OF_P, N, PER, H, W,
    TRAIN: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Normalisation, pooling, ReLU; the first program also updates the running statistics, to which
    ``bias`` belongs.
    """
    program, channel = tl.program_id(0), tl.arange(0, C)
    if TRAIN:
        part = tl.arange(0, PARTS)[:, None]
        n = tl.minimum(tl.maximum(P - part * PER_OF_P, 0), PER_OF_P).to(tl.float32)
        places = parts + part * C + channel[None, :]
        mean, squares = _merged(
            n, tl.load(places, n > 0, 0.0), tl.load(places + PARTS * C, n > 0, 0.0)
        )
        inverse = 1 / tl.sqrt_rn(squares / P + eps)
        if program == 0:
            old_mean, old_var = tl.load(running_mean + channel), tl.load(running_var + channel)
            new_mean, new_var = mean + tl.load(bias + channel), squares / (P - 1)
            tl.store(running_mean + channel, momentum * new_mean + (1 - momentum) * old_mean)
            tl.store(running_var + channel, momentum * new_var + (1 - momentum) * old_var)
            tl.store(used + channel, mean)
            tl.store(used + C + channel, inverse)
    else:
        mean = tl.load(running_mean + channel) - tl.load(bias + channel)
        inverse = 1 / tl.sqrt_rn(tl.load(running_var + channel) + eps)
    scale, shift = tl.load(gamma + channel) * inverse, tl.load(beta + channel)
    for start in range(program * PER, program * PER + PER, ROWS):
        at = start + tl.arange(0, ROWS)[:, None]
        best, _, _, whole = _largest(y, at, N, H, W, mean, scale, shift, C)
        tl.store(
            out + _pooled(at, H, W) * C + channel[None, :], tl.where(best <= 0, 0.0, best), whole
        )


@jit
def _arrived(y, grad, at, N, H, W, mean, scale, beta, C: tl.constexpr):
    """The gradient that windows' largest normalised pixels get, what these pixels were, their
    numbers.
    """
    best, raw, which, whole = _largest(y, at, N, H, W, mean, scale, beta, C)
    d = tl.load(grad + _pooled(at, H, W) * C + tl.arange(0, C)[None, :], whole, 0.0).to(tl.float32)
    return tl.where(best <= 0, 0.0, d), raw, which


@jit
def _block_sums(
    y,
    used,
    gamma,
    beta,
    grad,
    parts,
    N,
    PER,
    H,
    W,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Each program's share of the gradients of beta and gamma."""
    part, channel = tl.program_id(0), tl.arange(0, C)
    mean, inverse = tl.load(used + channel), tl.load(used + C + channel)
    scale, shift = tl.load(gamma + channel) * inverse, tl.load(beta + channel)
    of_beta, of_gamma = tl.zeros([ROWS, C], tl.float32), tl.zeros([ROWS, C], tl.float32)
    for start in range(part * PER, part * PER + PER, ROWS):
        at = start + tl.arange(0, ROWS)[:, None]
        d, raw, _ = _arrived(y, grad, at, N, H, W, mean, scale, shift, C)
        of_beta += d
        of_gamma += d * (raw - mean[None, :])
    tl.store(parts + part * C + channel, tl.sum(of_beta, 0))
    tl.store(parts + (PARTS + part) * C + channel, tl.sum(of_gamma, 0) * inverse)


@jit
def _block_backward(
    y, used, gamma, beta, grad, parts, d_gamma, d_beta, d_y, P, N, PER, H, W,
    C: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    program, channel, part = tl.program_id(0), tl.arange(0, C), tl.arange(0, PARTS)[:, None]
    places, written = parts + part * C + channel[None, :], part * PER < N
    of_beta = tl.sum(tl.load(places, written, 0.0), 0)
    of_gamma = tl.sum(tl.load(places + PARTS * C, written, 0.0), 0)
    if program == 0:
        tl.store(d_beta + channel, of_beta)
        tl.store(d_gamma + channel, of_gamma)
    mean, inverse = tl.load(used + channel), tl.load(used + C + channel)
    scale, shift = tl.load(gamma + channel) * inverse, tl.load(beta + channel)
    level, slope = of_beta / P, of_gamma * inverse / P
    for start in range(program * PER, program * PER + PER, ROWS):
        at = start + tl.arange(0, ROWS)[:, None]
        d, _, which = _arrived(y, grad, at, N, H, W, mean, scale, shift, C)
        for k in tl.static_range(4):
            place, inside = _pixel(at, k, N, H, W)
            x = tl.load(y + place * C + channel[None, :], inside, 0.0).to(tl.float32)
            moved = (
                tl.where(which == k, d, 0.0) - level[None, :] - (x - mean[None, :]) * slope[None, :]
            )
            tl.store(d_y + place * C + channel[None, :], scale[None, :] * moved, inside)


def handles_block(x: Tensor, weight: Tensor) -> bool:
    """Whether ``train_block`` and ``eval_block`` are written for this input and these filters."""
    return (
        weight.shape[:2] in ((N_FILTERS, 3), (N_FILTERS, N_FILTERS))
        and x[:, 0].numel() * N_FILTERS < 2**31
    )


def train_block(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """See ``learner.train_block``."""
    running = norm.running_mean, norm.running_var, norm.momentum, norm.eps
    return NormPoolReLU.apply(
        _convolved(x, conv), norm.weight, norm.bias, conv.bias.detach(), *running
    )


def eval_block(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """See ``learner.eval_block``; without a graph."""
    running = norm.running_mean, norm.running_var, norm.momentum, norm.eps
    return _normalised(
        _convolved(x, conv), norm.weight, norm.bias, conv.bias, *running, train=False
    )[0]


def _convolved(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Without the bias, which batch normalisation takes away or the kernel adds."""
    return Convolution.apply(x, conv.weight)


def _counts(y: Tensor) -> tuple[int, int, int, int]:
    """Pixels, windows (cut ones, too), height and width."""
    n, _, height, width = y.shape
    return n * height * width, n * -(-height // 2) * -(-width // 2), height, width


def _normalised(y, gamma, beta, bias, running_mean, running_var, momentum, eps, train):
    """The block's output, and the batch's mean and 1 / deviation [2, C] if ``train``."""
    (pixels, windows, height, width), channels = _counts(y), y.shape[1]
    parts, used = gamma.new_empty(2, PARTS, channels), gamma.new_empty(2, channels)
    shape, sizes = (
        (len(y), channels, height // 2, width // 2),
        {"C": channels, "PARTS": PARTS, "num_warps": WARPS},
    )
    out = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
    per_of_pixels, programs = shares(pixels, 4 * ROWS, PARTS)
    if train:
        _moments[programs](y, parts, pixels, per_of_pixels, ROWS=4 * ROWS, **sizes)
    per, programs = shares(windows, ROWS, PARTS)
    args = (y, parts, gamma, beta, bias, running_mean, running_var, used, out, momentum, eps)
    _block_forward[programs](
        *args, pixels, per_of_pixels, windows, per, height, width, TRAIN=train, ROWS=ROWS, **sizes
    )
    return out, used


class NormPoolReLU(torch.autograd.Function):
    """What follows a block's convolution in training: normalisation by the batch's statistics, 2x2
    max-pooling, ReLU.

    (convolution's output without its bias, channels last, gamma, beta, that bias, running mean and
    variance, momentum, eps) -> output, channels last. The running statistics are updated. The
    backward pass normalises and picks the maxima a second time: beside the convolution's output it
    keeps nothing.
    """

    @staticmethod
    def forward(ctx, y, gamma, beta, *others):
        out, used = _normalised(y, gamma, beta, *others, train=True)
        ctx.save_for_backward(y, used, gamma, beta)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, used, gamma, beta = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        pixels, windows, *size = _counts(y)
        per, programs = shares(windows, ROWS, PARTS)
        parts, made = (
            gamma.new_empty(2, PARTS, len(gamma)),
            [torch.empty_like(t) for t in (gamma, beta, y)],
        )
        sizes = {"C": len(gamma), "ROWS": ROWS, "PARTS": PARTS, "num_warps": WARPS}
        _block_sums[programs](y, used, gamma, beta, grad, parts, windows, per, *size, **sizes)
        _block_backward[programs](
            y, used, gamma, beta, grad, parts, *made, pixels, windows, per, *size, **sizes
        )
        return made[2], *made[:2], *[None] * 5
