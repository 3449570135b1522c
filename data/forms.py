"""Which form a source is in, and the plan that turns it into {train,val,test}/<class>/<image>."""

import csv
import io
import re
from pathlib import Path, PurePosixPath

from arrays import CACHE, CATEGORY, SPLIT_NAMES, WNID, CachePickles, CategoryPickles, Shards
from plans import MINI, SPLITS, TINY, Item, Plan, by_side, place, refuse_split, split_classes, unlisted
from sources import ARCHIVES, DataError, NestedTars, Union, is_image, natural, open_source, some

FORMS = (
    "train/val/test folders of class folders; images with train.csv, val.csv, test.csv; 100 class folders; "
    "mini-imagenet-cache-*.pkl; miniImageNet_category_split_*.pickle; *.parquet; ILSVRC-2012's train; "
    "Tiny-ImageNet-200; any class folders with --split"
)
_CLASS_TAR = re.compile(r"n\d{8}\.tar")
_STRAY = 20  # beside pickles, shards or tars, more images than that are a data set of their own
_RANKED = re.compile(r"(n\d{8})(\d{8})\.\w+")  # Ravi & Larochelle's names: class, number


def recognise(source, options):
    """Find the form of an open source.

    Args:
        source: of `sources.open_source`.
        options: Options.

    Returns:
        Plan, still to be validated.

    Raises:
        DataError: it is in no known form, or in one with a fault.
    """
    plan = _recognise(source, options)
    for reason, names in source.skipped.items():
        plan.notes.append(f"ignored: {reason}, {len(names)} ({some(names)})")
    return plan


def _recognise(source, options):
    base = {name: name.rpartition("/")[2] for name in source.files}
    signs = {
        CachePickles.what: [name for name, b in base.items() if CACHE.fullmatch(b)],
        CategoryPickles.what: [name for name, b in base.items() if CATEGORY.fullmatch(b)],
        Shards.what: [name for name, b in base.items() if b.lower().endswith(".parquet")],
        "ILSVRC-2012's tars": [name for name, b in base.items() if _CLASS_TAR.fullmatch(b)],
    }
    signs = {what: names for what, names in signs.items() if names}
    images = sum(map(is_image, source.files))
    if len(signs) > 1 or (signs and images > _STRAY):
        there = [*signs, *([f"{images} images"] if images > _STRAY else [])]
        raise DataError(f"{source.path}: holds {' and '.join(there)}: give the folder of one of them as SOURCE")
    ((what, names),) = signs.items() or ((None, None),)
    if what == CachePickles.what:
        return _from_pickles(source, names, CACHE, CachePickles, options)
    if what == CategoryPickles.what:
        return _from_pickles(source, names, CATEGORY, CategoryPickles, options)
    if what == Shards.what:
        return _from_shards(source, names, options)
    tables = _tables(source, options)
    if what:
        refuse_split(options, source, what)
        nested = NestedTars(source, set(MINI.side))
        if missing := set(MINI.side) - nested.classes:
            raise DataError(
                f"{source.path}: lacks the tars of {len(missing)} of mini-ImageNet's classes ({some(missing)})"
            )
        return _from_ilsvrc(nested, _by_folder(nested.files), tables, len(nested.classes))
    inner = _unpacked(source)
    return _from_images(inner, tables or _tables(inner, options), options)


def _unpacked(source):
    """The source itself, or the archives in a folder that holds its images packed."""
    if source.kind != "a folder" or any(map(is_image, source.files)):
        return source
    packed = {name: source.path / name for name in source.files if name.lower().endswith(ARCHIVES)}
    splits = {SPLIT_NAMES.get(PurePosixPath(name).name.split(".")[0].lower()): path for name, path in packed.items()}
    if len(packed) == 3 and set(splits) == set(SPLITS):
        return Union(
            source.path, "a folder of train, val and test archives", {s: open_source(p) for s, p in splits.items()}
        )
    if len(packed) == 1:
        (path,) = packed.values()
        return open_source(path)
    return source


# ---- pickles and shards


def _from_pickles(source, names, pattern, reader, options):
    refuse_split(options, source, reader.what)
    parts = {}
    for name in names:
        split = pattern.fullmatch(name.rpartition("/")[2]).group(1).removeprefix("train_phase_")
        if parts.setdefault(split, name) != name:
            raise DataError(f"{source.path}: holds {split}'s pickle in two places: give the folder of one of them")
    if lacking := [split for split in SPLITS if split not in parts]:
        raise DataError(f"{source.path}: has {', '.join(names)}, but lacks {' and '.join(lacking)}'s pickle")
    pickles = reader(source, parts)
    items = [
        Item(split, cls, f"{cls}_{rank:04d}.png", key)
        for split, classes in pickles.rows.items()
        for cls, keys in classes.items()
        for rank, key in enumerate(keys)
    ]
    plan = Plan(f"{source.kind} with {reader.what}", pickles, items)
    if any(re.fullmatch(r"train-\d{3,}", cls) for cls in pickles.rows["train"]):
        plan.notes.append("the labels are numbers without names: classes are called by split and number")
    return plan


def _from_shards(source, names, options):
    class_names = None
    if options.class_names:
        lines = options.class_names.read_text("utf-8", "replace").splitlines()
        class_names = [line.strip() for line in lines if line.strip()]
    shards = Shards(source, names, class_names)
    rows = {split: shards.rows[split] for split in SPLITS if split in shards.rows}
    if not shards.named:
        if options.split:
            rows = {s: {f"class-{cls:03d}": keys for cls, keys in classes.items()} for s, classes in rows.items()}
        elif len(rows) == 3 and len({frozenset(classes) for classes in rows.values()}) == 3:
            rows = {s: {f"{s}-{cls:03d}": keys for cls, keys in classes.items()} for s, classes in rows.items()}
        else:
            raise DataError(
                f"{source.path}: every class is in every shard and the labels are numbers without names: "
                "give the names, one a line, with --class-names FILE"
            )
    merged, how, notes = place(rows, source, options)
    items = []
    for split, classes in merged.items():
        for cls, keys in classes.items():
            targets = [shards.target(key, cls, rank) for rank, key in enumerate(keys)]
            if len(set(targets)) < len(targets):
                targets = [f"{cls}_{rank:04d}" for rank in range(len(keys))]
            items += [Item(split, cls, target, key) for target, key in zip(targets, keys, strict=True)]
    if not shards.named:
        notes.append("the labels are numbers without names: classes are called by number")
    plan = Plan(f"{source.kind} with {len(names)} Parquet shards, {how}", shards, items, notes)
    return plan


# ---- image files


def _by_folder(names):
    """{folder above class folders: {class: [image, in natural order]}}; <class>/images/ (Tiny-ImageNet) is <class>/."""
    folders, groups = {}, {}
    for name in filter(is_image, names):
        folders.setdefault(name.rpartition("/")[0], []).append(name)
    for path, names in folders.items():
        folder = PurePosixPath(path)
        if folder.name == "images" and WNID.fullmatch(folder.parent.name):
            folder = folder.parent
        if folder.name:
            group = groups.setdefault(str(folder.parent), {})
            group[folder.name] = sorted([*group.get(folder.name, ()), *names], key=natural)
    return groups


def _refuse_empty(source, parents):
    """Raise DataError if a folder beside class folders has no image anywhere below it."""
    filled = {folder for name in source.files if is_image(name) for folder in PurePosixPath(name).parents}
    for folder in map(PurePosixPath, sorted(source.dirs, key=natural)):
        if str(folder.parent) in parents and folder not in filled:
            raise DataError(f"{source.path}: class folder {folder} holds no image: fill it or remove it")


def _items(splits, files):
    return [
        Item(split, cls, PurePosixPath(name).name, name, files[name])
        for split, classes in splits.items()
        for cls, names in classes.items()
        for name in names
    ]


def _from_images(source, tables, options):
    images = [name for name in source.files if is_image(name)]
    if not images:
        kinds = {PurePosixPath(name).suffix.lower() or "no suffix" for name in source.files}
        there = f"{len(source.files)} files ({some(kinds, 6)})" if source.files else "no files"
        raise DataError(f"{source.path}: no images in it, but {there}; known forms: {FORMS}")
    groups = _by_folder(images)
    plan = (
        _from_tiny(source, groups, options)  # whose val/images/ and test/images/ look like classes
        or _from_layout(source, groups, options)
        or (tables and _from_tables(source, groups, images, tables, options))
        or _from_class_folders(source, groups, options)
    )
    used = {item.key for item in plan.items}
    if unused := [name for name in images if name not in used]:
        plan.notes.append(f"not used: {len(unused)} other images ({some(unused)})")
    others = [
        name for name in source.files if not is_image(name) and not name.lower().endswith((".csv", ".txt", ".json"))
    ]
    if others:
        plan.notes.append(f"ignored: files that are no images, {len(others)} ({some(others)})")
    return plan


def _from_layout(source, groups, options):
    """{train,val,test}/<class>/<image>, perhaps under some more folders; None if it is not that."""
    layouts = {}
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
    whole = {above: splits for above, splits in layouts.items() if len(splits) == 3}
    if not whole:
        return None
    if len(whole) > 1:
        raise DataError(f"{source.path}: holds {len(whole)} data sets ({some(whole)}): give the folder of one of them")
    ((above, splits),) = whole.items()
    _refuse_empty(source, [parent for parent in groups if SPLIT_NAMES.get(PurePosixPath(parent).name.lower())])
    merged, how, notes = place(splits, source, options)
    items = _items(merged, source.files)
    if how != "split already":  # the parts of a class were numbered apart
        names = [item.path for item in items]
        if len(set(names)) < len(names):
            for item in items:
                item.name = f"{PurePosixPath(item.key).parent.parent.name}-{item.name}"
    return Plan(f"{source.kind} of class folders, {how}", source, items, notes)


def _from_tiny(source, groups, options):
    parents = [
        p
        for p, classes in groups.items()
        if any("/images/" in names[0] and WNID.fullmatch(c) for c, names in classes.items())
    ]
    parents = [p for p in parents if PurePosixPath(p).name == "train"]
    if not parents:
        return None
    classes = groups[parents[0]]
    if options.split:
        side, how, notes = split_classes(set(classes), options, source.path)
        return Plan(
            f"{source.kind} with Tiny-ImageNet-200, {how}", source, _items(by_side(classes, side), source.files), notes
        )
    if missing := set(TINY.side) - set(classes):
        raise DataError(
            f"{source.path}: Tiny-ImageNet-200 without {len(missing)} of tiny64's classes ({some(missing)})"
        )
    first = {cls: names[: TINY.per_class] for cls, names in classes.items()}
    return Plan(
        f"{source.kind} with Tiny-ImageNet-200, the first {TINY.per_class} training images of tiny64's 100 classes",
        source,
        _items(by_side(first, TINY.side), source.files),
        dest="tiny64",
    )


def _from_class_folders(source, groups, options):
    if options.split and not re.fullmatch(r"\d+/\d+/\d+", options.split):
        side, *_ = split_classes(set().union(*groups.values()), options, source.path)
        groups = {p: classes for p, classes in groups.items() if set(side) <= set(classes)} or groups
    elif not options.split:
        known = {p: classes for p, classes in groups.items() if set(MINI.side) <= set(classes)}
        if len(known) == 1:
            ((_, classes),) = known.items()
            if len(classes) > 100 or max(len(classes[cls]) for cls in MINI.side) > MINI.per_class:
                return _from_ilsvrc(source, known, None, len(classes))
            groups = known
    if not groups:
        raise DataError(
            f"{source.path}: holds images, but no class folders and no train.csv, val.csv, test.csv: give --csv DIR"
        )
    if len(groups) > 1:
        splits = sorted({PurePosixPath(p).name for p in groups} & set(SPLIT_NAMES))
        if splits:
            raise DataError(
                f"{source.path}: has {' and '.join(splits)}, but not all of train, val and test; known forms: {FORMS}"
            )
        raise DataError(
            f"{source.path}: holds class folders in {len(groups)} places ({some(groups)}): give one of them as SOURCE"
        )
    ((parent, classes),) = groups.items()
    _refuse_empty(source, [parent])
    if options.split:
        side, how, notes = split_classes(set(classes), options, source.path)
    elif set(classes) == set(MINI.side):
        side, how, notes = MINI.side, "split by mini-ImageNet's class lists", []
    else:
        raise unlisted(source, classes)
    return Plan(
        f"{source.kind} of {len(classes)} class folders, {how}",
        source,
        _items(by_side(classes, side), source.files),
        notes,
    )


# ---- CSV files


def _tables(source, options):
    """{split: (shown name, text)} of train.csv, val.csv and test.csv: of --csv, inside of the source, or beside it."""
    wanted = {f"{split}.csv": split for split in SPLITS}
    if options.csv:
        if lacking := [name for name in wanted if not (options.csv / name).is_file()]:
            raise DataError(f"--csv {options.csv}: has no {' and no '.join(lacking)}")
        return {split: (str(options.csv / name), (options.csv / name).read_bytes()) for name, split in wanted.items()}
    inside = {}
    for name in source.files:
        path = PurePosixPath(name)
        if path.name in wanted:
            inside.setdefault(str(path.parent), {})[name] = wanted[path.name]
    inside = [names for names in inside.values() if len(names) == 3]
    if len(inside) > 1:
        raise DataError(f"{source.path}: holds train.csv in {len(inside)} places: choose one with --csv DIR")
    if inside:
        (names,) = inside
        return {
            names[name]: (f"{source.path}: {name}", file.read_bytes() if isinstance(file, Path) else file.read())
            for name, file in source.stream(set(names))
        }
    beside = source.path.absolute().parent
    if not options.split and all((beside / name).is_file() for name in wanted):
        return {split: (str(beside / name), (beside / name).read_bytes()) for name, split in wanted.items()}
    return None


def _rows(tables):
    """Yield (split, where, filename, label) of each line `filename,label`."""
    for split in SPLITS:
        shown, content = tables[split]
        try:
            lines = list(csv.reader(io.StringIO(content.decode("utf-8-sig")), strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{shown}: is not a CSV file ({error})") from None
        for number, line in enumerate(lines, 1):
            line = [cell.strip() for cell in line]
            if not any(line) or (number == 1 and line == ["filename", "label"]):
                continue
            where = f"{shown}: line {number}"
            if len(line) != 2 or not all(line):
                raise DataError(f"{where}: {','.join(line)[:80]!r} is not filename,label")
            told = WNID.match(line[0])
            if told and WNID.fullmatch(line[1]) and told.group() != line[1]:
                raise DataError(f"{where}: wrong label {line[1]} for {line[0]}")
            yield split, where, *line


def _from_tables(source, groups, images, tables, options):
    """Images named by CSV files: in one folder, or in class folders as ILSVRC-2012 has them."""
    refuse_split(options, source, "CSV files, which say the split")
    rows = list(_rows(tables))
    labels = {label for *_, label in rows}
    known = {parent: classes for parent, classes in groups.items() if labels and labels <= set(classes)}
    if len(known) == 1:
        return _from_ilsvrc(source, known, tables, len(next(iter(known.values()))))
    at = {}
    for name in images:
        at.setdefault(PurePosixPath(name).name, []).append(name)
    items, missing = [], []
    for split, where, name, label in rows:
        found = at.get(name, ())
        if len(found) > 1:
            raise DataError(f"{where}: {name} is there {len(found)} times ({some(found)})")
        if found:
            items.append(Item(split, label, name, found[0], source.files[found[0]]))
        else:
            missing.append(f"{where}: its image {name} is missing")
    if missing:
        raise DataError(f"{missing[0]} from {source.path}" + (f" (and {len(missing) - 1} more)" if missing[1:] else ""))
    return Plan(f"{source.kind} of images with train.csv, val.csv and test.csv", source, items)


def _from_ilsvrc(source, groups, tables, count):
    """ILSVRC-2012's training folders or tars: the images of the CSV files, or the first 600 of each class.

    Ravi & Larochelle's names are the class's WordNet id and a number of eight digits: the rank, from 1, of the image in
    its class, ordered by the number in ILSVRC's own name. (So also read by yaoyao-liu/mini-imagenet-tools.)
    """
    classes = {}
    for group in groups.values():
        for cls, names in group.items():
            classes.setdefault(cls, []).extend(names)
    what = f"{source.kind} of ILSVRC-2012's training images, {count} classes,"
    if tables is None:
        first = {cls: names[: MINI.per_class] for cls, names in classes.items()}
        items = _items(by_side(first, MINI.side), source.files)
        note = "these are NOT the published images, which need train.csv, val.csv and test.csv: give --csv DIR"
        return Plan(
            f"{what} the first {MINI.per_class} images of mini-ImageNet's 100", source, items, [note], published=False
        )
    exact = {cls: {PurePosixPath(name).name: name for name in names} for cls, names in classes.items()}
    items, ranked = [], 0
    for split, where, name, label in _rows(tables):
        if label not in classes:
            raise DataError(f"{where}: {source.path} has no class {label}")
        key, match = exact[label].get(name), _RANKED.fullmatch(name)
        if key is None and match and match.group(1) == label and 1 <= int(match.group(2)) <= len(classes[label]):
            key = classes[label][int(match.group(2)) - 1]
            ranked += 1
        if key is None:
            raise DataError(
                f"{where}: its image {name} is missing from {source.path} ({label} has {len(classes[label])} images)"
            )
        items.append(Item(split, label, name, key, source.files[key]))
    notes = [f"{ranked} images were found by their rank in their class, as the CSV files number them"] if ranked else []
    return Plan(f"{source.kind} of {count} class folders with train.csv, val.csv and test.csv", source, items, notes)
