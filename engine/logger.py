"""A run's log: console.log for people, metrics.jsonl for programs, TensorBoard's files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from engine.schema import finite, fits
from utils import UserError, counted, explained, load_package

CONSOLE, METRICS = "console.log", "metrics.jsonl"
_MEAN = {"mean": float, "ci95": float}
_LOSS = {"mean": (float, None), "ci95": (float, None)}  # None: one was not finite


def _is_episode(n: object) -> bool:
    return isinstance(n, int) and fits(n, float)


def _accuracies(values: object) -> bool:
    return bool(values) and fits(values, [finite])


_FORMS = {  # of events, by kind: what is read of them
    "train": {
        "episode": _is_episode,
        "mean_loss": (float, None),  # no loss was finite
        "mean_accuracy": float,
        "time": {"seconds": float, "episodes_per_second": lambda n: fits(n, float) and n > 0},
    },
    "val": {"episode": _is_episode, "loss": _LOSS, "accuracy": _MEAN, "accuracies?": _accuracies},
}


def summary(values: Iterable[float]) -> dict[str, float]:
    """Mean, population standard deviation and half-width of the 95 % interval, 1.96 * std /
    sqrt(n).

    Args:
        values: one number an episode, in whatever unit.

    Returns:
        ``mean``, ``std`` and ``ci95`` in that unit, and ``n``.
    """
    values = [float(v) for v in values]
    mean = statistics.fmean(values)
    std = statistics.pstdev(values) if math.isfinite(mean) else math.nan
    return {"mean": mean, "std": std, "ci95": 1.96 * std / math.sqrt(len(values)), "n": len(values)}


def result_line(name: str, losses: list[float], accuracies: list[float]) -> str:
    """Mean, 95 % interval and standard deviation over episodes, as one line of text."""
    loss, accuracy = summary(losses), summary(accuracies)
    mean = f"accuracy {accuracy['mean']:.2f} ± {accuracy['ci95']:.2f} %"
    rest = f"(std {accuracy['std']:.2f}), loss {loss['mean']:.4f}"
    return f"{name}, {counted(len(losses), 'episode')}: {mean} {rest}"


class Logger:
    """Appends to ``console.log`` and to ``metrics.jsonl``, which has one JSON object per event.

    Args:
        folder: the run's folder.
        end_at: the files' lengths at the last checkpoint, from ``position``; what a killed process
            wrote beyond is cut off.
        tensorboard: also write TensorBoard's files.
        episode: of that checkpoint; TensorBoard hides what was written after it.

    Raises:
        UserError: a file cannot be written, or is shorter than ``end_at`` says; or TensorBoard is
            missing or broken.
    """

    NAMES = (CONSOLE, METRICS)

    def __init__(
        self, folder: Path, end_at: dict[str, int], tensorboard: bool = False, episode: int = 0
    ):
        self._board = _tensorboard(folder, episode) if tensorboard else None
        how = {"encoding": "utf-8", "errors": "backslashreplace"}  # file names are any bytes
        with explained(folder, advice="choose another --save"):
            self._files = {name: (folder / name).open("a", **how) for name in self.NAMES}
            for name, size in self._sizes().items():
                if size < end_at.get(name, 0):
                    found = f"{size} bytes, but the last checkpoint says {end_at[name]}"
                    raise UserError(f"{folder / name}: {found}; choose another --save")
                self._files[name].truncate(end_at.get(name, size))

    def position(self) -> dict[str, int]:
        """The lengths of the two files in bytes, once they are safely on disk."""
        for file in self._files.values():
            with explained(file.name, advice="free some space"):
                os.fsync(file.fileno())
        return self._sizes()

    def _sizes(self) -> dict[str, int]:
        return {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}

    def info(self, text: str) -> None:
        """Print a line, above the progress bar if there is one, and keep it with its time."""
        tqdm.write(text)
        _append(self._files[CONSOLE], f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def event(self, kind: str, **values) -> None:
        """Append one JSON object; wall-clock times go under ``time``, infinities become null."""
        _append(self._files[METRICS], json.dumps({"event": kind, **_with_null(values)}) + "\n")

    def curve(self, kind: str, episode: int, loss: float, accuracy: float) -> None:
        """Add a point to TensorBoard's curves, if they are asked for."""
        if self._board is not None:
            self._board.add_scalar(f"{kind}/loss", loss, episode)
            self._board.add_scalar(f"{kind}/accuracy", accuracy, episode)

    def close(self) -> None:
        """Close all files."""
        if self._board is not None:
            self._board.close()
        for file in self._files.values():
            with contextlib.suppress(OSError):  # what could not be written was reported then
                file.close()


def _with_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _with_null(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _append(file: IO[str], text: str) -> None:
    with explained(file.name, advice="free some space"):
        file.write(text)
        file.flush()


def _tensorboard(folder: Path, episode: int) -> Any:
    try:
        writer = load_package("torch.utils.tensorboard", "tensorboard").SummaryWriter
    except UserError as e:
        raise UserError(f"--tensorboard: {e}") from e
    return writer(str(folder / "tensorboard"), purge_step=episode + 1)


def read_metrics(folder: Path) -> list[dict]:
    """Read a run's events in order, without a last line that was cut off.

    Raises:
        UserError: the file cannot be read, or no training is logged there.
    """
    path, events = folder / METRICS, []
    with explained(path, "cannot be read", "name a run folder"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):  # the latter of "[[[[..."
            events.append(json.loads(line))
    events = [e for e in events if isinstance(e, dict) and "event" in e]
    if not all(fits(e, _FORMS.get(str(e["event"]), object)) for e in events):
        raise UserError(f"{path}: holds what no training logs; name another run")
    if not any(e["event"] == "train" for e in events):
        raise UserError(f"{path}: no episode of training is logged there yet")
    return events
