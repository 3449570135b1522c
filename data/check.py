"""What a data set of {train,val,test}/<class>/<image> holds, and whether it is mini-ImageNet."""

import hashlib
import io
import os
import re
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from plans import MINI, SPLITS, TINY
from sources import DataError, is_image, natural, some
from tqdm import tqdm

_LOSSY = {"JPEG", "MPO", "WEBP"}
_CHUNK = 256


@dataclass
class Split:
    """One split.

    classes: {class: number of readable images}
    sizes: {(width, height): number}
    fingerprint: 16 hex digits, over which images stand together in a class, whatever class and file are called.
    """

    classes: dict = field(default_factory=dict)
    sizes: Counter = field(default_factory=Counter)
    fingerprint: str = ""

    @property
    def images(self):
        return sum(self.classes.values())


@dataclass
class Report:
    """splits: {split: Split}; unreadable: [(path, why)]; duplicates: [(path, path)] across splits; strays: [path]."""

    splits: dict
    unreadable: list
    duplicates: list
    inside: int  # images that stand twice in one split
    strays: list


def _look(path):
    """(digest, digest of the pixels, (width, height)) of an image file, or a str that says what is wrong with it.

    A JPEG's digest is of its bytes, for decoders differ by a bit; a PNG's is of its pixels, for encoders differ.
    """
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            pixels = hashlib.sha256(repr(image.size).encode() + image.convert("RGB").tobytes()).digest()[:16]
            lossy = image.format in _LOSSY
            return hashlib.sha256(content).digest()[:16] if lossy else pixels, pixels, image.size
    except Exception as error:  # Pillow's plugins raise a dozen kinds
        what = " ".join(str(error).split()) or type(error).__name__
        return re.sub(r"<_io.BytesIO.*?>", "the file", what)[:100]


def examine(folder, progress=False):
    """Read every image of a data set.

    Args:
        folder: of {train,val,test}/<class>/<image>.
        progress: show a bar on stderr.

    Returns:
        Report.

    Raises:
        DataError: `folder` has not that layout.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if lacking := [split for split in SPLITS if not (folder / split).is_dir()]:
        raise DataError(f"{folder}: has no folder {' and no '.join(lacking)}: not a data set of train, val and test")
    splits, files, strays = {split: Split() for split in SPLITS}, [], []
    for split in SPLITS:
        for cls in sorted(os.scandir(folder / split), key=lambda entry: natural(entry.name)):
            if cls.name.startswith("."):
                continue
            if not cls.is_dir():
                strays.append(f"{split}/{cls.name}")
                continue
            splits[split].classes[cls.name] = 0
            for entry in os.scandir(cls.path):
                if is_image(entry.name) and not entry.name.startswith("."):
                    files.append((split, cls.name, entry.name))
                else:
                    strays.append(f"{split}/{cls.name}/{entry.name}")
    digests, first, unreadable, duplicates, inside = {}, {}, [], [], 0
    bar = tqdm(desc="checking", total=len(files), unit=" images", disable=None if progress else True)
    with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata
        for start in range(0, len(files), _CHUNK):
            chunk = files[start : start + _CHUNK]
            for file, seen in zip(chunk, pool.map(lambda file: _look(folder.joinpath(*file)), chunk), strict=True):
                split, cls, _ = file
                if isinstance(seen, str):
                    unreadable.append(("/".join(file), seen))
                    continue
                digest, pixels, size = seen
                splits[split].classes[cls] += 1
                splits[split].sizes[size] += 1
                digests.setdefault((split, cls), []).append(digest)
                other = first.setdefault(pixels, file)
                if other[0] != split:
                    duplicates.append(("/".join(other), "/".join(file)))
                elif other is not file:
                    inside += 1
            bar.update(len(chunk))
    for split in SPLITS:
        classes = sorted(hashlib.sha256(b"".join(sorted(d))).digest() for (s, _), d in digests.items() if s == split)
        splits[split].fingerprint = hashlib.sha256(b"".join(classes)).hexdigest()[:16]
    return Report(splits, sorted(unreadable), duplicates, inside, strays)


def _counts(splits):
    return "/".join(str(len(splits[split].classes)) for split in SPLITS)


def _per_class(classes):
    low, high = (min(classes.values()), max(classes.values())) if classes else (0, 0)
    return str(low) if low == high else f"{low} to {high}"


def table(report):
    """The report's splits as lines of text."""
    rows = [("split", "classes", "images", "per class", "width x height", "fingerprint")]
    for name, split in report.splits.items():
        sizes = sorted(split.sizes)
        size = f"{sizes[0][0]}x{sizes[0][1]}" if len(sizes) == 1 else f"{len(sizes)} sizes"
        if len(sizes) > 1:
            (w0, h0), (w1, h1) = map(min, zip(*sizes, strict=True)), map(max, zip(*sizes, strict=True))
            size = f"{w0}..{w1} x {h0}..{h1}"
        rows.append((name, len(split.classes), split.images, _per_class(split.classes), size, split.fingerprint))
    widths = [max(len(str(row[i])) for row in rows) for i in range(6)]
    return ["  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def verdict(report, record=None):
    """What the data set is, and what is wrong with it.

    Args:
        report: of `examine`.
        record: of `build.read_record`, or {}.

    Returns:
        (one line, [finding, ...]); no findings mean that the data set is sound.
    """
    record, splits, findings = record or {}, report.splits, []
    side = {}
    for split in SPLITS:
        for cls in splits[split].classes:
            side.setdefault(cls, []).append(split)
    total = len(side)
    if twice := {cls for cls, where in side.items() if len(where) > 1}:
        findings.append(f"in more than one split: {len(twice)} classes ({some(twice)})")
    if empty := [f"{split}/{cls}" for split in SPLITS for cls, n in splits[split].classes.items() if n == 0]:
        findings.append(f"without images: {len(empty)} classes ({some(empty)})")
    findings += [f"{split} has no classes" for split in SPLITS if not splits[split].classes]
    findings += [f"cannot be decoded: {path} ({why})" for path, why in report.unreadable[:10]]
    if len(report.unreadable) > 10:
        findings.append(f"cannot be decoded: {len(report.unreadable) - 10} images more")
    if report.strays:
        findings.append(f"no images, to be removed: {len(report.strays)} files ({some(report.strays)})")
    for split, told in record.get("fingerprints", {}).items():
        if told != splits[split].fingerprint:
            findings.append(f"{split} is not what prepare.py wrote, whose fingerprint was {told}")

    known = max((MINI, TINY), key=lambda known: len(set(known.side) & set(side)))
    shared = set(known.side) & set(side)
    sizes = {n for split in splits.values() for n in split.classes.values()}
    shape = f"{_counts(splits)} x {next(iter(sizes)) if len(sizes) == 1 else _per_class_of(splits)}"
    if 2 * len(shared) < max(total, 1):
        if (_counts(splits), sizes) == ("64/16/20", {MINI.per_class}):
            return f"{shape}, as in mini-ImageNet, but the classes' names cannot tell whether it is", findings
        return f"not mini-ImageNet: {shape} images, other classes", findings
    differs = []
    for split in SPLITS:
        ours, theirs = set(splits[split].classes), set(known.splits[split])
        if lost := theirs - ours:
            differs.append(f"missing from {split}: {len(lost)} classes ({some(lost)})")
        if extra := ours - theirs:
            differs.append(f"too much in {split}: {len(extra)} classes ({some(extra)})")
        for word, wrong in (
            ("missing", {c: known.per_class - n for c, n in splits[split].classes.items() if n < known.per_class}),
            ("too much", {c: n - known.per_class for c, n in splits[split].classes.items() if n > known.per_class}),
        ):
            wrong = {cls: n for cls, n in wrong.items() if cls in theirs}
            if wrong:
                worst = sorted(wrong, key=wrong.get, reverse=True)[:3]
                which = ", ".join(f"{cls}: {wrong[cls]}" for cls in worst) + ", ..." * (len(wrong) > 3)
                differs.append(f"{word} in {split}: {sum(wrong.values())} images of {len(wrong)} classes ({which})")
    if differs:
        return f"not {known.name}, 64/16/20 x {known.per_class}, but {shape} with its classes", differs + findings
    if not record.get("published", True):
        return f"{known.name}'s classes, {shape}, but not the published images", findings
    return f"{known.name}, {shape}", findings


def notes(report):
    """Images that stand in a data set more than once, as lines. ImageNet itself has some, so they are no fault."""
    lines = [f"the same image in two splits: {a} and {b}" for a, b in report.duplicates[:10]]
    if len(report.duplicates) > 10:
        lines.append(f"the same image in two splits: {len(report.duplicates) - 10} images more")
    if report.inside:
        lines.append(f"the same image twice in one split: {report.inside} images")
    return lines


def _per_class_of(splits):
    return _per_class({(s, c): n for s, split in splits.items() for c, n in split.classes.items()})
