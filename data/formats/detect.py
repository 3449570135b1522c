"""Finds the form of a source, and makes the plan that turns it into
{train,val,test}/<class>/<image>.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from utils import SPLITS, UserError

from .arrays import CachePickles, CategoryPickles, Shards
from .manifest import (
    MINI,
    TINY,
    Classes,
    Item,
    Options,
    Plan,
    by_side,
    is_numbers,
    place,
    refuse_split,
    split_classes,
    unlisted,
)
from .sources import (
    ARCHIVES,
    CLASS_TAR,
    SPLIT_NAMES,
    WNID,
    NestedTars,
    Source,
    Union,
    is_image,
    natural,
    open_source,
    some,
)

FORMS = (
    "train/val/test folders of class folders; images with train.csv, val.csv, test.csv; 100 class folders; "
    "mini-imagenet-cache-*.pkl; miniImageNet_category_split_*.pickle; *.parquet; ILSVRC-2012's train; "
    "Tiny-ImageNet-200; any class folders with --split"
)
_STRAY = 20  # more images than these beside pickles, shards or tars are a data set of their own
_RANKED = re.compile(r"(n\d{8})(\d{8})\.\w+")  # Ravi & Larochelle's names: class, number

Groups = dict[str, Classes]  # {folder above class folders: {class: [image, in natural order]}}
Tables = dict[str, tuple[str, bytes]]  # {split: (the CSV file's shown name, its content)}


def detect(source: Source, options: Options) -> Plan:
    """Find the form of an open source.

    Returns:
        The plan; call `manifest.validate` on it.

    Raises:
        UserError: it is in no known form, or in one with a fault.
    """
    plan = _recognise(source, options)
    for reason, names in source.skipped.items():
        plan.notes.append(f"ignored: {reason}, {len(names)} ({some(names)})")
    return plan


def _recognise(source: Source, options: Options) -> Plan:
    base = {name: name.rpartition("/")[2] for name in source.files}
    signs = {
        CachePickles.what: [name for name, b in base.items() if CachePickles.pattern.fullmatch(b)],
        CategoryPickles.what: [
            name for name, b in base.items() if CategoryPickles.pattern.fullmatch(b)
        ],
        Shards.what: [name for name, b in base.items() if b.lower().endswith(".parquet")],
        "ILSVRC-2012's tars": [name for name, b in base.items() if CLASS_TAR.fullmatch(b)],
    }
    signs = {what: names for what, names in signs.items() if names}
    images = sum(map(is_image, source.files))
    if len(signs) > 1 or (signs and images > _STRAY):
        there = [*signs, *([f"{images} images"] if images > _STRAY else [])]
        raise UserError(
            f"{source.path}: holds {' and '.join(there)}: give the folder of one of them as SOURCE"
        )
    ((what, names),) = signs.items() or (("", []),)
    for reader in (CachePickles, CategoryPickles):
        if what == reader.what:
            return _from_pickles(source, names, reader, options)
    if what == Shards.what:
        return _from_shards(source, names, options)
    tables = _tables(source, options)
    if what:
        refuse_split(options, source, what)
        nested = NestedTars(source, set(MINI.side))
        if missing := set(MINI.side) - nested.classes:
            lost = f"the tars of {len(missing)} of mini-ImageNet's classes ({some(missing)})"
            raise UserError(f"{source.path}: lacks {lost}")
        classes = _by_folder(nested.files).get(".", {})
        return _from_ilsvrc(nested, classes, tables, len(nested.classes))
    inner = _unpacked(source)
    return _from_images(inner, tables or _tables(inner, options), options)


def _unpacked(source: Source) -> Source:
    """The source itself, or the archives in a folder that holds its images packed."""
    if source.kind != "a folder" or any(map(is_image, source.files)):
        return source
    packed = {name: source.path / name for name in source.files if name.lower().endswith(ARCHIVES)}
    splits = {
        SPLIT_NAMES.get(PurePosixPath(name).name.split(".")[0].lower()): path
        for name, path in packed.items()
    }
    if len(packed) == 3 and set(splits) == set(SPLITS):
        parts = {split: open_source(path) for split, path in splits.items()}
        return Union(source.path, "a folder of train, val and test archives", parts)
    if len(packed) == 1:
        (path,) = packed.values()
        return open_source(path)
    return source


# ---- Pickles and shards ----


def _from_pickles(
    source: Source, names: list[str], reader: type[CachePickles | CategoryPickles], options: Options
) -> Plan:
    refuse_split(options, source, reader.what)
    parts: dict[str, str] = {}
    for name in names:
        split = (
            reader.pattern.fullmatch(name.rpartition("/")[2]).group(1).removeprefix("train_phase_")
        )
        if parts.setdefault(split, name) != name:
            raise UserError(
                f"{source.path}: holds {split}'s pickle in two places: give the folder of one of them"
            )
    if lacking := [split for split in SPLITS if split not in parts]:
        raise UserError(
            f"{source.path}: has {', '.join(names)}, but lacks {' and '.join(lacking)}'s pickle"
        )
    pickles = reader(source, parts)
    items = [
        Item(split, cls, f"{cls}_{rank:04d}.png", key)
        for split, classes in pickles.rows.items()
        for cls, keys in classes.items()
        for rank, key in enumerate(keys)
    ]
    plan = Plan(f"{source.kind} with {reader.what}", pickles, items)
    if any(re.fullmatch(r"train-\d{3,}", cls) for cls in pickles.rows["train"]):
        plan.notes.append(
            "the labels are numbers without names: classes are called by split and number"
        )
    return plan


def _from_shards(source: Source, names: list[str], options: Options) -> Plan:
    class_names = None
    if options.class_names:
        lines = options.class_names.read_text("utf-8", "replace").splitlines()
        class_names = [line.strip() for line in lines if line.strip()]
    shards = Shards(source, names, class_names)
    rows = {split: shards.rows[split] for split in SPLITS if split in shards.rows}
    if not shards.named:
        apart = len(rows) == 3 and len({frozenset(classes) for classes in rows.values()}) == 3
        if not options.split and not apart:
            raise UserError(
                f"{source.path}: every class is in every shard and the labels are numbers without names: "
                "give the names, one a line, with --class-names FILE"
            )
        prefix = {split: "class" if options.split else split for split in rows}
        rows = {
            s: {f"{prefix[s]}-{cls:03d}": keys for cls, keys in classes.items()}
            for s, classes in rows.items()
        }
    merged, how, notes = place(rows, source, options)
    items = []
    for split, classes in merged.items():
        for cls, keys in classes.items():
            targets = [shards.target(key, cls, rank) for rank, key in enumerate(keys)]
            if len(set(targets)) < len(targets):
                targets = [f"{cls}_{rank:04d}" for rank in range(len(keys))]
            items += [
                Item(split, cls, target, key) for target, key in zip(targets, keys, strict=True)
            ]
    if not shards.named:
        notes.append("the labels are numbers without names: classes are called by number")
    return Plan(f"{source.kind} with {len(names)} Parquet shards, {how}", shards, items, notes)


# ---- Image files ----


def _by_folder(names: Iterable[str]) -> Groups:
    """Group images by class folder; <class>/images/ (Tiny-ImageNet) counts as <class>/."""
    folders: dict[str, list[str]] = {}
    for name in filter(is_image, names):
        folders.setdefault(name.rpartition("/")[0], []).append(name)
    groups: Groups = {}
    for path, files in folders.items():
        folder = PurePosixPath(path)
        if folder.name == "images" and WNID.fullmatch(folder.parent.name):
            folder = folder.parent
        if folder.name:
            group = groups.setdefault(str(folder.parent), {})
            group[folder.name] = sorted([*group.get(folder.name, ()), *files], key=natural)
    return groups


def _refuse_empty(source: Source, parents: list[str]) -> None:
    """Raise UserError if a folder beside class folders has no image anywhere below it."""
    filled = {
        folder for name in source.files if is_image(name) for folder in PurePosixPath(name).parents
    }
    for folder in map(PurePosixPath, sorted(source.dirs, key=natural)):
        if str(folder.parent) in parents and folder not in filled:
            raise UserError(
                f"{source.path}: class folder {folder} holds no image: fill it or remove it"
            )


def items_of(splits: dict[str, Classes], source: Source) -> list[Item]:
    """The items of {split: {class: [image file of the source]}}."""
    return [
        Item(split, cls, PurePosixPath(name).name, name, source.files[name])
        for split, classes in splits.items()
        for cls, names in classes.items()
        for name in names
    ]


def _from_images(source: Source, tables: Tables | None, options: Options) -> Plan:
    images = [name for name in source.files if is_image(name)]
    if not images:
        kinds = {PurePosixPath(name).suffix.lower() or "no suffix" for name in source.files}
        there = (
            f"no images among its {len(source.files)} files ({some(kinds, 6)})"
            if kinds
            else "no images, no files at all"
        )
        raise UserError(f"{source.path}: holds {there}; known forms: {FORMS}")
    groups = _by_folder(images)
    plan = (
        _from_tiny(
            source, groups, options
        )  # first, as its val/images/ and test/images/ look like classes
        or _from_layout(source, groups, options)
        or (tables and _from_tables(source, groups, images, tables, options))
        or _from_class_folders(source, groups, options)
    )
    used = {item.key for item in plan.items}
    if unused := [name for name in images if name not in used]:
        plan.notes.append(f"not used: {len(unused)} other images ({some(unused)})")
    others = [
        n
        for n in source.files
        if not is_image(n) and not n.lower().endswith((".csv", ".txt", ".json"))
    ]
    if others:
        plan.notes.append(f"ignored: files that are not images, {len(others)} ({some(others)})")
    return plan


def _from_layout(source: Source, groups: Groups, options: Options) -> Plan | None:
    """{train,val,test}/<class>/<image>, perhaps under more folders; None if it is not that.

    Two of the three folders are enough if both have the same classes: then the classes are split
    anew.
    """
    layouts: dict[str, dict[str, Classes]] = {}
    for parent, classes in groups.items():
        folder = PurePosixPath(parent)
        if split := SPLIT_NAMES.get(folder.name.lower()):
            above = folder.parent
            if above.name == folder.name:  # train.tar that holds train/
                above = above.parent
            layouts.setdefault(str(above), {}).setdefault(split, {}).update(classes)
    if source.kind.startswith("a folder of train"):
        layouts = {".": {}}
        for parent, classes in groups.items():
            layouts["."].setdefault(parent.split("/")[0], {}).update(classes)
    whole = {
        above: splits
        for above, splits in layouts.items()
        if len(splits) == 3 or _same_classes(splits)
    }
    if not whole:
        return None
    if len(whole) > 1:
        raise UserError(
            f"{source.path}: holds {len(whole)} data sets ({some(whole)}): give the folder of one of them"
        )
    ((_, splits),) = whole.items()
    _refuse_empty(
        source, [parent for parent in groups if SPLIT_NAMES.get(PurePosixPath(parent).name.lower())]
    )
    merged, how, notes = place(splits, source, options)
    items = items_of(merged, source)
    if how != "split already" and len({item.path for item in items}) < len(
        items
    ):  # each part numbers its images anew
        for item in items:
            item.name = f"{PurePosixPath(item.key).parent.parent.name}-{item.name}"
    return Plan(f"{source.kind} of class folders, {how}", source, items, notes)


def _same_classes(splits: dict[str, Classes]) -> bool:
    return len(splits) == 2 and len({frozenset(classes) for classes in splits.values()}) == 1


def _from_tiny(source: Source, groups: Groups, options: Options) -> Plan | None:
    """Tiny-ImageNet-200, whose training images lie in train/<class>/images/; None if it is not
    that.
    """
    for parent, classes in groups.items():
        packed = any("/images/" in names[0] and WNID.fullmatch(c) for c, names in classes.items())
        if packed and PurePosixPath(parent).name == "train":
            break
    else:
        return None
    found = f"{source.kind} with Tiny-ImageNet-200"
    if options.split:
        side, how, notes = split_classes(classes, options, source.path)
        return Plan(f"{found}, {how}", source, items_of(by_side(classes, side), source), notes)
    if missing := set(TINY.side) - set(classes):
        lost = f"{len(missing)} of tiny64's classes ({some(missing)})"
        raise UserError(f"{source.path}: Tiny-ImageNet-200 without {lost}")
    how = f"the first {TINY.per_class} training images of tiny64's 100 classes"
    return Plan(
        f"{found}, {how}", source, _first(classes, TINY.per_class, TINY.side, source), dest="tiny64"
    )


def _first(classes: Classes, count: int, side: dict[str, str], source: Source) -> list[Item]:
    return items_of(by_side({cls: names[:count] for cls, names in classes.items()}, side), source)


def _from_class_folders(source: Source, groups: Groups, options: Options) -> Plan:
    if options.split and not is_numbers(options.split):
        side, *_ = split_classes(set().union(*groups.values()), options, source.path)
        groups = {
            p: classes for p, classes in groups.items() if set(side) <= set(classes)
        } or groups
    elif not options.split:
        known = {p: classes for p, classes in groups.items() if set(MINI.side) <= set(classes)}
        if len(known) == 1:
            ((_, classes),) = known.items()
            if len(classes) > 100 or max(len(classes[cls]) for cls in MINI.side) > MINI.per_class:
                return _from_ilsvrc(source, classes, None, len(classes))
            groups = known
    if not groups:
        lost = (
            "holds images, but no class folders and no train.csv, val.csv, test.csv: give --csv DIR"
        )
        raise UserError(f"{source.path}: {lost}")
    if len(groups) > 1:
        if splits := sorted({PurePosixPath(p).name for p in groups} & set(SPLIT_NAMES)):
            lost = f"has {' and '.join(splits)}, but not all of train, val and test"
            raise UserError(f"{source.path}: {lost}; known forms: {FORMS}")
        places = f"{len(groups)} places ({some(groups)})"
        raise UserError(
            f"{source.path}: holds class folders in {places}: give one of them as SOURCE"
        )
    ((parent, classes),) = groups.items()
    _refuse_empty(source, [parent])
    if options.split:
        side, how, notes = split_classes(classes, options, source.path)
    elif set(classes) == set(MINI.side):
        side, how, notes = MINI.side, "split by mini-ImageNet's class lists", []
    else:
        raise unlisted(source, classes)
    found = f"{source.kind} of {len(classes)} class folders, {how}"
    return Plan(found, source, items_of(by_side(classes, side), source), notes)


# ---- CSV files ----


def _tables(source: Source, options: Options) -> Tables | None:
    """train.csv, val.csv and test.csv of --csv, inside of the source, or beside it; None if there
    are none.
    """
    wanted = {f"{split}.csv": split for split in SPLITS}
    if options.csv:
        if lacking := [name for name in wanted if not (options.csv / name).is_file()]:
            raise UserError(f"--csv {options.csv}: has no {' and no '.join(lacking)}")
        return _read_tables(options.csv)
    folders: dict[str, dict[str, str]] = {}
    for name in source.files:
        path = PurePosixPath(name)
        if path.name in wanted:
            folders.setdefault(str(path.parent), {})[name] = wanted[path.name]
    inside = [names for names in folders.values() if len(names) == 3]
    if len(inside) > 1:
        raise UserError(
            f"{source.path}: holds train.csv in {len(inside)} places: choose one with --csv DIR"
        )
    if inside:
        (names,) = inside
        return {
            names[name]: (
                f"{source.path}: {name}",
                file.read_bytes() if isinstance(file, Path) else file.read(),
            )
            for name, file in source.stream(set(names))
        }
    beside = source.path.absolute().parent
    if not options.split and all((beside / name).is_file() for name in wanted):
        return _read_tables(beside)
    return None


def _read_tables(folder: Path) -> Tables:
    return {
        split: (str(folder / f"{split}.csv"), (folder / f"{split}.csv").read_bytes())
        for split in SPLITS
    }


def _rows(tables: Tables) -> Iterator[tuple[str, str, str, str]]:
    """Yield (split, where, filename, label) of each line `filename,label`."""
    for split in SPLITS:
        shown, content = tables[split]
        try:
            lines = list(csv.reader(io.StringIO(content.decode("utf-8-sig")), strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{shown}: is not a CSV file ({error})") from None
        for number, line in enumerate(lines, 1):
            line = [cell.strip() for cell in line]
            if not any(line) or (number == 1 and line == ["filename", "label"]):
                continue
            where = f"{shown}: line {number}"
            if len(line) != 2 or not all(line):
                raise UserError(f"{where}: {','.join(line)[:80]!r} is not filename,label")
            told = WNID.match(line[0])
            if told and WNID.fullmatch(line[1]) and told.group() != line[1]:
                raise UserError(f"{where}: wrong label {line[1]} for {line[0]}")
            yield split, where, *line


def _from_tables(
    source: Source, groups: Groups, images: list[str], tables: Tables, options: Options
) -> Plan:
    """Images that CSV files name: in one folder, or in class folders as ILSVRC-2012 has them."""
    refuse_split(options, source, "CSV files, which say the split")
    rows = list(_rows(tables))
    labels = {label for *_, label in rows}
    known = [classes for classes in groups.values() if labels and labels <= set(classes)]
    if len(known) == 1:
        return _from_ilsvrc(source, known[0], tables, len(known[0]))
    at: dict[str, list[str]] = {}
    for name in images:
        at.setdefault(PurePosixPath(name).name, []).append(name)
    items, missing = [], []
    for split, where, name, label in rows:
        found = at.get(name, [])
        if len(found) > 1:
            raise UserError(f"{where}: {name} is there {len(found)} times ({some(found)})")
        if found:
            items.append(Item(split, label, name, found[0], source.files[found[0]]))
        else:
            missing.append(f"{where}: its image {name} is missing")
    if missing:
        more = f" (and {len(missing) - 1} more)" if missing[1:] else ""
        raise UserError(f"{missing[0]} from {source.path}{more}")
    return Plan(f"{source.kind} of images with train.csv, val.csv and test.csv", source, items)


def _from_ilsvrc(source: Source, classes: Classes, tables: Tables | None, count: int) -> Plan:
    """ILSVRC-2012's training images: those of the CSV files, or without these the first 600 of each
    class.

    A name of Ravi & Larochelle's is the class's WordNet id and a number of eight digits: the
    image's rank, from 1, in its class in the order of the numbers in ILSVRC's own names.
    yaoyao-liu/mini-imagenet-tools reads them so as well.
    """
    if tables is None:
        what = f"ILSVRC-2012's training images, {count} classes, the first {MINI.per_class} images of mini-ImageNet's 100"
        note = "these are NOT the published images, which need train.csv, val.csv and test.csv: give --csv DIR"
        items = _first(classes, MINI.per_class, MINI.side, source)
        return Plan(f"{source.kind} of {what}", source, items, [note], published=False)
    exact = {
        cls: {PurePosixPath(name).name: name for name in names} for cls, names in classes.items()
    }
    items, ranked = [], 0
    for split, where, name, label in _rows(tables):
        if label not in classes:
            raise UserError(f"{where}: {source.path} has no class {label}")
        key, match = exact[label].get(name), _RANKED.fullmatch(name)
        if (
            key is None
            and match
            and match.group(1) == label
            and 1 <= int(match.group(2)) <= len(classes[label])
        ):
            key = classes[label][int(match.group(2)) - 1]
            ranked += 1
        if key is None:
            there = f"{label} has {len(classes[label])} images"
            raise UserError(f"{where}: its image {name} is missing from {source.path} ({there})")
        items.append(Item(split, label, name, key, source.files[key]))
    notes = (
        [f"{ranked} images were found by their rank in their class, as the CSV files number them"]
        if ranked
        else []
    )
    return Plan(
        f"{source.kind} of {count} class folders with train.csv, val.csv and test.csv",
        source,
        items,
        notes,
    )
