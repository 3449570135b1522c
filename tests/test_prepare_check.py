"""data/prepare.py --check: what a data set is, and what is wrong with it."""

import shutil

import prepare_forms as forms
import pytest
from PIL import Image
from prepare_forms import CLASSES, SPLITS, plans, prepare


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
    monkeypatch.setattr("forms.plans.MINI.per_class", 3)
    code, out = check(forms.layout_folder(tmp_path))
    assert code == 0
    assert "\nmini-ImageNet, 64/16/20 x 3\n" in out
    assert line_of(out, "train")[:5] == ["train", "64", "192", "3", "20x20"]
    assert line_of(out, "val")[:4] == ["val", "16", "48", "3"]
    assert line_of(out, "test")[:4] == ["test", "20", "60", "3"]


def test_what_is_missing_or_too_much_is_named(tmp_path, check):
    source = forms.layout_folder(tmp_path)
    lost, moved, short = CLASSES["train"][5], CLASSES["val"][1], CLASSES["test"][7]
    shutil.rmtree(source / "train" / lost)
    (source / "val" / moved).rename(source / "test" / moved)
    next((source / "test" / short).iterdir()).unlink()
    forms.write(source, {"test/n00000001/1.jpg": forms.photograph([5])})
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
        (lambda at: shutil.copytree(a_file(at, "val").parent, at / "train" / CLASSES["val"][0]), "more than one split"),
        (lambda at: a_file(at, "test").write_bytes(b"\xff\xd8\xff none"), "cannot be decoded: test/"),
        (lambda at: (at / "train" / "n00000001").mkdir(), "without images"),
        (lambda at: (a_file(at, "train").parent / "Thumbs.db").write_bytes(b""), "Thumbs.db"),
        (lambda at: a_file(at, "val").write_bytes(forms.photograph([77])), "val is not what prepare.py wrote"),
    ],
)
def test_faults_are_reported(spoil, said, tmp_path, check):
    source = forms.layout_folder(tmp_path)
    dest = tmp_path / "out"
    assert prepare.main([str(source), "--dest", str(dest), "--link", "copy"]) == 0
    before = check(dest)[1]
    assert said not in before
    spoil(dest)
    code, out = check(dest)
    assert code == 1
    assert said in out


def test_an_image_that_is_there_twice_is_reported(tmp_path, check):
    source = forms.layout_folder(tmp_path)
    (a_file(source, "train").parent / "again.jpg").write_bytes(a_file(source, "train").read_bytes())
    (a_file(source, "test").parent / "again.jpg").write_bytes(a_file(source, "val").read_bytes())
    _, out = check(source)
    assert "note: the same image twice in one split: 1 images" in out
    cls = CLASSES["val"][0], CLASSES["test"][0]
    assert f"note: the same image in two splits: val/{cls[0]}/{cls[0]}00000002.jpg and test/{cls[1]}/again.jpg" in out


def a_file(at, split):
    return sorted((at / split / CLASSES[split][0]).iterdir())[0]


def test_other_data_sets(tmp_path, check):
    names = [(split, cls, i) for split in range(3) for cls in range(2) for i in range(3)]
    files = {f"{SPLITS[s]}/{s}-{c}/{i}.png": forms.png([s, c, i]) for s, c, i in names}
    code, out = check(forms.write(tmp_path / "own", files))
    assert code == 0
    assert "not mini-ImageNet, but a data set of its own: 2/2/2 x 3 images" in out
    assert line_of(out, "train")[4] == "12x12"


def test_first_600_of_ilsvrc_are_not_called_mini_imagenet(tmp_path, check, monkeypatch):
    monkeypatch.setattr("forms.plans.MINI.per_class", 5)
    source = forms.ilsvrc_folder(tmp_path)
    for split in SPLITS:
        (tmp_path / f"{split}.csv").unlink()
    assert prepare.main([str(source), "--dest", str(tmp_path / "out")]) == 0
    code, out = check(tmp_path / "out")
    assert code == 0
    assert "mini-ImageNet's classes, 64/16/20 x 5, but not the published images" in out


def test_fingerprint_of_a_png_is_of_its_pixels(tmp_path, check):
    files = {f"{split}/{split}-{c}/1.png": forms.png([n, c]) for n, split in enumerate(SPLITS) for c in range(2)}
    at = forms.write(tmp_path / "own", files)
    first = check(at)[1]
    for path in at.rglob("*.png"):  # another encoder
        before = path.read_bytes()
        Image.open(path).save(path, compress_level=0)
        assert path.read_bytes() != before
    assert check(at)[1] == first


def test_fingerprint_is_of_the_classes_images(tmp_path, check):
    source = forms.layout_folder(tmp_path)
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
