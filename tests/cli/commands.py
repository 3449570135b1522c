"""The command line in this process, on a tiny data set."""

import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

import main
from utils import run_main

SMALL = "--cpu --image-size 16 --n-class 3 --n-shot 1 --n-eval 2 --epoch 2 --hidden-size 4".split()
SMALL += "--log-freq 1 --val-freq 2 --episode-val 2 --n-workers 0 --plots false".split()
BEST, LAST = "meta-learner-best.pth.tar", "meta-learner-last.pth.tar"


def run_cli(*argv):
    """Run ``main.py``; returns its exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = run_main(main.main, [str(word) for word in argv])
        except SystemExit as e:
            code = e.code
    return code, out.getvalue(), err.getvalue()


def run_train(data, save, *flags):
    """Train for four episodes."""
    return run_cli("--data-root", data, "--save", save, "--episode", 4, *SMALL, *flags)


def run_test(save, *flags):
    """Test a run's best checkpoint on three episodes."""
    small = ("--cpu", "--n-workers", 0, "--episode-test", 3)
    return run_cli("--mode", "test", "--save", save, *small, *flags)


def succeeded(done):
    """The output of a command that has ended well."""
    code, out, err = done
    assert (code, err) == (0, ""), err
    return out


def refused(done, *culprits):
    """Exit code 2, and one line that names the culprits."""
    code, _, err = done
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("error: ")
    assert not [culprit for culprit in culprits if culprit not in err], err


def listing(place):
    """What lies in a folder, apart from decoded images: name, size and time of each entry."""
    paths = [path for path in Path(place).rglob("*") if ".decoded" not in path.parts]
    stats = [(path, os.lstat(path)) for path in sorted(paths) if path.name != ".decoded"]
    return [(path, s.st_size, s.st_mtime_ns) for path, s in stats if not path.is_dir()] + [
        path for path, _ in stats if path.is_dir()
    ]


def metrics(save, *events, seed=719):
    """The lines of a run's metrics, without their times."""
    lines = Path(f"{save}-{seed}", "metrics.jsonl").read_text().splitlines()
    lines = [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]
    return [line for line in lines if not events or line["event"] in events]


def tensors(save, name=LAST):
    """A run's checkpoint."""
    return torch.load(Path(f"{save}-719", "ckpts", name), weights_only=True)
