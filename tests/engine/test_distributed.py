"""Several processes: ``together`` forks them and sees each one's exit code; torchrun is slow."""

import contextlib
import faulthandler
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    ONE_THREAD,
    ROOT,
    assert_same,
    before_call,
    completed,
    kill_self,
    metrics,
    poisoned,
    refused,
    run_cli,
    run_test,
    succeeded,
    tensors,
    training,
    wait_for_lines,
)
from torch.distributed import TCPStore

from engine import checkpoint, distributed
from engine import model as models
from engine.flags import parse
from engine.folder import locked
from engine.run import Run
from fast import images
from utils import UserError

M6 = ("--meta-batch", "6", "--log-freq", "6", "--save-minutes", "0", "--resume", "auto")
SHORT = {"episode": 24, "val_freq": 12}  # 4 updates
LONG = {"episode": 120, "val_freq": 60}  # time enough to kill a rank
slow = pytest.mark.slow


def child(rank, size, port, served, place, argv, prepare):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": str(served)}
    os.environ |= {"OMP_NUM_THREADS": "1"}
    faulthandler.dump_traceback_later(300, exit=True)  # says where it hangs
    prepare(rank)
    code, _, err = run_cli(*argv)
    (place / f"err{rank}").write_text(err)
    os._exit(code)


def together(place, size, argv, prepare=lambda rank: None, port=None, present=None):
    """Start ranks with ``argv``, or ``argv(rank)`` each; their exit codes and what stderr holds.

    This process serves the store, as torchrun does, unless rank 0 is to do it on a given port.
    """
    place.mkdir(exist_ok=True)
    own = argv if callable(argv) else lambda rank: argv
    fork, served, there = multiprocessing.get_context("fork"), port is None, present or range(size)
    listener = socket.create_server(("127.0.0.1", 0)) if served else None
    port = port or str(listener.getsockname()[1])
    how = [(rank, size, port, served, place, own(rank), prepare) for rank in there]
    processes = [fork.Process(target=child, args=args) for args in how]
    for process in processes:
        process.start()
    if served:  # only now: a fork copies a lock that the store's thread holds, but not the thread
        how = {"wait_for_workers": False, "master_listen_fd": listener.detach()}
        store = TCPStore("127.0.0.1", int(port), is_master=True, **how)  # noqa: F841 - it serves
    for process in processes:
        process.join(300)
        if process.exitcode is None:
            process.kill()
    files = [place / f"err{rank}" for rank in there]
    words = "".join(file.read_text() for file in files if file.exists())
    return [process.exitcode for process in processes], words


def all_refused(found, *culprits):
    """One line for all ranks, which names the culprits, and exit code 2 of each."""
    codes, err = found
    assert set(codes) == {2}, err
    assert err.count("\n") == 1, err
    assert all(str(word) in err for word in culprits), err


def torchrun(n, argv, *flags):
    """The command; each rank has one thread."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(n), *flags, str(ROOT / "main.py"), *argv]


def alone(length):
    @pytest.fixture(scope="module")
    def run(master, tmp_path_factory):
        """The run that all others must equal: one process."""
        save = tmp_path_factory.mktemp("alone") / "logs"
        succeeded(run_cli(*training(master, save, *M6, **length)))
        succeeded(run_test(master, save, "--episode-test", "4", "7"))
        return save

    return run


short, long = alone(SHORT), alone(LONG)


def assert_as_alone(save, alone):
    for name in ("last", "best"):
        assert_same(*(tensors(run, f"meta-learner-{name}.pth.tar") for run in (save, alone)))
    assert metrics(save) == metrics(alone)


def results_of(save):
    tests = json.loads(Path(f"{save}-719", "results.json").read_text())["tests"]
    return [{k: v for k, v in test.items() if k != "about"} for test in tests]


# ---- The same numbers ----


def test_two_and_three_ranks_give_the_bits_of_one(master, short, tmp_path):
    """Training, logs and validation, in which a third rank has nothing to do; the second half on
    another number of ranks; and the test.
    """
    save = tmp_path / "logs"
    for n, episode in ((2, 12), (3, 24)):
        argv = training(master, save, *M6, episode=episode, val_freq=12)
        codes, err = together(tmp_path / f"{n}", n, argv)
        assert (codes, err) == ([0] * n, "")
    assert_same(tensors(save), tensors(short))
    assert metrics(save) == metrics(short)
    argv = f"--mode test --data-root {master} --save {save} --episode-test 4 7 --cpu --n-workers 0"
    assert together(tmp_path / "t", 3, argv.split())[0] == [0, 0, 0]
    assert results_of(save) == results_of(short)


@slow
def test_torchrun_gives_the_bits_of_one(master, short, tmp_path):
    save = tmp_path / "logs"
    done = completed(torchrun(2, training(master, save, *M6, **SHORT)))
    assert succeeded(done).count("device: ") == 1
    assert_as_alone(save, short)
    test = f"--mode test --data-root {master} --save {save} --episode-test 4 7 --cpu --n-workers 0"
    succeeded(completed(torchrun(2, test.split())))
    assert results_of(save) == results_of(short)


def test_plain_ranks_agree_too(master, tmp_path):
    pytest.importorskip("torchvision.transforms.functional")  # loaded before the forks, as the rest
    flags = ("--meta-batch", "2", "--plain")
    for n in (1, 2):
        argv = training(master, tmp_path / f"run{n}", *flags, episode=4, val_freq=4)
        assert together(tmp_path / f"{n}", n, argv)[0] == [0] * n
    assert metrics(tmp_path / "run2") == metrics(tmp_path / "run1")


# ---- Ends ----


def begun(command, save, n_lines):
    """Start torchrun and wait for lines in the run's log; the launcher and the ranks' processes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen(command, env=ONE_THREAD, **pipes)
    wait_for_lines(Path(f"{save}-719", "metrics.jsonl"), n_lines, launcher)
    return launcher, workers(launcher)


def workers(launcher):
    """Process ids by rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    found = {}
    for pid in children:
        with contextlib.suppress(OSError):  # it has ended
            environment = Path(f"/proc/{pid}/environ").read_text()
            if rank := re.search(r"\0RANK=(\d+)", "\0" + environment):
                found[int(rank[1])] = int(pid)
    return [found[rank] for rank in sorted(found)]


@slow
def test_a_rank_that_dies_takes_the_others_down(master, long, tmp_path):
    save, command = tmp_path / "logs", training(master, tmp_path / "logs", *M6, **LONG)
    # torchrun ends a rank later than the rank itself does
    launcher, pids = begun(torchrun(2, command, "--monitor-interval", "5"), save, 4)
    os.kill(pids[1], signal.SIGKILL)
    killed = time.monotonic()
    _, err = launcher.communicate(timeout=600)
    assert time.monotonic() - killed < 25  # torchrun itself would kill the others after 30 s
    assert launcher.returncode != 0
    assert not any(Path("/proc", str(pid)).exists() for pid in pids)
    assert re.findall("^error: rank (\\d)", err, re.MULTILINE) == ["0"]
    assert 18 <= tensors(save)["episode"] < LONG["episode"]
    succeeded(run_cli(*command))
    assert_as_alone(save, long)


MEET = {
    "by number": "--node-rank {k} --master-addr 127.0.0.1 --master-port {port}",
    "by themselves": "--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port} --local-addr 127.0.0.1",
}


@slow
@pytest.mark.parametrize("how", MEET)
def test_torchrun_starts_them_again_on_two_machines(master, long, tmp_path, how):
    """Each has a launcher of its own, which counts starts by itself; a rank of each dies."""
    save, log, words = tmp_path / "logs", tmp_path / "logs-719/metrics.jsonl", tmp_path / "words"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv, launchers = training(master, save, *M6, **LONG), []
    with words.open("w") as file:
        try:
            for k in range(2):
                flags = f"--nnodes 2 --max-restarts 4 {MEET[how]}".format(k=k, port=port).split()
                command = [word for word in torchrun(1, argv, *flags) if word != "--standalone"]
                launchers.append(subprocess.Popen(command, stdout=file, stderr=2, env=ONE_THREAD))
            for lines, of in ((3, 0), (8, 1)):
                wait_for_lines(log, lines, *launchers)
                os.kill(workers(launchers[of])[0], signal.SIGKILL)
            assert [launcher.wait(300) for launcher in launchers] == [0, 0], words.read_text()
        finally:
            for launcher in launchers:
                launcher.terminate()  # and its rank
    assert_as_alone(save, long)


@slow
def test_the_launchers_signal_stops_all_at_the_same_update(master, long, tmp_path):
    save, command = tmp_path / "logs", training(master, tmp_path / "logs", *M6, **LONG)
    launcher, _ = begun(torchrun(3, command), save, 3)
    launcher.terminate()
    _, err = launcher.communicate(timeout=600)
    assert launcher.returncode != 0
    assert len(re.findall("^stopped by SIGTERM", err, re.MULTILINE)) == 1
    assert "error: " not in err
    assert tensors(save)["episode"] == metrics(save, "train")[-1]["episode"] < LONG["episode"]
    succeeded(run_cli(*command))
    assert_as_alone(save, long)


def on_rank(k, do):
    """For ``prepare``: what one of the ranks does."""
    return lambda rank: do() if rank == k else None


def in_gradient(do):
    """For ``prepare``: ``do(rank, call)`` before each of a rank's episodes."""
    return lambda rank: before_call(setattr, models, "meta_gradient", lambda n: do(rank, n))


def test_a_signal_to_one_rank_is_heeded_by_all(master, tmp_path):
    flags = (*M6, "--save-minutes", "60")
    argv = training(master, tmp_path / "logs", *flags, episode=48, val_freq=0)
    # of rank 2 in the third update
    third = in_gradient(lambda *at: kill_self(signal.SIGTERM) if at == (2, 5) else None)
    found = together(tmp_path / "a", 3, argv, third)
    assert (found[0], found[1].count("\n")) == ([143] * 3, 1)
    assert "SIGTERM" in found[1]
    assert tensors(tmp_path / "logs")["episode"] == 18

    def prepare(rank):
        in_gradient(lambda *at: kill_self(signal.SIGUSR1) if at == (1, 3) else None)(rank)
        before_call(setattr, Run, "log", lambda n: kill_self() if n == 4 else None)

    assert together(tmp_path / "b", 3, argv, prepare)[0] == [-signal.SIGKILL] * 3
    assert tensors(tmp_path / "logs")["episode"] == 30  # the second update after 18


def not_finite():
    original = models.meta_gradient
    models.meta_gradient = lambda episode, *rest: original(poisoned(episode), *rest)


def full_disk(*_):
    raise UserError("x.pth.tar: cannot be written")


ERRORS = {
    "20 updates": on_rank(1, not_finite),
    "x.pth.tar": lambda rank: setattr(checkpoint, "save", full_disk),
}


@pytest.mark.parametrize(("culprit", "prepare"), ERRORS.items())
def test_an_error_of_one_ends_all(master, tmp_path, prepare, culprit):
    flags = ("--meta-batch", "2", "--save-minutes", "0")
    argv = training(master, tmp_path / "logs", *flags, episode=60, val_freq=0)
    all_refused(together(tmp_path / "a", 2, argv, prepare), "rank 0", culprit)


def test_a_rank_that_dies_during_a_validation_ends_all(master, tmp_path):
    """At once; the other continues from the checkpoint before the validation."""
    prepare = on_rank(1, lambda: setattr(models, "evaluate_episode", lambda *_: os._exit(9)))
    argv = training(master, tmp_path / "logs", *M6[2:], "--meta-batch", "2")
    began = time.monotonic()
    codes, err = together(tmp_path / "a", 2, argv, prepare)
    assert time.monotonic() - began < 120
    assert (codes, err.count("\n")) == ([1, 9], 1), err
    assert "rank 0: another rank has ended" in err
    assert tensors(tmp_path / "logs")["episode"] == 2


@slow
def test_nobody_waits_longer_than_it_says(master, tmp_path):
    argv = training(master, tmp_path / "logs", "--meta-batch", "2", val_freq=0)

    def prepare(rank):
        distributed.TIMEOUT = distributed.timedelta(seconds=6)
        in_gradient(lambda rank, _: time.sleep(20 * rank))(rank)  # rank 1 hangs

    codes, err = together(tmp_path / "a", 2, argv, prepare)
    assert (codes, err.count("\n")) == ([1, 1], 1), err
    found = together(tmp_path / "b", 2, argv, prepare, present=[0])
    all_refused(found, "rank 0 of 2")  # rank 1 never comes


# ---- Refusals ----


def test_a_variable_that_is_no_number():
    command = [sys.executable, ROOT / "main.py", "--mode=results", "--runs", "x"]
    refused(completed(command, env=ONE_THREAD | {"WORLD_SIZE": "two"}), "WORLD_SIZE", "'two'")


other_version = on_rank(2, lambda: setattr(torch, "__version__", "2.0.0"))
other_code = on_rank(1, lambda: setattr(distributed, "_code", lambda: "other"))
other_threads = on_rank(1, lambda: torch.set_num_threads(2))
REFUSALS = {
    "the default": ("", None, "--meta-batch 1", "--meta-batch 3"),
    "not divisible": ("--meta-batch 8", None, "--meta-batch 8", "--meta-batch 9"),
    "all have a bad flag": ("--lr never", None, "--lr", "never"),
    "PyTorch": ("", other_version, "PyTorch", "2.0.0 on rank 2"),
    "code": ("", other_code, "repository", "other on rank 1"),
    "threads": ("--meta-batch 3", other_threads, "device: ", "2 threads"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(master, tmp_path, case):
    """One line, exit code 2 on every rank, and nothing is left behind."""
    flags, prepare, *culprits = REFUSALS[case]
    argv = training(master, tmp_path / "logs", *flags.split(), episode=72, val_freq=0)
    found = together(tmp_path / "a", 3, argv, prepare or (lambda rank: None))
    all_refused(found, *culprits)
    assert not (tmp_path / "logs-719").exists()


OF_ONE = {
    "other flag": ("--lr 0.002", "--lr", "0.002 on rank 1"),
    "bad flag": ("--lr never", "rank 1", "--lr"),
    "no data": ("--data-root /nowhere", "rank 1", "--data-root /nowhere"),
    "other data": ("--data-root {other}", "images"),
}


@pytest.mark.parametrize("case", OF_ONE)
@pytest.mark.parametrize("mode", ["train", pytest.param("test", marks=slow)])
def test_refusals_for_the_sake_of_one(master, short, data, tmp_path, case, mode):
    """Rank 1 of 2 has flags or data of its own."""
    flags, *culprits = OF_ONE[case]
    for split in ("train", "test"):
        image = next((data / split).iterdir()) / "0.jpg"
        image.rename(image.with_name("9.jpg"))
    argv = training(master, tmp_path / "logs", "--meta-batch", "2")
    if mode == "test":
        argv = f"--mode test --data-root {master} --save {short} --cpu --n-workers 0".split()
    more = flags.format(other=data).split()
    found = together(tmp_path / "a", 2, lambda rank: [*argv, *(more if rank == 1 else [])])
    all_refused(found, *culprits)
    assert not (tmp_path / "logs-719").exists()


def test_a_folder_in_use_is_refused_by_rank_0(master, short, tmp_path):
    """And a mode for one process by all."""
    argv = training(master, tmp_path / "logs", "--meta-batch", "2")
    with locked(parse(["--save", str(tmp_path / "logs")])):
        all_refused(together(tmp_path / "a", 2, argv), "rank 0", "logs-719")
    argv = ["--mode", "plot", "--save", str(short)]
    all_refused(together(tmp_path / "b", 2, argv), "--mode plot")


def test_a_port_in_use(master, tmp_path):
    argv = training(master, tmp_path / "logs", "--meta-batch", "2")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        found = together(tmp_path / "a", 2, argv, port=port, present=[0])
    all_refused(found, f"127.0.0.1:{port}", "--master-port")


@slow
def test_refusals_through_torchrun(master, tmp_path):
    done = completed(torchrun(2, training(master, tmp_path / "logs", "--meta-batch", "3")))
    assert done.returncode != 0
    assert len(re.findall("^error: --meta-batch 3", done.stderr, re.MULTILINE)) == 1
    assert re.findall(r"exitcode +: (\d+)", done.stderr) == ["2", "2"]


# ---- Data ----


def test_images_are_decoded_once_a_machine(data, tmp_path):
    """The others wait at the lock, however long it takes."""
    log = tmp_path / "built"

    def note(_):
        with log.open("a") as file:
            file.write("x")
        time.sleep(0.5)

    def prepare(rank):
        before_call(setattr, images, "_build", note)

    argv = training(data, tmp_path / "logs", "--meta-batch", "3", episode=3, val_freq=3)
    assert together(tmp_path / "a", 3, argv, prepare) == ([0, 0, 0], "")
    assert log.read_text() == "xx"  # for training and validation
    caches = [str(tmp_path / name) for name in "abc"]  # each machine may have its own
    argv += ["--save", str(tmp_path / "b"), "--cache-dir"]
    found = together(tmp_path / "b", 3, lambda rank: [*argv, caches[rank]], prepare)
    assert found == ([0, 0, 0], "")
    assert log.read_text() == "xx" + 3 * "xx"
