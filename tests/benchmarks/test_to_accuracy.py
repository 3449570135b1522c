"""benchmarks/to_accuracy.py: run folders in, episodes and minutes to an accuracy out."""

import json

import pytest
from conftest import benchmark, refused, rows_printed
from test_cli import train


def write_run(folder, accuracies, seconds, first=1, about=(), **hyper):
    """A run with a log line and a validation every 1,000 episodes; ``seconds`` of an episode in
    each of the lines.
    """
    folder.mkdir()
    events = []
    for k, (percent, time) in enumerate(zip(accuracies, seconds, strict=True), first):
        events.append(
            {"event": "train", "episode": 1000 * k, "time": {"episodes_per_second": 1 / time}}
        )
        events.append(
            {"event": "val", "episode": 1000 * k, "accuracy": {"mean": percent, "ci95": 2.0}}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    training = {"hyper_parameters": {"n_shot": 5, **hyper}, **dict(about)}
    (folder / "results.json").write_text(json.dumps({"training": training, "tests": []}))


def shown(*folders):
    """The table's rows by run."""
    return {
        row["run"]: row for row in rows_printed(benchmark("to_accuracy.py", *folders), alone=False)
    }


def test_the_first_validation_that_reaches_a_level(tmp_path):
    write_run(tmp_path / "a", [49.0, 51.0, 50.0, 55.0], [0.9, 0.3, 0.3, 5.0])
    row = shown(tmp_path / "a")["a"]
    assert (row["50 %"], row["55 %"], row["57.8 %"]) == ("2,000, 10 min", "4,000, 20 min", "")
    assert row["ms an episode"] == "300"
    assert row["best validation, %"] == "55.00 ± 2.00, after 4,000"
    assert row["episodes"] == "4,000"


def test_a_run_that_continues_another_one_begins_with_its_validations(tmp_path):
    write_run(tmp_path / "a", [40.0, 56.0, 58.0], [0.2, 0.2, 0.2])
    about = {"resumed_from": {"checkpoint": "a/meta-learner-last.pth.tar", "episode": 2100}}
    write_run(tmp_path / "b", [57.0, 58.5], [0.3, 0.3], first=3, about=about.items(), lr_decay=0.2)
    row = shown(tmp_path / "a", tmp_path / "b")["b"]
    assert (row["50 %"], row["57.8 %"]) == ("2,000, 10 min", "4,000, 20 min")
    assert shown(tmp_path / "b")["b"]["50 %"] == "3,000, 15 min"


def test_minutes_contain_the_pretraining_in_a_runs_folder(tmp_path):
    write_run(tmp_path / "a", [58.0], [0.3])
    write_run(tmp_path / "a" / "pretraining", [1.0, 2.0], [0.2, 0.2])
    path = tmp_path / "a" / "pretraining" / "metrics.jsonl"
    path.write_text(
        "".join(line for line in path.read_text().splitlines(True) if '"val"' not in line)
    )
    row = shown(tmp_path / "a")["a"]
    assert row["episodes"] == "1,000 after 2,000 batches"
    assert row["57.8 %"] == f"1,000, {(2000 * 0.2 + 1000 * 0.3) / 60:.0f} min"


def test_each_number_of_shots_has_its_levels(tmp_path):
    write_run(tmp_path / "a", [43.5], [0.2])
    write_run(tmp_path / "b", [43.5], [0.2], n_shot=1)
    write_run(tmp_path / "c", [43.5], [0.2], n_shot=3)
    done = benchmark("to_accuracy.py", *(tmp_path / name for name in "abc"))
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert [line for line in text.splitlines() if line.endswith("-shot:")] == [
        "5-shot:",
        "3-shot:",
        "1-shot:",
    ]
    assert "| 40 % | 43.44 % | 46 % |" in text


def test_an_untested_run_and_what_is_none(master, tmp_path):
    assert train(master, tmp_path / "logs") == 0
    row = shown(tmp_path / "logs-719")["logs-719"]
    assert row["episodes"] == "4"
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "gone"):
        assert refused(benchmark("to_accuracy.py", place)).startswith(
            f"error: {place}: neither results.json nor "
        )


@pytest.mark.parametrize("text", ["", "{}\n", "{", '{"event": "train", "episode": 1}\n'])
def test_logs_that_are_none(tmp_path, text):
    write_run(tmp_path / "a", [43.5], [0.2])
    (tmp_path / "a" / "metrics.jsonl").write_text(text)
    assert refused(benchmark("to_accuracy.py", tmp_path / "a")).startswith(
        f"error: {tmp_path}/a/metrics.jsonl: "
    )
