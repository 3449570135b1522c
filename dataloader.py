"""Image files on disk -> episodes.

An episode is a pure function of (seed, split, index): random generators made from these three draw
its classes, images, augmentation and order of minibatches. Workers, prefetching and resuming need
no state.

Only ``Generator.random`` is used: the Philox algorithm fixes its stream, while the higher samplers
may change between NumPy releases.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data import transforms
from data.imagefiles import load_image
from data.layout import Split, check_sizes
from episode import Episode
from utils import SPLITS

PICK, AUGMENT, ORDER = range(3)  # one random stream each, so that none depends on another


# ---- Random draws ----


def generator(seed: int, split: str, index: int, purpose: int) -> np.random.Generator:
    """The random numbers of an episode for one ``purpose``."""
    key = np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index, purpose))
    return np.random.Generator(np.random.Philox(key))


def draw_images(
    seed: int, split: Split, index: int, n_class: int, n_image: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw classes without replacement, then images of each without replacement.

    Returns:
        Class numbers [n_class] and image numbers within their class [n_class, n_image], int64.
    """
    rng = generator(seed, split.name, index, PICK)
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
    keys = generator(seed, split, index, ORDER).random((n_pass, n_support))
    order = np.argsort(keys, axis=1, kind="stable")
    return order if shuffle == "pass" else order[:1].repeat(n_pass, axis=0)


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
        augment: of the train split: "none", "flip", or a key of ``transforms.CROPS`` for crops,
            flips and jitter. Other splits use ``transforms.eval_image``.
        length: number of episodes.
        pixels: "imagenet" or "unit", see ``transforms.to_input``.
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

    def augmentation(self, index: int, sizes: np.ndarray) -> transforms.Augmentation | None:
        """Draw the episode's augmentation, if its split and ``augment`` ask for one.

        Args:
            sizes: [B, 2] int64, height and width of each source image in pixels.
        """
        if self.augment == "none" or self.split.name != "train":
            return None
        rng = generator(self.seed, self.split.name, index, AUGMENT)
        if self.augment == "flip":
            return transforms.draw_flips(rng, len(sizes))
        return transforms.draw_augmentation(rng, sizes, self.augment)

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
            images = [transforms.eval_image(image, size, self.augment) for image in images]
        else:
            images = [transforms.train_image(x, drawn, k, size) for k, x in enumerate(images)]
        return self.episode(transforms.to_input(images, self.pixels), self.order(index))

    def deliver(self, item: Episode, device: torch.device) -> Episode:
        """Move what ``__getitem__`` made in a worker process to the device that trains."""
        return Episode(*(t.to(device, non_blocking=True) for t in item))
