"""Time and memory of training and testing, ours against the textbook way, turn by turn in one process.

Every figure is the median of several rounds; a round runs ours, then the textbook's, so that a machine's moods hit both.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import textbook
import torch

import dataloader
import learner
import native
from cache import load_image, reduced_size
from capture import WARM_UP, Captured
from dataloader import EpisodeDataset, scan_split
from episode import Episode, evaluate_episode, train_episode
from evaluation import side_by_side
from learner import Learner
from metalearner import MetaLearner
from utils import UserError, keep_freed_memory

RECIPE = {"n_class": 5, "n_shot": 5, "n_eval": 15, "n_pass": 8, "image_size": 84}
BATCH_SIZE = 25


class Ours:
    """The project's path: decoded images, batched augmentation, hand-written backward passes, compiled or captured."""

    def __init__(self, device: torch.device, n_class=5, image_size=84, precision=None, batch_size=BATCH_SIZE, **_):
        torch.manual_seed(719)
        first = Learner(image_size, 1e-3, 0.95, n_class, "one", precision).to(device)
        self.learners = (first, copy.deepcopy(first))
        self.scratch = copy.deepcopy(self.learners)
        self.batch_size = batch_size
        self.meta = MetaLearner(4, 20, first.get_flat_params().numel()).to(device)
        self.meta.metalstm.init_cI(first.get_flat_params())
        self.optimizer = torch.optim.Adam(self.meta.parameters(), lr=1e-3, fused=True)
        graphs = device.type == "cuda"
        self.train = Captured(self._train, self.optimizer) if graphs else self._train
        self.test = Captured(self._test) if graphs else self._test

    def _train(self, episode: Episode) -> tuple[torch.Tensor, ...]:
        return train_episode(episode, *self.learners, self.meta, self.optimizer, self.batch_size, 0.25)

    def _test(self, episode: Episode) -> tuple[torch.Tensor, ...]:
        return evaluate_episode(episode, *self.scratch, self.meta, self.batch_size)

    def test_in_a_thread(self, episode: Episode) -> tuple[torch.Tensor, ...]:
        return evaluate_episode(episode, *copy.deepcopy(self.scratch), self.meta, self.batch_size)


class Textbook:
    """Plain modules, NCHW, autograd through everything."""

    def __init__(self, device: torch.device, n_class=5, image_size=84, batch_size=BATCH_SIZE, **_):
        torch.manual_seed(719)
        self.learners = [textbook.TextbookLearner(image_size, 1e-3, 0.95, n_class).to(device) for _ in range(2)]
        self.batch_size = batch_size
        n_params = sum(p.numel() for p in self.learners[0].parameters())
        self.meta = textbook.TextbookMetaLearner(20, n_params).to(device)
        flat = torch.cat([p.detach().reshape(-1) for p in self.learners[0].parameters()])
        self.meta.metalstm["cI"].data.copy_(flat.unsqueeze(1))
        self.optimizer = torch.optim.Adam(self.meta.parameters(), lr=1e-3, fused=True)

    def train(self, episode: Episode) -> tuple[torch.Tensor, ...]:
        return textbook.train_episode(episode, self.learners, self.meta, self.optimizer, self.batch_size, 0.25)

    def test(self, episode: Episode) -> tuple[torch.Tensor, ...]:
        return textbook.evaluate_episode(episode, self.learners, self.meta, self.batch_size)


@contextlib.contextmanager
def without_kernels():
    """PyTorch alone, as where there is no C++ compiler."""
    with mock.patch.object(native, "library", return_value=mock.Mock(functions={})):
        yield


def seconds(function: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def turns(functions: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each function, all of them once a round.

    One round is not counted; on a GPU those are not, in which graphs are recorded.

    What is called the textbook's runs with the C library's own setting of the allocator, as a plain program does; what is said
    to have no compiler runs without the kernels.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    uncounted = WARM_UP + 1 if device.type == "cuda" else 1
    for round_ in range(uncounted + rounds):
        for name, function in functions.items():
            keep_freed_memory(name != "textbook")
            with without_kernels() if "no compiler" in name else contextlib.nullcontext():
                spent = seconds(function, device)
            if round_ >= uncounted:
                times[name].append(spent)
    return {name: statistics.median(values) for name, values in times.items()}


def row(*cells: object) -> str:
    def text(cell: object) -> str:
        return str(cell) if not isinstance(cell, float) else f"{cell:.0f}" if cell >= 1000 else f"{cell:.3g}"

    return "| " + " | ".join(map(text, cells)) + " |"


def table(*head: str) -> list[str]:
    return ["", row(*head), "|" + "-|" * len(head)]


def end_to_end(root: Path, rounds: int, workers: int, device: torch.device) -> list[str]:
    """Episodes from images on disk through to the update, each path with its own data pipeline running ahead."""
    names = ["ours fp32", "ours bf16", *(["ours fp32, no compiler"] if device.type == "cpu" else []), "textbook"]
    spent = {}
    for what in ("train", "test"):
        length = 4 * (rounds + WARM_UP + 2)
        found = scan_split(root, what)
        ours = EpisodeDataset(found, 719, **RECIPE, augment="port", length=length)
        plain = textbook.TextbookDataset(found, 719, **RECIPE, length=length)

        def stepper(model: Ours | Textbook, stream: Iterator[Episode], what: str = what) -> Callable[[], object]:
            if what == "test" and isinstance(model, Ours) and device.type == "cpu":
                return lambda: list(side_by_side(model.test_in_a_thread, islice(stream, 4), torch.get_num_threads()))
            step = getattr(model, what)
            return lambda: [step(Episode(*(t.to(device) for t in next(stream)))) for _ in range(4)]

        steppers = {}
        for name in names:
            if name == "textbook":
                steppers[name] = stepper(Textbook(device), textbook.episodes(plain, workers))
            else:
                model = Ours(device, precision=torch.bfloat16 if "bf16" in name else None)
                steppers[name] = stepper(model, dataloader.episodes(ours, 0, workers, device, True))
        spent[what] = turns(steppers, rounds, device)
    lines = table("end to end", "training, ms an episode", "times the textbook's speed", "testing, ms", "times")
    for name in names:
        cells = [x for of in spent.values() for x in (of[name] * 250, of["textbook"] / of[name])]
        lines.append(row(name, *cells))
    return lines


def synthetic(device: torch.device, n_class=5, n_shot=5, n_eval=15, n_pass=8, image_size=84) -> Episode:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n_class, device=device)
    support, query = (
        torch.randn(n_class * k, 3, image_size, image_size, generator=generator)
        .to(device)
        .contiguous(memory_format=torch.channels_last)
        for k in (n_shot, n_eval)
    )
    order = torch.arange(n_class * n_shot, device=device).repeat(n_pass, 1)
    return Episode(support, y.repeat_interleave(n_shot), query, y.repeat_interleave(n_eval), order)


def parts(root: Path, rounds: int, device: torch.device) -> list[str]:
    """Where the time of an episode goes."""
    ours, plain, episode = Ours(device), Textbook(device), synthetic(device)
    found = scan_split(root, "train")
    ready = EpisodeDataset(found, 719, **RECIPE, augment="port", length=10**6)
    slow = textbook.TextbookDataset(found, 719, **RECIPE, length=10**6)
    w_grad, other = ours.learners[0].train(), plain.learners[0].train()
    flat = episode.support.contiguous()
    grad = torch.randn_like(ours.meta.metalstm.cI) * 1e-3
    loss = torch.tensor(1.5, device=device)

    def textbook_update() -> None:
        torch.nn.functional.cross_entropy(other(flat), episode.support_y).backward()

    def unroll(meta: Callable, state: object, c: Callable) -> None:
        for _ in range(8):
            state = meta(loss, grad, state)
        c(state).sum().backward()

    cI = plain.meta.metalstm["cI"]
    start = (None, torch.zeros_like(cI), torch.zeros_like(cI), cI)
    index = iter(range(10**6))
    pairs = {
        "one inner update of the learner": (
            lambda: w_grad.loss_and_grad(episode.support, episode.support_y),
            textbook_update,
        ),
        "meta-learner, 8 updates forward and back": (
            lambda: unroll(ours.meta, ours.meta.initial_state(), lambda s: s.c),
            lambda: unroll(plain.meta, start, lambda s: s[3]),
        ),
        "data of a training episode, one thread": (
            lambda: ready.assemble_on_cpu(ready[next(index)]),
            lambda: slow[next(index)],
        ),
        "training, data aside": (lambda: ours.train(episode), lambda: plain.train(episode)),
        "testing, data aside": (lambda: ours.test(episode), lambda: plain.test(episode)),
    }
    names = ["ours", *(["ours, no compiler"] if device.type == "cpu" else []), "textbook"]
    lines = table("part, ms", *names, "ours : textbook")
    for name, (mine, theirs) in pairs.items():
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1 if "one thread" in name else n_threads)
        spent = turns({k: theirs if k == "textbook" else mine for k in names}, rounds, device)
        torch.set_num_threads(n_threads)
        lines.append(row(name, *(v * 1e3 for v in spent.values()), spent["textbook"] / spent["ours"]))
    return lines


MEMORY = """
import resource, sys, threading
sys.path[:0] = [{root!r}, {root!r} + "/benchmarks"]
import torch, run
device = torch.device({device!r})
model, episode = run.{kind}(device), run.synthetic(device, n_pass={n_pass})
model.{what}(run.synthetic(device, n_pass=1))  # what loads once
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
base, peak, stop = resident(), 0, threading.Event()
def watch():
    global peak
    while not stop.wait(0.001):
        peak = max(peak, resident())
watcher = threading.Thread(target=watch)
watcher.start()
for _ in range(run.WARM_UP + 2 if device.type == "cuda" else 2):
    model.{what}(episode)
stop.set()
watcher.join()
print((torch.cuda.max_memory_reserved() if device.type == "cuda" else peak - base) / 2**20)
"""


def memory(device: torch.device) -> list[str]:
    """Peak memory above what a process starts with, one process each, and its growth with the number of updates."""
    lines = table("peak memory, MiB", "8 updates", "24 updates", "each update more")
    for kind in ("Ours", "Textbook"):
        for what in ("train", "test"):
            peaks = []
            for n_pass in (8, 24):
                code = MEMORY.format(root=str(ROOT), device=str(device), kind=kind, what=what, n_pass=n_pass)
                found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
                peaks.append(float(found.stdout.split()[-1]))
            lines.append(row(f"{kind.lower()}, {what}", *(f"{p:.0f}" for p in peaks), f"{(peaks[1] - peaks[0]) / 16:.1f}"))
    return lines


def scaling(rounds: int, device: torch.device) -> list[str]:
    """Cost of a training episode as each size changes, the others being the recipe's."""
    variants = [
        {},
        {"n_class": 10},
        {"n_class": 20},
        {"n_shot": 1},
        {"n_shot": 10},
        {"n_pass": 4},
        {"n_pass": 16},
        {"image_size": 42},
        {"image_size": 112},
        {"filters": 16},
        {"filters": 64},
    ]
    lines = table("training episode, data aside", "learner parameters", "ours ms", "textbook ms", "ratio")
    for variant in variants:
        shape = RECIPE | variant
        filters = shape.pop("filters", 32)
        episode = synthetic(device, **shape)
        shape["batch_size"] = episode.support.shape[0]
        with mock.patch.object(learner, "N_FILTERS", filters), mock.patch.object(textbook, "N_FILTERS", filters):
            ours, plain = Ours(device, **shape), Textbook(device, **shape)
        pair = {name: partial(model.train, episode) for name, model in (("ours", ours), ("textbook", plain))}
        spent = turns(pair, rounds, device)
        name = ", ".join(f"{k} {v}" for k, v in variant.items()) or "the recipe"
        if filters != 32 and device.type == "cpu":
            name += " (PyTorch's blocks: the kernels are for 32)"
        n_params = ours.meta.metalstm.cI.numel()
        lines.append(row(name, n_params, spent["ours"] * 1e3, spent["textbook"] * 1e3, spent["textbook"] / spent["ours"]))
    return lines


def start(root: Path, rounds: int, device: torch.device) -> list[str]:
    """From the command to the end of its first episode, the images being decoded already."""
    n_images = sum(map(len, scan_split(root, "train").files))
    times = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "main.py"), "--data-root", str(root), "--save", f"{folder}/logs"]
            command += ["--mode", "train", "--episode", "2", "--log-freq", "1", "--val-freq", "0", "--plots", "false"]
            command += ["--cpu"] if device.type == "cpu" else []
            begun = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
                next(line for line in process.stdout if line.startswith("["))
                times.append(time.perf_counter() - begun)
    lines = table("a run's start, to the end of its first episode", "s")
    return [*lines, row(f"{n_images} images to train on, decoded before", statistics.median(times))]


def reduction() -> list[str]:
    """What reducing a large photograph to 2 x 84 px changes in random crops of it, in grey levels."""
    import matplotlib
    import numpy as np
    from PIL import Image

    photograph = load_image(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")
    small = photograph.resize(reduced_size(*photograph.size, 84), Image.Resampling.LANCZOS)
    drawn = dataloader.draw_augmentation(0, "train", 0, np.tile((photograph.height, photograph.width), (500, 1)))
    scale = small.height / photograph.height
    differences, areas = [], []
    for top, left, height, width in drawn.box.tolist():
        large = photograph.resize((84, 84), Image.Resampling.BILINEAR, (left, top, left + width, top + height))
        box = (left * scale, top * scale, min((left + width) * scale, small.width), min((top + height) * scale, small.height))
        reduced = small.resize((84, 84), Image.Resampling.BILINEAR, box)
        differences.append(np.abs(np.asarray(large, float) - np.asarray(reduced, float)).mean())
        areas.append(height * width / (photograph.height * photograph.width))
    differences, areas = np.array(differences), np.array(areas)
    lines = table("area of the crop", "mean absolute difference, grey levels")
    for low, high in ((0.08, 0.25), (0.25, 0.5), (0.5, 1.01)):
        inside = (areas >= low) & (areas < high)
        lines.append(row(f"{low:.0%} to {min(high, 1):.0%}", f"{differences[inside].mean():.2f}"))
    return [*lines, row(f"all (a photograph of {photograph.width}x{photograph.height} px)", f"{differences.mean():.2f}")]


def machine(device: torch.device) -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((x.split(":")[1].strip() for x in info.splitlines() if x.startswith("model name")), platform.processor())
    name = f"{cpu}, {torch.get_num_threads()} threads, {native.library().state}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False)
    return f"{name}; torch {torch.__version__}; commit {commit.stdout.strip() or 'unknown'}; {time.strftime('%Y-%m-%d')}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmarks of the 5-way 5-shot recipe, ours against the textbook way.")
    glyphs = ROOT / "data" / "glyphs"
    parser.add_argument("--data-root", type=Path, default=glyphs, help="images to time with (default: data/glyphs)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of which the median is reported (default: 7)")
    parser.add_argument("--n-workers", type=int, default=2, help="worker processes of both data pipelines (default: 2)")
    parser.add_argument("--cpu", action="store_true", help="the CPU even where there is a GPU")
    parser.add_argument("--name", default=None, help="name of the table in benchmarks/results (default: cpu or cuda)")
    args = parser.parse_args()
    device = torch.device("cpu" if args.cpu or not torch.cuda.is_available() else "cuda")
    keep_freed_memory()
    command = f"bash benchmarks/run.sh --rounds {args.rounds} --n-workers {args.n_workers}"
    lines = [f"`{command}` on {machine(device)}; data: {args.data_root.name}"]
    print(lines[0])
    sections = (
        lambda: end_to_end(args.data_root, args.rounds, args.n_workers, device),
        lambda: parts(args.data_root, args.rounds, device),
        lambda: memory(device),
        lambda: scaling(max(1, args.rounds // 2), device),
        lambda: start(args.data_root, 3, device),
        reduction,
    )
    for section in sections:
        found = section()
        print("\n".join(found), flush=True)
        lines += found
    place = ROOT / "benchmarks" / "results" / f"{args.name or device.type}.md"
    place.parent.mkdir(exist_ok=True)
    place.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\nwritten to {place}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
