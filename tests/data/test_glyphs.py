"""data/glyphs.py: classes, images and the folder."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))
import glyphs

from engine.process import run_main

FILES = {"train": 64, "val": 16, "test": 20}


def make(dest: Path, *flags: str) -> int:
    return run_main(glyphs.main, ["--dest", str(dest), *flags])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A whole data set with two images a class; read only."""
    dest = tmp_path_factory.mktemp("glyphs") / "set"
    assert make(dest, "--per-class", "2") == 0
    return dest


# ---- Classes ----


def test_each_class_has_many_typefaces_that_draw_it_as_itself():
    for character in glyphs.CHARACTERS:
        shapes = [glyphs.letter(character, face, 48) for face in glyphs.faces(character)]
        assert len(shapes) >= 12
        # the box that stands for a missing character differs from every shape
        for face, shape in zip(glyphs.faces(character), shapes, strict=True):
            assert shape.tobytes() != glyphs.letter("\U000f0000", face, 48).tobytes()


# ---- Images ----


def test_layout(tmp_path):
    made = tmp_path / "large"
    assert make(made, "--image-size", "50", "--per-class", "2") == 0
    assert sorted(path.name for path in made.iterdir()) == ["prepared.json", "test", "train", "val"]
    for split, classes in FILES.items():
        assert len(list((made / split).iterdir())) == classes
        for folder in (made / split).iterdir():
            assert sorted(path.name for path in folder.iterdir()) == ["000.jpg", "001.jpg"]
            with Image.open(folder / "001.jpg") as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (50, 50))


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


# ---- The folder ----


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        ("", 0),
        *((f"--{flag}", 2) for flag in ("seed 1", "per-class 3", "image-size 64", "image-size 8")),
        *((flags, 2) for flags in ("--per-class 0", "--sede 1", "x")),
    ],
)
def test_second_run_does_nothing_and_another_is_refused(flags, code, made, capsys):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert make(made, "--per-class", "2", *flags.split()) == code
    err = capsys.readouterr().err
    assert err.count("\n") == code // 2
    assert code == 0 or str(made) in err or flags.split()[0] in err
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


@pytest.mark.parametrize("record", ["", "{}", '{"settings": {"seed": 719}}', "\xff"])
def test_a_damaged_record_is_refused(tmp_path, capsys, record, monkeypatch):
    """Also in the home folder after an equals sign, which no shell replaces."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "prepared.json").write_text(record, encoding="latin-1")
    assert run_main(glyphs.main, ["--dest=~/set"]) == 2
    assert str(tmp_path / "set") in capsys.readouterr().err
    assert (tmp_path / "set" / "prepared.json").read_text(encoding="latin-1") == record
