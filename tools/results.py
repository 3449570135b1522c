"""Results as papers report them: a run's tests in its ``results.json``, and Markdown tables of one
or several runs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from engine import checkpoint as checkpoints
from engine.flags import HYPER_PARAMETERS, ROOT
from utils import UserError, atomic_write, summary

NAME = "results.json"
BEST, LAST = "meta-learner-best.pth.tar", "meta-learner-last.pth.tar"

# accuracy in percent, 5-way on mini-ImageNet: recipe, validation, test on 600 episodes, and more
# about it (paper's table 1; the port's README)
PUBLISHED = {
    5: [
        ("paper", "", "60.60 ± 0.71", ""),
        ("the authors' code as the port's writer ran it", "", "about 53", ""),
        (
            "the older port, seed 719",
            "59.08 (std 9.9)",
            "57.76 (std 8.6)",
            "after 41,000 of 50,000 episodes",
        ),
        (
            "the older port, seed 53",
            "58.04 (std 9.1)",
            "58.14 (std 8.5)",
            "after 44,000 of 50,000 episodes",
        ),
    ],
    1: [("paper", "", "43.44 ± 0.77", "")],
}
PORT = {
    "augment": "port",
    "pixels": "imagenet",
    "bn_scale": "uniform",
    "bn_shift": 0.0,
    "lstm_init": "pytorch",
    "bf_init": [4.0, 6.0],
    "bi_init": [-5.0, -4.0],
    "lr": 1e-3,
    "lr_decay": 0.0,
    "grad_divisor": 0,
    "meta_batch": 1,
    "grad_clip": 0.25,
    "image_size": 84,
    "precision": "fp32",
    "n_eval": 15,
    "filters": 32,
    "adapt": "all",
    "hidden_size": 20,
    "bn_eps": 1e-3,
    "shuffle": "pass",
}
AUTHORS = {
    **PORT,
    "augment": "none",
    "pixels": "unit",
    "lstm_init": "authors",
    "bf_init": [4.0, 5.0],
    "shuffle": "episode",
}
FIVE_SHOT = {"epoch": 8, "batch_size": 25, "bn_momentum": 0.95}  # the schedules of both
PRETRAINED = {
    **AUTHORS,
    "bf_init": [5.0, 6.0],
    "adapt": "classifier",
    "bn_shift": 0.3,
    "grad_divisor": 1,
}
PRETRAINED |= {"lr": 1e-4, "lr_decay": 1.0}
ONE_SHOT = {"epoch": 12, "batch_size": 5, "bn_momentum": 0.9}
RECIPES = {  # as the scripts are called; for 5 shots or more, and for 1
    "port": (PORT | FIVE_SHOT, PORT | ONE_SHOT),
    "authors": (AUTHORS | FIVE_SHOT, AUTHORS | ONE_SHOT),
    "best": (
        PRETRAINED | FIVE_SHOT | {"bi_init": [0.5, 0.7]},
        PRETRAINED | FIVE_SHOT | {"batch_size": 5, "bi_init": [-1.4, -1.2]},
    ),
}
STARTS = {
    "best": "logs-pretrain"
}  # what a recipe's scripts begin with, where it is not from scratch
# 97.5 % quantile of Student's t distribution for 1, 2, ... 10 degrees of freedom
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def provenance(device: torch.device, n_processes: int = 1) -> dict[str, object]:
    """What runs, which code, on what: command (with the names of files instead of their paths),
    commit, versions, machine.
    """
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv]
    packages = ("torch", "torchvision", "numpy", "pillow")
    return {
        "command": "python " + shlex.join(words),
        "commit": commit,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{cpu}, {torch.get_num_threads()} threads",
    } | ({"processes": n_processes} if n_processes > 1 else {})


def is_mini_imagenet(classes: list[str]) -> bool:
    """Whether these are mini-ImageNet's 20 test classes."""
    lists = json.loads(
        (ROOT / "data" / "splits" / "mini-imagenet.json").read_text(encoding="utf-8")
    )
    return sorted(classes) == sorted(lists["test"])


def write_results(
    folder: Path, args: argparse.Namespace, checkpoint: dict, tests: list[dict], about: dict
) -> Path:
    """Add tests to a run's ``results.json``; an earlier test of the same thing is replaced, all
    others stay.

    Args:
        folder: the run's.
        args: of the test.
        checkpoint: what was tested.
        tests: from ``evaluation.judge``.
        about: of the test, from ``provenance``.

    Returns:
        The file's path.
    """
    path = folder / NAME
    stored = checkpoint.get("hyper_parameters", {})
    run, best = checkpoint.get("run", {}), checkpoint.get("best") or {}
    content = {
        "training": {
            **checkpoint.get("about", {}),
            "seed": stored.get("seed"),
            "hyper_parameters": stored,
            "data": {"fingerprints": run.get("data", {})},
            **_progress(folder),
        },
        "tests": read_results(folder)["tests"] if path.exists() else [],
    }
    tested = {
        "checkpoint": Path(args.resume).name,
        "episode": checkpoint["episode"],
        "training_length": {
            "seen": content["training"].get("episodes"),
            "asked_for": _asked_for(folder, checkpoint),
        },
        "validation": best if best.get("episode") == checkpoint["episode"] else None,
        "data": args.data_root.name,
        "episodes_drawn_by_seed": args.seed,
        "contradicts_training": contradictions(args, stored),
        "about": about,
    }
    for test in tests:
        test = tested | test
        content["tests"] = [t for t in content["tests"] if _key(t) != _key(test)] + [test]
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1, default=str) + "\n").encode())
    return path


def contradictions(args: argparse.Namespace, stored: dict[str, object]) -> dict[str, object]:
    """The flags of a test that differ from the training's, by name."""
    return {k: getattr(args, k) for k, v in stored.items() if getattr(args, k) != v}


def _key(test: dict) -> tuple:
    names = (
        "checkpoint",
        "episode",
        "data",
        "fingerprint",
        "n_class",
        "n_shot",
        "n_eval",
        "epoch",
        "batch_size",
    )
    changed = sorted(test["contradicts_training"].items())
    return (
        *(test[name] for name in names),
        test["episodes_drawn_by_seed"],
        str(test["counts"]),
        str(changed),
        answered(test),
    )


def _asked_for(folder: Path, checkpoint: dict) -> int | None:
    """The training's ``--episode``, by the newest checkpoint: a run may be asked for more after its
    best one.
    """
    with contextlib.suppress(UserError):
        checkpoint = checkpoints.load(folder / "ckpts" / LAST)
    return checkpoint.get("run", {}).get("asked_for")


def _progress(folder: Path) -> dict[str, object]:
    """How far and how long a run has trained, from its metrics: episodes, and hours without
    validations and pauses.
    """
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        train = [e for e in map(json.loads, lines) if e["event"] == "train"]
        return {
            "episodes": train[-1]["episode"],
            "hours": round(sum(e["time"]["seconds"] for e in train) / 3600, 3),
        }
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return {}


def answered(test: dict) -> str:
    """How a test's answers were found, in words for a table: over what they are averaged, and
    whether they are transductive.

    Older results do not say, and are neither.
    """
    how = test.get("averaged", {"orders": 1, "mirror": False})
    over = [f"{how['orders']} orders of the classes"] * (how["orders"] > 1) + [
        "mirror images"
    ] * how["mirror"]
    own = ", transductive" if test.get("transductive") else ""
    return own + (", averaged over " + " and ".join(over) if over else "")


def read_results(folder: Path) -> dict:
    """What ``write_results`` wrote.

    Raises:
        UserError: there is none, or it is something else.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["training"]["seed"], content["training"]["hyper_parameters"]
        for test in content["tests"]:
            _key(test), test["mini_imagenet"], test["data"]
            _table("", 0, 0, [(content["training"], test)])
    except FileNotFoundError as e:
        raise UserError(
            f"{folder}: no {NAME} there; test the run first (python main.py --mode test)"
        ) from e
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as e:
        raise UserError(
            f"{path}: not a test's results, or of an older version; move it away and test the run again"
        ) from e
    return content


def recipe(stored: dict[str, object], late: Iterable[str] = (), since: int = 0) -> str:
    """The name of a recipe: the port's, the authors', or the best one; or the nearest of them with
    its differences.

    Args:
        stored: a run's hyper-parameters.
        late: those that it has only had after ``since`` episodes, from a resumption on.
    """
    if not stored:
        return "unknown"
    known = {name: settings[stored.get("n_shot") == 1] for name, settings in RECIPES.items()}
    stored = known["port"] | checkpoints.OLDER | stored
    differ = {
        name: [k for k, v in settings.items() if stored[k] != v] for name, settings in known.items()
    }
    name = min(differ, key=lambda name: len(differ[name]))
    changes = [
        f"{k.replace('_', '-')} {spelled(stored[k])}"
        + f" only after {since:,} episodes" * (k in late)
        for k in HYPER_PARAMETERS
        if k in differ[name] or k in late
    ]
    return name + (", but " + ", ".join(changes) if changes else "")


def length(training: dict, test: dict) -> tuple[int | None, int | None]:
    """Episodes that a run had seen when it was tested, and how many were asked for; None: unknown,
    as in older results.
    """
    told = test.get("training_length") or {}
    seen = told.get("seen") or training.get("episodes")
    return seen, told.get("asked_for") or seen


def begun_with(training: dict) -> str:
    """The run folder whose checkpoint a training began with (``--start``), or nothing."""
    origin = training.get("started_from")
    return origin["checkpoint"].split("/")[-2] if origin else ""


def spelled(value: object) -> str:
    """A hyper-parameter's value as one types it after its flag."""
    return " ".join(f"{v:g}" for v in value) if isinstance(value, list) else str(value)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and half-width of its 95 % interval by Student's t distribution; at least two
    values.
    """
    quantile = T_QUANTILE[len(values) - 2] if len(values) - 2 < len(T_QUANTILE) else 1.96
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def tables(folders: list[Path], means_alone: bool = False) -> str:
    """Markdown tables of tested runs: one for each data set, n-way and k-shot, with published
    results beside mini-ImageNet's.

    A row is one tested checkpoint. Runs that differ in their seed only, of as many episodes, are
    followed by their mean, or with ``means_alone``, where they are three or more, replaced by it: a
    mean of two says little of itself. A folder without a test is skipped, with a note.

    Raises:
        UserError: nothing in these folders has been tested.
    """
    rows, notes = [], []
    for folder in folders:
        try:
            content = read_results(folder)
        except UserError as e:
            notes.append(str(e))
            continue
        rows += [(content["training"], test) for test in content["tests"]]
    if not rows:
        raise UserError("; ".join(notes) or "no run folders given; name some with --runs")
    groups: dict[tuple, list] = {}
    for training, test in rows:
        data = "mini-ImageNet" if test["mini_imagenet"] else test["data"]
        groups.setdefault(
            (not test["mini_imagenet"], data, test["n_class"], -test["n_shot"]), []
        ).append((training, test))
    blocks = [_table(*key[1:3], -key[3], groups[key], means_alone) for key in sorted(groups)]
    return "\n\n".join(blocks + [f"skipped {note}" for note in notes])


def _table(
    data: str, n_class: int, shots: int, rows: list[tuple[dict, dict]], means_alone: bool = False
) -> str:
    published = PUBLISHED.get(shots, []) if data == "mini-ImageNet" and n_class == 5 else []
    counts = sorted(
        {count for _, test in rows for count in test["counts"]} | ({600} if published else set())
    )
    lines = [
        f"{data}, {n_class}-way {shots}-shot, accuracy in %, mean ± 95 % interval over test episodes, or over seeds:",
        "",
        "| recipe | seed | tested | validation | "
        + " | ".join(f"{count} episodes" for count in counts)
        + " |",
        "|-|-|-|-|" + "-|" * len(counts),
    ]
    groups: dict[str, list] = {}
    for training, test in rows:
        groups.setdefault(_name(training, test, shots), []).append((training, test))
    for name in sorted(groups):
        found, means = _rows(groups[name], counts)
        for alike, cells in found:
            seeds, _ = means.get(alike, (1, ""))
            if not (means_alone and seeds > 2):
                lines.append(f"| {name} | {cells}")
        lines += [f"| {name} | {means[alike][1]}" for alike in sorted(means, key=str)]
    for name, val, test, more in published:
        cells = [test if count == 600 else "" for count in counts]
        lines.append(f"| {name} | | {more} | {val} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _name(training: dict, test: dict, shots: int) -> str:
    """What a row is called: the recipe, and all else but the seed that sets a run and its test
    apart.
    """
    trained_on = training["hyper_parameters"].get("n_shot", shots)
    since = (training.get("resumed_from") or {}).get("episode", 0)
    name = recipe(training["hyper_parameters"], training.get("changed") or (), since)
    origin = begun_with(training)
    alike = origin.removesuffix(f"-{training['seed']}")
    begun = ""
    if alike != STARTS.get(name, ""):
        begun = (
            f", begun with {alike}" + (" of its seed" if alike != origin else "")
            if origin
            else ", begun from scratch"
        )
    name += f", trained on {trained_on}-shot" if trained_on != shots else ""
    changed = {k: v for k, v in test["contradicts_training"].items() if k not in ("n_shot", "seed")}
    tested = "".join(
        f", tested with {k.replace('_', '-')} {spelled(v)}" for k, v in changed.items()
    )
    return name + begun + tested + answered(test)


def _rows(
    group: list[tuple[dict, dict]], counts: list[int]
) -> tuple[list[tuple[tuple, str]], dict[tuple, tuple[int, str]]]:
    """The cells, but for the name's, of runs that differ in their seed only, and of their means.

    Returns:
        Each run's cells, after a key that is the same for runs to be averaged; and by this key the
        number of seeds and their mean's cells, where there are several.
    """
    found, means = [], {}
    for training, test in sorted(group, key=lambda row: (row[0]["seed"] or 0, row[1]["episode"])):
        val, (seen, asked) = test["validation"], length(training, test)
        cells = [
            cell(test["accuracies"], c) if c <= len(test["accuracies"]) else "" for c in counts
        ]
        kind = (
            "best"
            if "best" in test["checkpoint"]
            else "last"
            if "last" in test["checkpoint"]
            else "checkpoint"
        )
        tested = f"{kind}, {test['episode']:,}" + (f" of {seen:,}" if seen else "") + " episodes"
        tested += f", {asked:,} asked for" if asked != seen else ""
        shown = f"{val['accuracy']:.2f} (std {val['std']:.1f})" if val and "std" in val else ""
        # the best of so many episodes, or the last of them: alike only where as many have been seen
        alike = (kind, asked, seen if kind == "best" else test["episode"])
        found.append(
            (alike, f"{training['seed']} | {tested} | {shown} | " + " | ".join(cells) + " |")
        )
        for c in test["counts"]:
            means.setdefault(alike, {}).setdefault(c, {})[training["seed"]] = summary(
                test["accuracies"][:c]
            )["mean"]
    said = {}
    for (kind, asked, episodes), by_count in means.items():
        over = {c: list(of.values()) for c, of in by_count.items() if len(of) > 1}
        if over and kind != "checkpoint":
            cells = [
                "{:.2f} ± {:.2f}".format(*interval(over[c])) if c in over else "" for c in counts
            ]
            n, of = max(map(len, over.values())), f" of {episodes:,} episodes" if episodes else ""
            said[kind, asked, episodes] = (
                n,
                f"mean of {n} seeds | {kind}{of} | | " + " | ".join(cells) + " |",
            )
    return found, said


def cell(accuracies: list[float], count: int) -> str:
    """Mean, 95 % interval and standard deviation of the first ``count`` episodes."""
    s = summary(accuracies[:count])
    return f"{s['mean']:.2f} ± {s['ci95']:.2f} (std {s['std']:.1f})"


def export(folder: Path) -> Path:
    """Copy what is worth publishing of a tested run into
    ``results/<data>-<shots>s<ways>c-<recipe>-<seed>/``.

    That is its logs, results and pictures, and the best meta-learner without the optimiser's state.

    Returns:
        The new folder, which must not exist yet.

    Raises:
        UserError: the run has not been tested, or the new folder exists.
    """
    content = read_results(folder)
    stored, data = content["training"]["hyper_parameters"], content["tests"][0]["data"]
    slug = re.sub(r"[^\w.]+", "-", recipe(stored).replace(", but ", "-"))
    name = f"{data}-{stored['n_shot']}s{stored['n_class']}c-{slug}-{content['training']['seed']}"
    dest = ROOT / "results" / name
    if dest.exists():
        raise UserError(f"{dest}: exists already; remove it first")
    best = checkpoints.held(folder, BEST, LAST)
    if best is None:
        raise UserError(f"{folder}/ckpts: no checkpoint there")
    checkpoint = checkpoints.load(best)
    published = ("episode", "mode", "metalearner", "hyper_parameters", "best", "about")
    kept = {k: checkpoint[k] for k in published if k in checkpoint}
    checkpoints.save(kept, dest / "meta-learner.pth.tar")
    for path in (
        *(folder / n for n in ("console.log", "metrics.jsonl", NAME)),
        *sorted((folder / "plots").glob("*.png")),
    ):
        if (
            path.is_file() and path.name != "confusion.png"
        ):  # which shows photographs: they are not ours to publish
            shutil.copy(path, dest)
    return dest
