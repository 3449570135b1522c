"""Writes the images of a manifest into a work folder beside the destination, which takes the
destination's name when the data set is complete.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.imagefiles import is_image
from utils import SPLITS, UserError, atomic_write, file_lock

from . import DATA
from .check import RECORD, examine, placed, print_report, read_record
from .sources import Source, some

_BATCH = 64
_SUFFIXES = {b"\x89PNG": ".png", b"RIFF": ".webp", b"BM": ".bmp"}  # of other content: .jpg


@dataclass
class Manifest:
    """What to make of a source."""

    found: str  # the source's format, for the user
    # yields (key, image) of a set of keys; an image is the path or the bytes of an image file, or
    # an array uint8 [H, W, 3]
    stream: Callable[[set[Any]], Iterable[tuple[Any, Any]]]
    # {split/class/name: key}; a name without a suffix gets one by the image's content
    items: dict[str, Any]
    notes: Sequence[str] = ()  # for the user
    published: bool = True  # False if the images are known not to be the published choice
    dest: str | None = None  # the name of the folder to make; None for the one that was asked for
    link: str = "copy"  # what to do with paths: "copy", "move", "hard" or "symlink"


def work_folder(dest: Path) -> Path:
    """Where `build` makes ``dest``: beside it, so that moving it is one rename."""
    return dest.parent / f".{dest.name}.part"


def is_built(dest: Path, settings: dict[str, Any]) -> bool:
    """Whether ``dest`` was made with these settings; False if it is missing or empty.

    Raises:
        UserError: something else is there, images are missing from it, or it is a folder of code.
    """
    place = Path(os.path.realpath(dest))
    for folder in (DATA / "formats", DATA / "splits"):
        if folder in (place, *place.parents):
            raise UserError(f"--dest {dest}: must not be in {folder}, which holds code")
    if not os.path.lexists(dest) or (dest.is_dir() and not any(dest.iterdir())):
        return False
    record = read_record(dest) if dest.is_dir() else {}
    if record.get("settings") == settings:
        images, written = len(placed(Source(dest))), record.get("images")
        if images == written:
            print(f"{dest}: is there already, made from {settings['source']}: nothing to do")
            return True
        fault, advice = f"holds {images} images where {written} were written", "run again"
    else:
        made = record.get("settings", {}).get("source")
        what = f"was made from {made} or with other flags" if made else "holds something else"
        fault, advice = f"exists and {what}", f"choose another --dest (--check {dest} describes it)"
    raise UserError(f"{dest}: {fault}: remove it, or {advice}")


def build(dest: Path, settings: dict[str, Any], make: Callable[[Path], Manifest]) -> None:
    """Make a data set at ``dest``, which must be missing or an empty folder, and show what it is.

    Args:
        settings: what a later run must share to resume this one; kept in the record. Its "source"
            is named in errors.
        make: its manifest; may unpack archives into the folder that it is given.

    Raises:
        UserError: the source has a fault, or an image cannot be read: ``dest`` is untouched and
            nothing is left behind. Or the disk is full or read-only: ``dest`` is untouched, and
            `work_folder` keeps what was done.
    """
    work = work_folder(dest)
    record: dict[str, Any] = {"settings": settings}
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        _clear(work, settings)
        work.mkdir(exist_ok=True)
        with file_lock(work / ".lock"):
            _write_record(work, record)
            shutil.rmtree(work / ".unpacked", ignore_errors=True)
            try:
                manifest = make(work / ".unpacked")
                dest = dest.with_name(manifest.dest or dest.name)
                is_built(dest, settings)  # refuses a data set of another source
                _fill(work, manifest, dest, settings["source"])
                report = examine(work)
                if report.unreadable:
                    keys = manifest.items  # of names with and without a suffix
                    bad = [
                        f"{keys.get(path, keys.get(os.path.splitext(path)[0]))} ({why})"
                        for path, why in report.unreadable.items()
                    ]
                    raise UserError(f"{settings['source']}: {some(bad, 10)}")
            except (UserError, MemoryError, RecursionError):
                shutil.rmtree(work, ignore_errors=True)
                raise
            finally:
                shutil.rmtree(work / ".unpacked", ignore_errors=True)
            record |= {"found": manifest.found, "published": manifest.published}
            record |= {"images": len(manifest.items), "fingerprints": report.fingerprints}
            _write_record(work, record)
            for hidden in work.glob(".*"):  # the lock, and what a killed run has half-written
                hidden.unlink()
            os.rename(work, dest)
    except OSError as error:
        if isinstance(error, BrokenPipeError) or error.filename == "output":  # of Terminal
            raise
        advice = "choose another --dest, or change who may read and write there"
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            advice = f"free some space and run the same command again; it resumes from {work}"
        elif error.errno == errno.EXDEV:
            advice = "hard links cannot cross disks: choose --link copy or --link symlink"
        what = error.filename2 or error.filename or dest
        raise UserError(f"{what}: {error.strerror or error}: {advice}") from error
    except KeyboardInterrupt:
        print("interrupted: run the same command again to resume", file=sys.stderr)
        raise
    print(f"ready: {dest}")
    print_report(dest, report)


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    with atomic_write(folder / RECORD) as file:
        file.write(json.dumps(record, indent=1, sort_keys=True).encode())


def _clear(work: Path, settings: dict[str, Any]) -> None:
    """Remove what a run with other settings has left in the work folder."""
    if not work.is_dir() or read_record(work).get("settings") == settings:
        return
    if not (work / RECORD).exists() and any(not e.name.startswith(".") for e in work.iterdir()):
        raise UserError(f"{work}: is in the way and was not made by this command: move it")
    with file_lock(work / ".lock"):
        shutil.rmtree(work)


def _fill(work: Path, manifest: Manifest, dest: Path, source: str) -> None:
    """Write all images of a manifest that an interrupted run has not written."""
    folders = {path.rpartition("/")[0] for path in manifest.items}
    counts = "/".join(str(sum(f.startswith(f"{split}/") for f in folders)) for split in SPLITS)
    total = len(manifest.items)
    print(f"found: {source}: {manifest.found}", *manifest.notes, sep="\nnote: ")
    print(f"writing: {counts} classes, {total} images -> {dest}", flush=True)
    stored = set(placed(Source(work)))
    stems = {os.path.splitext(name)[0] for name in stored}  # of names without a suffix
    left = {
        key: path
        for path, key in manifest.items.items()
        if path not in stored and (is_image(path) or path not in stems)
    }
    if done := total - len(left):
        print(f"resuming: {done} of {total} images are there")
    for folder in folders:
        (work / folder).mkdir(parents=True, exist_ok=True)
    images = iter(manifest.stream(set(left)))
    bar = tqdm(None, "writing", total, initial=done, unit=" images", disable=None)
    with bar, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        while batch := list(itertools.islice(images, _BATCH)):
            todo = [(work / left.pop(key), image) for key, image in batch]
            list(pool.map(lambda item: _write(*item, manifest.link), todo))
            bar.update(len(batch))
    if left:
        raise UserError(f"{source}: has changed meanwhile: {some([*map(str, left)])} are gone")


def _write(target: Path, image: Path | bytes | np.ndarray, link: str) -> None:
    """Write one image: a Path is copied, moved or linked, bytes are written as they are, an array
    becomes a PNG.
    """
    if isinstance(image, np.ndarray):
        content = io.BytesIO()
        Image.fromarray(image).save(content, "PNG", compress_level=3)
        image = content.getvalue()
    if not is_image(target.name):
        suffixes = (suffix for magic, suffix in _SUFFIXES.items() if image.startswith(magic))
        target = target.with_name(target.name + next(suffixes, ".jpg"))
    if isinstance(image, Path) and link != "copy":
        target.unlink(missing_ok=True)
        put = {"move": os.replace, "hard": os.link, "symlink": os.symlink}[link]
        put(image if link == "move" else image.resolve(), target)
        return
    # not utils.atomic_write, which waits for the disk at each file
    part = target.parents[2] / f".{threading.get_ident()}"
    part.write_bytes(image.read_bytes() if isinstance(image, Path) else image)
    os.replace(part, target)
