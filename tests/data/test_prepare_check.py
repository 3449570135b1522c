"""data/prepare.py --check: what a data set is, and what is wrong with it."""

import json
import shutil

import prepare_formats as formats
import pytest
from PIL import Image
from prepare_formats import CLASSES, SPLITS, plans, prepare


@pytest.fixture
def check(capsys):
    """Run --check; returns (exit code, stdout)."""

    def check(folder):
        code = prepare.main(["--check", str(folder)])
        out, err = capsys.readouterr()
        assert err == ""
        return code, out

    return check


def line_of(out, split):
    return next(line.split() for line in out.splitlines() if line.startswith(split))


def test_mini_imagenet_is_called_by_its_name(tmp_path, check, monkeypatch):
    assert (plans.MINI.per_class, plans.TINY.per_class) == (600, 450)
    monkeypatch.setattr("formats.manifest.MINI.per_class", 3)
    code, out = check(formats.layout_folder(tmp_path))
    assert code == 0
    assert "\nmini-ImageNet, 64/16/20 x 3\n" in out
    assert line_of(out, "train")[:5] == ["train", "64", "192", "3", "20x20"]
    assert line_of(out, "val")[:4] == ["val", "16", "48", "3"]
    assert line_of(out, "test")[:4] == ["test", "20", "60", "3"]


def test_what_is_missing_or_too_much_is_named(tmp_path, check):
    source = formats.layout_folder(tmp_path)
    lost, moved, short = CLASSES["train"][5], CLASSES["val"][1], CLASSES["test"][7]
    shutil.rmtree(source / "train" / lost)
    (source / "val" / moved).rename(source / "test" / moved)
    next((source / "test" / short).iterdir()).unlink()
    formats.write(source, {"test/n00000001/1.jpg": formats.photograph([5])})
    code, out = check(source)
    assert code == 1
    assert "not mini-ImageNet, 64/16/20 x 600" in out
    assert f"missing from train: 1 classes ({lost})" in out
    assert f"missing from val: 1 classes ({moved})" in out
    assert "too many in test: 2 classes" in out
    assert f"{short}: 598" in out


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda at: shutil.copytree(a_file(at, "val").parent, at / "train" / CLASSES["val"][0]),
            "more than one split",
        ),
        (
            lambda at: a_file(at, "test").write_bytes(b"\xff\xd8\xff none"),
            "cannot be decoded: test/",
        ),
        (lambda at: (at / "train" / "n00000001").mkdir(), "without images"),
        (lambda at: (a_file(at, "train").parent / "Thumbs.db").write_bytes(b""), "Thumbs.db"),
        (
            lambda at: a_file(at, "val").write_bytes(formats.photograph([77])),
            "val is not what prepare.py wrote",
        ),
    ],
)
def test_faults_are_reported(spoil, said, tmp_path, check):
    source = formats.layout_folder(tmp_path)
    dest = tmp_path / "out"
    assert prepare.main([str(source), "--dest", str(dest), "--link", "copy"]) == 0
    before = check(dest)[1]
    assert said not in before
    spoil(dest)
    code, out = check(dest)
    assert code == 1
    assert said in out


def test_an_image_that_is_there_twice_is_reported(tmp_path, check):
    source = formats.layout_folder(tmp_path)
    (a_file(source, "train").parent / "again.jpg").write_bytes(a_file(source, "train").read_bytes())
    (a_file(source, "test").parent / "again.jpg").write_bytes(a_file(source, "val").read_bytes())
    _, out = check(source)
    assert "note: the same image twice in one split: 1 images" in out
    cls = CLASSES["val"][0], CLASSES["test"][0]
    assert (
        f"note: the same image in two splits: val/{cls[0]}/{cls[0]}00000002.jpg and test/{cls[1]}/again.jpg"
        in out
    )


def a_file(at, split):
    return sorted((at / split / CLASSES[split][0]).iterdir())[0]


def test_other_data_sets(tmp_path, check):
    names = [(split, cls, i) for split in range(3) for cls in range(2) for i in range(3)]
    files = {f"{SPLITS[s]}/{s}-{c}/{i}.png": formats.png([s, c, i]) for s, c, i in names}
    code, out = check(formats.write(tmp_path / "own", files))
    assert code == 0
    assert "not mini-ImageNet, but a data set of its own: 2/2/2 x 3 images" in out
    assert line_of(out, "train")[4] == "12x12"


def test_first_600_of_ilsvrc_are_not_called_mini_imagenet(tmp_path, check, monkeypatch):
    monkeypatch.setattr("formats.manifest.MINI.per_class", 5)
    source = formats.ilsvrc_folder(tmp_path)
    for split in SPLITS:
        (tmp_path / f"{split}.csv").unlink()
    assert prepare.main([str(source), "--dest", str(tmp_path / "out")]) == 0
    code, out = check(tmp_path / "out")
    assert code == 0
    assert "mini-ImageNet's classes, 64/16/20 x 5, but not the published images" in out


def test_published_images_are_known_by_their_fingerprints(tmp_path, check, monkeypatch):
    published = {"train": "a0f6099e953b59a0", "val": "47092cf1f09ba147", "test": "8b64ff4d6c3030ef"}
    assert plans.MINI.fingerprints == published
    monkeypatch.setattr("formats.manifest.MINI.per_class", 3)
    source = formats.layout_folder(tmp_path)
    out = check(source)[1]
    assert "the published images" not in out
    monkeypatch.setattr(
        "formats.manifest.MINI.fingerprints", {split: line_of(out, split)[-1] for split in SPLITS}
    )
    assert "\nmini-ImageNet, 64/16/20 x 3: the published images\n" in check(source)[1]
    a_file(source, "val").write_bytes(formats.photograph([77]))
    assert "the published images" not in check(source)[1]


@pytest.mark.parametrize("by_file", [False, True])
def test_a_split_of_ones_own_is_not_held_against_mini_imagenet(by_file, tmp_path, capsys, check):
    source = formats.class_folders(tmp_path)
    split = "60/20/20"
    if by_file:
        lists = {name: CLASSES[name][: (6, 2, 2)[n]] for n, name in enumerate(SPLITS)}
        split = str(tmp_path / "split.json")
        (tmp_path / "split.json").write_text(json.dumps(lists))
    assert prepare.main([str(source), "--split", split, "--dest", str(tmp_path / "out")]) == 0
    made = capsys.readouterr().out
    code, out = check(tmp_path / "out")
    assert code == 0
    for text in (made, out):
        assert "missing" not in text
        assert "too many" not in text
        assert f"a data set of its own: {'6/2/2' if by_file else split} x 3 images" in text


def next_of(out):
    return out.splitlines()[-1].removeprefix("next: ")


def test_the_next_command(tmp_path, check, monkeypatch):
    monkeypatch.chdir(formats.ROOT)
    at = formats.layout_folder(tmp_path).rename(tmp_path / "my set")
    for folder in at.glob("*/*"):
        for n in range(20):
            (folder / f"more{n}.jpg").write_bytes(formats.photograph([n], 8))
    out = check(at)[1]
    assert "not mini-ImageNet" in out  # it has findings, which come first
    assert next_of(out) == f"correct what is listed above, then: --check {at}"
    monkeypatch.setattr("formats.manifest.MINI.per_class", 23)
    assert next_of(check(at)[1]) == f"bash scripts/train_5s_5c.sh --data-root '{at}'"
    monkeypatch.chdir(tmp_path)
    assert next_of(check(at)[1]) == f"bash {formats.ROOT}/scripts/train_5s_5c.sh --data-root '{at}'"


@pytest.mark.parametrize(
    ("classes", "images", "flags"),
    [(2, 4, "--n-class 2 --n-shot 2 --n-eval 2"), (2, 1, None), (1, 20, None)],
)
def test_the_next_command_for_small_data_sets(classes, images, flags, tmp_path, check):
    files = {
        f"{s}/{s}{c}/{i}.png": formats.png([c, i])
        for s in SPLITS
        for c in range(classes)
        for i in range(images)
    }
    said = next_of(check(formats.write(tmp_path / "own", files))[1])
    assert (
        said.endswith(f"train_5s_5c.sh --data-root {tmp_path}/own {flags}")
        if flags
        else said.startswith("add classes")
    )


def test_the_next_command_for_glyphs_and_omniglot(tmp_path, check, monkeypatch):
    monkeypatch.chdir(formats.ROOT)
    monkeypatch.setattr("formats.check.DATA", tmp_path)
    monkeypatch.setattr("formats.check.SCRIPTS", formats.ROOT / "scripts")
    files = {
        f"{s}/{s}{c}/{i}.png": formats.png([c, i])
        for s in SPLITS
        for c in range(5)
        for i in range(20)
    }
    omniglot = {"settings": {"source": "omniglot", "split": "5/5/5"}}
    for name, marker, content, home, away in (
        (
            "glyphs",
            "glyphs.json",
            {},
            "quickstart.sh",
            "train_5s_5c.sh --data-root {} --image-size 12 --augment none",
        ),
        (
            "omniglot",
            "prepared.json",
            omniglot,
            "train_omniglot.sh",
            "train_omniglot.sh --data-root {}",
        ),
    ):
        for place, wanted in ((tmp_path / name, home), (tmp_path / "else" / name, away)):
            formats.write(place, files | {marker: json.dumps(content).encode()})
            assert next_of(check(place)[1]) == f"bash scripts/{wanted.format(place)}"


def test_fingerprint_of_a_png_is_of_its_pixels(tmp_path, check):
    files = {
        f"{split}/{split}-{c}/1.png": formats.png([n, c])
        for n, split in enumerate(SPLITS)
        for c in range(2)
    }
    at = formats.write(tmp_path / "own", files)
    first = check(at)[1]
    for path in at.rglob("*.png"):  # another encoder
        before = path.read_bytes()
        Image.open(path).save(path, compress_level=0)
        assert path.read_bytes() != before
    assert check(at)[1] == first


def test_fingerprint_is_of_the_classes_images(tmp_path, check):
    source = formats.layout_folder(tmp_path)
    first = line_of(check(source)[1], "train")[-1]
    a, b = CLASSES["train"][:2]
    (source / "train" / a / "renamed.jpg").write_bytes(a_file(source, "train").read_bytes())
    a_file(source, "train").unlink()
    assert line_of(check(source)[1], "train")[-1] == first
    moved = sorted((source / "train" / a).iterdir())[0]
    other = sorted((source / "train" / b).iterdir())[0]
    content = moved.read_bytes(), other.read_bytes()
    moved.write_bytes(content[1])
    other.write_bytes(content[0])
    assert line_of(check(source)[1], "train")[-1] != first
