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

SOURCES = ("layout_folder", "layout_zip", "csv_folder", "cache_pickles")


@pytest.fixture
def refused(capsys, tmp_path):
    """Run the command, which must refuse: returns its line."""

    def refused(*argv, dest=None):
        dest = dest or tmp_path / "dest"
        before = tree(tmp_path)
        code = prepare.main([*map(str, argv), "--dest", str(dest)])
        out, err = capsys.readouterr()
        assert code == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in out + err
        assert tree(tmp_path) == before
        assert not list(tmp_path.rglob("*.part"))
        return err

    return refused


# ---- pickles


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def evil(tmp_path, thing, key="image_data"):
    source = formats.cache_pickles(tmp_path)
    path = source / "mini-imagenet-cache-val.pkl"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | {key: thing}))
    return source


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda at: Call(os.system, f"touch {at}/owned"), "system"),
        (lambda at: Call(eval, f"open('{at}/owned', 'w')"), "eval"),
        (lambda at: Call(getattr, "", "upper"), "getattr"),
        (lambda at: Call(np.load, f"{at}/x.npy"), "load"),
        (
            lambda at: Call(np.lib.format.open_memmap, f"{at}/owned", "w+", "u1", (1,)),
            "open_memmap",
        ),
        (lambda at: io.BytesIO, "BytesIO"),
        (lambda at: np.dtype([("a", "O")]), "not uint8"),
    ],
    ids=["system", "eval", "getattr", "numpy-load", "numpy-file", "class", "objects"],
)
def test_malicious_pickle(call, named, tmp_path, refused):
    thing = call(tmp_path)
    if isinstance(thing, np.dtype):
        thing = np.zeros(3, thing)
    line = refused(evil(tmp_path, thing))
    assert "mini-imagenet-cache-val.pkl" in line
    assert named in line
    assert not (tmp_path / "owned").exists()


def forged(images, shape):
    """A Python 2 pickle that claims another shape than it has bytes for."""
    return formats.python2_pickle(images, [0]).replace(
        b"M\x01\x00", b"M" + shape.to_bytes(2, "little")
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "Ran out of input"),
        (b"\x80\x04}", "refused"),
        (b"no pickle at all", "refused"),
        (pickle.dumps([1, 2]), "dict was expected"),
        (pickle.dumps({"data": 1}), "no 'image_data'"),
        (pickle.dumps({"image_data": 1, "class_dict": {}}), "array was expected"),
        (
            pickle.dumps({"image_data": np.zeros((2, 3, 3, 3), np.float32), "class_dict": {}}),
            "not uint8",
        ),
        (pickle.dumps({"image_data": np.zeros((2, 3), np.uint8), "class_dict": {}}), "not uint8"),
        (pickle.dumps({"image_data": np.zeros((2, 3, 3, 3), np.uint8)}), "dict was expected"),
    ],
)
def test_pickle_of_something_else(content, said, tmp_path, refused):
    source = formats.cache_pickles(tmp_path)
    (source / "mini-imagenet-cache-test.pkl").write_bytes(content)
    assert said in refused(source)


def test_truncated_pickles(tmp_path, refused):
    for form in (formats.cache_pickles, formats.category_pickles):
        at = tmp_path / form.__name__
        at.mkdir()
        path = next(path for path in form(at).iterdir() if path.stem.endswith("train"))
        path.write_bytes(path.read_bytes()[:-2000])
        assert f"{path.name}: refused" in refused(at)


def test_category_pickle_with_a_forged_shape(tmp_path, refused):
    source = formats.category_pickles(tmp_path)
    content = forged(np.zeros((1, 4, 4, 3), np.uint8), 9)
    assert content != formats.python2_pickle(np.zeros((1, 4, 4, 3), np.uint8), [0])
    (source / "miniImageNet_category_split_val.pickle").write_bytes(content)
    assert "damaged" in refused(source)


def test_two_pickles_of_three(tmp_path, refused):
    source = formats.cache_pickles(tmp_path)
    (source / "mini-imagenet-cache-val.pkl").unlink()
    assert "lacks val" in refused(source)


# ---- wrong labels


@pytest.mark.parametrize(
    "change",
    [
        lambda classes, cls, other: {cls: [*classes[cls], 10**6]},
        lambda classes, cls, other: {cls: [-1]},
        lambda classes, cls, other: {cls: classes[cls][1:]},
        lambda classes, cls, other: {cls: classes[cls] + classes[other]},
        lambda classes, cls, other: {cls: []},
        lambda classes, cls, other: {cls: ["a"]},
        lambda classes, cls, other: {cls: [], "../../up": classes[cls]},
    ],
    ids=["above", "below", "unlabelled", "twice", "none", "text", "path"],
)
def test_wrong_label_in_a_cache_pickle(change, tmp_path, refused):
    source = formats.cache_pickles(tmp_path)
    path = source / "mini-imagenet-cache-val.pkl"
    data = pickle.loads(path.read_bytes())
    classes = data["class_dict"] | change(data["class_dict"], *CLASSES["val"][:2])
    data["class_dict"] = {
        cls: rows for cls, rows in classes.items() if rows or ".." not in "".join(classes)
    }
    path.write_bytes(pickle.dumps(data))
    refused(source)


def test_more_labels_than_images_in_a_category_pickle(tmp_path, refused):
    source = formats.category_pickles(tmp_path)
    content = formats.python2_pickle(np.zeros((4, 6, 6, 3), np.uint8), [1, 2, 3, 1, 2])
    (source / "miniImageNet_category_split_test.pickle").write_bytes(content)
    assert "4 images, but 5 labels" in refused(source)


@pytest.mark.parametrize("label", [100, -1, None])
def test_wrong_label_in_a_shard(label, tmp_path, refused):
    pytest.importorskip("pyarrow")
    source = formats.parquet_every_class(tmp_path)
    names = [str(n) for n in range(100)]
    image = formats.photograph([0])
    formats.shard(
        source / "default" / "test" / "0000.parquet",
        [("a.jpg", image, 1), ("b.jpg", image, label)],
        names,
    )
    line = refused(source)
    assert "row 1" in line
    assert str(label) in line


def test_class_in_two_splits(tmp_path, refused):
    source = formats.layout_folder(tmp_path)
    cls = CLASSES["test"][3]
    formats.write(source, {f"train/{cls}/x.jpg": formats.photograph([1])})
    line = refused(source)
    assert f"class {cls} is in train and in test" in line


def csv_with(tmp_path, change):
    source = formats.csv_folder(tmp_path)
    path = source / "train.csv"
    path.write_text(change(path.read_text()))
    return source


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace(",n01558993", ",n01704323", 1), "line 5: wrong label n01704323"),
        (lambda text: text + "x.jpg,../../up\n", "x.jpg is missing"),
        (
            lambda text: text.replace(".jpg,n01558993", ".jpg,..", 1),
            "cannot be the name of a class",
        ),
        (
            lambda text: text + "n0153282900000099.jpg,n01532829\n",
            "line 194: its image n0153282900000099.jpg is miss",
        ),
        (lambda text: text + "n0153282900000099.jpg\n", "is not filename,label"),
        (lambda text: text + text.splitlines()[1] + "\n", "two images"),
        (lambda text: text + "n0153282900000002.jpg,bird\n", "listed twice"),
        (lambda text: "filename,label\n", "no class for train"),
        (lambda text: text + '"', "CSV"),
    ],
)
def test_wrong_csv_line(change, said, tmp_path, refused):
    assert said in refused(csv_with(tmp_path, change))


def test_csv_lines_image_is_missing(tmp_path, refused):
    for form, name in ((formats.csv_folder, "images"), (formats.ilsvrc_folder, "")):
        at = tmp_path / form.__name__
        at.mkdir()
        source = form(at)
        files = sorted((source / name).rglob(f"{CLASSES['train'][0]}*.*"))
        files[-1].unlink()
        line = refused(source)
        assert "train.csv: line" in line
        assert f"{CLASSES['train'][0]}0000000" in line


# ---- archives


@pytest.mark.parametrize(
    "name", ["../x.jpg", "/abs/x.jpg", "train/../../x.jpg", "C:\\x.jpg", "a/..\\..\\x.jpg"]
)
@pytest.mark.parametrize("pack", [formats.tar, formats.zipped])
def test_archive_that_points_outside(name, pack, tmp_path, refused):
    if pack is formats.tar and name.startswith("a"):
        pytest.skip("a backslash is a letter in a tar archive's names")
    line = refused(pack(tmp_path / "evil.archive", dataset() | {name: b"x"}))
    assert "points outside" in line


@pytest.mark.parametrize(
    ("kind", "target"), [(tarfile.SYMTYPE, "../../../../etc"), (tarfile.LNKTYPE, "/etc/passwd")]
)
def test_link_in_an_archive_that_points_outside(kind, target, tmp_path, refused):
    source = formats.layout_tar(tmp_path)
    with tarfile.open(source, "a") as archive:
        member = tarfile.TarInfo("train/n01532829/link.jpg")
        member.type, member.linkname = kind, target
        archive.addfile(member)
    assert "points outside" in refused(source)


def test_links_inside_an_archive_are_followed(tmp_path):
    files = dataset()
    first, second, *_ = files
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"d/{name}")
            if name == second:
                member.type, member.linkname = tarfile.LNKTYPE, f"d/{first}"
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    assert prepare.main([str(tmp_path / "x.tar"), "--dest", str(tmp_path / "out")]) == 0
    assert tree(tmp_path / "out") == files | {second: files[first]}


@pytest.mark.parametrize(
    "form", ["layout_tar", "layout_tar_gz", "layout_zip", "ilsvrc_tar", "class_folders_zip"]
)
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.7, 0.999])
def test_truncated_archive(form, kept, tmp_path, refused):
    source = getattr(formats, form)(tmp_path)
    content = source.read_bytes()
    # a tar archive is padded with zeros, whose loss does no harm
    content = content.rstrip(b"\0") if form.endswith("tar") else content
    source.write_bytes(content[: int(len(content) * kept)])
    line = refused(source)
    assert ("truncated" in line) if kept else ("empty" in line)


def test_tar_that_ends_between_two_members(tmp_path, refused):
    source = formats.layout_tar(tmp_path)
    with tarfile.open(source) as archive:
        end = archive.getmembers()[150].offset
    source.write_bytes(source.read_bytes()[:end])
    assert "no end mark" in refused(source)


def test_corrupt_bytes_within_a_zip(tmp_path, refused):
    source = formats.layout_zip(tmp_path)
    content = bytearray(source.read_bytes())
    with zipfile.ZipFile(source) as archive:
        at = archive.getinfo(next(iter(dataset()))).header_offset + 200
    content[at : at + 4] = b"????"
    source.write_bytes(content)
    assert "damaged" in refused(source)


def test_encrypted_zip(tmp_path, refused):
    source = formats.layout_zip(tmp_path)
    content = bytearray(source.read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 8] |= 1
    source.write_bytes(content)
    assert "encrypted" in refused(source)


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".jpg", ""])
def test_a_file_that_is_no_archive(suffix, tmp_path, refused):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"<html>404</html>" * 50)
    assert str(path) in refused(path)


def test_truncated_shard_and_missing_pyarrow(tmp_path, refused, monkeypatch):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and no more")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refused(tmp_path)
    monkeypatch.undo()
    pytest.importorskip("pyarrow")
    assert "damaged Parquet" in refused(tmp_path)


def test_shard_with_a_damaged_page(tmp_path, refused):
    pytest.importorskip("pyarrow")
    source = formats.parquet_split(tmp_path)
    path = source / "data" / "test-00001-of-00002.parquet"
    content = bytearray(path.read_bytes())
    for at in range(4, len(content) - 2000, 50):
        content[at] ^= 0xFF
    path.write_bytes(content)
    refused(source)


# ---- images


@pytest.mark.parametrize("form", ["layout_folder", "layout_tar", "csv_folder"])
@pytest.mark.parametrize(
    "damage", [lambda c: c[: len(c) // 2], lambda c: b"", lambda c: b"<html>404</html>"]
)
def test_image_that_cannot_be_decoded(form, damage, tmp_path, refused, monkeypatch):
    name = list(dataset())[77]
    broken = dataset() | {name: damage(dataset()[name])}
    monkeypatch.setattr(formats, "dataset", lambda: broken)
    line = refused(getattr(formats, form)(tmp_path))
    assert name.split("/")[-1] in line
    assert "not a sound image" in line


def test_class_without_images(tmp_path, refused):
    for source, folder in (
        (formats.layout_folder(tmp_path / "a"), "train/n00000001"),
        (formats.class_folders(tmp_path / "b"), "n00000001"),
    ):
        (source / folder).mkdir()
        (source / folder / "notes.txt").write_text("none yet")
        assert f"class folder {folder} holds no image" in refused(source)


# ---- sources and destinations


def test_wrong_path_and_empty_folder(tmp_path, refused):
    assert "no such file" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no images, no files at all" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "a.npy").write_bytes(b"x")
    line = refused(tmp_path / "empty")
    assert "holds no images among its 1 files (.npy)" in line
    assert "known forms" in line
    os.symlink(tmp_path / "gone", tmp_path / "dangling")
    assert "link" in refused(tmp_path / "dangling")


def test_two_forms_in_one_folder(tmp_path, refused):
    source = formats.cache_pickles(tmp_path)
    formats.write(source, {"pictures/of/them.jpg": formats.photograph([1])})
    (tmp_path / "more").mkdir()
    formats.category_pickles(tmp_path / "more")
    line = refused(source)
    assert "mini-imagenet-cache pickles and miniImageNet_category_split pickles" in line
    formats.layout_folder(tmp_path / "more")
    assert "301 images" in refused(source)


def test_no_split_and_two_of_three_splits(tmp_path, refused):
    source = formats.write(
        tmp_path / "own", {f"{c}/{i}.jpg": formats.photograph([i]) for c in "abc" for i in range(2)}
    )
    assert "--split" in refused(source)
    for value, said in (
        ("1/1/2", "3 classes"),
        ("3/0/0", "3 classes"),
        (str(tmp_path / "none.json"), "JSON"),
        (str(tmp_path / "own"), "directory"),
    ):
        assert said in refused(source, "--split", value)
    for lists, said in (
        ({"train": ["a"], "val": ["b"]}, "must be"),
        ([], "must be"),
        ({"train": ["a"], "val": ["b"], "test": ["x"]}, "(x)"),
        ({"train": ["a"], "val": ["b"], "test": ["b"]}, "both"),
        ({"train": ["a", "b"], "val": [], "test": ["c"]}, "val"),
    ):
        (tmp_path / "s.json").write_text(json.dumps(lists))
        assert said in refused(source, "--split", tmp_path / "s.json")
    (tmp_path / "s.json").write_text("{")
    assert "not JSON" in refused(source, "--split", tmp_path / "s.json")
    assert "leave it out" in refused(formats.layout_zip(tmp_path), "--split", "64/16/20")
    source = formats.layout_folder(tmp_path)
    (source / "val").rename(tmp_path / "elsewhere")
    assert "train" in refused(source)


def test_nearly_mini_imagenet(tmp_path, refused):
    source = formats.class_folders(tmp_path)
    (source / CLASSES["val"][2]).rename(tmp_path / "x")
    line = refused(source)
    assert "lacks 1 of mini-ImageNet's 100 classes" in line
    assert CLASSES["val"][2] in line


def test_dest_that_holds_something_else(tmp_path, refused):
    source = formats.layout_zip(tmp_path)
    formats.write(tmp_path, {"dest/train/cat/1.jpg": b"mine"})
    assert "choose another --dest" in refused(source)
    (tmp_path / "file").write_text("mine")
    assert "not a folder" in refused(source, dest=tmp_path / "file")
    refused(source, dest=tmp_path / "file" / "below")
    os.symlink(tmp_path / "gone", tmp_path / "link")
    assert "exists" in refused(source, dest=tmp_path / "link")
    formats.write(tmp_path, {".away.part/mine.txt": b"mine"})
    line = prepare.main([str(source), "--dest", str(tmp_path / "away")])
    assert line == 2
    assert (tmp_path / ".away.part" / "mine.txt").read_bytes() == b"mine"


def test_links_in_a_circle(tmp_path, capsys):
    os.symlink("circle", tmp_path / "circle")
    source = formats.layout_zip(tmp_path)
    for argv in (
        [str(source), "--dest", str(tmp_path / "circle")],
        [str(tmp_path / "circle"), "--dest", str(tmp_path / "out")],
    ):
        assert prepare.main(argv) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_source_that_is_the_dest(tmp_path, refused):
    source = formats.layout_folder(tmp_path)
    assert "--check" in refused(source, dest=source)
    assert "exists" in refused(source, dest=source.parent)


def test_empty_dest_is_filled_and_source_may_surround_it(tmp_path):
    source = formats.cache_pickles(tmp_path)
    (source / "dest").mkdir()
    assert prepare.main([str(source), "--dest", str(source / "dest")]) == 0
    assert len(tree(source / "dest")) == 300
    assert prepare.main([str(source), "--dest", str(source / "dest")]) == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_dest(tmp_path, refused):
    source = formats.layout_zip(tmp_path)
    (tmp_path / "locked").mkdir(mode=0o555)
    assert "choose another --dest" in refused(source, dest=tmp_path / "locked" / "out")


def test_unwritable_dest(tmp_path, refused):
    assert "/proc" in refused(formats.layout_zip(tmp_path), dest="/proc/nowhere/out")


@pytest.mark.parametrize("form", SOURCES)
@pytest.mark.parametrize(
    ("limit", "said"), [(0, "free some space"), (700, "no room on the disk: free some space")]
)
def test_disk_that_fills_up(form, limit, said, tmp_path):
    source = getattr(formats, form)(tmp_path)
    argv = [sys.executable, PREPARE, source, "--dest", tmp_path / "out"]

    def fill_up():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    full = subprocess.run(argv, capture_output=True, text=True, preexec_fn=fill_up)
    assert (full.returncode, full.stderr.count("\n")) == (2, 1)
    assert said in full.stderr
    assert (
        limit == 0
        or f"run the same command again; it resumes from {tmp_path}/.out.part" in full.stderr
    )
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob(".*.jpg.part"))
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
    assert "links that lead in a circle, 1" in out
    assert "links that lead nowhere" in out
    assert "notes.docx" in out


def test_names_that_are_no_text(tmp_path, capsys):
    source = tmp_path / "bytes"
    for cls in (b"\xff\xfe", b"b", b"c"):
        (source / os.fsdecode(cls)).mkdir(parents=True)
        (source / os.fsdecode(cls) / "1.jpg").write_bytes(formats.photograph(list(cls)))
    argv = [str(source), "--split", "1/1/1", "--dest", str(tmp_path / "out")]
    assert prepare.main(argv) == 0
    assert (
        sorted(os.listdir(tmp_path / "out" / "train") + os.listdir(tmp_path / "out" / "val")) != []
    )
    assert prepare.main(["--check", str(tmp_path / "out")]) == 0


def test_two_at_once(tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl")
    source = formats.layout_zip(tmp_path)
    work = tmp_path / ".out.part"
    work.mkdir()
    with (work / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert prepare.main([str(source), "--dest", str(tmp_path / "out")]) == 2
    assert "in use by another process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
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
    ],
)
def test_wrong_flags(argv, said, capsys):
    code = prepare.main(argv)
    err = capsys.readouterr().err
    assert (code, err.count("\n")) == (2, 1)
    assert said in err


def test_flags_that_do_not_fit_the_source(tmp_path, refused):
    source = formats.layout_zip(tmp_path)
    assert "only files of a folder can be linked" in refused(source, "--link", "hard")
    (tmp_path / "flat").mkdir()
    formats.write(tmp_path / "flat", {"images/a.jpg": b"x"})
    assert "no train.csv" in refused(tmp_path / "flat", "--csv", tmp_path / "flat")
    assert "--csv" in refused(tmp_path / "flat" / "images")
    assert "/nowhere" in refused(source, "--class-names", "/nowhere")


@pytest.mark.parametrize(
    "form", ["layout_tar_gz", "layout_zip", "ilsvrc_tar", "cache_pickles", "category_pickles"]
)
def test_bytes_changed_anywhere_end_in_a_data_set_or_in_one_line(form, tmp_path, capsys):
    source = getattr(formats, form)(tmp_path)
    target = source if source.is_file() else next(source.glob("*train.p*"))
    sound = target.read_bytes()
    random = np.random.default_rng(0)
    codes = set()
    for _ in range(8):
        content = bytearray(sound)
        at = (
            int(random.integers(len(content) - 100))
            if random.random() < 0.5
            else int(random.integers(90))
        )
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
