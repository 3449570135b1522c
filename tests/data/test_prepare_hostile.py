"""data/prepare.py and input that is wrong: one line, exit code 2, the destination as it was."""

import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import prepare_formats as formats
import pytest
from prepare_formats import CLASSES, PREPARE, dataset, prepare, tree


@pytest.fixture
def refused(capsys, tmp_path):
    """Run the command, which must refuse and change nothing: returns its line."""

    def refused(*argv, dest=None):
        dest = dest or tmp_path / "dest"
        before = tree(tmp_path)
        code = prepare.main([*map(str, argv), "--dest", str(dest)])
        err = capsys.readouterr().err
        assert code == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert tree(tmp_path) == before
        assert not list(tmp_path.rglob("*.part"))
        return err

    return refused


# ---- Pickles and shards


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call

    def stop(self, *_):
        raise self.call[0]


@pytest.mark.parametrize(
    ("call", "culprit"),
    [
        (lambda at: Call(os.system, f"touch {at}/owned"), "system"),
        (lambda at: Call(eval, f"open('{at}/owned', 'w')"), "eval"),
        (lambda at: Call(getattr, "", "upper"), "getattr"),
        (lambda at: Call(np.load, f"{at}/x.npy"), "load"),
        (lambda at: Call(np.lib.format.open_memmap, f"{at}/owned", "w+", "u1", (1,)), "memmap"),
        (lambda at: io.BytesIO, "BytesIO"),
        (lambda at: np.zeros(3, [("a", "O")]), "image_data"),
    ],
)
def test_malicious_pickle(call, culprit, tmp_path, refused):
    source = formats.cache_pickles(tmp_path)
    path = source / "mini-imagenet-cache-val.pkl"
    data = pickle.loads(path.read_bytes()) | {"image_data": call(tmp_path)}
    path.write_bytes(pickle.dumps(data))
    line = refused(source)
    assert path.name in line
    assert culprit in line
    assert not (tmp_path / "owned").exists()


IMAGES = np.zeros((2, 3, 3, 3), np.uint8)


@pytest.mark.parametrize(
    ("content", "culprit"),
    [
        (b"", ""),
        (b"\x80\x04}", ""),
        (b"no pickle at all", ""),
        (pickle.dumps([1, 2]), "list"),
        (pickle.dumps({"other": 1}), "image_data"),
        (pickle.dumps({"image_data": 1, "class_dict": {}}), "image_data"),
        (pickle.dumps({"image_data": IMAGES.astype(np.float32), "class_dict": {}}), "float32"),
        (pickle.dumps({"image_data": IMAGES[0, 0], "class_dict": {}}), "[3, 3]"),
        (pickle.dumps({"image_data": IMAGES}), "class_dict"),
    ],
)
def test_pickle_of_something_else(content, culprit, tmp_path, refused):
    source = formats.cache_pickles(tmp_path)
    path = source / "mini-imagenet-cache-test.pkl"
    path.write_bytes(content)
    line = refused(source)
    assert path.name in line
    assert culprit in line


@pytest.mark.parametrize("form", [formats.cache_pickles, formats.category_pickles])
def test_truncated_and_missing_pickles(form, tmp_path, refused):
    source = form(tmp_path)
    path = next(path for path in source.iterdir() if path.stem.endswith("train"))
    path.write_bytes(path.read_bytes()[:-2000])
    assert path.name in refused(source)
    path.unlink()
    assert "train" in refused(source)


# a shape of 9 images, but bytes for one; more labels than images
SHORT = np.zeros((1, 4, 4, 3), np.uint8)
FORGED = formats.python2_pickle(SHORT, [0]).replace(b"M\x01\x00", b"M\x09\x00")
UNEVEN = formats.python2_pickle(np.zeros((4, 6, 6, 3), np.uint8), [1, 2, 3, 1, 2])


@pytest.mark.parametrize("content", [FORGED, UNEVEN])
def test_category_pickle_that_contradicts_itself(content, tmp_path, refused):
    source = formats.category_pickles(tmp_path)
    (source / "miniImageNet_category_split_val.pickle").write_bytes(content)
    assert "miniImageNet_category_split_val.pickle" in refused(source)


@pytest.mark.parametrize(
    "change",
    [
        lambda classes, cls, other: {cls: [*classes[cls], 10**6]},
        lambda classes, cls, other: {cls: [-1]},
        lambda classes, cls, other: {cls: classes[cls][1:]},
        lambda classes, cls, other: {cls: classes[cls] + classes[other]},
        lambda classes, cls, other: {cls: []},
        lambda classes, cls, other: {cls: ["a"]},
        lambda classes, cls, other: {"../../up": classes.pop(cls)},
    ],
    ids=["above", "below", "unlabelled", "twice", "none", "text", "path"],
)
def test_wrong_label_in_a_cache_pickle(change, tmp_path, refused):
    source = formats.cache_pickles(tmp_path)
    path = source / "mini-imagenet-cache-val.pkl"
    data = pickle.loads(path.read_bytes())
    data["class_dict"].update(change(data["class_dict"], *CLASSES["val"][:2]))
    path.write_bytes(pickle.dumps(data))
    refused(source)


@pytest.mark.parametrize("label", [100, -1, None])
def test_wrong_label_in_a_shard(label, tmp_path, refused):
    pytest.importorskip("pyarrow")
    source = formats.parquet_every_class(tmp_path)
    image, names = formats.photograph([0]), [str(n) for n in range(100)]
    rows = [("a.jpg", image, 1), ("b.jpg", image, label)]
    formats.shard(source / "default" / "test" / "0000.parquet", rows, names)
    line = refused(source)
    assert "row 1" in line
    assert str(label) in line


@pytest.mark.parametrize("content", [b"PAR1 and no more", None])
def test_damaged_shard_and_missing_pyarrow(content, tmp_path, refused, monkeypatch):
    pytest.importorskip("pyarrow")
    source = formats.parquet_split(tmp_path)
    path = source / "data" / "test-00001-of-00002.parquet"
    damaged = bytearray(path.read_bytes())
    for at in range(4, len(damaged) - 2000, 50):
        damaged[at] ^= 0xFF
    path.write_bytes(damaged if content is None else content)
    refused(source)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refused(source)


# ---- CSV files


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda text: text.replace(",n01558993", ",n01704323", 1), "line 5"),
        (lambda text: text + "x.jpg,../../up\n", "x.jpg"),
        (lambda text: text + "../../x.jpg,n01532829\n", "x.jpg"),
        (lambda text: text.replace(".jpg,n01558993", ".jpg,..", 1), "'..'"),
        (lambda text: text + "n0153282900000099.jpg,n01532829\n", "line 194"),
        (lambda text: text + "n0153282900000099.jpg\n", "line 194"),
        (lambda text: text + text.splitlines()[1] + "\n", "n0153282900000002.jpg"),
        (lambda text: text + "n0153282900000002.jpg,bird\n", "n0153282900000002.jpg"),
        (lambda text: "filename,label\n", "train"),
        (lambda text: "", "train"),
        (lambda text: text + '"', "train.csv"),
        (lambda text: text + "\0,", "train.csv"),
    ],
)
def test_wrong_csv_line(change, culprit, tmp_path, refused):
    source = formats.csv_folder(tmp_path)
    path = source / "train.csv"
    path.write_text(change(path.read_text()))
    assert culprit in refused(source)


@pytest.mark.parametrize("form", [formats.csv_folder, formats.ilsvrc_folder])
def test_csv_lines_image_is_missing(form, tmp_path, refused):
    source = form(tmp_path)
    cls = CLASSES["train"][0]
    sorted(source.rglob(f"{cls}*.*"))[-1].unlink()
    line = refused(source)
    assert "train.csv: line" in line
    assert f"{cls}0000000" in line


# ---- Archives


@pytest.mark.parametrize(
    "name", ["../x.jpg", "/abs/x.jpg", "t/../../x.jpg", "C:\\x", "a/..\\..\\x"]
)
@pytest.mark.parametrize("pack", [formats.tar, formats.zipped])
def test_archive_that_points_outside(name, pack, tmp_path, refused):
    if pack is formats.tar and name.startswith("a"):
        pytest.skip("a backslash is a letter in a tar archive's names")
    assert "x" in refused(pack(tmp_path / "evil.archive", dataset() | {name: b"x"}))


def test_links_in_an_archive_are_not_followed(tmp_path, capsys):
    source = formats.layout_tar(tmp_path)
    with tarfile.open(source, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo("train/n01532829/link.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert prepare.main([str(source), "--dest", str(tmp_path / "out")]) == 0
    assert tree(tmp_path / "out") == dataset()
    assert "link.jpg" in capsys.readouterr().out


ARCHIVES = [
    "layout_tar",
    "layout_tar_gz",
    "layout_tar_xz",
    "layout_zip",
    "ilsvrc_tar",
    "zip_in_zip",
]


@pytest.mark.parametrize("form", ARCHIVES)
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_truncated_archive(form, kept, tmp_path, refused):
    source = getattr(formats, form)(tmp_path)
    content = source.read_bytes()
    # a tar archive is padded with zeros, whose loss does no harm
    content = content.rstrip(b"\0") if form.endswith("tar") else content
    source.write_bytes(content[: int(len(content) * kept)])
    assert source.name in refused(source)


def test_tar_that_ends_between_two_members(tmp_path, refused):
    source = formats.layout_tar(tmp_path)
    with tarfile.open(source) as archive:
        end = archive.getmembers()[150].offset
    source.write_bytes(source.read_bytes()[:end])
    assert source.name in refused(source)


@pytest.mark.parametrize("damage", ["bytes", "encrypted"])
def test_spoilt_zip(damage, tmp_path, refused):
    source = formats.layout_zip(tmp_path)
    content = bytearray(source.read_bytes())
    if damage == "bytes":
        with zipfile.ZipFile(source) as archive:
            at = archive.getinfo(next(iter(dataset()))).header_offset + 200
        content[at : at + 4] = b"????"
    else:
        content[content.index(b"PK\x01\x02") + 8] |= 1
    source.write_bytes(content)
    assert source.name in refused(source)


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".jpg", ""])
def test_a_file_that_is_no_archive(suffix, tmp_path, refused):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"<html>404</html>" * 50)
    assert str(path) in refused(path)


@pytest.mark.parametrize(
    "form", ["layout_tar_gz", "layout_tar_xz", "layout_zip", "ilsvrc_tar", "category_pickles"]
)
def test_bytes_changed_anywhere_end_in_a_data_set_or_in_one_line(form, tmp_path, capsys):
    source = getattr(formats, form)(tmp_path)
    target = source if source.is_file() else next(source.glob("*train.p*"))
    sound = target.read_bytes()
    random = np.random.default_rng(0)
    codes = set()
    for n in range(6):
        content = bytearray(sound)
        at = int(random.integers(len(content) - 100 if n % 2 else 90))
        content[at : at + 8] = random.bytes(8)
        target.write_bytes(content)
        codes.add(prepare.main([str(source), "--dest", str(tmp_path / "out")]))
        err = capsys.readouterr().err
        assert (tmp_path / "out").exists() == (err == "")
        assert err.count("\n") <= 1
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert not list(tmp_path.glob(".out*"))
    assert 2 in codes
    assert codes <= {0, 2}


# ---- Images and classes


@pytest.mark.parametrize("form", ["layout_folder", "layout_tar", "csv_folder"])
def test_images_that_cannot_be_decoded_are_all_named(form, tmp_path, refused, monkeypatch):
    names = [list(dataset())[n] for n in (7, 77, 277)]
    half = dataset()[names[0]][:500]
    broken = dataset() | dict(zip(names, (half, b"", b"<html>404</html>"), strict=True))
    monkeypatch.setattr(formats, "dataset", lambda: broken)
    line = refused(getattr(formats, form)(tmp_path))
    assert all(os.path.basename(name) in line for name in names)


@pytest.mark.parametrize(
    ("form", "spoil", "culprit"),
    [
        ("layout_folder", "train/n00000001/notes.txt", "train/n00000001"),
        ("class_folders", "n00000001/notes.txt", "n00000001"),
        ("layout_folder", f"train/{CLASSES['test'][3]}/x.jpg", CLASSES["test"][3]),
    ],
)
def test_class_without_images_and_class_in_two_splits(form, spoil, culprit, tmp_path, refused):
    source = getattr(formats, form)(tmp_path)
    formats.write(source, {spoil: formats.photograph([1])})
    assert culprit in refused(source)


def test_nearly_mini_imagenet(tmp_path, refused):
    source = formats.class_folders(tmp_path)
    (source / CLASSES["val"][2]).rename(tmp_path / "x")
    assert CLASSES["val"][2] in refused(source)


# ---- Sources, flags and destinations


def test_sources_that_hold_no_data_set(tmp_path, refused):
    assert "nowhere" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "a.npy").write_bytes(b"x")
    assert ".npy" in refused(tmp_path / "empty")
    os.symlink(tmp_path / "gone", tmp_path / "dangling")
    assert "dangling" in refused(tmp_path / "dangling")
    formats.write(tmp_path / "flat", {"a.jpg": b"x"})
    assert "--csv" in refused(tmp_path / "flat")
    assert "train.csv" in refused(tmp_path / "flat", "--csv", tmp_path / "flat")
    formats.write(tmp_path / "packed", {"a.zip": b"x", "b.zip": b"x"})
    assert "a.zip" in refused(tmp_path / "packed")  # and not a list of formats
    source = formats.layout_folder(tmp_path)
    shutil.rmtree(source / "val")
    assert "val" in refused(source)


def test_two_formats_in_one_folder(tmp_path, refused):
    source = formats.cache_pickles(tmp_path)
    (tmp_path / "more").mkdir()
    formats.category_pickles(tmp_path / "more")
    line = refused(source)
    assert "mini-imagenet-cache" in line
    assert "miniImageNet_category_split" in line
    formats.layout_folder(tmp_path / "more")
    assert "300 images" in refused(source)


@pytest.mark.parametrize(
    ("split", "culprit"),
    [
        (None, "--split"),
        ("1/1/2", "3 classes"),
        ("3/0/0", "3 classes"),
        ("/nowhere.json", "/nowhere.json"),
        (os.path.dirname(__file__), "--split"),
        ("{", "JSON"),
        ("[" * 100_000, "JSON"),
        ("[]", "train"),
        ({"train": ["a"], "val": ["b"]}, "test"),
        ({"train": ["a"], "val": ["b"], "test": ["x"]}, "(x)"),
        ({"train": ["a"], "val": ["b"], "test": ["b"]}, "class b"),
        ({"train": ["a", "b"], "val": [], "test": ["c"]}, "val"),
    ],
)
def test_wrong_split(split, culprit, tmp_path, refused):
    names = [f"{cls}/{i}.jpg" for cls in "abc" for i in range(2)]
    source = formats.write(tmp_path / "own", {name: formats.photograph([1]) for name in names})
    if isinstance(split, dict) or (split and split[0] in "[{"):
        text = json.dumps(split) if isinstance(split, dict) else split
        split = tmp_path / "split.json"
        split.write_text(text)
    assert culprit in refused(source, *(("--split", split) if split else ()))


@pytest.mark.parametrize(
    ("argv", "culprit"),
    [
        ([], "SOURCE"),
        ([""], "SOURCE"),
        (["x", "--check", "y"], "SOURCE"),
        (["x", "--link", "magic"], "--link"),
        (["x", "--seed", "a"], "--seed"),
        (["x", "--seed", "-1"], "--seed"),
        (["x", "--nonsense"], "--nonsense"),
        (["x", "--split", "1/1/1"], "--dest"),
        (["x", "--csv", "/nowhere"], "x"),
        (["--check", "/nowhere"], "/nowhere"),
        (["--check", __file__], __file__),
    ],
)
def test_wrong_flags(argv, culprit, capsys):
    code = prepare.main(argv)
    err = capsys.readouterr().err
    assert (code, err.count("\n")) == (2, 1)
    assert culprit in err


def test_flags_that_do_not_fit_the_source(tmp_path, refused):
    source = formats.layout_zip(tmp_path)
    for name in ("formats", "splits/new", "../data/splits"):  # folders of code
        assert "--dest" in refused(source, dest=PREPARE.parent / name)
    assert "--link" in refused(source, "--link", "hard")
    assert "--split" in refused(source, "--split", "64/16/20")
    assert "/nowhere" in refused(source, "--class-names", "/nowhere")


def test_dest_that_holds_something_else(tmp_path, refused):
    source = formats.layout_zip(tmp_path)
    formats.write(tmp_path, {"dest/train/cat/1.jpg": b"mine", "file": b"mine"})
    os.symlink(tmp_path / "gone", tmp_path / "link")
    for dest in ("dest", "file", "file/below", "link"):
        assert str(tmp_path / dest[:4]) in refused(source, dest=tmp_path / dest)
    formats.write(tmp_path, {".away.part/mine.txt": b"mine"})
    assert prepare.main([str(source), "--dest", str(tmp_path / "away")]) == 2
    assert (tmp_path / ".away.part" / "mine.txt").read_bytes() == b"mine"


def test_source_and_dest_that_overlap(tmp_path, refused):
    source = formats.layout_folder(tmp_path)
    assert "--check" in refused(source, dest=source)
    assert str(tmp_path) in refused(source, dest=tmp_path)
    pickles = formats.cache_pickles(tmp_path / "mini")
    shutil.rmtree(pickles / "train")
    shutil.rmtree(pickles / "val")
    shutil.rmtree(pickles / "test")
    (pickles / "dest").mkdir()  # empty: it is filled
    for _ in range(2):
        assert prepare.main([str(pickles), "--dest", str(pickles / "dest")]) == 0
        assert len(tree(pickles / "dest")) == 300


def test_links_in_a_circle(tmp_path, capsys):
    os.symlink("circle", tmp_path / "circle")
    source, circle = str(formats.layout_zip(tmp_path)), str(tmp_path / "circle")
    for argv in ([source, "--dest", circle], [circle, "--dest", str(tmp_path / "out")]):
        assert prepare.main(argv) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_unwritable_dest(tmp_path, refused):
    source = formats.layout_zip(tmp_path)
    assert "/proc" in refused(source, dest="/proc/nowhere/out")
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o555)
        assert "locked" in refused(source, dest=tmp_path / "locked" / "out")


@pytest.mark.parametrize("form", ["layout_folder", "layout_zip", "cache_pickles"])
@pytest.mark.parametrize("limit", [0, 700])
def test_disk_that_fills_up(form, limit, tmp_path):
    source = getattr(formats, form)(tmp_path)
    argv = [sys.executable, PREPARE, source, "--dest", tmp_path / "out"]

    def fill_up():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    full = subprocess.run(argv, capture_output=True, text=True, preexec_fn=fill_up)
    assert (full.returncode, full.stderr.count("\n")) == (2, 1)
    assert "free some space" in full.stderr
    assert not (tmp_path / "out").exists()
    roomy = subprocess.run(argv, capture_output=True, text=True)
    assert (roomy.returncode, roomy.stderr) == (0, "")
    assert formats.pixels(tree(tmp_path / "out")) == formats.pixels(dataset())


def test_loops_litter_and_odd_files(tmp_path, capsys):
    source = formats.layout_nested(tmp_path)
    inner = source / "a b" / "mini-imagenet"
    cls = inner / "train" / CLASSES["train"][0]
    os.symlink(source, inner / "train" / "loop")
    os.symlink("self", cls / "self")
    os.symlink(tmp_path / "gone.jpg", cls / "gone.jpg")
    os.mkfifo(cls / "pipe.jpg")
    formats.write(cls, {".hidden.jpg": b"x", "Thumbs.db": b"x", "notes.docx": b"x"})
    assert prepare.main([str(source), "--dest", str(tmp_path / "öut put")]) == 0
    assert tree(tmp_path / "öut put") == dataset()
    out = capsys.readouterr().out
    assert all(name in out for name in ("loop", "gone.jpg", "notes.docx"))


def test_names_that_are_no_text(tmp_path):
    source = tmp_path / "bytes"
    for cls in (b"\xff\xfe", b"b", b"c"):
        (source / os.fsdecode(cls)).mkdir(parents=True)
        (source / os.fsdecode(cls) / "1.jpg").write_bytes(formats.photograph(list(cls)))
    argv = [str(source), "--split", "1/1/1", "--dest", str(tmp_path / "out")]
    assert prepare.main(argv) == 0
    assert len(tree(tmp_path / "out")) == 3
    assert prepare.main(["--check", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("end", ["a lock", "an interrupt"])
def test_two_at_once_and_an_interrupt(end, tmp_path, capsys, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    argv = [str(formats.layout_zip(tmp_path)), "--dest", str(tmp_path / "out")]
    work = tmp_path / ".out.part"
    work.mkdir()
    with (work / ".lock").open("w") as file:
        if end == "a lock":
            fcntl.flock(file, fcntl.LOCK_EX)
        else:
            monkeypatch.setattr("formats.build._write", Call(KeyboardInterrupt).stop)
        assert prepare.main(argv) == (2 if end == "a lock" else 130)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert end != "a lock" or str(work) in err
    assert (work / ".lock").exists()
    assert not (tmp_path / "out").exists()
