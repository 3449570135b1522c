import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import expect, tensors, train

import main
from around.plots import read_metrics, smooth
from around.recording import LAYERS, QUANTILES, layers, read_trace
from learner import Learner

ALL = {"curves", "gates", "movement", "adaptation", "confusion"}


def drawn(save):
    place = Path(f"{save}-719", "plots")
    return {p.stem for p in place.glob("*.png")} & {p.stem for p in place.glob("*.svg")}


def plot(save):
    return main.run(["--mode", "plot", "--save", str(save)])


@pytest.fixture(scope="module")
def run(master, tmp_path_factory):
    save = tmp_path_factory.mktemp("plotted") / "logs"
    assert train(master, save, "--plots", "true") == 0
    return save


def test_all_pictures_of_a_run(master, run, capsys):
    assert drawn(run) == ALL
    argv = ["--mode", "test", "--data-root", str(master), "--save", str(run), "--cpu"]
    assert main.run([*argv, "--episode-test", "3", "--shots", "1", "2"]) == 0
    assert plot(run) == 0
    assert drawn(run) == ALL | {"histogram"}
    for path in Path(f"{run}-719", "plots").glob("*.png"):
        pixels = np.asarray(Image.open(path).convert("L"))
        assert min(pixels.shape) > 400
        assert pixels.std() > 5  # not empty
    assert "drawn: " in capsys.readouterr().out


def test_a_run_with_one_point_and_no_validation(master, tmp_path):
    assert train(master, tmp_path / "logs", "--plots", "true", episode=1, val_freq=0) == 0
    assert drawn(tmp_path / "logs") == ALL


def test_a_resumed_run(master, tmp_path):
    assert train(master, tmp_path / "logs", episode=2) == 0
    assert train(master, tmp_path / "logs", "--resume", "auto", "--plots", "true", episode=5) == 0
    assert drawn(tmp_path / "logs") == ALL


def test_a_run_without_a_record_has_its_curves(master, tmp_path):
    assert train(master, tmp_path / "logs") == 0
    assert not Path(tmp_path, "logs-719", "trace.npz").exists()
    assert plot(tmp_path / "logs") == 0
    assert drawn(tmp_path / "logs") == {"curves"}


def test_cut_and_odd_lines_do_not_break_it(master, tmp_path, capsys):
    assert train(master, tmp_path / "logs") == 0
    path = tmp_path / "logs-719" / "metrics.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    odd = json.dumps({**first, "mean_loss": float("nan"), "episode": 5})
    path.write_text(path.read_text() + odd + "\n" + '{"event": "tra')
    assert plot(tmp_path / "logs") == 0
    path.write_text("")
    expect(capsys, plot(tmp_path / "logs"), "no episode of training")
    expect(capsys, plot(tmp_path / "nowhere"), "nowhere-719/metrics.jsonl: cannot be read")
    (tmp_path / "logs-719" / "trace.npz").write_bytes(b"junk")
    path.write_text(json.dumps(first) + "\n")
    expect(capsys, plot(tmp_path / "logs"), "trace.npz: not a record")


def test_recording_changes_nothing_of_the_training(master, run, tmp_path):
    assert train(master, tmp_path / "logs") == 0
    a, b = (tensors(save)["metalearner"] for save in (run, tmp_path / "logs"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_what_is_recorded(run):
    trace = read_trace(Path(f"{run}-719"))
    n_episodes, n_updates = trace["query"].shape
    assert (n_episodes, n_updates) == (20, 2)
    assert trace["forget"].shape == (20, 2, len(LAYERS), 1 + len(QUANTILES))
    assert ((trace["forget"] > 0) & (trace["forget"] < 1)).all()
    assert (trace["forget"][..., 0] > 0.9).all()  # it starts as gradient descent with a small step
    assert (trace["input"][..., 0] < 0.1).all()
    assert (np.diff(trace["input"][..., 1:], axis=-1) >= 0).all()  # quantiles
    assert (trace["moved"] > 0).all()
    assert ((trace["support"] >= 0) & (trace["support"] <= 100)).all()
    assert trace["images"].shape == (6, 16, 16, 3)
    assert sorted(trace["confusion"][:, 0]) == [0, 0, 1, 1, 2, 2]


def test_layers_cover_the_flat_vector():
    learner = Learner(32, 1e-3, 0.95, 5)
    found = layers(learner)
    assert len(found) == len(LAYERS)
    assert [s.start for s in found[1:]] == [s.stop for s in found[:-1]]
    assert (found[0].start, found[-1].stop) == (0, learner.get_flat_params().numel())
    assert found[0].stop == 32 * 27 + 32 * 3
    assert found[-1].stop - found[-1].start == learner.cls.weight.numel() + 5


def test_smoothing_is_numpys():
    values = np.array([1.0, np.nan, 4.0, 7.0, 2.0])
    mean, std = smooth(values, 3)
    assert mean[3] == pytest.approx(np.mean([4, 7, 2]))
    assert std[3] == pytest.approx(np.std([4, 7, 2]))
    assert mean[0] == 1.0
    assert smooth(values, 1)[0][3] == 7.0


def test_metrics_are_read_in_order(run):
    events = read_metrics(Path(f"{run}-719"))
    assert [e["episode"] for e in events if e["event"] == "train"] == [1, 2, 3, 4]



def test_tensorboard(master, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(master, tmp_path / "logs", "--tensorboard") == 0
    events = EventAccumulator(str(tmp_path / "logs-719" / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "logs-719" / "metrics.jsonl").read_text().splitlines()]
    expected = [(e["episode"], e["mean_loss"]) for e in lines if e["event"] == "train"]
    assert [(s.step, pytest.approx(s.value, rel=1e-6)) for s in events.Scalars("train/loss")] == expected
    assert {s.step for s in events.Scalars("val/accuracy")} == {2, 4}
