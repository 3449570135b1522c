"""Reads and writes a run's tests, in its ``results.json``."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
from pathlib import Path

from engine import checkpoint as checkpoints
from engine.checkpoint import LAST
from engine.flags import check_stored, completed, data_name, essence, spelled
from engine.logger import TOO_MUCH, read_metrics
from tools.recipes import text
from utils import UserError, atomic_write, file_lock

NAME = "results.json"
_TYPES = {  # of a test's entries
    **dict.fromkeys(("checkpoint", "data", "fingerprint"), str),
    **dict.fromkeys(("episode", "n_class", "n_shot", "n_eval", "epoch", "batch_size"), int),
    **dict.fromkeys(("mini_imagenet", "transductive"), bool),
    **dict.fromkeys(("contradicts_training", "tta", "about", "training_length"), dict),
    **dict.fromkeys(("counts", "accuracies", "losses"), list),
    "episodes_drawn_by_seed": int,
    "validation": (dict, type(None)),
}
# two tests that agree in all others are of the same thing: the later one replaces the other
_FOUND = {"accuracies", "losses", "about", "training_length", "validation", "mini_imagenet"}
_KEY = _TYPES.keys() - _FOUND


def contradictions(args: argparse.Namespace, stored: dict[str, object]) -> dict[str, object]:
    """The hyper-parameters of a test that differ from the training's, by name."""
    own, stored = vars(args), completed(stored)
    return {k: own[k] for k, v in stored.items() if essence(own[k]) != essence(v)}


def contradiction_notes(args: argparse.Namespace, checkpoint: dict) -> list[str]:
    """A note on each of ``contradictions``."""
    stored = completed(checkpoint.get("hyper_parameters", {}))
    return [
        f"note: tested with {spelled(k)} {value}, but trained with {stored[k]}"
        for k, value in contradictions(args, stored).items()
    ]


def folder_of(path: Path) -> Path | None:
    """The run folder of a checkpoint, which keeps its tests; without one None, and a note says so.

    Raises:
        UserError: it cannot keep any.
    """
    if path.resolve().parent.name != "ckpts":
        print(f"note: {path} is not in the ckpts/ of a run folder; the test is not recorded")
        return None
    folder = path.resolve().parent.parent
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: cannot be written; copy the run, and test the copy")
    if (folder / NAME).exists():
        read_results(folder)
    return folder


def write_results(
    folder: Path, args: argparse.Namespace, checkpoint: dict, tests: list[dict], about: dict
) -> Path:
    """Add tests to a run's ``results.json``; an earlier test of the same thing is replaced.

    Args:
        folder: the run's.
        args: of the test.
        checkpoint: what was tested.
        tests: from ``run_test``.
        about: of the test, from ``provenance``.

    Returns:
        The file's path.
    """
    stored, best = checkpoint.get("hyper_parameters", {}), checkpoint.get("best") or {}
    training = {
        **checkpoint.get("about", {}),
        "seed": stored.get("seed"),
        "hyper_parameters": stored,
        "data": {"fingerprints": checkpoint.get("run", {}).get("data", {})},
        **_progress(folder),
    }
    length = {"seen": training.get("episodes"), "asked_for": _asked_for(folder, checkpoint)}
    tested = {
        "checkpoint": Path(args.resume).name,
        "episode": checkpoint["episode"],
        "training_length": length,
        "validation": best if best.get("episode") == checkpoint["episode"] else None,
        "data": data_name(args),
        "episodes_drawn_by_seed": args.seed,
        "contradicts_training": contradictions(args, stored),
        "about": about,
    }
    path = folder / NAME
    with file_lock(folder / f".{NAME}.lock", wait=True):  # two tests may end at the same time
        kept = read_results(folder)["tests"] if path.exists() else []
        for test in tests:
            test = json.loads(json.dumps(tested | test, default=str))
            kept = [t for t in kept if any(t[k] != test[k] for k in _KEY)] + [test]
        with atomic_write(path) as file:
            content = {"training": training, "tests": kept}
            file.write((json.dumps(content, indent=1, default=str) + "\n").encode())
    return path


def _asked_for(folder: Path, checkpoint: dict) -> int | None:
    """The training's ``--episode``, by its last checkpoint: a run may continue after its best."""
    with contextlib.suppress(UserError):
        checkpoint = checkpoints.load(folder / "ckpts" / LAST)
    return checkpoint.get("run", {}).get("asked_for")


def _progress(folder: Path) -> dict[str, object]:
    """Episodes seen, and hours of training without validations and pauses; empty if unknown."""
    with contextlib.suppress(UserError):
        train = [e for e in read_metrics(folder) if e["event"] == "train"]
        hours = sum(e["time"]["seconds"] for e in train) / 3600
        return {"episodes": train[-1]["episode"], "hours": round(hours, 3)}
    return {}


def read_results(folder: Path) -> dict:
    """Read what ``write_results`` wrote: ``training`` and ``tests``.

    Raises:
        UserError: there is none, or it is something else.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        training = content["training"]
        check_stored(path, {"hyper_parameters": training["hyper_parameters"]})
        sound = bool(content["tests"]) and all(map(_is_test, content["tests"]))
        sound = sound and isinstance(training["seed"], (int, type(None)))
        origins = filter(None, map(training.get, ("started_from", "resumed_from")))
        pairs = [
            (o[k], kind) for o in origins for k, kind in (("checkpoint", str), ("episode", int))
        ]
        sound = sound and all(isinstance(*pair) for pair in pairs)
    except (FileNotFoundError, NotADirectoryError) as e:
        advice = "name another, or test it first (python main.py --mode test)"
        raise UserError(f"{folder}: is not a run folder with a {NAME}; {advice}") from e
    except (OSError, ValueError, LookupError, TypeError, AttributeError, *TOO_MUCH):
        sound = False
    if not sound:
        raise UserError(f"{path}: not a test's results; move it away and test the run again")
    return content


def _is_test(test: dict) -> bool:
    """Whether a test has all entries; missing ones may raise."""
    lengths = map(test["training_length"].get, ("seen", "asked_for"))
    whole = [*test["counts"], test["tta"]["permutations"], *(n for n in lengths if n is not None)]
    val = test["validation"]
    numbers = [*test["accuracies"], *([val["accuracy"], val.get("std", 0.0)] if val else [])]
    sound = all(isinstance(test[key], kind) for key, kind in _TYPES.items())
    sound = sound and all(isinstance(n, int) for n in whole) and all(map(math.isfinite, numbers))
    sound = sound and isinstance(test["tta"]["flip"], bool)
    return sound and 0 < min(test["counts"]) <= max(test["counts"]) <= len(test["accuracies"])


def variant(test: dict) -> str:
    """How a test differs from the plain one: flags, batch norm, the draw of episodes, TTA."""
    apart = {k: v for k, v in test["contradicts_training"].items() if k not in ("n_shot", "seed")}
    flags = ", ".join(f"{spelled(k)[2:]} {text(v)}" for k, v in apart.items())
    tta = test["tta"]
    over = [f"{tta['permutations']} permutations"] * (tta["permutations"] > 1)
    over += ["flips"] * tta["flip"]
    words = [f"tested with {flags}"] * bool(flags) + ["transductive"] * test["transductive"]
    if "seed" in test["contradicts_training"]:
        words.append(f"test episodes of seed {test['episodes_drawn_by_seed']}")
    return ", ".join(words + [f"TTA: {' and '.join(over)}"] * bool(over))
