"""``--mode predict`` with a small model."""

import csv
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from conftest import before_call
from PIL import Image

from engine.flags import parse
from main import load_predictor
from tools import plots, predict
from tools.predictor import Predictor
from utils import UserError


@pytest.fixture
def answers(master, trained, tmp_path, monkeypatch):
    """Predict by three classes of examples in the working directory; the rows that are written."""
    for k in range(3):
        name = f"test class {k}"
        shutil.copytree(master / "test" / name, tmp_path / "support" / name)
    monkeypatch.chdir(tmp_path)

    def predicted(out="answer", written=None, query=master / "test" / "test class 1"):
        argv = ["--mode", "predict", "--cpu", "--resume", f"{trained}-719", "--out", out]
        argv += ["--support", "support", "--query", str(query)]
        predict.predict(load_predictor(parse(argv)))
        with Path(written or f"{out}.csv").open(encoding="utf-8") as file:
            return list(csv.reader(file))

    return predicted


def test_predictions_are_written_and_not_replaced(answers, monkeypatch):
    head, *rows = answers()
    assert head[3:] == ["test class 0", "test class 1", "test class 2"]
    assert len(rows) == 8
    for row in rows:
        shares = [float(p) for p in row[3:]]
        assert sum(shares) == pytest.approx(1, abs=1e-3)
        assert row[1] == head[3:][shares.index(max(shares))]
    monkeypatch.setattr(Predictor, "adapt", lambda *_: 1 / 0)  # refused before the work begins
    for left in ("answer.csv", "answer.png"):
        with pytest.raises(UserError, match=rf"{left}.*--out"):
            answers()
        Path(left).unlink()


def test_answers_are_printed_even_if_they_cannot_be_written(answers, monkeypatch, capsys):
    write = partial(Path("answer.csv").write_text, "another's")
    before_call(monkeypatch.setattr, Predictor, "predict", lambda _: write() and None)
    with pytest.raises(UserError, match=r"answer\.csv"):
        answers()
    assert "test class 1, " in capsys.readouterr().out
    assert Path("answer.csv").read_text(encoding="utf-8") == "another's"
    monkeypatch.setattr(Predictor, "adapt", lambda *_: 1 / 0)  # refused before the work begins
    for out in ("x" * 300, "answer.csv/x"):
        with pytest.raises(UserError, match="--out"):
            answers(out=out)


@pytest.mark.parametrize(
    ("out", "written"),
    [
        *(("new/", "new/predictions.csv"), ("support", "support/predictions.csv")),
        *((".", "predictions.csv"), ("a.b", "a.b.csv"), ("a.CSV", "a.csv")),
    ],
)
def test_where_predictions_go(answers, monkeypatch, out, written):
    monkeypatch.setattr(predict, "picture", lambda *_: b"")
    answers(out=out, written=written)
    assert Path(written).with_suffix(".png").exists()


def test_names_play_no_part(answers, monkeypatch):
    monkeypatch.setattr(predict, "picture", lambda *_: b"")
    before = answers()
    Path("support", "test class 0").rename(Path("support", "z"))
    after = answers(out="renamed")
    assert after[0][3:] == [*before[0][4:], "z"]
    assert [row[3:] for row in after[1:]] == [[*r[4:], r[3]] for r in before[1:]]


def test_a_broken_matplotlib_costs_no_answer(answers, monkeypatch, capsys):
    monkeypatch.setattr(plots.load_figures(), "style", lambda texts: 1 / 0)
    assert len(answers()) == 9
    assert "pictures are left out" in capsys.readouterr().out
    assert not Path("answer.png").exists()


def test_odd_names_are_answered_and_drawn(answers, capsys):
    """Formulas, line breaks, letters without a font, bytes that are no text, long names."""
    odd = ["$\\frac{a$_^.jpg", "a\nb.jpg", "\u732b \U0001f408 \U000f0000.jpg", "caf\udce9.jpg"]
    odd += ["long " * 40 + ".jpg", "no image.jpg", "-.jpg"]
    Path("query").mkdir()
    for name in odd:
        shutil.copy(Path("support", "test class 1", "0.jpg"), Path("query", name))
    Path("query", "no image.jpg").write_text("text")
    for k, name in enumerate(("$x_1$ \u732b", "n01532829")):
        Path("support", f"test class {k}").rename(Path("support", name))
    head, *rows = answers(query="query")
    assert {row[0] for row in rows} == {
        f"query/{name}".encode("utf-8", "backslashreplace").decode()
        for name in odd
        if name != "no image.jpg"
    }
    assert {"$x_1$ \u732b", "n01532829"} < set(head)
    assert len({tuple(row[1:]) for row in rows}) == 1  # it is the same image
    out = capsys.readouterr().out
    assert "note: skipped query/no image.jpg" in out
    assert "no font here has" in out
    assert "house finch" in out
    with Image.open("answer.png") as image:
        assert max(image.size) < 3000  # no name has made it wider


def test_what_cannot_be_predicted_is_refused(answers):
    def refused(*culprits, **query):
        with pytest.raises(UserError, match=".*".join(culprits)):
            answers(**query)

    Path("text.jpg").write_text("text")
    refused(r"text\.jpg", query="text.jpg")
    known = Path("support", "test class 0")
    shutil.copy("text.jpg", known)
    refused("--support", r"text\.jpg")
    (known / "text.jpg").unlink()
    os.mkfifo(known / "pipe.jpg")
    refused("support", r"pipe\.jpg")
    shutil.rmtree(known)
    refused("--support", "2 classes")
    Path("support", "empty").mkdir()
    refused("support/empty")
    assert not list(Path().glob("answer*"))
