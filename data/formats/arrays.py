"""Images in pickles and Parquet shards.

`read_pickle` and `read_shard` read one file. Without ``wanted`` they yield (row, label, file name
or None) of each of its images, and with a set of rows (row, label, image) of these. A label is a
number or a name.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from data.imagefiles import nfc
from utils import UserError, pip_install

from . import safe_pickle
from .sources import SPLIT_NAMES, WNID, Source

Key = tuple[str, int]  # file, row
Label = int | str
Reader = Callable[[str, Collection[int] | None], Iterator[tuple[int, Label, Any]]]


def read_table(
    read: Reader, splits: dict[str, str]
) -> tuple[dict[str, dict[Label, list[Key]]], dict[Key, str]]:
    """{split: {class: [key of each image]}} of the files {name: split}, and the known file names.

    Numbers become the WordNet ids that their images' file names begin with, if all have one.
    """
    table: dict[str, dict[Label, list[Key]]] = {}
    names: dict[Key, str] = {}
    wnids: dict[Label, set[str]] = {}
    for file, split in splits.items():
        classes = table.setdefault(split, {})
        for row, label, path in read(file, None):
            name = nfc(PurePosixPath((path or "").replace("\\", "/")).name)
            if isinstance(label, int):
                wnids.setdefault(label, set()).add(name[:9])
            else:
                label = nfc(label)
            classes.setdefault(label, []).append((file, row))
            names[file, row] = name
    distinct = len({*map(frozenset, wnids.values())}) == len(wnids)
    if distinct and all(len(of) == 1 and WNID.fullmatch(*of) for of in wnids.values()):
        for split, classes in table.items():
            table[split] = {next(iter(wnids.get(c, {c}))): keys for c, keys in classes.items()}
    return table, names


def stream(read: Reader, wanted: set[Key]) -> Iterator[tuple[Key, Any]]:
    """Yield (key, image) of the wanted keys."""
    for file in {file for file, _ in wanted}:
        for row, _, image in read(file, {row for name, row in wanted if name == file}):
            yield (file, row), image


# ---- Pickles ----


def read_pickle(
    source: Source, file: str, wanted: Collection[int] | None
) -> Iterator[tuple[int, Label, np.ndarray | None]]:
    """Read image_data uint8 [N, H, W, 3] and class_dict {class: indices}; or data uint8
    [N, H, W, 3] and labels [N], numbers or names. An image is uint8 [H, W, 3].

    Raises:
        UserError: the pickle is refused, or its images and labels do not fit together.
    """
    shown = f"{source.path}: {file}"
    with source.files[file].open("rb") as content:
        data = safe_pickle.load(content, shown)
    key = next((key for key in ("image_data", "data") if key in data), None)
    if key is None:
        raise UserError(f"{shown}: has neither 'image_data' nor 'data'")
    images = safe_pickle.as_array(data.pop(key), f"{shown}: {key}")
    if images.dtype != np.uint8 or images.shape[3:] != (3,) or 0 in images.shape:
        is_now = f"{images.dtype} {list(images.shape)}"
        raise UserError(f"{shown}: {key} is {is_now}, not uint8 [images, height, width, 3]")
    labels = (_of_labels if "labels" in data else _of_class_dict)(data, len(images), shown)
    for row in range(len(images)) if wanted is None else sorted(wanted):
        # a view would keep all images in memory
        yield row, labels[row], None if wanted is None else images[row].copy()


def _of_labels(data: dict[str, Any], count: int, shown: str) -> list[str | int]:
    """The class of each of ``count`` images by ``labels``; a number without ``catname2label``."""
    labels = safe_pickle.as_array(data["labels"], f"{shown}: labels").ravel()
    kind = labels.dtype.kind
    if len(labels) != count or kind not in "iuU" or (kind == "i" and labels.min() < 0):
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


# ---- Parquet shards ----


def split_in_name(name: str) -> str:
    """The split in a shard's name, or in its folders' names, the nearest first; else "train"."""
    tokens = re.split(r"[^a-z]+", "/".join(reversed(PurePosixPath(name.lower()).parts)))
    return next((SPLIT_NAMES[token] for token in tokens if token in SPLIT_NAMES), "train")


def read_shard(
    source: Source, file: str, wanted: Collection[int] | None
) -> Iterator[tuple[int, Label, Any]]:
    """Read a column of images {bytes, path} and one of labels, numbers or names. An image is the
    bytes of its file.

    Raises:
        UserError: pyarrow or a column is missing, the shard is damaged, a label is wrong, or an
            image is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        advice = pip_install("pyarrow")
        raise source.error(f"Parquet files need pyarrow; run: {advice}") from None
    part, batch = ("path", 4096) if wanted is None else ("bytes", 64)  # rows in memory
    try:
        with pyarrow.parquet.ParquetFile(source.files[file]) as shard:
            image, label = _columns(shard.schema_arrow, source, file)
            names = _names_in_metadata(shard.schema_arrow, label)
            tables = shard.iter_batches(batch, columns=[f"{image}.{part}", label])
            rows = (row for table in tables for row in table.to_pylist())
            for number, row in enumerate(rows):
                value, of = (row.get(image) or {}).get(part), row[label]
                where = f"{file}: row {number}"
                if not isinstance(of, str):
                    if not isinstance(of, int) or not 0 <= of < len(names or range(2**63 - 1)):
                        classes = f" of {len(names)} classes" if names else ""
                        raise source.error(f"{where}: wrong label {of!r}{classes}")
                    of = names[of] if names else of
                if wanted is None or number in wanted:
                    if wanted and not value:
                        raise source.error(f"{where} has no image")
                    yield number, of, value
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        what = str(error).partition("\n")[0][:150]
        advice = f"truncated or damaged Parquet file ({what}): get another copy"
        raise source.error(f"{file}: {advice}") from None


def _columns(schema: Any, source: Source, file: str) -> tuple[str, str]:
    """The names of the image and the label column."""
    from pyarrow import types

    kinds = (types.is_integer, types.is_string, types.is_large_string, types.is_dictionary)
    structs = [field for field in schema if types.is_struct(field.type)]
    images = [f.name for f in structs if f.type.get_field_index("bytes") >= 0]
    labels = [f.name for f in schema if any(kind(f.type) for kind in kinds)]
    usual = [n for n in ("label", "labels", "class", "fine_label", "target") if n in labels]
    if not images or not (usual or len(labels) == 1):
        columns = ", ".join(f"{f.name} ({str(f.type)[:40]})" for f in schema)
        needs = "needs a column of images {bytes, path} and one of labels"
        raise source.error(f"{file}: {needs}; its columns are {columns}")
    return "image" if "image" in images else images[0], [*usual, *labels][0]


def _names_in_metadata(schema: Any, label: str) -> list[str]:
    """The class names that data hubs put into a shard's metadata; [] if there are none."""
    with contextlib.suppress(KeyError, ValueError, TypeError):
        info = json.loads(schema.metadata[b"huggingface"])["info"]
        names = info["features"][label]["names"]
        return list(map(str, names)) if isinstance(names, list) else []
    return []
