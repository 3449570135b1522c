"""Bad input of every kind: exit code 2, one line with the culprit, and nothing changed on disk."""

import io
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from conftest import ROOT, refused, run_cli, run_test, succeeded, tensors, train, training
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from engine import checkpoint as checkpoints
from engine.checkpoint import BEST, LAST
from utils import UserError

FEW = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


def listing(place):
    """The files and folders in a place but decoded images and locks, with the files' times."""
    paths = [p for p in place.rglob("*") if not {".decoded", "lock"} & set(p.parts)]
    return {(p, None if p.is_dir() else os.lstat(p).st_mtime_ns) for p in paths}


# ---- Flags ----

FLAGS = {  # those that meet files; engine/test_flags.py has what is bad by itself
    "--plain --precision bf16": "--precision bf16",
    "--bn-shift 1": "--bn-shift 1",
    "--gpu 0": "--gpu 0",
    "--method linear-head": "--init-from",
    "--meta-batch 3": "--episode 4",
    "--n-class 7": "--n-class 7",
    "--n-eval 8": "class 0",
    "--data-root nowhere": "nowhere",
    "--resume nowhere.pth.tar": "--resume nowhere.pth.tar",
    "--init-from nowhere": "--init-from nowhere",
    "--mode test": "logs-719/ckpts",
    "--mode predict": "logs-719/ckpts",
    "--mode plot": "logs-719",
    "--mode results": "logs-719",
    "--mode export": "logs-719",
}
TOO_LONG = "x" * 300
FLAGS |= {f"{f} {TOO_LONG}": TOO_LONG for f in ("--data-root", "--cache-dir", "--resume", "--save")}


@pytest.mark.parametrize("words", FLAGS)
def test_flags(master, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    argv = training(master, tmp_path / "logs", *words.split())
    if "--gpu" in words:
        argv.remove("--cpu")
    refused(run_cli(*argv), FLAGS[words])
    assert not listing(tmp_path)


# ---- Data ----


def encoded(kind):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    Image.new("RGB", (60, 60)).save(buffer, kind)
    return buffer.getvalue()


def replace(folder, content=None):
    """Put a file of that content, or else an empty folder, in a folder's place."""
    folder.rename(folder.parent / "away")
    folder.mkdir() if content is None else folder.write_bytes(content)


CLASS = "train/class 1"
IMAGES = {  # a file beside the images -> its content
    "empty.jpg": b"",
    "truncated.jpg": encoded("JPEG")[:400],
    "truncated.png": encoded("PNG")[:60],
    "page.jpg": b"<html>404</html>",
    "bomb.gif": b"GIF89a" + struct.pack("<HH", 20000, 10000) + encoded("GIF")[10:],
    "кот 猫.jpg": b"hello",
    "a\nb.jpg": b"hello",
}
DATA = {  # what is done to the data -> the culprit
    "root is a file": (lambda d: replace(d, b""), "data"),
    "empty root": (replace, "data/train"),
    "split is a file": (lambda d: replace(d / "train", b""), "data/train"),
    "no val": (lambda d: (d / "val").rename(d / "dev"), "data/val"),
    "empty split": (lambda d: replace(d / "val"), "val"),
    "empty class": (lambda d: (d / "train/void").mkdir(), "train/void"),
    "stray file": (lambda d: (d / "train/list.csv").write_text(""), "train/list.csv"),
    "folder": (lambda d: (d / CLASS / "sub").mkdir(), f"{CLASS}/sub"),
    "loop": (lambda d: (d / CLASS / "loop.jpg").symlink_to("loop.jpg"), "loop.jpg"),
    "dangling": (lambda d: (d / CLASS / "gone.jpg").symlink_to("nowhere.jpg"), "gone.jpg"),
    "pipe": (lambda d: os.mkfifo(d / CLASS / "pipe.jpg"), f"{CLASS}/pipe.jpg"),
    "link to a class": (lambda d: (d / "test/x").symlink_to(d / "train/class 2"), "test/x"),
    "in two splits": (lambda d: (d / "val/val class 1").rename(d / "val/class 2"), "class 2"),
}


@pytest.mark.parametrize("name", [*IMAGES, *DATA])
def test_data(data, tmp_path, name):
    if name in IMAGES:
        culprit = data / CLASS / name
        culprit.write_bytes(IMAGES[name])
    else:
        change, culprit = DATA[name]
        change(data)
    before = listing(tmp_path)
    refused(train(data, tmp_path / "logs"), str(culprit).replace("\n", "\\n"))
    assert listing(tmp_path) == before


@pytest.mark.parametrize("workers", [0, 2])
def test_plain_which_decodes_late(data, tmp_path, workers):
    for path in data.glob("train/*/*.jpg"):
        path.write_bytes(b"junk")
    done = train(data, tmp_path / "logs", "--plain", "--n-workers", workers)
    refused(done, str(data / "train"))
    assert not (tmp_path / "logs-719" / "ckpts").exists()


@pytest.mark.parametrize(
    ("old", "new", "culprit"),
    [("test/test class 1", "test/class 3", "class 3"), ("test", "holdout", "test")],
)
def test_a_test_split(data, trained, old, new, culprit):
    (data / old).rename(data / new)
    refused(run_test(data, trained), culprit)
    assert not (data / ".decoded").exists()  # before images are decoded


def test_a_class_that_the_checkpoint_was_trained_on_is_refused_in_tests(data, trained):
    """Also where the data set has no training classes."""
    shutil.rmtree(data / "train")
    (data / "test/test class 1").rename(data / "test/class 3")
    refused(run_test(data, trained), "class 3")


# ---- Folders ----


def test_a_failed_start_leaves_what_was_there(master, tmp_path):
    (tmp_path / "logs-719").mkdir()
    (tmp_path / "logs-719" / "notes.txt").write_text("mine")
    for save in ("logs", "new/runs/logs"):
        refused(train(tmp_path / "nowhere", tmp_path / save), "nowhere")
        assert {p.name for p in tmp_path.rglob("*")} - {"lock"} == {"logs-719", "notes.txt"}
    succeeded(train(master, tmp_path / "logs", episode=1))


@pytest.mark.parametrize("flag", ["--save", "--cache-dir"])
def test_a_folder_in_a_file(master, tmp_path, flag):
    (tmp_path / "file").write_text("")
    refused(train(master, tmp_path / "logs", flag, tmp_path / "file" / "x"), tmp_path / "file")
    assert {path.name for path in tmp_path.rglob("*")} == {"file"}


# ---- Checkpoints ----


def merged(content, changes):
    """A table with changes, table by table; ... takes an entry away."""
    kept = {k: v for k, v in content.items() if k not in changes}
    for k, v in changes.items():
        if v is not ...:
            inner = isinstance(v, dict) and isinstance(content.get(k), dict)
            kept[k] = merged(content[k], v) if inner else v
    return kept


ONE, BF, WF = torch.zeros(1, 1), "metalstm.bF", "metalstm.WF"
CHECKPOINTS = {  # a file's content, or what is changed -> a culprit beside the file
    "empty": (b"", ""),
    "text": (b"hello", ""),
    "another dict": ({"episode": None}, "episode"),
    "negative count": ({"episode": -1}, "episode -1"),
    "unknown mode": ({"mode": "fly"}, "fly"),
    "no tensors": ({"metalearner": 3}, "metalearner"),
    "shape": ({"metalearner": {WF: torch.zeros(3, 1)}}, WF),
    "a tensor less": ({"metalearner": {WF: ...}}, WF),
    "a tensor more": ({"metalearner": {"extra": ONE}}, "extra"),
    "whole numbers": ({"metalearner": {BF: ONE.long()}}, BF),
    "not finite": ({"metalearner": {BF: ONE / 0}}, BF),
    "sparse": ({"metalearner": {BF: ONE.to_sparse()}}, BF),
    "absurd flag": ({"hyper_parameters": {"n_shot": -3}}, "n_shot -3"),
    "flag of another kind": ({"hyper_parameters": {"lr": "fast"}}, "lr fast"),
    "unknown flag": ({"hyper_parameters": {"speed": 1}}, "speed"),
    "no flags": ({"hyper_parameters": [1]}, "hyper_parameters"),
    "state": ({"run": 3}, ""),
    "state lacks": ({"run": {"data": ...}}, ""),
    "state, negative": ({"run": {"validated": -1}}, ""),
    "state, uneven": ({"run": {"losses": [1.0]}}, ""),
    "state, no list": ({"run": {"skipped": {}}}, ""),
    "state, whole numbers": ({"run": {"losses": [1], "accuracies": [1.0]}}, ""),
    "state, text": ({"run": {"losses": ["1"], "accuracies": [1.0]}}, ""),
    "state, data": ({"run": {"data": {"train": 3}}}, ""),
    "state, logs": ({"run": {"logs_end_at": {"console.log": "12"}}}, ""),
    "state, unknown": ({"run": {"unknown": 3}}, ""),
    "about": ({"about": 3}, ""),
    "data root": ({"data_root": 3}, "data_root"),
    "no optimiser": ({"optim": ...}, ""),
    "a foreign optimiser": ({"optim": {"state": ..., "param_groups": []}}, ""),
    "absurd run flag": ({"run_flags": {"episode_val": 0}}, "episode_val 0"),
    "unknown run flag": ({"run_flags": {"lr": 0.1}}, "lr"),
    "a number for a run flag": ({"run_flags": {3: 4}}, "run_flags"),
    "no run flags": ({"run_flags": [1]}, "run_flags"),
}
PARTS = ("hyper_parameters", "run_flags", "about", "classes", "data_root", "run")
CHECKPOINTS |= {f"{part} is None": ({part: None}, part) for part in PARTS}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(master, trained, tmp_path, name):
    (change, culprit), path = CHECKPOINTS[name], tmp_path / "bad.pth.tar"
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        torch.save(merged(tensors(trained), change), path)
    before = listing(tmp_path)
    refused(train(master, tmp_path / "logs", "--resume", path, episode=6), path, culprit)
    assert listing(tmp_path) == before


def test_files_that_are_no_checkpoint(master, trained, tmp_path):
    raw = bytearray(Path(f"{trained}-719", "ckpts", LAST).read_bytes())
    (tmp_path / "half").write_bytes(raw[: len(raw) // 2])
    raw[len(raw) // 2] ^= 1
    (tmp_path / "a bit").write_bytes(raw)
    for path in (tmp_path, ROOT / "LICENSE", tmp_path / "half", tmp_path / "a bit"):
        refused(run_test(master, "nowhere", "--resume", path), path)


@pytest.mark.parametrize("words", ["--image-size 84", "--n-class 5", "--hidden-size 5"])
def test_flags_that_do_not_fit_a_checkpoint(master, trained, words):
    refused(run_test(master, trained, *words.split()), BEST, words.split()[0])


class Command:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [lambda c: pickle.dumps(c), None], ids=["pickle", "torch"])
def test_a_foreign_pickle_is_not_executed(master, trained, tmp_path, write):
    path, content = tmp_path / "bad", {"episode": 1, "metalearner": Command(tmp_path / "ran")}
    path.write_bytes(write(content)) if write else torch.save(content, path)
    refused(train(master, tmp_path / "logs", "--resume", path), path)
    refused(run_test(master, "nowhere", "--resume", path), path)
    assert {p.name for p in tmp_path.iterdir()} == {"bad"}


# ---- Any bytes at all ----


@FEW
@given(content=st.binary(max_size=300), at=st.integers(0, 2000), how=st.sampled_from("rcf"))
def test_any_bytes_as_a_checkpoint(tmp_path, content, at, how):
    """Random ones, a cut file, and a flipped byte."""
    good = io.BytesIO()
    torch.save({"episode": 1, "metalearner": {"a": torch.zeros(3)}}, good)
    good = bytearray(good.getvalue())
    if how == "f":
        good[at % len(good)] ^= 0xFF
    path = tmp_path / "x.pth.tar"
    path.write_bytes({"r": content, "c": good[: at % len(good)], "f": good}[how])
    try:
        loaded = checkpoints.load(path)
        assert loaded["episode"] == 1
        assert torch.equal(loaded["metalearner"]["a"], torch.zeros(3))
    except UserError as error:
        assert "x.pth.tar" in str(error)  # noqa: PT017
