"""Time and memory of training and testing: fast/ against --plain, turn by turn in one process.

Every figure is the median of several rounds; a round runs each way once, so that a machine's moods
hit both.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from dataloader import draw_augmentation, episodes, load_image, scan_split
from engine.backend import choose, dataset
from engine.evaluation import Evaluator
from engine.flags import parse, settle
from engine.run import begin_worker
from episode import Episode, train_episode
from fast import native
from fast.graphs import CHECKED, WARM_UP
from fast.images import reduced_size
from fast.library import library
from fast.threads import keep_freed_memory
from main import build
from utils import UserError

TURN = 4  # episodes


class Model:
    """What main.py trains and tests with these flags; the others are those of the 5-way 5-shot
    recipe.
    """

    def __init__(self, device: torch.device, plain: bool, **flags):
        self.args = args = settle(
            {"cpu": device.type == "cpu", "plain": plain, **flags}, parse([])[1]
        )
        self.way = choose(args)
        learners, self.meta = build(args, self.way)
        self.learner = learners[0].train()
        self.optimizer = self.way.adam(self.meta.parameters(), lr=args.lr)
        self.test = Evaluator(args, self.way, learners, self.meta).lanes.one

        def train(episode: Episode) -> tuple[torch.Tensor, ...]:
            more = (self.meta, self.optimizer, args.batch_size, args.grad_clip, self.way.step)
            return train_episode(episode, *learners, *more)

        self.train = self.way.recorded(train, (*learners, self.meta), self.optimizer)


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


def turns(
    functions: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each function, all of them once a round.

    One round is not counted; on a GPU those are not, in which graphs are recorded and checked.

    What is called plain runs with the C library's own setting of the allocator, as with
    ``--plain``; what is said to have no compiler runs without the kernels.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    uncounted = WARM_UP + CHECKED if device.type == "cuda" else 1
    for round_ in range(uncounted + rounds):
        for name, function in functions.items():
            keep_freed_memory(name != "plain")
            with without_kernels() if "no compiler" in name else contextlib.nullcontext():
                spent = seconds(function, device)
            if round_ >= uncounted:
                times[name].append(spent)
    return {name: statistics.median(values) for name, values in times.items()}


def ways(device: torch.device, bf16: bool = False) -> list[str]:
    """The columns or rows of a table."""
    without = ["fast, no compiler"] if device.type == "cpu" else []
    return ["plain", "fast", *(["fast bf16"] if bf16 else []), *without]


def row(*cells: object) -> str:
    def text(cell: object) -> str:
        return (
            str(cell)
            if not isinstance(cell, float)
            else f"{cell:.0f}"
            if cell >= 1000
            else f"{cell:.3g}"
        )

    return "| " + " | ".join(map(text, cells)) + " |"


def table(*head: str) -> list[str]:
    return ["", row(*head), "|" + "-|" * len(head)]


def end_to_end(root: Path, rounds: int, workers: int, device: torch.device) -> list[str]:
    """Episodes from images on disk through to the update, each way with its own data pipeline
    running ahead.
    """
    names, spent = ways(device, bf16=True), {}
    for what in ("train", "test"):

        def stepper(name: str, what: str = what) -> Callable[[], object]:
            model = Model(
                device,
                name == "plain",
                precision="bf16" if "bf16" in name else "fp32",
                data_root=root,
            )
            data = dataset(
                model.args, model.way, scan_split(root, what), TURN * (rounds + WARM_UP + CHECKED)
            )
            stream = episodes(data, 0, workers, device, True, begin_worker)
            step, together = (model.train, map) if what == "train" else (model.test, model.way.map)
            return lambda: list(together(step, islice(stream, TURN)))

        spent[what] = turns({name: stepper(name) for name in names}, rounds, device)
    lines = table(
        "end to end",
        "training, ms an episode",
        "times plain's speed",
        "testing, ms",
        "times plain's speed",
    )
    for name in names:
        cells = [
            x for of in spent.values() for x in (of[name] * 1e3 / TURN, of["plain"] / of[name])
        ]
        lines.append(row(name, *cells))
    return lines


def synthetic(device: torch.device, args: argparse.Namespace) -> Episode:
    """An episode of noise in the shape that the flags ask for."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(args.n_class, device=device)
    support, query = (
        torch.randn(args.n_class * k, 3, args.image_size, args.image_size, generator=generator)
        .to(device)
        .contiguous(memory_format=torch.contiguous_format if args.plain else torch.channels_last)
        for k in (args.n_shot, args.n_eval)
    )
    order = torch.arange(args.n_class * args.n_shot, device=device).repeat(args.epoch, 1)
    return Episode(
        support, y.repeat_interleave(args.n_shot), query, y.repeat_interleave(args.n_eval), order
    )


def parts(root: Path, rounds: int, device: torch.device) -> list[str]:
    """Where the time of an episode goes."""

    def of(plain: bool) -> dict[str, Callable[[], object]]:
        model = Model(device, plain, data_root=root)
        data = dataset(model.args, model.way, scan_split(root, "train"), 10**6)
        index, episode = iter(range(10**6)), synthetic(device, model.args)
        grad, loss = (
            torch.randn_like(model.meta.metalstm.cI) * 1e-3,
            torch.tensor(1.5, device=device),
        )

        def unroll() -> None:
            state = model.meta.initial_state()
            for _ in range(model.args.epoch):
                state = model.meta(loss, grad, state)
            state.c.sum().backward()

        return {
            "one inner update of the learner": lambda: model.learner.loss_and_grad(
                episode.support, episode.support_y
            ),
            "meta-learner, 8 updates forward and back": unroll,
            "data of a training episode, one thread": lambda: data.deliver(
                data[next(index)], device
            ),
            "training, data aside": lambda: model.train(episode),
            "testing, data aside": lambda: model.test(episode),
        }

    plain, fast, names = of(True), of(False), ways(device)
    lines = table("part, ms", *names, "plain : fast")
    for part in plain:
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1 if "one thread" in part else n_threads)
        spent = turns(
            {name: (plain if name == "plain" else fast)[part] for name in names}, rounds, device
        )
        torch.set_num_threads(n_threads)
        lines.append(row(part, *(v * 1e3 for v in spent.values()), spent["plain"] / spent["fast"]))
    return lines


MEMORY = """
import resource, sys, threading
sys.path[:0] = [{root!r}, {root!r} + "/benchmarks"]
import torch, run, fast.threads
fast.threads.keep_freed_memory = lambda: None  # or what the first episode frees would not be counted again
device = torch.device({device!r})
model = run.Model(device, {plain}, epoch={epoch})
episode = run.synthetic(device, model.args)
model.{what}(episode._replace(order=episode.order[:1]))  # what loads once
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
base, peak, stop = resident(), 0, threading.Event()
def watch():
    global peak
    while not stop.wait(0.001):
        peak = max(peak, resident())
watcher = threading.Thread(target=watch)
watcher.start()
for _ in range(run.WARM_UP + run.CHECKED + 1 if device.type == "cuda" else 2):
    model.{what}(episode)
stop.set()
watcher.join()
print((torch.cuda.max_memory_reserved() if device.type == "cuda" else peak - base) / 2**20)
"""


def memory(device: torch.device) -> list[str]:
    """Peak memory above what a process starts with, one process each, and its growth with the
    number of updates.
    """
    lines = table("peak memory, MiB", "8 updates", "24 updates", "each update more")
    for name in ("plain", "fast"):
        for what in ("train", "test"):
            peaks = []
            for epoch in (8, 24):
                code = MEMORY.format(
                    root=str(ROOT),
                    device=str(device),
                    plain=name == "plain",
                    what=what,
                    epoch=epoch,
                )
                found = subprocess.run(
                    [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
                )
                peaks.append(float(found.stdout.split()[-1]))
            lines.append(
                row(
                    f"{name}, {what}",
                    *(f"{p:.0f}" for p in peaks),
                    f"{(peaks[1] - peaks[0]) / 16:.1f}",
                )
            )
    return lines


VARIANTS = [
    {},
    {"n_class": 10},
    {"n_class": 20},
    {"n_shot": 1},
    {"n_shot": 10},
    {"epoch": 4},
    {"epoch": 16},
]
VARIANTS += [{"image_size": 42}, {"image_size": 112}, {"filters": 16}, {"filters": 64}]


def scaling(rounds: int, device: torch.device) -> list[str]:
    """Cost of a training episode as each size changes, the others being the recipe's; a minibatch
    is the whole support set.
    """
    lines = table(
        "training episode, data aside",
        "learner parameters",
        "plain, ms",
        "fast, ms",
        "plain : fast",
    )
    for variant in VARIANTS:
        models = {
            k: Model(device, k == "plain", **{"batch_size": 10**6, **variant})
            for k in ("plain", "fast")
        }
        spent = turns(
            {k: partial(m.train, synthetic(device, m.args)) for k, m in models.items()},
            rounds,
            device,
        )
        name = ", ".join(f"{k} {v}" for k, v in variant.items()) or "the recipe"
        if "filters" in variant and device.type == "cpu":
            name += " (PyTorch's blocks: the kernels are for 32)"
        n_params = models["fast"].meta.metalstm.cI.numel()
        lines.append(
            row(
                name,
                n_params,
                spent["plain"] * 1e3,
                spent["fast"] * 1e3,
                spent["plain"] / spent["fast"],
            )
        )
    return lines


def start(root: Path, rounds: int, device: torch.device) -> list[str]:
    """From the command to the end of its first episode; for the fast way the images are decoded
    already.
    """
    n_images = sum(map(len, scan_split(root, "train").files))
    times: dict[str, list[float]] = {"plain": [], "fast": []}
    for _ in range(rounds):
        for name, spent in times.items():
            with tempfile.TemporaryDirectory() as folder:
                command = [
                    sys.executable,
                    str(ROOT / "main.py"),
                    "--data-root",
                    str(root),
                    "--save",
                    f"{folder}/logs",
                ]
                command += [
                    "--mode",
                    "train",
                    "--episode",
                    "2",
                    "--log-freq",
                    "1",
                    "--val-freq",
                    "0",
                    "--plots",
                    "false",
                ]
                command += [
                    *(["--cpu"] if device.type == "cpu" else []),
                    *(["--plain"] if name == "plain" else []),
                ]
                begun = time.perf_counter()
                with subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                ) as process:
                    next(line for line in process.stdout if line.startswith("["))
                    spent.append(time.perf_counter() - begun)
    lines = table("a run's start, to the end of its first episode, s", *times)
    return [*lines, row(f"{n_images} images to train on", *map(statistics.median, times.values()))]


def reduction() -> list[str]:
    """What reducing a large photograph to 2 x 84 px changes in random crops of it, in grey levels."""
    import matplotlib
    import numpy as np
    from PIL import Image

    photograph = load_image(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")
    small = photograph.resize(reduced_size(*photograph.size, 84), Image.Resampling.LANCZOS)
    drawn = draw_augmentation(
        0, "train", 0, np.tile((photograph.height, photograph.width), (500, 1))
    )
    scale = small.height / photograph.height
    differences, areas = [], []
    for top, left, height, width in drawn.box.tolist():
        large = photograph.resize(
            (84, 84), Image.Resampling.BILINEAR, (left, top, left + width, top + height)
        )
        box = (
            left * scale,
            top * scale,
            min((left + width) * scale, small.width),
            min((top + height) * scale, small.height),
        )
        reduced = small.resize((84, 84), Image.Resampling.BILINEAR, box)
        differences.append(np.abs(np.asarray(large, float) - np.asarray(reduced, float)).mean())
        areas.append(height * width / (photograph.height * photograph.width))
    differences, areas = np.array(differences), np.array(areas)
    lines = table("area of the crop", "mean absolute difference, grey levels")
    for low, high in ((0.08, 0.25), (0.25, 0.5), (0.5, 1.01)):
        inside = (areas >= low) & (areas < high)
        lines.append(row(f"{low:.0%} to {min(high, 1):.0%}", f"{differences[inside].mean():.2f}"))
    return [
        *lines,
        row(
            f"all (a photograph of {photograph.width}x{photograph.height} px)",
            f"{differences.mean():.2f}",
        ),
    ]


LARGEST = 20  # kernels of a table


def kernels(device: torch.device) -> list[str]:
    """A GPU's time for one training episode by kernel, as the profiler sees it where the episode is
    not recorded.
    """
    model = Model(device, plain=False)
    episode = synthetic(device, model.args)
    for _ in range(2):
        model.train.function(episode)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        model.train.function(episode)
        torch.cuda.synchronize()
    found = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    found = [event for event in found if event.self_device_time_total > 0]
    lines = table("kernel", "launches", "ms")
    for event in found[:LARGEST]:
        lines.append(
            row(event.key[:90].replace("|", " "), event.count, event.self_device_time_total / 1e3)
        )
    total = sum(event.self_device_time_total for event in found)
    return [*lines, row("all", sum(event.count for event in found), total / 1e3)]


def machine(device: torch.device) -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next(
        (x.split(":")[1].strip() for x in info.splitlines() if x.startswith("model name")),
        platform.processor(),
    )
    name = f"{cpu}, {torch.get_num_threads()} threads, {library().state}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False)
    return f"{name}; torch {torch.__version__}; commit {commit.stdout.strip() or 'unknown'}; {time.strftime('%Y-%m-%d')}"


SECTIONS = {
    "end-to-end": lambda args, device: end_to_end(
        args.data_root, args.rounds, args.n_workers, device
    ),
    "parts": lambda args, device: parts(args.data_root, args.rounds, device),
    "kernels": lambda args, device: kernels(device) if device.type == "cuda" else [],
    "memory": lambda args, device: memory(device),
    "scaling": lambda args, device: scaling(max(1, args.rounds // 2), device),
    "start": lambda args, device: start(args.data_root, 3, device),
    "reduction": lambda args, device: reduction(),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Benchmarks of the 5-way 5-shot recipe, fast/ against --plain."
    )
    glyphs = ROOT / "data" / "glyphs"
    parser.add_argument(
        "--data-root", type=Path, default=glyphs, help="images to time with (default: data/glyphs)"
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="rounds of which the median is reported (default: 7)"
    )
    parser.add_argument(
        "--n-workers",
        type=int,
        default=2,
        help="worker processes of each data pipeline (default: 2)",
    )
    parser.add_argument("--cpu", action="store_true", help="the CPU even where there is a GPU")
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=SECTIONS,
        help="which of them (default: all)",
    )
    parser.add_argument(
        "--name",
        default=None,
        help="name of the table in benchmarks/results (default: cpu or cuda)",
    )
    args = parser.parse_args()
    device = torch.device("cpu" if args.cpu or not torch.cuda.is_available() else "cuda")
    command = f"bash benchmarks/run.sh --rounds {args.rounds} --n-workers {args.n_workers}"
    if args.sections != SECTIONS:
        command += f" --sections {' '.join(args.sections)}"
    lines = [f"`{command}` on {machine(device)}; data: {args.data_root.name}"]
    print(lines[0])
    for name in args.sections:
        found = SECTIONS[name](args, device)
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
