"""Trials of a recipe side by side: what each run changes, its best validation, and how that differs
from the first run's.

The difference is taken episode by episode, from runs that validate on the same episodes: of one
seed, ways and shots, on one data set. Minutes are counted as for time to accuracy, without the
training that a run begins with (--start).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from to_accuracy import logged, seconds_each, training

from engine.flags import HYPER_PARAMETERS
from tools.results import begun_with, spelled
from utils import UserError, print_error, summary

EPISODES = ("seed", "n_class", "n_shot", "n_eval")  # which episodes a run is validated on


def interval(values: list[float], sign: str = "") -> str:
    found = summary(values)
    return f"{found['mean']:{sign}.2f} ± {found['ci95']:.2f}"


def changes(stored: dict[str, object], first: dict[str, object]) -> str:
    """The hyper-parameters that are not the first run's, as flags."""
    names = [name for name in HYPER_PARAMETERS if stored.get(name) != first.get(name)]
    return ", ".join(f"`--{name.replace('_', '-')} {spelled(stored.get(name))}`" for name in names)


def table(folders: list[Path], kept: list[Path]) -> str:
    """A row for each run.

    Raises:
        UserError: a folder is not a run's, or keeps no validation by episode.
    """
    abouts, rows, before = [training(folder) for folder in folders], [], None
    for folder, about in zip(folders, abouts, strict=True):
        events = logged(folder)
        validations = [event for event in events if event["event"] == "val"]
        if not all("accuracies" in event for event in validations):
            raise UserError(
                f"{folder}/metrics.jsonl: of an older version, without the accuracy of each validation episode"
            )
        best = max(validations, key=lambda event: summary(event["accuracies"])["mean"])
        found = best["accuracies"]
        if before and len(before) != len(found):
            n = f"{len(found)} episodes, {folders[0]} on {len(before)}"
            raise UserError(f"{folder}: validated on {n}; name runs of one kind")
        stored, first = about["hyper_parameters"], abouts[0]["hyper_parameters"]
        seconds, n = seconds_each(events), events[-1]["episode"]
        cells = [folder.name, begun_with(about), changes(stored, first)]
        cells += [f"{best['episode']:,} of {n:,}", f"{n * seconds / 60:.0f}", interval(found)]
        paired = before and all(stored.get(name) == first.get(name) for name in EPISODES)
        cells += [
            interval([a - b for a, b in zip(found, before, strict=True)], "+") if paired else ""
        ]
        rows.append("| " + " | ".join([*cells, "yes" if folder in kept else ""]) + " |")
        before = before or found
    heads = ["run", "begins with", "change", "episodes", "minutes"]
    heads += [f"validation on {len(before)} episodes, %", "against the first", "kept"]
    return "\n".join(["| " + " | ".join(heads) + " |", "|" + "-|" * len(heads), *rows])


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run folder; the first one is what others change",
    )
    parser.add_argument(
        "--kept",
        nargs="+",
        type=Path,
        default=[],
        metavar="RUN",
        help="those whose change a recipe keeps",
    )
    args = parser.parse_args(argv)
    try:
        print(table(args.runs, args.kept))
    except UserError as e:
        return print_error(e)
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
