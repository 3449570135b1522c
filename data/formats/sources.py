"""Folders, zip and tar archives, and tars of tars behind one interface: named files that are read
one after another.

No archive is ever extracted under names of its own choice, and names that point outside are refused
as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
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

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
WNID = re.compile(r"n\d{8}")  # WordNet's number of a class
CLASS_TAR = re.compile(r"n\d{8}\.tar")
Files = Iterator[tuple[str, Path | IO[bytes]]]


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that compares numbers as numbers: a_9.jpg before a_10.jpg."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", name)
        if part
    ]


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGES


def some(names: Collection[str], most: int = 3) -> str:
    """'a, b, c and 4 more' of a collection of names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(heapq.nsmallest(most, names)) + more


def _any_junk(name: str) -> bool:
    return any(is_junk(part) for part in name.split("/"))


class Source:
    """Named files.

    Attributes:
        path: the folder or archive.
        kind: what it is, in words.
        files: {POSIX path: bytes}, sorted, without hidden files and litter.
        dirs: the paths of its folders.
        skipped: {reason: [path]} of what is left out.
    """

    kind = ""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.files: dict[str, int] = {}
        self.dirs: set[str] = set()
        self.skipped: dict[str, list[str]] = {}

    def stream(self, wanted: set[str]) -> Files:
        """Yield (name, file) of the wanted files in the source's own order; files of a folder come
        as Path.

        An open file is valid until the next one is asked for.
        """
        raise NotImplementedError

    def _add(self, name: str, size: int) -> bool:
        if _any_junk(name):
            return False
        if name in self.files:
            raise UserError(f"{self.path}: holds {name} twice: unpack it and pack it again")
        self.files[name] = size
        if name.rpartition("/")[0] not in self.dirs:
            self.dirs.update(map(str, PurePosixPath(name).parents))
        return True

    def _add_dir(self, name: str) -> None:
        if not _any_junk(name):
            self.dirs.add(name)

    def _skip(self, reason: str, name: str) -> None:
        if not _any_junk(name):
            self.skipped.setdefault(reason, []).append(name)

    def _sort(self) -> None:
        self.files = {name: self.files[name] for name in sorted(self.files)}
        self.dirs.discard(".")

    def _inside(self, name: str, base: str = "") -> str:
        """The normalised name of an archive's member, or of a link's target relative to ``base``.

        Raises:
            UserError: it is absolute or leaves the archive.
        """
        parts: list[str] = []
        outside = name.startswith("/") or "\0" in name or re.match(r"[A-Za-z]:[\\/]", name)
        for part in f"{base}/{name}".split("/"):
            if part == "..":
                outside = outside or not base or not parts
                parts = parts[:-1]
            elif part not in ("", "."):
                parts.append(part)
        if outside:
            raise UserError(
                f"{self.path}: refused, its member {name} points outside the archive: get another copy"
            )
        return "/".join(parts)


class Folder(Source):
    """A folder on disk. It follows links, but not in circles.

    Args:
        without: real paths of folders to leave out.
    """

    kind = "a folder"

    def __init__(self, path: Path, without: Collection[str] = ()):
        super().__init__(path)
        self._without = without
        self._stamp = hashlib.sha256()
        self._walk(self.path, "", ())
        self._sort()

    def _walk(self, folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> None:
        try:
            here = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{folder}: cannot be listed ({error.strerror})") from None
        if (here.st_dev, here.st_ino) in above:
            self._skip("links that lead in a circle", prefix)
            return
        if prefix:
            self.dirs.add(prefix.rstrip("/"))
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
                self._stamp.update(
                    f"{name}\0{info.st_size}\0{info.st_mtime_ns}\n".encode(
                        "utf-8", "surrogateescape"
                    )
                )

    def stamp(self) -> str:
        """A digest that changes when a file is added, removed or rewritten."""
        return self._stamp.hexdigest()

    def stream(self, wanted: set[str]) -> Files:
        for name in self.files:
            if name in wanted:
                yield name, self.path / name


class Zip(Source):
    kind = "a zip archive"

    def __init__(self, path: Path):
        super().__init__(path)
        self._members = {}
        with self._open() as archive:
            for member in archive.infolist():
                name = self._name(member)
                if member.is_dir() or not name:
                    self._add_dir(name)
                elif stat.S_ISLNK(member.external_attr >> 16):
                    self._skip("links", name)
                elif self._add(name, member.file_size):
                    if member.flag_bits & 1:
                        raise UserError(
                            f"{self.path}: is encrypted: unpack it with its password and give the folder"
                        )
                    self._members[name] = member
        self._sort()

    def _name(self, member: zipfile.ZipInfo) -> str:
        # zips made by old Windows tools separate folders by backslashes
        return self._inside(member.filename.replace("\\", "/"))

    @contextlib.contextmanager
    def _open(self) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except (
            zipfile.BadZipFile,
            EOFError,
            zlib.error,
            NotImplementedError,
            UnicodeDecodeError,
        ) as error:
            raise UserError(
                f"{self.path}: truncated or damaged zip archive ({error}): get another copy"
            ) from None

    def stream(self, wanted: set[str]) -> Files:
        with self._open() as archive:
            for member in sorted(
                (self._members[name] for name in wanted), key=lambda member: member.header_offset
            ):
                with archive.open(member) as file:
                    yield self._name(member), file


class Tar(Source):
    """A tar archive, compressed or not. It is read from end to end twice: to list it and to stream
    it.

    Args:
        file: the open archive, if it lies inside another one.
    """

    kind = "a tar archive"

    def __init__(self, path: Path | str, file: IO[bytes] | None = None):
        super().__init__(path)
        self._file = file
        links = {}
        desc, off = f"listing {self.path.name}", True if file else None
        with tqdm(desc=desc, unit=" files", disable=off, leave=False) as progress:
            for _, member in self._members():
                progress.update()
                name = self._inside(member.name)
                if member.isreg():
                    self._add(name, member.size)
                elif member.isdir():
                    self._add_dir(name)
                elif member.issym() or member.islnk():
                    base = str(PurePosixPath(name).parent) if member.issym() else ""
                    links[name] = self._inside(member.linkname, base)
                else:
                    self._skip("devices and pipes", name)
        self._links_to: dict[str, list[str]] = {}
        for name, target in links.items():
            for _ in range(len(links)):
                target = links.get(target, target)
            if target not in self.files:
                self._skip("links", name)
            elif self._add(name, self.files[target]):
                self._links_to.setdefault(target, []).append(name)
        self._sort()

    def _members(self) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        try:
            if self._file is not None:
                self._file.seek(0)
            with tarfile.open(
                self.path if self._file is None else None, "r:*", self._file
            ) as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # 60,000 of them need not be kept
                    yield archive, member
                # tarfile itself takes an archive without its end mark for a whole one
                archive.fileobj.seek(archive.offset)
                if archive.fileobj.read(512) != bytes(512):
                    raise tarfile.ReadError(f"no member and no end mark at byte {archive.offset}")
                while archive.fileobj.read(1 << 20):  # to the end, where gzip keeps its checksum
                    pass
        except (tarfile.TarError, EOFError, zlib.error, ValueError, OSError) as error:
            if (
                isinstance(error, OSError) and error.errno is not None
            ):  # not a complaint of gzip, bz2 or lzma
                raise
            what = "it does not begin as one" if "could not be opened" in str(error) else error
            raise UserError(
                f"{self.path}: truncated or damaged tar archive ({what}): get another copy"
            ) from None

    def stream(self, wanted: set[str]) -> Files:
        left = len(wanted)
        for archive, member in self._members():
            if not member.isreg():
                continue
            name = self._inside(member.name)
            for served in (name, *self._links_to.get(name, ())):
                if served in wanted:
                    with archive.extractfile(member) as file:
                        yield served, file
                    left -= 1
            if not left:
                return


class NestedTars(Source):
    """The images of <class>.tar files in a folder or archive, as ILSVRC2012_img_train.tar has them:
    <class>/<image>.

    Attributes:
        classes: all classes that have a tar; only those of the argument ``classes`` are listed.
    """

    def __init__(self, outer: Source, classes: Collection[str]):
        super().__init__(outer.path)
        self.kind = f"{outer.kind} of tar archives"
        self.skipped = dict(outer.skipped)
        self._outer = outer
        tars = {
            n: PurePosixPath(n).stem
            for n in outer.files
            if CLASS_TAR.fullmatch(n.rpartition("/")[2])
        }
        self.classes = set(tars.values())
        self._tars = {name: wnid for name, wnid in tars.items() if wnid in classes}
        for wnid, inner in self._inner(self._tars, f"listing {self.path.name}"):
            for name, size in inner.files.items():
                self._add(f"{wnid}/{PurePosixPath(name).name}", size)
        self._sort()

    def _inner(self, tars: Collection[str], desc: str | None = None) -> Iterator[tuple[str, Tar]]:
        streamed = self._outer.stream(set(tars))
        off = None if desc else True
        for name, file in tqdm(streamed, desc, len(tars), unit=" tars", disable=off, leave=False):
            with (
                file.open("rb")
                if isinstance(file, Path)
                else contextlib.nullcontext(file) as opened
            ):
                yield self._tars[name], Tar(f"{self.path}: {name}", opened)

    def stream(self, wanted: set[str]) -> Files:
        tars = [
            name
            for name, wnid in self._tars.items()
            if any(key.startswith(f"{wnid}/") for key in wanted)
        ]
        for wnid, inner in self._inner(tars):
            keys = {name: f"{wnid}/{PurePosixPath(name).name}" for name in inner.files}
            for name, file in inner.stream({name for name, key in keys.items() if key in wanted}):
                yield keys[name], file


class Union(Source):
    """Several sources, each under the name of a folder: ``parts`` is {folder: source}."""

    def __init__(self, path: Path, kind: str, parts: dict[str, Source]):
        super().__init__(path)
        self.kind, self._parts = kind, parts
        for prefix, part in parts.items():
            self.files.update({f"{prefix}/{name}": size for name, size in part.files.items()})
            self.dirs.update(f"{prefix}/{name}" for name in part.dirs)
            for reason, names in part.skipped.items():
                self.skipped.setdefault(reason, []).extend(f"{prefix}/{name}" for name in names)

    def stream(self, wanted: set[str]) -> Files:
        for prefix, part in self._parts.items():
            inside = {
                name.removeprefix(f"{prefix}/") for name in wanted if name.startswith(f"{prefix}/")
            }
            if inside:
                for name, file in part.stream(inside):
                    yield f"{prefix}/{name}", file


def open_source(path: Path, without: Collection[str] = ()) -> Source:
    """Open the folder or archive at ``path``. The content of an archive tells its kind, not its
    name.

    Args:
        without: real paths of folders inside of it to leave out.

    Raises:
        UserError: nothing is there, or neither a folder nor a sound archive.
    """
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        return Folder(path, without)
    if not path.is_file():
        raise UserError(f"{path}: is neither a file nor a folder (a link that leads nowhere?)")
    with path.open("rb") as file:
        head = file.read(262)
    if not head:
        raise UserError(f"{path}: is empty: get another copy")
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06") or (
        zipfile.is_zipfile(path) and path.suffix.lower() == ".zip"
    ):
        return Zip(path)
    packed = head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0"))
    if packed or head[257:262] == b"ustar" or path.name.lower().endswith(ARCHIVES[1:]):
        return Tar(path)
    raise UserError(
        f"{path}: is neither a folder nor a zip or tar archive: give the one that holds the data set's files"
    )
