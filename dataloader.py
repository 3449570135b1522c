"""Image files on disk -> episodes.

An episode is a pure function of (seed, split, index): its classes, its images, each augmentation
parameter and the order of its minibatches come from generators made from these three. Workers,
prefetching and resuming need no state.

Only ``Generator.random`` is drawn from: its stream is fixed by the Philox algorithm, while the
higher samplers may change between NumPy releases.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from episode import Episode
from utils import SPLITS, UserError, is_junk

CROP_RATIO = (3 / 4, 4 / 3)
CROPS = {  # by --augment: share of the image's area in a crop; brightness, contrast, saturation and hue jitter
    "port": ((0.08, 1.0), (0.4, 0.4, 0.4, 0.2)),
    "zoom": ((0.22, 1.0), (0.2, 0.2, 0.4, 0.2)),
    "mild": ((0.6, 1.0), (0.2, 0.2, 0.2, 0.05)),
}
MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of pixels in [0, 1]
STD = (0.229, 0.224, 0.225)
PIXELS = {
    "imagenet": (MEAN, STD),
    "unit": ((0.0,) * 3, (1.0,) * 3),
}  # mean and deviation by --pixels
_PICK, _AUGMENT, _ORDER = range(3)  # one stream each, so that changing one leaves the others alone


# ---- Files ----


class Split(NamedTuple):
    """One split's files, classes and images both in the order of their names."""

    name: str  # train, val or test
    classes: list[str]
    files: list[list[Path]]  # files[c] are the images of classes[c]
    root: Path  # the data set's folder


def scan_split(root: Path, split: str) -> Split:
    """List ``root/<split>/<class>/<image>``; hidden files and litter of operating systems are
    ignored.

    Raises:
        UserError: the folder is missing or empty, or it holds something unexpected.
    """
    if not root.is_dir():
        raise UserError(
            f"--data-root {root}: no such folder; make it with data/prepare.py (data/README.md says from what), or try "
            "scripts/quickstart.sh, which needs no download"
        )
    folder = root / split
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --data-root should hold train/, val/ and test/")
    return Split(split, *scan_classes(folder, split), root)


def scan_classes(folder: Path, what: str) -> tuple[list[str], list[list[Path]]]:
    """List ``folder/<class>/<image>``; ``what`` names the folder in errors.

    Raises:
        UserError: the folder is missing or empty, or it holds something unexpected.
    """
    if not folder.is_dir():
        raise UserError(f"{what} {folder}: no such folder")
    known = {
        ext.lower() for ext, kind in Image.registered_extensions().items() if kind in Image.OPEN
    }
    classes, files = [], []
    for entry in _visible(folder):
        if not _is_folder(entry):
            raise UserError(f"{entry.path}: a file among the class folders of {what}; remove it")
        images = _visible(Path(entry.path))
        for image in images:
            if _is_folder(image):
                raise UserError(
                    f"{image.path}: a folder where an image should be; expected {folder}/<class>/<image>"
                )
            if os.path.splitext(image.name)[1].lower() not in known:
                raise UserError(
                    f"{image.path}: not an image by its name; remove it or give it its format's ending"
                )
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
    return [e for e in entries if not is_junk(e.name)]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def relative_names(files: list[Path], root: Path) -> list[str]:
    """The files' paths within ``root``; ``Path.relative_to`` would take seconds for tens of
    thousands of files.
    """
    folder = "" if root == Path() else os.path.join(str(root), "")
    return [str(path).removeprefix(folder) for path in files]


def stats_of(files: list[Path]) -> list[os.stat_result]:
    """What the file system knows of each file.

    Raises:
        UserError: a file cannot be read; it is named.
    """
    try:
        return [os.stat(path) for path in files]
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be read ({e.strerror}); remove or replace it") from e


def check_splits(root: Path) -> None:
    """Check that no two splits of a data set share a class, by its folder's name.

    Raises:
        UserError: a class is in two splits; it is named.
    """
    seen: dict[str, str] = {}
    for split in SPLITS:
        for entry in _visible(root / split) if (root / split).is_dir() else ():
            other = seen.setdefault(entry.name, split)
            if other != split:
                raise UserError(
                    f"{root}: {other}/ and {split}/ both hold a class named {entry.name}, but each "
                    "class belongs to one split; remove one, or rename it if they differ"
                )


def load_image(path: Path) -> Image.Image:
    """Decode one file to RGB, whatever its mode, turned as its EXIF orientation says.

    Raises:
        UserError: it cannot be decoded, or is implausibly large; it is named.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith(
                    "I"
                ):  # 16 bits; older versions of Pillow call it "I" and would clip it at 255
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                return image.convert("RGB")
    except Exception as e:  # Pillow's decoders raise nearly anything on damaged files
        reason = (
            str(e).replace(repr(str(path)), "").replace(str(path), "").strip(" :")
            or type(e).__name__
        )
        raise UserError(
            f"{path}: not a readable image ({reason.splitlines()[0]}); remove or replace it"
        ) from e


# ---- Chance ----


def check_split(split: Split, n_class: int, n_shot: int, n_eval: int) -> None:
    """Check that every episode can be drawn.

    Raises:
        UserError: there are too few classes, or a class has too few images; it is named.
    """
    if len(split.classes) < n_class:
        raise UserError(
            f"--n-class {n_class}: the {split.name} split has only {len(split.classes)} classes"
        )
    for name, images in zip(split.classes, split.files, strict=True):
        if len(images) < n_shot + n_eval:
            raise UserError(
                f"{split.name}/{name}: {len(images)} images, but an episode takes {n_shot + n_eval} "
                f"(--n-shot {n_shot} + --n-eval {n_eval})"
            )


def _generator(seed: int, split: str, index: int, purpose: int) -> np.random.Generator:
    key = np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index, purpose))
    return np.random.Generator(np.random.Philox(key))


def draw_images(
    seed: int, split: Split, index: int, n_class: int, n_image: int
) -> tuple[np.ndarray, np.ndarray]:
    """Classes without replacement, then different images of each.

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
    """Order of the support images in each pass over them, [n_pass, n_support] int64.

    Args:
        shuffle: "pass" for a new order in each pass, "episode" for one in all of them.
    """
    order = np.argsort(
        _generator(seed, split, index, _ORDER).random((n_pass, n_support)), axis=1, kind="stable"
    )
    return order if shuffle == "pass" else np.broadcast_to(order[:1], order.shape).copy()


class Augmentation(NamedTuple):
    """One row per image: what RandomResizedCrop, RandomHorizontalFlip and ColorJitter draw, in the
    order of application.

    Where images are only mirrored, all but ``flip`` is None.
    """

    box: (
        np.ndarray | None
    )  # [B, 4] int64: top, left, height, width of the crop in pixels of the source
    flip: np.ndarray  # [B] bool
    jitter: (
        np.ndarray | None
    )  # [B, 4] float64: brightness, contrast, saturation factors, hue shift in turns
    order: np.ndarray | None  # [B, 4] int64: the order in which those four are applied


def draw_augmentation(
    seed: int, split: str, index: int, sizes: np.ndarray, augment: str = "port"
) -> Augmentation:
    """The training augmentation's parameters, distributed as torchvision draws them.

    Args:
        augment: a key of ``CROPS``.
        sizes: [B, 2] int64, height and width of each source image in pixels.
    """
    rng = _generator(seed, split, index, _AUGMENT)
    n = len(sizes)
    height, width = sizes[:, :1], sizes[:, 1:]
    # RandomResizedCrop: the first of ten boxes that fits, else the largest centred one of an
    # allowed shape
    (least, most), spread = CROPS[augment]
    area = height * width * (least + (most - least) * rng.random((n, 10)))
    low, high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    ratio = np.exp(low + (high - low) * rng.random((n, 10)))
    w, h = (
        np.rint(np.sqrt(area * ratio)).astype(np.int64),
        np.rint(np.sqrt(area / ratio)).astype(np.int64),
    )
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


def draw_mirrored(seed: int, split: str, index: int, n: int) -> Augmentation:
    """Which of n images are mirrored: each with probability 1/2."""
    return Augmentation(None, _generator(seed, split, index, _AUGMENT).random(n) < 0.5, None, None)


# ---- Pixels ----


def _torchvision():
    from torchvision.transforms import (
        functional,  # takes a second to load, which fast/ need not wait for
    )

    return functional


def train_image(image: Image.Image, drawn: Augmentation, k: int, image_size: int) -> Image.Image:
    """Apply row ``k`` of the training augmentation: crop and resize, flip, then the four colours in
    their drawn order.
    """
    TF = _torchvision()
    if drawn.box is None:
        image = eval_image(image, image_size, "flip")
        return TF.hflip(image) if drawn.flip[k] else image
    top, left, height, width = (int(v) for v in drawn.box[k])
    image = TF.resized_crop(
        image, top, left, height, width, [image_size, image_size], TF.InterpolationMode.BILINEAR
    )
    if drawn.flip[k]:
        image = TF.hflip(image)
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for which in drawn.order[k]:
        image = adjust[which](image, float(drawn.jitter[k, which]))
    return image


def eval_image(image: Image.Image, image_size: int, augment: str) -> Image.Image:
    """Resize without chance.

    Args:
        augment: "port" for the shorter side to image_size * 8 // 7, then the centre; all others for
            the whole image squashed to a square, as the authors do in training, too.
    """
    TF = _torchvision()
    if augment != "port":
        return TF.resize(image, [image_size, image_size], TF.InterpolationMode.BILINEAR)
    image = TF.resize(image, [image_size * 8 // 7], TF.InterpolationMode.BILINEAR)
    return TF.center_crop(image, [image_size, image_size])


def to_input(images: list[Image.Image], pixels: str) -> Tensor:
    """What the learner reads: [B, 3, H, W] float32.

    Args:
        pixels: "imagenet" for [0, 1] less ImageNet's mean, divided by its deviation; "unit" for [0,
            1].
    """
    TF, (mean, std) = _torchvision(), PIXELS[pixels]
    return torch.stack([TF.normalize(TF.to_tensor(image), mean, std) for image in images])


# ---- Episodes ----


class EpisodeDataset(Dataset):
    """Episodes 0, 1, ... of a split, read from its image files.

    Args:
        split: as ``scan_split`` lists it.
        seed: the run's seed.
        n_class, n_shot, n_eval: shape of the episode.
        n_pass: passes over the support set in the inner loop (``--epoch``).
        image_size: height and width of the result in pixels.
        augment: "port" for the older port's transforms (random ones for the train split), "none" to
            squash each image, "flip" to squash each and mirror those of the train split at
            random; "zoom" and "mild" for crops, mirroring and colours of the train split, see
            ``CROPS``, and the whole image in the others.
        length: number of episodes.
        pixels: "imagenet" or "unit", see ``to_input``.
        shuffle: "pass" or "episode", see ``draw_order``.
        in_order: whether an episode's classes come in the order of their names instead of the order
            in which they are drawn; then episodes of all classes give each class the same label.

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
        pixels: str = "imagenet",
        shuffle: str = "pass",
        in_order: bool = False,
    ):
        check_split(split, n_class, n_shot, n_eval)
        self.split, self.seed, self.length = split, seed, length
        self.n_class, self.n_shot, self.n_eval, self.n_pass = n_class, n_shot, n_eval, n_pass
        self.image_size, self.augment, self.pixels, self.shuffle = (
            image_size,
            augment,
            pixels,
            shuffle,
        )
        self.in_order = in_order
        self.files = [path for of_class in split.files for path in of_class]
        self._first = np.cumsum([0] + [len(of_class) for of_class in split.files])

    @property
    def names(self) -> list[str]:
        """The files' paths within the data set's folder."""
        return [os.path.join(self.split.name, path.parent.name, path.name) for path in self.files]

    def file_sizes(self) -> list[int]:
        """The files' sizes in bytes."""
        return [path.stat().st_size for path in self.files]

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the files' names, classes and sizes: two data sets that share it are
        the same.
        """
        digest = hashlib.sha256()
        for name, size in zip(self.names, self.file_sizes(), strict=True):
            digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return self.length

    def first(self, n: int) -> EpisodeDataset:
        """The same episodes, ``n`` of them."""
        some = copy.copy(self)
        some.length = n
        return some

    def numbers(self, index: int) -> np.ndarray:
        """The places in ``files`` of an episode's images, support set first: [n_class * (n_shot +
        n_eval)] int64.
        """
        classes, picks = draw_images(
            self.seed, self.split, index, self.n_class, self.n_shot + self.n_eval
        )
        numbers = self._first[classes][:, None] + picks
        if self.in_order:
            numbers = numbers[np.argsort(classes)]
        return np.concatenate(
            (numbers[:, : self.n_shot].reshape(-1), numbers[:, self.n_shot :].reshape(-1))
        )

    def order(self, index: int) -> Tensor:
        """See ``Episode.order``."""
        n_support = self.n_class * self.n_shot
        return torch.from_numpy(
            draw_order(self.seed, self.split.name, index, self.n_pass, n_support, self.shuffle)
        )

    def augmentation(self, index: int, sizes: np.ndarray) -> Augmentation | None:
        """The episode's random transforms, if its split and ``augment`` ask for them; ``sizes`` as
        in ``draw_augmentation``.
        """
        if self.augment == "none" or self.split.name != "train":
            return None
        if self.augment == "flip":
            return draw_mirrored(self.seed, self.split.name, index, len(sizes))
        return draw_augmentation(self.seed, self.split.name, index, sizes, self.augment)

    def episode(self, x: Tensor, order: Tensor) -> Episode:
        """An episode of the images ``x``, support set first."""
        n_support = self.n_class * self.n_shot
        y = torch.arange(self.n_class, device=x.device)
        y_support, y_query = y.repeat_interleave(self.n_shot), y.repeat_interleave(self.n_eval)
        return Episode(x[:n_support], y_support, x[n_support:], y_query, order)

    def __getitem__(self, index: int) -> Episode:
        images = [load_image(self.files[number]) for number in self.numbers(index)]
        drawn = self.augmentation(
            index, np.array([(image.height, image.width) for image in images])
        )
        if drawn is None:
            images = [eval_image(image, self.image_size, self.augment) for image in images]
        else:
            images = [
                train_image(image, drawn, k, self.image_size) for k, image in enumerate(images)
            ]
        return self.episode(to_input(images, self.pixels), self.order(index))

    def deliver(self, item: Episode, device: torch.device) -> Episode:
        """Bring what ``__getitem__`` made in a worker process to the device that trains."""
        return Episode(*(t.to(device, non_blocking=True) for t in item))


def episodes(
    dataset: EpisodeDataset,
    start: int,
    n_workers: int,
    device: torch.device,
    pin_memory: bool,
    worker_init: Callable[[int], None] | None = None,
    step: int = 1,
) -> Iterator[Episode]:
    """Yield episodes ``start``, ``start + step``, ... of a data set in order, on ``device``; worker
    processes run ahead.

    Raises:
        UserError: an image cannot be read.
    """
    loader = DataLoader(
        _Told(dataset),
        batch_size=None,
        sampler=range(start, len(dataset), step),
        num_workers=n_workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory and device.type != "cpu",
        worker_init_fn=worker_init,
        generator=torch.Generator(),  # or it draws from the global one, which belongs to the training
    )
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield dataset.deliver(item, device)


class _Told(Dataset):
    """A data set that returns its errors; raised in a worker, they would come with a traceback,
    which keeps workers alive.
    """

    def __init__(self, dataset: EpisodeDataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> object:
        try:
            return self.dataset[index]
        except UserError as error:
            return error


def _as_it_is(item: object) -> object:
    return item
