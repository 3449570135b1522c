"""results.json, and the tables made of it."""

import functools
import json
import math
import operator
import re
import statistics
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.checkpoint import BEST, LAST, load
from engine.flags import DEFAULTS, HYPER_PARAMETERS, ROOT, parse, resolve
from engine.logger import read_metrics
from tools.export import export
from tools.recipes import recipes
from tools.results import NAME, contradiction_notes, read_results, variant, write_results
from tools.tables import interval, results_mode, tables
from utils import UserError

PORT = {k: DEFAULTS[k] for k in HYPER_PARAMETERS}
VALUES = [50.0, 60.0, 40.0, 50.0]
ONCE, TWICE = ({"permutations": n, "flip": n > 1} for n in (1, 2))


def with_test(
    folder, accuracies=VALUES, hyper=PORT, seed=719, data="x", name=BEST, flags=(), seen=4000,
    asked_for=None, about=None, **other,
):  # fmt: skip
    """A run folder with the results of one test more; ``other`` are entries of the test."""
    folder.mkdir(exist_ok=True)
    stored = {**hyper, "seed": seed}
    argv = ["--mode", "test", "--resume", f"{folder}/ckpts/{name}", "--data-root", f"images/{data}"]
    checkpoint = {"episode": 3000, "hyper_parameters": stored, "about": about or {}}
    checkpoint["best"] = {"episode": 3000, "accuracy": 41.25, "std": 8.04}
    checkpoint["run"] = {"asked_for": asked_for or seen}
    line = {"event": "train", "episode": seen, "mean_loss": 1.0, "mean_accuracy": 40.0}
    line["time"] = {"seconds": 1.0, "episodes_per_second": 2.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    test = {"n_class": 5, "n_shot": 5, "n_eval": 15, "epoch": 8, "batch_size": 25, "tta": ONCE}
    test |= {"transductive": False, "fingerprint": f"of {data}", "mini_imagenet": False}
    test |= {"counts": [2, 4], "accuracies": accuracies, "losses": accuracies, **other}
    args = resolve(parse([*argv, *flags]), stored)
    write_results(folder, args, checkpoint, [test], {"command": "x"})
    return folder


def rows_of(text):
    """The rows of the first table, as lists of cells."""
    block = [line for line in text.split("\n\n")[1].splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in block}) == 1
    return [[c.strip() for c in line.strip("|").split("|")] for line in (block[0], *block[2:])]


def test_t_quantiles():
    mean, half = interval([50.0, 52.0, 57.0])
    assert mean == 53
    assert half == pytest.approx(4.303 * statistics.stdev([50, 52, 57]) / math.sqrt(3))


def test_three_seeds_have_a_mean_in_its_own_column(tmp_path):
    runs = [with_test(tmp_path / f"{s}", [s, s, s, s + 4.0], seed=s) for s in (30, 40, 50)]
    head, *rows = rows_of(tables(runs))
    assert head[4:] == ["2 episodes", "4 episodes", "mean over seeds"]
    assert [row[1] for row in rows] == ["30", "40", "50", "3 seeds"]
    assert [row[-1] for row in rows[:3]] == ["", "", ""]
    mean, half = interval([31.0, 41.0, 51.0])
    assert rows[3][4:] == ["", "", f"{mean:.2f} ± {half:.2f}"]


def test_two_seeds_have_no_mean(tmp_path):
    runs = [with_test(tmp_path / f"{k}", seed=s) for k, s in enumerate((1, 53, 53))]
    head, *rows = rows_of(tables(runs))
    assert head[-1] == "4 episodes"
    assert len(rows) == 3


@pytest.mark.parametrize(
    "other",
    [
        {"hyper": recipes()["authors", 5]},
        {"hyper": PORT | {"hidden_size": 40}},
        {"hyper": recipes()["port", 1]},
        {"name": LAST},
        {"flags": ("--pixels", "unit")},
        {"seen": 9000},
        {"asked_for": 9000},
        {"tta": TWICE},
        {"fingerprint": "of other images"},
        {"about": {"started_from": {"checkpoint": "x/y", "episode": 20}}},
        {"about": {"resumed_from": {"checkpoint": "x/y", "episode": 2}, "changed": {"lr": 1}}},
    ],
)
def test_different_things_are_never_averaged(tmp_path, other):
    runs = [with_test(tmp_path / f"{s}", seed=s) for s in (1, 2)]
    runs.append(with_test(tmp_path / "3", seed=3, **other))
    assert all("seeds" not in row[1] for row in rows_of(tables(runs)))


def test_seeds_with_a_pre_training_each_are_averaged(tmp_path):
    hyper, runs = recipes()["pretrained", 5], []
    for seed in (1, 2, 3):
        origin = {"checkpoint": f"pre-{seed}/{LAST}", "episode": 20}
        about = {"started_from": origin}
        runs.append(with_test(tmp_path / f"{seed}", hyper=hyper, seed=seed, about=about))
    last = rows_of(tables(runs))[-1]
    assert last[1] == "3 seeds"
    assert "pre-SEED" in last[0]


def test_published_numbers_stand_beside_mini_imagenet_only(tmp_path):
    assert "60.60" not in tables([with_test(tmp_path / "a", data="miniImagenet")])
    run = with_test(tmp_path / "b", mini_imagenet=True, n_class=20, n_shot=1)
    assert "43.44" not in tables([run])
    rows = rows_of(tables([with_test(tmp_path / "c", mini_imagenet=True)]))
    assert rows[0][-1] == "600 episodes"
    assert rows[1][-1] == ""
    assert "60.60" in rows[2][-1]


def test_a_table_for_each_data_set_way_and_shot(tmp_path):
    folder = tmp_path / "a"
    mini = {"mini_imagenet": True, "data": "m"}
    for other in ({}, {"n_shot": 1}, {"data": "y"}, {"n_class": 20}, mini):
        with_test(folder, **other)
    heads = [line.split(", acc")[0] for line in tables([folder]).splitlines() if ", acc" in line]
    assert heads[0] == "mini-ImageNet, 5-way 5-shot"
    assert len(set(heads)) == 5


def test_the_same_test_is_replaced_and_others_stay(tmp_path):
    folder = with_test(tmp_path / "a")
    for other in ({"tta": TWICE}, {"name": LAST}, {"data": "y"}, {"counts": [4]}):
        with_test(folder, **other)
    with_test(folder, [1.0] * 4)
    tests = read_results(folder)["tests"]
    assert len(tests) == 5
    assert tests[-1]["accuracies"] == [1.0] * 4


def test_tests_that_end_together_are_all_kept(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: with_test(tmp_path / "a", data=f"{k}"), range(8)))
    assert len(read_results(tmp_path / "a")["tests"]) == 8


def test_contradictions_are_named():
    args = resolve(parse(["--pixels", "unit"]), PORT)
    (note,) = contradiction_notes(args, {"hyper_parameters": PORT})
    assert "--pixels unit" in note
    assert "imagenet" in note
    args = resolve(parse(["--lr", "0.5", "--second-order", "true", "--ema", "0.5"]), PORT)
    assert contradiction_notes(args, {"hyper_parameters": PORT}) == []  # a test does not use them
    averaged = PORT | {"ema": 0.5}
    (note,) = contradiction_notes(
        resolve(parse(["--ema", "0"]), averaged), {"hyper_parameters": averaged}
    )
    assert "--ema 0.0" in note


def test_untested_folders_are_skipped_or_refused(tmp_path, capsys):
    runs = [str(with_test(tmp_path / "a")), str(tmp_path / "nowhere")]
    results_mode(Namespace(runs=runs))
    assert "nowhere" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "cat.jpg").write_text("")
    for name in ("nowhere", "cat.jpg"):
        with pytest.raises(UserError, match=f"{name}: is not a run folder"):
            tables([tmp_path / name])


def test_a_test_with_flags_of_its_own_says_so(tmp_path):
    folder = with_test(tmp_path / "a", flags=("--epoch", "5", "--grad-divisor", "5"))
    (test,) = read_results(folder)["tests"]
    assert variant(test) == "tested with epoch 5, grad-divisor 5"
    assert variant(test) in rows_of(tables([folder]))[1][0]


def test_another_draw_of_test_episodes_has_a_mean_of_its_own(tmp_path):
    runs = [with_test(tmp_path / f"{s}", [s, s, s, s + 4.0], seed=s) for s in (30, 40, 50)]
    for run, values in zip(runs, ([1.0] * 4, [2.0] * 4, [6.0] * 4), strict=True):
        with_test(run, values, seed=int(run.name), flags=("--seed", "7"))
    rows = [row for row in rows_of(tables(runs)) if row[1] == "3 seeds"]
    assert [row[-1].split()[0] for row in rows] == ["41.00", "3.00"]
    assert rows[1][0] == f"{rows[0][0]}, test episodes of seed 7"


OTHER_FILES = [(NAME, content) for content in ("", "[]", "{}", '{"tests": 3}', "\0")]
OTHER_FILES += [("metrics.jsonl", content) for content in (None, "", '{"event": "val"}', "\0")]
OTHER_FILES += [(name, "[" * 200_000) for name in (NAME, "metrics.jsonl")]


@pytest.mark.parametrize(("name", "content"), OTHER_FILES, ids=range(len(OTHER_FILES)))
def test_other_files_are_refused(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(name)):
        (read_results if name == NAME else read_metrics)(tmp_path)


DAMAGE = {  # where results.json is damaged -> what is there then
    "tests 0 accuracies": [[], ["a"], [math.inf] * 4, [10**400] * 4],
    "tests 0 training_length": [{"seen": "x"}],
    "tests 0 counts": [[0], 2, ["two"]],
    "tests 0 validation": [{"accuracy": "high", "std": 1}],
    "tests 0 contradicts_training": [[]],
    "tests 0 episode": ["x"],
    "tests 0 checkpoint": [3],
    "tests 0 tta": [{}],
    "tests 0 mini_imagenet": [None],
    "training hyper_parameters bf_init": [[None, 5.0]],
    "training hyper_parameters n_shot": ["\ud800"],
    "training hyper_parameters x": [1],
}


@pytest.mark.parametrize("place", DAMAGE)
def test_damaged_results_are_refused(tmp_path, place):
    """Another value of a part, or no such part."""
    path = with_test(tmp_path / "a") / NAME
    content = json.loads(path.read_text())
    *above, part = [int(word) if word == "0" else word for word in place.split()]
    inner = functools.reduce(operator.getitem, above, content)
    damaged = [{**inner, part: value} for value in DAMAGE[place]]
    if "hyper_parameters" not in above:  # of which older runs lack some
        damaged.append({k: v for k, v in inner.items() if k != part})
    for table in damaged:
        inner.clear()
        inner.update(table)
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"results\.json"):
            read_results(tmp_path / "a")


def test_damaged_metrics_are_refused(trained, tmp_path):
    """But a line that was cut off is left out, and a mean of no finite losses is null."""
    lines = Path(f"{trained}-719", "metrics.jsonl").read_text().splitlines()
    train, val = (
        next(e for e in map(json.loads, lines) if e["event"] == k) for k in ("train", "val")
    )
    path, sound = tmp_path / "metrics.jsonl", [train, val, {**train, "mean_loss": None}]
    path.write_text("\n".join([*map(json.dumps, sound), "3", '{"event": "tra']))
    assert read_metrics(tmp_path) == sound
    slow = {"seconds": 1.0, "episodes_per_second": 0}
    changes = [{"episode": None}, {"mean_loss": "x"}, {"mean_loss": 10**400}, {"time": {}}]
    damaged = [train | change for change in [*changes, {"time": slow}]]
    damaged += [val | {"accuracy": 5.0}, val | {"accuracies": ["x"]}, val | {"accuracies": None}]
    damaged += [{k: v for k, v in train.items() if k != "mean_loss"}, train | {"episode": 10**400}]
    for event in damaged:
        path.write_text("\n".join(map(json.dumps, [train, event])))
        with pytest.raises(UserError, match=r"metrics\.jsonl"):
            read_metrics(tmp_path)


def test_what_is_published_loads_and_is_in_the_table():
    """As ``bash scripts/results.sh --write docs/results.md`` has written it."""
    published = sorted((ROOT / "results").glob(f"*/{NAME}"))
    assert published
    for path in (ROOT / "results").glob("*/meta-learner.pth.tar"):
        load(path)
    text = (ROOT / "docs" / "results.md").read_text()
    (found,) = re.findall("<!-- results -->\n(.*?)<!-- /results -->\n", text, re.DOTALL)
    assert found == tables([path.parent for path in published]) + "\n"


def test_export_needs_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="ckpts"):
        export(with_test(tmp_path / "a"), tmp_path)


def test_a_data_set_in_the_working_directory_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "mine" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine")
    for root in (".", "train/.."):
        folder = with_test(tmp_path / "a", flags=("--data-root", root))
        assert tables([folder]).startswith("mine, 5-way")
