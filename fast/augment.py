"""Whole batches of images cropped, resized, flipped and coloured at once, each image with its own
parameters.

This does on the device that trains what dataloader.py does with torchvision to one Pillow image
after another. An antialiased crop-and-resize is two small matrix products, rows and columns apart
as in Pillow; the colours are elementwise. Pillow rounds to whole grey levels after each step and
this does not: there is no other difference.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataloader import PIXELS, Augmentation
from fast import gpu, native
from fast.gpu.colour import colour

GREY = (0.299, 0.587, 0.114)  # ITU-R 601 luma, as Pillow's mode L
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


class Windows(NamedTuple):
    """Which part of each image is resized to which size, and which part of the result is kept:
    int64 [B, 2] (y, x) each.
    """

    start: np.ndarray  # first pixel of the source's part
    extent: np.ndarray  # its size
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

    @staticmethod
    def squashed(sizes: np.ndarray, image_size: int) -> Windows:
        """The whole image to image_size x image_size."""
        zero = np.zeros_like(sizes)
        return Windows(zero, sizes, zero + image_size, zero)


def table(windows: Windows, drawn: Augmentation | None) -> np.ndarray:
    """All that ``transform`` needs to know of each image, as numbers that float32 holds exactly,
    but for the factors.

    Returns:
        [B, 9] or, if colours change, [B, 17] float32: windows (8), flip, factors (4), their order
        (4).
    """
    columns = [
        *windows,
        np.zeros((len(windows.start), 1)) if drawn is None else drawn.flip[:, None],
    ]
    if drawn is not None and drawn.jitter is not None:
        columns += [drawn.jitter, drawn.order]
    return np.concatenate(columns, axis=1, dtype=np.float32)


@functools.cache
def _constant(device: torch.device, *values: float) -> Tensor:
    """A vector that stays on the device."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def _weights(
    start: Tensor, extent: Tensor, out: Tensor, skip: Tensor, length: int, image_size: int
) -> Tensor:
    """Antialiased bilinear filter along one axis (Pillow's: a triangle as wide as the step when it
    reduces).

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


def _filters(
    windows: Tensor, flip: Tensor, size: tuple[int, int], image_size: int
) -> tuple[Tensor, Tensor]:
    """Weights of all images' rows [B, image_size, H] and columns [B, image_size, W], mirrored where
    ``flip`` [B] is not 0.
    """
    rows, columns = (_weights(*windows[:, :, axis], size[axis], image_size) for axis in (0, 1))
    return rows, torch.where((flip != 0).view(-1, 1, 1), columns.flip(1), columns)


def _resize(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[B, 3, H, W] uint8 -> [B, 3, image_size, image_size] float32, grey levels 0 to 255."""
    x = torch.bmm(pixels.float().flatten(1, 2), columns.transpose(1, 2))  # [B, 3 * H, image_size]
    return torch.matmul(rows.unsqueeze(1), x.view(*pixels.shape[:3], -1))


def _grey(x: Tensor) -> Tensor:
    r, g, b = x.unbind(1)
    return (r * GREY[0]).add_(g, alpha=GREY[1]).add_(b, alpha=GREY[2]).unsqueeze(1)


def _turn_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue of HSV by ``turns`` [B, 1, 1, 1] of the circle, in Pillow's steps of 1/255."""
    r, g, b = x.unbind(1)
    top = torch.maximum(torch.maximum(r, g), b)
    bottom = torch.minimum(torch.minimum(r, g), b)
    chroma = top - bottom
    unit = (255 / 6) / chroma.clamp_min(1e-6)
    red, green = r == top, g == top
    hue = torch.where(
        red,
        (g - b) * unit,
        torch.where(green, ((b - r) * unit).add_(85), ((r - g) * unit).add_(170)),
    )
    hue = hue.floor_().add_((turns * 255).trunc().view(-1, 1, 1)).remainder_(255).mul_(6 / 255)
    out = torch.empty_like(x)
    torch.addcmul(bottom, chroma, (hue - 3).abs_().sub_(1).clamp_(0, 1), out=out[:, 0])
    torch.addcmul(bottom, chroma, (hue - 2).abs_().neg_().add_(2).clamp_(0, 1), out=out[:, 1])
    torch.addcmul(bottom, chroma, (hue - 4).abs_().neg_().add_(2).clamp_(0, 1), out=out[:, 2])
    return out


def _adjust(x: Tensor, step: int, factor: Tensor) -> Tensor:
    """One step of ColorJitter with a factor for each image [B, 1, 1, 1]; x holds grey levels 0 to
    255.
    """
    if step == HUE:
        return _turn_hue(x, factor)
    if step == BRIGHTNESS:
        return (x * factor).clamp_(0, 255)
    target = _grey(x)
    if step == CONTRAST:
        target = _whole_mean(target)
    return torch.lerp(target, x, factor).clamp_(0, 255)


def _whole_mean(grey: Tensor) -> Tensor:
    """Each image's mean as Pillow's whole number, [B, 1, 1, 1]."""
    return (grey.mean((1, 2, 3), keepdim=True) + 0.5).floor_()


def _colour(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of each image, each image in its own order.

    Args:
        x: [B, 3, H, W], grey levels 0 to 255, which may be overwritten.
        factors: [B, 4], see ``transform``.
        order: [B, 4] int64.
    """
    if x.device.type == "cpu":
        for place in range(4):
            for step in range(4):
                which = (order[:, place] == step).nonzero()[:, 0]
                x[which] = _adjust(x[which], step, factors[which, step].view(-1, 1, 1, 1))
        return x
    return gpu.replaced(colour, _colour_together, 1e-3, x, factors, order)


def _colour_together(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """The same for a GPU, where the number of launches counts: the same operations for all images
    at each of the four places.

    Brightness, contrast and saturation are one interpolation, from black, the mean grey or the grey
    picture.
    """
    for step, factor in zip(order.t(), factors.gather(1, order).t(), strict=True):
        step, factor = step.view(-1, 1, 1, 1), factor.view(-1, 1, 1, 1)
        grey = _grey(x)
        target = torch.where(step == CONTRAST, _whole_mean(grey), grey).mul_(step != BRIGHTNESS)
        x = torch.where(
            step == HUE, _turn_hue(x, factor), torch.lerp(target, x, factor).clamp_(0, 255)
        )
    return x


def transform(pixels: Tensor, table: Tensor, image_size: int, scale: str = "imagenet") -> Tensor:
    """Turn decoded images into the learner's input.

    Args:
        pixels: [B, 3, H, W] uint8, smaller images padded on the right and below; their device does
            the work.
        table: what to do with each image, from the function ``table``, on the same device. Factors
            are those of brightness, contrast and saturation, and the shift of the hue in turns;
            without them colours stay.
        image_size: pixels of the result.
        scale: "imagenet" for ImageNet's mean and deviation, "unit" for numbers from 0 to 1.

    Returns:
        [B, 3, image_size, image_size] float32 in channels_last format.
    """
    device = pixels.device
    out = torch.empty(
        len(pixels), 3, image_size, image_size, device=device, memory_format=torch.channels_last
    )
    windows, flip = table[:, :8].view(-1, 4, 2).transpose(0, 1), table[:, 8]
    factors, order = (None, None) if table.shape[1] == 9 else (table[:, 9:13], table[:, 13:].long())
    mean, std = (_constant(device, *values) for values in PIXELS[scale])
    if native.handles(pixels, torch.uint8):
        return native.augment(pixels, windows.long(), flip != 0, factors, order, (mean, std), out)
    x = _resize(pixels, *_filters(windows, flip, pixels.shape[2:], image_size))
    if factors is not None:
        x = _colour(x, factors, order)
    mean, std = (v.view(3, 1, 1) * 255 for v in (mean, std))
    return torch.addcmul(-mean / std, x, 1 / std, out=out)
