"""Omniglot (Lake et al., 2015): 1,623 handwritten characters of 50 alphabets, 20 drawings each.

A class is one character. Vinyals et al. (2016) train on 1,200 random characters and test on the
other 423; this split sets 172 of the 1,200 aside for validation: 1028/172/423. Their lists were
never published, so a seed draws these, from both sets of the original together. There are no
rotated copies.
"""

from __future__ import annotations

from pathlib import Path

from utils import UserError, pip_install

SPLIT = "1028/172/423"


def download(root: Path) -> list[Path]:
    """The paths of Omniglot's two archives in ``root``, which torchvision downloads if missing.

    Raises:
        UserError: torchvision is missing, or the download failed.
    """
    try:
        from torchvision.datasets import Omniglot
    except ImportError:
        raise UserError(f"omniglot: needs torchvision; run: {pip_install()}") from None
    folder = root / Omniglot.folder
    archives = [folder / "images_background.zip", folder / "images_evaluation.zip"]
    for path in archives:
        try:
            Omniglot(root, background=path == archives[0], download=True)
        except (OSError, RuntimeError) as error:
            # torchvision does not unpack archives that were put there by hand, and need not
            if isinstance(error, FileNotFoundError) and path.is_file():
                continue
            what = " ".join(str(error).split())[:150]
            advice = f"put {archives[0].name} and {archives[1].name} into {folder} by hand"
            raise UserError(f"omniglot: cannot download {path.name} ({what}): {advice}") from None
    return archives
