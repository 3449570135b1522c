"""Image files on disk -> episodes.

An episode is a pure function of (seed, split, index): random generators made from these three draw
its classes, images, augmentation and order of minibatches. Workers, prefetching and resuming need
no state.

Only ``Generator.random`` is used: the Philox algorithm fixes its stream, while the higher samplers
may change between NumPy releases.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data.imagefiles import load_image
from data.layout import Split, check_sizes
from episode import Episode
from utils import SPLITS, load_package

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
_PICK, _AUGMENT, _ORDER = range(3)  # one random stream each, so that none depends on another


# ---- Random draws ----


def _generator(seed: int, split: str, index: int, purpose: int) -> np.random.Generator:
    key = np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index, purpose))
    return np.random.Generator(np.random.Philox(key))


def draw_images(
    seed: int, split: Split, index: int, n_class: int, n_image: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw classes without replacement, then images of each without replacement.

    Returns:
        Class numbers [n_class] and image numbers within their class [n_class, n_image], int64.
    """
    rng = _generator(seed, split.name, index, _PICK)
    classes = np.argsort(rng.random(len(split.classes)), kind="stable")[:n_class]
    images = [np.argsort(rng.random(len(split.files[c])), kind="stable")[:n_image] for c in classes]
    return classes, np.stack(images)


def draw_order(
    seed: int, split: str, index: int, n_pass: int, n_support: int, shuffle: str = "pass"
) -> np.ndarray:
    """Draw the order of the support images in each pass, [n_pass, n_support] int64.

    Args:
        shuffle: "pass" for a new order in each pass, "episode" for one in all of them.
    """
    keys = _generator(seed, split, index, _ORDER).random((n_pass, n_support))
    order = np.argsort(keys, axis=1, kind="stable")
    return order if shuffle == "pass" else order[:1].repeat(n_pass, axis=0)


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
    seed: int, split: str, index: int, sizes: np.ndarray, augment: str = "port"
) -> Augmentation:
    """Draw the training augmentation's parameters, distributed as in torchvision.

    Args:
        sizes: [B, 2] int64, height and width of each source image in pixels.
        augment: a key of ``CROPS``.
    """
    rng = _generator(seed, split, index, _AUGMENT)
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


def draw_flips(seed: int, split: str, index: int, n: int) -> Augmentation:
    """Draw which of n images are flipped, each with probability 1/2."""
    return Augmentation(None, _generator(seed, split, index, _AUGMENT).random(n) < 0.5, None, None)


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


# ---- Episodes ----


@dataclass(eq=False, repr=False)
class EpisodeDataset(Dataset):
    """Episodes 0, 1, ... of a split, read from its image files.

    Args:
        split: as ``scan_split`` lists it.
        seed: the run's seed.
        n_class, n_shot, n_eval: shape of the episode.
        n_pass: passes over the support set in the inner loop (``--epoch``).
        image_size: height and width of the result in pixels.
        augment: of the train split: "none", "flip", or a key of ``CROPS`` for crops, flips and
            jitter. Other splits use ``eval_image``.
        length: number of episodes.
        pixels: "imagenet" or "unit", see ``to_input``.
        shuffle: "pass" or "episode", see ``draw_order``.
        in_order: sort an episode's classes by name, so that episodes of all classes give each
            class the same label.

    Raises:
        UserError: the split cannot serve such episodes.
    """

    split: Split
    seed: int
    n_class: int
    n_shot: int
    n_eval: int
    n_pass: int
    image_size: int
    augment: str
    length: int
    pixels: str = "imagenet"
    shuffle: str = "pass"
    in_order: bool = False

    def __post_init__(self) -> None:
        check_sizes(self.split, self.n_class, self.n_shot, self.n_eval)
        self.files = self.split.images
        self._offsets = np.cumsum([0] + [len(of_class) for of_class in self.split.files])

    def __len__(self) -> int:
        return self.length

    def first(self, n: int) -> EpisodeDataset:
        """The first ``n`` episodes."""
        some = copy.copy(self)
        some.length = n
        return some

    def indices(self, index: int) -> np.ndarray:
        """Indices in ``files`` of an episode's images, support set first.

        Returns:
            [n_class * (n_shot + n_eval)] int64.
        """
        n_image = self.n_shot + self.n_eval
        classes, picks = draw_images(self.seed, self.split, index, self.n_class, n_image)
        numbers = self._offsets[classes][:, None] + picks
        if self.in_order:
            numbers = numbers[np.argsort(classes)]
        support, query = numbers[:, : self.n_shot], numbers[:, self.n_shot :]
        return np.concatenate((support.reshape(-1), query.reshape(-1)))

    def order(self, index: int) -> Tensor:
        """See ``Episode.order``."""
        n_support = self.n_class * self.n_shot
        shape = (self.n_pass, n_support, self.shuffle)
        return torch.from_numpy(draw_order(self.seed, self.split.name, index, *shape))

    def augmentation(self, index: int, sizes: np.ndarray) -> Augmentation | None:
        """Draw the episode's augmentation, if its split and ``augment`` ask for one.

        Args:
            sizes: [B, 2] int64, height and width of each source image in pixels.
        """
        if self.augment == "none" or self.split.name != "train":
            return None
        if self.augment == "flip":
            return draw_flips(self.seed, self.split.name, index, len(sizes))
        return draw_augmentation(self.seed, self.split.name, index, sizes, self.augment)

    def episode(self, x: Tensor, order: Tensor) -> Episode:
        """Make an episode of the images ``x``, support set first."""
        n_support = self.n_class * self.n_shot
        y = torch.arange(self.n_class, device=x.device)
        y_support, y_query = y.repeat_interleave(self.n_shot), y.repeat_interleave(self.n_eval)
        return Episode(x[:n_support], y_support, x[n_support:], y_query, order)

    def __getitem__(self, index: int) -> Episode:
        images = [load_image(self.files[number]) for number in self.indices(index)]
        sizes = np.array([(image.height, image.width) for image in images])
        drawn, size = self.augmentation(index, sizes), self.image_size
        if drawn is None:
            images = [eval_image(image, size, self.augment) for image in images]
        else:
            images = [train_image(image, drawn, k, size) for k, image in enumerate(images)]
        return self.episode(to_input(images, self.pixels), self.order(index))

    def deliver(self, item: Episode, device: torch.device) -> Episode:
        """Move what ``__getitem__`` made in a worker process to the device that trains."""
        return Episode(*(t.to(device, non_blocking=True) for t in item))
