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
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from imagefiles import is_image
from utils import SPLITS, UserError, atomic_write, file_lock

from . import DATA
from .check import Report, examine
from .manifest import Manifest
from .sources import intact, open_source, some

RECORD = "prepared.json"  # in the data set: what it was made from, and its fingerprints
_BATCH = 64
_SUFFIXES = {b"\x89PNG": ".png", b"RIFF": ".webp", b"BM": ".bmp"}  # of other content: .jpg


def work_folder(dest: Path) -> Path:
    """Where `build` makes ``dest``: beside it, so that moving it is one rename."""
    return dest.parent / f".{dest.name}.part"


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a prepared folder; {} if it has none, or a damaged one."""
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        fingerprints = set(dict(record.get("fingerprints", {})))
        sound = isinstance(record["settings"], dict) and fingerprints <= set(SPLITS)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return record if sound else {}


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
        images, written = len(_images(dest)), record.get("images")
        if images == written:
            return True
        fault, advice = f"holds {images} images where {written} were written", "run again"
    else:
        made = record.get("settings", {}).get("source")
        what = f"was made from {made} or with other flags" if made else "holds something else"
        fault, advice = f"exists and {what}", f"choose another --dest (--check {dest} describes it)"
    raise UserError(f"{dest}: {fault}: remove it, or {advice}")


def _images(folder: Path) -> dict[str, int]:
    """{<split>/<class>/<image>: bytes} of a data set."""
    files = open_source(folder).files.items()
    placed = tuple(f"{split}/" for split in SPLITS)
    return {name: n for name, n in files if name.count("/") == 2 and name.startswith(placed)}


def build(manifest: Manifest, dest: Path, settings: dict[str, Any], link: str = "copy") -> Report:
    """Make the data set of a manifest at ``dest``, which must be missing or an empty folder.

    Args:
        settings: what a later run must share to resume this one; kept in the record. Its "source"
            is named in errors.
        link: "copy"; or "hard" or "symlink" for a source that is a folder.

    Returns:
        The report on the finished data set.

    Raises:
        UserError: an image cannot be read or decoded: ``dest`` is untouched and nothing is left
            behind. Or the disk is full or read-only: ``dest`` is untouched, and `work_folder` keeps
            what was done.
    """
    manifest.validate(settings["source"])
    work = work_folder(dest)
    record: dict[str, Any] = {"settings": settings}
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        _clear(work, settings)
        work.mkdir(exist_ok=True)
        with file_lock(work / ".lock"):
            _write_record(work, record)
            try:
                _fill(work, manifest, link, settings["source"])
                report = examine(work)
                _refuse_unreadable(report, manifest, settings["source"])
            except UserError:
                shutil.rmtree(work, ignore_errors=True)
                raise
            record |= {"found": manifest.found, "published": manifest.published}
            record |= {"images": len(manifest.items), "fingerprints": report.fingerprints}
            _write_record(work, record)
            for hidden in work.glob(".*"):  # the lock, and what a killed run has half-written
                hidden.unlink()
            os.rename(work, dest)
    except OSError as error:
        advice = "choose another --dest, or change who may read and write there"
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            advice = f"free some space and run the same command again; it resumes from {work}"
        elif error.errno == errno.EXDEV:
            advice = "hard links cannot cross disks: choose --link copy or --link symlink"
        what = error.filename2 or error.filename or dest
        raise UserError(f"{what}: {error.strerror or error}: {advice}") from error
    return report


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


def _refuse_unreadable(report: Report, manifest: Manifest, source: str) -> None:
    bad = report.unreadable
    bad |= {os.path.splitext(name)[0]: why for name, why in bad.items()}  # items without a suffix
    lines = [f"{item.key} ({bad[item.path]})" for item in manifest.items if item.path in bad]
    if lines:
        raise UserError(f"{source}: {some(lines, 10)}")


def _fill(work: Path, manifest: Manifest, link: str, source: str) -> None:
    """Write all images of a manifest that an interrupted run has not written."""
    stored = _images(work)
    stored |= {os.path.splitext(name)[0]: size for name, size in stored.items()}
    left = {item.key: item for item in manifest.items}
    for key, item in list(left.items()):
        if item.path in stored and item.size in (None, stored[item.path]):
            del left[key]
    for folder in {work / item.split / item.cls for item in manifest.items}:
        folder.mkdir(parents=True, exist_ok=True)
    total, done = len(manifest.items), len(manifest.items) - len(left)
    if done:
        print(f"resuming: {done} of {total} images are there")
    images = manifest.reader.stream(set(left))
    if link != "copy":
        images = ((key, Path(file.name).resolve()) for key, file in images)
    read = ((key, x.read() if hasattr(x, "read") else x) for key, x in images)
    bar = tqdm(None, "writing", total, initial=done, unit=" images", disable=None)
    with bar, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        while True:
            with intact(source):
                batch = list(itertools.islice(read, _BATCH))
            if not batch:
                break
            targets = [work / left.pop(key).path for key, _ in batch]
            list(pool.map(_write, targets, [image for _, image in batch], [link] * len(batch)))
            bar.update(len(batch))
    if left:
        lost = f"{len(left)} images are no longer there ({some([*map(str, left)])})"
        raise UserError(f"{source}: {lost}: has it changed?")


def _write(target: Path, image: Path | bytes | np.ndarray, link: str) -> None:
    """Write one image: a Path is linked, bytes are written as they are, an array becomes a PNG."""
    if isinstance(image, Path):
        target.unlink(missing_ok=True)
        (os.symlink if link == "symlink" else os.link)(image, target)
        return
    if isinstance(image, np.ndarray):
        content = io.BytesIO()
        Image.fromarray(image).save(content, "PNG", compress_level=3)
        image = content.getvalue()
    if not is_image(target.name):
        suffixes = (suffix for magic, suffix in _SUFFIXES.items() if image.startswith(magic))
        target = target.with_name(target.name + next(suffixes, ".jpg"))
    # not utils.atomic_write, which waits for the disk at each file
    part = target.parents[2] / f".{threading.get_ident()}"
    part.write_bytes(image)
    os.replace(part, target)
