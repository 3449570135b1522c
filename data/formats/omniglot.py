"""Omniglot (Lake et al., 2015): 1,623 handwritten characters of 50 alphabets, 20 drawings each.

A class is one character. Vinyals et al. (2016) train on 1,200 random characters and test on the
other 423; this split sets 172 of the 1,200 aside for validation: 1028/172/423. Their lists were
never published, so a seed draws these, from both sets of the original together. There are no
rotated copies.
"""

from __future__ import annotations

import argparse
from pathlib import Path, PurePosixPath

from utils import UserError

from .detect import from_parts
from .manifest import Classes, Manifest
from .sources import open_nested, open_source

SPLIT = "1028/172/423"
_ARCHIVES = {"images_background.zip": True, "images_evaluation.zip": False}


def download(root: Path) -> list[Path]:
    """The paths of Omniglot's two archives in ``root``, which torchvision downloads if missing.

    Raises:
        UserError: torchvision is missing, or the download failed.
    """
    try:
        from torchvision.datasets import Omniglot
    except ImportError:
        raise UserError("omniglot: needs torchvision: pip install -r requirements.txt") from None
    folder = root / Omniglot.folder
    for name, background in _ARCHIVES.items():
        try:
            Omniglot(root, background=background, download=True)
        except (OSError, RuntimeError) as error:
            # torchvision does not unpack archives that were put there by hand, and need not
            if isinstance(error, FileNotFoundError) and (folder / name).is_file():
                continue
            what = " ".join(str(error).split())[:150]
            advice = f"put {' and '.join(_ARCHIVES)} into {folder} by hand"
            raise UserError(f"omniglot: cannot download {name} ({what}): {advice}") from None
    return [folder / name for name in _ARCHIVES]


def manifest(folder: Path, args: argparse.Namespace) -> Manifest:
    """The manifest of the two archives in ``folder``; ``args.split`` must be given."""
    source = open_nested(open_source(folder), {name: Path(name).stem for name in _ARCHIVES})
    classes: Classes = {}
    for name in source.files:
        path = PurePosixPath(name)
        if path.suffix == ".png" and len(path.parts) >= 3:
            classes.setdefault(f"{path.parts[-3]}_{path.parts[-2]}", []).append(name)
    return from_parts(source, {"all": classes}, args)
