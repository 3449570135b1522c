"""Transforms of images: the training augmentation, the resizing of validation and test, and the
learner's input.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils import load_package

CROP_RATIO = (3 / 4, 4 / 3)
# by --augment: share of the image's area in a crop; jitter of brightness, contrast, saturation, hue
CROPS = {
    "port": ((0.08, 1.0), (0.4, 0.4, 0.4, 0.2)),
    "zoom": ((0.22, 1.0), (0.2, 0.2, 0.4, 0.2)),
    "mild": ((0.6, 1.0), (0.2, 0.2, 0.2, 0.05)),
}
MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of pixels in [0, 1]
STD = (0.229, 0.224, 0.225)
# by --pixels: mean and deviation
PIXELS = {"imagenet": (MEAN, STD), "unit": ((0.0,) * 3, (1.0,) * 3)}


# ---- Random draws ----


class Augmentation(NamedTuple):
    """Parameters of RandomResizedCrop, RandomHorizontalFlip and ColorJitter, one row per image.

    Attributes:
        box: [B, 4] int64: top, left, height, width of the crop in pixels; None for no crop.
        flip: [B] bool.
        jitter: [B, 4] float64: factors of brightness, contrast and saturation, and the shift of
            the hue in turns; None for no jitter.
        order: [B, 4] int64: the order in which those four are applied, or None.
    """

    box: np.ndarray | None
    flip: np.ndarray
    jitter: np.ndarray | None
    order: np.ndarray | None


def draw_augmentation(
    rng: np.random.Generator, sizes: np.ndarray, augment: str = "port"
) -> Augmentation:
    """Draw the training augmentation's parameters, distributed as in torchvision.

    Args:
        rng: of which only ``random`` is used, see dataloader.py.
        sizes: [B, 2] int64, height and width of each source image in pixels.
        augment: a key of ``CROPS``.
    """
    n = len(sizes)
    height, width = sizes[:, :1], sizes[:, 1:]
    # RandomResizedCrop: the first of ten boxes that fits, else the largest centred one
    (least, most), spread = CROPS[augment]
    area = height * width * (least + (most - least) * rng.random((n, 10)))
    low, high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    ratio = np.exp(low + (high - low) * rng.random((n, 10)))
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = np.argmax(fits, axis=1)[:, None]
    w, h = np.take_along_axis(w, first, 1)[:, 0], np.take_along_axis(h, first, 1)[:, 0]
    place = rng.random((n, 2))
    top = np.floor(place[:, 0] * (sizes[:, 0] - h + 1)).astype(np.int64)
    left = np.floor(place[:, 1] * (sizes[:, 1] - w + 1)).astype(np.int64)
    for k in np.flatnonzero(~fits.any(axis=1)):
        H, W = sizes[k].tolist()
        h[k], w[k] = min(H, round(W / CROP_RATIO[0])), min(W, round(H * CROP_RATIO[1]))
        top[k], left[k] = (H - h[k]) // 2, (W - w[k]) // 2
    flip = rng.random(n) < 0.5
    jitter = np.array([1.0, 1.0, 1.0, 0.0]) + np.array(spread) * (2 * rng.random((n, 4)) - 1)
    order = np.argsort(rng.random((n, 4)), axis=1, kind="stable")
    return Augmentation(np.stack((top, left, h, w), axis=1), flip, jitter, order)


def draw_flips(rng: np.random.Generator, n: int) -> Augmentation:
    """Draw which of n images are flipped, each with probability 1/2."""
    return Augmentation(None, rng.random(n) < 0.5, None, None)


# ---- Pixels ----


def _torchvision():
    # loads for a second; fast/ does without it
    return load_package("torchvision.transforms.functional")


def train_image(image: Image.Image, drawn: Augmentation, k: int, image_size: int) -> Image.Image:
    """Apply row ``k`` of the augmentation: crop and resize, flip, jitter in the drawn order."""
    TF = _torchvision()
    size, bilinear = [image_size, image_size], TF.InterpolationMode.BILINEAR
    if drawn.box is None:
        image = TF.resize(image, size, bilinear)
    else:
        image = TF.resized_crop(image, *drawn.box[k].tolist(), size, bilinear)
    if drawn.flip[k]:
        image = TF.hflip(image)
    if drawn.jitter is None or drawn.order is None:
        return image
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for which in drawn.order[k]:
        image = adjust[which](image, float(drawn.jitter[k, which]))
    return image


def eval_image(image: Image.Image, image_size: int, augment: str) -> Image.Image:
    """Resize to a square: the transform of validation and test.

    Args:
        augment: "port": the shorter side to image_size * 8 // 7, then a centre crop; any other:
            the whole image squashed, as the authors do in training, too.
    """
    TF = _torchvision()
    if augment != "port":
        return TF.resize(image, [image_size, image_size], TF.InterpolationMode.BILINEAR)
    longer, most = max(image.size), 32 * min(image.size)
    if longer > most:  # scaling up a one-pixel strip would exhaust memory
        middle = most + (longer - most) % 2
        image = TF.center_crop(image, [min(image.height, middle), min(image.width, middle)])
    image = TF.resize(image, [image_size * 8 // 7], TF.InterpolationMode.BILINEAR)
    return TF.center_crop(image, [image_size, image_size])


def to_input(images: list[Image.Image], pixels: str) -> Tensor:
    """Turn images into the learner's input [B, 3, H, W], float32.

    Args:
        pixels: "imagenet" to normalise by ImageNet's mean and deviation; "unit" for [0, 1].
    """
    TF, (mean, std) = _torchvision(), PIXELS[pixels]
    return torch.stack([TF.normalize(TF.to_tensor(image), mean, std) for image in images])
