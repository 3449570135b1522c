"""The command line on real JPEGs."""

import errno
import json
import os
import shutil
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import SMALL, metrics, refused, run_cli, run_test, succeeded, tensors, train
from PIL import Image

import main
from engine.checkpoint import BEST, LAST
from engine.evaluation import Evaluator
from engine.run import Run
from tools import plots


def test_a_run_is_a_folder(trained):
    folder = trained.with_name("logs-719")
    files = {p.name for p in folder.iterdir()}
    assert files - {"results.json"} == {"ckpts", "console.log", "lock", "metrics.jsonl"}
    names = {f"meta-learner-{n}.pth.tar" for n in (2, 4, "best", "last")}
    assert {p.name for p in (folder / "ckpts").iterdir()} == names
    assert [m["episode"] for m in metrics(trained, "train")] == [1, 2, 3, 4]
    assert [m["episode"] for m in metrics(trained, "val")] == [2, 4]
    assert tensors(trained)["episode"] == 4
    assert tensors(trained)["hyper_parameters"]["n_shot"] == 1


def test_the_best_checkpoint_is_the_best_by_validation(master, tmp_path, monkeypatch):
    """The first of equals."""
    accuracies = iter([[40.0, 60.0], [70.0, 50.0], [50.0, 70.0], [50.0, 40.0]])
    monkeypatch.setattr(Evaluator, "__call__", lambda *_: ([1.0, 1.0], next(accuracies)))
    succeeded(train(master, tmp_path / "logs", "--val-freq", 1))
    assert tensors(tmp_path / "logs", BEST)["episode"] == 2


def test_the_rate_counts_what_a_gpu_still_has_to_do(master, tmp_path, monkeypatch):
    """The program only hands episodes over; their numbers come when the GPU is done."""
    to_floats = Run._to_floats
    monkeypatch.setattr(Run, "_to_floats", lambda run: time.sleep(0.2) or to_floats(run))
    succeeded(train(master, tmp_path / "logs", "--val-freq", 0, "--episode", 1))
    line = (tmp_path / "logs-719" / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["time"]["seconds"] > 0.2


@pytest.mark.parametrize("flags", [("--n-workers", 2), ("--val-freq", 0)])
def test_same_seed_same_metrics(master, trained, tmp_path, flags):
    succeeded(train(master, tmp_path / "logs", *flags))
    event = "train" if "--val-freq" in flags else None
    assert metrics(tmp_path / "logs", event) == metrics(trained, event)


def test_another_seed_is_another_run(master, trained, tmp_path):
    """Without validation the last checkpoint is tested."""
    save = tmp_path / "logs"
    succeeded(train(master, save, "--seed", 53, "--episode", 1, "--val-freq", 0))
    assert metrics(save, seed=53)[0]["loss"] != metrics(trained)[0]["loss"]
    assert LAST in succeeded(run_test(None, save, "--seed", 53, "--episode-test", 2))


def test_running_mean_is_of_the_episodes_since_the_last_line(master, trained, tmp_path):
    succeeded(train(master, tmp_path / "logs", "--log-freq", 3))
    each = [m["loss"] for m in metrics(trained, "train")]
    lines = metrics(tmp_path / "logs", "train")
    assert [m["episode"] for m in lines] == [3, 4]
    means = [line["mean_loss"] for line in lines]
    assert means == pytest.approx([sum(each[:3]) / 3, each[3]])


def test_a_test_needs_no_flag_of_the_training(own):
    lines = set()
    for workers in (0, 2):
        out = succeeded(run_test(None, own, "--n-workers", workers, "--episode-test", 3))
        assert BEST in out
        lines |= {line for line in out.splitlines() if line.startswith("test, 3 episodes")}
    assert len(lines) == 1
    refused(run_test(None, own, "--n-eval", 9), "--n-eval 9")  # a given flag comes first


def test_a_checkpoint_of_the_port(master, trained, tmp_path):
    content = tensors(trained)
    theirs = {k: content[k] for k in ("episode", "metalearner", "optim")}
    torch.save(theirs, tmp_path / "port.pth.tar")
    flags = ("--resume", tmp_path / "port.pth.tar", *SMALL, "--episode-test", 2)
    assert "after 4 episodes" in succeeded(run_test(master, "nowhere", *flags))


def test_a_test_that_cannot_be_kept_is_refused_before_it_begins(own, tmp_path, monkeypatch):
    begun, folder = [], Path(f"{own}-719")
    monkeypatch.setattr(main, "run_test", lambda *_: begun.append(1))
    (folder / "results.json").write_text("{")
    refused(run_test(None, own), folder / "results.json")
    (folder / "results.json").unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)  # as on a read-only file system
    refused(run_test(None, own), folder)
    assert not begun
    shutil.move(folder / "ckpts" / BEST, tmp_path)
    succeeded(run_test(None, own, "--resume", tmp_path / BEST))  # not kept, with a note
    assert begun


# ---- Exports ----


@pytest.fixture
def export(own, tmp_path):
    """Exports a tested run: (its folder, the call)."""
    words = ("--mode", "export", "--save", own, "--to", tmp_path / "exported")
    succeeded(run_test(None, own, "--episode-test", 2))
    return Path(f"{own}-719"), lambda: run_cli(*words)


def test_what_is_published_is_what_was_tested(export, tmp_path):
    """A training that went on after its test has another best checkpoint."""
    best = export[0] / "ckpts" / BEST
    torch.save(torch.load(best, weights_only=True) | {"episode": 3}, best)
    refused(export[1](), best, "results.json")
    assert not (tmp_path / "exported").exists()


def test_the_name_of_an_export_fits_a_file_system(export, tmp_path):
    path = export[0] / "results.json"
    content = json.loads(path.read_text())
    content["tests"][0]["data"] = "../\N{SNOWMAN}é" + "é" * 120
    path.write_text(json.dumps(content))
    succeeded(export[1]())
    (folder,) = (tmp_path / "exported").iterdir()
    assert folder.name.endswith("-719")


def test_an_export_is_whole_or_not_there(export, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy", Mock(side_effect=[None, full]))
        refused(export[1](), str(tmp_path / "exported"), "--to")
    assert not list((tmp_path / "exported").iterdir())
    succeeded(export[1]())


def test_what_is_worth_publishing(master, export, tmp_path, monkeypatch):
    succeeded(export[1]())
    (folder,) = (tmp_path / "exported").iterdir()
    files = {"console.log", "meta-learner.pth.tar", "metrics.jsonl", "results.json"}
    assert {p.name for p in folder.iterdir()} == files
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
        assert str(master.parent).encode() not in path.read_bytes()
    done = run_test(master, "nowhere", "--resume", folder, "--episode-test", 2)
    assert f"note: {folder}" in succeeded(done)
    refused(export[1](), folder, "--to")
    draw = ("--mode", "plot", "--resume", folder, "--cpu", "--n-workers", 0)
    succeeded(run_cli(*draw))
    assert {p.stem for p in (folder / "plots").iterdir()} == {"curves", "histogram"}
    monkeypatch.setattr(plots, "plot", lambda folder: None)
    succeeded(run_cli(*draw, "--data-root", master))
    assert "images" not in np.load(folder / "trace.npz").files  # photographs


def test_no_photograph_is_published(master, export, tmp_path):
    draw = ("--mode", "plot", "--cpu", "--n-workers", 0, "--data-root", master)
    succeeded(run_cli(*draw, "--resume", export[0]))
    assert (export[0] / "plots" / "confusion.png").exists()
    succeeded(export[1]())
    (folder,) = (tmp_path / "exported").iterdir()
    assert not list(folder.rglob("confusion*"))
    assert "images" not in np.load(folder / "trace.npz").files


# ---- Where the images are ----


def test_the_images_of_the_training_are_found_again(data, tmp_path, monkeypatch):
    """Also when training was told a relative path, and testing starts elsewhere."""
    save = tmp_path / "logs"
    monkeypatch.chdir(data.parent)
    succeeded(train(data.name, save, "--episode", 1))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    succeeded(run_test(None, save, "--episode-test", 2))
    data.rename(tmp_path / "moved")
    refused(run_test(None, save), str(data))
    succeeded(run_test(tmp_path / "moved", save, "--episode-test", 2))
    refused(run_test(None, save, "--data", "nothing"), "nothing")  # what is given counts


def test_images_under_odd_names(data, tmp_path):
    """And of another kind than their names say; their content is tested with the data loader."""
    folder = data / "train" / "class 1"
    (folder / "0.jpg").rename(tmp_path / "0.jpg")
    (folder / "ü\n猫.JPG").symlink_to(tmp_path / "0.jpg")
    Image.new("RGB", (20, 20)).save(folder / "1.jpg", "PNG")
    succeeded(train(data, tmp_path / "logs", episode=1))  # which decodes all


# ---- Plain ----


def test_plain_is_plain(master, trained, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "fast"]:
        monkeypatch.setitem(sys.modules, name, None)  # any import of it fails
    for done in (
        train(master, tmp_path / "a", "--plain"),
        run_test(None, trained, "--plain", "--episode-test", 2),
    ):
        assert "(--plain)" in succeeded(done).splitlines()[0]
