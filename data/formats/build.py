"""Carries out a plan in a temporary folder beside the destination, and moves it into place when it
is complete.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import tarfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils import SPLITS, UserError, atomic_write, file_lock

from .check import Report, examine
from .manifest import Plan
from .sources import is_image, some

RECORD = "prepared.json"  # in the data set: what it was made from, and its fingerprints
_BATCH = 64
_MAGIC = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG": ".png",
    b"RIFF": ".webp",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}


def work_folder(dest: Path) -> Path:
    """Where `build` makes ``dest``: beside it, so that moving it is one rename."""
    return dest.parent / f".{dest.name}.part"


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a prepared folder; {} if it has none."""
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        sound = isinstance(record["settings"], dict) and set(
            dict(record.get("fingerprints", {}))
        ) <= set(SPLITS)
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return record if sound else {}


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    with atomic_write(folder / RECORD) as file:
        file.write(json.dumps(record, indent=1, sort_keys=True).encode())


def build(plan: Plan, dest: Path, settings: dict[str, Any], link: str = "copy") -> Report:
    """Make the data set of a plan at ``dest``, which must be missing or an empty folder.

    Args:
        settings: what a later run must share to resume this one; kept in the record.
        link: "copy"; or "hard" or "symlink" for a source that is a folder.

    Returns:
        The report on the finished data set.

    Raises:
        UserError: an image cannot be read or decoded; ``dest`` is untouched and nothing is left
            behind.
        OSError: the disk is full or read-only; ``dest`` is untouched, and `work_folder` keeps what
            was done.
    """
    work = work_folder(dest)
    dest.parent.mkdir(parents=True, exist_ok=True)
    if work.is_dir() and any(work.iterdir()) and read_record(work).get("settings") != settings:
        if not (work / RECORD).exists() and any(
            not entry.name.startswith(".") for entry in work.iterdir()
        ):
            raise UserError(f"{work}: is in the way and was not made by prepare.py: move it")
        with file_lock(work / ".lock"):
            shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    with file_lock(work / ".lock"):
        _write_record(work, {"settings": settings})
        try:
            _fill(work, plan, link, settings["source"])
            report = examine(work, progress=True)
            _refuse_unreadable(report, plan, settings["source"])
        except UserError:
            shutil.rmtree(work, ignore_errors=True)
            raise
        record = {
            "settings": settings,
            "found": plan.found,
            **({} if plan.published else {"published": False}),
            "images": len(plan.items),
            "fingerprints": {split: report.splits[split].fingerprint for split in SPLITS},
        }
        _write_record(work, record)
        for hidden in work.glob(".*"):  # the lock, and what a killed run has half-written
            hidden.unlink()
        os.rename(work, dest)
    return report


def _refuse_unreadable(report: Report, plan: Plan, source: str) -> None:
    if not report.unreadable:
        return
    name, why = report.unreadable[0]
    key = next(
        (item.key for item in plan.items if item.path in (name, os.path.splitext(name)[0])), name
    )
    shown = key if isinstance(key, str) else f"{key[0]}, row {key[1]}"
    more = f" (and {len(report.unreadable) - 1} more)" if report.unreadable[1:] else ""
    raise UserError(f"{source}: {shown}: is not a sound image ({why}){more}: get another copy")


def _fill(work: Path, plan: Plan, link: str, source: str) -> None:
    """Write all images of a plan that an interrupted run has not written."""
    wanted = {}
    for split in SPLITS:
        items = [item for item in plan.items if item.split == split]
        stored = _stored(work / split)
        wanted |= {
            i.key: i for i in items if i.path not in stored or i.size not in (None, stored[i.path])
        }
        for cls in {item.cls for item in items}:
            (work / split / cls).mkdir(parents=True, exist_ok=True)
    done = len(plan.items) - len(wanted)
    if done:
        print(f"resuming: {done} of {len(plan.items)} images are there")
    bar = tqdm(
        desc="writing",
        total=len(plan.items),
        initial=done,
        unit=" images",
        smoothing=0.05,
        disable=None,
    )
    with bar, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        batch, left = [], set(wanted)

        def write_batch() -> None:
            list(pool.map(lambda pair: _put(work / pair[0].path, pair[1], link), batch))
            bar.update(len(batch))
            batch.clear()

        try:
            for key, image in plan.reader.stream(set(wanted)):
                batch.append((wanted[key], image.read() if hasattr(image, "read") else image))
                left.discard(key)
                if len(batch) == _BATCH:
                    write_batch()
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (
                None,
                errno.EINVAL,
            ):  # EINVAL: a damaged offset
                raise
            raise UserError(
                f"{source}: truncated or damaged archive ({error}): get another copy"
            ) from None
        write_batch()
    if left:
        raise UserError(
            f"{source}: {len(left)} images are no longer there ({some([*map(str, left)])}): has it changed?"
        )


def _stored(folder: Path) -> dict[str, int]:
    """{<split>/<class>/<image>: bytes} of what an interrupted run has left, also by names without a
    suffix.
    """
    stored = {}
    for cls in os.scandir(folder) if folder.is_dir() else ():
        for entry in os.scandir(cls.path):
            if entry.name.startswith(".") or not os.path.exists(entry.path):
                os.unlink(entry.path)  # half-written, or a link to what is gone
                continue
            name = f"{folder.name}/{cls.name}/{entry.name}"
            stored[name] = stored[os.path.splitext(name)[0]] = entry.stat().st_size
    return stored


def _put(target: Path, image: Path | bytes | np.ndarray, link: str) -> None:
    """Write one image: a Path is copied or linked, bytes are written as they are, an array becomes
    a PNG.
    """
    if isinstance(image, Path):
        if link != "copy":
            target.unlink(missing_ok=True)
            (os.symlink if link == "symlink" else os.link)(image.resolve(), target)
            return
        image = image.read_bytes()
    if isinstance(image, np.ndarray):
        content = io.BytesIO()
        Image.fromarray(image).save(content, "PNG", compress_level=3)
        image = content.getvalue()
    if not is_image(target.name):
        suffix = next(
            (suffix for magic, suffix in _MAGIC.items() if image.startswith(magic)), ".jpg"
        )
        target = target.with_name(target.name + suffix)
    # not utils.atomic_write: it waits for the disk at each file, and its umask is not safe in
    # threads
    part = target.with_name(f".{target.name[:200]}.part")
    try:
        part.write_bytes(image)
        os.replace(part, target)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
