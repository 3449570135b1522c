"""Images in pickles and Parquet shards.

A reader's ``rows`` yields (key, file name or None, label) of each image of a file, and its
``stream`` (key, image) of the wanted keys. A key is (file, row), a label is a number or a name.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from imagefiles import nfc
from utils import UserError, pip_install

from . import safe_pickle
from .sources import SPLIT_NAMES, WNID, Source

Key = tuple[str, int]
Label = int | str


def read_table(
    reader: Pickles | Shards, splits: dict[str, str]
) -> tuple[dict[str, dict[Label, list[Key]]], dict[Key, str]]:
    """{split: {class: [key of each image]}} of the files {name: split}, and the known file names.

    Numbers become the WordNet ids that their images' file names begin with, if all have one.
    """
    table: dict[str, dict[Label, list[Key]]] = {}
    names: dict[Key, str] = {}
    for file, split in splits.items():
        classes = table.setdefault(split, {})
        for key, name, label in reader.rows(file):
            classes.setdefault(nfc(label) if isinstance(label, str) else label, []).append(key)
            if name:
                names[key] = nfc(PurePosixPath(name.replace("\\", "/")).name)
    wnids: dict[Label, set[str]] = {}
    for classes in table.values():
        for label, keys in classes.items():
            if isinstance(label, int):
                wnids.setdefault(label, set()).update(names.get(key, "")[:9] for key in keys)
    if all(len(of) == 1 and WNID.fullmatch(*of) for of in wnids.values()):
        for split, classes in table.items():
            table[split] = {next(iter(wnids.get(c, {c}))): keys for c, keys in classes.items()}
    return table, names


class Pickles:
    """Pickles of image_data uint8 [N, H, W, 3] and class_dict {class: indices}; or of data uint8
    [N, H, W, 3] and labels [N], numbers or names. One at a time is in memory.

    Raises:
        UserError: a pickle is refused, or its images and labels do not fit together.
    """

    suffix = ".png"

    def __init__(self, source: Source):
        self._source = source

    def rows(self, name: str) -> Iterator[tuple[Key, None, Label]]:
        images, data = self._load(name)
        read = _of_labels if "labels" in data else _of_class_dict
        classes = read(data, len(images), f"{self._source.path}: {name}")
        del images, data  # before the next one is loaded
        yield from (((name, row), None, label) for row, label in enumerate(classes))

    def _load(self, name: str) -> tuple[np.ndarray, dict[str, Any]]:
        """The images uint8 [N, H, W, 3] of a pickle, and the rest of it."""
        shown = f"{self._source.path}: {name}"
        with self._source.open_path(name).open("rb") as file:
            data = safe_pickle.load(file, shown)
        key = next((key for key in ("image_data", "data") if key in data), None)
        if key is None:
            raise UserError(f"{shown}: has neither 'image_data' nor 'data'")
        images = safe_pickle.as_array(data.pop(key), f"{shown}: {key}")
        if images.dtype != np.uint8 or images.shape[3:] != (3,) or 0 in images.shape:
            is_now = f"{images.dtype} {list(images.shape)}"
            raise UserError(f"{shown}: {key} is {is_now}, not uint8 [images, height, width, 3]")
        return images, data

    def stream(self, wanted: set[Key]) -> Iterator[tuple[Key, np.ndarray]]:
        """Yield (key, image uint8 [H, W, 3]) of the wanted keys."""
        for name in {name for name, _ in wanted}:
            images, _ = self._load(name)
            for row in sorted(row for key, row in wanted if key == name):
                yield (name, row), images[row].copy()  # a view would keep all of them in memory
            del images


def _of_labels(data: dict[str, Any], count: int, shown: str) -> list[str | int]:
    """The class of each of ``count`` images by ``labels``; a number without ``catname2label``."""
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
    """The class of each of ``count`` images by ``class_dict``."""
    classes: list[str | None] = [None] * count
    for cls, rows in safe_pickle.as_dict(data.get("class_dict"), f"{shown}: class_dict").items():
        rows = safe_pickle.as_array(rows, f"{shown}: class_dict[{cls!r}]").ravel()
        if rows.size == 0 or rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= count:
            raise UserError(f"{shown}: class {cls} must list indices of the {count} images")
        for row in rows.tolist():
            if classes[row] is not None:
                raise UserError(f"{shown}: image {row} is in class {classes[row]} and in {cls}")
            classes[row] = str(cls)
    if None in classes:
        raise UserError(f"{shown}: {classes.count(None)} of {count} images belong to no class")
    return classes


def split_in_name(name: str) -> str:
    """The split in a shard's name, or in its folders' names, the nearest first; else "train"."""
    tokens = re.split(r"[^a-z]+", "/".join(reversed(PurePosixPath(name.lower()).parts)))
    return next((SPLIT_NAMES[token] for token in tokens if token in SPLIT_NAMES), "train")


class Shards:
    """Parquet shards with a column of images {bytes, path} and one of labels, numbers or names.

    Args:
        class_names: the names of labels 0, 1, ...; None takes them from the shards' metadata.

    Raises:
        UserError: pyarrow or a column is missing, a shard is damaged, or a label is wrong.
    """

    suffix = ""  # the images tell

    def __init__(self, source: Source, class_names: list[str] | None):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            advice = pip_install("pyarrow")
            raise source.error(f"Parquet files need pyarrow; run: {advice}") from None
        self._arrow, self._source, self._class_names = pyarrow, source, class_names

    def rows(self, name: str) -> Iterator[tuple[Key, str | None, Label]]:
        for key, path, label in self._rows(name, "path", 4096):
            known = self._class_names
            if not isinstance(label, str):
                if not isinstance(label, int) or not 0 <= label < len(known or range(2**63 - 1)):
                    classes = f" of {len(known)} classes" if known else ""
                    where = f"{name}: row {key[1]}"
                    raise self._source.error(f"{where}: wrong label {label!r}{classes}")
                label = known[label] if known else label
            yield key, path, label

    def _rows(self, name: str, part: str, batch: int) -> Iterator[tuple[Key, Any, Any]]:
        """Yield (key, the image's ``part``, label) of each of a shard's rows, ``batch`` of them in
        memory.
        """
        try:
            with self._arrow.parquet.ParquetFile(self._source.open_path(name)) as shard:
                image, label = self._columns(name, shard.schema_arrow)
                tables = shard.iter_batches(batch, columns=[f"{image}.{part}", label])
                rows = (row for table in tables for row in table.to_pylist())
                for number, row in enumerate(rows):
                    yield (name, number), (row.get(image) or {}).get(part), row[label]
        except (self._arrow.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            what = str(error).partition("\n")[0][:150]
            advice = f"truncated or damaged Parquet file ({what}): get another copy"
            raise self._source.error(f"{name}: {advice}") from None

    def _columns(self, name: str, schema: Any) -> tuple[str, str]:
        """The names of the image and the label column; takes class names from the metadata."""
        is_ = self._arrow.types
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

    def stream(self, wanted: set[Key]) -> Iterator[tuple[Key, bytes]]:
        """Yield (key, bytes of the image file) of the wanted keys."""
        for name in {name for name, _ in wanted}:
            for key, content, _ in self._rows(name, "bytes", 64):
                if key in wanted:
                    if not content:
                        raise self._source.error(f"{name}: row {key[1]} has no image")
                    yield key, content
