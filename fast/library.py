"""The C++ kernels in kernels/, compiled for this machine at first use and cached."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "kernels"
MAIN = FOLDER / "kernels.cpp"  # includes the headers
# clang on ARM knows no -march=native
ARCH = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
FLAGS = ["-std=c++17", "-O3", ARCH, "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
# Tried first. Apple's clang knows no OpenMP, and any clang's needs another runtime than g++'s.
GCC_FLAGS = ["-fopenmp", "-fno-predictive-commoning"]  # the latter optimisation spills registers
DIGEST = 32  # bytes of a SHA-256
SLOWER = "without compiled kernels, about 3.5 times slower"

KERNELS = tuple(re.findall(r"^EXPORT\((\w+)", MAIN.read_text(), re.MULTILINE))
_TYPES = {"p": ctypes.c_void_p, "f": ctypes.c_float, "l": ctypes.c_int64}  # as in kernels.cpp


class Library:
    """The compiled kernels.

    Attributes:
        functions: the kernels by name; empty if they could not be compiled.
        state: for the first line of output: which compiler built them, or why there are none.
    """

    def __init__(self):
        self.functions = {}
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
        if compiler is None:
            self.state = f"{SLOWER} (no C++ compiler found: install g++, or set CXX)"
            return
        try:
            # CXX may be a command of several words, such as "ccache g++"
            library = _load([compiler] if shutil.which(compiler) else shlex.split(compiler))
            self.functions = {name: _function(library, name) for name in KERNELS}
            parallel = ctypes.c_int.in_dll(library, "parallel").value
            one = "" if parallel else " without OpenMP: one thread an episode"
            self.state = f"kernels compiled by {Path(compiler).name}{one}"
        except (OSError, ValueError, subprocess.SubprocessError) as e:
            text = getattr(e, "stderr", None) or str(e)  # of a timeout it is bytes
            lines = (os.fsdecode(text) if isinstance(text, bytes) else text).strip().splitlines()
            first = lines[0] if lines else type(e).__name__
            error = next((line for line in lines if "error" in line), first)
            self.state = f"{SLOWER} ({compiler} cannot compile kernels/: {error})"


def _function(library: ctypes.CDLL, name: str) -> Callable:
    letters = ctypes.c_char_p.in_dll(library, f"{name}_arguments").value.decode()
    address = ctypes.c_void_p.in_dll(library, f"{name}_address").value
    return ctypes.CFUNCTYPE(ctypes.c_int, *(_TYPES[letter] for letter in letters))(address)


def _openmp() -> list[str]:
    """Path of the OpenMP runtime that PyTorch has loaded, in a list; empty if unknown.

    The kernels link against the same one: a second runtime would start a second pool of threads on
    the same cores.
    """
    maps = Path("/proc/self/maps")
    lines = os.fsdecode(maps.read_bytes()).splitlines() if maps.exists() else []
    loaded = sorted({line.split(maxsplit=5)[-1] for line in lines})  # a path may hold spaces
    return [path for path in loaded if re.match(r"lib(gomp|iomp5|omp)\b", Path(path).name)][:1]


def _processor() -> list[str]:
    """The processor's model and features."""
    cpuinfo, keys = Path("/proc/cpuinfo"), ("model name", "flags", "Features")
    info = cpuinfo.read_text().split("\n\n")[0] if cpuinfo.exists() else ""
    return [line for line in info.splitlines() if line.startswith(keys)] or [platform.processor()]


def _load(compiler: list[str]) -> ctypes.CDLL:
    """Load the kernels from the cache, or compile them and store them there.

    The cache is ``lstm-meta-learner`` under $XDG_CACHE_HOME or ~/.cache. A file's name holds a hash
    of all that the machine code depends on: sources, flags, compiler, system, processor and OpenMP
    runtime. Where there is no home folder, or it cannot be used, each process compiles for itself.
    """
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
    version = run([*compiler, "--version"], timeout=60).stdout
    sources, openmp = [p.read_text() for p in (MAIN, *sorted(FOLDER.glob("*.h")))], _openmp()
    parts = (*sources, *FLAGS, *GCC_FLAGS, *compiler[1:], version, platform.platform())
    parts += (*_processor(), *openmp)
    key = hashlib.sha256(os.fsencode("\0".join(parts))).hexdigest()[:16]
    cache, cached = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), False
    folder = Path(cache) / "lstm-meta-learner"
    path = folder / f"kernels-{key}.so"
    if folder.is_absolute():  # without a home folder "~" is still there
        with contextlib.suppress(OSError):
            content = path.read_bytes()  # loading a damaged file can crash the process
            if hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]:
                return ctypes.CDLL(str(path))
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        cached = os.access(folder, os.W_OK)
    print("compiling the kernels, which takes about ten seconds" + " once" * cached, flush=True)
    if cached:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # full, or noexec
            return _compile(run, compiler, openmp, path)
    return _compile(run, compiler, openmp)


def _compile(
    run: Callable, compiler: list[str], openmp: list[str], cache: Path | None = None
) -> ctypes.CDLL:
    """Compile and load the kernels; ``cache`` is the path to store them at, if any."""
    folder = cache.parent if cache else None
    with tempfile.TemporaryDirectory(prefix=".compile-", dir=folder) as work:
        compiled, linked = f"{work}/kernels.o", f"{work}/kernels.so"
        for more in (GCC_FLAGS, []):
            try:
                run([*compiler, *FLAGS, *more, "-c", str(MAIN), "-o", compiled], timeout=300)
                run([*compiler, "-shared", compiled, *openmp, "-o", linked], timeout=300)
                library = ctypes.CDLL(linked)
                break
            except (OSError, subprocess.CalledProcessError):
                if not more:
                    raise
        if cache:
            with open(linked, "r+b") as file:  # the loader ignores what follows the library
                file.write(hashlib.sha256(file.read()).digest())
            os.replace(linked, cache)
        return library


library = functools.cache(Library)  # loads them at the first call
