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
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from utils import UserError, is_junk

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
WNID = re.compile(r"n\d{8}")  # a class's id in WordNet
_IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
_DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError),
    *(EOFError, NotImplementedError, ValueError),
)


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that compares numbers as numbers: a_9.jpg before a_10.jpg."""
    parts = filter(None, re.split(r"(\d+)", name))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def is_image(name: str) -> bool:
    """Whether a file's suffix is that of an image."""
    return os.path.splitext(name)[1].lower() in _IMAGES


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
        what = f"truncated or damaged ({str(error)[:150]})"
        raise UserError(f"{shown}: {what}: get another copy") from None


def _has_junk(name: str) -> bool:
    return any(map(is_junk, name.split("/")))


class Source:
    """Named files.

    Attributes:
        path: the folder or archive.
        kind: what it is, for messages.
        files: {POSIX path: bytes}, sorted, without hidden files and litter.
        dirs: the paths of its folders.
        skipped: {reason: [path]} of what is left out.
    """

    def __init__(self, path: Path, kind: str):
        self.path, self.kind = path, kind
        self.files: dict[str, int] = {}
        self.dirs: set[str] = set()
        self.skipped: dict[str, list[str]] = {}
        self._list()
        self.files = dict(sorted(self.files.items()))
        self.dirs = {name for name in self.dirs if name != "." and not _has_junk(name)}

    def _list(self) -> None:
        raise NotImplementedError

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, IO[bytes]]]:
        """Yield (name, open file) of the wanted files in the source's own order.

        A file is valid until the next one is asked for."""
        raise NotImplementedError

    def error(self, message: str) -> UserError:
        """The error that says what is wrong with this source."""
        return UserError(f"{self.path}: {message}")

    def _add(self, name: str, size: int) -> bool:
        if _has_junk(name):
            return False
        if name in self.files:
            raise self.error(f"holds {name} twice: unpack it and pack it again")
        self.files[name] = size
        if name.rpartition("/")[0] not in self.dirs:
            self.dirs.update(map(str, PurePosixPath(name).parents))
        return True

    def _skip(self, reason: str, name: str) -> None:
        if not _has_junk(name):
            self.skipped.setdefault(reason, []).append(name)

    def _inside(self, name: str) -> str:
        """The normalised name of an archive's member. Raises UserError if it leaves the archive."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if re.match(r"/|[A-Za-z]:[\\/]", name) or "\0" in name or ".." in parts:
            raise self.error(f"refused, as its member {name} points outside: get another copy")
        return "/".join(parts)


class Folder(Source):
    """A folder on disk. Links are followed, but not in circles.

    Args:
        without: real paths of folders to leave out.
    """

    def __init__(self, path: Path, without: Collection[str] = ()):
        self._without, self._stamp = without, hashlib.sha256()
        super().__init__(path, "a folder")

    def _list(self) -> None:
        self._walk(self.path, "", ())

    def _walk(self, folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> None:
        try:
            here = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{folder}: cannot be listed ({error.strerror})") from None
        if (here.st_dev, here.st_ino) in above:
            self._skip("links that lead in a circle", prefix)
            return
        self.dirs.add(prefix.rstrip("/") or ".")
        for entry in entries:
            name = prefix + entry.name
            if is_junk(entry.name):
                continue
            try:
                info = entry.stat()
            except OSError:
                self._skip("links that lead nowhere", name)
                continue
            if stat.S_ISDIR(info.st_mode):
                if os.path.realpath(entry.path) not in self._without:
                    self._walk(Path(entry.path), name + "/", (*above, (here.st_dev, here.st_ino)))
            elif stat.S_ISREG(info.st_mode):
                self._add(name, info.st_size)
                line = f"{name}\0{info.st_size}\0{info.st_mtime_ns}\n"
                self._stamp.update(line.encode("utf-8", "surrogateescape"))

    def stamp(self) -> str:
        """A digest that changes when a file is added, removed or rewritten."""
        return self._stamp.hexdigest()

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, IO[bytes]]]:
        for name in sorted(wanted):
            with (self.path / name).open("rb") as file:
                yield name, file


class Zip(Source):
    """A zip archive: at ``path``, or in the open ``file``."""

    def __init__(self, path: Path, file: IO[bytes] | None = None):
        self._file, self._members = file, {}
        super().__init__(path, "a zip archive")

    def _list(self) -> None:
        with intact(self.path), zipfile.ZipFile(self._file or self.path) as archive:
            for member in archive.infolist():
                # old Windows tools separate folders by backslashes
                name = self._inside(member.filename.replace("\\", "/"))
                if member.is_dir() or not name:
                    self.dirs.add(name or ".")
                elif stat.S_ISLNK(member.external_attr >> 16):
                    self._skip("links", name)
                elif self._add(name, member.file_size):
                    if member.flag_bits & 1:
                        raise self.error("is encrypted: unpack it with its password")
                    self._members[name] = member

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, IO[bytes]]]:
        with intact(self.path), zipfile.ZipFile(self._file or self.path) as archive:
            for name in sorted(wanted, key=lambda name: self._members[name].header_offset):
                with archive.open(self._members[name]) as file:
                    yield name, file


class Tar(Source):
    """A tar archive, compressed or not: at ``path``, or in the open ``file``. It is read from end
    to end, once to list it and once to stream it.
    """

    def __init__(self, path: Path, file: IO[bytes] | None = None):
        self._file = file
        super().__init__(path, "a tar archive")

    def _list(self) -> None:
        desc, off = f"listing {self.path.name}", True if self._file else None
        for _, member in tqdm(self._read(), desc, unit=" files", disable=off, leave=False):
            name = self._inside(member.name)
            if member.isreg():
                self._add(name, member.size)
            elif member.isdir():
                self.dirs.add(name or ".")
            else:
                self._skip("links, devices and pipes", name)

    def _read(self) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        with intact(self.path):
            if self._file:
                self._file.seek(0)
            path = None if self._file else self.path
            with tarfile.open(path, "r:*", self._file) as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # 60,000 of them need not be kept
                    yield archive, member
                # tarfile takes an archive without its end mark for a whole one
                archive.fileobj.seek(archive.offset)
                if archive.fileobj.read(512) != bytes(512):
                    raise tarfile.ReadError(f"no member and no end mark at byte {archive.offset}")
                while archive.fileobj.read(1 << 20):  # to the end, where gzip keeps its checksum
                    pass

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, IO[bytes]]]:
        left = len(wanted)
        for archive, member in self._read():
            if not member.isreg():
                continue
            if (name := self._inside(member.name)) in wanted:
                with archive.extractfile(member) as file:
                    yield name, file
                left -= 1
            if not left:
                return


class Nested(Source):
    """The files of archives in a source, each archive's in a folder of its own.

    Args:
        outer: the source that holds the archives.
        parts: {the archive's name in ``outer``: folder, or "" for none}.
    """

    def __init__(self, outer: Source, parts: dict[str, str]):
        self._outer, self._parts = outer, parts
        super().__init__(outer.path, f"{outer.kind} of archives")

    def _list(self) -> None:
        desc = f"listing {self.path.name}"
        opened = self._open(self._parts)
        for folder, part in tqdm(opened, desc, len(self._parts), disable=None, leave=False):
            for name, size in part.files.items():
                self._add(self._place(folder, name), size)
            self.dirs.update(self._place(folder, name) for name in part.dirs)
            for reason, names in part.skipped.items():
                self.skipped.setdefault(reason, []).extend(names)

    def _open(self, names: Collection[str]) -> Iterator[tuple[str, Source]]:
        for name, file in self._outer.stream(set(names)):
            yield self._parts[name], open_archive(Path(f"{self.path}: {name}"), file)

    @staticmethod
    def _place(folder: str, name: str) -> str:
        # train.tar may hold train/, which is that folder
        return str(PurePosixPath(folder, f"{name}/".removeprefix(f"{folder}/")))

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, IO[bytes]]]:
        folders = {name.partition("/")[0] for name in wanted}
        names = [name for name, folder in self._parts.items() if not folder or folder in folders]
        for folder, part in self._open(names):
            places = {name: self._place(folder, name) for name in part.files}
            for name, file in part.stream({name for name in places if places[name] in wanted}):
                yield places[name], file


def open_archive(path: Path, file: IO[bytes] | None = None) -> Zip | Tar:
    """Open the archive at ``path``, or in the open ``file``. Its content tells which kind it is.

    Raises:
        UserError: it is not a sound zip or tar archive.
    """
    with path.open("rb") if file is None else contextlib.nullcontext(file) as opened:
        with intact(path):
            head = opened.read(262)
        if not head:
            raise UserError(f"{path}: is empty: get another copy")
        suffix = path.name.lower()
        if head[:2] == b"PK" or (suffix.endswith(".zip") and zipfile.is_zipfile(opened)):
            return Zip(path, file)
    packed = head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0"))
    if packed or head[257:262] == b"ustar" or suffix.endswith(ARCHIVES[1:]):
        return Tar(path, file)
    raise UserError(f"{path}: is neither a folder nor a zip or tar archive")


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
        return Folder(path, without)
    if not path.is_file():
        raise UserError(f"{path}: is neither a file nor a folder (a link that leads nowhere?)")
    return open_archive(path)
