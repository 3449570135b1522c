"""Compiled CPU kernels for the hot loops of an episode, as functions that autograd knows.

They replace the PyTorch code of learner.py, metalearner.py and augment.py in this folder. That code
still runs where there is no C++ compiler, and for tensors that ``handles`` or ``handles_block``
turns down.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fast.library import ONE_TYPE, SUFFIX, library
from learner import N_BLOCKS

N_FILTERS, TILE = (
    32,
    128,
)  # as C in kernels/blocks.h and TILE in kernels/meta.h; N_BLOCKS is BLOCKS in learner.h


# ---- Which tensors the kernels know ----


def handles(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether the kernels are compiled and can work on ``x``.

    They can if it is on the CPU, has one of ``dtypes`` (float32 if none is given) and is not empty.
    If it is 4-dimensional, a batch [B, C, H, W], it must also have 3 or 32 channels and at least
    2x2 pixels. Under autocast PyTorch picks the types, so the answer is no.
    """
    known = x.device.type == "cpu" and x.dtype in (dtypes or (torch.float32,)) and x.numel() > 0
    if x.dim() == 4:
        known = known and x.shape[1] in (3, N_FILTERS) and min(x.shape[2:]) >= 2
    return known and not torch.is_autocast_enabled("cpu") and bool(library().functions)


def handles_block(x: Tensor, weight: Tensor) -> bool:
    """Whether ``train_block`` and ``eval_block`` can work on this input and these filters."""
    fits = x.dim() == 4 and weight.shape == (N_FILTERS, x.shape[1], 3, 3)
    return fits and weight.dtype == torch.float32 and weight.is_cpu and handles(x, *SUFFIX)


def _checked(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """``x``, contiguous, as kernels read it. Raises ValueError if it has another shape or type or
    is not on the CPU.
    """
    if x.shape != shape or x.dtype != dtype or not x.is_cpu:
        found = f"{x.dtype} {list(x.shape)} on {x.device}"
        raise ValueError(f"the kernel needs {dtype} {list(shape)} on cpu, but was given {found}")
    return x.contiguous()


def _call(name: str, first: Tensor, *others: Tensor | float | ctypes.Array | None) -> None:
    """Call a kernel, the one for ``first``'s type if there are two. It trusts all sizes and memory
    layouts.
    """
    numbers = [a.data_ptr() if isinstance(a, Tensor) else a for a in (first, *others)]
    suffix = "" if name in ONE_TYPE else SUFFIX[first.dtype]
    library().functions[name + suffix](*numbers, torch.get_num_threads())


# ---- Augmentation ----


def augment(
    pixels: Tensor,
    windows: Tensor,
    flip: Tensor,
    jitter: Tensor | None,
    order: Tensor | None,
    scale: tuple[Tensor, Tensor],
    out: Tensor,
) -> Tensor:
    """See ``augment.transform``.

    Takes pixels uint8 [B, 3, H, W]; windows int64 [4, B, 2], which lie inside the images; flip bool
    [B]; jitter float32 [B, 4] with order int64 [B, 4], or None; the mean and the deviation, float32
    [3] each; out float32 [B, 3, size, size], channels last, which takes the result. Raises
    ValueError for anything else.
    """
    n, _, height, width = pixels.shape
    size = out.shape[2]
    _checked(out, (n, 3, size, size))
    if not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError("out must be contiguous in channels_last format")
    pixels, flip = (
        _checked(pixels, (n, 3, height, width), torch.uint8),
        _checked(flip, (n,), torch.bool),
    )
    windows = _checked(windows, (4, n, 2), torch.int64)
    start, extent, target, _ = windows
    if not (
        (start >= 0)
        & (extent >= 1)
        & (extent <= torch.tensor((height, width)) - start)
        & (target >= 1)
    ).all():
        raise ValueError("a window is empty or reaches beyond its image")
    if jitter is not None:
        jitter, order = _checked(jitter, (n, 4)), _checked(order, (n, 4), torch.int64)
        if not ((order >= 0) & (order < 4)).all():
            raise ValueError("order must hold numbers from 0 to 3")
    mean, deviation = (_checked(t, (3,)) for t in scale)
    _call(
        "augment",
        pixels,
        windows,
        flip,
        jitter,
        order,
        mean,
        deviation,
        out,
        size,
        n,
        height,
        width,
    )
    return out


# ---- Blocks of the learner ----


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _is_ours(x: Tensor) -> bool:
    """Whether a block's convolution has kernels; in bfloat16 PyTorch's is faster, where that type
    pays at all.
    """
    return x.shape[1] == N_FILTERS and x.dtype == torch.float32


def _convolved(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution of a block, with a border of zeros; ``x`` and what is returned are channels
    last.
    """
    if not _is_ours(x):
        return _channels_last(F.conv2d(x, weight, padding=1))
    y = torch.empty_like(x)
    _call("convolve", x, weight.contiguous(), y, *_size(x))
    return y


def _convolved_back(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: bool
) -> tuple[Tensor | None, Tensor]:
    """The gradients at a convolution's input, if wanted, and at its filters; ``grad`` and ``x`` are
    channels last.
    """
    if not _is_ours(x):
        fixed = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        return torch.ops.aten.convolution_backward(grad, x, weight, *fixed, [wanted, True, False])[
            :2
        ]
    weight = weight.contiguous()
    grad_x, grad_w = torch.empty_like(x) if wanted else None, torch.empty_like(weight)
    if grad_x is not None:
        _call("convolve_to_input", grad, weight, grad_x, *_size(x))
    _call("convolve_to_filters", grad, x, grad_w, *_size(x))
    return grad_x, grad_w


def _pooled(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a block's output from input ``x``, or for something else of that shape."""
    shape = (x.shape[0], N_FILTERS, x.shape[2] // 2, x.shape[3] // 2)
    return torch.empty(shape, dtype=dtype or x.dtype, memory_format=torch.channels_last)


def _size(x: Tensor) -> tuple[int, int, int]:
    """Images, height and width."""
    return x.shape[0], x.shape[2], x.shape[3]


class PatchMoments(NamedTuple):
    """Sums over the 3x3 patches of a batch of images, one patch around each pixel, with zeros
    beyond the border.
    """

    total: Tensor  # [27], float64: sum of the patches
    product: Tensor  # [27, 27], float64: sum of their outer products with themselves
    count: int  # number of patches

    @staticmethod
    def of(x: Tensor) -> PatchMoments | None:
        """The moments of images [B, 3, H, W]; None if the kernels, the only users of moments, do
        not handle ``x``.
        """
        if x.dim() != 4 or x.shape[1] != 3 or not handles(x, *SUFFIX):
            return None
        total, product = (
            x.new_empty(27, dtype=torch.float64),
            x.new_empty(27, 27, dtype=torch.float64),
        )
        _call("patch_moments", _channels_last(x), total, product, *_size(x))
        return PatchMoments(total, product, math.prod(_size(x)))


class FirstBlock(torch.autograd.Function):
    """A block whose input is 3-channel images that need no gradient.

    (images, weight, gamma, beta, eps, the images' moments) -> output, batch mean [C], biased batch
    variance [C].
    """

    @staticmethod
    def forward(ctx, x, weight, gamma, beta, eps, moments):
        x, w = _channels_last(x), weight.to(x.dtype).float().contiguous()
        gamma, beta = (_checked(t, (N_FILTERS,)) for t in (gamma, beta))
        out, where = _pooled(x), _pooled(x, torch.uint8)
        mean, var = torch.empty_like(gamma), torch.empty_like(gamma)
        total, product, _ = moments
        _call(
            "first_forward",
            x,
            w,
            gamma,
            beta,
            eps,
            total,
            product,
            where,
            out,
            mean,
            var,
            *_size(x),
        )
        ctx.save_for_backward(x, w, out, where, gamma, beta, mean, var, total, product)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _mean, _var):
        x, w, out, where, gamma, beta, mean, var, total, product = ctx.saved_tensors
        made = [torch.empty_like(t) for t in (w, gamma, beta)]
        args = (x, w, out, where, gamma, beta, mean, var, ctx.eps, total, product, *made, *_size(x))
        _call("first_backward", _channels_last(grad), *args)
        return None, *made, None, None


class Block(torch.autograd.Function):
    """(input, weight, gamma, beta, eps) -> output, batch mean [C], biased batch variance [C]."""

    @staticmethod
    def forward(ctx, x, weight, gamma, beta, eps):
        x, w = _channels_last(x), weight.to(x.dtype)
        gamma, beta = (_checked(t, (N_FILTERS,)) for t in (gamma, beta))
        y, pooled, where, out = _convolved(x, w), _pooled(x), _pooled(x, torch.uint8), _pooled(x)
        mean, var = torch.empty_like(gamma), torch.empty_like(gamma)
        _call("block_forward", y, gamma, beta, eps, pooled, where, out, mean, var, *_size(x))
        ctx.save_for_backward(x, w, pooled, where, gamma, beta, mean, var)
        ctx.eps, ctx.y = eps, y
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _mean, _var):
        x, w, pooled, where, gamma, beta, mean, var = ctx.saved_tensors
        y = _convolved(x, w) if ctx.y is None else ctx.y
        ctx.y = None  # the kernel overwrites it with its gradient
        grad_gamma, grad_beta = torch.empty_like(gamma), torch.empty_like(beta)
        args = (pooled, where, y, gamma, beta, mean, var, ctx.eps, grad_gamma, grad_beta, *_size(x))
        _call("block_backward", _channels_last(grad), *args)
        grad_x, grad_w = _convolved_back(y, x, w, ctx.needs_input_grad[0])
        return grad_x, grad_w.to(gamma.dtype), grad_gamma, grad_beta, None


def train_block(
    x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, moments: PatchMoments | None
) -> Tensor:
    """See ``block.train_block``; only for what ``handles_block`` accepts.

    The order here is convolution, pooling, normalisation, ReLU. The function is the same:
    normalisation is an affine map of each channel, and an increasing one commutes with the maximum.
    Where the scale is negative, the opposite of the convolution's output is pooled. Normalisation
    and ReLU then work on a quarter of the numbers.

    The first block uses two more facts: its input needs no gradient, and its convolution is linear
    in the 27 numbers under a filter. The batch statistics of the convolution's output, and the part
    of the weight gradient that passes through them, therefore follow from the moments of the
    images, which are the same in all updates of an episode. So the convolution's output, the
    largest tensor of the network, is never stored.
    """
    count = math.prod(_size(x))
    if x.shape[1] == 3 and not x.requires_grad:
        if moments is None or moments.count != count:
            moments = PatchMoments.of(x)
        out, mean, var = FirstBlock.apply(x, conv.weight, norm.weight, norm.bias, norm.eps, moments)
    else:
        out, mean, var = Block.apply(x, conv.weight, norm.weight, norm.bias, norm.eps)
    with torch.no_grad():
        norm.running_mean.lerp_(mean + conv.bias, norm.momentum)
        norm.running_var.lerp_(var * (count / max(count - 1, 1)), norm.momentum)
    return out


def eval_block(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """See ``block.eval_block``; only for what ``handles_block`` accepts, and without a graph.

    The running statistics become part of the convolution's weight and bias.
    """
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight = (conv.weight * scale.view(-1, 1, 1, 1)).to(x.dtype)
    bias = _checked((conv.bias - norm.running_mean) * scale + norm.bias, (N_FILTERS,))
    x, out = _channels_last(x), _pooled(x)
    if x.shape[1] == 3:
        _call("first_eval", x, weight.float().contiguous(), bias, out, *_size(x))
    else:
        _call("block_eval", _convolved(x, weight), bias, out, *_size(x))
    return out


def loss_and_grad(
    x: Tensor,
    y: Tensor,
    moments: PatchMoments,
    parameters: list[Tensor],
    running: list[Tensor],
    eps: float,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """``FlatModule.loss_and_grad`` of the learner in train mode, in one call.

    Takes float32 images that ``handles_block`` accepts, their labels int64 [B] and moments; the
    learner's parameters; and the running means and then the running variances of its blocks, which
    it updates. A label that is no class makes the loss NaN: an error would have to wait for the
    labels. Raises ValueError for images of another size than the classifier's.
    """
    n_images, n_classes = len(x), len(parameters[-1])
    _checked(
        parameters[-2], (n_classes, N_FILTERS * math.prod(n // 2**N_BLOCKS for n in x.shape[2:]))
    )
    x, y, parameters = (
        _channels_last(x),
        _checked(y, (n_images,), torch.int64),
        [_checked(p, p.shape) for p in parameters],
    )
    loss, grad = x.new_empty(()), x.new_empty(sum(p.numel() for p in parameters), 1)
    addresses = [
        (ctypes.c_void_p * len(of))(*(t.data_ptr() for t in of)) for of in (parameters, running)
    ]
    _call(
        "learner_gradient",
        x,
        y,
        *moments[:2],
        *addresses,
        eps,
        momentum,
        loss,
        grad,
        *_size(x),
        n_classes,
    )
    return loss, grad


# ---- The meta-learner ----


def lstm_state(cI: Tensor, hidden_size: int) -> Tensor:
    """Zeros for the h or c that ``MetaStep`` takes: [tiles, hidden_size, TILE], with TILE
    coordinates side by side.
    """
    return cI.new_zeros(-(-cI.numel() // TILE), hidden_size, TILE)


class MetaStep(torch.autograd.Function):
    """One update by ``metalearner.MetaLearner``.

    (loss [], the LSTM's weight_ih, weight_hh, bias_ih and bias_hh, WF [H+2, 1], bF [1, 1], WI, bI,
    grad [P, 1], h and c as ``lstm_state`` makes them, f [P, 1], i [P, 1], theta [P, 1]) -> the new
    h, c, f, i, theta. loss and grad are constants. The backward pass computes the gates a second
    time, which is cheaper than storing them.
    """

    @staticmethod
    def forward(ctx, *inputs):
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[9]:
            raise ValueError(
                "loss and gradient must be detached: the meta-learner takes them as constants"
            )
        H, P = inputs[10].shape[1], len(inputs[9])
        of_lstm, of_gate = ((4 * H, 4), (4 * H, H), (4 * H,), (4 * H,)), ((H + 2, 1), (1, 1))
        tiled, flat = (-(-P // TILE), H, TILE), (P, 1)
        shapes = ((), *of_lstm, *of_gate, *of_gate, flat, tiled, tiled, flat, flat, flat)
        inputs = [_checked(t, shape) for t, shape in zip(inputs, shapes, strict=True)]
        *lstm, wf, _, wi, _, grad = inputs[:10]
        state = inputs[10:]
        new = [torch.empty_like(t) for t in state]
        x = grad.new_empty(tiled[0], 2, TILE)
        _call("meta_forward", *inputs, x, *new, H, P)
        ctx.save_for_backward(*lstm, wf, wi, grad, x, *state, new[2], new[3])
        return tuple(new)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        _, w_ih, w_hh, bias, _, wf, wi, *_ = saved = ctx.saved_tensors
        state = saved[9:14]
        made = [torch.empty_like(t) for t in (w_ih, w_hh, bias, wf, wf[:1], wi, wi[:1], *state)]
        grads = [g.contiguous() for g in grads]
        _call("meta_backward", *saved, *grads, *made, state[0].shape[1], state[2].numel())
        return None, *made[:3], made[2], *made[3:7], None, *made[7:]
