"""The compiled CPU kernels as autograd functions.

They replace the PyTorch code of learner.py, metalearner.py and augment.py in this folder. That code
runs where there is no C++ compiler, and for tensors that ``handles`` or ``handles_block`` rejects.
"""

from __future__ import annotations

import ctypes
import math
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fast.library import library
from learner import N_BLOCKS

N_FILTERS = 32  # C in kernels/blocks.h; N_BLOCKS is BLOCKS in kernels/learner.h
TILE = 128  # as in kernels/meta.h
STEP = 1e-4  # of the difference for second order, as a share of the parameters' norm


# ---- Which tensors the kernels handle ----


def handles(x: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernels are compiled and handle ``x``.

    They handle tensors on the CPU that have this ``dtype`` and are not empty. A batch [B, C, H, W]
    must also have 3 or 32 channels and at least 2x2 pixels. Under autocast PyTorch picks the
    dtypes, so the answer is no.
    """
    fits = x.device.type == "cpu" and x.dtype == dtype and x.numel() > 0
    if x.dim() == 4:
        fits = fits and x.shape[1] in (3, N_FILTERS) and min(x.shape[2:]) >= 2
    return fits and not torch.is_autocast_enabled("cpu") and bool(library().functions)


def handles_block(x: Tensor, weight: Tensor) -> bool:
    """Whether ``train_block`` and ``eval_block`` handle this input and these filters. They compute
    no gradient of 3-channel images.
    """
    fits = x.dim() == 4 and weight.shape == (N_FILTERS, x.shape[1], 3, 3)
    fits = fits and weight.dtype == torch.float32 and weight.is_cpu and handles(x)
    return fits and not (x.shape[1] == 3 and x.requires_grad)


def _checked(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """``x``, contiguous; ValueError if it has another shape or dtype or is not on the CPU."""
    if x.shape != shape or x.dtype != dtype or not x.is_cpu:
        actual = f"{x.dtype} {list(x.shape)} on {x.device}"
        raise ValueError(f"the kernel needs {dtype} {list(shape)} on cpu, but was given {actual}")
    return x.contiguous()


def _call(name: str, *arguments: Tensor | float | ctypes.Array | None) -> None:
    """Call a kernel, which trusts all sizes, dtypes and layouts."""
    # not under the name of the tensors, which must live as long as the kernel runs
    pointers = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    if not library().functions[name](*pointers, torch.get_num_threads()):
        raise MemoryError(f"the kernel {name} finds no memory")


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

    Args:
        pixels: [B, 3, H, W] uint8.
        windows: [4, B, 2] int64, an ``augment.Windows`` that lies inside the images.
        flip: [B] bool.
        jitter, order: [B, 4] float32 and [B, 4] int64, or None.
        scale: mean and standard deviation, [3] float32 each.
        out: [B, 3, size, size] float32, channels last; takes the result.

    Raises:
        ValueError: an argument is not like that.
    """
    n, _, height, width = pixels.shape
    size = out.shape[2]
    fits = out.shape == (n, 3, size, size) and out.dtype == torch.float32 and out.is_cpu
    if not (fits and out.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError("out must be [B, 3, size, size] float32 on the CPU, channels_last")
    pixels = _checked(pixels, (n, 3, height, width), torch.uint8)
    flip = _checked(flip, (n,), torch.bool)
    windows = _checked(windows, (4, n, 2), torch.int64)
    start, extent, target, _ = windows
    inside = (start >= 0) & (extent <= torch.tensor((height, width)) - start)
    if not (inside & (extent >= 1) & (target >= 1)).all():
        raise ValueError("a window is empty or reaches beyond its image")
    if jitter is not None:
        jitter, order = _checked(jitter, (n, 4)), _checked(order, (n, 4), torch.int64)
        if not ((order >= 0) & (order < 4)).all():
            raise ValueError("order must hold numbers from 0 to 3")
    mean, std = (_checked(t, (3,)) for t in scale)
    args = windows, flip, jitter, order, mean, std, out
    _call("augment", pixels, *args, size, n, height, width)
    return out


# ---- Blocks of the learner ----


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _convolve(x: Tensor, weight: Tensor, turned: bool = False) -> Tensor:
    """A block's convolution, padded with zeros; or, ``turned``, the gradient of its input from that
    of its output. ``x`` and the result are channels last.
    """
    y = torch.empty_like(x)
    _call("convolve", x, weight.contiguous(), y, turned, *_size(x))
    return y


def _filters_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the filters; all images are channels last."""
    grad_w = torch.empty_like(weight, memory_format=torch.contiguous_format)
    _call("convolve_to_filters", grad, x, grad_w, *_size(x))
    return grad_w


def _empty_pooled(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory of the shape of a block's output for input ``x``."""
    shape = (x.shape[0], N_FILTERS, x.shape[2] // 2, x.shape[3] // 2)
    return torch.empty(shape, dtype=dtype or x.dtype, memory_format=torch.channels_last)


def _size(x: Tensor) -> tuple[int, int, int]:
    """Images, height and width."""
    return x.shape[0], x.shape[2], x.shape[3]


class PatchMoments(NamedTuple):
    """Sums over all zero-padded 3x3 patches of a batch of images, one patch around each pixel."""

    total: Tensor  # [27], float64: sum of the patches
    product: Tensor  # [27, 27], float64: sum of their outer products with themselves

    @staticmethod
    def of(x: Tensor) -> PatchMoments | None:
        """The moments of images [B, 3, H, W]; None if the kernels do not handle ``x``."""
        if x.dim() != 4 or x.shape[1] != 3 or not handles(x):
            return None
        total = x.new_empty(27, dtype=torch.float64)
        product = x.new_empty(27, 27, dtype=torch.float64)
        _call("patch_moments", _channels_last(x), total, product, *_size(x))
        return PatchMoments(total, product)


class Block(torch.autograd.Function):
    """A block in training.

    (input, weight, gamma, beta, eps, moments) -> output, batch mean [C], biased batch variance [C].
    ``moments`` are those of 3-channel images, which need no gradient; None for 32 channels.
    """

    @staticmethod
    def forward(ctx, x, weight, gamma, beta, eps, moments):
        x, weight = _channels_last(x), weight.contiguous()
        gamma, beta = (_checked(t, (N_FILTERS,)) for t in (gamma, beta))
        out, switches = _empty_pooled(x), _empty_pooled(x, torch.uint8)
        mean, var = torch.empty_like(gamma), torch.empty_like(gamma)
        results, ctx.y = (switches, out, mean, var), None
        if moments is not None:
            name, read, kept = "first_forward", (x, weight), moments
        else:
            ctx.y = _convolve(x, weight)
            name, read, kept = "block_forward", (ctx.y,), (_empty_pooled(x),)
        _call(name, *read, gamma, beta, eps, *kept, *results, *_size(x))
        ctx.save_for_backward(x, weight, switches, gamma, beta, mean, var, *kept)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _mean, _var):
        x, weight, switches, *affine, mean, var = ctx.saved_tensors[:7]
        grad, kept = _channels_last(grad), ctx.saved_tensors[7:]
        grads, norm = [torch.empty_like(t) for t in affine], (*affine, mean, var, ctx.eps)
        if len(kept) == 2:  # the images' moments
            grad_w = torch.empty_like(weight)
            args = x, weight, switches, *norm, *kept, grad_w
            _call("first_backward", grad, *args, *grads, *_size(x))
            return None, grad_w, *grads, None, None
        y = _convolve(x, weight) if ctx.y is None else ctx.y
        ctx.y = None  # the kernel overwrites it with its gradient
        _call("block_backward", grad, *kept, switches, y, *norm, *grads, *_size(x))
        grad_x = _convolve(y, weight, turned=True) if ctx.needs_input_grad[0] else None
        return grad_x, _filters_gradient(y, x, weight), *grads, None, None


def train_block(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """See ``learner.train_block``; only for what ``handles_block`` accepts. README.md says why
    pooling comes first, and what the moments are for.
    """
    weights, count = (conv.weight, norm.weight, norm.bias), math.prod(_size(x))
    out, mean, var = Block.apply(x, *weights, norm.eps, PatchMoments.of(x))
    with torch.no_grad():
        norm.running_mean.lerp_(mean + conv.bias, norm.momentum)
        norm.running_var.lerp_(var * (count / max(count - 1, 1)), norm.momentum)
    return out


def eval_block(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """See ``learner.eval_block``; only for what ``handles_block`` accepts, and without a graph.

    The running statistics are folded into the convolution's weight and bias.
    """
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    bias = _checked((conv.bias - norm.running_mean) * scale + norm.bias, (N_FILTERS,))
    x, out = _channels_last(x), _empty_pooled(x)
    if x.shape[1] == 3:
        _call("first_eval", x, weight.contiguous(), bias, out, *_size(x))
    else:
        _call("block_eval", _convolve(x, weight), bias, out, *_size(x))
    return out


def loss_and_grad(
    x: Tensor,
    y: Tensor,
    moments: PatchMoments,
    parameters: list[Tensor],
    running: list[Tensor],
    eps: float,
    momentum: float,
    frozen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``FlatModule.loss_and_grad`` of the learner in train mode, in one call.

    Args:
        x: images that ``handles_block`` accepts.
        y: labels [B] int64. One outside 0..n_classes-1 makes the loss NaN: an error would have to
            wait for the labels.
        moments: of ``x``.
        parameters: the learner's, in their order.
        running: the blocks' running means, then their running variances, which are updated.
        eps, momentum: of batch normalisation.
        frozen: another call's switches, which decide instead of the maxima and signs. The running
            statistics then stay as they are.

    Returns:
        The loss [], its gradient [P, 1], and the switches of poolings and ReLUs, see blocks.h.

    Raises:
        ValueError: the images' size is not the classifier's, or a layer is not Conv4's.
    """
    n_images, n_classes = len(x), len(parameters[-1])
    n_features = N_FILTERS * math.prod(n // 2**N_BLOCKS for n in x.shape[2:])
    x, y = _channels_last(x), _checked(y, (n_images,), torch.int64)
    shapes = [((N_FILTERS, n, 3, 3), *3 * [(N_FILTERS,)]) for n in (3, *3 * [N_FILTERS])]
    shapes = [*chain(*shapes), (n_classes, n_features), (n_classes,)]
    parameters = [_checked(p, shape) for p, shape in zip(parameters, shapes, strict=True)]
    running = [_checked(t, (N_FILTERS,)) for t in running]
    loss, grad = x.new_empty(()), x.new_empty(sum(p.numel() for p in parameters), 1)
    name, switches = "learner_gradient_frozen", frozen
    if switches is None:
        pixels = sum(math.prod(n >> b for n in x.shape[2:]) for b in range(1, N_BLOCKS + 1))
        name = "learner_gradient"
        switches = x.new_empty(n_images * N_FILTERS * pixels, dtype=torch.uint8)
    pointers = [
        (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
        for tensors in (parameters, running)
    ]
    args = *moments, *pointers, eps, momentum, switches, loss, grad
    _call(name, x, y, *args, *_size(x), n_classes)
    return loss, grad, switches


class LossAndGrad(torch.autograd.Function):
    """``FlatModule.loss_and_grad_at``: (cell state c [P, 1], images x, function) -> loss [],
    gradient [P, 1].

    ``function``: (c, switches or None) -> ``loss_and_grad`` of x at c.

    The backward pass multiplies the Hessian by a vector v: (g(c + r v) - g(c)) / r. Where a maximum
    or a ReLU switched between the two points, the difference would be a jump's, so both take the
    switches of c, as the Hessian does.
    """

    @staticmethod
    def forward(ctx, c, x, function):
        loss, grad, switches = function(c, None)
        ctx.save_for_backward(c, grad, x)  # x: so that PyTorch notices if it is overwritten
        ctx.function, ctx.switches = function, switches
        return loss, grad

    @staticmethod
    @once_differentiable
    def backward(ctx, of_loss, v):
        c, grad, _ = ctx.saved_tensors
        size = v.norm(dtype=torch.float64).clamp_min(torch.finfo(v.dtype).tiny)
        r = STEP * c.norm() / size  # [], so r * v keeps v's dtype
        after = ctx.function(c + r * v, ctx.switches)[1]
        return of_loss * grad + (after - grad) / r, None, None


# ---- The meta-learner ----


class MetaStep(torch.autograd.Function):
    """One update by ``metalearner.MetaLearner``.

    (loss [], the LSTM's weight_ih, weight_hh, bias_ih and bias_hh, WF [H+2, 1], bF [1, 1], WI, bI,
    grad [P, 1], h and c [tiles of TILE coordinates, hidden_size, TILE], f [P, 1], i [P, 1], theta
    [P, 1]) -> the new h, c, f, i, theta. The backward pass recomputes the gates, which is cheaper
    than storing them.
    """

    @staticmethod
    def forward(ctx, *inputs):
        H, P = inputs[10].shape[1], len(inputs[9])
        lstm_shapes, gate = ((4 * H, 4), (4 * H, H), (4 * H,), (4 * H,)), ((H + 2, 1), (1, 1))
        tiled, flat = (-(-P // TILE), H, TILE), (P, 1)
        shapes = ((), *lstm_shapes, *gate, *gate, flat, tiled, tiled, flat, flat, flat)
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
        loss, w_ih, w_hh, bias, _, wf, wi, grad, _, *state = (saved := ctx.saved_tensors)[:14]
        learned, inputs = (w_ih, w_hh, bias, wf, wf[:1], wi, wi[:1]), (None, None)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[9]:
            inputs = torch.empty_like(loss), torch.empty_like(grad)
        out_grads = [torch.empty_like(t) for t in (*learned, *state)]
        grads = [g.contiguous() for g in grads]
        sizes = state[0].shape[1], state[2].numel()
        _call("meta_backward", *saved, *grads, *inputs, *out_grads, *sizes)
        return inputs[0], *out_grads[:3], out_grads[2], *out_grads[3:7], inputs[1], *out_grads[7:]
