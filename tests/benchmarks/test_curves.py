"""benchmarks/curves.py: the picture of several runs."""

import json

import pytest
from helpers import curves

from tools.plots import load_figures
from utils import UserError


def log(folder, means):
    """A run's log with a validation after 100, 200, ... episodes."""
    folder.mkdir()
    time = {"seconds": 20.0, "episodes_per_second": 5.0}
    first = {"event": "train", "episode": 50, "mean_loss": 1.0, "mean_accuracy": 50.0, "time": time}
    val = [
        {"event": "val", "episode": 100 * n, "loss": {"mean": 1.0, "ci95": 0.1}}
        | {"accuracy": {"mean": mean, "ci95": 1.0}}
        for n, mean in enumerate(means, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in (first, *val)))
    return str(folder)


def test_a_line_for_each_run_and_a_colour_for_each_recipe(tmp_path, monkeypatch):
    names = {"first-719": [40.0, 50.0], "first-53": [41.0], "second-719": [60.0, 61.0, 62.0]}
    runs = [log(tmp_path / name, means) for name, means in names.items()]
    drawn, plt = [], load_figures().plt
    subplots = plt.subplots
    monkeypatch.setattr(plt, "subplots", lambda **how: drawn.append(subplots(**how)) or drawn[-1])
    for suffix in ("svg", "png"):
        assert curves.main([*runs, "--out", str(tmp_path / f"out.{suffix}")]) == 0
        assert (tmp_path / f"out.{suffix}").stat().st_size > 1000
    lines = drawn[0][1].lines
    assert [line.get_label() for line in lines] == [*names]
    assert [list(line.get_ydata()) for line in lines] == [*names.values()]
    assert list(lines[2].get_xdata()) == [100, 200, 300]
    assert lines[0].get_color() == lines[1].get_color() != lines[2].get_color()
    assert lines[0].get_linestyle() != lines[1].get_linestyle()


def test_bad_input(tmp_path):
    run = log(tmp_path / "run-719", [])
    with pytest.raises(UserError, match=r"run-719: no validation"):
        curves.main([run, "--out", str(tmp_path / "out.svg")])
    with pytest.raises(UserError, match=r"--out: is 'out.txt', but must end in"):
        curves.main([run, "--out", "out.txt"])
    with pytest.raises(UserError, match=r"none/out\.svg: cannot be written"):
        curves.main([log(tmp_path / "run-53", [40.0]), "--out", str(tmp_path / "none" / "out.svg")])
