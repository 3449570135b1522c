import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_cli import expect, shell, train

import main
import report
from report import cell, read_results, table, write_results
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent


def result(seed, accuracies, shots=5):
    test = {"epoch": 8, "batch_size": 25, "counts": [2, 4], "accuracies": accuracies, "losses": accuracies}
    best = {"episode": 3000, "accuracy": 41.25, "std": 8.04}
    return {"seed": seed, "episode": 3000, "best": best, "n_class": 5, "data": "x", "tests": {str(shots): test}}


def test_cells_are_numpys():
    values = np.array([50.0, 60.0, 80.0, 10.0])
    half = 1.96 * values[:3].std() / np.sqrt(3)
    assert cell(values.tolist(), 3) == f"{values[:3].mean():.2f} ± {half:.2f} (std {values[:3].std():.1f})"


def test_table_of_two_seeds(tmp_path):
    text = table([result(719, [50.0, 60.0, 40.0, 50.0]), result(53, [70.0, 60.0, 60.0, 70.0])])
    lines = text.splitlines()
    assert lines[0].startswith("5-way 5-shot")
    assert lines[2] == "| seed | data | train episodes | val | test, 2 episodes | test, 4 episodes |"
    assert lines[4].startswith("| 719 | x | 3000 | 41.25 (std 8.0) | 55.00 ± 6.93 (std 5.0) | 50.00 ")
    assert lines[6].startswith("| mean over runs | | | | 60.00 ± 6.93 (2 runs) | 57.50 ± 10.39 (2 runs) |")
    assert any("60.60 ± 0.71" in line for line in lines)
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_results_come_back(tmp_path):
    write_results(tmp_path, result(719, [1.0, 2.0]))
    assert read_results(tmp_path) == result(719, [1.0, 2.0])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"tests": 3}', "\0"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / report.NAME).write_text(content)
    with pytest.raises(UserError, match=r"results\.json: not a test's results"):
        read_results(tmp_path)


@pytest.fixture(scope="module")
def run(master, tmp_path_factory):
    save = tmp_path_factory.mktemp("tested") / "logs"
    assert train(master, save) == 0
    return save


def do_test(master, run, *flags):
    return main.run(["--mode", "test", "--data-root", str(master), "--save", str(run), "--cpu", "--n-workers", "0", *flags])


def test_counts_are_of_the_same_episodes(master, run, capsys):
    assert do_test(master, run, "--episode-test", "6", "3") == 0
    out = capsys.readouterr().out
    assert "test, 3 episodes" in out
    assert "test, 6 episodes" in out
    assert "| 719 |" in out
    accuracies = read_results(Path(f"{run}-719"))["tests"]["1"]["accuracies"]
    assert do_test(master, run, "--episode-test", "3") == 0
    assert read_results(Path(f"{run}-719"))["tests"]["1"]["accuracies"] == accuracies[:3]


def test_other_numbers_of_shots_take_the_authors_schedule(master, run, capsys):
    assert do_test(master, run, "--episode-test", "2", "--shots", "1", "2") == 0
    out = capsys.readouterr().out
    assert "test 1-shot (2 x 25), 2 episodes" in out
    assert "test 2-shot (5 x 5), 2 episodes" in out
    tests = read_results(Path(f"{run}-719"))["tests"]
    assert {k: (t["epoch"], t["batch_size"]) for k, t in tests.items()} == {"1": (2, 25), "2": (5, 5)}
    expect(capsys, do_test(master, run, "--shots", "9"), "test/class 0", "9")


def test_table_command(master, run, tmp_path, capsys):
    assert do_test(master, run, "--episode-test", "2") == 0
    other = tmp_path / "logs-53"
    shutil.copytree(f"{run}-719", other)
    content = json.loads((other / report.NAME).read_text())
    (other / report.NAME).write_text(json.dumps({**content, "seed": 53}))
    found = shell("results.sh", f"{run}-719", str(other), cwd=tmp_path)
    assert found.returncode == 0
    assert "| 53 |" in found.stdout
    assert "(2 runs)" in found.stdout
    (other / report.NAME).unlink()
    found = subprocess.run([sys.executable, str(ROOT / "report.py"), str(other)], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr.startswith(f"error: {other}: no results.json there")
    assert report.main([]) == 2
