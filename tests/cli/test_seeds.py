"""Several seeds by one command, and jobs of Slurm, whose programs are stand-ins here."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, tensors
from test_scripts import bash, environment, executable, one_line, repository  # noqa: F401

from engine.checkpoint import LAST
from engine.flags import parse, resolve

QUIET = "--n-workers 1 --val-freq 0 --episode-test 2 --save-minutes 60"
QUIET = [*SMALL, *QUIET.split()]
# a main.py that leaves the files of a training or a test, and says how it was called
STUB = """import os, signal, sys, time
argv = sys.argv[1:]
given = dict(zip(argv, argv[1:])) | dict(word.split("=") for word in argv if "=" in word)
folder = os.path.expanduser(given.get("--save", "")) + "-" + given.get("--seed", "")
where = [os.environ.get(name, "") for name in ("CUDA_VISIBLE_DEVICES", "RANK")]
print(os.environ.get("OMP_NUM_THREADS"), file=open(LOG + ".threads", "a"))
print("\\t".join([*where, *argv]), file=open(LOG, "a"))
if argv[1] == "train":
    os.makedirs(folder + "/ckpts", exist_ok=True)
    open(folder + "/ckpts/meta-learner-last.pth.tar", "a")
    if given.get("--episode") == "100000":  # as long as nothing stops it
        stop = lambda *_: sys.exit(print("snapshot", file=sys.stderr) or 143)
        signal.signal(signal.SIGTERM, stop)
        open(folder + "/metrics.jsonl", "w").write("{}")
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
    environment(place, f'case "$*" in *device_count*) echo {gpus}; exit ;; esac')
    return {"VIRTUAL_ENV": str(place)}


def seeds(clone, *argv, gpus=0, **env):
    env |= with_gpus(clone, gpus)
    return bash(clone[0] / "scripts" / "seeds.sh", *argv, cwd=clone[0].parent, **env)


def modes(calls):
    return [(call[3], resolve(parse(call[2:])).seed) for call in calls if call[3] != "results"]


def test_seeds_one_after_the_other(clone):
    """Finished ones are not tested again, unless they are trained further."""
    flags = ("--data-root", "my images", "--save", "a b")
    run = seeds(clone, "719", "53", *flags)
    assert (run.returncode, run.stdout, run.stderr) == (0, "the table\n", "")
    *calls, table = clone[1]()
    assert modes(calls) == [("train", 719), ("test", 719), ("train", 53), ("test", 53)]
    for call in calls:
        args = resolve(parse(call[2:]))
        assert (args.save, args.data_root) == ("a b", Path("my images"))
    assert table[2:] == ["--mode", "results", "--runs", "a b-719", "a b-53"]
    time.sleep(0.05)
    (clone[0].parent / "a b-53" / "ckpts" / LAST).touch()
    run = seeds(clone, "719", "53", *flags)
    assert "a b-719: tested already" in run.stdout
    assert modes(clone[1]()[5:]) == [("train", 719), ("train", 53), ("test", 53)]


@pytest.mark.parametrize("given", [["--minutes=08"], ["--minutes", "8"]])
def test_minutes_are_decimal(clone, given):
    """A zero in front makes no octal number."""
    place = clone[0].parent
    executable(place / "bin" / "sleep", f"echo $1 >>{place}/slept; exec /bin/sleep 60")
    assert seeds(clone, "719", *given, path=place / "bin").returncode == 0
    assert (place / "slept").read_text() == "480\n"


def test_the_home_folder_after_an_equals_sign(clone, tmp_path):
    """Which no shell replaces."""
    assert seeds(clone, "719", "--save=~/logs", HOME=str(tmp_path)).returncode == 0
    assert clone[1]()[-1][-1] == str(tmp_path / "logs-719")


def test_what_is_named_twice_runs_once(clone):
    assert seeds(clone, "719", "0719", "719", "--recipe", "train_1s_5c,train_1s_5c").returncode == 0
    *calls, table = clone[1]()
    assert modes(calls) == [("train", 719), ("test", 719)]
    assert len(table) == 2 + 4  # one run


@pytest.mark.parametrize("given", ["--recipe {}", "--recipe={}"])
def test_another_recipe_with_its_own_folders(clone, given):
    """Pre-training is not tested, and has no table."""
    words = given.format("train_1s_5c_authors").split()
    assert seeds(clone, "53", *words, "--n-eval", "9").returncode == 0
    train, test, table = (call[2:] for call in clone[1]())
    args, save = resolve(parse(train)), "logs-1shot-authors"
    assert (args.n_shot, args.augment, args.save, args.n_eval) == (1, "none", save, 9)
    assert resolve(parse(test)).save == save
    assert table == ["--mode", "results", "--runs", f"{save}-53"]
    run = seeds(clone, "719", "53", *given.format("pretrain").split())
    assert (run.returncode, run.stderr) == (0, "")
    assert modes(clone[1]()[3:]) == [("pretrain", 719), ("pretrain", 53)]
    assert len(clone[1]()) == 5


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
    assert table[2:] == ["--mode", "results", "--runs", *folders]
    threads = (clone[0].parent / "called.threads").read_text().split()
    assert threads[0] == str(-(-len(os.sched_getaffinity(0)) // 4))
    expected = [(mode, seed) for mode in ("test", "train") for seed in (53, 719)]
    assert sorted(modes(calls)) == sorted(2 * expected)


@pytest.mark.parametrize("serves", [True, False])
def test_an_mps_server_is_started_and_stopped(clone, serves):
    log, control = clone[0].parent / "mps", clone[0].parent / "bin" / "nvidia-cuda-mps-control"
    words = f'echo "${{1-$(cat)}}" >>"{log}"; [ "$*" != -d ] || {str(serves).lower()}'
    executable(control, words)
    # the stand-in's PyTorch has no GPU, so a server that starts is stopped, too
    flags = {"gpus": 1, "path": control.parent}
    assert seeds(clone, "719", "53", "--per-gpu", "2", **flags).returncode == 0
    assert log.read_text().split()[:2] == ["-d", "quit"]
    log.unlink()
    assert seeds(clone, "719", **flags).returncode == 0
    assert not log.exists()


def test_after_its_minutes_it_stops_with_snapshots(clone):
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
    one_line(seeds(clone, *words.split()), culprit)


def children(pid):
    """Process numbers of all below one."""
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return below + [n for child in below for n in children(child)]


def wait_for(condition, process):
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def _all_gpus(monkeypatch):
    """The other tests see none, by this variable."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


real = pytest.mark.skipif(
    not Path(sys.prefix, "bin", "python").exists(),
    reason="no environment that the scripts could use",
)


def begin(script, *flags, cwd, **env):
    ours = {"VIRTUAL_ENV": sys.prefix, "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **ours, **env}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = ["bash", str(script), *flags]
    return subprocess.Popen(command, cwd=cwd, env=env, start_new_session=True, **how)


def ended(process, code=0):
    """What a process has printed, once it has ended."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, err
    return out, err


def interrupted(process, folders, number):
    """Send a signal when all are at work: what was said, once nothing of it runs any more."""
    metrics = [folder / "metrics.jsonl" for folder in folders]
    wait_for(lambda: all(path.exists() and path.stat().st_size for path in metrics), process)
    below = {n: Path(f"/proc/{n}/cmdline").read_text() for n in children(process.pid)}
    ours = [n for n in below if "main.py" in below[n]]
    assert len(ours) >= len(folders)
    process.send_signal(number)
    _, err = ended(process, 128 + number)
    assert not [n for n in ours if Path(f"/proc/{n}").exists()]
    return err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("gpus", [0, 2])
def test_a_signal_reaches_all_trainings(clone, gpus, number):
    place, begun = clone[0].parent, [719, 53] if gpus else [719]
    script, flags = clone[0] / "scripts" / "seeds.sh", ["719", "53", "--episode", "100000"]
    process = begin(script, *flags, cwd=place, **with_gpus(clone, gpus))
    err = interrupted(process, [place / f"logs-{seed}" for seed in begun], number)
    assert err.count("snapshot") == len(begun)
    assert sorted(modes(clone[1]())) == sorted(("train", seed) for seed in begun)


@real
@pytest.mark.slow
def test_a_stopped_training_goes_on_where_it_was(master, tmp_path):
    flags = ["719", "--data-root", str(master), *QUIET, "--episode"]
    script = ROOT / "scripts" / "seeds.sh"
    process, folder = begin(script, *flags, "100000", cwd=tmp_path), tmp_path / "logs-719"
    assert "stopped by SIGTERM after episode" in interrupted(process, [folder], signal.SIGINT)
    done = tensors(tmp_path / "logs")["episode"]
    out, _ = ended(begin(script, *flags, str(done + 1), cwd=tmp_path))
    assert f"resuming after episode {done} of {done + 1}" in out
    assert f"last, {done + 1:,} of {done + 1:,} episodes" in out


# ---- Slurm ----


@pytest.fixture
def slurm(tmp_path):
    """A folder with srun, scancel and scontrol, which log their calls and do what ours needs."""
    place = tmp_path / "slurm"
    log = f'echo "$(basename "$0") $*" >>"{place}/calls"\n'
    # takes its flags away, runs the rest on each node, and as the real one kills it when a SIGTERM
    # comes
    srun = f"""nodes=${{SLURM_JOB_NUM_NODES:-1}}
while case $1 in --nodes=*) nodes=${{1#*=}} ;; --*) ;; *) false ;; esac; do shift; done
"$@" & echo $! >"{place}/step"
trap 'kill -KILL $(cat "{place}/step")' TERM
wait $!"""
    executable(place / "srun", log + srun)
    executable(place / "scancel", log + f'kill -TERM $(cat "{place}/step")')
    names = 'case "$*" in "show hostnames"*) echo node7; sleep 0.2; echo node8 ;; esac'
    executable(place / "scontrol", log + names)
    (place / "calls").touch()
    return place


def job(root, slurm, **env):
    """Variables of a job; without ``VIRTUAL_ENV`` the environment is the clone's."""
    shutil.copy(ROOT / "scripts" / "slurm_5s_5c.sh", slurm / "slurm_script")  # as Slurm does
    own = {"SLURM_SUBMIT_DIR": str(root), "SLURM_JOB_ID": "31", "SLURM_ARRAY_TASK_ID": "53"}
    return own | {"VIRTUAL_ENV": str(root.parent / "active")} | env


def calls_of(slurm):
    return (slurm / "calls").read_text().splitlines()


def test_a_job_trains_and_tests_its_seed(clone, slurm):
    root, calls = clone
    environment(root.parent / "active")
    env = job(root, slurm, SLURM_GPUS_ON_NODE="1")
    run = bash(slurm / "slurm_script", "--data-root", "my images", path=slurm, **env)
    assert run.returncode == 0, run.stderr
    assert modes(calls()) == [("train", 53), ("test", 53)]
    assert all(resolve(parse(call[2:])).data_root == Path("my images") for call in calls())
    assert (root / "logs-53" / "results.json").exists()
    assert [line.split()[0] for line in calls_of(slurm)] == ["srun", "srun"]
    # a training that fails is neither tested nor queued again
    run = bash(slurm / "slurm_script", path=slurm, **env | {"SLURM_ARRAY_TASK_ID": "13"})
    assert run.returncode == 7
    assert modes(calls())[2:] == [("train", 13)]
    assert not any("requeue" in line for line in calls_of(slurm))


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 4), (2, 4), (2, 1)])
def test_several_gpus_share_the_episodes_of_an_update(clone, slurm, nodes, gpus):
    root, _ = clone
    environment(root.parent / "active", 'case "$*" in *distributed*) exit 0 ;; esac')
    env = job(root, slurm, SLURM_JOB_NODELIST="node[7-8]")
    env |= {"SLURM_JOB_NUM_NODES": str(nodes), "SLURM_GPUS_ON_NODE": str(gpus)}
    run = bash(slurm / "slurm_script", "--n-eval", "9", path=slurm, **env)
    assert run.returncode == 0, run.stderr
    train = next(line for line in calls_of(slurm) if line.startswith("srun"))
    assert f"--nnodes {nodes} --nproc-per-node {gpus} --no-python" in train
    assert "--rdzv-endpoint node7:20031" in train
    assert train.endswith(f"train_5s_5c.sh --seed 53 --meta-batch {nodes * gpus} --n-eval 9")
    assert "--ntasks-per-node=1" in train
    assert "--nodes=1 --ntasks=1" in calls_of(slurm)[-1]  # one process tests


@pytest.mark.slow
def test_torchrun_starts_the_recipe_as_so_many_ranks(clone, slurm):
    root, calls = clone
    environment(root.parent / "active")
    executable(slurm / "scontrol", "echo localhost")
    env = job(root, slurm, SLURM_JOB_NODELIST="localhost")
    run = bash(slurm / "slurm_script", path=slurm, SLURM_GPUS_ON_NODE="2", **env)
    assert run.returncode == 0, run.stderr
    found = sorted((call[3], call[1]) for call in calls())
    assert found == [("test", ""), ("train", "0"), ("train", "1")]


@real
@pytest.mark.slow
def test_a_job_whose_time_is_nearly_over_is_queued_again(master, tmp_path, slurm):
    flags = ["--data-root", str(master), *QUIET, "--save", str(tmp_path / "logs"), "--episode"]
    path = os.pathsep.join((str(slurm), os.environ["PATH"]))
    env = job(ROOT, slurm, SLURM_ARRAY_TASK_ID="719", PATH=path, VIRTUAL_ENV=sys.prefix)
    metrics, script = tmp_path / "logs-719" / "metrics.jsonl", slurm / "slurm_script"
    for number, code in ((signal.SIGUSR1, 0), (signal.SIGTERM, 143)):
        begun = metrics.stat().st_size if metrics.exists() else 0
        process = begin(script, *flags, "100000", cwd=tmp_path, **env)
        wait_for(lambda begun=begun: metrics.exists() and metrics.stat().st_size > begun, process)
        process.send_signal(number)
        assert "stopped by SIGTERM after episode" in ended(process, code)[1]
        done = tensors(tmp_path / "logs")["episode"]
    # after preemption Slurm itself does it
    assert calls_of(slurm).count("scontrol requeue 31") == 1
    out, _ = ended(begin(script, *flags, str(done + 1), cwd=tmp_path, **env))
    assert f"resuming after episode {done} of {done + 1}" in out
    assert (tmp_path / "logs-719" / "results.json").exists()


def test_what_a_job_refuses(tmp_path):
    script = ROOT / "scripts" / "slurm_5s_5c.sh"
    run = bash(script)
    assert run.returncode != 0
    assert "sbatch" in run.stderr
    one_line(bash(script, SLURM_SUBMIT_DIR=str(tmp_path)), "submit")


def test_slurm_reads_its_flags():
    """They stand before the first command."""
    text = (ROOT / "scripts" / "slurm_5s_5c.sh").read_text()
    head = text.partition("\nset ")[0]
    flags = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", head, re.MULTILINE))
    assert len(flags) == text.count("#SBATCH")
    known = {"requeue": "", "array": "719,53", "signal": "B:USR1@120", "ntasks-per-node": "1"}
    assert known.items() <= flags.items()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    command = ["shellcheck", "-x", *sorted(map(str, (ROOT / "scripts").glob("*.sh")))]
    run = subprocess.run(command, cwd=ROOT / "scripts", capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
