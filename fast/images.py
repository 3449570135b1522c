"""Episodes from images that are decoded once and augmented in batches.

At first use a split becomes one array of bytes on disk, which later runs map into memory. Such a
cache is a folder ``<split>-<largest side>-<key>`` with ``pixels.bin`` (each image as [3, height,
width] uint8, one after another) and ``index.npz`` (sizes, checksum). The key is a hash of all that
the pixels depend on: names, sizes and modification times of the files, and the settings below. The
folder is filled under another name and then renamed, so it is either complete or absent. A lock
makes one of several processes build it while the others wait.

Images whose shorter side is at most twice ``image_size`` keep every pixel; mini-ImageNet's usual 84
px are among them. Larger ones are downscaled to that once. A random crop covers half of an image on
average, so it still has at least ``image_size`` pixels a side.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dataloader import EpisodeDataset, Split, load_image, relative_names, stats_of
from episode import Episode
from fast.augment import Windows, table, transform
from utils import UserError, file_lock

FOLDER = ".decoded"
FORMAT = 3  # raise it whenever the same files would give other bytes


def reduced_size(width: int, height: int, image_size: int) -> tuple[int, int]:
    """The size (width, height) at which an image is cached: its shorter side at most 2 * image_size
    pixels.
    """
    scale = 2 * image_size / min(width, height)
    if scale >= 1:
        return width, height
    return max(1, round(width * scale)), max(1, round(height * scale))


def _decode(path: Path, image_size: int) -> np.ndarray:
    image = load_image(path)
    size = reduced_size(*image.size, image_size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


class DecodedSplit:
    """All images of a split, decoded.

    Attributes:
        sizes: [N, 2] int64, height and width of each image in pixels.
    """

    def __init__(self, folder: Path):
        """Open a finished cache.

        Raises:
            ValueError, OSError, KeyError, zlib.error, zipfile.BadZipFile: it is damaged.
        """
        with np.load(folder / "index.npz", allow_pickle=False) as index:
            self.sizes, checksum = index["sizes"], int(index["checksum"])
        ends = np.cumsum(self.sizes.prod(axis=1) * 3)
        self._starts = np.concatenate(([0], ends[:-1]))
        self._pixels = np.memmap(folder / "pixels.bin", dtype=np.uint8, mode="r")
        if self._pixels.size != ends[-1] or _checksum(self._pixels) != checksum:
            raise ValueError("its bytes have changed")

    def image(self, k: int) -> np.ndarray:
        """Image ``k``, [3, height, width] uint8, read-only."""
        height, width = self.sizes[k]
        start = self._starts[k]
        return self._pixels[start : start + 3 * height * width].reshape(3, height, width)


def _checksum(pixels: np.ndarray) -> int:
    value = 0
    for at in range(0, pixels.size, 1 << 24):
        value = zlib.crc32(pixels[at : at + (1 << 24)], value)
    return value


def _key(files: list[Path], stats: list[os.stat_result], root: Path, image_size: int) -> str:
    digest = hashlib.sha256(f"{FORMAT} {image_size}".encode())
    for name, stat in zip(relative_names(files, root), stats, strict=True):
        line = f"\0{name}\0{stat.st_size}\0{stat.st_mtime_ns}"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def decoded(
    name: str,
    files: list[Path],
    root: Path,
    image_size: int,
    cache_dir: Path | None,
    stats: list[os.stat_result] | None = None,
) -> DecodedSplit:
    """A split's decoded images from the cache, which all cores build if it is missing.

    Args:
        name: of the split.
        files: its images, in the order of their numbers.
        root: the data set's folder, which also holds the caches by default.
        image_size: size in pixels of the episodes' images, see ``reduced_size``.
        cache_dir: another folder for caches, with a subfolder for each data set.
        stats: of the files, from ``stats_of``, if known already.

    Raises:
        UserError: an image cannot be decoded, or the cache cannot be written.
    """
    parent = root / FOLDER
    if cache_dir is not None:
        path = root.resolve()
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
        parent = cache_dir / f"{path.name[:40]}-{digest}"
    prefix = f"{name}-{2 * image_size}-"
    folder = parent / (prefix + _key(files, stats or stats_of(files), root, image_size))
    split = _open(folder)
    if split is not None:
        return split
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with file_lock(parent / "lock", wait=True):
            split = _open(folder)  # built by the process that held the lock until now
            if split is not None:
                return split
            for stale in (*parent.glob(f"{prefix}*"), *parent.glob(".*.tmp")):
                shutil.rmtree(stale, ignore_errors=True)
            building = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=parent))
            try:
                _build(building, name, files, image_size)
                building.rename(folder)
            finally:
                shutil.rmtree(building, ignore_errors=True)
            return DecodedSplit(folder)
    except OSError as e:
        problem = f"the decoded images cannot be kept there ({e.strerror})"
        raise UserError(f"{parent}: {problem}; name a folder with space by --cache-dir") from e


def _open(folder: Path) -> DecodedSplit | None:
    """A finished cache; None if it is missing or damaged."""
    if not folder.is_dir():
        return None
    try:
        return DecodedSplit(folder)
    except Exception as e:  # damaged bytes raise nearly anything; the image files are still there
        tqdm.write(f"{folder}: damaged ({e}); building it again")
        return None


def _build(folder: Path, name: str, files: list[Path], image_size: int) -> None:
    sizes, checksum = [], 0
    workers = os.cpu_count() or 1
    bar = tqdm(total=len(files), desc=f"decoding {name}", unit="image", leave=False, disable=None)
    with (folder / "pixels.bin").open("wb") as out, ThreadPoolExecutor(workers) as pool:
        todo = iter(files)
        while chunk := list(islice(todo, 256 * workers)):
            for pixels in pool.map(lambda path: _decode(path, image_size), chunk):
                sizes.append(pixels.shape[1:])
                checksum = zlib.crc32(pixels, checksum)
                out.write(pixels)
            bar.update(len(chunk))
        out.flush()
        os.fsync(out.fileno())
    bar.close()
    with (folder / "index.npz").open("wb") as out:
        np.savez(out, sizes=np.array(sizes, dtype=np.int64), checksum=np.uint32(checksum))
        out.flush()
        os.fsync(out.fileno())


class Drawn(NamedTuple):
    """An episode's source images and parameters in one buffer, which one copy brings to a GPU.

    The buffer holds uint8: the bytes of ``augment.table`` and of the episode's order, all float32,
    then the images, support before query, padded on the right and below.
    """

    buffer: Tensor
    table: tuple[int, int]  # shape of the table
    pixels: tuple[int, int, int, int]  # of the images: [n_class * (n_shot + n_eval), 3, H, W]


class FastEpisodeDataset(EpisodeDataset):
    """``dataloader.EpisodeDataset`` from decoded images; its pixels differ by Pillow's rounding.

    Args:
        split, and all others: as for ``EpisodeDataset``.
        device: on a CPU the worker processes augment; for a GPU they read, and the GPU augments.
        cache_dir: folder of the caches, see ``decoded``.

    Raises:
        UserError: the split cannot serve such episodes, or a file cannot be used.
    """

    def __init__(
        self, split: Split, *args, device: torch.device, cache_dir: Path | None = None, **kwargs
    ):
        super().__init__(split, *args, **kwargs)
        self.device = device
        self.stream: torch.cuda.Stream | None = None  # of the GPU's augmentation
        stats = stats_of(self.files)
        self._file_sizes = [stat.st_size for stat in stats]
        of_split = split.name, self.files, split.root
        self._decoded = decoded(*of_split, self.image_size, cache_dir, stats)

    def file_sizes(self) -> list[int]:
        """See ``EpisodeDataset.file_sizes``."""
        return self._file_sizes

    def draw(self, index: int) -> Drawn:
        """Read an episode's images and draw its random numbers."""
        numbers = self.numbers(index)
        sizes = self._decoded.sizes[numbers]
        drawn = self.augmentation(index, sizes)
        if drawn is not None and drawn.box is not None:
            windows = Windows.crops(drawn.box, self.image_size)
        elif self.augment == "port":
            windows = Windows.centres(sizes, self.image_size)
        else:
            windows = Windows.squashed(sizes, self.image_size)
        rows = table(windows, drawn)
        floats = np.concatenate((rows, self.order(index)), axis=None, dtype=np.float32)
        n_bytes, shape = floats.nbytes, (len(numbers), 3, *sizes.max(axis=0).tolist())
        buffer = np.zeros(n_bytes + math.prod(shape), dtype=np.uint8)
        buffer[:n_bytes] = floats.view(np.uint8)
        pixels = buffer[n_bytes:].reshape(shape)
        for row, number, (height, width) in zip(pixels, numbers, sizes, strict=True):
            row[:, :height, :width] = self._decoded.image(number)
        return Drawn(torch.from_numpy(buffer), rows.shape, shape)

    def assemble(self, drawn: Drawn, device: torch.device) -> Episode:
        """Augment a drawn episode on ``device``."""
        buffer = drawn.buffer.to(device, non_blocking=True)
        start, n = len(buffer) - math.prod(drawn.pixels), math.prod(drawn.table)
        floats, images = buffer[:start].view(torch.float32), buffer[start:].view(drawn.pixels)
        x = transform(images, floats[:n].view(drawn.table), self.image_size, self.pixels)
        return self.episode(x, floats[n:].view(self.n_pass, -1).long())

    def __getitem__(self, index: int) -> Episode | Drawn:
        drawn = self.draw(index)
        if self.device.type != "cpu":
            return drawn
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the same bits in and outside a worker process
        try:
            return self.assemble(drawn, self.device)
        finally:
            torch.set_num_threads(n_threads)

    def deliver(self, item: Episode | Drawn, device: torch.device) -> Episode:
        """See ``EpisodeDataset.deliver``. A GPU augments on its own stream, beside the training on
        the episode before.
        """
        if not isinstance(item, Drawn):
            return item
        if device.type != "cuda":
            return self.assemble(item, device)
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        current = torch.cuda.current_stream()
        with torch.cuda.stream(self.stream):
            episode = self.assemble(item, device)
        current.wait_stream(self.stream)
        for t in episode:
            t.record_stream(current)  # or its memory would be reused too early
        return episode
