"""Images inside of pickles and Parquet shards.

Each reader has
    what: what it reads, in words
    rows: {split: {class: [key of each image]}}
    stream(wanted): yields (key, image) for the keys in `wanted`; an image is a uint8 array [H, W, 3] or a file's bytes
"""

import contextlib
import itertools
import json
import re
import shutil
import tempfile
from pathlib import Path, PurePosixPath

import numpy as np
import unpickle
from sources import DataError, is_image, natural

CACHE = re.compile(r"mini-imagenet-cache-(train|val|test)\.pkl")
CATEGORY = re.compile(r"miniImageNet_category_split_(train_phase_train|val|test)\.pickle")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
WNID = re.compile(r"n\d{8}")


@contextlib.contextmanager
def _opened(file):
    if isinstance(file, Path):
        with file.open("rb") as opened:
            yield opened
    else:
        yield file


class _Pickles:
    def __init__(self, source, parts):
        """
        Args:
            source: of `sources.open_source`.
            parts: {split: the name of its pickle in `source`}

        Raises:
            DataError: a pickle is refused, or its images and labels do not fit together.
        """
        self._source, self._parts = source, parts
        self.rows = {}
        for split, images, classes in self._loaded(parts):
            del images  # before the next one is loaded
            self.rows[split] = {cls: [(split, int(row)) for row in rows] for cls, rows in classes.items()}

    def _loaded(self, splits):
        """Yield (split, images uint8 [N, H, W, 3], {class: rows}), one pickle in memory at a time."""
        split_of = {name: split for split, name in self._parts.items() if split in splits}
        for name, file in self._source.stream(set(split_of)):
            shown = f"{self._source.path}: {name}"
            with _opened(file) as opened:
                data = unpickle.as_dict(unpickle.load(opened, shown), shown)
            yield split_of[name], *self._read(data, split_of[name], shown)
            del data

    def _images(self, data, key, shown):
        if key not in data:
            raise DataError(f"{shown}: has no {key!r}, only {', '.join(map(repr, list(data)[:6])) or 'nothing'}")
        images = unpickle.as_array(data[key], f"{shown}: {key}")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
            raise DataError(
                f"{shown}: {key} is {images.dtype} {list(images.shape)}, not uint8 [images, height, width, 3]"
            )
        return images

    def stream(self, wanted):
        for split, images, _ in self._loaded({split for split, _ in wanted}):
            for row in sorted(row for part, row in wanted if part == split):
                yield (split, row), images[row].copy()  # a view would keep all of them in memory
            del images


class CachePickles(_Pickles):
    """image_data uint8 [N, 84, 84, 3] and class_dict name -> indices."""

    what = "mini-imagenet-cache pickles"

    def _read(self, data, split, shown):
        images = self._images(data, "image_data", shown)
        classes, owner = {}, {}
        for cls, rows in unpickle.as_dict(data.get("class_dict"), f"{shown}: class_dict").items():
            rows = unpickle.as_array(rows, f"{shown}: class_dict[{cls!r}]").ravel()
            if rows.size == 0:
                raise DataError(f"{shown}: class {cls} has no images")
            if rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= len(images):
                raise DataError(f"{shown}: class {cls} has an index outside of the {len(images)} images: wrong labels")
            classes[str(cls)] = rows
            for row in rows.tolist():
                if owner.setdefault(row, cls) is not cls or len(set(rows.tolist())) != rows.size:
                    raise DataError(
                        f"{shown}: image {row} stands in class {owner[row]} and again in {cls}: wrong labels"
                    )
        if len(owner) != len(images):
            raise DataError(
                f"{shown}: {len(images) - len(owner)} of {len(images)} images belong to no class: wrong labels"
            )
        return images, classes


class CategoryPickles(_Pickles):
    """data uint8 [N, 84, 84, 3] and labels [N], numbers or names."""

    what = "miniImageNet_category_split pickles"

    def _read(self, data, split, shown):
        images = self._images(data, "data", shown)
        if "labels" not in data:
            raise DataError(f"{shown}: has no 'labels'")
        labels = unpickle.as_array(data["labels"], f"{shown}: labels").ravel()
        if len(labels) != len(images):
            raise DataError(f"{shown}: has {len(images)} images, but {len(labels)} labels")
        if labels.dtype.kind not in "iuU" or (labels.dtype.kind == "i" and labels.min() < 0):
            raise DataError(f"{shown}: its labels are neither class numbers nor class names")
        names = unpickle.as_dict(data.get("catname2label", {}), f"{shown}: catname2label")
        names = {label: str(name) for name, label in names.items() if isinstance(label, int)}
        classes = {}
        order = np.argsort(labels, kind="stable")
        for rows in np.split(order, np.flatnonzero(labels[order][1:] != labels[order][:-1]) + 1):
            label = labels[rows[0]].item()
            # numbers may start from 0 again in each file: the split's name keeps them apart
            name = label if isinstance(label, str) else names.get(label, f"{split}-{label:03d}")
            if name in classes:
                raise DataError(f"{shown}: two labels are called {name}")
            classes[name] = rows
        return images, classes


def _split_of(name):
    """The split that a shard's name or its folders' names tell, the nearest first; None if they tell none."""
    path = PurePosixPath(name.lower())
    for part in (path.name, *reversed(path.parts[:-1])):
        for token in re.split(r"[^a-z]+", part):
            if token in SPLIT_NAMES:
                return SPLIT_NAMES[token]
    return None


class Shards:
    """Parquet shards of an image column {bytes, path} and a label, a number or a class name."""

    what = "Parquet shards"

    def __init__(self, source, names, class_names=None):
        """
        Args:
            source: of `sources.open_source`.
            names: the shards' names in it.
            class_names: list of the names of labels 0, 1, ..., or None to find them in the shards.

        Raises:
            DataError: pyarrow is missing, a shard is damaged, a column is missing or a label is wrong.
        """
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise DataError(
                f"{source.path}: Parquet files need pyarrow: pip install pyarrow (or -r requirements-data.txt)"
            ) from None
        self._arrow, self._source = pyarrow, source
        self.named = True
        self._class_names = class_names
        self.file_names = {}  # key -> the file's name in its path column
        labels = {}
        for name, shard in self._shards(names):
            image, label = self._columns(name, shard)
            split = _split_of(name) or "train"
            rows = itertools.chain.from_iterable(self._batches(name, shard, 4096, [f"{image}.path", label]))
            for number, row in enumerate(rows):
                key = (name, number)
                cls = self._class(row[label], name, number)
                labels.setdefault((split, name), {}).setdefault(cls, []).append(key)
                if path := (row.get(image) or {}).get("path"):
                    self.file_names[key] = PurePosixPath(path.replace("\\", "/")).name
        self.rows = {}
        for (split, _), classes in labels.items():
            for cls, keys in classes.items():
                self.rows.setdefault(split, {}).setdefault(cls, []).extend(keys)
        self._name_numbers()

    def _shards(self, names):
        """Yield (name, ParquetFile)."""
        for name, file in self._source.stream(set(names)):
            with contextlib.ExitStack() as stack:
                if not isinstance(file, Path):  # Parquet is read from its end: unpack this one shard
                    unpacked = stack.enter_context(tempfile.TemporaryFile())
                    shutil.copyfileobj(file, unpacked)
                    file = unpacked
                try:
                    yield name, stack.enter_context(self._arrow.parquet.ParquetFile(file))
                except (self._arrow.ArrowException, OSError, ValueError) as error:
                    if isinstance(error, OSError) and error.errno is not None:
                        raise
                    raise self._damaged(name, error) from None

    def _batches(self, name, shard, rows, columns):
        """Yield a shard's columns, so many rows at a time, as lists of dicts."""
        try:
            yield from (table.to_pylist() for table in shard.iter_batches(rows, columns=columns))
        except (self._arrow.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise self._damaged(name, error) from None

    def _damaged(self, name, error):
        what = str(error).splitlines()[0][:150]
        return DataError(f"{self._source.path}: {name}: truncated or damaged Parquet file ({what}): get another copy")

    def _columns(self, name, shard):
        """The names of the image and of the label column; class names out of the shard's metadata."""
        arrow, schema = self._arrow, shard.schema_arrow
        images = [f.name for f in schema if arrow.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
        labels = [
            f.name
            for f in schema
            if arrow.types.is_integer(f.type)
            or arrow.types.is_string(f.type)
            or arrow.types.is_large_string(f.type)
            or arrow.types.is_dictionary(f.type)
        ]
        label = next((n for n in ("label", "labels", "class", "fine_label", "target") if n in labels), None)
        label = label or (labels[0] if len(labels) == 1 else None)
        if not images or label is None:
            raise DataError(
                f"{self._source.path}: {name}: needs a column of images {{bytes, path}} and one of labels; "
                f"its columns are {', '.join(f'{f.name} ({str(f.type)[:40]})' for f in schema)}"
            )
        if self._class_names is None:
            with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError):
                features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
                names = features[label]["names"]
                if isinstance(names, list) and names:
                    self._class_names = list(map(str, names))
        return images[0] if "image" not in images else "image", label

    def _class(self, value, name, row):
        if isinstance(value, str):
            return value
        known = self._class_names
        if not isinstance(value, int) or value < 0 or (known and value >= len(known)):
            classes = f" of {len(known)} classes" if known else ""
            raise DataError(f"{self._source.path}: {name}: row {row}: wrong label {value!r}{classes}")
        return known[value] if known else value

    def _name_numbers(self):
        """Labels that are numbers without names: take the WordNet id that the paths of a label's images share."""
        numbers = sorted({cls for classes in self.rows.values() for cls in classes if isinstance(cls, int)})
        if not numbers:
            return
        wnids = {}
        for split, classes in self.rows.items():
            for cls, keys in classes.items():
                found = {WNID.match(self.file_names.get(key, "")) for key in keys}
                found = {match and match.group() for match in found}
                wnids[split, cls] = found.pop() if len(found) == 1 else None
        self.named = all(wnids.values())
        for split, classes in self.rows.items():
            self.rows[split] = {}
            for cls, keys in sorted(classes.items()):
                new = wnids[split, cls] if self.named else cls
                self.rows[split].setdefault(new, []).extend(keys)

    def target(self, key, cls, rank):
        """A file name for an image: that of its path, or a number; without a suffix where only the bytes will tell."""
        name = self.file_names.get(key, "")
        return name if is_image(name) else f"{cls}_{rank:04d}"

    def stream(self, wanted):
        for name, shard in self._shards(sorted({name for name, _ in wanted}, key=natural)):
            image, _ = self._columns(name, shard)
            rows = itertools.chain.from_iterable(self._batches(name, shard, 64, [f"{image}.bytes"]))
            for number, row in enumerate(rows):
                if (name, number) in wanted:
                    content = (row[image] or {}).get("bytes")
                    if not content:
                        raise DataError(f"{self._source.path}: {name}: row {number} has no image")
                    yield (name, number), content
