"""The command line on real JPEGs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from options import parse, settle

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--cpu", "--image-size", "16", "--n-class", "3", "--n-shot", "1", "--n-eval", "2", "--epoch", "2"]
SMALL += ["--hidden-size", "4", "--log-freq", "1", "--n-workers", "0", "--plots", "false"]


def train(data, save, *flags, episode=4, val_freq=2):
    argv = ["--mode", "train", "--data-root", str(data), "--save", str(save), "--episode", str(episode)]
    return main.run([*argv, "--val-freq", str(val_freq), "--episode-val", "2", *SMALL, *flags])


def metrics(save, *events):
    """The lines of a run's metrics without their times."""
    lines = [json.loads(line) for line in Path(f"{save}-719", "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in lines if not events or line["event"] in events]


def tensors(save, name="meta-learner-last.pth.tar"):
    return torch.load(Path(f"{save}-719", "ckpts", name), weights_only=True)


@pytest.fixture(scope="module")
def trained(master, tmp_path_factory):
    save = tmp_path_factory.mktemp("run") / "logs"
    assert train(master, save) == 0
    return save


def test_a_run_is_a_folder(trained):
    folder = Path(f"{trained}-719")
    assert sorted(p.name for p in folder.iterdir()) == ["ckpts", "console.log", "lock", "metrics.jsonl"]
    assert sorted(p.name for p in (folder / "ckpts").iterdir()) == [
        "meta-learner-2.pth.tar",
        "meta-learner-4.pth.tar",
        "meta-learner-best.pth.tar",
        "meta-learner-last.pth.tar",
    ]
    assert [m["episode"] for m in metrics(trained, "train")] == [1, 2, 3, 4]
    assert [m["episode"] for m in metrics(trained, "val")] == [2, 4]
    assert tensors(trained)["episode"] == 4
    assert tensors(trained)["hyper_parameters"]["n_shot"] == 1
    best = max(metrics(trained, "val"), key=lambda m: m["accuracy"]["mean"])
    assert tensors(trained, "meta-learner-best.pth.tar")["episode"] == best["episode"]


@pytest.mark.parametrize("flags", [(), ("--n-workers", "2"), ("--val-freq", "0")])
def test_same_seed_same_metrics(master, trained, tmp_path, flags):
    assert train(master, tmp_path / "logs", *flags) == 0
    events = ("train",) if "--val-freq" in flags else ()
    assert metrics(tmp_path / "logs", *events) == metrics(trained, *events)


def test_another_seed_is_another_run(master, trained, tmp_path):
    save = tmp_path / "logs"
    assert train(master, save, "--seed", "53") == 0
    other = [json.loads(line) for line in (tmp_path / "logs-53" / "metrics.jsonl").read_text().splitlines()]
    assert other[0]["loss"] != metrics(trained)[0]["loss"]


def test_running_mean_is_of_the_episodes_since_the_last_line(master, trained, tmp_path):
    assert train(master, tmp_path / "logs", "--log-freq", "3") == 0
    each = [m["loss"] for m in metrics(trained, "train")]
    lines = metrics(tmp_path / "logs", "train")
    assert [m["episode"] for m in lines] == [3, 4]
    assert lines[0]["mean_loss"] == pytest.approx(sum(each[:3]) / 3)
    assert lines[1]["mean_loss"] == pytest.approx(each[3])


def test_resumed_training_reaches_the_same_bits(master, trained, tmp_path):
    save = tmp_path / "logs"
    assert train(master, save, episode=2) == 0
    assert train(master, save, "--resume", str(tmp_path / "logs-719" / "ckpts" / "meta-learner-2.pth.tar")) == 0
    assert metrics(save) == metrics(trained)
    whole, resumed = tensors(trained), tensors(save)
    assert all(torch.equal(whole["metalearner"][k], resumed["metalearner"][k]) for k in whole["metalearner"])
    assert whole["best"] == resumed["best"]


def test_test_needs_only_the_data_root(master, trained, capsys):
    assert main.run(["--mode", "test", "--data-root", str(master), "--save", str(trained), "--episode-test", "5", "--cpu"]) == 0
    out = capsys.readouterr().out
    assert "meta-learner-best.pth.tar" in out
    assert re.search(r"test, 5 episodes: accuracy \d+\.\d\d ± \d+\.\d\d % \(std \d+\.\d\d\), loss \d\.\d{4}", out)
    # a given flag overrides the checkpoint's
    flags = ["--mode", "test", "--data-root", str(master), "--save", str(trained), "--cpu", "--n-eval", "9"]
    assert main.run(flags) == 2
    assert "--n-eval 9" in capsys.readouterr().err


def test_testing_twice_gives_the_same_numbers(master, trained, capsys):
    lines = set()
    for workers in ("0", "2"):
        argv = ["--mode", "test", "--data-root", str(master), "--save", str(trained), "--episode-test", "4", "--cpu"]
        assert main.run([*argv, "--n-workers", workers]) == 0
        lines.add(capsys.readouterr().out.splitlines()[-1])
    assert len(lines) == 1


def test_without_validation_the_last_is_tested(master, tmp_path, capsys):
    assert train(master, tmp_path / "logs", val_freq=0, episode=1) == 0
    argv = ["--mode", "test", "--data-root", str(master), "--save", str(tmp_path / "logs"), "--episode-test", "2"]
    assert main.run(argv) == 0
    assert "meta-learner-last.pth.tar" in capsys.readouterr().out


def test_checkpoint_of_the_older_port(master, trained, tmp_path, capsys):
    content = tensors(trained)
    old = {k: content[k] for k in ("episode", "metalearner", "optim")}
    torch.save(old, tmp_path / "old.pth.tar")
    argv = ["--mode", "test", "--data-root", str(master), "--resume", str(tmp_path / "old.pth.tar"), "--episode-test", "2"]
    assert main.run([*argv, *SMALL]) == 0
    assert "after 4 episodes" in capsys.readouterr().out


def test_images_of_every_kind(data, tmp_path, capsys):
    """Greyscale, CMYK, palette, transparent, 16-bit, in PNG, GIF, WebP and JPEG, side by side in one class."""
    folder = data / "train" / "class 1"
    kinds = [("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("I;16", "png"), ("RGB", "webp"), ("P", "gif")]
    for number, (mode, ending) in enumerate([*kinds, ("1", "bmp")]):
        image = Image.open(folder / f"{number}.jpg")
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        else:
            image = image.convert(mode)
        (folder / f"{number}.jpg").unlink()
        image.save(folder / f"new {number}.{ending}")
    capsys.readouterr()
    assert train(data, tmp_path / "logs") == 0
    assert len(list(folder.iterdir())) == 8
    assert capsys.readouterr().err == ""


def test_a_path_that_is_no_text(master, tmp_path):
    """A folder's name holds a byte that is no UTF-8, and the console knows ASCII only."""
    root = tmp_path / os.fsdecode(b"images \xff")
    shutil.copytree(master, root)
    command = [sys.executable, ROOT / "main.py", "--data-root", root, "--episode", "1", "--episode-val", "1", *SMALL]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert "images \\udcff" in run.stdout
    assert "images \\udcff" in (tmp_path / "logs-719" / "console.log").read_text()


def expect(capsys, code, *words):
    """Exit code 2 and one line on stderr with all of the words."""
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert "Traceback" not in err


def test_data_that_cannot_serve(data, tmp_path, capsys):
    def attempt(*flags):
        return train(data, tmp_path / "logs", *flags)

    image = data / "train" / "class 1" / "3.jpg"
    expect(capsys, train(tmp_path / "nowhere", tmp_path / "logs"), "nowhere", "no such folder")
    expect(capsys, attempt("--n-class", "7"), "--n-class 7", "only 6 classes")
    expect(capsys, attempt("--n-eval", "8"), "train/class 0", "8 images", "9")
    good = image.read_bytes()
    image.write_bytes(good[: len(good) // 2])
    expect(capsys, attempt(), str(image), "not a readable image")
    image.write_bytes(b"")
    expect(capsys, attempt(), str(image), "not a readable image")
    image.write_bytes(b"\x89PNG but not really")
    expect(capsys, attempt(), str(image), "not a readable image")
    image.write_bytes(good)
    (image.parent / "notes.txt").write_text("hello")
    expect(capsys, attempt(), "notes.txt", "not an image by its name")
    (image.parent / "notes.txt").unlink()
    (data / "train" / "stray.jpg").write_bytes(good)
    expect(capsys, attempt(), "stray.jpg", "among the class folders")
    (data / "train" / "stray.jpg").unlink()
    (image.parent / "deeper").mkdir()
    expect(capsys, attempt(), "deeper", "a folder where an image should be")
    (image.parent / "deeper").rmdir()
    (data / "train" / "empty").mkdir()
    expect(capsys, attempt(), "train/empty", "0 images")
    (data / "train" / "empty").rmdir()
    for name in (".DS_Store", "Thumbs.db", ".hidden.jpg"):
        (image.parent / name).write_bytes(b"junk")
        (data / "train" / name).write_bytes(b"junk")
    (data / "val").rename(data / "validation")
    expect(capsys, attempt(), str(data / "val"), "no such folder")
    (data / "validation").rename(data / "val")
    shutil.rmtree(tmp_path / "logs-719", ignore_errors=True)
    assert attempt() == 0  # hidden files are ignored, and nothing of the above is left


def test_checkpoints_that_cannot_serve(master, trained, tmp_path, capsys):
    def attempt(path, *flags):
        argv = ["--mode", "test", "--data-root", str(master), "--episode-test", "2", "--cpu", "--resume", str(path)]
        return main.run([*argv, *flags])

    best = Path(f"{trained}-719", "ckpts", "meta-learner-best.pth.tar")
    expect(capsys, attempt(tmp_path / "none.pth.tar"), "none.pth.tar", "no such checkpoint")
    expect(capsys, attempt(tmp_path), str(tmp_path), "no such checkpoint")
    expect(capsys, attempt(ROOT / "LICENSE"), "LICENSE", "not a checkpoint")
    (tmp_path / "half").write_bytes(best.read_bytes()[:2000])
    expect(capsys, attempt(tmp_path / "half"), "half", "not a checkpoint")
    expect(capsys, attempt(best, "--image-size", "84"), "metalstm.cI", "--image-size")
    expect(capsys, attempt(best, "--n-class", "5"), "metalstm.cI", "--n-class")
    expect(capsys, attempt(best, "--hidden-size", "20"), "--hidden-size")
    content = tensors(trained)
    del content["metalearner"]["metalstm.WF"]
    torch.save(content, tmp_path / "lacking")
    expect(capsys, attempt(tmp_path / "lacking"), "lacks metalstm.WF")
    last = Path(f"{trained}-719", "ckpts", "meta-learner-last.pth.tar")
    expect(capsys, train(master, trained, "--resume", str(last), episode=1), "--episode 1", "ask for more")
    code = main.run(["--mode", "test", "--data-root", str(master), "--save", str(tmp_path / "nothing")])
    expect(capsys, code, "nothing-719/ckpts: no checkpoint there", "--resume")
    assert not (tmp_path / "nothing-719").exists()


def test_a_missing_test_split(data, trained, capsys):
    (data / "test").rename(data / "holdout")
    code = main.run(["--mode", "test", "--data-root", str(data), "--save", str(trained), "--cpu"])
    expect(capsys, code, f"{data}/test: no such folder")


@pytest.mark.parametrize("flag", ["--data-root", "--cache-dir", "--resume", "--save"])
def test_names_that_are_too_long(master, tmp_path, capsys, flag):
    code = train(master, tmp_path / "logs", flag, str(tmp_path / ("x" * 300)))
    expect(capsys, code, "x" * 300, "File name too long")


def test_flags_that_cannot_serve(master, tmp_path, capsys):
    expect(capsys, train(master, tmp_path / "logs", "--n-shot", "-1"), "--n-shot", "whole number from 1")
    expect(capsys, train(master, tmp_path / "logs", "--image-size", "15"), "--image-size", "16")
    expect(capsys, train(master, tmp_path / "logs", "--frobnicate"), "--frobnicate")
    assert not (tmp_path / "logs-719").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_asked_for_and_absent(master, tmp_path, capsys):
    assert main.run(["--data-root", str(master), "--save", str(tmp_path / "logs"), "--gpu", "0"]) == 2
    assert "--gpu 0: PyTorch sees 0 GPUs" in capsys.readouterr().err


def shell(script, *flags, cwd, **env):
    env = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PIP_NO_INDEX": "1", **env}
    command = ["bash", str(ROOT / "scripts" / script), *flags]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(not Path(sys.prefix, "bin", "python").exists(), reason="no environment that the scripts could use")
@pytest.mark.parametrize("recipe", ["5s_5c", "1s_5c"])
def test_the_shell_scripts(master, tmp_path, recipe):
    small = ["--data-root", str(master), "--image-size", "16", "--n-class", "3", "--n-shot", "1", "--n-eval", "2", "--cpu"]
    small += ["--plots", "false"]
    run = shell(f"train_{recipe}.sh", *small, "--episode", "2", "--episode-val", "2", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    folder = tmp_path / ("logs-719" if recipe == "5s_5c" else "logs-1shot-719")
    assert (folder / "ckpts" / "meta-learner-2.pth.tar").is_file()
    assert "device: CPU" in run.stdout
    test = shell(f"eval_{recipe}.sh", *small, "--episode-test", "2", cwd=tmp_path)
    assert test.returncode == 0, test.stderr
    assert "test, 2 episodes: accuracy" in test.stdout
    again = shell(f"train_{recipe}.sh", *small, "--episode", "2", cwd=tmp_path)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    bad = shell(f"train_{recipe}.sh", "--data-root", "nowhere", "--save", "other", cwd=tmp_path)
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert "nowhere" in bad.stderr


ONE_SHOT = dict(n_shot=1, epoch=12, batch_size=5, bn_momentum=0.9, save="logs-1shot")
AUTHORS = dict(augment="none", pixels="unit", shuffle="episode", lstm_init="authors", bf_init=[4.0, 5.0])


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("train_5s_5c", dict(resume="auto")),
        ("train_1s_5c", dict(ONE_SHOT, episode=75000, resume="auto")),
        ("train_5s_5c_authors", dict(AUTHORS, save="logs-authors", resume="auto")),
        ("train_1s_5c_authors", dict(ONE_SHOT, **AUTHORS, save="logs-1shot-authors", episode=75000, resume="auto")),
        ("eval_1s_5c", dict(ONE_SHOT, mode="test", episode_test=[100, 250, 600])),
        ("eval_5s_5c", dict(mode="test", episode_test=[100, 250, 600])),
    ],
)
def test_the_scripts_hold_the_published_recipes(recipe, expected):
    text = (ROOT / "scripts" / f"{recipe}.sh").read_text()
    argv = text[text.index("main.py") :].replace('main.py"', "").replace("\\\n", " ").replace('"$@"', "").split()
    assert vars(settle(*parse(argv))) == {**vars(settle(*parse([]))), **expected}
