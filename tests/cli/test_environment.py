"""Starting where something is missing: a home folder, an output, a signal, a package, a parent."""

import errno
import importlib
import os
import pwd
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, metrics, refused, run_cli, succeeded, train, training

import main
import utils
from engine import process
from engine.flags import parse
from utils import UserError, load_package, pip_install, run_main

CLEAN = {k: v for k, v in os.environ.items() if k not in ("CONDA_PREFIX", "VIRTUAL_ENV")}


def start(*command, **kwargs):
    how = {"capture_output": True, "text": True, "timeout": 300, "check": False, **kwargs}
    return subprocess.run([str(word) for word in command], **how)


# ---- Home ----


@pytest.fixture
def homeless(monkeypatch):
    def unknown(_):
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_tilde_without_a_home_folder(homeless):
    with pytest.raises(UserError, match=r"--save.*~/x.*HOME"):
        parse(["--save=~/x"])


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = parse(["--query", "~/a.png", "~x.png", "--runs", "~", "--cache-dir=~/c"])
    assert found["query"] == ["/home/me/a.png", "~x.png"]
    assert (found["runs"], found["cache_dir"]) == (["/home/me"], "/home/me/c")


# ---- Outputs and signals ----


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_outputs(master, tmp_path, closed):
    words = training(master, tmp_path / "logs", "--n-workers", 2, episode=2)
    line = f'"$@" {closed}; code=$?; echo $code >{tmp_path}/code'
    start("bash", "-c", line, "-", sys.executable, ROOT / "main.py", *words)
    assert (tmp_path / "code").read_text() == "0\n"
    assert len(metrics(tmp_path / "logs", "val")) == 1
    lock = Path(tmp_path, "logs-719", "lock").read_text()  # nothing was printed into it
    assert lock.startswith("process")
    assert "\n" not in lock


def test_a_full_output():
    code = "from engine.process import Terminal; from utils import run_main; Terminal.take_over()\n"
    code += "run_main(lambda _: print('x'), [])"
    done = start("bash", "-c", 'exec "$@" >/dev/full', "-", sys.executable, "-c", code, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, f"error: output: {os.strerror(errno.ENOSPC)}\n")


def test_signals_that_the_system_lacks(master, tmp_path, monkeypatch):
    """Windows has no SIGHUP, SIGUSR1 and SIGPIPE, and no locks."""
    with monkeypatch.context() as windows:
        for name in ("SIGHUP", "SIGUSR1", "SIGPIPE"):
            windows.delattr(signal, name)
        for name in ("SCHED_IDLE", "getpriority"):
            windows.delattr(os, name)
        windows.setattr(utils, "fcntl", None)
        importlib.reload(process)
        assert [s.name for s in process.HANDLED] == ["SIGTERM", "SIGINT"]
        process.lower_priority()
        run_main(main.main, [])  # it names the missing data set, or whatever is not there
        succeeded(train(master, tmp_path / "logs", episode=2))

        def gone(_):
            raise BrokenPipeError

        windows.setattr(sys, "stdout", open(os.devnull, "w"))  # noqa: SIM115
        assert run_main(gone, []) == 128 + 13
    importlib.reload(process)


# ---- Packages ----

BROKEN = {
    "missing": ("raise ModuleNotFoundError(f'No module named {name!r}', name=name)", "is missing"),
    "a wrong binary": ("raise ImportError('undefined symbol: x')", "undefined symbol"),
    "operators": ("raise RuntimeError('operator torchvision::nms does not exist')", "nms"),
    "a half-removed one": ("raise AttributeError('no attribute y')", "no attribute y"),
    "of another": ("import nowhere_at_all", "nowhere_at_all is missing"),
}


@pytest.mark.parametrize("package", ["numpy", "PIL", "tqdm", "torch"])
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_package(tmp_path, package, fault):
    code, words = BROKEN[fault]
    (tmp_path / f"{package}.py").write_text(f"name = {package!r}\n{code}\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    name = {"PIL": "pillow"}.get(package, package) if fault not in ("missing", "of another") else ""
    done = start(sys.executable, ROOT / "main.py", "--mode", "results", env=env)
    refused(done, words, f"{sys.executable} -m pip install", name)


@pytest.mark.parametrize("words", [["--plain"], ["--mode", "predict"]])
def test_torchvision_whose_operators_do_not_load(master, tmp_path, monkeypatch, words):
    save = tmp_path / "logs"
    if "predict" in words:
        succeeded(train(master, save, episode=1))
        words += ["--save", save, "--support", tmp_path / "three", "--cpu"]
        for k in range(3):
            (tmp_path / "three" / str(k)).mkdir(parents=True)
            (tmp_path / "three" / str(k) / "a.jpg").symlink_to(master / "test/test class 0/0.jpg")
        words += ["--query", master / "test", "--out", tmp_path / "out"]
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "broken" / "torchvision").mkdir(parents=True)
    text = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    (tmp_path / "broken" / "torchvision" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "broken")
    done = run_cli(*words) if "predict" in words else train(master, save, *words)
    refused(done, "torchvision", "nms", "pip install")
    assert not list(tmp_path.glob("out*"))
    assert save.with_name("logs-719").exists() == ("predict" in words)


def test_a_broken_tensorboard(master, tmp_path, monkeypatch):
    (tmp_path / "tensorboard").mkdir()
    text = "raise TypeError('Descriptors cannot be created directly')\n"
    (tmp_path / "tensorboard" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [
        n for n in sys.modules if n.startswith(("tensorboard", "torch.utils.tensorboard"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    done = train(master, tmp_path / "logs", "--tensorboard")
    refused(done, "--tensorboard", "Descriptors", "--force-reinstall tensorboard")


def test_the_advice_outside_an_environment_makes_one(monkeypatch):
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert pip_install("x").startswith("python3 -m venv .venv && .venv/bin/python -m pip")
    monkeypatch.setenv("CONDA_PREFIX", "/opt/conda")
    assert pip_install("x") == f"{sys.executable} -m pip install x"
    with pytest.raises(UserError, match=r"requirements\.txt"):
        load_package("nowhere_at_all")


@pytest.mark.slow
def test_an_environment_without_pip(tmp_path):
    """As uv makes them."""
    start(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    line = f"source {ROOT}/scripts/env.sh; use_python requirements.txt"
    env = {**CLEAN, "VIRTUAL_ENV": str(tmp_path / "venv")}
    done = start("bash", "-c", f"set -e; {line}", env=env)
    assert done.returncode == 2
    assert "uv pip install" in done.stderr.splitlines()[-1]
    assert str(tmp_path / "venv") in done.stderr


# ---- Threads, silence, parents ----


@pytest.mark.parametrize("module", ["fast", "engine", "utils", "main"])
def test_threads_of_an_imported_library_do_not_spin(module):
    """Whatever is imported before PyTorch sets it."""
    code = f"import os\ntry: import {module}\nfinally: print(os.environ['GOMP_SPINCOUNT'])"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP", "OMP_WAIT"))}
    done = start(sys.executable, "-S", "-c", code, cwd=ROOT, env=env)
    assert done.stdout == "1000\n"


def test_the_example_imports_it_before_pytorch():
    lines = (ROOT / "examples" / "own_loop.py").read_text().splitlines()
    found = [line.split()[1] for line in lines if line.startswith("import ")]
    assert found.index("engine") < found.index("torch")


def test_training_says_that_it_has_begun(master, tmp_path):
    done = train(master, tmp_path / "logs", "--log-freq", 50)
    assert "a line follows every 50 episodes" in succeeded(done)
    assert "follows" not in (tmp_path / "logs-719" / "console.log").read_text()


PARENT = """
import os, sys, time
if os.fork() == 0:
    from engine.process import end_with_parent
    end_with_parent()
    print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_a_rank_ends_when_its_launcher_is_killed():
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        rank = Path("/proc", parent.stdout.readline().strip())
        parent.kill()
        for _ in range(100):
            if not rank.exists() or "zombie" in (rank / "status").read_text():
                return
            time.sleep(0.1)
    os.kill(int(rank.name), signal.SIGKILL)
    pytest.fail("it still runs")
