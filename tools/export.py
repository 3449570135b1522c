"""Copies the parts of a tested run that are to be published."""

from __future__ import annotations

import re
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path

import numpy as np

from engine import checkpoint as checkpoints
from engine.checkpoint import BEST, LAST
from engine.flags import run_folder
from engine.logger import Logger
from tools import results, trace
from tools.recipes import recipe_name
from utils import UserError, atomic_write, explained

PUBLISHED = ("episode", "mode", "metalearner", "backbone", "hyper_parameters", "run_flags")
PUBLISHED += ("best", "about", "classes")


def export_mode(args: Namespace) -> None:
    """Export this run and print where."""
    print(f"written to {export(run_folder(args), Path(args.to))}")


def export(folder: Path, to: Path) -> Path:
    """Copy a tested run into ``to/<data>-<shots>s<ways>c-<recipe>-<seed>/``.

    That is its logs, results, trace and pictures, and the best checkpoint without the optimiser's
    state; no photograph, which are not ours to publish.

    Returns:
        The new folder, which must not exist yet.

    Raises:
        UserError: this checkpoint has not been tested, or the new folder exists or cannot be
            written; nothing is then left of it.
    """
    content = results.read_results(folder)
    stored, seed = content["training"]["hyper_parameters"], content["training"]["seed"]
    recipe = recipe_name(stored).replace(", but ", "-")
    shape = f"{stored.get('n_shot')}s{stored.get('n_class')}c"
    best = checkpoints.find_checkpoint(folder, BEST, LAST)
    if best is None:
        raise UserError(f"{folder}/ckpts: no checkpoint there")
    checkpoint = checkpoints.load(best)
    if checkpoint["episode"] not in [test["episode"] for test in content["tests"]]:
        advice = f"of which {folder / results.NAME} has no test; test the run again"
        raise UserError(f"{best}: is of episode {checkpoint['episode']}, {advice}")
    data = Path(checkpoint.get("data_root", content["tests"][0]["data"])).name
    slug = re.sub(r"[^\w.]+", "-", f"{data}-{shape}-{recipe}")
    # a file's name has at most 255 bytes
    target = to / f"{slug.encode()[:200].decode(errors='ignore')}-{seed}"
    if target.exists():
        raise UserError(f"{target}: exists already; give another --to, or remove it")
    with explained(target, advice="give another --to"):
        to.mkdir(parents=True, exist_ok=True)
        # takes its name when it is complete
        with tempfile.TemporaryDirectory(dir=to, prefix=".") as temporary:
            whole = Path(temporary, "run")
            _copy(folder, checkpoint, whole)
            whole.rename(target)
    return target


def _copy(folder: Path, checkpoint: dict, target: Path) -> None:
    kept = {k: checkpoint[k] for k in PUBLISHED if k in checkpoint}
    checkpoints.save(kept, target / "meta-learner.pth.tar")
    for name in (*Logger.NAMES, results.NAME):
        if (folder / name).is_file():
            shutil.copy(folder / name, target)
    for path in sorted((folder / "plots").glob("*.png")):
        if path.name != "confusion.png":
            (target / "plots").mkdir(exist_ok=True)
            shutil.copy(path, target / "plots")
    if (arrays := trace.read_trace(folder)) is not None:
        arrays.pop("images", None)
        with atomic_write(target / trace.NAME) as file:
            np.savez_compressed(file, **arrays)
