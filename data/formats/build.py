"""Writes the images of a manifest into a work folder beside the destination, which takes the
destination's name when the data set is complete.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils import SPLITS, UserError, file_lock

from .check import RECORD, examine, placed, print_report, read_record
from .sources import Source, some

_BATCH = 64


@dataclass
class Manifest:
    """What to make of a source."""

    found: str  # the source's format, for the user
    # yields (key, image) of a set of keys; an image is the path or the bytes of an image file, or
    # an array uint8 [H, W, 3]
    stream: Callable[[set[Any]], Iterable[tuple[Any, Any]]]
    items: dict[str, Any]  # {split/class/name: key}
    notes: Sequence[str] = ()  # for the user
    published: bool = True  # False if the images are known not to be the published choice
    dest: str | None = None  # the name of the folder to make; None for the one that was asked for
    link: str = "copy"  # what to do with paths: "copy", "move", "hard" or "symlink"


def is_built(dest: Path, settings: dict[str, Any]) -> bool:
    """Whether ``dest`` was made with these settings; False if it is missing or empty.

    Raises:
        UserError: something else is there, or images are missing from it.
    """
    if not os.path.lexists(dest) or (dest.is_dir() and not any(dest.iterdir())):
        if dest.is_symlink() or os.path.ismount(dest):
            why = "a link or a mount point, which a folder cannot replace; name a folder inside"
            raise UserError(f"--dest {dest}: is {why}")
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
        settings: kept in the record, by which a later run knows the data set. Its "source" is named
            in errors.
        make: its manifest; may unpack archives into the folder that it is given.

    Raises:
        UserError: the source has a fault, an image cannot be read, or the disk is full or
            read-only: ``dest`` is untouched, and nothing is left behind.
    """
    work = dest.parent / f".{dest.name}.part"  # beside it, so that moving it is one rename
    lock, images = work / ".lock", work / "made"
    try:
        if work.exists() and not lock.exists():
            raise UserError(f"{work}: is in the way and was not made by this command: move it")
        work.mkdir(parents=True, exist_ok=True)
        with file_lock(lock):
            try:
                for left in (images, work / "unpacked"):  # by a run that was killed
                    shutil.rmtree(left, ignore_errors=True)
                manifest = make(work / "unpacked")
                dest = dest.with_name(manifest.dest or dest.name)
                is_built(dest, settings)  # refuses a data set of another source
                _fill(images, manifest, dest, settings["source"])
                report = examine(images)
                if report.unreadable:
                    bad = [f"{manifest.items[p]} ({why})" for p, why in report.unreadable.items()]
                    raise UserError(f"{settings['source']}: {some(bad, 10)}")
                record = {"settings": settings, "found": manifest.found}
                record |= {"published": manifest.published, "images": len(manifest.items)}
                record |= {"fingerprints": report.fingerprints}
                text = json.dumps(record, indent=1, sort_keys=True)
                (images / RECORD).write_text(text, encoding="utf-8")
                os.rename(images, dest)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if isinstance(error, BrokenPipeError) or error.filename == "output":  # of Terminal
            raise
        advice = "choose another --dest, or change who may read and write there"
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            advice = "free some space"
        elif error.errno == errno.EXDEV:
            advice = "hard links cannot cross disks: choose --link copy or --link symlink"
        what = error.filename2 or error.filename or dest
        raise UserError(f"{what}: {error.strerror or error}: {advice}") from error
    except KeyboardInterrupt:
        print("interrupted: nothing is left behind", file=sys.stderr)
        raise
    print(f"ready: {dest}")
    print_report(dest, report)


def _fill(folder: Path, manifest: Manifest, dest: Path, source: str) -> None:
    """Write all images of a manifest."""
    classes = {path.rpartition("/")[0] for path in manifest.items}
    counts = "/".join(str(sum(c.startswith(f"{split}/") for c in classes)) for split in SPLITS)
    left = {key: folder / path for path, key in manifest.items.items()}
    print(f"found: {source}: {manifest.found}", *manifest.notes, sep="\nnote: ")
    print(f"writing: {counts} classes, {len(left)} images -> {dest}", flush=True)
    for cls in classes:
        (folder / cls).mkdir(parents=True)
    images = iter(manifest.stream(set(left)))
    bar = tqdm(None, "writing", len(left), unit=" images", disable=None)
    with bar, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        while batch := list(itertools.islice(images, _BATCH)):
            todo = [(left.pop(key), image) for key, image in batch]
            list(pool.map(lambda item: _write(*item, manifest.link), todo))
            bar.update(len(batch))
    if left:
        raise UserError(f"{source}: has changed meanwhile: {some([*map(str, left)])} are gone")


def _write(target: Path, image: Path | bytes | np.ndarray, link: str) -> None:
    """Write one image: a Path is copied, moved or linked, bytes are written as they are, an array
    becomes a PNG.
    """
    if isinstance(image, np.ndarray):
        Image.fromarray(image).save(target, "PNG", compress_level=3)
    elif isinstance(image, bytes):
        target.write_bytes(image)
    else:
        put = {"copy": shutil.copyfile, "move": os.replace, "hard": os.link, "symlink": os.symlink}
        put[link](image if link == "move" else image.resolve(), target)
