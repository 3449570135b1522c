import contextlib
import copy
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
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
from data.layout import scan_split
from dataloader import EpisodeDataset
from engine.backend import make_reproducible
from engine.process import run_main
from engine.stream import episodes
from episode import Episode, evaluate_episode, meta_gradient, step_if_finite, update_metalearner
from learner import Conv4
from metalearner import MetaLearner

# nohup and a shell's & ignore these signals, and what the tests start would, too
usual = ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL))
for number, handler in usual:
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

CPU = torch.device("cpu")
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
LEARNERS, METALEARNERS = {"plain": Conv4}, {"plain": MetaLearner}
DATASETS, STEPS = {"plain": EpisodeDataset}, {"plain": step_if_finite}
if importlib.util.find_spec("fast") is not None:
    from fast.graphs import CUDAGraphFunction, step_without_sync
    from fast.images import FastEpisodeDataset
    from fast.learner import FastConv4
    from fast.metalearner import FastMetaLearner

    LEARNERS["fast"], METALEARNERS["fast"] = FastConv4, FastMetaLearner
    STEPS["fast"] = step_without_sync
    DATASETS["fast"] = partial(FastEpisodeDataset, device=CPU)
else:  # the folder is gone: what tests it goes with it
    collect_ignore = [
        str(path.relative_to(Path(__file__).parent))
        for path in Path(__file__).parent.rglob("test_*.py")
        if re.search(r"^(from|import) fast", path.read_text(), re.MULTILINE)
    ]
BACKENDS = tuple(LEARNERS)


def pytest_configure(config):
    """Leave the GPU to ``pytest -m gpu``; one thread, since forks lose those of OpenMP."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ONE_THREAD["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip("no GPU here, or not asked for by -m gpu"))


def networks(
    backend, image_size, dtype, n_class=5, hidden_size=20, gates=(), device="cpu", **options
):
    """Two equal learners, and a meta-learner that starts as they do."""
    learner = LEARNERS[backend](image_size, 1e-3, 0.95, n_class, **options).to(device, dtype)
    meta = METALEARNERS[backend](4, hidden_size, learner.size(), *gates).to(device, dtype)
    meta.init_cI(learner.get_flat_params())
    return learner, copy.deepcopy(learner), meta


class Model:
    """A backend's learners, meta-learner and Adam, always from the same initialisation."""

    def __init__(self, backend, image_size, dtype=torch.float32, batch_size=25, **options):
        torch.manual_seed(1)
        *self.learners, self.meta = networks(backend, image_size, dtype, **options)
        self.scratch = copy.deepcopy(self.learners)
        self.optimizer = make_adam(backend, self.meta)
        self.step, self.batch_size = STEPS[backend], batch_size

    def captured(self, mode):
        """``train`` or ``test``, to be recorded as a CUDA graph."""
        if mode == "train":
            return CUDAGraphFunction(self.train, (*self.learners, self.meta), self.optimizer)
        return CUDAGraphFunction(self.test, (*self.scratch, self.meta))

    def train(self, episode):
        gradient, loss, percent = meta_gradient(episode, *self.learners, self.meta, self.batch_size)
        how = (self.meta, self.optimizer, 0.25, self.step)
        return loss, percent, update_metalearner(gradient.unsqueeze(0), loss.unsqueeze(0), *how)

    def test(self, episode):
        return evaluate_episode(episode, *self.scratch, self.meta, self.batch_size)

    def everything(self):
        weights = self.meta.state_dict().values()
        return [t.clone() for t in (*weights, *adam_state(self.optimizer))]


def make_adam(backend, meta):
    return torch.optim.Adam(meta.parameters(), lr=1e-3, fused=backend == "fast")


def adam_state(optimizer):
    return [t for state in optimizer.state.values() for t in state.values()]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Plain, as the root has it, and fast."""
    return request.param


@pytest.fixture(autouse=True)
def _seeded():
    make_reproducible(0)
    yield
    torch.set_num_threads(1)


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A smooth random picture, which JPEG keeps well."""
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def master(tmp_path_factory):
    """A small data set of real JPEG files: 6 classes of 8 images in each split."""
    root = tmp_path_factory.mktemp("master")
    rng = np.random.default_rng(1)
    for split in ("train", "val", "test"):
        for c in range(6):
            folder = root / split / (f"class {c}" if split == "train" else f"{split} class {c}")
            folder.mkdir(parents=True)
            for k in range(8):
                image = photograph(rng, int(rng.integers(18, 40)), int(rng.integers(18, 40)))
                image.save(folder / f"{k}.jpg", quality=95)
    return root


@pytest.fixture
def data(master, tmp_path):
    """A copy of the small data set that a test may damage."""
    return shutil.copytree(master, tmp_path / "data", ignore=shutil.ignore_patterns(".decoded"))


def make(backend, n_shot=2, n_pass=2, size=16, dtype=torch.float32):
    """An episode, and the networks that learn from it."""
    torch.manual_seed(0)
    models = networks(backend, size, dtype, n_class=3, hidden_size=5, gates=[(-2.0, -1.0)])
    return new_episode(n_shot=n_shot, n_pass=n_pass, size=size, dtype=dtype), *models


def new_episode(n_class=3, n_shot=2, n_eval=2, n_pass=2, size=16, dtype=torch.float32):
    """Noise: images of ``size`` pixels, or vectors if ``size`` is a shape."""
    shape, y = (3, size, size) if isinstance(size, int) else size, torch.arange(n_class)
    support = torch.randn(n_class * n_shot, *shape, dtype=dtype)
    query = torch.randn(n_class * n_eval, *shape, dtype=dtype)
    order = torch.stack([torch.randperm(n_class * n_shot) for _ in range(n_pass)])
    labels = y.repeat_interleave(n_shot), y.repeat_interleave(n_eval)
    return Episode(support, labels[0], query, labels[1], order)


def dataset(backend, root, split="train", length=6, **kwargs):
    settings = dict(n_class=3, n_shot=2, n_eval=3, n_pass=2, image_size=16, augment="port") | kwargs
    return DATASETS[backend](scan_split(root, split), 719, length=length, **settings)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def refused(done, *culprits):
    """The one line with which a command has refused its input; it names all the culprits."""
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert all(str(culprit) in done.stderr for culprit in culprits), done.stderr
    return done.stderr


def before_call(patch, module, name, do):
    """Call ``do(n)`` before a function's nth call, n = 1, 2, ...; ``patch`` is a ``setattr``."""
    original, calls = getattr(module, name), itertools.count(1)
    patch(module, name, lambda *args, **kwargs: do(next(calls)) or original(*args, **kwargs))


def poisoned(episode):
    """An episode whose query images are not finite."""
    return episode._replace(query=episode.query * float("nan"))


def kill_self(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


# ---- The command line ----


def completed(command, **kwargs):
    """Run a command in a process of its own, on one thread."""
    how = {"capture_output": True, "text": True, "timeout": 600, "env": ONE_THREAD, **kwargs}
    return subprocess.run(command, check=False, **how)


def wait_for_lines(log, n_lines, *processes):
    """Wait until a run has logged as many lines; the processes must live that long."""
    deadline = time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n") >= n_lines):
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < deadline
        time.sleep(0.01)


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


SMALL = "--cpu --image-size 16 --n-class 3 --n-shot 1 --n-eval 2 --epoch 2 --log-freq 1"
SMALL = (SMALL + " --n-workers 0 --plots false").split()


def training(data, save, *flags, episode=4, val_freq=2):
    """The words of a small training, 3-way 1-shot on 16 pixels; later flags win."""
    run = ["--mode", "train", "--data-root", data, "--save", save, "--episode", episode]
    run += ["--val-freq", val_freq, "--episode-val", 2, *SMALL, *flags]
    return [str(word) for word in run]


def train(*words, **length):
    """Run a small training, as ``training`` describes it."""
    return run_cli(*training(*words, **length))


def pretrain(data, save, *flags, episode=4):
    """Run a small pre-training, on all classes."""
    run = ["--mode", "pretrain", "--data-root", data, "--save", save, "--episode", episode]
    words = [word for word in SMALL if word not in ("--n-class", "3")]
    return run_cli(*run, "--val-freq", 2, *words, *flags)


def run_test(data, save, *flags):
    """Test a run; without ``data`` the run has to know where its images are."""
    root = [] if data is None else ["--data-root", data]
    return run_cli("--mode", "test", *root, "--save", save, "--cpu", "--n-workers", 0, *flags)


@pytest.fixture(scope="session")
def trained(master, tmp_path_factory):
    """A run of four episodes with two validations; only tests that leave it as it is take it."""
    save = tmp_path_factory.mktemp("trained") / "logs"
    succeeded(train(master, save))
    return save


@pytest.fixture
def own(trained, tmp_path):
    """A copy of ``trained``."""
    shutil.copytree(f"{trained}-719", tmp_path / "own-719")
    return tmp_path / "own"


def succeeded(done):
    """What a command that has succeeded has printed."""
    assert done.returncode == 0, done.stderr
    return done.stdout


def metrics(save, event=None, seed=719):
    """A run's ``metrics.jsonl`` without what the clock says; of one kind of event, or all."""
    lines = Path(f"{save}-{seed}", "metrics.jsonl").read_text().splitlines()
    kept = [e for e in map(json.loads, lines) if event in (None, e["event"])]
    return [{k: v for k, v in e.items() if k != "time"} for e in kept]


def tensors(save, name="meta-learner-last.pth.tar", seed=719):
    """The content of a run's checkpoint."""
    path = Path(f"{save}-{seed}", "ckpts", name)
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_same(a, b, but=("about", "data_root", "logs_end_at")):
    """Two checkpoints, or parts of them, are equal to the bit, but for a run's place and clock."""
    assert type(a) is type(b)
    if isinstance(a, list | tuple):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a.keys() - set(but):
            assert_same(a[k], b[k], but)
    else:
        assert a == b


def assert_same_runs(a, b):
    """Two runs end with the same bits, and have logged the same numbers."""
    assert_same(tensors(a), tensors(b))
    assert metrics(a) == metrics(b)


def drawn(root, image_size, length, dtype=torch.float32, device=CPU):
    """Augmented 5-way 5-shot episodes of real JPEGs."""
    dataset = FastEpisodeDataset(
        scan_split(root, "train"), 719, 5, 5, 3, 2, image_size, "port", length, device=device
    )
    for episode in episodes(dataset, 0, 0, device, False):
        yield episode._replace(support=episode.support.to(dtype), query=episode.query.to(dtype))
