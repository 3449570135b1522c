"""Logging, files that are whole or not there, and statistics."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import json
import math
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import torch
from tqdm import tqdm


class UserError(Exception):
    """Something that the user can mend: shown as one line, exit code 2."""


class Logger:
    """One run's console and files: ``console.log`` for people, ``metrics.jsonl`` (an object an event) for programs.

    Args:
        folder: the run's folder, made if it is missing.
        at: from ``position``: what stands beyond it was written by a process that was killed, and is cut off.

    Raises:
        UserError: the folder cannot be made or written, or a file is shorter than ``at`` says.
    """

    NAMES = ("console.log", "metrics.jsonl")

    def __init__(self, folder: Path, at: dict[str, int] | None = None):
        self.folder = folder
        at = at or {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            how = {"encoding": "utf-8", "errors": "backslashreplace"}  # file names may hold bytes of any kind
            self._console, self._metrics = ((folder / name).open("a", **how) for name in self.NAMES)
            for file, name in zip((self._console, self._metrics), self.NAMES, strict=True):
                size = (folder / name).stat().st_size
                if size < at.get(name, 0):
                    raise UserError(f"{file.name}: {size} bytes, but the snapshot saw {at[name]}; choose another --save")
                file.truncate(at.get(name, size))
        except OSError as e:
            raise UserError(f"{folder}: cannot be written ({e.strerror}); choose another folder with --save") from e

    def position(self) -> dict[str, int]:
        """How long the two files are, in bytes, once they are safely on disk."""
        for file in (self._console, self._metrics):
            os.fsync(file.fileno())
        return {name: (self.folder / name).stat().st_size for name in self.NAMES}

    def info(self, text: str) -> None:
        """Print a line, above the progress bar if there is one, and keep it with its time."""
        tqdm.write(text)
        _append(self._console, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def event(self, kind: str, **values) -> None:
        """Append one JSON object to ``metrics.jsonl``; wall-clock quantities go under the key ``time``.

        A number that is not finite becomes null: JSON has no other word for it.
        """
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        _append(self._metrics, json.dumps({"event": kind, **values}) + "\n")

    def close(self) -> None:
        for file in (self._console, self._metrics):
            with contextlib.suppress(OSError):  # what could not be written was told when it was
                file.close()


class Terminal(io.FileIO):
    """Standard output or error. When the terminal is gone, what is written there is lost, but nothing else."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as e:
            if e.errno != errno.EIO:
                raise
            return len(data)

    @classmethod
    def take_over(cls) -> None:
        """Send ``sys.stdout`` and ``sys.stderr`` through it, line by line."""
        for name, number in (("stdout", 1), ("stderr", 2)):
            raw = io.BufferedWriter(cls(number, "w", closefd=False))
            encoding = getattr(sys, name).encoding
            # file names may hold bytes of any kind
            setattr(sys, name, io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True))


def _append(file: IO[str], text: str) -> None:
    try:
        file.write(text)
        file.flush()
    except OSError as e:
        raise UserError(f"{file.name}: cannot be written ({e.strerror}); free some space or choose another --save") from e


@contextlib.contextmanager
def whole_file(path: Path):
    """Open a temporary file beside ``path`` for binary writing; it takes the name only once it is complete and on disk.

    Raises:
        UserError: it cannot be written; whatever was at ``path`` is still there.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror}); free some space or choose another folder") from e
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_checkpoint(content: dict, *paths: Path) -> None:
    """Write one checkpoint under each of the names, the same bytes."""
    for path in paths:
        with whole_file(path) as file:
            try:
                torch.save(content, file)
            except RuntimeError as e:  # torch wraps a failed write
                raise OSError(None, str(e).splitlines()[0]) from e


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint of ours or of the older port, without executing anything that it contains.

    Returns:
        A dict with at least ``episode`` (int) and ``metalearner`` (a state dict of CPU tensors).

    Raises:
        UserError: there is no such file, or it is no checkpoint.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give --resume a file written by training")
    try:
        if zipfile.is_zipfile(path):  # PyTorch writes the members' checksums but does not look at them
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise ValueError("its bytes are not those that were written")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # any bytes may be in there, so anything may be raised
        raise UserError(f"{path}: not a checkpoint ({type(e).__name__}); give --resume a file written by training") from e
    ours = isinstance(content, dict) and isinstance(content.get("episode"), int)
    if not ours or not isinstance(content.get("metalearner"), dict):
        raise UserError(f"{path}: not a checkpoint of this project: it lacks 'episode' or 'metalearner'")
    if content["episode"] < 0:
        raise UserError(f"{path}: episode {content['episode']} cannot be; take an earlier checkpoint")
    if not all(isinstance(v, torch.Tensor) for v in content["metalearner"].values()):
        raise UserError(f"{path}: not a checkpoint of this project: 'metalearner' holds things that are no tensors")
    for name, value in content["metalearner"].items():
        if not value.is_floating_point() or value.layout != torch.strided:
            raise UserError(f"{path}: {name} is {value.dtype}, {value.layout}, but should be a dense tensor of floats")
        if not torch.isfinite(value).all():
            raise UserError(f"{path}: {name} holds numbers that are not finite; take an earlier checkpoint")
    return content


def keep_freed_memory(keep: bool = True) -> None:
    """Ask glibc to keep large freed blocks for the next episode instead of handing them back to the system page by page.

    Elsewhere than on glibc it does nothing.

    Args:
        keep: False for the thresholds at which glibc arrives by itself.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << (30 if keep else 25))  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1 if keep else 1 << 26)  # M_TRIM_THRESHOLD


def summary(values: Iterable[float]) -> dict[str, float]:
    """Mean, population standard deviation and half-width of the 95 % interval, 1.96 * std / sqrt(n).

    Args:
        values: one number an episode, in whatever unit.

    Returns:
        ``mean``, ``std`` and ``ci95`` in that unit, and ``n``.
    """
    values = [float(v) for v in values]
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    return {"mean": mean, "std": std, "ci95": 1.96 * std / math.sqrt(len(values)), "n": len(values)}
