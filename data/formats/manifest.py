"""Plans: the images of a data set with their places, and the rules by which classes come into
splits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils import SPLITS, UserError

from . import DATA
from .sources import SPLIT_NAMES, Source, natural, some

_LARGEST = 1 << 28  # bytes; a larger file is not an image of a data set
_NUMBERS = re.compile(r"\d+/\d+/\d+")

Classes = dict[str, list]  # {class: [image]}


@dataclass
class Known:
    """A published data set: its classes {split: [class]}, images per class, and fingerprints of
    published copies.
    """

    name: str
    per_class: int
    splits: dict[str, list[str]]
    fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def side(self) -> dict[str, str]:
        """{class: split}"""
        return {cls: split for split, classes in self.splits.items() for cls in classes}


def _lists(name: str) -> dict[str, list[str]]:
    return json.loads((DATA / "splits" / name).read_text("utf-8"))


MINI = Known(
    "mini-ImageNet",
    600,
    _lists("mini-imagenet.json"),
    # of the JPEG files of 84 px under Ravi & Larochelle's names, as in
    # github.com/Deo0330/split_minidataset
    {"train": "a0f6099e953b59a0", "val": "47092cf1f09ba147", "test": "8b64ff4d6c3030ef"},
)
TINY = Known("tiny64", 450, _lists("tiny64.json"))


@dataclass
class Item:
    """One image: its place, its key in the reader's stream, and its bytes if known before it is
    read.

    A name without a suffix gets one by the image's content.
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
class Plan:
    """What to make of a source.

    Attributes:
        found: the source's form, in words.
        reader: its ``stream(keys)`` yields (key, image): a Path, an open file, bytes, or an array
            uint8 [H, W, 3].
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
    dest: str = "miniImagenet"


@dataclass
class Options:
    """The flags on which a plan depends."""

    csv: Path | None = None
    split: str | None = None
    seed: int = 719
    class_names: Path | None = None


def refuse_split(options: Options, source: Source, what: str) -> None:
    """Raise UserError if --split is given for a source whose form says the split."""
    if options.split:
        raise UserError(
            f"--split is for class folders and shards that are not split; {source.path} holds {what}: leave it out"
        )


def validate(plan: Plan, path: Path) -> None:
    """Raise UserError unless all names are safe, images unique, splits filled, and classes in one
    split each.
    """
    side: dict[str, str] = {}
    paths, keys = set(), set()
    for item in plan.items:
        for name in (item.cls, item.name):
            if not _is_plain(name):
                raise UserError(
                    f"{path}: {name[:80]!r} cannot be the name of a class or file: refused"
                )
        if side.setdefault(item.cls, item.split) != item.split:
            raise UserError(
                f"{path}: class {item.cls} is both in {side[item.cls]} and in {item.split}: wrong labels"
            )
        if item.path in paths:
            raise UserError(f"{path}: has two images for {item.path}")
        if item.size is not None and item.size > _LARGEST:
            raise UserError(
                f"{path}: {item.key} has {item.size} bytes: that is not an image of a data set"
            )
        if item.key in keys:
            raise UserError(f"{path}: {item.key} is listed twice")
        paths.add(item.path)
        keys.add(item.key)
    for split in SPLITS:
        if split not in side.values():
            raise UserError(f"{path}: there is no class for {split}")


def _is_plain(name: str) -> bool:
    return bool(
        name
        and not name.startswith(".")
        and len(name.encode("utf-8", "surrogateescape")) <= 240
        and not any(ord(c) < 32 or c in "/\\" for c in name)
    )


# ---- Splits by class ----


def place(
    splits: dict[str, Classes], source: Source, options: Options
) -> tuple[dict[str, Classes], str, list[str]]:
    """Split by class what is split already, or has every class in every part.

    Args:
        splits: {train, val or test: {class: [image]}}.

    Returns:
        (the same by class, how it was split in words, notes for the user).

    Raises:
        UserError: it is neither, or --split does not fit.
    """
    sets = {split: set(classes) for split, classes in splits.items() if classes}
    everything: Classes = {}
    for split in SPLITS:
        for cls, images in splits.get(split, {}).items():
            everything.setdefault(cls, []).extend(images)
    if len(sets) == 3 and sum(map(len, sets.values())) == len(everything):
        refuse_split(options, source, "a data set that is split already")
        return splits, "split already", []
    if options.split:
        side, how, notes = split_classes(everything, options, source.path)
    elif all(classes == set(everything) for classes in sets.values()):
        lists = next((known for known in (MINI, TINY) if set(known.side) == set(everything)), None)
        if lists is None:
            raise unlisted(source, everything)
        side, how, notes = (
            lists.side,
            f"every class in every part, split by {lists.name}'s class lists",
            [],
        )
    elif len(sets) < 3:
        lacking = " or ".join(s for s in SPLITS if s not in sets)
        raise UserError(f"{source.path}: has {' and '.join(sets)}, but no {lacking}")
    else:
        twice = [cls for cls in everything if sum(cls in classes for classes in sets.values()) > 1]
        first = min(twice, key=natural)
        where = " and in ".join(split for split in SPLITS if first in sets[split])
        raise UserError(
            f"{source.path}: class {first} is in {where}: each class belongs in one split"
        )
    return by_side(everything, side), how, notes


def by_side(classes: Classes, side: dict[str, str]) -> dict[str, Classes]:
    """{split: {class: images}} of {class: images} and {class: split}; other classes are left out."""
    return {
        split: {cls: images for cls, images in classes.items() if side.get(cls) == split}
        for split in SPLITS
    }


def unlisted(source: Source, classes: Collection[str]) -> UserError:
    """The error of class folders that no list splits."""
    ours = set(MINI.side) & set(classes)
    if len(ours) >= 50:
        missing, extra = set(MINI.side) - ours, set(classes) - ours
        what = (
            [f"lacks {len(missing)} of mini-ImageNet's 100 classes ({some(missing)})"]
            if missing
            else []
        )
        what += [f"has others ({some(extra)})"] if extra else []
        return UserError(
            f"{source.path}: {' and '.join(what)}: complete it, or say with --split how to split it"
        )
    return UserError(
        f"{source.path}: has {len(classes)} class folders ({some(classes)}) neither split nor mini-ImageNet's: "
        "say how to split them with --split FILE or --split TRAIN/VAL/TEST"
    )


def split_classes(
    classes: Iterable[str], options: Options, path: Path
) -> tuple[dict[str, str], str, list[str]]:
    """Split classes as --split says.

    Returns:
        ({class: split}, how in words, notes for the user).

    Raises:
        UserError: the flag does not fit the classes.
    """
    classes, flag = set(classes), options.split
    if is_numbers(flag):
        counts = [int(n) for n in flag.split("/")]
        if sum(counts) != len(classes) or 0 in counts:
            raise UserError(
                f"--split {flag}: give three numbers above 0 that add up to {path}'s {len(classes)} classes"
            )
        order = np.random.Generator(np.random.Philox(options.seed)).permutation(len(classes))
        names = np.array(sorted(classes), dtype=object)[order]
        parts = np.split(names, np.cumsum(counts)[:-1])
        side = {cls: split for split, part in zip(SPLITS, parts, strict=True) for cls in part}
        return side, f"classes drawn {flag} with seed {options.seed}", []
    file = Path(flag)
    try:
        lists = json.loads(file.read_text("utf-8"))
    except OSError as error:
        advice = "give a JSON file or numbers of classes as in 64/16/20"
        raise UserError(f"--split {file}: {error.strerror}: {advice}") from None
    except ValueError as error:
        raise UserError(f"--split {file}: is not JSON ({error})") from None
    lists = {SPLIT_NAMES.get(k): v for k, v in lists.items()} if isinstance(lists, dict) else {}
    if not all(
        isinstance(lists.get(s), list) and all(isinstance(c, str) for c in lists[s]) for s in SPLITS
    ):
        raise UserError(
            f'--split {file}: must be {{"train": [class, ...], "val": [...], "test": [...]}}'
        )
    side = {}
    for split in SPLITS:
        for cls in lists[split]:
            if side.setdefault(cls, split) != split:
                raise UserError(
                    f"--split {file}: class {cls} is both in {side[cls]} and in {split}"
                )
    if missing := set(side) - classes:
        raise UserError(
            f"--split {file}: {len(missing)} of its classes are not in {path} ({some(missing)})"
        )
    rest = classes - set(side)
    notes = [f"ignored: classes not in {file.name}, {len(rest)} ({some(rest)})"] if rest else []
    return side, f"split by {file.name}", notes


def is_numbers(flag: str | None) -> bool:
    """Whether --split is TRAIN/VAL/TEST, and not a file."""
    return bool(flag and _NUMBERS.fullmatch(flag))
