"""Traces and pictures of a small model."""

import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ONE_THREAD, ROOT, completed, succeeded

from dataloader import scan_split
from engine.backend import dataset
from engine.flags import parse
from engine.model import Model
from main import load_model
from metalearner import MetaLearner
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


def test_without_photographs_confusion_is_left_out(run):
    arrays = read_trace(run)
    del arrays["images"]
    np.savez(run / NAME, **arrays)
    assert plots.plot(run, "confusion") == []


def test_validations_stand_at_their_episodes(run):
    for axes in plots.load_figures().curves(run).axes:
        assert list(axes.containers[0][0].get_xdata()) == [2, 4]


def test_an_exported_pre_training_counts_batches(run):
    content = {"episode": 6, "mode": "pretrain", "network": {"weight": torch.ones(1)}}
    shutil.rmtree(run / "ckpts")
    torch.save(content, run / "meta-learner.pth.tar")
    labels = [axes.get_xlabel() for axes in plots.load_figures().curves(run).axes]
    assert "batches" in labels


def test_words_and_numbers_of_the_pictures(run):
    figures = plots.load_figures()
    trace = read_trace(run)
    figures.plt.rcParams["text.usetex"] = True  # as a user's own style may ask
    with figures.style([]):
        assert not figures.plt.rcParams["text.usetex"]
        gates = figures.gates("run", {**trace, "forget": 0.997 + trace["forget"] * 1e-5})
    gates.canvas.draw()
    titles = [axes.get_title() for axes in gates.axes[:5]]
    assert titles == [f"convolution {k}" for k in range(1, 5)] + ["classifier"]
    assert gates.axes[0].yaxis.get_offset_text().get_text() == ""
    mean, std = figures.smooth(np.array([8.0, 4.0, 2.0, 2.0, 5.0]), 3)
    assert list(mean) == pytest.approx([8, 14 / 3, 8 / 3, 3, 3.5])  # no leap at the end
    assert std[0] == 0
    figures.plt.rcParams["text.usetex"] = False


def test_a_damaged_trace_is_named(run):
    (run / NAME).write_bytes(b"junk")
    with pytest.raises(UserError, match=r"trace\.npz"):
        plots.plot(run)


def test_a_trace_for_publication_holds_no_photograph(tmp_path, monkeypatch):
    arrays = {"images": np.ones(3), "moved": np.ones(3)}
    monkeypatch.setattr("tools.trace.record", lambda *_: dict(arrays))
    what = SimpleNamespace(first=int), Model(None, None, MetaLearner(4, 1, 3)), 25, None
    write_trace(tmp_path, *what)
    assert np.load(tmp_path / NAME).files == ["moved"]
    (tmp_path / "ckpts").mkdir()
    write_trace(tmp_path, *what)
    assert np.load(tmp_path / NAME).files == ["images", "moved"]


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
