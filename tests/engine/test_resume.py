"""Whatever happens to a run, it goes on to the bits that it would have reached."""

import fcntl
import multiprocessing
import os
import pty
import random
import re
import resource
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_cli import SMALL, expect, metrics, tensors, train

import main
import utils
from around import run as running
from engine import checkpoint as checkpoints
from engine import evaluation, logs
from engine.backend import choose
from engine.flags import parse
from fast import images

EPISODES = 60
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def child(data, save, flags, prepare):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background may ignore
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    prepare()
    code = train(
        data, save, "--resume", "auto", "--save-minutes", "0", *flags, episode=EPISODES, val_freq=20
    )
    os._exit(code)


def start(data, save, *flags, prepare=lambda: None):
    process = multiprocessing.get_context("fork").Process(
        target=child, args=(data, save, flags, prepare)
    )
    process.start()
    return process


def finish(data, save):
    process = start(data, save)
    process.join(600)
    assert process.exitcode == 0


def command_line(data, save, *flags):
    """What ``start`` runs in a process of its own, as people type it."""
    run = [
        "--mode",
        "train",
        "--data-root",
        str(data),
        "--save",
        str(save),
        "--resume",
        "auto",
        "--episode",
        str(EPISODES),
    ]
    return [
        sys.executable,
        str(ROOT / "main.py"),
        *run,
        "--val-freq",
        "20",
        "--episode-val",
        "2",
        *SMALL,
        *flags,
    ]


def console(save):
    """Lines of console.log without what depends on the clock or on folders' names."""
    text = Path(f"{save}-719", "console.log").read_text()
    return re.sub(
        r"^\S+ \S+ |\d+\.\d+ episodes/s.*|\S+(?=: 6 classes to train on)",
        "",
        text,
        flags=re.MULTILINE,
    ).splitlines()


def outcome(data, save, capsys):
    argv = [
        "--mode",
        "test",
        "--data-root",
        str(data),
        "--save",
        str(save),
        "--episode-test",
        "5",
        "--cpu",
        "--n-workers",
        "0",
    ]
    assert main.run(argv) == 0
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("test, ")]


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a.keys() - {
            "about",
            "data_root",
            "logs_end_at",
        }:  # the command, a copy's place, and log lines hold rates
            assert_same(a[k], b[k])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.fixture(scope="module")
def undisturbed(master, tmp_path_factory):
    save = tmp_path_factory.mktemp("undisturbed") / "logs"
    finish(master, save)
    return save


def assert_as_undisturbed(data, save, undisturbed, capsys):
    for name in ("last", "best", "20", "60"):
        assert_same(
            tensors(save, f"meta-learner-{name}.pth.tar"),
            tensors(undisturbed, f"meta-learner-{name}.pth.tar"),
        )
    assert metrics(save) == metrics(undisturbed)
    assert console(save) == console(undisturbed)
    assert outcome(data, save, capsys) == outcome(data, undisturbed, capsys)
    for place in (Path(f"{save}-719", "ckpts"), Path(data, images.FOLDER)):
        assert not list(place.glob(".*.tmp"))  # what killed writes left is gone


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_random_instants(data, tmp_path, undisturbed, capsys, number):
    """20 times each: while starting, decoding, training, validating and saving, wherever it happens
    to be.
    """
    rng = random.Random(int(number))
    kills = 0
    while kills < 20:
        process = start(data, tmp_path / "logs")
        process.join(rng.uniform(0.01, 0.25))
        if process.exitcode is None:
            os.kill(process.pid, number)
            process.join(600)
            kills += 1
        assert process.exitcode in (0, -number, 128 + number)
        if (
            process.exitcode == 0
        ):  # finished before it could be killed twenty times: go on killing it in a new place
            assert_as_undisturbed(data, tmp_path / "logs", undisturbed, capsys)
            for path in sorted(tmp_path.rglob("*"), reverse=True):
                if path.is_relative_to(tmp_path / "logs-719"):
                    path.unlink() if path.is_file() else path.rmdir()
    finish(data, tmp_path / "logs")
    assert_as_undisturbed(data, tmp_path / "logs", undisturbed, capsys)


def test_killed_while_worker_processes_are_alive(data, tmp_path, undisturbed, capsys):
    """They outlive it by some seconds and must not keep it from being started again at once."""
    command = command_line(data, tmp_path / "logs", "--save-minutes", "0", "--n-workers", "2")
    for line in (5, 30):  # of the log: then it is killed
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD
        ) as process:
            for text in process.stdout:
                if text.startswith(f"[{line}/") or text.startswith(f"[ {line}/"):
                    workers = (
                        Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                    )
                    process.kill()
                    break  # the workers keep the pipe open
        assert process.returncode == -signal.SIGKILL
        assert len(workers) == 2
    assert subprocess.run(command, capture_output=True, env=ONE_THREAD).returncode == 0
    assert_as_undisturbed(data, tmp_path / "logs", undisturbed, capsys)
    deadline = time.monotonic() + 300
    while any(Path("/proc", pid).exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path("/proc", pid).exists() for pid in workers)


def test_whoever_reads_the_output_may_go(data, tmp_path, undisturbed, capsys):
    """``| head -n 3``: it ends at once, with its workers and no traceback, and can be gone on with."""
    command = command_line(data, tmp_path / "logs", "--save-minutes", "0", "--n-workers", "2")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD
    ) as process:
        for _ in range(3):
            process.stdout.readline()
        process.stdout.close()
        assert process.wait(600) == 128 + signal.SIGPIPE
        assert "Traceback" not in process.stderr.read()
    assert subprocess.run(command, capture_output=True, env=ONE_THREAD).returncode == 0
    assert_as_undisturbed(data, tmp_path / "logs", undisturbed, capsys)


def die_at(module, name, call):
    """Replace a function by one that kills the process at its nth call, before it has done its
    work.
    """
    original, count = getattr(module, name), [0]

    def deadly(*args, **kwargs):
        count[0] += 1
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(module, name, deadly)


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (utils.os, "replace", 1),
        (utils.os, "replace", 7),
        (utils.os, "fsync", 8),
        (checkpoints.torch, "save", 5),
        (logs, "_append", 9),
        (images.np, "savez", 1),
        (images, "_decode", 30),
        (images.Path, "rename", 2),
        (evaluation, "evaluate_episode", 3),
        (running, "summary", 2),  # of the first line of the log
        (running, "summary", 41),  # of the first validation
    ],
)
def test_killed_at_the_worst_instants(data, tmp_path, undisturbed, capsys, module, name, call):
    process = start(data, tmp_path / "logs", prepare=lambda: die_at(module, name, call))
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    finish(data, tmp_path / "logs")
    assert_as_undisturbed(data, tmp_path / "logs", undisturbed, capsys)


def test_signal_saves_and_says_how_to_go_on(data, tmp_path, capfd, undisturbed):
    save = tmp_path / "logs"
    original = main.train_episode

    def interrupted(*args):
        if threading.current_thread() is threading.main_thread():
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    process = start(
        data,
        save,
        "--save-minutes",
        "60",
        prepare=lambda: setattr(main, "train_episode", interrupted),
    )
    process.join(600)
    assert process.exitcode == 128 + signal.SIGINT
    err = capfd.readouterr().err
    assert "stopped by SIGINT after episode 1; continue with --resume auto" in err
    assert "Traceback" not in err
    assert tensors(save)["episode"] == 1


def test_a_terminal_that_goes_away_costs_no_episode(data, tmp_path, undisturbed, capsys):
    """As when a laptop is closed on an ssh session; under nohup it is none of the training's
    business.
    """
    command = command_line(data, tmp_path / "logs")
    for handler, code in ((signal.SIG_DFL, 128 + signal.SIGHUP), (signal.SIG_IGN, 0)):
        ours, its = pty.openpty()

        def own_terminal(its=its, handler=handler):
            os.setsid()
            fcntl.ioctl(its, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGHUP, handler)

        process = subprocess.Popen(
            command, stdin=its, stdout=its, stderr=its, env=ONE_THREAD, preexec_fn=own_terminal
        )
        os.close(its)
        seen = b""
        while b"/60] loss" not in seen:
            seen += os.read(ours, 1000)
        os.close(ours)
        assert process.wait(600) == code
        assert (
            0
            < tensors(tmp_path / "logs")["episode"]
            == metrics(tmp_path / "logs", "train")[-1]["episode"]
        )
    assert_as_undisturbed(data, tmp_path / "logs", undisturbed, capsys)


def test_sigusr1_saves_and_goes_on(data, tmp_path):
    save, original = tmp_path / "logs", main.train_episode

    def asked(*args):
        os.kill(os.getpid(), signal.SIGUSR1)
        main.train_episode = doomed
        return original(*args)

    def doomed(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    process = start(
        data, save, "--save-minutes", "60", prepare=lambda: setattr(main, "train_episode", asked)
    )
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    assert tensors(save)["episode"] == 1


def test_one_process_a_folder(data, tmp_path, capsys):
    with running.Run({"save": str(tmp_path / "logs")}, parse([])[1]):
        expect(
            capsys, train(data, tmp_path / "logs"), "logs-719: in use by process", str(os.getpid())
        )
        assert (
            tmp_path / "logs-719" / "lock"
        ).exists()  # the one that was refused takes nothing away
    (tmp_path / "logs-719").mkdir()
    (tmp_path / "logs-719" / "lock").write_text(
        "process 1 on elsewhere since 1970"
    )  # stale: nobody holds it
    assert train(data, tmp_path / "logs") == 0


def test_a_folder_is_not_silently_continued(data, tmp_path, capsys):
    save = tmp_path / "logs"
    assert train(data, save) == 0
    before = metrics(save)
    expect(capsys, train(data, save), "holds a run already", "continue it with --resume auto")
    expect(
        capsys,
        train(data, save, "--resume", "auto", "--lr", "0.01", episode=6),
        "--lr 0.01",
        "begun with --lr 0.001",
    )
    expect(
        capsys,
        train(data, save, "--resume", "auto", "--n-shot", "2", episode=6),
        "--n-shot 2",
        "begun with --n-shot 1",
    )
    (data / "train" / "class 0" / "0.jpg").rename(data / "train" / "class 0" / "9.jpg")
    expect(capsys, train(data, save, "--resume", "auto", episode=6), "train: other images")
    assert metrics(save) == before
    (data / "train" / "class 0" / "9.jpg").rename(data / "train" / "class 0" / "0.jpg")
    assert train(data, save, "--resume", "auto") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert train(data, save, "--resume", "auto", episode=6) == 0
    assert metrics(save)[: len(before)] == before
    assert [m["episode"] for m in metrics(save, "train")] == [1, 2, 3, 4, 5, 6]
    expect(capsys, train(data, save, "--resume", "auto", episode=3), "--episode 3", "has seen 6")


def test_a_cut_log_is_not_silently_continued(data, tmp_path, capsys):
    assert train(data, tmp_path / "logs") == 0
    (tmp_path / "logs-719" / "metrics.jsonl").write_text("")
    expect(
        capsys,
        train(data, tmp_path / "logs", "--resume", "auto", episode=6),
        "metrics.jsonl: 0 bytes",
    )


def test_resuming_elsewhere_begins_new_logs(data, tmp_path):
    assert train(data, tmp_path / "a") == 0
    assert (
        train(
            data, tmp_path / "b", "--resume", str(tmp_path / "a-719/ckpts/meta-learner-2.pth.tar")
        )
        == 0
    )
    assert metrics(tmp_path / "b", "train") == metrics(tmp_path / "a", "train")[2:]
    assert_same(tensors(tmp_path / "a")["metalearner"], tensors(tmp_path / "b")["metalearner"])


def test_another_folder_may_take_other_training_settings(data, tmp_path, capsys):
    assert train(data, tmp_path / "a") == 0
    start = ("--resume", str(tmp_path / "a-719/ckpts/meta-learner-2.pth.tar"))
    expect(
        capsys,
        train(data, tmp_path / "a", *start, "--lr", "0.0001"),
        "--lr 0.0001",
        "another --save and --resume",
    )
    expect(
        capsys,
        train(data, tmp_path / "b", *start, "--bi-init", "0", "0"),
        "--bi-init [0.0, 0.0]",
        "begun with",
    )
    assert not (tmp_path / "b-719").exists()
    assert train(data, tmp_path / "b", *start, "--lr", "0.0001") == 0
    found = tensors(tmp_path / "b")
    assert found["hyper_parameters"]["lr"] == 0.0001
    assert found["optim"]["param_groups"][0]["lr"] == 0.0001
    assert found["about"]["resumed_from"] == {
        "checkpoint": "a-719/meta-learner-2.pth.tar",
        "episode": 2,
    }
    assert found["about"]["changed"] == {"lr": 0.0001}
    assert found["best"]["episode"] == 4
    assert (tmp_path / "b-719/ckpts/meta-learner-best.pth.tar").is_file()
    assert train(data, tmp_path / "b", "--resume", "auto", episode=6) == 0
    assert tensors(tmp_path / "b")["about"] == found["about"]


def test_a_training_that_begins_with_another_ones_meta_learner(data, tmp_path, capsys):
    assert train(data, tmp_path / "a") == 0
    flags, run = ("--start", str(tmp_path / "a-719"), "--grad-divisor", "3"), tmp_path / "b-719"
    expect(
        capsys,
        train(data, tmp_path / "b", "--start", str(tmp_path / "gone")),
        "--start",
        "neither",
        "gone nor",
        "gone-719",
    )
    expect(
        capsys, train(data, tmp_path / "b", *flags, "--hidden-size", "5"), "a-719", "--hidden-size"
    )
    assert not run.exists()
    assert train(data, tmp_path / "b", *flags, "--lr", "1e-12", "--lr-decay", "1") == 0
    before, after = tensors(tmp_path / "a", "meta-learner-best.pth.tar"), tensors(tmp_path / "b")
    for name, value in before["metalearner"].items():
        assert torch.allclose(value, after["metalearner"][name], rtol=0, atol=1e-10)
    assert after["about"]["started_from"] == {
        "checkpoint": "a-719/meta-learner-best.pth.tar",
        "episode": before["episode"],
    }
    assert after["hyper_parameters"]["grad_divisor"] == 3
    assert len(metrics(tmp_path / "b", "train")) == after["episode"] == 4
    # a run that continues needs its start no more
    flags = ("--start", str(tmp_path / "gone"), "--resume", "auto")
    assert train(data, tmp_path / "b", *flags, episode=6) == 0
    assert tensors(tmp_path / "b")["about"] == after["about"]


def test_checkpoint_of_the_older_port_can_be_trained_on(data, tmp_path):
    assert train(data, tmp_path / "a") == 0
    content = {k: tensors(tmp_path / "a")[k] for k in ("episode", "metalearner", "optim")}
    for group in content["optim"]["param_groups"]:
        group["fused"] = None
    torch.save(content, tmp_path / "old.pth.tar")
    assert train(data, tmp_path / "b", "--resume", str(tmp_path / "old.pth.tar"), episode=6) == 0
    assert train(data, tmp_path / "a", "--resume", "auto", episode=6) == 0
    assert_same(tensors(tmp_path / "a")["metalearner"], tensors(tmp_path / "b")["metalearner"])


@pytest.mark.parametrize("optim", [{}, [], {"state": {}, "param_groups": []}, None])
def test_foreign_optimiser_states(data, tmp_path, capsys, optim):
    assert train(data, tmp_path / "a") == 0
    content = tensors(tmp_path / "a") | {"optim": optim}
    torch.save(content, tmp_path / "x.pth.tar")
    code = train(data, tmp_path / "b", "--resume", str(tmp_path / "x.pth.tar"), episode=6)
    expect(capsys, code, "x.pth.tar", "optimiser's state does not fit")


def poisoned(at):
    """train_episode whose query images are not finite in the given calls."""
    original, count = main.train_episode, [0]

    def train_episode(episode, *args):
        count[0] += 1
        if count[0] in at:
            episode = episode._replace(query=episode.query * float("nan"))
        return original(episode, *args)

    return train_episode


def test_numbers_that_are_not_finite_never_enter_the_weights(data, tmp_path, monkeypatch):
    monkeypatch.setattr(main, "train_episode", poisoned({2}))
    assert train(data, tmp_path / "logs", val_freq=1, episode=3) == 0
    one, two, three = (tensors(tmp_path / "logs", f"meta-learner-{k}.pth.tar") for k in (1, 2, 3))
    assert_same(one["metalearner"], two["metalearner"])
    assert_same(one["optim"], two["optim"])
    assert not torch.equal(two["metalearner"]["metalstm.WF"], three["metalearner"]["metalstm.WF"])
    assert [m["skipped"] for m in metrics(tmp_path / "logs", "train")] == [0, 1, 0]


def test_a_run_of_them_stops_training(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main, "train_episode", poisoned(range(4, 100)))
    code = train(data, tmp_path / "logs", "--log-freq", "5", episode=40)
    expect(capsys, code, "22 updates in a row", "meta-learner-best.pth.tar")
    assert metrics(tmp_path / "logs", "train")[-1]["episode"] == 25
    assert all(torch.isfinite(v).all() for v in tensors(tmp_path / "logs")["metalearner"].values())


def limited(size):
    """A disk with room for files of this many bytes only."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    ("size", "culprit"),
    [
        (5_000, "decoded images cannot be kept"),
        (200_000, "meta-learner-last.pth.tar"),
        (3_000, "metrics.jsonl"),
    ],
)
def test_disk_full(data, tmp_path, undisturbed, capfd, size, culprit):
    """In a cache build, a checkpoint and a metrics line: one line, and the run goes on once there
    is room.
    """
    save = tmp_path / "logs"
    if size != 5_000:
        cache_dir = data / images.FOLDER
        finish(data, tmp_path / "other")
        assert cache_dir.is_dir()

    def prepare():
        if size == 3_000:  # for this file alone: the captured console is a file, too
            original = logs._append

            def append(file, text):
                if file.name.endswith("metrics.jsonl"):
                    limited(size)
                original(file, text)
                limited(resource.RLIM_INFINITY)

            logs._append = append
        else:
            limited(size)

    capfd.readouterr()
    process = start(data, save, prepare=prepare)
    process.join(600)
    captured = capfd.readouterr()
    assert process.exitcode == 2
    assert captured.err.count("error: ") == 1
    assert culprit in captured.err
    assert "Traceback" not in captured.err
    finish(data, save)
    assert_as_undisturbed(data, save, undisturbed, capfd)


def test_snapshots_cost_little(data, tmp_path):
    """Under 1 % of training at the default of one in five minutes."""
    given = {"data_root": str(data), "save": str(tmp_path / "logs"), "n_shot": 1, "n_eval": 2}
    with running.Run(given, parse([])[1]) as run:
        way = choose(run.args)
        _, metalearner = main.build(run.args, way)
        learned = [p for p in metalearner.parameters() if p.requires_grad]
        optimizer = way.adam(learned, lr=run.args.lr)
        for p in learned:
            p.grad = torch.ones_like(p)
        optimizer.step()  # its moments are part of a snapshot
        some = SimpleNamespace(fingerprint="0", split=SimpleNamespace(classes=["a"]))
        run.restore(metalearner, optimizer, some, some, way.device)
        run.snapshot(0, running.LAST)
        begin = time.perf_counter()
        for _ in range(5):
            run.snapshot(0, running.LAST)
        assert (time.perf_counter() - begin) / 5 < 0.01 * 60 * run.args.save_minutes
