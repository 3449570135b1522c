"""Several processes. `together` forks them, so that each one's exit code and words can be seen;
`torchrun` is real.
"""

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
from conftest import ROOT
from test_cli import SMALL, do_test, metrics, tensors
from test_resume import assert_same, console
from torch.distributed import TCPStore

import main
from around import lanes, ranks, way
from engine.flags import parse, settle
from fast import images
from utils import UserError

M6 = ("--meta-batch", "6", "--log-freq", "6", "--save-minutes", "0", "--resume", "auto")
EPISODES = 120  # 20 updates


def child(rank, size, port, served, place, argv, prepare):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": str(served)}
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(place / f"{name}{rank}", os.O_CREAT | os.O_WRONLY), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    faulthandler.dump_traceback_later(300, exit=True)  # says where it hangs
    prepare(rank)
    try:
        code = main.run(argv)
    except SystemExit as e:
        code = e.code
    sys.stderr.flush()
    os._exit(code)


def together(place, size, argv, prepare=lambda rank: None, port=None, present=None):
    """Start ranks with ``argv(rank)`` each; their exit codes, and all that they wrote to stderr.

    This process serves the store, as torchrun does, unless rank 0 is to do it on a given port.
    """
    place.mkdir(exist_ok=True)
    how, listener = (
        multiprocessing.get_context("fork"),
        None if port else socket.create_server(("127.0.0.1", 0)),
    )
    served, there, port = (
        port is None,
        present or range(size),
        port or str(listener.getsockname()[1]),
    )
    processes = [
        how.Process(target=child, args=(r, size, port, served, place, argv(r), prepare))
        for r in there
    ]
    for process in processes:
        process.start()
    if served:  # only now: a fork while the store's thread holds a lock would copy the lock, but not the thread
        how = {"wait_for_workers": False, "master_listen_fd": listener.detach()}
        store = TCPStore("127.0.0.1", int(port), is_master=True, **how)  # noqa: F841 - serves as long as it lives
    for process in processes:
        process.join(600)
        if process.exitcode is None:
            process.kill()
    return [process.exitcode for process in processes], "".join(
        (place / f"err{r}").read_text() for r in there
    )


def training(data, save, *flags, episode=EPISODES, val_freq=60):
    run = [
        "--mode",
        "train",
        "--data-root",
        str(data),
        "--save",
        str(save),
        "--episode",
        str(episode),
    ]
    return [*run, "--val-freq", str(val_freq), "--episode-val", "5", *SMALL, *flags]


SLOW = ("--monitor-interval", "5")  # a rank that loses another one speaks before torchrun ends it


def torchrun(n, argv, *flags):
    """The command; each rank has one thread."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(n),
        *flags,
    ]
    return [*launcher, str(ROOT / "main.py"), *argv]


def completed(command):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env=environment
    )


@pytest.fixture(scope="module")
def alone(master, tmp_path_factory):
    """The run that all others must equal: one process."""
    save = tmp_path_factory.mktemp("alone") / "logs"
    assert main.run(training(master, save, *M6)) == 0
    assert do_test(master, save, "--episode-test", "4", "7") == 0
    return save


def assert_as_alone(save, alone):
    for name in ("last", "best", "60", "120"):
        assert_same(
            tensors(save, f"meta-learner-{name}.pth.tar"),
            tensors(alone, f"meta-learner-{name}.pth.tar"),
        )
    assert metrics(save) == metrics(alone)
    assert console(save) == console(alone)


def after_a_test(save):
    tests = json.loads(Path(f"{save}-719", "results.json").read_text())["tests"]
    return [{k: v for k, v in test.items() if k != "about"} for test in tests]


# ---- The same numbers ----


def test_two_and_three_ranks_give_the_bits_of_one(master, alone, tmp_path):
    """Training, validation and logs; the second half resumed under another number of ranks; and the
    test.
    """
    save = tmp_path / "logs"
    for n, episode in ((2, 60), (3, EPISODES)):
        done = completed(torchrun(n, training(master, save, *M6, episode=episode)))
        assert done.returncode == 0, done.stderr
        assert "error" not in done.stderr
        assert done.stdout.count("device: ") == 1
    assert len(metrics(save, "train")) == 20
    assert metrics(save) == metrics(alone)
    assert_same(tensors(save), tensors(alone))
    test = [
        "--mode",
        "test",
        "--data-root",
        str(master),
        "--save",
        str(save),
        "--episode-test",
        "4",
        "7",
        "--cpu",
    ]
    done = completed(torchrun(3, [*test, "--n-workers", "0"]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test, 7 episodes") == 1
    assert after_a_test(save) == after_a_test(alone)
    assert (
        json.loads(Path(f"{save}-719", "results.json").read_text())["tests"][0]["about"][
            "processes"
        ]
        == 3
    )


def test_fewer_episodes_than_ranks(master, alone, tmp_path):
    """In a validation and in a test: some have nothing to do."""
    for n, save in ((1, tmp_path / "one"), (3, tmp_path / "three")):
        argv = training(master, save, *M6, "--episode-val", "2", episode=6, val_freq=6)
        assert together(tmp_path / f"{n}", n, lambda rank, argv=argv: argv)[0] == [0] * n
    assert metrics(tmp_path / "three") == metrics(tmp_path / "one")


def test_plain_ranks_agree_too(master, tmp_path):
    pytest.importorskip("torchvision.transforms.functional")  # loaded before the forks, as the rest
    for n in (1, 2):
        argv = training(
            master, tmp_path / f"run{n}", "--meta-batch", "2", "--plain", episode=4, val_freq=4
        )
        assert together(tmp_path / f"{n}", n, lambda rank, argv=argv: argv)[0] == [0] * n
    assert metrics(tmp_path / "run2") == metrics(tmp_path / "run1")


def test_one_process_needs_no_network():
    alone = ranks.Ranks.started()
    assert (alone.rank, alone.size, alone.local) == (0, 1, (0, 1))
    rows = torch.zeros(2, 3)
    assert alone.gather(rows) is rows
    assert alone.exchange(7) == [7]
    assert alone.largest(3, 0) == [3, 0]
    alone.begin({})
    assert vars(alone).keys() == {"rank", "size", "local", "_begun"}  # no store, no process group


# ---- Ends ----


def begun(command, save, line):
    """Start torchrun and wait until the run's log holds a line; the launcher and the ranks' process
    ids in their order.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = Path(f"{save}-719", "metrics.jsonl")
    launcher = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 600
    while not (log.exists() and log.read_text().count("\n") >= line):
        assert launcher.poll() is None, launcher.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return launcher, workers(launcher)


def workers(launcher):
    """Process ids by rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    environments = {}
    for pid in children:
        with contextlib.suppress(OSError):  # it has ended
            environments[int(pid)] = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    found = {
        int(v[5:]): pid
        for pid, values in environments.items()
        for v in values
        if v.startswith(b"RANK=")
    }
    return [found[rank] for rank in sorted(found)]


def test_a_rank_that_dies_takes_the_others_down(master, alone, tmp_path):
    save = tmp_path / "logs"
    launcher, pids = begun(
        torchrun(2, training(master, save, *M6), *SLOW), save, 4
    )  # so the snapshot of 18 is there
    os.kill(pids[1], signal.SIGKILL)
    killed = time.monotonic()
    _, err = launcher.communicate(timeout=600)
    assert time.monotonic() - killed < 25  # torchrun itself would have killed the others after 30 s
    assert launcher.returncode != 0
    assert not any(Path("/proc", str(pid)).exists() for pid in pids)
    assert len(re.findall("^error: ", err, re.MULTILINE)) == 1
    assert "error: rank 0: another rank has ended" in err
    assert 18 <= tensors(save)["episode"] < EPISODES
    assert main.run(training(master, save, *M6)) == 0
    assert_as_alone(save, alone)


def test_torchrun_starts_them_again(master, alone, tmp_path):
    save = tmp_path / "logs"
    launcher, pids = begun(torchrun(2, training(master, save, *M6), "--max-restarts", "1"), save, 3)
    os.kill(pids[0], signal.SIGKILL)
    out, err = launcher.communicate(timeout=600)
    assert launcher.returncode == 0, err
    assert "resuming after episode" in out
    assert_as_alone(save, alone)


def test_a_second_start_reads_nothing_of_the_first(master, tmp_path):
    """Neither addresses nor who ended first: torchrun keeps one store for all starts."""
    save = tmp_path / "logs"
    run = training(master, save, *M6, episode=60000, val_freq=0)
    launcher, first = begun(torchrun(2, run, "--max-restarts", "1", *SLOW), save, 3)
    os.kill(first[1], signal.SIGKILL)  # so rank 0 speaks
    log = Path(f"{save}-719", "metrics.jsonl")
    while len(second := workers(launcher)) < 2 or set(first) & set(second):
        assert launcher.poll() is None
        time.sleep(0.1)
    n = log.read_text().count("\n")
    while log.read_text().count("\n") < n + 3:
        assert launcher.poll() is None
        time.sleep(0.1)
    os.kill(second[0], signal.SIGKILL)  # so rank 1 does
    _, err = launcher.communicate(timeout=600)
    assert re.findall("^error: rank (\\d): another rank has ended", err, re.MULTILINE) == ["0", "1"]


HOW_MACHINES_MEET = {
    "by number": [
        "--node-rank",
        "{k}",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        "{port}",
    ],  # as in README.md
    "by themselves": [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:{port}",
        "--local-addr",
        "127.0.0.1",
    ],
}


@pytest.mark.parametrize("how", HOW_MACHINES_MEET)
def test_torchrun_starts_them_again_on_two_machines(master, alone, tmp_path, how):
    """Each has a launcher of its own, which counts starts by itself; a rank of one dies, and then
    one of the other.
    """
    save, log = tmp_path / "logs", tmp_path / "logs-719" / "metrics.jsonl"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = [[flag.format(k=k, port=port) for flag in HOW_MACHINES_MEET[how]] for k in range(2)]
    run = training(master, save, *M6)
    commands = [
        torchrun(1, run, "--nnodes", "2", "--max-restarts", "4", *flags[k]) for k in range(2)
    ]
    commands = [[word for word in command if word != "--standalone"] for command in commands]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "words").open("w") as words:
        launchers = [
            subprocess.Popen(command, stdout=words, stderr=words, env=environment)
            for command in commands
        ]
        try:
            for lines, of in ((3, 0), (8, 1)):
                while not (log.exists() and log.read_text().count("\n") >= lines):
                    assert [launcher.poll() for launcher in launchers] == [None, None], (
                        tmp_path / "words"
                    ).read_text()
                    time.sleep(0.01)
                os.kill(workers(launchers[of])[0], signal.SIGKILL)
            assert [launcher.wait(300) for launcher in launchers] == [0, 0], (
                tmp_path / "words"
            ).read_text()
        finally:
            for launcher in launchers:
                launcher.terminate()  # and its rank
    assert (tmp_path / "words").read_text().count("resuming after episode") == 2
    assert_as_alone(save, alone)


def test_the_launchers_signal_stops_all_at_the_same_update(master, alone, tmp_path):
    save = tmp_path / "logs"
    launcher, _ = begun(torchrun(3, training(master, save, *M6)), save, 3)
    launcher.terminate()
    _, err = launcher.communicate(timeout=600)
    assert launcher.returncode != 0
    (n,) = re.findall(
        "^stopped by SIGTERM after episode (\\d+); continue with --resume auto", err, re.MULTILINE
    )
    assert "error: " not in err
    assert tensors(save)["episode"] == int(n) == metrics(save, "train")[-1]["episode"]
    assert main.run(training(master, save, *M6)) == 0
    assert_as_alone(save, alone)


def signalled(number, at_call, of_rank):
    """For ``prepare``: one rank sends itself a signal while it works on one of its episodes."""

    def prepare(rank):
        original, calls = lanes.meta_gradient, []

        def meta_gradient(*args):
            calls.append(0)
            if rank == of_rank and len(calls) == at_call:
                os.kill(os.getpid(), number)
            return original(*args)

        lanes.meta_gradient = meta_gradient

    return prepare


def test_a_signal_to_one_rank_is_heeded_by_all(master, tmp_path):
    argv = training(master, tmp_path / "logs", *M6, "--save-minutes", "60", val_freq=0)
    codes, err = together(
        tmp_path / "a", 3, lambda rank: argv, signalled(signal.SIGTERM, 5, 2)
    )  # in the third update
    assert codes == [143] * 3
    assert err.count("\n") == 1
    assert "stopped by SIGTERM after episode 18" in err
    assert tensors(tmp_path / "logs")["episode"] == 18

    def prepare(rank):
        signalled(signal.SIGUSR1, 3, 1)(rank)
        kept = main.Run.log
        main.Run.log = lambda run, n, *rest: (
            kept(run, n, *rest) if n < 42 else os.kill(os.getpid(), signal.SIGKILL)
        )

    assert together(tmp_path / "b", 3, lambda rank: argv, prepare)[0] == [-signal.SIGKILL] * 3
    assert tensors(tmp_path / "logs")["episode"] == 30  # the second update after 18


def test_a_run_of_updates_that_are_not_finite_ends_all(master, tmp_path):
    def prepare(rank):
        original = lanes.meta_gradient

        def meta_gradient(*args):
            gradient, loss, accuracy = original(*args)
            return gradient * (float("nan") if rank == 1 else 1), loss, accuracy

        lanes.meta_gradient = meta_gradient

    codes, err = together(
        tmp_path / "a",
        2,
        lambda rank: training(master, tmp_path / "logs", "--meta-batch", "2", val_freq=0),
        prepare,
    )
    assert codes == [2, 2]
    assert err.count("\n") == 1
    assert "error: rank 0: 20 updates in a row" in err


def test_a_full_disk_of_rank_0_ends_all(master, tmp_path):
    def prepare(rank):
        def save(*_):
            raise UserError("x.pth.tar: cannot be written")

        main.checkpoints.save = save

    codes, err = together(
        tmp_path / "a", 2, lambda rank: training(master, tmp_path / "logs", *M6), prepare
    )
    assert codes == [2, 2]
    assert err == "error: rank 0: x.pth.tar: cannot be written\n"


def test_nobody_waits_longer_than_it_says(master, tmp_path):
    def argv(rank):
        return training(master, tmp_path / "logs", "--meta-batch", "2", val_freq=0)

    def prepare(rank):
        ranks.TIMEOUT = ranks.timedelta(seconds=6)
        original = lanes.meta_gradient
        lanes.meta_gradient = lambda *args: time.sleep(20 * rank) or original(*args)  # rank 1 hangs

    codes, err = together(tmp_path / "a", 2, argv, prepare)
    assert codes == [1, 1]
    assert err.count("\n") == 1
    assert "another rank has ended or does not answer" in err
    codes, err = together(tmp_path / "b", 2, argv, prepare, present=[0])  # rank 1 never comes
    assert codes == [2]
    assert "error: rank 0 of 2: cannot meet the others at 127.0.0.1" in err


# ---- Refusals ----


def other_flag(rank):
    return ["--lr", "0.002"] if rank == 1 else []


def other_version(rank):
    if rank == 2:
        torch.__version__ = "2.0.0"


def other_code(rank):
    if rank == 1:
        ranks._code = lambda: "other"


def other_device(rank):
    torch.set_num_threads(1 + (rank == 1))


REFUSALS = {
    "fewer episodes than ranks": (
        "--meta-batch 2",
        None,
        "error: --meta-batch 2: 3 processes cannot",
        "give --meta-batch 3",
    ),
    "the default": ("", None, "error: --meta-batch 1: 3 processes cannot", "give --meta-batch 3"),
    "not divisible": (
        "--meta-batch 8",
        None,
        "error: --meta-batch 8: 3 processes cannot",
        "give --meta-batch 9",
    ),
    "half an update": (
        "--meta-batch 6 --episode 9",
        None,
        "error: --episode 9: not a multiple of --meta-batch 6",
        "give 12",
    ),
    "all have a bad flag": ("--lr never", None, "error: --lr: is 'never'", ""),
    "all lack the data": (
        "--meta-batch 3 --data-root /nowhere",
        None,
        "error: --data-root /nowhere: no such folder",
        "",
    ),
    "PyTorch": ("", other_version, "error: version of PyTorch: ", "but 2.0.0 on rank 2"),
    "code": ("", other_code, "error: version of this repository: ", "but other on rank 1"),
    "threads": ("--meta-batch 3", other_device, "error: device: ", "2 threads"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(master, tmp_path, case):
    """One line, exit code 2 on every rank, and nothing is left behind."""
    flags, prepare, *words = REFUSALS[case]
    argv = training(master, tmp_path / "logs", *flags.split(), episode=12, val_freq=0)
    argv += ["--episode", "9"] if "--episode" in flags else []
    codes, err = together(tmp_path / "a", 3, lambda rank: argv, prepare or (lambda rank: None))
    assert codes == [2, 2, 2], err
    assert err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert not (tmp_path / "logs-719").exists()


OF_ONE = {
    "other flag": (["--lr", "0.002"], "error: --lr: the default on rank 0, but 0.002 on rank 1"),
    "bad flag": (["--lr", "never"], "error: rank 1: --lr: is 'never'"),
    "no data": (["--data-root", "/nowhere"], "error: rank 1: --data-root /nowhere: no such folder"),
    "other data": (["--data-root", "{other}"], "error: train images: "),
}


@pytest.mark.parametrize("case", OF_ONE)
@pytest.mark.parametrize("mode", ["train", "test"])
def test_refusals_for_the_sake_of_one(master, alone, data, tmp_path, case, mode):
    """Rank 1 of 2 has flags or data of its own."""
    flags, word = OF_ONE[case]
    for split in ("train", "test"):
        (next((data / split).iterdir()) / "0.jpg").rename(next((data / split).iterdir()) / "9.jpg")
    argv = training(master, tmp_path / "logs", "--meta-batch", "2")
    if mode == "test":
        argv = [
            "--mode",
            "test",
            "--data-root",
            str(master),
            "--save",
            str(alone),
            "--cpu",
            "--n-workers",
            "0",
        ]
    more = [flag.format(other=data) for flag in flags]
    codes, err = together(tmp_path / "a", 2, lambda rank: [*argv, *(more if rank == 1 else [])])
    assert codes == [2, 2], err
    assert err.count("\n") == 1, err
    assert word.replace("train images", f"{mode} images") in err
    assert not (tmp_path / "logs-719").exists()


def test_a_folder_in_use_is_refused_by_rank_0(master, tmp_path):
    with main.Run({"save": str(tmp_path / "logs")}, parse([])[1]):
        codes, err = together(
            tmp_path / "a", 2, lambda rank: training(master, tmp_path / "logs", "--meta-batch", "2")
        )
    assert codes == [2, 2]
    assert err.startswith("error: rank 0: ")
    assert "in use by process" in err
    assert err.count("\n") == 1


def test_other_modes_are_for_one_process(master, alone, tmp_path):
    codes, err = together(tmp_path / "a", 2, lambda rank: ["--mode", "plot", "--save", str(alone)])
    assert codes == [2, 2]
    assert err == "error: --mode plot: is for one process; start it without torchrun\n"


def test_a_port_in_use(master, tmp_path):
    argv = training(master, tmp_path / "logs", "--meta-batch", "2")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        codes, err = together(tmp_path / "a", 2, lambda rank: argv, port=port, present=[0])
    assert codes == [2]
    assert f"error: rank 0 of 2: cannot meet the others at 127.0.0.1:{port}" in err
    assert "choose another --master-port" in err


def test_refusals_through_torchrun(master, tmp_path):
    done = completed(torchrun(2, training(master, tmp_path / "logs", "--meta-batch", "3")))
    assert done.returncode != 0
    assert re.findall("^error: .*", done.stderr, re.MULTILINE) == [
        "error: --meta-batch 3: 2 processes cannot divide an update of 3 episodes evenly; give --meta-batch 4"
    ]
    assert re.findall(r"exitcode +: (\d+)", done.stderr) == ["2", "2"]


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({}, "4 processes here, but 2 GPUs; give torchrun --nproc-per-node 2"),
        ({"gpu": 0}, "--gpu 0: each of the 4 processes"),
    ],
)
def test_more_ranks_than_gpus(monkeypatch, given, word):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=word):
        way.choose(settle(given, parse([])[1]), (0, 4))


# ---- Data ----


def test_images_are_decoded_once_a_machine(data, tmp_path):
    """The others wait at the lock, however long it takes."""
    log = tmp_path / "built"

    def prepare(rank):
        original = images._build

        def build(folder, name, *rest):
            with log.open("a") as file:
                file.write(f"{name}\n")
            time.sleep(1)
            original(folder, name, *rest)

        images._build = build

    argv = training(data, tmp_path / "logs", "--meta-batch", "3", episode=3, val_freq=3)
    codes, err = together(tmp_path / "a", 3, lambda rank: argv, prepare)
    assert codes == [0, 0, 0], err
    assert sorted(log.read_text().split()) == ["train", "val"]


def test_each_machine_may_have_its_own_cache(data, tmp_path):
    def argv(rank):
        return [
            *training(data, tmp_path / "logs", "--meta-batch", "2", episode=2),
            "--cache-dir",
            str(tmp_path / f"c{rank}"),
        ]

    assert together(tmp_path / "a", 2, argv)[0] == [0, 0]
    assert [len(list((tmp_path / f"c{rank}").glob("*/train-*"))) for rank in (0, 1)] == [1, 1]
