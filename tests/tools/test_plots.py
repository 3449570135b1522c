"""Traces and pictures of a small model."""

import os
import shutil
import sys

import numpy as np
import pytest
from conftest import ONE_THREAD, ROOT, completed, run_cli, succeeded

from data.layout import scan_split
from engine.backend import dataset
from engine.checkpoint import LAST, load
from engine.flags import parse
from main import load_model
from tools import plots
from tools.trace import NAME, QUANTILES, read_trace, write_trace
from utils import UserError


@pytest.fixture(scope="module")
def traced(trained, tmp_path_factory):
    """A run folder with a trace."""
    folder = shutil.copytree(f"{trained}-719", tmp_path_factory.mktemp("traced") / "run")
    (folder / "results.json").unlink(missing_ok=True)
    args, _, backend, model = load_model(parse(["--cpu", "--resume", str(folder)]))
    val_set = dataset(args, backend, scan_split(args.data_root, "val"), 4)
    write_trace(folder, val_set, model, 25, backend.device)
    return folder


@pytest.fixture
def run(traced, tmp_path):
    return shutil.copytree(traced, tmp_path / "$\\frac$ run")


def test_what_is_traced(run):
    trace = read_trace(run)
    assert list(trace["layers"]) == ["conv1", "conv2", "conv3", "conv4", "cls"]
    assert trace["forget"].shape[1:] == (2, 5, 1 + len(QUANTILES))
    assert trace["query"].shape[1] == 3
    assert (trace["moved"] > 0).all()
    assert sorted(trace["confusion"][:, 0]) == [0, 0, 1, 1, 2, 2]


def test_all_pictures_are_drawn(run):
    names = {path.stem for path in plots.plot(run)}
    assert names == {"curves", "gates", "movement", "adaptation", "confusion"}
    assert {path.stem for path in (run / "plots").glob("*.svg")} == names


def test_an_old_trace_is_renewed(run):
    before = read_trace(run)
    os.utime(run / NAME, (0, 0))
    succeeded(run_cli("--mode", "plot", "--resume", run, "--cpu", "--n-workers", 0))
    assert np.array_equal(read_trace(run)["classes"], before["classes"])
    assert (run / NAME).stat().st_mtime == 0  # without the data it cannot be
    root = load(run / "ckpts" / LAST)["data_root"]
    succeeded(run_cli("--mode", "plot", "--resume", run, "--data-root", root, "--cpu"))
    assert (run / NAME).stat().st_mtime > 0


def test_without_photographs_confusion_is_left_out(run):
    arrays = read_trace(run)
    del arrays["images"]
    np.savez(run / NAME, **arrays)
    assert plots.plot(run, "confusion") == []


def test_validations_stand_at_their_episodes(run):
    for axes in plots.load_figures().curves(run).axes:
        assert list(axes.containers[0][0].get_xdata()) == [2, 4]


def test_style_and_numbers_of_the_pictures(monkeypatch):
    figures = plots.load_figures()
    # as a user's own style may ask
    monkeypatch.setitem(figures.plt.rcParams, "text.usetex", True)
    with figures.style([]):
        assert not figures.plt.rcParams["text.usetex"]
    mean, std = figures.smooth(np.array([8.0, 4.0, 2.0, 2.0, 5.0]), 3)
    assert list(mean) == pytest.approx([8, 14 / 3, 8 / 3, 3, 3.5])  # no leap at the end
    assert std[0] == 0


def test_a_damaged_trace_is_named(run):
    (run / NAME).write_bytes(b"junk")
    with pytest.raises(UserError, match=r"trace\.npz"):
        plots.plot(run)


def test_a_broken_matplotlib_costs_pictures_alone(run, monkeypatch, capsys):
    monkeypatch.setattr(plots.load_figures(), "curves", lambda folder: 1 / 0)
    plots.draw(run)
    assert "ZeroDivisionError" in capsys.readouterr().out
    monkeypatch.delitem(sys.modules, "tools.figures")
    monkeypatch.delattr("tools.figures")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plots.draw(run)
    assert "matplotlib" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [["data/glyphs.py", "--help"], ["-c", "from tools.figures import plt; plt.figure()"]]
)
def test_the_backend_of_a_notebook_is_not_looked_for(command):
    """It is inherited by what a notebook starts, also in an environment without Jupyter."""
    env = ONE_THREAD | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    succeeded(completed([sys.executable, *command], cwd=ROOT, env=env))
