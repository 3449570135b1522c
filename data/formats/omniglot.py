"""Omniglot (Lake et al., 2015): 1,623 handwritten characters of 50 alphabets, 20 drawings each.

A class is one character. Vinyals et al. (2016) train on 1,200 random characters and test on the
other 423; this split sets 172 of the 1,200 aside for validation: 1028/172/423. Their lists were
never published, so a seed draws these, from both sets of the original together. There are no
rotated copies.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from utils import UserError

from .detect import items_of
from .manifest import Classes, Options, Plan, by_side, split_classes
from .sources import Source, Union, Zip

SPLIT = "1028/172/423"
_SETS = ("images_background", "images_evaluation")


def download(root: Path) -> Source:
    """Open Omniglot's two archives in ``root``/omniglot-py; torchvision downloads what is missing.

    Raises:
        UserError: torchvision is missing, or the download failed.
    """
    try:
        from torchvision.datasets import Omniglot
    except ImportError:
        raise UserError("omniglot: needs torchvision: pip install -r requirements.txt") from None
    folder = root / Omniglot.folder
    for name, background in zip(_SETS, (True, False), strict=True):
        try:
            Omniglot(root, background=background, download=True)
        except (OSError, RuntimeError) as error:
            # torchvision does not unpack archives that were put there by hand; this code needs the
            # archives only
            if isinstance(error, FileNotFoundError) and (folder / f"{name}.zip").is_file():
                continue
            what = " ".join(str(error).split())[:150]
            by_hand = f"put {' and '.join(f'{n}.zip' for n in _SETS)} into {folder} by hand"
            raise UserError(
                f"omniglot: torchvision could not download {name}.zip ({what}): {by_hand}"
            ) from None
    return Union(
        folder, "torchvision's Omniglot", {name: Zip(folder / f"{name}.zip") for name in _SETS}
    )


def plan(source: Source, options: Options) -> Plan:
    """The plan for `download`'s source; ``options.split`` must be given."""
    classes: Classes = {}
    for name in source.files:
        path = PurePosixPath(name)
        if path.suffix == ".png" and len(path.parts) >= 4:
            classes.setdefault(f"{path.parts[-3]}_{path.parts[-2]}", []).append(name)
    side, how, notes = split_classes(classes, options, source.path)
    found = f"{source.kind} of {len(classes)} characters, {how}"
    return Plan(found, source, items_of(by_side(classes, side), source), notes, dest="omniglot")
