"""Starting where something is missing: a home folder, an output, a signal, a package, a parent."""

import errno
import importlib
import os
import pwd
import shutil
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


def start(*command, cwd=ROOT, env=None):
    """Run a command, with these variables more."""
    how = {"capture_output": True, "text": True, "timeout": 300, "check": False}
    env = os.environ | (env or {})
    return subprocess.run([str(word) for word in command], cwd=cwd, env=env, **how)


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


# ---- Before PyTorch is imported ----

AS_MAIN = "import os, runpy, sys; sys.argv = ['main.py', *sys.argv[1:]]\n"
AS_MAIN += "try: runpy.run_path('main.py', run_name='__main__')\nfinally: "


def test_help_and_wrong_flags_come_before_pytorch():
    command = (sys.executable, "-c", AS_MAIN + "assert 'torch' not in sys.modules")
    done = start(*command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--tta-permutations" in done.stdout
    refused(start(*command, "--lr", "7"), "--lr")


def test_without_packages_one_line_says_so():
    done = start(sys.executable, "-S", "main.py")  # -S leaves out all installed packages
    refused(done, "numpy", "pip install")


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="Linux only")
@pytest.mark.parametrize(("nice", "policy"), [(0, "SCHED_OTHER"), (10, "SCHED_IDLE")])
def test_a_niced_run_steps_aside_for_all_others(nice, policy):
    if os.getpriority(os.PRIO_PROCESS, 0) > 0 or os.sched_getscheduler(0) != os.SCHED_OTHER:
        pytest.skip("the tests are niced themselves")
    code = AS_MAIN + "os.write(2, b'%d' % os.sched_getscheduler(0))"
    done = start("nice", "-n", nice, sys.executable, "-c", code, "--help")
    assert int(done.stderr) == getattr(os, policy)


# ---- Outputs, signals, images ----


@pytest.mark.slow
def test_a_path_that_is_no_text_an_ascii_console_and_no_home(master, tmp_path):
    root = tmp_path / os.fsdecode(b"images \xff")
    shutil.copytree(master, root)
    command = (sys.executable, ROOT / "main.py", *training(root, "logs", episode=1))
    env = {"PYTHONIOENCODING": "ascii", "PATH": os.defpath, "CUDA_VISIBLE_DEVICES": ""}
    done = start("env", "-i", *(f"{k}={v}" for k, v in env.items()), *command, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "images \\udcff" in done.stdout


@pytest.mark.slow
def test_a_bad_image_in_a_worker_process_ends_the_program(data, tmp_path):
    for path in data.glob("train/*/*.jpg"):
        path.write_bytes(b"junk")
    words = training(data, tmp_path / "logs", "--plain", "--n-workers", 2)
    refused(start(sys.executable, "main.py", *words), data / "train")


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
    done = start("bash", "-c", 'exec "$@" >/dev/full', "-", sys.executable, "-c", code)
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
    name = {"PIL": "pillow"}.get(package, package) if fault not in ("missing", "of another") else ""
    env = {"PYTHONPATH": str(tmp_path)}
    done = start(sys.executable, "main.py", "--mode", "results", env=env)
    refused(done, words, f"{sys.executable} -m pip install", name)


@pytest.mark.parametrize("text", ["raise ImportError('undefined symbol: x')", ""])
@pytest.mark.parametrize(
    ("script", "package"),
    [("glyphs", "numpy"), ("glyphs", "matplotlib"), ("prepare", "tqdm"), ("prepare", "pillow")],
)
def test_a_broken_package_of_a_data_script(tmp_path, script, package, text):
    """Also one that is empty."""
    (tmp_path / f"{package.replace('pillow', 'PIL')}.py").write_text(text)
    done = start(sys.executable, f"data/{script}.py", "--help", env={"PYTHONPATH": str(tmp_path)})
    refused(done, package, "pip install")


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
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torchvision.py").write_text(BROKEN["operators"][0])
    monkeypatch.syspath_prepend(tmp_path / "broken")
    done = run_cli(*words) if "predict" in words else train(master, save, *words)
    refused(done, "torchvision", "nms", "pip install")
    assert not list(tmp_path.glob("out*"))
    assert save.with_name("logs-719").exists() == ("predict" in words)


def test_a_broken_tensorboard(master, tmp_path, monkeypatch):
    text = "raise TypeError('Descriptors cannot be created directly')\n"
    (tmp_path / "tensorboard.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    loaded = ("tensorboard", "torch.utils.tensorboard")
    for name in [name for name in sys.modules if name.startswith(loaded)]:
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


# ---- Threads, silence, parents ----


@pytest.mark.parametrize(
    ("module", "given", "expected"),
    [
        *((module, {}, "1000") for module in ("fast", "engine", "utils", "main")),
        ("main", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("main", {"OMP_WAIT_POLICY": "PASSIVE"}, "None"),
    ],
)
def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise(
    module, given, expected, monkeypatch
):
    """Whatever is imported before PyTorch sets it."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    code = f"import os\ntry: import {module}\nfinally: print(os.environ.get('GOMP_SPINCOUNT'))"
    assert start(sys.executable, "-S", "-c", code, env=given).stdout.strip() == expected


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
