import copy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from episode import evaluate_episode, train_episode
from learner import Learner
from metalearner import MetaLearner


class Model:
    """Learners, meta-learner and Adam as in training, always from the same initialisation."""

    def __init__(self, image_size, dtype=torch.float32, conv_dtype=None, device="cpu", batch_size=25):
        torch.manual_seed(1)
        w_grad = Learner(image_size, 1e-3, 0.95, 5, "one", conv_dtype).to(device, dtype)
        self.learners, self.scratch = ((w_grad, copy.deepcopy(w_grad)), (copy.deepcopy(w_grad), copy.deepcopy(w_grad)))
        self.meta = MetaLearner(4, 20, w_grad.get_flat_params().numel()).to(device, dtype)
        self.meta.metalstm.init_cI(w_grad.get_flat_params())
        self.optimizer = torch.optim.Adam(self.meta.parameters(), lr=1e-3, fused=True)
        self.batch_size = batch_size

    def train(self, episode):
        return train_episode(episode, *self.learners, self.meta, self.optimizer, self.batch_size, 0.25)

    def test(self, episode):
        return evaluate_episode(episode, *self.scratch, self.meta, self.batch_size)

    def everything(self):
        adam = [t for state in self.optimizer.state.values() for t in state.values()]
        return [t.clone() for t in (*self.meta.state_dict().values(), *adam)]


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
