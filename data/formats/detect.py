"""Finds the format of a source and makes its manifest.

Every format comes down to one table, {part: {class: [key of each image]}}, where a part is train,
val, test or the whole. `split_parts` splits it by class where the parts do not.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from imagefiles import is_image, nfc, read_text, suffix, unknown_formats
from utils import SPLITS, UserError

from .arrays import Pickles, Shards, read_table, split_in_name
from .build import Manifest
from .sources import ARCHIVES, SPLIT_NAMES, WNID, Source, natural, some, unpack
from .splits import MINI, TINY, Classes, is_numbers, read_split_file, split_parts

_STRAY = 20  # more images than these beside pickles, shards or tars are a data set of their own
_RANKED = re.compile(r"(n\d{8})(\d{8})\.\w+")  # Ravi & Larochelle's names: class, number
_OMNIGLOT = re.compile(r"(?:.*/)?images_(?:background|evaluation)/([^/]+)/([^/]+)/[^/]+")
_FILE_COLUMNS = ("filename", "file_name", "file", "image_name", "image", "path")
_LABEL_COLUMNS = ("label", "class_name", "class", "class_id", "category", "wnid")

Groups = dict[str, Classes]  # {folder above class folders: {class: [image, in natural order]}}
Tables = dict[str, tuple[str, bytes]]  # {split: (the CSV file's shown name, its content)}


def detect(source: Source, args: argparse.Namespace, scratch: Path) -> Manifest:
    """Find the format of a source.

    Args:
        args: the flags csv, dest, link, split, seed and class_names.
        scratch: a folder to unpack archives in the source into.

    Raises:
        UserError: it is in no known format, or has a fault.
    """
    hits = {
        what: {name: found for name in source.files if (found := re.fullmatch(p, _base(name)))}
        for what, p in ARRAYS.items()
    }
    hits = {what: matches for what, matches in hits.items() if matches}
    images = sum(map(is_image, source.files))
    if len(hits) > 1 or (hits and images > _STRAY):
        there = [*hits, *([f"{images} images"] if images > _STRAY else [])]
        raise source.error(f"holds {' and '.join(there)}: give the folder of one of them")
    notes, what = [], "image files"
    if hits:
        ((what, matches),) = hits.items()
        reader, parts, names, notes = _from_arrays(source, what, matches, args)
    else:
        tables = _find_tables(source, args)
        source = reader = _unpacked(source, args, scratch)
        parts, names = _from_images(source, tables or _find_tables(source, args), args)
    if args.link != "copy" and (hits or source.archive):
        raise UserError(f"--link {args.link}: only image files of a folder can be linked")
    splits, how, known, cut = split_parts(parts, source, args)
    items = {
        f"{split}/{cls}/{name}": key
        for split, classes in splits.items()
        for cls, keys in classes.items()
        for name, key in zip(_file_names(cls, keys, names, reader.suffix), keys, strict=True)
    }
    for path in items:
        for name in path.split("/", 2)[1:]:
            odd = name.startswith(".") or any(ord(c) < 32 or c in "/\\" for c in name)
            if odd or not 0 < len(os.fsencode(name)) <= 240:
                raise source.error(f"{name[:80]!r} cannot be the name of a class or file")
    if len(used := set(items.values())) < len(items):
        twice = Counter(items.values()).most_common(1)[0][0]
        raise source.error(f"{twice} is listed twice")
    published = not (cut and known is MINI)
    if not published:
        notes.append("these are NOT the published images: for those give CSV files with --csv DIR")
    files = [] if hits else list(source.files)
    odd = [name for name in files if not is_image(name)]
    odd = [name for name in odd if not name.lower().endswith((".csv", ".txt", ".json"))]
    for left_out, those in (
        ("other images", [name for name in files if is_image(name) and name not in used]),
        (unknown_formats(odd).partition(" ")[2], odd),
        ("links, pipes and devices", source.skipped),
    ):
        if those:
            notes.append(f"left out: {len(those)} {left_out} ({some(those)})")
    dest = None if args.dest else known.folder
    return Manifest(f"{what}, {how}", reader, items, notes, published, dest)


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _file_names(cls: str, keys: list, names: dict, usual: str) -> list[str]:
    """A file name for each image of a class: its own, or a number where some have none or are
    equal, as in parts that number their images anew.
    """
    own = [names.get(key, "") for key in keys]
    own = [name if is_image(name) else "" for name in own]
    numbers = [f"{cls}_{rank:04d}{suffix(name) or usual}" for rank, name in enumerate(own)]
    return own if len(set(own)) == len(own) and all(own) else numbers


def _unpacked(source: Source, args: argparse.Namespace, scratch: Path) -> Source:
    """The source itself, or the archives in it if it holds its images packed: a tar for each class,
    as ILSVRC-2012 has them, an archive for each split, or one archive.
    """
    packed = [name for name in source.files if name.lower().endswith(ARCHIVES)]
    stems = {name: _base(name).split(".")[0] for name in packed}
    splits = {SPLIT_NAMES.get(stem.lower()) for stem in stems.values()}
    if not packed or sum(map(is_image, source.files)) > _STRAY:
        return source
    if all(map(WNID.fullmatch, stems.values())):
        packed = [name for name in packed if is_wanted(name, args)]
    elif len(packed) > 1 and (len(packed) != 3 or splits != set(SPLITS)):
        advice = "unpack them, or give the one that holds the images"
        raise source.error(f"holds {len(packed)} archives ({some(packed)}): {advice}")
    archives = {source.open_path(name): stems[name] for name in packed}
    return unpack(source.path, archives, scratch / "inner")


def is_wanted(name: str, args: argparse.Namespace) -> bool:
    """Whether to unpack a file of this name: not if it is the archive of a class of ILSVRC-2012
    that mini-ImageNet does not have.
    """
    found = re.fullmatch(r"(n\d{8})\.tar", _base(name))
    return bool(args.split) or not found or found.group(1) in MINI.split_of


# ---- Pickles and shards ----


def _from_arrays(
    source: Source, what: str, matches: dict[str, re.Match], args: argparse.Namespace
) -> tuple[Pickles | Shards, dict[str, Classes], dict, list[str]]:
    """The reader, the table, the known file names, and notes."""
    reader: Pickles | Shards
    if what == "Parquet shards":
        text = read_text(args.class_names) if args.class_names else ""
        class_names = [line.strip() for line in text.splitlines() if line.strip()]
        reader, splits = Shards(source, class_names or None), {n: split_in_name(n) for n in matches}
    else:
        reader, splits = Pickles(source), {n: m.group(m.lastindex) for n, m in matches.items()}
        if len(set(splits.values())) < len(splits):
            there = ", ".join(splits)
            raise source.error(f"holds a split's pickle twice ({there}): give one folder")
    table, names = read_table(reader, splits)
    sets, note = set(map(frozenset, table.values())), []
    if any(isinstance(label, int) for labels in sets for label in labels):
        note = ["the labels are numbers without names: classes are called by number"]
        if isinstance(reader, Shards) and not args.split and len(sets) < len(SPLITS):
            raise source.error(
                "every class is in every shard and the labels are numbers without names: "
                "give the names, one a line, with --class-names FILE"
            )
    # numbers may start from 0 again in each pickle, and without --split in each shard
    whole = args.split and isinstance(reader, Shards)
    parts = {
        split: {
            f"{'class' if whole else split}-{c:03d}" if isinstance(c, int) else c: keys
            for c, keys in sorted(classes.items(), key=str)
        }
        for split, classes in table.items()
    }
    return reader, parts, names, note


_CATEGORY = r"miniImageNet_category_split_(?:train_phase_(train)|(val|test))\.pickle"
ARRAYS = {  # what it is: the pattern of its files' names
    "mini-imagenet-cache pickles": r"mini-imagenet-cache-(train|val|test)\.pkl",
    "miniImageNet_category_split pickles": _CATEGORY,
    "Parquet shards": r"(?i:.*\.parquet)",
}


# ---- Image files ----


def _from_images(
    source: Source, tables: Tables | None, args: argparse.Namespace
) -> tuple[dict[str, Classes], dict[str, str]]:
    """The table of image files, and the name of each."""
    images = sorted(filter(is_image, source.files), key=natural)
    if not images:
        there = unknown_formats(source.files) or "no files"
        raise source.error(f"holds no images, but {there}; data/README.md lists the formats")
    groups = _by_folder(images)
    parts = _layout(source, groups)
    if tables and not parts:
        return _from_tables(source, groups, images, tables)
    parts = parts or _class_folders(source, groups, args)
    filled = {str(folder) for name in images for folder in PurePosixPath(name).parents}
    used = (name for of in parts.values() for names in of.values() for name in names)
    parents = {str(PurePosixPath(name).parent.parent) for name in used}
    for folder in sorted(source.dirs - filled, key=natural):
        if str(PurePosixPath(folder).parent) in parents:
            raise source.error(f"class folder {folder} holds no image: fill it or remove it")
    return parts, {name: _base(name) for name in images}


def _by_folder(images: list[str]) -> Groups:
    """Group images by class folder; <class>/images/ (Tiny-ImageNet) counts as <class>/, and its
    val/images/ and test/images/, which are of no class, are left out. Omniglot's classes are in
    folders of alphabets. Names of Ravi & Larochelle's in one folder begin with their class.
    """
    ranked = len({name.rpartition("/")[0] for name in images}) == 1
    ranked = ranked and all(_RANKED.fullmatch(_base(name)) for name in images)
    groups: Groups = {}
    for name in images:
        folder = PurePosixPath(name).parent
        if folder.name == "images" and WNID.fullmatch(folder.parent.name):
            folder = folder.parent
        above, cls = str(folder.parent), folder.name
        if drawing := _OMNIGLOT.fullmatch(name):
            above, cls = "omniglot", "_".join(drawing.groups())
        elif ranked:
            cls = _base(name)[:9]
        if cls and not (cls == "images" and folder.parent.name in SPLIT_NAMES):
            groups.setdefault(above, {}).setdefault(cls, []).append(name)
    return groups


def _layout(source: Source, groups: Groups) -> dict[str, Classes] | None:
    """{train,val,test}/<class>/<image>, perhaps between more folders; None if it is not that.

    Two of the three folders are enough if both have the same classes."""
    layouts: dict[str, dict[str, Classes]] = {}
    for parent, classes in groups.items():
        folders = parent.split("/")
        at = [n for n, folder in enumerate(folders) if folder.lower() in SPLIT_NAMES]
        if at:
            above, split = "/".join(folders[: at[0]]), SPLIT_NAMES[folders[at[-1]].lower()]
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
    return next(iter(whole.values()), None)


def _class_folders(source: Source, groups: Groups, args: argparse.Namespace) -> dict[str, Classes]:
    """Class folders in one place, or in that place of several which has the classes asked for."""
    if not groups:
        advice = "make a folder for each class, or give --csv DIR"
        raise source.error(f"holds images, but neither class folders nor CSV files: {advice}")
    lists = [MINI.split_of.keys(), TINY.split_of.keys()]
    if args.split:
        lists = [] if is_numbers(args.split) else [read_split_file(Path(args.split)).keys()]
    for wanted in lists:
        fitting = [classes for classes in groups.values() if wanted <= classes.keys()]
        if len(fitting) == 1:
            return {"all": fitting[0]}
    if len(groups) > 1:
        what = f"holds class folders in {len(groups)} places ({some(groups)})"
        raise source.error(f"{what}, which are not train, val and test: give one")
    return {"all": next(iter(groups.values()))}


# ---- CSV files ----


def _find_tables(source: Source, args: argparse.Namespace) -> Tables | None:
    """train.csv, val.csv and test.csv of --csv, inside of the source, or beside it; None if there
    are none.
    """
    names = [f"{split}.csv" for split in SPLITS]
    folder = args.csv or source.path.absolute().parent
    paths = {str(folder / name): folder / name for name in names}
    if not args.csv:
        inside = [PurePosixPath(name).parent for name in source.files if _base(name) == names[0]]
        inside = [{str(at / name) for name in names} for at in inside]
        inside = [tables for tables in inside if tables <= source.files.keys()]
        if len(inside) > 1:
            raise source.error(f"holds train.csv in {len(inside)} places: give --csv DIR")
        if inside:
            paths = {str(source.path / name): source.open_path(name) for name in inside[0]}
        elif args.split:
            return None
    lacking = [path.name for path in paths.values() if not path.is_file()]
    if args.csv and lacking:
        raise UserError(f"--csv {args.csv}: has no {' and no '.join(lacking)}")
    read = {path.stem: (shown, path) for shown, path in paths.items()}
    return None if lacking else {n: (shown, path.read_bytes()) for n, (shown, path) in read.items()}


def _rows(tables: Tables) -> Iterator[tuple[str, str, str, str]]:
    """Yield (split, place of the line, file name, label)."""
    for split in SPLITS:
        shown, content = tables[split]
        try:
            text = io.StringIO(nfc(content.decode("utf-8-sig")))
            lines = csv.DictReader(text, strict=True)
            columns = {name.strip().lower(): name for name in lines.fieldnames or ()}
            rows = [(f"{shown}: line {lines.line_num}", row) for row in lines]
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{shown}: is not a CSV file ({error})") from None
        file = next((columns[name] for name in _FILE_COLUMNS if name in columns), "")
        label = next((columns[name] for name in _LABEL_COLUMNS if name in columns), "")
        if not (file and label):
            raise UserError(f"{shown}: needs columns filename and label, but has {list(columns)}")
        for where, row in rows:
            name, cls = (row[file] or "").strip(), (row[label] or "").strip()
            if None in row or None in row.values() or not (name and cls):
                raise UserError(f"{where}: {str(row)[:80]} is not a file name and a label")
            told = WNID.match(name)
            if told and WNID.fullmatch(cls) and told.group() != cls:
                raise UserError(f"{where}: wrong label {cls} for {name}")
            yield split, where, _base(name), cls


def _from_tables(
    source: Source, groups: Groups, images: list[str], tables: Tables
) -> tuple[dict[str, Classes], dict[str, str]]:
    """Images that CSV files name: in one folder, or in class folders as ILSVRC-2012 has them.

    A name of Ravi & Larochelle's is the class's WordNet id and a number of eight digits: the
    image's rank, from 1, in its class in the order of the numbers in ILSVRC's own names.
    yaoyao-liu/mini-imagenet-tools reads them so as well."""
    rows = list(_rows(tables))
    labels = {label for *_, label in rows}
    fitting = [classes for classes in groups.values() if labels <= set(classes)]
    classes = fitting[0] if len(fitting) == 1 else {}
    by_rank = not any(_RANKED.fullmatch(_base(name)) for name in images)
    at: dict[str, list[str]] = {}
    for name in images:
        at.setdefault(_base(name), []).append(name)
    parts: dict[str, Classes] = {split: {} for split in SPLITS}
    names, faults = {}, []
    for split, where, name, label in rows:
        found, match = at.get(name, []), _RANKED.fullmatch(name)
        if len(found) > 1 and label in classes:
            found = [file for file in found if file in classes[label]]
        elif not found and by_rank and match and match.group(1) == label:
            rank = int(match.group(2))
            found = classes.get(label, [])[rank - 1 : rank] if rank else []
        if len(found) == 1:
            parts[split].setdefault(label, []).append(found[0])
            names[found[0]] = name if is_image(name) else _base(found[0])
        else:
            faults.append(f"{where}: {source.path} has {len(found) or 'no'} images {name}")
    if faults:
        raise UserError(f"{faults[0]}{f' (and {len(faults) - 1} more lines)' * bool(faults[1:])}")
    return parts, names
