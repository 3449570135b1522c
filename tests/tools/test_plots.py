import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_cli import do_test, expect, tensors, train
from torch import nn

import main
from around import plots
from dataloader import EpisodeDataset, scan_split
from learner import Conv4, FlatModule
from metalearner import MetaLearner
from tools.class_names import plain
from tools.plots import (
    curves,
    fonts_for,
    histogram,
    read_metrics,
    settings,
    shorten,
    smooth,
    style,
    training_time,
)
from tools.trace import QUANTILES, layers, read_trace, record, write_trace

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


def copied(run, folder):
    """A copy of the run, which other tests may have tested."""
    return Path(
        shutil.copytree(f"{run}-719", folder, ignore=shutil.ignore_patterns("results.json"))
    )


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
    assert (n_episodes, n_updates) == (20, 3)  # cI itself, and two updates
    assert list(trace["layers"]) == ["conv1", "conv2", "conv3", "conv4", "cls"]
    assert trace["forget"].shape == (20, 2, 5, 1 + len(QUANTILES))
    assert ((trace["forget"] > 0) & (trace["forget"] < 1)).all()
    assert (trace["forget"][..., 0] > 0.9).all()  # it starts as gradient descent with a small step
    assert (trace["input"][..., 0] < 0.1).all()
    assert (np.diff(trace["input"][..., 1:], axis=-1) >= 0).all()  # quantiles
    assert (trace["moved"] > 0).all()
    assert ((trace["support"] >= 0) & (trace["support"] <= 100)).all()
    assert trace["images"].shape == (6, 16, 16, 3)
    assert sorted(trace["confusion"][:, 0]) == [0, 0, 1, 1, 2, 2]


def test_the_names_of_the_classes_are_recorded(master, run):
    dataset = EpisodeDataset(scan_split(master, "val"), 719, 3, 1, 2, 2, 16, "port", 20)
    trace = read_trace(Path(f"{run}-719"))
    numbers = dataset.numbers(19)
    assert list(trace["classes"]) == [dataset.files[k].parent.name for k in numbers[:3]]
    assert [dataset.files[k].parent.name for k in numbers[3:]] == [
        str(trace["classes"][k]) for k in trace["confusion"][:, 0]
    ]


def test_layers_cover_the_flat_vector():
    learner = Conv4(32, 1e-3, 0.95, 5)
    found = list(layers(learner, learner.size()).values())
    assert len(found) == 5
    assert [s.start for s in found[1:]] == [s.stop for s in found[:-1]]
    assert (found[0].start, found[-1].stop) == (0, learner.get_flat_params().numel())
    assert found[0].stop == 32 * 27 + 32 * 3
    assert found[-1].stop - found[-1].start == learner.cls.weight.numel() + 5
    assert layers(learner, learner.cls.size()) == {"cls": slice(0, learner.cls.size())}


def test_a_classifier_that_adapts_alone_has_its_gates_only(master, tmp_path):
    save = tmp_path / "logs"
    assert train(master, save, "--adapt", "classifier", "--plots", "true") == 0
    trace = read_trace(Path(f"{save}-719"))
    assert list(trace["layers"]) == ["cls"]
    assert trace["forget"].shape[2] == trace["moved"].shape[2] == 1
    assert drawn(save) == ALL


class Two(FlatModule):
    """Another learner: two layers, the first with a normalisation."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 6), nn.LayerNorm(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(x))


def test_another_learner_has_its_own_layers(master, run, tmp_path):
    learners = (Two(), Two())
    assert list(layers(learners[0], learners[0].size())) == ["body.1", "head"]
    theta = learners[0].get_flat_params()
    metalearner = MetaLearner(4, 4, len(theta))
    metalearner.metalstm.init_cI(theta)
    dataset = EpisodeDataset(scan_split(master, "val"), 719, 3, 1, 2, 2, 16, "port", 2)
    folder = copied(run, tmp_path / "logs-719")
    write_trace(folder, record(dataset, learners, metalearner, 25, torch.device("cpu")))
    assert {path.stem for path in plots.plot(folder)} == ALL


def test_smoothing_is_numpys():
    values = np.array([1.0, np.nan, 4.0, 7.0, 2.0])
    mean, std = smooth(values, 3)
    assert mean[3] == pytest.approx(np.mean([4, 7, 2]))
    assert std[3] == pytest.approx(np.std([4, 7, 2]))
    assert mean[0] == 1.0
    assert list(smooth(np.array([5.0, 1.0, 2.0, 3.0, 9.0]), 5)[0][[0, -1]]) == [5, 9]  # as logged
    assert smooth(values, 1)[0][3] == 7.0


def test_metrics_are_read_in_order(run):
    events = read_metrics(Path(f"{run}-719"))
    assert [e["episode"] for e in events if e["event"] == "train"] == [1, 2, 3, 4]


def line(episode, rate, n=50):
    return {
        "event": "train",
        "episode": episode,
        "time": {"seconds": n / rate, "episodes_per_second": rate},
    }


def test_the_time_axis_has_a_fitting_unit_and_no_pauses():
    times, unit = training_time([line(50, 5), line(100, 5), line(150, 5 / 1000), line(200, 5)])
    assert unit == "seconds"
    assert list(times) == pytest.approx([10, 20, 30, 40])
    times, unit = training_time([line(50 * k, 1) for k in range(1, 11)])
    assert (unit, times[-1]) == ("minutes", pytest.approx(500 / 60))
    times, unit = training_time([line(5000 * k, 1, 5000) for k in range(1, 11)])
    assert (unit, times[-1]) == ("hours", pytest.approx(50000 / 3600))
    # a line after a resumption knows the seconds since then only; a run may continue another run's
    # checkpoint
    assert list(training_time([line(4050, 5), line(4100, 5, 10)])[0]) == pytest.approx([10, 20])


def test_chance_and_the_measures_are_in_the_curves(run):
    folder = Path(f"{run}-719")
    assert settings(folder)["n_class"] == 3
    figure = curves(folder)
    for axes, level in zip(figure.axes[::2], (np.log(3), 100 / 3), strict=True):
        assert any(np.allclose(found.get_ydata(), level) for found in axes.lines)
    legend = figure.legends[0]
    assert "support set" in legend.get_title().get_text()
    assert "guessing among 3 classes" in [text.get_text() for text in legend.get_texts()]
    plots.plt.close(figure)


def test_a_published_run_has_no_checkpoints(master, run, tmp_path):
    folder = copied(run, tmp_path / "logs-719")
    assert do_test(master, tmp_path / "logs", "--episode-test", "2") == 0
    shutil.rmtree(folder / "ckpts")
    assert settings(folder)["n_class"] == 3
    (folder / "results.json").unlink()
    assert settings(folder) == {}
    assert plot(tmp_path / "logs") == 0


def test_a_test_draws_its_histogram(master, run, tmp_path):
    folder = copied(run, tmp_path / "logs-719")
    shutil.rmtree(folder / "plots")
    assert do_test(master, tmp_path / "logs", "--episode-test", "2") == 0
    assert not (folder / "plots").exists()  # nor does the run want any
    (folder / "plots").mkdir()
    assert do_test(master, tmp_path / "logs", "--episode-test", "2", "--plots", "false") == 0
    assert drawn(tmp_path / "logs") == set()
    assert do_test(master, tmp_path / "logs", "--episode-test", "2") == 0
    assert drawn(tmp_path / "logs") == {"histogram"}


def test_the_histogram_has_all_tests(master, run, tmp_path):
    folder = copied(run, tmp_path / "logs-719")
    assert (
        do_test(
            master, tmp_path / "logs", "--episode-test", "2", "--shots", "1", "2", "3", "4", "5"
        )
        == 0
    )
    figure = histogram(folder)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title.split(",")[0] for title in titles] == [
        "1-shot",
        "2-shot",
        "3-shot",
        "4-shot",
        "5-shot",
    ]
    assert "trained on 1-shot" in figure.get_suptitle()
    plots.plt.close(figure)


def test_a_run_folder_can_be_named(master, run, tmp_path, capsys, monkeypatch):
    folder, none = copied(run, tmp_path / "elsewhere-719"), tmp_path / "none"
    expect(
        capsys,
        main.run(["--mode", "plot", "--resume", str(none)]),
        f"--resume {none}: there is neither",
        f"{none}-719",
    )
    monkeypatch.setattr(plots, "plot", lambda folder, wanted: [folder])
    without_seed = tmp_path / "elsewhere"
    for named in (folder, folder / "ckpts" / "meta-learner-2.pth.tar", without_seed):
        assert main.run(["--mode", "plot", "--resume", str(named)]) == 0
        assert capsys.readouterr().out == f"drawn: {folder}\n"
    for k, named in enumerate((folder, without_seed)):
        argv = [
            "--mode",
            "test",
            "--data-root",
            str(master),
            "--resume",
            str(named),
            "--cpu",
            "--episode-test",
            "2",
        ]
        assert main.run(argv) == 0
        assert f"testing {folder}/ckpts/meta-learner-best.pth.tar" in capsys.readouterr().out
        assert train(master, tmp_path / f"new {k}", "--resume", str(named), episode=5) == 0
        assert "resuming after episode 4 of 5" in capsys.readouterr().out


def test_wordnet_numbers_are_shown_as_words(run, tmp_path):
    """Those of mini-ImageNet and tiny64; whatever else a class is called stays as it is."""
    splits = [
        json.loads((ROOT / "data" / "splits" / f"{name}.json").read_text())
        for name in ("mini-imagenet", "tiny64")
    ]
    numbers = {number for lists in splits for members in lists.values() for number in members}
    assert len(numbers) > 170
    assert len({plain(number) for number in numbers} - numbers) == len(
        numbers
    )  # each has a name, and no other class has it
    assert plain("n01532829") == "house finch"
    trace = read_trace(Path(f"{run}-719")) | {
        "classes": np.array(["n02129165", "n99999999", "my cat"])
    }
    figure = plots.confusion("a run", trace)
    labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert (
        labels
        == [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()]
        == ["lion", "n99999999", "my cat"]
    )
    plots.plt.close(figure)


def test_an_older_record_has_numbers_for_names(run, tmp_path):
    folder = copied(run, tmp_path / "logs-719")
    trace = read_trace(folder)
    for name in ("layers", "classes"):
        del trace[name]
    write_trace(folder, trace | {name: trace[name][:, 1:] for name in ("support", "query")})
    assert list(read_trace(folder)["classes"]) == ["1", "2", "3"]
    assert {path.stem for path in plots.plot(folder)} == ALL


def test_a_folder_of_any_name(run, tmp_path, capsys):
    """Mathematics to Matplotlib, too long for a title, and in characters that no font here may
    have.
    """
    folder = copied(run, tmp_path / f"$\\frac$ \U00013000 {'long ' * 40}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {path.stem for path in plots.plot(folder)} == ALL


def test_words_are_shortened_in_their_middle():
    assert shorten("cats", 4) == "cats"
    assert shorten("abcdefghij", 7) == "abc…hij"
    assert shorten("IMG_20231001_123456.jpg", 12) == "IMG_20…6.jpg"[:6] + "…" + "6.jpg"
    assert shorten("猫" * 10, 20) == "猫" * 10
    assert shorten("猫" * 11, 20) == "猫" * 5 + "…" + "猫" * 4
    assert shorten("a\nb\udcff", 20) == "a?b\\udcff"


def test_a_font_for_what_the_first_one_lacks(capsys):
    assert fonts_for(["plain words"]) == ["DejaVu Sans"]
    assert capsys.readouterr().out == ""
    fonts_for(["\U000fffff \U000ffffe"])
    assert (
        capsys.readouterr().out
        == "note: no font here has \U000ffffe \U000fffff; boxes stand for them in pictures\n"
    )
    with style(["\u2112"]):  # only some of the fonts that Matplotlib brings along have it
        assert plots.plt.rcParams["font.family"][0] == "DejaVu Sans"


def test_tensorboard(master, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(master, tmp_path / "logs", "--tensorboard") == 0
    events = EventAccumulator(str(tmp_path / "logs-719" / "tensorboard"))
    events.Reload()
    lines = [
        json.loads(line)
        for line in (tmp_path / "logs-719" / "metrics.jsonl").read_text().splitlines()
    ]
    expected = [(e["episode"], e["mean_loss"]) for e in lines if e["event"] == "train"]
    assert [
        (s.step, pytest.approx(s.value, rel=1e-6)) for s in events.Scalars("train/loss")
    ] == expected
    assert {s.step for s in events.Scalars("val/accuracy")} == {2, 4}
