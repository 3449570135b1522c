"""benchmarks/validate.py: runs on the same validation episodes."""

import pytest
from conftest import metrics, succeeded, train
from helpers import table, validate

from engine.checkpoint import BEST, LAST
from utils import UserError

FLAGS = ["--episode-val", "5", "--n-workers", "0", "--cpu"]
TITLE = "validation, 5 episodes, %"


@pytest.fixture(scope="module")
def runs(master, tmp_path_factory):
    """Two trainings of different seeds and learning rates."""
    folder = tmp_path_factory.mktemp("runs")
    succeeded(train(master, folder / "a", "--episode-val", "5"))
    succeeded(train(master, folder / "b", "--seed", "1", "--lr", "0.1", "--episode-val", "5"))
    return [folder / "a-719", folder / "b-1"]


def test_runs_on_the_same_episodes(runs, capsys):
    a, b = table(validate, capsys, *runs, *FLAGS)
    again, _ = table(validate, capsys, runs[1], runs[0], *FLAGS)
    assert (a["checkpoint"], a["difference"]) == (f"a-719/{BEST}", "")
    assert again[TITLE] == b[TITLE]  # whatever the order
    means = [float(row[TITLE].split()[0]) for row in (a, b)]
    assert float(b["difference"].split()[0]) == pytest.approx(means[1] - means[0], abs=0.02)


def test_it_is_the_validation_of_training(runs, capsys):
    """With a run's own seed, the last checkpoint scores what the run's log says."""
    last = runs[0] / "ckpts" / LAST
    (row,) = table(validate, capsys, last, *FLAGS)
    logged = metrics(runs[0].with_name("a"), "val")[-1]
    assert row["episode"] == "4"
    assert row[TITLE] == "{mean:.2f} ± {ci95:.2f}".format(**logged["accuracy"])
    (transductive,) = table(validate, capsys, last, *FLAGS, "--transductive", "true")
    assert transductive[TITLE] != row[TITLE]


def test_runs_of_another_kind_are_refused(runs, master, tmp_path, capsys):
    succeeded(train(master, tmp_path / "c", "--n-class", "2"))
    with pytest.raises(UserError, match="c-719"):
        validate.main([str(runs[0]), str(tmp_path / "c-719"), *FLAGS])


def test_another_number_of_shots_keeps_the_schedule_of_training(runs, capsys):
    assert validate.main([str(runs[0]), *FLAGS, "--n-shot", "2", "--n-eval", "1"]) == 0
    found = capsys.readouterr().out
    assert "note: 6 support images here, 3 in training" in found
    for flag in ("--shots 1", "--save x", "--mode test", "--resume x"):
        with pytest.raises(UserError, match=flag):
            validate.main([str(runs[0]), *FLAGS, *flag.split()])


def test_runs_on_other_images_are_refused(runs, data, tmp_path):
    next((data / "val" / "val class 0").iterdir()).unlink()
    succeeded(train(data, tmp_path / "d"))
    with pytest.raises(UserError, match="d-719"):
        validate.main([str(runs[0]), str(tmp_path / "d-719"), *FLAGS])
