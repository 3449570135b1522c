"""Bad input of every kind: exit code 2, one line with the culprit, and nothing changed on disk."""

import io
import os
import pickle
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, metrics, refused, run_cli, run_test, succeeded, tensors, train, training
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import main
from engine import checkpoint as checkpoints
from engine.checkpoint import LAST
from engine.flags import parse, resolve
from fast import images
from imagefiles import load_image
from utils import UserError, file_lock

FEW = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


def listing(place):
    """The files and folders in a place but decoded images and locks, with the files' times."""
    paths = [p for p in place.rglob("*") if not {".decoded", "lock"} & set(p.parts)]
    return {(p, None if p.is_dir() else os.lstat(p).st_mtime_ns) for p in paths}


@pytest.fixture(scope="module")
def trained(master, tmp_path_factory):
    """A run of two episodes."""
    save = tmp_path_factory.mktemp("run") / "logs"
    succeeded(train(master, save, episode=2))
    return save


# ---- Flags ----

FLAGS = {
    "--n-shot 0": "--n-shot",
    "--n-shot -1": "--n-shot",
    "--episode many": "--episode",
    "--lr nan": "--lr",
    "--lr 1e9": "--lr",
    "--image-size 15": "--image-size",
    "--image-size 100000": "--image-size",
    "--learning-rate 1": "--learning-rate",
    "--mode fly": "--mode",
    "--seed": "--seed",
    "--bi-init 1 0": "--bi-init 1 0",
    "--cpu --gpu 0": "--gpu 0",
    "--plain --precision bf16": "--precision bf16",
    "--bn-shift 1": "--bn-shift 1",
    "--method linear-head": "--init-from",
    "--method linear-head --transductive true": "--transductive",
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


@pytest.mark.parametrize("words", FLAGS)
def test_flags(master, tmp_path, words):
    refused(train(master, tmp_path / "logs", *words.split()), FLAGS[words])
    assert not listing(tmp_path)


@pytest.mark.parametrize("flag", ["--data-root", "--cache-dir", "--resume", "--save"])
def test_names_that_are_too_long(master, tmp_path, flag):
    refused(train(master, tmp_path / "logs", flag, tmp_path / ("x" * 300)), "x" * 300)
    assert not listing(tmp_path)


def test_a_gpu_asked_for_and_absent(master, tmp_path):
    done = run_cli("--data-root", master, "--save", tmp_path / "logs", "--gpu", 0)
    refused(done, "--gpu 0")
    assert not listing(tmp_path)


def test_without_tensorboard(master, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused(train(master, tmp_path / "logs", "--tensorboard"), "--tensorboard")
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
IMAGES = {  # in the place of one image: name -> content
    "empty.jpg": lambda: b"",
    "truncated.jpg": lambda: encoded("JPEG")[:400],
    "truncated.png": lambda: encoded("PNG")[:60],
    "page.jpg": lambda: b"<html>404</html>",
    "bomb.gif": lambda: b"GIF89a" + struct.pack("<HH", 20000, 10000) + encoded("GIF")[10:],
    "кот 猫.jpg": lambda: b"hello",
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
    "newline": (lambda d: (d / CLASS / "a\nb.jpg").write_text("hello"), "a\\nb.jpg"),
    "in two splits": (lambda d: (d / "val/val class 1").rename(d / "val/class 2"), "class 2"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(data, tmp_path, name):
    (data / CLASS / "3.jpg").unlink()
    (data / CLASS / name).write_bytes(IMAGES[name]())
    before = listing(tmp_path)
    refused(train(data, tmp_path / "logs"), data / CLASS / name)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", DATA)
def test_data(data, tmp_path, name):
    change, culprit = DATA[name]
    change(data)
    before = listing(tmp_path)
    refused(train(data, tmp_path / "logs"), culprit)
    assert listing(tmp_path) == before


def damage_all(data):
    """Make all training images unreadable."""
    for path in data.glob("train/*/*.jpg"):
        path.write_bytes(b"junk")


def unlink_all(data):
    """Replace all training images by links to nowhere."""
    for path in data.glob("train/*/*.jpg"):
        path.unlink()
        path.symlink_to("nowhere.jpg")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", [damage_all, unlink_all])
def test_plain_which_decodes_late(data, tmp_path, damage, workers):
    damage(data)
    done = train(data, tmp_path / "logs", "--plain", "--n-workers", workers)
    refused(done, str(data / "train"))
    assert not (tmp_path / "logs-719" / "ckpts").exists()


def test_a_class_in_two_splits_is_refused_in_tests(data, trained):
    (data / "test/test class 1").rename(data / "test/class 3")
    refused(run_test(data, trained), "class 3")
    assert not (data / ".decoded").exists()  # before images are decoded


def test_a_class_that_the_checkpoint_was_trained_on_is_refused_in_tests(data, trained):
    """Also where the data set has no training classes."""
    shutil.rmtree(data / "train")
    (data / "test/test class 1").rename(data / "test/class 3")
    refused(run_test(data, trained), "class 3")


def test_a_missing_test_split(data, trained):
    (data / "test").rename(data / "holdout")
    refused(run_test(data, trained), data / "test")


def test_litter_and_odd_names_are_fine(data, tmp_path):
    folder = data / CLASS
    for name in (".DS_Store", "Thumbs.db", ".hidden.jpg"):
        (folder / name).write_bytes(b"junk")
        (data / "train" / name).write_bytes(b"junk")
    (folder / "3.jpg").write_bytes(encoded("PNG"))
    (folder / "4.jpg").rename(folder / "with space ü\n猫.JPEG")
    (folder / "5.jpg").rename(tmp_path / "5.jpg")
    (folder / "5.jpg").symlink_to(tmp_path / "5.jpg")
    succeeded(train(data, tmp_path / "logs", episode=1))


def test_files_that_vanish_while_training_are_not_missed(data, tmp_path, monkeypatch):
    succeeded(train(data, tmp_path / "a"))
    batches = main.Run.batches

    def vanish(run):
        shutil.rmtree(data / "train")
        return batches(run)

    monkeypatch.setattr(main.Run, "batches", vanish)
    succeeded(train(data, tmp_path / "b"))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


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


def test_a_folder_in_use(master, tmp_path):
    folder = tmp_path / "logs-719"
    folder.mkdir()
    with file_lock(folder / "lock"):
        refused(train(master, tmp_path / "logs"), folder, str(os.getpid()))
    assert [path.name for path in folder.iterdir()] == ["lock"]


@pytest.fixture
def mounted(tmp_path):
    """Mount a tiny file system in memory, where that is allowed."""
    place = tmp_path / "mounted"
    place.mkdir()

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", *options, "none", place]
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except FileNotFoundError:
            pytest.skip("no mount here")
        if done.returncode:
            pytest.skip("mounting is not allowed here")
        return place

    yield mount
    subprocess.run(["umount", place], capture_output=True, check=False)


def test_a_full_disk(master, mounted):
    place = mounted("size=64k")
    refused(train(master, place / "logs"), place / "logs-719")


def test_a_read_only_folder(master, mounted):
    place = mounted("ro,size=64k")
    refused(train(master, place / "logs"), place / "logs-719")


# ---- Checkpoints ----


def change(**values):
    """Replace parts of a checkpoint."""
    return lambda content: content | values


def change_part(part, **values):
    """Replace what one part of a checkpoint holds."""
    return lambda content: content | {part: content[part] | values}


def without(part, name=None):
    """Leave out a part of a checkpoint, or an entry of it."""

    def leave_out(content):
        table = dict(content[part]) if name else content
        table.pop(name or part)
        return content | {part: table} if name else table

    return leave_out


def change_tensor(value, name="metalstm.bF"):
    """Replace a tensor."""
    return change_part("metalearner", **{name: value})


ONE = torch.zeros(1, 1)
CHECKPOINTS = {  # what is done to a checkpoint -> a culprit beside the file
    "empty": (lambda content: b"", ""),
    "text": (lambda content: b"hello", ""),
    "another dict": (lambda content: {"model": content["metalearner"]}, "episode"),
    "negative count": (change(episode=-1), "episode -1"),
    "unknown mode": (change(mode="fly"), "fly"),
    "no tensors": (change(metalearner=3), "metalearner"),
    "shape": (change_tensor(torch.zeros(3, 1), "metalstm.WF"), "metalstm.WF"),
    "a tensor less": (without("metalearner", "metalstm.WF"), "metalstm.WF"),
    "a tensor more": (change_tensor(ONE, "extra"), "extra"),
    "whole numbers": (change_tensor(ONE.long()), "metalstm.bF"),
    "not finite": (change_tensor(ONE / 0), "metalstm.bF"),
    "sparse": (change_tensor(ONE.to_sparse()), "metalstm.bF"),
    "absurd flag": (change_part("hyper_parameters", n_shot=-3), "n_shot -3"),
    "flag of another kind": (change_part("hyper_parameters", lr="fast"), "lr fast"),
    "unknown flag": (change_part("hyper_parameters", speed=1), "speed"),
    "no flags": (change(hyper_parameters=[1]), "hyper_parameters"),
    "state": (change(run=3), ""),
    "state lacks": (without("run", "data"), ""),
    "about": (change(about=3), ""),
    "data root": (change(data_root=3), "data_root"),
    "no optimiser": (without("optim"), ""),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(master, trained, tmp_path, name):
    alter, culprit = CHECKPOINTS[name]
    content, path = alter(tensors(trained)), tmp_path / "bad.pth.tar"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    before = listing(tmp_path)
    refused(train(master, tmp_path / "logs", "--resume", path), path, culprit)
    assert listing(tmp_path) == before


def test_files_that_are_no_checkpoint(master, trained, tmp_path):
    last = trained.with_name("logs-719") / "ckpts" / LAST
    (tmp_path / "half").write_bytes(last.read_bytes()[:2000])
    for path in (tmp_path, ROOT / "LICENSE", tmp_path / "half"):
        refused(run_test(master, "nowhere", "--resume", path), path)


@pytest.mark.parametrize("words", ["--image-size 84", "--n-class 5", "--hidden-size 20"])
def test_flags_that_do_not_fit_a_checkpoint(master, trained, words):
    refused(
        run_test(master, trained, *words.split()), LAST.replace("last", "best"), words.split()[0]
    )


@pytest.mark.parametrize("words", ["--episode 1", "--bi-init 0 0", "--n-shot 2"])
def test_flags_that_cannot_continue_a_run(master, trained, words):
    before = listing(trained.parent)
    refused(train(master, trained, "--resume", "auto", *words.split()), words.split()[0])
    assert listing(trained.parent) == before


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
@given(
    st.lists(
        st.sampled_from(["--n-shot", "--lr", "--seed", "--pin-mem", "--mode", "--x"])
        | st.text(max_size=8)
    )
)
def test_any_flags(argv):
    try:
        resolve(parse([a for a in argv if a not in ("-h", "--help")]))
    except UserError as error:
        assert str(error)  # noqa: PT017


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
        assert "x.jpg" in str(error)  # noqa: PT017


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
    path.write_bytes({"random": content, "cut": good[: cut % len(good)], "flip": good}[mode])
    try:
        loaded = checkpoints.load(path)
        assert loaded["episode"] == 1
        assert torch.equal(loaded["metalearner"]["a"], torch.zeros(3))
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


# ---- The process's surroundings ----


@pytest.mark.slow
def test_a_path_that_is_no_text_an_ascii_console_and_no_home(master, tmp_path):
    root = tmp_path / os.fsdecode(b"images \xff")
    shutil.copytree(master, root)
    command = [sys.executable, ROOT / "main.py", *training(root, "logs", episode=1)]
    env = {"PYTHONIOENCODING": "ascii", "PATH": os.defpath, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "images \\udcff" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("redirection", "codes"), [(">&-", [0]), ("| head -n 1", [0, 141])])
def test_an_output_that_nobody_reads(master, tmp_path, redirection, codes):
    command = shlex.join([sys.executable, f"{ROOT}/main.py", *training(master, "logs", episode=1)])
    line = f"set -o pipefail; {command} {redirection}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode in codes
    assert done.stderr == ""


@pytest.mark.slow
def test_a_bad_image_in_a_worker_process_ends_the_program(data, tmp_path):
    damage_all(data)
    words = training(data, tmp_path / "logs", "--plain", "--n-workers", 2)
    command = [sys.executable, ROOT / "main.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    refused(done, data / "train")
