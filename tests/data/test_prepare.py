"""data/prepare.py: every format of one data set comes out as that data set."""

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import unicodedata

import prepare_formats as formats
import pytest
from conftest import ONE_THREAD, before_call, completed, kill_self
from prepare_formats import CLASSES, SPLITS, dataset, make, pixels, prepare, refused, run, tree


def folders(at):
    return {split: sorted(os.listdir(at / split)) for split in SPLITS}


@pytest.mark.parametrize("form", formats.FORMS)
def test_every_format_comes_out_as_the_same_data_set(form, tmp_path, run):
    """Byte for byte; of arrays pixel for pixel."""
    code, _, err = run(make(form, tmp_path))
    assert (code, err) == (0, "")
    made = tree(tmp_path / "out")
    assert pixels(made) == pixels(dataset())
    assert form not in formats.FILE_FORMS or made == dataset()
    assert form not in formats.ARRAY_FORMS or all(name.endswith(".png") for name in made)
    named = {os.path.dirname(name) for name in made} == set(map(os.path.dirname, dataset()))
    assert named == (form not in formats.UNNAMED)


def test_ilsvrc_without_csv_takes_the_first_images(tmp_path, run, monkeypatch):
    """Which are not called mini-ImageNet's."""
    monkeypatch.setattr("data.formats.splits.MINI.per_class", 3)
    files, cls = formats.below("train", formats.ilsvrc_files()), formats.NAMES[0]
    assert run(formats.write(tmp_path, files))[0] == 0
    kept = {f"{cls}_{n}.JPEG" for n in formats.NUMBERS[:3]}
    assert {path.name for path in (tmp_path / "out").glob(f"*/{cls}/*")} == kept
    code, out, _ = run("--check", tmp_path / "out")
    assert code == 0
    assert "not the published images" in out


@pytest.mark.parametrize("packed", [False, True])
def test_tiny_imagenet_comes_out_as_tiny64(packed, tmp_path, run, monkeypatch):
    monkeypatch.setattr("data.formats.splits.TINY.per_class", 3)
    files = formats.tiny_imagenet()
    source = formats.write(tmp_path, formats.packed("tiny.zip", files) if packed else files)
    assert run(source)[0] == 0
    lists = {split: sorted(classes) for split, classes in formats.TINY_CLASSES.items()}
    assert folders(tmp_path / "out") == lists
    cls = formats.TINY_CLASSES["train"][0]
    names = {f"{cls}_{i}.JPEG" for i in range(3)}
    assert set(os.listdir(tmp_path / "out" / "train" / cls)) == names


OTHER = ["Hund", "été 1", "猫", "d.e", "_x", "Z"]


def other_classes():
    pairs = [(n, cls, i) for n, cls in enumerate(OTHER) for i in range(2)]
    return {f"own/images/{cls}/{i}.jpg": formats.photograph(n, i) for n, cls, i in pairs}


@pytest.mark.parametrize(
    ("packed", "encoding", "form"), [(True, "utf-8", "NFC"), (False, "utf-8-sig", "NFD")]
)
def test_split_by_file(packed, encoding, form, tmp_path, run):
    """Also with a byte order mark, and where file and folders write é in two ways."""
    lists = {"train": OTHER[:3], "val": [OTHER[3]], "test": [OTHER[4]]}
    text = unicodedata.normalize(form, json.dumps(lists, ensure_ascii=False))
    (tmp_path / "split.json").write_text(text, encoding)
    files = other_classes()
    if packed:
        nfd = {unicodedata.normalize("NFD", name): x for name, x in files.items()}
        files = formats.packed("own.zip", nfd)
    source = formats.write(tmp_path, files)
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
    source, drawn = formats.write(tmp_path, other_classes()), []
    for n, seed in enumerate((1, 1, 2, 3)):
        dest = tmp_path / f"out{n}"
        assert run(source, "--split", "3/1/2", "--seed", seed, "--dest", dest)[0] == 0
        drawn.append(folders(dest))
        assert [len(part) for part in drawn[-1].values()] == [3, 1, 2]
        assert sorted(itertools.chain(*drawn[-1].values())) == sorted(OTHER)
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


def test_shards_whose_labels_have_no_names_need_a_split(tmp_path, run, refused):
    pytest.importorskip("pyarrow")
    shard = formats.shard(formats.rows(names=formats.NAMES, with_path=False))
    source = formats.write(tmp_path, {"hub/train.parquet": shard})
    assert "--split" in refused(source)
    assert run(source, "--split", "64/16/20")[0] == 0
    assert set(folders(tmp_path / "out")["train"]) < {f"class-{n:03d}" for n in range(100)}


def test_two_folders_of_the_same_other_classes_need_a_split(tmp_path, run, refused):
    names = [f"own/{s}/{cls}/{i}.jpg" for s in ("train", "test") for cls in "abc" for i in "12"]
    source = formats.write(tmp_path, dict.fromkeys(names, formats.photograph(1)))
    assert "--split" in refused(source)
    assert run(source, "--split", "1/1/1")[0] == 0
    assert len(tree(tmp_path / "out")) == len(names)  # images of the same name are both kept


def test_after_a_kill_it_starts_over(tmp_path, run):
    source, dest, work = make("mini_tar", tmp_path), tmp_path / "out", tmp_path / ".out.part"

    def killed():
        before_call(setattr, formats.build, "_write", lambda n: n == 100 and kill_self())
        prepare(source, "--dest", dest)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    assert not dest.exists()
    assert len(list(work.glob("made/*/*/n*"))) >= 90
    assert run(source)[0] == 0
    assert tree(dest) == dataset()
    assert not work.exists()


def test_from_any_folder_without_torch_and_over_what_another_source_left(tmp_path):
    source = make("mini_zip", tmp_path)
    formats.write(tmp_path / ".out.part", {"made/train/n9/x.jpg": b"x", ".lock": b""})
    code = "import sys, prepare\nassert prepare.main([sys.argv[1], '--dest', 'out']) == 0\n"
    command = [sys.executable, "-c", f"{code}assert 'torch' not in sys.modules", source.name]
    env = ONE_THREAD | {"PYTHONPATH": str(formats.PREPARE.parent)}
    assert completed(command, cwd=tmp_path, env=env).stderr == ""
    assert tree(tmp_path / "out") == dataset()


def test_default_dest_is_beside_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("prepare.DATA", tmp_path / "data")
    tiny = formats.write(tmp_path, formats.tiny_imagenet())
    sources = (make("mini_zip", tmp_path), "miniImagenet", 300), (tiny, "tiny64", 202)
    for source, name, images in sources:
        for _ in range(2):
            assert prepare(source) == 0
        assert len(tree(tmp_path / "data" / name)) == images


@pytest.mark.parametrize("unpacked", [True, False])
def test_omniglot(unpacked, tmp_path, run, refused, monkeypatch):
    """What torchvision leaves: two archives, and what they held; or archives put there by hand."""
    datasets = pytest.importorskip("torchvision.datasets")
    sums, drawings = {}, {}
    for part, numbers in (("images_background", range(9)), ("images_evaluation", range(9, 12))):
        files = {
            f"{part}/Alphabet_{n // 3}/character{n % 3:02d}/{n:04d}_{i:02d}.png": formats.png(n, i)
            for n, i in itertools.product(numbers, range(2))
        }
        archive = formats.packed(f"{part}.zip", files)
        formats.write(tmp_path / "omniglot-py", archive | (files if unpacked else {}))
        sums[part] = hashlib.md5(archive[f"{part}.zip"]).hexdigest()
        drawings |= files
    monkeypatch.setattr(datasets.Omniglot, "zips_md5", sums)
    argv = ("omniglot", "--download", tmp_path)
    assert "12 classes" in refused(*argv)  # the usual split asks for 1,623
    assert run(*argv, "--split", "6/2/4")[0] == 0
    assert sorted(tree(tmp_path / "out").values()) == sorted(drawings.values())
    classes = folders(tmp_path / "out")
    assert [len(classes[split]) for split in SPLITS] == [6, 2, 4]
    wanted = {"_".join(name.split("/")[1:3]) for name in drawings}
    assert set(itertools.chain(*classes.values())) == wanted
    code, out, _ = run(*argv, "--split", "6/2/4")
    assert (code, out.count("\n")) == (0, 1)


def test_omniglot_that_cannot_be_downloaded(tmp_path, refused, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(datasets.Omniglot, "download_url_prefix", f"file://{tmp_path}/nowhere")
    assert "images_background.zip" in refused("omniglot", "--download", tmp_path / "new")
