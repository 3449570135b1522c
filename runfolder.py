"""A run's folder: one process at a time, snapshots to go on from, and what makes a run stop early.

``logs-<seed>/`` holds ``console.log``, ``metrics.jsonl``, ``lock`` and ``ckpts/``. ``meta-learner-last.pth.tar`` is the
snapshot: all that the next episode depends on, and how long the two logs were, so that a run that goes on cuts off what a
killed one wrote after it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import time
from pathlib import Path
from typing import IO

from utils import UserError

_locks: list[IO] = []  # held by this process
HEEDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
BEST, LAST = "meta-learner-best.pth.tar", "meta-learner-last.pth.tar"


@contextlib.contextmanager
def locked(folder: Path):
    """Hold a run folder, made if it is missing, for this process alone. The system lets go of it however the process ends.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a+b", buffering=0)
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror}); choose another folder with --save") from e
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "another process"
            raise UserError(f"{folder}: in use by {holder}; wait for it, or choose another --save or --seed") from e
        with contextlib.suppress(OSError):  # a full disk is told of by the logs
            file.truncate(0)
            who = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
            file.write(who.encode())
        _locks.append(file)
        try:
            yield
        finally:
            _locks.remove(file)


def check_run_state(path: Path, content: dict) -> None:
    """See that what a checkpoint says of its run, if anything, is what a run writes.

    Raises:
        UserError: it is not.
    """

    def is_run(run: object) -> bool:
        log = run["since_log"]
        return (
            all(isinstance(run[k], int) and run[k] >= 0 for k in ("validated", "skipped_in_a_row"))
            and list(log) == ["loss", "accuracy", "skipped"]
            and len({len(v) for v in log.values()}) == 1
            and all(isinstance(x, float) for v in log.values() for x in v)
            and all(isinstance(run["data"][split], str) for split in ("train", "val"))
            and all(isinstance(v, int) and v >= 0 for v in run["logs_end_at"].values())
        )

    try:
        best = content.get("best")
        good = "run" not in content or is_run(content["run"])
        good = good and (best is None or (isinstance(best["episode"], int) and isinstance(best["accuracy"], float)))
    except (TypeError, KeyError, AttributeError):
        good = False
    if not good:
        raise UserError(f"{path}: its run state is not what training writes; take an earlier checkpoint")


class Signals:
    """What was asked of this process from outside, looked at between episodes.

    SIGTERM, SIGINT (Ctrl-C) and SIGHUP (the terminal is gone) ask for a snapshot and the end, SIGUSR1 (what Slurm sends before
    it preempts) for a snapshot. A second SIGINT ends the process at once. What was ignored from the start, as SIGHUP is under
    nohup and SIGINT in a script's background, stays so.
    """

    def __init__(self):
        self.stop: signal.Signals | None = None
        self.save = False
        heeded = [s for s in HEEDED if signal.getsignal(s) != signal.SIG_IGN]
        self._before = {s: signal.signal(s, self._note) for s in heeded}

    def _note(self, number: int, _frame) -> None:
        if number == signal.SIGUSR1:
            self.save = True
        elif number == signal.SIGINT and self.stop is not None:
            raise KeyboardInterrupt
        else:
            self.stop = signal.Signals(number)

    def restore(self) -> None:
        """Hand the signals back to whoever had them."""
        for s, handler in self._before.items():
            signal.signal(s, handler)


class Stopped(Exception):
    """A signal ended the run after its snapshot was written."""

    def __init__(self, number: signal.Signals, folder: Path, episode: int):
        super().__init__(f"stopped by {number.name} after episode {episode}; go on with --resume auto ({folder})")
        self.exit_code = 128 + number


def begin_worker(_worker: int = 0) -> None:
    """What a worker process does first: heed no signal, since one to the whole group reaches it, too, and let go of the lock.

    Workers end when the training does; one that was killed they survive by some seconds, in which it can be started again.
    """
    for s in HEEDED:
        signal.signal(s, signal.SIG_IGN)
    for file in _locks:
        file.close()
