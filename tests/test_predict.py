import csv
import shutil

import pytest
from PIL import Image
from test_cli import expect, train

import main


@pytest.fixture(scope="module")
def checkpoint(master, tmp_path_factory):
    save = tmp_path_factory.mktemp("predict") / "logs"
    assert train(master, save) == 0
    return f"{save}-719/ckpts/meta-learner-best.pth.tar"


@pytest.fixture
def photographs(master, tmp_path):
    """Three classes with two, two and three examples, and some images to classify."""
    for k, name in enumerate(("cats", "dogs", "ünicode birds")):
        (tmp_path / "support" / name).mkdir(parents=True)
        for i in range(3 if k == 2 else 2):
            shutil.copy(master / "test" / f"test class {k}" / f"{i}.jpg", tmp_path / "support" / name / f"{i}.jpg")
    (tmp_path / "query").mkdir()
    for k in range(4):
        shutil.copy(master / "test" / f"test class {k % 3}" / f"{4 + k}.jpg", tmp_path / "query" / f"{k}.jpg")
    Image.new("RGB", (300, 120), "red").save(tmp_path / "wide.png")
    return tmp_path


def run(checkpoint, place, *flags):
    argv = ["--mode", "predict", "--resume", checkpoint, "--cpu", "--out", str(place / "answer")]
    return main.run([*argv, *flags])


def test_predictions(checkpoint, photographs, capsys):
    support, query = str(photographs / "support"), [str(photographs / "query"), str(photographs / "wide.png")]
    assert run(checkpoint, photographs, "--support", support, "--query", *query) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = list(csv.reader((photographs / "answer.csv").open(encoding="utf-8")))
    assert rows[0] == ["file", "class", "probability", "cats", "dogs", "ünicode birds"]
    assert [row[0].rsplit("/", 1)[1] for row in rows[1:]] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "wide.png"]
    for row in rows[1:]:
        probabilities = [float(p) for p in row[3:]]
        assert sum(probabilities) == pytest.approx(1, abs=1e-3)
        assert row[1] == rows[0][3:][probabilities.index(max(probabilities))]
        assert any(line.startswith(row[0]) and row[1] in line for line in lines)
    assert min(Image.open(photographs / "answer.png").size) > 300
    first = (photographs / "answer.csv").read_bytes()
    assert run(checkpoint, photographs, "--support", support, "--query", *query) == 0
    assert (photographs / "answer.csv").read_bytes() == first


def test_bad_input(checkpoint, photographs, capsys):
    support, query = str(photographs / "support"), str(photographs / "query")
    expect(capsys, run(checkpoint, photographs, "--query", query), "--support: needed by --mode predict")
    expect(capsys, run(checkpoint, photographs, "--support", support), "--query: needed by --mode predict")
    expect(capsys, run(checkpoint, photographs, "--support", "nowhere", "--query", query), "--support nowhere: no such folder")
    expect(capsys, run(checkpoint, photographs, "--support", support, "--query", "gone.jpg"), "--query gone.jpg")
    (photographs / "void").mkdir()
    expect(capsys, run(checkpoint, photographs, "--support", support, "--query", str(photographs / "void")), "no images there")
    (photographs / "support" / "fish").mkdir()
    expect(capsys, run(checkpoint, photographs, "--support", support, "--query", query), "4 classes", "trained for 3")
    (photographs / "support" / "fish").rmdir()
    shutil.rmtree(photographs / "support" / "cats")
    (photographs / "support" / "cats").mkdir()
    expect(capsys, run(checkpoint, photographs, "--support", support, "--query", query), "cats", "no images")
    shutil.copy(photographs / "wide.png", photographs / "support" / "cats")
    (photographs / "query" / "9.jpg").write_bytes(b"junk")
    expect(capsys, run(checkpoint, photographs, "--support", support, "--query", query), "9.jpg: not a readable image")
    assert not (photographs / "answer.csv").exists()
