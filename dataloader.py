"""Image files on disk -> episodes.

An episode is a pure function of (seed, split, index): random generators made from these three draw
its classes, images, augmentation and order of minibatches. Workers, prefetching and resuming need
no state.

Only ``Generator.random`` is used: the Philox algorithm fixes its stream, while the higher samplers
may change between NumPy releases.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import os
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data import imagefiles
from episode import Episode
from utils import SPLITS, UserError, load_package

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
LONGEST_WAIT = 300  # seconds in which no worker process has an episode ready
_PICK, _AUGMENT, _ORDER = range(3)  # one random stream each, so that none depends on another


# ---- Files ----


class Split(NamedTuple):
    """One split's files, classes and images both in the order of their names."""

    name: str  # train, val or test
    classes: list[str]
    files: list[list[Path]]  # files[c] are the images of classes[c]
    root: Path  # the data set's folder


def scan_split(root: Path, split: str) -> Split:
    """List ``root/<split>/<class>/<image>``, see ``scan_classes``.

    Raises:
        UserError: the folder is missing or empty, or a file or folder is where none belongs.
    """
    if not root.is_dir():
        advice = "make it with data/prepare.py (see data/README.md), or try scripts/quickstart.sh"
        raise UserError(f"--data-root {root}: no such folder; {advice}")
    folder = root / split
    if not folder.is_dir():
        advice = "--data-root should hold train/, val/ (or give --val-freq 0) and test/"
        raise UserError(f"{folder}: no such folder; {advice}")
    return Split(split, *scan_classes(folder, split), root)


def scan_classes(folder: Path, what: str) -> tuple[list[str], list[list[Path]]]:
    """List ``folder/<class>/<image>``; ``what`` names the folder in errors. A note counts files of
    unknown format, which are left out.

    Raises:
        UserError: the folder is missing or empty, a file, folder, dangling link or pipe is where
            none belongs, or two names are equal in Unicode NFC or lead to one folder.
    """
    if not folder.is_dir():
        raise UserError(f"{what} {folder}: no such folder")
    classes: list[str] = []
    files: list[list[Path]] = []
    unknown: list[str] = []
    seen: set[str] = set()  # names in NFC, and real paths
    for entry in imagefiles.entries(folder):
        if imagefiles.kind_of(entry) != "folder":
            raise UserError(f"{entry.path}: a file among the class folders of {what}; remove it")
        keys = {imagefiles.nfc(entry.name), os.path.realpath(entry.path)}
        if keys & seen:
            why = "a second class of this name, or a link to another class"
            raise UserError(f"{entry.path}: {why}; merge them, rename or remove one")
        images = imagefiles.entries(Path(entry.path))
        for image in images:
            if (kind := imagefiles.kind_of(image)) != "file":
                why = "a link that leads nowhere, a pipe or a device" if kind == "other" else kind
                advice = f"remove it; expected {folder}/<class>/<image>"
                raise UserError(f"{image.path}: {why}, and no image; {advice}")
        seen |= keys
        classes.append(entry.name)
        files.append([Path(image.path) for image in images if imagefiles.is_image(image.name)])
        unknown += [image.name for image in images if not imagefiles.is_image(image.name)]
    if not classes:
        raise UserError(f"{folder}: holds no class folders; expected {folder}/<class>/<image>")
    imagefiles.note_unknown(folder, unknown)
    return classes, files


def relative_names(files: list[Path], root: Path) -> list[str]:
    """The files' paths within ``root``; ``Path.relative_to`` takes seconds for 60,000 files."""
    folder = "" if root == Path() else os.path.join(str(root), "")
    return [str(path).removeprefix(folder) for path in files]


def stats_of(files: list[Path]) -> list[tuple[int, int]]:
    """The files' sizes in bytes and modification times in ns.

    Raises:
        UserError: a file cannot be read; it is named.
    """
    try:
        return [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, files)]
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be read ({e.strerror}); remove or replace it") from e


def check_splits(
    root: Path, trained_on: Iterable[str] = (), unseen: Collection[str] = ("test",)
) -> None:
    """Check that no two splits of a data set share a class, see ``class_places``.

    Args:
        trained_on: the classes of a checkpoint's training, which the splits ``unseen`` must not
            hold.

    Raises:
        UserError: a class is in two splits; it is named.
    """
    places = imagefiles.class_places(root)
    if shared := imagefiles.in_several_splits(places.values()):
        advice = "each class belongs to one split; remove one, or rename it if they differ"
        raise UserError(f"{root}: {shared[0]} are one class by name or folder, but {advice}")
    for name in trained_on:
        for place in places.get(imagefiles.nfc(name), ()):
            if (split := place.partition("/")[0]) in unseen:
                advice = f"{split}/ should hold classes that training has not seen"
                what = f"the checkpoint was trained on class {name}"
                raise UserError(f"{root}/{place}: {what}; {advice}")


# ---- Random draws ----


def check_sizes(split: Split, n_class: int, n_shot: int, n_eval: int) -> None:
    """Check that every episode can be drawn.

    Raises:
        UserError: there are too few classes, or a class has too few images; it is named.
    """
    if len(split.classes) < n_class:
        found = f"the {split.name} split has only {len(split.classes)} classes; lower it"
        raise UserError(f"--n-class {n_class}: {found}")
    needed = n_shot + n_eval
    short = [k for k, images in enumerate(split.files) if len(images) < needed]
    if short:
        name, n_images = split.classes[short[0]], len(split.files[short[0]])
        folder = split.root / split.name / name
        others = f", and {len(short) - 1} more classes have too few" * (len(short) > 1)
        advice = "lower these flags"
        if len(split.classes) - len(short) >= n_class:
            hidden = shlex.join(["mv", str(folder), str(folder.with_name(f".{name}"))])
            advice += f", or leave the class out: {hidden}"
        raise UserError(
            f"{folder}: {n_images} images, but an episode takes {needed} (--n-shot {n_shot} + "
            f"--n-eval {n_eval}){others}; {advice}"
        )


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
    return order if shuffle == "pass" else np.broadcast_to(order[:1], order.shape).copy()


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
        augment: a key of ``CROPS``.
        sizes: [B, 2] int64, height and width of each source image in pixels.
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
        H, W = (int(v) for v in sizes[k])
        h[k], w[k] = H, W
        if CROP_RATIO[0] > W / H:
            h[k] = round(W / CROP_RATIO[0])
        elif CROP_RATIO[1] < W / H:
            w[k] = round(H * CROP_RATIO[1])
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
    if drawn.box is None or drawn.jitter is None or drawn.order is None:
        image = eval_image(image, image_size, "flip")
        return TF.hflip(image) if drawn.flip[k] else image
    top, left, height, width = (int(v) for v in drawn.box[k])
    square = [image_size, image_size]
    bilinear = TF.InterpolationMode.BILINEAR
    image = TF.resized_crop(image, top, left, height, width, square, bilinear)
    if drawn.flip[k]:
        image = TF.hflip(image)
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
        self.files = [path for of_class in self.split.files for path in of_class]
        self._first = np.cumsum([0] + [len(of_class) for of_class in self.split.files])

    @functools.cached_property
    def stats(self) -> list[tuple[int, int]]:
        """See ``stats_of``; read once."""
        return stats_of(self.files)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify the data set by its files' names, classes and sizes."""
        digest = hashlib.sha256()
        names = relative_names(self.files, self.split.root)
        for name, (size, _) in zip(names, self.stats, strict=True):
            digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]

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
        numbers = self._first[classes][:, None] + picks
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
        images = [imagefiles.load_image(self.files[number]) for number in self.indices(index)]
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


def episodes(
    dataset: EpisodeDataset,
    start: int,
    n_workers: int,
    device: torch.device,
    pin_memory: bool,
    worker_init: Callable[[int], None] | None = None,
    step: int = 1,
    waiting: Callable[[], None] = lambda: None,
) -> Iterator[Episode]:
    """Yield episodes ``start``, ``start + step``, ... on ``device``; worker processes run ahead.

    Args:
        waiting: called every second in which no worker has an episode ready.

    Raises:
        UserError: an image cannot be read, or nothing comes from the workers.
    """
    loader = DataLoader(
        _ReturnsErrors(dataset),
        batch_size=None,
        sampler=range(start, len(dataset), step),
        num_workers=n_workers,
        collate_fn=_identity,
        timeout=1 if n_workers else 0,
        pin_memory=pin_memory and device.type != "cpu",
        worker_init_fn=worker_init,
        generator=torch.Generator(),  # the global one belongs to the training
    )
    stream, waited = iter(loader), 0
    try:
        while waited < LONGEST_WAIT:
            try:
                item = next(stream)
            except StopIteration:
                return
            except RuntimeError as e:
                if "DataLoader timed out" not in str(e):
                    raise
                waited += 1
                waiting()
                continue
            if isinstance(item, UserError):
                raise item
            yield dataset.deliver(item, device)
            waited = 0
        late = f"no episode came from the worker processes in {LONGEST_WAIT} seconds"
        advice = "give --n-workers 0, which shows what holds them up"
        raise UserError(f"--n-workers {n_workers}: {late}; {advice}")
    finally:
        if n_workers:  # an exception's traceback would keep them alive
            stream._shutdown_workers()  # type: ignore[attr-defined]


class _ReturnsErrors(Dataset):
    """Returns a data set's errors: raised in a worker, their message would be a whole traceback.

    In a worker it moves the tensors to shared memory itself: the queue drops an item that it cannot
    move.
    """

    def __init__(self, dataset: EpisodeDataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> object:
        try:
            item = self.dataset[index]
        except UserError as error:
            return error
        worker = get_worker_info()
        if worker is not None:
            try:
                for tensor in item:
                    if isinstance(tensor, Tensor):
                        tensor.share_memory_()
            except RuntimeError as e:
                advice = "mount a larger /dev/shm (docker run --shm-size 1g), or give --n-workers 0"
                why = f"an episode does not fit into shared memory ({str(e).splitlines()[0]})"
                return UserError(f"--n-workers {worker.num_workers}: {why}; {advice}")
        return item


def _identity(item: object) -> object:
    return item
