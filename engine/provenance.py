"""Command, commit, versions and machine, recorded with every run and test."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys

import torch

from engine.flags import ROOT
from utils import counted

PACKAGES = ("torch", "torchvision", "numpy", "pillow")


def provenance(device: torch.device, n_processes: int = 1) -> dict[str, object]:
    """Command (with file names instead of absolute paths), commit, versions, and machine."""
    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv]
    on_gpu = device.type == "cuda"
    cpu = f"{cpu_name()}, {counted(torch.get_num_threads(), 'thread')}"
    about = {
        "command": "python " + shlex.join(words),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu,
    }
    return about | ({"processes": n_processes} if n_processes > 1 else {})


def commit() -> str:
    """This repository's commit, with "-dirty" if files differ from it, or "unknown"."""
    if not (ROOT / ".git").exists():  # a copy of the files, perhaps in another repository
        return "unknown"
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_name() -> str:
    """The CPU's model."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", "rb") as file:
        name = next(line for line in file if line.startswith(b"model name"))
        return name.decode(errors="replace").split(":")[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package) or "unknown"
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return "unknown"
