"""Images in pickles and Parquet shards."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from utils import UserError, pip_install

from . import safe_pickle
from .sources import SPLIT_NAMES, WNID, Folder, Source, is_image

# one of the names of a split's pickle; the last group that matches is the split
PICKLE = re.compile(
    r"mini-imagenet-cache-(train|val|test)\.pkl|"
    r"miniImageNet_category_split_(?:train_phase_(train)|(val|test))\.pickle"
)
Key = tuple[str, int]  # an image: (pickle or shard, row)
Keys = dict[str, dict[str, list[Key]]]  # {split: {class: keys}}


class Pickles:
    """One pickle for each split, with one of these contents:

    image_data uint8 [N, H, W, 3] and class_dict {class: indices};
    data uint8 [N, H, W, 3] and labels [N], numbers or names.

    Args:
        source: where the pickles are.
        names: {the pickle's name in ``source``: split}.

    Attributes:
        keys: {split: {class: [key of each image]}}.

    Raises:
        UserError: a pickle is refused, or its images and labels do not fit together.
    """

    def __init__(self, source: Source, names: dict[str, str]):
        self._source = source
        self.keys: Keys = {}
        for name, images, data in self._load(set(names)):
            shown, count = f"{source.path}: {name}", len(images)
            del images  # before the next one is loaded
            classes = self.keys.setdefault(names[name], {})
            for row, cls in enumerate(_classes(data, names[name], count, shown)):
                classes.setdefault(cls, []).append((name, row))

    def _load(self, names: set[str]) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
        """Yield (name, images uint8 [N, H, W, 3], the rest) with one pickle in memory at a time."""
        for name, file in self._source.stream(names):
            shown = f"{self._source.path}: {name}"
            data = safe_pickle.load(file, shown)
            key = next((key for key in ("image_data", "data") if key in data), None)
            if key is None:
                raise UserError(f"{shown}: has neither 'image_data' nor 'data'")
            images = safe_pickle.as_array(data.pop(key), f"{shown}: {key}")
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
                is_now = f"{images.dtype} {list(images.shape)}"
                raise UserError(f"{shown}: {key} is {is_now}, not uint8 [images, height, width, 3]")
            if 0 in images.shape:
                raise UserError(f"{shown}: {key} is empty")
            yield name, images, data
            del data, images

    def stream(self, wanted: set[Key]) -> Iterator[tuple[Key, np.ndarray]]:
        """Yield (key, image uint8 [H, W, 3]) of the wanted keys."""
        for name, images, _ in self._load({name for name, _ in wanted}):
            for row in sorted(row for key, row in wanted if key == name):
                yield (name, row), images[row].copy()  # a view would keep all of them in memory
            del images


def _classes(data: dict[str, Any], split: str, count: int, shown: str) -> list[str]:
    """The class of each of a pickle's ``count`` images."""
    if "labels" in data:
        labels = safe_pickle.as_array(data["labels"], f"{shown}: labels").ravel()
        if len(labels) != count:
            raise UserError(f"{shown}: has {count} images, but {len(labels)} labels")
        if labels.dtype.kind not in "iuU" or (labels.dtype.kind == "i" and labels.min() < 0):
            raise UserError(f"{shown}: its labels are neither class numbers nor class names")
        names = safe_pickle.as_dict(data.get("catname2label", {}), f"{shown}: catname2label")
        names = {label: str(name) for name, label in names.items() if isinstance(label, int)}
        # numbers may start from 0 again in each file: the split's name keeps them apart
        return [
            label if isinstance(label, str) else names.get(label, f"{split}-{label:03d}")
            for label in labels.tolist()
        ]
    classes: list[str | None] = [None] * count
    for cls, rows in safe_pickle.as_dict(data.get("class_dict"), f"{shown}: class_dict").items():
        rows = safe_pickle.as_array(rows, f"{shown}: class_dict[{cls!r}]").ravel()
        if rows.size == 0:
            raise UserError(f"{shown}: class {cls} has no images")
        if rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= count:
            raise UserError(f"{shown}: class {cls} has an index outside of the {count} images")
        for row in rows.tolist():
            if classes[row] is not None:
                both = f"is in class {classes[row]} and again in {cls}"
                raise UserError(f"{shown}: image {row} {both}: wrong labels")
            classes[row] = str(cls)
    if None in classes:
        raise UserError(f"{shown}: {classes.count(None)} of {count} images belong to no class")
    return classes


def _split_of(name: str) -> str:
    """The split in a shard's name, or in its folders' names, the nearest first; else "train"."""
    path = PurePosixPath(name.lower())
    for part in (path.name, *reversed(path.parts[:-1])):
        for token in re.split(r"[^a-z]+", part):
            if token in SPLIT_NAMES:
                return SPLIT_NAMES[token]
    return "train"


class Shards:
    """Parquet shards with a column of images {bytes, path} and one of labels, numbers or names.

    Args:
        source: where the shards are.
        names: their names in it.
        class_names: the names of labels 0, 1, ...; None takes them from the shards' metadata, or
            else from the images' paths.

    Attributes:
        keys: {split: {class: [key of each image]}}; a class without a name is a number of 3 digits.
        named: whether the classes have names.
        files: {key: file name} of the images whose paths are known.

    Raises:
        UserError: pyarrow or a column is missing, a shard is damaged, or a label is wrong.
    """

    def __init__(
        self, source: Source, names: Collection[str], class_names: list[str] | None = None
    ):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise source.error(
                f"Parquet files need pyarrow; run: {pip_install('pyarrow')}"
            ) from None
        self._arrow, self._source, self._class_names = pyarrow, source, class_names
        self.files: dict[Key, str] = {}
        rows: dict[str, dict[str | int, list[Key]]] = {}
        for name, shard in self._open(set(names)):
            image, label = self._columns(name, shard)
            classes = rows.setdefault(_split_of(name), {})
            columns = [f"{image}.path", label]
            for number, row in enumerate(self._rows(name, shard, 4096, columns)):
                key = (name, number)
                classes.setdefault(self._class(row[label], key), []).append(key)
                if path := (row.get(image) or {}).get("path"):
                    self.files[key] = PurePosixPath(path.replace("\\", "/")).name
        self._name_classes(rows)

    def _open(self, names: set[str]) -> Iterator[tuple[str, Any]]:
        """Yield (name, ParquetFile)."""
        for name, file in self._source.stream(names):
            with contextlib.ExitStack() as stack:
                if not isinstance(self._source, Folder):  # Parquet is read from its end
                    unpacked = stack.enter_context(tempfile.TemporaryFile())
                    shutil.copyfileobj(file, unpacked)
                    file = unpacked
                with self._intact(name):
                    shard = stack.enter_context(self._arrow.parquet.ParquetFile(file))
                yield name, shard

    def _rows(self, name: str, shard: Any, batch: int, columns: list[str]) -> Iterator[dict]:
        """Yield a shard's rows as dicts, ``batch`` of them in memory."""
        with self._intact(name):
            for table in shard.iter_batches(batch, columns=columns):
                yield from table.to_pylist()

    @contextlib.contextmanager
    def _intact(self, name: str) -> Iterator[None]:
        """Turn pyarrow's errors into a UserError."""
        try:
            yield
        except (self._arrow.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            what = str(error).partition("\n")[0][:150]
            raise self._source.error(
                f"{name}: truncated or damaged Parquet file ({what}): get another copy"
            ) from None

    def _columns(self, name: str, shard: Any) -> tuple[str, str]:
        """The names of the image and the label column; takes class names from the metadata."""
        is_, schema = self._arrow.types, shard.schema_arrow
        kinds = (is_.is_integer, is_.is_string, is_.is_large_string, is_.is_dictionary)
        structs = [field for field in schema if is_.is_struct(field.type)]
        images = [f.name for f in structs if f.type.get_field_index("bytes") >= 0]
        labels = [f.name for f in schema if any(kind(f.type) for kind in kinds)]
        usual = [n for n in ("label", "labels", "class", "fine_label", "target") if n in labels]
        if not images or not (usual or len(labels) == 1):
            columns = ", ".join(f"{f.name} ({str(f.type)[:40]})" for f in schema)
            needs = "needs a column of images {bytes, path} and one of labels"
            raise self._source.error(f"{name}: {needs}; its columns are {columns}")
        label = [*usual, *labels][0]
        if self._class_names is None:
            with contextlib.suppress(KeyError, ValueError, TypeError):
                info = json.loads((schema.metadata or {})[b"huggingface"])["info"]
                names = info["features"][label]["names"]
                if isinstance(names, list) and names:
                    self._class_names = list(map(str, names))
        return "image" if "image" in images else images[0], label

    def _class(self, value: Any, key: Key) -> str | int:
        if isinstance(value, str):
            return value
        known = self._class_names
        if not isinstance(value, int) or value < 0 or (known and value >= len(known)):
            classes = f" of {len(known)} classes" if known else ""
            raise self._source.error(f"{key[0]}: row {key[1]}: wrong label {value!r}{classes}")
        return known[value] if known else value

    def _name_classes(self, rows: dict[str, dict[str | int, list[Key]]]) -> None:
        """Name labels that are numbers by the WordNet ids that their images' paths begin with, if
        each label has one.
        """
        names = {}
        for split, classes in rows.items():
            for cls, keys in classes.items():
                found = {self.files.get(key, "")[:9] for key in keys}
                wnid = found.pop() if len(found) == 1 else ""
                names[split, cls] = wnid if WNID.fullmatch(wnid) else None
        numbers = any(isinstance(cls, int) for _, cls in names)
        self.named = not numbers or all(names.values())
        self.keys: Keys = {split: {} for split in rows}
        for split, classes in rows.items():
            for cls in sorted(classes, key=str):
                name = cls if isinstance(cls, str) else names[split, cls]
                name = name if self.named else f"{cls:03d}" if isinstance(cls, int) else cls
                self.keys[split].setdefault(name, []).extend(classes[cls])

    def stream(self, wanted: set[Key]) -> Iterator[tuple[Key, bytes]]:
        """Yield (key, bytes of the image file) of the wanted keys."""
        for name, shard in self._open({name for name, _ in wanted}):
            image, _ = self._columns(name, shard)
            for number, row in enumerate(self._rows(name, shard, 64, [f"{image}.bytes"])):
                if (name, number) in wanted:
                    content = (row[image] or {}).get("bytes")
                    if not content:
                        raise self._source.error(f"{name}: row {number} has no image")
                    yield (name, number), content


def file_names(cls: str, keys: list[Key], files: dict[Key, str], suffix: str) -> list[str]:
    """A file name for each image of a class: that in its path, or a number and ``suffix``."""
    numbers = [f"{cls}_{rank:04d}{suffix}" for rank in range(len(keys))]
    names = [files.get(key, "") for key in keys]
    names = [name if is_image(name) else n for name, n in zip(names, numbers, strict=True)]
    return names if len(set(names)) == len(names) else numbers
