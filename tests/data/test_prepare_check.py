"""data/prepare.py --check: what a data set is, and what is wrong with it."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess

import prepare_formats as formats
import pytest
from PIL import Image
from prepare_formats import CLASSES, SPLITS, make, run, splits

from data.imagefiles import load_image
from data.layout import scan_split
from tools.predict import gather
from utils import UserError

VAL = CLASSES["val"][0]


@pytest.fixture
def check(run):
    """Run --check: (exit code, stdout)."""

    def check(folder):
        code, out, err = run("--check", folder)
        assert err == ""
        return code, out

    return check


@pytest.fixture
def three(monkeypatch):
    """A mini-ImageNet of three images a class."""
    assert (splits.MINI.per_class, splits.TINY.per_class) == (600, 450)
    monkeypatch.setattr("data.formats.splits.MINI.per_class", 3)


def row(out, split):
    """The cells of a split's line of the table."""
    return next(line.split() for line in out.splitlines() if line.startswith(f"{split} "))


def verdict(out):
    return out.splitlines()[4]


def lines(out, start):
    return [line for line in out.splitlines() if line.startswith(start)]


def a_file(at, split, cls=0):
    return sorted((at / split / CLASSES[split][cls]).iterdir())[0]


def own(at, name="own", classes=2, images=3):
    """A data set of other classes."""
    keys = itertools.product(range(3), range(classes), range(images))
    return formats.write(
        at, {f"{name}/{SPLITS[s]}/{s}-{c}/{i}.png": formats.png(s, c, i) for s, c, i in keys}
    )


def test_mini_imagenet_is_called_by_its_name(three, tmp_path, check, monkeypatch):
    source = make("mini_folder", tmp_path)
    code, out = check(source)
    assert (code, verdict(out)) == (0, "mini-ImageNet, 64/16/20 x 3")
    assert row(out, "train")[:5] == ["train", "64", "192", "3", "20x20"]
    assert row(out, "val")[:4] == ["val", "16", "48", "3"]
    assert row(out, "test")[:4] == ["test", "20", "60", "3"]
    fingerprints = {split: row(out, split)[-1] for split in SPLITS}
    monkeypatch.setattr("data.formats.splits.MINI.fingerprints", fingerprints)
    assert "the published images" in verdict(check(source)[1])


def test_what_is_missing_or_too_much_is_named(three, tmp_path, check):
    source = make("mini_folder", tmp_path)
    lost, moved, short = CLASSES["train"][5], CLASSES["val"][1], CLASSES["test"][7]
    shutil.rmtree(source / "train" / lost)
    (source / "val" / moved).rename(source / "test" / moved)
    a_file(source, "test", 7).unlink()
    formats.write(source, {"test/n00000001/1.jpg": formats.photograph(5)})
    code, out = check(source)
    assert code == 1
    assert "not mini-ImageNet" in verdict(out)
    findings = "".join(lines(out, "- "))
    for name in (f"train/{lost}", f"val/{moved}", f"test/{moved}", "test/n00000001", short):
        assert name in findings


@pytest.mark.parametrize(
    ("spoil", "culprit"),
    [
        (lambda at: shutil.copytree(a_file(at, "val").parent, at / "train" / VAL), VAL),
        (lambda at: (at / "test/x").symlink_to(a_file(at, "val").parent), "test/x"),
        (lambda at: os.mkfifo(at / "val" / VAL / "pipe.jpg"), "pipe.jpg"),
        (lambda at: a_file(at, "test").write_bytes(b"\xff\xd8\xff none"), "00000002.jpg"),
        (lambda at: (at / "train" / "n00000001").mkdir(), "train/n00000001"),
        (lambda at: formats.write(at, {"val/x.txt": b"", "val/a/b/c.jpg": b""}), "val/a/b/c.jpg"),
        (lambda at: a_file(at, "val").write_bytes(formats.photograph(77)), "changed"),
    ],
    ids=["twice", "linked", "pipe", "no image", "empty", "strays", "changed"],
)
def test_faults_are_reported(spoil, culprit, tmp_path, run, check):
    dest = tmp_path / "out"
    assert run(make("mini_folder", tmp_path))[0] == 0
    formats.write(dest, {".decoded/train/1.npy": b"x", "train/.DS_Store": b"x"})  # no fault
    before = check(dest)[1]
    spoil(dest)
    code, out = check(dest)
    assert code == 1
    assert any(culprit in line for line in lines(out, "- ") if line not in before)


def test_check_training_and_prediction_have_one_verdict(tmp_path, check, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)  # above this Pillow warns
    monkeypatch.setattr("warnings.warn", lambda *_, **__: None)  # pytest shows what is ignored
    small, large, bomb = (Image.new("RGB", (side, side)) for side in (45, 155, 210))
    sound = {"a.gif": formats.encoded(small, "GIF"), "a.jfif": formats.encoded(small, "JPEG")}
    sound["108 megapixels.jpg"] = formats.encoded(large, "JPEG")
    bad = {"bomb.png": formats.encoded(bomb, "PNG"), "a.jpg": b"\xff\xd8\xff none"}
    at = own(tmp_path)
    folder = at / "train" / "0-0"
    formats.write(folder, {**sound, **bad, "b.HEIC": b"x", "@eaDir/c.jpg": b"x"})
    code, out = check(at)
    assert code == 1
    assert "1 files of unknown format: .heic" in out
    files = scan_split(at, "train").files[0]
    assert files == gather([str(folder)], [])
    assert gather([str(folder)], files[1:]) == files[:1]
    for path in files:
        assert (path.name in out) == (path.name in bad)
        with pytest.raises(UserError) if path.name in bad else contextlib.nullcontext():
            load_image(path)  # as training and prediction do


def test_an_image_that_is_there_twice_is_a_note(tmp_path, check):
    source = make("mini_folder", tmp_path)
    train, val, test = (a_file(source, split) for split in SPLITS)
    (train.parent / "again.jpg").write_bytes(train.read_bytes())
    (test.parent / "again.jpg").write_bytes(val.read_bytes())
    notes = lines(check(source)[1], "note: ")
    assert len(notes) == 2
    pair = (val.relative_to(source), f"test/{test.parent.name}/again.jpg")
    assert all(str(name) in notes[0] for name in pair)


def test_ones_own_split_of_mini_imagenets_classes_is_no_fault(tmp_path, run, check):
    lists = {name: CLASSES[name][:n] for name, n in zip(SPLITS, (6, 2, 2), strict=True)}
    (tmp_path / "split.json").write_text(json.dumps(lists))
    source = make("class_folders", tmp_path)
    for dest, split in ((tmp_path / "a", "60/20/20"), (tmp_path / "b", tmp_path / "split.json")):
        assert run(source, "--split", split, "--dest", dest)[0] == 0
        assert check(dest)[0] == 0


@pytest.mark.parametrize(
    ("classes", "images", "flags"),
    [(5, 20, ""), (2, 4, " --n-class 2 --n-shot 2 --n-eval 2"), (2, 1, None), (1, 20, None)],
)
def test_other_data_sets_and_the_next_command(classes, images, flags, tmp_path, check, monkeypatch):
    at = own(tmp_path, "my set", classes, images)
    for folder, script in ((formats.ROOT, ""), (tmp_path, f"{formats.ROOT}/")):
        monkeypatch.chdir(folder)
        code, out = check(at)
        assert code == 0
        assert "not mini-ImageNet" in verdict(out)
        assert f"{classes}/{classes}/{classes} x {images}" in verdict(out)
        command = f"next: bash {script}scripts/train_5s_5c.sh --data-root '{at}'{flags}"
        assert (lines(out, "next: ") == [command]) == (flags is not None)
    (at / "train" / "empty").mkdir()
    assert f"--check {at}" in lines(check(at)[1], "next: ")[0]


@pytest.mark.parametrize(("classes", "flags"), [(6, ""), (5, " --n-shot 5 --n-eval 10")])
def test_a_class_with_few_images_is_named_and_left_out(classes, flags, tmp_path, check):
    at = own(tmp_path, "own", classes, 20)
    for path in sorted((at / "val" / "1-0").iterdir())[15:]:
        path.unlink()
    out = check(at)[1]
    assert any("val/1-0 (15)" in line for line in lines(out, "note: "))
    command = lines(out, "next: ")[0].removeprefix("next: ")
    assert command.endswith(f"--data-root {at}{flags}")
    if not flags:
        subprocess.run(command.partition(" && ")[0], shell=True, check=True)
        assert "note: " not in check(at)[1]


def test_fingerprint_of_a_png_is_of_its_pixels(tmp_path, check):
    at = own(tmp_path)
    first = check(at)[1]
    for path in at.rglob("*.png"):  # another encoder
        before = path.read_bytes()
        Image.open(path).save(path, compress_level=0)
        assert path.read_bytes() != before
    assert check(at)[1] == first


def test_fingerprint_is_of_the_classes_images(tmp_path, check):
    source = make("mini_folder", tmp_path)
    first = row(check(source)[1], "train")[-1]
    image = a_file(source, "train")
    image.rename(image.with_name("renamed.jpg"))
    assert row(check(source)[1], "train")[-1] == first
    a, b = a_file(source, "train"), a_file(source, "train", 1)
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)
    assert row(check(source)[1], "train")[-1] != first
