"""Compiling the kernels on machines that are not like the one they were written on."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from fast import library

PROBE = """extern "C" {
void* probe_address = &probe_address;
const char* probe_arguments = "l";
#ifdef _OPENMP
int parallel = 1;
#else
int parallel = 0;
#endif
}
"""


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """A small library in place of the kernels."""
    (tmp_path / "probe.cpp").write_text(PROBE)
    monkeypatch.setattr(library, "MAIN", tmp_path / "probe.cpp")
    monkeypatch.setattr(library, "KERNELS", ("probe",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if shutil.which("g++") is None:
        pytest.skip("no compiler")


def test_a_compiler_behind_another_command(probe, tmp_path, monkeypatch):
    """As ``CXX="ccache g++"``."""
    wrapper = tmp_path / "my wrapper"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o755)
    for words in (f"{shlex.quote(str(wrapper))} g++ -g", str(wrapper)):
        monkeypatch.setenv("CXX", words)
        found = library.Library()
        assert list(found.functions) == (["probe"] if "g++" in words else []), found.state


def test_a_compiler_without_openmp(probe, tmp_path, monkeypatch):
    """Like Apple's clang; found in the cache the next time."""
    compiler = tmp_path / "apple"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    for words, cache in ((str(compiler), "a"), ("g++", "b"), (str(compiler), "a")):
        monkeypatch.setenv("CXX", words)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        found = library.Library()
        assert list(found.functions) == ["probe"], found.state
        assert ("without OpenMP" in found.state) == (words != "g++")


@pytest.mark.parametrize("words", ["g++ '", "nowhere g++", " "])
def test_a_command_that_is_none(probe, monkeypatch, words):
    monkeypatch.setenv("CXX", words)
    found = library.Library()
    assert not found.functions
    assert "a third of the speed" in found.state


def test_an_openmp_whose_path_has_spaces(tmp_path, monkeypatch):
    maps = tmp_path / "maps"
    runtime = "/opt/my env/lib/libgomp-24e2ab19.so.1.0.0"
    row = f"7f65-7f66 r--p 00000000 08:01 123{' ' * 20}"
    maps.write_text(f"{row}{runtime}\n7f65-7f66 rw-p 00000000 00:00 0 \n{row}/lib/libc.so.6\n")
    monkeypatch.setattr(
        library, "Path", lambda path: maps if path == "/proc/self/maps" else Path(path)
    )
    assert library._openmp() == [runtime]


CODE = """
import os, sys
from pathlib import Path
from unittest import mock
with mock.patch("os.path.expanduser", lambda path: path):  # no HOME, no entry of the user
    import torch
    from fast import gpu, library
    assert "TRITON_HOME" not in os.environ  # it is made for a first kernel, not for an import
    assert gpu._agrees(torch.abs, torch.abs, 0, lambda function: [function(torch.ones(1))])
    assert os.path.isabs(os.environ["TRITON_HOME"])
    library.MAIN, library.KERNELS = Path(sys.argv[1]), ("probe",)
    print(library.Library().state)
"""


def test_without_a_home_folder(probe, tmp_path):
    """Nothing called "~" is made."""
    place = tmp_path / "here"
    place.mkdir()
    homes = "HOME", "XDG_CACHE_HOME", "TRITON_HOME"
    env = {k: v for k, v in os.environ.items() if k not in homes}
    command = [sys.executable, "-c", CODE, str(tmp_path / "probe.cpp")]
    env |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=False)
    assert "kernels compiled" in done.stdout, done.stderr
    assert done.stdout.startswith("compiling")  # it says what takes so long
    assert not list(place.iterdir())
    assert not list(tmp_path.glob("triton-*"))
