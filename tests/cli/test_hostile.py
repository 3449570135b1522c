"""Bad input of every kind: one line that names the culprit, exit code 2, nothing lost."""

import io
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_cli import ROOT, SMALL, expect, metrics, tensors, train

import main
from dataloader import load_image
from engine import checkpoint as checkpoints
from engine.flags import parse, settle
from fast import images
from utils import UserError

CHECKPOINT = "meta-learner-last.pth.tar"
FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def image_file(name, content):
    """A file in the place of one image."""

    def prepare(data, tmp_path):
        (data / "train" / "class 1" / "3.jpg").unlink()
        (data / "train" / "class 1" / name).write_bytes(content() if callable(content) else content)
        return []

    return prepare


def encoded(kind, size=(30, 30), **kwargs):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, kind, **kwargs)
    return buffer.getvalue()


def flags(text):
    return lambda data, tmp_path: text.split()


def place(change):
    def prepare(data, tmp_path):
        change(data, tmp_path)
        return []

    return prepare


def checkpoint(change):
    """Go on from a checkpoint that was tampered with."""

    def prepare(data, tmp_path):
        assert train(data, tmp_path / "begun") == 0
        content = tensors(tmp_path / "begun")
        changed = change(content)
        content = content if changed is None else changed
        path = tmp_path / "bad.pth.tar"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        return ["--resume", str(path), "--episode", "9"]

    return prepare


def altered(key, **changes):
    return checkpoint(lambda c: c[key].update(changes))


def meta(name, value):
    return checkpoint(lambda c: c["metalearner"].__setitem__(name, value))


def plain(change):
    """Without fast/, which looks at every image before it starts."""
    return lambda data, tmp_path: [*place(change)(data, tmp_path), "--plain"]


def junk(data, _):
    for path in data.glob("train/*/*.jpg"):
        path.write_bytes(b"junk")


def loop(data, _):
    (data / "train" / "class 1" / "loop.jpg").symlink_to("loop.jpg")


def dangling(data, _):
    (data / "train" / "class 1" / "gone.jpg").symlink_to("nowhere.jpg")


BAD = {
    # data
    "no root": (flags("--data-root nowhere"), "--data-root nowhere: no such folder"),
    "root is a file": (place(lambda d, t: (d.rename(t / "d"), d.write_text(""))), "no such folder"),
    "empty root": (place(lambda d, t: (d.rename(t / "d"), d.mkdir())), "train: no such folder"),
    "no train": (place(lambda d, t: (d / "train").rename(d / "training")), "train: no such folder"),
    "no val": (place(lambda d, t: (d / "val").rename(d / "dev")), "val: no such folder"),
    "empty split": (
        place(lambda d, t: ((d / "val").rename(d / "dev"), (d / "val").mkdir())),
        "val: holds no class folders",
    ),
    "split is a file": (
        place(lambda d, t: ((d / "val").rename(d / "dev"), (d / "val").write_text(""))),
        "val: no such folder",
    ),
    "empty class": (place(lambda d, t: (d / "train" / "void").mkdir()), "train/void: 0 images"),
    "stray file": (
        place(lambda d, t: (d / "train" / "list.csv").write_text("")),
        "list.csv: a file among the class folders",
    ),
    "text among images": (image_file("notes.txt", b"hello"), "notes.txt: not an image by its name"),
    "folder among images": (
        place(lambda d, t: (d / "train" / "class 1" / "sub").mkdir()),
        "sub: a folder where an image",
    ),
    "empty image": (image_file("3.jpg", b""), "3.jpg: not a readable image"),
    "truncated image": (
        image_file("3.jpg", lambda: encoded("JPEG", (60, 60))[:400]),
        "3.jpg: not a readable image",
    ),
    "truncated png": (
        image_file("3.png", lambda: encoded("PNG", (60, 60))[:60]),
        "3.png: not a readable image",
    ),
    "text as image": (image_file("3.jpg", b"hello"), "3.jpg: not a readable image"),
    "html as image": (image_file("3.jpg", b"<html>404</html>"), "3.jpg: not a readable image"),
    "bomb": (
        image_file("3.png", lambda: encoded("PNG", (20000, 10000))),
        "3.png: not a readable image",
    ),
    "name with newline": (image_file("a\nb.jpg", b"hello"), "a\\nb.jpg: not a readable image"),
    "name in other letters": (
        image_file("кот 猫.jpg", b"hello"),
        "кот 猫.jpg: not a readable image",
    ),
    "symlink loop": (place(loop), "loop.jpg: cannot be read"),
    "dangling symlink": (place(dangling), "gone.jpg: cannot be read"),
    "plainly a symlink loop": (plain(loop), "loop.jpg: "),
    "plainly a dangling symlink": (plain(dangling), "gone.jpg: "),
    "plainly a bad image": (plain(junk), "not a readable image"),
    "plainly a bad image, in a worker": (
        lambda d, t: [*plain(junk)(d, t), "--n-workers", "2"],
        "not a readable image",
    ),
    "class in two splits": (
        place(lambda d, t: (d / "val/val class 1").rename(d / "val/class 1")),
        "a class named class 1",
    ),
    "too many classes": (flags("--n-class 7"), "--n-class 7: the train split has only 6 classes"),
    "too many images": (flags("--n-eval 8"), "train/class 0: 8 images, but an episode takes 9"),
    # flags
    "zero shots": (flags("--n-shot 0"), "--n-shot: is '0', but must be a whole number from 1"),
    "negative shots": (flags("--n-shot -1"), "--n-shot: is '-1'"),
    "words for numbers": (flags("--episode many"), "--episode: is 'many'"),
    "not a number": (flags("--lr nan"), "--lr: is 'nan', but must be a number above 0"),
    "absurd rate": (flags("--lr 1e9"), "--lr: is '1e9'"),
    "tiny images": (
        flags("--image-size 15"),
        "--image-size: is '15', but must be a whole number from 16",
    ),
    "huge images": (flags("--image-size 100000"), "--image-size: is '100000'"),
    "unknown flag": (flags("--learning-rate 1"), "--learning-rate"),
    "unknown mode": (flags("--mode fly"), "--mode: invalid choice: 'fly'"),
    "crossed range": (flags("--bi-init 1 0"), "--bi-init 1 0"),
    "no value": (flags("--seed"), "--seed: expected one argument"),
    "both devices": (flags("--cpu --gpu 0"), "--cpu and --gpu 0"),
    "cache in a file": (
        lambda d, t: ((t / "f").write_text(""), ["--cache-dir", str(t / "f")])[1],
        "--cache-dir",
    ),
    "save in a file": (
        lambda d, t: ((t / "f").write_text(""), ["--save", str(t / "f" / "x")])[1],
        "--save",
    ),
    # checkpoints
    "no checkpoint": (
        flags("--resume nowhere.pth.tar"),
        "--resume nowhere.pth.tar: there is neither",
    ),
    "checkpoint is a folder": (lambda d, t: ["--resume", str(t)], "no such checkpoint"),
    "empty checkpoint": (checkpoint(lambda c: b""), "bad.pth.tar: not a checkpoint"),
    "text as checkpoint": (checkpoint(lambda c: b"hello"), "bad.pth.tar: not a checkpoint"),
    "another dict": (
        checkpoint(lambda c: {"model": c["metalearner"]}),
        "bad.pth.tar: not a checkpoint of this project",
    ),
    "negative count": (checkpoint(lambda c: c | {"episode": -1}), "bad.pth.tar: episode -1"),
    "another shape": (meta("metalstm.WF", torch.zeros(3, 1)), "metalstm.WF is [3, 1]"),
    "a tensor too many": (meta("extra", torch.zeros(1)), "has an unknown extra"),
    "whole numbers": (meta("metalstm.bF", torch.zeros(1, 1, dtype=torch.int64)), "metalstm.bF"),
    "not finite": (
        meta("metalstm.bF", torch.full((1, 1), float("nan"))),
        "metalstm.bF holds numbers that are not finite",
    ),
    "sparse": (meta("metalstm.bF", torch.zeros(1, 1).to_sparse()), "metalstm.bF"),
    "absurd hyper-parameter": (altered("hyper_parameters", n_shot=-3), "n_shot -3"),
    "hyper-parameter of another kind": (altered("hyper_parameters", lr="fast"), "lr fast"),
    "hyper-parameters are a list": (
        checkpoint(lambda c: c | {"hyper_parameters": [1]}),
        "hyper_parameters",
    ),
    "run state of another kind": (
        checkpoint(lambda c: c | {"run": 3}),
        "bad.pth.tar: its run state",
    ),
    "run state lacks something": (
        checkpoint(lambda c: c["run"].pop("data") and None),
        "bad.pth.tar: its run state",
    ),
    "origin of another kind": (
        checkpoint(lambda c: c | {"about": 3}),
        "bad.pth.tar: what it says about its training",
    ),
    "data root of another kind": (
        checkpoint(lambda c: c | {"data_root": 3}),
        "bad.pth.tar: what it says about its training",
    ),
    "optimiser lacks": (
        checkpoint(lambda c: c.pop("optim") and None),
        "optimiser's state does not fit",
    ),
    "other hyper-parameter": (
        lambda d, t: [*checkpoint(lambda c: c)(d, t), "--bi-init", "0", "0"],
        "--bi-init",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(data, tmp_path, capsys, name):
    prepare, line = BAD[name]
    extra = prepare(data, tmp_path)
    capsys.readouterr()
    expect(capsys, train(data, tmp_path / "logs", *extra), line)
    assert not list(tmp_path.rglob("logs-719/ckpts/*"))


def test_a_bad_image_in_a_worker_process_ends_the_program(data, tmp_path):
    """In one line, at once, and with nothing of it left running."""
    junk(data, tmp_path)
    command = [
        sys.executable,
        ROOT / "main.py",
        "--data-root",
        data,
        "--save",
        tmp_path / "logs",
        *SMALL,
        "--plain",
    ]
    run = subprocess.run(
        [*command, "--n-workers", "2"], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 2
    assert re.fullmatch(r"error: .*/train/class \d/\d\.jpg: not a readable image .*\n", run.stderr)


def test_the_table_is_long_enough():
    assert len(BAD) >= 40


def test_wrong_extension_and_odd_names_are_fine(data, tmp_path):
    folder = data / "train" / "class 1"
    (folder / "3.jpg").write_bytes(encoded("PNG"))
    (folder / "4.jpg").rename(folder / "with space ü\n猫.JPEG")
    (folder / "5.jpg").rename(tmp_path / "5.jpg")
    (folder / "5.jpg").symlink_to(tmp_path / "5.jpg")
    assert train(data, tmp_path / "logs") == 0


def test_files_that_vanish_while_training_are_not_missed(data, tmp_path, monkeypatch):
    assert train(data, tmp_path / "a") == 0
    original = main.train_episode

    def train_episode(*args):
        for path in data.rglob("*.jpg"):
            path.unlink()
        return original(*args)

    monkeypatch.setattr(main, "train_episode", train_episode)
    assert train(data, tmp_path / "b") == 0
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


class Command:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_hostile_pickle_in_the_runs_own_folder(data, tmp_path, capsys):
    assert train(data, tmp_path / "logs") == 0
    path = tmp_path / "logs-719" / "ckpts" / CHECKPOINT
    path.write_bytes(pickle.dumps({"episode": 1, "metalearner": Command(tmp_path / "ran")}))
    expect(
        capsys,
        train(data, tmp_path / "logs", "--resume", "auto"),
        f"{CHECKPOINT}: not a checkpoint",
    )
    assert not (tmp_path / "ran").exists()


@FEW
@given(
    st.lists(
        st.sampled_from(["--n-shot", "--lr", "--seed", "--pin-mem", "--mode", "--x"])
        | st.text(max_size=8)
    )
)
def test_any_flags(argv):
    argv = [a for a in argv if a not in ("-h", "--help")]
    try:
        settle(*parse(argv))
    except UserError as error:
        assert str(error)  # noqa: PT017
    except SystemExit as exit_:
        assert exit_.code == 0  # noqa: PT017


@FEW
@given(
    content=st.binary(max_size=300),
    head=st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a"]),
)
def test_any_bytes_as_an_image(tmp_path, content, head):
    path = tmp_path / "x.jpg"
    path.write_bytes(head + content)
    try:
        assert load_image(path).mode == "RGB"
    except UserError as error:
        assert "x.jpg: not a readable image" in str(error)  # noqa: PT017


@FEW
@given(
    content=st.binary(max_size=300),
    cut=st.integers(0, 2000),
    mode=st.sampled_from(["random", "cut", "flip"]),
)
def test_any_bytes_as_a_checkpoint(tmp_path, content, cut, mode):
    good = io.BytesIO()
    torch.save({"episode": 1, "metalearner": {"a": torch.zeros(3)}}, good)
    good = bytearray(good.getvalue())
    if mode == "flip":
        good[cut % len(good)] ^= 0xFF
    path = tmp_path / "x.pth.tar"
    path.write_bytes(
        {"random": content, "cut": bytes(good[: cut % len(good)]), "flip": bytes(good)}[mode]
    )
    try:
        content = checkpoints.load(path)
        assert content["episode"] == 1
        assert torch.equal(content["metalearner"]["a"], torch.zeros(3))
    except UserError as error:
        assert "x.pth.tar" in str(error)  # noqa: PT017


@FEW
@given(content=st.binary(max_size=300), name=st.sampled_from(["pixels.bin", "index.npz"]))
def test_any_bytes_as_a_cache(tmp_path_factory, content, name):
    root = tmp_path_factory.mktemp("any")
    folder = root / "train" / "a"
    folder.mkdir(parents=True)
    Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(20, 20, 3)).save(folder / "0.png")
    good = images.decoded("train", [folder / "0.png"], root, 16, None).image(0).copy()
    place = next(Path(root, images.FOLDER).glob("train-*"))
    (place / name).unlink()
    (place / name).write_bytes(content)
    assert (images.decoded("train", [folder / "0.png"], root, 16, None).image(0) == good).all()
