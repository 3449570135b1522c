"""What a test leaves in results.json, and the tables made of it."""

import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_cli import do_test, expect, shell, tensors, train

import main
from around import results
from engine.flags import HYPER_PARAMETERS, hyper_parameters, parse, settle
from tools.results import cell, interval, read_results, recipe, tables, write_results
from utils import UserError

BEST, LAST = "meta-learner-best.pth.tar", "meta-learner-last.pth.tar"
PORT = hyper_parameters(settle(*parse([])))
AUTHORS = PORT | dict(
    augment="none", pixels="unit", lstm_init="authors", bf_init=[4.0, 5.0], shuffle="episode"
)


def with_test(
    folder,
    accuracies,
    hyper=PORT,
    seed=719,
    shots=5,
    mini=False,
    data="x",
    name=BEST,
    episode=3000,
    n_class=5,
    counts=(2, 4),
    flags=(),
    seen=None,
    asked_for=None,
    about=None,
):
    """A run folder with the results of one test more."""
    folder.mkdir(exist_ok=True)
    stored = {**hyper, "seed": seed}
    given, defaults = parse(
        [
            "--mode",
            "test",
            "--resume",
            f"{folder}/ckpts/{name}",
            "--data-root",
            f"images/{data}",
            *flags,
        ]
    )
    best = {"episode": 3000, "accuracy": 41.25, "std": 8.04}
    checkpoint = {
        "episode": episode,
        "hyper_parameters": stored,
        "best": best,
        "about": about or {"commit": "abc"},
    }
    if seen is not None:
        line = {"event": "train", "episode": seen, "time": {"seconds": 1.0}}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        checkpoint["run"] = {"asked_for": asked_for or seen}
    shape = {"n_class": n_class, "n_shot": shots, "n_eval": 15, "epoch": 8, "batch_size": 25}
    known = {"fingerprint": f"of {data}", "mini_imagenet": mini, "counts": list(counts)}
    test = {**shape, **known, "accuracies": accuracies, "losses": accuracies}
    write_results(
        folder,
        settle(given, defaults, stored),
        checkpoint,
        [test],
        {"command": "python main.py --mode test"},
    )
    return folder


def lines_of(text, start="| "):
    return [line for line in text.splitlines() if line.startswith(start)]


def rows_of(text):
    """The rows of the first table, as lists of cells."""
    block = text.split("\n\n")[1].splitlines()
    assert len({line.count("|") for line in block}) == 1
    return [[c.strip() for c in line.strip("|").split("|")] for line in (block[0], *block[2:])]


# ---- Numbers ----


def test_cells_are_numpys():
    values = np.array([50.0, 60.0, 80.0, 10.0])
    half = 1.96 * values[:3].std() / np.sqrt(3)
    assert (
        cell(values.tolist(), 3)
        == f"{values[:3].mean():.2f} ± {half:.2f} (std {values[:3].std():.1f})"
    )


def test_the_interval_over_seeds_is_students():
    mean, half = interval([57.76, 58.14])
    assert mean == pytest.approx(57.95)
    assert half == pytest.approx(12.706 * statistics.stdev([57.76, 58.14]) / math.sqrt(2))
    assert half == pytest.approx(
        2.414, abs=5e-4
    )  # not 0.26, as the normal distribution would have it
    for n, quantile in ((3, 4.303), (5, 2.776), (11, 2.228)):
        values = [float(k * k) for k in range(n)]
        assert interval(values)[1] == pytest.approx(quantile * np.std(values, ddof=1) / np.sqrt(n))


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        (PORT, "port"),
        (AUTHORS, "authors"),
        (PORT | dict(n_shot=1, epoch=12, batch_size=5, bn_momentum=0.9), "port"),
        (AUTHORS | dict(n_shot=1, epoch=12, batch_size=5, bn_momentum=0.9), "authors"),
        (PORT | dict(augment="none"), "port, but augment none"),
        (PORT | dict(bi_init=[0.0, 0.0], image_size=32), "port, but image-size 32, bi-init 0 0"),
        (PORT | dict(epoch=12), "port, but epoch 12"),
        (PORT | dict(hidden_size=40), "port, but hidden-size 40"),
        (PORT | dict(precision="bf16"), "port, but precision bf16"),
        (AUTHORS | dict(bn_scale="one"), "authors, but bn-scale one"),
        # older than the flags of pixels and initialisation: they were the port's, but for batch
        # normalisation's scale
        ({k: PORT[k] for k in ("n_shot", "augment", "bi_init", "lr")}, "port, but bn-scale one"),
        (
            {k: PORT[k] for k in ("n_shot", "bi_init", "lr")} | dict(augment="none"),
            "port, but augment none, bn-scale one",
        ),
        ({}, "unknown"),
    ],
)
def test_names_of_recipes(stored, name):
    assert recipe(stored) == name


@pytest.mark.parametrize("shots", ["5s", "1s"])
@pytest.mark.parametrize(
    ("suffix", "name"), [("", "port"), ("_authors", "authors"), ("_best", "best")]
)
def test_each_script_is_called_as_its_recipe(shots, suffix, name):
    text = (ROOT / "scripts" / f"train_{shots}_5c{suffix}.sh").read_text()
    words = text.partition('main.py" ')[2].replace("\\\n", " ").replace('"', "").split()
    assert recipe(hyper_parameters(settle(*parse(words[:-1])))) == name


@pytest.mark.parametrize(
    "flag", sorted(set(HYPER_PARAMETERS) - {"n_class", "n_shot", "seed", "input_size"})
)
def test_no_hyper_parameter_is_left_out_of_a_recipes_name(flag):
    other = {
        "augment": "none",
        "pixels": "unit",
        "shuffle": "episode",
        "bn_scale": "one",
        "lstm_init": "authors",
    }
    other |= {"precision": "bf16", "bi_init": [0.0, 1.0], "bf_init": [0.0, 1.0]}
    assert recipe(PORT | {flag: other.get(flag, 7)}) != "port"


# ---- Tables ----


def test_table_of_two_seeds(tmp_path):
    a = with_test(tmp_path / "a", [50.0, 60.0, 40.0, 50.0])
    b = with_test(tmp_path / "b", [70.0, 60.0, 60.0, 70.0], seed=53)
    text = tables([a, b])
    assert text.startswith("x, 5-way 5-shot, accuracy in %")
    head, first, second, mean = rows_of(text)
    assert head == ["recipe", "seed", "tested", "validation", "2 episodes", "4 episodes"]
    # in the order of seeds
    assert first[:4] == ["port", "53", "best, 3,000 episodes", "41.25 (std 8.0)"]
    assert second[:4] == ["port", "719", "best, 3,000 episodes", "41.25 (std 8.0)"]
    assert second[4:] == ["55.00 ± 6.93 (std 5.0)", "50.00 ± 6.93 (std 7.1)"]
    assert mean[:4] == ["port", "mean of 2 seeds", "best", ""]
    assert mean[4:] == ["60.00 ± 63.53", "57.50 ± 95.29"]  # 12.706 times the half of 10 and of 15


def test_one_seed_has_no_mean(tmp_path):
    text = tables([with_test(tmp_path / "a", [50.0, 60.0, 40.0, 50.0])])
    assert len(rows_of(text)) == 2
    assert "mean of" not in text
    # nor has one seed that was tested twice
    with_test(tmp_path / "a", [50.0, 60.0, 40.0, 50.0], counts=(3,))
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert "mean of" not in tables([tmp_path / "a", tmp_path / "copy"])


def test_the_table_says_what_a_run_was_begun_with(tmp_path):
    about = {"started_from": {"checkpoint": "results/five/meta-learner.pth.tar", "episode": 20}}
    assert ", begun with five |" in tables(
        [with_test(tmp_path / "a", [50.0, 60.0], seen=4000, about=about)]
    )


def test_seeds_with_a_pre_training_each_are_averaged(tmp_path):
    def run(seed, start):
        about = {
            "started_from": {"checkpoint": f"{start}/meta-learner-last.pth.tar", "episode": 20}
        }
        return with_test(
            tmp_path / f"{seed}{start}", [50.0, 60.0, 40.0, 50.0], seed=seed, seen=4000, about=about
        )

    text = tables([run(719, "pre-719"), run(53, "pre-53")])
    name = "port, begun with pre of its seed"
    assert [row[:3] for row in rows_of(text)[1:]] == [
        [name, "53", "best, 3,000 of 4,000 episodes"],
        [name, "719", "best, 3,000 of 4,000 episodes"],
        [name, "mean of 2 seeds", "best of 4,000 episodes"],
    ]
    assert "mean of" not in tables([run(719, "pre-719"), run(53, "pre-719")])


def test_the_start_that_a_recipe_asks_for_is_not_told(tmp_path):
    best = hyper_parameters(settle(*parse([]))) | results.RECIPES["best"][0]

    def name(folder, **about):
        return rows_of(
            tables(
                [
                    with_test(
                        tmp_path / folder, [50.0, 60.0], hyper=best, seen=200, about=about or None
                    )
                ]
            )
        )[1][0]

    def of(folder):
        return {
            "started_from": {"checkpoint": f"{folder}/meta-learner-last.pth.tar", "episode": 20}
        }

    assert name("a", **of("logs-pretrain-719")) == "best"
    assert (
        name("b", **of("logs-pretrain-53")) == "best, begun with logs-pretrain-53"
    )  # of another seed
    assert (
        name("c", **of("logs-pretrain-short-719"))
        == "best, begun with logs-pretrain-short of its seed"
    )
    assert name("d") == "best, begun from scratch"


def test_means_alone(tmp_path):
    values = [50.0, 60.0, 40.0, 50.0]
    three = [with_test(tmp_path / f"{s}", values, seed=s, seen=4000) for s in (1, 53, 719)]
    two = [
        with_test(tmp_path / f"two-{s}", values, hyper=AUTHORS, seed=s, seen=4000)
        for s in (53, 719)
    ]
    all_rows, alone = (
        rows_of(tables([*three, *two])),
        rows_of(tables([*three, *two], means_alone=True)),
    )
    assert [row[1] for row in all_rows[1:]] == [
        "53",
        "719",
        "mean of 2 seeds",
        "1",
        "53",
        "719",
        "mean of 3 seeds",
    ]
    assert alone == all_rows[:4] + all_rows[7:]  # a mean of two says little of itself
    twice = rows_of(tables([*two, shutil.copytree(two[0], tmp_path / "copy")], means_alone=True))
    assert [row[1] for row in twice[1:]] == ["53", "53", "719", "mean of 2 seeds"]


@pytest.mark.skipif(
    not Path(sys.prefix, "bin", "python").exists(),
    reason="no environment that the scripts could use",
)
@pytest.mark.parametrize("readme", ["README.md", "results/README.md"])
def test_readmes_have_the_tables_that_their_commands_print(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    command = re.search(r"^`?(bash scripts/results\.sh results/[^`\n]*)", text, re.MULTILINE)[1]
    env = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PIP_NO_INDEX": "1"}
    said = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    tables = [block for block in said.stdout.split("\n\n") if block.startswith("|")]
    assert tables
    assert [table for table in tables if table.rstrip() not in text] == []
    above = text[: text.index(tables[0].rstrip())]  # README.md begins with some of their numbers
    assert [
        number
        for number in re.findall(r"\d\d\.\d\d ± \d\.\d\d", above)
        if number not in said.stdout
    ] == []


def test_what_changed_at_a_resumption_is_told_once(tmp_path):
    about = {
        "resumed_from": {"checkpoint": "x/y", "episode": 2000},
        "changed": {"lr_decay": 0.2, "epoch": 8},
    }
    folder = with_test(
        tmp_path / "a", [50.0, 60.0], hyper=PORT | {"lr_decay": 0.2}, seen=4000, about=about
    )
    expected = "port, but lr-decay 0.2 only after 2,000 episodes, epoch 8 only after 2,000 episodes"
    assert [row[0] for row in rows_of(tables([folder]))[1:]] == [expected]


@pytest.mark.parametrize(
    "other",
    [
        dict(hyper=AUTHORS),
        dict(hyper=PORT | dict(augment="none")),
        dict(hyper=PORT | dict(hidden_size=40)),
        dict(hyper=PORT | dict(epoch=12)),
        dict(
            hyper=PORT | dict(n_shot=1, epoch=12, batch_size=5, bn_momentum=0.9)
        ),  # trained on 1-shot, tested on 5-shot
        dict(name=LAST),
        dict(flags=("--pixels", "unit")),  # not as it was trained
        dict(seen=9000),
        dict(seen=4000, asked_for=9000),
        dict(name=LAST, episode=2000, seen=4000),
        dict(about={"resumed_from": {"checkpoint": "x/y", "episode": 20}, "changed": {"lr": 1e-4}}),
        dict(about={"started_from": {"checkpoint": "x/y", "episode": 20}}),
    ],
)
def test_different_things_are_never_averaged(tmp_path, other):
    other = {"seen": 4000, **other}
    a = with_test(tmp_path / "a", [50.0, 60.0, 40.0, 50.0], seen=4000)
    b = with_test(tmp_path / "b", [70.0, 60.0, 60.0, 70.0], seed=53, **other)
    text = tables([a, b])
    assert len(rows_of(text)) == 3
    assert "mean of" not in text
    # while two seeds of each are
    c = with_test(tmp_path / "c", [20.0, 60.0, 60.0, 70.0], seed=1, **other)
    d = with_test(tmp_path / "d", [80.0, 60.0, 40.0, 50.0], seed=1, seen=4000)
    text = tables([a, b, c, d])
    assert text.count("mean of 2 seeds") == 2
    assert len(rows_of(text)) == 1 + 4 + 2


def test_the_length_of_a_training_is_told(tmp_path):
    """As it was when it was tested: a later test of the same run leaves the earlier one's as it is."""
    a, values = tmp_path / "a", [50.0, 60.0, 40.0, 50.0]
    with_test(a, values, seen=4500, asked_for=9000)
    with_test(a, values, episode=8000, seen=9000)
    with_test(tmp_path / "b", values[::-1], seed=53, episode=7000, seen=9000)
    rows = rows_of(tables([a, tmp_path / "b"]))
    assert [row[2] for row in rows[1:]] == [
        "best, 7,000 of 9,000 episodes",
        "best, 3,000 of 4,500 episodes, 9,000 asked for",
        "best, 8,000 of 9,000 episodes",
        "best of 9,000 episodes",
    ]
    assert rows[-1][:2] == ["port", "mean of 2 seeds"]


def test_what_a_row_tells_of_another_training_or_testing(tmp_path):
    one_shot = PORT | dict(n_shot=1, epoch=12, batch_size=5, bn_momentum=0.9)
    with_test(tmp_path / "a", [1.0] * 4, hyper=one_shot)
    with_test(
        tmp_path / "a",
        [1.0] * 4,
        hyper=one_shot,
        name=LAST,
        episode=4000,
        flags=("--pixels", "unit"),
    )
    first, second = rows_of(tables([tmp_path / "a"]))[1:]
    assert first[0] == "port, trained on 1-shot"
    assert second[0] == "port, trained on 1-shot, tested with pixels unit"
    assert second[2:4] == ["last, 4,000 episodes", ""]  # the validation was of another episode


def test_a_table_for_each_data_set_way_and_shot(tmp_path):
    folder, values = tmp_path / "a", [50.0, 60.0, 40.0, 50.0]
    with_test(folder, values, shots=1)
    with_test(folder, values, shots=5)
    with_test(folder, values, data="y")
    with_test(folder, values, n_class=20)
    with_test(folder, values, data="mini", mini=True)
    heads = [
        line.split(",")[:2] for line in tables([folder]).splitlines() if "accuracy in %" in line
    ]
    assert heads == [
        ["mini-ImageNet", " 5-way 5-shot"],
        ["x", " 5-way 5-shot"],
        ["x", " 5-way 1-shot"],
        ["x", " 20-way 5-shot"],
        ["y", " 5-way 5-shot"],
    ]


def test_published_numbers_stand_beside_mini_imagenets_test_classes_only(tmp_path):
    values = [50.0, 60.0, 40.0, 50.0]
    text = tables([with_test(tmp_path / "a", values, data="miniImagenet")])  # by its name only
    assert "60.60" not in text
    assert "paper" not in text
    assert "43.44" not in tables(
        [with_test(tmp_path / "b", values, mini=True, n_class=20, shots=1)]
    )
    rows = rows_of(tables([with_test(tmp_path / "c", values, mini=True)]))
    assert rows[0][4:] == ["2 episodes", "4 episodes", "600 episodes"]  # theirs are of 600
    assert ["paper", "", "", "", "", "", "60.60 ± 0.71"] in rows
    assert [row[-1] for row in rows[1:]] == [
        "",
        "60.60 ± 0.71",
        "about 53",
        "57.76 (std 8.6)",
        "58.14 (std 8.5)",
    ]
    rows = rows_of(tables([with_test(tmp_path / "d", values, mini=True, shots=1)]))
    assert [row[-1] for row in rows[1:]] == ["", "43.44 ± 0.77"]


def test_the_classes_decide_what_is_mini_imagenet():
    lists = json.loads((results.ROOT / "data" / "splits" / "mini-imagenet.json").read_text())
    assert len(lists["test"]) == 20
    assert results.is_mini_imagenet(lists["test"][::-1])
    assert not results.is_mini_imagenet(lists["test"][1:])
    assert not results.is_mini_imagenet(lists["val"])


def test_folders_without_a_test_are_skipped_with_a_note(tmp_path, capsys):
    folder = with_test(tmp_path / "a", [50.0, 60.0, 40.0, 50.0])
    (tmp_path / "untested").mkdir()
    paths = [str(folder), str(tmp_path / "untested"), str(tmp_path / "nowhere")]
    assert main.run(["--mode", "results", "--runs", *paths]) == 0
    out = capsys.readouterr().out
    assert len(rows_of(out)) == 2
    notes = [line for line in out.splitlines() if line.startswith("skipped ")]
    assert len(notes) == 2
    for path, note in zip(paths[1:], notes, strict=True):
        assert note.startswith(f"skipped {path}: no results.json there; test the run first")
    expect(
        capsys,
        main.run(["--mode", "results", "--runs", *paths[1:]]),
        "untested: no results.json there",
        "nowhere: no",
    )
    expect(
        capsys,
        main.run(["--mode", "results", "--save", str(tmp_path / "logs")]),
        "logs-719: no results.json there",
    )
    expect(
        capsys, main.run(["--mode", "results", "--runs"]), "--runs: expected at least one argument"
    )


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"tests": 3}', "\0", '{"tests": [], "seed": 719, "episode": 3}']
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / results.NAME).write_text(content)
    with pytest.raises(UserError, match=r"results\.json: not a test's results"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accuracies", []),
        ("accuracies", ["a"]),
        ("accuracies", 3),
        ("counts", [0]),
        ("counts", 2),
        ("counts", ["two"]),
        ("validation", {"accuracy": "high", "std": 1}),
        ("validation", 3),
        ("contradicts_training", []),
        ("episode", "x"),
        ("checkpoint", 3),
        ("mini_imagenet", None),
    ],
)
def test_results_that_were_tampered_with_are_refused(tmp_path, name, value):
    path = with_test(tmp_path / "a", [50.0, 60.0, 40.0, 50.0]) / results.NAME
    content = json.loads(path.read_text())
    if value is None:
        del content["tests"][0][name]
    else:
        content["tests"][0][name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"results\.json: not a test's results"):
        read_results(tmp_path / "a")


def test_damaged_results_do_not_hide_the_others(tmp_path):
    folder = with_test(tmp_path / "a", [50.0, 60.0, 40.0, 50.0])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / results.NAME).write_text("{")
    text = tables([folder, tmp_path / "b"])
    assert len(rows_of(text.rpartition("\n\n")[0])) == 2
    assert text.splitlines()[-1].startswith(
        f"skipped {tmp_path / 'b' / results.NAME}: not a test's results"
    )


# ---- Tests of a run ----


@pytest.fixture(scope="module")
def once(master, tmp_path_factory):
    save = tmp_path_factory.mktemp("tested") / "logs"
    assert train(master, save) == 0
    return save


@pytest.fixture
def run(once, tmp_path):
    """A trained run that has not been tested."""
    shutil.copytree(f"{once}-719", tmp_path / "logs-719")
    return tmp_path / "logs"


def found(run):
    return read_results(Path(f"{run}-719"))


def test_counts_are_of_the_same_episodes(master, run, capsys):
    assert do_test(master, run, "--episode-test", "6", "3") == 0
    out = capsys.readouterr().out
    assert "test, 3 episodes" in out
    assert "test, 6 episodes" in out
    assert rows_of("\n\n" + out.split("\n\n")[2])[0][4:] == ["3 episodes", "6 episodes"]
    assert do_test(master, run, "--episode-test", "3") == 0
    both, first = found(run)["tests"]
    assert both["counts"] == [3, 6]
    assert first["counts"] == [3]
    assert both["accuracies"][:3] == first["accuracies"]


def test_a_test_of_more_episodes_fills_the_columns_of_fewer(tmp_path):
    values = [50.0, 60.0, 40.0, 50.0]
    folders = [
        with_test(tmp_path / name, values[:n], counts=(n,), seed=n)
        for name, n in (("a", 2), ("b", 4))
    ]
    fewer, more = [row[4:] for row in rows_of(tables(folders))[1:3]]
    assert (fewer[0], more[0]) == ("55.00 ± 6.93 (std 5.0)",) * 2
    assert (fewer[1], more[1]) == ("", "50.00 ± 6.93 (std 7.1)")


def test_another_test_is_added_and_the_same_one_replaced(master, run, data):
    best, last = (
        str(Path(f"{run}-719", "ckpts", name)) for name in (BEST, "meta-learner-2.pth.tar")
    )

    def do(*flags, root=master):
        assert do_test(root, run, *flags) == 0
        return [(t["checkpoint"], t["data"], t["n_shot"], t["counts"]) for t in found(run)["tests"]]

    tests = [(BEST, master.name, 1, [2])]
    assert do("--episode-test", "2") == tests
    assert do("--episode-test", "2", "--resume", best) == tests  # the same
    tests.append((BEST, master.name, 1, [3]))
    assert do("--episode-test", "3") == tests
    tests.append(("meta-learner-2.pth.tar", master.name, 1, [2]))
    assert do("--episode-test", "2", "--resume", last) == tests
    tests.append((BEST, master.name, 2, [2]))
    assert do("--episode-test", "2", "--shots", "2") == tests
    tests.append((BEST, "data", 1, [2]))
    assert do("--episode-test", "2", root=data) == tests
    tests.append((BEST, "data", 1, [2]))  # images with the same names, but one of another size
    (data / "test" / "test class 1" / "1.jpg").write_bytes(
        (data / "test" / "test class 2" / "1.jpg").read_bytes() + b"\0"
    )
    assert do("--episode-test", "2", root=data) == tests
    tests.append((BEST, master.name, 1, [2]))  # not as it was trained
    assert do("--episode-test", "2", "--pixels", "unit") == tests
    assert do("--episode-test", "2") == [*tests[1:], tests[0]]  # the newest comes last
    assert found(run)["tests"][-1]["contradicts_training"] == {}


def test_another_seed_draws_other_episodes_but_does_not_relabel_the_run(master, run, capsys):
    assert do_test(master, run, "--episode-test", "4") == 0
    resume = str(Path(f"{run}-719", "ckpts", BEST))
    assert do_test(master, run, "--episode-test", "4", "--seed", "1", "--resume", resume) == 0
    content = found(run)
    assert content["training"]["seed"] == 719
    assert content["training"]["hyper_parameters"]["seed"] == 719
    assert [t["episodes_drawn_by_seed"] for t in content["tests"]] == [719, 1]
    assert content["tests"][0]["losses"] != content["tests"][1]["losses"]
    table = capsys.readouterr().out.rpartition("\n\n")[2]
    assert [row.split("|")[2].strip() for row in lines_of(table)[1:]] == ["719", "719"]
    assert "mean of" not in table


def test_other_numbers_of_shots_take_the_authors_schedule(master, run, capsys):
    assert do_test(master, run, "--episode-test", "2", "--shots", "1", "2") == 0
    out = capsys.readouterr().out
    assert "test 1-shot (2 x 25), 2 episodes" in out
    assert "test 2-shot (5 x 5), 2 episodes" in out
    assert ", trained on 1-shot" in out
    schedules = {t["n_shot"]: (t["epoch"], t["batch_size"]) for t in found(run)["tests"]}
    assert schedules == {1: (2, 25), 2: (5, 5)}
    expect(capsys, do_test(master, run, "--shots", "9"), "test/test class 0", "9")


def test_a_flag_that_contradicts_the_training_is_noted_and_kept(master, run, capsys):
    assert do_test(master, run, "--episode-test", "2", "--pixels", "unit", "--n-eval", "3") == 0
    out = capsys.readouterr().out
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert sorted(notes) == [
        "note: tested with --n-eval 3, but trained with 2",
        "note: tested with --pixels unit, but trained with imagenet",
    ]
    content = found(run)
    assert content["tests"][0]["contradicts_training"] == {"n_eval": 3, "pixels": "unit"}
    assert content["training"]["hyper_parameters"]["pixels"] == "imagenet"  # it is the training's
    assert ", tested with n-eval 3, tested with pixels unit |" in out
    assert (
        do_test(master, run, "--episode-test", "2", "--pixels", "imagenet") == 0
    )  # says the same as the training
    assert "note: " not in capsys.readouterr().out
    assert found(run)["tests"][1]["contradicts_training"] == {}


def test_a_run_that_was_asked_for_more_after_its_best(master, run, capsys):
    assert (
        train(master, run, "--resume", "auto", episode=6, val_freq=0) == 0
    )  # the best is of before
    assert do_test(master, run, "--episode-test", "2") == 0
    assert tensors(run, BEST)["run"]["asked_for"] == 4
    assert found(run)["tests"][0]["training_length"] == {"seen": 6, "asked_for": 6}
    Path(f"{run}-719", "ckpts", LAST).unlink()
    assert do_test(master, run, "--episode-test", "2") == 0
    assert found(run)["tests"][0]["training_length"] == {"seen": 6, "asked_for": 4}


def test_where_the_numbers_come_from_is_kept(master, run):
    assert do_test(master, run, "--episode-test", "2") == 0
    content = found(run)
    training, test = content["training"], content["tests"][0]
    for about in (training, test["about"]):
        assert about["command"].startswith("python ")
        assert "/" not in about["command"].split()[1]  # no path of this machine
        assert len(about["commit"]) >= 7
        assert about["versions"].keys() >= {"python", "torch", "torchvision", "numpy", "pillow"}
        assert "threads" in about["device"]
    stored = tensors(run)
    assert training["hyper_parameters"] == stored["hyper_parameters"]
    assert set(training["hyper_parameters"]) == set(HYPER_PARAMETERS)
    assert training["data"]["fingerprints"] == stored["run"]["data"]
    assert training["data"]["fingerprints"].keys() == {"train", "val"}
    assert training["episodes"] == 4
    events = [
        json.loads(line) for line in Path(f"{run}-719", "metrics.jsonl").read_text().splitlines()
    ]
    seconds = sum(e["time"]["seconds"] for e in events if e["event"] == "train")
    assert training["hours"] == pytest.approx(seconds / 3600, abs=1e-3)
    best = tensors(run, BEST)
    assert (test["checkpoint"], test["episode"], test["validation"]) == (
        BEST,
        best["episode"],
        best["best"],
    )
    assert test["fingerprint"] not in training["data"]["fingerprints"].values()
    assert test["mini_imagenet"] is False
    assert len(test["accuracies"]) == len(test["losses"]) == 2


def test_a_checkpoint_outside_a_run_folder_is_tested_without_results(master, run, tmp_path, capsys):
    shutil.copy(Path(f"{run}-719", "ckpts", BEST), tmp_path / "x.pth.tar")
    assert do_test(master, run, "--episode-test", "2", "--resume", str(tmp_path / "x.pth.tar")) == 0
    assert "test, 2 episodes" in capsys.readouterr().out
    assert not Path(f"{run}-719", results.NAME).exists()


def test_the_script_of_tables(master, run, tmp_path):
    assert do_test(master, run, "--episode-test", "2") == 0
    for seed in (1, 53):
        other = tmp_path / f"logs-{seed}"
        shutil.copytree(f"{run}-719", other)
        content = json.loads((other / results.NAME).read_text())
        content["training"]["seed"] = content["training"]["hyper_parameters"]["seed"] = seed
        (other / results.NAME).write_text(json.dumps(content))
    said = shell("results.sh", f"{run.name}-719", "logs-1", "logs-53", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "| 53 |" in said.stdout
    assert "| mean of 3 seeds | best" in said.stdout
    alone = shell(
        "results.sh", f"{run.name}-719", "logs-1", "logs-53", "--means", "true", cwd=tmp_path
    ).stdout
    assert "| mean of 3 seeds | best" in alone
    assert "| 53 |" not in alone
    (other / results.NAME).unlink()
    said = shell("results.sh", f"{run.name}-719", "logs-53", cwd=tmp_path)
    assert said.returncode == 0
    assert said.stdout.splitlines()[-1].startswith("skipped logs-53: no results.json there")
    said = shell("results.sh", "logs-53", cwd=tmp_path)
    assert said.returncode == 2
    assert said.stderr.startswith("error: logs-53: no results.json there")
    assert said.stderr.count("\n") == 1
    assert shell("results.sh", cwd=tmp_path).returncode == 2
