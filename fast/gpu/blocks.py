"""The learner's blocks: a convolution, then batch normalisation, 2x2 max-pooling and ReLU.

Images are channels last. Each program works on PER pixels or 2x2 pooling windows, ROWS at once.
Where a size is odd, the windows at the edge are incomplete: pooling skips them, the batch
statistics do not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fast.gpu import INT32, jit, launch, shares, tl
from fast.gpu.convolution import Convolution
from fast.native import N_FILTERS

PARTS = 128  # most programs, a power of 2: about the number of multiprocessors of a large GPU
ROWS, WARPS = 64, 16  # windows that a program works on at once, and its warps


@jit
def _merged(n, mean, squares):
    """Merge groups' counts n [groups, 1], means and sums of squared deviations [groups, C].

    Returns the mean and the sum of squared deviations [C] of all.
    """
    total_mean = tl.sum(n * mean, 0) / tl.sum(n, 0)
    off = mean - total_mean[None, :]
    return total_mean, tl.sum(squares + n * off * off, 0)


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
    """Offset of pixel k of the windows ``at``, and whether it lies in the image."""
    wide, high = (W + 1) // 2, (H + 1) // 2
    column, row = at % wide * 2 + k % 2, at // wide % high * 2 + k // 2
    return (at // wide // high * H + row) * W + column, (at < N) & (row < H) & (column < W)


@jit
def _pooled(at, H, W):
    """Offset of the windows ``at`` in the pooled output."""
    wide, high = (W + 1) // 2, (H + 1) // 2
    return (at // wide // high * (H // 2) + at // wide % high) * (W // 2) + at % wide


@jit
def _largest(y, at, N, H, W, mean, scale, beta, C: tl.constexpr):
    """The maximum of windows' normalised pixels, with PyTorch's choice among equal ones.

    ``fma`` rounds alike wherever it is compiled: the backward pass must pick the same pixel.
    Returns the maximum, the same pixel before normalisation, its number (argmax), and which windows
    are complete.
    """
    channel = tl.arange(0, C)[None, :]
    for k in tl.static_range(4):
        place, inside = _pixel(at, k, N, H, W)
        x = tl.load(y + place * C + channel, inside, 0.0).to(tl.float32)
        zero = tl.zeros_like(x)
        z = tl.fma(x - mean[None, :], scale[None, :] + zero, beta[None, :] + zero)
        z = z.to(y.dtype.element_ty).to(tl.float32)
        if k == 0:
            best, raw, argmax = z, x, tl.zeros(z.shape, tl.int32)
        else:
            better = (z > best) | (z != z)
            best, raw = tl.where(better, z, best), tl.where(better, x, raw)
            argmax = tl.where(better, k, argmax)
    return best, raw, argmax, inside  # a window is complete if it has pixel 3


@jit
def _chosen(
    y, at, N, H, W, mean, scale, beta, y0, used0, gamma0, beta0,
    FROZEN: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """``_largest``; with FROZEN, what a call on ``y0`` has chosen, which need not be the largest.

    Returns also what the ReLU looks at, after the maximum.
    """
    if FROZEN:
        channel = tl.arange(0, C)
        mean0, scale0 = tl.load(used0 + channel), tl.load(used0 + C + channel)
        scale0, shift0 = tl.load(gamma0 + channel) * scale0, tl.load(beta0 + channel)
        sign, _, argmax, complete = _largest(y0, at, N, H, W, mean0, scale0, shift0, C)
        place, inside = _pixel(at, argmax, N, H, W)
        raw = tl.load(y + place * C + channel[None, :], inside, 0.0).to(tl.float32)
        best = (raw - mean[None, :]) * scale[None, :] + beta[None, :]
    else:
        best, raw, argmax, complete = _largest(y, at, N, H, W, mean, scale, beta, C)
        sign = best
    return best, sign, raw, argmax, complete


@jit
def _block_forward(
    y, parts, gamma, beta, y0, used0, gamma0, beta0, bias, running_mean, running_var, used, out,
    momentum, eps, P, PER_OF_P, N, PER, H, W,
    TRAIN: tl.constexpr, FROZEN: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Normalisation, pooling, ReLU. Unless FROZEN, the first program also updates the running
    statistics, which include the convolution's ``bias``.
    """
    program, channel = tl.program_id(0), tl.arange(0, C)
    if TRAIN:
        part = tl.arange(0, PARTS)[:, None]
        n = tl.minimum(tl.maximum(P - part * PER_OF_P, 0), PER_OF_P).to(tl.float32)
        places = parts + part * C + channel[None, :]
        mean, squares = tl.load(places, n > 0, 0.0), tl.load(places + PARTS * C, n > 0, 0.0)
        mean, squares = _merged(n, mean, squares)
        inverse = 1 / tl.sqrt_rn(squares / P + eps)
        if program == 0:
            if not FROZEN:
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
        best, sign, _, _, complete = _chosen(
            y, at, N, H, W, mean, scale, shift, y0, used0, gamma0, beta0, FROZEN, C
        )
        pooled = out + _pooled(at, H, W) * C + channel[None, :]
        tl.store(pooled, tl.where(sign <= 0, 0.0, best), complete)


@jit
def _through_relu(
    y, grad, at, N, H, W, mean, scale, beta, y0, used0, gamma0, beta0,
    FROZEN: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradient at windows' maxima, these pixels before normalisation, and argmax."""
    _, sign, raw, argmax, complete = _chosen(
        y, at, N, H, W, mean, scale, beta, y0, used0, gamma0, beta0, FROZEN, C
    )
    places = grad + _pooled(at, H, W) * C + tl.arange(0, C)[None, :]
    d = tl.load(places, complete, 0.0).to(tl.float32)
    return tl.where(sign <= 0, 0.0, d), raw, argmax


@jit
def _block_sums(
    y, used, gamma, beta, y0, used0, gamma0, beta0, grad, parts, N, PER, H, W,
    FROZEN: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Each program's share of the gradients of beta and gamma."""
    part, channel = tl.program_id(0), tl.arange(0, C)
    mean, inverse = tl.load(used + channel), tl.load(used + C + channel)
    scale, shift = tl.load(gamma + channel) * inverse, tl.load(beta + channel)
    d_beta_sum, d_gamma_sum = tl.zeros([ROWS, C], tl.float32), tl.zeros([ROWS, C], tl.float32)
    for start in range(part * PER, part * PER + PER, ROWS):
        at = start + tl.arange(0, ROWS)[:, None]
        d, raw, _ = _through_relu(
            y, grad, at, N, H, W, mean, scale, shift, y0, used0, gamma0, beta0, FROZEN, C
        )
        d_beta_sum += d
        d_gamma_sum += d * (raw - mean[None, :])
    tl.store(parts + part * C + channel, tl.sum(d_beta_sum, 0))
    tl.store(parts + (PARTS + part) * C + channel, tl.sum(d_gamma_sum, 0) * inverse)


@jit
def _block_backward(
    y, used, gamma, beta, y0, used0, gamma0, beta0, grad, parts, d_gamma, d_beta, d_y,
    P, N, PER, H, W,
    FROZEN: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    program, channel, part = tl.program_id(0), tl.arange(0, C), tl.arange(0, PARTS)[:, None]
    places, written = parts + part * C + channel[None, :], part * PER < N
    d_beta_sum = tl.sum(tl.load(places, written, 0.0), 0)
    d_gamma_sum = tl.sum(tl.load(places + PARTS * C, written, 0.0), 0)
    if program == 0:
        tl.store(d_beta + channel, d_beta_sum)
        tl.store(d_gamma + channel, d_gamma_sum)
    mean, inverse = tl.load(used + channel), tl.load(used + C + channel)
    scale, shift = tl.load(gamma + channel) * inverse, tl.load(beta + channel)
    level, slope = d_beta_sum / P, d_gamma_sum * inverse / P
    for start in range(program * PER, program * PER + PER, ROWS):
        at = start + tl.arange(0, ROWS)[:, None]
        d, _, argmax = _through_relu(
            y, grad, at, N, H, W, mean, scale, shift, y0, used0, gamma0, beta0, FROZEN, C
        )
        for k in tl.static_range(4):
            place, inside = _pixel(at, k, N, H, W)
            x = tl.load(y + place * C + channel[None, :], inside, 0.0).to(tl.float32)
            d_k = tl.where(argmax == k, d, 0.0)
            d_k = d_k - level[None, :] - (x - mean[None, :]) * slope[None, :]
            tl.store(d_y + place * C + channel[None, :], scale[None, :] * d_k, inside)


def handles_block(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels fit this input and these filters, with offsets in int32."""
    fits = weight.shape[:2] in ((N_FILTERS, 3), (N_FILTERS, N_FILTERS))
    return fits and x[:, 0].numel() * N_FILTERS < INT32


def train_block(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """See ``learner.train_block``; batch normalisation cancels the convolution's bias."""
    y, running = Convolution.apply(x, conv.weight), (norm.running_mean, norm.running_var)
    affine = norm.weight, norm.bias, conv.bias.detach()
    return NormPoolReLU.apply(y, *affine, *running, norm.momentum, norm.eps)


def eval_block(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """See ``learner.eval_block``; without a graph. The kernel adds the convolution's bias."""
    y, running = Convolution.apply(x, conv.weight), (norm.running_mean, norm.running_var)
    affine = norm.weight, norm.bias, conv.bias
    return normalised(y, *affine, *running, norm.momentum, norm.eps, train=False)[0]


def _counts(y: Tensor) -> tuple[int, int, int, int]:
    """Numbers of pixels and of windows, incomplete ones included; height and width."""
    n, _, height, width = y.shape
    return n * height * width, n * -(-height // 2) * -(-width // 2), height, width


def normalised(
    y, gamma, beta, bias, running_mean, running_var, momentum, eps, train, frozen=None
):  # fmt: skip
    """The block's output; with ``train`` also the batch's mean and 1 / deviation [2, C].

    ``frozen``: the y, used, gamma and beta of another call, whose maxima and signs decide.
    """
    (pixels, windows, height, width), channels = _counts(y), y.shape[1]
    parts, used = gamma.new_empty(2, PARTS, channels), gamma.new_empty(2, channels)
    shape = len(y), channels, height // 2, width // 2
    out = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
    options = {"C": channels, "PARTS": PARTS, "num_warps": WARPS}
    per_of_p, programs = shares(pixels, 4 * ROWS, PARTS)
    if train:
        launch(_moments, programs, y, parts, pixels, per_of_p, ROWS=4 * ROWS, **options)
    per, programs = shares(windows, ROWS, PARTS)
    args = parts, gamma, beta, *(frozen or (y, used, gamma, beta)), bias, running_mean, running_var
    sizes = pixels, per_of_p, windows, per, height, width
    options |= {"TRAIN": train, "FROZEN": frozen is not None, "ROWS": ROWS}
    launch(_block_forward, programs, y, *args, used, out, momentum, eps, *sizes, **options)
    return out, used


class NormPoolReLU(torch.autograd.Function):
    """A block after its convolution, in training: batch norm, 2x2 max-pooling, ReLU.

    (the convolution's output without its bias, channels last, gamma, beta, that bias, running mean
    and variance, momentum, eps) -> output, channels last. The running statistics are updated. The
    backward pass keeps only the convolution's output, and recomputes normalisation and maxima.
    """

    @staticmethod
    def forward(ctx, y, gamma, beta, *others):
        out, used = normalised(y, gamma, beta, *others, train=True)
        ctx.save_for_backward(y, used, gamma, beta)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        _, _, gamma, beta = saved = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        d_gamma, d_beta = torch.empty_like(gamma), torch.empty_like(beta)
        return norm_gradient(*saved, grad, d_gamma, d_beta), d_gamma, d_beta, *[None] * 5


def norm_gradient(y, used, gamma, beta, grad, d_gamma, d_beta, frozen=None) -> Tensor:
    """The gradient of y, what ``normalised`` read, from that of its output, channels last; writes
    those of gamma and beta. ``frozen`` as for ``normalised``.
    """
    pixels, windows, *size = _counts(y)
    per, programs = shares(windows, ROWS, PARTS)
    parts, d_y = gamma.new_empty(2, PARTS, len(gamma)), torch.empty_like(y)
    args = y, used, gamma, beta, *(frozen or (y, used, gamma, beta)), grad, parts
    options = {"FROZEN": frozen is not None, "C": len(gamma)}
    options |= {"ROWS": ROWS, "PARTS": PARTS, "num_warps": WARPS}
    launch(_block_sums, programs, *args, windows, per, *size, **options)
    args = *args, d_gamma, d_beta, d_y
    launch(_block_backward, programs, *args, pixels, windows, per, *size, **options)
    return d_y
