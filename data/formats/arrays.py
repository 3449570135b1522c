"""Images in pickles and Parquet shards."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from utils import UserError

from . import safe_pickle
from .sources import SPLIT_NAMES, WNID, Source, is_image, natural

Key = tuple[str, int]  # an image: (split or shard, row)


class _Pickles:
    """One pickle a split.

    Args:
        source: where the pickles are.
        parts: {split: the pickle's name in ``source``}.

    Attributes:
        rows: {split: {class: [key of each image]}}.

    Raises:
        UserError: a pickle is refused, or its images and labels do not fit together.
    """

    what = ""  # the form, in words
    pattern: re.Pattern  # of the pickles' names; group 1 is the split

    def __init__(self, source: Source, parts: dict[str, str]):
        self._source, self._parts = source, parts
        self.rows: dict[str, dict[str, list[Key]]] = {}
        for split, images, classes in self._loaded(set(parts)):
            del images  # before the next one is loaded
            self.rows[split] = {
                cls: [(split, int(row)) for row in rows] for cls, rows in classes.items()
            }

    def _loaded(self, splits: set[str]) -> Iterator[tuple[str, np.ndarray, dict[str, np.ndarray]]]:
        """Yield (split, images uint8 [N, H, W, 3], {class: rows}) with one pickle in memory at a
        time.
        """
        split_of = {name: split for split, name in self._parts.items() if split in splits}
        for name, file in self._source.stream(set(split_of)):
            shown = f"{self._source.path}: {name}"
            with (
                file.open("rb")
                if isinstance(file, Path)
                else contextlib.nullcontext(file) as opened
            ):
                data = safe_pickle.as_dict(safe_pickle.load(opened, shown), shown)
            yield split_of[name], *self._read(data, split_of[name], shown)
            del data

    def _read(self, data: dict, split: str, shown: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        raise NotImplementedError

    def _images(self, data: dict, key: str, shown: str) -> np.ndarray:
        if key not in data:
            raise UserError(
                f"{shown}: has no {key!r}, only {', '.join(map(repr, list(data)[:6])) or 'nothing'}"
            )
        images = safe_pickle.as_array(data[key], f"{shown}: {key}")
        if (
            images.dtype != np.uint8
            or images.ndim != 4
            or images.shape[-1] != 3
            or 0 in images.shape
        ):
            is_now = f"{images.dtype} {list(images.shape)}"
            raise UserError(f"{shown}: {key} is {is_now}, not uint8 [images, height, width, 3]")
        return images

    def stream(self, wanted: set[Key]) -> Iterator[tuple[Key, np.ndarray]]:
        """Yield (key, image uint8 [H, W, 3]) of the wanted keys."""
        for split, images, _ in self._loaded({split for split, _ in wanted}):
            for row in sorted(row for part, row in wanted if part == split):
                yield (split, row), images[row].copy()  # a view would keep all of them in memory
            del images


class CachePickles(_Pickles):
    """Pickles of image_data uint8 [N, 84, 84, 3] and class_dict {name: indices}."""

    what = "mini-imagenet-cache pickles"
    pattern = re.compile(r"mini-imagenet-cache-(train|val|test)\.pkl")

    def _read(self, data: dict, split: str, shown: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        images = self._images(data, "image_data", shown)
        classes, owner = {}, {}
        for cls, rows in safe_pickle.as_dict(
            data.get("class_dict"), f"{shown}: class_dict"
        ).items():
            rows = safe_pickle.as_array(rows, f"{shown}: class_dict[{cls!r}]").ravel()
            if rows.size == 0:
                raise UserError(f"{shown}: class {cls} has no images")
            if rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= len(images):
                raise UserError(
                    f"{shown}: class {cls} has an index outside of the {len(images)} images: wrong labels"
                )
            classes[str(cls)] = rows
            repeats = len(np.unique(rows)) != rows.size
            for row in rows.tolist():
                if owner.setdefault(row, cls) is not cls or repeats:
                    raise UserError(
                        f"{shown}: image {row} is in class {owner[row]} and again in {cls}: wrong labels"
                    )
        if lost := len(images) - len(owner):
            raise UserError(
                f"{shown}: {lost} of {len(images)} images belong to no class: wrong labels"
            )
        return images, classes


class CategoryPickles(_Pickles):
    """Pickles of data uint8 [N, 84, 84, 3] and labels [N], numbers or names."""

    what = "miniImageNet_category_split pickles"
    pattern = re.compile(r"miniImageNet_category_split_(train_phase_train|val|test)\.pickle")

    def _read(self, data: dict, split: str, shown: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        images = self._images(data, "data", shown)
        if "labels" not in data:
            raise UserError(f"{shown}: has no 'labels'")
        labels = safe_pickle.as_array(data["labels"], f"{shown}: labels").ravel()
        if len(labels) != len(images):
            raise UserError(f"{shown}: has {len(images)} images, but {len(labels)} labels")
        if labels.dtype.kind not in "iuU" or (labels.dtype.kind == "i" and labels.min() < 0):
            raise UserError(f"{shown}: its labels are neither class numbers nor class names")
        names = safe_pickle.as_dict(data.get("catname2label", {}), f"{shown}: catname2label")
        names = {label: str(name) for name, label in names.items() if isinstance(label, int)}
        classes = {}
        order = np.argsort(labels, kind="stable")
        for rows in np.split(order, np.flatnonzero(labels[order][1:] != labels[order][:-1]) + 1):
            label = labels[rows[0]].item()
            # numbers may start from 0 again in each file: the split's name keeps them apart
            name = label if isinstance(label, str) else names.get(label, f"{split}-{label:03d}")
            if name in classes:
                raise UserError(f"{shown}: two labels are called {name}")
            classes[name] = rows
        return images, classes


def _split_of(name: str) -> str:
    """The split that a shard's name or else its folders' names tell, the nearest first; "train" if
    they tell none.
    """
    path = PurePosixPath(name.lower())
    for part in (path.name, *reversed(path.parts[:-1])):
        for token in re.split(r"[^a-z]+", part):
            if token in SPLIT_NAMES:
                return SPLIT_NAMES[token]
    return "train"


class Shards:
    """Parquet shards with a column of images {bytes, path} and one of labels, numbers or class
    names.

    Args:
        source: where the shards are.
        names: their names in it.
        class_names: the names of labels 0, 1, ...; None looks for them in the shards.

    Attributes:
        rows: {split: {class: [key of each image]}}; a class is an int if it has no name.
        named: whether the classes have names.

    Raises:
        UserError: pyarrow or a column is missing, a shard is damaged, or a label is wrong.
    """

    what = "Parquet shards"

    def __init__(
        self, source: Source, names: Collection[str], class_names: list[str] | None = None
    ):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            needs = "Parquet files need pyarrow: pip install pyarrow (or -r requirements-data.txt)"
            raise UserError(f"{source.path}: {needs}") from None
        self._arrow, self._source, self._class_names = pyarrow, source, class_names
        self._file_names: dict[Key, str] = {}
        self.rows: dict[str, dict[str | int, list[Key]]] = {}
        for name, shard in self._shards(names):
            image, label = self._columns(name, shard)
            classes = self.rows.setdefault(_split_of(name), {})
            for number, row in enumerate(
                self._batches(name, shard, 4096, [f"{image}.path", label])
            ):
                key = (name, number)
                classes.setdefault(self._class(row[label], name, number), []).append(key)
                if path := (row.get(image) or {}).get("path"):
                    self._file_names[key] = PurePosixPath(path.replace("\\", "/")).name
        self.named = self._name_numbers()

    def _shards(self, names: Collection[str]) -> Iterator[tuple[str, Any]]:
        """Yield (name, ParquetFile)."""
        for name, file in self._source.stream(set(names)):
            with contextlib.ExitStack() as stack:
                if not isinstance(
                    file, Path
                ):  # Parquet is read from its end: unpack this one shard
                    unpacked: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
                    shutil.copyfileobj(file, unpacked)
                    file = unpacked
                with self._damage(name):
                    shard = stack.enter_context(self._arrow.parquet.ParquetFile(file))
                yield name, shard

    def _batches(self, name: str, shard: Any, rows: int, columns: list[str]) -> Iterator[dict]:
        """Yield a shard's rows as dicts, decoding so many at a time."""
        with self._damage(name):
            for table in shard.iter_batches(rows, columns=columns):
                yield from table.to_pylist()

    @contextlib.contextmanager
    def _damage(self, name: str) -> Iterator[None]:
        """Turn pyarrow's errors into a UserError."""
        try:
            yield
        except (self._arrow.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            what = f"truncated or damaged Parquet file ({str(error).partition(chr(10))[0][:150]})"
            raise UserError(f"{self._source.path}: {name}: {what}: get another copy") from None

    def _columns(self, name: str, shard: Any) -> tuple[str, str]:
        """The names of the image and the label column. Takes the class names from the shard's
        metadata.
        """
        is_, schema = self._arrow.types, shard.schema_arrow
        kinds: tuple[Callable[[Any], bool], ...] = (
            is_.is_integer,
            is_.is_string,
            is_.is_large_string,
            is_.is_dictionary,
        )
        images = [
            f.name for f in schema if is_.is_struct(f.type) and f.type.get_field_index("bytes") >= 0
        ]
        labels = [f.name for f in schema if any(kind(f.type) for kind in kinds)]
        label = next(
            (n for n in ("label", "labels", "class", "fine_label", "target") if n in labels), None
        )
        label = label or (labels[0] if len(labels) == 1 else None)
        if not images or label is None:
            raise UserError(
                f"{self._source.path}: {name}: needs a column of images {{bytes, path}} and one of labels; "
                f"its columns are {', '.join(f'{f.name} ({str(f.type)[:40]})' for f in schema)}"
            )
        if self._class_names is None:
            with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError):
                names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][
                    label
                ]["names"]
                if isinstance(names, list) and names:
                    self._class_names = list(map(str, names))
        return images[0] if "image" not in images else "image", label

    def _class(self, value: Any, name: str, row: int) -> str | int:
        if isinstance(value, str):
            return value
        known = self._class_names
        if not isinstance(value, int) or value < 0 or (known and value >= len(known)):
            classes = f" of {len(known)} classes" if known else ""
            raise UserError(
                f"{self._source.path}: {name}: row {row}: wrong label {value!r}{classes}"
            )
        return known[value] if known else value

    def _name_numbers(self) -> bool:
        """Name labels that are numbers by the WordNet id that the paths of a label's images share,
        if all do.
        """
        if not any(isinstance(cls, int) for classes in self.rows.values() for cls in classes):
            return True
        wnids = {}
        for split, classes in self.rows.items():
            for cls, keys in classes.items():
                found = {WNID.match(self._file_names.get(key, "")) for key in keys}
                ids = {match and match.group() for match in found}
                wnids[split, cls] = ids.pop() if len(ids) == 1 else None
        named = all(wnids.values())
        for split, classes in self.rows.items():
            self.rows[split] = {}
            for cls, keys in sorted(classes.items()):
                self.rows[split].setdefault(wnids[split, cls] if named else cls, []).extend(keys)
        return named

    def target(self, key: Key, cls: str, rank: int) -> str:
        """A file name for an image: that of its path, or a number without a suffix, which the bytes
        tell later.
        """
        name = self._file_names.get(key, "")
        return name if is_image(name) else f"{cls}_{rank:04d}"

    def stream(self, wanted: set[Key]) -> Iterator[tuple[Key, bytes]]:
        """Yield (key, bytes of the image file) of the wanted keys."""
        for name, shard in self._shards(sorted({name for name, _ in wanted}, key=natural)):
            image, _ = self._columns(name, shard)
            for number, row in enumerate(self._batches(name, shard, 64, [f"{image}.bytes"])):
                if (name, number) in wanted:
                    content = (row[image] or {}).get("bytes")
                    if not content:
                        raise UserError(f"{self._source.path}: {name}: row {number} has no image")
                    yield (name, number), content
