"""Markdown tables of tested runs, with published results beside mini-ImageNet's."""

from __future__ import annotations

import math
import statistics
import sys
from argparse import Namespace
from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import torch

from engine.flags import run_folder
from engine.logger import summary
from engine.provenance import provenance
from tools import plots
from tools.recipes import recipe_name, starts_from
from tools.results import read_results, variant, write_results
from tools.words import markdown_table
from utils import UserError, counted

_TESTED = "after {} of 50,000 episodes"
# accuracy in percent, 5-way on mini-ImageNet, by shots: who, what was tested, validation, and test
# on 600 episodes (the paper's table 1; the port's README)
PUBLISHED = {
    5: [
        ("paper", "", "", "60.60 ± 0.71"),
        ("the port, seed 719", _TESTED.format("41,000"), "59.08 (std 9.9)", "57.76 (std 8.6)"),
        ("the port, seed 53", _TESTED.format("44,000"), "58.04 (std 9.1)", "58.14 (std 8.5)"),
    ],
    1: [("paper", "", "", "43.44 ± 0.77")],
}
PUBLISHED_COUNT = 600
MIN_SEEDS = 3  # fewer have no mean
# 97.5 % quantiles of Student's t distribution for 1, 2, ... 10 degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and half-width of its 95 % interval by Student's t distribution."""
    t = _T[min(len(values) - 1, len(_T)) - 1]  # a little wide for more than 11 seeds
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values))


def report(
    folder: Path,
    args: Namespace,
    checkpoint: dict,
    tests: list[dict],
    device: torch.device,
    n_processes: int,
) -> None:
    """Keep tests of a run's checkpoint in the run's folder, and print and draw them."""
    about = provenance(device, n_processes)
    written = write_results(folder, args, checkpoint, tests, about)
    print(f"written to {written}\n\n{tables([folder])}")
    if args.plots and (folder / "plots").is_dir():
        plots.draw(folder, "histogram")


def results_mode(args: Namespace) -> None:
    """Print the tables of ``--runs``, or of this run."""
    print(tables([Path(folder) for folder in args.runs or [run_folder(args)]]))


def tables(folders: list[Path]) -> str:
    """Markdown tables of tested runs: one for each data set, n-way and k-shot.

    A row is one tested checkpoint. Three or more runs that differ in their seed only, tested after
    as many episodes, are followed by a row with their mean.
    A folder without a test is skipped, with a note on stderr.

    Raises:
        UserError: nothing in these folders has been tested.
    """
    rows, notes = [], []
    for folder in folders:
        try:
            content = read_results(folder)
        except UserError as e:
            notes.append(str(e))
        else:
            rows += [Row(content["training"], test) for test in content["tests"]]
    if not rows:
        raise UserError("; ".join(notes) or "no run folders given; name some with --runs")
    by_table = attrgetter("table")
    parts = [_table(*part) for part in groupby(sorted(rows, key=by_table), by_table)]
    for note in notes:
        print(f"skipped {note}", file=sys.stderr)
    return "\n\n".join(parts)


class Row:
    """A tested checkpoint.

    Attributes:
        table: what the rows of a table share, which sorts the tables.
        kind: the checkpoint that was tested: "best", "last", or "checkpoint" for another.
        seen: episodes that the run had seen when it was tested, or None if that is unknown.
        asked: episodes that it was to see.
        group: what rows share that differ in their seed only: name, kind, episodes seen
            and asked, and the images' fingerprint.
    """

    def __init__(self, training: dict, test: dict):
        self.test, self.seed, length = test, training["seed"], test["training_length"]
        data = "mini-ImageNet" if test["mini_imagenet"] else test["data"]
        self.table = (not test["mini_imagenet"], data, test["n_class"], -test["n_shot"])
        self.kind = next((k for k in ("best", "last") if k in test["checkpoint"]), "checkpoint")
        self.seen = length.get("seen") or training.get("episodes")
        self.asked = length.get("asked_for") or self.seen
        seen = self.seen if self.kind == "best" else test["episode"]
        self.group = (_name(training, test), self.kind, seen, self.asked, test["fingerprint"])

    def cells(self, counts: list[int]) -> list[str]:
        """Name, seed, what was tested, validation, accuracy by count."""
        val, values = self.test["validation"], self.test["accuracies"]
        tested = f"{self.kind}, {self.test['episode']:,}"
        tested += (f" of {self.seen:,}" if self.seen else "") + " episodes"
        tested += f", {self.asked:,} asked for" if self.asked != self.seen else ""
        validated = f"{val['accuracy']:.2f} (std {val['std']:.1f})" if val and "std" in val else ""
        found = [summary(values[:n]) if n <= len(values) else None for n in counts]
        cells = [
            f"{s['mean']:.2f} ± {s['ci95']:.2f} (std {s['std']:.1f})" if s else "" for s in found
        ]
        return [self.group[0], str(self.seed), tested, validated, *cells]


def _name(training: dict, test: dict) -> str:
    """The recipe, and all but the seed that sets a run and its test apart."""
    stored, shots = training["hyper_parameters"], test["n_shot"]
    since = (training.get("resumed_from") or {}).get("episode", 0)
    recipe = recipe_name(stored, training.get("changed") or (), since)
    trained_on = stored.get("n_shot", shots)
    words = [recipe] + [f"trained on {trained_on}-shot"] * (trained_on != shots)
    checkpoint = (training.get("started_from") or {}).get("checkpoint", "")  # of --init-from
    origin = Path(checkpoint).parent.name
    alike = origin.removesuffix(f"-{training['seed']}")
    if alike != Path(starts_from(recipe, trained_on)).name:
        suffix = "-SEED" if alike != origin else ""
        words.append(f"initialised from {alike}{suffix}" if origin else "from scratch")
    return ", ".join(filter(None, [*words, variant(test)]))


def _table(key: tuple, these: Iterable[Row]) -> str:
    (foreign, data, n_class, shots), rows = (*key[:3], -key[3]), list(these)
    published = [] if foreign or n_class != 5 else PUBLISHED.get(shots, [])
    counts = {count for row in rows for count in row.test["counts"]}
    counts = sorted(counts | ({PUBLISHED_COUNT} if published else set()))
    rows.sort(key=lambda row: (str(row.group), row.seed or 0, row.test["episode"]))
    lines, has_means = [], False
    for (name, kind, seen, *_), alike in groupby(rows, attrgetter("group")):
        group = list(alike)
        mean = _mean(group) if kind != "checkpoint" else None
        lines += [[*row.cells(counts), ""] for row in group]
        if mean is not None:
            n, count, numbers = mean
            over = numbers if count == counts[-1] else f"{numbers} ({count} episodes)"
            length = f" of {seen:,} episodes" if seen else ""
            lines.append([name, f"{n} seeds", kind + length, "", *[""] * len(counts), over])
            has_means = True
    for name, tested, val, test in published:
        cells = [test if count == PUBLISHED_COUNT else "" for count in counts]
        lines.append([name, "", tested, val, *cells, ""])
    header = ["recipe", "seed", "tested", "validation", *(counted(n, "episode") for n in counts)]
    width = len(header) + has_means
    header.append("mean over seeds")
    about = "accuracy in %, mean ± 95 % interval over test episodes"
    about += ", or over seeds in the last column" if has_means else ""
    table = markdown_table(header[:width], [line[:width] for line in lines])
    return f"{data}, {n_class}-way {shots}-shot, {about}:\n\n{table}"


def _mean(rows: list[Row]) -> tuple[int, int, str] | None:
    """Number of seeds, test episodes, and mean ± interval over the seeds; None for few seeds."""
    for count in sorted({n for row in rows for n in row.test["counts"]}, reverse=True):
        these = {row.seed: row.test["accuracies"] for row in rows if count in row.test["counts"]}
        if len(these) >= MIN_SEEDS:
            mean, half = interval([statistics.fmean(a[:count]) for a in these.values()])
            return len(these), count, f"{mean:.2f} ± {half:.2f}"
    return None
