"""What the tests of benchmarks/ share, the scripts included."""

import importlib
import sys

from conftest import ROOT

import main

sys.path.insert(0, str(ROOT / "benchmarks"))
SCRIPTS = ("compare_runs", "counts", "run", "validate")
compare_runs, counts, run, validate = map(importlib.import_module, SCRIPTS)

SMALL = ["--cpu", "--epoch", "2", "--image-size", "16", "--n-shot", "1", "--n-eval", "2"]
SMALL += ["--hidden-size", "4", "--episode", "4", "--val-freq", "2", "--log-freq", "1"]
SMALL += ["--n-workers", "0", "--plots", "false"]


def train(data, save, *flags, mode="train"):
    """Train a tiny network for four episodes, with two validations."""
    argv = ["--mode", mode, "--data-root", str(data), "--save", str(save), *SMALL, *flags]
    assert main.main(argv) == 0


def table(script, capsys, *argv):
    """The rows of the table that a script prints, each as a dict by heading."""
    capsys.readouterr()
    assert script.main([str(word) for word in argv]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("|") for line in lines)
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]
