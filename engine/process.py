"""This process: terminal, priority, signals, exit."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from utils import UserError, first_line, load_package, out_of_memory, release_locks

PACKAGES = ["numpy", "PIL.Image", "tqdm.std", "torch"]  # that main.py needs
_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
HANDLED = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class Terminal(io.FileIO):
    """Standard output or error that outlives its terminal: writes after a hang-up are lost."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as e:
            if e.errno != errno.EIO:
                # so that the flush at exit does not fail, too
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
                raise OSError(e.errno, e.strerror, "output") from e
            return len(data)

    @classmethod
    def take_over(cls) -> None:
        """Send ``sys.stdout`` and ``sys.stderr`` through it, line by line."""
        for name, number in (("stdout", 1), ("stderr", 2)):
            if getattr(sys, name) is None:  # closed by the shell, as by >&-
                # else the next open() takes this descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
                setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115 - until the end
            raw = io.BufferedWriter(cls(number, "w", closefd=False))
            how = {"errors": "backslashreplace", "line_buffering": True}  # file names are any bytes
            setattr(sys, name, io.TextIOWrapper(raw, getattr(sys, name).encoding, **how))


def announce(text: str) -> None:
    """Say what is being done, on a terminal alone: the next line replaces it."""
    if sys.stderr.isatty():
        print(f"{text}\033[K", end="\r", file=sys.stderr, flush=True)


def run_main(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Run a command; its exit code, or 2 and one line on stderr for what the user can fix."""
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


def print_error(error: object) -> int:
    """Print one line on stderr (file names may hold newlines); returns the exit code 2."""
    print("error: " + str(error).replace("\n", "\\n"), file=sys.stderr)
    return 2


def check_packages(names: list[str]) -> None:
    """Check that the packages can be imported, see ``load_package``."""
    for name in names:
        load_package(name)


class Signals:
    """Notes the signals that arrive; training looks at them between two episodes.

    SIGTERM, SIGINT and SIGHUP ask for a checkpoint and the end, SIGUSR1 (Slurm, before it preempts)
    for a checkpoint. A second SIGINT ends the process at once. A signal that is ignored from the
    start, such as SIGHUP under nohup, stays ignored.

    Attributes:
        stop: the signal that asks for the end, or None.
        save: whether a checkpoint is asked for.
    """

    def __init__(self):
        self.stop: signal.Signals | None = None
        self.save = False
        handled = [s for s in HANDLED if signal.getsignal(s) != signal.SIG_IGN]
        self._before = {s: signal.signal(s, self._note) for s in handled}

    def _note(self, number: int, _frame) -> None:
        if number == getattr(signal, "SIGUSR1", None):
            self.save = True
        elif number == signal.SIGINT and self.stop is not None:
            raise KeyboardInterrupt
        else:
            self.stop = signal.Signals(number)

    def restore(self) -> None:
        """Restore the former handlers."""
        for s, handler in self._before.items():
            signal.signal(s, handler)


class Stopped(Exception):
    """A signal ended the run after its checkpoint was written."""

    def __init__(self, number: signal.Signals, folder: Path, episode: int):
        super().__init__(
            f"stopped by {number.name} after episode {episode}; "
            f"continue with --resume auto ({folder})"
        )
        self.exit_code = 128 + number


def begin_worker(_worker: int = 0) -> None:
    """Start a worker process: ignore signals to the whole group, and release the parent's locks.

    Workers end with the training; they survive a killed one by seconds, in which it may restart.
    """
    for s in HANDLED:
        signal.signal(s, signal.SIG_IGN)
    release_locks()


def end_with_parent() -> None:
    """Ask Linux to send this process SIGTERM when its parent ends, even if that is killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def explain_failures() -> Iterator[None]:
    """Say what to do about exhausted memory and killed worker processes.

    Raises:
        UserError: in place of their exceptions.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError, ValueError) as e:
        why = first_line(e)
        if "more than 1 value per channel" in why:  # batch norm of features of one pixel
            advice = "give --n-shot or --batch-size a value that leaves no minibatch of one image"
            raise UserError(f"batch norm cannot train on one image ({why}); {advice}") from e
        if out_of_memory(e):
            flags = "--image-size, --filters, --hidden-size, --epoch, --n-eval, --n-class"
            raise UserError(f"out of memory ({why}); lower one of {flags}, --n-workers") from e
        place = Path(traceback.extract_tb(e.__traceback__)[-1].filename).parent.name
        if isinstance(e, OSError) and place == "multiprocessing":  # such as a semaphore's
            from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as Loader

            Loader._shutdown = True  # or the half-made one prints a traceback at its end
            cause = "/dev/shm may be full or read-only, or processes or open files too many"
            raise UserError(f"worker processes fail ({why}); {cause}; give --n-workers 0") from e
        if "DataLoader worker (pid" in why:
            cause = "memory or /dev/shm may be too small for --n-workers"
            advice = "continue with --resume auto, and --n-workers 0 if it happens again"
            raise UserError(f"a worker process has ended ({why}); {cause}; {advice}") from e
        raise


def exit_process(run: Callable[[], int]) -> None:
    """End this process with the exit code that ``run`` returns or raises.

    A rank of several skips Python's own shutdown, which PyTorch's network threads may abort.
    """
    try:
        code = run()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    if workers := multiprocessing.active_children():  # stuck: Python would wait for them
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's raises an error
        for worker in workers:
            worker.kill()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
