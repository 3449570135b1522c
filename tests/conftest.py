import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A smooth random picture, which JPEG keeps well."""
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def master(tmp_path_factory):
    """A small data set of real JPEG files: 6 classes x 8 images a split."""
    root = tmp_path_factory.mktemp("master")
    rng = np.random.default_rng(1)
    for split in ("train", "val", "test"):
        for c in range(6):
            folder = root / split / f"class {c}"
            folder.mkdir(parents=True)
            for k in range(8):
                photograph(rng, int(rng.integers(18, 40)), int(rng.integers(18, 40))).save(folder / f"{k}.jpg", quality=95)
    return root


@pytest.fixture
def data(master, tmp_path):
    """A copy of the small data set that a test may damage."""
    return Path(shutil.copytree(master, tmp_path / "data", ignore=shutil.ignore_patterns(".decoded")))
