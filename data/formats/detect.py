"""Finds the format of a source and makes its manifest."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterator
from pathlib import PurePosixPath

from utils import SPLITS, UserError

from .arrays import PICKLE, Pickles, Shards, file_names
from .manifest import (
    MINI,
    TINY,
    Classes,
    Item,
    Manifest,
    Options,
    by_split,
    is_numbers,
    split_classes,
    split_parts,
)
from .sources import ARCHIVES, SPLIT_NAMES, WNID, Nested, Source, is_image, natural, some

FORMATS = (
    "train/val/test folders of class folders; images with train.csv, val.csv, test.csv; 100 class "
    "folders; mini-imagenet-cache-*.pkl; miniImageNet_category_split_*.pickle; *.parquet; "
    "ILSVRC-2012's train; Tiny-ImageNet-200; any class folders with --split"
)
_STRAY = 20  # more images than these beside pickles, shards or tars are a data set of their own
_CLASS_TAR = re.compile(r"n\d{8}\.tar")
_RANKED = re.compile(r"(n\d{8})(\d{8})\.\w+")  # Ravi & Larochelle's names: class, number
_FILE_COLUMNS = {"filename", "file_name", "file", "image_name", "image", "path"}
_LABEL_COLUMNS = {"label", "class_name", "class", "class_id", "category", "wnid"}

Groups = dict[str, Classes]  # {folder above class folders: {class: [image, in natural order]}}
Row = tuple[str, str, str, str]  # of a CSV file: split, the line's place, file name, label
Tables = dict[str, tuple[str, bytes]]  # {split: (the CSV file's shown name, its content)}


def detect(source: Source, options: Options) -> Manifest:
    """Find the format of an open source.

    Returns:
        The manifest, not yet validated.

    Raises:
        UserError: it is in no known format, or has a fault.
    """
    base = {name: _base(name) for name in source.files}
    pickles = {name: match for name, b in base.items() if (match := PICKLE.fullmatch(b))}
    found = {
        "mini-imagenet-cache pickles": [n for n, match in pickles.items() if match.group(1)],
        "miniImageNet_category_split pickles": [n for n, m in pickles.items() if not m.group(1)],
        "Parquet shards": [name for name, b in base.items() if b.lower().endswith(".parquet")],
        "ILSVRC-2012's tars": [name for name, b in base.items() if _CLASS_TAR.fullmatch(b)],
    }
    found = {what: names for what, names in found.items() if names}
    images = sum(map(is_image, source.files))
    if len(found) > 1 or (found and images > _STRAY):
        there = [*found, *([f"{images} images"] if images > _STRAY else [])]
        raise source.error(f"holds {' and '.join(there)}: give the folder of one of them")
    what, names = next(iter(found.items()), ("", []))
    if pickles:
        manifest = _from_pickles(source, what, pickles, options)
    elif what == "Parquet shards":
        manifest = _from_shards(source, names, options)
    elif names:
        manifest = _from_class_tars(source, names, options)
    else:
        tables = _find_tables(source, options)
        source = _unpacked(source)
        manifest = _from_images(source, tables or _find_tables(source, options), options)
    for reason, names in source.skipped.items():
        manifest.notes.append(f"ignored: {reason}, {len(names)} ({some(names)})")
    return manifest


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _unpacked(source: Source) -> Source:
    """The source itself, or the archives in it if it holds its images packed."""
    if any(map(is_image, source.files)):
        return source
    packed = [name for name in source.files if name.lower().endswith(ARCHIVES)]
    splits = {name: SPLIT_NAMES.get(_base(name).split(".")[0].lower(), "") for name in packed}
    if len(packed) == 1:
        return Nested(source, {packed[0]: ""})
    if len(packed) == 3 and set(splits.values()) == set(SPLITS):
        return Nested(source, splits)
    return source


def items_of(splits: dict[str, Classes], source: Source) -> list[Item]:
    """The items of {split: {class: [image file of the source]}}."""
    return [
        Item(split, cls, _base(name), name, source.files[name])
        for split, classes in splits.items()
        for cls, names in classes.items()
        for name in names
    ]


# ---- Pickles and shards ----


def _from_pickles(
    source: Source, what: str, matches: dict[str, re.Match], options: Options
) -> Manifest:
    options.refuse_split(source, what)
    names = {name: match.group(match.lastindex) for name, match in matches.items()}
    if len(set(names.values())) < len(names):
        raise source.error(f"holds a split's pickle twice ({', '.join(names)}): give one folder")
    if lacking := set(SPLITS) - set(names.values()):
        raise source.error(f"has {', '.join(names)}, but lacks {' and '.join(lacking)}'s pickle")
    reader = Pickles(source, names)
    manifest = Manifest(f"{source.kind} with {what}", reader, _array_items(reader.keys, {}))
    if any(re.fullmatch(r"train-\d{3,}", cls) for cls in reader.keys["train"]):
        manifest.notes.append(
            "the labels are numbers without names: classes are called by split and number"
        )
    return manifest


def _array_items(splits: dict[str, Classes], files: dict, suffix: str = ".png") -> list[Item]:
    return [
        Item(split, cls, name, key)
        for split, classes in splits.items()
        for cls, keys in classes.items()
        for name, key in zip(file_names(cls, keys, files, suffix), keys, strict=True)
    ]


def _from_shards(source: Source, names: list[str], options: Options) -> Manifest:
    class_names = None
    if options.class_names:
        lines = options.class_names.read_text("utf-8-sig", "replace").splitlines()
        class_names = [line.strip() for line in lines if line.strip()]
    reader = Shards(source, names, class_names)
    parts, notes = reader.keys, []
    if not reader.named:
        sets = {frozenset(classes) for classes in parts.values()}
        if not options.split and (len(parts) < 3 or len(sets) < 3):
            raise source.error(
                "every class is in every shard and the labels are numbers without names: "
                "give the names, one a line, with --class-names FILE"
            )
        # without --split, numbers start from 0 again in each split
        parts = {
            split: {f"{'class' if options.split else split}-{c}": k for c, k in classes.items()}
            for split, classes in parts.items()
        }
        notes.append("the labels are numbers without names: classes are called by number")
    splits, how = split_parts(parts, source, options)
    found = f"{source.kind} with {len(names)} Parquet shards, {how}"
    return Manifest(found, reader, _array_items(splits, reader.files, ""), notes)


# ---- Image files ----


def _by_folder(source: Source) -> Groups:
    """Group images by class folder; <class>/images/ (Tiny-ImageNet) counts as <class>/."""
    folders: dict[str, list[str]] = {}
    for name in filter(is_image, source.files):
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


def _refuse_empty(source: Source, parents: Collection[str]) -> None:
    """Raise UserError if a folder beside class folders has no image anywhere below it."""
    images = filter(is_image, source.files)
    filled = {str(folder) for name in images for folder in PurePosixPath(name).parents}
    for folder in sorted(source.dirs - filled, key=natural):
        if str(PurePosixPath(folder).parent) in parents:
            raise source.error(f"class folder {folder} holds no image: fill it or remove it")


def _from_images(source: Source, tables: Tables | None, options: Options) -> Manifest:
    images = [name for name in source.files if is_image(name)]
    others = [name for name in source.files if not is_image(name)]
    if not images:
        packed = [name for name in others if name.lower().endswith(ARCHIVES)]
        if packed:
            advice = "unpack them, or give the one that holds the images"
            raise source.error(f"holds {len(packed)} archives ({some(packed)}): {advice}")
        kinds = {PurePosixPath(name).suffix.lower() or "no suffix" for name in others}
        there = f" among its {len(others)} files ({some(kinds, 6)})" if kinds else ", no files"
        raise source.error(f"holds no images{there}; known formats: {FORMATS}")
    groups = _by_folder(source)
    manifest = (
        _from_tiny(source, groups, options)  # whose val/images/ and test/images/ look like classes
        or _from_layout(source, groups, options)
        or (tables and _from_tables(source, groups, images, tables, options))
        or _from_class_folders(source, groups, options)
    )
    used = {item.key for item in manifest.items}
    if unused := [name for name in images if name not in used]:
        manifest.notes.append(f"not used: {len(unused)} other images ({some(unused)})")
    others = [name for name in others if not name.lower().endswith((".csv", ".txt", ".json"))]
    if others:
        ignored = f"ignored: files that are not images, {len(others)} ({some(others)})"
        manifest.notes.append(ignored)
    return manifest


def _from_layout(source: Source, groups: Groups, options: Options) -> Manifest | None:
    """{train,val,test}/<class>/<image>, perhaps under more folders; None if it is not that.

    Two of the three folders are enough if both have the same classes."""
    layouts: dict[str, dict[str, Classes]] = {}
    for parent, classes in groups.items():
        folder = PurePosixPath(parent)
        if isinstance(source, Nested) and folder.parts and folder.parts[0] in SPLITS:
            folder = PurePosixPath(folder.parts[0])  # the archive of a split
        if split := SPLIT_NAMES.get(folder.name.lower()):
            above = folder.parent
            if above.name == folder.name:  # train/train/, from a train.tar that holds train/
                above = above.parent
            layouts.setdefault(str(above), {}).setdefault(split, {}).update(classes)
    whole = {
        above: parts
        for above, parts in layouts.items()
        if len(parts) == 3 or (len(parts) == 2 and len(set(map(frozenset, parts.values()))) == 1)
    }
    if not whole:
        return None
    if len(whole) > 1:
        raise source.error(f"holds {len(whole)} data sets ({some(whole)}): give one's folder")
    ((_, parts),) = whole.items()
    _refuse_empty(source, {p for p in groups if SPLIT_NAMES.get(_base(p).lower())})
    splits, how = split_parts(parts, source, options)
    items = items_of(splits, source)
    if len({item.path for item in items}) < len(items):  # each part numbers its images anew
        for item in items:
            item.name = f"{PurePosixPath(item.key).parent.parent.name}-{item.name}"
    return Manifest(f"{source.kind} of class folders, {how}", source, items)


def _from_tiny(source: Source, groups: Groups, options: Options) -> Manifest | None:
    """Tiny-ImageNet-200, whose training images are in train/<class>/images/; None if it is not
    that.
    """
    for parent, classes in groups.items():
        packed = any("/images/" in names[0] and WNID.fullmatch(c) for c, names in classes.items())
        if packed and _base(parent) == "train":
            break
    else:
        return None
    found = f"{source.kind} with Tiny-ImageNet-200"
    if options.split:
        split_of, how = split_classes(classes, options, source.path)
        items = items_of(by_split(classes, split_of), source)
        return Manifest(f"{found}, {how}", source, items)
    if missing := set(TINY.split_of) - set(classes):
        lost = f"{len(missing)} of tiny64's classes ({some(missing)})"
        raise source.error(f"Tiny-ImageNet-200 without {lost}")
    found += f", the first {TINY.per_class} training images of tiny64's 100 classes"
    first = {cls: names[: TINY.per_class] for cls, names in classes.items()}
    return Manifest(found, source, items_of(by_split(first, TINY.split_of), source), dest="tiny64")


def _from_class_folders(source: Source, groups: Groups, options: Options) -> Manifest:
    """Class folders that are not split; or one folder of Ravi & Larochelle's files, whose names
    begin with their class.
    """
    named = {name: _RANKED.fullmatch(_base(name)) for name in source.files if is_image(name)}
    if all(named.values()) and len({name.rpartition("/")[0] for name in named}) == 1:
        groups = {"": {}}
        for name, match in named.items():
            groups[""].setdefault(match.group(1), []).append(name)
    wanted = set(MINI.split_of)
    if options.split and not is_numbers(options.split):
        wanted = set(split_classes(set().union(*groups.values()), options, source.path)[0])
    if not options.split or not is_numbers(options.split):
        fitting = {p: classes for p, classes in groups.items() if wanted <= set(classes)}
        groups = fitting if len(fitting) == 1 else groups
    if not groups:
        advice = "make a folder for each class, or give --csv DIR"
        raise source.error(f"holds images, but neither class folders nor CSV files: {advice}")
    if len(groups) > 1:
        if splits := sorted({_base(parent) for parent in groups} & set(SPLIT_NAMES)):
            lost = f"has {' and '.join(splits)}, but not all of train, val and test"
            raise source.error(f"{lost}; known formats: {FORMATS}")
        raise source.error(
            f"holds class folders in {len(groups)} places ({some(groups)}): give one"
        )
    ((parent, classes),) = groups.items()
    if not options.split and wanted <= set(classes):
        largest = max(len(classes[cls]) for cls in wanted)
        if len(classes) > len(wanted) or largest > MINI.per_class:
            return _from_ilsvrc(source, classes, None)
    _refuse_empty(source, [parent])
    splits, how = split_parts({"all": classes}, source, options)
    found = f"{source.kind} of {len(classes)} class folders, {how}"
    return Manifest(found, source, items_of(splits, source))


# ---- CSV files ----


def _find_tables(source: Source, options: Options) -> Tables | None:
    """train.csv, val.csv and test.csv of --csv, inside of the source, or beside it; None if there
    are none.
    """
    wanted = {f"{split}.csv": split for split in SPLITS}
    folders: dict[str, list[str]] = {}
    for name in source.files:
        if _base(name) in wanted:
            folders.setdefault(name.rpartition("/")[0], []).append(name)
    inside = [names for names in folders.values() if len(names) == 3]
    beside = options.csv or source.path.absolute().parent
    lacking = [name for name in wanted if not (beside / name).is_file()]
    if options.csv and lacking:
        raise UserError(f"--csv {options.csv}: has no {' and no '.join(lacking)}")
    if inside and not options.csv:
        if len(inside) > 1:
            raise source.error(f"holds train.csv in {len(inside)} places: give --csv DIR")
        return {
            wanted[_base(name)]: (f"{source.path}: {name}", file.read())
            for name, file in source.stream(set(inside[0]))
        }
    if lacking or (options.split and not options.csv):
        return None
    return {
        split: (str(beside / name), (beside / name).read_bytes()) for name, split in wanted.items()
    }


def _rows(tables: Tables) -> Iterator[Row]:
    """The lines of CSV files of file names and labels. A header says which column is which; without
    one the file name comes first.
    """
    for split in SPLITS:
        shown, content = tables[split]
        try:
            lines = list(csv.reader(io.StringIO(content.decode("utf-8-sig")), strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{shown}: is not a CSV file ({error})") from None
        head = [cell.strip().lower() for cell in lines[0]] if lines else []
        columns = [
            next((n for n, cell in enumerate(head) if cell in known), None)
            for known in (_FILE_COLUMNS, _LABEL_COLUMNS)
        ]
        width = len(head)
        if None in columns:
            head, columns, width = [], [0, 1], 2
        for number, line in enumerate(lines, 1):
            line = [cell.strip() for cell in line]
            if not any(line) or (number == 1 and head):
                continue
            where = f"{shown}: line {number}"
            if len(line) != width or not all(line[column] for column in columns):
                raise UserError(f"{where}: {','.join(line)[:80]!r} is not a file name and a label")
            name, label = (line[column] for column in columns)
            told = WNID.match(name)
            if told and WNID.fullmatch(label) and told.group() != label:
                raise UserError(f"{where}: wrong label {label} for {name}")
            yield split, where, name, label


def _from_tables(
    source: Source, groups: Groups, images: list[str], tables: Tables, options: Options
) -> Manifest:
    """Images that CSV files name: in one folder, or in class folders as ILSVRC-2012 has them."""
    options.refuse_split(source, "CSV files, which say the split")
    rows = list(_rows(tables))
    labels = {label for *_, label in rows}
    known = [classes for classes in groups.values() if labels and labels <= set(classes)]
    if len(known) == 1:
        return _from_ilsvrc(source, known[0], rows)
    at: dict[str, list[str]] = {}
    for name in images:
        at.setdefault(_base(name), []).append(name)
    items, missing = [], []
    for split, where, path, label in rows:
        name = _base(path)
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
    return Manifest(f"{source.kind} of images with train.csv, val.csv and test.csv", source, items)


def _from_class_tars(source: Source, names: list[str], options: Options) -> Manifest:
    """ILSVRC2012_img_train.tar, which holds a tar for each class."""
    options.refuse_split(source, "ILSVRC-2012's tars")
    wnids = {name: PurePosixPath(name).stem for name in names}
    if missing := set(MINI.split_of) - set(wnids.values()):
        lost = f"the tars of {len(missing)} of mini-ImageNet's classes ({some(missing)})"
        raise source.error(f"lacks {lost}")
    tables = _find_tables(source, options)
    tars = {name: wnid for name, wnid in wnids.items() if wnid in MINI.split_of}
    nested = Nested(source, tars)
    classes: Classes = {wnid: [] for wnid in tars.values()}
    for name in filter(is_image, nested.files):
        classes[name.partition("/")[0]].append(name)
    classes = {wnid: sorted(names, key=natural) for wnid, names in classes.items()}
    return _from_ilsvrc(nested, classes, list(_rows(tables)) if tables else None)


def _from_ilsvrc(source: Source, classes: Classes, rows: list[Row] | None) -> Manifest:
    """ILSVRC-2012's training images: those of the CSV files, or without these the first 600 of each
    class.

    A name of Ravi & Larochelle's is the class's WordNet id and a number of eight digits: the
    image's rank, from 1, in its class in the order of the numbers in ILSVRC's own names.
    yaoyao-liu/mini-imagenet-tools reads them so as well."""
    if rows is None:
        found = f"ILSVRC-2012's training images, the first {MINI.per_class} of mini-ImageNet's 100"
        note = "these are NOT the published images: for those give CSV files with --csv DIR"
        first = {cls: names[: MINI.per_class] for cls, names in classes.items()}
        items = items_of(by_split(first, MINI.split_of), source)
        return Manifest(f"{source.kind} of {found}", source, items, [note], published=False)
    exact = {cls: {_base(name): name for name in names} for cls, names in classes.items()}
    items, ranked = [], 0
    for split, where, path, label in rows:
        name = _base(path)
        if label not in classes:
            raise UserError(f"{where}: {source.path} has no class {label}")
        key, match = exact[label].get(name), _RANKED.fullmatch(name)
        if key is None and match and match.group(1) == label:
            rank = int(match.group(2))
            key = classes[label][rank - 1] if 1 <= rank <= len(classes[label]) else None
            ranked += 1
        if key is None:
            there = f"{label} has {len(classes[label])} images"
            raise UserError(f"{where}: its image {name} is missing from {source.path} ({there})")
        items.append(Item(split, label, name, key, source.files[key]))
    note = f"{ranked} images were found by their rank in their class, as the CSV files number them"
    found = f"{source.kind} of {len(classes)} class folders with train.csv, val.csv and test.csv"
    return Manifest(found, source, items, [note] if ranked else [])
