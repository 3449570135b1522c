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
from functools import partial
from pathlib import Path, PurePosixPath

from data.imagefiles import is_image, read_text, suffix, unknown_formats
from utils import SPLITS, UserError

from .arrays import Reader, read_pickle, read_shard, read_table, split_in_name, stream
from .build import Manifest
from .sources import ARCHIVES, SPLIT_NAMES, WNID, Source, natural, some, unpack
from .splits import MINI, TINY, Classes, is_numbers, read_split_file, split_parts

SHARDS = "Parquet shards"
ARRAYS = {  # what it is: the pattern of its files' names
    "mini-imagenet-cache pickles": r"mini-imagenet-cache-(train|val|test)\.pkl",
    "miniImageNet_category_split pickles": (
        r"miniImageNet_category_split_(?:train_phase_(train)|(val|test))\.pickle"
    ),
    SHARDS: r"(?i:.*\.parquet)",
}
_STRAY = 20  # more images than these beside pickles, shards or tars are a data set of their own
_RANKED = re.compile(r"(n\d{8})(\d{8})\.\w+")  # Ravi & Larochelle's names: class, number
_OMNIGLOT = re.compile(r"(?:.*/)?images_(?:background|evaluation)/([^/]+)/([^/]+)/[^/]+")
_FILE_COLUMNS = ("filename", "file_name", "file", "image_name", "image", "path")
_LABEL_COLUMNS = ("label", "class_name", "class", "class_id", "category", "wnid")

Tables = list[tuple[Path, Path]]  # of train.csv, val.csv and test.csv: (name for the user, path)


def detect(source: Source, args: argparse.Namespace, scratch: Path) -> Manifest:
    """Find the format of a source.

    Args:
        args: the flags csv, dest, link, split, and seed.
        scratch: a folder to unpack archives in the source into.

    Raises:
        UserError: it is in no known format, or has a fault.
    """
    hits = {
        what: matches
        for what, pattern in ARRAYS.items()
        if (matches := {n: m for n in source.files if (m := re.fullmatch(pattern, _base(n)))})
    }
    images = sum(map(is_image, source.files))
    there = [*hits, *[f"{images} images"] * (images > _STRAY)]
    if hits and len(there) > 1:
        raise source.error(f"holds {' and '.join(there)}: give the folder of one of them")
    if hits and args.csv:
        raise UserError(f"--csv {args.csv}: is for image files, not for {there[0]}: leave it out")
    if hits:
        ((what, matches),) = hits.items()
        read, parts, names, notes = _from_arrays(source, what, matches, args)
        files, read_images = [], partial(stream, read)
    else:
        what, tables = "image files", _find_tables(source, args)
        source = _unpacked(source, args, scratch)
        parts, names, notes = _from_images(source, tables or _find_tables(source, args), args)
        files, read_images = list(source.files), source.stream
    if args.link != "copy" and (hits or source.archive):
        raise UserError(f"--link {args.link}: only image files of a folder can be linked")
    splits, how, known, cut = split_parts(parts, source, args)
    usual = ".jpg" if what == SHARDS else ".png"
    items = {
        f"{split}/{cls}/{name}": key
        for split, classes in splits.items()
        for cls, keys in classes.items()
        for name, key in zip(_file_names(cls, keys, names, usual), keys, strict=True)
    }
    for name in (name for path in items for name in path.split("/", 2)[1:]):
        if (
            not re.fullmatch(r"[^.\x00-\x1f/\\][^\x00-\x1f/\\]*", name)
            or len(os.fsencode(name)) > 240
        ):
            raise source.error(f"{name[:80]!r} cannot be the name of a class or file")
    if len(used := set(items.values())) < len(items):
        twice = Counter(items.values()).most_common(1)[0][0]
        raise source.error(f"{twice} is listed twice")
    published = not (cut and known is MINI)
    if not published:
        notes.append("these are NOT the published images: for those give CSV files with --csv DIR")
    odd = [n for n in files if not (is_image(n) or suffix(n) in (".csv", ".txt", ".json"))]
    for left_out, those in (
        ("other images", [name for name in files if is_image(name) and name not in used]),
        (unknown_formats(odd).partition(" ")[2], odd),
        ("links, pipes and devices", source.skipped),
    ):
        if those:
            notes.append(f"left out: {len(those)} {left_out} ({some(those)})")
    dest, link = None if args.dest else known.folder, "move" if source.archive else args.link
    return Manifest(f"{what}, {how}", read_images, items, notes, published, dest, link)


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _file_names(cls: str, keys: list, names: dict, usual: str) -> list[str]:
    """A file name for each image of a class: its own, or a number where some have none or are
    equal, as in parts that number their images anew.
    """
    own = [names[key] if is_image(names[key]) else "" for key in keys]
    numbers = [f"{cls}_{rank:04d}{suffix(name) or usual}" for rank, name in enumerate(own)]
    return own if len(set(own)) == len(own) and all(own) else numbers


def _unpacked(source: Source, args: argparse.Namespace, scratch: Path) -> Source:
    """The source itself, or the archives in it if it holds its images packed: a tar for each class,
    as ILSVRC-2012 has them, an archive for each split, or one archive.
    """
    packed = [name for name in source.files if name.lower().endswith(ARCHIVES)]
    if not packed or sum(map(is_image, source.files)) > _STRAY:
        return source
    stems = {name: _base(name).split(".")[0] for name in packed}
    splits = sorted(SPLIT_NAMES.get(stem.lower(), "") for stem in stems.values())
    by_class = all(map(WNID.fullmatch, stems.values()))
    if len(packed) > 1 and not by_class and splits != sorted(SPLITS):
        advice = "unpack them, or give the one that holds the images"
        raise source.error(f"holds {len(packed)} archives ({some(packed)}): {advice}")
    if len({*stems.values()}) < len(stems):
        twice = Counter(stems.values()).most_common(1)[0][0]
        raise source.error(f"holds several archives of class {twice}: give the folder of one set")
    archives = {source.files[name]: stems[name] for name in packed if is_wanted(name, args)}
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
) -> tuple[Reader, dict[str, Classes], dict, list[str]]:
    """The reader, the table, the file names, and notes."""
    if what == SHARDS:
        read = partial(read_shard, source)
        splits = {name: split_in_name(name) for name in matches}
    else:
        read = partial(read_pickle, source)
        splits = {name: match[match.lastindex] for name, match in matches.items()}
        if len(set(splits.values())) < len(splits):
            there = ", ".join(splits)
            raise source.error(f"holds a split's pickle twice ({there}): give one folder")
    table, names = read_table(read, splits)
    sets, notes = set(map(frozenset, table.values())), []
    if any(isinstance(label, int) for labels in sets for label in labels):
        lack = "the labels are numbers without names"
        notes = [f"{lack}: classes are called by number"]
        if what == SHARDS and not args.split and len(sets) < len(SPLITS):
            advice = "split them with --split FILE or --split TRAIN/VAL/TEST"
            raise source.error(f"every class is in every shard and {lack}: {advice}")
    # numbers may start from 0 again in each pickle, and without --split in each shard
    whole = args.split and what == SHARDS
    parts = {
        split: {
            f"{'class' if whole else split}-{c:03d}" if isinstance(c, int) else c: keys
            for c, keys in sorted(classes.items(), key=str)
        }
        for split, classes in table.items()
    }
    return read, parts, names, notes


# ---- Image files ----


def _from_images(
    source: Source, tables: Tables, args: argparse.Namespace
) -> tuple[dict[str, Classes], dict[str, str], list[str]]:
    """The table of image files, the name of each, and notes."""
    images = sorted(filter(is_image, source.files), key=natural)
    if not images:
        there = unknown_formats(source.files) or "no files"
        raise source.error(f"holds no images, but {there}; data/README.md lists the formats")
    layouts, places = _by_folder(images)
    if len(layouts) > 1:
        raise source.error(f"holds {len(layouts)} data sets ({some(layouts)}): give one's folder")
    if args.csv and layouts:
        advice = "leave --csv out, or give the folder with all classes, such as train/"
        raise source.error(f"has splits of its own, beside --csv {args.csv}: {advice}")
    if tables and not layouts:
        return _from_tables(source, places, images, tables)
    parts = next(iter(layouts.values()), None) or {"all": _class_folders(source, places, args)}
    filled = {str(folder) for name in images for folder in PurePosixPath(name).parents}
    used = (name for of in parts.values() for names in of.values() for name in names)
    parents = {str(PurePosixPath(name).parent.parent) for name in used}
    for folder in sorted(source.dirs - filled, key=natural):
        if str(PurePosixPath(folder).parent) in parents:
            raise source.error(f"class folder {folder} holds no image: fill it or remove it")
    return parts, {name: _base(name) for name in images}, []


def _by_folder(images: list[str]) -> tuple[dict[str, dict[str, Classes]], dict[str, Classes]]:
    """Group images by class folder; <class>/images/ (Tiny-ImageNet) counts as <class>/, and its
    val/images/ and test/images/, which are of no class, are left out. Omniglot's classes are in
    folders of alphabets. Names of Ravi & Larochelle's in one folder begin with their class.

    Returns:
        {folder: {part: {class: [image]}}} of {train,val,test}/<class>/<image>, perhaps with more
        folders between; two parts are enough if both have the same classes. And {folder above
        class folders: {class: [image]}} of all images.
    """
    ranked = len({name.rpartition("/")[0] for name in images}) == 1
    ranked = ranked and all(_RANKED.fullmatch(_base(name)) for name in images)
    layouts: dict[str, dict[str, Classes]] = {}
    places: dict[str, Classes] = {}
    for name in images:
        folder = PurePosixPath(name).parent
        if folder.name == "images" and WNID.fullmatch(folder.parent.name):
            folder = folder.parent
        above, cls = folder.parent, folder.name
        if drawing := _OMNIGLOT.fullmatch(name):
            above, cls = PurePosixPath("omniglot"), "_".join(drawing.groups())
        elif ranked:
            cls = _base(name)[:9]
        if not cls or (cls == "images" and above.name in SPLIT_NAMES):
            continue
        places.setdefault(str(above), {}).setdefault(cls, []).append(name)
        if at := [n for n, part in enumerate(above.parts) if part.lower() in SPLIT_NAMES]:
            layout = layouts.setdefault("/".join(above.parts[: at[0]]), {})
            part = layout.setdefault(SPLIT_NAMES[above.parts[at[-1]].lower()], {})
            part.setdefault(cls, []).append(name)
    for folder, parts in list(layouts.items()):
        if len(parts) < 2 or (len(parts) == 2 and len(set(map(frozenset, parts.values()))) == 2):
            del layouts[folder]
    return layouts, places


def _class_folders(source: Source, places: dict[str, Classes], args: argparse.Namespace) -> Classes:
    """Class folders in one place, or in that place of several which has the classes asked for."""
    if not places:
        advice = "make a folder for each class, or give --csv DIR"
        raise source.error(f"holds images, but neither class folders nor CSV files: {advice}")
    lists = [MINI.split_of.keys(), TINY.split_of.keys()]
    if args.split:
        lists = [] if is_numbers(args.split) else [read_split_file(Path(args.split)).keys()]
    for wanted in lists:
        fitting = [classes for classes in places.values() if wanted <= classes.keys()]
        if len(fitting) == 1:
            return fitting[0]
    if len(places) > 1:
        what = f"holds class folders in {len(places)} places ({some(places)})"
        raise source.error(f"{what}, which are not train, val and test: give one")
    return next(iter(places.values()))


# ---- CSV files ----


def _find_tables(source: Source, args: argparse.Namespace) -> Tables:
    """train.csv, val.csv and test.csv of --csv, inside of the source, or beside it; [] if there
    are none.
    """
    names = [f"{split}.csv" for split in SPLITS]
    folder = args.csv or source.path.absolute().parent
    tables = [(folder / name, folder / name) for name in names]
    if not args.csv:
        at = [PurePosixPath(name).parent for name in source.files if _base(name) == names[0]]
        inside = [[str(folder / name) for name in names] for folder in at]
        inside = [paths for paths in inside if source.files.keys() >= {*paths}]
        if len(inside) > 1:
            raise source.error(f"holds train.csv in {len(inside)} places: give --csv DIR")
        if inside:
            return [(source.path / name, source.files[name]) for name in inside[0]]
        if args.split:
            return []
    lacking = [path.name for _, path in tables if not path.is_file()]
    if args.csv and lacking:
        raise UserError(f"--csv {args.csv}: has no {' and no '.join(lacking)}")
    return [] if lacking else tables


def _rows(tables: Tables) -> Iterator[tuple[str, str, str, str]]:
    """Yield (split, place of the line, file name, label)."""
    for shown, path in tables:
        try:
            lines = csv.DictReader(io.StringIO(read_text(path)), strict=True)
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
            yield path.stem, where, _base(name), cls


def _from_tables(
    source: Source, places: dict[str, Classes], images: list[str], tables: Tables
) -> tuple[dict[str, Classes], dict[str, str], list[str]]:
    """Images that CSV files name: in one folder, or in class folders as ILSVRC-2012 has them.

    A name of Ravi & Larochelle's is the class's WordNet id and a number of eight digits: the
    image's rank, from 1, in its class in the order of the numbers in ILSVRC's own names.
    yaoyao-liu/mini-imagenet-tools reads them so as well."""
    rows = list(_rows(tables))
    labels = {label for *_, label in rows}
    fitting = [classes for classes in places.values() if labels <= set(classes)]
    classes = fitting[0] if len(fitting) == 1 else {}
    by_rank = not any(_RANKED.fullmatch(_base(name)) for name in images)
    at: dict[str, list[str]] = {}
    for name in images:
        at.setdefault(_base(name), []).append(name)
    parts: dict[str, Classes] = {split: {} for split in SPLITS}
    names, faults, ranked = {}, [], set()
    for split, where, name, label in rows:
        found, match = at.get(name, []), _RANKED.fullmatch(name)
        if len(found) > 1 and label in classes:
            found = [file for file in found if file in classes[label]]
        elif not found and by_rank and match and match.group(1) == label:
            rank = int(match.group(2))
            ranked.add(len(classes.get(label, [])))
            found = classes.get(label, [])[rank - 1 : rank] if rank else []
        if len(found) == 1:
            parts[split].setdefault(label, []).append(found[0])
            names[found[0]] = name if is_image(name) else _base(found[0])
        else:
            faults.append(f"{where}: {source.path} has {len(found) or 'no'} images {name}")
    if faults:
        raise UserError(f"{faults[0]}{f' (and {len(faults) - 1} more lines)' * bool(faults[1:])}")
    if not ranked:
        return parts, names, []
    note = "images are found by their rank in their class, so folders must be ILSVRC-2012's, whole"
    note += f" (732 to 1,300 images each); here they have {min(ranked)} to {max(ranked)}"
    return parts, names, [note]
