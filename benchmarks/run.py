"""Measure time and memory of training and testing: fast/ against --plain, in one process.

    bash benchmarks/run.sh --data-root data/miniImagenet

Each time is the median over several rounds. A round runs each backend once, so that other load on
the machine slows down all of them alike. The table also goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from data.layout import scan_split
from dataloader import EpisodeDataset
from engine.backend import adam, dataset, select_backend
from engine.distributed import SINGLE_PROCESS
from engine.evaluation import Evaluator
from engine.flags import ROOT, Parser, data_name, int_range, path, resolve
from engine.parallel import make_train_step
from engine.process import run_main
from engine.provenance import commit, cpu_name
from engine.stream import episodes
from episode import Episode, trainable_parameters
from fast import native
from fast.graphs import CHECKED, WARM_UP
from fast.library import library
from fast.threads import keep_freed_memory
from main import build
from tools.words import markdown_table
from utils import UserError

TURN = 4  # episodes of a round, end to end
LARGEST = 20  # kernels of a table
BACKENDS = {"cpu": ["plain", "fast", "fast, no compiler"], "cuda": ["plain", "fast"]}
VARIANTS = [{}, {"n_class": 10}, {"n_class": 20}, {"n_shot": 1}, {"n_shot": 10}, {"epoch": 4}]
VARIANTS += [{"epoch": 16}, {"image_size": 42}, {"image_size": 112}]
VARIANTS += [{"filters": 16}, {"filters": 64}]


class Timed:
    """What main.py trains and tests, by default with the port's 5-way 5-shot recipe.

    Args:
        plain: whether to leave out fast/.
        capture: whether episodes become a CUDA graph.
        flags: those that differ from main.py's defaults.
    """

    def __init__(self, device: torch.device, plain: bool, capture: bool = True, **flags):
        self.args = args = resolve({"cpu": device.type == "cpu", "plain": plain, **flags})
        self.backend = select_backend(args)
        if not capture:
            self.backend = self.backend._replace(capture=lambda function, *_: function)
        self.networks = build(args, self.backend)
        how = (args, self.backend, self.networks)
        self.evaluate = Evaluator(*how).evaluate
        optimizer = adam(args, self.backend, trainable_parameters(self.networks.metalearner))
        self._train_step = make_train_step(*how, optimizer, SINGLE_PROCESS)

    def train(self, episode: Episode) -> tuple[torch.Tensor, ...]:
        """Update the meta-learner by one episode."""
        return self._train_step(1, [episode])

    def test(self, episode: Episode) -> tuple[torch.Tensor, ...]:
        """Evaluate one episode."""
        (result,) = self.evaluate([episode])
        return result

    def dataset(self, split: str, length: int) -> EpisodeDataset:
        """Episodes of images on disk."""
        return dataset(self.args, self.backend, scan_split(self.args.data_root, split), length)


def median_seconds(
    functions: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Time functions, by backend, turn by turn.

    The first round does not count; on a GPU, nor do those that capture and check a CUDA graph.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    no_compiler = mock.patch.object(native, "library", return_value=mock.Mock(functions={}))
    uncounted = WARM_UP + CHECKED if device.type == "cuda" else 1
    for n in range(uncounted + rounds):
        for name, function in functions.items():
            keep_freed_memory(name != "plain")  # plain: the C library's own allocator
            with no_compiler if "no compiler" in name else contextlib.nullcontext():
                start = time.perf_counter()
                function()
                if device.type == "cuda":
                    torch.cuda.synchronize()
            if n >= uncounted:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def table(header: list[str], rows: list[list[object]]) -> str:
    """A table with numbers of three digits."""

    def text(cell: object) -> object:
        if not isinstance(cell, float):
            return cell
        return f"{cell:.0f}" if cell >= 1000 else f"{cell:.3g}"

    return markdown_table(header, [list(map(text, row)) for row in rows])


def end_to_end(args: argparse.Namespace, device: torch.device) -> str:
    """Episodes from images on disk to the update, each backend with its own data pipeline."""

    def stepper(name: str, split: str) -> Callable[[], object]:
        precision = "bf16" if "bf16" in name else "fp32"
        model = Timed(device, name == "plain", precision=precision, data_root=args.data_root)
        data = model.dataset(split, TURN * (args.rounds + WARM_UP + CHECKED))
        stream = episodes(data, 0, args.n_workers, device, True)
        if split == "train":
            return lambda: [model.train(episode) for episode in islice(stream, TURN)]
        return lambda: list(model.evaluate(islice(stream, TURN)))

    names = [*BACKENDS[device.type], *(["fast bf16"] if device.type == "cuda" else [])]
    rows: list[list] = [[name] for name in names]
    for split in ("train", "test"):
        steppers = {name: stepper(name, split) for name in names}
        spent = median_seconds(steppers, args.rounds, device)
        for name, row in zip(names, rows, strict=True):
            row += [spent[name] * 1e3 / TURN, spent["plain"] / spent[name]]
    header = ["end to end", "training, ms an episode", "speed relative to plain"]
    return table([*header, "testing, ms an episode", "speed relative to plain"], rows)


def synthetic(device: torch.device, args) -> Episode:
    """An episode of noise of the shape that the flags ask for."""
    generator = torch.Generator().manual_seed(0)
    layout = torch.contiguous_format if args.plain else torch.channels_last

    def images(n: int) -> torch.Tensor:
        x = torch.randn(args.n_class * n, 3, args.image_size, args.image_size, generator=generator)
        return x.to(device).contiguous(memory_format=layout)

    y = torch.arange(args.n_class, device=device)
    order = torch.arange(args.n_class * args.n_shot, device=device).repeat(args.epoch, 1)
    support = images(args.n_shot), y.repeat_interleave(args.n_shot)
    return Episode(*support, images(args.n_eval), y.repeat_interleave(args.n_eval), order)


def parts(args: argparse.Namespace, device: torch.device) -> str:
    """Where the time of an episode goes."""

    def functions(plain: bool) -> dict[str, Callable[[], object]]:
        model = Timed(device, plain, data_root=args.data_root)
        metalearner, (learner, _) = model.networks.metalearner, model.networks.learners
        learner.train()
        data, index = model.dataset("train", 10**6), count()
        episode = synthetic(device, model.args)
        grad = torch.randn_like(metalearner.metalstm.cI) * 1e-3
        loss = torch.tensor(1.5, device=device)

        def unroll() -> None:
            state = metalearner.initial_state()
            for _ in range(model.args.epoch):
                state = metalearner(loss, grad, state)
            state.c.sum().backward()

        images, labels = episode.support, episode.support_y

        def deliver() -> None:
            data.deliver(data[next(index)], device)

        return {
            "one inner update of the learner": lambda: learner.loss_and_grad(images, labels),
            "meta-learner, 8 updates forward and back": unroll,
            "data of a training episode, one thread": deliver,
            "training without data": lambda: model.train(episode),
            "testing without data": lambda: model.test(episode),
        }

    plain, fast, names, rows = functions(True), functions(False), BACKENDS[device.type], []
    for part in plain:
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1 if "one thread" in part else n_threads)
        choice = {name: (plain if name == "plain" else fast)[part] for name in names}
        spent = median_seconds(choice, args.rounds, device)
        torch.set_num_threads(n_threads)
        rows.append([part, *(s * 1e3 for s in spent.values()), spent["plain"] / spent["fast"]])
    return table(["part, ms", *names, "plain : fast"], rows)


def peak(device: torch.device, plain: bool, what: str, epoch: int) -> float:
    """Peak memory of training or testing above this process's before, in MiB."""
    # or the next episode would reuse what one frees
    with mock.patch("fast.threads.keep_freed_memory"):
        model = Timed(device, plain, epoch=epoch)
    episode, function = synthetic(device, model.args), getattr(model, what)
    function(episode._replace(order=episode.order[:1]))  # loads libraries
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    def resident(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**10

    base, on_gpu = resident("VmRSS"), device.type == "cuda"
    for _ in range(WARM_UP + CHECKED + 1 if on_gpu else 2):
        function(episode)
    return torch.cuda.max_memory_reserved() / 2**20 if on_gpu else resident("VmHWM") - base


def memory(_args: argparse.Namespace, device: torch.device) -> str:
    """Peak memory, in a process for each, and its growth with the number of updates."""
    rows = []
    for name in ("plain", "fast"):
        for what in ("train", "test"):
            peaks = []
            for epoch in (8, 24):
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    peaks.append(pool.submit(peak, device, name == "plain", what, epoch).result())
            growth = f"{(peaks[1] - peaks[0]) / 16:.1f}"
            rows.append([f"{name}, {what}", *(f"{p:.0f}" for p in peaks), growth])
    return table(["peak memory, MiB", "8 updates", "24 updates", "per update"], rows)


def scaling(args: argparse.Namespace, device: torch.device) -> str:
    """A training episode as one size changes; a minibatch is the whole support set."""
    rows = []
    for variant in VARIANTS:
        flags = {"batch_size": 10**6, **variant}
        models = {name: Timed(device, name == "plain", **flags) for name in ("plain", "fast")}
        steps = {k: partial(m.train, synthetic(device, m.args)) for k, m in models.items()}
        spent = median_seconds(steps, max(1, args.rounds // 2), device)
        name = ", ".join(f"{k} {v}" for k, v in variant.items()) or "the recipe"
        if "filters" in variant and device.type == "cpu":
            name += " (PyTorch's code: the kernels are for 32)"
        n_params = models["fast"].networks.learners[0].size()
        times = [spent["plain"] * 1e3, spent["fast"] * 1e3, spent["plain"] / spent["fast"]]
        rows.append([name, n_params, *times])
    header = ["training without data", "learner parameters", "plain, ms", "fast, ms"]
    return table([*header, "plain : fast"], rows)


def kernels(_args: argparse.Namespace, device: torch.device) -> str:
    """A GPU's time for one training episode, by kernel, without a CUDA graph; of a CPU nothing."""
    if device.type == "cpu":
        return ""
    model = Timed(device, plain=False, capture=False)
    episode = synthetic(device, model.args)
    for _ in range(2):
        model.train(episode)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        model.train(episode)
        torch.cuda.synchronize()
    found = [(e.key[:90], e.count, e.self_device_time_total / 1e3) for e in profile.key_averages()]
    found = sorted((row for row in found if row[-1] > 0), key=lambda row: -row[-1])
    total = ["all", sum(n for _, n, _ in found), sum(ms for *_, ms in found)]
    return table(["kernel", "launches", "ms"], [*found[:LARGEST], total])


SECTIONS = {f.__name__.replace("_", "-"): f for f in (end_to_end, parts, scaling, memory, kernels)}


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    words = "data set to time with (default: data/glyphs)"
    add("--data-root", type=path, default=ROOT / "data" / "glyphs", help=words)
    words = "rounds, of which the median is reported (default: 7)"
    add("--rounds", type=int_range(1), default=7, metavar="N", help=words)
    words = "worker processes of each data pipeline (default: 2)"
    add("--n-workers", type=int_range(0), default=2, metavar="N", help=words)
    add("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    words = "what to measure (default: everything)"
    add("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help=words)
    words = "writes OUT (default: benchmarks/results/cpu.md or cuda.md)"
    add("--out", type=path, help=words)
    args = parser.parse_args(argv)
    device = torch.device("cpu" if args.cpu or not torch.cuda.is_available() else "cuda")
    out = Path(args.out or ROOT / "benchmarks" / "results" / f"{device.type}.md")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    name = f"{cpu_name()}, {torch.get_num_threads()} threads, {library().state}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    now = f"torch {torch.__version__}; commit {commit()}; {time.strftime('%Y-%m-%d')}"
    command = shlex.join(["bash", "benchmarks/run.sh", *argv])
    blocks = [f"`{command}` on {name}; {now}; data: {data_name(args)}"]
    print(blocks[0])
    for name in args.sections:
        if found := SECTIONS[name](args, device):
            print(f"\n{found}", flush=True)
            blocks.append(found)
    out.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    print(f"\nwritten to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
