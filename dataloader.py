"""Images on disk -> episodes.

An episode is a pure function of (seed, split, index): its classes, its images, each augmentation parameter and the order of its
minibatches come from generators made from these three. Workers, prefetching and resuming need no state.

Only ``Generator.random`` is drawn from: its stream is fixed by the Philox algorithm, while the higher samplers may change
between NumPy releases.
"""

from __future__ import annotations

import copy
import math
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from augment import Windows, transform
from cache import decoded
from episode import Episode
from utils import UserError

SPLITS = ("train", "val", "test")
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
    root: Path  # the data set's folder


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
    return Split(split, *scan_classes(folder, split), root)


def scan_classes(folder: Path, what: str) -> tuple[list[str], list[list[Path]]]:
    """List ``folder/<class>/<image>``; ``what`` names the folder in errors.

    Raises:
        UserError: the folder is missing or empty, or something in it is not what its place says.
    """
    if not folder.is_dir():
        raise UserError(f"{what} {folder}: no such folder")
    known = {ext.lower() for ext, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    classes, files = [], []
    for entry in _visible(folder):
        if not _is_folder(entry):
            raise UserError(f"{entry.path}: a file among the class folders of {what}; remove it")
        images = _visible(Path(entry.path))
        for image in images:
            if _is_folder(image):
                raise UserError(f"{image.path}: a folder where an image should be; expected {folder}/<class>/<image>")
            if os.path.splitext(image.name)[1].lower() not in known:
                raise UserError(f"{image.path}: not an image by its name; remove it or give it its format's ending")
        classes.append(entry.name)
        files.append([Path(image.path) for image in images])
    if not classes:
        raise UserError(f"{folder}: holds no class folders; expected {folder}/<class>/<image>")
    return classes, files


def _visible(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as e:
        raise UserError(f"{folder}: cannot be read ({e.strerror})") from e
    return [e for e in entries if not e.name.startswith(".") and e.name.lower() not in _IGNORED]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


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


def draw_order(seed: int, split: str, index: int, n_pass: int, n_support: int, shuffle: str = "pass") -> np.ndarray:
    """Order of the support images in each pass over them, [n_pass, n_support] int64.

    Args:
        shuffle: "pass" for a new order in each pass, "episode" for one in all of them.
    """
    order = np.argsort(_generator(seed, split, index, _ORDER).random((n_pass, n_support)), axis=1, kind="stable")
    return order if shuffle == "pass" else np.broadcast_to(order[:1], order.shape).copy()


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
        if CROP_RATIO[0] > W / H:
            h[k] = round(W / CROP_RATIO[0])
        elif CROP_RATIO[1] < W / H:
            w[k] = round(H * CROP_RATIO[1])
        top[k], left[k] = (H - h[k]) // 2, (W - w[k]) // 2
    flip = rng.random(n) < 0.5
    centre, spread = np.array([1.0, 1.0, 1.0, 0.0]), np.array(JITTER)
    jitter = centre + spread * (2 * rng.random((n, 4)) - 1)
    order = np.argsort(rng.random((n, 4)), axis=1, kind="stable")
    return Augmentation(np.stack((top, left, h, w), axis=1), flip, jitter, order)


class Drawn(NamedTuple):
    """An episode's source images and what is to become of them: all that the augmentation needs, on whichever device."""

    pixels: Tensor  # [n_class * (n_shot + n_eval), 3, H, W] uint8: support, then query; small images padded right and below
    windows: Windows
    augmentation: Augmentation | None
    order: Tensor  # see Episode


class EpisodeDataset(Dataset):
    """Episodes 0, 1, ... of a split, from its decoded images.

    Args:
        split: as ``scan_split`` lists it.
        seed: the run's seed.
        n_class, n_shot, n_eval: shape of the episode.
        n_pass: passes over the support set in the inner loop (``--epoch``).
        image_size: height and width of the result in pixels.
        augment: "port" for the older port's transforms (random for the train split), "none" to squash each image.
        length: how many episodes there are.
        pixels: "imagenet" or "unit", see ``augment.transform``.
        shuffle: "pass" or "episode", see ``draw_order``.
        cache_dir: where the decoded images go, see ``cache.decoded``.

    Raises:
        UserError: the split cannot serve such episodes, or a file cannot be used.
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
        pixels: str = "imagenet",
        shuffle: str = "pass",
        cache_dir: Path | None = None,
    ):
        check_split(split, n_class, n_shot, n_eval)
        self.split, self.seed, self.length = split, seed, length
        self.n_class, self.n_shot, self.n_eval, self.n_pass = n_class, n_shot, n_eval, n_pass
        self.image_size, self.augment, self.pixels, self.shuffle = image_size, augment, pixels, shuffle
        self._first = np.cumsum([0] + [len(files) for files in split.files])
        files = [path for of_class in split.files for path in of_class]
        self._decoded = decoded(split.name, files, split.root, image_size, cache_dir)

    @property
    def fingerprint(self) -> str:
        """Of the classes, the files' names and the decoded pixels: two data sets that share it give the same episodes."""
        names = "\0".join(str(path.relative_to(self.split.root)) for of_class in self.split.files for path in of_class)
        return f"{zlib.crc32(names.encode('utf-8', 'surrogateescape')):08x}-{self._decoded.checksum:08x}"

    def __len__(self) -> int:
        return self.length

    def first(self, n: int) -> EpisodeDataset:
        """The same episodes, ``n`` of them."""
        some = copy.copy(self)
        some.length = n
        return some

    def __getitem__(self, index: int) -> Drawn:
        classes, picks = draw_images(self.seed, self.split, index, self.n_class, self.n_shot + self.n_eval)
        numbers = self._first[classes][:, None] + picks
        numbers = np.concatenate((numbers[:, : self.n_shot].reshape(-1), numbers[:, self.n_shot :].reshape(-1)))
        sizes = self._decoded.sizes[numbers]
        pixels = np.zeros((len(numbers), 3, *sizes.max(axis=0)), dtype=np.uint8)
        for row, number, (height, width) in zip(pixels, numbers, sizes, strict=True):
            row[:, :height, :width] = self._decoded.image(number)
        augmentation = None
        if self.augment == "none":
            windows = Windows.squashed(sizes, self.image_size)
        elif self.split.name == "train":
            augmentation = draw_augmentation(self.seed, self.split.name, index, sizes)
            windows = Windows.crops(augmentation.box, self.image_size)
        else:
            windows = Windows.centres(sizes, self.image_size)
        order = draw_order(self.seed, self.split.name, index, self.n_pass, self.n_class * self.n_shot, self.shuffle)
        return Drawn(torch.from_numpy(pixels), windows, augmentation, torch.from_numpy(order))

    def assemble(self, drawn: Drawn, device: torch.device) -> Episode:
        """Augment a drawn episode on ``device``."""
        flip, jitter, order = np.zeros(len(drawn.pixels), dtype=bool), None, None
        if drawn.augmentation is not None:
            _, flip, jitter, order = drawn.augmentation
        pixels = drawn.pixels.to(device, non_blocking=True)
        x = transform(pixels, drawn.windows, self.image_size, flip, jitter, order, self.pixels)
        n_support = self.n_class * self.n_shot
        y = torch.arange(self.n_class, device=device)
        return Episode(
            x[:n_support],
            y.repeat_interleave(self.n_shot),
            x[n_support:],
            y.repeat_interleave(self.n_eval),
            drawn.order.to(device, non_blocking=True),
        )

    def assemble_on_cpu(self, drawn: Drawn) -> Episode:
        """Augment by one thread, whether in a worker process or not: the same bits either way."""
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self.assemble(drawn, torch.device("cpu"))
        finally:
            torch.set_num_threads(n_threads)


def episodes(
    dataset: EpisodeDataset,
    start: int,
    n_workers: int,
    device: torch.device,
    pin_memory: bool,
    worker_init: Callable[[int], None] | None = None,
) -> Iterator[Episode]:
    """Yield episodes ``start``, ``start + 1``, ... of a data set in order, on ``device``.

    Worker processes run ahead: for a CPU they do all the work, for a GPU they read and the GPU augments.
    """
    on_cpu = device.type == "cpu"
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start, len(dataset)),
        num_workers=n_workers,
        collate_fn=dataset.assemble_on_cpu if on_cpu else _as_it_is,
        pin_memory=pin_memory and not on_cpu,
        worker_init_fn=worker_init,
        generator=torch.Generator(),  # or it draws from the global one, which is the training's
    )
    for item in loader:
        yield item if on_cpu else dataset.assemble(item, device)


def _as_it_is(drawn: Drawn) -> Drawn:
    return drawn
