"""The C++ kernels in kernels/, compiled for this machine at first use and kept in a cache."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent / "kernels"
MAIN = FOLDER / "kernels.cpp"  # includes the headers
COMPILERS = ("g++", "c++")
FLAGS = [
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
]
FLAGS += [
    "-fno-predictive-commoning",
    "-Wno-psabi",
]  # the optimisation switched off here spills registers
DIGEST = 32  # bytes of a SHA-256
SLOWER = "without compiled kernels, at a third of the speed"

# the kernels' names; those in BY_TYPE end in one of SUFFIX
ONE_TYPE = ("augment", "convolve", "convolve_to_input", "convolve_to_filters")
ONE_TYPE += ("learner_gradient", "meta_forward", "meta_backward")
BY_TYPE = (
    "block_forward",
    "block_backward",
    "block_eval",
    "first_forward",
    "first_backward",
    "first_eval",
    "patch_moments",
)
_TYPES = {
    "p": ctypes.c_void_p,
    "f": ctypes.c_float,
    "l": ctypes.c_int64,
}  # by the letters of kernels.cpp
SUFFIX = {torch.float32: "_float", torch.bfloat16: "_bfloat16"}


class Library:
    """The compiled kernels.

    Attributes:
        functions: the kernels by name; empty if they could not be compiled.
        state: a sentence for the user: which compiler made them, or why there are none.
    """

    def __init__(self):
        self.functions = {}
        compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
        if compiler is None:
            self.state = f"{SLOWER} (no C++ compiler found: install g++, or set CXX)"
            return
        try:
            library = _load(compiler)
            for name in (
                *ONE_TYPE,
                *(name + suffix for name in BY_TYPE for suffix in SUFFIX.values()),
            ):
                letters = ctypes.c_char_p.in_dll(library, f"{name}_arguments").value.decode()
                address = ctypes.c_void_p.in_dll(library, f"{name}_address").value
                self.functions[name] = ctypes.CFUNCTYPE(
                    None, *(_TYPES[letter] for letter in letters)
                )(address)
            self.state = f"kernels compiled by {Path(compiler).name}"
        except (OSError, ValueError, subprocess.SubprocessError) as e:
            self.functions = {}
            said = (getattr(e, "stderr", None) or str(e)).strip().splitlines()
            wrong = next(
                (line for line in said if "error" in line), said[0] if said else type(e).__name__
            )
            self.state = f"{SLOWER} ({compiler} cannot compile kernels/: {wrong})"


def _openmp() -> list[str]:
    """Path of the OpenMP runtime that PyTorch has loaded, in a list; empty if unknown.

    The kernels link against the same one: a second runtime would start a second pool of threads on
    the same cores.
    """
    maps = Path("/proc/self/maps")
    loaded = (
        {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    )
    return sorted(path for path in loaded if re.match(r"lib(gomp|iomp5|omp)\b", Path(path).name))[
        :1
    ]


def _load(compiler: str) -> ctypes.CDLL:
    """Load the kernels from the cache, or compile them and store them there.

    The cache is ``lstm-meta-learner`` under $XDG_CACHE_HOME or ~/.cache. A file's name holds a hash
    of everything that the compiled code depends on: source, flags, compiler, system, processor and
    OpenMP runtime.
    """
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    info = (
        Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        if Path("/proc/cpuinfo").exists()
        else platform.processor()
    )
    processor = [
        line for line in info.splitlines() if line.startswith(("model name", "flags", "Features"))
    ]
    sources = [path.read_text() for path in (MAIN, *sorted(FOLDER.glob("*.h")))]
    openmp = _openmp()
    parts = (*sources, *FLAGS, version, platform.platform(), *processor, *openmp)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lstm-meta-learner"
    path = folder / f"kernels-{key}.so"
    with contextlib.suppress(OSError):
        content = path.read_bytes()
        if (
            hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]
        ):  # loading a damaged file can crash the process
            return ctypes.CDLL(str(path))
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    keep = os.access(folder, os.W_OK)  # if not, this process compiles them for itself
    with tempfile.TemporaryDirectory(prefix=".compile-", dir=folder if keep else None) as place:
        made, linked = f"{place}/kernels.o", f"{place}/kernels.so"
        for command in (
            [*FLAGS, "-c", str(MAIN), "-o", made],
            ["-shared", made, *openmp, "-o", linked],
        ):
            subprocess.run(
                [compiler, *command], capture_output=True, text=True, check=True, timeout=300
            )
        with open(linked, "r+b") as file:
            file.write(
                hashlib.sha256(file.read()).digest()
            )  # the loader ignores what follows the library
        library = ctypes.CDLL(linked)
        if keep:
            os.replace(linked, path)
        return library


@functools.cache
def library() -> Library:
    """The kernels, loaded at the first call."""
    return Library()
