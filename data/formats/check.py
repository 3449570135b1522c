"""Says what a data set holds, and whether it is mini-ImageNet."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.imagefiles import is_image, load_image, unknown_formats
from data.layout import class_places, in_several_splits
from utils import SPLITS, UserError

from . import DATA
from .sources import Source, natural, some
from .splits import MINI, TINY, Known

RECORD = "prepared.json"  # in the data set: what it was made from, and its fingerprints
_EPISODE = 20  # images of a class in an episode by default: --n-shot 5 and --n-eval 15
_LOSSY = (b"\xff\xd8", b"RIFF")  # the first bytes of JPEG and WebP


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a prepared folder; {} if it has none, or a damaged one."""
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        fingerprints = set(dict(record.get("fingerprints", {})))
        sound = isinstance(record["settings"], dict) and fingerprints <= set(SPLITS)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return record if sound else {}


@dataclass
class Report:
    """What `examine` finds."""

    classes: dict[str, dict[str, int]]  # {split: {class: number of readable images}}
    sizes: dict[str, set[tuple[int, int]]]  # {split: {(width, height)}}
    # {split: 16 hex digits} that tell which images are together in a class, whatever their names
    fingerprints: dict[str, str]
    unreadable: dict[str, str]  # {path: why}
    shared: list[str]  # classes in more than one split
    duplicates: list[tuple[str, str]]  # paths of equal images in two splits
    inside: int  # number of images that are in one split twice
    strays: list[str]  # paths of files where none belongs, and of links that lead nowhere
    unknown: list[str]  # paths of files of unknown format, which training leaves out

    @property
    def counts(self) -> dict[str, int]:
        """{split/class: number of readable images}."""
        return {f"{s}/{cls}": n for s, of in self.classes.items() for cls, n in of.items()}


def placed(source: Source) -> list[str]:
    """<split>/<class>/<file> of a data set, split by split."""
    return [n for s in SPLITS for n in source.files if n.startswith(f"{s}/") and n.count("/") == 2]


def examine(folder: Path) -> Report:
    """Read every image of a data set, with a bar on stderr.

    Raises:
        UserError: ``folder`` does not have the layout {train,val,test}/<class>/<image>.
    """
    source = Source(folder)
    if lacking := [split for split in SPLITS if split not in source.dirs]:
        raise UserError(f"{folder}: has no folder {' and no '.join(lacking)}")
    below = tuple(f"{split}/" for split in SPLITS)
    names = [name for name in (*source.files, *source.skipped) if name.startswith(below)]
    files = placed(source)
    strays = sorted(set(names) - set(files))
    unknown = [name for name in files if not is_image(name)]
    images = list(filter(is_image, files))
    digests: dict[str, dict[str, list[bytes]]] = {split: {} for split in SPLITS}
    for split, _, cls in (name.partition("/") for name in sorted(source.dirs, key=natural)):
        if split in SPLITS and cls and "/" not in cls:
            digests[split][cls] = []
    shared = in_several_splits(class_places(folder).values())
    sizes: dict[str, set[tuple[int, int]]] = {split: set() for split in SPLITS}
    report = Report({}, sizes, {}, {}, shared, [], 0, strays, unknown)
    first: dict[bytes, str] = {}  # {digest of the pixels: the first file}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata
        results = pool.map(_read_image, (source.files[name] for name in images))
        results = tqdm(results, "checking", len(images), unit=" images", disable=None)
        for name, image in zip(images, results, strict=True):
            if isinstance(image, str):
                report.unreadable[name] = image
                continue
            digest, pixels, size = image
            split, cls, _ = name.split("/")
            report.sizes[split].add(size)
            digests[split][cls].append(digest)
            other = first.setdefault(pixels, name)
            if not other.startswith(f"{split}/"):
                report.duplicates.append((other, name))
            elif other is not name:
                report.inside += 1
    for split, classes in digests.items():
        report.classes[split] = {cls: len(of) for cls, of in classes.items()}
        joined = sorted(hashlib.sha256(b"".join(sorted(c))).digest() for c in classes.values() if c)
        report.fingerprints[split] = hashlib.sha256(b"".join(joined)).hexdigest()[:16]
    return report


def _read_image(path: Path) -> tuple[bytes, bytes, tuple[int, int]] | str:
    """(digest, digest of the pixels, (width, height)) of an image as training decodes it, or why
    it cannot be read.

    A JPEG's digest is of its bytes, as decoders differ by a bit; a PNG's is of its pixels, as
    encoders differ.
    """
    try:
        content = path.read_bytes()
        image = load_image(path, io.BytesIO(content))
    except UserError as error:
        return str(error).removeprefix(f"{path}: ")
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()[:16]
    lossy = content.startswith(_LOSSY)
    return hashlib.sha256(content).digest()[:16] if lossy else pixels, pixels, image.size


# ---- The report as text ----


def print_report(folder: Path, report: Report) -> int:
    """Print a report and the next step; returns the exit code of --check."""
    record = read_record(folder)
    line, findings = _verdict(report, record)
    print(*_table(report), line, *(f"- {finding}" for finding in findings), sep="\n")
    # images that are there more than once, as in ImageNet itself, are no fault
    notes = _first_ten([f"the same image in two splits: {a} and {b}" for a, b in report.duplicates])
    notes += [f"the same image twice in one split: {report.inside} images"] * bool(report.inside)
    if report.unknown:
        notes.append(f"left out {unknown_formats(report.unknown)} ({some(report.unknown)})")
    short = [f"{path} ({n})" for path, n in report.counts.items() if n < _EPISODE]
    if 0 < len(short) < len(report.counts):
        what = "classes have too few images for --n-shot 5 and --n-eval 15"
        notes.append(f"{len(short)} {what}: {some(short, 10)}")
    for note in notes:
        print(f"note: {note}")
    correct = f"correct what is listed above, then: --check {folder}"
    print(f"next: {correct if findings else _next_command(folder, report)}")
    return 1 if findings else 0


def _table(report: Report) -> list[str]:
    rows = [("split", "classes", "images", "per class", "width x height", "fingerprint")]
    for split, classes in report.classes.items():
        counts, sizes = classes.values(), list(report.sizes[split]) or [(0, 0)]
        size = "x".join(_range(side, "..") for side in zip(*sizes, strict=True))
        numbers = str(len(classes)), str(sum(counts)), _range(counts)
        rows.append((split, *numbers, size, report.fingerprints[split]))
    lengths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, lengths)).rstrip() for row in rows]


def _verdict(report: Report, record: dict[str, Any]) -> tuple[str, list[str]]:
    """What the data set is, in one line, and what is wrong with it."""
    findings = _faults(report, record)
    names = {cls for classes in report.classes.values() for cls in classes}
    splits = "/".join(str(len(classes)) for classes in report.classes.values())
    shape = f"{splits} x {_range(report.counts.values())}"
    if report.fingerprints == MINI.fingerprints:
        return f"{MINI.name}, {shape}: the published images", findings
    known = max((MINI, TINY), key=lambda known: len(names & set(known.split_of)))
    shared, differences = len(names & set(known.split_of)), _differences(report, known)
    own = "split" in record.get("settings", {})  # the user's --split
    if 2 * shared < max(len(names), len(known.split_of)) or (differences and own):
        return f"not mini-ImageNet, but a data set of its own: {shape} images", findings
    if differences:
        usual = f"64/16/20 x {known.per_class}"
        return f"not {known.name}, {usual}, but {shape} with its classes", differences + findings
    but = "" if record.get("published", True) else ", but not the published images"
    return f"{known.name}, {shape}{but}", findings


def _faults(report: Report, record: dict[str, Any]) -> list[str]:
    """What is wrong with a data set, whatever it is."""
    changed = [s for s, f in record.get("fingerprints", {}).items() if f != report.fingerprints[s]]
    faults = {
        "splits without classes": [s for s, classes in report.classes.items() if not classes],
        "classes in more than one split": report.shared,
        "classes without images": [path for path, n in report.counts.items() if n == 0],
        "files or links that are not images of a class, remove them": report.strays,
        "splits whose images have changed since they were written": changed,
    }
    lines = [f"{len(names)} {what}: {some(names)}" for what, names in faults.items() if names]
    return lines + _first_ten([f"{path}: {why}" for path, why in report.unreadable.items()])


def _differences(report: Report, known: Known) -> list[str]:
    """How the classes and their numbers of images differ from a published data set."""
    more = Counter(report.counts)
    more.subtract({f"{split}/{cls}": known.per_class for cls, split in known.split_of.items()})
    lost = [f"{path} ({-n})" for path, n in more.items() if n < 0]
    extra = [f"{path} ({n})" for path, n in more.items() if n > 0]
    lines = {"missing images": lost, "images too many": extra}
    return [f"{len(p)} classes with {what}: {some(p, 10)}" for what, p in lines.items() if p]


def _first_ten(lines: list[str]) -> list[str]:
    return lines[:10] + [f"and {len(lines) - 10} more like this"] * (len(lines) > 10)


def _next_command(folder: Path, report: Report) -> str:
    """The command that trains on a sound data set; first it leaves out a few small classes, if
    enough others remain.
    """
    flags = ["--data-root", str(folder)]
    counts, commands = report.counts, []
    enough = {path: n for path, n in counts.items() if n >= _EPISODE}
    left = Counter(path.partition("/")[0] for path in enough)
    if len(enough) >= 0.8 * len(counts) and min(left[split] for split in SPLITS) >= 5:
        for at in (folder / path for path in sorted(counts.keys() - enough.keys())):
            commands.append(["mv", str(at), str(at.with_name(f".{at.name}"))])
        counts = enough
    classes, images = min(map(len, report.classes.values())), min(counts.values())
    if classes < 2 or images < 2:
        return "add images: training needs 2 classes in each split, and 2 images of each class"
    if classes < 5:
        flags += ["--n-class", str(classes)]
    if images < _EPISODE:
        shots = min(5, images // 2)
        flags += ["--n-shot", str(shots), "--n-eval", str(min(15, images - shots))]
    path = DATA.parent / "scripts" / "train_5s_5c.sh"
    shown = path.relative_to(Path.cwd()) if Path.cwd() in path.parents else path
    return " && ".join(map(shlex.join, [*commands, ["bash", str(shown), *flags]]))


def _range(counts: Iterable[int], between: str = " to ") -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low}{between}{high}"
