"""Says what a data set of {train,val,test}/<class>/<image> holds, and whether it is mini-ImageNet."""

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
from .sources import is_image, natural, some

SCRIPTS = DATA.parent / "scripts"
_LOSSY = {"JPEG", "MPO", "WEBP"}
_CHUNK = 256


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

    @property
    def images(self) -> int:
        return sum(self.classes.values())


@dataclass
class Report:
    """What `examine` finds.

    Attributes:
        splits: {split: Split}.
        unreadable: [(path, why)].
        duplicates: [(path, path)] of equal images in two splits.
        inside: number of images that are in one split twice.
        strays: paths of files that are not images.
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
    if lacking := [split for split in SPLITS if not (folder / split).is_dir()]:
        raise UserError(
            f"{folder}: has no folder {' and no '.join(lacking)}: not a data set of train, val and test"
        )
    report = Report({split: Split() for split in SPLITS})
    files = _list(folder, report)
    digests: dict[tuple[str, str], list[bytes]] = {}
    first: dict[bytes, tuple[str, str, str]] = {}
    bar = tqdm(
        desc="checking", total=len(files), unit=" images", disable=None if progress else True
    )
    with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata
        for start in range(0, len(files), _CHUNK):
            chunk = files[start : start + _CHUNK]
            for file, seen in zip(
                chunk, pool.map(lambda file: _look(folder.joinpath(*file)), chunk), strict=True
            ):
                if isinstance(seen, str):
                    report.unreadable.append(("/".join(file), seen))
                    continue
                split, cls, _ = file
                digest, pixels, size = seen
                report.splits[split].classes[cls] += 1
                report.splits[split].sizes[size] += 1
                digests.setdefault((split, cls), []).append(digest)
                other = first.setdefault(pixels, file)
                if other[0] != split:
                    report.duplicates.append(("/".join(other), "/".join(file)))
                elif other is not file:
                    report.inside += 1
            bar.update(len(chunk))
    for split in SPLITS:
        classes = sorted(
            hashlib.sha256(b"".join(sorted(d))).digest()
            for (s, _), d in digests.items()
            if s == split
        )
        report.splits[split].fingerprint = hashlib.sha256(b"".join(classes)).hexdigest()[:16]
    report.unreadable.sort()
    return report


def _list(folder: Path, report: Report) -> list[tuple[str, str, str]]:
    """All images as (split, class, file). Enters the classes and the stray files into the report."""
    files = []
    for split in SPLITS:
        for cls in sorted(os.scandir(folder / split), key=lambda entry: natural(entry.name)):
            if cls.name.startswith("."):
                continue
            if not cls.is_dir():
                report.strays.append(f"{split}/{cls.name}")
                continue
            report.splits[split].classes[cls.name] = 0
            for entry in os.scandir(cls.path):
                if is_image(entry.name) and not entry.name.startswith("."):
                    files.append((split, cls.name, entry.name))
                else:
                    report.strays.append(f"{split}/{cls.name}/{entry.name}")
    return files


def _look(path: Path) -> tuple[bytes, bytes, tuple[int, int]] | str:
    """(digest, digest of the pixels, (width, height)) of an image file, or what is wrong with it.

    A JPEG's digest is of its bytes, as decoders differ by a bit; a PNG's is of its pixels, as
    encoders differ.
    """
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            pixels = hashlib.sha256(
                repr(image.size).encode() + image.convert("RGB").tobytes()
            ).digest()[:16]
            lossy = image.format in _LOSSY
            return hashlib.sha256(content).digest()[:16] if lossy else pixels, pixels, image.size
    except Exception as error:  # Pillow's plugins raise a dozen kinds
        what = " ".join(str(error).split()) or type(error).__name__
        return re.sub(r"<_io.BytesIO.*?>", "the file", what)[:100]


# ---- The report in words ----


def table(report: Report) -> list[str]:
    """The report's splits as lines of text."""
    rows = [("split", "classes", "images", "per class", "width x height", "fingerprint")]
    for name, split in report.splits.items():
        sizes = sorted(split.sizes)
        size = f"{sizes[0][0]}x{sizes[0][1]}" if len(sizes) == 1 else f"{len(sizes)} sizes"
        if len(sizes) > 1:
            (w0, h0), (w1, h1) = (
                map(min, zip(*sizes, strict=True)),
                map(max, zip(*sizes, strict=True)),
            )
            size = f"{w0}..{w1} x {h0}..{h1}"
        per_class = _range(split.classes.values())
        rows.append(
            (name, str(len(split.classes)), str(split.images), per_class, size, split.fingerprint)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


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
    ways = "/".join(str(len(splits[split].classes)) for split in SPLITS)
    shape = f"{ways} x {_range(counts)}"
    if {split: splits[split].fingerprint for split in SPLITS} == MINI.fingerprints:
        return f"{MINI.name}, {shape}: the published images", findings
    known = max((MINI, TINY), key=lambda known: len(set(known.side) & classes))
    shared = len(set(known.side) & classes)
    differs = _differences(report, known)
    own = "split" in record.get("settings", {})  # the user's --split
    if 2 * shared < max(len(classes), len(known.side)) or (differs and own):
        if (ways, counts) == ("64/16/20", {MINI.per_class}) and not own:
            return (
                f"{shape}, as in mini-ImageNet, but the classes' names cannot tell whether it is",
                findings,
            )
        return f"not mini-ImageNet, but a data set of its own: {shape} images", findings
    if differs:
        return (
            f"not {known.name}, 64/16/20 x {known.per_class}, but {shape} with its classes",
            differs + findings,
        )
    if not record.get("published", True):
        return f"{known.name}'s classes, {shape}, but not the published images", findings
    return f"{known.name}, {shape}", findings


def _faults(report: Report, record: dict[str, Any]) -> list[str]:
    """What is wrong with a data set, whatever it is."""
    findings, where = [], Counter(cls for split in report.splits.values() for cls in split.classes)
    if twice := [cls for cls, n in where.items() if n > 1]:
        findings.append(f"in more than one split: {len(twice)} classes ({some(twice)})")
    if empty := [
        f"{name}/{cls}"
        for name, split in report.splits.items()
        for cls, n in split.classes.items()
        if n == 0
    ]:
        findings.append(f"without images: {len(empty)} classes ({some(empty)})")
    findings += [
        f"{name} has no classes" for name, split in report.splits.items() if not split.classes
    ]
    findings += [f"cannot be decoded: {path} ({why})" for path, why in report.unreadable[:10]]
    if len(report.unreadable) > 10:
        findings.append(f"cannot be decoded: {len(report.unreadable) - 10} more images")
    if report.strays:
        findings.append(
            f"not images, remove them: {len(report.strays)} files ({some(report.strays)})"
        )
    for split, told in record.get("fingerprints", {}).items():
        if told != report.splits[split].fingerprint:
            findings.append(f"{split} is not what prepare.py wrote, whose fingerprint was {told}")
    return findings


def _differences(report: Report, known: Known) -> list[str]:
    """How the classes and their numbers of images differ from a published data set."""
    differs = []
    for name, split in report.splits.items():
        listed = set(known.splits[name])
        if lost := listed - set(split.classes):
            differs.append(f"missing from {name}: {len(lost)} classes ({some(lost)})")
        if extra := set(split.classes) - listed:
            differs.append(f"too many in {name}: {len(extra)} classes ({some(extra)})")
        for word, sign in (("missing from", 1), ("too many in", -1)):
            wrong = {
                cls: sign * (known.per_class - n)
                for cls, n in split.classes.items()
                if cls in listed
            }
            wrong = {cls: n for cls, n in wrong.items() if n > 0}
            if wrong:
                worst = sorted(wrong, key=wrong.get, reverse=True)[:3]
                which = ", ".join(f"{cls}: {wrong[cls]}" for cls in worst) + ", ..." * (
                    len(wrong) > 3
                )
                differs.append(
                    f"{word} {name}: {sum(wrong.values())} images of {len(wrong)} classes ({which})"
                )
    return differs


def notes(report: Report) -> list[str]:
    """Images that a data set has more than once, as lines. ImageNet itself has some, so they are
    not a fault.
    """
    lines = [f"the same image in two splits: {a} and {b}" for a, b in report.duplicates[:10]]
    if len(report.duplicates) > 10:
        lines.append(f"the same image in two splits: {len(report.duplicates) - 10} more images")
    if report.inside:
        lines.append(f"the same image twice in one split: {report.inside} images")
    return lines


def next_command(folder: Path, report: Report, record: dict[str, Any]) -> str:
    """The command that trains on a sound data set."""
    script, flags = "train_5s_5c.sh", ["--data-root", str(folder)]
    home = folder.resolve() == DATA / folder.name  # where the scripts look
    if record.get("settings", {}).get("source") == "omniglot":
        script, flags = "train_omniglot.sh", [] if home else flags
    elif (folder / "glyphs.json").is_file():
        if home and folder.name == "glyphs":
            script, flags = "quickstart.sh", []
        else:
            side = max(max(size) for split in report.splits.values() for size in split.sizes)
            flags += ["--image-size", str(side), "--augment", "none"]
    ways = min(5, *(len(split.classes) for split in report.splits.values()))
    images = min(n for split in report.splits.values() for n in split.classes.values())
    if ways < 2 or images < 2:
        return "add classes and images: training needs 2 classes in each split, and 2 images of each class"
    if ways < 5:
        flags += ["--n-class", str(ways)]
    if images < 20:
        shots = min(5, images // 2)
        flags += ["--n-shot", str(shots), "--n-eval", str(min(15, images - shots))]
    path = SCRIPTS / script
    shown = path.relative_to(Path.cwd()) if Path.cwd() in path.parents else path
    return shlex.join(["bash", str(shown), *flags])


def _range(counts: Iterable[int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low} to {high}"
