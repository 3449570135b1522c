import contextlib
import copy
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import main
from dataloader import EpisodeDataset, episodes, scan_split
from engine.backend import make_reproducible
from episode import Episode, evaluate_episode, step_if_finite, train_episode
from learner import Conv4
from metalearner import MetaLearner
from utils import run_main

for number in (
    signal.SIGINT,
    signal.SIGHUP,
):  # nohup and a shell's & ignore them, and what tests start would, too
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )

CPU = torch.device("cpu")
LEARNERS, METALEARNERS, DATASETS = (
    {"plain": Conv4},
    {"plain": MetaLearner},
    {"plain": EpisodeDataset},
)
if importlib.util.find_spec("fast") is not None:
    from fast.graphs import CUDAGraphFunction, step_without_sync
    from fast.images import FastEpisodeDataset
    from fast.learner import FastConv4
    from fast.metalearner import FastMetaLearner

    LEARNERS["fast"], METALEARNERS["fast"] = FastConv4, FastMetaLearner
    DATASETS["fast"] = partial(FastEpisodeDataset, device=CPU)
else:  # the folder is gone: what tests it goes with it
    collect_ignore = [
        str(path.relative_to(Path(__file__).parent))
        for path in Path(__file__).parent.rglob("test_*.py")
        if re.search(r"^(from|import) fast", path.read_text(), re.MULTILINE)
    ]
WAYS = tuple(LEARNERS)


def pytest_configure(config):
    """The GPU is for ``pytest -m gpu``: all other tests are of the CPU, and would crowd it with
    hundreds of small programs.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip("no GPU here, or not asked for by -m gpu"))


class Model:
    """Learners, meta-learner and Adam as in training, in one of the two ways, always from the same
    initialisation.
    """

    def __init__(
        self,
        way,
        image_size,
        dtype=torch.float32,
        conv_dtype=None,
        device="cpu",
        batch_size=25,
        adapt="all",
    ):
        torch.manual_seed(1)
        extra = (
            {} if conv_dtype is None else {"conv_dtype": conv_dtype}
        )  # which only the fast learner has
        w_grad = LEARNERS[way](image_size, 1e-3, 0.95, 5, **extra).to(device, dtype)
        self.learners, self.scratch = (
            (w_grad, copy.deepcopy(w_grad)),
            (copy.deepcopy(w_grad), copy.deepcopy(w_grad)),
        )
        self.meta = METALEARNERS[way](4, 20, w_grad.get_flat_params().numel()).to(device, dtype)
        self.meta.metalstm.init_cI(w_grad.get_flat_params())
        self.optimizer = torch.optim.Adam(self.meta.parameters(), lr=1e-3, fused=way == "fast")
        self.step = step_without_sync if way == "fast" else step_if_finite
        self.batch_size = batch_size

    def captured(self, mode):
        """``train`` or ``test``, to be recorded as a CUDA graph."""
        if mode == "train":
            return CUDAGraphFunction(self.train, (*self.learners, self.meta), self.optimizer)
        return CUDAGraphFunction(self.test, (*self.scratch, self.meta))

    def train(self, episode):
        return train_episode(
            episode, *self.learners, self.meta, self.optimizer, self.batch_size, 0.25, self.step
        )

    def test(self, episode):
        return evaluate_episode(episode, *self.scratch, self.meta, self.batch_size)

    def everything(self):
        adam = [t for state in self.optimizer.state.values() for t in state.values()]
        return [t.clone() for t in (*self.meta.state_dict().values(), *adam)]


@pytest.fixture(params=WAYS)
def way(request):
    """The two ways in which everything can be done: plain, as the root has it, and fast."""
    return request.param


@pytest.fixture(autouse=True)
def _seeded():
    make_reproducible(0)


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A smooth random picture, which JPEG keeps well."""
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def master(tmp_path_factory):
    """A small data set of real JPEG files: 6 classes x 8 images a split, no class in two splits."""
    root = tmp_path_factory.mktemp("master")
    rng = np.random.default_rng(1)
    for split in ("train", "val", "test"):
        for c in range(6):
            folder = root / split / (f"class {c}" if split == "train" else f"{split} class {c}")
            folder.mkdir(parents=True)
            for k in range(8):
                photograph(rng, int(rng.integers(18, 40)), int(rng.integers(18, 40))).save(
                    folder / f"{k}.jpg", quality=95
                )
    return root


@pytest.fixture
def data(master, tmp_path):
    """A copy of the small data set that a test may damage."""
    return Path(
        shutil.copytree(master, tmp_path / "data", ignore=shutil.ignore_patterns(".decoded"))
    )


def make(way, n_class=3, n_shot=2, n_eval=2, n_pass=2, size=16, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    w_grad = LEARNERS[way](size, 1e-3, 0.95, n_class).to(dtype)
    wo_grad = copy.deepcopy(w_grad)
    meta = METALEARNERS[way](4, 5, w_grad.get_flat_params().numel(), (-2.0, -1.0)).to(dtype)
    meta.metalstm.init_cI(w_grad.get_flat_params())
    return new_episode(n_class, n_shot, n_eval, n_pass, size, dtype), w_grad, wo_grad, meta


def new_episode(n_class=3, n_shot=2, n_eval=2, n_pass=2, size=16, dtype=torch.float32):
    y = torch.arange(n_class)
    return Episode(
        torch.randn(n_class * n_shot, 3, size, size, dtype=dtype),
        y.repeat_interleave(n_shot),
        torch.randn(n_class * n_eval, 3, size, size, dtype=dtype),
        y.repeat_interleave(n_eval),
        torch.stack([torch.randperm(n_class * n_shot) for _ in range(n_pass)]),
    )


def dataset(way, root, split="train", length=6, **kwargs):
    settings = dict(n_class=3, n_shot=2, n_eval=3, n_pass=2, image_size=16, augment="port") | kwargs
    return DATASETS[way](scan_split(root, split), 719, length=length, **settings)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def benchmark(script, *argv):
    """Run a script of benchmarks/ to its end."""
    command = [sys.executable, ROOT / "benchmarks" / script, *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rows_printed(done, alone=True):
    """The rows of the table that a script has printed, alone or among other lines, each as a dict
    by heading.
    """
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table == lines or not alone
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return [dict(zip(head, row, strict=True)) for row in rows]


def refused(done, *culprits):
    """The one line with which a command has refused its input; it names all the culprits."""
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert all(str(culprit) in done.stderr for culprit in culprits), done.stderr
    return done.stderr


# ---- The command line, in this process ----


class Done(NamedTuple):
    """What a command has come to; names as in ``subprocess.CompletedProcess``."""

    returncode: int
    stdout: str
    stderr: str


def run_cli(*argv):
    """Run ``python main.py ARGV`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run_main(main.main, [str(word) for word in argv])
        except SystemExit as e:  # --help
            code = e.code or 0
    return Done(code, out.getvalue(), err.getvalue())


_small = "--cpu --image-size 16 --n-class 3 --n-shot 1 --n-eval 2 --epoch 2 --hidden-size 4 "
_small += "--log-freq 1 --n-workers 0 --plots false"
SMALL = _small.split()


def training(data, save, *flags, episode=4, val_freq=2):
    """The words of a small training, 3-way 1-shot on 16 pixels; later flags win."""
    run = ["--mode", "train", "--data-root", data, "--save", save, "--episode", episode]
    run += ["--val-freq", val_freq, "--episode-val", 2, *SMALL, *flags]
    return [str(word) for word in run]


def train(data, save, *flags, episode=4, val_freq=2):
    """Run a small training."""
    return run_cli(*training(data, save, *flags, episode=episode, val_freq=val_freq))


def run_test(data, save, *flags):
    """Test a run; without ``data`` the run has to know where its images are."""
    root = [] if data is None else ["--data-root", data]
    return run_cli("--mode", "test", *root, "--save", save, "--cpu", "--n-workers", 0, *flags)


def succeeded(done):
    """What a command that has succeeded has printed."""
    assert done.returncode == 0, done.stderr
    return done.stdout


def metrics(save, event=None, seed=719):
    """A run's ``metrics.jsonl`` without what the clock says; of one kind of event, or all."""
    lines = Path(f"{save}-{seed}", "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    kept = [e for e in events if event in (None, e["event"])]
    return [{k: v for k, v in e.items() if k != "time"} for e in kept]


def tensors(save, name="meta-learner-last.pth.tar", seed=719):
    """The content of a run's checkpoint."""
    path = Path(f"{save}-{seed}", "ckpts", name)
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_same(a, b, but=("about", "data_root", "logs_end_at")):
    """Two checkpoints, or parts of them, are equal to the bit, but for what a run's place and
    clock decide.
    """
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a.keys() - set(but):
            assert_same(a[k], b[k], but)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y, but)
    else:
        assert a == b


def drawn(root, image_size, length, dtype=torch.float32, device=CPU):
    """Augmented 5-way 5-shot episodes of real JPEGs."""
    dataset = FastEpisodeDataset(
        scan_split(root, "train"), 719, 5, 5, 3, 2, image_size, "port", length, device=device
    )
    for episode in episodes(dataset, 0, 0, device, False):
        yield episode._replace(support=episode.support.to(dtype), query=episode.query.to(dtype))
