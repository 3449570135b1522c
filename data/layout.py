"""A data set's layout on disk: {train,val,test}/<class>/<image>. Imports no PyTorch."""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from data.imagefiles import entries, is_image, kind_of, nfc, note_unknown
from utils import SPLITS, UserError


@dataclass(eq=False)
class Split:
    """One split's files, classes and images both in the order of their names."""

    name: str  # train, val or test
    classes: list[str]
    files: list[list[Path]]  # files[c] are the images of classes[c]
    root: Path  # the data set's folder

    @functools.cached_property
    def images(self) -> list[Path]:
        """All images, class after class."""
        return [path for of_class in self.files for path in of_class]

    @functools.cached_property
    def stats(self) -> list[tuple[str, int, int, int]]:
        """Each image's path within ``root``, size in bytes, and times in ns of the last change of
        content (which a copy may keep) and of status.

        Raises:
            UserError: an image cannot be read; it is named.
        """
        # Path.relative_to takes seconds for 60,000 files
        folder = "" if self.root == Path() else os.path.join(str(self.root), "")
        names = (str(path).removeprefix(folder) for path in self.images)
        try:
            stats = [os.stat(path) for path in self.images]
        except OSError as e:
            why = f"cannot be read ({e.strerror}); remove or replace it"
            raise UserError(f"{e.filename}: {why}") from e
        return [
            (n, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for n, s in zip(names, stats, strict=True)
        ]

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify the images by their names, classes and sizes."""
        digest = hashlib.sha256()
        for name, size, *_ in self.stats:
            digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]


def scan_split(root: Path, split: str) -> Split:
    """List ``root/<split>/<class>/<image>``, see ``scan_classes``.

    Raises:
        UserError: the folder is missing or empty, or a file or folder is where none belongs.
    """
    if not root.is_dir():
        advice = "make it with data/prepare.py (see data/README.md), or give another --data-root"
        raise UserError(f"--data-root {root}: no such folder; {advice}")
    folder = root / split
    if not folder.is_dir():
        advice = "--data-root should hold train/, val/ (or give --val-freq 0) and test/"
        raise UserError(f"{folder}: no such folder; {advice}")
    return Split(split, *scan_classes(folder, split), root)


def scan_classes(folder: Path, what: str) -> tuple[list[str], list[list[Path]]]:
    """List ``folder/<class>/<image>``; ``what`` names the folder in errors. A note counts files of
    unknown format, which are left out.

    Raises:
        UserError: the folder is missing or empty, a file, folder, dangling link or pipe is where
            none belongs, or two names are equal in Unicode NFC or lead to one folder.
    """
    if not folder.is_dir():
        raise UserError(f"{what} {folder}: no such folder")
    classes: list[str] = []
    files: list[list[Path]] = []
    unknown: list[str] = []
    seen: set[str] = set()  # names in NFC, and real paths
    for entry in entries(folder):
        if kind_of(entry) != "folder":
            raise UserError(f"{entry.path}: a file among the class folders of {what}; remove it")
        keys = {nfc(entry.name), os.path.realpath(entry.path)}
        if keys & seen:
            why = "a second class of this name, or a link to another class"
            raise UserError(f"{entry.path}: {why}; merge them, rename or remove one")
        images = entries(Path(entry.path))
        for image in images:
            if (kind := kind_of(image)) != "file":
                why = "a link that leads nowhere, a pipe or a device" if kind == "other" else kind
                advice = f"remove it; expected {folder}/<class>/<image>"
                raise UserError(f"{image.path}: {why}, and no image; {advice}")
        seen |= keys
        classes.append(entry.name)
        files.append([Path(image.path) for image in images if is_image(image.name)])
        unknown += [image.name for image in images if not is_image(image.name)]
    if not classes:
        raise UserError(f"{folder}: holds no class folders; expected {folder}/<class>/<image>")
    note_unknown(folder, unknown)
    return classes, files


def class_places(root: Path) -> dict[str, list[str]]:
    """{key: its <split>/<class>} of a data set, by names in NFC and by real paths: a class that
    has places in several splits belongs to none.

    Raises:
        UserError: a split cannot be read.
    """
    places: dict[str, list[str]] = {}
    for split in SPLITS:
        for entry in entries(root / split) if (root / split).is_dir() else ():
            for key in (nfc(entry.name), os.path.realpath(entry.path)):
                places.setdefault(key, []).append(f"{split}/{entry.name}")
    return places


def in_several_splits(places: Iterable[list[str]]) -> list[str]:
    """'train/cat and test/Cat' of each class that is in more than one split."""
    several = (of for of in places if len({place.partition("/")[0] for place in of}) > 1)
    return sorted({" and ".join(of) for of in several})


def check_splits(
    root: Path, trained_on: Iterable[str] = (), unseen: Collection[str] = ("test",)
) -> None:
    """Check that no two splits of a data set share a class, see ``class_places``.

    Args:
        trained_on: the classes of a checkpoint's training, which the splits ``unseen`` must not
            hold.

    Raises:
        UserError: a class is in two splits; it is named.
    """
    places = class_places(root)
    if shared := in_several_splits(places.values()):
        why = "the same class by name, or links to one folder"
        advice = "remove one, or rename it if they differ"
        raise UserError(f"{root}: {shared[0]} are {why}; {advice}")
    for name in trained_on:
        for place in places.get(nfc(name), ()):
            if (split := place.partition("/")[0]) in unseen:
                advice = f"{split}/ should hold classes that training has not seen"
                what = f"the checkpoint was trained on class {name}"
                raise UserError(f"{root}/{place}: {what}; {advice}")


def check_sizes(split: Split, n_class: int, n_shot: int, n_eval: int) -> None:
    """Check that every episode can be drawn.

    Raises:
        UserError: there are too few classes, or a class has too few images; it is named.
    """
    if len(split.classes) < n_class:
        found = f"the {split.name} split has only {len(split.classes)} classes; lower it"
        raise UserError(f"--n-class {n_class}: {found}")
    needed = n_shot + n_eval
    short = [k for k, images in enumerate(split.files) if len(images) < needed]
    if short:
        name, n_images = split.classes[short[0]], len(split.files[short[0]])
        folder = split.root / split.name / name
        others = f", and {len(short) - 1} more classes have too few" * (len(short) > 1)
        advice = "lower these flags"
        if len(split.classes) - len(short) >= n_class:
            hidden = shlex.join(["mv", str(folder), str(folder.with_name(f".{name}"))])
            advice += f", or leave the class out: {hidden}"
        raise UserError(
            f"{folder}: {n_images} images, but an episode takes {needed} (--n-shot {n_shot} + "
            f"--n-eval {n_eval}){others}; {advice}"
        )
