"""Images are decoded once: a split becomes one array of bytes on disk, memory-mapped ever after.

A cache is a folder ``<split>-<largest side>-<key>`` holding ``pixels.bin`` (each image as [3, height, width] uint8, one after
another) and ``index.npz`` (sizes, checksum). The key is a hash of everything that the pixels depend on: names, sizes and
modification times of the files, and the settings below. The folder is filled under another name and then renamed, so that it
is whole or not there; of two processes that want it at once, one builds and the other waits.

Images whose shorter side is at most twice ``image_size`` are kept to the pixel, mini-ImageNet's usual 84 px among them. Larger
ones are reduced to that, once: a random crop, whose area is half of the image's on average, then still has at least its pixels.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from utils import UserError

FOLDER = ".decoded"
FORMAT = 2  # raise it whenever the same files would give other bytes


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
                if image.mode.startswith("I"):  # 16 bits, "I" to older versions of Pillow, which would clip them at 255
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                return image.convert("RGB")
    except Exception as e:  # Pillow's decoders raise nearly anything on hostile bytes
        reason = str(e).replace(repr(str(path)), "").replace(str(path), "").strip(" :") or type(e).__name__
        raise UserError(f"{path}: not a readable image ({reason.splitlines()[0]}); remove or replace it") from e


def reduced_size(width: int, height: int, image_size: int) -> tuple[int, int]:
    """Size (width, height) at which an image is kept: its shorter side at most 2 * image_size pixels."""
    scale = 2 * image_size / min(width, height)
    return (width, height) if scale >= 1 else (max(1, round(width * scale)), max(1, round(height * scale)))


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
        checksum: CRC-32 of all pixels.
    """

    def __init__(self, folder: Path):
        """Open a finished cache.

        Raises:
            ValueError, OSError, KeyError, zlib.error, zipfile.BadZipFile: it is damaged.
        """
        with np.load(folder / "index.npz", allow_pickle=False) as index:
            self.sizes, self.checksum = index["sizes"], int(index["checksum"])
        ends = np.cumsum(self.sizes.prod(axis=1) * 3)
        self._starts = np.concatenate(([0], ends[:-1]))
        self._pixels = np.memmap(folder / "pixels.bin", dtype=np.uint8, mode="r")
        if self._pixels.size != ends[-1] or _checksum(self._pixels) != self.checksum:
            raise ValueError("its bytes are not those that were written")

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


def _key(files: list[Path], root: Path, image_size: int) -> str:
    digest = hashlib.sha256(f"{FORMAT} {image_size}".encode())
    for path in files:
        try:
            stat = path.stat()
        except OSError as e:
            raise UserError(f"{path}: cannot be read ({e.strerror}); remove or replace it") from e
        digest.update(f"\0{path.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def decoded(name: str, files: list[Path], root: Path, image_size: int, cache_dir: Path | None) -> DecodedSplit:
    """The split's decoded images, from the cache or built now with all cores.

    Args:
        name: of the split.
        files: its images, in the order in which they get their numbers.
        root: the data set's folder; the cache lies in it unless ``cache_dir`` says otherwise.
        image_size: size in pixels that episodes will have, see ``reduced_size``.
        cache_dir: where caches go instead.

    Raises:
        UserError: an image cannot be decoded, or the cache cannot be written.
    """
    key = _key(files, root, image_size)
    place = cache_dir if cache_dir is not None else root / FOLDER
    folder = place / f"{name}-{2 * image_size}-{key}"
    found = _finished(folder)
    if found is not None:
        return found
    try:
        place.mkdir(parents=True, exist_ok=True)
        with (place / "lock").open("ab") as lock:
            with contextlib.suppress(OSError):  # a file system without locks: then two may build, and the last one stays
                fcntl.flock(lock, fcntl.LOCK_EX)
            found = _finished(folder)  # by the process that held the lock until now
            if found is not None:
                return found
            for stale in (*place.glob(f"{name}-{2 * image_size}-*"), *place.glob(".*.tmp")):
                shutil.rmtree(stale, ignore_errors=True)
            building = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=place))
            try:
                _build(building, name, files, image_size)
                building.rename(folder)
            finally:
                shutil.rmtree(building, ignore_errors=True)
            return DecodedSplit(folder)
    except OSError as e:
        raise UserError(
            f"{place}: the decoded images cannot be kept there ({e.strerror}); name a folder with space by --cache-dir"
        ) from e


def _finished(folder: Path) -> DecodedSplit | None:
    if not folder.is_dir():
        return None
    try:
        return DecodedSplit(folder)
    except Exception as e:  # whatever damaged bytes lead to: the pictures are still there
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
