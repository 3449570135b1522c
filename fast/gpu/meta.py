"""An update of the meta-learner and its backward pass, which recomputes the gates.

Each program works on PER coordinates, TILE at once. LSTM gates have PyTorch's names: input i,
forget f, cell g and output o. The cell's own gates are called decay (forget) and rate (input).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast.gpu import INT32, jit, launch, shares, tl
from metalearner import MetaState

TILE, WARPS = 32, 8  # fewer warps or larger tiles spill registers
# options of the backward pass: two programs share a multiprocessor
BACKWARD = {"num_stages": 1, "maxnreg": 128}
MAX_PARTS = 264  # most programs: two for each multiprocessor of a large GPU
LARGEST_HIDDEN = 28  # with the gates' other inputs, 32


@jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@jit
def _tanh(x):
    """The Taylor series near 0, where the quotient would cancel."""
    square = x * x
    series = square * (17 / 315 - square * (62 / 2835))
    series = x * (1 - square * (1 / 3 - square * (2 / 15 - series)))
    power = tl.exp(-2 * tl.abs(x))
    quotient = (1 - power) / (1 + power)
    return tl.where(square < 0.04, series, tl.where(x < 0, -quotient, quotient))


@jit
def _prep(x):
    """metalearner.prep."""
    size = tl.abs(x)
    large = size >= 4.5399929762484854e-05  # exp(-10)
    sign = tl.where(x < 0, -1.0, 1.0)
    first = tl.where(large, tl.log(size + 1e-8) / 10, -1.0)
    return first, tl.where(large, sign, 22026.465794806718 * x)


@jit
def _through_prep(x, d_first, d_second):
    """The gradient of ``_prep``'s input."""
    size = tl.abs(x)
    sign = tl.where(x < 0, -1.0, 1.0)
    return tl.where(
        size >= 4.5399929762484854e-05,
        d_first * sign / (10 * (size + 1e-8)),
        22026.465794806718 * d_second,
    )


@jit
def _gate_weights(loss, w_ih, w_hh, b_ih, b_hh, k, H: tl.constexpr, W: tl.constexpr):
    """Gate k's weights for the inputs that ``_gate_inputs`` loads, [in, out], padded to W x W."""
    into, out = tl.arange(0, W)[:, None], tl.arange(0, W)[None, :]
    row, valid = k * H + out, out < H
    w = tl.load(w_hh + row * H + into, valid & (into < H), 0.0)
    w += tl.load(w_ih + row * 4 + 2 + into - H, valid & (into >= H) & (into < H + 2), 0.0)
    size, sign = _prep(tl.load(loss))
    bias = tl.load(b_ih + row, valid, 0.0) + tl.load(b_hh + row, valid, 0.0)
    of_size, of_sign = tl.load(w_ih + row * 4, valid, 0.0), tl.load(w_ih + row * 4 + 1, valid, 0.0)
    bias += size * of_size + sign * of_sign
    return w + tl.where(into == H + 2, bias, 0.0)


@jit
def _all_weights(loss, w_ih, w_hh, b_ih, b_hh, H: tl.constexpr, W: tl.constexpr):
    """The weights of the gates i, f, g and o."""
    w_i = _gate_weights(loss, w_ih, w_hh, b_ih, b_hh, 0, H, W)
    w_f = _gate_weights(loss, w_ih, w_hh, b_ih, b_hh, 1, H, W)
    w_g = _gate_weights(loss, w_ih, w_hh, b_ih, b_hh, 2, H, W)
    return w_i, w_f, w_g, _gate_weights(loss, w_ih, w_hh, b_ih, b_hh, 3, H, W)


@jit
def _gates(x, w_i, w_f, w_g, w_o):
    """The LSTM's gates i, f, g and o, [TILE, W] each."""
    i = _sigmoid(tl.dot(x, w_i, input_precision="ieee"))
    f = _sigmoid(tl.dot(x, w_f, input_precision="ieee"))
    g = _tanh(tl.dot(x, w_g, input_precision="ieee"))
    return i, f, g, _sigmoid(tl.dot(x, w_o, input_precision="ieee"))


@jit
def _gate_inputs(h, grad, at, P, H: tl.constexpr, W: tl.constexpr):
    """The gates' inputs [TILE, W]: h, the two numbers of prep(grad), and 1 for the bias, which
    includes prep(loss); and the gradient [TILE].
    """
    unit = tl.arange(0, W)[None, :]
    grad_tile = tl.load(grad + at, at < P, 0.0)
    first, second = _prep(grad_tile)
    x = tl.load(h + at[:, None] * H + unit, (at < P)[:, None] & (unit < H), 0.0)
    x = tl.where(unit == H, first[:, None], tl.where(unit == H + 1, second[:, None], x))
    return tl.where(unit == H + 2, 1.0, x), grad_tile


@jit
def _meta_forward(
    loss, w_ih, w_hh, b_ih, b_hh, wf, bf, wi, bi, grad, h, c, f, i, theta,
    new_h, new_c, new_f, new_i, new_theta,
    P, PER, H: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    unit = tl.arange(0, W)
    w_i, w_f, w_g, w_o = _all_weights(loss, w_ih, w_hh, b_ih, b_hh, H, W)
    w_decay, w_rate = tl.load(wf + unit, unit < H, 0.0), tl.load(wi + unit, unit < H, 0.0)
    for start in range(tl.program_id(0) * PER, tl.program_id(0) * PER + PER, TILE):
        at = start + tl.arange(0, TILE)
        inside, places = at < P, at[:, None] * H + unit[None, :]
        square = inside[:, None] & (unit < H)[None, :]
        x, g = _gate_inputs(h, grad, at, P, H, W)
        i_gate, f_gate, g_gate, o_gate = _gates(x, w_i, w_f, w_g, w_o)
        c_tile = f_gate * tl.load(c + places, square, 0.0) + i_gate * g_gate
        h_tile = o_gate * _tanh(c_tile)
        tl.store(new_c + places, c_tile, square)
        tl.store(new_h + places, h_tile, square)
        t, old_f = tl.load(theta + at, inside, 0.0), tl.load(f + at, inside, 0.0)
        old_i = tl.load(i + at, inside, 0.0)
        decay = tl.load(bf) + tl.sum(h_tile * w_decay[None, :], 1)
        decay = decay + t * tl.load(wf + H) + old_f * tl.load(wf + H + 1)
        rate = tl.load(bi) + tl.sum(h_tile * w_rate[None, :], 1)
        rate = rate + t * tl.load(wi + H) + old_i * tl.load(wi + H + 1)
        tl.store(new_f + at, decay, inside)
        tl.store(new_i + at, rate, inside)
        tl.store(new_theta + at, _sigmoid(decay) * t - _sigmoid(rate) * g, inside)


@jit
def _add(sums, at, value, valid, ADD: tl.constexpr):
    """Store a gradient, or add it to what is there."""
    if ADD:
        value += tl.load(sums + at, valid, 0.0)
    tl.store(sums + at, value, valid)


@jit
def _store_gate(sums, loss, k, d_w, H: tl.constexpr, W: tl.constexpr, ADD: tl.constexpr):
    """A program's gradient of gate k's weights and bias."""
    into, out = tl.arange(0, W)[:, None], tl.arange(0, W)[None, :]
    row, valid = k * H + out, out < H
    size, sign = _prep(tl.load(loss))
    last = valid & (into == H + 2)
    _add(sums, row * 4 + 2 + into - H, d_w, valid & (into >= H) & (into < H + 2), ADD)
    _add(sums, row * 4 + 0 * into, size * d_w, last, ADD)
    _add(sums, row * 4 + 1 + 0 * into, sign * d_w, last, ADD)
    _add(sums, 16 * H + row * H + into, d_w, valid & (into < H), ADD)
    _add(sums, 16 * H + 4 * H * H + row + 0 * into, d_w, last, ADD)


@jit
def _of_loss(w_ih, k, d_w, H: tl.constexpr, W: tl.constexpr):
    """A program's gradients of the two numbers of prep(loss), through gate k's bias."""
    into, out = tl.arange(0, W)[:, None], tl.arange(0, W)[None, :]
    row, last = k * H + out + 0 * into, (out < H) & (into == H + 2)
    d_size = tl.sum(tl.sum(tl.load(w_ih + row * 4, last, 0.0) * d_w, 1), 0)
    return d_size, tl.sum(tl.sum(tl.load(w_ih + row * 4 + 1, last, 0.0) * d_w, 1), 0)


@jit
def _meta_backward(
    loss, w_ih, w_hh, b_ih, b_hh, wf, wi, grad, h, c, f, i, theta, new_f, new_i,
    d_h, d_c, d_f, d_i, d_theta, old_d_h, old_d_c, old_d_f, old_d_i, old_d_theta,
    d_losses, d_grad, sums,
    P, PER, N, H: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr, ADD: tl.constexpr,
    INPUTS: tl.constexpr,
):  # fmt: skip
    """``sums`` takes N numbers per program: the gradients of both weights, of either bias, of WF,
    bF, WI and bI; with ADD they are added to those of later updates. With INPUTS, ``d_losses``
    takes each program's share of the loss's gradient, and ``d_grad`` the learner's gradient's.
    """
    unit, two = tl.arange(0, W), tl.arange(0, 16)
    sums += tl.program_id(0) * N
    w_i, w_f, w_g, w_o = _all_weights(loss, w_ih, w_hh, b_ih, b_hh, H, W)
    dw_i, dw_f = tl.zeros([W, W], tl.float32), tl.zeros([W, W], tl.float32)
    dw_g, dw_o = tl.zeros([W, W], tl.float32), tl.zeros([W, W], tl.float32)
    dw_cell = tl.zeros([W, 16], tl.float32)
    w_decay, w_rate = tl.load(wf + unit, unit < H, 0.0), tl.load(wi + unit, unit < H, 0.0)
    for start in range(tl.program_id(0) * PER, tl.program_id(0) * PER + PER, TILE):
        at = start + tl.arange(0, TILE)
        inside, places = at < P, at[:, None] * H + unit[None, :]
        square = inside[:, None] & (unit < H)[None, :]
        x, g = _gate_inputs(h, grad, at, P, H, W)
        # the cell's backward pass
        t, decay = tl.load(theta + at, inside, 0.0), _sigmoid(tl.load(new_f + at, inside, 0.0))
        rate = _sigmoid(tl.load(new_i + at, inside, 0.0))
        d = tl.load(d_theta + at, inside, 0.0)
        of_grad = -d * rate
        d_decay = tl.load(d_f + at, inside, 0.0) + d * t * decay * (1 - decay)
        d_rate = tl.load(d_i + at, inside, 0.0) - d * g * rate * (1 - rate)
        old_d = old_d_theta + at
        tl.store(old_d, d * decay + d_decay * tl.load(wf + H) + d_rate * tl.load(wi + H), inside)
        tl.store(old_d_f + at, d_decay * tl.load(wf + H + 1), inside)
        tl.store(old_d_i + at, d_rate * tl.load(wi + H + 1), inside)
        # the LSTM's gates again
        i_gate, f_gate, g_gate, o_gate = _gates(x, w_i, w_f, w_g, w_o)
        c_tile = tl.load(c + places, square, 0.0)
        squashed = _tanh(f_gate * c_tile + i_gate * g_gate)
        # the cell's inputs: the new h, theta, 1, the old f and i
        read = tl.where(
            unit[None, :] < H, o_gate * squashed, tl.where(unit[None, :] == H, t[:, None], 0.0)
        )
        read = tl.where(unit[None, :] == H + 1, 1.0, read)
        read = tl.where(unit[None, :] == H + 2, tl.load(f + at, inside, 0.0)[:, None], read)
        read = tl.where(unit[None, :] == H + 3, tl.load(i + at, inside, 0.0)[:, None], read)
        both = tl.where(
            two[None, :] == 0, d_decay[:, None], tl.where(two[None, :] == 1, d_rate[:, None], 0.0)
        )
        dw_cell = tl.dot(tl.trans(read), both, dw_cell, input_precision="ieee")
        # the LSTM's backward pass
        d = tl.load(d_h + places, square, 0.0)
        d = d + d_decay[:, None] * w_decay[None, :] + d_rate[:, None] * w_rate[None, :]
        do_gate = d * squashed * o_gate * (1 - o_gate)
        d = tl.load(d_c + places, square, 0.0) + d * o_gate * (1 - squashed * squashed)
        tl.store(old_d_c + places, d * f_gate, square)
        di_gate = d * g_gate * i_gate * (1 - i_gate)
        df_gate = d * c_tile * f_gate * (1 - f_gate)
        dg_gate = d * i_gate * (1 - g_gate * g_gate)
        dw_i = tl.dot(tl.trans(x), di_gate, dw_i, input_precision="ieee")
        dw_f = tl.dot(tl.trans(x), df_gate, dw_f, input_precision="ieee")
        dw_g = tl.dot(tl.trans(x), dg_gate, dw_g, input_precision="ieee")
        dw_o = tl.dot(tl.trans(x), do_gate, dw_o, input_precision="ieee")
        d = tl.dot(di_gate, tl.trans(w_i), input_precision="ieee")
        d = tl.dot(df_gate, tl.trans(w_f), d, input_precision="ieee")
        d = tl.dot(dg_gate, tl.trans(w_g), d, input_precision="ieee")
        d = tl.dot(do_gate, tl.trans(w_o), d, input_precision="ieee")
        tl.store(old_d_h + places, d, square)
        if INPUTS:
            of_first = tl.sum(tl.where(unit[None, :] == H, d, 0.0), 1)
            of_second = tl.sum(tl.where(unit[None, :] == H + 1, d, 0.0), 1)
            tl.store(d_grad + at, of_grad + _through_prep(g, of_first, of_second), inside)
    if INPUTS:
        size_i, sign_i = _of_loss(w_ih, 0, dw_i, H, W)
        size_f, sign_f = _of_loss(w_ih, 1, dw_f, H, W)
        size_g, sign_g = _of_loss(w_ih, 2, dw_g, H, W)
        size_o, sign_o = _of_loss(w_ih, 3, dw_o, H, W)
        of_size, of_sign = size_i + size_f + size_g + size_o, sign_i + sign_f + sign_g + sign_o
        of_loss = _through_prep(tl.load(loss), of_size, of_sign)
        tl.store(d_losses + tl.program_id(0), of_loss)
    _store_gate(sums, loss, 0, dw_i, H, W, ADD)
    _store_gate(sums, loss, 1, dw_f, H, W, ADD)
    _store_gate(sums, loss, 2, dw_g, H, W, ADD)
    _store_gate(sums, loss, 3, dw_o, H, W, ADD)
    into, which = unit[:, None], two[None, :]
    place = tl.where(into <= H, into, tl.where(into == H + 1, H + 2, H + 1))
    valid = (into < H + 2) | ((into == H + 2) & (which == 0)) | ((into == H + 3) & (which == 1))
    place += 4 * H * (H + 5) + which * (H + 3)
    _add(sums, place, dw_cell, valid & (which < 2), ADD)


def handles(grad: Tensor, hidden_size: int) -> bool:
    """Whether the kernels fit this hidden size and gradient [P, 1], with offsets in int32."""
    return hidden_size <= LARGEST_HIDDEN and len(grad) * (hidden_size + 1) < INT32


class Linked(MetaState):
    """A state after an update by ``step``; ``weights`` links it to all parameters."""

    weights: Tensor


def step(loss: Tensor, weights: list[Tensor], grad: Tensor, state: MetaState) -> Linked:
    """One update of the meta-learner; only for what ``handles`` accepts.

    The parameters' gradients go back from update to update, each adding its own, so that autograd
    has nothing to add: a link [programs, N] stands for all of them, N numbers in the order of
    ``_meta_backward``.

    Args:
        weights: the LSTM's four parameters, WF, bF, WI and bI.
    """
    link = state.weights if isinstance(state, Linked) else _link(weights, grad)
    *new, link = MetaStep.apply(link, loss, *(w.detach() for w in weights), grad, *state)
    new = Linked(*new)
    new.weights = link
    return new


def _link(weights: list[Tensor], grad: Tensor) -> Tensor:
    w_ih, w_hh, b_ih, b_hh, *gates = weights
    _, programs = shares(len(grad), TILE, MAX_PARTS)
    parts = [t.reshape(-1) for t in (w_ih, w_hh, b_ih + b_hh, *gates)]
    return torch.cat(parts).expand(*programs, -1)


class MetaStep(torch.autograd.Function):
    """(link, loss [], the LSTM's four parameters, WF, bF, WI, bI, which are constants, grad [P, 1],
    *MetaState) -> (*MetaState, link).
    """

    @staticmethod
    def forward(ctx, link, *inputs):
        ctx.set_materialize_grads(False)
        inputs = [t.contiguous() for t in inputs]
        *lstm, wf, _, wi, _, grad = inputs[:10]
        state = inputs[10:]
        new, P = [torch.empty_like(t) for t in state], len(grad)
        per, programs = shares(P, TILE, MAX_PARTS)
        launch(_meta_forward, programs, *inputs, *new, P, per, **_sizes(state[0].shape[1]))
        ctx.save_for_backward(*lstm, wf, wi, grad, *state, new[2], new[3])
        ctx.shape = link.shape
        return *new, link

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        grad, state, P = saved[7], saved[8:13], len(saved[7])
        *grads, later = grads
        grads = [
            torch.zeros_like(t) if g is None else g.contiguous()
            for t, g in zip(state, grads, strict=True)
        ]
        state_grads = [torch.empty_like(t) for t in state]
        sums = grad.new_empty(ctx.shape) if later is None else later  # nobody else's
        per, programs = shares(P, TILE, MAX_PARTS)
        inputs = ctx.needs_input_grad[10]  # second order
        sizes = _sizes(state[0].shape[1]) | BACKWARD | {"ADD": later is not None, "INPUTS": inputs}
        outputs = (grad.new_empty(programs), torch.empty_like(grad)) if inputs else (grad, grad)
        args = *saved, *grads, *state_grads, *outputs, sums, P, per, ctx.shape[1]
        launch(_meta_backward, programs, *args, **sizes)
        d_loss, d_grad = (outputs[0].sum(), outputs[1]) if inputs else (None, None)
        return sums, d_loss, *[None] * 8, d_grad, *state_grads


def _sizes(hidden_size: int) -> dict[str, object]:
    """The kernels' constants; Triton multiplies matrices whose sides are powers of 2 from 16 on."""
    width = max(16, 1 << (hidden_size + 3).bit_length())
    return {"H": hidden_size, "W": width, "TILE": TILE, "num_warps": WARPS}
