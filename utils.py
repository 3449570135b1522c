"""Errors, command lines, files written whole, locks, statistics. Imports no PyTorch."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import math
import os
import secrets
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, NoReturn

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

SPLITS = ("train", "val", "test")
_JUNK = {"__macosx", "@eadir", "#recycle", "thumbs.db", "desktop.ini", "icon\r"}


class UserError(Exception):
    """Something that the user can mend: shown as one line, exit code 2."""


# ---- The command line ----


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line and flags are never abbreviated."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def int_range(low: int, high: int = 10**9) -> Callable[[str], int]:
    """A parser of whole numbers from ``low`` to ``high``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"is {text!r}, but must be a whole number from {low} to {high}"
            )
        return value

    return parse


def float_range(low: float, high: float, low_open: bool = False) -> Callable[[str], float]:
    """A parser of finite numbers from ``low`` (itself excluded if ``low_open``) to ``high``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (low_open and value == low):
            bound = "above" if low_open else "from"
            raise argparse.ArgumentTypeError(
                f"is {text!r}, but must be a number {bound} {low:g} up to {high:g}"
            )
        return value

    return parse


def run_main(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Run a command; its exit code, or 2 and one line on stderr for what the user can mend."""
    try:
        return main(argv) or 0
    except UserError as error:
        return print_error(error)
    except BrokenPipeError:  # the reader of the output has gone, as `| head` does after ten lines
        # or the flush at exit fails once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + getattr(signal, "SIGPIPE", 13)
    except OSError as error:  # such as a name that is too long, or a folder without permission
        if error.filename is None:
            raise
        return print_error(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def print_error(error: object) -> int:
    """Print one line on stderr (file names may hold newlines); returns the exit code 2."""
    print("error: " + str(error).replace("\n", "\\n"), file=sys.stderr)
    return 2


def missing_package(*packages: str) -> str | None:
    """The first package, of these and of those that they import, that is not installed.

    torchvision is looked for but not imported, since that takes a second and fast/ does without.
    """
    try:
        for package in packages:
            if package != "torchvision":
                importlib.import_module(package)
            elif importlib.util.find_spec(package) is None:
                return package
    except ModuleNotFoundError as error:
        return error.name
    return None


# ---- Files ----


def is_junk(name: str) -> bool:
    """Whether a file or folder is hidden, or litter of an operating system."""
    return name.startswith(".") or name.lower() in _JUNK


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside ``path`` for binary writing; it takes the name only when it is
    complete and on disk.

    Raises:
        UserError: it cannot be written; whatever was at ``path`` is still there.
    """
    temporary = path.parent / f".{path.name[:200]}.{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise UserError(
            f"{path}: cannot be written ({e.strerror}); free some space or choose another folder"
        ) from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


_locks: list[IO[bytes]] = []  # held by this process


@contextlib.contextmanager
def file_lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock file, made if missing, for this process alone. The system releases it however the
    process ends.

    A file system without locks (or Windows) gives none: then nothing keeps two processes apart.

    Args:
        wait: wait for another holder instead of raising.

    Raises:
        UserError: another process holds it; the message says which.
        OSError: the file cannot be opened for writing.
    """
    with path.open("a+b", buffering=0) as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as e:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "another process"
            raise UserError(
                f"{path.parent}: in use by {holder}; wait for it, or choose another folder"
            ) from e
        except OSError:
            pass
        with contextlib.suppress(OSError):  # a full disk shows when something that matters is lost
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}".encode())
        _locks.append(file)
        try:
            yield
        finally:
            _locks.remove(file)


def release_locks() -> None:
    """Close the lock files that a worker process has inherited: it may outlive a killed parent,
    which can then start again.
    """
    for file in _locks:
        file.close()


# ---- Statistics ----


def summary(values: Iterable[float]) -> dict[str, float]:
    """Mean, population standard deviation and half-width of the 95 % interval, 1.96 * std /
    sqrt(n).

    Args:
        values: one number an episode, in whatever unit.

    Returns:
        ``mean``, ``std`` and ``ci95`` in that unit, and ``n``.
    """
    values = [float(v) for v in values]
    mean, std = statistics.fmean(values), statistics.pstdev(values)
    return {"mean": mean, "std": std, "ci95": 1.96 * std / math.sqrt(len(values)), "n": len(values)}
