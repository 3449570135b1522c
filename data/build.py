"""Carries a plan out in a temporary folder beside the destination, and moves it into place whole."""

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

import numpy as np
from check import examine
from PIL import Image
from plans import SPLITS
from sources import DataError, is_image, some
from tqdm import tqdm

RECORD = "prepared.json"  # lies in the data set: what it was made from, and its fingerprints
_BATCH = 64
_MAGIC = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG": ".png",
    b"RIFF": ".webp",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}


def work_folder(dest):
    """Where `dest` is made: beside it, so that moving it is one rename."""
    return dest.parent / f".{dest.name}.part"


def read_record(folder):
    """The record of a prepared folder; {} if it has none."""
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    sound = isinstance(record, dict) and isinstance(record.get("settings"), dict)
    return record if sound and set(record.get("fingerprints", SPLITS)) <= set(SPLITS) else {}


def _write(path, content):
    """Write bytes to `path`, whole or not at all."""
    part = path.with_name(f".{path.name[:200]}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _put(target, image, link):
    """Write one image: a Path is copied or linked, bytes are written as they are, an array becomes a PNG."""
    if isinstance(image, Path):
        if link != "copy":
            image = image.resolve()
            target.unlink(missing_ok=True)
            (os.symlink if link == "symlink" else os.link)(image, target)
            return
        image = image.read_bytes()
    if isinstance(image, np.ndarray):
        content = io.BytesIO()
        Image.fromarray(image).save(content, "PNG", compress_level=3)
        image = content.getvalue()
    if not is_image(target.name):
        suffix = next((suffix for magic, suffix in _MAGIC.items() if image.startswith(magic)), ".jpg")
        target = target.with_name(target.name + suffix)
    _write(target, image)


@contextlib.contextmanager
def _lock(work):
    """Only one process may work in a folder."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (work / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise DataError(f"{work}: another prepare.py is at work there: wait for it, or stop it") from None
        yield


def _stored(work, split):
    """{<split>/<class>/<image>: bytes} of what an interrupted run has left, also by names without a suffix."""
    stored = {}
    for cls in os.scandir(work / split) if (work / split).is_dir() else ():
        for entry in os.scandir(cls.path):
            if entry.name.startswith(".") or not os.path.exists(entry.path):
                os.unlink(entry.path)  # half-written, or a link to what is gone
                continue
            name = f"{split}/{cls.name}/{entry.name}"
            stored[name] = stored[os.path.splitext(name)[0]] = entry.stat().st_size
    return stored


def build(plan, dest, settings, link="copy"):
    """Make the data set of a plan at `dest`, which must not be there, or be an empty folder.

    Args:
        plan: of `forms.recognise`.
        dest: Path.
        settings: what a later run must share to go on here; kept in the record.
        link: "copy", "hard" or "symlink"; the latter two for a source that is a folder.

    Returns:
        `check.Report` of the finished data set.

    Raises:
        DataError: an image cannot be read or decoded; `dest` is untouched and nothing is left behind.
        OSError: the disk is full or read-only; `dest` is untouched, what was done stays in `work_folder(dest)`.
    """
    work = work_folder(dest)
    dest.parent.mkdir(parents=True, exist_ok=True)
    if work.is_dir() and any(work.iterdir()) and read_record(work).get("settings") != settings:
        if not (work / RECORD).exists() and {entry.name for entry in work.iterdir()} - {".lock", f".{RECORD}.part"}:
            raise DataError(f"{work}: is in the way and was not made by prepare.py: move it")
        with _lock(work):
            shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    with _lock(work):
        try:
            _write(work / RECORD, json.dumps({"settings": settings}).encode())
            _fill(work, plan, link, settings["source"])
            report = examine(work, progress=True)
            if report.unreadable:
                name, why = report.unreadable[0]
                called = name, os.path.splitext(name)[0]
                key = next((item.key for item in plan.items if item.path in called), name)
                key = key if isinstance(key, str) else f"{key[0]}, row {key[1]}"
                more = f" (and {len(report.unreadable) - 1} more)" if report.unreadable[1:] else ""
                raise DataError(f"{settings['source']}: {key}: is no sound image ({why}){more}: get another copy")
            record = {
                "settings": settings,
                "found": plan.found,
                **({} if plan.published else {"published": False}),
                "images": len(plan.items),
                "fingerprints": {split: report.splits[split].fingerprint for split in SPLITS},
            }
            _write(work / RECORD, json.dumps(record, indent=1, sort_keys=True).encode())
        except DataError:
            shutil.rmtree(work, ignore_errors=True)
            raise
        (work / ".lock").unlink(missing_ok=True)
        os.rename(work, dest)
    return report


def _fill(work, plan, link, source):
    wanted = {}
    for split in SPLITS:
        stored = _stored(work, split)
        for item in plan.items:
            if item.split == split and not (item.path in stored and item.size in (None, stored[item.path])):
                wanted[item.key] = item
        for cls in {item.cls for item in plan.items if item.split == split}:
            (work / split / cls).mkdir(parents=True, exist_ok=True)
    done = len(plan.items) - len(wanted)
    if done:
        print(f"going on: {done} of {len(plan.items)} images are there")
    bar = tqdm(desc="writing", total=len(plan.items), initial=done, unit=" images", smoothing=0.05, disable=None)
    with bar, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        batch, left = [], set(wanted)

        def write_batch():
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
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # a place that is not there
                raise
            raise DataError(f"{source}: truncated or damaged archive ({error}): get another copy") from None
        write_batch()
    if left:
        raise DataError(f"{source}: {len(left)} images are no longer there ({some(map(str, left))}): has it changed?")
