"""Compare trainings by their logs: what each changes, its speed, and its validation against the
first run's.

    python benchmarks/compare_runs.py RUN... [--at EPISODE]

The paired difference is taken episode by episode, between runs that validate on the same episodes:
of one seed, number of classes, shots and queries, on one data set. ``--at`` compares the
validations after EPISODE training episodes instead of each run's best. A training episode takes
what it takes in the fastest tenth of the log: validations, pauses and other programs do not count.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runs import difference, interval

from engine import checkpoint as checkpoints
from engine.checkpoint import BEST, LAST, find_checkpoint
from engine.flags import DEFAULTS, HYPER_PARAMETERS, Parser, completed, flag_name, int_range
from engine.logger import read_metrics
from engine.process import run_main
from tools.recipes import text
from tools.words import markdown_table
from utils import UserError

EPISODES = ("seed", "n_class", "n_shot", "n_eval")  # which episodes a run is validated on
VALIDATION = ("transductive", "tta_permutations", "tta_flip")  # and how


def seconds_per_episode(events: list[dict]) -> float:
    """Seconds of a training episode where nothing disturbs the run."""
    times = [1 / e["time"]["episodes_per_second"] for e in events if e["event"] == "train"]
    return statistics.quantiles(times, n=10, method="inclusive")[0] if len(times) > 1 else times[0]


def validation(folder: Path, events: list[dict], at: int | None) -> dict:
    """The best validation of a log, or the one after ``at`` episodes.

    Raises:
        UserError: there is none, or the log lacks the accuracy of each of its episodes.
    """
    found = [e for e in events if e["event"] == "val" and e["episode"] == (at or e["episode"])]
    if not found:
        raise UserError(f"{folder}: no validation {f'after {at} episodes' if at else 'yet'}")
    best = max(found, key=lambda event: event["accuracy"]["mean"])
    if "accuracies" not in best:
        raise UserError(f"{folder}: an older log, without the accuracy of each validation episode")
    return best


def compare(folders: list[Path], at: int | None = None) -> str:
    """The table: a row for each run.

    Raises:
        UserError: a folder is no run, or validates on another number of episodes.
    """
    rows, first, first_images, accuracies = [], None, None, []
    for folder in folders:
        path = find_checkpoint(folder, LAST, BEST)
        if path is None:
            raise UserError(f"{folder}: no checkpoint there; name a run folder")
        content, events = checkpoints.load(path), read_metrics(folder)
        stored = completed(content.get("hyper_parameters", {}))
        stored |= {k: content.get("run_flags", {}).get(k, DEFAULTS[k]) for k in VALIDATION}
        begins_with = (content.get("about", {}).get("started_from") or {}).get("checkpoint", "")
        val = validation(folder, events, at)
        found = val["accuracies"]
        first, accuracies = first or stored, accuracies or found
        if len(found) != len(accuracies):
            n = f"{len(found)} episodes, {folders[0]} on {len(accuracies)}"
            raise UserError(f"{folder}: validated on {n}; compare runs of one kind")
        images = content.get("run", {}).get("data", {}).get("val")  # not in exported runs
        first_images = first_images or images
        paired = folder != folders[0] and all(stored.get(k) == first.get(k) for k in EPISODES)
        paired = paired and images in (None, first_images)
        apart = [k for k in (*HYPER_PARAMETERS, *VALIDATION) if stored.get(k) != first.get(k)]
        changes = ", ".join(f"`{flag_name(k)} {text(stored.get(k))}`" for k in apart)
        last = max(e["episode"] for e in events if e["event"] in ("train", "val"))
        seen = f"{val['episode']:,} of {last:,}"
        cells = [folder.name, begins_with.split("/")[0], changes, seen]
        cells += [f"{seconds_per_episode(events) * 1e3:.0f}", interval(found)]
        rows.append([*cells, difference(found, accuracies) if paired else ""])
    header = ["run", "starts from", "changes", "validated after", "ms per episode"]
    header += [f"validation, {len(accuracies)} episodes, %", "difference"]
    return markdown_table(header, rows)


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__.partition("\n\n")[0])
    words = "a run folder; the others are compared with the first one"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=words)
    words = "compare after this many training episodes (default: each run's best)"
    parser.add_argument("--at", type=int_range(1), metavar="EPISODE", help=words)
    args = parser.parse_args(argv)
    print(compare(args.runs, args.at))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
