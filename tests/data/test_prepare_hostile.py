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
from prepare_formats import CLASSES, PREPARE, dataset, make, prepare, tree, zipped

pytest_plugins = ["prepare_fixtures"]

TRAIN, VAL, TEST = (CLASSES[split][0] for split in formats.SPLITS)


# ---- Sources with one fault, and the culprit that the line names


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call

    def stop(self, *_):
        raise self.call[0]


def cache(change):
    """Changes the dict in a pickle of mini-imagenet-cache."""

    def spoil(source):
        path = source / "mini-imagenet-cache-val.pkl"
        data = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps(data | change(data["class_dict"])))

    return spoil


def image_data(value):
    return cache(lambda _: {"image_data": value})


def labels(change):
    return cache(lambda classes: {"class_dict": classes | change(classes, *CLASSES["val"][:2])})


def file(name, change):
    """Replaces a file's content, or gives it to a function."""

    def spoil(source):
        path = source if source.is_file() else source / name
        content = change(path.read_bytes()) if callable(change) else change
        path.write_bytes(content)

    return spoil


def rows(change):
    return file("train.csv", lambda content: change(content.decode()).encode())


def append(row):
    """Adds a line to train.csv."""
    return rows(lambda text: text + row)


def label(value):
    def spoil(source):
        images = [("a.jpg", b"x", 1), ("b.jpg", b"x", value)]
        formats.shard(source / "default" / "test" / "0000.parquet", images, formats.NAMES)

    return spoil


def flip(content):
    damaged = bytearray(content)
    for at in range(4, len(damaged) - 2000, 50):
        damaged[at] ^= 0xFF
    return damaged


def encrypted(content):
    content = bytearray(content)
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return content


def spoilt(content):
    middle = len(content) // 2
    return content[:middle] + b"????" + content[middle + 4 :]


def half_a_tar(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return content[: archive.getmembers()[150].offset]


def cut(kept):
    # a tar archive is padded with zeros, whose loss does no harm
    return lambda content: content[: int(len(content.rstrip(b"\0")) * kept)]


def of_both(name):
    """A member of this name in a tar and in a zip archive."""
    return [
        (lambda at, p=p: p(at / "evil.archive", dataset() | {name: b"x"}), None, "x")
        for p in (formats.tar, zipped)
    ]


def new(files):
    """A folder of these files, or of dummies of these names."""
    files = files if isinstance(files, dict) else dict.fromkeys(files, b"x")
    return lambda at: formats.write(at / "new", files)


def add(name):
    return lambda source: formats.write(source, {name: b""})


def remove(name):
    return lambda source: (
        shutil.rmtree(source / name) if (source / name).is_dir() else (source / name).unlink()
    )


CACHE, CATEGORY = "mini-imagenet-cache-val.pkl", "miniImageNet_category_split_val.pickle"
IMAGES = np.zeros((2, 3, 3, 3), np.uint8)
# a shape of 9 images, but bytes for one; more labels than images
FORGED = formats.python2_pickle(IMAGES[:1], [0]).replace(b"M\x01\x00", b"M\x09\x00")
UNEVEN = formats.python2_pickle(IMAGES, [1, 2, 3])
SHARD = "data/test-00001-of-00002.parquet"
ONE_FAULT = [
    *(
        ("cache_pickles", image_data(Call(*call)), call[0].__name__)
        for call in (
            (os.system, "touch owned"),
            (eval, "open('owned', 'w')"),
            (getattr, "", "upper"),
            (np.load, "owned"),
            (np.lib.format.open_memmap, "owned", "w+", "u1", (1,)),
        )
    ),
    ("cache_pickles", image_data(io.BytesIO), "BytesIO"),
    ("cache_pickles", image_data(np.zeros(3, [("a", "O")])), "image_data"),
    ("cache_pickles", image_data(1), "image_data"),
    ("cache_pickles", image_data(IMAGES.astype(np.float32)), "float32"),
    ("cache_pickles", image_data(IMAGES[0, 0]), "[3, 3]"),
    ("cache_pickles", cache(lambda _: {"class_dict": None}), "class_dict"),
    ("cache_pickles", file(CACHE, b""), CACHE),
    ("cache_pickles", file(CACHE, pickle.dumps([1, 2])), "list"),
    ("cache_pickles", file(CACHE, pickle.dumps({"other": 1})), "image_data"),
    ("cache_pickles", file(CACHE, lambda content: content[:-2000]), CACHE),
    ("cache_pickles", remove(CACHE), "val"),
    ("category_pickles", file(CATEGORY, lambda content: content[:-2000]), CATEGORY),
    ("category_pickles", file(CATEGORY, FORGED), CATEGORY),
    ("category_pickles", file(CATEGORY, UNEVEN), CATEGORY),
    ("category_pickles", remove(CATEGORY), "val"),
    ("cache_pickles", labels(lambda classes, cls, _: {cls: [*classes[cls], 10**6]}), VAL),
    ("cache_pickles", labels(lambda classes, cls, _: {cls: [-1]}), VAL),
    ("cache_pickles", labels(lambda classes, cls, _: {cls: classes[cls][1:]}), "no class"),
    ("cache_pickles", labels(lambda classes, a, b: {a: classes[a] + classes[b]}), VAL),
    ("cache_pickles", labels(lambda classes, cls, _: {cls: []}), VAL),
    ("cache_pickles", labels(lambda classes, cls, _: {cls: ["a"]}), VAL),
    ("cache_pickles", labels(lambda classes, cls, _: {"../../up": classes.pop(cls)}), "cache"),
    ("parquet_every_class", label(100), "row 1: wrong label 100"),
    ("parquet_every_class", label(-1), "row 1: wrong label -1"),
    ("parquet_every_class", label(None), "row 1: wrong label None"),
    ("parquet_split", file(SHARD, b"PAR1 and no more"), SHARD),
    ("parquet_split", file(SHARD, flip), SHARD),
    ("csv_folder", rows(lambda text: text.replace(",n01558993", ",n01704323", 1)), "line 5"),
    ("csv_folder", append("x.jpg,../../up"), "x.jpg"),
    ("csv_folder", append("../../x.jpg,n01532829"), "x.jpg"),
    ("csv_folder", rows(lambda text: text.replace(".jpg,n01558993", ".jpg,..", 1)), "'..'"),
    ("csv_folder", append("n0153282900000099.jpg,n01532829"), "line 194"),
    ("csv_folder", append("n0153282900000099.jpg"), "line 194"),
    ("csv_folder", rows(lambda text: text + text.splitlines()[1] + "\n"), "n0153282900000002.jpg"),
    ("csv_folder", append("n0153282900000002.jpg,bird"), "00002.jpg"),
    ("csv_folder", file("train.csv", b"filename,label\n"), "train"),
    ("csv_folder", file("train.csv", b""), "train.csv"),
    ("csv_folder", rows(lambda text: text.replace("label", "x")), "train.csv"),
    ("csv_folder", append('"'), "train.csv"),
    ("csv_folder", append("\0,"), "train.csv"),
    ("csv_folder", file("train.csv", lambda content: content + b"\xff.jpg,x\n"), "train.csv"),
    ("csv_folder", remove(f"images/{TRAIN}00000002.jpg"), "train.csv: line"),
    ("ilsvrc_folder", remove(f"{TRAIN}/{TRAIN}_4321.JPEG"), "train.csv: line"),
    *of_both("../x.jpg"),
    *of_both("/abs/x.jpg"),
    *of_both("t/../../x.jpg"),
    *of_both("C:\\x"),
    of_both("a/..\\..\\x")[1],  # a backslash is a letter in a tar archive's names
    *(
        (form, file("", cut(kept)), form.split("_")[0])
        for form in ("mini_tar", "mini_tar_gz", "mini_tar_xz", "mini_zip")
        for kept in (0.0, 0.3, 0.999)
    ),
    ("ilsvrc_tar", file("", cut(0.3)), "ILSVRC2012_img_train.tar"),
    ("zip_in_zip", file("", cut(0.3)), "outer.zip"),
    ("mini_tar", file("", half_a_tar), "mini.tar"),
    ("mini_zip", file("", spoilt), "mini.zip"),
    ("mini_tar_gz", file("", spoilt), "mini.tar.gz"),
    ("mini_tar_xz", file("", spoilt), "mini.tar.xz"),
    ("mini_zip", file("", encrypted), "mini.zip"),
    ("mini_folder", add("train/n00000001/x.txt"), "n00000001"),
    ("class_folders", add("n00000001/x.txt"), "n00000001"),
    ("mini_folder", add(f"train/{TEST}/x.jpg"), TEST),
    ("class_folders", remove(VAL), VAL),
    ("mini_folder", remove("val"), "val"),
    *((lambda at, s=s: new([f"x{s}"])(at) / f"x{s}", None, f"x{s}") for s in (".zip", ".jpg", "")),
    (lambda at: at / "nowhere", None, "nowhere"),
    (new({}), None, "new"),
    (new(["a.npy"]), None, ".npy"),
    (new(["a.jpg"]), None, "--csv"),
    (new(["a.zip", "b.zip"]), None, "a.zip"),  # and not a list of formats
    (new([CACHE, CATEGORY]), None, "mini-imagenet-cache pickles and miniImageNet_category_split"),
]


@pytest.mark.parametrize(("form", "spoil", "culprit"), ONE_FAULT)
def test_one_fault(form, spoil, culprit, tmp_path, refused, monkeypatch):
    if "parquet" in str(form):
        pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    source = form(tmp_path) if callable(form) else make(form, tmp_path)
    if spoil:
        spoil(source)
    assert culprit in refused(source)
    assert not (tmp_path / "owned").exists()


def test_missing_pyarrow(tmp_path, refused, monkeypatch):
    formats.write(tmp_path / "hub", {"train.parquet": b"PAR1"})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refused(tmp_path / "hub")


def test_links_in_an_archive_are_not_followed(tmp_path, run):
    source = make("mini_tar", tmp_path)
    with tarfile.open(source, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo("train/n01532829/link.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    code, out, _ = run(source)
    assert code == 0
    assert tree(tmp_path / "out") == dataset()
    assert "link.jpg" in out


def test_a_zip_archive_that_holds_a_name_twice(tmp_path, refused):
    source = make("mini_zip", tmp_path)
    with zipfile.ZipFile(source, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(next(iter(dataset())), b"x")
    assert "00000002.jpg" in refused(source)


@pytest.mark.parametrize("form", ["mini_folder", "mini_tar", "csv_folder"])
def test_images_that_cannot_be_decoded_are_all_named(form, tmp_path, refused, monkeypatch):
    names = [list(dataset())[n] for n in (7, 77, 277)]
    half = dataset()[names[0]][:500]
    broken = dataset() | dict(zip(names, (half, b"", b"<html>404</html>"), strict=True))
    monkeypatch.setattr(formats, "dataset", lambda: broken)
    line = refused(make(form, tmp_path))
    assert all(os.path.basename(name) in line for name in names)


# ---- Flags and destinations


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
        ('{"train": ["a"], "val": ["b"], "test": ["c"], "val": ["c"]}', "as val"),
        ('{"train": ["a"], "val": ["b"], "validation": ["c"], "test": []}', "as validation"),
        ({"train": ["a"], "val": ["b"]}, "test"),
        ({"train": ["a"], "val": ["b"], "test": ["x"]}, "(x)"),
        ({"train": ["a"], "val": ["b"], "test": ["b"]}, "class b"),
        ({"train": ["a", "b"], "val": [], "test": ["c"]}, "val"),
    ],
)
def test_wrong_split(split, culprit, tmp_path, refused):
    source = new([f"{cls}/{i}.jpg" for cls in "abc" for i in range(2)])(tmp_path)
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
        (["--check=~/nowhere"], os.path.expanduser("~/nowhere")),
    ],
)
def test_wrong_flags(argv, culprit, capsys):
    assert prepare(*argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert culprit in err


def test_flags_that_do_not_fit_the_source(tmp_path, refused):
    source = make("mini_zip", tmp_path)
    for name in ("formats", "splits/new", "../data/splits"):  # folders of code
        assert "--dest" in refused(source, dest=PREPARE.parent / name)
    assert "--link" in refused(source, "--link", "hard")
    assert "--split" in refused(source, "--split", "64/16/20")
    assert "/nowhere" in refused(source, "--class-names", "/nowhere")
    assert "train.csv" in refused(source, "--csv", tmp_path)


def test_dest_that_holds_something_else(tmp_path, refused):
    source = make("mini_zip", tmp_path)
    formats.write(tmp_path, {"dest/train/cat/1.jpg": b"mine", "file": b"mine"})
    for dest in ("dest", "file", "file/below"):
        assert str(tmp_path / dest[:4]) in refused(source, dest=tmp_path / dest)
    formats.write(tmp_path, {".away.part/mine.txt": b"mine"})
    assert prepare(source, "--dest", tmp_path / "away") == 2
    assert (tmp_path / ".away.part" / "mine.txt").read_bytes() == b"mine"


def test_source_and_dest_that_overlap(tmp_path, refused):
    source = make("mini_folder", tmp_path)
    assert "--check" in refused(source, dest=source)
    assert str(tmp_path) in refused(source, dest=tmp_path)
    (source / "dest").mkdir()  # empty: it is filled
    for _ in range(2):
        assert prepare(source, "--dest", source / "dest") == 0
        assert len(tree(source / "dest")) == 300


@pytest.mark.parametrize("target", ["link", "gone"])
def test_link_to_itself_or_nowhere(target, tmp_path, refused):
    os.symlink(target, tmp_path / "link")
    assert "link" in refused(make("mini_zip", tmp_path), dest=tmp_path / "link")
    assert "link" in refused(tmp_path / "link")


def test_unwritable_dest(tmp_path, refused):
    source = make("mini_zip", tmp_path)
    assert "/proc" in refused(source, dest="/proc/nowhere/out")
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o555)
        assert "locked" in refused(source, dest=tmp_path / "locked" / "out")


@pytest.mark.parametrize("form", ["mini_folder", "mini_zip", "cache_pickles"])
@pytest.mark.parametrize("limit", [0, 700])
def test_disk_that_fills_up(form, limit, tmp_path):
    source = make(form, tmp_path)
    argv = [sys.executable, PREPARE, source, "--dest", tmp_path / "out"]

    def fill_up():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    full = subprocess.run(argv, capture_output=True, text=True, preexec_fn=fill_up)
    assert (full.returncode, full.stderr.count("\n")) == (2, 1)
    assert "free some space" in full.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.part" / ".unpacked").exists()
    assert prepare(*argv[2:]) == 0
    assert formats.pixels(tree(tmp_path / "out")) == formats.pixels(dataset())


@pytest.mark.parametrize("output", [">&-", "2>&-", ">/dev/full"])
def test_closed_and_full_outputs(output, tmp_path):
    source, out = make("mini_folder", tmp_path), tmp_path / "out"
    for argv in ((source, "--dest", out), ("--check", source)):
        command = ["bash", "-c", f'"$@" {output}', "-", sys.executable, PREPARE, *argv]
        done = subprocess.run(command, capture_output=True, text=True)
        full = output == ">/dev/full"
        if "--check" in argv and not full:
            assert (done.returncode, done.stderr) == (1, "")  # it is not mini-ImageNet's 600
        else:
            assert (done.returncode, done.stderr.count("\n")) == (2 * full, full)
        assert done.stderr.startswith("error: output: " * full)
    assert out.exists() != full


def test_loops_litter_and_odd_files(tmp_path, run):
    source = make("mini_nested", tmp_path)
    inner = source / "a b" / "mini-imagenet"
    cls = inner / "train" / TRAIN
    os.symlink(source, inner / "train" / "loop")
    os.symlink("self", cls / "self")
    os.symlink(tmp_path / "gone.jpg", cls / "gone.jpg")
    os.mkfifo(cls / "pipe.jpg")
    formats.write(cls, {".hidden.jpg": b"x", "Thumbs.db": b"x", "notes.docx": b"x"})
    code, out, _ = run(source, "--dest", tmp_path / "öut put")
    assert code == 0
    assert tree(tmp_path / "öut put") == dataset()
    assert all(name in out for name in ("loop", "gone.jpg", "notes.docx"))


def test_names_that_are_no_text(tmp_path):
    names = [os.fsdecode(cls) + "/1.jpg" for cls in (b"\xff", b"b", b"c")]
    source = new(dict.fromkeys(names, formats.photograph(1)))(tmp_path)
    assert prepare(source, "--split", "1/1/1", "--dest", tmp_path / "out") == 0
    assert len(tree(tmp_path / "out")) == 3
    assert prepare("--check", tmp_path / "out") == 0


@pytest.mark.parametrize("end", ["a lock", "an interrupt"])
def test_two_at_once_and_an_interrupt(end, tmp_path, run, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    source, work = make("mini_zip", tmp_path), tmp_path / ".out.part"
    work.mkdir()
    with (work / ".lock").open("w") as file:
        if end == "a lock":
            fcntl.flock(file, fcntl.LOCK_EX)
        else:
            monkeypatch.setattr("formats.build._write", Call(KeyboardInterrupt).stop)
        code, _, err = run(source)
        assert code == (2 if end == "a lock" else 130)
    assert err.count("\n") == 1
    assert end != "a lock" or str(work) in err
    assert (work / ".lock").exists()
    assert not (tmp_path / "out").exists()
