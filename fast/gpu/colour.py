"""Colour jitter, one program per image."""

from __future__ import annotations

import torch
from torch import Tensor

from fast.gpu import INT32, jit, launch, tl

BLOCK, WARPS = 1024, 8  # pixels that a program works on at once, and its warps


@jit
def _grey(r, g, b):
    return r * 0.299 + g * 0.587 + b * 0.114


@jit
def _lerp(target, x, factor):
    """torch.lerp's formula, then clamped to grey levels."""
    y = tl.where(factor < 0.5, target + factor * (x - target), x - (x - target) * (1 - factor))
    return tl.minimum(tl.maximum(y, 0.0), 255.0)


@jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@jit
def _adjust(r, g, b, step, factor, mean):
    """One of the four steps, see ``augment._adjust_colours``."""
    grey = _grey(r, g, b)
    target = tl.where(step == 0, 0.0, tl.where(step == 1, mean, grey))
    top, bottom = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
    chroma = top - bottom
    unit = tl.div_rn(tl.full(r.shape, 255 / 6, tl.float32), tl.maximum(chroma, 1e-6))
    hue = tl.where(
        r == top, (g - b) * unit, tl.where(g == top, (b - r) * unit + 85, (r - g) * unit + 170)
    )
    turn = factor * 255
    hue = tl.floor(hue)
    hue = tl.where(hue < 0, hue + 255, hue) + tl.where(turn < 0, tl.ceil(turn), tl.floor(turn))
    hue = tl.where(hue < 0, hue + 256, hue)  # a byte in Pillow
    hue = tl.where(hue >= 256, hue - 256, hue) * (6 / 255)
    is_hue = step == 3
    r = tl.where(is_hue, bottom + chroma * _clamp(tl.abs(hue - 3) - 1), _lerp(target, r, factor))
    g = tl.where(is_hue, bottom + chroma * _clamp(2 - tl.abs(hue - 2)), _lerp(target, g, factor))
    b = tl.where(is_hue, bottom + chroma * _clamp(2 - tl.abs(hue - 4)), _lerp(target, b, factor))
    return r, g, b


@jit
def _load(x, at, inside, n_pixels):
    """Red, green and blue."""
    r, g = tl.load(x + at, inside, 0.0), tl.load(x + n_pixels + at, inside, 0.0)
    return r, g, tl.load(x + 2 * n_pixels + at, inside, 0.0)


@jit
def _colour(x, factors, order, out, n_pixels, BLOCK: tl.constexpr):
    """One image: first the mean grey level before its contrast step, then all steps."""
    image = tl.program_id(0)
    x += image * 3 * n_pixels
    out += image * 3 * n_pixels
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_pixels, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n_pixels
        r, g, b = _load(x, at, inside, n_pixels)
        before = image >= 0  # before the contrast step: true so far
        for k in range(4):
            step = tl.load(order + image * 4 + k)
            before = before & (step != 1)
            new_r, new_g, new_b = _adjust(r, g, b, step, tl.load(factors + image * 4 + k), 0.0)
            r, g = tl.where(before, new_r, r), tl.where(before, new_g, g)
            b = tl.where(before, new_b, b)
        total += tl.where(inside, _grey(r, g, b), 0.0)
    mean = tl.floor(tl.sum(total, 0) / n_pixels + 0.5)
    for start in range(0, n_pixels, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n_pixels
        r, g, b = _load(x, at, inside, n_pixels)
        for k in range(4):
            step = tl.load(order + image * 4 + k)
            r, g, b = _adjust(r, g, b, step, tl.load(factors + image * 4 + k), mean)
        tl.store(out + at, r, inside)
        tl.store(out + n_pixels + at, g, inside)
        tl.store(out + 2 * n_pixels + at, b, inside)


def handles(x: Tensor) -> bool:
    """Whether offsets into images ``x`` fit into int32."""
    return x.numel() < INT32


def colour(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """``augment._adjust_colours`` in one launch; only for what ``handles`` accepts."""
    x, order = x.contiguous(), order.contiguous()
    out, n_pixels = torch.empty_like(x), x.shape[2] * x.shape[3]
    args = factors.gather(1, order), order, out, n_pixels
    launch(_colour, (len(x),), x, *args, BLOCK=BLOCK, num_warps=WARPS)
    return out
