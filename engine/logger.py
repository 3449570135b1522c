"""What a run writes while it goes: a log for people, metrics for programs, and TensorBoard's files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import IO

from tqdm import tqdm

from utils import UserError, summary


def result_line(what: str, losses: list[float], accuracies: list[float]) -> str:
    """Mean, 95 % interval and standard deviation of many episodes' results, in words."""
    loss, accuracy = summary(losses), summary(accuracies)
    return (
        f"{what}, {accuracy['n']} episodes: accuracy {accuracy['mean']:.2f} ± {accuracy['ci95']:.2f} % "
        f"(std {accuracy['std']:.2f}), loss {loss['mean']:.4f}"
    )


class Logger:
    """One run's console and files: ``console.log`` for people, ``metrics.jsonl`` (one object per
    event) for programs.

    Args:
        folder: the run's folder.
        at: from ``position``: whatever stands beyond it was written by a process that was killed,
            and is cut off.

    Raises:
        UserError: a file cannot be written, or is shorter than ``at`` says.
    """

    NAMES = ("console.log", "metrics.jsonl")

    def __init__(self, folder: Path, at: dict[str, int]):
        self.folder = folder
        try:
            how = {
                "encoding": "utf-8",
                "errors": "backslashreplace",
            }  # file names may hold bytes of any kind
            self._console, self._metrics = ((folder / name).open("a", **how) for name in self.NAMES)
            for file, name in zip((self._console, self._metrics), self.NAMES, strict=True):
                size = (folder / name).stat().st_size
                if size < at.get(name, 0):
                    raise UserError(
                        f"{file.name}: {size} bytes, but the snapshot saw {at[name]}; choose another --save"
                    )
                file.truncate(at.get(name, size))
        except OSError as e:
            raise UserError(
                f"{folder}: cannot be written ({e.strerror}); choose another folder with --save"
            ) from e

    def position(self) -> dict[str, int]:
        """The length of the two files in bytes, once they are safely on disk."""
        for file in (self._console, self._metrics):
            os.fsync(file.fileno())
        return {name: (self.folder / name).stat().st_size for name in self.NAMES}

    def info(self, text: str) -> None:
        """Print a line, above the progress bar if there is one, and keep it with its time."""
        tqdm.write(text)
        _append(self._console, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def event(self, kind: str, **values) -> None:
        """Append one JSON object to ``metrics.jsonl``; wall-clock quantities go under the key
        ``time``.

        A number that is not finite becomes null: JSON has no other word for it.
        """
        values = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        _append(self._metrics, json.dumps({"event": kind, **values}) + "\n")

    def close(self) -> None:
        """Close both files."""
        for file in (self._console, self._metrics):
            with contextlib.suppress(OSError):  # what could not be written was reported then
                file.close()


def _append(file: IO[str], text: str) -> None:
    try:
        file.write(text)
        file.flush()
    except OSError as e:
        raise UserError(
            f"{file.name}: cannot be written ({e.strerror}); free some space or choose another --save"
        ) from e


def open_tensorboard(folder: Path, done: int):
    """A writer that hides the numbers after episode ``done``, which a killed process may have
    written.

    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise UserError(
            "--tensorboard: the package is not installed; pip install tensorboard"
        ) from e
    return SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
