"""Image files: which of a folder's entries are images, and their pixels.

One rule for training, prediction, ``prepare.py`` and its ``--check``. Imports no PyTorch.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from utils import UserError, out_of_memory

# Pillow only recognises these, or needs other programs to decode them
_STUBS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_JUNK = {"__macosx", "@eadir", "#recycle", "thumbs.db", "desktop.ini", "icon\r"}
# photographs of 108 megapixels are real; Pillow still refuses twice its limit, 179 megapixels
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


# ---- Folders ----


@functools.cache
def suffixes() -> frozenset[str]:
    """The suffixes of images that Pillow can decode here, in lower case."""
    known = Image.registered_extensions().items()
    return frozenset(s.lower() for s, kind in known if kind in Image.OPEN and kind not in _STUBS)


def is_junk(name: str) -> bool:
    """Whether a file or folder is hidden, or litter of an operating system."""
    return name.startswith(".") or name.lower() in _JUNK


def suffix(name: str) -> str:
    """A file name's suffix in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def is_image(name: str) -> bool:
    """Whether a file is an image, by its suffix."""
    return suffix(name) in suffixes()


def nfc(text: str) -> str:
    """Unicode NFC, in which names are compared: macOS writes é as two characters."""
    return unicodedata.normalize("NFC", text)


def read_text(path: Path) -> str:
    """A text file that people have written: UTF-8, perhaps with a byte order mark; in NFC.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read, or is no UTF-8.
    """
    return nfc(path.read_text("utf-8-sig"))


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """A folder's entries by name, without hidden ones and operating systems' litter.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            return sorted((e for e in found if not is_junk(e.name)), key=lambda entry: entry.name)
    except OSError as e:
        raise UserError(f"{folder}: cannot be read ({e.strerror})") from e


def kind_of(entry: os.DirEntry[str]) -> str:
    """ "folder", "file" or "other", which is a link that leads nowhere, a pipe or a device; mostly
    without asking the disk.
    """
    with contextlib.suppress(OSError):  # a link that leads to itself
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    return "other"


def walk(
    folder: Path, without: Collection[str] = (), prefix: str = "", above: tuple = ()
) -> Iterator[tuple[str, os.DirEntry[str], str]]:
    """Yield (POSIX path in ``folder``, entry, "folder", "file" or "other") of all that is below it,
    a folder before its content. Links are followed, but not nowhere and not in circles.

    Args:
        without: real paths of folders to leave out.
        prefix, above: of the recursion.

    Raises:
        UserError: a folder cannot be read.
    """
    above = (*above, os.path.realpath(folder))
    for entry in entries(folder):
        name, kind = prefix + entry.name, kind_of(entry)
        if kind != "folder":
            yield name, entry, kind
        elif (real := os.path.realpath(entry.path)) in above:
            yield name, entry, "other"
        elif real not in without:
            yield name, entry, "folder"
            yield from walk(Path(entry.path), without, f"{name}/", above)


def images_below(folder: Path, without: Iterable[Path] = ()) -> list[Path]:
    """The images anywhere below a folder, by name; a note counts what else is there.

    Args:
        without: images to leave out, however they are named.

    Raises:
        UserError: the folder or one in it cannot be read.
    """
    found = [(name, kind) for name, _, kind in walk(folder) if kind != "folder"]
    files = [name for name, kind in found if kind == "file"]
    note_unknown(folder, (name for name in files if not is_image(name)))
    if other := [name for name, kind in found if kind == "other"]:
        what = f"{len(other)} links that lead nowhere, pipes or devices, such as {other[0]}"
        _print_once(f"note: {folder}: left out {what}")
    known = {os.path.realpath(path) for path in without}
    images = [folder / name for name in files if is_image(name)]
    return [path for path in images if not known or os.path.realpath(path) not in known]


def unknown_formats(names: Iterable[str]) -> str:
    """'3 files of unknown format: .heic, .txt' of files that are not images; '' of none."""
    kinds = Counter(suffix(name) or "no suffix" for name in names)
    return f"{kinds.total()} files of unknown format: {', '.join(sorted(kinds))}" if kinds else ""


def note_unknown(folder: Path, names: Iterable[str]) -> None:
    """Print a note that counts the files that are left out, once a process."""
    if text := unknown_formats(names):
        _print_once(f"note: {folder}: left out {text}")


@functools.cache
def _print_once(line: str) -> None:
    print(line, flush=True)


# ---- Pixels ----


def load_image(path: Path, file: IO[bytes] | None = None) -> Image.Image:
    """Decode one file to RGB: upright by its EXIF orientation, transparency on white.

    Args:
        file: the file's content, if it is open already.

    Raises:
        UserError: it cannot be decoded, is implausibly large, or has pixels of unknown range.
    """
    try:
        with Image.open(file or path) as image:
            image.load()
            return to_rgb(image)
    except Exception as e:  # Pillow's decoders raise nearly anything on damaged files
        if out_of_memory(e) or getattr(e, "errno", None) in (errno.EMFILE, errno.ENFILE):
            raise  # the file may be sound
        reason = str(e).replace(repr(str(path)), "").replace(str(path), "").strip(" :\n")
        reason = (reason or type(e).__name__).splitlines()[0]
        raise UserError(f"{path}: not a readable image ({reason}); remove or replace it") from e


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, upright by its EXIF orientation, transparency on white.

    Raises:
        ValueError: its pixels have no known range.
    """
    of_16_bits = image.mode.startswith("I;") or image.format in ("PNG", "PPM")
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as e:  # its EXIF block is damaged, not its pixels
        if out_of_memory(e):
            raise
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        values = np.asarray(image)
        if image.mode == "F":
            if not (values.min() >= 0 and values.max() <= 1):
                raise ValueError("floats outside 0 to 1")
            levels = values * 255
        elif of_16_bits:  # which Pillow may call "I"
            levels = np.where(values == image.info.get("transparency"), 255, values >> 8)
        else:
            raise ValueError("integers of unknown range; convert them to 8 or unsigned 16 bits")
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
