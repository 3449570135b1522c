"""Markdown tables of tested runs, with published results beside mini-ImageNet's."""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import torch

from engine.flags import run_folder
from engine.provenance import provenance
from tools import plots
from tools.markdown import markdown_table
from tools.recipes import recipe_name, starts_from
from tools.results import read_results, variant, write_results
from utils import UserError, summary

_TESTED = "after {} of 50,000 episodes"
# accuracy in percent, 5-way on mini-ImageNet, by shots: who, what was tested, validation, and test
# on 600 episodes (the paper's table 1; the port's README)
PUBLISHED = {
    5: [
        ("paper", "", "", "60.60 ± 0.71"),
        ("the authors' code as the port's writer ran it", "", "", "about 53"),
        ("the port, seed 719", _TESTED.format("41,000"), "59.08 (std 9.9)", "57.76 (std 8.6)"),
        ("the port, seed 53", _TESTED.format("44,000"), "58.04 (std 9.1)", "58.14 (std 8.5)"),
    ],
    1: [("paper", "", "", "43.44 ± 0.77")],
}
PUBLISHED_COUNT = 600
MIN_SEEDS = 3  # fewer have no mean
# 97.5 % quantiles of Student's t distribution for 1, 2, ... 10 degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def t_quantile(df: int) -> float:
    """97.5 % quantile of Student's t distribution; beyond the table by its expansion in 1/df."""
    if df <= len(_T):
        return _T[df - 1]
    # Abramowitz & Stegun, 26.7.5
    return 1.95996 + 2.37227 / df + 2.8225 / df**2 + 2.5558 / df**3 + 1.5895 / df**4


def interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and half-width of its 95 % interval by Student's t distribution."""
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half


def report(
    path: Path,
    args: argparse.Namespace,
    checkpoint: dict,
    tests: list[dict],
    device: torch.device,
    n_processes: int,
) -> None:
    """Keep tests of a run's checkpoint in the run's folder, and print and draw them.

    A checkpoint at another place than a run's ``ckpts/`` has no folder for them.
    """
    if path.resolve().parent.name != "ckpts":
        return
    folder = path.resolve().parent.parent
    about = provenance(device, n_processes)
    written = write_results(folder, args, checkpoint, tests, about)
    print(f"written to {written}\n\n{tables([folder])}")
    if args.plots and (folder / "plots").is_dir():
        plots.draw(folder, "histogram")


def results_mode(args: argparse.Namespace) -> None:
    """Print the tables of ``--runs``, or of this run."""
    print(tables([Path(folder) for folder in args.runs or [run_folder(args)]], args.means))


def tables(folders: list[Path], means_alone: bool = False) -> str:
    """Markdown tables of tested runs: one for each data set, n-way and k-shot.

    A row is one tested checkpoint. Three or more runs that differ in their seed only, tested after
    as many episodes, are followed by a row with their mean, or with ``means_alone`` replaced by it.
    A folder without a test is skipped, with a note.

    Raises:
        UserError: nothing in these folders has been tested.
    """
    groups: dict[tuple, list] = {}
    notes = []
    for folder in folders:
        try:
            content = read_results(folder)
        except UserError as e:
            notes.append(str(e))
            continue
        for test in content["tests"]:
            mini = test["mini_imagenet"]
            data = "mini-ImageNet" if mini else test["data"]
            key = (not mini, data, test["n_class"], -test["n_shot"])
            groups.setdefault(key, []).append((content["training"], test))
    if not groups:
        raise UserError("; ".join(notes) or "no run folders given; name some with --runs")
    blocks = [_table(key, groups[key], means_alone) for key in sorted(groups)]
    return "\n\n".join(blocks + [f"skipped {note}" for note in notes])


def _table(key: tuple, rows: list[tuple[dict, dict]], means_alone: bool) -> str:
    foreign, data, n_class, shots = *key[:3], -key[3]
    published = [] if foreign or n_class != 5 else PUBLISHED.get(shots, [])
    counts = {count for _, test in rows for count in test["counts"]}
    counts = sorted(counts | ({PUBLISHED_COUNT} if published else set()))
    groups: dict[tuple, list] = {}  # of runs that differ in their seed only
    for row in rows:
        groups.setdefault(_group(*row, shots), []).append(row)
    lines, has_means = [], False
    for name, kind, seen, asked in sorted(groups, key=str):
        group = groups[name, kind, seen, asked]
        group.sort(key=lambda row: (row[0]["seed"] or 0, row[1]["episode"]))
        mean = _mean(group) if kind != "checkpoint" else None
        if mean is None or not means_alone:
            lines += [[name, *_cells(*row, kind, counts), ""] for row in group]
        if mean is not None:
            n, count, numbers = mean
            over = numbers if count == counts[-1] else f"{numbers} ({count} episodes)"
            length = f" of {seen:,} episodes" if seen else ""
            lines.append([name, f"{n} seeds", kind + length, "", *[""] * len(counts), over])
            has_means = True
    for name, tested, val, test in published:
        cells = [test if count == PUBLISHED_COUNT else "" for count in counts]
        lines.append([name, "", tested, val, *cells, ""])
    header = ["recipe", "seed", "tested", "validation", *(f"{n} episodes" for n in counts)]
    width = len(header) + has_means
    header.append("mean over seeds")
    about = "accuracy in %, mean ± 95 % interval over test episodes"
    about += ", or over seeds in the last column" if has_means else ""
    table = markdown_table(header[:width], [line[:width] for line in lines])
    return f"{data}, {n_class}-way {shots}-shot, {about}:\n\n{table}"


def _group(training: dict, test: dict, shots: int) -> tuple:
    """What a row's name and training say, apart from the seed: (name, kind of checkpoint, episodes
    that the run had seen, episodes asked for).

    A best checkpoint is the best of so many episodes, a last one the last of them.
    """
    kind = next((k for k in ("best", "last") if k in test["checkpoint"]), "checkpoint")
    seen, asked = _length(training, test)
    return _name(training, test, shots), kind, seen if kind == "best" else test["episode"], asked


def _length(training: dict, test: dict) -> tuple[int | None, int | None]:
    """Episodes that a run had seen when it was tested, and asked for; None: unknown."""
    length = test["training_length"]
    seen = length.get("seen") or training.get("episodes")
    return seen, length.get("asked_for") or seen


def _name(training: dict, test: dict, shots: int) -> str:
    """The recipe, and all but the seed that sets a run and its test apart."""
    stored, seed = training["hyper_parameters"], training["seed"]
    since = (training.get("resumed_from") or {}).get("episode", 0)
    recipe = recipe_name(stored, training.get("changed") or (), since)
    trained_on = stored.get("n_shot", shots)
    words = [recipe] + [f"trained on {trained_on}-shot"] * (trained_on != shots)
    origin = started_from(training)
    alike = origin.removesuffix(f"-{seed}")
    if alike != Path(starts_from(recipe, trained_on)).name:
        suffix = "-SEED" if alike != origin else ""
        words.append(f"initialised from {alike}{suffix}" if origin else "from scratch")
    return ", ".join(words + [variant(test)] * bool(variant(test)))


def started_from(training: dict) -> str:
    """The run folder whose checkpoint a training started from (``--init-from``), or nothing."""
    origin = training.get("started_from")
    return Path(origin["checkpoint"]).parent.name if origin else ""


def _cells(training: dict, test: dict, kind: str, counts: list[int]) -> list[str]:
    """A run's cells after its name: seed, what was tested, validation, accuracy by count."""
    val, (seen, asked) = test["validation"], _length(training, test)
    tested = f"{kind}, {test['episode']:,}" + (f" of {seen:,}" if seen else "") + " episodes"
    tested += f", {asked:,} asked for" if asked != seen else ""
    validation = f"{val['accuracy']:.2f} (std {val['std']:.1f})" if val and "std" in val else ""
    values = test["accuracies"]
    accuracies = [cell(values, n) if n <= len(values) else "" for n in counts]
    return [str(training["seed"]), tested, validation, *accuracies]


def _mean(group: list[tuple[dict, dict]]) -> tuple[int, int, str] | None:
    """Number of seeds, test episodes, and mean ± interval over the seeds; None for few seeds."""
    for count in sorted({n for _, test in group for n in test["counts"]}, reverse=True):
        means = {
            training["seed"]: statistics.fmean(test["accuracies"][:count])
            for training, test in group
            if count in test["counts"]
        }
        if len(means) >= MIN_SEEDS:
            mean, half = interval(list(means.values()))
            return len(means), count, f"{mean:.2f} ± {half:.2f}"
    return None


def cell(accuracies: list[float], count: int) -> str:
    """Mean, 95 % interval and standard deviation of the first ``count`` episodes."""
    s = summary(accuracies[:count])
    return f"{s['mean']:.2f} ± {s['ci95']:.2f} (std {s['std']:.1f})"
