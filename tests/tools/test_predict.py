import csv
import math
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import expect, train

import main
from around import predict
from tools.predict import by_content, class_orders


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
            shutil.copy(
                master / "test" / f"test class {k}" / f"{i}.jpg",
                tmp_path / "support" / name / f"{i}.jpg",
            )
    (tmp_path / "query").mkdir()
    for k in range(4):
        shutil.copy(
            master / "test" / f"test class {k % 3}" / f"{4 + k}.jpg",
            tmp_path / "query" / f"{k}.jpg",
        )
    Image.new("RGB", (300, 120), "red").save(tmp_path / "wide.png")
    return tmp_path


def run(checkpoint, place, *flags):
    argv = ["--mode", "predict", "--resume", checkpoint, "--cpu", "--out", str(place / "answer")]
    return main.run([*argv, *flags])


def test_predictions(checkpoint, photographs, capsys):
    support, query = (
        str(photographs / "support"),
        [str(photographs / "query"), str(photographs / "wide.png")],
    )
    assert run(checkpoint, photographs, "--support", support, "--query", *query) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = list(csv.reader((photographs / "answer.csv").open(encoding="utf-8")))
    assert rows[0] == ["file", "class", "probability", "cats", "dogs", "ünicode birds"]
    assert [row[0].rsplit("/", 1)[1] for row in rows[1:]] == [
        "0.jpg",
        "1.jpg",
        "2.jpg",
        "3.jpg",
        "wide.png",
    ]
    for row in rows[1:]:
        probabilities = [float(p) for p in row[3:]]
        assert sum(probabilities) == pytest.approx(1, abs=1e-3)
        assert row[1] == rows[0][3:][probabilities.index(max(probabilities))]
        assert any(line.startswith(row[0]) and row[1] in line for line in lines)
    assert min(Image.open(photographs / "answer.png").size) > 300
    first = (photographs / "answer.csv").read_bytes()
    assert run(checkpoint, photographs, "--support", support, "--query", *query) == 0
    assert (photographs / "answer.csv").read_bytes() == first


def test_fewer_examples_take_steps_as_large_as_in_training(
    master, tmp_path, photographs, monkeypatch
):
    """A gradient is divided by the images of a minibatch; with one example a class, steps would be
    three times as large.
    """
    assert train(master, tmp_path / "logs", "--n-shot", "3") == 0
    for path in photographs.glob("support/*/[1-9].jpg"):
        path.unlink()
    seen, original = [], predict.adapted
    monkeypatch.setattr(
        predict, "adapted", lambda *args: seen.append(args[4].grad_divisor) or original(*args)
    )
    best = f"{tmp_path}/logs-719/ckpts/meta-learner-best.pth.tar"
    for flags in ((), ("--batch-size", "4"), ("--grad-divisor", "2")):
        where = (
            "--support",
            str(photographs / "support"),
            "--query",
            str(photographs / "wide.png"),
            "--orders",
            "1",
        )
        assert run(best, photographs, *where, *flags) == 0
    assert seen == [9, 4, 2]


def test_bad_input(checkpoint, photographs, capsys):
    support, query = str(photographs / "support"), str(photographs / "query")
    expect(
        capsys,
        run(checkpoint, photographs, "--query", query),
        "--support: needed by --mode predict",
    )
    expect(
        capsys,
        run(checkpoint, photographs, "--support", support),
        "--query: needed by --mode predict",
    )
    expect(
        capsys,
        run(checkpoint, photographs, "--support", "nowhere", "--query", query),
        "--support nowhere: no such folder",
    )
    expect(
        capsys,
        run(checkpoint, photographs, "--support", support, "--query", "gone.jpg"),
        "--query gone.jpg",
    )
    (photographs / "void").mkdir()
    expect(
        capsys,
        run(checkpoint, photographs, "--support", support, "--query", str(photographs / "void")),
        "no images there",
    )
    (photographs / "support" / "fish").mkdir()
    words = ("4 classes", "trained for 3", "leave out 1", "--n-class 4")
    expect(capsys, run(checkpoint, photographs, "--support", support, "--query", query), *words)
    (photographs / "support" / "fish").rmdir()
    shutil.rmtree(photographs / "support" / "cats")
    (photographs / "support" / "cats").mkdir()
    expect(
        capsys,
        run(checkpoint, photographs, "--support", support, "--query", query),
        "cats",
        "no images",
    )
    (photographs / "support" / "cats").rmdir()
    words = ("2 classes", "trained for 3", "add 1", "--n-class 2")
    expect(capsys, run(checkpoint, photographs, "--support", support, "--query", query), *words)
    (photographs / "support" / "cats").mkdir()
    shutil.copy(photographs / "wide.png", photographs / "support" / "cats")
    expect(
        capsys,
        run(checkpoint, photographs, "--support", support, "--query", query, "--orders", "0"),
        "--orders",
    )
    (photographs / "support" / "cats" / "9.jpg").write_bytes(b"junk")
    expect(
        capsys,
        run(checkpoint, photographs, "--support", support, "--query", query),
        "cats/9.jpg: not a readable image",
    )
    assert not (photographs / "answer.csv").exists()


def answers(place, name="answer"):
    with (place / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.reader(file))


def test_images_that_cannot_be_read_are_skipped(checkpoint, photographs, capsys):
    support, query = str(photographs / "support"), photographs / "query"
    (query / "scan.pdf").write_bytes(b"%PDF-1.4")
    (query / "9.jpg").write_bytes(b"junk")
    assert run(checkpoint, photographs, "--support", support, "--query", str(query)) == 0
    out = capsys.readouterr().out
    for name in ("scan.pdf", "9.jpg"):
        assert f"note: skipped {query / name}: not a readable image" in out
    assert [row[0].rsplit("/", 1)[1] for row in answers(photographs)[1:]] == [
        "0.jpg",
        "1.jpg",
        "2.jpg",
        "3.jpg",
    ]
    flags = (
        "--support",
        support,
        "--out",
        str(photographs / "none"),
        "--query",
        str(query / "scan.pdf"),
        str(query / "9.jpg"),
    )
    expect(capsys, run(checkpoint, photographs, *flags), "none of the 2 files is a readable image")
    assert not list(photographs.glob("none*"))


def test_class_names_of_any_kind(checkpoint, photographs, capsys):
    """Mathematics to Matplotlib, too long for a picture, Chinese."""
    support, query = photographs / "support", photographs / "query"
    names = ["$x_1$ \\frac", "long " * 40, "猫と犬"]
    for old, new in zip(sorted(support.iterdir()), names, strict=True):
        old.rename(support / new)
    (query / "0.jpg").rename(query / "$\\sqrt$ 猫.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(checkpoint, photographs, "--support", str(support), "--query", str(query)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.count("note: ") <= 1  # of the fonts that are missing
    assert set(answers(photographs)[0][3:]) == set(names)
    assert min(Image.open(photographs / "answer.png").size) > 300


def test_wordnet_numbers_come_with_words(checkpoint, photographs, capsys, monkeypatch):
    """What is printed and drawn is for people; the CSV file keeps the folders' names."""
    plots = pytest.importorskip("tools.plots")
    numbers = ["n02129165", "n04146614", "n99999999"]
    for old, new in zip(sorted((photographs / "support").iterdir()), numbers, strict=True):
        old.rename(photographs / "support" / new)
    drawn = []
    monkeypatch.setattr(plots.plt, "close", drawn.append)
    assert (
        run(
            checkpoint,
            photographs,
            "--support",
            str(photographs / "support"),
            "--query",
            str(photographs / "query"),
        )
        == 0
    )
    (figure,) = drawn
    assert [axes.get_title().splitlines()[0] for axes in figure.axes[:3]] == [
        "lion",
        "school bus",
        "n99999999",
    ]
    words = dict(
        zip(numbers, ("n02129165 (lion)", "n04146614 (school bus)", "n99999999"), strict=True)
    )
    lines = capsys.readouterr().out.splitlines()
    for file, answer, *_ in answers(photographs)[1:]:
        assert any(
            re.fullmatch(rf"{re.escape(file)} +{re.escape(words[answer])}, 0\.\d\d", line)
            for line in lines
        )
    monkeypatch.undo()
    plots.plt.close("all")


def test_names_that_are_no_text(photographs):
    names = ["b\udcff", "c"]
    image = (photographs / "query" / "0.jpg").rename(photographs / "query" / "a\udcff.jpg")
    shares = np.array([[0.25, 0.75]])
    assert (
        predict.table(names, [image], shares).decode().splitlines()[0]
        == "file,class,probability,b\\udcff,c"
    )
    assert predict.picture(names, [[image], [image]], [image], shares).startswith(b"\x89PNG")


def probabilities(place, name):
    """{image: {class: probability}}."""
    head, *rows = answers(place, name)
    return {row[0]: {c: float(p) for c, p in zip(head[3:], row[3:], strict=True)} for row in rows}


@pytest.mark.parametrize("count", ["1", "3", "6"])
def test_names_have_no_part_in_the_answer(checkpoint, photographs, count):
    support = photographs / "support"
    flags = (
        "--support",
        str(support),
        "--query",
        str(photographs / "query"),
        "--orders",
        count,
        "--batch-size",
        "3",
    )
    assert run(checkpoint, photographs, *flags) == 0
    before = probabilities(photographs, "answer")
    new = {"cats": "z", "dogs": "k", "ünicode birds": "a"}
    for old, name in new.items():
        (support / old).rename(support / name)
    (support / "a" / "0.jpg").rename(support / "a" / "7.jpg")
    assert run(checkpoint, photographs, *flags, "--out", str(photographs / "renamed")) == 0
    after = probabilities(photographs, "renamed")
    assert after == {image: {new[c]: p for c, p in of.items()} for image, of in before.items()}


def test_all_orders_leave_nothing_to_the_order(checkpoint, photographs, monkeypatch):
    """Also not to the one in which the classes are sorted: here by an arbitrary other one."""
    found = {}
    for count in ("1", "6"):
        flags = (
            "--support",
            str(photographs / "support"),
            "--query",
            str(photographs / "query"),
            "--orders",
            count,
        )
        for turn in (0, 1):
            if turn:
                monkeypatch.setattr(predict, "by_content", lambda images: by_content(images)[::-1])
            assert run(checkpoint, photographs, *flags, "--out", str(photographs / f"{turn}")) == 0
            monkeypatch.undo()
            found[count, turn] = [
                [float(p) for p in row[3:]] for row in answers(photographs, f"{turn}")[1:]
            ]
    assert not np.allclose(found["1", 0], found["1", 1], atol=2e-4)
    np.testing.assert_allclose(found["6", 0], found["6", 1], atol=2e-4)


def test_each_class_has_each_place_once_in_n_orders():
    orders = class_orders(5, 120, 719)
    assert len(orders) == len({tuple(order) for order in orders}) == 120
    assert list(orders[0]) == [0, 1, 2, 3, 4]
    for start in range(0, 120, 5):
        assert all(sorted(column) == [0, 1, 2, 3, 4] for column in orders[start : start + 5].T)
    assert len(class_orders(4, 1000, 719)) == math.factorial(4)
    assert class_orders(30, 7, 719).shape == (7, 30)
    np.testing.assert_array_equal(class_orders(6, 20, 3), class_orders(6, 100, 3)[:20])


def test_the_default_is_one_order_a_class(checkpoint, photographs, capsys):
    flags = ("--support", str(photographs / "support"), "--query", str(photographs / "query"))
    assert run(checkpoint, photographs, *flags) == 0
    assert "mean over 3 orders of the classes" in capsys.readouterr().out


def test_images_go_through_in_chunks(checkpoint, photographs, monkeypatch):
    flags = (
        "--support",
        str(photographs / "support"),
        "--query",
        str(photographs / "query"),
        str(photographs / "wide.png"),
    )
    assert run(checkpoint, photographs, *flags) == 0
    monkeypatch.setattr(predict, "CHUNK", 2)
    sizes, stack = [], torch.stack
    monkeypatch.setattr(
        torch, "stack", lambda tensors, *args: sizes.append(len(tensors)) or stack(tensors, *args)
    )
    assert run(checkpoint, photographs, *flags, "--out", str(photographs / "chunks")) == 0
    assert max(sizes) == 7  # the examples
    whole, parts = probabilities(photographs, "answer"), probabilities(photographs, "chunks")
    assert list(whole) == list(parts)
    for image in whole:
        assert parts[image] == pytest.approx(whole[image], abs=2e-4)


def test_the_picture_names_the_images(checkpoint, photographs, monkeypatch):
    plots = pytest.importorskip("tools.plots")
    long = photographs / "query" / f"{'holiday ' * 20}.jpg"
    (photographs / "query" / "0.jpg").rename(long)
    monkeypatch.setattr(predict, "SHOWN", 3)
    monkeypatch.setattr(plots.plt, "close", lambda figure: None)
    plots.plt.close("all")
    assert (
        run(
            checkpoint,
            photographs,
            "--support",
            str(photographs / "support"),
            "--query",
            str(photographs / "query"),
        )
        == 0
    )
    figure = plots.plt.gcf()
    assert figure.get_supxlabel() == "the first 3 of 4 images"
    names = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert names == ["1.jpg", "2.jpg", "3.jpg"]
    monkeypatch.undo()
    plots.plt.close("all")


@pytest.mark.parametrize("ending", [".csv", ".png", ".CSV", ""])
def test_an_ending_of_out_is_dropped(checkpoint, photographs, ending):
    flags = ("--support", str(photographs / "support"), "--query", str(photographs / "query"))
    assert (
        run(checkpoint, photographs, *flags, "--out", str(photographs / f"my.answers{ending}")) == 0
    )
    assert {path.name for path in photographs.glob("my*")} == {"my.answers.csv", "my.answers.png"}


def test_no_image_is_replaced(checkpoint, photographs, capsys):
    before = (photographs / "wide.png").read_bytes()
    flags = ("--support", str(photographs / "support"), "--query", str(photographs / "wide.png"))
    expect(
        capsys,
        run(checkpoint, photographs, *flags, "--out", str(photographs / "wide")),
        "--out",
        "would replace",
    )
    assert (photographs / "wide.png").read_bytes() == before
    assert not (photographs / "wide.csv").exists()


def test_a_run_folder_stands_for_its_best_checkpoint(checkpoint, photographs):
    flags = ("--support", str(photographs / "support"), "--query", str(photographs / "query"))
    assert run(checkpoint, photographs, *flags) == 0
    assert (
        run(checkpoint.split("/ckpts/")[0], photographs, *flags, "--out", str(photographs / "same"))
        == 0
    )
    assert answers(photographs) == answers(photographs, "same")
