"""One block of the learner in train mode, with its backward pass written by hand.

Convolution -> batch normalisation -> ReLU -> 2x2 max-pooling, computed as convolution -> pooling -> normalisation -> ReLU. That
is the same function: normalisation is an affine map a channel, which commutes with the maximum where its scale is positive, and
a negative scale is folded into the sign of the filter. Normalisation and ReLU then touch a quarter of the numbers.

A batch's own mean takes the convolution's bias out again. The bias is therefore never added, and its gradient is exactly zero;
added, it would leave rounding noise there, which prep and Adam blow up. Only the running mean hears of it.

The first block has two more liberties, since its input needs no gradient and its convolution is linear in the 27 pixels under
each filter. The batch statistics of its output follow from the pixels' own moments (28 x 28 numbers, the same in all updates
of an episode), as does the part of its weight gradient that passes through those statistics; so no pass over its output,
the largest tensor of the network, is needed for either. And on a CPU its images then go through a few at a time, so that this
tensor never leaves the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import native

CACHE_BYTES = 5_000_000  # of convolution output at a time; measured best on a 2-core Xeon with 2 MiB of L2 a core

_max_pool = torch.ops.aten.max_pool2d_with_indices
_relu_backward = torch.ops.aten.threshold_backward


class PatchMoments(NamedTuple):
    """Sums over all positions of the 3x3 patches (zero-padded) of a batch of images, in float64."""

    total: Tensor  # [C * 9]
    product: Tensor  # [C * 9, C * 9]
    count: int  # number of positions

    @staticmethod
    def of(x: Tensor) -> PatchMoments:
        """Moments of images [B, C, H, W]."""
        if native.handles(x):
            return PatchMoments(*native.patch_moments(x), x.shape[0] * x.shape[2] * x.shape[3])
        total = product = 0
        for images in x.split(_images_at_a_time(x, x.shape[1] * 9)):
            images = images.float() if images.dtype == torch.bfloat16 else images
            patches = F.unfold(images, 3, padding=1)  # [b, C * 9, H * W]
            total = total + patches.sum(2).double().sum(0)
            product = product + torch.bmm(patches, patches.transpose(1, 2)).double().sum(0)
        return PatchMoments(total, product, x.shape[0] * x.shape[2] * x.shape[3])


def _images_at_a_time(x: Tensor, channels: int) -> int:
    if x.device.type != "cpu":
        return x.shape[0]
    return max(1, CACHE_BYTES // (channels * x.shape[2] * x.shape[3] * 4))


def _per_channel(v: Tensor, like: Tensor) -> Tensor:
    return v.to(like.dtype).view(1, -1, 1, 1)


def _unpool(grad: Tensor, like: Tensor, where: Tensor) -> Tensor:
    return torch.ops.aten.max_pool2d_with_indices_backward(grad, like, [2, 2], [2, 2], [0, 0], [1, 1], False, where)


def _conv_backward(grad: Tensor, x: Tensor, w: Tensor, needs_x: bool) -> tuple[Tensor | None, Tensor]:
    grad_x, grad_w, _ = torch.ops.aten.convolution_backward(
        grad, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [needs_x, True, False]
    )
    return grad_x, grad_w


def _norm_relu(pooled: Tensor, mean: Tensor, invstd: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """ReLU of the normalised maxima; gamma is not negative."""
    scale = gamma * invstd
    return torch.addcmul(_per_channel(beta - mean * scale, pooled), pooled, _per_channel(scale, pooled)).relu_()


def _norm_relu_backward(grad: Tensor, out: Tensor, pooled: Tensor, mean: Tensor, invstd: Tensor, gamma: Tensor, count: int):
    """Back from the block's output to the convolution's.

    Returns:
        The gradient at the maxima, gradients of gamma and beta, and k0, k1: what passes through the batch statistics adds
        k0 + k1 * y to the gradient of each of the convolution's outputs y, maximum or not.
    """
    grad = _relu_backward(grad, out, 0)
    grad_beta = grad.sum((0, 2, 3), dtype=mean.dtype) if grad.is_cuda else _rows(grad).sum(0, dtype=mean.dtype)
    product = grad * pooled
    product = product.sum((0, 2, 3), dtype=mean.dtype) if grad.is_cuda else _rows(product).sum(0, dtype=mean.dtype)
    grad_gamma = invstd * (product - mean * grad_beta)
    scale = gamma * invstd
    k1 = -scale * invstd * grad_gamma / count
    k0 = -scale * grad_beta / count - mean * k1
    return grad * _per_channel(scale, grad), grad_gamma, grad_beta, k0, k1


def _rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class _FirstBlock(torch.autograd.Function):
    """(images, weight, gamma >= 0, beta, their moments) -> output, batch mean [C], biased batch variance [C]."""

    @staticmethod
    def forward(ctx, x, weight, gamma, beta, eps, moments):
        w = weight.to(x.dtype)
        flat = w.flatten(1).double()
        mean = flat @ moments.total / moments.count
        var = ((flat @ moments.product * flat).sum(1) / moments.count - mean * mean).clamp_min(0).to(weight.dtype)
        mean = mean.to(weight.dtype)
        ctx.step = _images_at_a_time(x, w.shape[0])
        maxima = [_max_pool(F.conv2d(images, w, padding=1), [2, 2]) for images in x.split(ctx.step)]
        pooled, *where = torch.cat([m[0] for m in maxima]), *(m[1] for m in maxima)
        invstd = torch.rsqrt(var + eps)
        out = _norm_relu(pooled, mean, invstd, gamma, beta)
        ctx.save_for_backward(x, w, gamma, mean, invstd, pooled, out, moments.total, moments.product, *where)
        ctx.count = moments.count
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    def backward(ctx, grad, _mean, _var):
        x, w, gamma, mean, invstd, pooled, out, total, product, *where = ctx.saved_tensors
        grad, grad_gamma, grad_beta, k0, k1 = _norm_relu_backward(grad, out, pooled, mean, invstd, gamma, ctx.count)
        grad_w = torch.outer(k0.double(), total) + k1.double().unsqueeze(1) * (w.flatten(1).double() @ product)
        grad_w = grad_w.to(mean.dtype).view_as(w)
        for images, g, at in zip(x.split(ctx.step), grad.split(ctx.step), where, strict=True):
            y = images[:, :1].expand(-1, w.shape[0], -1, -1)  # lends its shape
            y = torch.empty_like(y, memory_format=torch.channels_last)
            grad_w += _conv_backward(_unpool(g, y, at), images, w, False)[1]
        return None, grad_w, grad_gamma, grad_beta, None, None


class _Block(torch.autograd.Function):
    """(input, weight, gamma >= 0, beta) -> output, batch mean [C], biased batch variance [C]."""

    @staticmethod
    def forward(ctx, x, weight, gamma, beta, eps):
        w = weight.to(x.dtype)
        y = F.conv2d(x, w, padding=1)
        # the idle running statistics make it answer in their precision, not in y's
        mean, var = torch.batch_norm_update_stats(y, torch.zeros_like(gamma), torch.ones_like(gamma), 0.0)
        pooled, where = _max_pool(y, [2, 2])
        invstd = torch.rsqrt(var + eps)
        out = _norm_relu(pooled, mean, invstd, gamma, beta)
        ctx.save_for_backward(x, w, gamma, mean, invstd, pooled, out, y, where)
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    def backward(ctx, grad, _mean, _var):
        x, w, gamma, mean, invstd, pooled, out, y, where = ctx.saved_tensors
        count = y.numel() // y.shape[1]
        grad, grad_gamma, grad_beta, k0, k1 = _norm_relu_backward(grad, out, pooled, mean, invstd, gamma, count)
        grad = torch.addcmul(_per_channel(k0, y), y, _per_channel(k1, y)).add_(_unpool(grad, y, where))
        grad_x, grad_w = _conv_backward(grad, x, w, ctx.needs_input_grad[0])
        return grad_x, grad_w.to(mean.dtype), grad_gamma, grad_beta, None


def _compiled(x: Tensor, weight: Tensor) -> bool:
    return native.handles(x) and weight.dtype == torch.float32 and weight.shape[0] == native.N_FILTERS


def train_block(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, moments: PatchMoments | None = None) -> Tensor:
    """Convolution, batch normalisation by the batch's own statistics, ReLU and 2x2 max-pooling.

    Args:
        x: [B, C, H, W], float; fastest in channels_last memory format.
        conv, norm: the block's weights, as parameters or as slices of a cell state; ``norm``'s running statistics are updated.
        moments: of ``x`` when it is the images themselves: the first block.

    Returns:
        [B, filters, H // 2, W // 2].
    """
    # Pooling before normalising asks for a scale that is not negative: turn such a channel's filter round.
    sign = torch.where(norm.weight.detach() < 0, -1.0, 1.0).to(norm.weight.dtype)
    weight, gamma = conv.weight * sign.view(-1, 1, 1, 1), norm.weight * sign
    compiled = _compiled(x, weight)
    if moments is not None:
        block = native.FirstBlock if compiled else _FirstBlock
        out, mean, var = block.apply(x, weight, gamma, norm.bias, norm.eps, moments)
    else:
        block = native.Block if compiled else _Block
        out, mean, var = block.apply(x, weight, gamma, norm.bias, norm.eps)
    with torch.no_grad():
        count = x.shape[0] * x.shape[2] * x.shape[3]
        norm.running_mean.lerp_(mean * sign + conv.bias, norm.momentum)
        norm.running_var.lerp_(var * (count / max(count - 1, 1)), norm.momentum)
    return out


def eval_block(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """The same by the running statistics, which make normalisation part of the convolution's weight and bias.

    Args, returns: as ``train_block``.
    """
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight = (conv.weight * scale.view(-1, 1, 1, 1)).to(x.dtype)
    bias = (conv.bias - norm.running_mean) * scale + norm.bias
    if not torch.is_grad_enabled() and _compiled(x, conv.weight):
        return native.eval_block(x, weight, bias)
    bias = bias.to(x.dtype)
    parts = x.split(_images_at_a_time(x, weight.shape[0]))
    return torch.cat([F.max_pool2d(F.conv2d(part, weight, bias, padding=1), 2).relu_() for part in parts])
