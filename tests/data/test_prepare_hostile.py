"""data/prepare.py and input that is wrong: one line, exit code 2, the destination as it was."""

import io
import os
import pickle
import resource
import subprocess
import sys
import tarfile
import zipfile
from unittest.mock import Mock

import numpy as np
import prepare_formats as formats
import pytest
from prepare_formats import CLASSES, PREPARE, dataset, make, prepare, refused, run, tree

TRAIN, VAL, TEST = (CLASSES[split][0] for split in formats.SPLITS)


# ---- Sources with one fault, and the culprit that the line names


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


ZEROS = np.zeros((48, 3, 3, 3), np.uint8)
OF = {cls: [3 * n, 3 * n + 1, 3 * n + 2] for n, cls in enumerate(CLASSES["val"])}


def cache(**changes):
    """A pickle of mini-imagenet-cache."""
    return pickle.dumps({"image_data": ZEROS, "class_dict": OF} | changes)


def rows(old, new):
    """A change of a table's text."""
    return lambda content: content.replace(old, new, 1)


def label(value):
    """A shard with a wrong label in row 1."""

    def make(_):
        images = [("a.jpg", b"x", 1), ("b.jpg", b"x", value)]
        return formats.shard(images, formats.NAMES)

    return make


def flip(content):
    """Bytes that differ everywhere but in the head and the index."""
    damaged = bytearray(content)
    for at in range(4, len(damaged) - 2000, 50):
        damaged[at] ^= 0xFF
    return bytes(damaged)


def encrypted(content):
    at = content.index(b"PK\x01\x02") + 8
    return content[:at] + bytes([content[at] | 1]) + content[at + 1 :]


def spoilt(content):
    middle = len(content) // 2
    return content[:middle] + b"????" + content[middle + 4 :]


def half_a_tar(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return content[: archive.getmembers()[150].offset]


def cut(kept):
    # a tar archive is padded with zeros, whose loss does no harm
    return lambda content: content[: int(len(content.rstrip(b"\0")) * kept)]


def evil(path, name):
    """An archive with a member of this name."""
    return lambda _: formats.packed(path, dataset() | {name: b"x"})[path]


CUTS = [cut(kept) for kept in (0.0, 0.3, 0.999)]
CACHE, CATEGORY = "p/mini-imagenet-cache-val.pkl", "p/miniImageNet_category_split_val.pickle"
SHARD, NUMBERED = "hub/data/test-00001-of-00002.parquet", "hub/default/test/0000.parquet"
TABLE = "ravi/train.csv"
# a shape of 9 images, but bytes for one; more labels than images
FORGED = formats.python2_pickle(ZEROS[:1], [0]).replace(b"M\x01\x00", b"M\x09\x00")
UNEVEN = formats.python2_pickle(ZEROS[:2], [1, 2, 3])
# a format -> [(a file, or a part of its name, its content, a change of it, or None: it is gone,
# a culprit)]
FAULTS = {
    "cache_pickles_4": [
        *(
            (CACHE, cache(image_data=Call(*call)), call[0].__name__)
            for call in (
                (os.system, "touch owned"),
                (eval, "open('owned', 'w')"),
                (getattr, "", "upper"),
                (np.load, "owned"),
                (np.lib.format.open_memmap, "owned", "w+", "u1", (1,)),
                (io.BytesIO,),
            )
        ),
        (CACHE, cache(image_data=np.zeros(3, [("a", "O")])), "image_data"),
        (CACHE, cache(image_data=1), "image_data"),
        (CACHE, cache(image_data=ZEROS.astype(np.float32)), "float32"),
        (CACHE, cache(image_data=ZEROS[0, 0]), "[3, 3]"),
        (CACHE, cache(class_dict=None), "class_dict"),
        (CACHE, cache(class_dict=OF | {VAL: [0, 1, 2, 10**6]}), VAL),
        (CACHE, cache(class_dict=OF | {VAL: [-1]}), VAL),
        (CACHE, cache(class_dict=OF | {VAL: [0]}), "no class"),
        (CACHE, cache(class_dict=OF | {VAL: [0, 1, 2, 3]}), VAL),
        (CACHE, cache(class_dict=OF | {VAL: []}), VAL),
        (CACHE, cache(class_dict=OF | {VAL: ["a"]}), VAL),
        (CACHE, rows(VAL.encode(), b"../../../"), "'..'"),
        (CACHE, b"", CACHE[2:]),
        (CACHE, pickle.dumps([1, 2]), "list"),
        (CACHE, pickle.dumps({"other": 1}), "image_data"),
        (CACHE, cut(0.9), CACHE[2:]),
        (CACHE, None, "val"),
        (CATEGORY, b"x", "mini-imagenet-cache pickles and miniImageNet_category_split"),
    ],
    "category_pickles": [
        *((CATEGORY, change, CATEGORY[2:]) for change in (cut(0.9), FORGED, UNEVEN)),
        ("val", None, "val"),
    ],
    "parquet_every_class": [
        (NUMBERED, label(value), f"row 1: wrong label {value}") for value in (100, -1, None)
    ],
    "parquet_split": [(SHARD, b"PAR1 and no more", SHARD[4:]), (SHARD, flip, SHARD[4:])],
    "csv_folder": [
        (TABLE, rows(b",n01558993", b",n01704323"), "line 5"),
        (TABLE, rows(b".jpg,n01558993", b".jpg,.."), "'..'"),
        (TABLE, rows(b"label", b"x"), TABLE),
        (TABLE, b"filename,label\n", "train"),
        (TABLE, b"", TABLE),
        *(
            (TABLE, lambda content, line=line: content + line, culprit)
            for line, culprit in (
                (b"x.jpg,../../up", "x.jpg"),
                (b"../../x.jpg,n01532829", "x.jpg"),
                (b"n0153282900000099.jpg,n01532829", "line 194"),
                (b"n0153282900000099.jpg", "line 194"),
                (b"n0153282900000002.jpg,n01532829", "n0153282900000002.jpg"),
                (b"n0153282900000002.jpg,bird", "00002.jpg"),
                (b'"', TABLE),
                (b"\0,", TABLE),
                (b"\xff.jpg,x\n", TABLE),
            )
        ),
        (f"{TRAIN}00000002.jpg", None, f"{TABLE}: line"),
    ],
    "ilsvrc_folder": [(f"{TRAIN}_4321.JPEG", None, "train.csv: line")],
    "mini_tar": [("mini.tar", change, "mini.tar") for change in (*CUTS, half_a_tar)],
    "mini_tar_gz": [("mini.tar.gz", change, "mini.tar.gz") for change in (*CUTS, spoilt)],
    "mini_tar_xz": [("mini.tar.xz", change, "mini.tar.xz") for change in (*CUTS, spoilt)],
    "mini_zip": [("mini.zip", change, "mini.zip") for change in (*CUTS, spoilt, encrypted)],
    "ilsvrc_tar": [("ILSVRC", cut(0.3), "ILSVRC2012_img_train.tar")],
    "zip_in_zip": [("outer.zip", cut(0.3), "outer.zip")],
    "mini_folder": [
        ("mini/train/n00000001/x.txt", b"", "n00000001"),
        (f"mini/train/{TEST}/x.jpg", b"", TEST),
        ("/val/", None, "val"),
    ],
    "class_folders": [("all/n00000001/x.txt", b"", "n00000001"), (VAL, None, VAL)],
    "": [
        *((name, b"x", name) for name in ("x.zip", "x.jpg", "x")),
        ("new/.hidden", b"", "new"),
        ("new/a.npy", b"", ".npy"),
        ("new/a.jpg", b"", "--csv"),
        *(
            (path, evil(path, name), path)
            for path in ("evil.tar", "evil.zip")
            for name in ("../x.jpg", "/abs/x.jpg", "t/../../x.jpg", "C:\\x")
        ),
        # a backslash is a letter in a tar archive's names
        ("evil.zip", evil("evil.zip", "a/..\\..\\x"), "evil.zip"),
    ],
}
ONE_FAULT = [(form, *fault) for form, faults in FAULTS.items() for fault in faults]


@pytest.mark.parametrize(("form", "part", "change", "culprit"), ONE_FAULT)
def test_one_fault(form, part, change, culprit, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = dict(formats.files_of(form)) if form else {}
    for name in [name for name in files if part in name] or [part]:
        files[name] = change(files.get(name)) if callable(change) else change
    source = formats.write(tmp_path, {k: v for k, v in files.items() if v is not None})
    assert culprit in refused(source)
    assert not (tmp_path / "owned").exists()


def test_sources_that_are_not_one(tmp_path, refused):
    assert "nowhere" in refused(tmp_path / "nowhere")
    formats.write(tmp_path, {"new/a.zip": b"x", "new/b.zip": b"x"})
    assert "a.zip" in refused(tmp_path / "new")  # and not a list of formats


def test_missing_pyarrow(tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pyarrow" in refused(formats.write(tmp_path, {"hub/train.parquet": b"PAR1"}))


def test_two_archives_of_a_class(tmp_path, refused):
    tar = formats.packed("x.tar", {"n01532829_1.JPEG": formats.photograph(1)})["x.tar"]
    files = {f"{part}/{cls}.tar": tar for part in "ab" for cls in ("n01532829", "n01558993")}
    assert "n01532829" in refused(formats.write(tmp_path, formats.below("all", files)))


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
    line = refused(formats.write(tmp_path, formats.FORMS[form]()))
    assert all(os.path.basename(name) in line for name in names)


# ---- Flags and destinations

SPLIT_FILES = {  # what --split names, or the content of the file -> the culprit
    "": "--split",
    "1/1/2": "3 classes",
    "3/0/0": "3 classes",
    "/nowhere.json": "/nowhere.json",
    os.path.dirname(__file__): "--split",
    "{": "JSON",
    "[" * 100_000: "JSON",
    "[]": "train",
    '{"train": ["a"], "val": ["b"], "test": ["c"], "val": ["c"]}': "as val",
    '{"train": ["a"], "val": ["b"], "validation": ["c"], "test": []}': "as validation",
    '{"train": ["a"], "val": ["b"]}': "test",
    '{"train": ["a"], "val": ["b"], "test": ["x"]}': "(x)",
    '{"train": ["a"], "val": ["b"], "test": ["b"]}': "class b",
    '{"train": ["a", "b"], "val": [], "test": ["c"]}': "val",
}


@pytest.mark.parametrize("split", SPLIT_FILES, ids=range(len(SPLIT_FILES)))
def test_wrong_split(split, tmp_path, refused):
    names = [f"new/{cls}/{i}.jpg" for cls in "abc" for i in range(2)]
    source, culprit = formats.write(tmp_path, dict.fromkeys(names, b"x")), SPLIT_FILES[split]
    if split.startswith(("[", "{")):
        (tmp_path / "split.json").write_text(split)
        split = tmp_path / "split.json"
    assert culprit in refused(source, *(("--split", split) if split else ()))


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        ("", "SOURCE"),
        ("x --check y", "SOURCE"),
        ("x --link magic", "--link"),
        ("x --seed a", "--seed"),
        ("x --seed -1", "--seed"),
        ("x --nonsense", "--nonsense"),
        ("x --split 1/1/1", "--dest"),
        ("x --csv /nowhere", "x"),
        ("--check /nowhere", "/nowhere"),
        (f"--check {__file__}", __file__),
        ("--check=~/nowhere", os.path.expanduser("~/nowhere")),
    ],
)
def test_wrong_flags(words, culprit, capsys):
    assert prepare(*words.split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert culprit in err


def test_flags_and_destinations_that_do_not_fit_the_source(tmp_path, refused):
    source = make("mini_zip", tmp_path)
    for flag, value in (("--link", "hard"), ("--split", "64/16/20"), ("--csv", "/nowhere")):
        assert flag in refused(source, flag, value)
    tables = formats.write(tmp_path, formats.below("tables", formats.tables()))
    for form in ("mini_folder", "category_pickles"):
        assert "--csv" in refused(make(form, tmp_path / form), "--csv", tables)
    formats.write(tmp_path, {"dest/train/cat/1.jpg": b"mine", "file": b"mine"})
    os.symlink("loop", tmp_path / "loop")
    os.symlink("gone", tmp_path / "link")
    (tmp_path / "empty").mkdir()
    os.symlink("empty", tmp_path / "to empty")
    assert "--dest" in refused(source, dest=tmp_path / "to empty")
    for name in ("dest", "file", "file/below", "loop", "link"):
        assert str(tmp_path / name.split("/")[0]) in refused(source, dest=tmp_path / name)
    assert "/proc" in refused(source, dest="/proc/nowhere/out")
    assert "loop" in refused(tmp_path / "loop")
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o555)
        assert "locked" in refused(source, dest=tmp_path / "locked" / "out")
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


@pytest.mark.parametrize(
    ("form", "limit"),
    [("mini_folder", 0), ("mini_folder", 700), ("mini_zip", 700), ("cache_pickles_4", 700)],
)
def test_disk_that_fills_up(form, limit, tmp_path, run):
    source, usual = make(form, tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))  # no file may be larger
        code, _, err = run(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert (code, err.count("\n")) == (2, 1)
    assert "free some space" in err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.part").exists()
    assert run(source)[0] == 0
    assert formats.pixels(tree(tmp_path / "out")) == formats.pixels(dataset())


def test_a_full_output(tmp_path):
    argv = [sys.executable, PREPARE, make("mini_folder", tmp_path), "--dest", tmp_path / "out"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: output: ")
    assert not (tmp_path / "out").exists()


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
    names = [f"new/{os.fsdecode(cls)}/1.jpg" for cls in (b"\xff", b"b", b"c")]
    source = formats.write(tmp_path, dict.fromkeys(names, formats.photograph(1)))
    assert prepare(source, "--split", "1/1/1", "--dest", tmp_path / "out") == 0
    assert len(tree(tmp_path / "out")) == 3
    assert prepare("--check", tmp_path / "out") == 0


def test_two_at_once(tmp_path, run):
    fcntl = pytest.importorskip("fcntl")
    source, lock = make("mini_zip", tmp_path), tmp_path / ".out.part" / ".lock"
    formats.write(tmp_path, {".out.part/.lock": b"", ".out.part/made/1.jpg": b"x"})
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, _, err = run(source)
    assert (code, err.count("\n")) == (2, 1)
    assert str(lock.parent) in err
    assert (lock.parent / "made" / "1.jpg").exists()


def test_an_interrupt_leaves_nothing_behind(tmp_path, run, monkeypatch):
    source, before = make("mini_zip", tmp_path), tree(tmp_path)
    monkeypatch.setattr("data.formats.build._write", Mock(side_effect=KeyboardInterrupt))
    code, _, err = run(source)
    assert (code, err.count("\n")) == (130, 1)
    assert tree(tmp_path) == before
    assert not (tmp_path / ".out.part").exists()
