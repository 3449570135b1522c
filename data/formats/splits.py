"""Published data sets, and the rules that split classes."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.imagefiles import nfc, read_text
from utils import SPLITS, UserError

from . import DATA
from .sources import SPLIT_NAMES, Source, some

Classes = dict[str, list[Any]]  # {class: [key of each image]}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object by the splits that its keys mean. Raises ValueError if one is there twice."""
    lists: dict[str, Any] = {}
    for key, value in pairs:
        if (split := SPLIT_NAMES.get(key, key)) in lists:
            raise ValueError(f"{split} is there twice, as {key}")
        lists[split] = value
    return lists


def read_split_file(file: Path) -> dict[str, str]:
    """{class: split} of the JSON file of --split. Raises UserError if it is not one."""
    try:
        lists = json.loads(read_text(file), object_pairs_hook=_object)
    except OSError as error:
        advice = "give a JSON file or numbers of classes as in 64/16/20"
        raise UserError(f"--split {file}: {error.strerror}: {advice}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--split {file}: is no JSON of splits ({error})") from None
    split_of: dict[str, str] = {}
    for split in SPLITS:
        names = lists.get(split) if isinstance(lists, dict) else None
        if not isinstance(names, list) or {type(name) for name in names} != {str}:
            form = '{"train": [class, ...], "val": [...], "test": [...]}'
            raise UserError(f"--split {file}: must be {form}; it lacks {split}")
        for cls in map(nfc, names):
            if split_of.setdefault(cls, split) != split:
                raise UserError(f"--split {file}: class {cls} is in {split_of[cls]} and in {split}")
    return split_of


@dataclass
class Known:
    """A published data set."""

    name: str
    per_class: int  # number of images of each class
    folder: str  # its usual folder
    split_of: dict[str, str]  # {class: split}
    fingerprints: dict[str, str] = field(default_factory=dict)  # {split: of the published copies}


MINI = Known(
    *("mini-ImageNet", 600, "miniImagenet"),
    read_split_file(DATA / "splits" / "mini-imagenet.json"),
    # the JPEG files of 84 px under Ravi & Larochelle's names: github.com/Deo0330/split_minidataset
    {"train": "a0f6099e953b59a0", "val": "47092cf1f09ba147", "test": "8b64ff4d6c3030ef"},
)
TINY = Known("tiny64", 450, "tiny64", read_split_file(DATA / "splits" / "tiny64.json"))


def split_parts(
    parts: dict[str, Classes], source: Source, args: argparse.Namespace
) -> tuple[dict[str, Classes], str, Known, bool]:
    """Split the classes of a data set, unless its parts are split by class already.

    Without ``--split``, parts that all hold the classes of a known data set are split by its class
    lists; surplus classes and images are left out.

    Args:
        parts: {train, val or test: {class: [key]}}; or one part under any name.

    Returns:
        {split: {class: [key]}}, how it was split, what it is then called, and whether some of its
        images were left out.

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
    known = next((k for k in (MINI, TINY) if set(k.split_of) <= set(everything)), None)
    if len(sets) == 3 and apart:
        if args.split:
            raise UserError(f"--split: {source.path} is split by class already: leave it out")
        return parts, "split already", MINI, False
    if args.split:
        split_of, how = _split_classes(set(everything), args, source.path)
        return _by_split(everything, split_of), how, MINI, False
    alike = all(classes == set(everything) for classes in sets.values())
    if alike and known:
        first = {cls: keys[: known.per_class] for cls, keys in everything.items()}
        cut = len(first) > len(known.split_of) or first != everything
        how = f"split by {known.name}'s class lists"
        how += f", the first {known.per_class} images of each class" * cut
        return _by_split(first, known.split_of), how, known, cut
    if len(sets) > 1 and apart:
        lacking = " or ".join(split for split in SPLITS if split not in sets)
        raise source.error(f"has {' and '.join(sets)}, but no {lacking}")
    if not alike:
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
    splits: dict[str, Classes] = {split: {} for split in SPLITS}
    for cls in sorted(classes.keys() & split_of.keys()):
        splits[split_of[cls]][cls] = classes[cls]
    return splits


def is_numbers(flag: str | None) -> bool:
    """Whether --split is TRAIN/VAL/TEST, and not a file."""
    return bool(flag and re.fullmatch(r"\d+/\d+/\d+", flag))


def _split_classes(
    classes: set[str], args: argparse.Namespace, path: Path
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
        split_of = dict(zip(names, np.repeat(SPLITS, counts).tolist(), strict=True))
        return split_of, f"classes drawn {flag} with seed {args.seed}"
    split_of = read_split_file(Path(flag))
    if missing := set(split_of) - classes:
        lost = f"{len(missing)} of its classes are not in {path} ({some(missing)})"
        raise UserError(f"--split {flag}: {lost}")
    rest = classes - set(split_of)
    without = f", which leaves out {len(rest)} classes ({some(rest)})" if rest else ""
    return split_of, f"split by {Path(flag).name}{without}"
