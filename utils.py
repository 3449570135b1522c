"""Errors, command lines, files written whole, locks, counts and statistics.

Imports no PyTorch, and must be imported before it: OpenMP and cuBLAS read the settings made here
when they start.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import importlib.util
import math
import os
import secrets
import shlex
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

# deterministic cuBLAS needs a workspace of fixed size
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# by default OpenMP's threads spin while they wait, which slows down whatever runs beside them
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

SPLITS = ("train", "val", "test")
REQUIREMENTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "requirements.txt")
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
    return partial(_number, int, "a whole number", low, high, False)


def float_range(low: int, high: int, low_open: bool = False) -> Callable[[str], float]:
    """A parser of finite numbers from ``low`` (itself excluded if ``low_open``) to ``high``."""
    return partial(_number, float, "a number", low, high, low_open)


def _number(kind: type, what: str, low: int, high: int, low_open: bool, text: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high or (low_open and value == low):
        bound = "above" if low_open else "from"
        raise argparse.ArgumentTypeError(
            f"is {text!r}, but must be {what} {bound} {low} up to {high}"
        )
    return value


def run_main(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Run a command; its exit code, or 2 and one line on stderr for what the user can mend."""
    try:
        return main(argv) or 0
    except UserError as error:
        return print_error(error)
    except BrokenPipeError:  # the reader of the output has gone, as `| head` does after ten lines
        # so that the flush at exit succeeds
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + getattr(signal, "SIGPIPE", 13)
    except OSError as error:  # such as a name that is too long, or a folder without permission
        if error.filename is None:
            raise
        return print_error(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python, PyTorch, CUDA or Triton says that memory is exhausted."""
    words = ("out of memory", "defaultcpuallocator", "alloc_failed", "can't start new thread")
    text = str(error).lower()
    no_memory = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    return no_memory or (isinstance(error, RuntimeError) and any(word in text for word in words))


def print_error(error: object) -> int:
    """Print one line on stderr (file names may hold newlines); returns the exit code 2."""
    print("error: " + str(error).replace("\n", "\\n"), file=sys.stderr)
    return 2


def pip_install(what: str = f"-r {shlex.quote(REQUIREMENTS)}") -> str:
    """The command that installs packages; outside an environment it makes one."""
    python, first = shlex.quote(sys.executable or "python"), ""
    if sys.prefix == sys.base_prefix and "CONDA_PREFIX" not in os.environ:
        python, first = ".venv/bin/python", "python3 -m venv .venv && "
    return f"{first}{python} -m pip install {what}"


def load_package(name: str, package: str = "") -> ModuleType:
    """Import a module of another package.

    Args:
        package: what to install, if that is not in requirements.txt or has another name.

    Raises:
        UserError: the package, or one that it imports, is missing or broken; how to install it.
    """
    try:
        return importlib.import_module(name)
    except Exception as e:  # a broken package raises nearly anything
        if isinstance(e, ModuleNotFoundError) and "." not in (e.name or "."):
            advice = pip_install(package) if package else pip_install()
            raise UserError(f"{e.name} is missing; run: {advice}") from e
        package = package or name.partition(".")[0].replace("PIL", "pillow")
        why = next(iter(str(e).splitlines()), "") or type(e).__name__
        advice = pip_install(f"--force-reinstall {package}")
        raise UserError(f"{package} cannot be loaded ({why}); run: {advice}") from e


def check_packages(names: list[str]) -> None:
    """``load_package`` for each; torchvision is only located, for it takes a second to load, and
    fast/ mostly works without.
    """
    for name in names:
        if name != "torchvision":
            load_package(name)
        elif importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is missing; run: {pip_install()}")


# ---- Files ----


def is_junk(name: str) -> bool:
    """Whether a file or folder is hidden, or litter of an operating system."""
    return name.startswith(".") or name.lower() in _JUNK


@contextlib.contextmanager
def explained(
    place: object,
    what: str = "cannot be written",
    advice: str = "free some space or choose another folder",
) -> Iterator[None]:
    """Raise ``UserError`` for an error of the system, with advice."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{place}: {what} ({e.strerror}); {advice}") from e


@contextlib.contextmanager
def atomic_write(path: Path, new: bool = False) -> Iterator[IO[bytes]]:
    """Open a temporary file beside ``path`` for binary writing; it takes the name only when it is
    complete and on disk.

    Args:
        new: nothing may be at ``path``.

    Raises:
        UserError: it cannot be written; whatever was at ``path`` is still there.
    """
    temporary = path.parent / f".{path.name[:200]}.{secrets.token_hex(4)}.tmp"
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if new:
                path.open("xb").close()
            os.replace(temporary, path)
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
        with contextlib.suppress(OSError):  # on a full disk the next write that matters fails
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


# ---- Contents ----


def fits(value: Any, schema: Any) -> bool:
    """Whether a value, read from a file, matches a schema.

    A schema is None; a type, where float admits any number that fits into one; a predicate; a list
    with the schema of all items; a dict with the schemas of some entries, which may be missing if
    their name ends in "?"; {str: schema of all entries}; or a tuple of alternatives.
    """
    if isinstance(schema, tuple):
        return any(fits(value, each) for each in schema)
    if isinstance(schema, list):
        return isinstance(value, list) and all(fits(each, schema[0]) for each in value)
    if isinstance(schema, dict) and isinstance(value, dict):
        if schema.keys() == {str}:
            return fits(list(value), [str]) and fits(list(value.values()), [schema[str]])
        return all(
            fits(value[key], each) if (key := name.rstrip("?")) in value else name.endswith("?")
            for name, each in schema.items()
        )
    if schema is None or isinstance(schema, dict):
        return value is schema
    if schema is float:
        return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**1023)
    return isinstance(value, schema) if isinstance(schema, type) else schema(value)


def finite(value: Any) -> bool:
    """Whether it is a number, and finite."""
    return fits(value, float) and math.isfinite(value)


# ---- Statistics ----


def counted(n: int, noun: str) -> str:
    """``1 episode``, ``2 episodes``."""
    return f"{n} {noun}" + "s" * (n != 1)


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
