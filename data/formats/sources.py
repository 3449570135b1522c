"""Folders of files, and zip and tar archives, which are unpacked into a folder first."""

from __future__ import annotations

import errno
import hashlib
import heapq
import lzma
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from data.imagefiles import is_junk, nfc, walk
from utils import UserError

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
WNID = re.compile(r"n\d{8}")  # a class's id in WordNet
_DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, ValueError),
    RuntimeError,  # of zipfile: encrypted, or packed in an unknown way
)


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that compares numbers as numbers: a_9.jpg before a_10.jpg."""
    parts = filter(None, re.split(r"(\d+)", name))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def some(names: Collection[str], most: int = 3) -> str:
    """'a, b, c and 4 more' of a collection of names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(heapq.nsmallest(most, names)) + more


class Source:
    """The files below a folder.

    Args:
        archive: what was unpacked into it, for messages; None if it is the user's own folder.
        skipped: the names that were left out when it was unpacked.
        without: real paths of folders inside of it to leave out.

    Attributes:
        path: the user's name for it.
        files: {POSIX path in Unicode NFC: where it is}, sorted, without hidden files and litter.
        dirs: the paths of its folders.
        skipped: the paths of links that lead nowhere, devices and the like.
        stamp: a digest that changes when a file is added, removed or rewritten.

    Raises:
        UserError: there is no such folder, or two names in it are equal in NFC.
    """

    def __init__(
        self,
        folder: Path,
        archive: Path | None = None,
        skipped: Collection[str] = (),
        without: Collection[str] = (),
    ):
        self.archive, self.path = archive, archive or folder
        if not folder.is_dir():
            raise self.error("no such file or folder")
        files: dict[str, Path] = {}
        self.dirs: set[str] = set()
        self.skipped = list(skipped)
        digest = hashlib.sha256()
        for path, entry, kind in walk(folder, without):
            name = nfc(path)
            if kind == "folder":
                self.dirs.add(name)
            elif kind == "other":
                self.skipped.append(name)
            elif name in files:
                raise self.error(f"holds {name} twice: rename one")
            else:
                files[name], info = Path(entry.path), entry.stat()
                line = f"{name}\0{info.st_size}\0{info.st_mtime_ns}\n"
                digest.update(line.encode("utf-8", "surrogateescape"))
        self.files, self.stamp = dict(sorted(files.items())), digest.hexdigest()

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, Path]]:
        """Yield (name, where it is) of the wanted files."""
        return ((name, self.files[name]) for name in sorted(wanted))

    def error(self, message: str) -> UserError:
        """The error that says what is wrong with this source."""
        return UserError(f"{self.path}: {message}")


def _members(archive: Any) -> Iterator[tuple[str, Callable | None, bool]]:
    """Yield (name, what opens it or None, whether it is a folder) of an archive's members."""
    if isinstance(archive, zipfile.ZipFile):
        for info in archive.infolist():
            is_file = not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16)
            # old Windows tools separate folders by backslashes
            name = info.filename.replace("\\", "/")
            yield name, partial(archive.open, info) if is_file else None, info.is_dir()
        return
    for info in archive:
        yield info.name, partial(archive.extractfile, info) if info.isreg() else None, info.isdir()
    # tarfile takes an archive without its end mark for a whole one
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(512) != bytes(512):
        raise tarfile.ReadError(f"no member and no end mark at byte {archive.offset}")
    while archive.fileobj.read(1 << 20):  # to the end, where gzip keeps its checksum
        pass


def _unpack(
    path: Path, folder: Path, shown: Path, wanted: Callable[[str], object]
) -> Iterator[str]:
    """Unpack an archive's wanted files; yields the names of links and devices, which are not."""
    tar = tarfile.is_tarfile(path)  # before zipfile, which finds a zip archive in a tar archive
    with tarfile.open(path) if tar else zipfile.ZipFile(path) as archive:
        members = tqdm(_members(archive), f"unpacking {path.name}", unit=" files", disable=None)
        for name, opener, is_folder in members:
            parts = [part for part in name.split("/") if part not in ("", ".")]
            if re.match(r"/|[A-Za-z]:[\\/]", name) or "\0" in name or ".." in parts:
                raise UserError(f"{shown}: refused, as its member {name} points outside")
            target = folder.joinpath(*parts)
            if any(map(is_junk, parts)) or not wanted(name):
                continue
            if is_folder:
                target.mkdir(parents=True, exist_ok=True)
            elif opener is None:
                yield name
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                with opener() as file, target.open("xb") as copy:
                    shutil.copyfileobj(file, copy, 1 << 20)


def unpack(
    shown: Path,
    archives: dict[Path, str],
    folder: Path,
    wanted: Callable[[str], object] = lambda name: True,
) -> Source:
    """Unpack archives, whose content tells whether they are zip or tar, and open the result.

    Args:
        shown: the user's name for them.
        archives: {path: its own folder in ``folder``, or "" for none}.
        wanted: whether a member's name is.

    Raises:
        UserError: an archive is damaged, encrypted or none, or a member's name points outside of it
            or is there twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    skipped: list[str] = []
    for path, part in archives.items():
        name = shown if path == shown else f"{shown}: {path.name}"
        try:
            skipped += _unpack(path, folder / part, name, wanted)
            if folder.parent in path.parents:  # it was unpacked itself: make room
                path.unlink()
        except (FileExistsError, NotADirectoryError) as error:
            twice = PurePosixPath(error.filename).name
            raise UserError(f"{name}: holds {twice} twice: pack it again") from None
        except (*_DAMAGE, OSError) as error:
            # decompressors raise OSError without a number; EINVAL is a damaged offset
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise
            what = f"is no zip or tar archive, damaged or encrypted ({str(error)[:150]})"
            raise UserError(f"{name}: {what}: get another copy") from None
    return Source(folder, shown, skipped)
