"""Scaling of training over processes on this machine's CPU: ``torchrun`` with one rank or two, turn
by turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WAYS = {
    "1 rank, 1 thread": (1, 1),
    "1 rank, 2 threads": (1, 2),
    "2 ranks, 1 thread": (2, 1),
}  # ranks, threads of each

EXCHANGE = """
import os, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
def median(function):
    spent = []
    for _ in range(50):
        dist.barrier()
        begin = time.perf_counter()
        function()
        spent.append(time.perf_counter() - begin)
    return sorted(spent)[25] * 1e3
size = dist.get_world_size()
found = [median(lambda: dist.all_reduce(torch.zeros(2, dtype=torch.int64), dist.ReduceOp.MAX))]
for m in (1, 8, 64):
    mine, place = torch.zeros(m, 35031), [torch.zeros(m, 35031) for _ in range(size)]
    found.append(median(lambda: dist.all_gather(place, mine)))
if dist.get_rank() == 0:
    print(*found, flush=True)
dist.barrier()
os._exit(0)  # Python's shutdown aborts now and then, see around/ranks.py
"""


def torchrun(n_ranks: int, n_threads: int, *words: str) -> str:
    """Run a script on ranks of this machine; what it writes to stdout."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(n_ranks),
        *words,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(n_threads)}
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout


def milliseconds(
    root: Path, cache: str, n_ranks: int, n_threads: int, meta_batch: int, n_updates: int
) -> float:
    """Of an episode, in a training whose first update is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            str(ROOT / "main.py"),
            "--mode",
            "train",
            "--cpu",
            "--data-root",
            str(root),
            "--cache-dir",
            cache,
        ]
        words += [
            "--save",
            f"{folder}/logs",
            "--meta-batch",
            str(meta_batch),
            "--episode",
            str(meta_batch * (1 + n_updates)),
        ]
        words += [
            "--log-freq",
            str(meta_batch),
            "--val-freq",
            "0",
            "--plots",
            "false",
            "--n-workers",
            "1",
        ]
        torchrun(n_ranks, n_threads, *words)
        lines = [
            json.loads(line)
            for line in Path(f"{folder}/logs-719/metrics.jsonl").read_text().splitlines()
        ]
    return statistics.median(line["time"]["seconds"] for line in lines[1:]) * 1e3 / meta_batch


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Scaling of training over processes on this machine."
    )
    parser.add_argument("--data-root", type=Path, required=True, help="images to train on")
    parser.add_argument("--cache-dir", required=True, help="folder for decoded images")
    parser.add_argument("--meta-batch", type=int, default=4)
    parser.add_argument(
        "--rounds", type=int, default=3, help="of which the median is reported (default: 3)"
    )
    parser.add_argument(
        "--updates", type=int, default=4, help="that are timed in each run (default: 4)"
    )
    args = parser.parse_args()
    spent: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(args.rounds):
        for name, way in WAYS.items():
            spent[name].append(
                milliseconds(args.data_root, args.cache_dir, *way, args.meta_batch, args.updates)
            )
            print(f"{name}: {spent[name][-1]:.0f} ms an episode", flush=True)
    first = spent["1 rank, 1 thread"]
    print(
        f"\n{time.strftime('%Y-%m-%d')}, load {os.getloadavg()[0]:.1f}, --meta-batch {args.meta_batch}\n"
    )
    print("| | ms an episode | times the first, round by round |\n|-|-|-|")
    for name, values in spent.items():
        ratios = ", ".join(f"{a / b:.2f}" for a, b in zip(first, values, strict=True))
        print(f"| {name} | {statistics.median(values):.0f} | {ratios} |")
    with tempfile.TemporaryDirectory() as folder:  # of its own: Python imports from there
        script = Path(folder, "exchange.py")
        script.write_text(EXCHANGE)
        wishes, *gathers = (f"{float(x):.2f}" for x in torchrun(2, 1, str(script)).split())
    print(
        f"\nexchange of two ranks, ms: wishes {wishes}; gradients of 1, 8, 64 episodes each: {', '.join(gathers)}"
    )


if __name__ == "__main__":
    main()
