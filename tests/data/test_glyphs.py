"""data/glyphs.py: the layout, the images, and the folder's whole-or-nothing life."""

import json
import signal
import subprocess
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import utils

SCRIPT = Path(__file__).resolve().parents[2] / "data" / "glyphs.py"
SPEC = spec_from_file_location("glyphs", SCRIPT)
glyphs = module_from_spec(SPEC)
SPEC.loader.exec_module(glyphs)

SCRIPTS = {"digit", "latin", "greek", "cyrillic", "armenian", "georgian"}
FILES = {"train": 64, "val": 16, "test": 20}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A whole data set with two images a class; read only."""
    dest = tmp_path_factory.mktemp("glyphs") / "set"
    assert glyphs.main(["--dest", str(dest), "--per-class", "2"]) == 0
    return dest


@pytest.fixture(scope="module")
def test_images() -> np.ndarray:
    """The held-out classes at the default settings, 20 images of each: float [20, 20, 32, 32, 3] in
    0 .. 255.
    """
    classes = glyphs.class_splits()["test"]
    return np.array(
        [[np.asarray(glyphs.draw(719, c, i, 32)) for i in range(20)] for c in classes], dtype=float
    )


# ---- Classes ----


def test_splits_are_disjoint_and_hold_all_scripts():
    splits = glyphs.class_splits()
    names = [glyphs.class_name(c) for members in splits.values() for c in members]
    assert {split: len(members) for split, members in splits.items()} == FILES
    assert len(set(names)) == len(set(glyphs.CHARACTERS)) == 100
    for members in splits.values():
        assert {glyphs.class_name(c).split("-")[0] for c in members} == SCRIPTS


def test_folder_names_are_safe_on_every_file_system():
    for character in glyphs.CHARACTERS:
        name = glyphs.class_name(character)
        assert name == name.lower()
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz-")
    assert glyphs.class_name("Ω") == "greek-capital-omega"


def test_each_class_has_many_typefaces_that_draw_it_as_itself():
    for character in glyphs.CHARACTERS:
        shapes = [glyphs.letter(character, face, 48) for face in glyphs.faces(character)]
        assert len(shapes) >= 12
        # the box that stands for a missing character differs from every shape
        for face, shape in zip(glyphs.faces(character), shapes, strict=True):
            assert shape.tobytes() != glyphs.letter("\U000f0000", face, 48).tobytes()


def test_computer_modern_is_used_for_ascii_only():
    assert "cmr10" in glyphs.faces("A")
    assert not any(face.startswith("cm") for face in glyphs.faces("ß"))


# ---- Images ----


def test_layout(made):
    for split, classes in FILES.items():
        folders = sorted(path.name for path in (made / split).iterdir())
        assert len(folders) == classes
        for folder in folders:
            assert sorted(path.name for path in (made / split / folder).iterdir()) == [
                "000.jpg",
                "001.jpg",
            ]
    assert sorted(path.name for path in made.iterdir()) == ["glyphs.json", "test", "train", "val"]
    marker = json.loads((made / "glyphs.json").read_text())
    assert {key: marker[key] for key in ("seed", "image_size", "per_class")} == {
        "seed": 719,
        "image_size": 32,
        "per_class": 2,
    }


def test_images_are_rgb_jpegs_of_the_given_size(made, tmp_path):
    for path in made.glob("*/*/*.jpg"):
        with Image.open(path) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))
    assert (
        glyphs.main(["--dest", str(tmp_path / "large"), "--per-class", "1", "--image-size", "50"])
        == 0
    )
    with Image.open(tmp_path / "large" / "test" / "greek-capital-omega" / "000.jpg") as image:
        assert image.size == (50, 50)


def test_same_settings_give_the_same_bytes(made, tmp_path):
    assert glyphs.main(["--dest", str(tmp_path / "again"), "--per-class", "2"]) == 0
    assert contents(tmp_path / "again") == contents(made)


def test_an_image_depends_on_seed_character_and_index_alone(made):
    with Image.open(made / "train" / "greek-capital-sigma" / "001.jpg") as image:
        difference = np.asarray(image, float) - np.asarray(glyphs.draw(719, "Σ", 1, 32), float)
    assert (
        np.abs(difference).mean() < 8
    )  # the JPEG of that very picture, however many were drawn before it
    images = [
        glyphs.draw(*key, 32).tobytes()
        for key in [(719, "Σ", 1), (719, "Σ", 0), (719, "Ω", 1), (720, "Σ", 1)]
    ]
    assert len(set(images)) == 4
    assert glyphs.draw(719, "Σ", 1, 32).tobytes() == images[0]


def test_another_size_gives_the_same_picture():
    for character in "2Ωჰ":
        small = np.asarray(glyphs.draw(719, character, 3, 32), float)
        large = np.asarray(glyphs.draw(719, character, 3, 96).reduce(3), float)
        assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.9


def test_characters_are_whole_and_of_many_sizes():
    sizes = []
    for index in range(100):
        character = glyphs.CHARACTERS[index]
        rng = np.random.default_rng(index)
        shape = glyphs.letter(character, glyphs.faces(character)[index % 12], 96)
        coverage = glyphs.place(shape, rng, 32)
        border = np.concatenate([coverage[0], coverage[-1], coverage[:, 0], coverage[:, -1]])
        assert border.max() < 0.5  # blur may reach the border, a stroke may not
        rows, columns = np.nonzero(coverage > 0.3)
        sizes.append(max(np.ptp(rows), np.ptp(columns)) + 1)
    assert min(sizes) >= 14
    assert max(sizes) - min(sizes) >= 8


def test_ink_is_darker_than_paper():
    rng = np.random.default_rng(0)
    for _ in range(100):
        paper, ink = glyphs.colours(rng)
        assert (paper - ink) @ glyphs.LUMA >= glyphs.CONTRAST


def test_images_of_a_class_differ(test_images):
    for images in test_images:
        distances = np.abs(images[:, None] - images[None]).mean(axis=(2, 3, 4))
        assert distances[~np.eye(len(images), dtype=bool)].min() > 4


def test_neither_impossible_nor_trivial(test_images):
    """Nearest class centroid of mean-centred pixels, 5-way 5-shot: far from chance and far from
    right.
    """
    features = test_images - test_images.mean(axis=(2, 3), keepdims=True)
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


def test_second_run_does_nothing(made, capsys):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert glyphs.main(["--dest", str(made), "--per-class", "2"]) == 0
    assert "there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_an_empty_folder_is_filled(tmp_path):
    assert glyphs.main(["--dest", str(tmp_path), "--per-class", "1"]) == 0
    assert (tmp_path / "glyphs.json").is_file()


def refused(capsys, dest: Path, *flags: str) -> str:
    """Runs the script, expects one line on stderr and exit code 2, and nothing changed; returns the
    line.
    """
    before = contents(dest) if dest.is_dir() else dest.read_bytes()
    assert glyphs.main(["--dest", str(dest), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert (contents(dest) if dest.is_dir() else dest.read_bytes()) == before
    return captured.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--per-class", "2", "--seed", "1"], "seed 719 (asked: 1)"),
        (["--per-class", "3"], "per_class 2 (asked: 3)"),
        (["--per-class", "2", "--image-size", "64"], "image_size 32 (asked: 64)"),
    ],
)
def test_other_settings_are_refused(made, capsys, flags, said):
    line = refused(capsys, made, *flags)
    assert said in line
    assert "choose another --dest or remove it" in line


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert "holds something else" in refused(capsys, tmp_path)
    assert "is a file" in refused(capsys, tmp_path / "thesis.txt")


@pytest.mark.parametrize("marker", ["", "[]", "{}", '{"seed": 719}', "\xff"])
def test_a_damaged_marker_is_refused(tmp_path, capsys, marker):
    (tmp_path / "glyphs.json").write_text(marker, encoding="latin-1")
    assert "glyphs.json is damaged" in refused(capsys, tmp_path)


@pytest.mark.parametrize("name", ["formats", "splits", "splits/new"])
def test_folders_of_code_are_refused(capsys, name):
    assert glyphs.main(["--dest", str(SCRIPT.parent / name)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "part of the code" in captured.err
    assert not (SCRIPT.parent / "splits" / "new").exists()


def test_missing_images_are_noticed(tmp_path, capsys):
    dest = tmp_path / "set"
    assert glyphs.main(["--dest", str(dest), "--per-class", "1"]) == 0
    capsys.readouterr()
    (dest / "test" / "digit-six" / "000.jpg").unlink()
    assert "holds 99 images, 100 were made" in refused(capsys, dest, "--per-class", "1")


def test_a_place_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert glyphs.main(["--dest", str(tmp_path / "file" / "set")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert str(tmp_path / "file") in captured.err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "flags",
    [
        ["--image-size", "8"],
        ["--image-size", "big"],
        ["--per-class", "0"],
        ["--seed", "-1"],
        ["--sede", "1"],
        ["x"],
    ],
)
def test_bad_flags_get_one_line(tmp_path, capsys, flags):
    assert glyphs.main(["--dest", str(tmp_path / "set"), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert flags[0] in captured.err
    assert not (tmp_path / "set").exists()


def test_help_names_defaults_and_units(capsys):
    with pytest.raises(SystemExit) as caught:
        glyphs.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for part in (
        "pixels (default: 32)",
        "10000 (default: 60)",
        "(default: 719)",
        str(Path("data") / "glyphs"),
    ):
        assert part in text


def test_killed_half_way_a_rerun_succeeds(made, tmp_path):
    dest = tmp_path / "set"
    unfinished = tmp_path / ".set.tmp"
    run = subprocess.Popen(
        [sys.executable, SCRIPT, "--dest", dest, "--per-class", "500"], cwd=tmp_path
    )
    while run.poll() is None and len(list(unfinished.glob("train/*"))) < 2:
        time.sleep(0.01)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    assert not dest.exists()
    assert unfinished.exists()
    assert glyphs.main(["--dest", str(dest), "--per-class", "2"]) == 0
    assert not unfinished.exists()
    assert contents(dest) == contents(made)


def test_interrupted_it_leaves_nothing(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(glyphs, "draw", interrupt)
    assert glyphs.main(["--dest", str(tmp_path / "set")]) == 130
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(utils.fcntl is None, reason="no locks on this system")
def test_two_runs_at_once_make_one_data_set(made, tmp_path):
    command = [sys.executable, SCRIPT, "--dest", tmp_path / "set", "--per-class", "2"]
    runs = [
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = sorted(run.communicate()[0] for run in runs)
    assert [run.returncode for run in runs] == [0, 0]
    assert sum("there already" in line for line in said) == 1
    assert contents(tmp_path / "set") == contents(made)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
