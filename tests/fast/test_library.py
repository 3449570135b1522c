"""Compiling the kernels on machines that are not like the one they were written on."""

import os
import shlex
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from fast import gpu, library

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
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")


def executable(path, *lines):
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a small library in place of the kernels: whether there are any, and their state."""
    (tmp_path / "probe.cpp").write_text(PROBE)
    monkeypatch.setattr(library, "MAIN", tmp_path / "probe.cpp")
    monkeypatch.setattr(library, "KERNELS", ("probe",))

    def load(compiler="g++", cache="cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache) if cache else "")
        monkeypatch.setenv("CXX", compiler)
        loaded = library.Library()
        return list(loaded.functions) == ["probe"], loaded.state

    return load


@pytest.mark.parametrize(
    ("compiler", "culprit"),
    [("", "g++"), *((c, c) for c in ("/none/c++", "/bin/false", "g++ '", "nowhere g++", " "))],
)
def test_without_a_compiler(load, tmp_path, monkeypatch, compiler, culprit):
    """None installed, or ``CXX`` is none."""
    if not compiler:
        monkeypatch.setenv("PATH", "none")
    exists, state = load(compiler)
    assert not exists
    assert culprit in state
    assert "times slower" in state
    assert not (tmp_path / "cache").exists()


def test_compiler_error_is_shown(load, tmp_path):
    message = "a.cpp:1: error: bad"
    lines = "[ $1 = --version ] && exit", "echo note >&2", f"echo '{message}' >&2", "exit 1"
    exists, state = load(executable(tmp_path / "c++", *lines))
    assert not exists
    assert message in state
    assert list((tmp_path / "cache" / "lstm-meta-learner").iterdir()) == []


@needs_compiler
def test_compiled_once_and_again_if_damaged(load, tmp_path):
    cache = tmp_path / "cache" / "lstm-meta-learner"
    assert load()[0]
    (file,) = cache.iterdir()
    first, content = file.stat(), file.read_bytes()
    assert load()[0]
    assert file.stat().st_mtime_ns == first.st_mtime_ns
    file.unlink()  # the process has the old one mapped
    file.write_bytes(content[:1000])
    assert load()[0]
    assert file.stat().st_size == first.st_size
    assert list(cache.iterdir()) == [file]
    (tmp_path / "file").write_text("")
    assert load(cache="file")[0]  # without a cache
    assert (tmp_path / "file").read_text() == ""


@needs_compiler
def test_a_cache_from_which_nothing_can_be_loaded(load, tmp_path, monkeypatch):
    """As on a file system that is mounted noexec: each process compiles for itself."""
    loads = library.ctypes.CDLL

    def refuse(path):
        if path.startswith(str(tmp_path / "cache")):
            raise OSError("failed to map segment from shared object")
        return loads(path)

    monkeypatch.setattr(library.ctypes, "CDLL", refuse)
    for _ in range(2):
        exists, state = load()
        assert exists, state


def test_a_compiler_that_hangs(load, tmp_path, monkeypatch):
    lines = "[ $1 = --version ] && exit", "echo a warning >&2", "exec sleep 30"
    run = library.subprocess.run

    def hasty(command, **kwargs):
        return run(command, **{**kwargs, "timeout": min(1, kwargs["timeout"])})

    monkeypatch.setattr(library.subprocess, "run", hasty)
    exists, state = load(executable(tmp_path / "c++", *lines))
    assert not exists
    assert "a warning" in state


@needs_compiler
def test_a_compiler_behind_another_command(load, tmp_path):
    """As ``CXX="ccache g++"``."""
    wrapper = executable(tmp_path / "my wrapper", 'exec "$@"')
    assert load(f"{shlex.quote(wrapper)} g++ -g")[0]
    assert not load(wrapper)[0]


@needs_compiler
def test_a_compiler_without_openmp(load, tmp_path):
    """Like Apple's clang; found in the cache the next time."""
    lines = 'case "$*" in *-fopenmp*) exit 1;; esac', 'exec g++ "$@"'
    apple = executable(tmp_path / "apple", *lines)
    for compiler, cache in ((apple, "a"), ("g++", "b"), (apple, "a")):
        exists, state = load(compiler, cache)
        assert exists, state
        assert ("without OpenMP" in state) == (compiler == apple)


def test_an_openmp_whose_path_has_spaces(tmp_path, monkeypatch):
    maps, runtime = tmp_path / "maps", "/opt/my env/lib/libgomp-24e2ab19.so.1.0.0"
    row = f"7f65-7f66 r--p 00000000 08:01 123{' ' * 20}"
    maps.write_text(f"{row}{runtime}\n7f65-7f66 rw-p 00000000 00:00 0 \n{row}/lib/libc.so.6\n")
    monkeypatch.setattr(library, "Path", lambda path: maps if "maps" in path else Path(path))
    assert library._openmp() == [runtime]


@needs_compiler
def test_without_a_home_folder(load, tmp_path, monkeypatch, capsys):
    """Nothing called "~" is made."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TRITON_HOME", "")  # which it has again after the test
    monkeypatch.delenv("TRITON_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no HOME, no entry of the user
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gpu._triton_home.cache_clear()
    assert gpu._agrees(torch.abs, torch.abs, 0, lambda function: [function(torch.ones(1))])
    assert os.path.isabs(os.environ["TRITON_HOME"])
    assert load(cache=None)[0]
    assert capsys.readouterr().out.startswith("compiling")  # it says what takes so long
    gpu._triton_home.cache_clear()  # as at the end of the process
    assert not list((tmp_path / "here").iterdir())
    assert not list(tmp_path.glob("triton-*"))
