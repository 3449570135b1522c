"""Starting where something is missing: a home folder, an output, a signal, a package, a parent."""

import os
import pwd
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import ONE_THREAD, ROOT, completed, refused, succeeded, train, training

import utils
from engine.flags import parse
from utils import UserError, load_package, pip_install


def python(*words, **env):
    """Run Python in the repository, with these variables more."""
    return completed([sys.executable, *words], cwd=ROOT, env=ONE_THREAD | env)


# ---- Home ----


def test_a_tilde_is_the_home_folder_if_there_is_one(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = parse(["--query", "~/a.png", "~x.png", "--runs", "~", "--cache-dir=~/c"])
    assert found["query"] == ["/home/me/a.png", "~x.png"]
    assert (found["runs"], found["cache_dir"]) == (["/home/me"], "/home/me/c")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", Mock(side_effect=KeyError))
    with pytest.raises(UserError, match=r"--save.*~/x.*HOME"):
        parse(["--save=~/x"])


# ---- Before PyTorch is imported ----

AS_MAIN = "import os, runpy, sys; sys.argv = ['main.py', *sys.argv[1:]]\n"
AS_MAIN += "try: runpy.run_path('main.py', run_name='__main__')\nfinally: "


def test_help_and_wrong_flags_come_before_pytorch():
    command = ("-c", AS_MAIN + "assert 'torch' not in sys.modules")
    done = python(*command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--tta-permutations" in done.stdout
    refused(python(*command, "--lr", "7"), "--lr")


# ---- Outputs and signals ----


@pytest.mark.slow
def test_a_path_that_is_no_text_an_ascii_console_and_no_home(master, tmp_path):
    root = tmp_path / os.fsdecode(b"images \xff")
    shutil.copytree(master, root)
    command = [sys.executable, ROOT / "main.py", *training(root, "logs", episode=1)]
    env = {"PYTHONIOENCODING": "ascii", "PATH": os.defpath, "CUDA_VISIBLE_DEVICES": ""}
    done = completed(command, cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "images \\udcff" in done.stdout


@pytest.mark.slow
def test_closed_outputs(master, tmp_path):
    words = training(master, tmp_path / "logs", "--n-workers", 2, episode=2)
    line = f'"$@" <&- >&- 2>&-; code=$?; echo $code >{tmp_path}/code'
    completed(["bash", "-c", line, "-", sys.executable, ROOT / "main.py", *words])
    assert (tmp_path / "code").read_text() == "0\n"
    folder = tmp_path / "logs-719"
    assert '"val"' in (folder / "metrics.jsonl").read_text()
    lock = (folder / "lock").read_text()  # nothing was printed into it
    assert lock.startswith("process")
    assert "\n" not in lock


def test_what_windows_lacks(tmp_path, monkeypatch):
    for name in ("signal.SIGHUP", "signal.SIGUSR1"):
        monkeypatch.delattr(name)
    windows = runpy.run_path(str(ROOT / "engine" / "process.py"))
    assert [s.name for s in windows["HANDLED"]] == ["SIGTERM", "SIGINT"]
    monkeypatch.setattr(utils, "fcntl", None)
    with utils.file_lock(tmp_path / "lock"):
        pass
    monkeypatch.delattr("signal.SIGPIPE")
    monkeypatch.setattr(sys, "stdout", open(os.devnull, "w"))  # noqa: SIM115
    assert windows["run_main"](Mock(side_effect=BrokenPipeError), []) == 128 + 13


# ---- Packages ----

BROKEN = {
    "missing": ("raise ModuleNotFoundError(f'No module named {name!r}', name=name)", "is missing"),
    "a wrong binary": ("raise ImportError('undefined symbol: x')", "undefined symbol"),
    "operators": ("raise RuntimeError('operator torchvision::nms does not exist')", "nms"),
    "a half-removed one": ("raise AttributeError('no attribute y')", "no attribute y"),
    "of another": ("import nowhere_at_all", "nowhere_at_all is missing"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_package(tmp_path, monkeypatch, fault):
    code, words = BROKEN[fault]
    (tmp_path / "fragile.py").write_text(f"name = 'fragile'\n{code}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=words) as e:
        load_package("fragile")
    assert f"{sys.executable} -m pip install" in str(e.value)
    assert (" fragile" in str(e.value)) == (fault not in ("missing", "of another"))


@pytest.mark.parametrize(
    ("script", "module", "text"),
    [
        *(
            ("main", module, "raise ImportError('x')")
            for module in ("numpy", "PIL", "tqdm", "torch")
        ),
        *(("data/glyphs", module, "raise ImportError('x')") for module in ("numpy", "matplotlib")),
        *(("data/prepare", module, "") for module in ("tqdm", "PIL")),  # it is empty
    ],
)
def test_each_script_names_a_broken_package(tmp_path, script, module, text):
    (tmp_path / f"{module}.py").write_text(text)
    done = python(f"{script}.py", "--mode=results", PYTHONPATH=str(tmp_path))
    refused(done, module.replace("PIL", "pillow"), "pip install")


def test_without_packages_one_line_says_so():
    refused(python("-S", "main.py"), "numpy", "pip install")  # -S leaves out all installed packages


def test_torchvision_whose_operators_do_not_load(master, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torchvision.py").write_text(BROKEN["operators"][0])
    monkeypatch.syspath_prepend(tmp_path)
    done = train(master, tmp_path / "out", "--plain")
    refused(done, "torchvision", "nms", "pip install")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("fault", ["missing", "Descriptors"])
def test_a_broken_tensorboard(master, tmp_path, monkeypatch, fault):
    loaded = ("tensorboard", "torch.utils.tensorboard")
    for name in [name for name in sys.modules if name.startswith(loaded)]:
        monkeypatch.delitem(sys.modules, name)
    if fault == "missing":
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    else:
        text = "raise TypeError('Descriptors cannot be created directly')\n"
        (tmp_path / "tensorboard.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
    done = train(master, tmp_path / "logs", "--tensorboard")
    refused(done, "--tensorboard", "pip install", "" if fault == "missing" else fault)
    assert not (tmp_path / "logs-719").exists()


def test_tensorboard_gets_the_log(master, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    succeeded(train(master, tmp_path / "logs", "--tensorboard", "--log-freq", 1))
    board = EventAccumulator(str(tmp_path / "logs-719" / "tensorboard"))
    board.Reload()
    steps = {tag: [e.step for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    of_kind = {"train": [1, 2, 3, 4], "val": [2, 4]}
    assert steps == {f"{k}/{what}": n for k, n in of_kind.items() for what in ("loss", "accuracy")}


def test_the_advice_outside_an_environment_makes_one(monkeypatch):
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert pip_install("x").startswith("python3 -m venv .venv && .venv/bin/python -m pip")
    monkeypatch.setenv("CONDA_PREFIX", "/opt/conda")
    assert pip_install("x") == f"{sys.executable} -m pip install x"
    with pytest.raises(UserError, match=r"requirements\.txt"):
        load_package("nowhere_at_all")


# ---- Threads, silence, parents ----


@pytest.mark.parametrize(
    ("module", "given", "expected"),
    [
        *((module, {}, "1000") for module in ("fast", "engine", "utils", "main")),
        ("runpy; runpy.run_path('examples/own_loop.py')", {}, "1000"),
        ("main", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("main", {"OMP_WAIT_POLICY": "PASSIVE"}, "None"),
    ],
)
def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise(module, given, expected):
    """Whatever is imported before PyTorch sets it."""
    code = f"import os\ntry: import {module}\nfinally: print(os.environ.get('GOMP_SPINCOUNT'))"
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = completed([sys.executable, "-S", "-c", code], cwd=ROOT, env=clean | given)
    assert done.stdout.strip() == expected


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
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        rank = Path("/proc", parent.stdout.readline().strip())
        parent.kill()
    for _ in range(100):
        if not rank.exists() or "zombie" in (rank / "status").read_text():
            return
        time.sleep(0.1)
    os.kill(int(rank.name), signal.SIGKILL)
    pytest.fail("it still runs")
