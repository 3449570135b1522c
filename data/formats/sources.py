"""Folders, zip and tar archives, and archives in them, as named files that are read one after
another. Nothing is extracted under a name from an archive; names that point outside are refused.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import heapq
import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from tqdm import tqdm

from imagefiles import nfc, walk
from utils import UserError, is_junk

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


@contextlib.contextmanager
def intact(shown: object) -> Iterator[None]:
    """Raise UserError for what zipfile, tarfile and decompressors raise when a file is damaged."""
    try:
        yield
    except (*_DAMAGE, OSError) as error:
        # decompressors raise OSError without a number; EINVAL is a damaged offset
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        what = f"truncated, damaged or encrypted ({str(error)[:150]})"
        raise UserError(f"{shown}: {what}: get another copy") from None


class Member(NamedTuple):
    """An entry of a folder or archive.

    Attributes:
        name: its POSIX path, in Unicode NFC.
        open: opens the file; None for a folder.
        size, changed: of the file, in bytes and nanoseconds.
        skipped: why it is left out, if it is.
    """

    name: str
    open: Callable[[], IO[bytes]] | None = None
    size: int = 0
    changed: int = 0
    skipped: str = ""


Members = Callable[[], Iterator[Member]]


class Source:
    """Named files.

    Args:
        path, kind: the folder or archive, and what it is, for messages.
        members: lists its entries; a file can be opened until the next entry is asked for.

    Attributes:
        files: {POSIX path: bytes}, sorted, without hidden files and litter.
        dirs: the paths of its folders.
        skipped: {reason: [path]} of what is left out.
        stamp: a digest that changes when a file is added, removed or rewritten.
    """

    def __init__(self, path: Path, kind: str, members: Members):
        self.path, self.kind, self._members = path, kind, members
        self.files: dict[str, int] = {}
        self.dirs: set[str] = set()
        self.skipped: dict[str, list[str]] = {}
        digest = hashlib.sha256()
        listing = f"listing {path.name}"
        for member in tqdm(members(), listing, unit=" files", disable=None, leave=False):
            name = member.name
            if any(map(is_junk, name.split("/"))):
                continue
            if member.skipped:
                self.skipped.setdefault(member.skipped, []).append(name)
            elif member.open is None:
                self.dirs.add(name)
            elif name in self.files:
                raise self.error(f"holds {name} twice: unpack it and pack it again")
            else:
                self.files[name] = member.size
                line = f"{name}\0{member.size}\0{member.changed}\n"
                digest.update(line.encode("utf-8", "surrogateescape"))
                if name.rpartition("/")[0] not in self.dirs:
                    self.dirs.update(map(str, PurePosixPath(name).parents))
        self.files, self.stamp = dict(sorted(self.files.items())), digest.hexdigest()
        self.dirs -= {"", "."}

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, IO[bytes]]]:
        """Yield (name, open file) of the wanted files in the source's own order.

        A file is valid until the next one is asked for."""
        left = set(wanted)
        with intact(self.path):
            for member in self._members() if left else ():
                if member.open and member.name in left:
                    left.remove(member.name)
                    with member.open() as file:
                        yield member.name, file
                if not left:
                    return

    def error(self, message: str) -> UserError:
        """The error that says what is wrong with this source."""
        return UserError(f"{self.path}: {message}")


# ---- Kinds of sources: generators of their members ----


def _of_folder(folder: Path, without: Collection[str]) -> Iterator[Member]:
    for path, entry, kind in walk(folder, without):
        name = nfc(path)
        if kind == "file":
            info = entry.stat()
            opener = partial(open, entry.path, "rb")
            yield Member(name, opener, info.st_size, info.st_mtime_ns)
        else:
            odd = "links that lead nowhere or in circles, pipes and devices"
            yield Member(name, skipped="" if kind == "folder" else odd)


def _inside(path: Path, name: str) -> str:
    """The normalised name of an archive's member. Raises UserError if it leaves the archive."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if re.match(r"/|[A-Za-z]:[\\/]", name) or "\0" in name or ".." in parts:
        raise UserError(f"{path}: refused, as its member {name} points outside: get another copy")
    return nfc("/".join(parts))


def _of_zip(path: Path, file: IO[bytes] | None) -> Iterator[Member]:
    with intact(path), zipfile.ZipFile(file or path) as archive:
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            # old Windows tools separate folders by backslashes
            name = _inside(path, info.filename.replace("\\", "/"))
            opener = None if info.is_dir() else partial(archive.open, info)
            link = stat.S_ISLNK(info.external_attr >> 16)
            yield Member(name, opener, info.file_size, skipped="links" * link)


def _of_tar(path: Path, file: IO[bytes] | None) -> Iterator[Member]:
    """A tar archive, compressed or not, is read from end to end."""
    with intact(path), tarfile.open(None if file else path, "r:*", file) as archive:
        while (info := archive.next()) is not None:
            archive.members.clear()  # 60,000 of them need not be kept
            opener = partial(archive.extractfile, info) if info.isreg() else None
            odd = "" if opener or info.isdir() else "links, devices and pipes"
            yield Member(_inside(path, info.name), opener, info.size, skipped=odd)
        # tarfile takes an archive without its end mark for a whole one
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(512) != bytes(512):
            raise tarfile.ReadError(f"no member and no end mark at byte {archive.offset}")
        while archive.fileobj.read(1 << 20):  # to the end, where gzip keeps its checksum
            pass


def _of_archives(outer: Source, parts: dict[str, str]) -> Iterator[Member]:
    for name, file in outer.stream(set(parts)):
        folder = parts[name]
        _, members = _archive(Path(f"{outer.path}: {name}"), file)
        for member in members():
            # train.tar may hold train/, which is that folder
            within = f"{member.name}/".removeprefix(f"{folder}/")
            yield member._replace(name=str(PurePosixPath(folder, within)))


def _archive(path: Path, file: IO[bytes] | None = None) -> tuple[str, Members]:
    """The kind and the members of the archive at ``path``, or in the open ``file``. Its content
    tells which kind it is.
    """
    suffix = path.name.lower()
    with path.open("rb") if file is None else contextlib.nullcontext(file) as opened, intact(path):
        head = opened.read(262)
        if not head:
            raise UserError(f"{path}: is empty: get another copy")
        is_zip = head[:2] == b"PK" or (suffix.endswith(".zip") and zipfile.is_zipfile(opened))
        opened.seek(0)
    if is_zip:
        return "a zip archive", partial(_of_zip, path, file)
    packed = head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0"))
    if packed or head[257:262] == b"ustar" or suffix.endswith(ARCHIVES[1:]):
        return "a tar archive", partial(_of_tar, path, file)
    raise UserError(f"{path}: is neither a folder nor a zip or tar archive")


def open_nested(outer: Source, parts: dict[str, str]) -> Source:
    """The files of archives in a source, each archive's in a folder of its own.

    Args:
        parts: {the archive's name in ``outer``: folder, or "" for none}.
    """
    return Source(outer.path, f"{outer.kind} of archives", partial(_of_archives, outer, parts))


def open_source(path: Path, without: Collection[str] = ()) -> Source:
    """Open a folder or an archive.

    Args:
        without: real paths of folders inside of it to leave out.

    Raises:
        UserError: nothing is there, or it is neither a folder nor a sound archive.
    """
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        return Source(path, "a folder", partial(_of_folder, path, without))
    if not path.is_file():
        raise UserError(f"{path}: is neither a file nor a folder (a link that leads nowhere?)")
    return Source(path, *_archive(path))
