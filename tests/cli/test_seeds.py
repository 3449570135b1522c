"""Several seeds by one command, and jobs of Slurm, whose programs are stand-ins here."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, completed, refused, wait_for_lines
from test_scripts import bash, environment, executable, repository  # noqa: F401
from torch.distributed import run as torchrun

from engine.checkpoint import LAST
from engine.flags import parse, resolve

# a main.py that leaves the files of a training or a test, and says how it was called
STUB = """import os, signal, sys, time
argv = sys.argv[1:]
given = dict(zip(argv, argv[1:])) | dict(word.split("=") for word in argv if "=" in word)
folder = os.path.expanduser(given.get("--save", "")) + "-" + given.get("--seed", "")
device = os.environ.get("CUDA_VISIBLE_DEVICES", "")
print(os.environ.get("OMP_NUM_THREADS"), file=open(LOG + ".threads", "a"))
print("\\t".join([device, *argv]), file=open(LOG, "a"))
if argv[1] == "train":
    os.makedirs(folder + "/ckpts", exist_ok=True)
    open(folder + "/ckpts/meta-learner-last.pth.tar", "a")
    if given.get("--episode") == "100000":  # as long as nothing stops it
        stop = lambda *_: sys.exit(print("checkpoint", file=sys.stderr) or 143)
        signal.signal(signal.SIGTERM, stop)
        open(folder + "/metrics.jsonl", "w").write("{}\\n")
        time.sleep(300)
elif argv[1] == "test":
    time.sleep(0.05)
    os.makedirs(folder, exist_ok=True)
    open(folder + "/results.json", "w")
else:
    print("the table")
sys.exit(7 if given.get("--seed") == "13" and argv[1] == "train" else 0)
"""


@pytest.fixture
def clone(repository, tmp_path):  # noqa: F811
    """The scripts in a clone with the stand-in for main.py: (the clone, its calls as words)."""
    (repository / "main.py").write_text(STUB.replace("LOG", repr(str(tmp_path / "called"))))

    def calls():
        return [line.split("\t") for line in (tmp_path / "called").read_text().splitlines()]

    return repository, calls


def with_gpus(clone, gpus):
    """The environment variable of a Python whose PyTorch sees so many GPUs."""
    place = clone[0].parent / "active"
    cases = f"*device_count*) echo {gpus}; exit ;; *torch.zeros*) exit 1 ;;"
    environment(place, f'case "$*" in {cases} esac')
    return {"VIRTUAL_ENV": str(place)}


def seeds(clone, *argv, gpus=0, **env):
    env |= with_gpus(clone, gpus)
    return bash(clone[0] / "scripts" / "seeds.sh", *argv, cwd=clone[0].parent, **env)


def modes(calls):
    return [(call[2], resolve(parse(call[1:])).seed) for call in calls if call[2] != "results"]


def test_seeds_one_after_the_other(clone):
    """Finished ones are not tested again, unless they are trained further."""
    flags = ("--data-root", "my images", "--save", "a b")
    run = seeds(clone, "719", "53", *flags)
    assert (run.returncode, run.stdout, run.stderr) == (0, "the table\n", "")
    *calls, table = clone[1]()
    assert modes(calls) == [("train", 719), ("test", 719), ("train", 53), ("test", 53)]
    for call in calls:
        args = resolve(parse(call[1:]))
        assert (args.save, args.data_root) == ("a b", Path("my images"))
    assert table[1:] == ["--mode", "results", "--runs", "a b-719", "a b-53"]
    time.sleep(0.05)
    (clone[0].parent / "a b-53" / "ckpts" / LAST).touch()
    run = seeds(clone, "719", "53", *flags)
    assert "a b-719: tested already" in run.stdout
    assert modes(clone[1]()[5:]) == [("train", 719), ("train", 53), ("test", 53)]


@pytest.mark.parametrize(
    ("words", "called", "folders"),
    [
        ("53 --recipe=train_1s_5c_authors", "train test results", "logs-1shot-authors-53"),
        # named twice it runs once
        ("7 07 --recipe train_1s_5c,train_1s_5c", "train test results", "logs-1shot-7"),
        ("7 --save=~/x", "train test results", "HOME/x-7"),  # no shell replaces ~ after =
        # pre-training is not tested, and has no table
        ("7 53 --recipe pretrain", "pretrain pretrain", "logs-pretrain-7 logs-pretrain-53"),
    ],
)
def test_recipes_and_their_folders(clone, tmp_path, monkeypatch, words, called, folders):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = seeds(clone, *words.split(), "--cpu")
    assert run.returncode == 0, run.stderr
    calls = [resolve(parse(call[1:])) for call in clone[1]()]
    assert [args.mode for args in calls] == called.split()
    assert all(args.cpu for args in calls if args.mode != "results")
    found = [folder for args in calls for folder in args.runs or [f"{args.save}-{args.seed}"]]
    assert list(dict.fromkeys(found)) == folders.replace("HOME", str(tmp_path)).split()


def test_the_papers_table(clone):
    where = {"cwd": clone[0].parent, **with_gpus(clone, 1)}
    run = bash(clone[0] / "scripts" / "paper_table.sh", "--minutes", "1", **where)
    assert run.returncode == 0, run.stderr
    trained = {(mode, seed) for mode, seed in modes(clone[1]())}
    assert trained == {(mode, seed) for mode in ("train", "test") for seed in (719, 53, 1)}
    calls = [resolve(parse(call[1:])) for call in clone[1]() if call[2] == "train"]
    recipes = sorted((args.n_shot, args.second_order) for args in calls)
    assert recipes == [(1, True)] * 3 + [(5, False)] * 3 + [(5, True)] * 3


def test_minutes_are_decimal(clone):
    """A zero in front makes no octal number."""
    place = clone[0].parent
    executable(place / "bin" / "sleep", f"echo $1 >>{place}/slept; exec /bin/sleep 60")
    assert seeds(clone, "719", "--minutes=08", path=place / "bin").returncode == 0
    assert (place / "slept").read_text() == "480\n"


@pytest.mark.parametrize(
    ("gpus", "visible", "flags", "expected"),
    [
        (2, None, (), "0 1 0"),
        (2, "5,3", (), "5 3 5"),
        (8, "GPU-a,GPU-b,GPU-c", (), "GPU-a GPU-b GPU-c"),
        (1, None, (), None),
        (8, None, ("--gpu", "1"), None),
        (2, None, ("--per-gpu", "2"), "0 1 0"),
        (1, None, ("--per-gpu=4",), "0 0 0"),
    ],
)
def test_one_seed_on_each_gpu(clone, gpus, visible, flags, expected):
    env = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    run = seeds(clone, "719", "53", "2", *flags, gpus=gpus, **env)
    assert run.returncode == 0, run.stderr
    *calls, _ = clone[1]()
    found = {(seed, mode): call[0] for call, (mode, seed) in zip(calls, modes(calls), strict=True)}
    of_seed = dict(zip((719, 53, 2), expected.split() if expected else [""] * 3, strict=True))
    assert len(calls) == 6
    assert found == {(s, mode): of_seed[s] for s in of_seed for mode in ("train", "test")}
    notes = [line for line in run.stderr.splitlines() if line.startswith("seed ")]
    assert len(notes) == (3 if expected else 0)


def test_two_recipes_side_by_side_share_the_processor(clone):
    recipes = "train_5s_5c_authors,train_1s_5c_authors"
    folders = [f"logs-{name}-{seed}" for name in ("authors", "1shot-authors") for seed in (719, 53)]
    run = seeds(clone, "719", "53", "--recipe", recipes, "--per-gpu", "4")
    assert run.returncode == 0, run.stderr
    assert all(line.startswith("seed ") for line in run.stderr.splitlines())
    *calls, table = clone[1]()
    assert table[1:] == ["--mode", "results", "--runs", *folders]
    threads = (clone[0].parent / "called.threads").read_text().split()
    assert threads[0] == str(-(-len(os.sched_getaffinity(0)) // 4))
    expected = [(mode, seed) for mode in ("test", "train") for seed in (53, 719)]
    assert sorted(modes(calls)) == sorted(2 * expected)


@pytest.mark.parametrize("serves", [True, False])
def test_an_mps_server_is_started_and_stopped(clone, serves):
    log, control = clone[0].parent / "mps", clone[0].parent / "bin" / "nvidia-cuda-mps-control"
    words = f'echo "${{1-$(cat)}}" >>"{log}"; [ "$*" != -d ] || {str(serves).lower()}'
    executable(control, words)
    # the stand-in's PyTorch finds no GPU, so a server that starts is stopped, too
    flags = {"gpus": 1, "path": control.parent}
    assert seeds(clone, "719", "53", "--per-gpu", "2", **flags).returncode == 0
    assert log.read_text().split()[:2] == ["-d", "quit"]
    log.unlink()
    assert seeds(clone, "719", **flags).returncode == 0
    assert not log.exists()


def test_after_its_minutes_it_stops_with_checkpoints(clone):
    run = seeds(clone, "719", "--episode", "100000", "--minutes", "0")
    assert run.returncode == 143
    assert "stopped after 0 minutes" in run.stderr
    assert run.stdout == ""  # no table


@pytest.mark.parametrize("gpus", [0, 3])
def test_a_seed_that_fails_leaves_the_others_alone(clone, gpus):
    run = seeds(clone, "13", "719", "53", gpus=gpus)
    assert run.returncode == 7
    expected = [*(("test", n) for n in (53, 719)), *(("train", n) for n in (13, 53, 719))]
    assert sorted(modes(clone[1]())) == expected
    assert run.stdout.endswith("the table\n")


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        ("", "no seeds given"),
        ("--cpu", "no seeds given"),
        ("7 --recipe none", "--recipe none: there is no"),
        ("7 --recipe", "--recipe : there is no"),
        ("7 --recipe train_omniglot", "eval_omniglot.sh"),
        ("7 --per-gpu 0", "--per-gpu 0"),
        *((f"7 --minutes {minutes}", f"--minutes {minutes}") for minutes in ("1.5", "", "9" * 20)),
        ("7 --recipe train_5s_5c,train_1s_5c --save x", "--save x"),
        *((f"7 {flag}", "seeds.sh sets") for flag in ("--seed x", "--resume=auto", "--mode x")),
    ],
)
def test_what_seeds_refuses(clone, words, culprit):
    refused(seeds(clone, *words.split()), culprit)


def children(pid):
    """Process numbers of all below one."""
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return below + [n for child in below for n in children(child)]


@pytest.fixture(autouse=True)
def _all_gpus(monkeypatch):
    """The other tests see none, by this variable."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def interrupted(number, folders, *command, cwd, env):
    """Send a signal when all are at work: the exit code and stderr, once nothing of it runs."""
    how = {"start_new_session": True, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(["bash", *command], cwd=cwd, env=os.environ | env, **how)
    for folder in folders:
        wait_for_lines(folder / "metrics.jsonl", 1, process)
    below = {n: Path(f"/proc/{n}/cmdline").read_text() for n in children(process.pid)}
    ours = [n for n in below if "main.py" in below[n]]
    assert len(ours) >= len(folders)
    process.send_signal(number)
    _, err = process.communicate(timeout=600)
    assert not [n for n in ours if Path(f"/proc/{n}").exists()]
    return process.returncode, err


@pytest.mark.parametrize(
    ("number", "gpus"), [(signal.SIGTERM, 0), (signal.SIGINT, 2), (signal.SIGHUP, 2)]
)
def test_a_signal_reaches_all_trainings(clone, gpus, number):
    place, begun = clone[0].parent, [719, 53] if gpus else [719]
    command = [clone[0] / "scripts" / "seeds.sh", "719", "53", "--episode", "100000"]
    folders, env = [place / f"logs-{seed}" for seed in begun], with_gpus(clone, gpus)
    code, err = interrupted(number, folders, *command, cwd=place, env=env)
    assert code == 128 + number
    assert err.count("checkpoint") == len(begun)
    assert sorted(modes(clone[1]())) == sorted(("train", seed) for seed in begun)


# ---- Slurm ----


@pytest.fixture
def slurm(clone, tmp_path):
    """A job's script and variables, and the calls of srun, scancel and scontrol, which are
    stand-ins.
    """
    place, environ = tmp_path / "slurm", tmp_path / "active"
    log = f'echo "$(basename "$0") $*" >>"{place}/calls"\n'
    # takes its flags away, runs the rest, and as the real one kills it when a SIGTERM comes
    srun = f"""while case $1 in --*) ;; *) false ;; esac; do shift; done
"$@" & echo $! >"{place}/step"
trap 'kill -KILL $(cat "{place}/step")' TERM
wait $!"""
    executable(place / "srun", log + srun)
    executable(place / "scancel", log + f'kill -TERM $(cat "{place}/step")')
    executable(place / "scontrol", log + 'if [ "$2" = hostnames ]; then echo node7; echo node8; fi')
    environment(environ, 'case "$*" in *distributed*) exit 0 ;; esac')
    script = shutil.copy(ROOT / "scripts" / "slurm.sh", place / "slurm_script")  # as it does
    env = {"SLURM_SUBMIT_DIR": str(clone[0]), "SLURM_JOB_ID": "31", "SLURM_ARRAY_TASK_ID": "53"}
    env |= {"VIRTUAL_ENV": str(environ), "PATH": f"{place}{os.pathsep}{os.environ['PATH']}"}
    return script, env, lambda: (place / "calls").read_text().splitlines()


def test_a_job_trains_and_tests_its_seed(clone, slurm):
    (root, calls), (script, env, called) = clone, slurm
    flags = ("--recipe", "train_5s_5c_first_order", "--data-root", "my images")
    run = bash(script, *flags, **env, SLURM_GPUS_ON_NODE="1")
    assert run.returncode == 0, run.stderr
    assert modes(calls()) == [("train", 53), ("test", 53)]
    assert all(resolve(parse(call[1:])).data_root == Path("my images") for call in calls())
    assert (root / "logs-first-order-53" / "results.json").exists()
    assert [line.split()[0] for line in called()] == ["srun", "srun"]
    assert bash(script, "--recipe", "pretrain", **env).returncode == 0  # which has no test
    assert modes(calls())[2:] == [("pretrain", 53)]
    # a training that fails is neither tested nor queued again
    assert bash(script, **env | {"SLURM_ARRAY_TASK_ID": "13"}).returncode == 7
    assert modes(calls())[3:] == [("train", 13)]
    assert not any("requeue" in line for line in called())


@pytest.mark.parametrize(("nodes", "gpus"), [("1", "4"), ("2", "1")])
def test_several_gpus_share_the_episodes_of_an_update(slurm, nodes, gpus):
    """torchrun itself reads what it is given."""
    script, env, called = slurm
    env |= {"SLURM_JOB_NUM_NODES": nodes, "SLURM_GPUS_ON_NODE": gpus}
    run = bash(script, "--n-eval", "9", **env, SLURM_JOB_NODELIST="node[7-8]")
    assert run.returncode == 0, run.stderr
    train, test = (line for line in called() if line.startswith("srun"))
    srun, _, words = train.partition(" -m torch.distributed.run ")
    assert "--ntasks-per-node=1" in srun
    args = torchrun.parse_args(words.replace(f"{env['SLURM_SUBMIT_DIR']}/", "").split())
    assert (args.nnodes, args.nproc_per_node, args.no_python) == (nodes, gpus, True)
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("c10d", "node7:20031")
    assert args.training_script == "scripts/train_5s_5c.sh"
    expected = f"--seed 53 --meta-batch {int(nodes) * int(gpus)} --n-eval 9"
    assert args.training_script_args == expected.split()
    assert "--nodes=1 --ntasks=1" in test  # one process tests


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 143)])
def test_a_job_whose_time_is_nearly_over_is_queued_again(clone, slurm, number, code):
    """After preemption Slurm itself does it."""
    (root, calls), (script, env, called) = clone, slurm
    command = (script, "--episode", "100000")
    found, err = interrupted(number, [root / "logs-53"], *command, cwd=root, env=env)
    assert (found, err.count("checkpoint")) == (code, 1)
    assert modes(calls()) == [("train", 53)]
    assert called().count("scontrol requeue 31") == (number == signal.SIGUSR1)


def test_what_a_job_refuses(tmp_path, slurm):
    script, env, _ = slurm
    for flag in ("--recipe", "--recipe=none", "--recipe=train_omniglot"):
        refused(bash(script, flag, **env), "--recipe")
    script = ROOT / "scripts" / "slurm.sh"
    run = bash(script)
    assert run.returncode != 0
    assert "sbatch" in run.stderr
    refused(bash(script, SLURM_SUBMIT_DIR=str(tmp_path)), "submit")


def test_slurm_reads_its_flags():
    """They stand before the first command."""
    text = (ROOT / "scripts" / "slurm.sh").read_text()
    head = text.partition("\nset ")[0]
    flags = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", head, re.MULTILINE))
    assert len(flags) == text.count("#SBATCH")
    known = {"requeue": "", "array": "719,53", "signal": "B:USR1@120", "ntasks-per-node": "1"}
    assert known.items() <= flags.items()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    run = completed(["shellcheck", "-x", *(ROOT / "scripts").glob("*.sh")], cwd=ROOT / "scripts")
    assert run.returncode == 0, run.stdout
