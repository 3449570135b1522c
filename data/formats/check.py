"""Says what a data set holds, and whether it is mini-ImageNet."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shlex
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from utils import SPLITS, UserError

from . import DATA
from .manifest import MINI, TINY, Known
from .sources import Folder, is_image, natural, some

SCRIPTS = DATA.parent / "scripts"
_LOSSY = {"JPEG", "MPO", "WEBP"}


@dataclass
class Split:
    """One split.

    Attributes:
        classes: {class: number of readable images}.
        sizes: {(width, height): number of images}.
        fingerprint: 16 hex digits that tell which images are together in a class, whatever their
            names are.
    """

    classes: dict[str, int] = field(default_factory=dict)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    fingerprint: str = ""


@dataclass
class Report:
    """What `examine` finds.

    Attributes:
        splits: {split: Split}.
        unreadable: [(path, why)].
        duplicates: [(path, path)] of equal images in two splits.
        inside: number of images that are in one split twice.
        strays: paths of files that are not images of a class.
    """

    splits: dict[str, Split]
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    inside: int = 0
    strays: list[str] = field(default_factory=list)


def examine(folder: Path, progress: bool = False) -> Report:
    """Read every image of a data set.

    Args:
        progress: show a bar on stderr.

    Raises:
        UserError: ``folder`` does not have the layout {train,val,test}/<class>/<image>.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    source = Folder(folder)
    if lacking := [split for split in SPLITS if split not in source.dirs]:
        raise UserError(f"{folder}: has no folder {' and no '.join(lacking)}")
    report = Report({split: Split() for split in SPLITS})
    for name in sorted(source.dirs, key=natural):
        split, _, cls = name.partition("/")
        if split in SPLITS and cls and "/" not in cls:
            report.splits[split].classes[cls] = 0
    files = []
    for split in SPLITS:
        for name in (name for name in source.files if name.startswith(f"{split}/")):
            layout = name.count("/") == 2 and is_image(name)
            (files if layout else report.strays).append(name)
    _read_images(folder, files, report, progress)
    return report


def _read_images(folder: Path, files: list[str], report: Report, progress: bool) -> None:
    """Enter what all images show into the report."""
    digests: dict[str, dict[str, list[bytes]]] = {split: {} for split in SPLITS}
    first: dict[bytes, str] = {}  # {digest of the pixels: the first file}
    off = None if progress else True
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata
        results = pool.map(lambda name: _read_image(folder / name), files)
        images = tqdm(results, "checking", len(files), unit=" images", disable=off)
        for name, image in zip(files, images, strict=True):
            if isinstance(image, str):
                report.unreadable.append((name, image))
                continue
            digest, pixels, size = image
            split, cls, _ = name.split("/")
            report.splits[split].classes[cls] += 1
            report.splits[split].sizes[size] += 1
            digests[split].setdefault(cls, []).append(digest)
            other = first.setdefault(pixels, name)
            if other.partition("/")[0] != split:
                report.duplicates.append((other, name))
            elif other is not name:
                report.inside += 1
    for split, classes in digests.items():
        joined = sorted(hashlib.sha256(b"".join(sorted(d))).digest() for d in classes.values())
        report.splits[split].fingerprint = hashlib.sha256(b"".join(joined)).hexdigest()[:16]


def _read_image(path: Path) -> tuple[bytes, bytes, tuple[int, int]] | str:
    """(digest, digest of the pixels, (width, height)) of an image file, or what is wrong with it.

    A JPEG's digest is of its bytes, as decoders differ by a bit; a PNG's is of its pixels, as
    encoders differ.
    """
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            rgb = image.convert("RGB").tobytes()
            pixels = hashlib.sha256(repr(image.size).encode() + rgb).digest()[:16]
            lossy = image.format in _LOSSY
            return hashlib.sha256(content).digest()[:16] if lossy else pixels, pixels, image.size
    except Exception as error:  # Pillow's plugins raise a dozen kinds
        what = " ".join(str(error).split()) or type(error).__name__
        return re.sub(r"<_io.BytesIO.*?>", "the file", what)[:100]


# ---- The report as text ----


def table(report: Report) -> list[str]:
    """The report's splits as lines of text."""
    rows = [("split", "classes", "images", "per class", "width x height", "fingerprint")]
    for name, split in report.splits.items():
        counts = split.classes.values()
        size = "{}x{}".format(*next(iter(split.sizes), (0, 0)))
        if len(split.sizes) > 1:
            widths, heights = zip(*split.sizes, strict=True)
            size = f"{min(widths)}..{max(widths)} x {min(heights)}..{max(heights)}"
        total = str(sum(counts))
        rows.append((name, str(len(counts)), total, _range(counts), size, split.fingerprint))
    lengths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, lengths)) for row in rows]
    return [line.rstrip() for line in lines]


def verdict(report: Report, record: dict[str, Any]) -> tuple[str, list[str]]:
    """What the data set is, and what is wrong with it.

    Args:
        record: of `build.read_record`.

    Returns:
        (one line, findings); without findings the data set is sound.
    """
    splits, findings = report.splits, _faults(report, record)
    classes = {cls for split in splits.values() for cls in split.classes}
    counts = {n for split in splits.values() for n in split.classes.values()}
    shape = f"{'/'.join(str(len(splits[split].classes)) for split in SPLITS)} x {_range(counts)}"
    if {split: splits[split].fingerprint for split in SPLITS} == MINI.fingerprints:
        return f"{MINI.name}, {shape}: the published images", findings
    known = max((MINI, TINY), key=lambda known: len(classes & set(known.split_of)))
    shared, differences = len(classes & set(known.split_of)), _differences(report, known)
    own = "split" in record.get("settings", {})  # the user's --split
    if 2 * shared < max(len(classes), len(known.split_of)) or (differences and own):
        return f"not mini-ImageNet, but a data set of its own: {shape} images", findings
    if differences:
        usual = f"64/16/20 x {known.per_class}"
        return f"not {known.name}, {usual}, but {shape} with its classes", differences + findings
    if not record.get("published", True):
        return f"{known.name}'s classes, {shape}, but not the published images", findings
    return f"{known.name}, {shape}", findings


def _faults(report: Report, record: dict[str, Any]) -> list[str]:
    """What is wrong with a data set, whatever it is."""
    splits = report.splits
    findings = [f"{name} has no classes" for name, split in splits.items() if not split.classes]
    where = Counter(cls for split in splits.values() for cls in split.classes)
    if twice := [cls for cls, n in where.items() if n > 1]:
        findings.append(f"in more than one split: {len(twice)} classes ({some(twice)})")
    counts = {f"{s}/{cls}": n for s, split in splits.items() for cls, n in split.classes.items()}
    if empty := [path for path, n in counts.items() if n == 0]:
        findings.append(f"without images: {len(empty)} classes ({some(empty)})")
    bad = report.unreadable
    findings += [f"cannot be decoded: {path} ({why})" for path, why in bad[:10]]
    findings += [f"cannot be decoded: {len(bad) - 10} more images"] * (len(bad) > 10)
    if strays := report.strays:
        findings.append(f"not images of a class, remove them: {len(strays)} ({some(strays)})")
    for split, written in record.get("fingerprints", {}).items():
        if written != splits[split].fingerprint:
            findings.append(f"{split} is not what was written, whose fingerprint is {written}")
    return findings


def _differences(report: Report, known: Known) -> list[str]:
    """How the classes and their numbers of images differ from a published data set."""
    lines = []
    for name, split in report.splits.items():
        listed, there = set(known.splits[name]), set(split.classes)
        surplus = {cls: split.classes[cls] - known.per_class for cls in listed & there}
        lost = {cls: -n for cls, n in surplus.items() if n < 0}
        extra = {cls: n for cls, n in surplus.items() if n > 0}
        for words, classes, images in (
            ("missing from", listed - there, lost),
            ("too many in", there - listed, extra),
        ):
            if classes:
                lines.append(f"{words} {name}: {len(classes)} classes ({some(classes)})")
            if images:
                shown = some([f"{cls}: {n}" for cls, n in images.items()])
                total = f"{sum(images.values())} images of {len(images)} classes"
                lines.append(f"{words} {name}: {total} ({shown})")
    return lines


def notes(report: Report) -> list[str]:
    """Images that a data set has more than once, as lines. ImageNet itself has some, so they are
    not a fault.
    """
    pairs = report.duplicates
    lines = [f"the same image in two splits: {a} and {b}" for a, b in pairs[:10]]
    lines += [f"the same image in two splits: {len(pairs) - 10} more images"] * (len(pairs) > 10)
    if report.inside:
        lines.append(f"the same image twice in one split: {report.inside} images")
    return lines


def next_command(folder: Path, report: Report, record: dict[str, Any]) -> str:
    """The command that trains on a sound data set."""
    script, flags = "train_5s_5c.sh", ["--data-root", str(folder)]
    usual = folder.resolve() == DATA / folder.name  # where the scripts look
    source = record.get("settings", {}).get("source")
    if source == "omniglot":
        script, flags = "train_omniglot.sh", [] if usual else flags
    elif source == "glyphs" and usual and folder.name == "glyphs":
        script, flags = "quickstart.sh", []
    elif source == "glyphs":
        side = max(max(size) for split in report.splits.values() for size in split.sizes)
        flags += ["--image-size", str(side), "--augment", "none"]
    classes = min(5, *(len(split.classes) for split in report.splits.values()))
    images = min(n for split in report.splits.values() for n in split.classes.values())
    if classes < 2 or images < 2:
        return "add images: training needs 2 classes in each split, and 2 images of each class"
    if classes < 5:
        flags += ["--n-class", str(classes)]
    if images < 20:
        shots = min(5, images // 2)
        flags += ["--n-shot", str(shots), "--n-eval", str(min(15, images - shots))]
    path = SCRIPTS / script
    shown = path.relative_to(Path.cwd()) if Path.cwd() in path.parents else path
    return shlex.join(["bash", str(shown), *flags])


def _range(counts: Iterable[int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low} to {high}"
