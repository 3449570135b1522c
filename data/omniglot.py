"""Omniglot (Lake et al., 2015): 1,623 handwritten characters of 50 alphabets, 20 drawings each, as a data set of ours.

A class is a whole character. Vinyals et al. (2016) train on 1,200 characters drawn at random and test on the other 423;
here 172 of the 1,200 are set aside for validation: 1028/172/423. Their lists were never published, so ours are drawn by
seed, from both of the original's sets together. No rotated copies are made.
"""

from pathlib import PurePosixPath

from plans import SPLITS, Item, Plan, split_classes
from sources import DataError, Union, Zip

SPLIT = "1028/172/423"
_SETS = ("images_background", "images_evaluation")


def download(root):
    """Omniglot's two archives under `root`/omniglot-py, by torchvision, which downloads what is not there.

    Returns:
        Source of both.

    Raises:
        DataError: torchvision is missing, or the download failed.
    """
    try:
        from torchvision.datasets import Omniglot
    except ImportError:
        raise DataError("omniglot: needs torchvision: pip install -r requirements.txt") from None
    folder = root / Omniglot.folder
    for name, background in zip(_SETS, (True, False), strict=True):
        try:
            Omniglot(root, background=background, download=True)
        except (OSError, RuntimeError) as error:
            # archives put there by hand are checked, but not unpacked, by torchvision: we read the archives themselves
            if isinstance(error, FileNotFoundError) and (folder / f"{name}.zip").is_file():
                continue
            what = " ".join(str(error).split())[:150]
            raise DataError(
                f"omniglot: torchvision could not download {name}.zip ({what}): "
                f"put {' and '.join(f'{n}.zip' for n in _SETS)} into {folder} by hand"
            ) from None
    return Union(folder, "torchvision's Omniglot", {name: Zip(folder / f"{name}.zip") for name in _SETS})


def plan(source, options):
    """The plan of `download`'s source; `options` are `forms.Options`, with a split of numbers or a file."""
    classes = {}
    for name in source.files:
        path = PurePosixPath(name)
        if path.suffix == ".png" and len(path.parts) >= 4:
            classes.setdefault(f"{path.parts[-3]}_{path.parts[-2]}", []).append(name)
    side, how, notes = split_classes(set(classes), options, source.path)
    items = [
        Item(split, cls, PurePosixPath(name).name, name, source.files[name])
        for split in SPLITS
        for cls, names in classes.items()
        if side.get(cls) == split
        for name in names
    ]
    return Plan(f"{source.kind} of {len(classes)} characters, {how}", source, items, notes, dest="omniglot")
