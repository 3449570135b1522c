"""Traces, pictures and predictions of a small model."""

import copy
import csv
import json
import shutil
import sys

import numpy as np
import pytest
import torch

from dataloader import scan_split
from engine.backend import dataset, select_backend
from engine.flags import parse, resolve
from engine.model import Model
from tools import plots
from tools.predict import predict
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


def test_a_validation_before_the_log_has_no_time(run):
    figure = plots.load_figures().curves(run)
    lines = [axes.containers[0][0].get_xdata() for axes in figure.axes[:2]]
    assert list(lines[0]) == [1, 4]
    assert np.isnan(lines[1][0])
    assert lines[1][1] == pytest.approx(2)


def test_a_damaged_trace_is_named(run):
    (run / NAME).write_bytes(b"junk")
    with pytest.raises(UserError, match=r"trace\.npz"):
        plots.plot(run)


# ---- Predictions ----


@pytest.fixture
def photographs(master, tmp_path):
    """Three classes of examples."""
    for k in range(3):
        name = f"test class {k}"
        shutil.copytree(master / "test" / name, tmp_path / "support" / name)
    return tmp_path


def answers(place, master, *flags, out="answer"):
    argv = [*SMALL.split(), "--mode", "predict", "--support", str(place / "support"), "--query"]
    argv += [str(master / "test" / "test class 1"), "--out", str(place / out), *flags]
    args = resolve(parse(argv))
    backend = select_backend(args)
    predict(args, backend, make_model(backend))
    with (place / f"{out}.csv").open(encoding="utf-8") as file:
        return list(csv.reader(file))


def test_predictions_are_written_and_not_replaced(photographs, master):
    head, *rows = answers(photographs, master)
    assert head[3:] == ["test class 0", "test class 1", "test class 2"]
    assert len(rows) == 8
    for row in rows:
        shares = [float(p) for p in row[3:]]
        assert sum(shares) == pytest.approx(1, abs=1e-3)
        assert row[1] == head[3:][shares.index(max(shares))]
    assert (photographs / "answer.png").exists()
    answers(photographs, master)
    with pytest.raises(UserError, match=r"answer\.csv"):
        answers(photographs, master, "--tta-permutations", "1", "--tta-flip", "true")


def test_names_play_no_part(photographs, master):
    before = answers(photographs, master)
    (photographs / "support" / "test class 0").rename(photographs / "support" / "z")
    after = answers(photographs, master, out="renamed")
    assert after[0][3:] == [*before[0][4:], "z"]
    assert [row[3:] for row in after[1:]] == [[*r[4:], r[3]] for r in before[1:]]


def test_without_matplotlib_the_csv_is_written(photographs, master, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "tools.figures", raising=False)
    monkeypatch.delattr("tools.figures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert len(answers(photographs, master)) == 9
    assert "matplotlib" in capsys.readouterr().out
    assert not (photographs / "answer.png").exists()


def test_another_number_of_classes_is_refused(photographs, master):
    shutil.rmtree(photographs / "support" / "test class 0")
    with pytest.raises(UserError, match="--support"):
        answers(photographs, master)
