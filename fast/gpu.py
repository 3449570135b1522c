"""Kernels for a GPU in Triton, which comes with PyTorch's CUDA builds.

Each replaces PyTorch code of this folder, and ``replaced`` chooses: the kernel where Triton is there and, at its first use,
compiles and agrees with that code; otherwise the code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from tqdm import tqdm

from fast.native import N_FILTERS

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch without CUDA
    triton = None

TINY = 1e-20
TILE = 32  # coordinates that a program of the meta-learner's kernels works on at once
WARPS = 8  # with fewer, or with larger tiles, the numbers do not fit into registers
BACKWARD = {"num_stages": 1, "maxnreg": 128}  # of the backward pass: two programs share a processor
META_PARTS = 264  # programs at most: two for each processor of a large GPU
LARGEST_HIDDEN = 28  # with what else the gates read, 32
PARTS = 128  # programs of a block's kernels at most, a power of two: about as many as a large GPU has processors
ROWS, BLOCK_WARPS = 64, 16  # windows of four pixels that one of them works on at once, and by how many warps
CONV_ROWS, CONV_WARPS = 128, 8  # pixels that a convolution's program makes, and its warps
PARTS_OF_FILTERS = 256  # programs that share the gradient of the filters at most; how they work, by the number of channels:
OF_FILTERS = {3: {"ROWS": 64, "num_warps": 8, "num_stages": 3}, 32: {"ROWS": 32, "num_warps": 4, "num_stages": 2}}
# Tensor cores multiply float32 as three products of TF32, which together are nearly as precise.
PRECISION = "tf32x3"
_works: dict[Callable, bool] = {}  # by kernel


def replaced(kernel: Callable[..., Tensor], code: Callable[..., Tensor], tolerance: float, *args: Tensor) -> Tensor:
    """``kernel(*args)`` if it works here, else ``code(*args)``; ``tolerance`` as in ``works``."""
    chosen = kernel if works(kernel, code, tolerance, args[0], lambda function: [function(*args)]) else code
    return chosen(*args)


def works(
    kernel: Callable, code: Callable, tolerance: float, x: Tensor, results: Callable[[Callable], Iterable[Tensor]]
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


def _agrees(kernel: Callable, code: Callable, tolerance: float, results: Callable[[Callable], Iterable[Tensor]]) -> bool:
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


if triton is not None:

    @triton.jit
    def _grey(r, g, b):
        return r * 0.299 + g * 0.587 + b * 0.114

    @triton.jit
    def _between(target, x, factor):
        """torch.lerp's formula, then grey levels."""
        moved = tl.where(factor < 0.5, target + factor * (x - target), x - (x - target) * (1 - factor))
        return tl.minimum(tl.maximum(moved, 0.0), 255.0)

    @triton.jit
    def _unit(x):
        return tl.minimum(tl.maximum(x, 0.0), 1.0)

    @triton.jit
    def _adjusted(r, g, b, step, factor, mean):
        """One of the four colour steps, see ``augment._colour_together``."""
        grey = _grey(r, g, b)
        target = tl.where(step == 0, 0.0, tl.where(step == 1, mean, grey))
        top, bottom = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
        chroma = top - bottom
        unit = tl.div_rn(tl.full(r.shape, 255 / 6, tl.float32), tl.maximum(chroma, 1e-6))
        hue = tl.where(r == top, (g - b) * unit, tl.where(g == top, (b - r) * unit + 85, (r - g) * unit + 170))
        turn = factor * 255
        hue = tl.floor(hue) + tl.where(turn < 0, tl.ceil(turn), tl.floor(turn))
        hue = tl.where(hue < 0, hue + 255, hue)
        hue = tl.where(hue >= 255, hue - 255, hue) * (6 / 255)
        turned = step == 3
        r = tl.where(turned, bottom + chroma * _unit(tl.abs(hue - 3) - 1), _between(target, r, factor))
        g = tl.where(turned, bottom + chroma * _unit(2 - tl.abs(hue - 2)), _between(target, g, factor))
        b = tl.where(turned, bottom + chroma * _unit(2 - tl.abs(hue - 4)), _between(target, b, factor))
        return r, g, b

    @triton.jit
    def _colour(x, factors, order, out, n_pixels, BLOCK: tl.constexpr):
        """One image: first the mean grey that its contrast step will find, then all steps."""
        image = tl.program_id(0)
        x += image * 3 * n_pixels
        out += image * 3 * n_pixels
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, n_pixels, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < n_pixels
            r = tl.load(x + at, inside, 0.0)
            g = tl.load(x + n_pixels + at, inside, 0.0)
            b = tl.load(x + 2 * n_pixels + at, inside, 0.0)
            ahead = image >= 0  # of the contrast step: true so far
            for place in range(4):
                step = tl.load(order + image * 4 + place)
                ahead = ahead & (step != 1)
                new_r, new_g, new_b = _adjusted(r, g, b, step, tl.load(factors + image * 4 + place), 0.0)
                r, g, b = tl.where(ahead, new_r, r), tl.where(ahead, new_g, g), tl.where(ahead, new_b, b)
            total += tl.where(inside, _grey(r, g, b), 0.0)
        mean = tl.floor(tl.sum(total, 0) / n_pixels + 0.5)
        for start in range(0, n_pixels, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < n_pixels
            r = tl.load(x + at, inside, 0.0)
            g = tl.load(x + n_pixels + at, inside, 0.0)
            b = tl.load(x + 2 * n_pixels + at, inside, 0.0)
            for place in range(4):
                step = tl.load(order + image * 4 + place)
                r, g, b = _adjusted(r, g, b, step, tl.load(factors + image * 4 + place), mean)
            tl.store(out + at, r, inside)
            tl.store(out + n_pixels + at, g, inside)
            tl.store(out + 2 * n_pixels + at, b, inside)

    # ---- The meta-learner ----

    @triton.jit
    def _sigmoid(x):
        return 1 / (1 + tl.exp(-x))

    @triton.jit
    def _tanh(x):
        """By its series where the quotient would cancel."""
        square = x * x
        series = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835)))))
        power = tl.exp(-2 * tl.abs(x))
        quotient = (1 - power) / (1 + power)
        return tl.where(square < 0.04, series, tl.where(x < 0, -quotient, quotient))

    @triton.jit
    def _prepared(x):
        """metalearner.prep."""
        size = tl.abs(x)
        large = size >= 4.5399929762484854e-05  # exp(-10)
        sign = tl.where(x < 0, -1.0, 1.0)
        return tl.where(large, tl.log(size + 1e-8) / 10, -1.0), tl.where(large, sign, 22026.465794806718 * x)

    @triton.jit
    def _of_gate(loss, w_ih, w_hh, b_ih, b_hh, k, H: tl.constexpr, W: tl.constexpr):
        """Gate k's weights of what ``_read`` makes, [in, out] padded to W x W."""
        into, out = tl.arange(0, W)[:, None], tl.arange(0, W)[None, :]
        row, known = k * H + out, out < H
        found = tl.load(w_hh + row * H + into, known & (into < H), 0.0)
        found += tl.load(w_ih + row * 4 + 2 + into - H, known & (into >= H) & (into < H + 2), 0.0)
        size, sign = _prepared(tl.load(loss))
        bias = tl.load(b_ih + row, known, 0.0) + tl.load(b_hh + row, known, 0.0)
        bias += size * tl.load(w_ih + row * 4, known, 0.0) + sign * tl.load(w_ih + row * 4 + 1, known, 0.0)
        return found + tl.where(into == H + 2, bias, 0.0)

    @triton.jit
    def _read(h, grad, at, P, H: tl.constexpr, W: tl.constexpr):
        """What the gates weigh, [TILE, W]: h, the two numbers of the gradient, and 1 for the rest, which is the same for all
        coordinates; and the gradient."""
        unit = tl.arange(0, W)[None, :]
        g = tl.load(grad + at, at < P, 0.0)
        first, second = _prepared(g)
        x = tl.load(h + at[:, None] * H + unit, (at < P)[:, None] & (unit < H), 0.0)
        x = tl.where(unit == H, first[:, None], tl.where(unit == H + 1, second[:, None], x))
        return tl.where(unit == H + 2, 1.0, x), g

    @triton.jit
    def _meta_forward(
        loss, w_ih, w_hh, b_ih, b_hh, wf, bf, wi, bi, grad, h, c, f, i, theta, new_h, new_c, new_f, new_i, new_theta,
        P, PER, H: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        unit = tl.arange(0, W)
        of_entry = _of_gate(loss, w_ih, w_hh, b_ih, b_hh, 0, H, W)
        of_forget = _of_gate(loss, w_ih, w_hh, b_ih, b_hh, 1, H, W)
        of_candidate = _of_gate(loss, w_ih, w_hh, b_ih, b_hh, 2, H, W)
        of_leave = _of_gate(loss, w_ih, w_hh, b_ih, b_hh, 3, H, W)
        of_f, of_i = tl.load(wf + unit, unit < H, 0.0), tl.load(wi + unit, unit < H, 0.0)
        for start in range(tl.program_id(0) * PER, tl.program_id(0) * PER + PER, TILE):
            at = start + tl.arange(0, TILE)
            inside, places = at < P, at[:, None] * H + unit[None, :]
            square = inside[:, None] & (unit < H)[None, :]
            x, g = _read(h, grad, at, P, H, W)
            entry = _sigmoid(tl.dot(x, of_entry, input_precision="ieee"))
            forget = _sigmoid(tl.dot(x, of_forget, input_precision="ieee"))
            candidate = _tanh(tl.dot(x, of_candidate, input_precision="ieee"))
            leave = _sigmoid(tl.dot(x, of_leave, input_precision="ieee"))
            c_tile = forget * tl.load(c + places, square, 0.0) + entry * candidate
            h_tile = leave * _tanh(c_tile)
            tl.store(new_c + places, c_tile, square)
            tl.store(new_h + places, h_tile, square)
            t, old_f, old_i = tl.load(theta + at, inside, 0.0), tl.load(f + at, inside, 0.0), tl.load(i + at, inside, 0.0)
            f_now = tl.load(bf) + tl.sum(h_tile * of_f[None, :], 1) + t * tl.load(wf + H) + old_f * tl.load(wf + H + 1)
            i_now = tl.load(bi) + tl.sum(h_tile * of_i[None, :], 1) + t * tl.load(wi + H) + old_i * tl.load(wi + H + 1)
            tl.store(new_f + at, f_now, inside)
            tl.store(new_i + at, i_now, inside)
            tl.store(new_theta + at, _sigmoid(f_now) * t - _sigmoid(i_now) * g, inside)

    @triton.jit
    def _store_gate(sums, loss, k, found, H: tl.constexpr, W: tl.constexpr):
        """A program's gradient of gate k's weights and bias."""
        into, out = tl.arange(0, W)[:, None], tl.arange(0, W)[None, :]
        row, known = k * H + out, out < H
        size, sign = _prepared(tl.load(loss))
        last = known & (into == H + 2)
        tl.store(sums + row * 4 + 2 + into - H, found, known & (into >= H) & (into < H + 2))
        tl.store(sums + row * 4 + 0 * into, size * found, last)
        tl.store(sums + row * 4 + 1 + 0 * into, sign * found, last)
        tl.store(sums + 16 * H + row * H + into, found, known & (into < H))
        tl.store(sums + 16 * H + 4 * H * H + row + 0 * into, found, last)

    @triton.jit
    def _meta_backward(
        loss, w_ih, w_hh, b_ih, b_hh, wf, wi, grad, h, c, f, i, theta, new_f, new_i, d_h, d_c, d_f, d_i, d_theta,
        old_d_h, old_d_c, old_d_f, old_d_i, old_d_theta, sums,
        P, PER, N, H: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        """``sums`` takes N numbers per program: the gradients of both weights, of either bias, of WF, bF, WI and bI."""
        unit, two = tl.arange(0, W), tl.arange(0, 16)
        sums += tl.program_id(0) * N
        of_entry = _of_gate(loss, w_ih, w_hh, b_ih, b_hh, 0, H, W)
        of_forget = _of_gate(loss, w_ih, w_hh, b_ih, b_hh, 1, H, W)
        of_candidate = _of_gate(loss, w_ih, w_hh, b_ih, b_hh, 2, H, W)
        of_leave = _of_gate(loss, w_ih, w_hh, b_ih, b_hh, 3, H, W)
        to_entry, to_forget = tl.zeros([W, W], tl.float32), tl.zeros([W, W], tl.float32)
        to_candidate, to_leave = tl.zeros([W, W], tl.float32), tl.zeros([W, W], tl.float32)
        to_cell = tl.zeros([W, 16], tl.float32)
        of_f, of_i = tl.load(wf + unit, unit < H, 0.0), tl.load(wi + unit, unit < H, 0.0)
        for start in range(tl.program_id(0) * PER, tl.program_id(0) * PER + PER, TILE):
            at = start + tl.arange(0, TILE)
            inside, places = at < P, at[:, None] * H + unit[None, :]
            square = inside[:, None] & (unit < H)[None, :]
            x, g = _read(h, grad, at, P, H, W)
            # the cell
            t = tl.load(theta + at, inside, 0.0)
            decay, rate = _sigmoid(tl.load(new_f + at, inside, 0.0)), _sigmoid(tl.load(new_i + at, inside, 0.0))
            d = tl.load(d_theta + at, inside, 0.0)
            d_of_f = tl.load(d_f + at, inside, 0.0) + d * t * decay * (1 - decay)
            d_of_i = tl.load(d_i + at, inside, 0.0) - d * g * rate * (1 - rate)
            tl.store(old_d_theta + at, d * decay + d_of_f * tl.load(wf + H) + d_of_i * tl.load(wi + H), inside)
            tl.store(old_d_f + at, d_of_f * tl.load(wf + H + 1), inside)
            tl.store(old_d_i + at, d_of_i * tl.load(wi + H + 1), inside)
            # the LSTM's gates, a second time
            entry = _sigmoid(tl.dot(x, of_entry, input_precision="ieee"))
            forget = _sigmoid(tl.dot(x, of_forget, input_precision="ieee"))
            candidate = _tanh(tl.dot(x, of_candidate, input_precision="ieee"))
            leave = _sigmoid(tl.dot(x, of_leave, input_precision="ieee"))
            c_tile = tl.load(c + places, square, 0.0)
            squashed = _tanh(forget * c_tile + entry * candidate)
            # what the cell read: the new h, theta, 1, the old f and i
            read = tl.where(unit[None, :] < H, leave * squashed, tl.where(unit[None, :] == H, t[:, None], 0.0))
            read = tl.where(unit[None, :] == H + 1, 1.0, read)
            read = tl.where(unit[None, :] == H + 2, tl.load(f + at, inside, 0.0)[:, None], read)
            read = tl.where(unit[None, :] == H + 3, tl.load(i + at, inside, 0.0)[:, None], read)
            both = tl.where(two[None, :] == 0, d_of_f[:, None], tl.where(two[None, :] == 1, d_of_i[:, None], 0.0))
            to_cell = tl.dot(tl.trans(read), both, to_cell, input_precision="ieee")
            # its backward pass
            d = tl.load(d_h + places, square, 0.0) + d_of_f[:, None] * of_f[None, :] + d_of_i[:, None] * of_i[None, :]
            d_leave = d * squashed * leave * (1 - leave)
            d = tl.load(d_c + places, square, 0.0) + d * leave * (1 - squashed * squashed)
            tl.store(old_d_c + places, d * forget, square)
            d_entry, d_forget = d * candidate * entry * (1 - entry), d * c_tile * forget * (1 - forget)
            d_candidate = d * entry * (1 - candidate * candidate)
            to_entry = tl.dot(tl.trans(x), d_entry, to_entry, input_precision="ieee")
            to_forget = tl.dot(tl.trans(x), d_forget, to_forget, input_precision="ieee")
            to_candidate = tl.dot(tl.trans(x), d_candidate, to_candidate, input_precision="ieee")
            to_leave = tl.dot(tl.trans(x), d_leave, to_leave, input_precision="ieee")
            d = tl.dot(d_entry, tl.trans(of_entry), input_precision="ieee")
            d = tl.dot(d_forget, tl.trans(of_forget), d, input_precision="ieee")
            d = tl.dot(d_candidate, tl.trans(of_candidate), d, input_precision="ieee")
            d = tl.dot(d_leave, tl.trans(of_leave), d, input_precision="ieee")
            tl.store(old_d_h + places, d, square)
        _store_gate(sums, loss, 0, to_entry, H, W)
        _store_gate(sums, loss, 1, to_forget, H, W)
        _store_gate(sums, loss, 2, to_candidate, H, W)
        _store_gate(sums, loss, 3, to_leave, H, W)
        into, which = unit[:, None], two[None, :]
        place = tl.where(into <= H, into, tl.where(into == H + 1, H + 2, H + 1))
        known = (into < H + 2) | ((into == H + 2) & (which == 0)) | ((into == H + 3) & (which == 1))
        tl.store(sums + 4 * H * (H + 5) + which * (H + 3) + place, to_cell, known & (which < 2))

    # ---- Blocks of the learner ----
    #
    # Images are channels last: a pixel's C numbers lie side by side. Each program works on PER pixels or 2x2 windows, ROWS at
    # once. Where a size is odd, the windows at the edge are cut, and pooling leaves them out.

    @triton.jit
    def _seen(x, at, row, column, tap, P, H, W, C: tl.constexpr):
        """What 3x3 filters see around pixels ``at`` [ROWS, 1], [ROWS, 32]: of 32 channels what lies at place ``tap`` of the
        nine; of 3 channels all nine places, channel by channel."""
        number = tl.arange(0, 32)[None, :]
        if C == 3:
            channel, tap = number // 9, number % 9
        else:
            channel = number
        down, right = tap // 3 - 1, tap % 3 - 1
        row, column = row + down, column + right
        inside = (at < P) & (channel < C) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        return tl.load(x + (at + down * W + right) * C + channel, inside, 0.0)

    @triton.jit
    def _filters(weight, tap, C: tl.constexpr):
        """The weights of what ``_seen`` takes, [filter, 32]."""
        out, number = tl.arange(0, 32)[:, None], tl.arange(0, 32)[None, :]
        if C == 3:
            return tl.load(weight + out * 27 + number, number < 27, 0.0)
        return tl.load(weight + (out * C + number) * 9 + tap)

    @triton.jit
    def _convolve(
        x, weight, y, P, H, W,
        BACK: tl.constexpr, TAPS: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """A 3x3 convolution to 32 channels; or, if BACK, from the gradient of one's output to that of its input."""
        at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        row, column = at // W % H, at % W
        total = tl.zeros([ROWS, 32], tl.float32)
        for tap in range(TAPS):
            seen = _seen(x, at, row, column, tap, P, H, W, C)
            if BACK:
                total = tl.dot(seen, _filters(weight, TAPS - 1 - tap, C).to(seen.dtype), total, input_precision=PRECISION)
            else:
                total = tl.dot(seen, tl.trans(_filters(weight, tap, C).to(seen.dtype)), total, input_precision=PRECISION)
        tl.store(y + at * 32 + tl.arange(0, 32)[None, :], total, at < P)

    @triton.jit
    def _filters_backward(
        x, grad, parts, P, PER, H, W, C: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr
    ):  # fmt: skip
        """Each program's share of the gradient of the filters; of 32 channels, for one of their three lines."""
        part, line = tl.program_id(0), tl.program_id(1) * 3
        out, number = tl.arange(0, 32)[:, None], tl.arange(0, 32)[None, :]
        left, middle, right = (tl.zeros([32, 32], tl.float32), tl.zeros([32, 32], tl.float32), tl.zeros([32, 32], tl.float32))
        for start in range(part * PER, part * PER + PER, ROWS):
            at = start + tl.arange(0, ROWS)[:, None]
            row, column = at // W % H, at % W
            d = tl.trans(tl.load(grad + at * 32 + number, at < P, 0.0))
            left = tl.dot(d, _seen(x, at, row, column, line, P, H, W, C), left, input_precision=PRECISION)
            if C == 32:
                middle = tl.dot(d, _seen(x, at, row, column, line + 1, P, H, W, C), middle, input_precision=PRECISION)
                right = tl.dot(d, _seen(x, at, row, column, line + 2, P, H, W, C), right, input_precision=PRECISION)
        if C == 3:
            tl.store(parts + part * 32 * 27 + out * 27 + number, left, number < 27)
        else:
            places = parts + ((part * 32 + out) * 32 + number) * 9 + line
            tl.store(places, left)
            tl.store(places + 1, middle)
            tl.store(places + 2, right)

    @triton.jit
    def _merged(n, mean, squares):
        """Mean and sum of squared deviations [C] of groups taken together: n [groups, 1], mean and squares [groups, C]."""
        together = tl.sum(n * mean, 0) / tl.sum(n, 0)
        off = mean - together[None, :]
        return together, tl.sum(squares + n * off * off, 0)

    @triton.jit
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

    @triton.jit
    def _pixel(at, k, N, H, W):
        """Where pixel k of the windows ``at`` lies, and whether the image has it."""
        wide, high = (W + 1) // 2, (H + 1) // 2
        column, row = at % wide * 2 + k % 2, at // wide % high * 2 + k // 2
        return (at // wide // high * H + row) * W + column, (at < N) & (row < H) & (column < W)

    @triton.jit
    def _pooled(at, H, W):
        """Where the maximum of the windows ``at`` lies."""
        wide, high = (W + 1) // 2, (H + 1) // 2
        return (at // wide // high * (H // 2) + at // wide % high) * (W // 2) + at % wide

    @triton.jit
    def _largest(y, at, N, H, W, mean, scale, beta, C: tl.constexpr):
        """The largest normalised pixel of windows as PyTorch picks it: its value, what it was, its number; and uncut windows.

        ``fma`` rounds in one way wherever it is compiled: the backward pass must pick the same pixel.
        """
        channel = tl.arange(0, C)[None, :]
        for k in tl.static_range(4):
            place, inside = _pixel(at, k, N, H, W)
            x = tl.load(y + place * C + channel, inside, 0.0).to(tl.float32)
            z = tl.fma(x - mean[None, :], scale[None, :] + tl.zeros_like(x), beta[None, :] + tl.zeros_like(x))
            z = z.to(y.dtype.element_ty).to(tl.float32)
            if k == 0:
                best, raw, which = z, x, tl.zeros(z.shape, tl.int32)
            else:
                better = (z > best) | (z != z)
                best, raw, which = tl.where(better, z, best), tl.where(better, x, raw), tl.where(better, k, which)
        return best, raw, which, inside  # pixel 3 is there if all are

    @triton.jit
    def _block_forward(
        y, parts, gamma, beta, bias, running_mean, running_var, used, out, momentum, eps, P, PER_OF_P, N, PER, H, W,
        TRAIN: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        """Normalisation, pooling, ReLU; the first program also updates the running statistics, to which ``bias`` belongs."""
        program, channel = tl.program_id(0), tl.arange(0, C)
        if TRAIN:
            part = tl.arange(0, PARTS)[:, None]
            n = tl.minimum(tl.maximum(P - part * PER_OF_P, 0), PER_OF_P).to(tl.float32)
            places = parts + part * C + channel[None, :]
            mean, squares = _merged(n, tl.load(places, n > 0, 0.0), tl.load(places + PARTS * C, n > 0, 0.0))
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
            tl.store(out + _pooled(at, H, W) * C + channel[None, :], tl.where(best <= 0, 0.0, best), whole)

    @triton.jit
    def _arrived(y, grad, at, N, H, W, mean, scale, beta, C: tl.constexpr):
        """The gradient that windows' largest normalised pixels get, what these pixels were, their numbers."""
        best, raw, which, whole = _largest(y, at, N, H, W, mean, scale, beta, C)
        d = tl.load(grad + _pooled(at, H, W) * C + tl.arange(0, C)[None, :], whole, 0.0).to(tl.float32)
        return tl.where(best <= 0, 0.0, d), raw, which

    @triton.jit
    def _block_sums(y, used, gamma, beta, grad, parts, N, PER, H, W, C: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr):
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

    @triton.jit
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
                moved = tl.where(which == k, d, 0.0) - level[None, :] - (x - mean[None, :]) * slope[None, :]
                tl.store(d_y + place * C + channel[None, :], scale[None, :] * moved, inside)


def colour(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """``augment._colour_together`` in one launch."""
    x, order = x.contiguous(), order.contiguous()
    out = torch.empty_like(x)
    _colour[(len(x),)](x, factors.gather(1, order), order, out, x.shape[2] * x.shape[3], BLOCK=1024, num_warps=WARPS)
    return out


class MetaStep(torch.autograd.Function):
    """One update of the meta-learner: (loss, the LSTM's four parameters, WF, bF, WI, bI, grad, *MetaState) -> MetaState."""

    @staticmethod
    def forward(ctx, *inputs):
        inputs = [t.contiguous() for t in inputs]
        *lstm, wf, _, wi, _, grad = inputs[:10]
        state = inputs[10:]
        new = [torch.empty_like(t) for t in state]
        per, programs = _shares(len(grad), TILE, META_PARTS)
        _meta_forward[programs](*inputs, *new, len(grad), per, **_sizes(state[0].shape[1]))
        ctx.save_for_backward(*lstm, wf, wi, grad, *state, new[2], new[3])
        return tuple(new)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        _, *weights, bias, _, wf, wi, grad = saved[:8]
        state = saved[8:13]
        made, (per, programs) = [torch.empty_like(t) for t in state], _shares(len(grad), TILE, META_PARTS)
        shapes = [t.shape for t in (*weights, bias, wf, wf[:1], wi, wi[:1])]
        n = sum(shape.numel() for shape in shapes)
        sums = grad.new_empty(*programs, n)
        args = (*saved, *(g.contiguous() for g in grads), *made, sums, len(grad), per, n)
        _meta_backward[programs](*args, **_sizes(state[0].shape[1]), **BACKWARD)
        parts = sums.sum(0).split([shape.numel() for shape in shapes])
        w_ih, w_hh, bias, *cell = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        return None, w_ih, w_hh, bias, bias, *cell, None, *made


def _sizes(hidden_size: int) -> dict[str, object]:
    """The kernels' constants; Triton multiplies matrices of powers of two from 16 on."""
    width = max(16, 1 << (hidden_size + 3).bit_length())
    return {"H": hidden_size, "W": width, "TILE": TILE, "num_warps": WARPS}


# ---- Blocks of the learner ----


def handles_block(x: Tensor, weight: Tensor) -> bool:
    """Whether ``train_block`` and ``eval_block`` are written for this input and these filters."""
    return weight.shape[:2] in ((N_FILTERS, 3), (N_FILTERS, N_FILTERS)) and x[:, 0].numel() * N_FILTERS < 2**31


def train_block(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """See ``learner.train_block``."""
    running = norm.running_mean, norm.running_var, norm.momentum, norm.eps
    return NormPoolReLU.apply(_convolved(x, conv), norm.weight, norm.bias, conv.bias.detach(), *running)


def eval_block(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """See ``learner.eval_block``; without a graph."""
    running = norm.running_mean, norm.running_var, norm.momentum, norm.eps
    return _normalised(_convolved(x, conv), norm.weight, norm.bias, conv.bias, *running, train=False)[0]


def _convolved(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Without the bias, which batch normalisation takes away or the kernel adds."""
    return Convolution.apply(x, conv.weight)


class Convolution(torch.autograd.Function):
    """A 3x3 convolution, padded by 1, without bias: (x [B, 3 or 32, H, W], weight [32, 3 or 32, 3, 3]) -> [B, 32, H, W] in
    x's dtype, channels last; the filters' gradient is in theirs."""

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
        pixels, _, *size = _counts(x)
        how = {"C": x.shape[1], "PRECISION": PRECISION, **OF_FILTERS[x.shape[1]]}
        per, programs = _shares(pixels, how["ROWS"], PARTS_OF_FILTERS)
        parts = weight.new_empty(*programs, *weight.shape)
        _filters_backward[(*programs, 1 if x.shape[1] == 3 else 3)](x, grad, parts, pixels, per, *size, **how)
        of_x = None
        if ctx.needs_input_grad[0] and x.shape[1] == 3:  # nothing wants it but a check
            of_x = torch.nn.grad.conv2d_input(x.shape, weight.to(x.dtype), grad, padding=1)
        elif ctx.needs_input_grad[0]:
            of_x = _passed(grad, weight, back=True)
        return of_x, parts.sum(0)


def _passed(x: Tensor, weight: Tensor, back: bool = False) -> Tensor:
    """``_convolve`` of channels-last images."""
    pixels, _, *size = _counts(x)
    out = torch.empty(len(x), N_FILTERS, *size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    how = {"BACK": back, "TAPS": 1 if x.shape[1] == 3 else 9, "C": x.shape[1], "ROWS": CONV_ROWS, "PRECISION": PRECISION}
    _convolve[(-(-pixels // CONV_ROWS),)](x, weight, out, pixels, *size, num_warps=CONV_WARPS, **how)
    return out


def _shares(n: int, rows: int, parts: int) -> tuple[int, tuple[int]]:
    """How many of n pixels, windows or coordinates a program works on, ``rows`` at once, and the ``parts`` programs at most."""
    per = -(-n // (rows * parts)) * rows
    return per, (-(-n // per),)


def _counts(y: Tensor) -> tuple[int, int, int, int]:
    """Pixels, windows (cut ones, too), height and width."""
    n, _, height, width = y.shape
    return n * height * width, n * -(-height // 2) * -(-width // 2), height, width


def _normalised(y, gamma, beta, bias, running_mean, running_var, momentum, eps, train):
    """The block's output, and the batch's mean and 1 / deviation [2, C] if ``train``."""
    (pixels, windows, height, width), channels = _counts(y), y.shape[1]
    parts, used = gamma.new_empty(2, PARTS, channels), gamma.new_empty(2, channels)
    shape, sizes = (len(y), channels, height // 2, width // 2), {"C": channels, "PARTS": PARTS, "num_warps": BLOCK_WARPS}
    out = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
    per_of_pixels, programs = _shares(pixels, 4 * ROWS, PARTS)
    if train:
        _moments[programs](y, parts, pixels, per_of_pixels, ROWS=4 * ROWS, **sizes)
    per, programs = _shares(windows, ROWS, PARTS)
    args = (y, parts, gamma, beta, bias, running_mean, running_var, used, out, momentum, eps)
    _block_forward[programs](*args, pixels, per_of_pixels, windows, per, height, width, TRAIN=train, ROWS=ROWS, **sizes)
    return out, used


class NormPoolReLU(torch.autograd.Function):
    """What follows a block's convolution in training: normalisation by the batch's statistics, 2x2 max-pooling, ReLU.

    (convolution's output without its bias, channels last, gamma, beta, that bias, running mean and variance, momentum, eps) ->
    output, channels last. The running statistics are updated. The backward pass normalises and picks the maxima a second time:
    beside the convolution's output it keeps nothing.
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
        per, programs = _shares(windows, ROWS, PARTS)
        parts, made = gamma.new_empty(2, PARTS, len(gamma)), [torch.empty_like(t) for t in (gamma, beta, y)]
        sizes = {"C": len(gamma), "ROWS": ROWS, "PARTS": PARTS, "num_warps": BLOCK_WARPS}
        _block_sums[programs](y, used, gamma, beta, grad, parts, windows, per, *size, **sizes)
        _block_backward[programs](y, used, gamma, beta, grad, parts, *made, pixels, windows, per, *size, **sizes)
        return made[2], *made[:2], *[None] * 5
