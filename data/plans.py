"""What is to be made: images with their places, and how classes come into splits."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from arrays import SPLIT_NAMES
from sources import DataError, natural, some

SPLITS = ("train", "val", "test")
_LARGEST = 1 << 28  # bytes of one image file: beyond it, it is none


@dataclass
class Known:
    """A published choice of classes: {split: [class]}, and its number of images per class."""

    name: str
    per_class: int
    splits: dict

    @property
    def side(self):
        """{class: split}"""
        return {cls: split for split, classes in self.splits.items() for cls in classes}


def _known(name, file, per_class):
    return Known(name, per_class, json.loads((Path(__file__).parent / "splits" / file).read_text("utf-8")))


MINI = _known("mini-ImageNet", "mini-imagenet.json", 600)
TINY = _known("tiny64", "tiny64.json", 450)


@dataclass
class Item:
    """One image: where it goes, and its key in the reader's stream. A name without a suffix gets one by content."""

    split: str
    cls: str
    name: str
    key: object
    size: int | None = None

    @property
    def path(self):
        return f"{self.split}/{self.cls}/{self.name}"


@dataclass
class Plan:
    found: str
    reader: object  # has stream(keys)
    items: list
    notes: list = field(default_factory=list)
    published: bool = True  # False: known not to be the published choice of images
    dest: str = "miniImagenet"  # the usual folder's name


@dataclass
class Options:
    """The flags that bear upon the plan."""

    csv: Path | None = None
    split: str | None = None
    seed: int = 719
    class_names: Path | None = None


def refuse_split(options, source, what):
    if options.split:
        raise DataError(
            f"--split is for class folders and shards that are not split; {source.path} holds {what}: leave it out"
        )


def validate(plan, path):
    """Raise DataError unless the plan's names are safe, its images unique, its splits filled and classes disjoint."""
    side, seen, keys = {}, set(), set()
    for item in plan.items:
        for name in (item.cls, item.name):
            if not _is_plain(name):
                raise DataError(f"{path}: {name[:80]!r} cannot be a class's or file's name: refused")
        if side.setdefault(item.cls, item.split) != item.split:
            raise DataError(f"{path}: class {item.cls} is both in {side[item.cls]} and in {item.split}: wrong labels")
        if item.path in seen:
            raise DataError(f"{path}: has two images for {item.path}")
        if item.size is not None and item.size > _LARGEST:
            raise DataError(f"{path}: {item.key} has {item.size} bytes: that is no image of a data set")
        if item.key in keys:
            raise DataError(f"{path}: {item.key} is listed twice")
        seen.add(item.path)
        keys.add(item.key)
    for split in SPLITS:
        if split not in side.values():
            raise DataError(f"{path}: there is no class for {split}")


def _is_plain(name):
    return bool(
        name
        and not name.startswith(".")
        and len(name.encode("utf-8", "surrogateescape")) <= 240
        and not any(ord(c) < 32 or c in "/\\" for c in name)
    )


# ---- splits by class


def place(splits, source, options):
    """Classes that may or may not be split yet, split by class.

    Args:
        splits: {split: {class: [image]}}

    Returns:
        ({split: {class: [image]}}, how it was split, notes)
    """
    sets = {split: set(classes) for split, classes in splits.items() if classes}
    apart = len(sets) == 3 and sum(map(len, sets.values())) == len(set.union(*sets.values()))
    if apart:
        if options.split:
            refuse_split(options, source, "a data set that is split already")
        return splits, "split already", []
    everything = {}
    for split in SPLITS:
        for cls, images in splits.get(split, {}).items():
            everything.setdefault(cls, []).extend(images)
    if options.split:
        side, how, notes = split_classes(set(everything), options, source.path)
    elif all(classes == set(everything) for classes in sets.values()):
        lists = next((known for known in (MINI, TINY) if set(known.side) == set(everything)), None)
        if lists is None:
            raise unlisted(source, everything)
        side, how, notes = lists.side, f"every class in every part, split by {lists.name}'s class lists", []
    elif len(sets) < 3:
        raise DataError(
            f"{source.path}: has {' and '.join(sets)}, but no {' or '.join(s for s in SPLITS if s not in sets)}"
        )
    else:
        twice = {cls for a in SPLITS for b in SPLITS if a < b for cls in sets[a] & sets[b]}
        where = [split for split in SPLITS if min(twice, key=natural) in sets[split]]
        raise DataError(
            f"{source.path}: class {some(twice, 1)} is in {' and in '.join(where)}: each belongs in one split"
        )
    return by_side(everything, side), how, notes


def by_side(classes, side):
    return {split: {cls: images for cls, images in classes.items() if side.get(cls) == split} for split in SPLITS}


def unlisted(source, classes):
    ours = set(MINI.side) & set(classes)
    if len(ours) >= 50:
        missing, extra = set(MINI.side) - ours, set(classes) - ours
        what = f"lacks {len(missing)} of mini-ImageNet's 100 classes ({some(missing)})" if missing else ""
        what += " and " * bool(what and extra) + (f"has others ({some(extra)})" if extra else "")
        return DataError(f"{source.path}: {what}: complete it, or say with --split how to split it")
    return DataError(
        f"{source.path}: has {len(classes)} class folders ({some(classes)}) neither split nor mini-ImageNet's: "
        "say how to split them with --split FILE or --split TRAIN/VAL/TEST"
    )


def split_classes(classes, options, path):
    """--split's {class: split}, in words, and notes.

    Raises:
        DataError: the flag does not fit the classes.
    """
    if re.fullmatch(r"\d+/\d+/\d+", options.split):
        counts = [int(n) for n in options.split.split("/")]
        if sum(counts) != len(classes) or 0 in counts:
            raise DataError(
                f"--split {options.split}: three numbers above 0 adding up to {path}'s {len(classes)} classes"
            )
        order = np.random.Generator(np.random.Philox(options.seed)).permutation(len(classes))
        names = np.array(sorted(classes), dtype=object)[order]
        parts = np.split(names, np.cumsum(counts)[:-1])
        side = {cls: split for split, part in zip(SPLITS, parts, strict=True) for cls in part}
        return side, f"classes drawn {options.split} with seed {options.seed}", []
    file = Path(options.split)
    try:
        lists = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise DataError(
            f"--split {file}: {error.strerror}: give a JSON file or numbers of classes as in 64/16/20"
        ) from None
    except ValueError as error:
        raise DataError(f"--split {file}: is not JSON ({error})") from None
    lists = {SPLIT_NAMES.get(k): v for k, v in lists.items()} if isinstance(lists, dict) else {}
    if not all(isinstance(lists.get(s), list) and all(isinstance(c, str) for c in lists[s]) for s in SPLITS):
        raise DataError(f'--split {file}: must be {{"train": [class, ...], "val": [...], "test": [...]}}')
    side = {}
    for split in SPLITS:
        for cls in lists[split]:
            if side.setdefault(cls, split) != split:
                raise DataError(f"--split {file}: class {cls} is both in {side[cls]} and in {split}")
    if missing := set(side) - classes:
        raise DataError(f"--split {file}: {len(missing)} of its classes are not in {path} ({some(missing)})")
    rest = classes - set(side)
    return (
        side,
        f"split by {file.name}",
        [f"ignored: classes not in {file.name}, {len(rest)} ({some(rest)})"] if rest else [],
    )
