"""Two trainings on one machine: how fast is one alone, beside a second one, and beside a niced one?

Each is a process of main.py's default recipe with its worker processes. GOMP_SPINCOUNT in the
environment is passed on; 300000 is OpenMP's own. The fair share is what the scheduler's weights
say: a half, and beside nice 10 1024 / (1024 + 110).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAIN = Path(__file__).resolve().parent.parent / "main.py"
LINES, STEP = 4, 8  # log lines of a measurement, episodes of a line


@contextlib.contextmanager
def training(args: argparse.Namespace, folder: str, name: str, nice: int = 0):
    """A training that has begun, as the path of its metrics; it ends with the block."""
    command = [
        "nice",
        "-n",
        str(nice),
        sys.executable,
        str(MAIN),
        "--mode",
        "train",
        "--cpu",
        "--data-root",
        args.data_root,
    ]
    command += [
        "--save",
        f"{folder}/{name}",
        "--cache-dir",
        args.cache_dir or folder,
        "--log-freq",
        str(STEP),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            path = Path(f"{folder}/{name}-719/metrics.jsonl")
            while not (path.exists() and path.read_text()):
                if process.poll() is not None:
                    sys.exit(1)  # it has said why
                time.sleep(0.1)
            yield path
        finally:
            process.kill()


def rate(path: Path) -> float:
    """Episodes a second, of the next lines but the one that is half over."""
    start = len(path.read_text().splitlines()) + 1
    while len(lines := path.read_text().splitlines()) < start + LINES:
        time.sleep(0.1)
    return (
        LINES
        * STEP
        / sum(json.loads(line)["time"]["seconds"] for line in lines[start : start + LINES])
    )


parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
parser.add_argument("--data-root", required=True, help="data set to train on")
parser.add_argument("--cache-dir", help="folder for decoded images (default: a temporary one)")
args = parser.parse_args()
with tempfile.TemporaryDirectory() as folder, training(args, folder, "measured") as measured:
    rates = {"alone": (rate(measured), 1)}
    for name, nice, share in (
        ("beside a second one", 0, 1 / 2),
        ("beside one of nice 10", 10, 1024 / (1024 + 110)),
    ):
        with training(args, folder, name.replace(" ", "-"), nice):
            rates[name] = (rate(measured), share)
print("| training | episodes a second | of the speed alone | of the fair share |\n|-|-|-|-|")
for name, (value, share) in rates.items():
    print(
        f"| {name} | {value:.2f} | {value / rates['alone'][0]:.0%} | {value / rates['alone'][0] / share:.0%} |"
    )
