"""data/prepare.py: every format of one data set comes out as that data set."""

import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata

import prepare_formats as formats
import pytest
from prepare_formats import CLASSES, NAMES, PREPARE, SPLITS, dataset, make, pixels, tree

pytest_plugins = ["prepare_fixtures"]


def folders(at):
    return {split: sorted(os.listdir(at / split)) for split in SPLITS}


@pytest.mark.parametrize("form", formats.FORMS)
def test_every_format_comes_out_as_the_same_data_set(form, tmp_path, run):
    """Byte for byte; of arrays pixel for pixel."""
    if "parquet" in form:
        pytest.importorskip("pyarrow")
    code, _, err = run(make(form, tmp_path))
    assert (code, err) == (0, "")
    made = tree(tmp_path / "out")
    if form in formats.FILE_FORMS:
        assert made == dataset()
    elif form in formats.RENAMED_FORMS:
        assert sorted(made.values()) == sorted(dataset().values())
    else:
        assert pixels(made) == pixels(dataset())
    assert form not in formats.ARRAY_FORMS or all(name.endswith(".png") for name in made)
    named = {os.path.dirname(name) for name in made} == set(map(os.path.dirname, dataset()))
    assert named == (form not in formats.UNNAMED)


def test_fingerprint_is_of_the_images_not_of_their_names(tmp_path, run):
    made = {}
    for form in ("mini_tar", "class_folders", "cache_pickles", "category_pickles"):
        _, out, _ = run(make(form, tmp_path / form), "--dest", tmp_path / f"{form}-out")
        made[form] = re.findall(r"^(?:train|val|test) .* ([0-9a-f]{16})$", out, re.M)
    assert len(set(made["mini_tar"])) == 3
    assert made["mini_tar"] == made["class_folders"]
    assert made["cache_pickles"] == made["category_pickles"]


def test_ilsvrc_without_csv_takes_the_first_600(tmp_path, run):
    source, cls = formats.ilsvrc_without_csv(tmp_path), CLASSES["val"][0]
    images = (f"{cls}/{cls}_{n}.JPEG" for n in range(10_000, 10_600))
    formats.write(source, dict.fromkeys(images, formats.photograph(1)))
    assert run(source)[0] == 0
    kept = os.listdir(tmp_path / "out" / "val" / cls)
    numbers = sorted(int(re.findall(r"_(\d+)", name)[0]) for name in kept)
    assert numbers == [*formats.NUMBERS, *range(10_000, 10_595)]


@pytest.mark.parametrize("packed", [False, True])
def test_tiny_imagenet_comes_out_as_tiny64(packed, tmp_path, run):
    source = formats.tiny_imagenet(tmp_path)
    if packed:
        files = formats.below("tiny-imagenet-200/", tree(source))
        source = formats.zipped(tmp_path / "tiny.zip", files)
    assert run(source)[0] == 0
    lists = {split: sorted(classes) for split, classes in formats.TINY_CLASSES.items()}
    assert folders(tmp_path / "out") == lists
    cls = formats.TINY_CLASSES["train"][0]
    names = {f"{cls}_{i}.JPEG" for i in range(450)}
    assert set(os.listdir(tmp_path / "out" / "train" / cls)) == names


def other_classes(at):
    names = ["Hund", "été 1", "猫", "d.e", "_x", "Z"]
    pairs = [(n, cls, i) for n, cls in enumerate(names) for i in range(2)]
    files = {f"images/{cls}/{i}.jpg": formats.photograph(n, i) for n, cls, i in pairs}
    return names, formats.write(at / "my photographs", files)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("encoding", "form"), [("utf-8", "NFC"), ("utf-8-sig", "NFD")])
def test_split_by_file(encoding, form, packed, tmp_path, run):
    """Also with a byte order mark, and where file and folders write é in two ways."""
    names, source = other_classes(tmp_path)
    lists = {"train": names[:3], "val": [names[3]], "test": [names[4]]}
    text = unicodedata.normalize(form, json.dumps(lists, ensure_ascii=False))
    (tmp_path / "split.json").write_text(text, encoding)
    if packed:
        files = {unicodedata.normalize("NFD", name): x for name, x in tree(source).items()}
        source = formats.zipped(tmp_path / "own.zip", files)
    code, out, _ = run(source, "--split", tmp_path / "split.json")
    assert code == 0
    assert "(Z)" in out  # which is left out
    assert folders(tmp_path / "out") == {split: sorted(names) for split, names in lists.items()}


def test_names_in_csv_files_are_compared_in_nfc(tmp_path, run):
    for k, split in enumerate(SPLITS):
        nfd = unicodedata.normalize("NFD", f"été{k}")
        table = f"filename,label\nété{k}.jpg,{nfd}\n".encode("utf-8-sig")
        image = formats.photograph(k)
        formats.write(tmp_path / "own", {f"{nfd}.jpg": image, f"{split}.csv": table})
    assert run(tmp_path / "own")[0] == 0
    assert set(tree(tmp_path / "out")) == {f"{s}/été{k}/été{k}.jpg" for k, s in enumerate(SPLITS)}


def test_split_by_numbers_is_drawn_by_seed(tmp_path, run):
    names, source = other_classes(tmp_path)
    drawn = []
    for n, seed in enumerate((1, 1, 2, 3)):
        dest = tmp_path / f"out{n}"
        assert run(source, "--split", "3/1/2", "--seed", seed, "--dest", dest)[0] == 0
        drawn.append(folders(dest))
        assert [len(part) for part in drawn[-1].values()] == [3, 1, 2]
        assert sorted(itertools.chain(*drawn[-1].values())) == sorted(names)
    assert drawn[0] == drawn[1]
    assert len(set(map(str, drawn))) > 1


@pytest.mark.parametrize("link", ["hard", "symlink"])
def test_links(link, tmp_path, run):
    source = make("class_folders", tmp_path)
    assert run(source, "--link", link)[0] == 0
    assert tree(tmp_path / "out") == dataset()
    name = next(iter(dataset()))
    made = tmp_path / "out" / name
    assert made.samefile(source / name.split("/", 1)[1])
    assert made.is_symlink() == (link == "symlink")
    assert run(source, "--link", link)[0] == 0


def test_second_run_does_nothing(tmp_path, run):
    """Also after a training, which keeps decoded images in the data set, and macOS's Finder."""
    source = make("mini_tar", tmp_path)
    run(source)
    hidden = (".DS_Store", f"train/{CLASSES['train'][0]}/.DS_Store", ".decoded/train/1.npy")
    formats.write(tmp_path / "out", dict.fromkeys(hidden, b"x"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    code, out, err = run(source)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_second_run_sees_that_images_were_lost_or_the_source_changed(tmp_path, run, refused):
    source = make("class_folders", tmp_path)
    run(source)
    lost = tmp_path / "out" / next(iter(dataset()))
    lost.unlink()
    assert "299 images where 300" in refused(source)
    lost.write_bytes(b"")
    (source / CLASSES["test"][0] / "new.jpg").write_bytes(formats.photograph(1))
    assert "--dest" in refused(source)


def test_class_names_of_the_user(tmp_path, run, refused):
    pytest.importorskip("pyarrow")
    formats.shard(tmp_path / "hub" / "train.parquet", formats.rows(names=NAMES, with_path=False))
    assert "--class-names" in refused(tmp_path / "hub")
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n", "utf-8-sig")
    assert run(tmp_path / "hub", "--class-names", tmp_path / "names.txt")[0] == 0
    assert pixels(tree(tmp_path / "out")) == pixels(dataset())
    assert folders(tmp_path / "out") == {split: sorted(CLASSES[split]) for split in SPLITS}


def test_two_folders_of_the_same_other_classes_need_a_split(tmp_path, run, refused):
    names = [f"{split}/{cls}/{i}.jpg" for split in ("train", "test") for cls in "abc" for i in "12"]
    source = formats.write(tmp_path / "own", dict.fromkeys(names, formats.photograph(1)))
    assert "--split" in refused(source)
    assert run(source, "--split", "1/1/1")[0] == 0
    assert len(tree(tmp_path / "out")) == len(names)  # images of the same name are both kept


@pytest.mark.parametrize("form", ["mini_tar", "cache_pickles", "parquet_without_paths"])
def test_killed_at_any_time_it_resumes(form, tmp_path, run):
    if "parquet" in form:
        pytest.importorskip("pyarrow")
    source = make(form, tmp_path)
    dest, work = tmp_path / "out", tmp_path / ".out.part"
    # a slow disk, so that there is a middle to be killed in
    slow = f"""
import sys, time
sys.path.insert(0, {str(PREPARE.parent)!r})
import prepare
from formats import build
write = build._write
build._write = lambda *args: (time.sleep(0.02), write(*args))
prepare.main([{str(source)!r}, '--dest', {str(dest)!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.DEVNULL)
    end = time.time() + 30
    while time.time() < end and sum(1 for _ in work.glob("train/*/n*")) < 20:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not dest.exists()
    stored = {path: path.stat().st_mtime_ns for path in work.glob("*/*/n*")}
    assert 20 <= len(stored) < 300
    formats.write(work, {".12345": b"half-writ", ".prepared.json.x.tmp": b"{"})
    code, out, _ = run(source)
    assert code == 0
    assert f"{len(stored)} of 300" in out
    assert pixels(tree(dest)) == pixels(dataset())
    assert {p: (dest / p.relative_to(work)).stat().st_mtime_ns for p in stored} == stored
    assert not work.exists()
    assert not list(dest.glob(".*"))


def test_from_any_folder_without_torch_and_over_what_another_source_left(tmp_path):
    source = make("mini_zip", tmp_path)
    stale = formats.write(tmp_path / ".out.part", {"train/n99999999/x.jpg": b"x"})
    (stale / "prepared.json").write_text('{"settings": {"source": "other"}}')
    script = f"""
import sys
sys.path.insert(0, {str(PREPARE.parent)!r})
import prepare
assert prepare.main([{source.name!r}, '--dest', 'out']) == 0
assert 'torch' not in sys.modules
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(tmp_path / "out") == dataset()


def test_default_dest_is_beside_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("prepare.DATA", tmp_path / "data")
    sources = make("mini_zip", tmp_path), formats.tiny_imagenet(tmp_path, 3)
    for source, name, images in zip(sources, ("miniImagenet", "tiny64"), (300, 201), strict=True):
        for _ in range(2):
            assert formats.prepare(source) == 0
        assert len(tree(tmp_path / "data" / name)) == images


@pytest.mark.parametrize("unpacked", [True, False])
def test_omniglot(unpacked, tmp_path, run, refused, monkeypatch):
    """What torchvision leaves: two archives, and what they held; or archives put there by hand."""
    datasets = pytest.importorskip("torchvision.datasets")
    folder, sums, files = tmp_path / "omniglot-py", {}, {}
    for part, numbers in (("background", range(9)), ("evaluation", range(9, 12))):
        for n, i in itertools.product(numbers, range(2)):
            name = f"images_{part}/Alphabet_{n // 3}/character{n % 3:02d}/{n:04d}_{i:02d}.png"
            files[name] = formats.png(n, i)
        formats.write(folder, files if unpacked else {})
        inside = {name: content for name, content in files.items() if part in name}
        path = formats.zipped(folder / f"images_{part}.zip", inside)
        sums[path.stem] = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.Omniglot, "zips_md5", sums)
    argv = ("omniglot", "--download", tmp_path)
    assert "12 classes" in refused(*argv)  # the usual split asks for 1,623
    assert run(*argv, "--split", "6/2/4")[0] == 0
    assert sorted(tree(tmp_path / "out").values()) == sorted(files.values())
    classes = folders(tmp_path / "out")
    assert [len(classes[split]) for split in SPLITS] == [6, 2, 4]
    wanted = {"_".join(name.split("/")[1:3]) for name in files}
    assert set(itertools.chain(*classes.values())) == wanted
    code, out, _ = run(*argv, "--split", "6/2/4")
    assert (code, out.count("\n")) == (0, 1)


def test_omniglot_that_cannot_be_downloaded(tmp_path, refused, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(datasets.Omniglot, "download_url_prefix", f"file://{tmp_path}/nowhere")
    assert "images_background.zip" in refused("omniglot", "--download", tmp_path / "new")
