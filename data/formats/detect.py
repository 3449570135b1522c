"""Finds the format of a source and makes its manifest.

Every format comes down to one table, {part: {class: [key of each image]}}, where a part is train,
val, test or the whole. `split_parts` splits it by class where the parts do not. CSV files name each
image's split and class themselves.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from imagefiles import is_image, nfc, read_text, unknown_formats
from utils import SPLITS, UserError

from .arrays import Pickles, Shards, file_names
from .manifest import MINI, TINY, Classes, Item, Manifest, is_numbers, read_split_file, split_parts
from .sources import ARCHIVES, SPLIT_NAMES, WNID, Source, natural, open_nested, some

KNOWN = (
    "train/val/test folders of class folders; images with train.csv, val.csv, test.csv; 100 class "
    "folders; mini-imagenet-cache-*.pkl; miniImageNet_category_split_*.pickle; *.parquet; "
    "ILSVRC-2012's train; Tiny-ImageNet-200; any class folders with --split"
)
_STRAY = 20  # more images than these beside pickles, shards or tars are a data set of their own
_RANKED = re.compile(r"(n\d{8})(\d{8})\.\w+")  # Ravi & Larochelle's names: class, number
_FILE_COLUMNS = {"filename", "file_name", "file", "image_name", "image", "path"}
_LABEL_COLUMNS = {"label", "class_name", "class", "class_id", "category", "wnid"}

Groups = dict[str, Classes]  # {folder above class folders: {class: [image, in natural order]}}
Tables = dict[str, tuple[str, bytes]]  # {split: (the CSV file's shown name, its content)}


def detect(source: Source, args: argparse.Namespace) -> Manifest:
    """Find the format of an open source; its manifest is not yet validated.

    Args:
        args: the flags csv, split, seed and class_names.

    Raises:
        UserError: it is in no known format, or has a fault.
    """
    hits = {
        what: {name: found for name in source.files if (found := re.fullmatch(p, _base(name)))}
        for what, (p, _) in ARRAYS.items()
    }
    hits = {what: matches for what, matches in hits.items() if matches}
    images = sum(map(is_image, source.files))
    if len(hits) > 1 or (hits and images > _STRAY):
        there = [*hits, *([f"{images} images"] if images > _STRAY else [])]
        raise source.error(f"holds {' and '.join(there)}: give the folder of one of them")
    if hits:
        ((what, matches),) = hits.items()
        manifest = _from_arrays(source, what, ARRAYS[what][1](source, matches, args), args)
    else:
        tables = _find_tables(source, args)
        source = _unpacked(source, args)
        manifest = _from_images(source, tables or _find_tables(source, args), args)
    for reason, names in source.skipped.items():
        manifest.notes.append(f"ignored: {reason}, {len(names)} ({some(names)})")
    return manifest


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _unpacked(source: Source, args: argparse.Namespace) -> Source:
    """The source itself, or the archives in it if it holds its images packed: a tar for each class,
    as ILSVRC-2012 has them, an archive for each split, or one archive.
    """
    packed = [name for name in source.files if name.lower().endswith(ARCHIVES)]
    stems = {name: _base(name).split(".")[0] for name in packed}
    splits = {name: SPLIT_NAMES.get(stem.lower(), "") for name, stem in stems.items()}
    if not packed or sum(map(is_image, source.files)) > _STRAY:
        return source
    if all(map(WNID.fullmatch, stems.values())):
        wanted = set(stems.values()) if args.split else set(MINI.split_of)
        return open_nested(source, {name: wnid for name, wnid in stems.items() if wnid in wanted})
    if len(packed) == 1 or (len(packed) == 3 and set(splits.values()) == set(SPLITS)):
        return open_nested(source, splits if packed[1:] else {packed[0]: ""})
    advice = "unpack them, or give the one that holds the images"
    raise source.error(f"holds {len(packed)} archives ({some(packed)}): {advice}")


# ---- Pickles and shards ----


def _pickles(source: Source, matches: dict[str, re.Match], _: argparse.Namespace) -> Pickles:
    splits = {name: match.group(match.lastindex) for name, match in matches.items()}
    if len(set(splits.values())) < len(splits):
        raise source.error(f"holds a split's pickle twice ({', '.join(splits)}): give one folder")
    return Pickles(source, splits)


def _shards(source: Source, matches: dict[str, re.Match], args: argparse.Namespace) -> Shards:
    names = None
    if args.class_names:
        names = [line.strip() for line in read_text(args.class_names).splitlines() if line.strip()]
    reader = Shards(source, matches, names)
    if not reader.named:
        sets = {frozenset(classes) for classes in reader.keys.values()}
        if not args.split and len(sets) < 3:
            raise source.error(
                "every class is in every shard and the labels are numbers without names: "
                "give the names, one a line, with --class-names FILE"
            )
        # without --split, numbers start from 0 again in each split
        reader.keys = {
            split: {f"{'class' if args.split else split}-{c}": k for c, k in classes.items()}
            for split, classes in reader.keys.items()
        }
    return reader


_CATEGORY = r"miniImageNet_category_split_(?:train_phase_(train)|(val|test))\.pickle"
ARRAYS = {  # what it is: the pattern of its files' names, and what opens it
    "mini-imagenet-cache pickles": (r"mini-imagenet-cache-(train|val|test)\.pkl", _pickles),
    "miniImageNet_category_split pickles": (_CATEGORY, _pickles),
    "Parquet shards": (r"(?i:.*\.parquet)", _shards),
}


def _from_arrays(
    source: Source, what: str, reader: Pickles | Shards, args: argparse.Namespace
) -> Manifest:
    split, suffix = split_parts(reader.keys, source, args), ".png" * isinstance(reader, Pickles)
    items = [
        Item(part, cls, name, key)
        for part, classes in split.classes.items()
        for cls, keys in classes.items()
        for name, key in zip(file_names(cls, keys, reader.files, suffix), keys, strict=True)
    ]
    notes = ["the labels are numbers without names: classes are called by number"]
    notes *= not reader.named
    return Manifest(f"{source.kind} with {what}, {split.how}", reader, items, notes)


# ---- Image files ----


def _by_folder(images: list[str]) -> Groups:
    """Group images by class folder; <class>/images/ (Tiny-ImageNet) counts as <class>/, and its
    val/images/ and test/images/, which are of no class, are left out. Names of Ravi & Larochelle's
    in one folder begin with their class.
    """
    named = [_RANKED.fullmatch(_base(name)) for name in images]
    if all(named) and len({name.rpartition("/")[0] for name in images}) == 1:
        classes: Classes = {}
        for name, match in zip(images, named, strict=True):
            classes.setdefault(match.group(1), []).append(name)
        return {".": classes}
    groups: Groups = {}
    for name in sorted(images, key=natural):
        folder = PurePosixPath(name).parent
        if folder.name == "images" and WNID.fullmatch(folder.parent.name):
            folder = folder.parent
        if folder.name and not (folder.name == "images" and folder.parent.name in SPLIT_NAMES):
            groups.setdefault(str(folder.parent), {}).setdefault(folder.name, []).append(name)
    return groups


def _from_images(source: Source, tables: Tables | None, args: argparse.Namespace) -> Manifest:
    images = [name for name in source.files if is_image(name)]
    others = [name for name in source.files if not is_image(name)]
    if not images:
        there = unknown_formats(others) or "no files"
        raise source.error(f"holds no images, but {there}; known formats: {KNOWN}")
    groups = _by_folder(images)
    parts = _layout(source, groups)
    if tables and not parts:
        manifest = _from_tables(source, groups, tables, args)
    else:
        manifest = from_parts(source, parts or _class_folders(source, groups, args), args)
    used = {item.key for item in manifest.items}
    if unused := [name for name in images if name not in used]:
        manifest.notes.append(f"not used: {len(unused)} other images ({some(unused)})")
    if others := [name for name in others if not name.lower().endswith((".csv", ".txt", ".json"))]:
        manifest.notes.append(f"left out: {unknown_formats(others)} ({some(others)})")
    return manifest


def from_parts(source: Source, parts: dict[str, Classes], args: argparse.Namespace) -> Manifest:
    split = split_parts(parts, source, args)
    items = [
        Item(part, cls, _base(name), name, source.files[name])
        for part, classes in split.classes.items()
        for cls, names in classes.items()
        for name in names
    ]
    if len({item.path for item in items}) < len(items):  # each part numbers its images anew
        for item in items:
            item.name = f"{PurePosixPath(item.key).parent.parent.name}-{item.name}"
    chosen = split.cut and split.known is MINI
    note = "these are NOT the published images: for those give CSV files with --csv DIR"
    found = f"{source.kind} of class folders, {split.how}"
    return Manifest(found, source, items, [note] * chosen, not chosen, split.known.folder)


def _refuse_empty(source: Source, parents: Iterable[str]) -> None:
    """Raise UserError if a folder beside class folders has no image anywhere below it."""
    images = filter(is_image, source.files)
    filled = {str(folder) for name in images for folder in PurePosixPath(name).parents}
    for folder in sorted(source.dirs - filled, key=natural):
        if str(PurePosixPath(folder).parent) in parents:
            raise source.error(f"class folder {folder} holds no image: fill it or remove it")


def _layout(source: Source, groups: Groups) -> dict[str, Classes] | None:
    """{train,val,test}/<class>/<image>, perhaps between more folders; None if it is not that.

    Two of the three folders are enough if both have the same classes."""
    layouts: dict[str, dict[str, Classes]] = {}
    used: dict[str, list[str]] = {}
    for parent, classes in groups.items():
        folders = parent.split("/")
        at = [n for n, folder in enumerate(folders) if folder.lower() in SPLIT_NAMES]
        if at:
            above, split = "/".join(folders[: at[0]]), SPLIT_NAMES[folders[at[-1]].lower()]
            used.setdefault(above, []).append(parent)
            part = layouts.setdefault(above, {}).setdefault(split, {})
            for cls, names in classes.items():
                part.setdefault(cls, []).extend(names)
    whole = {
        above: parts
        for above, parts in layouts.items()
        if len(parts) == 3 or (len(parts) == 2 and len(set(map(frozenset, parts.values()))) == 1)
    }
    if len(whole) > 1:
        raise source.error(f"holds {len(whole)} data sets ({some(whole)}): give one's folder")
    for above, parts in whole.items():
        _refuse_empty(source, used[above])
        return parts
    return None


def _class_folders(source: Source, groups: Groups, args: argparse.Namespace) -> dict[str, Classes]:
    """Class folders in one place, or in that place of several which has the classes asked for."""
    if not groups:
        advice = "make a folder for each class, or give --csv DIR"
        raise source.error(f"holds images, but neither class folders nor CSV files: {advice}")
    lists = [set(MINI.split_of), set(TINY.split_of)]
    if args.split:
        lists = [] if is_numbers(args.split) else [set(read_split_file(Path(args.split)))]
    for wanted in lists if len(groups) > 1 else ():
        fitting = {parent: classes for parent, classes in groups.items() if wanted <= set(classes)}
        if len(fitting) == 1:
            return {"all": next(iter(fitting.values()))}
    if len(groups) > 1:
        what = f"holds class folders in {len(groups)} places ({some(groups)})"
        raise source.error(f"{what}, which are not train, val and test: give one")
    ((parent, classes),) = groups.items()
    _refuse_empty(source, [parent])
    return {"all": classes}


# ---- CSV files ----


def _find_tables(source: Source, args: argparse.Namespace) -> Tables | None:
    """train.csv, val.csv and test.csv of --csv, inside of the source, or beside it; None if there
    are none.
    """
    names = [f"{split}.csv" for split in SPLITS]
    if not args.csv:
        folders = [PurePosixPath(name).parent for name in source.files if _base(name) == names[0]]
        inside = [{str(folder / name) for name in names} for folder in folders]
        inside = [tables for tables in inside if tables <= source.files.keys()]
        if len(inside) > 1:
            raise source.error(f"holds train.csv in {len(inside)} places: give --csv DIR")
        for tables in inside:
            read = source.stream(tables)
            return {_base(n)[:-4]: (f"{source.path}: {n}", file.read()) for n, file in read}
    beside = args.csv or source.path.absolute().parent
    lacking = [name for name in names if not (beside / name).is_file()]
    if args.csv and lacking:
        raise UserError(f"--csv {args.csv}: has no {' and no '.join(lacking)}")
    if lacking or (args.split and not args.csv):
        return None
    return {name[:-4]: (str(beside / name), (beside / name).read_bytes()) for name in names}


def _rows(tables: Tables) -> Iterator[tuple[str, str, str, str]]:
    """Yield (split, place of the line, file name, label). A header says which column is which;
    without one the file name comes first.
    """
    for split in SPLITS:
        shown, content = tables[split]
        try:
            lines = list(csv.reader(io.StringIO(nfc(content.decode("utf-8-sig"))), strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{shown}: is not a CSV file ({error})") from None
        head = [cell.strip().lower() for cell in lines[0]] if lines else []
        file = next((n for n, cell in enumerate(head) if cell in _FILE_COLUMNS), None)
        cls = next((n for n, cell in enumerate(head) if cell in _LABEL_COLUMNS), None)
        if file is None or cls is None:
            head, file, cls = [], 0, 1
        for number, line in enumerate(lines, 1):
            line = [cell.strip() for cell in line]
            if not any(line) or (number == 1 and head):
                continue
            where = f"{shown}: line {number}"
            if len(line) != (len(head) or 2) or not (line[file] and line[cls]):
                raise UserError(f"{where}: {','.join(line)[:80]!r} is not a file name and a label")
            name, label = line[file], line[cls]
            told = WNID.match(name)
            if told and WNID.fullmatch(label) and told.group() != label:
                raise UserError(f"{where}: wrong label {label} for {name}")
            yield split, where, _base(name), label


def _from_tables(
    source: Source, groups: Groups, tables: Tables, args: argparse.Namespace
) -> Manifest:
    """Images that CSV files name: in one folder, or in class folders as ILSVRC-2012 has them.

    A name of Ravi & Larochelle's is the class's WordNet id and a number of eight digits: the
    image's rank, from 1, in its class in the order of the numbers in ILSVRC's own names.
    yaoyao-liu/mini-imagenet-tools reads them so as well."""
    if args.split:
        raise UserError(f"--split: {source.path} has CSV files, which say it: leave the flag out")
    rows = list(_rows(tables))
    labels = {label for *_, label in rows}
    fitting = [classes for classes in groups.values() if labels <= set(classes)]
    classes = fitting[0] if len(fitting) == 1 else {}
    at: dict[str, list[str]] = {}
    for name in filter(is_image, source.files):
        at.setdefault(_base(name), []).append(name)
    items, faults, ranked = [], [], 0
    for split, where, name, label in rows:
        found, match = at.get(name, []), _RANKED.fullmatch(name)
        if len(found) > 1 and label in classes:
            found = [file for file in found if file in classes[label]]
        elif not found and match and match.group(1) == label:
            rank = int(match.group(2))
            found = classes.get(label, [])[rank - 1 : rank] if rank else []
            ranked += len(found)
        if len(found) == 1:
            items.append(Item(split, label, name, found[0], source.files[found[0]]))
        else:
            faults.append(f"{where}: {source.path} has {len(found) or 'no'} images {name}")
    if faults:
        more = f" (and {len(faults) - 1} more lines)" if faults[1:] else ""
        raise UserError(f"{faults[0]}{more}")
    note = f"{ranked} images were found by their rank in their class, as the CSV files number them"
    found = f"{source.kind} of images with train.csv, val.csv and test.csv"
    return Manifest(found, source, items, [note] * (ranked > 0))
