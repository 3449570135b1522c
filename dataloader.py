"""Images on disk -> episodes.

An episode is a pure function of (seed, split, index): its classes, its images, each augmentation parameter and the order of its
minibatches come from generators made from these three. Workers, prefetching and resuming need no state.

Only ``Generator.random`` is drawn from: its stream is fixed by the Philox algorithm, while the higher samplers may change
between NumPy releases.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from episode import Episode
from utils import UserError

SPLITS = ("train", "val", "test")
MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of pixels in [0, 1]
STD = (0.229, 0.224, 0.225)
CROP_AREA = (0.08, 1.0)  # share of the image's area
CROP_RATIO = (3 / 4, 4 / 3)
JITTER = (0.4, 0.4, 0.4, 0.2)  # brightness, contrast, saturation, hue
_PICK, _AUGMENT, _ORDER = range(3)  # one stream each, so that changing one leaves the others alone
_IGNORED = {"thumbs.db", "desktop.ini"}


class Split(NamedTuple):
    """One split's files, classes and images both in the order of their names."""

    name: str  # train, val or test
    classes: list[str]
    files: list[list[Path]]  # files[c] are the images of classes[c]


def scan_split(root: Path, split: str) -> Split:
    """List ``root/<split>/<class>/<image>``; hidden files and operating systems' droppings are ignored.

    Raises:
        UserError: the folder is missing or empty, or something in it is not what its place says.
    """
    if not root.is_dir():
        raise UserError(f"--data-root {root}: no such folder; it should hold train/, val/ and test/ with a folder a class")
    folder = root / split
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --data-root should hold train/, val/ and test/")
    known = {ext.lower() for ext, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    classes, files = [], []
    for entry in _visible(folder):
        if not entry.is_dir():
            raise UserError(f"{entry}: a file among the class folders of {split}; remove it")
        images = _visible(entry)
        for image in images:
            if image.is_dir():
                raise UserError(f"{image}: a folder where an image should be; expected {split}/<class>/<image>")
            if image.suffix.lower() not in known:
                raise UserError(f"{image}: not an image by its name; remove it or give it its format's ending")
        classes.append(entry.name)
        files.append(images)
    if not classes:
        raise UserError(f"{folder}: holds no class folders; expected {split}/<class>/<image>")
    return Split(split, classes, files)


def _visible(folder: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as e:
        raise UserError(f"{folder}: cannot be read ({e.strerror})") from e
    return [folder / n for n in names if not n.startswith(".") and n.lower() not in _IGNORED]


def check_split(split: Split, n_class: int, n_shot: int, n_eval: int) -> None:
    """See that each possible episode can be drawn.

    Raises:
        UserError: there are too few classes, or a class has too few images; it is named.
    """
    if len(split.classes) < n_class:
        raise UserError(f"--n-class {n_class}: the {split.name} split has only {len(split.classes)} classes")
    for name, images in zip(split.classes, split.files, strict=True):
        if len(images) < n_shot + n_eval:
            raise UserError(
                f"{split.name}/{name}: {len(images)} images, but an episode takes {n_shot + n_eval} "
                f"(--n-shot {n_shot} + --n-eval {n_eval})"
            )


def _generator(seed: int, split: str, index: int, purpose: int) -> np.random.Generator:
    key = np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index, purpose))
    return np.random.Generator(np.random.Philox(key))


def draw_images(seed: int, split: Split, index: int, n_class: int, n_image: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes without replacement, then different images of each.

    Returns:
        Class numbers [n_class] and image numbers within their class [n_class, n_image], int64.
    """
    rng = _generator(seed, split.name, index, _PICK)
    classes = np.argsort(rng.random(len(split.classes)), kind="stable")[:n_class]
    images = [np.argsort(rng.random(len(split.files[c])), kind="stable")[:n_image] for c in classes]
    return classes, np.stack(images)


def draw_order(seed: int, split: str, index: int, n_pass: int, n_support: int) -> np.ndarray:
    """Order of the support images in each pass over them, [n_pass, n_support] int64."""
    return np.argsort(_generator(seed, split, index, _ORDER).random((n_pass, n_support)), axis=1, kind="stable")


class Augmentation(NamedTuple):
    """One image a row: what RandomResizedCrop, RandomHorizontalFlip and ColorJitter draw, in the order of application."""

    box: np.ndarray  # [B, 4] int64: top, left, height, width of the crop in pixels of the source
    flip: np.ndarray  # [B] bool
    jitter: np.ndarray  # [B, 4] float64: brightness, contrast, saturation factors, hue shift in turns
    order: np.ndarray  # [B, 4] int64: the order in which those four are applied


def draw_augmentation(seed: int, split: str, index: int, sizes: np.ndarray) -> Augmentation:
    """The training augmentation's parameters, distributed as torchvision draws them.

    Args:
        sizes: [B, 2] int64, height and width of each source image in pixels.
    """
    rng = _generator(seed, split, index, _AUGMENT)
    n = len(sizes)
    height, width = sizes[:, :1], sizes[:, 1:]
    # RandomResizedCrop: the first of ten boxes that fits, else the largest centred one of an allowed shape
    area = height * width * (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * rng.random((n, 10)))
    low, high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    ratio = np.exp(low + (high - low) * rng.random((n, 10)))
    w, h = np.rint(np.sqrt(area * ratio)).astype(np.int64), np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = np.argmax(fits, axis=1)[:, None]
    w, h = np.take_along_axis(w, first, 1)[:, 0], np.take_along_axis(h, first, 1)[:, 0]
    place = rng.random((n, 2))
    top = np.floor(place[:, 0] * (sizes[:, 0] - h + 1)).astype(np.int64)
    left = np.floor(place[:, 1] * (sizes[:, 1] - w + 1)).astype(np.int64)
    for k in np.flatnonzero(~fits.any(axis=1)):
        H, W = (int(v) for v in sizes[k])
        h[k], w[k] = H, W
        if W / H < CROP_RATIO[0]:
            h[k] = round(W / CROP_RATIO[0])
        elif W / H > CROP_RATIO[1]:
            w[k] = round(H * CROP_RATIO[1])
        top[k], left[k] = (H - h[k]) // 2, (W - w[k]) // 2
    flip = rng.random(n) < 0.5
    centre, spread = np.array([1.0, 1.0, 1.0, 0.0]), np.array(JITTER)
    jitter = centre + spread * (2 * rng.random((n, 4)) - 1)
    order = np.argsort(rng.random((n, 4)), axis=1, kind="stable")
    return Augmentation(np.stack((top, left, h, w), axis=1), flip, jitter, order)


def load_image(path: Path) -> Image.Image:
    """Decode one file to RGB, whatever its mode.

    Raises:
        UserError: it cannot be decoded; it is named.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as e:  # Pillow's decoders raise nearly anything on hostile bytes
        reason = str(e).replace(str(path), "").strip(" '\"") or type(e).__name__
        raise UserError(f"{path}: not a readable image ({reason}); remove or replace it") from e


def _normalise(image: Image.Image) -> torch.Tensor:
    return TF.normalize(TF.to_tensor(image), MEAN, STD)


def train_transform(image: Image.Image, augmentation: Augmentation, k: int, image_size: int) -> torch.Tensor:
    """Apply row ``k`` of the parameters with torchvision's own functions.

    Returns:
        [3, image_size, image_size] float32, normalised.
    """
    top, left, height, width = (int(v) for v in augmentation.box[k])
    image = TF.resized_crop(image, top, left, height, width, [image_size, image_size], InterpolationMode.BILINEAR)
    if augmentation.flip[k]:
        image = TF.hflip(image)
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for step in augmentation.order[k]:
        image = adjust[step](image, float(augmentation.jitter[k, step]))
    return _normalise(image)


def eval_transform(image: Image.Image, image_size: int) -> torch.Tensor:
    """Shorter side to image_size * 8 // 7, centre crop, normalise: [3, image_size, image_size] float32."""
    image = TF.resize(image, [image_size * 8 // 7], InterpolationMode.BILINEAR)
    return _normalise(TF.center_crop(image, [image_size, image_size]))


def squash_transform(image: Image.Image, image_size: int) -> torch.Tensor:
    """The whole image squashed to a square, as the authors prepared theirs: [3, image_size, image_size] float32."""
    return _normalise(TF.resize(image, [image_size, image_size], InterpolationMode.BILINEAR))


class EpisodeDataset(Dataset):
    """Episode ``index`` of a split, read from image files by Pillow and torchvision.

    Args:
        split: as ``scan_split`` lists it.
        seed: the run's seed.
        n_class, n_shot, n_eval: shape of the episode.
        n_pass: passes over the support set in the inner loop (``--epoch``).
        image_size: height and width of the result in pixels.
        augment: "port" for the older port's transforms (random for the train split), "none" to squash each image.
        length: how many episodes there are.

    Raises:
        UserError: the split cannot serve such episodes.
    """

    def __init__(
        self,
        split: Split,
        seed: int,
        n_class: int,
        n_shot: int,
        n_eval: int,
        n_pass: int,
        image_size: int,
        augment: str,
        length: int,
    ):
        check_split(split, n_class, n_shot, n_eval)
        self.split, self.seed, self.length = split, seed, length
        self.n_class, self.n_shot, self.n_eval, self.n_pass = n_class, n_shot, n_eval, n_pass
        self.image_size, self.augment = image_size, augment

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Episode | UserError:
        """The episode, or the error that a file gave: an exception raised here would reach the user as a worker's traceback."""
        try:
            return self._episode(index)
        except UserError as e:
            return e

    def _episode(self, index: int) -> Episode:
        classes, picks = draw_images(self.seed, self.split, index, self.n_class, self.n_shot + self.n_eval)
        images = [load_image(self.split.files[c][k]) for c, row in zip(classes, picks, strict=True) for k in row]
        if self.augment == "port" and self.split.name == "train":
            sizes = np.array([(image.height, image.width) for image in images], dtype=np.int64)
            drawn = draw_augmentation(self.seed, self.split.name, index, sizes)
            tensors = [train_transform(image, drawn, k, self.image_size) for k, image in enumerate(images)]
        else:
            transform = eval_transform if self.augment == "port" else squash_transform
            tensors = [transform(image, self.image_size) for image in images]
        x = torch.stack(tensors).view(self.n_class, self.n_shot + self.n_eval, 3, self.image_size, self.image_size)
        y = torch.arange(self.n_class)
        order = draw_order(self.seed, self.split.name, index, self.n_pass, self.n_class * self.n_shot)
        return Episode(
            x[:, : self.n_shot].flatten(0, 1),
            y.repeat_interleave(self.n_shot),
            x[:, self.n_shot :].flatten(0, 1),
            y.repeat_interleave(self.n_eval),
            torch.from_numpy(order),
        )


def episodes(dataset: EpisodeDataset, start: int, n_workers: int, pin_memory: bool):
    """Yield episodes ``start``, ``start + 1``, ... of a data set in order, prepared ahead by worker processes.

    Raises:
        UserError: a file cannot be used.
    """
    loader = DataLoader(
        dataset, batch_size=None, sampler=range(start, len(dataset)), num_workers=n_workers, pin_memory=pin_memory
    )
    for episode in loader:
        if isinstance(episode, UserError):
            raise episode
        yield episode
