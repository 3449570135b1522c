"""Episodes from images that are decoded once and augmented in batches.

At first use a split becomes one array of bytes on disk, which later runs map into memory. Such a
cache is a folder ``<split>-<limit of the shorter side>-<key>`` with ``pixels.bin`` (each image as
[3, height, width] uint8, one after another) and ``index.npz`` (sizes, checksum). The key is a hash
of all that the pixels depend on: names, sizes and times of the files, Pillow's version, and the
settings below. The folder is filled under another name and then renamed, so it is either complete
or absent. A lock makes one of several processes build it while the others wait.

Images whose shorter side is at most twice ``image_size`` keep every pixel; mini-ImageNet's usual 84
px are among them. Larger ones are downscaled to that once. A random crop covers half of an image on
average, so it still has at least ``image_size`` pixels a side.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import secrets
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.imagefiles import load_image
from data.layout import Split
from dataloader import EpisodeDataset
from episode import Episode
from fast.augment import Windows, table, transform
from fast.threads import in_order
from utils import UserError, file_lock, out_of_memory

FOLDER = ".decoded"
PADDING, LARGEST = 4, 1 << 28  # see _groups
FORMAT = 4  # raise it whenever the same files would give other bytes


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
    """All images of a split, decoded. A pickle of it holds no pixels: they are mapped anew.

    Attributes:
        sizes: [N, 2] int64, height and width of each image in pixels.
    """

    def __init__(self, folder: Path, check: bool = True):
        self.folder = folder
        with np.load(folder / "index.npz", allow_pickle=False) as index:
            self.sizes, checksum = index["sizes"], int(index["checksum"])
        self._ends = np.cumsum(self.sizes.prod(axis=1) * 3)
        self._pixels = np.memmap(folder / "pixels.bin", dtype=np.uint8, mode="r")
        if check and (self._pixels.size != self._ends[-1] or zlib.crc32(self._pixels) != checksum):
            raise ValueError("its bytes have changed")

    def __reduce__(self):
        return DecodedSplit, (self.folder, False)

    def image(self, k: int) -> np.ndarray:
        """Image ``k``, [3, height, width] uint8, read-only."""
        height, width = self.sizes[k]
        end = self._ends[k]
        return self._pixels[end - 3 * height * width : end].reshape(3, height, width)


def _key(split: Split, image_size: int) -> str:
    digest = hashlib.sha256(f"{FORMAT} {PIL.__version__} {image_size}".encode())
    for of_image in split.stats:
        digest.update("\0".join(map(str, ("", *of_image))).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def decoded(split: Split, image_size: int, cache_dir: Path | None) -> DecodedSplit:
    """A split's decoded images from the cache, which all cores build if it is missing.

    Args:
        split: its data set's folder also holds the caches by default.
        image_size: size in pixels of the episodes' images, see ``reduced_size``.
        cache_dir: another folder for caches, with a subfolder for each data set.

    Raises:
        UserError: an image cannot be decoded, or the cache cannot be written.
    """
    parent = split.root / FOLDER
    if cache_dir is not None:
        path = split.root.resolve()
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
        parent = cache_dir / f"{path.name[:40]}-{digest}"
    prefix = f"{split.name}-{2 * image_size}-"
    folder = parent / (prefix + _key(split, image_size))
    if found := _open(folder):
        return found
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with file_lock(parent / "lock", wait=True):
            if found := _open(folder):  # built by the process that held the lock until now
                return found
            for stale in (*parent.glob(f"{prefix}*"), *parent.glob(".*.tmp")):
                shutil.rmtree(stale, ignore_errors=True)
            building = parent / f".{secrets.token_hex(4)}.tmp"
            building.mkdir()  # for all whom the umask lets read
            try:
                _build(building, split.name, split.images, image_size)
                building.rename(folder)
            finally:
                shutil.rmtree(building, ignore_errors=True)
            return DecodedSplit(folder)
    except OSError as e:
        problem = f"the decoded images cannot be kept there ({e.strerror})"
        raise UserError(f"{parent}: {problem}; name a folder with space by --cache-dir") from e


def _open(folder: Path) -> DecodedSplit | None:
    """A finished cache; None if it is missing or damaged.

    Raises:
        UserError: it cannot be read, such as one that another user keeps to himself.
    """
    if not folder.is_dir():
        return None
    try:
        return DecodedSplit(folder)
    except Exception as e:  # damaged bytes raise nearly anything; the image files are still there
        if out_of_memory(e):
            raise
        damage = (None, errno.EINVAL, errno.ENOENT)  # EINVAL is a damaged offset in index.npz
        if isinstance(e, OSError) and e.errno not in damage:
            advice = "correct that, or name another folder by --cache-dir"
            place = e.filename or folder
            raise UserError(f"{place}: cannot be read ({e.strerror}); {advice}") from e
        tqdm.write(f"{folder}: damaged ({e}); building it again")
        return None


def _build(folder: Path, name: str, files: list[Path], image_size: int) -> None:
    sizes, checksum, workers = [], 0, os.cpu_count() or 1
    decode = partial(_decode, image_size=image_size)
    with (folder / "pixels.bin").open("wb") as out, ThreadPoolExecutor(workers) as pool:
        images = in_order(pool, decode, files, 8 * workers)  # no more of them are in memory
        look = {"desc": f"decoding {name}", "unit": "image", "leave": False, "disable": None}
        for pixels in tqdm(images, total=len(files), **look):
            sizes.append(pixels.shape[1:])
            checksum = zlib.crc32(pixels, checksum)
            out.write(pixels)
        _to_disk(out)
    with (folder / "index.npz").open("wb") as out:
        np.savez(out, sizes=np.array(sizes, dtype=np.int64), checksum=np.uint32(checksum))
        _to_disk(out)


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


class Drawn(NamedTuple):
    """An episode's source images and parameters in one buffer, which one copy brings to a GPU.

    The buffer holds uint8: the bytes of ``augment.table`` and of the episode's order, all float32,
    then the images, support before query. They are padded on the right and below to the largest of
    their group; all are one group unless their shapes are far apart.
    """

    buffer: Tensor
    table: tuple[int, int]  # shape of the table
    groups: list[tuple[list[int], tuple[int, int]]]  # rows of the table, and height and width


def _groups(sizes: np.ndarray) -> list[tuple[list[int], tuple[int, int]]]:
    """Group images of ``sizes`` [B, 2] so that padding them takes at most ``PADDING`` times their
    own pixels, and a group of several at most ``LARGEST`` bytes.
    """
    groups = [list(range(len(sizes)))]
    if not _fit(sizes):
        groups = [[]]
        for k in np.argsort(sizes[:, 0] / sizes[:, 1], kind="stable").tolist():
            if groups[-1] and not _fit(sizes[[*groups[-1], k]]):
                groups.append([])
            groups[-1].append(k)
    return [(rows, tuple(sizes[rows].max(axis=0).tolist())) for rows in groups]


def _fit(sizes: np.ndarray) -> bool:
    padded = len(sizes) * int(sizes.max(axis=0).prod())
    return padded <= PADDING * int(sizes.prod(axis=1).sum()) and 3 * padded <= LARGEST


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
        self._decoded = decoded(split, self.image_size, cache_dir)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"stream": None}  # workers that are not forked get a pickle

    def draw(self, index: int) -> Drawn:
        """Read an episode's images and draw its random numbers."""
        numbers = self.indices(index)
        sizes = self._decoded.sizes[numbers]
        augmentation = self.augmentation(index, sizes)
        if augmentation is not None and augmentation.box is not None:
            windows = Windows.crops(augmentation.box, self.image_size)
        elif self.augment == "port":
            windows = Windows.centres(sizes, self.image_size)
        else:  # the whole images
            windows = Windows.crops(np.hstack((np.zeros_like(sizes), sizes)), self.image_size)
        rows = table(windows, augmentation)
        floats = np.concatenate((rows, self.order(index)), axis=None, dtype=np.float32)
        groups, at = _groups(sizes), floats.nbytes
        padded = sum(len(members) * math.prod(shape) for members, shape in groups)
        buffer = np.zeros(at + 3 * padded, dtype=np.uint8)
        buffer[:at] = floats.view(np.uint8)
        for members, shape in groups:
            n_bytes = len(members) * 3 * math.prod(shape)
            pixels = buffer[at : at + n_bytes].reshape(-1, 3, *shape)
            for row, k in zip(pixels, members, strict=True):
                row[:, : sizes[k, 0], : sizes[k, 1]] = self._decoded.image(numbers[k])
            at += n_bytes
        return Drawn(torch.from_numpy(buffer), rows.shape, groups)

    def assemble(self, drawn: Drawn, device: torch.device) -> Episode:
        """Augment a drawn episode on ``device``."""
        buffer, n = drawn.buffer.to(device, non_blocking=True), math.prod(drawn.table)
        at = 4 * (n + self.n_pass * self.n_class * self.n_shot)
        floats = buffer[:at].view(torch.float32)
        rows, parts = floats[:n].view(drawn.table), []
        for members, shape in drawn.groups:
            images = buffer[at : at + len(members) * 3 * math.prod(shape)].view(-1, 3, *shape)
            at += images.numel()
            of_group = rows if len(drawn.groups) == 1 else rows[members]
            parts.append(transform(images, of_group, self.image_size, self.pixels))
        x = parts[0]
        if len(parts) > 1:
            x = x.new_empty((len(rows), *x.shape[1:])).to(memory_format=torch.channels_last)
            for (members, _), part in zip(drawn.groups, parts, strict=True):
                x[members] = part
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
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        current = torch.cuda.current_stream()
        with torch.cuda.stream(self.stream):
            episode = self.assemble(item, device)
        current.wait_stream(self.stream)
        for t in episode:
            t.record_stream(current)  # or its memory would be reused too early
        return episode
