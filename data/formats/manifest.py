"""Manifests: which image of a source goes to which split, class and file; and the rules that split
classes.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imagefiles import nfc, read_text
from utils import SPLITS, UserError

from . import DATA
from .sources import SPLIT_NAMES, Source, some

_LARGEST = 1 << 28  # bytes; a larger file is not an image of a data set

Classes = dict[str, list]  # {class: [key of each image]}


class Known:
    """A published data set.

    Args:
        name: for messages.
        per_class: images of each class.
        folder: its usual name.
        lists: the file of its class lists in data/splits.
        fingerprints: {split: 16 hex digits} of the published copies.
    """

    def __init__(self, name: str, per_class: int, folder: str, lists: str, **fingerprints: str):
        self.name, self.per_class, self.folder = name, per_class, folder
        self.fingerprints = fingerprints
        splits = json.loads((DATA / "splits" / lists).read_text("utf-8"))
        self.split_of = {cls: split for split, classes in splits.items() for cls in classes}


# the JPEG files of 84 px under Ravi & Larochelle's names: github.com/Deo0330/split_minidataset
_PUBLISHED = {"train": "a0f6099e953b59a0", "val": "47092cf1f09ba147", "test": "8b64ff4d6c3030ef"}
MINI = Known("mini-ImageNet", 600, "miniImagenet", "mini-imagenet.json", **_PUBLISHED)
TINY = Known("tiny64", 450, "tiny64", "tiny64.json")


@dataclass
class Item:
    """One image: its place in the data set, its key in the reader's stream, and its size in bytes
    if that is known before it is read. A name without a suffix gets one by the image's content.
    """

    split: str
    cls: str
    name: str
    key: Any
    size: int | None = None

    @property
    def path(self) -> str:
        return f"{self.split}/{self.cls}/{self.name}"


@dataclass
class Manifest:
    """What to make of a source.

    Attributes:
        found: the source's format, for the user.
        reader: its ``stream(keys)`` yields (key, image) of a set of keys; an image is an open file
            or bytes of an image file, or an array uint8 [H, W, 3].
        items: the images.
        notes: lines for the user.
        published: False if the images are known not to be the published choice.
        dest: the usual name of the folder.
    """

    found: str
    reader: Any
    items: list[Item]
    notes: list[str] = field(default_factory=list)
    published: bool = True
    dest: str = MINI.folder

    def validate(self, source: object) -> None:
        """Raise UserError unless all names are safe, images unique, splits filled, and classes in
        one split each.
        """
        split_of: dict[str, str] = {}
        paths, keys = set(), set()
        for item in self.items:
            other = split_of.setdefault(item.cls, item.split)
            unsafe = [name for name in (item.cls, item.name) if not _is_plain(name)]
            for wrong, why in (
                (unsafe, f"{str(unsafe)[:80]} cannot be the name of a class or file"),
                (other != item.split, f"class {item.cls} is in {other} and in {item.split}"),
                (item.key in keys, f"{item.key} is listed twice"),
                (item.path in paths, f"has two images for {item.path}"),
                ((item.size or 0) > _LARGEST, f"{item.key} has {item.size} bytes: no image"),
            ):
                if wrong:
                    raise UserError(f"{source}: {why}")
            paths.add(item.path)
            keys.add(item.key)
        for split in SPLITS:
            if split not in split_of.values():
                raise UserError(f"{source}: there is no class for {split}")


def _is_plain(name: str) -> bool:
    length = len(name.encode("utf-8", "surrogateescape"))
    odd = name.startswith(".") or any(ord(c) < 32 or c in "/\\" for c in name)
    return 0 < length <= 240 and not odd


# ---- Splits by class ----


class Split(NamedTuple):
    """Classes that are split: {split: {class: keys}}, how, and what they are then called."""

    classes: dict[str, Classes]
    how: str
    known: Known = MINI
    cut: bool = False  # to the first images of each class


def split_parts(parts: dict[str, Classes], source: Source, args: argparse.Namespace) -> Split:
    """Split the classes of a data set, unless its parts are split by class already.

    Without ``--split``, parts that all hold the classes of a known data set are split by its class
    lists; surplus classes and images are left out.

    Args:
        parts: {train, val or test: {class: [key]}}; or one part under any name.

    Raises:
        UserError: some classes are in several parts, nothing says how to split the classes, or
            --split does not fit.
    """
    sets = {part: set(classes) for part, classes in parts.items() if classes}
    everything: Classes = {}
    for classes in parts.values():
        for cls, keys in classes.items():
            everything.setdefault(cls, []).extend(keys)
    apart = sum(map(len, sets.values())) == len(everything)
    if len(sets) == 3 and apart:
        if args.split:
            advice = "leave the flag out"
            raise UserError(f"--split: {source.path} is split by class already: {advice}")
        return Split(parts, "split already")
    if args.split:
        split_of, how = _split_classes(set(everything), args, source.path)
        return Split(_by_split(everything, split_of), how)
    if all(classes == set(everything) for classes in sets.values()):
        for known in (MINI, TINY):
            if set(known.split_of) <= set(everything):
                first = {cls: keys[: known.per_class] for cls, keys in everything.items()}
                how = f"split by {known.name}'s class lists"
                cut = len(first) > len(known.split_of) or first != everything
                if cut:
                    how += f", the first {known.per_class} images of each class"
                return Split(_by_split(first, known.split_of), how, known, cut)
    elif apart:
        lacking = " or ".join(split for split in SPLITS if split not in sets)
        raise source.error(f"has {' and '.join(sets)}, but no {lacking}")
    else:
        cls = min(cls for cls in everything if sum(cls in s for s in sets.values()) > 1)
        both = " and in ".join(part for part in sets if cls in sets[part])
        raise source.error(f"class {cls} is in {both}: each class belongs in one split")
    missing, extra = set(MINI.split_of) - set(everything), set(everything) - set(MINI.split_of)
    lost = f", lacks {some(missing)}" if len(missing) < 50 else ""
    raise source.error(
        f"has {len(everything)} classes, neither split nor mini-ImageNet's ({some(extra)}{lost}): "
        "split them with --split FILE or --split TRAIN/VAL/TEST"
    )


def _by_split(classes: Classes, split_of: dict[str, str]) -> dict[str, Classes]:
    """{split: {class: keys}} of {class: keys} and {class: split}; other classes are left out."""
    return {
        split: {cls: keys for cls, keys in classes.items() if split_of.get(cls) == split}
        for split in SPLITS
    }


def is_numbers(flag: str | None) -> bool:
    """Whether --split is TRAIN/VAL/TEST, and not a file."""
    return bool(flag and re.fullmatch(r"\d+/\d+/\d+", flag))


def _split_classes(
    classes: Collection[str], args: argparse.Namespace, path: Path
) -> tuple[dict[str, str], str]:
    """Split classes as --split says: {class: split}, and how, for the user."""
    flag = args.split
    if is_numbers(flag):
        counts = [int(n) for n in flag.split("/")]
        if sum(counts) != len(classes) or 0 in counts:
            needs = f"give three numbers above 0 that add up to {path}'s {len(classes)} classes"
            raise UserError(f"--split {flag}: {needs}")
        order = np.random.Generator(np.random.Philox(args.seed)).permutation(len(classes))
        names = np.array(sorted(classes), dtype=object)[order]
        split_names = np.repeat(SPLITS, counts).tolist()
        how = f"classes drawn {flag} with seed {args.seed}"
        return dict(zip(names, split_names, strict=True)), how
    split_of = read_split_file(Path(flag))
    if missing := set(split_of) - set(classes):
        lost = f"{len(missing)} of its classes are not in {path} ({some(missing)})"
        raise UserError(f"--split {flag}: {lost}")
    rest = set(classes) - set(split_of)
    without = f", which leaves out {len(rest)} classes ({some(rest)})" if rest else ""
    return split_of, f"split by {Path(flag).name}{without}"


def read_split_file(file: Path) -> dict[str, str]:
    """{class: split} of the JSON file of --split. Raises UserError if it is not one."""
    try:
        lists = json.loads(read_text(file))
    except OSError as error:
        advice = "give a JSON file or numbers of classes as in 64/16/20"
        raise UserError(f"--split {file}: {error.strerror}: {advice}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--split {file}: is not JSON ({error})") from None
    lists = {SPLIT_NAMES.get(k): v for k, v in lists.items()} if isinstance(lists, dict) else {}
    split_of: dict[str, str] = {}
    for split in SPLITS:
        names = lists.get(split)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            form = '{"train": [class, ...], "val": [...], "test": [...]}'
            raise UserError(f"--split {file}: must be {form}; it lacks {split}")
        for cls in map(nfc, names):
            if split_of.setdefault(cls, split) != split:
                raise UserError(f"--split {file}: class {cls} is in {split_of[cls]} and in {split}")
    return split_of
