"""data/prepare.py: every form of one data set comes out as that data set."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import prepare_formats as formats
import pytest
from prepare_formats import CLASSES, PREPARE, SPLITS, dataset, pixels, prepare, tree


@pytest.fixture
def run(capsys):
    """Run the command; returns (exit code, stdout, stderr)."""

    def run(*argv):
        code = prepare.main([str(a) for a in argv])
        return code, *capsys.readouterr()

    return run


def fingerprints(text):
    return re.findall(r"^(?:train|val|test) .* ([0-9a-f]{16})$", text, re.M)


@pytest.mark.parametrize("form", formats.FILE_FORMS, ids=lambda form: form.__name__)
def test_file_forms_come_out_byte_for_byte(form, tmp_path, run):
    source = form(tmp_path)
    code, out, err = run(source, "--dest", tmp_path / "out")
    assert (code, err) == (0, "")
    assert out.startswith(f"found: {source}: ")
    assert tree(tmp_path / "out") == dataset()


@pytest.mark.parametrize("form", formats.PARQUET_FORMS, ids=lambda form: form.__name__)
def test_parquet_forms_come_out_byte_for_byte(form, tmp_path, run):
    pytest.importorskip("pyarrow")
    code, _, err = run(form(tmp_path), "--dest", tmp_path / "out")
    assert (code, err) == (0, "")
    assert tree(tmp_path / "out") == dataset()


@pytest.mark.parametrize("form", formats.ARRAY_FORMS, ids=lambda form: form.__name__)
def test_array_forms_come_out_pixel_for_pixel(form, tmp_path, run):
    code, out, err = run(form(tmp_path), "--dest", tmp_path / "out")
    assert (code, err) == (0, "")
    made = tree(tmp_path / "out")
    assert all(name.endswith(".png") for name in made)
    assert pixels(made) == pixels(dataset())
    named = {name.rsplit("/", 1)[0] for name in made} == {
        name.rsplit("/", 1)[0] for name in dataset()
    }
    assert named == ("category" not in form.__name__)  # whose labels are numbers
    assert ("without names" in out) == (not named)


def test_fingerprint_is_of_the_images_not_of_their_names(tmp_path, run):
    for form in ("layout_tar", "class_folders", "cache_pickles", "category_pickles"):
        (tmp_path / form).mkdir()
    made = {}
    for form in ("layout_tar", "class_folders", "cache_pickles", "category_pickles"):
        _, out, _ = run(getattr(formats, form)(tmp_path / form), "--dest", tmp_path / f"{form}-out")
        made[form] = fingerprints(out)
    assert len(set(made["layout_tar"])) == 3
    assert made["layout_tar"] == made["class_folders"]
    assert made["cache_pickles"] == made["category_pickles"]


def test_ilsvrc_without_csv_takes_the_first_600_and_says_so(tmp_path, run):
    source = formats.ilsvrc_folder(tmp_path)
    for split in SPLITS:
        (tmp_path / f"{split}.csv").unlink()
    cls = CLASSES["val"][0]
    formats.write(
        source,
        {f"{cls}/{cls}_{n}.JPEG": dataset()[next(iter(dataset()))] for n in range(10_000, 10_600)},
    )
    code, out, _ = run(source, "--dest", tmp_path / "out")
    assert code == 0
    assert "NOT the published images" in out
    kept = sorted(
        os.listdir(tmp_path / "out" / "val" / cls),
        key=lambda name: int(re.findall(r"_(\d+)", name)[0]),
    )
    assert len(kept) == 600
    assert kept[4:6] == [f"{cls}_4321.JPEG", f"{cls}_10000.JPEG"]
    assert kept[-1] == f"{cls}_10594.JPEG"


@pytest.mark.parametrize("packed", [False, True])
def test_tiny_imagenet_comes_out_as_tiny64(packed, tmp_path, run):
    source = formats.tiny_imagenet(tmp_path)
    if packed:
        files = {f"tiny-imagenet-200/{name}": content for name, content in tree(source).items()}
        source = formats.zipped(tmp_path / "tiny.zip", files)
    code, out, _ = run(source, "--dest", tmp_path / "out")
    assert code == 0
    assert "tiny64" in out
    for split in SPLITS:
        assert sorted(os.listdir(tmp_path / "out" / split)) == sorted(formats.TINY_CLASSES[split])
    cls = formats.TINY_CLASSES["train"][0]
    names = {f"{cls}_{i}.JPEG" for i in range(450)}
    assert set(os.listdir(tmp_path / "out" / "train" / cls)) == names


def other_classes(at):
    names = ["Hund", "été 1", "猫", "d.e", "_x", "Z"]
    files = {
        f"images/{cls}/{i}.jpg": formats.photograph([n, i])
        for n, cls in enumerate(names)
        for i in range(2)
    }
    return names, formats.write(at / "my photographs", files)


def test_split_by_file(tmp_path, run):
    names, source = other_classes(tmp_path)
    lists = {"train": names[:3], "val": [names[3]], "test": [names[4]]}
    (tmp_path / "split.json").write_text(json.dumps(lists))
    code, out, _ = run(source, "--split", tmp_path / "split.json", "--dest", tmp_path / "out")
    assert code == 0
    assert "ignored: classes not in split.json, 1 (Z)" in out
    assert {s: sorted(os.listdir(tmp_path / "out" / s)) for s in SPLITS} == {
        s: sorted(v) for s, v in lists.items()
    }


def test_split_by_numbers_is_drawn_by_seed(tmp_path, run):
    names, source = other_classes(tmp_path)
    drawn = []
    for n, seed in enumerate((1, 1, 2, 3)):
        dest = tmp_path / f"out{n}"
        assert run(source, "--split", "3/1/2", "--seed", seed, "--dest", dest)[0] == 0
        drawn.append([tuple(sorted(os.listdir(dest / split))) for split in SPLITS])
        assert [len(part) for part in drawn[-1]] == [3, 1, 2]
        assert sorted(sum(drawn[-1], ())) == sorted(names)
    assert drawn[0] == drawn[1]
    assert len({tuple(d) for d in drawn}) > 1


@pytest.mark.parametrize("link", ["hard", "symlink"])
def test_links(link, tmp_path, run):
    source = formats.class_folders(tmp_path)
    assert run(source, "--dest", tmp_path / "out", "--link", link)[0] == 0
    assert tree(tmp_path / "out") == dataset()
    name = next(iter(dataset()))
    made, original = tmp_path / "out" / name, source / name.split("/", 1)[1]
    assert made.samefile(original)
    assert made.is_symlink() == (link == "symlink")


def test_second_run_does_nothing(tmp_path, run):
    source = formats.layout_tar(tmp_path)
    run(source, "--dest", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    code, out, err = run(source, "--dest", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "nothing to do" in out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_second_run_sees_that_images_were_lost_or_the_source_changed(tmp_path, run):
    source = formats.class_folders(tmp_path)
    run(source, "--dest", tmp_path / "out")
    lost = tmp_path / "out" / next(iter(dataset()))
    lost.unlink()
    code, _, err = run(source, "--dest", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "299 files where 300" in err
    lost.write_bytes(b"")
    cls = CLASSES["test"][0]
    (source / cls / "new.jpg").write_bytes(formats.photograph([1]))
    code, _, err = run(source, "--dest", tmp_path / "out")
    assert code == 2
    assert "choose another --dest" in err


def test_numbers_named_by_the_user(tmp_path, run):
    pytest.importorskip("pyarrow")
    names = sorted(cls for split in SPLITS for cls in CLASSES[split])
    rows = [(None, content, names.index(name.split("/")[1])) for name, content in dataset().items()]
    formats.shard(tmp_path / "hub" / "train.parquet", rows)
    code, _, err = run(tmp_path / "hub", "--dest", tmp_path / "out")
    assert code == 2
    assert "--class-names" in err
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    assert (
        run(tmp_path / "hub", "--dest", tmp_path / "out", "--class-names", tmp_path / "names.txt")[
            0
        ]
        == 0
    )
    assert pixels(tree(tmp_path / "out")) == pixels(dataset())
    assert set(os.listdir(tmp_path / "out" / "val")) == set(CLASSES["val"])


def test_numbers_of_each_splits_own(tmp_path, run):
    pytest.importorskip("pyarrow")
    for split in SPLITS:
        files = {name: content for name, content in dataset().items() if name.startswith(split)}
        rows = [
            (None, c, sorted(CLASSES[split]).index(name.split("/")[1])) for name, c in files.items()
        ]
        formats.shard(tmp_path / "hub" / f"{split}.parquet", rows)
    code, out, _ = run(tmp_path / "hub", "--dest", tmp_path / "out")
    assert code == 0
    assert "without names" in out
    assert pixels(tree(tmp_path / "out")) == pixels(dataset())


def test_every_class_in_every_folder(tmp_path, run):
    """A mini-ImageNet for classification, whose files are numbered anew in each part."""
    files = {}
    for n, (name, content) in enumerate(dataset().items()):
        _, cls, _ = name.split("/")
        files[f"{SPLITS[n % 3]}/{cls}/1.jpg"] = content
    code, out, _ = run(formats.write(tmp_path / "mini", files), "--dest", tmp_path / "out")
    assert code == 0
    assert "split by mini-ImageNet's class lists" in out
    made = [(name.rsplit("/", 1)[0], content) for name, content in tree(tmp_path / "out").items()]
    assert sorted(made) == sorted(
        (name.rsplit("/", 1)[0], content) for name, content in dataset().items()
    )


@pytest.mark.parametrize("packed", [False, True])
def test_two_folders_of_the_same_classes(packed, tmp_path, run):
    """A clone of github.com/Deo0330/split_minidataset, or its zip: part of each class in train/,
    the rest in val/.
    """
    files = {".git/train/n1/x.jpg": b"x", ".gitattributes": b"x", "README.md": b"x"}
    for n, (name, content) in enumerate(dataset().items()):
        files[f"{('train', 'val')[n % 3 == 2]}/{name.split('/', 1)[1]}"] = content
    source = tmp_path / "split_minidataset"
    if packed:
        source = formats.zipped(
            tmp_path / "main.zip", {f"split_minidataset-main/{k}": v for k, v in files.items()}
        )
    else:
        formats.write(source, files)
    code, out, _ = run(source, "--dest", tmp_path / "out")
    assert code == 0
    assert "every class in every part, split by mini-ImageNet's class lists" in out
    assert tree(tmp_path / "out") == dataset()


def test_two_folders_of_the_same_other_classes_need_a_split(tmp_path, run):
    files = {
        f"{split}/{cls}/{i}.jpg": formats.photograph([i])
        for split in ("train", "test")
        for cls in "abc"
        for i in (1, 2)
    }
    source = formats.write(tmp_path / "own", files)
    code, _, err = run(source, "--dest", tmp_path / "out")
    assert code == 2
    assert "--split" in err
    assert run(source, "--split", "1/1/1", "--dest", tmp_path / "out")[0] == 0
    assert len(tree(tmp_path / "out")) == len(files)  # images of the same name are both kept


@pytest.mark.parametrize("name", ["formats", "splits", "formats/new", "../data/splits"])
def test_folders_of_code_are_no_destination(name, tmp_path, run):
    code, _, err = run(formats.layout_zip(tmp_path), "--dest", PREPARE.parent / name)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: ")
    assert "part of the code" in err


@pytest.mark.parametrize(
    "form",
    [formats.layout_tar, formats.cache_pickles, formats.parquet_without_paths],
    ids=["files", "arrays", "parquet"],
)
def test_killed_at_any_time_it_resumes(form, tmp_path, run):
    if "parquet" in form.__name__:
        pytest.importorskip("pyarrow")
    source = form(tmp_path)
    dest = tmp_path / "out"
    work = tmp_path / ".out.part"
    # a slow disk, so that there is a middle to be killed in
    slow = f"""
import sys, time
sys.path.insert(0, {str(PREPARE.parent)!r})
import prepare
from formats import build
put = build._write
build._write = lambda *args: (time.sleep(0.02), put(*args))
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
    half = work / "val" / CLASSES["val"][0] / ".half.jpg.part"
    half.parent.mkdir(parents=True, exist_ok=True)
    half.write_bytes(b"half-writ")
    (work / ".prepared.json.x.tmp").write_bytes(b"{")
    code, out, _ = run(source, "--dest", dest)
    assert code == 0
    assert f"resuming: {len(stored)} of 300" in out
    assert pixels(tree(dest)) == pixels(dataset())
    assert {p: (dest / p.relative_to(work)).stat().st_mtime_ns for p in stored} == stored
    assert not work.exists()


def test_what_another_source_left_is_not_mixed_in(tmp_path, run):
    source = formats.layout_zip(tmp_path)
    stale = formats.write(tmp_path / ".out.part", {"train/n99999999/x.jpg": b"x"})
    (stale / "prepared.json").write_text('{"settings": {"source": "other"}}')
    assert run(source, "--dest", tmp_path / "out")[0] == 0
    assert tree(tmp_path / "out") == dataset()


def test_interrupt_is_one_line(tmp_path, run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("formats.build._write", interrupt)
    code, _, err = run(formats.layout_zip(tmp_path), "--dest", tmp_path / "out")
    assert (code, err.count("\n")) == (130, 1)
    assert not (tmp_path / "out").exists()


def test_from_any_folder_and_without_torch(tmp_path):
    source = formats.layout_zip(tmp_path)
    script = f"""
import runpy, sys
sys.argv = ['prepare.py', {str(source.name)!r}, '--dest', 'out']
try:
    runpy.run_path({str(PREPARE)!r}, run_name='__main__')
except SystemExit as end:
    assert end.code == 0
assert 'torch' not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(tmp_path / "out") == dataset()


def test_default_dest_is_beside_the_command(tmp_path, run, monkeypatch):
    monkeypatch.setattr(prepare, "DATA", tmp_path / "data")
    source = formats.layout_zip(tmp_path)
    assert run(source)[0] == 0
    assert tree(tmp_path / "data" / "miniImagenet") == dataset()
    assert "nothing to do" in run(source)[1]
    tiny = formats.tiny_imagenet(tmp_path, 3)
    assert run(tiny)[0] == 0
    assert len(tree(tmp_path / "data" / "tiny64")) == 201
    assert "nothing to do" in run(tiny)[1]


def fake_omniglot(root):
    """What torchvision leaves: two archives, and what they held."""
    characters = [(f"Alphabet_{a}", f"character{c:02d}") for a in range(4) for c in range(1, 4)]
    files = {
        f"images_{'evaluation' if a == 'Alphabet_3' else 'background'}/{a}/{c}/{n:04d}_{i:02d}.png": formats.png(
            [n, i]
        )
        for n, (a, c) in enumerate(characters)
        for i in range(2)
    }
    folder = root / "omniglot-py"
    formats.write(folder, files)
    for name in ("images_background", "images_evaluation"):
        formats.zipped(
            folder / f"{name}.zip", {k: v for k, v in files.items() if k.startswith(name)}
        )
    return folder, files


@pytest.mark.parametrize("unpacked", [True, False])
def test_omniglot(unpacked, tmp_path, run, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    folder, files = fake_omniglot(tmp_path)
    sums = {path.stem: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.glob("*.zip")}
    monkeypatch.setattr(datasets.Omniglot, "zips_md5", sums)
    if not unpacked:  # archives put there by hand
        for path in folder.glob("images_*/"):
            path.is_dir() and path.rename(tmp_path / path.name)
    argv = ("omniglot", "--download", tmp_path, "--dest", tmp_path / "out")
    code, _, err = run(*argv)
    assert code == 2
    assert "12 classes" in err  # the usual split asks for 1,623
    assert run(*argv, "--split", "6/2/4")[0] == 0
    made = tree(tmp_path / "out")
    assert sorted(made.values()) == sorted(files.values())
    classes = {split: set(os.listdir(tmp_path / "out" / split)) for split in SPLITS}
    assert [len(classes[split]) for split in SPLITS] == [6, 2, 4]
    assert set.union(*classes.values()) == {"_".join(name.split("/")[1:3]) for name in files}
    assert "nothing to do" in run(*argv, "--split", "6/2/4")[1]


def test_omniglot_that_cannot_be_downloaded(tmp_path, run, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(datasets.Omniglot, "download_url_prefix", f"file://{tmp_path}/nowhere")
    code, _, err = run("omniglot", "--download", tmp_path, "--dest", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "images_background.zip" in err
    assert not (tmp_path / "out").exists()
