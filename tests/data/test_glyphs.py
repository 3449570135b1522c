"""data/glyphs.py: classes, images and the folder."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))
import glyphs

from utils import run_main

SCRIPTS = {"digit", "latin", "greek", "cyrillic", "armenian", "georgian"}
FILES = {"train": 64, "val": 16, "test": 20}


def make(dest: Path, *flags: str) -> int:
    return run_main(glyphs.main, ["--dest", str(dest), *flags])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def modified(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A whole data set with two images a class; read only."""
    dest = tmp_path_factory.mktemp("glyphs") / "set"
    assert make(dest, "--per-class", "2") == 0
    return dest


# ---- Classes ----


def test_splits_are_disjoint_and_hold_all_scripts():
    splits = glyphs.class_splits()
    names = [glyphs.class_name(c) for members in splits.values() for c in members]
    assert {split: len(members) for split, members in splits.items()} == FILES
    assert len(set(names)) == len(set(glyphs.CHARACTERS)) == 100
    for members in splits.values():
        assert {glyphs.class_name(c).split("-")[0] for c in members} == SCRIPTS


def test_folder_names_are_safe_on_every_file_system():
    names = "".join(map(glyphs.class_name, glyphs.CHARACTERS))
    assert set(names) <= set("abcdefghijklmnopqrstuvwxyz-")
    assert glyphs.class_name("Ω") == "greek-capital-omega"


def test_each_class_has_many_typefaces_that_draw_it_as_itself():
    for character in glyphs.CHARACTERS:
        shapes = [glyphs.letter(character, face, 48) for face in glyphs.faces(character)]
        assert len(shapes) >= 12
        # the box that stands for a missing character differs from every shape
        for face, shape in zip(glyphs.faces(character), shapes, strict=True):
            assert shape.tobytes() != glyphs.letter("\U000f0000", face, 48).tobytes()


# ---- Images ----


@pytest.mark.parametrize("side", [32, 50])
def test_layout(side, made, tmp_path):
    if side != 32:
        made = tmp_path / "large"
        assert make(made, "--image-size", str(side), "--per-class", "2") == 0
    assert sorted(path.name for path in made.iterdir()) == ["prepared.json", "test", "train", "val"]
    for split, classes in FILES.items():
        assert len(list((made / split).iterdir())) == classes
        for folder in (made / split).iterdir():
            assert sorted(path.name for path in folder.iterdir()) == ["000.jpg", "001.jpg"]
            with Image.open(folder / "001.jpg") as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (side, side))


def test_an_image_depends_on_seed_character_and_index_alone(made):
    with Image.open(made / "train" / "greek-capital-sigma" / "001.jpg") as image:
        difference = np.asarray(image, float) - np.asarray(glyphs.draw(719, "Σ", 1, 32), float)
    assert np.abs(difference).mean() < 8  # JPEG's
    keys = [(719, "Σ", 1), (719, "Σ", 0), (719, "Ω", 1), (720, "Σ", 1), (719, "Σ", 1)]
    images = [glyphs.draw(*key, 32).tobytes() for key in keys]
    assert len(set(images)) == 4
    assert images[0] == images[-1]


def test_another_size_gives_the_same_picture():
    for character in "2Ωჰ":
        small = np.asarray(glyphs.draw(719, character, 3, 32), float)
        large = np.asarray(glyphs.draw(719, character, 3, 96).reduce(3), float)
        assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.9


def test_characters_are_whole_and_of_many_sizes():
    sizes = []
    for index, character in enumerate(glyphs.CHARACTERS):
        rng = np.random.default_rng(index)
        shape = glyphs.letter(character, glyphs.faces(character)[index % 12], 96)
        coverage = glyphs.place(shape, rng, 32)
        border = np.concatenate([coverage[0], coverage[-1], coverage[:, 0], coverage[:, -1]])
        assert border.max() < 0.5  # blur may reach the border, a stroke may not
        rows, columns = np.nonzero(coverage > 0.3)
        sizes.append(max(np.ptp(rows), np.ptp(columns)) + 1)
    assert min(sizes) >= 14
    assert max(sizes) - min(sizes) >= 8


def test_neither_impossible_nor_trivial():
    """Nearest class centroid of mean-centred pixels, 5-way 5-shot: far from chance and far from
    right.
    """
    classes = glyphs.class_splits()["test"]
    images = [[np.asarray(glyphs.draw(719, c, i, 32), float) for i in range(20)] for c in classes]
    features = np.array(images) - np.mean(images, axis=(2, 3), keepdims=True)
    features = features.reshape(20, 20, -1)
    rng = np.random.default_rng(0)
    accuracies = []
    for _ in range(200):
        images = np.stack(
            [features[c][rng.permutation(20)] for c in rng.choice(20, size=5, replace=False)]
        )
        centroids, query = images[:, :5].mean(axis=1), images[:, 5:]
        nearest = ((query[:, :, None] - centroids) ** 2).sum(axis=-1).argmin(axis=-1)
        accuracies.append((nearest == np.arange(5)[:, None]).mean())
    assert 0.28 < np.mean(accuracies) < 0.8


# ---- The folder ----


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        *(([], 0), (["--seed", "1"], 2), (["--per-class", "3"], 2), (["--image-size", "64"], 2)),
        *((["--image-size", "8"], 2), (["--per-class", "0"], 2), (["--sede", "1"], 2), (["x"], 2)),
    ],
)
def test_second_run_does_nothing_and_another_is_refused(flags, code, made, capsys):
    before = modified(made)
    assert make(made, "--per-class", "2", *flags) == code
    err = capsys.readouterr().err
    assert err.count("\n") == code // 2
    assert code == 0 or str(made) in err or flags[0] in err
    assert modified(made) == before


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").write_text("mine")
    assert run_main(glyphs.main, ["--dest=~/x"]) == 2
    assert str(tmp_path / "x") in capsys.readouterr().err


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"settings": {"seed": 719}}', "\xff"])
def test_a_damaged_record_is_refused(tmp_path, capsys, record):
    (tmp_path / "prepared.json").write_text(record, encoding="latin-1")
    assert make(tmp_path) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert (tmp_path / "prepared.json").read_text(encoding="latin-1") == record


def test_interrupted_it_resumes_to_the_same_bytes(made, tmp_path, capsys, monkeypatch):
    draw, calls = glyphs.draw, []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 100:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(glyphs, "draw", interrupt)
    assert make(tmp_path / "set", "--per-class", "2") == 130
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "set").exists()
    assert make(tmp_path / "set", "--per-class", "2") == 0
    assert contents(tmp_path / "set") == contents(made)  # the same settings, the same bytes
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert len(calls) < 300  # not all of them again
