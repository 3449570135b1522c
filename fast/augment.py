"""Batched augmentation: crop, resize, flip and colour jitter with parameters of each image's own.

data/transforms.py applies torchvision to one Pillow image after another; this works on whole
batches, on the device that trains. An antialiased crop-and-resize is two small matrix products,
rows and columns separately as in Pillow; colour jitter is elementwise. The only difference is that
Pillow rounds to whole grey levels after each step.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.transforms import PIXELS, Augmentation
from fast import gpu, native
from fast.gpu import colour

GREY = (0.299, 0.587, 0.114)  # ITU-R 601 luma, as Pillow's mode L
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # steps of torchvision's ColorJitter


class Windows(NamedTuple):
    """The part of each image that is resized, and the part of the result that is kept; each array
    int64 [B, 2] (y, x).
    """

    start: np.ndarray  # first pixel of the source window
    extent: np.ndarray  # size of the window
    out: np.ndarray  # size to which it is resized
    skip: np.ndarray  # first pixel of the result that is kept

    @staticmethod
    def crops(box: np.ndarray, image_size: int) -> Windows:
        """A crop [B, 4] (top, left, height, width) resized to image_size."""
        square = np.full((len(box), 2), image_size)
        return Windows(box[:, :2], box[:, 2:], square, np.zeros_like(square))

    @staticmethod
    def centres(sizes: np.ndarray, image_size: int) -> Windows:
        """Shorter side to image_size * 8 // 7, then the central image_size x image_size."""
        short = sizes.min(axis=1, keepdims=True)
        out = np.where(sizes == short, image_size * 8 // 7, image_size * 8 // 7 * sizes // short)
        skip = np.rint((out - image_size) / 2).astype(np.int64)
        return Windows(np.zeros_like(sizes), sizes, out, skip)


def table(windows: Windows, drawn: Augmentation | None) -> np.ndarray:
    """The parameters of ``transform``; float32 holds all but the factors exactly.

    Returns:
        [B, 9] or, with colour jitter, [B, 17] float32: windows (8), flip, factors (4), order (4).
    """
    flip = np.zeros((len(windows.start), 1)) if drawn is None else drawn.flip[:, None]
    columns = [*windows, flip]
    if drawn is not None and drawn.jitter is not None:
        columns += [drawn.jitter, drawn.order]
    return np.concatenate(columns, axis=1, dtype=np.float32)


@functools.cache
def _constant(device: torch.device, *values: float) -> Tensor:
    """A vector on the device, made once."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def _weights(
    start: Tensor, extent: Tensor, out: Tensor, skip: Tensor, length: int, image_size: int
) -> Tensor:
    """Pillow's antialiased bilinear filter along one axis: a triangle that widens with the step.

    Args:
        start, extent, out, skip: [B], float32, of one axis, see ``Windows``.
        length: padded size of the source along it.

    Returns:
        [B, image_size, length] float32, each row summing to 1.
    """
    scale = (extent / out).view(-1, 1, 1)
    target = torch.arange(image_size, device=start.device).view(1, -1, 1) + skip.view(-1, 1, 1)
    source = torch.arange(length, device=start.device).view(1, 1, -1) - start.view(-1, 1, 1)
    inverse = 1 / scale.clamp_min(1)
    w = (source + 0.5) * inverse - (target + 0.5) * scale * inverse
    w = w.abs_().neg_().add_(1).clamp_min_(0)
    w *= (source >= 0) & (source < extent.view(-1, 1, 1))
    return w.div_(w.sum(2, keepdim=True))


def _resize(pixels: Tensor, windows: Tensor, flip: Tensor, image_size: int) -> Tensor:
    """[B, 3, H, W] uint8 -> [B, 3, image_size, image_size] float32, grey levels 0 to 255; flipped
    where ``flip`` [B] is not 0.
    """
    rows, columns = (
        _weights(*windows[:, :, axis], pixels.shape[2 + axis], image_size) for axis in (0, 1)
    )
    columns = torch.where((flip != 0).view(-1, 1, 1), columns.flip(1), columns)
    x = torch.bmm(pixels.float().flatten(1, 2), columns.transpose(1, 2))  # [B, 3 * H, image_size]
    return torch.matmul(rows.unsqueeze(1), x.view(*pixels.shape[:3], -1))


def _grey(x: Tensor) -> Tensor:
    r, g, b = x.unbind(1)
    return (r * GREY[0]).add_(g, alpha=GREY[1]).add_(b, alpha=GREY[2]).unsqueeze(1)


def _shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue of HSV by ``turns`` [B, 1, 1, 1] of the circle, in Pillow's steps of 1/255."""
    r, g, b = x.unbind(1)
    top = torch.maximum(torch.maximum(r, g), b)
    bottom = torch.minimum(torch.minimum(r, g), b)
    chroma = top - bottom
    unit = (255 / 6) / chroma.clamp_min(1e-6)
    red, green = r == top, g == top
    hue = torch.where(green, ((b - r) * unit).add_(85), ((r - g) * unit).add_(170))
    hue = torch.where(red, (g - b) * unit, hue)
    hue = hue.floor_().remainder_(255)  # a byte in Pillow, so the sum wraps at 256
    hue = hue.add_((turns * 255).trunc().view(-1, 1, 1)).remainder_(256).mul_(6 / 255)
    out = torch.empty_like(x)
    torch.addcmul(bottom, chroma, (hue - 3).abs_().sub_(1).clamp_(0, 1), out=out[:, 0])
    torch.addcmul(bottom, chroma, (hue - 2).abs_().neg_().add_(2).clamp_(0, 1), out=out[:, 1])
    torch.addcmul(bottom, chroma, (hue - 4).abs_().neg_().add_(2).clamp_(0, 1), out=out[:, 2])
    return out


def _adjust_colours(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of each image, each image in its own order.

    Brightness, contrast and saturation are one interpolation, from black, the mean grey level or
    the grey image.

    Args:
        x: [B, 3, H, W] float32, grey levels 0 to 255.
        factors: [B, 4], see ``transform``.
        order: [B, 4] int64.

    Returns:
        [B, 3, H, W].
    """
    for step, factor in zip(order.t(), factors.gather(1, order).t(), strict=True):
        step, factor = step.view(-1, 1, 1, 1), factor.view(-1, 1, 1, 1)
        grey = _grey(x)
        mean = (grey.mean((1, 2, 3), keepdim=True) + 0.5).floor_()  # Pillow's is a whole number
        target = torch.where(step == CONTRAST, mean, grey).mul_(step != BRIGHTNESS)
        adjusted = torch.lerp(target, x, factor).clamp_(0, 255)
        x = torch.where(step == HUE, _shift_hue(x, factor), adjusted)
    return x


def adjust_colours(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """``_adjust_colours`` by the Triton kernel where that works."""
    kernel, args = colour.colour, (x, factors, order)
    if colour.handles(x) and gpu.works(kernel, _adjust_colours, 1e-3, x, lambda f: [f(*args)]):
        return kernel(*args)
    return _adjust_colours(*args)


def transform(pixels: Tensor, table: Tensor, image_size: int, scale: str = "imagenet") -> Tensor:
    """Turn decoded images into the learner's input, on the images' device.

    Args:
        pixels: [B, 3, H, W] uint8, smaller images padded on the right and below.
        table: each image's parameters, from the function ``table``, on the same device. The factors
            are those of brightness, contrast and saturation, and the shift of the hue in turns.
        image_size: height and width of the result in pixels.
        scale: "imagenet" for ImageNet's mean and standard deviation, "unit" for [0, 1].

    Returns:
        [B, 3, image_size, image_size] float32 in channels_last format.
    """
    device, shape = pixels.device, (len(pixels), 3, image_size, image_size)
    out = torch.empty(shape, device=device, memory_format=torch.channels_last)
    windows, flip = table[:, :8].view(-1, 4, 2).transpose(0, 1), table[:, 8]
    factors, order = (None, None) if table.shape[1] == 9 else (table[:, 9:13], table[:, 13:].long())
    mean, std = (_constant(device, *values) for values in PIXELS[scale])
    if native.handles(pixels, torch.uint8):
        return native.augment(pixels, windows.long(), flip != 0, factors, order, (mean, std), out)
    x = _resize(pixels, windows, flip, image_size)
    if factors is not None:
        x = adjust_colours(x, factors, order)
    mean, std = (v.view(3, 1, 1) * 255 for v in (mean, std))
    return torch.addcmul(-mean / std, x, 1 / std, out=out)
