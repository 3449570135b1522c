"""Time to accuracy: after how many episodes and minutes does validation first reach a level? Run
folders in, Markdown out.

Minutes are episodes times the time of one where the run was undisturbed, its fastest tenth:
validations, pauses and other work on the machine do not count. A run that continues a checkpoint of
another one, as the best recipes' do, begins with that one's validations if its folder is given,
too. If its folder holds that of its pre-training, as ``pretraining/``, the minutes contain it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import checkpoint as checkpoints
from tools.results import LAST, NAME, recipe
from utils import UserError, print_error

LEVELS = {5: (50, 55, 57.8), 1: (40, 43.44, 46)}  # percent, by the number of shots


def training(folder: Path) -> dict:
    """What ``results.json`` says about a run's training; of an untested run, what its newest
    checkpoint says.
    """
    path = folder / NAME
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))["training"]
    for place in ("ckpts", "unfinished"):
        if (folder / place / LAST).is_file():
            checkpoint = checkpoints.load(folder / place / LAST)
            return {
                **checkpoint.get("about", {}),
                "hyper_parameters": checkpoint["hyper_parameters"],
            }
    raise UserError(f"{folder}: neither {NAME} nor ckpts/{LAST} there; name a run folder")


def logged(folder: Path, kinds: frozenset[str] = frozenset({"train", "val"})) -> list[dict]:
    """The events of a run, which are of all these kinds."""
    path = folder / "metrics.jsonl"
    try:
        events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = {event["event"] for event in events}
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); name a run folder") from e
    except (ValueError, LookupError, TypeError) as e:
        raise UserError(f"{path}: not a run's log ({type(e).__name__}); name a run folder") from e
    if not kinds <= found:
        raise UserError(f"{path}: no training with a validation in it yet")
    return events


def seconds_each(events: list[dict]) -> float:
    """Seconds of an episode, or of a batch, where the run was undisturbed."""
    times = [1 / e["time"]["episodes_per_second"] for e in events if e["event"] == "train"]
    return statistics.quantiles(times, n=10, method="inclusive")[0] if len(times) > 1 else times[0]


def validations(folder: Path, folders: list[Path]) -> dict[int, dict]:
    """Accuracy by episode, those before the run's beginning included."""
    found, origin = {}, training(folder).get("resumed_from")
    if origin:
        parents = [other for other in folders if other.name == Path(origin["checkpoint"]).parts[0]]
        for parent in parents:
            found |= {
                n: v for n, v in validations(parent, folders).items() if n <= origin["episode"]
            }
    return found | {
        event["episode"]: event["accuracy"] for event in logged(folder) if event["event"] == "val"
    }


def table(folders: list[Path]) -> str:
    """One table for each number of shots; a row is a run.

    Raises:
        UserError: a folder is not a run's.
    """
    rows: dict[int, list[str]] = {}
    for folder in folders:
        about, events, accuracies = training(folder), logged(folder), validations(folder, folders)
        stored = about["hyper_parameters"]
        shots = stored.get("n_shot", 5)
        seconds, before, length = seconds_each(events), 0.0, f"{events[-1]['episode']:,}"
        if (folder / "pretraining").is_dir():
            batches = logged(folder / "pretraining", frozenset({"train"}))
            before = batches[-1]["episode"] * seconds_each(batches)
            length += f" after {batches[-1]['episode']:,} batches"
        best = max(accuracies, key=lambda n: accuracies[n]["mean"])
        found = accuracies[best]
        cells = [folder.name, recipe(stored), length, f"{1000 * seconds:.0f}"]
        cells.append(f"{found['mean']:.2f} ± {found['ci95']:.2f}, after {best:,}")
        for level in LEVELS.get(shots, ()):
            first = next((n for n in sorted(accuracies) if accuracies[n]["mean"] >= level), None)
            cells.append(f"{first:,}, {(before + first * seconds) / 60:.0f} min" if first else "")
        rows.setdefault(shots, []).append("| " + " | ".join(cells) + " |")
    blocks = []
    for shots in sorted(rows, reverse=True):
        heads = [
            "run",
            "recipe",
            "episodes",
            "ms an episode",
            "best validation, %",
            *(f"{x} %" for x in LEVELS.get(shots, ())),
        ]
        lines = [
            f"{shots}-shot:",
            "",
            "| " + " | ".join(heads) + " |",
            "|" + "-|" * len(heads),
            *rows[shots],
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run folder, such as logs-719"
    )
    try:
        print(table(parser.parse_args(argv).runs))
    except UserError as e:
        return print_error(e)
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
