"""Folders, zip and tar archives, and tars of tars, all seen as one thing: named files that are read one after another.

Each source has
    kind: what it is, in words
    files: {name: bytes}, its files by POSIX path, sorted, hidden files and the like left out
    dirs: set of its folders' names
    skipped: {reason: [names]}, what was left out
    stream(wanted): yields (name, file) for the names in `wanted`, in the source's own order, one open file at a time;
        a folder's files come as `Path`

Nothing is ever extracted under a name that an archive chose, and names that point outside are refused all the same.
"""

import contextlib
import hashlib
import heapq
import os
import re
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_JUNK = {"__macosx", "thumbs.db", "desktop.ini", "icon\r"}
_CLASS_TAR = re.compile(r"n\d{8}\.tar")


class DataError(Exception):
    """Data that cannot be used; its message is one line for the user."""


def natural(name):
    """Sort key that counts numbers as numbers: a_9.jpg before a_10.jpg."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def is_image(name):
    return os.path.splitext(name)[1].lower() in IMAGES


def some(names, most=3):
    """'a, b, c and 4 more' of a collection of names."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(heapq.nsmallest(most, names)) + more


def _is_junk(part):
    return part.startswith(".") or part.lower() in _JUNK


class _Source:
    def __init__(self, path):
        self.path, self.files, self.dirs, self.skipped = Path(path), {}, set(), {}

    def _add(self, name, size):
        """Take a file in, unless it is hidden or an operating system's litter."""
        if any(_is_junk(part) for part in name.split("/")):
            return False
        if name in self.files:
            raise DataError(f"{self.path}: holds {name} twice: unpack it and pack it again")
        self.files[name] = size
        if name.rpartition("/")[0] not in self.dirs:
            self.dirs.update(map(str, PurePosixPath(name).parents))
        return True

    def _skip(self, reason, name):
        if not any(_is_junk(part) for part in name.split("/")):
            self.skipped.setdefault(reason, []).append(name)

    def _sort(self):
        self.files = {name: self.files[name] for name in sorted(self.files)}
        self.dirs.discard(".")

    def _inside(self, name, base=""):
        """An archive member's name, normalised.

        Raises:
            DataError: it is absolute or climbs out of the archive.
        """
        parts = []
        if name.startswith("/") or re.match(r"[A-Za-z]:[\\/]", name) or "\0" in name:
            parts = None
        for part in f"{base}/{name}".split("/") if parts is not None else ():
            if part == "..":
                if not base or not parts:
                    parts = None
                    break
                parts.pop()
            elif part not in ("", "."):
                parts.append(part)
        if parts is None:
            raise DataError(f"{self.path}: refused, its member {name} points outside the archive: get another copy")
        return "/".join(parts)


class Folder(_Source):
    """A folder on disk; links are followed, loops of them are cut."""

    kind = "a folder"

    def __init__(self, path, without=()):
        """
        Args:
            without: real paths of folders to leave out.
        """
        super().__init__(path)
        self._without = {str(folder) for folder in without}
        self._stamp = hashlib.sha256()
        self._walk(self.path, "", ())
        self._sort()

    def _walk(self, folder, prefix, above):
        try:
            here = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{folder}: cannot be listed ({error.strerror})") from None
        if (here.st_dev, here.st_ino) in above:
            self._skip("links that lead in a circle", prefix)
            return
        if prefix:
            self.dirs.add(prefix.rstrip("/"))
        for entry in entries:
            name = prefix + entry.name
            if _is_junk(entry.name):
                continue
            try:
                info = entry.stat()
            except OSError:
                self._skip("links that lead nowhere", name)
                continue
            if stat.S_ISDIR(info.st_mode):
                if os.path.realpath(entry.path) in self._without:
                    continue
                self._walk(Path(entry.path), name + "/", (*above, (here.st_dev, here.st_ino)))
            elif stat.S_ISREG(info.st_mode):
                self._add(name, info.st_size)
                self._stamp.update(f"{name}\0{info.st_size}\0{info.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))

    def stamp(self):
        """What changes when a file is added, removed or rewritten."""
        return self._stamp.hexdigest()

    def stream(self, wanted):
        for name in self.files:
            if name in wanted:
                yield name, self.path / name


class Zip(_Source):
    kind = "a zip archive"

    def __init__(self, path, file=None):
        super().__init__(path)
        self._file = file or path
        self._members = {}
        with self._open() as archive:
            for member in archive.infolist():
                # zips made by old Windows tools separate folders by backslashes
                name = self._inside(member.filename.replace("\\", "/"))
                if member.is_dir() or not name:
                    if not any(_is_junk(part) for part in name.split("/")):
                        self.dirs.add(name)
                elif stat.S_ISLNK(member.external_attr >> 16):
                    self._skip("links", name)
                elif self._add(name, member.file_size):
                    if member.flag_bits & 1:
                        raise DataError(f"{self.path}: is encrypted: unpack it with its password and give the folder")
                    self._members[name] = member
        self._sort()

    @contextlib.contextmanager
    def _open(self):
        try:
            with zipfile.ZipFile(self._file) as archive:
                yield archive
        except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path}: truncated or damaged zip archive ({error}): get another copy") from None

    def stream(self, wanted):
        with self._open() as archive:
            for member in sorted((self._members[name] for name in wanted), key=lambda member: member.header_offset):
                with archive.open(member) as file:
                    yield self._inside(member.filename.replace("\\", "/")), file


class Tar(_Source):
    """A tar archive, compressed or not. It is passed through from end to end, once to list and once to read it."""

    kind = "a tar archive"

    def __init__(self, path, file=None, bar=True):
        super().__init__(path)
        self._file = file
        links = {}
        with tqdm(
            desc=f"listing {self.path.name}", unit=" files", disable=None if bar else True, leave=False
        ) as progress:
            for _, member in self._members():
                progress.update()
                name = self._inside(member.name)
                if member.isreg():
                    self._add(name, member.size)
                elif member.isdir():
                    if not any(_is_junk(part) for part in name.split("/")):
                        self.dirs.add(name)
                elif member.issym() or member.islnk():
                    base = str(PurePosixPath(name).parent) if member.issym() else ""
                    links[name] = self._inside(member.linkname, base)
                else:
                    self._skip("devices and pipes", name)
        self._served = {}  # a file's name -> the names of the links to it
        for name, target in links.items():
            for _ in range(len(links)):
                target = links.get(target, target)
            if target not in self.files:
                self._skip("links", name)
            elif self._add(name, self.files[target]):
                self._served.setdefault(target, []).append(name)
        self._sort()

    def _members(self):
        """Yield (tarfile, member); the archive must end with its end mark, which tarfile does not ask for."""
        try:
            if self._file is not None:
                self._file.seek(0)
            # errors other than a closing one would otherwise be read as the archive's end
            with tarfile.open(self.path if self._file is None else None, "r:*", self._file) as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # 60,000 of them need not be kept
                    yield archive, member
                archive.fileobj.seek(archive.offset)
                if archive.fileobj.read(512) != bytes(512):
                    raise tarfile.ReadError(f"no member and no end mark at byte {archive.offset}")
                while archive.fileobj.read(1 << 20):  # to the end, where gzip keeps its checksum
                    pass
        except (tarfile.TarError, EOFError, zlib.error, ValueError) as error:
            raise self._damaged(error) from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise self._damaged(error) from None  # gzip's BadGzipFile, bz2's and lzma's complaints

    def _damaged(self, error):
        what = "it does not begin as one" if "could not be opened" in str(error) else error
        return DataError(f"{self.path}: truncated or damaged tar archive ({what}): get another copy")

    def stream(self, wanted):
        left = len(wanted)
        for archive, member in self._members():
            if not member.isreg():
                continue
            name = self._inside(member.name)
            for served in (name, *self._served.get(name, ())):
                if served in wanted:
                    with archive.extractfile(member) as file:
                        yield served, file
                    left -= 1
            if not left:
                return


class NestedTars(_Source):
    """Tars of images inside a folder or an archive, as in ILSVRC2012_img_train.tar: <class>.tar -> <class>/<image>."""

    def __init__(self, outer, classes):
        """Only the tars of `classes` are listed."""
        super().__init__(outer.path)
        self.kind = f"{outer.kind} of tar archives"
        self.skipped = dict(outer.skipped)
        self._outer = outer
        self._tars = {
            name: PurePosixPath(name).stem for name in outer.files if _CLASS_TAR.fullmatch(name.split("/")[-1])
        }
        self.classes = set(self._tars.values())
        self._tars = {name: wnid for name, wnid in self._tars.items() if wnid in classes}
        for wnid, inner in self._inner(self._tars, f"listing {self.path.name}"):
            for name, size in inner.files.items():
                self._add(f"{wnid}/{PurePosixPath(name).name}", size)
        self._sort()

    def _inner(self, tars, desc=None):
        streamed = self._outer.stream(set(tars))
        for name, file in tqdm(streamed, desc, len(tars), unit=" tars", disable=None if desc else True, leave=False):
            shown = f"{self.path}: {name}"
            if isinstance(file, Path):
                with file.open("rb") as opened:
                    yield self._tars[name], Tar(shown, opened, bar=False)
            else:
                yield self._tars[name], Tar(shown, file, bar=False)

    def stream(self, wanted):
        tars = [name for name, wnid in self._tars.items() if any(key.startswith(f"{wnid}/") for key in wanted)]
        for wnid, inner in self._inner(tars):
            for name, file in inner.stream(
                {name for name in inner.files if f"{wnid}/{PurePosixPath(name).name}" in wanted}
            ):
                yield f"{wnid}/{PurePosixPath(name).name}", file


class Union(_Source):
    """Several sources, each under a folder's name of its own."""

    def __init__(self, path, kind, parts):
        """
        Args:
            parts: {folder's name: source}
        """
        super().__init__(path)
        self.kind, self._parts = kind, parts
        for prefix, part in parts.items():
            self.files.update({f"{prefix}/{name}": size for name, size in part.files.items()})
            self.dirs.update(f"{prefix}/{name}" for name in part.dirs)
            for reason, names in part.skipped.items():
                self.skipped.setdefault(reason, []).extend(f"{prefix}/{name}" for name in names)

    def stream(self, wanted):
        for prefix, part in self._parts.items():
            inside = {name.removeprefix(f"{prefix}/") for name in wanted if name.startswith(f"{prefix}/")}
            if inside:
                for name, file in part.stream(inside):
                    yield f"{prefix}/{name}", file


def open_source(path, without=()):
    """The folder or archive at `path`; what an archive is, its content says and not its name.

    Args:
        without: real paths of folders inside of it that are none of it.

    Raises:
        DataError: there is nothing, or neither a folder nor a sound archive.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir():
        return Folder(path, without)
    if not path.is_file():
        raise DataError(f"{path}: is neither a file nor a folder (a link that leads nowhere?)")
    with path.open("rb") as file:
        head = file.read(262)
    if not head:
        raise DataError(f"{path}: is empty: get another copy")
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06") or (zipfile.is_zipfile(path) and path.suffix.lower() == ".zip"):
        return Zip(path)
    packed = head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0"))
    if packed or head[257:262] == b"ustar" or path.name.lower().endswith(ARCHIVES[1:]):
        return Tar(path)
    raise DataError(
        f"{path}: is neither a folder nor a zip or tar archive: give the one that holds the data set's files"
    )
