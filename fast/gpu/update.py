"""A minibatch's loss and gradient, without autograd: each kernel writes its share of the flat
gradient in place.

The classifier's kernels read the last block's output where it lies, pixel by pixel (channels last),
while the classifier's weights follow the channels: feature ``at`` of the one is feature ``_place``
of the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast import gpu
from fast.gpu import jit, launch, tl
from fast.gpu.blocks import norm_gradient, normalised
from fast.gpu.convolution import convolve, filters_gradient, kernels_order
from fast.native import N_FILTERS

FEATURES, WARPS = 128, 4  # features that a program works on at once, and its warps
IMAGES = 16  # images that a program of the weights' gradient works on at once
LARGEST_WAYS = 128
Switches = list[tuple[Tensor, Tensor, Tensor, Tensor]]  # of each block: ``norm_gradient``'s first


@jit
def _place(at, PIXELS, C: tl.constexpr):
    return at % C * PIXELS + at // C


@jit
def _classify(
    x, y, weight, bias, losses, d_logits, d_x, N, K, PIXELS,
    KP: tl.constexpr, C: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """One image's cross entropy and its gradients; KP is K or a little more, a power of 2."""
    image, k, F = tl.program_id(0), tl.arange(0, KP), PIXELS * C
    total = tl.zeros([KP, FEATURES], tl.float32)
    for start in range(0, F, FEATURES):
        at = start + tl.arange(0, FEATURES)
        inside = (k[:, None] < K) & (at < F)[None, :]
        w = tl.load(weight + k[:, None] * F + _place(at, PIXELS, C)[None, :], inside, 0.0)
        total += w * tl.load(x + image * F + at, at < F, 0.0).to(tl.float32)[None, :]
    logits = tl.sum(total, 1) + tl.load(bias + k, k < K, 0.0)
    logits = tl.where(k < K, logits, float("-inf"))
    largest, label = tl.max(logits, 0), tl.load(y + image)
    power = tl.exp(logits - largest)
    norm = tl.sum(power, 0)
    of_label = tl.sum(tl.where(k == label, logits, 0.0), 0)
    of_label = tl.where((label >= 0) & (label < K), of_label, float("nan"))
    tl.store(losses + image, tl.log(norm) + largest - of_label)
    d = (power / norm - tl.where(k == label, 1.0, 0.0)) / N
    tl.store(d_logits + image * K + k, d, k < K)
    for start in range(0, F, FEATURES):
        at = start + tl.arange(0, FEATURES)
        inside = (k[:, None] < K) & (at < F)[None, :]
        w = tl.load(weight + k[:, None] * F + _place(at, PIXELS, C)[None, :], inside, 0.0)
        tl.store(d_x + image * F + at, tl.sum(d[:, None] * w, 0), at < F)


@jit
def _classifier_backward(
    x, losses, d_logits, loss, d_weight, d_bias, N, K, PIXELS,
    C: tl.constexpr, FEATURES: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """The weights' gradient for one class and FEATURES features; the first programs also write the
    bias's and the mean loss.
    """
    k, F = tl.program_id(0), PIXELS * C
    at = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    total = tl.zeros([IMAGES, FEATURES], tl.float32)
    d_sum, loss_sum = tl.zeros([IMAGES], tl.float32), tl.zeros([IMAGES], tl.float32)
    for start in range(0, N, IMAGES):
        image = start + tl.arange(0, IMAGES)
        d = tl.load(d_logits + image * K + k, image < N, 0.0)
        inside = (image < N)[:, None] & (at < F)[None, :]
        features = tl.load(x + image[:, None] * F + at[None, :], inside, 0.0).to(tl.float32)
        total += d[:, None] * features
        d_sum += d
        loss_sum += tl.load(losses + image, image < N, 0.0)
    tl.store(d_weight + k * F + _place(at, PIXELS, C), tl.sum(total, 0), at < F)
    if tl.program_id(1) == 0:
        tl.store(d_bias + k, tl.sum(d_sum, 0))
        if k == 0:
            tl.store(loss, tl.sum(loss_sum, 0) / N)


def classifier(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, d_weight: Tensor, d_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean cross entropy [] of the last block's output x [B, 32, H, W], channels last, and its
    gradient with respect to x; writes those of weight [K, 32 * H * W] and bias [K].
    """
    n, n_classes, pixels = len(x), len(bias), x[0, 0].numel()
    if weight.shape[1] != N_FILTERS * pixels:
        raise ValueError(f"images of {pixels} pixels, but weights {list(weight.shape)}")
    losses, d_logits = bias.new_empty(n), bias.new_empty(n, n_classes)
    loss, d_x, sizes = bias.new_empty(()), torch.empty_like(x), (n, n_classes, pixels)
    options = {"C": N_FILTERS, "FEATURES": FEATURES, "num_warps": WARPS}
    args, ways = (x, y, weight, bias, losses, d_logits, d_x, *sizes), _padded(n_classes)
    launch(_classify, (n,), *args, KP=ways, **options)
    grid = n_classes, -(-pixels * N_FILTERS // FEATURES)
    args = x, losses, d_logits, loss, d_weight, d_bias, *sizes
    launch(_classifier_backward, grid, *args, IMAGES=IMAGES, **options)
    return loss, d_x


def _padded(n_classes: int) -> int:
    return 1 << (n_classes - 1).bit_length()


def _classifier(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, d_weight: Tensor, d_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The same in PyTorch."""
    with torch.enable_grad():
        learned = [t.detach().requires_grad_() for t in (x, weight, bias)]
        features = learned[0].flatten(1).to(weight.dtype)
        loss = F.cross_entropy(F.linear(features, *learned[1:]), y)
        d_x, *grads = torch.autograd.grad(loss, learned)
    torch._foreach_copy_([d_weight, d_bias], grads)
    return loss.detach(), d_x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def loss_and_grad(
    x: Tensor,
    y: Tensor,
    parameters: Sequence[Tensor],
    norms: Sequence[nn.BatchNorm2d],
    grads: Sequence[Tensor],
    frozen: Switches | None = None,
) -> tuple[Tensor, Switches]:
    """Train on a minibatch by the kernels of ``blocks``, whose self-checks passed.

    Args:
        x, y: images [B, 3, H, W] and labels [B].
        parameters: for each block the filters, their bias, gamma and beta, then the classifier's
            weight [K, F] and bias [K].
        norms: the blocks', for their constants and running statistics, which are updated.
        grads: where to write the gradients of ``parameters``; those of the biases that batch
            normalisation cancels are left alone.
        frozen: another call's switches, which decide instead of the maxima and signs. The running
            statistics then stay as they are.

    Returns:
        The mean cross entropy [], and what decides poolings and ReLUs.
    """
    kept, switches = [], []
    for b, norm in enumerate(norms):
        weight, bias, *affine = parameters[4 * b : 4 * b + 4]
        x = x.contiguous(memory_format=torch.channels_last)
        filters = kernels_order(weight).contiguous()  # no copy if they lie so
        z = convolve(x, filters)
        running = norm.running_mean, norm.running_var, norm.momentum, norm.eps
        chosen = frozen[b] if frozen else None
        out, used = normalised(z, *affine, bias, *running, train=True, frozen=chosen)
        kept.append((x, filters, chosen))
        switches.append((z, used, *affine))
        x = out
    weight, bias = parameters[-2:]
    args = x, y, weight, bias

    def results(implementation) -> list[Tensor]:
        written = [torch.empty_like(t) for t in grads[-2:]]
        return [*implementation(*args, *written), *written]

    tolerance = 1e-3 if x.dtype == torch.float32 else 2e-2
    variant = f"{_padded(len(bias))} classes, {str(x.dtype).removeprefix('torch.')}"
    works = len(bias) <= LARGEST_WAYS and gpu.works(
        classifier, _classifier, tolerance, weight, results, variant
    )
    loss, grad = (classifier if works else _classifier)(*args, *grads[-2:])
    for b, (x, filters, chosen) in reversed(list(enumerate(kept))):
        d_weight, _, d_gamma, d_beta = grads[4 * b : 4 * b + 4]
        grad = norm_gradient(*switches[b], grad, d_gamma, d_beta, chosen)
        filters_gradient(x, grad, d_weight)
        if b:
            grad = convolve(grad, filters, back=True)
    return loss, switches
