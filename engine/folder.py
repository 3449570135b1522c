"""The folder ``SAVE-SEED`` of a training, locked for one process, and the training's flags.

The folder holds ``console.log``, ``metrics.jsonl``, ``lock`` and ``ckpts/``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from engine import checkpoint as checkpoints
from engine import flags
from engine.checkpoint import BEST, LAST
from engine.distributed import SINGLE_PROCESS, Ranks
from engine.flags import comparable
from engine.logger import METRICS
from utils import UserError, file_lock

# hyper-parameters that shape the first episode, and cannot change after it
START_ONLY = {"bn_scale", "lstm_init", "bf_init", "bi_init"}
START_ONLY |= {"method", "bn_shift", "classifier", "learner"}


class RunFolder:
    """A training's folder, the checkpoint that it continues, and its flags.

    Of several ranks only rank 0 uses it.

    Args:
        cli_args: the flags that are given, from ``flags.parse``.
        ranks: that train together.
        still_there: whether the path still leads to the folder, see ``utils.file_lock``.

    Attributes:
        path: the folder.
        args: all flags, those of the checkpoint included; ``resume`` is the checkpoint's path.
        checkpoint: to continue from, or None.
        origin: path and content of the checkpoint that ``--init-from`` names, or None.
        continues: whether the checkpoint belongs to this folder, whose logs are then continued.
        changed: hyper-parameters that differ from the checkpoint's, by name; if it continues this
            folder's run, also flags that its validations and its schedule depend on.

    Raises:
        UserError: the folder is in use or cannot be written, or ``--resume`` names a checkpoint
            that cannot be continued with these flags.
    """

    def __init__(
        self,
        cli_args: dict[str, object],
        ranks: Ranks = SINGLE_PROCESS,
        still_there: Callable[[], bool] = lambda: True,
    ):
        args = flags.resolve(cli_args)
        self.ranks, self.path, self._still_there = ranks, flags.run_folder(args), still_there
        found = self._load(args) if ranks.rank == 0 else None
        resume, self.checkpoint, self.origin = ranks.exchange(found)[0]
        checkpoint, default = self.checkpoint or {}, flags.DEFAULTS
        stored = flags.completed(checkpoint.get("hyper_parameters", {}))
        own = (self.path / "ckpts").resolve()
        self.continues = resume is not None and Path(resume).resolve().parent == own
        free = {"val_freq"} if stored.get("lr_decay") else {"val_freq", "episode"}
        run_flags = checkpoint.get("run_flags", {})
        if self.continues and run_flags:
            stored = stored | {k: default[k] for k in flags.RUN_FLAGS} | run_flags
        elif stored.get("lr_decay") and "episode" in run_flags:  # on which the rate depends
            stored = stored | {"episode": run_flags["episode"]}
        given = {k: v for k, v in cli_args.items() if k in stored.keys() - free}
        self.changed = {k: v for k, v in given.items() if comparable(stored[k]) != comparable(v)}
        self._refuse_changes(str(resume), stored)
        self.args = flags.resolve({**cli_args, "resume": resume}, stored)
        _check_meta_batch(self.args, checkpoint.get("episode", 0), ranks.size)

    def _load(self, args: argparse.Namespace) -> tuple[str | None, dict | None, tuple | None]:
        resume, init_from, checkpoint, origin = args.resume, args.init_from, None, None
        if resume == "auto":
            last = self.path / "ckpts" / LAST
            resume = str(last) if last.is_file() else None
        elif resume:
            resume = checkpoints.resolve_checkpoint(resume, args.seed, LAST)
        if resume:
            checkpoint = checkpoints.load(Path(resume))
            mode = checkpoint.get("mode", "train")
            if mode != args.mode:
                advice = "give it to --init-from" if mode == "pretrain" else "give another --save"
                raise UserError(f"{resume}: is of --mode {mode}, not {args.mode}; {advice}")
            self._refuse_loss(Path(resume), checkpoint["episode"])
            if init_from:
                self._note_another_start(args, checkpoint)
        elif init_from:  # a run that continues is past its start
            find = (args.seed, BEST, LAST)
            path = Path(checkpoints.resolve_checkpoint(init_from, *find, flag="--init-from"))
            origin = path, checkpoints.load(path, "--init-from")
        return resume, checkpoint, origin

    @staticmethod
    def _note_another_start(args: argparse.Namespace, checkpoint: dict) -> None:
        origin = checkpoint.get("about", {}).get("started_from") or {}
        began = origin.get("checkpoint", "scratch")
        with contextlib.suppress(UserError):  # it may be gone by now
            path = checkpoints.resolve_checkpoint(args.init_from, args.seed, BEST, LAST)
            if checkpoints.short_name(Path(path)) != began:
                print(f"note: --init-from {path} has no effect: the run started from {began}")

    def _refuse_loss(self, resume: Path, episode: int) -> None:
        """Refuse an earlier checkpoint of this folder: later episodes would be overwritten."""
        last, seen = self.ckpt(LAST), [episode]
        if resume.resolve().parent != last.resolve().parent or resume.name == LAST:
            return
        with contextlib.suppress(UserError):  # damaged or gone: an earlier one is of use
            seen.append(checkpoints.load(last)["episode"])
        found = (re.fullmatch(r"meta-learner-(\d+)\.pth\.tar", p.name) for p in self._held())
        if episode < (most := max(seen + [int(match[1]) for match in found if match])):
            lost = f"its run has seen {most} episodes, and those after {episode} would be lost"
            raise UserError(f"{resume}: {lost}; give a later checkpoint or another --save")

    def _held(self) -> list[Path]:
        """The folder's checkpoints, from the oldest to the newest."""
        return sorted(self.ckpt("").glob("*.pth.tar"), key=lambda p: p.stat().st_mtime)

    def how_to_continue(self) -> str:
        """The beginning of the advice on how to continue the run that the folder holds, if any."""
        if held := self._held():
            which = "auto" if self.ckpt(LAST) in held else held[-1]
            return f"continue it with --resume {which}, or give "
        names = ("meta-learner*.pth.tar", "results.json", "trace.npz")  # exported, or lost ckpts/
        left = any(any(self.path.glob(name)) for name in names)
        metrics = self.path / METRICS  # a validation follows a checkpoint
        left = left or (metrics.is_file() and b'"event": "val"' in metrics.read_bytes())
        return "give " if left else ""

    def check_place(self) -> None:
        """Check that the path still leads to this folder, before something is written there.

        Raises:
            UserError: it was moved or removed.
        """
        if not self._still_there():
            what = "was moved or removed while its training ran, which ends here"
            raise UserError(f"{self.path}: {what}; continue from where its ckpts/ are now")

    def _refuse_changes(self, resume: str, stored: dict[str, object]) -> None:
        fixed = sorted(k for k in self.changed if self.continues or k in START_ONLY)
        if fixed:
            changes, began = (
                ", ".join(f"{flags.flag_name(k)} {flags.flag_value(values[k])}" for k in fixed)
                for values in (self.changed, stored)
            )
            advice = "leave them out" + ", or give another --save" * self.continues
            raise UserError(f"{changes}: {resume} began with {began}; {advice}")

    def finished(self) -> bool:
        """Whether the checkpoint has seen and validated all episodes, which a line then says."""
        state, n = self.checkpoint or {}, self.args.episode
        done = state.get("episode") == n == state.get("run", {}).get("validated")
        if done:
            data, asked = state.get("data_root"), str(self.args.data_root.resolve())
            of = "" if data in (None, asked) else f" of {data}, not of {asked}"
            print(f"{self.args.resume}: has seen all {n} episodes{of}; nothing to do")
        return done

    def ckpt(self, name: str) -> Path:
        """The path of a checkpoint of this run."""
        return self.path / "ckpts" / name


def _check_meta_batch(args: argparse.Namespace, seen: int, n_ranks: int) -> None:
    """Check that the ranks divide --meta-batch, and it divides --episode and --val-freq.

    Raises:
        UserError: one does not; it is named.
    """
    m = args.meta_batch
    if m % n_ranks:
        advice = f"give --meta-batch {m + -m % n_ranks}"
        if args.method not in flags.INNER_LOOP:
            advice = f"--method {args.method} trains in one; start it without torchrun"
        raise UserError(f"--meta-batch {m}: {n_ranks} processes cannot share it evenly; {advice}")
    for flag, n in (("--episode", args.episode), ("--val-freq", args.val_freq)):
        if n % m:
            raise UserError(f"{flag} {n}: not a multiple of --meta-batch {m}; give {n + -n % m}")
    if seen % m:
        advice = "give a divisor of that"
        raise UserError(f"--meta-batch {m}: {args.resume} has seen {seen} episodes; {advice}")


@contextlib.contextmanager
def locked(cli_args: dict[str, object], ranks: Ranks = SINGLE_PROCESS) -> Iterator[RunFolder]:
    """Lock a run folder; if nothing was put into it, remove it at the end."""
    folder = flags.run_folder(flags.resolve(cli_args))
    if ranks.rank > 0:
        yield RunFolder(cli_args, ranks)
        return
    try:
        made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder / "lock") as still_there:
            try:
                yield RunFolder(cli_args, ranks, still_there)
            finally:
                if still_there() and os.listdir(folder) == ["lock"]:
                    (folder / "lock").unlink()
                    with contextlib.suppress(OSError):  # somebody has put something there
                        for empty in made or [folder]:
                            empty.rmdir()
    except OSError as e:
        if e.filename is None or not Path(str(e.filename)).is_relative_to(folder):
            raise
        raise UserError(f"{folder}: cannot be written ({e.strerror}); give another --save") from e
