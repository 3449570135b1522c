"""Whatever happens to a run, it goes on to the bits that it would have reached."""

import fcntl
import itertools
import multiprocessing
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import (
    ONE_THREAD,
    ROOT,
    assert_same,
    before_call,
    kill_self,
    metrics,
    poisoned,
    refused,
    succeeded,
    tensors,
    train,
    training,
    wait_for_lines,
)

from engine import logger, run
from engine import model as models
from engine.checkpoint import BEST, LAST
from engine.flags import parse
from engine.folder import locked
from fast import images

LONG = {"episode": 12, "val_freq": 4}
ALWAYS = ("--resume", "auto", "--save-minutes", "0")  # a checkpoint after each episode
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(master, tmp_path_factory):
    save = tmp_path_factory.mktemp("undisturbed") / "logs"
    succeeded(train(master, save, *ALWAYS, **LONG))
    return save


def console(save):
    """Lines of console.log without what depends on the clock or on folders' names."""
    text = Path(f"{save}-719", "console.log").read_text()
    clock = r"^\S+ \S+ |\d+\.\d+ episodes/s.*|\S+(?=: 6 train)|\S+(?=/ckpts)"
    return re.sub(clock, "", text, flags=re.MULTILINE).splitlines()


def assert_as_undisturbed(data, save, undisturbed):
    """It goes on, and ends where it would have ended."""
    succeeded(train(data, save, *ALWAYS, **LONG))
    for name in (LAST, "meta-learner-best.pth.tar", "meta-learner-8.pth.tar"):
        assert_same(tensors(save, name), tensors(undisturbed, name))
    assert metrics(save) == metrics(undisturbed)
    assert console(save) == console(undisturbed)
    for place in (Path(f"{save}-719", "ckpts"), Path(data, images.FOLDER)):
        assert not list(place.glob(".*.tmp"))  # what killed writes left is gone


# ---- Processes that are killed ----


def child(data, save, flags, prepare):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare()
    done = train(data, save, *ALWAYS, *flags, **LONG)
    os.write(2, done.stderr.encode())
    os._exit(done.returncode)


def start(data, save, *flags, prepare=lambda: None):
    """Train in a forked process, which has PyTorch imported already."""
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=child, args=(data, save, flags, prepare))
    process.start()
    return process


def command_line(data, save, *flags):
    return [sys.executable, str(ROOT / "main.py"), *training(data, save, *ALWAYS, *flags, **LONG)]


INSTANTS = {  # where -> function, and the call that kills
    "first checkpoint": (os, "replace", 1),
    "later checkpoint": (os, "replace", 7),
    "writing a checkpoint": (torch, "save", 5),
    "metrics": (logger, "_append", 9),
    "first validation": (models, "evaluate_episode", 2),
    "end of a validation": (run, "summary", 9),
    "decoding": (images, "_decode", 30),
}
RARE = {
    "syncing": (os, "fsync", 8),
    "first line": (run, "summary", 2),
    "checksums": (images.np, "savez", 1),
    "renaming the images": (images.Path, "rename", 2),
}


@pytest.mark.parametrize("instant", [*INSTANTS, *(pytest.param(k, marks=slow) for k in RARE)])
def test_killed_at_the_worst_instants(data, tmp_path, undisturbed, instant):
    *at, call = (INSTANTS | RARE)[instant]
    kill = partial(before_call, setattr, *at, lambda n: kill_self() if n == call else None)
    process = start(data, tmp_path / "logs", prepare=kill)
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    assert_as_undisturbed(data, tmp_path / "logs", undisturbed)


@slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_random_instants(data, tmp_path, undisturbed, number):
    """Ten times: while it starts, decodes, trains, validates or saves, wherever it is."""
    rng, kills, save = random.Random(int(number)), 0, tmp_path / "logs"
    while kills < 10:
        process = start(data, save)
        process.join(rng.uniform(0.01, 0.6))
        if process.exitcode is None:
            os.kill(process.pid, number)
            process.join(300)
            kills += 1
        assert process.exitcode in (0, -number, 128 + number)
        if process.exitcode == 0:  # it was quicker; the next one begins anew
            assert_as_undisturbed(data, save, undisturbed)
            shutil.rmtree(f"{save}-719")
    assert_as_undisturbed(data, save, undisturbed)


@slow
def test_kill_9_of_a_command_with_workers(data, tmp_path, undisturbed):
    """The workers outlive it by seconds, but do not hold the lock."""
    save = tmp_path / "logs"
    command, log = command_line(data, save, "--n-workers", "2"), Path(f"{save}-719/metrics.jsonl")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ONE_THREAD)
    wait_for_lines(log, 1, process)
    time.sleep(random.uniform(0, 0.5))
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert_as_undisturbed(data, save, undisturbed)
    deadline = time.monotonic() + 60
    while any(Path("/proc", pid).exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path("/proc", pid).exists() for pid in workers)


@slow
def test_whoever_reads_the_output_may_go(data, tmp_path, undisturbed):
    """``| head -n 3``: it ends at once and without a traceback, and can be continued."""
    command, pipes = command_line(data, tmp_path / "logs"), {"stdout": -1, "stderr": -1}
    with subprocess.Popen(command, **pipes, text=True, env=ONE_THREAD) as process:
        for _ in range(3):
            process.stdout.readline()
        process.stdout.close()
        assert process.wait(300) == 128 + signal.SIGPIPE
        assert "Traceback" not in process.stderr.read()
    assert_as_undisturbed(data, tmp_path / "logs", undisturbed)


@slow
@pytest.mark.parametrize("hang_up", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_terminal_that_goes_away_costs_no_episode(data, tmp_path, undisturbed, hang_up):
    """As when a laptop is closed on an ssh session, without or with nohup."""
    save, (ours, its) = tmp_path / "logs", pty.openpty()

    def own_terminal():
        os.setsid()
        fcntl.ioctl(its, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, hang_up)

    streams = {"stdin": its, "stdout": its, "stderr": its, "preexec_fn": own_terminal}
    process = subprocess.Popen(command_line(data, save), env=ONE_THREAD, **streams)
    os.close(its)
    seen = b""
    while b"/12] loss" not in seen:
        seen += os.read(ours, 1000)
    os.close(ours)
    assert process.wait(300) == (0 if hang_up == signal.SIG_IGN else 128 + signal.SIGHUP)
    assert 0 < tensors(save)["episode"] == metrics(save, "train")[-1]["episode"]
    assert_as_undisturbed(data, save, undisturbed)


def limited(size):
    """A disk with room for files of this many bytes only."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    ("size", "culprit"), [(5_000, "decoded"), (200_000, LAST), (150, "metrics.jsonl")]
)
def test_disk_full(data, tmp_path, undisturbed, capfd, size, culprit):
    """For images, a checkpoint or a log: one line, and it goes on once there is room."""
    if culprit != "decoded":
        succeeded(train(data, tmp_path / "other"))  # decodes the images
    capfd.readouterr()
    process = start(data, tmp_path / "logs", prepare=lambda: limited(size))
    process.join(300)
    error = capfd.readouterr().err
    assert process.exitcode == 2
    assert error.count("error: ") == 1
    assert culprit in error
    assert "Traceback" not in error
    assert_as_undisturbed(data, tmp_path / "logs", undisturbed)


# ---- Signals ----


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize(("number", "during"), [*((n, "train") for n in SIGNALS), (15, "val")])
def test_a_signal_saves_and_ends(master, trained, tmp_path, monkeypatch, number, during):
    """During a validation it ends at once, and the validation is repeated."""
    at = {"train": (models, "meta_gradient"), "val": (models, "evaluate_episode")}[during]
    save, handler = tmp_path / "logs", signal.getsignal(number)
    before_call(monkeypatch.setattr, *at, lambda _: kill_self(number))
    done = train(master, save)
    assert (done.returncode, done.stderr.count("\n")) == (128 + number, 1)
    named = (signal.Signals(number).name, "--resume auto", "logs-719")
    assert all(word in done.stderr for word in named)
    assert tensors(save)["episode"] == (1 if during == "train" else 2)
    assert metrics(save, "val") == []
    assert signal.getsignal(number) == handler
    monkeypatch.undo()
    succeeded(train(master, save, "--resume", "auto"))
    assert metrics(save) == metrics(trained)
    assert_same(tensors(save), tensors(trained))


# ---- Which run a folder holds ----


def test_one_process_a_folder(master, tmp_path):
    save = tmp_path / "logs"
    with locked(parse(["--save", str(save)])):
        refused(train(master, save), "logs-719", os.getpid())
        assert (tmp_path / "logs-719" / "lock").exists()
    assert not (tmp_path / "logs-719").exists()  # nothing was put into it
    (tmp_path / "logs-719").mkdir()
    (tmp_path / "logs-719" / "lock").write_text("process 1 on elsewhere")  # nobody holds it
    succeeded(train(master, save))


@pytest.mark.parametrize("then", ["gone", "another's"])
def test_a_folder_that_is_removed_while_it_trains(master, tmp_path, monkeypatch, then):
    """The training ends; whoever has made the folder anew keeps all that is in it."""
    folder = tmp_path / "logs-719"

    def remove(n):
        if n == 2:
            shutil.rmtree(folder)
            if then == "another's":
                folder.mkdir()
                (folder / "lock").write_text("process 1")

    before_call(monkeypatch.setattr, run, "summary", remove)
    refused(train(master, tmp_path / "logs", **LONG), folder, "removed")
    left = [path.name for path in folder.iterdir()] if folder.exists() else []
    assert left == ["lock"] * (then != "gone")


@pytest.mark.parametrize("tested", [False, True])
def test_a_run_without_its_checkpoints_is_not_overwritten(data, tmp_path, tested):
    save = tmp_path / "logs"
    succeeded(train(data, save))
    before = metrics(save)
    shutil.rmtree(f"{save}-719/ckpts")
    if tested:
        Path(f"{save}-719", "results.json").write_text("{}")
    refused(train(data, save, "--resume", "auto"), "logs-719", "holds a run already")
    assert metrics(save) == before


def test_a_folder_is_not_silently_continued(data, tmp_path):
    save, again = tmp_path / "logs", ("--resume", "auto")
    succeeded(train(data, save))
    before = metrics(save)
    refused(train(data, save), "logs-719", "--resume auto")
    changed = ("--lr", "0.01", "--n-shot", "2", "--seed", "719")
    line = refused(train(data, save, *again, *changed, episode=6), "--lr 0.01", "--lr 0.001")
    assert "--n-shot 2" in line  # all at once
    assert "--seed" not in line
    image = data / "train" / "class 0" / "0.jpg"
    image.rename(image.with_name("9.jpg"))
    refused(train(data, save, *again, episode=6), data / "train")
    image.with_name("9.jpg").rename(image)
    succeeded(train(data, save, *again))  # has nothing to do
    assert metrics(save) == before
    succeeded(train(data, save, *again, episode=6))
    assert metrics(save)[: len(before)] == before
    assert [m["episode"] for m in metrics(save, "train")] == [1, 2, 3, 4, 5, 6]
    refused(train(data, save, *again, episode=3), "--episode 3")


def test_checkpoints_are_not_overwritten_by_an_earlier_start(master, own):
    """Neither by a new run, where the last checkpoint has gone, nor from an earlier checkpoint."""
    ckpts = Path(f"{own}-719", "ckpts")
    earlier = ckpts / "meta-learner-2.pth.tar"
    refused(train(master, own, "--resume", earlier), earlier, "4 episodes", "would be lost")
    later = ckpts / "meta-learner-4.pth.tar"
    os.utime(ckpts / BEST, (0, 0))
    before = metrics(own)
    (ckpts / LAST).unlink()
    line = refused(train(master, own, "--resume", "auto"), "holds a run already", "--resume")
    assert f"--resume {later}," in line
    refused(train(master, own, "--resume", earlier), earlier, "would be lost")
    assert metrics(own) == before
    succeeded(train(master, own, "--resume", later))
    exported = own.with_name("exported-719")
    exported.mkdir()
    shutil.copy(earlier, exported / "meta-learner.pth.tar")
    line = refused(train(master, own.with_name("exported"), "--resume", "auto"), "holds a run")
    assert "continue" not in line  # an exported run cannot


def test_another_folder_begins_new_logs(master, trained, tmp_path):
    """And may take other settings, but not those that shape the start."""
    second = f"{trained}-719/ckpts/meta-learner-2.pth.tar"
    succeeded(train(master, tmp_path / "a", "--resume", second))
    assert metrics(tmp_path / "a", "train") == metrics(trained, "train")[2:]
    assert_same(tensors(tmp_path / "a")["metalearner"], tensors(trained)["metalearner"])
    start = ("--resume", second, "--lr", "0.0001")
    refused(train(master, trained, *start), second, "would be lost")
    refused(train(master, tmp_path / "b", *start, "--bi-init", "0", "0"), "--bi-init 0.0 0.0")
    assert not (tmp_path / "b-719").exists()
    succeeded(train(master, tmp_path / "b", *start))
    found = tensors(tmp_path / "b")
    assert found["hyper_parameters"]["lr"] == found["optim"]["param_groups"][0]["lr"] == 0.0001
    origin = {"checkpoint": "logs-719/meta-learner-2.pth.tar", "episode": 2}
    assert (found["about"]["resumed_from"], found["about"]["changed"]) == (origin, {"lr": 0.0001})
    assert found["best"]["episode"] == 4
    succeeded(train(master, tmp_path / "b", "--resume", "auto", episode=6))
    assert tensors(tmp_path / "b")["about"] == found["about"]


def test_a_training_starts_from_another_ones_meta_learner(master, trained, tmp_path):
    save, gone = tmp_path / "logs", tmp_path / "gone"
    start = ("--init-from", f"{trained}-719", "--grad-divisor", "3")
    refused(train(master, save, "--init-from", gone), "--init-from", gone)
    refused(train(master, save, *start, "--hidden-size", "5"), trained, "--hidden-size")
    assert not Path(f"{save}-719").exists()
    succeeded(train(master, save, *start, "--lr", "1e-12"))
    before, after = tensors(trained, "meta-learner-best.pth.tar"), tensors(save)
    for name, value in before["metalearner"].items():
        assert torch.allclose(value, after["metalearner"][name], rtol=0, atol=1e-10)
    origin = {"checkpoint": "logs-719/meta-learner-best.pth.tar", "episode": before["episode"]}
    assert after["about"]["started_from"] == origin
    assert after["hyper_parameters"]["grad_divisor"] == 3
    assert len(metrics(save, "train")) == after["episode"] == 4
    # a run that continues needs its start no more
    succeeded(train(master, save, "--init-from", gone, "--resume", "auto", episode=6))
    assert tensors(save)["about"] == after["about"]
    again = ("--resume", "auto", "--init-from")
    assert "note" not in succeeded(train(master, save, *again, f"{trained}-719", episode=6))
    other = shutil.copytree(f"{trained}-719", tmp_path / "other-719")
    printed = succeeded(train(master, save, *again, other, episode=6))
    assert f"{other}/ckpts/{BEST} has no effect: the run started from logs-719/{BEST}" in printed
    succeeded(train(master, tmp_path / "fork", "--resume", f"{save}-719", episode=8))
    fork = tensors(tmp_path / "fork")["about"]
    assert (fork["started_from"], fork["resumed_from"]["episode"]) == (origin, 6)


# ---- Checkpoints ----


def test_a_cut_log_is_refused(master, own):
    log = Path(f"{own}-719", "metrics.jsonl")
    log.write_text("")
    refused(train(master, own, "--resume", "auto", episode=6), log)
    assert log.read_text() == ""


def test_a_checkpoint_of_the_port_can_be_trained_on(master, own, tmp_path):
    content = {k: tensors(own)[k] for k in ("episode", "metalearner", "optim")}
    for group in content["optim"]["param_groups"]:
        group["fused"] = None
    torch.save(content, tmp_path / "old.pth.tar")
    succeeded(train(master, tmp_path / "b", "--resume", tmp_path / "old.pth.tar", episode=6))
    succeeded(train(master, own, "--resume", "auto", episode=6))
    assert_same(tensors(own)["metalearner"], tensors(tmp_path / "b")["metalearner"])


# ---- Numbers that are not finite ----


def poison(monkeypatch, at):
    """Make the query images of the training episodes with these numbers not finite."""
    original, calls = models.meta_gradient, itertools.count(1)

    def meta_gradient(episode, *args):
        return original(poisoned(episode) if next(calls) in at else episode, *args)

    monkeypatch.setattr(models, "meta_gradient", meta_gradient)


def test_they_never_enter_the_weights(master, tmp_path, monkeypatch):
    poison(monkeypatch, {2})
    succeeded(train(master, tmp_path / "logs", val_freq=1, episode=3))
    one, two, three = (tensors(tmp_path / "logs", f"meta-learner-{k}.pth.tar") for k in (1, 2, 3))
    assert_same(one["metalearner"], two["metalearner"])
    assert_same(one["optim"], two["optim"])
    assert not torch.equal(two["metalearner"]["metalstm.WF"], three["metalearner"]["metalstm.WF"])
    assert [m["skipped"] for m in metrics(tmp_path / "logs", "train")] == [0, 1, 0]


def test_a_row_of_them_stops_training(master, tmp_path, monkeypatch):
    poison(monkeypatch, range(4, 100))
    done = train(master, tmp_path / "logs", "--log-freq", "5", episode=40)
    refused(done, "22 updates", "meta-learner-best.pth.tar", "--lr")
    assert metrics(tmp_path / "logs", "train")[-1]["episode"] == 25
    assert all(torch.isfinite(v).all() for v in tensors(tmp_path / "logs")["metalearner"].values())
