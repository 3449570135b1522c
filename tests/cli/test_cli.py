"""The command line on real JPEGs."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from around import results
from engine.flags import parse, settle
from engine.run import Run

ROOT = Path(__file__).resolve().parent.parent
TRIALS = ROOT.parent / "shared" / "trials"  # checkpoints of commit 6c46975, where there are some
SMALL = [
    "--cpu",
    "--image-size",
    "16",
    "--n-class",
    "3",
    "--n-shot",
    "1",
    "--n-eval",
    "2",
    "--epoch",
    "2",
]
SMALL += ["--hidden-size", "4", "--log-freq", "1", "--n-workers", "0", "--plots", "false"]


def train(data, save, *flags, episode=4, val_freq=2):
    argv = [
        "--mode",
        "train",
        "--data-root",
        str(data),
        "--save",
        str(save),
        "--episode",
        str(episode),
    ]
    return main.run([*argv, "--val-freq", str(val_freq), "--episode-val", "2", *SMALL, *flags])


def do_test(data, save, *flags):
    """Test a run; without ``data`` the run has to know where its images are."""
    root = [] if data is None else ["--data-root", str(data)]
    return main.run(
        ["--mode", "test", *root, "--save", str(save), "--cpu", "--n-workers", "0", *flags]
    )


def metrics(save, *events):
    """The lines of a run's metrics without their times."""
    lines = [
        json.loads(line) for line in Path(f"{save}-719", "metrics.jsonl").read_text().splitlines()
    ]
    return [
        {k: v for k, v in line.items() if k != "time"}
        for line in lines
        if not events or line["event"] in events
    ]


def tensors(save, name="meta-learner-last.pth.tar"):
    return torch.load(Path(f"{save}-719", "ckpts", name), weights_only=True)


@pytest.fixture(scope="module")
def trained(master, tmp_path_factory):
    save = tmp_path_factory.mktemp("run") / "logs"
    assert train(master, save) == 0
    return save


def test_a_run_is_a_folder(trained):
    folder = Path(f"{trained}-719")
    assert sorted(p.name for p in folder.iterdir()) == [
        "ckpts",
        "console.log",
        "lock",
        "metrics.jsonl",
    ]
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


def test_the_rate_counts_what_a_gpu_still_has_to_do(master, tmp_path, monkeypatch):
    """Its numbers come when it is done with the episodes, which the program has only handed over
    until then.
    """
    numbers = Run._numbers
    monkeypatch.setattr(Run, "_numbers", lambda run: time.sleep(0.5) or numbers(run))
    assert train(master, tmp_path / "logs", val_freq=0, episode=2) == 0
    lines = map(json.loads, Path(f"{tmp_path}/logs-719", "metrics.jsonl").read_text().splitlines())
    assert all(line["time"]["seconds"] > 0.5 for line in lines if line["event"] == "train")


@pytest.mark.parametrize("flags", [(), ("--n-workers", "2"), ("--val-freq", "0")])
def test_same_seed_same_metrics(master, trained, tmp_path, flags):
    assert train(master, tmp_path / "logs", *flags) == 0
    events = ("train",) if "--val-freq" in flags else ()
    assert metrics(tmp_path / "logs", *events) == metrics(trained, *events)


def test_another_seed_is_another_run(master, trained, tmp_path):
    save = tmp_path / "logs"
    assert train(master, save, "--seed", "53") == 0
    other = [
        json.loads(line)
        for line in (tmp_path / "logs-53" / "metrics.jsonl").read_text().splitlines()
    ]
    assert other[0]["loss"] != metrics(trained)[0]["loss"]


def test_running_mean_is_of_the_episodes_since_the_last_line(master, trained, tmp_path):
    assert train(master, tmp_path / "logs", "--log-freq", "3") == 0
    each = [m["loss"] for m in metrics(trained, "train")]
    lines = metrics(tmp_path / "logs", "train")
    assert [m["episode"] for m in lines] == [3, 4]
    assert lines[0]["mean_loss"] == pytest.approx(sum(each[:3]) / 3)
    assert lines[1]["mean_loss"] == pytest.approx(each[3])


@pytest.mark.parametrize("way", [(), ("--plain",)])
def test_resumed_training_reaches_the_same_bits(master, trained, tmp_path, way):
    save, undisturbed = tmp_path / "logs", tmp_path / "whole" if way else trained
    assert not way or train(master, undisturbed, *way) == 0
    assert train(master, save, *way, episode=2) == 0
    assert (
        train(
            master,
            save,
            *way,
            "--resume",
            str(tmp_path / "logs-719" / "ckpts" / "meta-learner-2.pth.tar"),
        )
        == 0
    )
    assert metrics(save) == metrics(undisturbed)
    whole, resumed = tensors(undisturbed), tensors(save)
    assert all(
        torch.equal(whole["metalearner"][k], resumed["metalearner"][k])
        for k in whole["metalearner"]
    )
    assert whole["best"] == resumed["best"]


def test_test_needs_only_the_data_root(master, trained, capsys):
    assert (
        main.run(
            [
                "--mode",
                "test",
                "--data-root",
                str(master),
                "--save",
                str(trained),
                "--episode-test",
                "5",
                "--cpu",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "meta-learner-best.pth.tar" in out
    assert re.search(
        r"test, 5 episodes: accuracy \d+\.\d\d ± \d+\.\d\d % \(std \d+\.\d\d\), loss \d\.\d{4}", out
    )
    # a given flag overrides the checkpoint's
    flags = [
        "--mode",
        "test",
        "--data-root",
        str(master),
        "--save",
        str(trained),
        "--cpu",
        "--n-eval",
        "9",
    ]
    assert main.run(flags) == 2
    assert "--n-eval 9" in capsys.readouterr().err


def test_testing_twice_gives_the_same_numbers(master, trained, capsys):
    lines = set()
    for workers in ("0", "2"):
        argv = [
            "--mode",
            "test",
            "--data-root",
            str(master),
            "--save",
            str(trained),
            "--episode-test",
            "4",
            "--cpu",
        ]
        assert main.run([*argv, "--n-workers", workers]) == 0
        lines |= {
            line for line in capsys.readouterr().out.splitlines() if line.startswith("test, ")
        }
    assert len(lines) == 1


def test_without_validation_the_last_is_tested(master, tmp_path, capsys):
    assert train(master, tmp_path / "logs", val_freq=0, episode=1) == 0
    argv = [
        "--mode",
        "test",
        "--data-root",
        str(master),
        "--save",
        str(tmp_path / "logs"),
        "--episode-test",
        "2",
    ]
    assert main.run(argv) == 0
    assert "meta-learner-last.pth.tar" in capsys.readouterr().out


def test_checkpoint_of_the_older_port(master, trained, tmp_path, capsys):
    content = tensors(trained)
    old = {k: content[k] for k in ("episode", "metalearner", "optim")}
    torch.save(old, tmp_path / "old.pth.tar")
    argv = [
        "--mode",
        "test",
        "--data-root",
        str(master),
        "--resume",
        str(tmp_path / "old.pth.tar"),
        "--episode-test",
        "2",
    ]
    assert main.run([*argv, *SMALL]) == 0
    assert "after 4 episodes" in capsys.readouterr().out


def of_commit_6c46975(content):
    """A checkpoint as that commit wrote it: without the flags that came later, with fingerprints of
    another form.
    """
    later = {
        "bn_scale",
        "pixels",
        "shuffle",
        "lstm_init",
        "bf_init",
        "filters",
        "meta_batch",
        "lr_decay",
        "grad_divisor",
    }
    later |= {"adapt", "bn_shift"}
    kept = ("episode", "metalearner", "optim", "hyper_parameters", "best", "run")
    old = {k: content[k] for k in kept}
    old["hyper_parameters"] = {
        k: v for k, v in content["hyper_parameters"].items() if k not in later
    }
    assert len(old["hyper_parameters"]) == 16  # as in shared/trials
    old["run"] = {
        **content["run"],
        "data": {"train": "49f54561-439397db", "val": "f64b2973-75ea7b32"},
    }
    return old


def test_checkpoint_of_before_the_later_flags(master, trained, tmp_path, capsys):
    """It tests to the same numbers as the checkpoint that says everything, and its results can be
    shown.
    """
    folder = tmp_path / "logs-719"
    (folder / "ckpts").mkdir(parents=True)
    best = "meta-learner-best.pth.tar"
    torch.save(of_commit_6c46975(tensors(trained, best)), folder / "ckpts" / best)
    said = []
    for save in (trained, tmp_path / "logs"):
        assert do_test(master, save, "--episode-test", "3") == 0
        said.append(capsys.readouterr().out)
    assert [line for line in said[0].splitlines() if line.startswith("test, ")] == [
        line for line in said[1].splitlines() if line.startswith("test, ")
    ]
    assert "note: " not in said[1]
    assert "bn-scale one" in said[1]  # as all of that time
    assert main.run(["--mode", "results", "--runs", str(folder)]) == 0


def test_a_training_of_before_is_continued_though_its_images_cannot_be_compared(
    master, data, trained, tmp_path, capsys
):
    folder, last = tmp_path / "logs-719", "meta-learner-last.pth.tar"
    shutil.copytree(f"{trained}-719", folder)
    old = of_commit_6c46975(tensors(trained))
    torch.save(old, folder / "ckpts" / last)
    expect(
        capsys,
        train(master, tmp_path / "logs", "--resume", "auto", "--bn-scale", "uniform", episode=5),
        "--bn-scale one",
    )
    assert train(master, tmp_path / "logs", "--resume", "auto", episode=5) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert (
        note
        == f"note: {folder}/ckpts/{last} is of an older version: nothing tells whether {master} still holds its images"
    )
    assert (
        "note: " not in (folder / "console.log").read_text()
    )  # which is to be that of an undisturbed run
    assert [m["episode"] for m in metrics(tmp_path / "logs", "train")] == [1, 2, 3, 4, 5]
    new = tensors(tmp_path / "logs")
    assert new["hyper_parameters"]["bn_scale"] == "one"
    # from now on they can be
    assert new["run"]["data"] == tensors(trained)["run"]["data"]
    (data / "val" / "val class 0" / "0.jpg").unlink()
    expect(
        capsys, train(data, tmp_path / "logs", "--resume", "auto", episode=6), "val: other images"
    )
    # nothing else is taken for that form
    for other in ("49f54561-439397d", "49f54561_439397db", "49F54561-439397DB", ""):
        torch.save(
            {**new, "run": {**new["run"], "data": {**new["run"]["data"], "train": other}}},
            folder / "ckpts" / last,
        )
        expect(
            capsys,
            train(master, tmp_path / "logs", "--resume", "auto", episode=6),
            "train: other images",
        )


@pytest.mark.skipif(not TRIALS.is_dir(), reason="no checkpoints of the trials here")
def test_checkpoints_of_the_trials(master, capsys):
    """Real ones, 84 pixels, 5-way 5-shot; their data set is not here, so fewer query images than
    they were trained with.
    """
    paths = sorted(TRIALS.glob("*.pth.tar"))
    assert paths
    for path in paths:
        assert (
            do_test(
                master, "nowhere", "--resume", str(path), "--episode-test", "2", "--n-eval", "3"
            )
            == 0
        )
        out = capsys.readouterr().out
        assert "note: tested with --n-eval 3, but trained with 15" in out
        assert re.search(r"^test, 2 episodes: accuracy \d", out, re.MULTILINE)


# ---- Where the images are ----


def test_the_training_s_images_are_found_again(data, tmp_path, capsys, monkeypatch):
    """Also when training was told a relative path and testing starts elsewhere."""
    monkeypatch.chdir(data.parent)
    assert train(data.name, tmp_path / "logs") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    assert do_test(None, tmp_path / "logs", "--episode-test", "2") == 0
    assert f"on {data}\n" in capsys.readouterr().out
    data.rename(tmp_path / "moved")
    expect(
        capsys,
        do_test(None, tmp_path / "logs", "--episode-test", "2"),
        f"--data-root {data}: no such folder",
    )
    assert do_test(tmp_path / "moved", tmp_path / "logs", "--episode-test", "2") == 0
    expect(
        capsys, do_test(None, tmp_path / "logs", "--data", "nothing"), "nothing: no such folder"
    )  # what is given counts


def test_a_class_in_two_splits_is_refused(data, tmp_path, capsys):
    (data / "val" / "val class 2").rename(data / "val" / "class 3")
    expect(
        capsys,
        train(data, tmp_path / "logs"),
        f"{data}: train/ and val/ both hold a class named class 3",
    )
    assert not (tmp_path / "logs-719").exists()
    assert not (data / ".decoded").exists()  # it is said at once, not after the images are decoded


def test_an_image_in_two_splits_is_noted(data, tmp_path, capsys):
    assert train(data, tmp_path / "a", episode=1) == 0
    assert "note: " not in capsys.readouterr().out
    ours, theirs = data / "val" / "val class 1" / "3.jpg", data / "train" / "class 4" / "3.jpg"
    ours.write_bytes(theirs.read_bytes()[:-1] + b"\0")  # same name and size only
    assert train(data, tmp_path / "b", episode=1) == 0
    assert "note: " not in capsys.readouterr().out
    shutil.copy(theirs, ours)
    assert train(data, tmp_path / "c", episode=1) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert str(ours) in notes[0]
    assert str(theirs) in notes[0]


# ---- Plain ----


def test_plain_says_so_and_is_plain(master, trained, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name == "fast" or name.startswith("fast.")]:
        monkeypatch.setitem(sys.modules, name, None)  # any import of it fails
    assert train(master, tmp_path / "logs", "--plain") == 0
    assert re.match(
        r"device: .*; plain PyTorch \(--plain\)$", capsys.readouterr().out.splitlines()[0]
    )
    assert do_test(master, trained, "--plain", "--episode-test", "2") == 0
    assert "; plain PyTorch (--plain)" in capsys.readouterr().out.splitlines()[0]


def test_the_fast_way_does_not_say_plain(master, tmp_path, capsys):
    assert train(master, tmp_path / "logs", episode=1) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("device: CPU, ")
    assert "plain" not in first


def test_plain_has_one_precision(master, tmp_path, capsys):
    expect(
        capsys,
        train(master, tmp_path / "logs", "--plain", "--precision", "bf16"),
        "--precision bf16",
        "--plain",
    )
    assert not (tmp_path / "logs-719").exists()


# ---- What is left behind ----


def test_a_failed_start_leaves_no_folder(data, tmp_path, capsys):
    save = tmp_path / "new" / "runs" / "logs"
    expect(capsys, train(tmp_path / "nowhere", save), "no such folder")
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine" / "old").mkdir(parents=True)
    expect(
        capsys, train(tmp_path / "nowhere", tmp_path / "mine" / "new" / "logs"), "no such folder"
    )
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["old"]
    (data / "train" / "class 1" / "3.jpg").write_bytes(b"junk")
    expect(capsys, train(data, save), "not a readable image")
    expect(
        capsys,
        train(data, save, "--resume", "none.pth.tar"),
        "--resume none.pth.tar: there is neither",
    )
    assert not (tmp_path / "new").exists()


def test_a_start_without_tensorboard_leaves_no_folder(master, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    expect(
        capsys,
        train(master, tmp_path / "logs", "--tensorboard"),
        "--tensorboard: the package is not installed",
    )
    assert not (tmp_path / "logs-719").exists()


def test_a_folder_with_something_in_it_stays(master, tmp_path, capsys):
    folder = tmp_path / "logs-719"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    expect(capsys, train(tmp_path / "nowhere", tmp_path / "logs"), "no such folder")
    assert (folder / "notes.txt").read_text() == "mine"
    assert train(master, tmp_path / "logs") == 0
    before = sorted(folder.rglob("*"))
    expect(
        capsys,
        train(tmp_path / "nowhere", tmp_path / "logs", "--resume", "auto", episode=9),
        "no such folder",
    )
    assert sorted(folder.rglob("*")) == before


def test_images_of_every_kind(data, tmp_path, capsys):
    """Greyscale, CMYK, palette, transparent, 16-bit, in PNG, GIF, WebP and JPEG, side by side in
    one class.
    """
    folder = data / "train" / "class 1"
    kinds = [
        ("L", "jpg"),
        ("CMYK", "jpg"),
        ("P", "png"),
        ("RGBA", "png"),
        ("I;16", "png"),
        ("RGB", "webp"),
        ("P", "gif"),
    ]
    for number, (mode, ending) in enumerate([*kinds, ("1", "bmp")]):
        image = Image.open(folder / f"{number}.jpg")
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        else:
            image = image.convert(mode)
        (folder / f"{number}.jpg").unlink()
        image.save(folder / f"new {number}.{ending}")
    for way in ((), ("--plain",)):
        capsys.readouterr()
        assert (
            train(data, tmp_path / f"logs{len(way)}", *way, episode=8) == 0
        )  # 8, for plain decodes only what is drawn
        assert len(list(folder.iterdir())) == 8
        assert capsys.readouterr().err == ""


def test_a_path_that_is_no_text(master, tmp_path):
    """A folder's name holds a byte that is no UTF-8, and the console knows ASCII only."""
    root = tmp_path / os.fsdecode(b"images \xff")
    shutil.copytree(master, root)
    command = [
        sys.executable,
        ROOT / "main.py",
        "--data-root",
        root,
        "--episode",
        "1",
        "--episode-val",
        "1",
        *SMALL,
    ]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    run = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900, check=False
    )
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
        argv = [
            "--mode",
            "test",
            "--data-root",
            str(master),
            "--episode-test",
            "2",
            "--cpu",
            "--resume",
            str(path),
        ]
        return main.run([*argv, *flags])

    best = Path(f"{trained}-719", "ckpts", "meta-learner-best.pth.tar")
    expect(capsys, attempt(tmp_path / "none.pth.tar"), "none.pth.tar: there is neither")
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
    expect(
        capsys,
        train(master, trained, "--resume", str(last), episode=1),
        "--episode 1",
        "ask for more",
    )
    code = main.run(
        ["--mode", "test", "--data-root", str(master), "--save", str(tmp_path / "nothing")]
    )
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
    expect(
        capsys,
        train(master, tmp_path / "logs", "--n-shot", "-1"),
        "--n-shot",
        "whole number from 1",
    )
    expect(capsys, train(master, tmp_path / "logs", "--image-size", "15"), "--image-size", "16")
    expect(capsys, train(master, tmp_path / "logs", "--frobnicate"), "--frobnicate")
    assert not (tmp_path / "logs-719").exists()


def test_a_gpu_asked_for_and_absent(master, tmp_path, capsys):
    assert (
        main.run(["--data-root", str(master), "--save", str(tmp_path / "logs"), "--gpu", "0"]) == 2
    )
    assert "--gpu 0: PyTorch sees 0 GPUs" in capsys.readouterr().err


def shell(script, *flags, cwd, **env):
    env = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PIP_NO_INDEX": "1", **env}
    command = ["bash", str(ROOT / "scripts" / script), *flags]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.mark.skipif(
    not Path(sys.prefix, "bin", "python").exists(),
    reason="no environment that the scripts could use",
)
@pytest.mark.parametrize("recipe", ["5s_5c", "1s_5c"])
def test_the_shell_scripts(master, tmp_path, recipe):
    small = [
        "--data-root",
        str(master),
        "--image-size",
        "16",
        "--n-class",
        "3",
        "--n-shot",
        "1",
        "--n-eval",
        "2",
        "--cpu",
    ]
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
AUTHORS = dict(
    augment="none", pixels="unit", shuffle="episode", lstm_init="authors", bf_init=[4.0, 5.0]
)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("train_5s_5c", dict(resume="auto")),
        ("train_1s_5c", dict(ONE_SHOT, episode=75000, resume="auto")),
        ("train_5s_5c_authors", dict(AUTHORS, save="logs-authors", resume="auto")),
        (
            "train_1s_5c_authors",
            dict(ONE_SHOT, **AUTHORS, save="logs-1shot-authors", episode=75000, resume="auto"),
        ),
        # the other hyper-parameters are those of the checkpoint
        ("eval_5s_5c", dict(mode="test", episode_test=[100, 250, 600])),
        ("eval_1s_5c", dict(mode="test", episode_test=[100, 250, 600], save="logs-1shot")),
        (
            "eval_5s_5c_authors",
            dict(mode="test", episode_test=[100, 250, 600], save="logs-authors"),
        ),
        (
            "eval_1s_5c_authors",
            dict(mode="test", episode_test=[100, 250, 600], save="logs-1shot-authors"),
        ),
    ],
)
def test_the_scripts_hold_the_published_recipes(recipe, expected):
    text = (ROOT / "scripts" / f"{recipe}.sh").read_text()
    argv = (
        text[text.index("main.py") :]
        .replace('main.py"', "")
        .replace("\\\n", " ")
        .replace('"$@"', "")
        .split()
    )
    assert vars(settle(*parse(argv))) == {**vars(settle(*parse([]))), **expected}


def test_what_is_worth_publishing(master, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    shutil.copytree(ROOT / "data" / "splits", tmp_path / "data" / "splits")
    copy = tmp_path / "run-719"
    shutil.copytree(f"{trained}-719", copy)
    export = ["--mode", "export", "--save", str(tmp_path / "run")]
    (copy / "results.json").unlink(missing_ok=True)
    expect(capsys, main.run(export), "run-719: no results.json there")
    assert do_test(master, tmp_path / "run", "--episode-test", "2") == 0
    assert main.run(export) == 0
    (folder,) = (tmp_path / "results").iterdir()
    assert folder.name.startswith(f"{master.name}-1s3c-port-")
    assert folder.name.endswith("-719")
    assert sorted(p.name for p in folder.iterdir()) == [
        "console.log",
        "meta-learner.pth.tar",
        "metrics.jsonl",
        "results.json",
    ]
    for path in folder.glob("*.*"):
        assert str(tmp_path).encode() not in path.read_bytes()
        assert str(master.parent).encode() not in path.read_bytes()
    capsys.readouterr()
    published = ["--resume", str(folder / "meta-learner.pth.tar"), "--episode-test", "3"]
    assert do_test(master, "nowhere", *published) == 0
    assert "3 episodes: accuracy" in capsys.readouterr().out
    expect(capsys, main.run(export), "exists already")


def test_without_pytorch_one_line_says_what_to_do(tmp_path):
    """-S leaves out all installed packages."""
    command = [sys.executable, "-S", ROOT / "main.py", "--mode", "test"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert (
        found.stderr
        == "error: torch is missing; run scripts/quickstart.sh, which installs what is needed\n"
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")],
)
def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise(given, expected):
    env = {
        k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    } | given
    code = "import main, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == expected


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="Linux only")
@pytest.mark.parametrize(
    ("nice", "policy"), [("0", "SCHED_OTHER"), ("5", "SCHED_OTHER"), ("10", "SCHED_IDLE")]
)
def test_a_niced_run_steps_aside_for_all_others(nice, policy):
    if os.getpriority(os.PRIO_PROCESS, 0) > 0 or os.sched_getscheduler(0) != os.SCHED_OTHER:
        pytest.skip("the tests are niced themselves")
    code = "import os, sys, runpy; sys.argv = ['main.py', '--help']\n"
    code += "try: runpy.run_path('main.py', run_name='__main__')\nfinally: os.write(2, b'%d' % os.sched_getscheduler(0))"
    command = ["nice", "-n", nice, sys.executable, "-c", code]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert int(found.stderr) == getattr(os, policy)
