"""benchmarks/trials.py: runs side by side, compared episode by episode."""

import json

from conftest import benchmark, refused, rows_printed
from test_cli import train


def write_run(folder, accuracies, **about):
    """A run of 300 episodes of 0.2 s with a validation after 200 and a worse one after 300."""
    folder.mkdir()
    events = [
        {"event": "train", "episode": n, "time": {"episodes_per_second": 5}}
        for n in (100, 200, 300)
    ]
    for n, worse in ((200, 0), (300, 1)):
        mean = sum(accuracies) / len(accuracies) - worse
        events.append(
            {
                "event": "val",
                "episode": n,
                "accuracy": {"mean": mean},
                "accuracies": [v - worse for v in accuracies],
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "results.json").write_text(json.dumps({"training": about, "tests": []}))


def run(*argv):
    return benchmark("trials.py", *argv)


def rows(*argv):
    return rows_printed(run(*argv))


def test_what_changed_and_the_paired_difference(tmp_path):
    write_run(
        tmp_path / "a",
        [40.0, 60.0, 50.0, 70.0],
        hyper_parameters={"lr": 1e-3, "bi_init": [-5.0, -4.0]},
    )
    origin = {"checkpoint": "pre-719/meta-learner-last.pth.tar", "episode": 4}
    hyper_parameters = {"lr": 1e-4, "bi_init": [-1.5, -1.0]}
    write_run(
        tmp_path / "b",
        [41.0, 62.0, 51.0, 72.0],
        hyper_parameters=hyper_parameters,
        started_from=origin,
    )
    a, b = rows(tmp_path / "a", tmp_path / "b", "--kept", tmp_path / "b")
    assert (a["change"], a["begins with"], a["against the first"], a["kept"]) == ("", "", "", "")
    assert (a["episodes"], a["minutes"]) == ("200 of 300", "1")
    assert a["validation on 4 episodes, %"].startswith("55.00 ± ")
    assert b["change"] == "`--lr 0.0001`, `--bi-init -1.5 -1`"
    assert (b["begins with"], b["kept"]) == ("pre-719", "yes")
    assert b["against the first"] == "+1.50 ± 0.49"  # the episodes themselves vary by 11


def test_episodes_of_another_seed_are_not_paired(tmp_path):
    write_run(tmp_path / "a", [40.0, 60.0], hyper_parameters={"seed": 719})
    write_run(tmp_path / "b", [40.0, 60.0], hyper_parameters={"seed": 53})
    assert [row["against the first"] for row in rows(tmp_path / "a", tmp_path / "b")] == ["", ""]


def test_runs_validated_on_other_episodes_are_refused(tmp_path):
    write_run(tmp_path / "a", [40.0, 60.0], hyper_parameters={})
    write_run(tmp_path / "b", [40.0, 60.0, 50.0], hyper_parameters={})
    assert f"{tmp_path}/b: validated on 3 episodes" in refused(run(tmp_path / "a", tmp_path / "b"))


def test_a_log_without_each_episode_is_refused(tmp_path):
    write_run(tmp_path / "a", [40.0, 60.0], hyper_parameters={})
    path = tmp_path / "a" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"accuracies"', '"other"'))
    assert f"{path}: " in refused(run(tmp_path / "a"))


def test_a_run_of_this_version(master, tmp_path):
    assert train(master, tmp_path / "logs") == 0
    (row,) = rows(tmp_path / "logs-719")
    assert row["run"] == "logs-719"
