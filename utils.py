"""Errors, packages, atomic writes, and locks.

Imports no PyTorch, and sets what OpenMP and cuBLAS read when PyTorch starts them: import it, or
``engine``, first.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import os
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import IO

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

# deterministic cuBLAS needs a workspace of fixed size
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# by default OpenMP's threads spin while they wait, which slows down other processes
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

SPLITS = ("train", "val", "test")
ROOT = Path(__file__).resolve().parent


class UserError(Exception):
    """Something that the user can fix: shown as one line, exit code 2."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def counted(n: int, noun: str) -> str:
    """``1 episode``, ``2 episodes``."""
    return f"{n} {noun}" + "s" * (n != 1)


# ---- Packages ----


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python, PyTorch, CUDA or Triton says that memory is exhausted."""
    words = ("out of memory", "defaultcpuallocator", "alloc_failed", "can't start new thread")
    text = str(error).lower()
    no_memory = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    return no_memory or (isinstance(error, RuntimeError) and any(word in text for word in words))


def pip_install(what: str = f"-r {shlex.quote(str(ROOT / 'requirements.txt'))}") -> str:
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
        advice = pip_install(f"--force-reinstall {package}")
        raise UserError(f"{package} cannot be loaded ({first_line(e)}); run: {advice}") from e


# ---- Files ----


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
def file_lock(path: Path, wait: bool = False) -> Iterator[Callable[[], bool]]:
    """Hold a lock file, made if missing, for this process alone. The system releases it however the
    process ends.

    A file system without locks (or Windows) gives none: then nothing keeps two processes apart.

    Args:
        wait: wait for another holder instead of raising, and say so.

    Yields:
        A function that tells whether the file is still at ``path``: its folder may be removed or
        moved, and another made in its place.

    Raises:
        UserError: another process holds it; the message says which.
        OSError: the file cannot be opened for writing.
    """
    with path.open("a+b", buffering=0) as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "another process"
            if not wait:
                advice = "wait for it, or choose another folder"
                raise UserError(f"{path.parent}: in use by {holder}; {advice}") from e
            print(f"waiting for {holder}, which holds {path}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        with contextlib.suppress(OSError):  # on a full disk the next write that matters fails
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}".encode())
        own = os.fstat(file.fileno())

        def still_there() -> bool:
            with contextlib.suppress(OSError):
                return os.path.samestat(own, os.stat(path))
            return False

        _locks.append(file)
        try:
            yield still_there
        finally:
            _locks.remove(file)


def release_locks() -> None:
    """Close the lock files that a worker process has inherited: it may outlive a killed parent,
    which can then start again.
    """
    for file in _locks:
        file.close()
