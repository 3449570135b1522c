"""Reads and writes a run's tests, in its ``results.json``."""

from __future__ import annotations

import contextlib
import json
import os
from argparse import Namespace
from pathlib import Path

from engine import checkpoint as checkpoints
from engine.checkpoint import LAST
from engine.flags import check_stored, comparable, completed, data_name, flag_name, flag_value
from engine.logger import read_metrics
from engine.schema import finite, fits
from tools.recipes import text
from utils import UserError, atomic_write, file_lock

NAME = "results.json"
_FORM = {  # of a test
    **dict.fromkeys(("checkpoint", "data", "fingerprint"), str),
    **dict.fromkeys(("episode", "n_class", "n_shot", "n_eval", "epoch", "batch_size"), int),
    **dict.fromkeys(("mini_imagenet", "transductive"), bool),
    **dict.fromkeys(("contradicts_training", "about"), dict),
    "tta": {"permutations": int, "flip": bool},
    "training_length": {"seen?": (int, None), "asked_for?": (int, None)},
    "episodes_drawn_by_seed": int,
    "validation": ({"accuracy": finite, "std?": finite}, None),
    "counts": [int],
    "accuracies": [finite],
    "losses": list,
}
_ORIGIN = ({"checkpoint": str, "episode": int}, None)
_TRAINING = {
    "hyper_parameters": dict,
    "seed": (int, None),
    "started_from?": _ORIGIN,
    "resumed_from?": _ORIGIN,
}
# two tests that agree in all others describe the same test: the later one replaces the other
_FOUND = {"accuracies", "losses", "about", "training_length", "validation", "mini_imagenet"}
_KEY = _FORM.keys() - _FOUND
# hyper-parameters that a test does not use
_OF_TRAINING = {"lr", "lr_decay", "grad_clip", "meta_batch", "second_order", "classifier"}
_OF_TRAINING |= {"lstm_init", "bf_init", "bi_init", "bn_scale", "bn_shift"}


def contradictions(args: Namespace, stored: dict[str, object]) -> dict[str, object]:
    """The hyper-parameters of a test that differ from the training's and matter to it, by name."""
    own, stored = vars(args), completed(stored)
    if not stored:
        return {}
    apart = {k: own[k] for k, v in stored.items() if comparable(own[k]) != comparable(v)}
    if apart.get("ema"):  # which only asks for the average that the checkpoint holds
        del apart["ema"]
    if "port" not in (own["augment"], stored["augment"]):  # the others treat test images alike
        apart.pop("augment", None)
    return {k: v for k, v in apart.items() if k not in _OF_TRAINING}


def contradiction_notes(args: Namespace, checkpoint: dict) -> list[str]:
    """A note on each of ``contradictions``."""
    stored = completed(checkpoint.get("hyper_parameters", {}))
    return [
        f"note: {flag_name(k)} {flag_value(v)} is given, but training had {flag_value(stored[k])}"
        for k, v in contradictions(args, stored).items()
    ]


def folder_of(path: Path) -> Path | None:
    """The run folder in which to record a checkpoint's tests; None, with a note, if there is none.

    Raises:
        UserError: it is not writable, or its results cannot be read.
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
    folder: Path, args: Namespace, checkpoint: dict, tests: list[dict], about: dict
) -> Path:
    """Add tests from ``run_test``, with ``about`` from ``provenance``, to a run's ``results.json``,
    and return its path; an earlier test of the same thing is replaced.
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
    path, content = folder / NAME, None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as e:
        advice = "name another, or test it first (python main.py --mode test)"
        raise UserError(f"{folder}: is not a run folder with a {NAME}; {advice}") from e
    except (OSError, ValueError, RecursionError):  # the last of "[[[[..."
        pass
    sound = fits(content, {"training": _TRAINING, "tests": [_FORM]}) and bool(content["tests"])
    if not sound or not all(
        test["counts"] and 0 < min(test["counts"]) <= max(test["counts"]) <= len(test["accuracies"])
        for test in content["tests"]
    ):
        raise UserError(f"{path}: not a test's results; move it away and test the run again")
    check_stored(path, {"hyper_parameters": content["training"]["hyper_parameters"]})
    return content


def variant(test: dict) -> str:
    """How a test differs from the plain one: flags, batch norm, the draw of episodes, TTA."""
    apart = {k: v for k, v in test["contradicts_training"].items() if k not in ("n_shot", "seed")}
    flags = ", ".join(f"{flag_name(k)[2:]} {text(v)}" for k, v in apart.items())
    tta = test["tta"]
    over = [f"{tta['permutations']} permutations"] * (tta["permutations"] > 1)
    over += ["flips"] * tta["flip"]
    words = [f"tested with {flags}"] * bool(flags) + ["transductive"] * test["transductive"]
    if "seed" in test["contradicts_training"]:
        words.append(f"test episodes of seed {test['episodes_drawn_by_seed']}")
    return ", ".join(words + [f"TTA: {' and '.join(over)}"] * bool(over))
