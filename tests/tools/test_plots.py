"""Traces and pictures of a small model."""

import copy
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, succeeded

from dataloader import scan_split
from engine.backend import dataset, select_backend
from engine.flags import parse, resolve
from engine.model import Model
from metalearner import MetaLearner
from tools import plots
from tools.trace import NAME, QUANTILES, read_trace, write_trace
from utils import UserError

SMALL = "--cpu --image-size 16 --n-class 3 --n-shot 1 --n-eval 2 --epoch 2 --n-workers 0"


def make_model(backend):
    torch.manual_seed(0)
    learner = backend.learner(16, 1e-3, 0.95, 3)
    meta = backend.metalearner(4, 4, learner.size())
    meta.metalstm.init_cI(learner.get_flat_params())
    return Model(learner, copy.deepcopy(learner), meta)


@pytest.fixture(scope="module")
def traced(master, tmp_path_factory):
    """A run folder with metrics and a trace."""
    folder = tmp_path_factory.mktemp("traced") / "run"
    folder.mkdir()
    args = resolve(parse([*SMALL.split(), "--data-root", str(master)]))
    backend = select_backend(args)
    val_set = dataset(args, backend, scan_split(master, "val"), 4)
    (folder / "ckpts").mkdir()
    write_trace(folder, val_set, make_model(backend), 25, backend.device)
    events = [{"event": "val", "episode": 1}]
    for n in (2, 4, 6):
        time = {"seconds": 1.0, "episodes_per_second": 2.0}
        events.append({"event": "train", "episode": n, "mean_loss": 1.0, "mean_accuracy": 40.0})
        events[-1]["time"] = time
    events.append({"event": "val", "episode": 4})
    for event in (events[0], events[-1]):
        event |= {key: {"mean": 1.0, "ci95": 0.1} for key in ("loss", "accuracy")}
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, events)))
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
    assert "confusion" not in {path.stem for path in plots.plot(run)}


def test_validations_stand_at_their_episodes(run):
    for axes in plots.load_figures().curves(run).axes:
        assert list(axes.containers[0][0].get_xdata()) == [1, 4]


def test_an_exported_pre_training_counts_batches(run):
    content = {"episode": 6, "mode": "pretrain", "network": {"weight": torch.ones(1)}}
    torch.save(content, run / "meta-learner.pth.tar")
    labels = [axes.get_xlabel() for axes in plots.load_figures().curves(run).axes]
    assert "batches" in labels


def test_words_and_numbers_of_the_pictures(run):
    figures = plots.load_figures()
    trace = read_trace(run)
    with figures.style([]):
        gates = figures.gates("run", {**trace, "forget": 0.997 + trace["forget"] * 1e-5})
    gates.canvas.draw()
    titles = [axes.get_title() for axes in gates.axes[:5]]
    assert titles == [f"convolution {k}" for k in range(1, 5)] + ["classifier"]
    assert gates.axes[0].yaxis.get_offset_text().get_text() == ""
    mean, std = figures.smooth(np.array([8.0, 4.0, 2.0, 2.0, 5.0]), 3)
    assert list(mean) == pytest.approx([8, 14 / 3, 8 / 3, 3, 3.5])  # no leap at the end
    assert std[0] == 0


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


@pytest.mark.parametrize("fault", ["missing", "broken"])
def test_a_broken_matplotlib_costs_pictures_alone(run, monkeypatch, capsys, fault):
    if fault == "missing":
        without_matplotlib(monkeypatch)
    else:
        monkeypatch.setattr(plots.load_figures(), "curves", lambda folder: 1 / 0)
    plots.draw(run)
    assert ("matplotlib" if fault == "missing" else "ZeroDivisionError") in capsys.readouterr().out


def without_matplotlib(monkeypatch):
    monkeypatch.delitem(sys.modules, "tools.figures", raising=False)
    monkeypatch.delattr("tools.figures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.parametrize(
    "command", [["data/glyphs.py", "--help"], ["-c", "from tools.figures import plt; plt.figure()"]]
)
def test_the_backend_of_a_notebook_is_not_looked_for(command):
    """It is inherited by what a notebook starts, also in an environment without Jupyter."""
    env = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = [sys.executable, *command]
    succeeded(subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True))
