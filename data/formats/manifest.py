"""Manifests: which image of a source goes to which split, class and file; and the rules that split
classes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils import SPLITS, UserError

from . import DATA
from .sources import SPLIT_NAMES, Source, natural, some

_LARGEST = 1 << 28  # bytes; a larger file is not an image of a data set

Classes = dict[str, list]  # {class: [key of each image]}


@dataclass
class Known:
    """A published data set: its classes {split: [class]}, images per class, and the fingerprints
    {split: 16 hex digits} of the published copies.
    """

    name: str
    per_class: int
    splits: dict[str, list[str]]
    fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def split_of(self) -> dict[str, str]:
        """{class: split}"""
        return {cls: split for split, classes in self.splits.items() for cls in classes}


def _class_lists(name: str) -> dict[str, list[str]]:
    return json.loads((DATA / "splits" / name).read_text("utf-8"))


MINI = Known(
    "mini-ImageNet",
    600,
    _class_lists("mini-imagenet.json"),
    # the JPEG files of 84 px under Ravi & Larochelle's names: github.com/Deo0330/split_minidataset
    {"train": "a0f6099e953b59a0", "val": "47092cf1f09ba147", "test": "8b64ff4d6c3030ef"},
)
TINY = Known("tiny64", 450, _class_lists("tiny64.json"))


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
    dest: str = "miniImagenet"

    def validate(self, source: object) -> None:
        """Raise UserError unless all names are safe, images unique, splits filled, and classes in
        one split each.
        """
        split_of: dict[str, str] = {}
        paths, keys = set(), set()
        for item in self.items:
            for name in (item.cls, item.name):
                if not _is_plain(name):
                    raise UserError(
                        f"{source}: {name[:80]!r} cannot be the name of a class or file"
                    )
            if split_of.setdefault(item.cls, item.split) != item.split:
                both = f"{split_of[item.cls]} and in {item.split}"
                raise UserError(f"{source}: class {item.cls} is both in {both}")
            if item.path in paths:
                raise UserError(f"{source}: has two images for {item.path}")
            if item.key in keys:
                raise UserError(f"{source}: {item.key} is listed twice")
            if item.size is not None and item.size > _LARGEST:
                raise UserError(f"{source}: {item.key} has {item.size} bytes: that is not an image")
            paths.add(item.path)
            keys.add(item.key)
        for split in SPLITS:
            if split not in split_of.values():
                raise UserError(f"{source}: there is no class for {split}")


def _is_plain(name: str) -> bool:
    return bool(
        name
        and not name.startswith(".")
        and len(name.encode("utf-8", "surrogateescape")) <= 240
        and not any(ord(c) < 32 or c in "/\\" for c in name)
    )


@dataclass
class Options:
    """The flags on which a manifest depends."""

    csv: Path | None = None
    split: str | None = None
    seed: int = 719
    class_names: Path | None = None

    def refuse_split(self, source: Source, what: str) -> None:
        """Raise UserError if --split is given for a source whose format says the split."""
        if self.split:
            raise UserError(f"--split: {source.path} holds {what}: leave the flag out")


# ---- Splits by class ----


def split_parts(
    parts: dict[str, Classes], source: Source, options: Options
) -> tuple[dict[str, Classes], str]:
    """Split the classes of a data set, unless its parts are split by class already.

    Args:
        parts: {train, val or test: {class: [key]}}; or one part under any name.

    Returns:
        ({train, val, test: {class: [key]}}, how it is split, for the user).

    Raises:
        UserError: some classes are in several parts, nothing says how to split the classes, or
            --split does not fit.
    """
    sets = {part: set(classes) for part, classes in parts.items() if classes}
    everything: Classes = {}
    for classes in parts.values():
        for cls, keys in classes.items():
            everything.setdefault(cls, []).extend(keys)
    if len(sets) == 3 and sum(map(len, sets.values())) == len(everything):
        options.refuse_split(source, "a data set that is split already")
        return parts, "split already"
    if options.split:
        split_of, how = split_classes(set(everything), options, source.path)
        return by_split(everything, split_of), how
    if all(classes == set(everything) for classes in sets.values()):
        known = next(
            (known for known in (MINI, TINY) if set(known.split_of) == {*everything}), None
        )
        if known is None:
            raise _unknown_classes(source, set(everything))
        how = "every class in every part, " if len(sets) > 1 else ""
        return by_split(everything, known.split_of), f"{how}split by {known.name}'s class lists"
    if len(sets) < 3:
        lacking = " or ".join(split for split in SPLITS if split not in sets)
        raise source.error(f"has {' and '.join(sets)}, but no {lacking}")
    twice = [cls for cls in everything if sum(cls in classes for classes in sets.values()) > 1]
    cls = min(twice, key=natural)
    both = " and in ".join(split for split in SPLITS if cls in sets[split])
    raise source.error(f"class {cls} is in {both}: each class belongs in one split")


def by_split(classes: Classes, split_of: dict[str, str]) -> dict[str, Classes]:
    """{split: {class: keys}} of {class: keys} and {class: split}; other classes are left out."""
    return {
        split: {cls: keys for cls, keys in classes.items() if split_of.get(cls) == split}
        for split in SPLITS
    }


def _unknown_classes(source: Source, classes: set[str]) -> UserError:
    mini = set(MINI.split_of)
    if len(mini & classes) < 50:
        return source.error(
            f"has {len(classes)} classes ({some(classes)}) neither split nor mini-ImageNet's: "
            "split them with --split FILE or --split TRAIN/VAL/TEST"
        )
    missing, extra = mini - classes, classes - mini
    lacks = f"lacks {len(missing)} of mini-ImageNet's 100 classes ({some(missing)})"
    what = [lacks] * bool(missing) + [f"has others ({some(extra)})"] * bool(extra)
    return source.error(f"{' and '.join(what)}: complete it, or split it with --split")


def is_numbers(flag: str | None) -> bool:
    """Whether --split is TRAIN/VAL/TEST, and not a file."""
    return bool(flag and re.fullmatch(r"\d+/\d+/\d+", flag))


def split_classes(
    classes: Collection[str], options: Options, path: Path
) -> tuple[dict[str, str], str]:
    """Split classes as --split says.

    Returns:
        ({class: split}, how, for the user).

    Raises:
        UserError: the flag does not fit the classes.
    """
    flag = options.split
    if is_numbers(flag):
        counts = [int(n) for n in flag.split("/")]
        if sum(counts) != len(classes) or 0 in counts:
            needs = f"give three numbers above 0 that add up to {path}'s {len(classes)} classes"
            raise UserError(f"--split {flag}: {needs}")
        order = np.random.Generator(np.random.Philox(options.seed)).permutation(len(classes))
        names = np.array(sorted(classes), dtype=object)[order]
        split_names = np.repeat(SPLITS, counts).tolist()
        how = f"classes drawn {flag} with seed {options.seed}"
        return dict(zip(names, split_names, strict=True)), how
    lists = _read_split_file(Path(flag))
    split_of: dict[str, str] = {}
    for split in SPLITS:
        for cls in lists[split]:
            if split_of.setdefault(cls, split) != split:
                both = f"{split_of[cls]} and in {split}"
                raise UserError(f"--split {flag}: class {cls} is both in {both}")
    if missing := set(split_of) - set(classes):
        lost = f"{len(missing)} of its classes are not in {path} ({some(missing)})"
        raise UserError(f"--split {flag}: {lost}")
    rest = set(classes) - set(split_of)
    without = f", which leaves out {len(rest)} classes ({some(rest)})" if rest else ""
    return split_of, f"split by {Path(flag).name}{without}"


def _read_split_file(file: Path) -> dict[str, list[str]]:
    try:
        lists = json.loads(file.read_text("utf-8-sig"))
    except OSError as error:
        advice = "give a JSON file or numbers of classes as in 64/16/20"
        raise UserError(f"--split {file}: {error.strerror}: {advice}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--split {file}: is not JSON ({error})") from None
    lists = {SPLIT_NAMES.get(k): v for k, v in lists.items()} if isinstance(lists, dict) else {}
    for split in SPLITS:
        names = lists.get(split)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            form = '{"train": [class, ...], "val": [...], "test": [...]}'
            raise UserError(f"--split {file}: must be {form}")
    return lists
