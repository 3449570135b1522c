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

from imagefiles import is_image, nfc
from utils import UserError

from . import safe_pickle
from .sources import SPLIT_NAMES, WNID, Source

Key = tuple[str, int]  # an image: (pickle or shard, row)


class Pickles:
    """One pickle for each split: image_data uint8 [N, H, W, 3] and class_dict {class: indices}; or
    data uint8 [N, H, W, 3] and labels [N], numbers or names.

    Args:
        names: {the pickle's name in ``source``: split}.

    Attributes:
        keys: {split: {class: [key of each image]}}.
        named: whether the classes have names.
        files: {}, as the images have no names.

    Raises:
        UserError: a pickle is refused, or its images and labels do not fit together.
    """

    def __init__(self, source: Source, names: dict[str, str]):
        self._source, self.named, self.files = source, True, {}
        self.keys: dict[str, dict[str, list[Key]]] = {}
        for name, images, data in self._load(set(names)):
            shown, count = f"{source.path}: {name}", len(images)
            del images  # before the next one is loaded
            classes = self.keys.setdefault(names[name], {})
            read = _of_labels if "labels" in data else _of_class_dict
            for row, cls in enumerate(read(data, count, shown)):
                if isinstance(cls, int):
                    # numbers may start from 0 again in each file: the split's name keeps them apart
                    cls, self.named = f"{names[name]}-{cls:03d}", False
                classes.setdefault(nfc(cls), []).append((name, row))

    def _load(self, names: set[str]) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
        """Yield (name, images uint8 [N, H, W, 3], the rest) with one pickle in memory at a time."""
        for name, file in self._source.stream(names):
            shown = f"{self._source.path}: {name}"
            data = safe_pickle.load(file, shown)
            key = next((key for key in ("image_data", "data") if key in data), None)
            if key is None:
                raise UserError(f"{shown}: has neither 'image_data' nor 'data'")
            images = safe_pickle.as_array(data.pop(key), f"{shown}: {key}")
            if images.dtype != np.uint8 or images.shape[3:] != (3,) or 0 in images.shape:
                is_now = f"{images.dtype} {list(images.shape)}"
                raise UserError(f"{shown}: {key} is {is_now}, not uint8 [images, height, width, 3]")
            yield name, images, data
            del data, images

    def stream(self, wanted: set[Key]) -> Iterator[tuple[Key, np.ndarray]]:
        """Yield (key, image uint8 [H, W, 3]) of the wanted keys."""
        for name, images, _ in self._load({name for name, _ in wanted}):
            for row in sorted(row for key, row in wanted if key == name):
                yield (name, row), images[row].copy()  # a view would keep all of them in memory
            del images


def _of_labels(data: dict[str, Any], count: int, shown: str) -> list[str | int]:
    """The class of each of a pickle's ``count`` images by ``labels``, a number if it has no name in
    ``catname2label``.
    """
    labels = safe_pickle.as_array(data["labels"], f"{shown}: labels").ravel()
    sound = labels.dtype.kind in "iuU" and not (labels.dtype.kind == "i" and labels.min() < 0)
    if len(labels) != count or not sound:
        found = f"{len(labels)} labels of type {labels.dtype}"
        needs = "must have a number above -1 or a name for each"
        raise UserError(f"{shown}: has {count} images, but {found}: {needs}")
    names = safe_pickle.as_dict(data.get("catname2label", {}), f"{shown}: catname2label")
    names = {label: str(name) for name, label in names.items() if isinstance(label, int)}
    return [names.get(label, label) for label in labels.tolist()]


def _of_class_dict(data: dict[str, Any], count: int, shown: str) -> list[str]:
    """The class of each of a pickle's ``count`` images by ``class_dict``."""
    classes: list[str | None] = [None] * count
    for cls, rows in safe_pickle.as_dict(data.get("class_dict"), f"{shown}: class_dict").items():
        rows = safe_pickle.as_array(rows, f"{shown}: class_dict[{cls!r}]").ravel()
        if rows.size == 0 or rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= count:
            needs = f"must list indices of the {count} images"
            raise UserError(f"{shown}: class {cls} {needs}")
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
    for part in reversed(PurePosixPath(name.lower()).parts):
        for token in re.split(r"[^a-z]+", part):
            if token in SPLIT_NAMES:
                return SPLIT_NAMES[token]
    return "train"


class Shards:
    """Parquet shards with a column of images {bytes, path} and one of labels, numbers or names.

    Args:
        class_names: the names of labels 0, 1, ...; None takes them from the shards' metadata, or
            else from the images' paths.

    Attributes:
        keys: {split: {class: [key of each image]}}; a class without a name is a number of 3 digits.
        named, files: whether the classes have names; {key: file name} where the path is known.

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
            raise source.error("Parquet files need pyarrow: pip install pyarrow") from None
        self._arrow, self._source, self._class_names = pyarrow, source, class_names
        self.files: dict[Key, str] = {}
        rows: dict[tuple[str, str | int], list[Key]] = {}
        for name, shard in self._open(set(names)):
            image, label = self._columns(name, shard)
            for key, row in self._rows(name, shard, 4096, [f"{image}.path", label]):
                rows.setdefault((_split_of(name), self._class(row[label], key)), []).append(key)
                if path := (row.get(image) or {}).get("path"):
                    self.files[key] = nfc(PurePosixPath(path.replace("\\", "/")).name)
        # numbers are named by the WordNet ids that their images' paths begin with, if each has one
        wnids = {}
        for (_, cls), keys in rows.items():
            starts = {self.files.get(key, "")[:9] for key in keys}
            if isinstance(cls, int):
                wnids[cls] = starts.pop() if len(starts) == 1 else ""
        self.named = all(map(WNID.fullmatch, wnids.values()))
        self.keys: dict[str, dict[str, list[Key]]] = {}
        for (split, cls), keys in sorted(rows.items(), key=str):
            if isinstance(cls, int):
                cls = wnids[cls] if self.named else f"{cls:03d}"
            self.keys.setdefault(split, {}).setdefault(cls, []).extend(keys)

    def _open(self, names: set[str]) -> Iterator[tuple[str, Any]]:
        """Yield (name, ParquetFile)."""
        for name, file in self._source.stream(names):
            with tempfile.TemporaryFile() as unpacked:
                if self._source.kind != "a folder":  # Parquet is read from its end
                    shutil.copyfileobj(file, unpacked)
                    file = unpacked
                with self._intact(name):
                    shard = self._arrow.parquet.ParquetFile(file)
                yield name, shard

    def _rows(
        self, name: str, shard: Any, batch: int, columns: list[str]
    ) -> Iterator[tuple[Key, dict]]:
        """Yield the key and the columns of each of a shard's rows, ``batch`` of them in memory."""
        with self._intact(name):
            tables = shard.iter_batches(batch, columns=columns)
            rows = (row for table in tables for row in table.to_pylist())
            yield from (((name, number), row) for number, row in enumerate(rows))

    @contextlib.contextmanager
    def _intact(self, name: str) -> Iterator[None]:
        """Turn pyarrow's errors into a UserError."""
        try:
            yield
        except (self._arrow.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            what = str(error).partition("\n")[0][:150]
            advice = f"truncated or damaged Parquet file ({what}): get another copy"
            raise self._source.error(f"{name}: {advice}") from None

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
                self._class_names = list(map(str, names)) if isinstance(names, list) else None
        return "image" if "image" in images else images[0], label

    def _class(self, value: Any, key: Key) -> str | int:
        if isinstance(value, str):
            return nfc(value)
        known = self._class_names
        if not isinstance(value, int) or value < 0 or (known and value >= len(known)):
            classes = f" of {len(known)} classes" if known else ""
            raise self._source.error(f"{key[0]}: row {key[1]}: wrong label {value!r}{classes}")
        return nfc(known[value]) if known else value

    def stream(self, wanted: set[Key]) -> Iterator[tuple[Key, bytes]]:
        """Yield (key, bytes of the image file) of the wanted keys."""
        for name, shard in self._open({name for name, _ in wanted}):
            image, _ = self._columns(name, shard)
            for key, row in self._rows(name, shard, 64, [f"{image}.bytes"]):
                if key in wanted:
                    if not (content := (row[image] or {}).get("bytes")):
                        raise self._source.error(f"{name}: row {key[1]} has no image")
                    yield key, content


def file_names(cls: str, keys: list[Key], files: dict[Key, str], suffix: str) -> list[str]:
    """A file name for each image of a class: that in its path, or a number and ``suffix``."""
    numbers = [f"{cls}_{rank:04d}{suffix}" for rank in range(len(keys))]
    names = [files.get(key, "") for key in keys]
    names = [name if is_image(name) else n for name, n in zip(names, numbers, strict=True)]
    return names if len(set(names)) == len(names) else numbers
