"""An update of the meta-learner and its backward pass, which computes the gates a second time.

Each program works on PER coordinates, TILE at once.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from fast.gpu import jit, shares, tl

TILE, WARPS = 32, 8  # with fewer warps, or with larger tiles, the numbers do not fit into registers
BACKWARD = {"num_stages": 1, "maxnreg": 128}  # of the backward pass: two programs share a processor
PARTS = 264  # programs at most: two for each processor of a large GPU
LARGEST_HIDDEN = 28  # with what else the gates read, 32


@jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@jit
def _tanh(x):
    """By its series where the quotient would cancel."""
    square = x * x
    series = x * (
        1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835))))
    )
    power = tl.exp(-2 * tl.abs(x))
    quotient = (1 - power) / (1 + power)
    return tl.where(square < 0.04, series, tl.where(x < 0, -quotient, quotient))


@jit
def _prepared(x):
    """metalearner.prep."""
    size = tl.abs(x)
    large = size >= 4.5399929762484854e-05  # exp(-10)
    sign = tl.where(x < 0, -1.0, 1.0)
    return tl.where(large, tl.log(size + 1e-8) / 10, -1.0), tl.where(
        large, sign, 22026.465794806718 * x
    )


@jit
def _of_gate(loss, w_ih, w_hh, b_ih, b_hh, k, H: tl.constexpr, W: tl.constexpr):
    """Gate k's weights of what ``_read`` makes, [in, out] padded to W x W."""
    into, out = tl.arange(0, W)[:, None], tl.arange(0, W)[None, :]
    row, known = k * H + out, out < H
    found = tl.load(w_hh + row * H + into, known & (into < H), 0.0)
    found += tl.load(w_ih + row * 4 + 2 + into - H, known & (into >= H) & (into < H + 2), 0.0)
    size, sign = _prepared(tl.load(loss))
    bias = tl.load(b_ih + row, known, 0.0) + tl.load(b_hh + row, known, 0.0)
    bias += size * tl.load(w_ih + row * 4, known, 0.0) + sign * tl.load(
        w_ih + row * 4 + 1, known, 0.0
    )
    return found + tl.where(into == H + 2, bias, 0.0)


@jit
def _of_gates(loss, w_ih, w_hh, b_ih, b_hh, H: tl.constexpr, W: tl.constexpr):
    """The weights of all four; PyTorch calls them the input, forget, cell and output gate."""
    of_entry = _of_gate(loss, w_ih, w_hh, b_ih, b_hh, 0, H, W)
    of_forget = _of_gate(loss, w_ih, w_hh, b_ih, b_hh, 1, H, W)
    of_candidate = _of_gate(loss, w_ih, w_hh, b_ih, b_hh, 2, H, W)
    return of_entry, of_forget, of_candidate, _of_gate(loss, w_ih, w_hh, b_ih, b_hh, 3, H, W)


@jit
def _gates(x, of_entry, of_forget, of_candidate, of_leave):
    """The LSTM's four gates, [TILE, W] each."""
    entry = _sigmoid(tl.dot(x, of_entry, input_precision="ieee"))
    forget = _sigmoid(tl.dot(x, of_forget, input_precision="ieee"))
    candidate = _tanh(tl.dot(x, of_candidate, input_precision="ieee"))
    return entry, forget, candidate, _sigmoid(tl.dot(x, of_leave, input_precision="ieee"))


@jit
def _read(h, grad, at, P, H: tl.constexpr, W: tl.constexpr):
    """What the gates weigh, [TILE, W]: h, the two numbers of the gradient, and 1 for the rest,
    which is the same for all coordinates; and the gradient.
    """
    unit = tl.arange(0, W)[None, :]
    g = tl.load(grad + at, at < P, 0.0)
    first, second = _prepared(g)
    x = tl.load(h + at[:, None] * H + unit, (at < P)[:, None] & (unit < H), 0.0)
    x = tl.where(unit == H, first[:, None], tl.where(unit == H + 1, second[:, None], x))
    return tl.where(unit == H + 2, 1.0, x), g


@jit
def _meta_forward(
    loss, w_ih, w_hh, b_ih, b_hh, wf, bf, wi, bi, grad, h, c, f, i, theta, new_h, new_c, new_f, new_i, new_theta,
    P, PER, H: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    unit = tl.arange(0, W)
    of_entry, of_forget, of_candidate, of_leave = _of_gates(loss, w_ih, w_hh, b_ih, b_hh, H, W)
    of_f, of_i = tl.load(wf + unit, unit < H, 0.0), tl.load(wi + unit, unit < H, 0.0)
    for start in range(tl.program_id(0) * PER, tl.program_id(0) * PER + PER, TILE):
        at = start + tl.arange(0, TILE)
        inside, places = at < P, at[:, None] * H + unit[None, :]
        square = inside[:, None] & (unit < H)[None, :]
        x, g = _read(h, grad, at, P, H, W)
        entry, forget, candidate, leave = _gates(x, of_entry, of_forget, of_candidate, of_leave)
        c_tile = forget * tl.load(c + places, square, 0.0) + entry * candidate
        h_tile = leave * _tanh(c_tile)
        tl.store(new_c + places, c_tile, square)
        tl.store(new_h + places, h_tile, square)
        t, old_f, old_i = (
            tl.load(theta + at, inside, 0.0),
            tl.load(f + at, inside, 0.0),
            tl.load(i + at, inside, 0.0),
        )
        f_now = (
            tl.load(bf)
            + tl.sum(h_tile * of_f[None, :], 1)
            + t * tl.load(wf + H)
            + old_f * tl.load(wf + H + 1)
        )
        i_now = (
            tl.load(bi)
            + tl.sum(h_tile * of_i[None, :], 1)
            + t * tl.load(wi + H)
            + old_i * tl.load(wi + H + 1)
        )
        tl.store(new_f + at, f_now, inside)
        tl.store(new_i + at, i_now, inside)
        tl.store(new_theta + at, _sigmoid(f_now) * t - _sigmoid(i_now) * g, inside)


@jit
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


@jit
def _meta_backward(
    loss, w_ih, w_hh, b_ih, b_hh, wf, wi, grad, h, c, f, i, theta, new_f, new_i, d_h, d_c, d_f, d_i, d_theta,
    old_d_h, old_d_c, old_d_f, old_d_i, old_d_theta, sums,
    P, PER, N, H: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``sums`` takes N numbers per program: the gradients of both weights, of either bias, of WF,
    bF, WI and bI.
    """
    unit, two = tl.arange(0, W), tl.arange(0, 16)
    sums += tl.program_id(0) * N
    of_entry, of_forget, of_candidate, of_leave = _of_gates(loss, w_ih, w_hh, b_ih, b_hh, H, W)
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
        decay, rate = (
            _sigmoid(tl.load(new_f + at, inside, 0.0)),
            _sigmoid(tl.load(new_i + at, inside, 0.0)),
        )
        d = tl.load(d_theta + at, inside, 0.0)
        d_of_f = tl.load(d_f + at, inside, 0.0) + d * t * decay * (1 - decay)
        d_of_i = tl.load(d_i + at, inside, 0.0) - d * g * rate * (1 - rate)
        tl.store(
            old_d_theta + at,
            d * decay + d_of_f * tl.load(wf + H) + d_of_i * tl.load(wi + H),
            inside,
        )
        tl.store(old_d_f + at, d_of_f * tl.load(wf + H + 1), inside)
        tl.store(old_d_i + at, d_of_i * tl.load(wi + H + 1), inside)
        # the LSTM's gates, a second time
        entry, forget, candidate, leave = _gates(x, of_entry, of_forget, of_candidate, of_leave)
        c_tile = tl.load(c + places, square, 0.0)
        squashed = _tanh(forget * c_tile + entry * candidate)
        # what the cell read: the new h, theta, 1, the old f and i
        read = tl.where(
            unit[None, :] < H, leave * squashed, tl.where(unit[None, :] == H, t[:, None], 0.0)
        )
        read = tl.where(unit[None, :] == H + 1, 1.0, read)
        read = tl.where(unit[None, :] == H + 2, tl.load(f + at, inside, 0.0)[:, None], read)
        read = tl.where(unit[None, :] == H + 3, tl.load(i + at, inside, 0.0)[:, None], read)
        both = tl.where(
            two[None, :] == 0, d_of_f[:, None], tl.where(two[None, :] == 1, d_of_i[:, None], 0.0)
        )
        to_cell = tl.dot(tl.trans(read), both, to_cell, input_precision="ieee")
        # its backward pass
        d = (
            tl.load(d_h + places, square, 0.0)
            + d_of_f[:, None] * of_f[None, :]
            + d_of_i[:, None] * of_i[None, :]
        )
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


class MetaStep(torch.autograd.Function):
    """One update of the meta-learner: (loss, the LSTM's four parameters, WF, bF, WI, bI, grad,
    *MetaState) -> MetaState.
    """

    @staticmethod
    def forward(ctx, *inputs):
        inputs = [t.contiguous() for t in inputs]
        *lstm, wf, _, wi, _, grad = inputs[:10]
        state = inputs[10:]
        new = [torch.empty_like(t) for t in state]
        per, programs = shares(len(grad), TILE, PARTS)
        _meta_forward[programs](*inputs, *new, len(grad), per, **_sizes(state[0].shape[1]))
        ctx.save_for_backward(*lstm, wf, wi, grad, *state, new[2], new[3])
        return tuple(new)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        _, *weights, bias, _, wf, wi, grad = saved[:8]
        state = saved[8:13]
        made, (per, programs) = [torch.empty_like(t) for t in state], shares(len(grad), TILE, PARTS)
        shapes = [t.shape for t in (*weights, bias, wf, wf[:1], wi, wi[:1])]
        n = sum(shape.numel() for shape in shapes)
        sums = grad.new_empty(*programs, n)
        args = (*saved, *(g.contiguous() for g in grads), *made, sums, len(grad), per, n)
        _meta_backward[programs](*args, **_sizes(state[0].shape[1]), **BACKWARD)
        parts = sums.sum(0).split([shape.numel() for shape in shapes])
        w_ih, w_hh, bias, *cell = (
            part.view(shape) for part, shape in zip(parts, shapes, strict=True)
        )
        return None, w_ih, w_hh, bias, bias, *cell, None, *made


def _sizes(hidden_size: int) -> dict[str, object]:
    """The kernels' constants; Triton multiplies matrices of powers of two from 16 on."""
    width = max(16, 1 << (hidden_size + 3).bit_length())
    return {"H": hidden_size, "W": width, "TILE": TILE, "num_warps": WARPS}
